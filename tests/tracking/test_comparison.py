import json

import pytest

from tests.runs import scored_run, write_report
from tracking import comparison, dvc_files
from tracking.comparison import compare, journal_results, select


def results(repository):
    return journal_results(repository)[0]


def labels(found):
    return [setting.label for setting in found.settings]


def test_runs_that_differ_only_in_their_seed_are_one_setting(tmp_path):
    for seed in (1, 2, 3):
        scored_run(tmp_path, f"slow-{seed}", 2.0 + seed / 100, seed=seed)
        scored_run(tmp_path, f"fast-{seed}", 1.5 + seed / 90, seed=seed, params={"train.muon_learning_rate": 0.04})
    (found,), left_out = compare(results(tmp_path))
    assert left_out == []
    assert labels(found) == ["muon_learning_rate=0.04", "muon_learning_rate=0.02"]
    assert [setting.seeds for setting in found.settings] == [[1, 2, 3], [1, 2, 3]]
    assert found.reference is found.settings[0]
    assert found.settings[1].mean("val_loss") == pytest.approx(2.02)
    assert found.settings[1].mean("excess") == pytest.approx(1.02)
    assert found.differences[0].paired
    assert found.differences[0].verdict == "worse"


def test_threads_make_another_setting_only_where_they_change_the_bits(tmp_path):
    for i, (threads, mode) in enumerate([("null", "portable"), (1, "portable"), (1, "machine"), (2, "machine")]):
        values = {"numerics.threads": threads, "numerics.determinism": mode}
        scored_run(tmp_path, f"run-{i}", 2.0 + i / 10, seed=i, params=values)
    (found,), _ = compare(results(tmp_path))
    assert [setting.seeds for setting in found.settings] == [[0, 1], [2], [3]]
    (found,), _ = compare([result for result in results(tmp_path) if result.seed < 2 or result.seed == 3])
    assert labels(found) == ["determinism=portable", "determinism=machine"]


def test_the_reference_is_the_best_setting_with_several_seeds_if_there_is_one(tmp_path):
    scored_run(tmp_path, "long", 1.5, params={"train.max_iters": 1200})
    assert compare(results(tmp_path))[0][0].reference.seeds == [1]
    for seed in (1, 2):
        scored_run(tmp_path, f"slow-{seed}", 2.0 + seed / 100, seed=seed, params={"train.max_iters": 100})
        values = {"train.max_iters": 100, "train.muon_learning_rate": 0.04}
        scored_run(tmp_path, f"fast-{seed}", 1.9 + seed / 101, seed=seed, params=values)
    (found,), _ = compare(results(tmp_path))
    assert (found.settings.index(found.reference), found.chosen) == (1, True)
    assert found.tests == 1, "a setting with one seed is no comparison"
    assert found.differences[0].p is None
    assert found.differences[1].verdict == "worse"


def test_names_of_parameters_are_as_short_as_is_unambiguous(tmp_path):
    for i, (batch, evaluated) in enumerate([(4, 8), (8, 16)]):
        params = {"train.batch_size": batch, "sample.batch_size": evaluated, "model.n_layer": i}
        scored_run(tmp_path, f"run-{i}", 2.0, params=params)
    (found,), _ = compare(results(tmp_path))
    assert labels(found)[0] == "n_layer=0 sample.batch_size=8 train.batch_size=4"


def test_the_newest_run_of_a_repeated_training_counts(tmp_path):
    scored_run(tmp_path, "first", 2.0)
    scored_run(tmp_path, "again", 1.9)
    info = tmp_path / ".runs/again/attempt-1/run.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"started": 1_800_000_000_000}))
    (found,), _ = compare(results(tmp_path))
    assert [result.name for result in found.settings[0].results] == ["again"]


def test_runs_of_other_code_are_another_setting_unless_their_models_are_equal(tmp_path):
    for name, code, model in (("old", "1" * 64, "a" * 64), ("same", "2" * 64, "a" * 64), ("other", "3" * 64, "b" * 64)):
        scored_run(tmp_path, name, 2.0, tags={"code.sha256": code, "git.commit": f"{name:x<40}"}, model=model)
    (found,), _ = compare(results(tmp_path))
    assert sorted(len(setting.results) for setting in found.settings) == [1, 1]
    assert "code=otherxx" in labels(found)


def test_code_of_the_same_commit_is_named_by_its_hash(tmp_path):
    for name, code in (("one", "1" * 64), ("two", "2" * 64)):
        scored_run(tmp_path, name, 2.0, tags={"code.sha256": code, "git.dirty": "true"})
    (found,), _ = compare(results(tmp_path))
    assert sorted(labels(found)) == ["code=aaaaaaa+~1111", "code=aaaaaaa+~2222"]


def test_losses_of_other_texts_are_not_compared(tmp_path):
    scored_run(tmp_path, "one", 2.0)
    scored_run(tmp_path, "two", 1.0, params={"download.source": "shakespeare"}, profile={"sha256": "f" * 64})
    scored_run(tmp_path, "edited", 1.0, profile={"sha256": "d" * 64, "bytes": 901})
    found, _ = compare(results(tmp_path))
    assert [len(each.settings) for each in found] == [1, 1, 1]


def test_other_tokenizers_are_compared_in_bits_per_byte(tmp_path):
    scored_run(tmp_path, "bpe", 2.0)
    scored_run(tmp_path, "char", 1.0, params={"tokenize.tokenizer": "char"}, profile={"sha256": "f" * 64})
    (found,), _ = compare(results(tmp_path))
    assert found.score == "bits_per_byte"
    assert labels(found) == ["tokenizer=char", "tokenizer=bpe"]


def test_models_that_were_scored_in_different_ways_are_not_compared(tmp_path):
    scored_run(tmp_path, "one", 2.0)
    scored_run(tmp_path, "two", 1.0, params={"train.batch_size": 2})
    path = tmp_path / ".runs/reports/evaluate-two.json"
    path.write_text(path.read_text().replace('"evaluate.stride": "null"', '"evaluate.stride": "1"'))
    assert len(compare(results(tmp_path))[0]) == 2


def test_the_newest_score_of_a_model_counts_or_that_of_the_requested_method(tmp_path):
    scored_run(tmp_path, "one", 2.0)
    first = tmp_path / ".runs/reports/evaluate-one.json"
    report = json.loads(first.read_text())
    tags = {"evaluate.stride": "16"}
    later = report | {"t": report["t"] + 1, "tags": tags, "metrics": {"evaluate/val_loss": 1.9}}
    first.with_name("evaluate-two.json").write_text(json.dumps(later))
    for way, loss in ((None, 1.9), ("stride 16", 1.9), ("stride null", 2.0)):
        (found,), _ = journal_results(tmp_path, way)
        assert found.scores["val_loss"] == loss
        assert found.evaluated == (way or "stride 16")


def test_runs_without_a_score_of_the_whole_split_are_left_out(tmp_path):
    scored_run(tmp_path, "one", 2.0)
    scored_run(tmp_path, "two", 1.0, params={"train.batch_size": 2})
    (tmp_path / ".runs/reports/evaluate-two.json").unlink()
    (found,), left_out = compare(results(tmp_path))
    assert [result.name for setting in found.settings for result in setting.results] == ["one"]
    assert left_out[0].startswith("two (.runs/two/attempt-1) has no score")
    (tmp_path / ".runs/reports/evaluate-one.json").unlink()
    (found,), left_out = compare(results(tmp_path))  # then training's own losses are compared
    assert left_out == []
    assert [setting.mean("val_loss") for setting in found.settings] == [1.01, 2.01]


def test_unfinished_and_damaged_runs_are_left_out_with_the_reason(tmp_path):
    for name in ("good", "cut", "broken", "failed"):
        scored_run(tmp_path, name, 2.0)
    journal = tmp_path / ".runs/cut/attempt-1/journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-1]))
    (tmp_path / ".runs/broken/attempt-1/run.json").write_text("{")
    journal = tmp_path / ".runs/failed/attempt-1/journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"FINISHED"', b'"FAILED"'))
    write_report(tmp_path).with_name("evaluate-broken.json").write_text("{")
    found, left_out = journal_results(tmp_path)
    assert [result.name for result in found] == ["good"]
    text = "\n".join(sorted(left_out))
    assert ".runs/broken/attempt-1 is damaged (JSONDecodeError" in text
    assert "cut (.runs/cut/attempt-1) has not finished, or was killed" in text
    assert "failed (.runs/failed/attempt-1) failed" in text


def test_a_baseline_replaces_the_best_setting_as_reference(tmp_path):
    for i, loss in enumerate((2.0, 1.5, 1.7)):
        scored_run(tmp_path, f"run-{i}", loss, params={"train.batch_size": i + 1})
    (found,), _ = compare(results(tmp_path), lambda result: result.name == "run-0")
    assert found.reference.label == "batch_size=1"
    assert [diff.mean for diff in found.differences] == pytest.approx([-0.5, -0.3])
    assert (found.chosen, found.tests) == (False, 2)
    assert compare(results(tmp_path))[0][0].tests == 3  # the best of three is the best of three pairs
    with pytest.raises(ValueError, match="3 settings: batch_size=2; batch_size=3; batch_size=1; give one"):
        compare(results(tmp_path), lambda result: True)
    with pytest.raises(ValueError, match="none of the runs"):
        compare(results(tmp_path), lambda result: False)


def test_the_curve_has_steps_tokens_and_seconds(tmp_path):
    scored_run(tmp_path, "run", 2.0)
    (result,) = results(tmp_path)
    points = result.curve()
    assert [point.step for point in points] == [0, 10, 20, 30, 40]
    assert (points[2].tokens, points[2].seconds, points[2].val_loss) == (10240, 0.201, 3.0)
    assert result.seconds == 0.405
    assert result.sample() == "text of 40 <!-- x -->\nü"


def test_a_run_can_be_named_in_many_ways(tmp_path):
    tags = {"dvc.experiment": "idea-1", "fingerprint": "f1" * 32}
    scored_run(tmp_path, "one", 2.0, tags=tags)
    scored_run(tmp_path, "two", 1.0, params={"train.batch_size": 2}, tags={"dvc.experiment": "idea-2"})
    both = results(tmp_path)
    one = next(result for result in both if result.name == "one")
    for argument in ("one", "idea-1", ".runs/one/attempt-1", ".runs/one", one.model[:7], "f1f1f1f1", "*-1", "on[e]"):
        assert select(both, argument, tmp_path) == [one], argument
    assert select(both, "idea-*", tmp_path) == both
    with pytest.raises(ValueError, match=r"no finished run is 'idea-3'.*did you mean 'idea-[12]'"):
        select(both, "idea-3", tmp_path)
    with pytest.raises(ValueError, match="no finished run is 'x'"):
        select(both, "x", tmp_path)


def test_an_experiment_that_another_clone_trained_is_named_with_the_ways_to_see_it(tmp_path, monkeypatch):
    ref = f"refs/exps/aa/{'a' * 38}/pulled"
    monkeypatch.setattr(comparison, "experiment_refs", lambda root, name: [ref] if name == "pulled" else [])
    with pytest.raises(ValueError, match=r"no run of experiment 'pulled' is here, .*`dvc exp show`.*--server"):
        select([], "pulled", tmp_path)


def test_a_commit_that_another_clone_trained_is_named_with_the_way_to_its_losses(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "resolve_commit", lambda root, revision: "b" * 40)
    with pytest.raises(ValueError, match=r"no run of commit 'HEAD~4' is here: `dvc metrics diff HEAD~4 HEAD` has its"):
        select([], "HEAD~4", tmp_path)


def test_a_commit_names_the_model_in_its_lock_rather_than_the_runs_started_at_it(tmp_path, monkeypatch):
    scored_run(tmp_path, "held", 2.0)
    scored_run(tmp_path, "begun", 1.0, params={"train.batch_size": 2}, tags={"git.commit": "b" * 40})
    both = results(tmp_path)
    held, begun = (next(result for result in both if result.name == name) for name in ("held", "begun"))
    lock = f"stages: {{train: {{outs: [{{path: model, md5: {held.tags['model.md5']}}}]}}}}"
    monkeypatch.setattr(dvc_files, "git_or_none", lambda root, _, path: lock if path.startswith("here:") else None)
    monkeypatch.setattr(comparison, "resolve_commit", lambda root, revision: "b" * 40)
    assert select(both, "here", tmp_path) == [held]
    assert select(both, "elsewhere", tmp_path) == [begun]


def test_an_unknown_argument_does_not_name_runs_without_a_commit(tmp_path):
    scored_run(tmp_path, "one", 2.0)
    (result,) = results(tmp_path)
    del result.tags["git.commit"]
    with pytest.raises(ValueError, match="no finished run is 'x'"):
        select([result], "x", tmp_path)
