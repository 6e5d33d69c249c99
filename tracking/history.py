"""Where lineage is looked up: dvc.lock in all of git's history, the journals of the runs, and MLflow."""

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
from tracking.mlflow_server import TrackingError, as_text, connect, has_run, resolve_uri, sqlite_path
from tracking.redaction import redact
from tracking.run import Run, runs_in

NOT_FINISHED = "not finished"
_EXPERIMENT = re.compile(r"refs/exps/[0-9a-f]{2}/[0-9a-f]{38}/(?P<name>.+)")  # others of DVC's refs are its own affair


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
        """The names, in full, from which the commit can be reached."""
        return git(self.root, "for-each-ref", "--format=%(refname)", "--contains", self.commit).splitlines()

    @property
    def experiments(self) -> dict[str, str]:
        """The DVC experiments that it can be reached from: name -> ref."""
        found = ((_EXPERIMENT.fullmatch(ref), ref) for ref in self.refs)
        return {match["name"]: ref for match, ref in found if match}

    @property
    def kind(self) -> str:
        if any(ref.startswith(("refs/heads/", "refs/tags/", "refs/remotes/")) for ref in self.refs):
            return "commit"
        return "experiment" if self.experiments else "unnamed"

    @property
    def name(self) -> str:
        """In a few words: "1a2b3c4 main" or "1a2b3c4 experiment slower"."""
        if self.kind == "experiment":
            return f"{self.commit[:7]} experiment {', '.join(self.experiments)}"
        prefixes = "refs/heads/", "refs/tags/", "refs/remotes/"
        names = [ref.split("/", 2)[2] for ref in self.refs if ref.startswith(prefixes)]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"{self.commit[:7]} {', '.join(names[:3]) + more if names else 'in no branch'}"

    @cached_property
    def differs(self) -> list[str]:
        """What of the commit is not what dvc.lock says the model was made from; empty if `dvc repro` makes it again."""
        return _differences(self.root, self.commit, self.lock)


def holders(root: Path, md5: str) -> list[Holder]:
    """All commits that brought a model whose hash begins with `md5` into dvc.lock, the best to go back to first.

    That is one that makes the model again rather than one whose code or params have changed since, a commit of a branch
    rather than an experiment, and the oldest.
    """
    # -m: a merge that resolved dvc.lock by hand may be the first to hold it.
    search = ["log", "--all", "-m", "--full-history", "--topo-order", "--reverse", "--no-show-signature"]
    commits = git_or_none(root, *search, "--format=%H", f"-S{md5}", "--", "dvc.lock") or ""
    found = []
    for commit in dict.fromkeys(commits.splitlines()):
        lock = DvcLock.parse_or_empty(git_or_none(root, "show", f"{commit}:./dvc.lock"))
        held = lock.out_md5("train", "model")
        if held and held.startswith(md5):
            found.append(Holder(root, commit, held, lock))
    order = ["commit", "experiment", "unnamed"]
    return sorted(found, key=lambda holder: (bool(holder.differs), order.index(holder.kind)))


def experiment_models(root: Path, name: str) -> set[str]:
    """The md5 of the model in dvc.lock, for each DVC experiment of that name.

    One whose stages all came from the cache has no run of its own, and its dvc.lock may have been another commit's.
    """
    named = experiment_refs(root, name)
    locks = [DvcLock.parse_or_empty(git_or_none(root, "show", f"{ref}:./dvc.lock")) for ref in named]
    return {md5 for lock in locks if (md5 := lock.out_md5("train", "model"))}


def experiment_refs(root: Path, name: str) -> list[str]:
    """git's refs of the DVC experiments of that name; empty where no repository is."""
    refs = (git_or_none(root, "for-each-ref", "--format=%(refname)", "refs/exps") or "").splitlines()
    return [ref for ref in refs if (match := _EXPERIMENT.fullmatch(ref)) and match["name"] == name]


def known_commit(root: Path, commit: str) -> bool:
    return git_or_none(root, "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}") is not None


def fetch_command(root: Path, commit: str) -> str | None:
    """What a fresh clone lacks of a commit, as a command; None if it comes with every clone."""
    refs = git(root, "for-each-ref", "--format=%(refname)", "--contains", commit).splitlines()
    if any(ref.startswith(("refs/heads/", "refs/tags/")) for ref in refs):
        return None
    experiment = next((ref for ref in refs if _EXPERIMENT.fullmatch(ref)), None)
    return f"git fetch --quiet origin {f'{experiment}:{experiment}' if experiment else commit}"


def _differences(root: Path, commit: str, lock: DvcLock) -> list[str]:
    """Names of deps and params of train, and of the stages before it, that the commit has otherwise or not at all."""
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
        for file, values in lock.stages[stage].params.items():
            current = _yaml_at(root, commit, file)
            found += [name for key, value in values.items() for name in _unequal(key, value, _value(current, key))]
    return sorted(set(found))


def _value(values: Any, key: str) -> Any:
    """A section, or one value of it: "train" or "train.seed"; dvc.yaml may name either."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _unequal(name: str, locked: Any, current: Any) -> list[str]:
    if isinstance(locked, dict) and isinstance(current, dict):
        keys = {**locked, **current}
        return [found for key in keys for found in _unequal(f"{name}.{key}", locked.get(key), current.get(key))]
    return [] if locked == current else [name]


def _tree(root: Path, commit: str) -> dict[str, str]:
    """All files of a commit: path -> blob."""
    listed = git(root, "ls-tree", "-r", "-z", commit).split("\0")
    entries = (line.partition("\t") for line in listed if line)
    return {path: info.split()[2] for info, _, path in entries}


def _md5_at(root: Path, blobs: dict[str, str], path: str) -> str | None:
    """DVC's hash of a file or directory of a commit, as directory_md5 makes it; None for what it does not hold."""
    if path in blobs:
        return _md5_of_blob(root, blobs[path])
    prefix = f"{path.rstrip('/')}/"
    below = {name.removeprefix(prefix): blob for name, blob in blobs.items() if name.startswith(prefix)}
    return listing_md5({name: _md5_of_blob(root, blob) for name, blob in below.items()}) if below else None


@cache
def _md5_of_blob(root: Path, blob: str) -> str:
    return hashlib.md5(git_bytes(root, "cat-file", "blob", blob)).hexdigest()


def _yaml_at(root: Path, commit: str, file: str) -> dict[str, Any]:
    """What a commit's file of params holds; nothing where it is absent or damaged."""
    try:
        return read_yaml(git(root, "show", f"{commit}:./{file}"), file)
    except ValueError:
        return {}


# --- runs: the journals, which are the original, and MLflow


@dataclass
class KnownRun:
    """A training as its journal or MLflow tells of it."""

    id: str  # MLflow's; empty: it has not got there
    name: str
    status: str
    started: int  # ms
    params: dict[str, str]
    tags: dict[str, str]
    environment: dict[str, str] | None = None
    diff: Path | None = None  # uncommitted changes
    attempt: str = ""  # where its journal lies
    in_mlflow: bool = False
    diff_in_mlflow: bool = False

    @property
    def sha256(self) -> str:
        return self.tags.get("model.sha256", "")

    @property
    def md5(self) -> str:
        return self.tags.get("model.md5", "")

    @property
    def pulled(self) -> bool:
        """Whether it is no training: MLflow's place for scores of a model whose training is in another database."""
        return "model.pulled" in self.tags

    @property
    def dirty(self) -> bool:
        return self.tags.get("git.dirty") == "true"

    def __str__(self) -> str:
        return f"{self.id or self.attempt} '{self.name}'"


@dataclass
class KnownRuns:
    """All runs, from the journals and from MLflow; what one of them has lost the other one tells."""

    root: Path
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.uri = resolve_uri(self.root)
        self.local = {key: run for found in runs_in(self.root) for key, run in self._journal(found)}
        self.client = self._connect()

    def by_id(self, run_id: str) -> KnownRun | None:
        found = [run for run in self.local.values() if run.id == run_id]
        with_mlflow = self._ask(lambda: [self.client.get_run(run_id)] if has_run(self.client, run_id) else [])
        return next(iter(self._merged(found, with_mlflow)), None)

    def by_name(self, name: str) -> list[KnownRun]:
        """Those of that name, or of the DVC experiment of that name."""
        quoted = f'"{name}"' if "'" in name else f"'{name}'"
        found = [run for run in self.local.values() if name in (run.name, run.tags.get("dvc.experiment"))]
        fields = ("attributes.run_name", "tags.`dvc.experiment`")
        return self._merged(found, [run for field in fields for run in self._search(f"{field} = {quoted}")])

    def by_model(self, prefix: str) -> list[KnownRun]:
        """Those that made a model whose sha256 or md5 begins so; clean ones first, then the oldest."""
        local = self.local.values() if prefix else []
        found = [run for run in local if run.sha256.startswith(prefix) or run.md5.startswith(prefix)]
        told = [run for tag in ("sha256", "md5") for run in self._search(f"tags.`model.{tag}` LIKE '{prefix}%'")]
        merged = self._merged(found, told)
        return sorted(merged, key=lambda run: (run.pulled, run.dirty, run.started))

    def _connect(self) -> Any:
        path = sqlite_path(self.uri)
        if path and not path.exists():
            self._warn(f"there is no {path}")  # connecting would make an empty one
            return None
        try:
            return connect(self.uri, self.root)
        except TrackingError as error:
            self._warn(str(error))
            return None

    def _warn(self, why: str) -> None:
        self.warnings.append(f"{why}; told from the journals in {self.root / '.runs'} alone")

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

    def _merged(self, local: list[KnownRun], mlflow: list[Any]) -> list[KnownRun]:
        """Each run once: the journal's view, as it is the original, and MLflow's where the journal is gone."""
        found = {id(run): run for run in local}
        for told in mlflow:
            tags = told.data.tags
            run = self.local.get(tags.get("run_key", ""))
            if run is None:
                info = told.info
                run = KnownRun(info.run_id, info.run_name, info.status, info.start_time, told.data.params, tags)
                self.local[tags.get("run_key") or info.run_id] = run
            run.id, run.in_mlflow = told.info.run_id, True
            if run.status == NOT_FINISHED:  # a kill leaves no word in the journal
                run.status = told.info.status
            found[id(run)] = run
        return list(found.values())

    def complete(self, run: KnownRun) -> None:
        """Fetches from MLflow what its artifacts tell of a run whose journal is gone."""
        names = (
            {file.path for file in self._ask(lambda: self.client.list_artifacts(run.id))} if run.in_mlflow else set()
        )
        run.diff_in_mlflow = "uncommitted.diff" in names
        if run.environment is None and "environment.json" in names:
            with tempfile.TemporaryDirectory() as folder:
                for path in self._ask(lambda: [self.client.download_artifacts(run.id, "environment.json", folder)]):
                    run.environment = json.loads(Path(path).read_text(encoding="utf-8"))[-1]["environment"]

    def _journal(self, run: Run) -> list[tuple[str, KnownRun]]:
        try:
            info, end = run.info, run.end or {}
            made = {f"model.{name}": run.result.get(f"model_{name}") for name in ("sha256", "md5")}
            tags = info["tags"] | {name: value for name, value in made.items() if value is not None}
            params = {name: as_text(value) for name, value in info["params"].items()}
            status = end.get("status", NOT_FINISHED)
            known = KnownRun(run.mlflow.get("run_id", ""), info["name"], status, info["started"], params, tags)
            known.attempt = str(run.directory.relative_to(self.root))
            known.environment = run.environment
            if (run.artifacts / "uncommitted.diff").exists():
                known.diff = run.artifacts / "uncommitted.diff"
            return [(info["run_key"], known)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self.warnings.append(f"{run} is damaged ({type(error).__name__}: {error}) and was passed over")
            return []
