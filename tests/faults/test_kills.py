"""A short soak: some random kills, the same ones each time. `make soak` does a hundred and more."""

import random

import pytest

from tests.faults import kills
from tests.pipeline.clones import TINY, Clone

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def seconds(seed: Clone, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return kills.durations(kills.fresh_clone(seed, tmp_path_factory.mktemp("timed") / "clone"))


@pytest.mark.parametrize("number", [1, 2])
def test_nothing_is_left_of_random_kills(seed: Clone, seconds: dict[str, float], number: int, copy_of, tmp_path):
    clone = kills.fresh_clone(seed, tmp_path / "clone")
    try:
        struck = kills.disturb(clone, random.Random(number), seconds, 6, print)
        assert len(struck) >= 3
        kills.assert_nothing_is_left(clone, seed, TINY["runtime.checkpoint_interval"])
    finally:
        clone.end_processes()
