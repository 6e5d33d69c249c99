"""`python -m tools lineage`: what it prints, followed in a new clone, ends with the same model."""

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanogpt.files import sha256_tree
from tests.pipeline.clones import Clone
from tests.pipeline.test_repro import ran
from tracking.dvc_files import directory_md5

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="session")
def traced(seed: Clone, once: Callable[..., Clone]) -> Clone:
    """The seed with an experiment, and with a run of a workspace that was never committed. Not to be changed."""

    def make(path: Path) -> None:
        clone = seed.copy(path)
        clone.run("dvc exp run --name elsewhere --temp -S train.seed=5 train")
        clone.set_params(**{"train.seed": 7})
        clone.append("nanogpt/optimizer.py", "\n# Not committed.\n")
        clone.repro("train")
        clone.run("git checkout --quiet . && dvc checkout")

    return once("traced", make)


@pytest.fixture
def clone(traced: Clone, copy_of: Callable[..., Clone]) -> Clone:
    return copy_of(traced)


def run_tagged(clone: Clone, **tags: str) -> Any:
    """The only run with these tags; underscores in names stand for dots."""
    wanted = {name.replace("_", "."): value for name, value in tags.items()}.items()
    (run,) = [run for run in clone.runs() if wanted <= run.data.tags.items()]
    return run


def described(clone: Clone, argument: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(clone.tool("lineage", "--json", argument))
    return found


def follow(clone: Clone, argument: str) -> Path:
    """Runs the commands that are printed for people, line by line in one shell; returns the new clone's model.

    `make setup` finds an environment that is there already, and would install one otherwise.
    """
    output = clone.run(f"python -m tools lineage {shlex.quote(argument)}")
    block = re.search(r"^the commands that make it again; .*:\n((?:    .*\n)+)", output, re.MULTILINE)
    assert block, output
    commands = [line.strip() for line in block[1].splitlines()]
    place = commands.index("make setup")
    set_up = f"mkdir .venv && ln -s {shlex.quote(sys.prefix)}/* .venv/ && touch .venv/.ready"
    script = "\n".join(["set -e", *commands[:place], set_up, *commands[place:]])
    printed = clone.run(re.sub("^dvc ", "WITHOUT_MLFLOW=1 dvc ", script, flags=re.MULTILINE), timeout=600)
    assert "Running stage 'train'" in printed, "the model was not made again"
    new = re.search(r"^cd (.*)$", script, re.MULTILINE)
    assert new
    return (clone.path / new[1]).resolve() / "model"


def test_the_run_of_a_commit_is_made_again(clone: Clone, seed: Clone) -> None:
    (trained,) = seed.runs()
    found = described(clone, trained.info.run_id)
    tags = trained.data.tags
    assert found["run"]["id"] == trained.info.run_id
    assert len(found["run"]["source"]) == 2
    assert found["model"] == {"sha256": tags["model.sha256"], "md5": tags["model.md5"]}
    assert found["code"]["sha256"] == tags["code.sha256"]
    assert found["tokens"]["sha256"] == tags["tokens.sha256"]
    assert found["tokens"]["md5"] == seed.lock()["tokenize"]["outs"][0]["md5"]
    assert found["data"]["md5"] == seed.lock()["download"]["outs"][0]["md5"]
    assert found["params"] == trained.data.params
    assert found["commit"]["id"] == seed.run("git rev-parse HEAD").strip()
    assert found["run"]["git.commit"] == seed.run("git rev-parse HEAD~1").strip()
    assert found["differs_here"] == {}
    assert found["notes"] == []
    assert sha256_tree(follow(clone, trained.info.run_id)) == tags["model.sha256"]


def test_a_model_directory_is_the_same_as_its_run_and_comes_from_the_cache(clone: Clone, seed: Clone) -> None:
    (trained,) = seed.runs()
    found = described(clone, "model")
    assert found == described(clone, trained.info.run_id) == described(clone, seed.lock()["train"]["outs"][1]["md5"])
    clone.run(found["from_cache"])
    assert directory_md5(clone.path / found["from_cache"].split()[-1]) == found["model"]["md5"]
    assert clone.run("git status --porcelain") == ""


def test_an_experiment_is_made_again_in_a_clone_that_had_not_got_it(clone: Clone) -> None:
    run = run_tagged(clone, dvc_experiment="elsewhere")
    found = described(clone, run.info.run_id)
    assert found["run"]["dvc.experiment"] == "elsewhere"
    assert found["run"]["git.commit"] == clone.run("git rev-parse main").strip()
    assert found["commit"]["kind"] == "experiment"
    held = clone.run("git for-each-ref --format='%(objectname)' 'refs/exps/*/*/elsewhere'").strip()
    assert found["commit"]["id"] == held
    assert found["params"]["train.seed"] == "5"
    model = follow(clone, "elsewhere")
    assert sha256_tree(model) == run.data.tags["model.sha256"]
    assert directory_md5(model) == run.data.tags["model.md5"]
    assert "elsewhere" in Clone(model.parent).run("dvc exp list --all-commits")


@pytest.mark.parametrize("source", ["journal", "mlflow"])
def test_a_run_that_no_commit_holds_is_made_again_from_its_changes(clone: Clone, source: str) -> None:
    baseline = clone.run("git rev-parse main").strip()
    run = run_tagged(clone, git_dirty="true", dvc_experiment="none")
    if source == "mlflow":
        shutil.rmtree(clone.path / ".runs")
    else:
        (clone.path / "mlflow.db").rename(clone.path / "mlflow.db-gone")
    found = described(clone, run.data.tags["model.sha256"][:12])
    assert found["commit"] is None
    assert (found["run"]["git.commit"], found["run"]["git.dirty"]) == (baseline, "true")
    assert found["environment"]["torch"]
    model = follow(clone, run.data.tags["model.md5"])
    assert sha256_tree(model) == run.data.tags["model.sha256"]
    assert "# Not committed." in (model.parent / "nanogpt/optimizer.py").read_text()


def test_an_earlier_training_comes_back_from_the_cache_without_a_run_of_its_own_and_leads_to_the_one_that_made_it(
    seed: Clone, copy_of: Callable[..., Clone]
) -> None:
    """The only test that finds a run of its own in MLflow for a training that DVC's cache had."""
    clone = copy_of(seed)
    (trained,) = clone.runs()
    clone.set_params(**{"train.seed": 2})
    assert ran(clone.repro("train")) == ["train"]
    assert clone.lock()["train"]["outs"] != seed.lock()["train"]["outs"]
    assert len(clone.runs()) == 2
    other = directory_md5(clone.path / "model")
    assert described(clone, "model")["run"]["id"] == clone.runs()[1].info.run_id

    clone.set_params(**{"train.seed": 1337})
    output = clone.repro()
    assert ran(output) == []
    assert "Stage 'train' is cached" in output
    assert clone.read("dvc.lock") == seed.read("dvc.lock")
    assert clone.outs() == seed.outs()
    assert len(clone.runs()) == 2
    assert described(clone, "model")["run"]["id"] == trained.info.run_id
    assert described(clone, other)["params"]["train.seed"] == "2"
