"""What a command costs before its own work: each stage's start, each --help, `dvc repro` with nothing to do, MLflow.

All of it in a clone of HEAD in which a small pipeline has been run once, so that nothing here is touched. The floors,
Python, torch, DVC and MLflow alone, are measured beside it; DVC's are `dvc status` of an empty project and `dvc repro`
of one stage without dependencies. The candidates take turns. Beside the time stands that of the processor, which others
on the machine disturb less.
"""

import importlib
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from benchmarks.common import benchmark, call, cpu_seconds, row, write_params
from nanogpt.params import load_params, with_values
from tools.__main__ import COMMANDS
from tracking.clean_clone import CleanClone, CouldNotRun, clean_clone
from tracking.git import git
from tracking.run import runs_in

STAGES = ("download", "tokenize", "train", "evaluate", "sample")
HEAVY = ("torch", "torch._dynamo", "transformers", "datasets", "mlflow", "tokenizers", "matplotlib", "pyarrow")
SMALL = {
    "download.documents": 60,
    "tokenize.vocab_size": 300,
    "model.n_embd": 32,
    "model.block_size": 32,
    "train.max_iters": 20,
    "train.warmup_iters": 2,
    "train.eval_interval": 10,
    "sample.max_new_tokens": 40,
    "numerics.threads": 1,
}

# A stage shows its progress when its own work begins; there it is ended, and has not started MLflow's process.
TORCH, STATUS, REPRO = "import torch", "dvc status, empty project", "dvc repro, nothing to do"
START = """
import os, runpy, sys
from tracking import mlflow_process
from tracking.console import Console

stage, *heavy = sys.argv[1:]

def begin(*arguments, **named):
    print("modules", len(sys.modules), *[name for name in heavy if name in sys.modules], flush=True)
    os._exit(0)

mlflow_process.start = lambda *arguments: None
Console.progress = begin
sys.argv = [stage]
runpy.run_module(stage, run_name="__main__")
"""


@benchmark
@click.option("--rounds", default=3, show_default=True, help="Turns of each candidate; the median is shown.")
def main(rounds: int) -> dict[str, Any]:
    """Prints the seconds until each command begins its own work, and what it has imported by then."""
    root = Path(git(Path.cwd(), "rev-parse", "--show-toplevel"))
    with clean_clone(root, git(root, "rev-parse", "HEAD")) as clone:
        write_params(with_values(load_params(), SMALL), clone.path / "params.yaml")
        clone.run("dvc", "repro")
        end = seconds_after_the_end(clone.path)
        figures = measure(clone, rounds)
    figures["seconds"]["MLflow, end of the run"] = [end]
    click.echo(row("", "time", "processor", width=10))
    for name, times in figures["seconds"].items():
        both = (times, figures["processor_seconds"].get(name))
        cells = (f"{statistics.median(each):.2f} s" if each else "" for each in both)
        click.echo(f"{row(name, *cells, width=10)}  {figures['imports'].get(name, '')}")
    own = {name: statistics.median(seconds) for name, seconds in figures["processor_seconds"].items()}
    click.echo(f"processor: {REPRO}, is {own[REPRO] / own[STATUS]:.2f} times {STATUS}")
    for stage in ("train", "evaluate", "sample"):
        click.echo(f"processor: stages.{stage} takes {own[f'stages.{stage}'] - own[TORCH]:.2f} s above {TORCH}")
    return figures


def make_projects(clone: CleanClone) -> dict[str, list[str]]:
    """Makes two other DVC projects beside the clone; returns the commands of DVC's floors by name."""
    empty, one = (clone.path.parent / name for name in ("empty", "one"))
    for project in (empty, one):
        clone.run("git", "init", "--quiet", str(project))
        clone.run("dvc", "--cd", str(project), "init", "--quiet")
    (one / "dvc.yaml").write_text("stages:\n  only:\n    cmd: echo 1 > out\n    outs: [out]\n", encoding="ascii")
    clone.run("dvc", "--cd", str(one), "repro")
    return {STATUS: ["dvc", "--cd", str(empty), "status"], "dvc repro, one stage": ["dvc", "--cd", str(one), "repro"]}


def measure(clone: CleanClone, rounds: int) -> dict[str, Any]:
    """Returns the seconds of each command by name, one per round, and what the stages import."""
    commands = {
        "python": [sys.executable, "-c", "pass"],
        # It ends as START does: torch's own end takes a quarter as long as its import.
        TORCH: [sys.executable, "-c", "import os, torch; os._exit(0)"],
        "dvc --version": ["dvc", "--version"],
        **make_projects(clone),
        REPRO: ["dvc", "repro"],
        **{f"stages.{name}": [sys.executable, "-c", START, f"stages.{name}", *HEAVY] for name in STAGES},
        **{f"stages.{name} --help": [sys.executable, "-m", f"stages.{name}", "--help"] for name in STAGES},
        "tools --help": [sys.executable, "-m", "tools", "--help"],
        **{f"tools {name} --help": [sys.executable, "-m", "tools", name, "--help"] for name in COMMANDS},
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    processor: dict[str, list[float]] = {name: [] for name in commands}
    imports: dict[str, str] = {}
    for _ in range(rounds):
        for name, command in commands.items():
            begin, before = time.perf_counter(), cpu_seconds()
            output = clone.run(*command)
            seconds[name].append(time.perf_counter() - begin)
            processor[name].append(cpu_seconds() - before)
            if command[-1] == HEAVY[-1]:
                _, modules, *heavy = output.splitlines()[-1].split()
                imports[name] = f"{int(modules):,} modules" + "".join(f", {each}" for each in heavy)
            if command == ["dvc", "repro"] and "up to date" not in output:
                raise CouldNotRun("`dvc repro` had something to do the second time")
        for name, value in call(mlflow_seconds)[0].items():
            seconds.setdefault(name, []).append(value)
    return {"seconds": seconds, "processor_seconds": processor, "imports": imports}


def mlflow_seconds() -> dict[str, float]:
    """Returns the seconds of importing MLflow and of connecting to a new and to an existing database."""
    stamps = [time.perf_counter()]
    importlib.import_module("mlflow.tracking")
    stamps.append(time.perf_counter())
    from tracking import mlflow_server

    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            mlflow_server.connect(f"sqlite:///{folder}/mlflow.db", Path(folder))
            stamps.append(time.perf_counter())
    names = ("MLflow, import", "MLflow, a new database", "MLflow, one that exists")
    return {name: after - before for name, (before, after) in zip(names, pairwise(stamps), strict=True)}


def seconds_after_the_end(clone: Path) -> float:
    """Returns how long the train stage waited after its last record until MLflow had the whole run."""
    (run,) = runs_in(clone)
    assert run.end is not None
    return float(run.mlflow_path.stat().st_mtime - run.end["t"] / 1000)


if __name__ == "__main__":
    main()
