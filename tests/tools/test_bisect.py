import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.conftest import BUILT_IN
from tests.tracking.test_bisection import History
from tools.__main__ import main
from tools.bisect_checks import Losses, Results, first_change
from tracking.clean_clone import CouldNotRun

WEIGHTS = ["wte", "head"]


def steps(loss: float = 5.0, since: int = 1, tensors: str = "", tokens: str = "t" * 64) -> dict[str, Any]:
    """Three first steps whose loss, and then their tensors, have another value since a step."""
    numbers = range(1, 4)
    return {
        "environment": {"numerics.determinism": "portable"},
        "made_of": {"tokens": tokens},
        "steps": [{"step": n, "loss": loss if n >= since else 5.0, "grad_norm": 1.0, "lr": 1e-3} for n in numbers],
        "tensors": [[[name, f"{n}{tensors if n >= since else ''}"] for name in WEIGHTS] for n in (0, *numbers)],
    }


# --- what differs


def test_the_first_difference_is_named() -> None:
    assert first_change(steps(), steps()) is None
    found = first_change(steps(), steps(4.0, since=2, tensors="x"))
    assert found is not None
    assert found["line"].startswith("values: first at step 2: loss 5.0 -> 4.0")
    assert found["line"].endswith("weights: 2 of 2 tensors differ after step 2, the first is wte")
    assert (found["step"], found["tensor"]) == (2, "wte")
    initial = first_change(steps(), steps(4.0, since=0, tensors="x"))
    assert initial is not None
    assert initial["line"].startswith("weights: 2 of 2 tensors differ before the first step, the first is wte; values")
    tokens = first_change(steps(), steps(tokens="u" * 64))
    assert tokens is not None
    assert tokens["line"] == f"data/tokens: sha256 {'t' * 12} -> {'u' * 12}"


def test_a_renamed_tensor_and_commits_that_recorded_no_tensors_are_no_difference() -> None:
    renamed = json.loads(json.dumps(steps()).replace("wte", "embedding"))
    assert first_change(steps(), renamed) is None
    older = {name: value for name, value in steps(tensors="x").items() if name != "tensors"}
    assert first_change(older, steps()) is None
    fewer = {**steps(), "steps": steps()["steps"][:2], "tensors": steps()["tensors"][:3]}
    assert (first_change(steps(), fewer) or {})["line"] == "3 steps -> 2 steps"


class Trained:
    """Losses by commit; a commit has a model of its own unless `models` says otherwise."""

    def __init__(self, models: dict[str, str] | None = None, **losses: list[float]):
        self.losses, self.models, self.runs = losses, models or {}, set[tuple[str, int]]()

    def scores(self, commit: str, seed: int) -> dict[str, Any]:
        self.runs.add((commit, seed))
        loss, model = self.losses[commit][seed - 1], self.models.get(commit, commit)
        return {"text": "t", "tokens": "t", "model": f"{model}-{seed}", "val_loss": loss, "bits_per_byte": loss / 2}


GOOD = [2.0 + (i * 7 % 5) / 50 for i in range(12)]
BAD = [loss - 0.1 + 0.01 * (i % 3) for i, loss in enumerate(GOOD)]
NOISE = [loss + 0.001 * (-1) ** i for i, loss in enumerate(GOOD)]


def losses(trained: Trained) -> Losses:
    return Losses(trained, 12)  # type: ignore[arg-type]


def test_a_loss_is_that_of_the_end_from_which_it_does_not_differ() -> None:
    trained = Trained(
        good=GOOD, bad=BAD, like_good=NOISE, like_bad=[x - 0.1 for x in NOISE], worse=[x + 1 for x in BAD]
    )
    check = losses(trained)
    assert check.differ("good", "bad")
    assert not check.differ("good", "like_good")
    assert not check.changed("good", "bad", "like_good")
    assert check.changed("good", "bad", "like_bad")
    assert check.changed("good", "bad", "worse")
    found = check.difference("good", "bad")
    assert found is not None
    assert found["mean"] == pytest.approx(-0.09, abs=0.01)
    assert found["line"].startswith("loss -0.09")


def test_a_commit_that_makes_the_model_of_an_end_takes_one_run() -> None:
    trained = Trained({"same": "good", "other": "bad"}, good=GOOD, bad=BAD, same=GOOD, other=BAD)
    check = losses(trained)
    assert check.differ("good", "bad")
    assert not check.changed("good", "bad", "same")
    assert check.changed("good", "bad", "other")
    assert {commit for commit, seed in trained.runs if seed > 1} == {"good", "bad"}
    assert check.difference("good", "other") == check.difference("good", "bad")
    assert check.same("good", "same") == "good and same make the same model"


def test_a_loss_that_is_undecided_counts_as_a_commit_that_cannot_be_run() -> None:
    wild = [(a + b) / 2 + (-1) ** i for i, (a, b) in enumerate(zip(GOOD, BAD, strict=True))]
    with pytest.raises(CouldNotRun, match="undecided after 12 seeds"):
        losses(Trained(good=GOOD, bad=BAD, wild=wild)).changed("good", "bad", "wild")


# --- the command


@pytest.fixture
def history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> History:
    """Ten commits, c0 to c9, of which c6 changes the bits; `runs` counts those in clean clones."""
    made = History(tmp_path)
    made.line(*(f"c{i}" for i in range(10)))
    made.git("update-ref", "refs/heads/main", made.hashes["c9"])
    monkeypatch.chdir(tmp_path)
    return made


@pytest.fixture
def broken() -> set[str]:
    """The names of commits that cannot be run."""
    return set()


@pytest.fixture
def runs(history: History, broken: set[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    done: list[str] = []

    def run(results: Any, commit: str, values: dict[str, Any], run: Any) -> dict[str, Any]:
        name = history.name(commit)
        done.append(name)
        return {"error": "no module"} if name in broken else {"result": steps(4.0 if name >= "c6" else 5.0)}

    monkeypatch.setattr("tools.bisect_checks.Results._run", run)
    return done


def bisect(history: History, *arguments: str, code: int = 0) -> Result:
    arguments = tuple(history.hashes.get(argument, argument) for argument in arguments)
    result = CliRunner().invoke(main, ["bisect", *arguments])
    assert result.exit_code == code, result.output
    return result


def test_the_outcome(history: History, runs: list[str]) -> None:
    result = bisect(history, "c0")
    short = {name: commit[:7] for name, commit in history.hashes.items()}
    lines = result.stdout.splitlines()
    assert lines[0] == f"first commit with other bits: {short['c6']} c6"
    assert lines[1].startswith("author     a, 20")
    assert lines[3].startswith("differs    values: first at step 1: loss 5.0 -> 4.0")
    assert lines[4:] == [
        f"see it     python -m tools bisect --again {history.hashes['c5'][:12]} {history.hashes['c6'][:12]}",
        f"checks     {len(runs) - 2} among 9 commits, besides both ends",
    ]
    assert "9 commits left, about 3 checks" in result.stderr
    done = len(runs)
    found = json.loads(bisect(history, "c0", "--json").stdout)
    assert (found["commit"], found["subject"], found["skipped"]) == (history.hashes["c6"], "c6", [])
    assert found["difference"]["step"] == 1
    assert len(runs) == done  # all results were kept
    bisect(history, *lines[4].split()[-3:])
    assert runs[done:] == ["c5", "c6"]  # the command that shows it runs both


def test_an_interrupted_search_continues(history: History, runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    bisect(history, "c0", "c9")
    whole = list(runs)
    for path in (history.root / ".runs/bisect").rglob("*.json"):
        if history.name(path.name[:40]) not in whole[:3]:
            path.unlink()
    runs.clear()
    bisect(history, "c0", "c9")
    assert runs == whole[3:]


def test_commits_that_cannot_be_run_are_named(history: History, runs: list[str], broken: set[str]) -> None:
    broken |= {"c4", "c5"}
    printed = bisect(history, "c0", code=3).stdout
    assert "the first commit with other bits is one of these 3, of which only the last could be run:" in printed
    assert [line.split()[-1] for line in printed.splitlines()[1:4]] == ["c4", "c5", "c6"]
    assert f"skipped    {history.hashes['c4'][:7]} c4: no module" in printed
    found = json.loads(bisect(history, "c0", "--json", code=3).stdout)
    assert (found["commit"], len(found["among"]), len(found["skipped"])) == (None, 3, 2)
    broken |= {"c9"}
    error = bisect(history, "c0", "--again", code=1).stderr
    assert " c9: no module; choose another, or try it again with --again" in error


def test_a_commit_is_run_in_a_clone_with_the_parameters_that_are_set(tmp_path: Path) -> None:
    history = History(tmp_path)
    (tmp_path / "params.yaml").write_text("train:\n  seed: 1  # a comment\n")
    history.git("add", "params.yaml")
    history.git("commit", "--quiet", "--message", "x")
    commit = history.git("rev-parse", "HEAD")

    def run(**values: Any) -> dict[str, Any]:
        read = lambda clone: {"text": (clone.path / "params.yaml").read_text()}  # noqa: E731
        return Results(tmp_path, {}, False, print)._run(commit, values, read)

    assert run(**{"train.seed": 2}) == {"result": {"text": "train:\n  seed: 2  # a comment\n"}}
    assert "-S sets train.sed, which its params.yaml does not have" in run(**{"train.sed": 2})["error"]

    def fails(clone: Any) -> dict[str, Any]:
        raise CouldNotRun("`dvc repro` failed with exit code 1:\n    raise Error()\nImportError: no y\nERROR: failed")

    assert Results(tmp_path, {}, False, print)._run(commit, {}, fails) == {"error": "ImportError: no y"}
    assert history.git("status", "--porcelain") == ""


def test_a_value_that_is_invalid_today_is_refused_before_anything_runs(history: History, runs: list[str]) -> None:
    (history.root / "params.yaml").write_text(BUILT_IN.read_text())
    error = bisect(history, "c0", "-S", "train.max_iters=0", code=1).stderr.splitlines()[-1]
    assert error.startswith("Error: bisect: -S: train.max_iters = 0 is invalid: input should be greater than")
    assert not runs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("c9", "c0"), "give the older one first"),
        (("c3", "c3"), "are the same commit"),
        (("c0", "c5"), "the first 3 steps have the same bits at"),
        (("nothing",), "'nothing' is no commit of this repository"),
        (("c0", "-S", "x"), "-S x is invalid: write section.key=value"),
        (("c0", "--loss", "-S", "train.seed=1"), "-S train.seed is invalid: --loss sets the seeds itself"),
    ],
)
def test_errors_are_one_line(history: History, runs: list[str], arguments: tuple[str, ...], message: str) -> None:
    error = bisect(history, *arguments, code=1).stderr.splitlines()[-1]
    assert error.startswith("Error: bisect: ")
    assert message in error
