import subprocess
from pathlib import Path

import pytest

from tracking.run_name import committed_params, is_generated, run_name, setting

COMMITTED = {"download.seed": 1, "model.n_embd": 32, "train.learning_rate": 3e-4, "train.seed": 1337, "sample.seed": 1}
PARAMS = {name: value for name, value in COMMITTED.items() if not name.startswith("sample.")}


@pytest.mark.parametrize(
    ("changes", "diff", "expected"),
    [
        ({}, "", "1a2b3c4"),
        ({"train.seed": 1338}, "diff --git a/params.yaml b/params.yaml\n", "1a2b3c4"),
        ({"train.learning_rate": 0.04, "model.n_embd": 64}, "", "n_embd=64 learning_rate=0.04"),
        ({"download.seed": 2}, "", "download.seed=2"),  # not train's
        ({"train.learning_rate": None}, "", "learning_rate=null"),
        ({}, "diff --git a/nanogpt/model.py b/nanogpt/model.py\n", "1a2b3c4 + uncommitted"),
        ({"model.n_embd": 64}, "diff --git a/stages/x.py b/stages/x.py\n", "n_embd=64 + uncommitted"),
    ],
)
def test_a_setting_is_the_difference_from_the_commit_without_the_seed(changes, diff, expected) -> None:
    assert setting(PARAMS | changes, COMMITTED, diff, "1a2b3c4d5e") == expected


@pytest.mark.parametrize(
    ("experiment", "differs", "attempt", "expected"),
    [
        (None, "1a2b3c4", 1, "1a2b3c4 seed=1338"),
        (None, "muon_learning_rate=0.04", 1, "muon_learning_rate=0.04 seed=1338"),
        ("freed-tach", "muon_learning_rate=0.04", 1, "muon_learning_rate=0.04 seed=1338"),
        ("freed-tach", "1a2b3c4", 1, "1a2b3c4 seed=1338"),
        ("wide", "n_embd=64", 1, "wide n_embd=64 seed=1338"),
        ("wide", "1a2b3c4", 2, "wide 1a2b3c4 seed=1338 attempt=2"),
    ],
)
def test_a_name_has_the_setting_and_the_seed(experiment, differs, attempt, expected) -> None:
    assert run_name(experiment, differs, 1338, attempt) == expected


def test_a_long_name_is_cut_before_the_seed() -> None:
    name = run_name(None, "n_embd=64 " * 20, 1338, 1)
    assert (len(name), name[-11:]) == (100, "… seed=1338")


def test_names_that_dvc_generates_are_recognised() -> None:
    from dvc.repo.experiments.utils import gen_random_name

    assert all(is_generated(gen_random_name()) for _ in range(50))
    assert not any(is_generated(name) for name in ("wide", "wider-muon", "smoke", "a-b-c", "", "-"))


def test_the_params_of_a_commit(tmp_path: Path) -> None:
    def commit(text: str) -> None:
        (tmp_path / "params.yaml").write_text(text)
        subprocess.run(
            "git init -q && git add -A && git -c user.name=a -c user.email=a commit -qm x", shell=True, cwd=tmp_path
        )

    assert committed_params(tmp_path) == {}  # no repository
    commit("train:\n  learning_rate: 3e-05\n  patience: null\nmodel: no section\n")
    assert committed_params(tmp_path) == {"train.learning_rate": 3e-5, "train.patience": None}
    commit("<<<<<<< HEAD\n")
    assert committed_params(tmp_path) == {}
