"""Where a model comes from, and how to get it back: `python -m tools lineage <MLflow run | model directory | hash>`."""

import json
import re
import shlex
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from nanogpt.files import sha256_tree
from tools.command import command
from tracking.console import repository
from tracking.dvc_files import DvcLock, cache_path, directory_md5
from tracking.fingerprint import environment
from tracking.git import git
from tracking.history import Holder, RecordedRun, RecordedRuns, experiment_models, fetch_command, has_commit, holders
from tracking.mlflow_server import resolve_uri
from tracking.redaction import redact
from tracking.run import as_text

UNKNOWN = "unknown"
_HASH = re.compile(r"[0-9a-f]{7,64}")
_RUN_ID = re.compile(r"[0-9a-f]{32}")


@dataclass
class Lineage:
    """The chain from a model back to what made it."""

    sha256: str
    md5: str
    run: RecordedRun | None
    twins: list[RecordedRun]  # other runs that made the same model
    held: list[Holder]  # commits and experiments whose dvc.lock has the model
    lock: DvcLock  # one that has it: a commit's, or else the workspace's; empty if there is none


def resolve(argument: str, root: Path, runs: RecordedRuns) -> Lineage:
    """What the argument names. Raises ValueError where that is nothing, or several things."""
    path = Path(argument)
    if path.is_dir() or "/" in argument:
        if not (path / "model.json").is_file():
            raise _no_model(argument, root)
        return _of_model(root, runs, sha256_tree(path), directory_md5(path), None)
    if _RUN_ID.fullmatch(argument) and (run := runs.by_id(argument)):
        return _of_model(root, runs, run.sha256, run.md5, run)
    prefix = argument.removesuffix(".dir")
    if _HASH.fullmatch(prefix) and (models := _models(root, runs, prefix)):
        if len(models) > 1:
            raise ValueError(f"{argument} may be {' or '.join(sorted(models))}: give more of the hash")
        return _of_model(root, runs, *next(iter(models.values())), None)
    named = runs.by_name(argument)
    if len(named) > 1:
        raise ValueError(f"{len(named)} runs are named {argument!r}: {_listed(named)}; give a run's id")
    if named:
        return _of_model(root, runs, named[0].sha256, named[0].md5, named[0])
    if in_experiments := experiment_models(root, argument):
        if len(in_experiments) > 1:
            raise ValueError(
                f"experiments named {argument!r} have the models {', '.join(sorted(in_experiments))}; give one"
            )
        return _of_model(root, runs, "", in_experiments.pop(), None)
    if argument == "model":
        raise _no_model(argument, root)
    searched = [
        "run ids",
        "run names",
        "names of experiments",
        "hashes of models in MLflow" if runs.client else "",
        "journals in .runs",
    ]
    searched += ["dvc.lock in all of git's history and experiments", "model/"]
    short = "" if _HASH.fullmatch(prefix) else "; a hash is told by 7 or more of its hexadecimal digits"
    warnings = "".join(f" ({line})" for line in runs.warnings)
    raise ValueError(
        f"nothing is known of {argument!r}{short}; searched: {', '.join(filter(None, searched))}{warnings}. "
        "What another clone has comes with `git fetch`, its experiments with `dvc exp pull`"
    )


def _no_model(argument: str, root: Path) -> ValueError:
    """Why a directory is no model, and what makes the pipeline's own."""
    remedy = "give the directory of a published model"
    if Path(argument).resolve() == (root / "model").resolve():
        md5 = DvcLock.of_workspace(root).model_md5
        remedy = (
            "`dvc checkout model` brings it back"
            if md5 and cache_path(root, md5).exists()
            else "`dvc repro train` makes it"
        )
    return ValueError(f"{argument} is no model directory: it holds no model.json; {remedy}")


def _models(root: Path, runs: RecordedRuns, prefix: str) -> dict[str, tuple[str, str]]:
    """All models with a hash that begins so: a name for people -> (sha256, md5), "" where it is not known."""
    pairs = [(run.sha256, run.md5) for run in runs.by_model(prefix)]
    if (root / "model" / "model.json").is_file():
        pairs.append((sha256_tree(root / "model"), directory_md5(root / "model")))
    pairs += [("", holder.md5) for holder in holders(root, prefix)]
    pairs.append(("", DvcLock.of_workspace(root).model_md5 or ""))
    found: dict[str, tuple[str, str]] = {}
    known = {md5: sha256 for sha256, md5 in pairs if sha256 and md5}
    for sha256, md5 in pairs:
        sha256 = sha256 or known.get(md5, "")
        md5 = md5 or next((other for other, same in known.items() if same == sha256), "")
        if sha256.startswith(prefix) or md5.startswith(prefix):
            names = [f"sha256 {sha256}"] if sha256.startswith(prefix) else []
            found[" = ".join([*names, *([f"md5 {md5}"] if md5.startswith(prefix) else [])])] = (sha256, md5)
    return found


def _of_model(root: Path, runs: RecordedRuns, sha256: str, md5: str, run: RecordedRun | None) -> Lineage:
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
            f"no run and no commit knows this model (sha256 {sha256}, md5 {md5}): it was changed, or made elsewhere; "
            "`dvc status model` compares it with dvc.lock, `git fetch` and `dvc exp pull` bring what another clone has"
        )
    if run:
        runs.complete(run)
    lock = held[0].lock if held else DvcLock.of_workspace(root)
    if not md5 or lock.model_md5 != md5:
        lock = DvcLock()
    return Lineage(sha256, md5, run, [twin for twin in trained if twin is not run], held, lock)


def _listed(runs: list[RecordedRun]) -> str:
    return ", ".join(run.id or run.attempt for run in runs[:5]) + (" …" if len(runs) > 5 else "")


# --- the way back


def way_back(root: Path, lineage: Lineage) -> tuple[list[str], list[str]]:
    """The commands that make the model again in a new clone, none if there is no way; and what to know of them."""
    run = None if lineage.run is None or lineage.run.pulled else lineage.run
    holder = next(iter(lineage.held), None)
    notes: list[str] = []
    trained_at = run.tags.get("git.commit", "none") if run else "none"
    whole = holder is not None and not holder.differs
    if run and not whole and has_commit(root, trained_at):
        commit, patch = trained_at, _patch(root, run, notes)
        if patch is None:
            return [], notes
        if run.dirty:
            notes.append("files that git did not track then are kept nowhere: if the text was one, it is missing")
    elif holder:
        commit, patch = holder.commit, []
        if holder.differs:
            notes.append(f"the commit has other {', '.join(holder.differs)} than its dvc.lock: expect another model")
    else:
        why = f"the run's commit ({trained_at[:12]}) is not in this repository" if run else "no run of it is known"
        return [], [f"{UNKNOWN}: no dvc.lock in git's history holds the model, and {why}; `git fetch` may bring it"]
    source = _params(lineage).get("download.source", UNKNOWN)
    if source != "grammar" and not (whole and source.startswith("file:")):  # dvc.lock has the hash of inputs/texts/
        notes.append(f"download.source is {source}: the text must be there again (a network, or the file)")
    determinism = _params(lineage).get("numerics.determinism")
    if determinism in ("machine", "off"):
        promise = "no bits" if determinism == "off" else "the same bits only on the same kind of machine"
        notes.append(f"numerics.determinism is {determinism}, which promises {promise}")
    folder = f"../model-{(lineage.md5 or lineage.sha256 or trained_at)[:8]}"
    fetch = fetch_command(root, commit)
    commands = [f"git clone --quiet {shlex.quote(str(root))} {folder}", f"cd {folder}", *([fetch] if fetch else [])]
    commands += [f"git checkout --quiet {commit}", *patch, "make setup", "source .venv/bin/activate", "dvc repro train"]
    if lineage.md5:  # of train's out alone: evaluate's entry stays as it was
        commands.append(f"sed -n '/^  train:/,/^  [a-z]*:$/p' dvc.lock | grep {lineage.md5}")
    return commands, notes


def _patch(root: Path, run: RecordedRun, notes: list[str]) -> list[str] | None:
    """The commands that bring back a run's uncommitted changes; None, with a note, where these are not whole."""
    if not run.dirty:
        return []
    left_out = run.tags.get("git.left_out")
    if left_out:
        notes.append(f"not kept, since they are no part of the experiment: the changes of {left_out}")
    if run.diff is None and run.diff_in_mlflow:
        uri = redact(resolve_uri(root))
        if uri != resolve_uri(root):
            notes.append("the password of MLflow's server belongs in place of ***")
        download = f"mlflow artifacts download --run-id {run.id} --artifact-path uncommitted.diff --dst-path .."
        empty = "--allow-empty " if left_out else ""  # it may hold names alone
        download = f"MLFLOW_TRACKING_URI={shlex.quote(uri)} {download}"
        return ["make setup", "source .venv/bin/activate", download, f"git apply {empty}../uncommitted.diff"]
    text = run.diff.read_text(encoding="utf-8") if run.diff else ""
    if not text:
        notes.append(f"{UNKNOWN}: there were uncommitted changes, and their uncommitted.diff is nowhere")
    elif text.rstrip().endswith("characters in all]") and "\n[cut: " in text:
        notes.append(f"{UNKNOWN}: {run.diff} is only the beginning of the uncommitted changes, which were too many")
    elif re.search(r"^Binary files .* differ$", text, re.MULTILINE):
        notes.append(f"{UNKNOWN}: binary files had changed, which {run.diff} does not hold")
    else:
        return [f"git apply {shlex.quote(str(run.diff))}"] if "diff --git " in text else []
    return None


def shortcut(root: Path, lineage: Lineage) -> str | None:
    """The command that takes the model from DVC's cache here, without training; None if it is not there."""
    if not lineage.held or not cache_path(root, lineage.md5).exists():
        return None
    return f"dvc get . model --rev {lineage.held[0].commit} --out build/model-{lineage.md5[:8]}"


# --- what is printed


def _params(lineage: Lineage) -> dict[str, str]:
    """The run's; those of dvc.lock where no run is known."""
    if lineage.run and lineage.run.params:
        return lineage.run.params
    found: dict[str, str] = {}
    for stage in ("download", "tokenize", "train"):
        for values in lineage.lock.stages[stage].params.values() if stage in lineage.lock.stages else ():
            for section, content in values.items():
                items = content.items() if isinstance(content, dict) else [("", content)]
                found |= {f"{section}.{key}".rstrip("."): as_text(value) for key, value in items}
    return found


def no_model_because(run: RecordedRun | None) -> str:
    if run and "model.sha256" not in run.tags:
        return f"none: the run is {run.status}"
    return f"{UNKNOWN}: no run tells it"


def describe(root: Path, runs: RecordedRuns, lineage: Lineage) -> dict[str, Any]:
    """The whole chain: what `--json` prints, and what the lines for people are made of."""
    run, holder = lineage.run, next(iter(lineage.held), None)
    tags = run.tags if run else {}
    commands, notes = way_back(root, lineage)
    no_model = no_model_because(run)
    no_run, no_lock = f"{UNKNOWN}: no run tells it", f"{UNKNOWN}: no dvc.lock with this model tells it"
    found: dict[str, Any] = {
        "model": {"sha256": lineage.sha256 or no_model, "md5": lineage.md5 or no_model},
        "run": None,
        "commit": None,
        "also": [other.name for other in lineage.held[1:]],
        "twins": [twin.id or twin.attempt for twin in lineage.twins],
        "params": _params(lineage),
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
        names = ("git.commit", "git.dirty", "dvc.experiment", "dvc.baseline", "fingerprint", "attempt")
        where = [f"MLflow at {redact(runs.uri)}"] if run.in_mlflow else []
        where += [f"journal {run.attempt}"] if run.attempt else []
        told = {"id": run.id, "name": run.name, "status": run.status, "started": run.started, "source": where}
        told["pulled"] = run.pulled
        found["run"] = told | {name: tags.get(name, UNKNOWN) for name in names}
    if holder:
        found["commit"] = {"id": holder.commit, "kind": holder.kind, "name": holder.name}
    if run and run.environment:
        here = environment()
        found["differs_here"] = {
            name: [value, here.get(name, UNKNOWN)]
            for name, value in run.environment.items()
            if here.get(name, UNKNOWN) != value
        }
    return found


def lines(root: Path, found: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """A label and what stands beside it."""
    run, commit = found["run"], found["commit"]
    no_run = f"{UNKNOWN}: neither MLflow nor .runs has a run of this model"
    text: list[tuple[str, list[str]]] = [("model", [f"{name:6} {value}" for name, value in found["model"].items()])]
    if run:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run["started"] / 1000))
        dirty = {"true": "with uncommitted changes", "false": "clean"}.get(run["git.dirty"], f"changes {UNKNOWN}")
        head = "its baseline" if run["dvc.experiment"] not in ("none", UNKNOWN) else "HEAD"
        text.append(("run", [f"{run['id'] or 'not in MLflow'} '{run['name']}', {run['status']}, began {began}"]))
        text[-1][1].append(f"told by {' and '.join(run['source'])}")
        if found["twins"]:
            ids = ", ".join(found["twins"][:3]) + (" …" if len(found["twins"]) > 3 else "")
            text[-1][1].append(f"{len(found['twins'])} more made the same model: {ids}")
        trained_at = [f"{run['git.commit']} ({head}), {dirty}"]
        if run["pulled"]:
            trained_at = [
                f"{UNKNOWN}: the model was pulled, and this run only scored it; its training is recorded elsewhere"
            ]
        text.append(("trained at", trained_at))
        if head == "its baseline":
            text[-1][1].append(f"experiment {run['dvc.experiment']}")
    else:
        text.append(("run", [no_run]))
    if commit:
        subject = git(root, "show", "--no-patch", "--no-show-signature", "--format=%cs %s", commit["id"])
        text.append(("kept by", [f"{commit['id']} ({commit['name'].partition(' ')[2]})", subject]))
        if found["also"]:
            names = ", ".join(found["also"][:5]) + (" …" if len(found["also"]) > 5 else "")
            text[-1][1].append(f"{len(found['also'])} more: {names}")
    else:
        text.append(("kept by", ["no commit and no experiment: no dvc.lock in git's history holds the model"]))
    sections: dict[str, list[str]] = {}
    for name, value in found["params"].items():
        sections.setdefault(name.partition(".")[0], []).append(f"{name.partition('.')[2]}={value}")
    text.append(("params", [f"{name}: {' '.join(values)}" for name, values in sections.items()] or [UNKNOWN]))
    source = found["params"].get("download.source", UNKNOWN)
    text.append(("data", [f"md5 {found['data']['md5']}, source {source}"]))
    text.append(("tokens", [f"sha256 {found['tokens']['sha256']}", f"md5    {found['tokens']['md5']}"]))
    text.append(("code", [f"sha256 {found['code']['sha256']}"]))
    known = ", ".join(f"{name} {value}" for name, value in (found["environment"] or {}).items())
    text.append(("environment", [known or f"{UNKNOWN}: no run's record of it"]))
    text[-1][1].extend(f"{name} {old} -> {new} here" for name, (old, new) in found["differs_here"].items())
    if found["differs_here"]:
        text[-1][1].append("the same bits are promised in the environment of constraints.txt only")
    return text


def show(root: Path, found: dict[str, Any]) -> None:
    for label, paragraphs in lines(root, found):
        for paragraph in paragraphs:
            for line in textwrap.wrap(paragraph, 110, break_long_words=False, break_on_hyphens=False):
                click.echo(f"{label:15}{line}")
                label = ""
    click.echo("\nthe commands that bring it back:" if found["commands"] else "\nno way back is known")
    for line in found["commands"]:
        click.echo(f"    {line}")
    for note in found["notes"]:
        click.echo(f"note: {note}")
    if found["from_cache"]:
        click.echo(f"or, as DVC's cache here has it:\n    {found['from_cache']}")


@command()
@click.argument("subject", metavar="RUN|DIRECTORY|HASH")
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON.")
def main(subject: str, as_json: bool) -> None:
    """Shows where a model comes from and how to make it again.

    Prints its run, commit, params, data, code and environment, and the commands that make it again.
    RUN is an MLflow run's id or name, DIRECTORY holds a model, HASH is the beginning of a model's sha256 or md5.
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
        click.secho(f"warning: {warning}", fg="yellow", err=True)
    show(root, found)
