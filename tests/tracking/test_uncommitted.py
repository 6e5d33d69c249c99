"""Which uncommitted changes are kept: those of the experiment, and the names of the other files."""

import subprocess
from pathlib import Path

import pytest

from tracking.resume import uncommitted

BEFORE = ("-c", "diff.noprefix=false", "diff", "--no-ext-diff", "--no-color", "--binary", "HEAD", "--", ".")
SECRET = "s3cret"


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    for name in ("params.yaml", "dvc.yaml", "dvc.lock", "nanogpt/model.py", "stages/train.py", "inputs/prompts/a.txt"):
        write(root, name, "old\n")
    for name in (".dvc/config", "README.md", "presets/a.yaml"):
        write(root, name, "old\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "1")
    return root


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def test_nothing_has_changed(repository: Path) -> None:
    write(repository, "dvc.lock", "new\n")
    assert uncommitted(repository) == ("", "")


def test_changes_of_the_experiment_are_kept_to_the_byte(repository: Path) -> None:
    for name in ("params.yaml", "dvc.yaml", "nanogpt/model.py", "inputs/prompts/a.txt", "presets/a.yaml"):
        write(repository, name, "new\n")
    (repository / "nanogpt/binary").write_bytes(bytes(range(256)))
    git(repository, "add", "nanogpt/binary")
    git(repository, "mv", "stages/train.py", "stages/training.py")
    diff = uncommitted(repository)
    assert diff == (git(repository, *BEFORE).removesuffix("\n"), "")
    assert "diff --git a/nanogpt/binary b/nanogpt/binary" in diff[0]


def test_files_outside_of_the_experiment_are_named_and_not_kept(repository: Path) -> None:
    write(repository, "params.yaml", "new\n")
    write(repository, ".dvc/config", f"['remote \"r\"']\n    password = {SECRET}\n")
    for name in (".env", "notes/token.txt", "inputs/texts/.env", "stages/.secrets/token", "nanogpt/.netrc"):
        write(repository, name, SECRET)
    git(repository, "add", "-N", ".")
    diff, left_out = uncommitted(repository)
    assert SECRET not in diff
    assert left_out == ".dvc/config, .env, inputs/texts/.env, nanogpt/.netrc, notes/token.txt, stages/.secrets/token"
    assert diff.splitlines()[0] == f"# not kept, because it is not part of the experiment: {left_out}"
    write(repository.parent, "uncommitted.diff", f"{diff}\n")  # what is kept can be applied
    git(repository, "reset", "-q", "--hard")
    git(repository, "apply", "../uncommitted.diff")
    assert (repository / "params.yaml").read_text() == "new\n"


def test_if_the_experiment_is_unchanged_only_names_are_kept(repository: Path) -> None:
    write(repository, "README.md", "new\n")
    assert uncommitted(repository) == ("# not kept, because it is not part of the experiment: README.md\n", "README.md")
