"""`python -m tools trial` runs what is missing through DVC, and goes on after a kill."""

import json
import os
import signal

import pytest

from tests.pipeline.clones import Clone, wait_until
from tracking.run import Run

pytestmark = pytest.mark.pipeline

TRIAL = "python -m tools trial --name faster -S train.learning_rate=0.05 --max-seeds 2 --json"


def test_a_trial_that_was_killed_goes_on_with_the_runs_that_it_has(seed: Clone, copy_of):
    """The only test that finds a trial whose own parameters or code are not those of the runs that DVC makes for it."""
    clone = copy_of(seed)
    first = clone.start(f"exec {TRIAL}", WITHOUT_MLFLOW="1")
    wait_until(lambda: [Run(path).status for path in clone.attempts()] == 2 * ["finished"], "the idea's run", clone)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    wait_until(lambda: not clone.processes(), "the end of all processes", clone)

    outcome = json.loads(clone.run(f"{TRIAL} 2>stderr.txt", check=3, WITHOUT_MLFLOW="1"))
    assert outcome["decision"] == "undecided"
    assert [pair["seed"] for pair in outcome["pairs"]] == [1337, 1338]
    assert all(pair["idea_model"] != pair["baseline_model"] for pair in outcome["pairs"])
    assert len(clone.attempts()) == 4  # seed 1337 of the baseline was there
    assert clone.read("experiments/ledger.md").count("| faster | learning_rate=0.05 | params.yaml | 2 |") == 1
    assert sorted(clone.run("dvc exp list --name-only").split()) == [
        "faster-1337",
        "faster-1338",
        "faster-baseline-1338",
    ]
