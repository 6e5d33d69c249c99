"""What the saved view holds; tests/pipeline/test_page.py looks at the page that MLflow makes of it."""

import base64
import json
import shutil
import zlib
from pathlib import Path

from tests.runs import finished_attempt, make_attempt
from tracking import mlflow_view
from tracking.mlflow_page import BEST, METRICS, REPORTED, TOKENS
from tracking.mlflow_run import Replica
from tracking.mlflow_server import connect, resolve_uri
from tracking.run import Run


def test_columns_are_the_parameters_in_which_runs_differ_and_the_seed() -> None:
    runs = [{"a": "1", "b": "1", "c": str(n % 2), "d": str(n), "train.seed": str(n)} for n in range(3)]
    assert mlflow_view.differing(runs) == ["d", "c"]
    assert mlflow_view.differing([*runs, {"a": "1", "train.seed": "1"}]) == ["d", "c", "b"]  # of an older version
    columns = mlflow_view.view(runs)["selectedColumns"]
    assert columns == [
        *("metrics.`val_loss`", "metrics.`excess`", "metrics.`bits_per_byte`"),
        *("params.`d`", "params.`c`", "params.`train.seed`", "attributes.`Duration`"),
    ]
    assert mlflow_view.differing([]) == []


def test_many_parameters_that_differ_fit_the_tag() -> None:
    runs = [{f"train.a_parameter_with_a_long_name_{n}": str(run) for n in range(90)} for run in range(2)]
    view = json.dumps(mlflow_view.view(runs))
    assert len(mlflow_view.differing(runs)) == mlflow_view.MAX_PARAMS
    assert len(base64.b64encode(zlib.compress(view.encode(), 9))) < 4000  # of 5,000 that every server takes


def test_the_validation_loss_is_the_first_chart_and_each_metric_has_one_or_none() -> None:
    charts = mlflow_view.view([])["compareRunCharts"]
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


def test_a_finished_run_saves_the_view_of_its_experiment(tmp_path: Path, empty_database: Path, monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    attempts = [finished_attempt(tmp_path), make_attempt(tmp_path, "other", params={"model.n_embd": 64})]
    uri = resolve_uri(tmp_path)
    Replica(Run(attempts[1]), uri).push()
    Replica(Run(attempts[0]), uri).finish()
    client = connect(uri, tmp_path)
    experiment = client.get_experiment_by_name("test/one experiment")
    packed = experiment.tags[mlflow_view.TAG].removeprefix("deflate;")
    view = json.loads(zlib.decompress(base64.b64decode(packed)))
    assert "params.`model.n_embd`" in view["selectedColumns"]
    assert mlflow_view.save_of(client, "test/one experiment") == experiment.experiment_id
    assert mlflow_view.save_of(client, "another") is None
