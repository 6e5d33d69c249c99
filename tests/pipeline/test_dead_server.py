"""A tracking server that is gone costs nothing but the delay."""

import pytest

from tests.pipeline.clones import closed_port
from tests.pipeline.test_secrets import ENVIRONMENT, IN_ADDRESS, leaks

pytestmark = pytest.mark.pipeline


def test_without_a_server_the_pipeline_succeeds_and_sync_brings_everything_later(seed, copy_of):
    """The only test that finds a stage that a dead server holds up, a report that is lost, or a secret that is told."""
    clone = copy_of(seed, runs=False)
    (clone.path / "mlflow.db").unlink()
    clone.set_params(**{"tracking.wait_seconds": 1})
    clone.forget("train", "evaluate", "sample")
    no_uri = f"http://user:p/{IN_ADDRESS}@127.0.0.1:{closed_port()}"
    uri = f"http://user:p@{IN_ADDRESS}@127.0.0.1:{closed_port()}/?token={IN_ADDRESS}"
    output = clone.repro("train", MLFLOW_TRACKING_URI=no_uri, **ENVIRONMENT)
    output += clone.repro(MLFLOW_TRACKING_URI=uri, **ENVIRONMENT)
    assert output.count("`python -m tools sync` sends it later") == 3, output
    assert clone.lock() == seed.lock()
    assert clone.outs() == seed.outs()
    assert not (clone.path / "mlflow.db").exists()
    assert clone.processes() == []

    for address in (no_uri, uri):
        printed = clone.run("python -m tools sync", check=1, MLFLOW_TRACKING_URI=address, **ENVIRONMENT)
        assert "failed: MLflow at " in printed
        output += printed
    output += clone.run("python -m tools sync", **ENVIRONMENT)
    assert "is complete in MLflow" in output
    assert leaks(clone, output) == []
    (run,), (reference,) = clone.runs(), seed.runs()
    assert run.info.status == "FINISHED"
    assert run.data.params == reference.data.params
    assert set(run.data.metrics) >= set(reference.data.metrics)
    scores = clone.scores()
    assert {key: run.data.metrics[key] for key in scores} == scores
    for key in ("train/loss", "eval/val_loss", "tokens_per_second"):
        assert clone.history(run, key) == seed.history(reference, key)
    models, expected = (
        sorted(model.name for model in each.client().search_logged_models([of.info.experiment_id]))
        for each, of in ((clone, run), (seed, reference))
    )
    assert models == expected
    assert "has everything" in clone.tool("sync")
