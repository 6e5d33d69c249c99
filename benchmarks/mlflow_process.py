"""CPU seconds of the process that fills MLflow: its start, while the training runs, and its end.

Writes the journal of a finished run once more, with the same time between its records, into a run directory and a
database of its own. Nothing is trained, so nothing competes with the process, and its CPU time repeats.
"""

import os
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import psutil

from benchmarks.common import benchmark, row
from tracking import mlflow_process
from tracking.journal import Journal, Record
from tracking.run import Run, runs_in

START_SECONDS = 10.0  # by then the process has imported MLflow and made its database and its run


@benchmark
@click.option("--seconds", type=float, help="Length of the training.  [default: that of the recorded run]")
def main(seconds: float | None) -> dict[str, Any]:
    """Replays the newest finished run of this repository for MLflow's process, and prints what that takes."""
    finished = [run for run in runs_in(Path.cwd()) if run.status == "finished"]
    if not finished:
        raise click.UsageError("no finished run in .runs; `dvc repro` makes one")
    source = finished[-1]
    records = [{name: value for name, value in record.items() if name != "crc"} for record in source.records()]
    length = (records[-1]["t"] - records[0]["t"]) / 1000
    seconds = seconds or length
    if seconds <= START_SECONDS:
        raise click.UsageError(f"a training of {seconds:g} s is too short: give --seconds above {START_SECONDS:g}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DVC_ROOT"], os.environ["MLFLOW_TRACKING_URI"] = folder, f"sqlite:///{folder}/mlflow.db"
        run = Run(Path(folder) / ".runs" / source.directory.parent.name / "attempt-1")
        for part in (source.artifacts, source.models):
            shutil.copytree(part, run.directory / part.name)
        run.write_info(source.info)
        spent = replay(run, records, seconds / length)
    click.echo(row("", "seconds", "CPU s", "% of 2 cores"))
    for name, (duration, cpu) in spent.items():
        click.echo(row(name, duration, cpu, 50 * cpu / duration))
    return {"records": len(records), "seconds": seconds, "spent": spent}


def replay(run: Run, records: list[Record], slowness: float) -> dict[str, tuple[float, float]]:
    """Returns the seconds and the CPU seconds of MLflow's process, by the part of the run."""
    with Journal(run.journal) as journal:
        journal.append_many(records[:1])
        begin, written = time.monotonic(), 1
        follower = mlflow_process.start(run, Path.cwd(), 60)
        marks = [(0.0, 0.0)]
        while written < len(records) - 1:
            now = time.monotonic() - begin
            if now >= START_SECONDS and len(marks) == 1:
                marks.append((now, processor_seconds(follower.process.pid)))
            due = records[0]["t"] + 1000 * now / slowness
            ready = [record for record in records[written:-1] if record["t"] <= due]
            journal.append_many(ready)
            written += len(ready)
            time.sleep(0.2)
        marks.append((time.monotonic() - begin, processor_seconds(follower.process.pid)))
        journal.append_many(records[-1:])
    click.echo(mlflow_process.wait(follower, 60))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)  # it is the only child
    marks.append((time.monotonic() - begin, used.ru_utime + used.ru_stime))
    names = ("start", "training", "end")
    parts = {name: (b[0] - a[0], b[1] - a[1]) for name, a, b in zip(names, marks, marks[1:], strict=False)}
    return {**parts, "all": marks[-1]}


def processor_seconds(pid: int) -> float:
    """Returns the CPU seconds of a running process."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    main()
