"""git runs in the repository that is given, whatever the environment."""

import subprocess

import pytest

from tracking.git import GitError, git, git_bytes, git_or_none


@pytest.fixture
def repository(tmp_path):
    root = tmp_path / "repository"
    subprocess.run(["git", "init", "--quiet", "--initial-branch=trunk", str(root)], check=True)
    return root


def test_output_is_without_the_last_newline(repository):
    assert git(repository, "symbolic-ref", "--short", "HEAD") == "trunk"
    assert git_or_none(repository, "symbolic-ref", "--short", "HEAD") == "trunk"
    assert git_or_none(repository, "for-each-ref") == ""


def test_a_command_that_fails_raises_an_error_or_returns_none(repository):
    for root, *arguments in (
        (repository, "rev-parse", "HEAD"),
        (repository, "no-such-command"),
        (repository / "missing", "status"),
        (repository.parent, "status"),
    ):
        assert git_or_none(root, *arguments) is None
        with pytest.raises(GitError, match=rf"^`git -C {root} {' '.join(arguments)}` failed: \w.*") as caught:
            git(root, *arguments)
        assert "\n" not in str(caught.value)


def test_without_git_it_raises_an_error(repository, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_or_none(repository, "status") is None
    with pytest.raises(GitError, match="git cannot be run"):
        git(repository, "status")


def test_bytes_stay_as_they_are(repository):
    (repository / "file").write_bytes(b"\xff\r\n\n")
    blob = git(repository, "hash-object", "-w", "file")
    assert git_bytes(repository, "cat-file", "blob", blob) == b"\xff\r\n\n"
    assert git(repository, "cat-file", "blob", blob) == "\ufffd\r"


def test_in_a_hook_of_another_repository_git_uses_the_given_one(repository, tmp_path, monkeypatch):
    other = tmp_path / "other"
    subprocess.run(["git", "init", "--quiet", "--initial-branch=elsewhere", str(other)], check=True)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git/index"))
    assert git(repository, "symbolic-ref", "--short", "HEAD") == "trunk"
