"""What tracking costs the training loop: the journal, MLflow's process beside it, system metrics, a bad server.

Each run is a process of its own, and the candidates take turns, so that a noisy machine is unfair to none. Where it is
too noisy for ratios, the processor's time that MLflow's process takes says what it can cost at most.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import click
import psutil

from nanogpt.params import load_params
from tracking.console import Console
from tracking.first_steps import TOKENS
from tracking.retrace import Retrace

CANDIDATES = {
    "nothing": "neither journal nor MLflow",
    "journal": "the journal alone",
    "unsampled": "journal and MLflow, no system metrics",
    "database": "all of it",
    "gone": "all of it, a server that is gone",
    "slow": "all of it, a server that fails after 2 s",
}
# MLflow's process, as replicator starts it, without the system metrics.
UNSAMPLED = """
from nanogpt import tracking_follow
from tools.sync import main
tracking_follow._start_metrics = lambda *_: None
main()
"""


@click.command()
@click.option("--steps", default=200, show_default=True, help="Steps of each run.")
@click.option("--rounds", default=5, show_default=True, help="Turns of each candidate.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the figures here too.")
@click.option("--only", type=click.Choice([*CANDIDATES]), hidden=True, help="Measure one candidate in this process.")
def main(steps: int, rounds: int, out: Path | None, only: str | None) -> None:
    """Trains on data/tokens as params.yaml says, with more and more of what tracks it."""
    if only:
        click.echo(json.dumps(measure(steps, only)))
        return
    most = load_params().train.max_iters
    if not 1 <= steps <= most:
        raise click.UsageError(f"--steps {steps}: train.max_iters = {most} allows 1 to that many")
    times: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    beside: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    for number in range(rounds):
        for name in CANDIDATES if number % 2 else reversed([*CANDIDATES]):
            command = [sys.executable, "-m", "benchmarks.tracking_overhead", "--steps", str(steps), "--only", name]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            figures = json.loads(output.splitlines()[-1])
            times[name].append(figures["seconds"])
            beside[name].append(figures["beside"])
    # Of one round, so that what the machine does meanwhile is in both.
    ratios = {
        name: statistics.median(a / b for a, b in zip(times[name], times["nothing"], strict=True)) for name in times
    }
    click.echo(f"{'tracked by':40} {'ms/step':>8} {'ratio':>8} {'CPU beside':>12}")
    for name, what in CANDIDATES.items():
        own, other = 1e3 * statistics.median(times[name]), 1e3 * statistics.median(beside[name])
        click.echo(f"{what:40} {own:8.2f} {ratios[name]:8.3f} {other:9.2f} ms")
    if out:
        content = {"seconds_per_step": times, "ratios": ratios, "cpu_seconds_beside_per_step": beside}
        out.write_text(json.dumps(content, indent=1) + "\n")


def measure(steps: int, candidate: str) -> dict[str, float]:
    """Per step of the whole loop, evaluations and checkpoints included: its `seconds`, and those of the processor that
    MLflow's process takes `beside` it.
    """
    params = load_params()
    from nanogpt import determinism
    from tracking.fingerprint import environment
    from tracking.journal import NoJournal
    from tracking.resume import describe

    resolved = determinism.pin(params.numerics, params.runtime.device)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DVC_ROOT"] = tempfile.tempdir = folder
        os.environ["MLFLOW_TRACKING_URI"] = uri(candidate, folder)
        with Retrace(Console("benchmark"), params, resolved, TOKENS, "benchmark") as retrace:
            retrace.training.params = params
            attempt = retrace.training.attempt
            retrace.journal.append("start", step=0, resumed=False, environment=environment())
            dataset = {"name": "benchmark", "source": str(TOKENS), "sha256": "0" * 64}
            describe(attempt, params, {"fingerprint": "0" * 64}, dataset)
            if candidate == "nothing":
                retrace.training.journal = NoJournal()
            follower = start(candidate, attempt) if candidate not in {"nothing", "journal"} else None
            if follower:
                wait_for_run(candidate, attempt, follower)  # a fixed cost, not the loop's
            before, begin = processor_seconds(follower), time.perf_counter()
            retrace.to(steps)
            seconds, beside = time.perf_counter() - begin, processor_seconds(follower) - before
            if follower:
                follower.kill()
                follower.wait()
    return {"seconds": seconds / steps, "beside": beside / steps}


def processor_seconds(process: "subprocess.Popen[bytes] | None") -> float:
    """Those that a process, which has not ended, has taken of the processor; 0 without one."""
    if process is None:
        return 0.0
    times = psutil.Process(process.pid).cpu_times()
    return float(times.user + times.system)


def start(candidate: str, attempt: Path) -> "subprocess.Popen[bytes]":
    """The process that fills MLflow."""
    from tracking import mlflow_process

    if candidate != "unsampled":
        return mlflow_process.start(attempt, Path.cwd(), 0).process
    command = [sys.executable, "-c", UNSAMPLED, str(attempt), "--follow", str(os.getpid()), "--wait-seconds", "0"]
    environment = {**os.environ, "DVC_ROOT": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for_run(candidate: str, attempt: Path, follower: "subprocess.Popen[bytes]") -> None:
    """Until MLflow's process has imported what it needs and has made its run, where there is a database for it."""
    if candidate in {"gone", "slow"}:
        time.sleep(5)
        return
    while not (attempt / "mlflow.json").exists():
        if follower.poll() is not None:
            raise click.ClickException(f"{candidate}: MLflow's process has ended with {follower.returncode}")
        time.sleep(0.1)


def uri(candidate: str, folder: str) -> str:
    """Where MLflow is, for a candidate."""
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
    """Answers every request after two seconds: that it has failed."""
    while True:
        connection, _ = listener.accept()
        connection.recv(65536)
        time.sleep(2)
        connection.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        connection.close()


if __name__ == "__main__":
    main()
