"""What DVC's own files and environment variables say about the stage that is running."""

import hashlib
import json
import os
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError


def dvc_process() -> int | None:
    """Process id of the DVC that runs this stage, its direct parent (`exec` in dvc.yaml); None if run by hand.

    0 if that DVC has died already: then the parent is init, which is of another session.
    """
    if "DVC_STAGE" not in os.environ:
        return None
    parent = os.getppid()
    return parent if os.getsid(parent) == os.getsid(0) else 0


def experiment_name() -> str | None:
    """Name of the running DVC experiment; None for a plain `dvc repro` and for a stage run by hand."""
    return os.environ.get("DVC_EXP_NAME")


def locked_md5(stage: str, out: str, path: Path = Path("dvc.lock")) -> str | None:
    """The hash that dvc.lock holds for a stage's out; None where there is none, or no whole dvc.lock."""
    try:
        lock = YAML(typ="safe").load(path.read_text())
        md5 = next((entry["md5"] for entry in lock["stages"][stage]["outs"] if entry["path"] == out), None)
    except (OSError, ValueError, YAMLError, KeyError, TypeError, RecursionError):
        return None
    return md5 if isinstance(md5, str) else None


def is_cached(repository: Path, md5: str) -> bool:
    """Whether DVC's cache, at its usual place, holds what dvc.lock knows by that md5."""
    return (repository / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]).exists()


def directory_md5(directory: Path) -> str:
    """DVC's hash of a directory, as it stands in dvc.lock (a test compares it with DVC's own)."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    entries = [
        {"md5": hashlib.md5(path.read_bytes()).hexdigest(), "relpath": path.relative_to(directory).as_posix()}
        for path in files
    ]
    entries.sort(key=lambda entry: entry["relpath"])
    return hashlib.md5(json.dumps(entries, sort_keys=True).encode()).hexdigest() + ".dir"
