"""Adds what evaluate and sample found to the MLflow run that trained the model. The result does not depend on it."""

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

from nanogpt.files import sha256_json, write_text
from nanogpt.params import Section, TrackingParams, flatten
from tracking.console import Console, repository
from tracking.mlflow_run import deliver_report
from tracking.mlflow_server import as_text, resolve_uri
from tracking.redaction import redact

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
    """Writes the report under .runs/reports/, then sends it; a server that fails costs a warning."""
    values = flatten(settings, f"{console.name}.")
    tags = {name: as_text(value) for name, value in values.items()}
    content: dict[str, Any] = {
        "stage": console.name,
        "model": model_sha256,
        "metrics": {f"{console.name}/{name}": value for name, value in metrics.items()},
        "tags": tags,
        "files": files,
        "experiment": tracking.experiment,
    }
    path = repository() / ".runs" / "reports" / f"{console.name}-{sha256_json(content)[:16]}.json"
    if not path.exists():  # a stage that was killed after it reported has the same to say, of the same time
        write_text(path, json.dumps({**content, "t": time.time_ns() // 1_000_000}, sort_keys=True, indent=1) + "\n")
    try:
        limit = max(LEAST_WAIT, tracking.wait_seconds)
        run = within(limit, lambda: deliver_report(path, resolve_uri(repository()), repository()))
    except Exception as error:  # whatever a tracking server does, the stage's result stands
        reason = redact(str(error))[:200]
        console.warn(f"MLflow did not take the report ({reason}); `python -m tools sync` sends it later")
    else:
        console.say(f"recorded in MLflow run {run}" if run else "the model's run was deleted in MLflow: left alone")


def within(seconds: float, do: Callable[[], Result]) -> Result:
    """What `do` returns or raises; TimeoutError if it takes longer.

    A server that answers a byte at a time keeps to every limit that a client can set for a request.
    """
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(do())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # which does not keep the process from ending
    try:
        return done.result(seconds)
    except FutureTimeout as error:
        raise TimeoutError(f"it has not answered within {seconds:.0f} s") from error
