"""Kills the real pipeline at random moments, starts it again, and sees whether anything is left of that in the end.

A round begins with a fresh clone: a committed dvc.lock, no outs, no cache, no runs. `dvc repro` is started and killed
some times, then left to itself; what it leaves must be what an undisturbed run leaves.
"""

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from tests.pipeline.clones import Clone, wait_until
from tests.pipeline.test_kills import assert_as_undisturbed
from tracking.journal import read_records

SECONDS = {"download": 0.5, "tokenize": 0.5, "train": 5.0, "evaluate": 3.0, "sample": 3.0}  # of a stage, roughly
STAGES = tuple(SECONDS)
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TARGETS = ("stage", "dvc", "group")
# Places in a process (see hooks/sitecustomize.py) where a kill falls between two steps that belong together.
WRITING = {"event": "os.rename", "path": r"(data/|/?model|metrics/|plots/|samples|step-\d+|models/|run\.json|reports/)"}
CACHING = {"event": "os.rename", "path": r"\.dvc/cache/files/"}
LOCKING = {"event": "open", "path": r"(^|/)dvc\.lock$", "writing": True}


@dataclass(frozen=True)
class Kill:
    """One kill: in which stage, of whom, by what, and when."""

    stage: str
    target: str
    signal: signal.Signals
    moment: str  # "running" | "writing" (an out or a checkpoint) | "caching" | "locking" | "lock cut" (dvc.lock)
    after: float  # running: seconds after the stage began
    count: int = 1  # else: at which such place

    def __str__(self) -> str:
        when = f"after {self.after:.2f} s" if self.moment == "running" else f"{self.moment} no. {self.count}"
        return f"{self.signal.name} to {self.target} in {self.stage}, {when}"


def draw(rng: random.Random, stage: str) -> Kill:
    """A random kill in a stage."""
    number, target, after = rng.choice(SIGNALS), rng.choice(TARGETS), rng.uniform(0, SECONDS[stage])
    moment = rng.choice(["running"] * 4 + ["writing"] * 4 + ["caching", "locking", "lock cut"])
    if moment == "running":
        return Kill(stage, target, number, moment, after)
    if moment == "writing":
        return Kill(stage, target, number, moment, after, rng.randint(1, 12 if stage == "train" else 1))
    return Kill(stage, "dvc", signal.SIGKILL, moment, after, rng.randint(1, 3) if moment == "caching" else 1)


class Repro:
    """A running `dvc repro`, killed as one kill says."""

    def __init__(self, clone: Clone, kill: Kill | None):
        self.clone, self.kill, self.killed = clone, kill, False
        self.began: dict[str, float] = {}
        self.lines: list[str] = []
        self.mark = clone.path.parent / f"killed-{time.monotonic_ns()}"
        fault = self._fault()
        variables = {"FAULT": json.dumps(fault)} if fault else {}
        self.process = clone.start("dvc repro", **variables)
        self._timer: threading.Timer | None = None
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _fault(self) -> dict[str, object] | None:
        kill = self.kill
        if kill is None or kill.moment == "running":
            return None
        common = {"count": kill.count, "signal": int(kill.signal), "mark": str(self.mark)}
        if kill.moment == "writing":
            target = {"stage": "self", "dvc": "parent", "group": "group"}[kill.target]
            return {"in": f"stages.{kill.stage}", "target": target, **WRITING, **common}
        place = CACHING if kill.moment == "caching" else {**LOCKING, "cut": kill.moment == "lock cut"}
        # DVC is to be killed after that very stage: its outs come into the cache, and then into dvc.lock.
        return {"in": "dvc repro", "target": "self", "stage": kill.stage, **place, **common}

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            begun = re.match(r"Running stage '(\w+)'", line)
            if begun:
                self.began[begun[1]] = time.monotonic()
                kill = self.kill
                if kill and STAGES.index(begun[1]) > STAGES.index(kill.stage) and not self.mark.exists():
                    # The place was never reached (DVC does not write a dvc.lock that stays as it is).
                    kill = self.kill = dataclasses.replace(kill, stage=begun[1], moment="running")
                if kill and kill.moment == "running" and kill.stage == begun[1]:
                    self._timer = threading.Timer(kill.after, self._strike)
                    self._timer.start()

    def _strike(self) -> None:
        kill = self.kill
        assert kill is not None
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if kill.target == "group":
                os.killpg(self.process.pid, kill.signal)
            elif kill.target == "dvc":
                os.kill(self.process.pid, kill.signal)
            else:
                children = psutil.Process(self.process.pid).children()
                stages = [child for child in children if f"stages.{kill.stage}" in " ".join(child.cmdline())]
                if not stages:
                    return
                os.kill(stages[0].pid, kill.signal)
            self.killed = True

    def wait(self) -> str:
        """Until DVC has ended; its output. A stage that outlives it may still be running."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(300)
        assert self.process.poll() is not None, f"dvc repro hangs after {self.kill}\n{self.clone.logs()}"
        if self._timer:
            self._timer.cancel()
        self._reader.join(60)
        self.killed |= self.mark.exists()
        return "".join(self.lines)


def fresh_clone(seed: Clone, path: Path) -> Clone:
    """What `git clone` gives: the seed's commit with its dvc.lock, without outs, cache and runs."""
    clone = seed.copy(path, runs=False)
    for name in ("data", "model", "metrics", "plots", "samples", ".dvc/cache", ".dvc/tmp"):
        shutil.rmtree(path / name, ignore_errors=True)
    return clone


def disturb(clone: Clone, rng: random.Random, kills: int, say: Callable[[str], None]) -> list[Kill]:
    """Starts `dvc repro` and kills it, again and again; at last once undisturbed. Returns the kills that struck."""
    struck: list[Kill] = []
    done = rng.choice([-1, STAGES.index("train") - 1])  # the last stage that dvc.lock is known to hold
    if done > 0:
        clone.repro(STAGES[done])
    for _ in range(3 * kills):
        if len(struck) == kills or done == len(STAGES) - 1:
            break
        following = min(done + 1 + rng.choice([0, 0, 0, 1]), len(STAGES) - 1)
        kill = draw(rng, STAGES[following])
        repro = Repro(clone, kill)
        output = repro.wait()
        if repro.killed:
            assert repro.kill is not None
            struck.append(repro.kill)
            say(f"{len(struck):4} {repro.kill}")
        done = max([done, *(STAGES.index(stage) - 1 for stage in repro.began)])
        if repro.process.returncode == 0:
            done = len(STAGES) - 1
        elif not repro.killed:
            raise AssertionError(f"dvc repro failed without a kill ({kill})\n{output}\n{clone.logs()}")
        if rng.random() < 0.7:  # otherwise the next one is started while a process may still live
            wait_until(lambda: not clone.processes(), "the end of all processes", clone)
        restore_dvc(clone, say)
    final = Repro(clone, None)
    output = final.wait()
    assert final.process.returncode == 0, f"the undisturbed repro failed\n{output}\n{clone.logs()}"
    wait_until(lambda: not clone.processes(), "the end of all processes", clone)
    return struck


def restore_dvc(clone: Clone, say: Callable[[str], None]) -> None:
    """What the user does when DVC was killed while it wrote one of its two files that it writes in place."""
    try:
        whole = isinstance(YAML(typ="safe").load(clone.read("dvc.lock"))["stages"], dict)
    except (OSError, YAMLError, KeyError, TypeError):
        whole = False
    if not whole:
        say("     git checkout dvc.lock")
        clone.run("git checkout --quiet dvc.lock")
    try:
        json.loads(clone.read(".dvc/tmp/rwlock"))
    except FileNotFoundError:
        pass
    except ValueError:
        say("     rm .dvc/tmp/rwlock")
        clone.run("rm .dvc/tmp/rwlock")


def assert_nothing_is_left(clone: Clone, seed: Clone, checkpoint_interval: int) -> None:
    """The clone is as if it had never been disturbed, and no kill cost more than one checkpoint interval."""
    assert_as_undisturbed(clone, seed)
    assert clone.read("dvc.lock") == seed.read("dvc.lock")
    assert clone.run("git status --porcelain") == ""
    assert [path.name for path in clone.attempts()] == ["attempt-1"], clone.logs()
    newest = 0
    for record, _ in read_records(clone.attempts()[0] / "journal.jsonl"):
        if record["kind"] == "start":
            assert newest - record["step"] <= checkpoint_interval, f"lost steps {record['step']} to {newest}"
        newest = max(newest, record["step"]) if record["kind"] == "step" else newest
    (run,), (reference,) = clone.runs(), seed.runs()
    assert run.data.params == reference.data.params
    assert run.data.metrics.keys() - {"mfu"} == reference.data.metrics.keys() - {"mfu"}
    assert clone.history(run, "val_loss") == seed.history(reference, "val_loss")
    assert clone.scores().items() <= run.data.metrics.items()
