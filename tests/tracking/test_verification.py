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
    monkeypatch.setattr(verification, "run_first_steps", lambda clone, say: first_steps(determinism, torch, apart))
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
    monkeypatch.setattr(verification, "run_first_steps", lambda clone, say: next(results))
    report = verification.check_base(root, "HEAD~1", print)
    assert [finding.verdict for finding in report.findings] == [verdict]


def test_a_change_of_dvc_lock_declares_the_difference(commit, monkeypatch):
    root = commit(first_steps("portable"))
    (root / "dvc.lock").write_text("stages: {train: {outs: [{path: model, md5: another}]}}\n")
    subprocess.run(["git", *IDENTITY, "commit", "--quiet", "--all", "--message", "x"], cwd=root, check=True)
    results = iter([first_steps("portable"), first_steps("portable", apart=0.1)])
    monkeypatch.setattr(verification, "run_first_steps", lambda clone, say: next(results))
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


def test_known_answers_that_differ_are_named(commit, monkeypatch):
    root = commit(first_steps("portable") | {"kernels": {"attention": "a", "exp": "b"}})
    found = first_steps("portable") | {"kernels": {"attention": "c", "exp": "b"}}
    monkeypatch.setattr(verification, "run_first_steps", lambda clone, say: found)
    finding = verification.check_steps(root, print).findings[-1]
    assert (finding.artifact, finding.found, finding.verdict) == ("known answers", "attention", "DIVERGED")


@pytest.fixture
def emulated(commit, monkeypatch):
    """`emulated(determinism, {CPU: steps, or the error})`: the verdicts under emulated CPUs."""

    def verdicts(determinism: str, results: dict[str, Any]) -> list[tuple[str, str]]:
        here = first_steps(determinism) | {"kernels": {"exp": "b"}}

        def train(clone: Any, *python: str) -> dict[str, Any]:
            result = results.get(python[2], here)
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(verification.shutil, "which", lambda name: f"/usr/bin/{name}")
        monkeypatch.setattr(verification, "run_first_steps", lambda clone, say: here)
        monkeypatch.setattr(verification, "_train_first_steps", train)
        report = verification.check_cpus(commit(first_steps(determinism)), print)
        return [(finding.stage, finding.verdict) for finding in report.findings]

    return verdicts


REFUSED = {cpu: verification.CouldNotRun("needs a CPU with AVX2 and FMA") for cpu in verification.UNABLE_CPUS}


def test_equal_steps_under_every_emulated_cpu_are_identical(emulated):
    cpus = [*verification.CPUS, *verification.UNABLE_CPUS]
    assert emulated("portable", REFUSED) == [(cpu, "identical") for cpu in cpus]


@pytest.mark.parametrize(
    ("cpu", "result"),
    [
        ("Haswell", first_steps("portable", apart=1e-6) | {"kernels": {"exp": "b"}}),
        ("EPYC", first_steps("portable") | {"kernels": {"exp": "c"}}),
        ("SandyBridge", verification.CouldNotRun("killed by signal 4")),
        ("SandyBridge", first_steps("portable")),  # trained, though it cannot have the same bits
    ],
)
def test_another_result_under_an_emulated_cpu_diverges(emulated, cpu, result):
    found = emulated("portable", REFUSED | {cpu: result})
    assert [name for name, verdict in found if verdict == "DIVERGED"] == [cpu]


def test_other_cpus_need_the_emulator_and_portable(emulated, monkeypatch, tmp_path):
    with pytest.raises(verification.CouldNotRun, match=r"only numerics\.determinism = portable"):
        emulated("machine", REFUSED)
    monkeypatch.setattr(verification.shutil, "which", lambda name: None)
    with pytest.raises(verification.CouldNotRun, match=r"qemu-x86_64 is not installed; .* apt-get install qemu-user"):
        verification.check_cpus(tmp_path, print)
