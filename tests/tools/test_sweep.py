import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nanogpt.params import flatten, load_params, with_values
from tests.conftest import BUILT_IN
from tests.runs import end, make_attempt, start, write_report
from tools import sweep_run, trial
from tools.__main__ import main
from tracking.fingerprint import code_hash
from tracking.journal import Journal

SPACE = """
parameters:
  train.muon_learning_rate: {low: 0.005, high: 0.2, log: true}
  train.learning_rate: [0.003, 0.01, 0.03, 0.1]
"""
LAST = 90


class Trainings:
    """In place of DVC: writes the journal of a training whose loss is a function of its parameters."""

    def __init__(self, root: Path):
        self.root, self.calls, self.fail, self.cached = root, [], None, ()

    def loss(self, params, step):
        far = abs(math.log(params["train.muon_learning_rate"] / 0.08)) + abs(
            math.log(params["train.learning_rate"] / 0.01)
        )
        return 2 + far / 5 + 100 / (step + 10) + math.sin(1e4 * params["train.seed"] * far) / 50

    def __call__(self, root, name, values, pause=None, force=False):
        self.calls.append((name, pause))
        log = root / f"{name}.log"
        log.write_text("ERROR: it broke\n")
        if self.fail and self.fail(name, values):
            return 1, log
        if name in self.cached and not force:
            return 0, log
        params = with_values(load_params(root / "params.yaml"), values)
        flat = {k: v for part in trial.SECTIONS for k, v in flatten(getattr(params, part), f"{part}.").items()}
        folder = f"{name}-run"
        attempt = root / ".runs" / folder / "attempt-1"
        if not attempt.exists():
            val = {"bytes": 900, "documents": 3, "tokens": 450, "sha256": "e" * 64}
            tags = {"code.sha256": code_hash(root, "stages.train"), "dvc.experiment": "none", "git.commit": "a" * 40}
            profile = {"train": {"bytes": 8000, "documents": 30}, "val": val}
            make_attempt(root, folder, params=flat, tags=tags, dataset={"name": "g", "source": "", "profile": profile})
        diverges = params.train.muon_learning_rate > 0.15
        with Journal(attempt / "journal.jsonl") as journal:
            start(journal)
            for step in range(0, (pause or LAST) + 1, 10):
                if diverges and step > 10:
                    end(journal, "FAILED", step, diverged=step)
                    return 1, log
                journal.append("eval", step=step, val_loss=self.loss(flat, step), train_loss=1.0, tokens=step)
            made = {"model_sha256": name.ljust(64, "0"), "model_md5": name.ljust(32, "0")}
            if pause is None:
                end(journal, "FINISHED", LAST, val_loss=1.0, steps=LAST, **made)
            else:
                end(journal, "KILLED", pause)
        if pause is None:
            loss = self.loss(flat, LAST)
            report = write_report(root, model=made["model_sha256"], metrics={"evaluate/val_loss": loss})
            report.rename(report.with_name(f"evaluate-{name}.json"))
        return 1 if pause else 0, log


@pytest.fixture
def root(project, monkeypatch):
    bad = {"train.muon_learning_rate": 0.001}  # so that every trial is better
    root = project(**{"train.max_iters": LAST, "train.eval_interval": 10, **bad})
    (root / "stages").mkdir()
    (root / "stages/train.py").write_text('"""Trains."""\n')
    (root / "lr.yaml").write_text(SPACE)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return root


@pytest.fixture
def trainings(root, monkeypatch):
    fake = Trainings(root)
    monkeypatch.setattr(sweep_run, "experiment", fake)
    monkeypatch.setattr(trial, "experiment", fake)
    return fake


def sweep(*arguments: str, code: int) -> Result:
    result = CliRunner().invoke(main, ["sweep", "lr.yaml", *arguments])
    assert result.exit_code == code, result.output
    return result


def study(root: Path) -> list[dict]:
    trials = json.loads((root / ".runs/sweeps/lr/study.json").read_text())["trials"]
    return [{name: value for name, value in each.items() if name != "seconds"} for each in trials]


def test_the_best_is_found_confirmed_and_explained(root, trainings):
    found = json.loads(sweep("--budget", "36 trials", "--json", code=0).stdout)
    assert found["decision"] == "keep"
    assert found["best"]["values"]["train.learning_rate"] == 0.01
    assert 0.05 < found["best"]["values"]["train.muon_learning_rate"] < 0.12
    assert found["importance"].keys() == found["best"]["values"].keys()
    assert found["region"]["train.learning_rate"] == [0.01]
    assert len(found["trials"]) == 36
    steps = sum(max(int(step) for step in each["losses"]) for each in found["trials"])
    assert steps < 0.45 * 36 * LAST
    seeds = {run["seed"] for setting in found["confirmation"]["settings"] for run in setting["runs"]}
    assert seeds == {1338, 1339, 1340, 1341, 1342}
    printed = sweep("--budget", "36 trials", code=0).stdout
    assert "36 trials: " in printed
    assert "keep: trial " in printed
    assert "as good within noise" in printed


def test_no_training_is_done_twice_and_a_promoted_one_goes_on(root, trainings):
    sweep("--budget", "18 trials", code=0)
    assert len(trainings.calls) == len(set(trainings.calls))
    to_the_end = {name for name, pause in trainings.calls if pause is None}
    assert any((name, 10) in trainings.calls and (name, 30) in trainings.calls for name in to_the_end)
    before = len(trainings.calls)
    sweep("--budget", "18 trials", code=0)
    assert len(trainings.calls) == before
    sweep("--budget", "20 trials", code=0)  # a larger budget goes on
    assert len(study(root)) == 20


@pytest.mark.parametrize("killed_after", [4, 10, 15])
def test_a_killed_sweep_makes_the_same_trials(root, trainings, killed_after):
    class Killed(BaseException):
        pass

    def kill(name, values):
        if len(trainings.calls) == killed_after:
            raise Killed

    trainings.fail = kill
    with pytest.raises(Killed):
        CliRunner().invoke(main, ["sweep", "lr.yaml", "--budget", "18 trials"])
    trainings.fail = None
    sweep("--budget", "18 trials", "--confirm", "0", code=3)
    continued, calls = study(root), sorted(map(str, trainings.calls))
    (root / ".runs/sweeps/lr/study.json").unlink()
    sweep("--budget", "18 trials", "--confirm", "0", "-j", "3", code=3)  # from the runs alone, and in parallel
    assert study(root) == continued
    assert len(calls) - len(set(calls)) <= 1
    assert sorted(map(str, trainings.calls)) == calls


def test_a_failed_trial_does_not_end_the_sweep(root, trainings):
    trainings.fail = lambda name, values: name == "lr-3"
    printed = sweep("--budget", "9 trials", "--confirm", "0", code=3).stdout
    assert "1 failed" in printed
    assert "trial   3  step     10    failed" in printed


def test_a_result_from_dvc_s_cache_is_made_again(root, trainings):
    trainings.cached = ("lr-0", "lr-1-1338")
    sweep("--budget", "4 trials", "--confirm", "2", code=3)
    assert [name for name, _ in trainings.calls].count("lr-0") == 2


def test_a_diverged_trial_is_a_result(root, trainings):
    sweep("--budget", "27 trials", code=0)
    assert any(math.inf in dict(each["losses"]).values() for each in study(root))


def test_params_that_fail_themselves_end_the_sweep_with_the_reason(root, trainings):
    trainings.fail = lambda name, values: True
    assert "experiment lr-0 failed: ERROR: it broke" in sweep(code=2).stderr
    trainings.fail = None
    sweep("--confirm", "0", code=3)  # as the message says: repeat the command


@pytest.mark.parametrize(
    ("budget", "trials"), [("5 trials", 5), ("400 steps", 11), ("180 steps", 4), ("4e12 FLOPs", 11), ("20s", 12)]
)
def test_budgets(root, trainings, monkeypatch, budget, trials):
    monkeypatch.setattr(sweep_run, "flops_per_step", lambda side: 1e10)
    monkeypatch.setattr(sweep_run, "timed", lambda function, trial, rung: (function(trial, rung), 1.0))
    sweep("--budget", budget, "--confirm", "0", code=3)
    assert len(study(root)) == pytest.approx(trials, rel=0.4)


def test_all_combinations_of_a_small_space_are_tried_once(root, trainings):
    (root / "lr.yaml").write_text("parameters: {train.learning_rate: [0.005, 0.02, 0.08], train.beta1: [0.8, 0.9]}")
    sweep("--budget", "1000 trials", code=1)
    values = [json.dumps(each["values"]) for each in study(root)]
    assert len(values) == len(set(values)) == 6  # params.yaml is one of them


def test_constraints_are_met(root, trainings):
    (root / "lr.yaml").write_text(SPACE + "constraints: [train.learning_rate >= train.muon_learning_rate]\n")
    sweep("--budget", "18 trials", "--confirm", "0", code=3)
    for each in study(root)[1:]:
        assert each["values"]["train.learning_rate"] >= each["values"]["train.muon_learning_rate"]


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("", "lr.yaml is empty"),
        ("parameters: [1", "lr.yaml is not valid YAML (while parsing"),
        ("x: 1", "lr.yaml: x is not a known key"),
        ("parameters: {}", "parameters is missing; add it"),
        ("parameters: {train.lerning_rate: [1.0]}", "train.lerning_rate = 1.0 is not a known parameter; did you mean"),
        ("parameters: {train.learning_rate: [0.1, x]}", "lr.yaml: train.learning_rate = 'x' is invalid"),
        ("parameters: {train.learning_rate: {low: -1, high: 1}}", "train.learning_rate = -1 is invalid"),
        ("parameters: {train.learning_rate: {low: 1}}", "has low = 1 and high = None"),
        ("parameters: {train.learning_rate: {lo: 1}}", "train.learning_rate.lo is not a known key; did you mean"),
        ("parameters: {train.min_lr: {low: 0.0, high: 1.0, log: true}}", "a log scale needs"),
        ("parameters: {train.learning_rate: 0.1}", "is one value; write a list"),
        ("parameters: {train.beta1: [0.8, 0.8]}", "a list with a value twice"),
        ("parameters: {train.seed: [1, 2]}", "the sweep chooses the seeds; remove the line"),
        ("parameters: {train.batch_size: [1, 2]}", "different numbers of tokens"),
        ("parameters: {download.documents: [100, 200]}", "is no hyperparameter"),
        ("parameters: {sample.top_k: [1, 2]}", "is no hyperparameter"),
        ("parameters: {model.n_head: [5, 7]}", "no combination may be tried: lr.yaml: model.n_embd = 96 is not"),
        (
            SPACE + "constraints: [train.beta1 > 1]",
            "no combination may be tried: lr.yaml: constraint 'train.beta1 > 1'",
        ),
        (SPACE + "constraints: [train.beta3 > 1]", "train.beta3 is not a key of params.yaml; did you mean train.beta"),
        (SPACE + "constraints: ['open(1)']", "constraint 'open(1)' is invalid: write comparisons"),
        (SPACE + "constraints: ['1 +']", "constraint '1 +' is invalid"),
    ],
)
def test_a_wrong_space_is_refused_before_anything_runs(root, trainings, space, message):
    (root / "lr.yaml").write_text(space)
    assert message in sweep(code=2).stderr
    assert not trainings.calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "often"], "--budget 'often' is invalid: write 30m"),
        (["--budget", "50 steps"], "--budget of 50 steps is less than one training, train.max_iters = 90"),
        (["--name", "a/b"], "--name 'a/b' is invalid"),
    ],
)
def test_wrong_options_are_refused(root, trainings, arguments, message):
    assert message in sweep(*arguments, code=2).stderr
    assert not trainings.calls


def test_another_space_needs_another_name(root, trainings):
    sweep("--budget", "4 trials", "--confirm", "0", code=3)
    (root / "lr.yaml").write_text(SPACE.replace("0.2", "0.3"))
    assert "is a sweep with another space; give this one another --name" in sweep(code=2).stderr
    sweep("--name", "wider", "--budget", "4 trials", "--confirm", "0", code=3)


def test_repository_s_params_have_rungs():
    from tools.sweep import rungs

    assert rungs(load_params(BUILT_IN).train) == [100, 400, 1200]
