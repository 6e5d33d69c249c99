"""The content of the saved view; tests/pipeline/test_page.py checks the page that MLflow makes of it."""

import base64
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

from tests.runs import finished_attempt, make_attempt
from tracking import mlflow_view
from tracking.mlflow_page import BEST, METRICS, REPORTED, TOKENS
from tracking.mlflow_run import Replica
from tracking.mlflow_server import resolve_uri
from tracking.run import Run


def test_columns_are_the_parameters_in_which_runs_differ_and_the_seed() -> None:
    runs = [{"a": "1", "b": "1", "c": str(n % 2), "d": str(n), "train.seed": str(n)} for n in range(3)]
    assert mlflow_view.differing(runs) == ["d", "c"]
    assert mlflow_view.differing([*runs, {"a": "1", "train.seed": "1"}]) == ["d", "c", "b"]  # of an older version
    columns = mlflow_view.view(runs, False)["selectedColumns"]
    assert columns == [
        *("metrics.`val_loss`", "metrics.`excess`", "metrics.`bits_per_byte`"),
        *("params.`d`", "params.`c`", "params.`train.seed`", "attributes.`Duration`"),
    ]
    assert mlflow_view.differing([]) == []


def test_many_parameters_that_differ_fit_the_tag() -> None:
    runs = [{f"train.a_parameter_with_a_long_name_{n}": str(run) for n in range(90)} for run in range(2)]
    view = json.dumps(mlflow_view.view(runs, True))
    assert len(mlflow_view.differing(runs)) == mlflow_view.MAX_PARAMS
    assert len(base64.b64encode(zlib.compress(view.encode(), 9))) < 4000  # of 5,000 that every server takes


def test_the_validation_loss_is_the_first_chart_and_each_metric_has_one_or_none() -> None:
    charts = mlflow_view.view([], False)["compareRunCharts"]
    shown = [(chart["metricKey"], chart["selectedXAxisMetricKey"]) for chart in charts if not chart["deleted"]]
    assert shown[:4] == [
        ("eval/val_loss", ""),
        ("eval/val_loss", "tokens"),
        ("train/loss", ""),
        ("train/loss", "tokens"),
    ]
    assert len({chart["uuid"] for chart in charts}) == len(charts)
    metrics = {name for names in METRICS.values() for name in names.values()} | {*REPORTED.values(), BEST, TOKENS}
    assert {chart["metricKey"] for chart in charts} == metrics


def test_addresses() -> None:
    runs = "http://host:1/#/experiments/7/runs?viewStateShareKey=nanogpt&workflowType=machine_learning"
    assert mlflow_view.address("http://host:1", "7") == mlflow_view.address("http://host:1/", "7") == runs
    assert mlflow_view.address("http://host:1", None) == "http://host:1/#/experiments?workflowType=machine_learning"


def saved(client: Any, experiment: str) -> dict[str, Any]:
    packed = client.get_experiment(experiment).tags[mlflow_view.TAG].removeprefix("deflate;")
    view: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(packed)))
    return view


def test_a_finished_run_saves_the_view_of_its_experiment(tmp_path: Path, empty_database: Path, monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    attempts = [finished_attempt(tmp_path), make_attempt(tmp_path, "other", params={"model.n_embd": 64})]
    uri = resolve_uri(tmp_path)
    Replica(Run(attempts[1]), uri).push()
    replica = Replica(Run(attempts[0]), uri)
    replica.finish()
    client = replica._client
    experiment = client.get_experiment_by_name("test/one experiment")
    view = saved(client, experiment.experiment_id)
    assert "params.`model.n_embd`" in view["selectedColumns"]
    assert view["groupBy"] is None  # of an older version, they name no setting
    for run in client.search_runs([experiment.experiment_id]):
        client.set_tag(run.info.run_id, "setting", "n_embd=64")
    pulled = client.create_run(experiment.experiment_id, 0, "pulled", {"model.pulled": "x"})
    mlflow_view.save(client, experiment.experiment_id)
    assert saved(client, experiment.experiment_id)["groupBy"]["groupByKeys"][0]["groupByData"] == "setting"
    client.set_tag(replica.run_id, "setting", "n_embd=32")
    mlflow_view.save(client, experiment.experiment_id)
    assert saved(client, experiment.experiment_id)["groupBy"] is None
    client.delete_run(pulled.info.run_id)
    assert mlflow_view.save_of(client, "test/one experiment") == experiment.experiment_id
    assert mlflow_view.save_of(client, "another") is None
