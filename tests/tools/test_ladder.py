import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nanogpt.params import flatten, parse_params
from nanogpt.scaling import Law, fit
from tests.conftest import BUILT_IN
from tests.runs import scored_run
from tools import ladder_prediction, ladder_run, trial
from tools.__main__ import main
from tools.ladder_run import Grid, Ladder
from tracking.fingerprint import code_hash

TRUE = Law(1.04, 60.0, 0.45, 900.0, 0.55)
ARGUMENTS = ("--name", "small", "--depths", "1,2,3", "--tokens", "300k,0.6M,1200000")
SENT: list[tuple[object, ...]] = []  # reports to MLflow
PREDICTION = Path("experiments/ladders/small.json")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A git repository with params.yaml and a train stage, where DVC must not be called."""
    (tmp_path / "params.yaml").write_text(BUILT_IN.read_text())
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages/train.py").write_text('"""Trains."""\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr(trial, "dvc", lambda *arguments: pytest.fail(f"{arguments} was run"))
    monkeypatch.setattr(ladder_prediction, "report", lambda *arguments: SENT.append(arguments))
    monkeypatch.setattr(fit, "__defaults__", (20,))  # samples of the bootstrap
    git("init", "-q")
    commit("params.yaml")
    return tmp_path


def git(*arguments: str) -> str:
    who = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    return subprocess.run(["git", *who, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def commit(path: str | Path) -> str:
    git("add", str(path))
    git("commit", "-qm", "more")
    return git("rev-parse", "HEAD")


def finished(root: Path, name: str, loss: float, overrides: dict[str, object], at: str = "a" * 40) -> None:
    """A finished run of params.yaml with other values, started at a commit."""
    params = parse_params((root / "params.yaml").read_text(), Path("params.yaml"))
    flat = {k: v for part in trial.SECTIONS for k, v in flatten(getattr(params, part), f"{part}.").items()}
    tags = {"code.sha256": code_hash(root, "stages.train"), "git.commit": at}
    scored_run(root, name, loss, seed=1337, params=flat | overrides, tags=tags)


def train_all(root: Path) -> Ladder:
    """The runs of the ladder, with the losses of a law and some noise."""
    ladder = ladder_run.plan(root, "small", [], Grid([1, 2, 3], [300_000, 600_000, 1_200_000], None, 1))
    for i, rung in enumerate(ladder.rungs):
        loss = TRUE.loss(rung.parameters, rung.tokens) * (1 + (i * 7 % 5 - 2) / 2000)
        finished(root, ladder.side(rung).name, loss, rung.overrides)
    return ladder


def climb(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["ladder", *arguments])
    assert result.exit_code == code, result.output
    return result


def test_small_runs_predict_a_larger_one_and_the_grade_comes_after_the_commit(root):
    ladder = train_all(root)
    printed = climb(*ARGUMENTS).stdout
    assert "small: 9 trainings x 1 seeds" in printed
    found = json.loads(PREDICTION.read_text())
    assert found["law"]["floor"] == pytest.approx(TRUE.floor, abs=0.1)
    assert f"E is {found['law']['floor'] - 1:+.4f} from the best possible loss, 1.0000" in printed
    target = found["target"]
    assert found["prediction"]["loss"] == pytest.approx(TRUE.loss(target["parameters"], target["tokens"]), abs=0.02)
    assert target["flops"] == pytest.approx(8 * ladder.largest.flops, rel=0.01)
    assert PREDICTION.with_suffix(".svg").read_text().startswith("<?xml")
    before = PREDICTION.read_bytes(), PREDICTION.with_suffix(".svg").read_bytes()
    climb(*ARGUMENTS)
    assert (PREDICTION.read_bytes(), PREDICTION.with_suffix(".svg").read_bytes()) == before

    remedy = climb("--name", "small", "--grade", code=2).stderr
    assert f"{PREDICTION} is not committed: `git add {PREDICTION}` and `git commit` come before" in remedy
    head = commit(PREDICTION)
    finished(root, "target", found["prediction"]["loss"] + 5e-5, target["overrides"], at=head)
    held = json.loads(climb("--name", "small", "--grade", "--json").stdout)
    assert held["holds"] is True
    assert held["difference"] == pytest.approx(5e-5)
    *_, model, _, metrics, files = SENT[-1]
    assert (model, metrics["loss"]) == (held["model"], held["loss"])
    assert files["ladder.svg"] == PREDICTION.with_suffix(".svg").read_text()


def test_a_prediction_that_fails_has_an_exit_code_of_its_own(root):
    train_all(root)
    found = json.loads(climb(*ARGUMENTS, "--json").stdout)
    finished(root, "target", found["prediction"]["loss"] + 0.1, found["target"]["overrides"], at=commit(PREDICTION))
    assert "the prediction fails: " in climb("--name", "small", "--grade", code=1).stdout


def test_a_run_that_began_before_the_commit_is_not_graded(root):
    train_all(root)
    found = json.loads(climb(*ARGUMENTS, "--json").stdout)
    finished(root, "target", found["prediction"]["loss"], found["target"]["overrides"], at=git("rev-parse", "HEAD"))
    commit(PREDICTION)
    failed = climb("--name", "small", "--grade", code=2).stderr
    assert "its loss may have been known when the prediction was committed; predict another training" in failed


def test_a_prediction_of_other_parameters_or_code_is_not_graded(root):
    train_all(root)
    climb(*ARGUMENTS)
    commit(PREDICTION)
    (root / "stages/train.py").write_text('"""Trains."""\nx = 1\n')
    assert (
        "params.yaml or the code of the train stage is not what" in climb("--name", "small", "--grade", code=2).stderr
    )


def test_a_limit_leaves_out_the_largest(root):
    every = ladder_run.plan(root, "small", [], Grid(None, None, None, 2))
    assert len(every.rungs) == 9
    assert every.seeds == [1337, 1338]
    flops = sorted(rung.flops for rung in every.rungs)
    few = ladder_run.plan(root, "small", [], Grid(None, None, flops[6], 1))
    assert sorted(rung.flops for rung in few.rungs) == flops[:7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--name", "a b"), "--name 'a b' is invalid: a name consists of letters, digits, - and _"),
        ((*ARGUMENTS, "-S", "train.max_iter=3"), "not a known parameter; did you mean train.max_iters?"),
        ((*ARGUMENTS, "-S", "train.seed=3"), "a ladder sets the seeds itself; --seeds says how many"),
        (
            (*ARGUMENTS, "--depths", "1,2"),
            "6 different trainings, of 2 sizes and 3 numbers of tokens, do not determine",
        ),
        ((*ARGUMENTS, "--depths", "1,x"), "'1,x' is not a list of positive numbers, such as 400k,0.8M"),
        ((*ARGUMENTS, "--limit", "1e3"), "0 different trainings, of 0 sizes and 0 numbers of tokens, do not determine"),
        ((*ARGUMENTS, "-S", "train.patience=3"), "rules out the sizes of a dial; set it to null"),
        (("--name", "none", "--grade"), "`python -m tools ladder --name none` makes the prediction to grade"),
    ],
)
def test_errors_come_before_any_run_and_have_an_exit_code_of_their_own(root, arguments, message):
    assert message in " ".join(climb(*arguments, code=2).stderr.split())
