"""A training as a job of a real Slurm cluster: two nodes, one process on each (tests/faults/cluster.py)."""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.cluster import Cluster, missing
from tests.pipeline.clones import Clone, wait_until

pytestmark = [pytest.mark.pipeline, pytest.mark.skipif(bool(missing()), reason=f"no Slurm: {missing()}")]

SHARED = {"train.processes": 2, "train.gradient_accumulation_steps": 2}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path / "slurm") as cluster:
        yield cluster


class Job:
    """`dvc repro train` as a Slurm job. Rank 0 stands still where it has recorded steps 7, 17 and 22, if it is held."""

    def __init__(self, clone: Clone, cluster: Cluster):
        self.clone, self.cluster, self.go = clone, cluster, clone.path.parent / "go"
        self.go.unlink(missing_ok=True)
        at = {"PAUSE_AT": r'"kind":"step","t":\d+,"step":(7|17|22),', "PAUSE_UNTIL": str(self.go)}
        self.process: subprocess.Popen[str] = clone.start(
            "dvc repro train", NANOGPT_LAUNCHER="slurm/submit", **cluster.variables, **at
        )

    def wait_for_step(self, step: int) -> None:
        self._wait_until(lambda: self.clone.attempts() and step in self.clone.steps(), f"step {step}")

    def wait_for_line(self, line: str) -> None:
        """Waits for a line of the job's output."""
        self._wait_until(lambda: line in self.log.read_text(), line)

    def wait_for_requeue(self, restarts: int) -> None:
        """Waits until the job is in Slurm's queue again, and has it start at once."""
        self._wait_until(lambda: self.cluster.waits(self.log.stem, restarts), f"requeue no. {restarts}")
        self.cluster.start_requeued_now()

    @property
    def log(self) -> Path:
        """The newest job's output."""
        return max((self.clone.path / ".runs" / "slurm").glob("*.log"), key=lambda path: int(path.stem))

    def _wait_until(self, condition: Callable[[], object], what: str) -> None:
        def met() -> object:
            assert self.process.poll() is None, f"{self.process.communicate()[0]}\n{self.cluster.log()}"
            return condition()

        wait_until(met, what, self.clone, seconds=120)

    def end(self) -> tuple[int, str]:
        """Waits for the end of DVC; its exit code and what it has printed."""
        output, _ = self.process.communicate(timeout=120)
        return self.process.returncode, output


def test_a_job_ends_with_dvc_and_goes_on_after_preemption_and_the_loss_of_a_node_to_the_same_bits(
    seed: Clone, copy_of: Callable[..., Clone], cluster: Cluster
):
    """The only test that finds a job that outlives its DVC, or a step or a run that a requeue loses or doubles."""
    undisturbed, clone = copy_of(seed, "undisturbed", runs=False, mlflow=False), copy_of(seed, runs=False)
    for each in (undisturbed, clone):
        each.set_params(**SHARED)
    alone = undisturbed.start("dvc repro train")

    job = Job(clone, cluster)
    job.wait_for_step(7)
    os.killpg(job.process.pid, signal.SIGINT)  # Ctrl-C in a terminal
    job.wait_for_line("CANCELLED")
    job.go.touch()
    code, output = job.end()
    assert code != 0
    stopped = re.search(r"stopped at step (\d+) \(SIGTERM\), everything is saved", output)
    assert stopped, output
    assert "exited with 143" in output
    assert cluster.jobs() == []

    job = Job(clone, cluster)
    job.wait_for_step(17)
    cluster.run("sbatch --partition=urgent --nodes=2 --exclusive --output=/dev/null --wrap true")
    job.wait_for_line("CANCELLED")  # preempted
    job.go.touch()
    job.wait_for_line("stopped at step")
    job.go.unlink()
    job.wait_for_requeue(1)
    job.wait_for_step(22)
    cluster.kill_node("node2")  # rank 0 stands still after its last checkpoint
    job.wait_for_requeue(2)
    job.go.touch()
    cluster.start_node("node2")
    code, output = job.end()
    assert code == 0, output
    (preempted,) = re.findall(r"stopped at step (\d+)", output)
    assert re.findall(r"resuming at step (\d+)", output) == [stopped[1], preempted, preempted]

    assert alone.communicate(timeout=120)[1] is None
    assert clone.outs() == undisturbed.outs()
    assert clone.lock() == undisturbed.lock()
    assert clone.steps() == list(range(1, 31))
    assert len(clone.attempts()) == 1
    (run,) = clone.runs()
    assert run.info.status == "FINISHED"
    assert clone.history(run, "train/loss") == list(range(1, 31))
    assert clone.processes() == []
