"""The check that a commit gives what its dvc.lock says: it passes when that is so, and fails when it is not."""

import hashlib
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import HOOKS
from tests.pipeline.clones import Clone
from tests.test_workflow import commands

pytestmark = pytest.mark.pipeline

OUTS = [
    *("data/raw", "data/tokens", "metrics/train.json", "model", "plots/loss.csv"),
    *("metrics/evaluate.json", "metrics/val_loss.json", "samples"),
]
RATE = "lr = lr_at("


@pytest.fixture(scope="session")
def golden(seed: Clone, once) -> Clone:
    """The seed with a golden file of this environment, and threads enough for the surroundings to matter.

    Its code leaves MLflow out and ends quickly: in a clean clone nothing else of the tests takes effect.
    """

    def make(path):
        clone = seed.copy(path)
        clone.append("tracking/__init__.py", (HOOKS / "without_mlflow.py").read_text())
        clone.append("tracking/__init__.py", "\nimport atexit\nimport gc\n\natexit.register(gc.freeze)\n")
        (clone.path / ".venv").mkdir()
        (clone.path / ".venv/.ready").touch()  # make's set-up is done
        clone.set_params(**{"numerics.threads": 2, "model.n_embd": 64, "train.batch_size": 16})
        clone.repro()
        clone.run("rm -f golden/*.json && python -m tools golden")
        clone.commit("Golden")

    return once("golden", make)


def verify(clone: Clone, arguments: str = "", check: int = 0) -> tuple[str, dict]:
    """What it printed, and its newest entry in verify.json."""
    output = clone.run(f"python -m tools verify --out reports {arguments}", check=check)
    suite = ElementTree.fromstring(clone.read("reports/junit.xml"))
    report = json.loads(clone.read("reports/verify.json"))[-1]
    assert int(suite.get("tests")) == max(1, len(report["findings"]))
    assert report["verdict"] in clone.read("reports/report.md")
    assert report["verdict"] in output.splitlines()[-1]
    return output, report


def md5_of(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def change_training(clone: Clone) -> None:
    """From the fifth step on the learning rate is another; dvc.lock is made to believe that nothing has changed."""
    path = clone.path / "nanogpt/train.py"
    assert path.read_text().count(RATE) == 1
    old = md5_of(path)
    path.write_text(path.read_text().replace(RATE, "lr = 1e-4 * (step >= 4) + lr_at("))
    new, size = md5_of(path), path.stat().st_size
    lock = re.sub(rf"{old}\n( +)size: \d+", rf"{new}\n\1size: {size}", clone.read("dvc.lock"))
    assert lock != clone.read("dvc.lock")
    clone.write("dvc.lock", lock)


def test_a_true_dvc_lock_is_confirmed_in_varied_surroundings(golden, copy_of: Callable[..., Clone]):
    """The only test that finds a check that takes equal bits for others, or bits that depend on the surroundings."""
    clone = copy_of(golden)
    output = clone.run("make --old-file=.venv/.ready verify-varied REPORTS=reports")
    (report,) = json.loads(clone.read("reports/varied/verify.json"))
    assert report["layer"] == "full, in varied surroundings"
    assert [finding["artifact"] for finding in report["findings"]] == OUTS
    assert {finding["verdict"] for finding in report["findings"]} == {"identical"}
    assert report["commit"] == clone.run("git rev-parse HEAD").strip()
    assert report["environment"]["numerics.determinism"] == "portable"
    assert report["environment_differs"] == []
    assert output.count(" identical") == len(OUTS) + 1
    assert clone.run("git status --porcelain --untracked-files=no") == ""


def test_other_bits_are_found_with_the_step_and_the_tensor_where_they_begin(golden, copy_of):
    """The only test that finds a check that takes other bits for equal ones, or blames the wrong place."""
    clone = copy_of(golden)
    change_training(clone)
    clone.commit("A change that dvc.lock hides")
    output, report = verify(clone, check=1)
    verdicts = {finding["artifact"]: finding["verdict"] for finding in report["findings"]}
    assert verdicts["data/tokens"] == "identical"
    assert verdicts["model"] == verdicts["metrics/evaluate.json"] == verdicts["samples"] == "DIVERGED"
    assert re.search(r"training: first at step 5: lr [\d.e-]+ -> [\d.e-]+ \([\d,]+ ulps? in float32\)", output), output
    assert re.search(
        r"weights: \d+ of \d+ tensors differ, the first is h\.0\.\S+: [\d,]+ of [\d,]+ elements, by up to "
        r"[\d,]+ ulps?",
        output,
    ), output
    assert "<failure" in clone.read("reports/junit.xml")

    output, report = verify(clone, "--layer steps", check=1)
    # The steps, and the answers of the kernels.
    assert [finding["verdict"] for finding in report["findings"]] == ["DIVERGED", "identical"]
    assert "first at step 5: lr" in output
    assert (
        "since the golden file was written, code changed; if that is intended: `dvc repro` and `make golden`" in output
    )
    output, report = verify(clone, "--layer base --base HEAD~1", check=1)
    assert "results change and dvc.lock does not" in output


def test_a_change_that_changes_nothing_is_identical(golden, copy_of):
    """The only test that finds a comment that the check takes for a change, or a dvc.lock of other code that passes."""
    clone = copy_of(golden)
    clone.append("nanogpt/schedule.py", "\n# A comment.\n")
    clone.commit("A refactoring")
    _, report = verify(clone, "--layer steps")
    assert {finding["verdict"] for finding in report["findings"]} == {"identical"}
    output, report = verify(clone, "--layer lock", check=1)  # but dvc.lock is of other code
    assert "nanogpt/schedule.py modified" in json.dumps(report["findings"])
    assert "run `dvc repro` and `make golden`, commit dvc.lock and golden/ with the change" in output


def elsewhere(clone: Clone) -> None:
    """The golden file is of an older torch."""
    (path,) = (clone.path / "golden").glob("*.json")
    content = json.loads(path.read_bytes())
    content["environment"]["torch"] = "2.0.0"
    path.unlink()
    clone.write(
        "rename.py",
        "import json, sys\nfrom tracking.golden import file_name\n"
        "print(file_name(json.load(open(sys.argv[1]))['environment']))\n",
    )
    clone.write("new.json", json.dumps(content))
    name = clone.run("PYTHONPATH=. python rename.py new.json").strip()
    clone.run(f"mv new.json golden/{name} && rm rename.py")


def test_in_another_environment_other_bits_with_the_same_metrics_are_tolerated(golden, copy_of):
    """The only test that finds a check that blames a change for what another environment does, or excuses a change."""
    clone = copy_of(golden)
    elsewhere(clone)
    change_training(clone)
    clone.commit("Other bits, as if they were made elsewhere")
    output, report = verify(clone)
    assert re.search(r"environment: torch 2\.0\.0 -> 2\.\d+", output)
    verdicts = {finding["artifact"]: finding["verdict"] for finding in report["findings"]}
    assert verdicts["data/tokens"] == "identical"
    assert verdicts["model"] == verdicts["samples"] == "within tolerance"
    assert re.search(r"val_loss [\d.]+ -> [\d.]+ \(limit 0.02\)", output)


def test_what_cannot_be_checked_is_said_with_code_2(golden, copy_of):
    clone = copy_of(golden)
    clone.run("git rm --quiet --cached dvc.lock && git commit --quiet --message gone")
    output, report = verify(clone, check=2)
    assert report["findings"] == []
    assert "dvc.lock" in report["error"]
    clone.run("git reset --quiet --hard HEAD~1")
    clone.write("stages/tokenize.py", "raise SystemExit(3)\n")
    clone.commit("Broken")
    output, report = verify(clone, check=2)
    assert "`dvc repro --force --no-run-cache --single-item tokenize` failed" in output
    assert "could not be run" in output.splitlines()[-1]


def test_a_remote_that_lacks_something_is_found(golden, copy_of):
    clone = copy_of(golden)
    clone.run(f"dvc remote add --default store {clone.path.parent}/store && dvc push")
    clone.commit("A remote")
    _, report = verify(clone, "--layer lock")
    assert report["findings"][-1]["verdict"] == "identical"
    clone.run("dvc remote remove store")  # as `dvc exp apply` of an experiment that is older than the remote does
    output, report = verify(clone, "--layer lock")
    assert report["findings"][-1]["found"] == "the workspace has another .dvc/config"
    assert "uncommitted changes, such as those of .dvc/config, were not checked" in output
    clone.run("git checkout .dvc/config")
    model = clone.lock()["train"]["outs"][-1]["md5"]
    for path in (clone.path.parent / "store").rglob(model[2:]):
        path.unlink()
    _, report = verify(clone, "--layer lock", check=1)
    assert report["findings"][-1]["verdict"] == "MISSING"
    assert re.match(r"\d+ missing, such as \S+$", report["findings"][-1]["found"])
    (clone.path.parent / "store").rename(clone.path.parent / "elsewhere")
    clone.set_params(**{"model.n_layer": 2})
    clone.commit("Another model")
    _, report = verify(clone, "--layer lock", check=1)
    assert report["findings"][-1]["found"] == f"this machine has no folder {clone.path.parent}/store"
    assert "model.n_layer 1 -> 2" in [finding["found"] for finding in report["findings"]]


@pytest.mark.parametrize("job", ["quick", "diff"])  # "full" is the two other commands
def test_the_steps_of_a_job_succeed(golden: Clone, copy_of, job: str):
    """The only test that finds a step of the workflow that fails, or that reports nothing."""
    clone = copy_of(golden)
    if job == "diff":
        clone.set_params(**{"evaluate.stride": 16})
    clone.commit("Next")
    for command in commands(job):
        if command != "make setup":
            clone.run(
                command.replace("make ", "make --old-file=.venv/.ready ", 1), BASE="HEAD~1", GITHUB_STEP_SUMMARY="s.md"
            )
    summary = clone.read("s.md")
    if job == "diff":
        assert re.search(r"params\.yaml.*evaluate\.stride.*16", summary), summary
        assert re.search(r"metrics/val_loss\.json.*val_loss", summary), summary
    else:
        assert len(re.findall(r"^## .*: identical$", summary, re.MULTILINE)) == 3
