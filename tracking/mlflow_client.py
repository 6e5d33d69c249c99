"""The only way to MLflow's stores, which changes what they would reject or store as something else.

PostgreSQL rejects NUL in text and text longer than its column, every store rejects text that is not UTF-8, and MLflow
would store NaN as 0 and infinity as 1.8e308. Keys need no such care: they are constants and parameters' names.
"""

import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tracking.mlflow_page import Point
from tracking.run import as_text

_NAME, _PARAM, _TAG, _DATASET, _PROFILE = 250, 6000, 8000, 500, 16_777_215  # characters
_PARAMS_AT_ONCE, _METRICS_AT_ONCE = 100, 1000
_SLOW_STORE = 5e6  # bytes per second that a server's own store takes at least
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_UNKNOWN = re.compile(r"[\x80-\x9f\ud800-\udfff]")  # controls without a picture, and lone surrogates
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def fit_text(text: str, limit: int) -> str:
    """Replaces each control character by a visible one, and cuts the text at `limit` characters."""
    text = _CONTROL.sub(lambda found: chr(0x2400 + ord(found[0])), text[:limit])  # NUL becomes ␀
    return _UNKNOWN.sub("\ufffd", text.replace("\x7f", "␡"))


def fit_file(text: str) -> bytes:
    """A file's content; replaces only lone surrogates, which have no UTF-8."""
    return _SURROGATE.sub("\ufffd", text).encode()


class StoreClient:
    """An MlflowClient whose methods below accept any text and any number; all others are MLflow's own."""

    def __init__(self, uri: str):
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def get_experiment_by_name(self, name: str) -> Any:
        return self._client.get_experiment_by_name(fit_text(name, _NAME))

    def create_experiment(self, name: str, artifact_location: str | None = None) -> Any:
        return self._client.create_experiment(fit_text(name, _NAME), artifact_location)

    def create_run(self, experiment: str, started: int, name: str, tags: dict[str, Any]) -> Any:
        return self._client.create_run(experiment, started, _fit_tags(tags), run_name=fit_text(name, _NAME))

    def set_tags(self, run_id: str, tags: dict[str, Any]) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(run_id, tags=[RunTag(*tag) for tag in _fit_tags(tags).items()], synchronous=True)

    def log_params(self, run_id: str, params: dict[str, str]) -> None:
        from mlflow.entities import Param

        entities = [Param(key, fit_text(value, _PARAM)) for key, value in params.items()]
        for first in range(0, len(entities), _PARAMS_AT_ONCE):
            self._client.log_batch(run_id, params=entities[first : first + _PARAMS_AT_ONCE], synchronous=True)

    def log_points(self, run_id: str, points: Iterable[Point], model_id: str | None = None) -> None:
        """Logs those points of metrics that are finite, for the run or for one of its models."""
        from mlflow.entities import Metric

        metrics = [
            Metric(p.key, p.value, p.t, p.step, model_id=model_id, run_id=model_id and run_id)
            for p in points
            if math.isfinite(p.value)
        ]
        for first in range(0, len(metrics), _METRICS_AT_ONCE):
            self._client.log_batch(run_id, metrics=metrics[first : first + _METRICS_AT_ONCE], synchronous=True)

    def log_dataset(self, run_id: str, name: str, sha256: str, source: str, profile: str) -> None:
        """Records that the run was trained on a dataset; `source` and `profile` are JSON."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        # MLflow takes 36 characters of digest; the profile has the whole hash.
        data = Dataset(
            fit_text(name, _DATASET),
            sha256[:36],
            "local",
            fit_text(source, 65_535),
            profile=fit_text(profile, _PROFILE),
        )
        self._client.log_inputs(run_id, [DatasetInput(data, [InputTag("mlflow.data.context", "training")])])

    def log_file(self, run_id: str, path: str, content: bytes) -> None:
        """Stores an artifact of that content."""
        folder, _, name = path.rpartition("/")
        with tempfile.TemporaryDirectory() as temporary:
            (Path(temporary) / name).write_bytes(content)
            self.log_artifact(run_id, f"{temporary}/{name}", folder or None)

    def log_model_artifacts(self, model_id: str, folder: str) -> None:
        """Stores a model's files."""
        with more_time(sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())):
            self._client.log_model_artifacts(model_id, folder)


@contextmanager
def more_time(size: int) -> Iterator[None]:
    """Waits longer for an answer to `size` bytes: a server answers after it has sent them to its own store.

    MLflow reads the limit from the environment at each request.
    """
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ.get(name, "120")  # MLflow's default
    os.environ[name] = str(int(before) + math.ceil(size / _SLOW_STORE))
    try:
        yield
    finally:
        os.environ[name] = before


def _fit_tags(tags: dict[str, Any]) -> dict[str, str]:
    return {key: fit_text(as_text(value), _TAG) for key, value in tags.items()}
