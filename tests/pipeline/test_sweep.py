"""`python -m tools sweep` runs trials through DVC, pauses and continues them, and goes on after a kill."""

import json
import os
import re
import signal

import pytest

from tests.conftest import REPOSITORY
from tests.pipeline.clones import Clone, wait_until
from tracking.run import Run

pytestmark = pytest.mark.pipeline

SWEEP = "python -m tools sweep lr.yaml --budget '3 trials' --confirm 0 --json"


def test_a_sweep_that_was_killed_goes_on_with_the_trainings_that_it_has(seed: Clone, copy_of):
    """The only test that finds a pause that the train stage ignores, or a training that begins again after it."""
    clone = copy_of(seed, runs=False)  # so params.yaml's own result is in DVC's cache, and has no run
    (space,) = re.findall(r"```yaml\n(.*?)```", (REPOSITORY / "docs/sweeps.md").read_text(), re.DOTALL)
    clone.write("lr.yaml", space)
    first = clone.start(f"exec {SWEEP}", WITHOUT_MLFLOW="1")
    wait_until(lambda: [Run(path).status for path in clone.attempts()][1:] == ["killed"], "the first pause", clone)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    wait_until(lambda: not clone.processes(), "the end of all processes", clone)

    found = json.loads(clone.run(f"{SWEEP} 2>stderr.txt", check=None, WITHOUT_MLFLOW="1"))
    assert found["rungs"] == [10, 30]
    assert [list(trial["losses"]) for trial in found["trials"]].count(["10"]) == 1
    assert len(clone.attempts()) == 3
    promoted = next(trial["number"] for trial in found["trials"][1:] if "30" in trial["losses"])
    assert clone.steps(promoted) == list(range(1, 31))
    assert [start["step"] for start in clone.records("start", promoted)] == [0, 10]
    assert sorted(clone.run("dvc exp list --name-only").split()) == ["lr-0", f"lr-{promoted}"]
    clone.run(f"dvc exp apply lr-{promoted}")
    assert f"muon_learning_rate: {found['trials'][promoted]['values']['train.muon_learning_rate']}" in clone.read(
        "params.yaml"
    )
