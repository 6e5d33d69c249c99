"""`dvc push` and `dvc pull` with a directory as remote: a colleague's clone."""

from collections.abc import Callable
from pathlib import Path

import pytest

from nanogpt.files import sha256_tree
from tests.pipeline.clones import Clone

pytestmark = pytest.mark.pipeline


def pulled(seed: Clone, copy_of: Callable[..., Clone], tmp_path: Path) -> Clone:
    """A colleague's clone of the seed after `dvc pull`; it has never trained."""
    origin = copy_of(seed, "origin", runs=False)
    origin.run(f"dvc remote add --default storage {tmp_path / 'storage'}")
    origin.commit("A remote")
    origin.run("dvc push")
    origin.run("git clone --quiet . ../colleague")
    colleague = Clone(tmp_path / "colleague")
    colleague.run("dvc pull")
    return colleague


def test_a_pulled_clone_has_everything_and_its_evaluation_is_a_run_that_says_so(seed, copy_of, tmp_path):
    """The only test that finds an out that is not pushed, or a report on a model of which MLflow has no training."""
    clone = pulled(seed, copy_of, tmp_path)
    assert clone.outs() == seed.outs()
    assert "Running stage" not in clone.repro()
    assert clone.run("git status --porcelain") == ""

    clone.run("python -m stages.evaluate")
    clone.run("python -m stages.sample")
    assert clone.outs()["metrics/evaluate.json"] == seed.outs()["metrics/evaluate.json"]
    (run,) = clone.runs()
    assert run.info.status == "FINISHED"
    assert run.info.run_name.startswith("pulled model ")
    assert run.data.tags["model.sha256"] == seed.runs()[0].data.tags["model.sha256"]
    assert "The model was pulled" in run.data.tags["mlflow.note.content"]
    assert run.data.metrics == seed.scores()


def test_the_model_of_a_commit_older_than_the_remote_reaches_a_colleague_as_the_page_says(seed, copy_of, tmp_path):
    """DVC reads a commit's remote from that commit, unless this clone alone has one for all commits."""
    add = f"dvc remote add --local --default storage {tmp_path / 'storage'}"
    origin = copy_of(seed, "origin", runs=False)
    old = origin.run("git rev-parse HEAD").strip()
    origin.run(f"dvc remote add --default storage {tmp_path / 'storage'}")
    origin.commit("A remote")
    origin.run("git clone --quiet . ../colleague")
    colleague = Clone(tmp_path / "colleague")
    get = f"dvc get . model --rev {old} --out build/old"
    assert "failed to load directory" in colleague.run(get, check=255)
    for command in (add, f"git switch --detach {old}", "dvc push", "git switch main"):
        origin.run(command)
    colleague.run(add)
    colleague.run(get)
    assert sha256_tree(colleague.path / "build/old") == sha256_tree(seed.path / "model")
