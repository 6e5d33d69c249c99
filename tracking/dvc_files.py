"""DVC's files: dvc.lock, the stages of dvc.yaml, the cache. And the DVC process that runs a stage."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from tracking.git import git_or_none


def dvc_process() -> int | None:
    """Process id of the DVC that runs this stage, its direct parent (`exec` in dvc.yaml); None if started by hand.

    0 if that DVC has died already: then the parent is init, which belongs to another session.
    """
    if "DVC_STAGE" not in os.environ:
        return None
    parent = os.getppid()
    return parent if os.getsid(parent) == os.getsid(0) else 0


# --- dvc.lock and dvc.yaml


@dataclass(frozen=True)
class LockedStage:
    """A stage's entry in dvc.lock."""

    deps: dict[str, str]  # path -> md5
    outs: dict[str, str]  # path -> md5
    params: dict[str, dict[str, Any]]  # file -> key -> value; a key may be a section


@dataclass(frozen=True)
class DvcLock:
    """A dvc.lock, or an empty one. DVC writes it in place, so a kill may cut it off anywhere."""

    stages: dict[str, LockedStage] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "DvcLock":
        """Raises ValueError, with a remedy, for an incomplete dvc.lock."""
        try:
            stages = read_yaml(text, "dvc.lock")["stages"]
            return cls({name: _locked_stage(entry) for name, entry in stages.items()})
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError("dvc.lock names no stages; `git checkout dvc.lock`, or `dvc repro` again") from error

    @classmethod
    def parse_or_empty(cls, text: str | None) -> "DvcLock":
        """Empty for no text or an incomplete one: a commit may have no dvc.lock, or one with conflict markers."""
        try:
            return cls.parse(text or "")
        except ValueError:
            return cls()

    @classmethod
    def of_workspace(cls, root: Path) -> "DvcLock":
        """The dvc.lock in the working tree; empty where it is absent or damaged."""
        try:
            return cls.parse_or_empty((root / "dvc.lock").read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            return cls()

    @classmethod
    def of_commit(cls, root: Path, commit: str) -> "DvcLock":
        """The dvc.lock of a commit or ref; empty where it is absent or damaged."""
        return cls.parse_or_empty(git_or_none(root, "show", f"{commit}:./dvc.lock"))

    @property
    def model_md5(self) -> str | None:
        """The md5 of the model; None if the lock has none."""
        return self.out_md5("train", "model")

    def out_md5(self, stage: str, path: str) -> str | None:
        """The md5 of a stage's out; None if the lock has none."""
        return self.stages[stage].outs.get(path) if stage in self.stages else None

    def outs(self) -> dict[str, dict[str, str]]:
        """stage -> path -> md5"""
        return {name: stage.outs for name, stage in self.stages.items()}


def _locked_stage(entry: dict[str, Any]) -> LockedStage:
    deps, outs = ({part["path"]: part["md5"] for part in entry.get(kind, [])} for kind in ("deps", "outs"))
    if not all(isinstance(text, str) for text in (*deps.keys(), *deps.values(), *outs.keys(), *outs.values())):
        raise TypeError("a path or an md5 is not text")
    params = entry.get("params", {})
    if not all(isinstance(values, dict) for values in params.values()):
        raise TypeError("params are not grouped by file")
    return LockedStage(deps, outs, params)


def stage_names(dvc_yaml: str) -> list[str]:
    """The stages of a dvc.yaml, in its order. Raises ValueError."""
    return list(read_yaml(dvc_yaml, "dvc.yaml").get("stages", {}))


def read_yaml(text: str, name: str) -> dict[str, Any]:
    """Parses the text of the YAML file `name`, which must be a mapping. Raises ValueError with a remedy."""
    try:
        content = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, TypeError, RecursionError) as error:
        if text.startswith("<<<<<<< ") or "\n<<<<<<< " in text:
            mend = f"`git checkout --ours {name}`, then `dvc repro`" if name == "dvc.lock" else "resolve it"
            raise ValueError(f"{name} holds a merge conflict; {mend} and `git add {name}`") from error
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{name} is not valid YAML ({reason}); `git checkout {name}` restores it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} is empty; `git checkout {name}` restores it")
    return content


# --- the cache


def cache_path(root: Path, md5: str) -> Path:
    """Where DVC's cache keeps the object with an md5 of dvc.lock, whether or not it is there. Raises ValueError.

    DVC's own code reads its four levels of configuration, since cache.dir may name any folder. In the stages, which
    have imported most of it, that takes 0.05 s of processor time; the command `dvc cache dir` takes 0.5 s.
    """
    cache = _configuration(root)["cache"].get("dir")
    return Path(cache or root / ".dvc" / "cache") / "files" / "md5" / md5[:2] / md5[2:]


def remote_folder(root: Path) -> Path | None:
    """The folder that is DVC's default remote; None if there is none, or it is no folder. Raises ValueError."""
    config = _configuration(root)
    remote = config["remote"].get(config["core"].get("remote"), {})
    return Path(remote["url"]) if remote and "://" not in remote["url"] else None


def _configuration(root: Path) -> Any:
    """DVC's configuration, of all its levels. Raises ValueError."""
    from dvc.config import Config, ConfigError

    try:
        return Config(str(root / ".dvc"))
    except ConfigError as error:
        raise ValueError(f"DVC's configuration is damaged ({error}); `dvc config --list` shows it") from error


def path_md5(path: Path) -> str | None:
    """DVC's hash of a file or a directory; None if there is neither."""
    if path.is_dir():
        return directory_md5(path)
    return _file_md5(path) if path.is_file() else None


def directory_md5(directory: Path) -> str:
    """DVC's hash of a directory, as in dvc.lock (a test compares it with DVC's own)."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return listing_md5({path.relative_to(directory).as_posix(): _file_md5(path) for path in files})


def listing_md5(files: dict[str, str]) -> str:
    """DVC's hash of a directory, from the md5 of each of its files: path relative to it -> md5."""
    entries = [{"md5": md5, "relpath": path} for path, md5 in sorted(files.items())]
    return _md5(json.dumps(entries, sort_keys=True).encode()) + ".dir"


def _file_md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()
