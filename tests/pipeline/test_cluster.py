"""Stages as jobs of a real Slurm cluster of two nodes (tests/faults/cluster.py)."""

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.faults.cluster import Cluster, missing
from tests.pipeline.clones import Clone, wait_until

pytestmark = [pytest.mark.pipeline, pytest.mark.skipif(bool(missing()), reason=f"no Slurm: {missing()}")]

SHARED = {"train.processes": 2, "train.gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster") / "slurm") as cluster:
        yield cluster


class Job:
    """A command that waits for a Slurm job."""

    def __init__(self, clone: Clone, cluster: Cluster, command: str, **variables: str):
        self.clone, self.cluster = clone, cluster
        self.process = clone.start(command, **cluster.variables, **variables)

    @property
    def log(self) -> Path:
        """The newest job's output."""
        logs = (self.clone.path / ".runs" / "slurm").glob("*.log")
        return max(logs, key=lambda path: int(path.stem), default=Path(os.devnull))

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        def met() -> object:
            assert self.process.poll() is None, f"{self.process.communicate()[0]}\n{self.cluster.log()}"
            return condition()

        wait_until(met, what, self.clone, seconds=120)

    def wait_for_line(self, line: str) -> None:
        """Waits for a line of the job's output."""
        self.wait_for(lambda: line in self.log.read_text(), line)

    def wait_for_requeue(self, restarts: int) -> None:
        """Waits until the job is in Slurm's queue again."""
        self.wait_for(lambda: self.cluster.waits(self.log.stem, restarts), f"requeue no. {restarts}")

    def start_again(self, restarts: int) -> None:
        """Has the requeued job start at once."""
        started = lambda: self.cluster.start_requeued_now() or not self.cluster.waits(self.log.stem, restarts)  # noqa: E731
        self.wait_for(started, f"start after requeue no. {restarts}")

    def end(self, ctrl_c: bool = False) -> tuple[int, str]:
        """Waits for the end of the command; its exit code and what it has printed."""
        if ctrl_c:
            os.killpg(self.process.pid, signal.SIGINT)
        output, _ = self.process.communicate(timeout=120)
        wait_until(lambda: not self.cluster.jobs(), "the end of all jobs", self.clone)
        return self.process.returncode, output


def test_a_training_goes_on_after_the_loss_of_a_node_and_after_preemption_to_the_same_bits(
    seed: Clone, copy_of: Callable[..., Clone], cluster: Cluster
):
    """The only test that finds a step, a run or bits that a requeued job loses or doubles."""
    undisturbed, clone = copy_of(seed, "undisturbed", runs=False, mlflow=False), copy_of(seed, runs=False)
    for each in (undisturbed, clone):
        each.set_params(**SHARED)
    alone = undisturbed.start("dvc repro train")

    go = clone.path.parent / "go"  # rank 0 stands still where it has recorded step 7
    at = {"PAUSE_AT": r'"kind":"step","t":\d+,"step":7,', "PAUSE_UNTIL": str(go)}
    job = Job(clone, cluster, "dvc repro train", NANOGPT_LAUNCHER="slurm/submit", **at)
    job.wait_for(lambda: clone.attempts() and 7 in clone.steps(), "step 7")
    cluster.kill_node("node2")
    job.wait_for_requeue(1)
    job.log.write_text("")
    cluster.start_node("node2")
    job.start_again(1)
    job.wait_for_line("resuming at step 5")
    cluster.run("sbatch --partition=urgent --nodes=2 --exclusive --output=/dev/null --wrap true")
    job.wait_for_line("CANCELLED")  # preempted
    go.touch()
    job.wait_for_line("stopped at step")
    job.wait_for_requeue(2)
    stopped = re.search(r"stopped at step (\d+) \(SIGTERM\), everything is saved", job.log.read_text())
    assert stopped
    assert int(stopped[1]) < 30
    code, output = job.end(ctrl_c=True)  # and not two minutes later, when the job would start again
    assert code != 0
    assert "exited with 143" in output

    code, output = Job(clone, cluster, "dvc repro train", NANOGPT_LAUNCHER="slurm/submit").end()
    assert code == 0, output
    assert f"train: resuming at step {stopped[1]} of 30" in output
    assert alone.communicate(timeout=120)[1] is None
    assert clone.outs() == undisturbed.outs()
    assert clone.lock() == undisturbed.lock()
    assert clone.steps() == list(range(1, 31))
    assert len(clone.attempts()) == 1
    (run,) = clone.runs()
    assert run.info.status == "FINISHED"
    assert clone.history(run, "train/loss") == list(range(1, 31))
    assert clone.processes() == []


# --- slurm/submit and slurm/stage.sbatch, with a stage that is over in no time ----------------------------------------

STAGE = """
import os, signal, time
from pathlib import Path
rank, again = os.environ["RANK"], Path(f"begun-{os.environ['RANK']}").exists()
print("rank", rank, "of", os.environ["WORLD_SIZE"], flush=True)
Path(f"begun-{rank}").touch()
"""


@pytest.fixture
def stage(tmp_path: Path) -> Callable[[str], Clone]:
    """`stage(code)`: a folder in which the train stage is that code, which knows `rank`, and `again` if it was run."""

    def make(code: str) -> Clone:
        shutil.copytree(REPOSITORY / "slurm", tmp_path / "slurm")
        (tmp_path / "stages").mkdir()
        (tmp_path / "stages/train.py").write_text(STAGE + code)
        return Clone(tmp_path)

    return make


def test_a_signal_ends_the_job_for_good(stage, cluster):
    job = Job(stage("time.sleep(60)"), cluster, "exec slurm/submit train")
    job.wait_for_line("rank 1 of 2")
    job.process.send_signal(signal.SIGTERM)
    code, output = job.end()
    assert (code, output.count("rank 0")) == (143, 1)


def test_an_error_is_final(stage, cluster):
    code, output = Job(stage("raise SystemExit(int(rank))"), cluster, "exec slurm/submit train").end()
    assert (code, output.count("rank 0")) == (1, 1)


def test_the_loss_of_a_process_is_not(stage, cluster):
    job = Job(stage("again or rank == '0' or os.kill(os.getpid(), 9)"), cluster, "exec slurm/submit train")
    job.wait_for_requeue(1)
    job.start_again(1)
    code, output = job.end()
    assert (code, output.count("rank 0"), output.count("rank 1")) == (0, 2, 2)


def test_a_stage_that_no_processes_share_is_one_task_and_options_go_to_sbatch(stage, cluster):
    clone = stage("")
    (clone.path / "stages/train.py").rename(clone.path / "stages/sample.py")
    code, output = Job(clone, cluster, "exec slurm/submit --nodes=2 --job-name=mine sample").end()
    assert code == 0
    assert output.splitlines()[1:] == ["rank 0 of 1"]
