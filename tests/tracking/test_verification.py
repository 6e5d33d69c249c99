"""The verdicts on the first steps, for invented records; tests/pipeline/test_verify.py trains."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tracking import verification
from tracking.golden import file_name

IDENTITY = ("-c", "user.name=a", "-c", "user.email=b")


def first_steps(determinism: str, torch: str = "2", apart: float = 0.0) -> dict[str, Any]:
    steps = [{"step": step, "loss": 5.0 + apart * (step > 4), "grad_norm": 1.0, "lr": 1e-3} for step in range(1, 21)]
    environment = {"python": "3.11", "torch": torch, "numerics.determinism": determinism, "numerics.threads": "2"}
    return {"environment": environment, "made_of": {"code": "a"}, "steps": steps}


@pytest.fixture
def commit(tmp_path: Path):
    """`commit(golden)`: a repository whose newest commit, and the one before, hold that golden file."""

    def make(golden: dict[str, Any]) -> Path:
        (tmp_path / "golden").mkdir()
        content = {**golden, "model": "m", "metrics": {"val_loss": 1.0}}
        (tmp_path / "golden" / file_name(golden["environment"])).write_text(json.dumps(content))
        (tmp_path / "dvc.lock").write_text("stages: {train: {outs: [{path: model, md5: m}]}}\n")
        for command in (["init", "-q"], ["add", "."], *[["commit", "-q", "--allow-empty", "-m", "x"]] * 2):
            subprocess.run(["git", *IDENTITY, *command], cwd=tmp_path, check=True)
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("determinism", "torch", "apart", "verdict"),
    [
        ("portable", "2", 0.0, "identical"),
        ("portable", "2", 1e-6, "DIVERGED"),
        ("portable", "3", 1e-6, "within tolerance"),
        ("portable", "3", 0.1, "environment changed"),
        ("off", "2", 1e-6, "within tolerance"),
        ("off", "2", 0.1, "DIVERGED"),
        ("off", "3", 0.1, "environment changed"),
    ],
)
def test_the_first_steps_against_a_golden_file(commit, monkeypatch, determinism, torch, apart, verdict):
    root = commit(first_steps(determinism))
    monkeypatch.setattr(verification, "_first_steps", lambda clone, say: first_steps(determinism, torch, apart))
    report = verification.check_steps(root, print)
    assert [finding.verdict for finding in report.findings] == [verdict]
    assert verdict in ("identical", "within tolerance") or "`make golden`" in report.table()


@pytest.mark.parametrize(
    ("determinism", "apart", "verdict"),
    [
        ("portable", 0.0, "identical"),
        ("portable", 1e-6, "DIVERGED"),
        ("off", 1e-6, "within tolerance"),
        ("off", 0.1, "DIVERGED"),
    ],
)
def test_the_first_steps_of_two_commits(commit, monkeypatch, determinism, apart, verdict):
    root = commit(first_steps(determinism))
    results = iter([first_steps(determinism), first_steps(determinism, apart=apart)])
    monkeypatch.setattr(verification, "_first_steps", lambda clone, say: next(results))
    report = verification.check_base(root, "HEAD~1", print)
    assert [finding.verdict for finding in report.findings] == [verdict]


def test_a_change_of_dvc_lock_declares_the_difference(commit, monkeypatch):
    root = commit(first_steps("portable"))
    (root / "dvc.lock").write_text("stages: {train: {outs: [{path: model, md5: another}]}}\n")
    subprocess.run(["git", *IDENTITY, "commit", "--quiet", "--all", "--message", "x"], cwd=root, check=True)
    results = iter([first_steps("portable"), first_steps("portable", apart=0.1)])
    monkeypatch.setattr(verification, "_first_steps", lambda clone, say: next(results))
    report = verification.check_base(root, "HEAD~1", print)
    assert [finding.verdict for finding in report.findings] == ["changed, as dvc.lock says"]


@pytest.mark.parametrize(
    ("changes", "stale"),
    [
        (["always changed"], ["always changed"]),
        ([{"changed deps": {"a.py": "modified", "data/raw": "deleted"}}], ["a.py modified"]),
        ([{"changed outs": {"model": "not in cache"}}], []),
        ([{"changed deps": {"params.yaml": {"train.seed": "modified", "b": "new"}}}], ["train.seed modified", "b new"]),
        (["changed command", {"changed outs": {"model": "deleted"}}], ["changed command"]),
    ],
)
def test_the_changes_that_dvc_status_reports_are_named(changes, stale):
    assert verification._stale(changes) == stale
