"""What a stage has imported when its own work begins. Times are benchmarks/startup.py's."""

import shlex

import pytest

from benchmarks.startup import HEAVY, START
from tests.pipeline.clones import Clone

pytestmark = pytest.mark.pipeline


@pytest.mark.parametrize(
    ("stage", "needed"),
    [("download", set()), ("tokenize", set()), ("train", {"torch"}), ("evaluate", {"torch"}), ("sample", {"torch"})],
)
def test_a_stage_begins_with_no_more_than_it_needs(seed: Clone, tmp_path, stage: str, needed: set[str]) -> None:
    before = seed.outs()
    command = f"python -c {shlex.quote(START)} stages.{stage} {' '.join(HEAVY)}"
    output = seed.run(command, DVC_ROOT=str(tmp_path))  # where its log and its run directory go
    word, _, *found = output.splitlines()[-1].split()
    assert word == "modules"
    assert set(found) == needed
    assert seed.outs() == before
