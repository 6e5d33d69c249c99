import re
import shutil

import pytest
from click.testing import CliRunner, Result

from tests.runs import scored_run
from tools import champion
from tools.__main__ import main
from tracking.comparison import journal_results
from tracking.mlflow_run import Replica, deliver_report
from tracking.mlflow_server import connect, resolve_uri
from tracking.run import Run


@pytest.fixture
def root(tmp_path, empty_database, monkeypatch):
    """A repository with two settings of two seeds, also in MLflow; `fast` is better, and verify passes."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    for seed, (slow, fast) in enumerate([(2.0, 1.9), (2.05, 1.9501)], 1):
        add(tmp_path, f"slow-{seed}", slow, seed, 0.02)
        add(tmp_path, f"fast-{seed}", fast, seed, 0.04)
    monkeypatch.setattr(champion, "not_reproduced", lambda root, result: [])
    return tmp_path


def add(root, name: str, loss: float, seed: int, rate: float) -> None:
    attempt = scored_run(root, name, loss, seed=seed, params={"train.muon_learning_rate": rate})
    if seed == 1:  # the better one, which may become the champion
        (attempt / "models/best").mkdir(parents=True)
        (attempt / "models/best/weights.safetensors").write_text(name)
    uri = resolve_uri(root)
    Replica(Run(attempt), uri).finish()
    deliver_report(root / f".runs/reports/evaluate-{name}.json", uri, root)


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code, result.output
    return result


def current(root):
    client = connect(resolve_uri(root), root)
    version = client.get_model_version_by_alias("nanogpt", "champion")
    return client.get_run(version.run_id).info.run_name, version


def test_a_champion_is_beaten_only_by_a_verdict(root):
    assert "no champion yet" in run("serve", code=1).stderr
    assert run("champion", "slow-*").stdout == "slow-1 is the champion: version 1 of nanogpt, val loss 2.0000\n"
    assert "slow-1 is the champion already" in run("champion", "slow-*").stdout
    assert run("champion", "fast-*").stdout == "fast-1 is the champion: version 2 of nanogpt, val loss 1.9000\n"
    refused = run("champion", "slow-*", code=1).stderr
    assert re.search(r"against fast-1, \+0.0999 \[.*\]: worse. --force registers it anyway", refused)
    refused = run("champion", "*-1", code=1).stderr
    assert "that is 2 settings: muon_learning_rate=0.02; muon_learning_rate=0.04; choose one" in refused
    name, version = current(root)
    assert (name, version.tags.keys()) == ("fast-1", {"model.sha256"})
    assert re.fullmatch(r"models:/m-[0-9a-f]{32}", version.source)  # no path, which a moved repository would break
    shutil.rmtree(root / ".runs/fast-1")
    assert "is neither in this repository nor in tracking.experiment" in run("champion", "slow-*", code=1).stderr


def test_a_champion_of_the_meantime_is_not_replaced_without_a_comparison(root, monkeypatch):
    """While a member's run is verified, which takes minutes, a colleague registers another one."""
    colleague = next(result for result in journal_results(root)[0] if result.name == "fast-1")

    def verify(root, result):
        champion.register(connect(resolve_uri(root), root), colleague, [])
        return []

    monkeypatch.setattr(champion, "not_reproduced", verify)
    refused = run("champion", "slow-*", code=1).stderr
    assert "version 1 of nanogpt became the champion in the meantime; run this again" in refused
    assert current(root)[0] == "fast-1"


def test_a_run_that_only_the_team_has_can_become_and_be_the_champion(root, monkeypatch):
    monkeypatch.setattr(champion, "is_server", lambda uri: True)
    monkeypatch.setattr(champion, "experiment_here", lambda: "test/one experiment")
    shutil.rmtree(root / ".runs/fast-1")
    assert "fast-1 is the champion: version 1" in run("champion", "fast-*").stdout
    assert "against fast-1, +0.0999 [" in run("champion", "slow-*", code=1).stderr


def test_a_run_that_mlflow_lacks_is_sent_by_sync(root):
    scored_run(root, "late", 1.8, params={"train.muon_learning_rate": 0.08})
    assert (
        "MLflow has no run .runs/late/attempt-1; `python -m tools sync` sends it"
        in run("champion", "late", "--force", code=1).stderr
    )


def test_what_does_not_come_out_again_needs_force(root, monkeypatch):
    monkeypatch.setattr(champion, "not_reproduced", lambda root, result: ["`verify` of abc says DIVERGED"])
    assert (
        "fast-1 does not become the champion: `verify` of abc says DIVERGED" in run("champion", "fast-*", code=1).stderr
    )
    run("champion", "fast-*", "--force")
    assert current(root)[1].tags["forced"] == "`verify` of abc says DIVERGED"
    assert "MLflow has no model of run" in run("champion", "slow-2", "--force", code=1).stderr


def test_other_code_with_the_same_parameters_can_beat_the_champion(tmp_path):
    for seed, (old, new) in enumerate([(2.0, 1.9), (2.05, 1.9501)], 1):
        scored_run(tmp_path, f"old-{seed}", old, seed=seed, tags={"code.sha256": "1" * 64})
        scored_run(tmp_path, f"new-{seed}", new, seed=seed, tags={"code.sha256": "2" * 64})
    results = {result.name: result for result in journal_results(tmp_path)[0]}
    assert champion.against([*results.values()], results["new-1"], results["old-1"].id) == []
    (objection,) = champion.against([*results.values()], results["old-1"], results["new-1"].id)
    assert objection.endswith(": worse")
    (objection,) = champion.against([*results.values()], results["old-2"], results["old-1"].id)
    assert "is the same setting" in objection


def test_runs_of_several_texts_are_several_settings(tmp_path):
    scored_run(tmp_path, "one", 2.0)
    scored_run(tmp_path, "two", 1.0, params={"download.source": "shakespeare"}, profile={"sha256": "f" * 64})
    with pytest.raises(ValueError, match="that is 2 settings"):
        champion.best_of(journal_results(tmp_path)[0])
