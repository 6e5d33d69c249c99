"""What a command costs before its own work: each stage's start, each --help, `dvc repro` with nothing to do, MLflow.

All of it in a clone of HEAD in which a small pipeline has been run once, so that nothing here is touched. The floors,
Python, torch, DVC and MLflow alone, are measured beside it. The candidates take turns. Beside the time stands that of
the processor, which others on the machine disturb less.
"""

import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import click
from ruamel.yaml import YAML

from tools.__main__ import COMMANDS
from tracking.clean_clone import CleanClone, CouldNotRun, clean_clone
from tracking.git import git
from tracking.journal import attempts, last_record

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

# A stage tells its progress when its own work begins; there it is ended, and has not started MLflow's process.
START = """
import os, runpy, sys
from nanogpt import replicator
from stages.console import Console

stage, *heavy = sys.argv[1:]

def begin(*arguments, **named):
    print("modules", len(sys.modules), *[name for name in heavy if name in sys.modules], flush=True)
    os._exit(0)

replicator.start = lambda *arguments: None
Console.progress = begin
sys.argv = [stage]
runpy.run_module(stage, run_name="__main__")
"""

# Seconds of MLflow's import, and of connecting to a database that is new and to one that exists.
MLFLOW = """
import sys, time
from pathlib import Path
from tempfile import TemporaryDirectory

times = [time.perf_counter()]
import mlflow.tracking
times.append(time.perf_counter())
from nanogpt import mlflow_server

with TemporaryDirectory() as folder:
    for _ in range(2):
        mlflow_server.connect(f"sqlite:///{folder}/mlflow.db", Path(folder))
        times.append(time.perf_counter())
print("seconds", *[after - before for before, after in zip(times, times[1:])])
"""


@click.command()
@click.option("--rounds", default=3, show_default=True, help="Turns of each candidate; the median is shown.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the figures here too.")
def main(rounds: int, out: Path | None) -> None:
    """Seconds that each command needs until its own work begins, and what it has imported by then."""
    root = Path(git(Path.cwd(), "rev-parse", "--show-toplevel"))
    try:
        with clean_clone(root, git(root, "rev-parse", "HEAD")) as clone:
            make_small(clone)
            clone.run("dvc", "repro")
            end = seconds_after_the_end(clone.path)
            figures = measure(clone, rounds)
            figures["seconds"]["MLflow, end of the run"] = [end]
    except CouldNotRun as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{'':28} {'time':>8} {'processor':>10}")
    for name, times in figures["seconds"].items():
        processor = figures["processor_seconds"].get(name)
        shown = f"{statistics.median(processor):8.2f} s" if processor else ""
        click.echo(f"{name:28} {statistics.median(times):6.2f} s {shown:10}  {figures['imports'].get(name, '')}")
    if out:
        out.write_text(json.dumps(figures, indent=1) + "\n")


def make_small(clone: CleanClone) -> None:
    """A pipeline of seconds."""
    yaml, path = YAML(), clone.path / "params.yaml"
    params = yaml.load(path.read_text(encoding="utf-8"))
    for key, value in SMALL.items():
        section, name = key.split(".")
        params[section][name] = value
    with path.open("w", encoding="utf-8") as file:
        yaml.dump(params, file)


def measure(clone: CleanClone, rounds: int) -> dict[str, Any]:
    """Seconds of each command by its name, once a round, and what the stages have imported."""
    commands = {
        "python": [sys.executable, "-c", "pass"],
        "import torch": [sys.executable, "-c", "import torch"],
        "dvc --version": ["dvc", "--version"],
        "dvc repro, nothing to do": ["dvc", "repro"],
        **{f"stages.{name}": [sys.executable, "-c", START, f"stages.{name}", *HEAVY] for name in STAGES},
        **{f"stages.{name} --help": [sys.executable, "-m", f"stages.{name}", "--help"] for name in STAGES},
        "tools --help": [sys.executable, "-m", "tools", "--help"],
        **{f"tools {name} --help": [sys.executable, "-m", "tools", name, "--help"] for name in COMMANDS},
    }
    parts = ("MLflow, import", "MLflow, a new database", "MLflow, one that exists")
    seconds: dict[str, list[float]] = {name: [] for name in [*commands, *parts]}
    processor: dict[str, list[float]] = {name: [] for name in commands}
    imports: dict[str, str] = {}
    for _ in range(rounds):
        for name, command in commands.items():
            begin, before = time.perf_counter(), processor_seconds()
            output = clone.run(*command)
            seconds[name].append(time.perf_counter() - begin)
            processor[name].append(processor_seconds() - before)
            if command[-1] == HEAVY[-1]:
                _, modules, *heavy = output.splitlines()[-1].split()
                imports[name] = f"{int(modules):,} modules" + "".join(f", {each}" for each in heavy)
            if command == ["dvc", "repro"] and "up to date" not in output:
                raise CouldNotRun("`dvc repro` had something to do the second time")
        told = clone.run(sys.executable, "-c", MLFLOW).splitlines()[-1].split()[1:]
        for name, value in zip(parts, told, strict=True):
            seconds[name].append(float(value))
    return {"seconds": seconds, "processor_seconds": processor, "imports": imports}


def processor_seconds() -> float:
    """What all processes that were started here and have ended have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def seconds_after_the_end(clone: Path) -> float:
    """How long the train stage waited, after its last record, until MLflow had all of the run."""
    (attempt,) = attempts(clone / ".runs")
    end = last_record(attempt / "journal.jsonl")
    assert end is not None
    return float((attempt / "mlflow.json").stat().st_mtime - end["t"] / 1000)


if __name__ == "__main__":
    main()
