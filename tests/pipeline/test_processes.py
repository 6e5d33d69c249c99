"""A training whose steps two processes share, as DVC runs it."""

import os
import re
import signal

import psutil
import pytest

from tests.pipeline.test_kills import PausedTraining

pytestmark = pytest.mark.pipeline


def test_two_processes_are_one_run_which_goes_on_after_one_of_them_was_told_to_end(seed, copy_of):
    """The only test that finds a launcher that DVC, or MLflow's process, takes for something else than the trainer."""
    clone = copy_of(seed, runs=False)
    clone.set_params(**{"train.processes": 2, "train.gradient_accumulation_steps": 2})
    paused = PausedTraining(clone, "step", 12, "dvc repro train")  # the first process: it alone writes
    launcher = psutil.Process(paused.trainer).parent()
    assert launcher.ppid() == paused.process.pid  # the stage, DVC's child
    (other,) = [process.pid for process in launcher.children() if process.pid != paused.trainer and _trains(process)]
    os.kill(other, signal.SIGTERM)
    paused.let_go()
    output = paused.output()
    assert re.search(r"stopped at step \d+ \(SIGTERM\), everything is saved", output)
    assert "exited with 143" in output
    assert "Traceback" not in output

    output = clone.repro("train")
    assert "resuming at step" in output
    assert output.count("train: step 30: val loss") == 1
    assert clone.processes() == []
    assert clone.steps() == list(range(1, 31))
    (run,) = clone.runs()
    assert run.info.status == "FINISHED"
    assert run.data.params["train.processes"] == "2"
    assert clone.history(run, "train/loss") == list(range(1, 31))
    assert clone.repro("train").count("didn't change") == 3


def _trains(process: psutil.Process) -> bool:
    return "stages.train" in process.cmdline()
