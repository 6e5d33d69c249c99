"""A short soak: some random kills, the same ones each time. `make soak` does a hundred and more."""

import random

import pytest

from tests.faults import kills
from tests.pipeline.clones import TINY, Clone

pytestmark = pytest.mark.pipeline


def test_nothing_is_left_of_random_kills(seed: Clone, tmp_path):
    """The only test that finds half-written files of ours, or of DVC's, that stop a later `dvc repro` or change it."""
    clone = kills.fresh_clone(seed, tmp_path / "clone")
    try:
        struck = kills.disturb(clone, random.Random(1), 6, print)
        assert len(struck) >= 3
        kills.assert_nothing_is_left(clone, seed, TINY["runtime.checkpoint_interval"])
    finally:
        clone.end_processes()
