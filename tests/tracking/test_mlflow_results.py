import shutil

import pytest

from tests.runs import make_attempt, scored_run
from tracking.comparison import compare, journal_results
from tracking.journal import Journal
from tracking.mlflow_results import server_results
from tracking.mlflow_run import Replica, deliver_report
from tracking.mlflow_server import resolve_uri
from tracking.run import Run

EXPERIMENT = "test/one experiment"


@pytest.fixture
def repository(tmp_path, empty_database, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    return tmp_path


def test_mlflow_gives_the_comparison_that_the_journals_give(repository):
    uri = resolve_uri(repository)
    for name, loss, seed, batch in (("a", 2.0, 1, 4), ("b", 2.1, 2, 4), ("c", 1.5, 1, 8), ("d", 1.7, 2, 8)):
        Replica(Run(scored_run(repository, name, loss, seed=seed, params={"train.batch_size": batch})), uri).finish()
        deliver_report(repository / f".runs/reports/evaluate-{name}.json", uri, repository)
    unfinished = make_attempt(repository, "open")
    with Journal(unfinished / "journal.jsonl") as journal:
        journal.append("start", step=0, resumed=False)
    Replica(Run(unfinished), uri).push()

    from_server, left_out = server_results(repository, EXPERIMENT)
    (found,), (expected,) = (compare(results)[0] for results in (from_server, journal_results(repository)[0]))
    assert [(each.label, each.seeds) for each in found.settings] == [("batch_size=8", [1, 2]), ("batch_size=4", [1, 2])]
    assert found.differences == expected.differences
    for score in ("val_loss", "bits_per_byte", "excess", "floor"):
        assert found.settings[0].mean(score) == pytest.approx(expected.settings[0].mean(score)), score
    assert [line.split(" (")[0] for line in left_out] == ["open"]

    mine, theirs = (each.settings[0].results[0] for each in (found, expected))
    assert mine.model == theirs.model
    assert mine.sample() == theirs.sample()
    assert [(p.step, p.tokens, p.val_loss, p.train_loss) for p in mine.curve()] == [
        (p.step, p.tokens, p.val_loss, p.train_loss) for p in theirs.curve()
    ]


def test_an_unknown_experiment_is_reported_with_the_ones_that_exist(repository):
    Replica(Run(scored_run(repository, "a", 2.0)), resolve_uri(repository)).finish()
    with pytest.raises(ValueError, match=f"no experiment 'other'.*it has: .*{EXPERIMENT}"):
        server_results(repository, "other")
