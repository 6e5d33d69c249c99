"""git, run in one place."""

import os
import subprocess
from pathlib import Path

from tracking.redaction import redact


class GitError(ValueError):
    """git is missing or refused; the message is one line with the command and what git said."""


def git(root: Path, *arguments: str) -> str:
    """What a git command in `root` prints, without the last newline. Raises GitError."""
    return git_bytes(root, *arguments).decode(errors="replace").rstrip("\n")


def git_or_none(root: Path, *arguments: str) -> str | None:
    """The same; None where the command fails or `root` is in no repository."""
    try:
        return git(root, *arguments)
    except GitError:
        return None


def git_bytes(root: Path, *arguments: str) -> bytes:
    """What a git command in `root` prints, to the byte. Raises GitError."""
    command = ["git", "-C", str(root), *arguments]
    try:
        return subprocess.run(command, env=environment(), capture_output=True, check=True).stdout
    except OSError as error:
        raise GitError(f"git cannot be run ({error})") from error
    except subprocess.CalledProcessError as error:
        message = redact(error.stderr.decode(errors="replace"))
        raise GitError(f"`{redact(' '.join(command))}` failed: {message}") from error


def environment() -> dict[str, str]:
    """Ours without git's variables: a git hook sets GIT_DIR and GIT_INDEX_FILE, which name another repository."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
