"""What a stage says: lines, progress, errors in one line. All of it is also in .runs/logs/<experiment>/<stage>.log."""

import functools
import inspect
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
from tracking.launch import rank, started
from tracking.stop import end_with

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Update = Callable[..., None]
Item = TypeVar("Item")


def repository() -> Path:
    """The original repository; under `dvc exp run --temp` and in the queue, not the working directory."""
    return Path(os.environ.get("DVC_ROOT", ".")).resolve()


class Console:
    """Prints lines and progress, and keeps a copy of every line in the stage's log.

    Of the processes that share a training's steps the first one does; the others say nothing but what ends them.
    """

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
        """Takes the bar away while whole lines are printed, on stdout or stderr, and shows it again below them."""
        bar = self._bar
        if bar:
            bar.stop()
        yield
        if bar:
            bar.start()

    def record(self, line: str) -> None:
        # Without a copy on a full disk: what is to be told is told on the screen.
        with suppress(OSError), self.log.open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    @contextmanager
    def progress(self, what: str, total: int | None, done: int = 0) -> Iterator[Update]:
        """Yields `update(done, **fields)`. A bar on a terminal; elsewhere a plain line every five seconds."""
        if self.silent:
            yield lambda done, **fields: None
            return
        if sys.stderr.isatty():
            with _bar(what, total) as self._bar:
                task = self._bar.add_task(what, total=total, completed=done, text="")
                try:
                    yield partial(_update, self._bar, task)
                finally:
                    self._bar = None
            return
        last = time.monotonic()

        def say(done: int, **fields: str) -> None:
            nonlocal last
            if time.monotonic() - last >= 5:
                last = time.monotonic()
                of = f" of {total:,}" if total else ""
                self.say(", ".join([f"{what} {done:,}{of}", *(f"{name} {value}" for name, value in fields.items())]))

        yield say


def counting(items: Iterable[Item], update: Update) -> Iterator[Item]:
    """The items one by one; `update` shows how many have been taken."""
    done = 0
    for item in items:
        update(done)
        yield item
        done += 1
    update(done)


def _bar(what: str, total: int | None) -> "Progress":
    """One line, whatever the width of the terminal: the bar takes what the text leaves."""
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    text = TextColumn("{task.fields[text]}")
    columns = (
        (
            TextColumn(what),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:,}/{task.total:,}"),
            text,
            TimeRemainingColumn(),
        )
        if total
        else (SpinnerColumn("line"), TextColumn(what + " {task.completed:,}"), text)
    )
    terminal = RichConsole(stderr=True)
    return Progress(*columns, console=terminal, transient=True, expand=bool(total), redirect_stdout=False)


def _update(bar: "Progress", task: "TaskID", done: int, **fields: str) -> None:
    bar.update(task, completed=done, text="  ".join(f"{name} {value}" for name, value in fields.items()))


def command(name: str, *options: Callable[[Any], Any]) -> Callable[[Callable[..., None]], click.Command]:
    """Makes `function(console, **options)` a click command.

    Its errors print what errors.py says; their tracebacks are in the log.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def run(**arguments: Any) -> None:
            try:
                console = Console(name)
            except OSError as error:
                raise click.ClickException(f"{name}: the log cannot be written ({error}); check the disk") from error
            if started() is not None:  # torchrun is the parent, and not DVC
                end_with(os.getppid(), "who launched it", console.warn)
            elif (dvc := dvc_process()) is not None:
                end_with(dvc, "dvc", console.warn)
            with errors_in_one_line(name, console.warn, console.record):
                function(console, **arguments)

        for option in reversed(options):
            run = option(run)
        return click.command(name, help=inspect.getdoc(function))(run)

    return decorate
