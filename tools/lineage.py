"""Traces a model back to its run, commit, data and code, and prints the commands that make it again."""

import json
import re
import shlex
import textwrap
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from nanogpt.files import sha256_tree
from tools.command import command
from tracking.console import repository
from tracking.dvc_files import DvcLock, cache_path, directory_md5
from tracking.errors import warn
from tracking.fingerprint import environment
from tracking.git import git, resolve_commit
from tracking.history import Holder, RecordedRun, RecordedRuns, experiment_models, fetch_command, holders
from tracking.mlflow_server import resolve_uri
from tracking.redaction import redact
from tracking.run import as_text

UNKNOWN = "unknown"
_HASH = re.compile(r"[0-9a-f]{7,64}")
_RUN_ID = re.compile(r"[0-9a-f]{32}")


@dataclass
class Lineage:
    """A model and what it was made by."""

    sha256: str
    md5: str
    run: RecordedRun | None
    twins: list[RecordedRun]  # other runs that made the same model
    held: list[Holder]  # commits and experiments whose dvc.lock contains the model
    lock: DvcLock  # one that contains it: a commit's, otherwise the workspace's; empty if there is none
    asked: str | None = None  # the commit that was named, which may have kept it from an earlier one

    @property
    def trained(self) -> RecordedRun | None:
        """The run, if it trained the model and did not only score a pulled one."""
        return None if self.run is None or self.run.pulled else self.run

    @property
    def params(self) -> dict[str, str]:
        """Those of the run, otherwise those in dvc.lock."""
        if self.run and self.run.params:
            return self.run.params
        found: dict[str, str] = {}
        for stage in ("download", "tokenize", "train"):
            for values in self.lock.stages[stage].params.values() if stage in self.lock.stages else ():
                for section, content in values.items():
                    items = content.items() if isinstance(content, dict) else [("", content)]
                    found |= {f"{section}.{key}".rstrip("."): as_text(value) for key, value in items}
        return found


# --- what the argument names


def resolve(argument: str, root: Path, runs: RecordedRuns) -> Lineage:
    """The lineage of what the argument names. Raises ValueError if that is nothing, or ambiguous."""
    path = Path(argument)
    if path.is_file() and (path.parent / "model.json").is_file():
        path = path.parent
    if path.is_dir() or "/" in argument:
        if not (path / "model.json").is_file():
            raise _no_model(argument, root)
        return _of_model(root, runs, sha256_tree(path), directory_md5(path))
    if _RUN_ID.fullmatch(argument) and (run := runs.by_id(argument)):
        return _of_run(root, runs, run)
    prefix = argument.removesuffix(".dir")
    if _HASH.fullmatch(prefix) and (models := _models(root, runs, prefix)):
        if len(models) > 1:
            raise ValueError(f"{argument} may be {' or '.join(sorted(models))}: give more of the hash")
        return _of_model(root, runs, *next(iter(models.values())))
    if named := runs.by_name(argument):
        if len(named) > 1:
            ids = _some([run.id or run.attempt for run in named], 5)
            raise ValueError(f"{len(named)} runs are named {argument!r}: {ids}; give a run's id")
        return _of_run(root, runs, named[0])
    if in_experiments := experiment_models(root, argument):
        if len(in_experiments) > 1:
            models_ = ", ".join(sorted(in_experiments))
            raise ValueError(f"experiments named {argument!r} have the models {models_}; give one")
        return _of_model(root, runs, "", in_experiments.pop())
    if argument == "model":
        raise _no_model(argument, root)
    if commit := resolve_commit(root, argument):
        if not (of_commit := DvcLock.of_commit(root, commit).model_md5):
            raise ValueError(
                f"commit {argument} has no model in its dvc.lock; `git log -- dvc.lock` lists the commits with results"
            )
        return replace(_of_model(root, runs, "", of_commit), asked=commit)
    mlflow = "hashes of models in MLflow, " if runs.client else ""
    short = "" if _HASH.fullmatch(prefix) else " (a hash needs 7 or more hexadecimal digits)"
    raise ValueError(
        f"no run, model, experiment or commit is called {argument!r}{short}; searched: run ids and names, "
        f"experiments, {mlflow}journals in .runs, dvc.lock in all of git's history and experiments, model/"
        f"{''.join(f' ({line})' for line in runs.warnings)}. `git fetch` gets what another clone has, and "
        "`dvc exp pull` its experiments"
    )


def _no_model(argument: str, root: Path) -> ValueError:
    """The error for a directory without a model, with the command that makes the pipeline's own."""
    remedy = "give the directory of a published model"
    if Path(argument).resolve() == (root / "model").resolve():
        md5 = DvcLock.of_workspace(root).model_md5
        remedy = (
            "`dvc checkout model` restores it"
            if md5 and cache_path(root, md5).exists()
            else "`dvc repro train` makes it"
        )
    return ValueError(f"{argument} is not a model directory: it has no model.json; {remedy}")


def _models(root: Path, runs: RecordedRuns, prefix: str) -> dict[str, tuple[str, str]]:
    """All models with a hash that begins with `prefix`: a description -> (sha256, md5), "" if one is unknown."""
    pairs = [(run.sha256, run.md5) for run in runs.by_model(prefix)]
    if (root / "model" / "model.json").is_file():
        pairs.append((sha256_tree(root / "model"), directory_md5(root / "model")))
    pairs += [("", holder.md5) for holder in holders(root, prefix)]
    pairs.append(("", DvcLock.of_workspace(root).model_md5 or ""))
    sha256_of = {md5: sha256 for sha256, md5 in pairs if sha256 and md5}
    md5_of = {sha256: md5 for md5, sha256 in reversed(sha256_of.items())}
    found: dict[str, tuple[str, str]] = {}
    for sha256, md5 in pairs:
        sha256, md5 = sha256 or sha256_of.get(md5, ""), md5 or md5_of.get(sha256, "")
        names = [f"{kind} {value}" for kind, value in (("sha256", sha256), ("md5", md5)) if value.startswith(prefix)]
        if names:
            found[" = ".join(names)] = (sha256, md5)
    return found


def _of_run(root: Path, runs: RecordedRuns, run: RecordedRun) -> Lineage:
    return _of_model(root, runs, run.sha256, run.md5, run)


def _of_model(root: Path, runs: RecordedRuns, sha256: str, md5: str, run: RecordedRun | None = None) -> Lineage:
    same = runs.by_model(sha256 or md5) if sha256 or md5 else []
    trained = [twin for twin in same if not twin.pulled]
    if run is None or run.pulled:
        run = next(iter([*trained, *([run] if run else same)]), None)
    md5 = md5 or next((twin.md5 for twin in trained if twin.md5), "")
    sha256 = sha256 or next((twin.sha256 for twin in trained if twin.sha256), "")
    if not md5 and sha256 and (root / "model/model.json").is_file() and sha256_tree(root / "model") == sha256:
        md5 = directory_md5(root / "model")
    held = holders(root, md5) if md5 else []
    if run is None and not held:
        raise ValueError(
            f"no run and no commit has this model (sha256 {sha256}, md5 {md5}): it was changed, or made elsewhere; "
            "`dvc status model` compares it with dvc.lock, `git fetch` and `dvc exp pull` get what another clone has"
        )
    if run:
        runs.complete(run)
    lock = held[0].lock if held else DvcLock.of_workspace(root)
    if not md5 or lock.model_md5 != md5:
        lock = DvcLock()
    return Lineage(sha256, md5, run, [twin for twin in trained if twin is not run], held, lock)


def _some(names: list[str], most: int) -> str:
    return ", ".join(names[:most]) + (" …" if len(names) > most else "")


# --- the way back


def way_back(root: Path, lineage: Lineage) -> tuple[list[str], list[str]]:
    """The commands that make the model again in a new clone, none if that is impossible; and notes about them."""
    run, holder = lineage.trained, next(iter(lineage.held), None)
    notes: list[str] = []
    trained_at = run.tags.get("git.commit", "none") if run else "none"
    complete = holder is not None and not holder.differs
    if run and not complete and resolve_commit(root, trained_at):
        commit, patch = trained_at, _patch(root, run, notes)
        if patch is None:
            return [], notes
        if run.dirty:
            notes.append("files that git did not track were not recorded: a text among them is missing")
    elif holder:
        commit, patch = holder.commit, []
        if holder.differs:
            notes.append(f"in this commit, {', '.join(holder.differs)} does not match dvc.lock: expect another model")
    else:
        why = f"the run's commit ({trained_at[:12]}) is not in this repository" if run else "no run made it here"
        return [], [f"{UNKNOWN}: no dvc.lock in git's history contains the model, and {why}; try `git fetch`"]
    source = lineage.params.get("download.source", UNKNOWN)
    if source != "grammar" and not (complete and source.startswith("file:")):  # dvc.lock has the hash of inputs/texts/
        notes.append(f"download.source is {source}: the text must be available (from the network, or as a file)")
    determinism = lineage.params.get("numerics.determinism")
    if determinism in ("machine", "off"):
        promise = "does not promise the same bits" if determinism == "off" else "needs the same kind of machine"
        notes.append(f"numerics.determinism is {determinism}, which {promise}")
    folder = f"../model-{(lineage.md5 or lineage.sha256 or trained_at)[:8]}"
    fetch = fetch_command(root, commit)
    commands = [f"git clone --quiet {shlex.quote(str(root))} {folder}", f"cd {folder}", *([fetch] if fetch else [])]
    commands += [f"git checkout --quiet {commit}", *patch, "make setup", "source .venv/bin/activate", "dvc repro train"]
    if lineage.md5:  # search only the outs of train, since the entry of evaluate did not change
        commands.append(f"sed -n '/^  train:/,/^  [a-z]*:$/p' dvc.lock | grep {lineage.md5}")
    return commands, notes


def _patch(root: Path, run: RecordedRun, notes: list[str]) -> list[str] | None:
    """The commands that apply the uncommitted changes of a run; None, with a note, if these are incomplete."""
    if not run.dirty:
        return []
    left_out = run.tags.get("git.left_out")
    if left_out:
        notes.append(f"not recorded, because they are not part of the experiment: the changes of {left_out}")
    if run.diff is None and run.diff_in_mlflow:
        uri = redact(resolve_uri(root))
        if uri != resolve_uri(root):
            notes.append("replace *** with the password of MLflow's server")
        download = f"mlflow artifacts download --run-id {run.id} --artifact-path uncommitted.diff --dst-path .."
        empty = "--allow-empty " if left_out else ""  # it may contain only names
        download = f"MLFLOW_TRACKING_URI={shlex.quote(uri)} {download}"
        return ["make setup", "source .venv/bin/activate", download, f"git apply {empty}../uncommitted.diff"]
    text = run.diff.read_text(encoding="utf-8") if run.diff else ""
    if not text:
        problem = "there were uncommitted changes, but their uncommitted.diff is missing"
    elif text.rstrip().endswith("characters in all]") and "\n[cut: " in text:
        problem = f"{run.diff} contains only the beginning of the uncommitted changes, which were too many"
    elif re.search(r"^Binary files .* differ$", text, re.MULTILINE):
        problem = f"binary files had changed, which {run.diff} does not contain"
    else:
        return [f"git apply {shlex.quote(str(run.diff))}"] if "diff --git " in text else []
    notes.append(f"{UNKNOWN}: {problem}")
    return None


def shortcut(root: Path, lineage: Lineage) -> str | None:
    """The command that takes the model from DVC's cache here, without training; None if it is not there."""
    if not lineage.held or not cache_path(root, lineage.md5).exists():
        return None
    return f"dvc get . model --rev {lineage.held[0].commit} --out build/model-{lineage.md5[:8]}"


# --- what is printed


def describe(root: Path, runs: RecordedRuns, lineage: Lineage) -> dict[str, Any]:
    """The complete lineage, as `--json` prints it."""
    run, holder = lineage.run, next(iter(lineage.held), None)
    tags = run.tags if run else {}
    commands, notes = way_back(root, lineage)
    no_run, no_lock = f"{UNKNOWN}: no run recorded it", f"{UNKNOWN}: no dvc.lock contains this model"
    no_model = f"none: the run is {run.status}" if run and "model.sha256" not in tags else no_run
    found: dict[str, Any] = {
        "model": {"sha256": lineage.sha256 or no_model, "md5": lineage.md5 or no_model},
        "run": None,
        "commit": {"id": holder.commit, "kind": holder.kind, "name": holder.name} if holder else None,
        "asked": lineage.asked,
        "also": [other.name for other in lineage.held[1:]],
        "twins": [twin.id or twin.attempt for twin in lineage.twins],
        "params": lineage.params,
        "data": {"md5": lineage.lock.out_md5("download", "data/raw") or no_lock},
        "tokens": {
            "sha256": tags.get("tokens.sha256", no_run),
            "md5": lineage.lock.out_md5("tokenize", "data/tokens") or no_lock,
        },
        "code": {"sha256": tags.get("code.sha256", no_run)},
        "environment": run.environment if run else None,
        "differs_here": {},
        "commands": commands,
        "notes": notes,
        "from_cache": shortcut(root, lineage),
        "warnings": runs.warnings,
    }
    if run:
        source = [f"MLflow at {redact(runs.uri)}"] if run.in_mlflow else []
        source += [f"journal {run.attempt}"] if run.attempt else []
        names = ("git.commit", "git.dirty", "dvc.experiment", "dvc.baseline", "fingerprint", "attempt")
        found["run"] = {name: getattr(run, name) for name in ("id", "name", "status", "started", "pulled")}
        found["run"] |= {"source": source, **{name: tags.get(name, UNKNOWN) for name in names}}
    if run and run.environment:
        here = environment()
        pairs = {name: [value, here.get(name, UNKNOWN)] for name, value in run.environment.items()}
        found["differs_here"] = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    return found


def lines(root: Path, found: dict[str, Any]) -> dict[str, list[str]]:
    """Labels, and the lines beside each."""
    sections: dict[str, list[str]] = {}
    for name, value in found["params"].items():
        sections.setdefault(name.partition(".")[0], []).append(f"{name.partition('.')[2]}={value}")
    known = ", ".join(f"{name} {value}" for name, value in (found["environment"] or {}).items())
    differing = [f"{name} {old} -> {new} here" for name, (old, new) in found["differs_here"].items()]
    if differing:
        differing.append("the same bits are promised only in the environment of constraints.txt")
    return {
        "model": [f"{name:6} {value}" for name, value in found["model"].items()],
        "kept by": _commit_lines(root, found),
        **_run_lines(found),
        "params": [f"{name}: {' '.join(values)}" for name, values in sections.items()] or [UNKNOWN],
        "data": [f"md5 {found['data']['md5']}, source {found['params'].get('download.source', UNKNOWN)}"],
        "tokens": [f"sha256 {found['tokens']['sha256']}", f"md5    {found['tokens']['md5']}"],
        "code": [f"sha256 {found['code']['sha256']}"],
        "environment": [known or f"{UNKNOWN}: no run recorded it", *differing],
    }


def _run_lines(found: dict[str, Any]) -> dict[str, list[str]]:
    run, twins = found["run"], found["twins"]
    if not run:
        return {"run": [f"{UNKNOWN}: neither MLflow nor .runs has a run of this model"]}
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run["started"] / 1000))
    dirty = {"true": "with uncommitted changes, such as those of -S", "false": "clean"}.get(
        run["git.dirty"], f"changes {UNKNOWN}"
    )
    in_experiment = run["dvc.experiment"] not in ("none", UNKNOWN)
    about = [f"{run['id'] or 'not in MLflow'} '{run['name']}', {run['status']}, began {began}"]
    about.append(f"found in {' and '.join(run['source'])}")
    if twins:
        about.append(f"{len(twins)} more made the same model: {_some(twins, 3)}")
    if run["pulled"]:
        trained_at = f"{UNKNOWN}: the model was pulled, and this run only scored it; its training is recorded elsewhere"
    else:
        trained_at = f"{run['git.commit']}{', the baseline of the experiment' if in_experiment else ''}, {dirty}"
    experiment = [f"experiment {run['dvc.experiment']}"] if in_experiment else []
    return {"run": about, "trained at": [trained_at, *experiment]}


def _commit_lines(root: Path, found: dict[str, Any]) -> list[str]:
    commit, also, asked = found["commit"], found["also"], found["asked"]
    if not commit:
        return ["no commit and no experiment: no dvc.lock in git's history contains the model"]
    subject = git(root, "show", "--no-patch", "--no-show-signature", "--format=%cs %s", commit["id"])
    more = [f"and {len(also) - 3} more commits"] if len(also) > 3 else []
    return [
        f"{commit['id']} ({commit['name'].partition(' ')[2]})",
        subject,
        *(["later commits keep it until dvc.lock has another model"] if commit["kind"] == "commit" else []),
        *([f"unchanged at {asked}"] if asked not in (None, commit["id"]) else []),
        *("restored by {} ({})".format(*name.split(" ", 1)) for name in also[:3]),
        *more,
    ]


def show(root: Path, found: dict[str, Any]) -> None:
    for label, paragraphs in lines(root, found).items():
        for paragraph in paragraphs:
            for line in textwrap.wrap(paragraph, 110, break_long_words=False, break_on_hyphens=False):
                click.echo(f"{label:15}{line}")
                label = ""
    again = "the commands that make it again; the last one fails if the bits differ:"
    click.echo(f"\n{again if found['commands'] else 'no way to make it again is known'}")
    for line in found["commands"]:
        click.echo(f"    {line}")
    for note in found["notes"]:
        click.echo(f"note: {note}")
    if found["from_cache"]:
        click.echo(f"or take it from DVC's cache here:\n    {found['from_cache']}")


@command()
@click.argument("subject", metavar="RUN|EXPERIMENT|COMMIT|DIRECTORY|HASH")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(subject: str, as_json: bool) -> None:
    """Shows where a model comes from and how to make it again.

    Prints its run, commit, params, data, code and environment, and the commands that make it again. RUN is the id or
    name of an MLflow run, COMMIT has a dvc.lock with the model, DIRECTORY contains a model, HASH is the beginning of
    its sha256 or md5, which are those of the directory and not of a file in it.
    """
    root = repository()
    if not (root / "dvc.yaml").is_file():
        raise ValueError(f"{root} has no dvc.yaml: start this in the root of the repository")
    runs = RecordedRuns(root)
    found = describe(root, runs, resolve(subject, root, runs))
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    for warning in runs.warnings:
        warn("lineage", warning)
    show(root, found)
