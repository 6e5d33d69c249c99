"""git, asked in one place."""

import subprocess
from pathlib import Path


def git(root: Path, *arguments: str) -> str:
    """Output of a git command in `root`, without the last newline; empty where git or the repository is missing."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.decode(errors="replace").rstrip("\n")
