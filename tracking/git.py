"""Runs git."""

import os
import subprocess
from pathlib import Path

from tracking.redaction import redact


class GitError(ValueError):
    """git is missing or a command failed; the message is one line with the command and git's reason."""


def git(root: Path, *arguments: str) -> str:
    """Runs a git command in `root`; returns its output without the last newline. Raises GitError."""
    return git_bytes(root, *arguments).decode(errors="replace").rstrip("\n")


def git_or_none(root: Path, *arguments: str) -> str | None:
    """`git`, but None where the command fails or `root` is in no repository."""
    try:
        return git(root, *arguments)
    except GitError:
        return None


def resolve_commit(root: Path, revision: str) -> str | None:
    """The full hash of a commit; None if the repository does not have it."""
    return git_or_none(root, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")


def git_bytes(root: Path, *arguments: str) -> bytes:
    """`git`, with the output as bytes. Raises GitError."""
    command = ["git", "-C", str(root), *arguments]
    try:
        return subprocess.run(command, env=environment(), capture_output=True, check=True).stdout
    except OSError as error:
        raise GitError(f"git cannot be run ({error})") from error
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace")
        raise GitError(redact(f"`{' '.join(command)}` failed: {reason}")) from error


def environment() -> dict[str, str]:
    """os.environ without git's variables: a git hook sets GIT_DIR and GIT_INDEX_FILE, which name another repository."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
