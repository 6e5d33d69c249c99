"""Adds the results of evaluate and sample to the MLflow run that trained the model; no result depends on it."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

from nanogpt.files import sha256_json, write_json
from nanogpt.params import Section, TrackingParams, flatten
from tracking.console import Console, repository
from tracking.mlflow_run import deliver_report
from tracking.mlflow_server import resolve_uri
from tracking.redaction import redact
from tracking.run import as_text

Result = TypeVar("Result")
LEAST_WAIT = 60.0  # seconds; the first connection alone takes some


def report(
    console: Console,
    tracking: TrackingParams,
    model_sha256: str,
    settings: Section,
    metrics: dict[str, float],
    files: dict[str, str],
) -> None:
    """Writes a report into .runs/reports/ and sends it; a server that fails costs a warning.

    `settings` are the stage's parameters, `files` the texts to store, by name.
    """
    stage = console.name
    content: dict[str, Any] = {
        "stage": stage,
        "model": model_sha256,
        "metrics": {f"{stage}/{name}": value for name, value in metrics.items()},
        "tags": {name: as_text(value) for name, value in flatten(settings, f"{stage}.").items()},
        "files": files,
        "experiment": tracking.experiment,
    }
    path = repository() / ".runs" / "reports" / f"{stage}-{sha256_json(content)[:16]}.json"
    if not path.exists():  # else the stage was killed after it had reported the same
        write_json(path, {**content, "t": time.time_ns() // 1_000_000})
    try:
        limit = max(LEAST_WAIT, tracking.wait_seconds)
        run = within(limit, lambda: deliver_report(path, resolve_uri(repository()), repository()))
    except Exception as error:  # whatever a tracking server does, the stage's result stands
        reason = redact(str(error))[:200]
        console.warn(f"MLflow did not take the report ({reason}); `python -m tools sync` sends it later")
    else:
        console.say(f"recorded in MLflow run {run}" if run else "the model's run was deleted in MLflow: left alone")


def within(seconds: float, do: Callable[[], Result]) -> Result:
    """Returns or raises what `do` does; raises TimeoutError if it takes longer.

    A server that sends one byte at a time stays within every limit that a client can set for a request.
    """
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(do())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # a daemon, so that the process can end
    try:
        return done.result(seconds)
    except FutureTimeout as error:
        raise TimeoutError(f"it has not answered within {seconds:.0f} s") from error
