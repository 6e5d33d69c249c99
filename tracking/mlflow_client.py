"""The one door to MLflow's stores: makes fit what they would refuse, or keep as something else.

PostgreSQL refuses NUL in text and names beyond their column, every store text that is no UTF-8, and MLflow keys with
other characters than its own; NaN would be kept as 0 and infinity as 1.8e308. What fits is sent as it is.
"""

import math
import re
from typing import Any

_NAME, _KEY, _PARAM, _TAG, _DATASET = 250, 250, 6000, 8000, 500  # characters
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_UNKNOWN = re.compile(r"[\x80-\x9f\ud800-\udfff]")  # controls without a picture, and lone surrogates
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def fit_text(text: str, limit: int) -> str:
    """Text with control characters visible, one for one, and cut at `limit` characters."""
    text = _CONTROL.sub(lambda found: chr(0x2400 + ord(found[0])), text[:limit])  # NUL becomes ␀
    return _UNKNOWN.sub("\ufffd", text.replace("\x7f", "␡"))


def fit_key(key: str) -> str:
    """A key of the characters that MLflow takes, and without parts that would climb in a path."""
    parts = re.sub(r"[^/\w.\- :]", "_", key).split("/")
    return "/".join(part for part in parts if part not in {"", ".", ".."})[:_KEY] or "_"


def fit_file(text: str) -> str:
    """A file's content, to the character but for lone surrogates, which have no UTF-8."""
    return _SURROGATE.sub("\ufffd", text)


class StoreClient:
    """An MlflowClient that fits what it is given; of its methods that write text or numbers, those used here."""

    def __init__(self, uri: str):
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def get_experiment_by_name(self, name: str) -> Any:
        return self._client.get_experiment_by_name(fit_text(name, _NAME))

    def create_experiment(self, name: str, artifact_location: str | None = None, tags: Any = None) -> Any:
        return self._client.create_experiment(fit_text(name, _NAME), artifact_location, tags)

    def create_run(
        self, experiment_id: str, start_time: int | None = None, tags: Any = None, run_name: str | None = None
    ) -> Any:
        name = run_name and fit_text(run_name, _NAME)
        return self._client.create_run(experiment_id, start_time, _fit(tags or {}), run_name=name)

    def set_tag(self, run_id: str, key: str, value: Any, synchronous: bool | None = None) -> Any:
        return self._client.set_tag(run_id, fit_key(key), fit_text(value, _TAG), synchronous)

    def log_batch(
        self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = (), synchronous: bool | None = None
    ) -> Any:
        from mlflow.entities import Param, RunTag

        metrics = [_fit_metric(metric) for metric in metrics if math.isfinite(metric.value)]
        params = [Param(fit_key(param.key), fit_text(param.value, _PARAM)) for param in params]
        tags = [RunTag(fit_key(tag.key), fit_text(tag.value, _TAG)) for tag in tags]
        return self._client.log_batch(run_id, metrics, params, tags, synchronous)

    def log_inputs(self, run_id: str, datasets: Any = None, models: Any = None) -> None:
        self._client.log_inputs(run_id, [_fit_dataset(one) for one in datasets or []], models)

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
        self._client.log_text(run_id, fit_file(text), artifact_file)


def _fit(tags: dict[str, str]) -> dict[str, str]:
    return {fit_key(key): fit_text(value, _TAG) for key, value in tags.items()}


def _fit_metric(metric: Any) -> Any:
    from mlflow.entities import Metric

    key = fit_key(metric.key)
    if key == metric.key:
        return metric
    return Metric(key, metric.value, metric.timestamp, metric.step, metric.model_id, run_id=metric.run_id)


def _fit_dataset(given: Any) -> Any:
    from mlflow.entities import Dataset, DatasetInput

    data = given.dataset
    fitted = Dataset(
        fit_text(data.name, _DATASET),
        data.digest,
        data.source_type,
        fit_text(data.source, 65_535),
        profile=data.profile and fit_text(data.profile, 16_777_215),
    )
    return DatasetInput(fitted, given.tags)
