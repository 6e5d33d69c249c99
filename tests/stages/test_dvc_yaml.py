"""dvc.yaml agrees with the source."""

import ast
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from nanogpt.params import Params
from tools.deps import deps_of
from tracking.fingerprint import PLUMBING, import_closure

REPOSITORY = Path(__file__).parents[2]
STAGES: dict[str, Any] = YAML(typ="safe").load((REPOSITORY / "dvc.yaml").read_text())["stages"]
# What DVC does not track: it cannot change a result (runtime) or only reports it (tracking).
UNTRACKED = {"runtime", "tracking"}


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_the_import_closure(stage: str) -> None:
    deps = STAGES[stage]["deps"]
    assert deps == deps_of(REPOSITORY, stage, deps), f"deps of {stage} in dvc.yaml are outdated: run `make deps`"


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_the_sections_that_the_stage_reads(stage: str) -> None:
    sources = [
        path
        for path in import_closure(REPOSITORY, f"stages.{stage}")
        if path.startswith(("stages/", "nanogpt/recipe.py"))
    ]
    read = set().union(*(sections_read((REPOSITORY / path).read_text()) for path in sources)) - UNTRACKED
    assert set(STAGES[stage]["params"]) == read, f"correct params of {stage} in dvc.yaml"


def sections_read(source: str) -> set[str]:
    """Sections that are taken from Params: `params.train`, `self.params.train`, `load_params().train`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in Params.model_fields:
            owner = ast.unparse(node.value)
            if owner.split(".")[-1] in {"params", "load_params()"}:
                found.add(node.attr)
    return found


def test_sections_read_sees_each_way_of_reading() -> None:
    source = "a = params.train.seed; b = self.params.model; c = load_params().download; d = other.sample"
    assert sections_read(source) == {"train", "model", "download"}


def test_every_stage_is_a_module_with_the_command_that_dvc_runs() -> None:
    for stage, description in STAGES.items():
        assert description["cmd"] == f"exec python -m stages.{stage}"
        assert (REPOSITORY / "stages" / f"{stage}.py").is_file()


def test_plumbing_exists() -> None:
    assert [path for path in PLUMBING if not (REPOSITORY / path).exists()] == []


def test_editing_the_model_trains_again_and_editing_generation_does_not() -> None:
    train = STAGES["train"]["deps"]
    assert "nanogpt/generate.py" not in train
    assert "nanogpt/model.py" in train
