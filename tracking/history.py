"""Looks up lineage: dvc.lock in all of git's history, the journals of the runs, and MLflow."""

import fnmatch
import hashlib
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from tracking.dvc_files import DvcLock, listing_md5, read_yaml
from tracking.git import git, git_bytes, git_or_none
from tracking.mlflow_server import TrackingError, connect, has_run, resolve_uri, sqlite_path
from tracking.redaction import redact
from tracking.run import DAMAGE, Run, runs_in

NOT_FINISHED = "not finished"
_NAMES = ("refs/heads/", "refs/tags/", "refs/remotes/")
_EXPERIMENT = re.compile(r"refs/exps/[0-9a-f]{2}/[0-9a-f]{38}/(?P<name>.+)")  # DVC's other refs are internal


# --- git


@dataclass(frozen=True)
class Holder:
    """A commit that brought a model into dvc.lock."""

    root: Path
    commit: str
    md5: str  # of the model, as dvc.lock has it
    lock: DvcLock

    @cached_property
    def refs(self) -> list[str]:
        """The full names of the refs from which the commit can be reached."""
        return _refs_to(self.root, self.commit)

    @property
    def experiments(self) -> dict[str, str]:
        """The DVC experiments from which it can be reached: name -> ref."""
        found = ((_EXPERIMENT.fullmatch(ref), ref) for ref in self.refs)
        return {match["name"]: ref for match, ref in found if match}

    @property
    def kind(self) -> str:
        """commit | experiment | unnamed"""
        if any(ref.startswith(_NAMES) for ref in self.refs):
            return "commit"
        return "experiment" if self.experiments else "unnamed"

    @property
    def name(self) -> str:
        """For people: "1a2b3c4 main" or "1a2b3c4 experiment slower"."""
        if self.kind == "experiment":
            return f"{self.commit[:7]} experiment {_first_three([*self.experiments])}"
        names = [ref.split("/", 2)[2] for ref in self.refs if ref.startswith(_NAMES)]
        return f"{self.commit[:7]} {_first_three(names) or 'in no branch'}"

    @cached_property
    def differs(self) -> list[str]:
        """The deps and params of the commit that differ from its dvc.lock; without any, `dvc repro` makes the model."""
        return _differences(self.root, self.commit, self.lock)


def _first_three(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def holders(root: Path, md5: str) -> list[Holder]:
    """All commits that brought a model whose hash begins with `md5` into dvc.lock, the best one to check out first.

    Commits that make the model again come before those whose code or params differ from dvc.lock, commits of a branch
    before experiments, and older commits before newer ones.
    """
    # -m, since a merge that resolved dvc.lock by hand may be the first to have it.
    search = ["log", "--all", "-m", "--full-history", "--topo-order", "--reverse", "--no-show-signature"]
    commits = git_or_none(root, *search, "--format=%H", f"-S{md5}", "--", "dvc.lock") or ""
    found = []
    for commit in dict.fromkeys(commits.splitlines()):
        lock = DvcLock.of_commit(root, commit)
        if lock.model_md5 and lock.model_md5.startswith(md5):
            found.append(Holder(root, commit, lock.model_md5, lock))
    order = ["commit", "experiment", "unnamed"]
    return sorted(found, key=lambda holder: (bool(holder.differs), order.index(holder.kind)))


def experiment_models(root: Path, name: str) -> set[str]:
    """The md5 of the model in dvc.lock, for each DVC experiment of that name.

    An experiment whose stages all came from the cache has no run, and its dvc.lock may be the same as its baseline's.
    """
    return {md5 for ref in experiment_refs(root, name) if (md5 := DvcLock.of_commit(root, ref).model_md5)}


def experiment_refs(root: Path, name: str) -> list[str]:
    """The refs of the DVC experiments of that name (a pattern may have *); empty outside of a repository."""
    refs = (git_or_none(root, "for-each-ref", "--format=%(refname)", "refs/exps") or "").splitlines()
    return [ref for ref in refs if (match := _EXPERIMENT.fullmatch(ref)) and fnmatch.fnmatchcase(match["name"], name)]


def fetch_command(root: Path, commit: str) -> str | None:
    """The command that brings a commit into a fresh clone; None if every clone has it."""
    refs = _refs_to(root, commit)
    if any(ref.startswith(("refs/heads/", "refs/tags/")) for ref in refs):
        return None
    experiment = next((ref for ref in refs if _EXPERIMENT.fullmatch(ref)), None)
    return f"git fetch --quiet origin {f'{experiment}:{experiment}' if experiment else commit}"


def _refs_to(root: Path, commit: str) -> list[str]:
    return git(root, "for-each-ref", "--format=%(refname)", "--contains", commit).splitlines()


def _differences(root: Path, commit: str, lock: DvcLock) -> list[str]:
    """Names of the deps and params of train and the stages before it that differ between a commit and its dvc.lock."""
    blobs = _tree(root, commit)
    makers = {path: name for name, outs in lock.outs().items() for path in outs}
    found: list[str] = []
    todo, seen = ["train"], set()
    while todo:
        stage = todo.pop()
        if stage in seen:
            continue
        seen.add(stage)
        for path, md5 in lock.stages[stage].deps.items():
            if path in makers:
                todo.append(makers[path])
            elif md5 != _md5_at(root, blobs, path):
                found.append(path)
        found += [name for name, _, _ in changed_params(root, commit, lock.stages[stage].params)]
    return sorted(set(found))


def changed_params(root: Path, commit: str, locked: dict[str, dict[str, Any]]) -> list[tuple[str, Any, Any]]:
    """The parameters, of a stage in dvc.lock by file, that a commit has with other values: name, locked, current."""
    found = []
    for file, values in locked.items():
        current = _yaml_at(root, commit, file)
        found += [change for key, value in values.items() for change in unequal(key, value, _value(current, key))]
    return found


def _value(values: Any, key: str) -> Any:
    """The section "train" or the value "train.seed"; dvc.yaml may name either."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def unequal(name: str, locked: Any, current: Any) -> list[tuple[str, Any, Any]]:
    """The keys below `name` with other values: key, locked, current."""
    if isinstance(locked, dict) and isinstance(current, dict):
        keys = {**locked, **current}
        return [found for key in keys for found in unequal(f"{name}.{key}", locked.get(key), current.get(key))]
    return [] if locked == current else [(name, locked, current)]


def _tree(root: Path, commit: str) -> dict[str, str]:
    """All files of a commit: path -> blob."""
    listed = git(root, "ls-tree", "-r", "-z", commit).split("\0")
    entries = (line.partition("\t") for line in listed if line)
    return {path: info.split()[2] for info, _, path in entries}


def _md5_at(root: Path, blobs: dict[str, str], path: str) -> str | None:
    """DVC's hash of a file or directory of a commit; None if the commit has neither."""
    if path in blobs:
        return _md5_of_blob(root, blobs[path])
    prefix = f"{path.rstrip('/')}/"
    below = {name.removeprefix(prefix): blob for name, blob in blobs.items() if name.startswith(prefix)}
    return listing_md5({name: _md5_of_blob(root, blob) for name, blob in below.items()}) if below else None


@cache
def _md5_of_blob(root: Path, blob: str) -> str:
    return hashlib.md5(git_bytes(root, "cat-file", "blob", blob)).hexdigest()


def _yaml_at(root: Path, commit: str, file: str) -> dict[str, Any]:
    """The content of a commit's params file; empty where it is absent or damaged."""
    try:
        return read_yaml(git(root, "show", f"{commit}:./{file}"), file)
    except ValueError:
        return {}


# --- runs: the journals, which are the original, and MLflow


@dataclass
class RecordedRun:
    """A training as recorded in its journal or in MLflow."""

    id: str  # MLflow's; empty if it has not been sent
    name: str
    status: str
    started: int  # ms
    params: dict[str, str]
    tags: dict[str, str]
    environment: dict[str, str] | None = None
    diff: Path | None = None  # uncommitted changes
    attempt: str = ""  # where its journal is
    in_mlflow: bool = False
    diff_in_mlflow: bool = False

    @classmethod
    def from_journal(cls, run: Run, root: Path) -> "RecordedRun":
        """Raises an error of DAMAGE."""
        return cls(
            id=run.mlflow.get("run_id", ""),
            name=run.info["name"],
            status=(run.end or {}).get("status", NOT_FINISHED),
            started=run.info["started"],
            params=run.params,
            tags=run.tags,
            environment=run.environment,
            diff=run.diff if run.diff.exists() else None,
            attempt=str(run.directory.relative_to(root)),
        )

    @classmethod
    def from_mlflow(cls, run: Any) -> "RecordedRun":
        info, data = run.info, run.data
        return cls(info.run_id, info.run_name, info.status, info.start_time, data.params, data.tags)

    @property
    def sha256(self) -> str:
        return self.tags.get("model.sha256", "")

    @property
    def md5(self) -> str:
        return self.tags.get("model.md5", "")

    @property
    def pulled(self) -> bool:
        """Whether it is no training: MLflow keeps scores there of a model whose training is in another database."""
        return "model.pulled" in self.tags

    @property
    def dirty(self) -> bool:
        return self.tags.get("git.dirty") == "true"

    def __str__(self) -> str:
        return f"{self.id or self.attempt} '{self.name}'"


@dataclass
class RecordedRuns:
    """All runs of the journals and of MLflow; each fills in what the other has lost."""

    root: Path
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.uri = resolve_uri(self.root)
        self.local: dict[str, RecordedRun] = {}  # by run_key
        for run in runs_in(self.root):
            try:
                self.local[run.info["run_key"]] = RecordedRun.from_journal(run, self.root)
            except DAMAGE as error:
                self.warnings.append(f"{run} is damaged ({type(error).__name__}: {error}) and was skipped")
        self.client = self._connect()

    def by_id(self, run_id: str) -> RecordedRun | None:
        found = [run for run in self.local.values() if run.id == run_id]
        in_mlflow = self._ask(lambda: [self.client.get_run(run_id)] if has_run(self.client, run_id) else [])
        return next(iter(self._merged(found, in_mlflow)), None)

    def by_name(self, name: str) -> list[RecordedRun]:
        """The runs of that name, or of the DVC experiment of that name."""
        quoted = f'"{name}"' if "'" in name else f"'{name}'"
        found = [run for run in self.local.values() if name in (run.name, run.tags.get("dvc.experiment"))]
        fields = ("attributes.run_name", "tags.`dvc.experiment`")
        return self._merged(found, [run for field in fields for run in self._search(f"{field} = {quoted}")])

    def by_model(self, prefix: str) -> list[RecordedRun]:
        """The runs that made a model whose sha256 or md5 has that prefix; clean ones first, then the oldest."""
        local = self.local.values() if prefix else []
        found = [run for run in local if run.sha256.startswith(prefix) or run.md5.startswith(prefix)]
        in_mlflow = [run for tag in ("sha256", "md5") for run in self._search(f"tags.`model.{tag}` LIKE '{prefix}%'")]
        return sorted(self._merged(found, in_mlflow), key=lambda run: (run.pulled, run.dirty, run.started))

    def complete(self, run: RecordedRun) -> None:
        """Adds what MLflow's artifacts record of a run without a journal."""
        files = self._ask(lambda: self.client.list_artifacts(run.id)) if run.in_mlflow else []
        names = {file.path for file in files}
        run.diff_in_mlflow = "uncommitted.diff" in names
        if run.environment is None and "environment.json" in names:
            with tempfile.TemporaryDirectory() as folder:
                for path in self._ask(lambda: [self.client.download_artifacts(run.id, "environment.json", folder)]):
                    run.environment = json.loads(Path(path).read_text(encoding="utf-8"))[-1]["environment"]

    def _connect(self) -> Any:
        path = sqlite_path(self.uri)
        if path and not path.exists():
            self._warn(f"there is no {path}")  # connecting would create an empty one
            return None
        try:
            return connect(self.uri, self.root)
        except TrackingError as error:
            self._warn(str(error))
            return None

    def _warn(self, why: str) -> None:
        self.warnings.append(f"{why}; only the journals in {self.root / '.runs'} were searched")

    def _ask(self, question: Callable[[], Any]) -> list[Any]:
        if self.client is None:
            return []
        try:
            return list(question())
        except Exception as error:  # whatever a tracking server does, the journals and git still answer
            self._warn(f"MLflow at {redact(self.uri)} did not answer ({redact(str(error))[:200]})")
            self.client = None
            return []

    def _search(self, condition: str) -> list[Any]:
        def question() -> list[Any]:
            experiments = [experiment.experiment_id for experiment in self.client.search_experiments()]
            return list(self.client.search_runs(experiments, condition)) if experiments else []

        return self._ask(question)

    def _merged(self, local: list[RecordedRun], mlflow: list[Any]) -> list[RecordedRun]:
        """Each run once, as in its journal, which is the original, or as in MLflow if it has no journal here."""
        found = {id(run): run for run in local}
        for recorded in mlflow:
            key = recorded.data.tags.get("run_key") or recorded.info.run_id
            run = self.local.setdefault(key, RecordedRun.from_mlflow(recorded))
            run.id, run.in_mlflow = recorded.info.run_id, True
            if run.status == NOT_FINISHED:  # a killed process writes nothing in the journal
                run.status = recorded.info.status
            found[id(run)] = run
        return list(found.values())
