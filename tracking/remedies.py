"""What mends an error: the core names the file that is damaged, and here stands which command makes it whole again."""

import errno
import os
from pathlib import Path

from nanogpt.files import Damaged, Missing

_SYSTEM = {
    errno.EACCES: "check its owner and permissions",
    errno.EMFILE: "allow more open files (`ulimit -n`)",
    errno.ENOSPC: "free some space",
    errno.EROFS: "make the file system writable",
}
_STAGES = {"data/raw": "download", "data/tokens": "tokenize"}  # what makes a folder


def remedy(error: Exception) -> str:
    """A clause to append to the error's message; empty where the message names the remedy, or none is known."""
    if isinstance(error, Damaged):
        return _restore(error.path)
    if isinstance(error, Missing):
        return (
            "under `dvc exp run --temp` and in the queue, files that git does not track are absent: commit them, "
            "or give an absolute path"
        )
    if isinstance(error, OSError) and error.errno in _SYSTEM:
        return f"{_SYSTEM[error.errno]} and start again"
    return ""


def _restore(path: Path) -> str:
    folder = Path(os.path.relpath(path.parent)).as_posix()  # as dvc.yaml names it
    if folder in _STAGES:
        # DVC takes a damaged file for a good one if its time and size are right, hence the removal.
        return f"`rm -r {folder}` and `dvc checkout`, or make it anew with `dvc repro -f {_STAGES[folder]}`"
    if folder == "model":
        if not path.exists():
            return "`dvc checkout` or `dvc repro` brings it back"
        return "remove model and run `dvc checkout`, or `dvc repro` if DVC's cache has lost it too"
    if path.name == "params.yaml":
        return f"`git diff {path}` shows what was lost, and `git checkout {path}` restores it"
    return "restore it with `git checkout` or `dvc checkout`, or run the stage again that makes it (`dvc repro -f`)"
