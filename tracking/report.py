"""Adds what evaluate and sample found to the MLflow run that trained the model. The result does not depend on it."""

import json
import time
from typing import Any

from nanogpt.files import sha256_json, write_text
from nanogpt.params import Section, TrackingParams, flatten
from tracking.console import Console, repository
from tracking.mlflow_run import deliver_report
from tracking.mlflow_server import as_text, resolve_uri
from tracking.redaction import redact


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
        run = deliver_report(path, resolve_uri(repository()), repository())
    except Exception as error:  # whatever a tracking server does, the stage's result stands
        reason = redact(str(error))[:200]
        console.warn(f"MLflow did not take the report ({reason}); `python -m tools sync` sends it later")
    else:
        console.say(f"recorded in MLflow run {run}" if run else "the model's run was deleted in MLflow: left alone")
