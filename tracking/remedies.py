"""Which command mends an error. The core names the damaged file; this module knows how to restore it."""

import errno
import os
from pathlib import Path

from nanogpt.files import Damaged, Missing
from nanogpt.params_errors import ParamsError

_SYSTEM = {
    errno.EACCES: "check its owner and permissions",
    errno.EMFILE: "allow more open files (`ulimit -n`)",
    errno.ENOSPC: "free some space",
    errno.EROFS: "make the file system writable",
}
# Touched first, because git may have read the file in the same second in which DVC wrote it, at the same size.
_WRITTEN = (
    "`touch params.yaml && git checkout params.yaml` takes back what -S wrote there, `dvc checkout` what DVC removed"
)
_STAGES = {"data/raw": "download", "data/tokens": "tokenize"}  # folder -> the stage that makes it


def remedy(error: Exception) -> str:
    """A clause to append to the error's message; empty if the message names the remedy already or none is known."""
    if isinstance(error, Damaged):
        return _restore(error.path)
    if isinstance(error, ParamsError):
        in_place = Path(os.environ.get("DVC_ROOT", ".")).samefile(".")  # not with --temp or in the queue
        return _WRITTEN if "DVC_EXP_NAME" in os.environ and in_place else ""
    if isinstance(error, Missing):
        return (
            "under `dvc exp run --temp` and in the queue, untracked files are absent: commit them, or give an "
            "absolute path"
        )
    if isinstance(error, OSError) and error.errno in _SYSTEM:
        return f"{_SYSTEM[error.errno]} and start again"
    return ""


def _restore(path: Path) -> str:
    folder = Path(os.path.relpath(path.parent)).as_posix()  # as in dvc.yaml
    if folder in _STAGES:
        # Removed first, because DVC trusts a damaged file whose time and size are right.
        return f"`rm -r {folder}` and `dvc checkout`, or make it again with `dvc repro -f {_STAGES[folder]}`"
    if folder == "model":
        if not path.exists():
            return "`dvc checkout` or `dvc repro` brings it back"
        return "remove model and run `dvc checkout`, or `dvc repro` if DVC's cache has lost it too"
    if path.name == "params.yaml":
        return f"`git diff {path}` shows what was lost, and `git checkout {path}` restores it"
    return "restore it with `git checkout` or `dvc checkout`, or rerun the stage that makes it (`dvc repro -f`)"
