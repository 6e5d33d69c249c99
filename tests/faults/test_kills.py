"""A short soak: some random kills, the same ones each time. `make soak` does a hundred and more."""

import json
import random

import pytest

from tests.faults import kills
from tests.pipeline.clones import TINY, Clone

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def seconds(seed: Clone, once) -> dict[str, float]:
    """What each stage takes, measured once, whatever the number of workers."""

    def make(path):
        clone = kills.fresh_clone(seed, path)
        clone.write("seconds.json", json.dumps(kills.durations(clone)))

    return json.loads(once("timed", make).read("seconds.json"))


@pytest.mark.parametrize("number", [1, 2])
def test_nothing_is_left_of_random_kills(seed: Clone, seconds: dict[str, float], number: int, copy_of, tmp_path):
    clone = kills.fresh_clone(seed, tmp_path / "clone")
    try:
        struck = kills.disturb(clone, random.Random(number), seconds, 6, print)
        assert len(struck) >= 3
        kills.assert_nothing_is_left(clone, seed, TINY["runtime.checkpoint_interval"])
    finally:
        clone.end_processes()
