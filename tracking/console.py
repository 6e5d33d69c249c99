"""What a stage prints: lines, progress, errors. A copy of each line goes to .runs/logs/<experiment>/<stage>.log."""

import functools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tracking.dvc_files import dvc_process
from tracking.errors import errors_in_one_line, warn
from tracking.launch import launcher, rank, run_elsewhere, world_size
from tracking.stop import end_with

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Update = Callable[..., None]
Item = TypeVar("Item")


def repository() -> Path:
    """The original repository; not the working directory under `dvc exp run --temp` and in the queue."""
    return Path(os.environ.get("DVC_ROOT", ".")).resolve()


class Console:
    """Prints lines and progress, and copies every line to the stage's log. In a distributed training, only rank 0."""

    def __init__(self, name: str):
        self.name, self.silent = name, rank() > 0
        self._bar: Progress | None = None
        self.log = repository() / ".runs" / "logs" / os.environ.get("DVC_EXP_NAME", "workspace") / f"{name}.log"
        if not self.silent:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self.log.write_bytes(b"")

    def say(self, line: str) -> None:
        if not self.silent:
            with self._above_the_bar():
                click.echo(f"{self.name}: {line}")
            self.record(line)

    def warn(self, line: str) -> None:
        if not self.silent:
            with self._above_the_bar():
                warn(self.name, line)
            self.record(f"warning: {line}")

    @contextmanager
    def _above_the_bar(self) -> Iterator[None]:
        """Hides the progress bar while a line is printed, on stdout or stderr, and shows it again below."""
        if self._bar:
            self._bar.stop()
        yield
        if self._bar:
            self._bar.start()

    def record(self, line: str) -> None:
        """Writes a line to the log alone. A full disk is ignored here: the screen shows what matters."""
        with suppress(OSError), self.log.open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    @contextmanager
    def progress(self, what: str, total: int | None, done: int = 0) -> Iterator[Update]:
        """Yields `update(done, **fields)`: a bar on a terminal, elsewhere a plain line every five seconds."""
        if self.silent:
            yield lambda done, **fields: None
        elif sys.stderr.isatty():
            with _bar(what, total) as self._bar:
                task = self._bar.add_task(what, total=total, completed=done, text="")
                try:
                    yield partial(_update, self._bar, task)
                finally:
                    self._bar = None
        else:
            yield self._progress_lines(what, total)

    def _progress_lines(self, what: str, total: int | None) -> Update:
        last, of = time.monotonic(), f" of {total:,}" if total else ""

        def update(done: int, **fields: str) -> None:
            nonlocal last
            if time.monotonic() - last >= 5:
                last = time.monotonic()
                self.say(", ".join([f"{what} {done:,}{of}", *(f"{name} {value}" for name, value in fields.items())]))

        return update


def counting(items: Iterable[Item], update: Update) -> Iterator[Item]:
    """Yields the items; `update` shows how many have been processed."""
    done = 0
    for item in items:
        update(done)
        yield item
        done += 1
    update(done)


def _bar(what: str, total: int | None) -> "Progress":
    """A progress bar of one line: the bar takes the width that the text leaves."""
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeRemainingColumn

    text = TextColumn("{task.fields[text]}")
    columns: list[ProgressColumn] = [SpinnerColumn("line"), TextColumn(what + " {task.completed:,}"), text]
    if total:
        count = TextColumn("{task.completed:,}/{task.total:,}")
        columns = [TextColumn(what), BarColumn(bar_width=None), count, text, TimeRemainingColumn()]
    terminal = RichConsole(stderr=True)
    return Progress(*columns, console=terminal, transient=True, expand=bool(total), redirect_stdout=False)


def _update(bar: "Progress", task: "TaskID", done: int, **fields: str) -> None:
    bar.update(task, completed=done, text="  ".join(f"{name} {value}" for name, value in fields.items()))


def command(name: str) -> Callable[[Callable[..., None]], click.Command]:
    """Makes `function(console, **options)` the click command of a stage, which ends with DVC and reports its errors."""

    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def run(**arguments: Any) -> None:
            try:
                console = Console(name)
            except OSError as error:
                raise click.ClickException(f"{name}: the log cannot be written ({error}); check the disk") from error
            if world_size() is not None:  # torchrun or Slurm is the parent, and not DVC
                end_with(os.getppid(), "the process that launched it", console.warn)
            elif (dvc := dvc_process()) is not None:
                end_with(dvc, "dvc", console.warn)
            with errors_in_one_line(name, console.warn, console.record):
                if (elsewhere := launcher(name)) is not None:
                    sys.exit(run_elsewhere(elsewhere))
                function(console, **arguments)

        return click.command(name)(run)

    return decorate
