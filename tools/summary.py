"""The end of `make repro`: shows the result, where to look, and whether dvc.lock is the committed one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from tools.command import command
from tracking.dvc_files import DvcLock, path_md5, read_yaml
from tracking.errors import check_made
from tracking.git import git, git_or_none
from tracking.history import unequal
from tracking.run import runs_in

TRAIN, EVALUATE, LOCK = Path("metrics/train.json"), Path("metrics/evaluate.json"), Path("dvc.lock")


@command()
def main() -> None:
    """Summarises the newest result and compares dvc.lock with HEAD's."""
    check_made(TRAIN, EVALUATE, LOCK)
    click.echo("\n".join([*result(), *places(), lock_state()]))


def result() -> list[str]:
    train = json.loads(TRAIN.read_text())
    scores = json.loads(EVALUATE.read_text())
    lines = [
        "",
        f"val loss       {scores['val_loss']:.4f} nats per token, perplexity {scores['perplexity']:.3f}, "
        f"{scores['bits_per_byte']:.4f} bits per byte",
        f"train loss     {scores['train_loss']:.4f}",
    ]
    if "floor" in scores:
        lines.append(f"best possible  {scores['floor']:.4f}, so the excess is {scores['excess']:.4f}")
    lines.append(
        f"model          {train['parameters']:,} parameters, {train['tokens']:,} tokens in {train['steps']:,} steps"
    )
    return lines


def places() -> list[str]:
    return [
        "",
        "samples        samples/samples.md",
        "loss curve     plots/loss.csv (`dvc plots show`), all scores: metrics/evaluate.json",
        *(["MLflow         `make ui`"] if runs_in(Path()) else []),
        "",
    ]


def lock_state() -> str:
    """Compares dvc.lock with git, since DVC silently rewrites it when an artifact has other bits."""
    committed = git_or_none(Path.cwd(), "show", "HEAD:./dvc.lock")
    if committed is None or not git(Path.cwd(), "ls-files", str(LOCK)):
        return "dvc.lock is not committed yet: `git add dvc.lock params.yaml && git commit` keeps this result"
    lock = DvcLock.of_workspace(Path())
    if other := other_out(lock):
        return (
            "the result here is NOT that of dvc.lock: `dvc checkout` brings that one, or `dvc pull` if DVC's cache "
            f"lacks it ({other} differs)"
        )
    if later := changed_since(lock):
        return f"dvc.lock was made before {', '.join(later[:3])} changed: `dvc repro` makes it true again"
    changed = git(Path.cwd(), "diff", "HEAD", "--name-only", "--", "dvc.lock", "params.yaml", "nanogpt", "stages")
    if "dvc.lock" not in changed.splitlines():
        return "dvc.lock is the committed one: this result is bit for bit what the commit says"
    if untracked := untracked_deps():
        names = ", ".join(untracked[:3]) + ("" if len(untracked) <= 3 else f" and {len(untracked) - 3} more")
        return (
            f"dvc.lock depends on {names}, which git does not track, so a clone lacks it: commit it too, or move it "
            "away and run `dvc repro`"
        )
    if DvcLock.parse(committed).outs() == lock.outs():
        return (
            "dvc.lock has new hashes of code, parameters or inputs, but this result is bit for bit the committed one: "
            "commit dvc.lock"
        )
    if changed.splitlines() == ["dvc.lock"]:
        if others := other_inputs(DvcLock.parse(committed), lock):
            return (
                f"dvc.lock is new: the committed one was made before {', '.join(others[:3])} changed; "
                "`make golden` and commit both to keep this result"
            )
        return (
            "dvc.lock DIFFERS from the committed one though code and params are the same: this result has other bits "
            "(not the environment of constraints.txt?); see `git diff dvc.lock`"
        )
    return "dvc.lock is new, as code or params differ from the commit: `make golden` and commit all to keep this result"


def other_out(lock: DvcLock) -> str | None:
    """A part of the result that is not what the lock names; the data, which may be large, is not read."""
    outs = lock.outs()
    parts = {path: md5 for stage in ("train", "evaluate", "sample") for path, md5 in outs.get(stage, {}).items()}
    return next((path for path, md5 in parts.items() if path_md5(Path(path)) not in {md5, None}), None)


def changed_since(lock: DvcLock) -> list[str]:
    """The files, folders and parameters that are not what a lock was made with, without what the stages make."""
    deps = {path: md5 for stage in lock.stages.values() for path, md5 in stage.deps.items()}
    inputs = deps.keys() - {path for outs in lock.outs().values() for path in outs}
    found = {path for path in inputs if path_md5(Path(path)) not in {deps[path], None}}
    for stage in lock.stages.values():
        for file, sections in stage.params.items():
            known = read_yaml(Path(file).read_text(encoding="utf-8"), file)
            found |= changed_keys(sections, known)
    return sorted(found)


def other_inputs(old: DvcLock, new: DvcLock) -> list[str]:
    """The files and parameters that two locks record with other content, without what the stages make."""
    made = {path for outs in new.outs().values() for path in outs}
    found = set[str]()
    for name in old.stages.keys() & new.stages.keys():
        before, after = old.stages[name], new.stages[name]
        found |= {path for path in before.deps | after.deps if before.deps.get(path) != after.deps.get(path)}
        for file, sections in after.params.items():
            found |= changed_keys(sections, before.params.get(file, {}))
    return sorted(found - made)


def changed_keys(sections: Mapping[str, Any], others: Mapping[str, Any]) -> set[str]:
    return {key for name, values in sections.items() for key, _, _ in unequal(name, values, others.get(name))}


def untracked_deps() -> list[str]:
    """Files among the deps of the stages, without their outs, that git neither tracks nor ignores."""
    stages = DvcLock.of_workspace(Path()).stages.values()
    deps = {dep for stage in stages for dep in stage.deps} - {out for stage in stages for out in stage.outs}
    inside = sorted(dep for dep in deps if not Path(dep).is_absolute())  # other files are not in the repository
    found = git(Path.cwd(), "ls-files", "-z", "--others", "--exclude-standard", "--", *inside) if inside else ""
    return [name for name in found.split("\0") if name]
