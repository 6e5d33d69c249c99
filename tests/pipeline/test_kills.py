"""Whatever ends a training, the next `dvc repro` goes on with it: the same bits, one MLflow run, every step once."""

import os
import re
import signal
from pathlib import Path

import pytest

from tests.pipeline.clones import Clone, wait_until
from tracking.lock import holder

pytestmark = pytest.mark.pipeline


class PausedTraining:
    """`dvc repro` whose trainer stands still, in the writing of a record to the journal (hooks/sitecustomize.py)."""

    def __init__(self, clone: Clone, kind: str, step: int, command: str = "dvc repro"):
        self.clone, self.go = clone, clone.path.parent / f"go-{kind}-{step}"
        at = rf'"kind":"{kind}","t":\d+,"step":{step},' if kind != "end" else '"kind":"end"'
        self.process = clone.start(command, PAUSE_AT=at, PAUSE_UNTIL=str(self.go))
        self.attempt = wait_until(self._paused_attempt(kind, step), f"{kind} record of step {step}", clone)
        self.trainer = holder(self.attempt.parent / "lock")

    def _paused_attempt(self, kind: str, step: int):
        def find() -> Path | None:
            assert self.process.poll() is None, f"it has ended\n{self.process.communicate()[0]}\n{self.clone.logs()}"
            newest = self.clone.attempts()[-1:]
            return newest[0] if newest and any(r["step"] == step for r in self.clone.records(kind)) else None

        return find

    def let_go(self) -> None:
        self.go.touch()

    def output(self) -> str:
        """Waits for the end of the command, which must have failed, and of every process."""
        output, _ = self.process.communicate(timeout=300)
        assert self.process.returncode != 0, output
        wait_until(lambda: self.clone.processes() == [], "the end of all processes", self.clone)
        return output


@pytest.fixture
def untrained(seed: Clone, copy_of) -> Clone:
    """The seed before its training: data, but neither model nor run."""
    clone = copy_of(seed, runs=False)
    clone.forget("train")
    return clone


def assert_as_undisturbed(clone: Clone, seed: Clone, runs: int = 1) -> None:
    assert clone.lock() == seed.lock()
    assert clone.outs() == seed.outs()
    assert clone.leftovers() == []
    assert clone.processes() == []
    assert clone.end()["status"] == "FINISHED"
    for kind in ("step", "eval", "sample"):
        assert [r["step"] for r in clone.records(kind)] == [r["step"] for r in seed.records(kind)]
    assert clone.records("diverged") == []
    found = clone.runs()
    assert [run.info.status for run in found] == ["FINISHED"] * runs
    (reference,) = seed.runs()
    for key in ("train/loss", "grad_norm", "learning_rate", "eval/val_loss", "tokens", "eval/best_val_loss"):
        assert clone.history(found[-1], key) == seed.history(reference, key), key
    for key in ("memory_mb", "tokens_per_second"):
        assert clone.history(found[-1], key) == sorted(set(clone.history(found[-1], key))), key


def test_a_training_goes_on_after_whatever_ended_it(seed, untrained):
    """The only test that finds a run that one of these ends leaves other than undisturbed: in a step, point or status.

    Ctrl-C and SIGTERM, which save; the death of dvc, which its orphan sees and saves; and SIGKILL, which saves nothing.
    """
    first = PausedTraining(untrained, "step", 7)
    os.killpg(first.process.pid, signal.SIGINT)  # Ctrl-C in a terminal reaches dvc and the trainer
    first.let_go()
    output = first.output()
    stopped = re.search(r"stopped at step (\d+) \(Ctrl-C\), everything is saved; `dvc repro` resumes it", output)
    assert stopped, output
    assert "Traceback" not in output
    assert untrained.steps() == list(range(1, int(stopped[1]) + 1))
    assert [run.info.status for run in untrained.runs()] == ["KILLED"]

    second = PausedTraining(untrained, "step", 12)
    os.kill(second.trainer, signal.SIGTERM)
    second.let_go()
    assert re.search(r"stopped at step \d+ \(SIGTERM\), everything is saved", second.output())
    assert [run.info.status for run in untrained.runs()] == ["KILLED"]

    third = PausedTraining(untrained, "step", 17)
    os.kill(third.process.pid, signal.SIGKILL)
    third.process.wait()
    log = untrained.path / ".runs/logs/workspace/train.log"
    wait_until(lambda: "warning: dvc is gone" in log.read_text(), "the warning", untrained)
    third.let_go()
    wait_until(lambda: untrained.processes() == [], "the end of the orphan", untrained)
    assert re.search(r"stopped at step \d+ \(SIGTERM\), everything is saved", log.read_text())
    assert [run.info.status for run in untrained.runs()] == ["KILLED"]

    fourth = PausedTraining(untrained, "speed", 25)  # the journal holds more steps than the newest checkpoint
    os.kill(fourth.trainer, signal.SIGKILL)
    assert "exited with -9" in fourth.output()
    assert untrained.steps() == list(range(1, 26))
    assert [run.info.status for run in untrained.runs()] == ["KILLED"]

    newest = untrained.checkpoints().steps()[-1]
    assert 17 < newest < 25
    assert f"resuming at step {newest} of 30" in untrained.repro()
    assert_as_undisturbed(untrained, seed)


def test_a_training_that_was_done_when_it_was_killed_is_published_without_training(seed, untrained):
    """The only test that finds a finished training that is lost, or done once more, with the process that did it."""
    training = PausedTraining(untrained, "end", 30)
    os.kill(training.trainer, signal.SIGKILL)
    training.output()
    assert not (untrained.path / "model").exists()

    assert "this training is finished already" in untrained.repro()
    assert_as_undisturbed(untrained, seed)

    untrained.forget("train")  # as if dvc had been killed before it wrote dvc.lock
    assert "this training is finished already" in untrained.repro()
    assert_as_undisturbed(untrained, seed)


def test_forced_repro_trains_afresh_as_a_run_of_its_own_and_keeps_the_uncommitted_diff(seed, copy_of):
    """The only test that finds a forced training that writes into the run of the first one."""
    clone = copy_of(seed)
    clone.append("presets/overfit.txt", "An uncommitted line.\n")
    clone.append("LICENSE", "A line of no experiment.\n")
    output = clone.repro("--force --single-item train")
    assert "training it afresh" in output
    assert [attempt.name for attempt in clone.attempts()] == ["attempt-1", "attempt-2"]
    assert clone.steps(0) == clone.steps(1)
    assert_as_undisturbed(clone, seed, runs=2)

    run = clone.runs()[-1]
    assert run.data.tags["git.dirty"] == "true"
    base = clone.run("git rev-parse --short=7 HEAD~1").strip()  # HEAD has changed dvc.lock alone
    assert run.info.run_name == f"{base} + uncommitted seed=1337 attempt=2"
    diff = clone.client().download_artifacts(run.info.run_id, "uncommitted.diff")
    assert "+An uncommitted line." in Path(diff).read_text()
    assert "A line of no experiment." not in Path(diff).read_text()
    assert run.data.tags["git.left_out"] == "LICENSE"


def test_two_trainers_never_work_in_one_run_directory(seed, untrained):
    """The only test that finds two commands that train the same at once, or one that does not wait for the other."""
    first = PausedTraining(untrained, "step", 12, "python -m stages.train")
    second = untrained.start("python -m stages.train")
    log = untrained.path / ".runs/logs/workspace/train.log"
    wait_until(lambda: "runs the same training; waiting for its result" in log.read_text(), "the wait", untrained)
    assert untrained.steps()[-1] < 30
    first.let_go()
    for process in (first.process, second):
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    assert "this training is finished already" in output
    wait_until(lambda: untrained.processes() == [], "the end of all processes", untrained)
    assert untrained.outs() == seed.outs()
    assert len(untrained.attempts()) == len(untrained.runs()) == 1
