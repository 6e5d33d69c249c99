"""What tracking costs the training loop: checkpoints, the journal, MLflow's process, a bad server.

Each run is a separate process, and the candidates take turns, so that load on the machine affects all of them. If the
ratios are too noisy, the CPU time of MLflow's process bounds its cost.
"""

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import psutil

from benchmarks.common import benchmark, call, row
from nanogpt.params import load_params
from tracking.golden import TOKENS
from tracking.run import Run

CANDIDATES = {
    "nothing": "neither journal nor MLflow",
    "journal": "the journal alone",
    "unsampled": "journal and MLflow, no system metrics",
    "database": "all of it",
    "gone": "all of it, a server that is gone",
    "slow": "all of it, a server that fails after 2 s",
}
# MLflow's process, as mlflow_process starts it, without the system metrics.
UNSAMPLED = """
from tools.sync import main
from tracking import mlflow_sync
mlflow_sync._sampler = lambda *_: lambda: None
main()
"""


@benchmark
@click.option("--steps", default=200, show_default=True, help="Steps of each run.")
@click.option("--rounds", default=5, show_default=True, help="Turns of each candidate.")
def main(steps: int, rounds: int) -> dict[str, Any]:
    """Trains on data/tokens with the settings of params.yaml, adding one part of the tracking after another."""
    most = load_params().train.max_iters
    if not 1 <= steps <= most:
        raise click.UsageError(f"--steps {steps}: train.max_iters = {most} allows 1 to that many")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CANDIDATES}
    for number in range(rounds):
        for name in CANDIDATES if number % 2 else reversed([*CANDIDATES]):
            found[name].append(call(measure, steps=steps, candidate=name)[0])
    # From the same round, so that other load on the machine affects both.
    pairs = {name: zip(found[name], found["nothing"], strict=True) for name in CANDIDATES}
    ratios = {name: statistics.median(a["seconds"] / b["seconds"] for a, b in pairs[name]) for name in CANDIDATES}
    click.echo(row(f"{'ms per step':40}", "the loop", "ratio", "its checkpoints", "CPU beside", width=17))
    for name, what in CANDIDATES.items():
        names = ("seconds", "checkpoints", "beside")
        own, saving, beside = (1e3 * statistics.median(each[key] for each in found[name]) for key in names)
        click.echo(row(f"{what:40}", own, f"{ratios[name]:.3f}", saving, beside, width=17))
    return {"seconds_per_step": found, "ratios": ratios}


def measure(steps: int, candidate: str) -> dict[str, float]:
    """Returns seconds per step: of the whole loop with evaluations, and of the `checkpoints` that it waits for.

    `beside` is the CPU time of MLflow's process.
    """
    params = load_params()
    from nanogpt import determinism

    numerics = determinism.pin(params.numerics, params.runtime.device)
    from nanogpt.checkpoint import Checkpoints
    from nanogpt.recipe import load_recipe
    from nanogpt.train import Stopped, train
    from nanogpt.train_state import TrainState
    from tracking.console import Console
    from tracking.fingerprint import environment
    from tracking.journal import Journal
    from tracking.observers import SamplePreview, observing
    from tracking.recording import dataset
    from tracking.resume import describe
    from tracking.retrace import Recorder

    class TimedCheckpoints(Checkpoints):
        seconds = 0.0

        def save(self, state: TrainState, extra: dict[str, Any]) -> str:
            begin = time.perf_counter()
            sha256 = super().save(state, extra)
            self.seconds += time.perf_counter() - begin
            return sha256

    recipe = load_recipe(params, numerics, TOKENS)
    state, follower = recipe.new_state(), None
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DVC_ROOT"] = tempfile.tempdir = folder
        os.environ["MLFLOW_TRACKING_URI"] = uri(candidate, folder)
        console, run, curve = Console("benchmark"), Run(Path(folder) / "attempt-1"), Path(folder) / "loss.csv"
        with Journal(run.journal) as journal, observing(console, recipe, run, journal, state, curve) as observers:
            journal.append("start", step=0, resumed=False, environment=environment())
            describe(run, params, {"fingerprint": "0" * 64}, dataset(recipe, "0" * 64))
            if candidate == "nothing":
                observers = [one for one in observers if isinstance(one, SamplePreview)]  # which all candidates have
            elif candidate != "journal":
                follower = start(candidate, run)
                wait_for_run(candidate, run, follower)  # a fixed cost, not the loop's
            observers, checkpoints = (
                [*observers, Recorder(state, steps)],
                TimedCheckpoints(run.checkpoints, "benchmark"),
            )
            before, begin = processor_seconds(follower), time.perf_counter()
            with suppress(Stopped):
                train(state, recipe.batches(state), params, recipe.evaluator(), observers, checkpoints)
            seconds, beside = time.perf_counter() - begin, processor_seconds(follower) - before
            if follower:
                follower.kill()
                follower.wait()
    return {"seconds": seconds / steps, "checkpoints": checkpoints.seconds / steps, "beside": beside / steps}


def processor_seconds(process: "subprocess.Popen[bytes] | None") -> float:
    """Returns the CPU seconds of a running process, or 0 without one."""
    if process is None:
        return 0.0
    times = psutil.Process(process.pid).cpu_times()
    return float(times.user + times.system)


def start(candidate: str, run: Run) -> "subprocess.Popen[bytes]":
    """Returns the process that writes to MLflow."""
    from tracking import mlflow_process

    if candidate != "unsampled":
        return mlflow_process.start(run, Path.cwd(), 0).process
    command = [sys.executable, "-c", UNSAMPLED, str(run), "--follow", str(os.getpid()), "--wait-seconds", "0"]
    environment = {**os.environ, "DVC_ROOT": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for_run(candidate: str, run: Run, follower: "subprocess.Popen[bytes]") -> None:
    """Waits until MLflow's process has started and has created its run, if there is a database."""
    if candidate in {"gone", "slow"}:
        time.sleep(5)
        return
    while not run.mlflow_path.exists():
        if follower.poll() is not None:
            raise ValueError(f"{candidate}: MLflow's process has ended with {follower.returncode}")
        time.sleep(0.1)


def uri(candidate: str, folder: str) -> str:
    """Returns the address of MLflow for a candidate."""
    if candidate not in {"gone", "slow"}:
        return f"sqlite:///{folder}/mlflow.db"
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    if candidate == "gone":
        listener.close()
    else:
        threading.Thread(target=answer_slowly, args=(listener,), daemon=True).start()
    return address


def answer_slowly(listener: socket.socket) -> None:
    """Answers every request with an error, after two seconds."""
    while True:
        connection, _ = listener.accept()
        connection.recv(65536)
        time.sleep(2)
        connection.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        connection.close()


if __name__ == "__main__":
    main()
