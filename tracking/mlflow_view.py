"""The view in which MLflow's page opens an experiment: a shared view, stored as a tag of the experiment.

Without it, MLflow 3 opens on "GenAI", its table has neither metrics nor parameters, and its charts are sorted by name.
The format is that of the page's "Share" button.
"""

import base64
import json
import zlib
from typing import Any

from tracking.mlflow_page import BEST, LOSS, REPORTED, TOKENS

KEY = "nanogpt"  # of the view, in its URL
TAG = f"mlflow.sharedViewState.{KEY}"
MAX_RUNS = 500  # newest runs whose parameters are compared
MAX_PARAMS = 8  # columns for parameters that differ, besides the seed
_SEED = "train.seed"
_WIDTHS = {"1": 60, "attributes.`Run Name`": 300, "runDateAndNestInfo": 150}  # pixels, of the first columns
_BY_SETTING = {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": "setting"}]}
_STEP = ""  # an x-axis; others are the names of metrics
_CHARTS = [  # (metric, x-axis), in the order of the page
    *((LOSS, _STEP), (LOSS, TOKENS), ("train/loss", _STEP), ("train/loss", TOKENS), ("eval/train_loss", _STEP)),
    *((name, _STEP) for name in ("tokens_per_second", "mfu", "grad_norm", "learning_rate", "clip_rate", "memory_mb")),
]


def address(server: str, experiment: str | None) -> str:
    """The URL of the experiment's runs (by its id) in the saved view; without one, of the list of experiments."""
    page = f"{experiment}/runs?viewStateShareKey={KEY}&" if experiment else "?"
    return f"{server.rstrip('/')}/#/experiments/{page}workflowType=machine_learning".replace("/?", "?")


def save_of(client: Any, name: str) -> str | None:
    """Saves the view of the experiment of that name; returns its id, None if the store has none."""
    found = client.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage != "active":
        return None
    save(client, found.experiment_id)
    return str(found.experiment_id)


def save(client: Any, experiment: str) -> None:
    """Saves the view of an experiment (by its id) for its present runs."""
    found = [run.data for run in client.search_runs([experiment], max_results=MAX_RUNS)]
    trained = [run for run in found if "model.pulled" not in run.tags]
    settings = [run.tags.get("setting") for run in trained]
    text = json.dumps(view([run.params for run in trained], None not in settings and len({*settings}) < len(settings)))
    packed = base64.b64encode(zlib.compress(text.encode(), 9)).decode()
    client.set_experiment_tag(experiment, TAG, f"deflate;{packed}")


def view(runs: list[dict[str, str]], grouped: bool) -> dict[str, Any]:
    """The state of MLflow's page for runs with these parameters; `grouped`: by their setting, with its mean."""
    metrics = [f"metrics.`{name}`" for name in ("val_loss", "excess", "bits_per_byte")]
    params = [f"params.`{name}`" for name in [*differing(runs), _SEED]]
    # The page adds a chart for each metric, except where one is marked as deleted.
    uncharted = sorted({*REPORTED.values(), BEST, TOKENS})
    return {
        "searchFilter": "",
        "orderByKey": metrics[0],
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": [*metrics, *params, "attributes.`Duration`"],
        "columnOrder": [*_WIDTHS, *metrics, *params, "duration"],
        "columnWidths": _WIDTHS | {name: max(95, 7 * len(name) - 30) for name in [*metrics, *params]},
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsHiddenMode": "FIRST_20_RUNS",
        "viewMaximized": False,
        "runListHidden": False,
        "groupBy": _BY_SETTING if grouped else None,
        "useGroupedValuesInCharts": False,
        "isAccordionReordered": True,  # keeps the order of the charts
        "compareRunSections": [_section("curves", "Curves"), _section("system", "System metrics", display=False)],
        "compareRunCharts": [*map(_chart, _CHARTS), *map(_no_chart, uncharted)],
    }


def differing(runs: list[dict[str, str]]) -> list[str]:
    """The parameters in which runs differ, except the seed, those with the most values first; at most MAX_PARAMS."""
    names = dict.fromkeys(name for params in runs for name in params if name != _SEED)
    values = {name: len({params.get(name) for params in runs}) for name in names}
    found = [name for name in names if values[name] > 1]
    return sorted(found, key=lambda name: -values[name])[:MAX_PARAMS]


def _section(uuid: str, name: str, display: bool = True) -> dict[str, Any]:
    return {"uuid": uuid, "name": name, "display": display, "isReordered": True, "deleted": False, "isGenerated": False}


def _chart(chart: tuple[str, str]) -> dict[str, Any]:
    metric, axis = chart
    return {
        "uuid": f"{metric} by {axis}",
        "type": "LINE",
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "metricSectionId": "curves",
        "deleted": False,
        "isGenerated": False,
        "useGlobalXaxisKey": False,
        "useGlobalLineSmoothing": False,
        "lineSmoothness": 0,
        "xAxisKey": "metric" if axis else "step",
        "selectedXAxisMetricKey": axis,
        "scaleType": "log" if "loss" in metric else "linear",  # linear, the first drop would hide the rest
    }


def _no_chart(metric: str) -> dict[str, Any]:
    return {"uuid": metric, "type": "BAR", "metricKey": metric, "metricSectionId": "curves", "deleted": True}
