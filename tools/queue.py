"""Runs the queued experiments: `python -m tools queue`.

DVC's queue workers send themselves messages through files. Now and then one reads a message before it is written, and
ends, most often on a busy machine; `dvc exp run --run-all` then waits for ever (treeverse/dvc#10428). Here a worker
that ends is replaced, and none is asked how it is: that would be one more message.
"""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import psutil

from tools.command import command

POLL_SECONDS = 3.0
DONE, REMOVED, FAILED = "done", "removed from the queue", "FAILED"
USELESS = 5  # workers that end one after the other without an experiment in between


@dataclass
class Workers:
    """DVC's queue workers, as processes that outlive this one and end when the queue is empty."""

    root: Path
    log: Path
    started: Iterator[int] = field(default_factory=itertools.count)

    def alive(self) -> int:
        """How many run in this repository, also those that an earlier command has left running."""
        return sum(map(self._is_one, psutil.process_iter()))

    def keep(self, number: int) -> int:
        """Starts workers until so many are running; returns how many were started."""
        missing = max(0, number - self.alive())
        for _ in range(missing):
            self._start()
        return missing

    def _is_one(self, process: psutil.Process) -> bool:
        try:
            return "queue-worker" in process.cmdline() and Path(process.cwd()) == self.root.resolve()
        except psutil.Error:  # it has ended, or is another user's
            return False

    def _start(self) -> None:
        number = next(self.started)
        node = f"queue-{os.getpid()}-{number}@localhost"
        arguments = [sys.executable, "-m", "dvc", "exp", "queue-worker", node, *(["--clean"] if number == 0 else [])]
        with self.log.open("ab") as log:
            subprocess.Popen(
                arguments, cwd=self.root, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )


@command()
@click.option("-j", "--jobs", type=click.IntRange(1, 1000), default=1, help="Experiments at the same time.")
def main(jobs: int) -> None:
    """Runs all queued experiments to their end.

    Queue them with `dvc exp run --queue`. Ctrl-C leaves the workers running: repeat the command to wait for them, or
    end them with `dvc queue stop`. Compares their settings at the end, with earlier runs of these. Exit code 0: all are
    done; 1: some failed; 2: error.
    """
    from dvc.repo import Repo

    root = Path.cwd()
    log = root / ".runs" / "logs" / "queue.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with Repo(str(root)) as repo:
            made, failed = run(repo.experiments.celery_queue, Workers(root, log), jobs, click.echo)
    except KeyboardInterrupt:
        click.echo("\nthe experiments go on in the background: `dvc queue stop` ends the workers after them")
        sys.exit(130)
    if made:
        compared(root, made)
    if failed:
        click.echo(f"{len(failed)} failed: {', '.join(failed)}; `dvc queue logs {failed[0]}` shows what one printed")
        sys.exit(1)


def compared(root: Path, experiments: list[str]) -> None:
    """Prints the comparison of the settings of these experiments, earlier runs of them included."""
    from tools.compare import advice, table
    from tracking.comparison import compare, journal_results, select

    results, _ = journal_results(root)
    try:
        settings = {result.setting for name in experiments for result in select(results, name, root)}
    except ValueError as error:  # one that did not train: DVC had the result
        click.echo(f"not compared: {error}")
        return
    comparisons, _ = compare(result for result in results if result.setting in settings)
    click.echo("\n" + "\n\n".join([*map(table, comparisons), *advice(root, comparisons)]))


def run(queue: Any, workers: Workers, jobs: int, say: Callable[[str], None]) -> tuple[list[str], list[str]]:
    """Runs what is in DVC's queue, with a line for each experiment; returns the names of those done and those failed.

    Raises ValueError if workers end without having run anything.
    """
    queued, active = entries(queue)
    waited_for, made, failed = {**queued, **active}, list[str](), list[str]()
    if not waited_for:
        say("nothing is queued; `dvc exp run --queue -S KEY=VALUE` adds an experiment")
        return made, failed
    say(f"{len(waited_for)} experiments, {jobs} at a time; `dvc queue logs NAME --follow` shows one of them")
    total, useless = len(waited_for), 0
    while waited_for:
        restarted = workers.keep(min(jobs, len(queued) + len(active))) if queued else 0
        time.sleep(POLL_SECONDS)
        queued, active = entries(queue)
        lost = {rev for rev in active if not workers.alive() and is_lost(queue, rev)}
        over = [rev for rev in waited_for if rev not in queued and (rev not in active or rev in lost)]
        for rev in over:
            name, how = outcome(queue, waited_for.pop(rev), rev in lost)
            made += [name] if how == DONE else []
            failed += [name] if how not in (DONE, REMOVED) else []
            say(f"{total - len(waited_for)} of {total}  {name}  {how}")
        useless = 0 if over or active else useless + restarted
        if useless > USELESS * jobs:
            raise ValueError(f"DVC's workers end without having run an experiment; see {workers.log}")
    return made, failed


def entries(queue: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The queued and the active tasks by revision. One that begins meanwhile is in both or in the second."""
    while True:
        try:
            queued = {entry.stash_rev: entry for entry in queue.iter_queued()}
            return queued, {entry.stash_rev: entry for entry in queue.iter_active()}
        except ValueError:  # half a message
            time.sleep(POLL_SECONDS)


def is_lost(queue: Any, rev: str) -> bool:
    """Whether an active task has no process, because it was killed with its worker."""
    process = queue.proc.get(rev)
    return process is None or not psutil.pid_exists(process.pid)


def outcome(queue: Any, entry: Any, lost: bool) -> tuple[str, str]:
    """The name of a task that is over, or of the experiment that it made, and how it ended."""
    name = entry.name or entry.stash_rev[:7]
    if lost:
        return name, f"interrupted: `dvc queue kill {name}`, then queue it again under this name, and it continues"
    try:
        result = queue.get_result(entry)
    except FileNotFoundError:
        result = None
    if result and result.exp_hash and result.ref_info:
        return result.ref_info.name, DONE
    return name, FAILED if entry.stash_rev in {done.entry.stash_rev for done in queue.iter_done()} else REMOVED
