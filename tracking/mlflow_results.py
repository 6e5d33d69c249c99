"""The finished runs of an experiment on an MLflow server, for instance a team's, as results to compare."""

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from tracking.comparison import Point, Result, scoring_method
from tracking.mlflow_page import LOSS
from tracking.mlflow_run import SAMPLES
from tracking.mlflow_server import connect, explained, resolve_uri

_SCORES = ("val_loss", "bits_per_byte", "excess")
_PAGE = 1000  # runs that MLflow returns at once


def server_results(root: Path, experiment: str) -> tuple[list[Result], list[str]]:
    """All finished trainings of the experiment at MLFLOW_TRACKING_URI, oldest first; and a line for each other run.

    Raises TrackingError if MLflow does not answer, ValueError if it has no such experiment.
    """
    uri = resolve_uri(root)
    with explained(uri):
        client = connect(uri, root)
        found = client.get_experiment_by_name(experiment)
        names = [one.name for one in client.search_experiments()]
    if found is None:
        has = ", ".join(sorted(names))
        raise ValueError(f"MLflow has no experiment {experiment!r} (tracking.experiment); it has: {has or 'none'}")
    with explained(uri):
        page = client.search_runs([found.experiment_id], max_results=_PAGE)
        runs = [*page]
        while page.token:
            page = client.search_runs([found.experiment_id], max_results=_PAGE, page_token=page.token)
            runs += page
    results, left_out = [], []
    for run in sorted(runs, key=lambda each: each.info.start_time):
        if "model.pulled" in run.data.tags:  # only scores, of a training in another database
            continue
        if run.info.status == "FINISHED" and "model.sha256" in run.data.tags:
            results.append(_result(client, run, experiment))
        else:
            left_out.append(f"{run.info.run_name} ({run.info.run_id}) is {run.info.status}")
    return results, left_out


def _result(client: Any, run: Any, experiment: str) -> Result:
    info, params, tags, metrics = run.info, run.data.params, run.data.tags, run.data.metrics
    scores = {name: float(metrics[name]) for name in _SCORES if name in metrics}
    evaluated = None
    if "val_loss" in scores:
        evaluated = scoring_method(tags["evaluate.stride"]) if "evaluate.stride" in tags else None
    elif LOSS in metrics:
        scores["val_loss"] = float(metrics[LOSS])
    if {"val_loss", "excess"} <= scores.keys():
        scores["floor"] = scores["val_loss"] - scores["excess"]
    return Result(
        id=info.run_id,
        name=info.run_name,
        experiment=experiment,
        params=params,
        tags=tags,
        profile=_profile(run),
        started=info.start_time,
        steps=int(params.get("train.max_iters", 0)),
        seconds=(info.end_time - info.start_time) / 1000,  # with the time between a kill and the next start
        scores=scores,
        evaluated=evaluated,
        curve=partial(_curve, client, info.run_id, info.start_time),
        sample=partial(_sample, client, info.run_id),
    )


def _profile(run: Any) -> dict[str, Any]:
    """meta.json of the run's tokens, from MLflow's dataset; empty if it is not there."""
    datasets = run.inputs.dataset_inputs if run.inputs else []
    profile: dict[str, Any] = json.loads(datasets[0].dataset.profile) if datasets else {}
    return profile


def _curve(client: Any, run_id: str, started: int) -> list[Point]:
    val, train, tokens = (
        {point.step: point for point in client.get_metric_history(run_id, key)}
        for key in (LOSS, "eval/train_loss", "tokens")
    )
    return [
        Point(
            step,
            int(tokens[step].value) if step in tokens else 0,
            (point.timestamp - started) / 1000,
            train[step].value if step in train else float("nan"),
            point.value,
        )
        for step, point in sorted(val.items())
    ]


def _sample(client: Any, run_id: str) -> str:
    """The last text of the run's table of samples; empty if there is none."""
    if SAMPLES not in {file.path for file in client.list_artifacts(run_id)}:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        table = json.loads(Path(client.download_artifacts(run_id, SAMPLES, folder)).read_text(encoding="utf-8"))
    return str(table["data"][-1][-1]) if table.get("data") else ""
