"""Kills ranks, nodes, the MLflow server and DVC's queue worker at random moments, and checks what is left of it.

In each round one worker of DVC's queue runs an experiment whose stages are jobs of a real Slurm cluster of two nodes,
and record to a real MLflow server. What is killed is started again, as an administrator or the user does it. In the end
the experiment must be the one that an undisturbed training gives, to the bit, with one run that has everything once.
"""

import collections
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import click
import psutil
from ruamel.yaml import YAML

from tests.faults.cluster import NODES, Cluster, missing
from tests.faults.servers import Server, running
from tests.faults.test_tracking import assert_all_is_there_once
from tests.pipeline.clones import Clone, make_fresh

TARGETS = ("rank", "node", "server", "worker")
SECONDS = 20.0  # between kills, at most
LIMIT = 900.0  # seconds of a round
SETTINGS = {"train.max_iters": 400, "train.processes": 2, "train.gradient_accumulation_steps": 2}
NAME = "soaked"  # of the experiment


class Round:
    """A clone whose experiment is in DVC's queue, the cluster on which it runs, and the server to which it records."""

    def __init__(self, clone: Clone, cluster: Cluster, server: Server, rng: random.Random):
        self.clone, self.cluster, self.server, self.rng = clone, cluster, server, rng
        self.variables = {"NANOGPT_LAUNCHER": "slurm/submit", "MLFLOW_TRACKING_URI": server.uri, **cluster.variables}
        self.back: list[tuple[float, Callable[[], None]]] = []  # when to start again what
        self.began, self.queued = time.monotonic(), 0

    def commit(self) -> str | None:
        """The experiment's commit, if DVC has stored it."""
        refs = self.clone.run("git for-each-ref --format='%(objectname) %(refname)' refs/exps").splitlines()
        return next((ref.split()[0] for ref in refs if ref.endswith(f"/{NAME}")), None)

    def tend(self) -> None:
        """Starts again what was killed when its time has come, requeued jobs, and the task when no worker is left."""
        assert time.monotonic() - self.began < LIMIT, f"not finished\n{self.clone.logs()}\n{self.cluster.log()}"
        now = time.monotonic()
        due = [start for when, start in self.back if when <= now]
        self.back = [(when, start) for when, start in self.back if when > now]
        for start in due:
            start()
        self.cluster.start_requeued_now()
        if not list(self._workers()) and not self.commit():
            self.queue()

    def queue(self) -> None:
        """Queues the experiment, again if its worker was killed or its task has failed (docs/troubleshooting.md)."""
        if self.queued:
            self.clone.run(f"dvc queue kill {NAME}", check=None)
            self.clone.run(f"dvc queue remove {NAME}", check=None)
        self.queued += 1
        self.clone.run(f"dvc exp run --queue --force --name {NAME}")
        self.clone.run("dvc queue start >/dev/null 2>&1", **self.variables)  # its worker would keep the pipe open

    def step(self) -> int:
        """The newest step in the journal."""
        return max(self.clone.steps(), default=0) if self.clone.attempts() else 0

    def moment(self) -> Callable[[], bool]:
        """The moment of the next kill, some seconds or some steps from now: whether it has come."""
        if self.rng.random() < 0.4:
            at = time.monotonic() + self.rng.uniform(0, SECONDS)
            return lambda: time.monotonic() > at
        last = SETTINGS["train.max_iters"]
        step = min(self.step() + self.rng.randint(1, last // 4), last)
        return lambda: self.step() >= step

    def strike(self, target: str) -> bool:
        """Kills one of that kind; False if there is none."""
        later = time.monotonic() + self.rng.uniform(0, SECONDS / 2)
        if target == "server":
            self.server.kill()
            self.back.append((later, self.server.start))
        elif target == "node":
            up = [node for node in NODES if self.cluster.is_up(node)]
            if not up:
                return False
            node = self.rng.choice(up)
            self.cluster.kill_node(node)
            self.back.append((later, lambda: self.cluster.start_node(node)))
        else:
            found = list(self._workers() if target == "worker" else self._ranks())
            if not found:
                return False
            with suppress(psutil.NoSuchProcess):
                self.rng.choice(found).kill()
        return True

    def _workers(self) -> Iterator[psutil.Process]:
        return self._with_words("dvc", "queue-worker")

    def _ranks(self) -> Iterator[psutil.Process]:
        for process in self._with_words("-m", "stages.train"):
            with suppress(psutil.Error):
                if "RANK" in process.environ():
                    yield process

    def _with_words(self, *words: str) -> Iterator[psutil.Process]:
        for process in self.clone.processes():
            with suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if all(word in line for word in words):
                    yield process


def disturb(this: Round, kills: int) -> list[str]:
    """Queues the experiment and kills so many times, then waits for its end. Returns what was killed."""
    struck: list[str] = []
    this.queue()
    now = this.moment()
    while not this.commit() or this.back or this.cluster.jobs() or this.clone.processes():
        this.tend()
        if len(struck) < kills and now() and not this.commit():
            target = this.rng.choice(TARGETS)
            if this.strike(target):
                struck.append(target)
                click.echo(f"{len(struck):4} {target}, {this.step()} steps are recorded")
                now = this.moment()
        time.sleep(0.5)
    return struck


def assert_nothing_is_lost_or_doubled(this: Round, reference: Clone) -> None:
    clone, server = this.clone, this.server
    lock = YAML(typ="safe").load(clone.run(f"git show {this.commit()}:dvc.lock"))["stages"]
    assert lock == reference.lock()
    clone.run(f"dvc exp apply {NAME}")
    assert clone.outs() == reference.outs()
    assert [path.name for path in clone.attempts()] == ["attempt-1"], clone.logs()
    for kind in ("step", "eval", "sample"):
        assert [r["step"] for r in clone.records(kind)] == [r["step"] for r in reference.records(kind)], kind
    assert [r["loss"] for r in clone.records("step")] == [r["loss"] for r in reference.records("step")]
    clone.tool("sync", MLFLOW_TRACKING_URI=server.uri)
    assert_all_is_there_once(server, clone, reference, clone.path.name)


@click.command()
@click.option("--kills", "wanted", default=30, show_default=True, help="At least so many.")
@click.option("--seed", default=0, show_default=True, help="Of the random moments.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to work, and what to leave after a failure.")
def main(wanted: int, seed: int, folder: Path | None) -> None:
    """Soaks throw-away clones on a throw-away Slurm cluster, until enough kills struck."""
    if lacking := missing():
        click.echo(f"no kills on a cluster: {lacking}")
        return
    folder = folder or Path(tempfile.mkdtemp(prefix="soak-"))
    reference = make_fresh(folder / "reference")
    reference.set_params(**SETTINGS)
    reference.commit()
    reference.repro()
    reference.commit("The pipeline's result")
    struck: list[str] = []
    rounds, begin = 0, time.monotonic()
    try:
        with Cluster(folder / "slurm") as cluster, running(folder / "server") as server:
            while len(struck) < wanted:
                rounds += 1
                click.echo(f"round {rounds}")
                rng = random.Random(1000 * seed + rounds)
                clone = reference.copy(folder / f"round-{rounds}", runs=False)
                clone.set_params(**{"tracking.experiment": clone.path.name})
                clone.commit()
                clone.forget("train", "evaluate", "sample")
                clone.commit("Untrained")
                this = Round(clone, cluster, server, rng)
                struck += disturb(this, rng.randint(3, 8))
                assert_nothing_is_lost_or_doubled(this, reference)
                shutil.rmtree(clone.path)
    except BaseException as error:
        traceback.print_exc()
        click.echo(f"FAILED in round {rounds} of seed {seed}, left in {folder}: {type(error).__name__}")
        sys.exit(1)
    counts = ", ".join(f"{name} {count}" for name, count in sorted(collections.Counter(struck).items()))
    minutes = (time.monotonic() - begin) / 60
    click.echo(f"{len(struck)} kills in {rounds} rounds, {minutes:.0f} min: nothing lost, nothing doubled ({counts})")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
