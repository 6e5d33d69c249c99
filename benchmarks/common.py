"""What the benchmarks share: options, --json, separate processes, time and memory, lines of a table."""

import functools
import importlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import psutil
from ruamel.yaml import YAML

from nanogpt.params import Params, load_params, parse_assignments, with_values
from tools.preset import preset_params
from tracking.errors import explain

Command = Callable[..., Any]

PARAMS = Path("params.yaml")
TEXT = click.Path(exists=True, dir_okay=False, path_type=Path)
nanogpt_option = click.option(
    "--nanogpt", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A checkout of nanoGPT."
)

# Linux counts a parent's peak as its child's: that of the parent's memory, from which the child is forked. So that a
# measured process has its own, its parent is this one, which holds next to nothing.
_LAUNCHER = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
print(f"\\n{usage.ru_maxrss}", end="")
code = os.waitstatus_to_exitcode(status)
sys.exit(code if code >= 0 else 128 - code)
"""
_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes in which ru_maxrss counts


# --- the command line -------------------------------------------------------------------------------------------------


class Missed(Exception):
    """The figures were measured and miss the target."""

    def __init__(self, message: str, figures: Any):
        super().__init__(message)
        self.figures = figures


def benchmark(main: Command) -> click.Command:
    """Turns a function into a command: --json writes its result, and an error is one line."""

    @click.option(
        "--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Also write the figures to this file."
    )
    @functools.wraps(main)
    def command(out: Path | None, **options: Any) -> None:
        missed = None
        try:
            figures = main(**options)
        except Missed as error:
            figures, missed = error.figures, str(error)
        except (ValueError, OSError) as error:
            raise click.ClickException(explain(error)) from error
        if out:
            out.write_text(json.dumps(figures, indent=1) + "\n")
        if missed:
            raise click.ClickException(missed)

    return click.command()(command)


def with_params(preset: str | None = None) -> Callable[[Command], Command]:
    """Adds --preset and --set to a command and passes it the resulting parameters as `params`."""

    def decorated(main: Command) -> Command:
        default = preset or "params.yaml as it is"

        @click.option("--preset", default=preset, help=f"The settings of presets/NAME.yaml.  [default: {default}]")
        @click.option(
            "--set", "-S", "values", multiple=True, metavar="KEY=VALUE", help="Change a parameter; repeatable."
        )
        @functools.wraps(main)
        def command(preset: str | None, values: tuple[str, ...], **options: Any) -> Any:
            params = load_params(PARAMS) if preset is None else preset_params(preset)
            return main(params=with_values(params, parse_assignments(values), PARAMS), **options)

        return command

    return decorated


def write_params(params: Params, path: Path) -> None:
    """Writes a params.yaml, such as that of a clone."""
    with path.open("w", encoding="utf-8") as file:
        YAML().dump(params.model_dump(mode="json"), file)


def row(name: object, *cells: object, width: int = 12) -> str:
    """Formats a line of a table; None is an unknown value."""
    return f"{name!s:28}" + "".join(f"{shown(cell):>{width}}" for cell in cells)


def shown(value: object) -> str:
    """Formats a number with four digits, without an exponent."""
    if value is None:
        return "not known"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if type(value) is int else str(value)


# --- processes --------------------------------------------------------------------------------------------------------


def run(command: list[str], directory: Path, variables: dict[str, str] | None = None) -> tuple[str, int]:
    """Returns what a process printed, and its peak memory in bytes. Raises ClickException with its last lines."""
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, *command]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        environment = {**os.environ, **(variables or {})}
        code = subprocess.call(launcher, cwd=directory, env=environment, stdout=log, stderr=subprocess.STDOUT)
        log.seek(0)
        output, _, peak = log.read().rpartition("\n")
    if code:
        last = "\n".join(output.splitlines()[-5:])
        raise click.ClickException(f"{' '.join(command)[:200]} exited with {code}:\n{last}")
    return output, int(peak) * _UNIT


def call(function: Command, threads: int | None = None, **arguments: Any) -> tuple[Any, int]:
    """Calls a benchmark's function in a separate process. Returns its result and the peak memory in bytes.

    Arguments and result are such as JSON holds.
    """
    spec = sys.modules["__main__"].__spec__
    module = spec.name if function.__module__ == "__main__" and spec else function.__module__
    command = [sys.executable, "-m", "benchmarks.common", module, function.__name__, json.dumps(arguments)]
    output, peak = run(command, Path.cwd(), {} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    return json.loads(output.splitlines()[-1]), peak


def called(module: str, function: str, arguments: str) -> None:
    """Runs in the process that `call` starts."""
    print(json.dumps(getattr(importlib.import_module(module), function)(**json.loads(arguments))))


# --- time and memory --------------------------------------------------------------------------------------------------


@dataclass
class Spent:
    """What a block took, including the processes that it started."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak: int = 0  # bytes: the highest sum


@contextmanager
def measuring() -> Iterator[Spent]:
    """Measures a block: this process's memory by the kernel's count, that of its child processes by sampling."""
    spent, ended = Spent(), threading.Event()
    watcher = threading.Thread(target=_watch, args=(spent, ended))
    forget_peak()
    watcher.start()
    begin, processor = time.perf_counter(), cpu_seconds()
    try:
        yield spent
        spent.seconds, spent.cpu_seconds = time.perf_counter() - begin, cpu_seconds() - processor
    finally:
        ended.set()
        watcher.join()
        spent.peak = max(spent.peak, own_peak())


def _watch(spent: Spent, ended: threading.Event) -> None:
    me = psutil.Process()
    while not ended.wait(0.1):
        total = 0
        for process in (me, *me.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        spent.peak = max(spent.peak, total)


def cpu_seconds() -> float:
    """CPU seconds of this process and of its finished child processes."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def own_peak() -> int:
    """Peak memory of this process in bytes; the figure of getrusage starts at what the parent held."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT
    kilobytes = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    assert kilobytes
    return int(kilobytes[1]) * 1024


def forget_peak() -> None:
    """Resets own_peak() to the current memory, where the system supports it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


# --- data -------------------------------------------------------------------------------------------------------------


def write_tokens(text: Path, params: Params, folder: Path) -> Path:
    """Writes folder/tokens from a file, as the first two stages do, and returns its path. Raises ValueError."""
    from nanogpt.corpus.prepare import prepare
    from nanogpt.corpus.sources import write_corpus

    download = params.download.model_copy(update={"source": f"file:{text}"})
    write_corpus(download, folder / "raw")
    prepare(folder / "raw", folder / "tokens", params.tokenize, params.runtime.processes)
    return folder / "tokens"


if __name__ == "__main__":
    called(*sys.argv[1:])
