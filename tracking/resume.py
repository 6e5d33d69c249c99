"""Whether a training is new, interrupted or finished; and the description that a new one gets."""

import os
import time
import uuid
from pathlib import Path
from typing import Any

from nanogpt.checkpoint import Checkpoints, restore_on_all_ranks
from nanogpt.files import write_text
from nanogpt.params import Params, flatten
from nanogpt.train_state import TrainState
from tracking.console import Console, repository
from tracking.dvc_files import DvcLock, cache_path, path_md5
from tracking.git import git_or_none
from tracking.journal import START, Journal, JournalDamaged
from tracking.run import Run, attempts_of
from tracking.run_name import committed_params, run_name, setting

DIFF_LIMIT = 1_000_000  # characters of uncommitted changes that are kept with a run
# What an experiment consists of, which should contain no password; hidden files in it (.env) are not kept.
EXPERIMENT = ("params.yaml", "dvc.yaml", "presets", "inputs", "nanogpt", "stages", "tracking", "tools")
LEFT_OUT = "# not kept, because it is not part of the experiment: "  # `git apply` ignores what precedes a diff


def choose(console: Console, directory: Path, fingerprint: str) -> Run:
    """The run to continue in a run directory whose lock is held: a new one, an unfinished one or a finished one.

    A finished one is returned, to be published again, when DVC lost its model, or when DVC runs the stage only because
    the bytes of a dep changed in a way that cannot change the result. Otherwise the user wants to see it reproduced, so
    a new one is returned. Raises JournalDamaged, and ValueError for a training that diverged, as it would again.
    """
    attempts = attempts_of(directory)
    if not attempts:
        return Run(directory / "attempt-1")
    newest = attempts[-1]
    with Journal(newest.journal) as journal:
        check_journal(newest, journal, fingerprint)
    if "diverged" in newest.result:
        raise ValueError(
            f"this training has diverged before, at step {newest.result['diverged']} ({newest.directory}); change "
            "train.learning_rate, train.warmup_iters or train.grad_clip, "
            f"or remove {directory} to repeat it"
        )
    if newest.status != "finished" or not is_in_dvc(newest.result):
        return newest
    if changed := changed_deps("train"):
        console.say(f"changed without effect on the result: {', '.join(changed)}")
        return newest
    console.say("dvc.lock has this model already: training it afresh")
    return Run(directory / f"attempt-{newest.number + 1}")


def is_in_dvc(result: dict[str, Any]) -> bool:
    """Whether DVC has stored a finished training's model: dvc.lock names it, and not only because a commit's does.

    DVC puts a model into its cache before it writes dvc.lock; evaluate and sample, which leave reports, run after that.
    """
    if DvcLock.of_workspace(Path()).model_md5 != result["model_md5"]:
        return False
    # Searches for the model's hash in the text, because `tools sync` reports damaged reports.
    reports = (path.read_bytes() for path in (repository() / ".runs" / "reports").glob("*.json"))
    cached = cache_path(repository(), result["model_md5"]).exists()
    return cached or any(result["model_sha256"].encode() in report for report in reports)


def changed_deps(stage: str) -> list[str]:
    """The deps of a stage that differ from dvc.lock, and so are why DVC runs it; none if the user forced it to.

    Only files and the folder of initial models: data is part of the fingerprint, and may be large.
    """
    stages = DvcLock.of_workspace(Path()).stages
    outs = [path for other in stages.values() for path in other.outs]
    return [path for path, md5 in stages[stage].deps.items() if path not in outs and path_md5(Path(path)) != md5]


def check_journal(run: Run, journal: Journal, fingerprint: str) -> None:
    """Raises JournalDamaged if the journal is another run's, or lacks records that were there."""
    first = next(journal.records(), None)
    if first is not None and first.get("fingerprint") != fingerprint:
        raise JournalDamaged(journal.path, "it is another run's")
    # If mlflow.json is lost, everything is sent again.
    sent = run.mlflow.get("journal", START)
    if (first is None and run.is_described) or not journal.has_position(sent):
        raise JournalDamaged(journal.path, "it lacks records that were there")


def restore_newest(
    console: Console, state: TrainState, checkpoints: Checkpoints, journal: Journal, last_step: int
) -> None:
    """Restores the newest undamaged checkpoint, if there is one, on all ranks."""
    checkpoint = checkpoints.newest(on_damage=console.warn)
    if checkpoint is not None and not journal.has_position(checkpoint.extra["journal"]):
        raise ValueError(
            f"{journal.path} lacks records that checkpoint {checkpoint.directory.name} relies on; "
            f"remove {journal.path.parent} to train afresh"
        )
    restore_on_all_ranks(state, checkpoint)
    if checkpoint is not None:
        console.say(f"resuming at step {state.progress.step:,} of {last_step:,}")


def describe(run: Run, params: Params, hashes: dict[str, str], dataset: dict[str, Any]) -> None:
    """Writes run.json and artifacts/, from which MLflow's run is created, unless they are there already."""
    if run.is_described:
        return
    commit = git_or_none(Path.cwd(), "rev-parse", "HEAD") or ""
    diff, left_out = uncommitted(Path.cwd())
    write_text(run.artifacts / "params.yaml", Path("params.yaml").read_text(encoding="utf-8"))
    if diff:
        cut = "" if len(diff) <= DIFF_LIMIT else f"\n[cut: {len(diff):,} characters in all]"
        write_text(run.diff, diff[:DIFF_LIMIT] + cut + "\n")
    sections = ("download", "tokenize", "model", "train", "numerics")
    values = {k: v for name in sections for k, v in flatten(getattr(params, name), f"{name}.").items()}
    # The newest commit that changed more than dvc.lock.
    base = git_or_none(Path.cwd(), "log", "-1", "--format=%H", "--", *EXPERIMENT) or commit
    differs = setting(values, committed_params(Path.cwd()), diff, base)
    experiment = os.environ.get("DVC_EXP_NAME")
    tags = {
        "setting": differs,
        "git.commit": commit or "none",
        "git.dirty": str(bool(diff)).lower(),
        "dvc.experiment": experiment or "none",
        "dvc.baseline": os.environ.get("DVC_EXP_BASELINE_REV", "none"),
        "attempt": str(run.directory.relative_to(repository())),
        **({"git.left_out": left_out} if left_out else {}),
        **hashes,
    }
    info = {
        "run_key": uuid.uuid4().hex,
        "name": run_name(experiment, differs, params.train.seed, run.number),
        "experiment": params.tracking.experiment,
        "params": values,
        "tags": tags,
        "dataset": dataset,
        "started": time.time_ns() // 1_000_000,
        "max_iters": params.train.last_step,
    }
    run.write_info(info)


def uncommitted(root: Path) -> tuple[str, str]:
    """The uncommitted changes of the experiment, as a diff for `git apply`, and the other files that have changed.

    The diff begins with the names of the others, and leaves out their content: they may contain passwords.
    """
    # dvc.lock was just written by the stages before this one, and not by the user.
    everything = "HEAD", "--", ".", ":(exclude)dvc.lock"
    experiment = "HEAD", "--", *EXPERIMENT, ":(exclude,glob)**/.*", ":(exclude,glob)**/.*/**"
    # A diff for `git apply`, whatever the user's settings are.
    plain = ("-c", "diff.noprefix=false", "diff", "--no-ext-diff", "--no-color", "--binary")
    diff = git_or_none(root, *plain, *experiment) or ""
    names = ("diff", "--no-ext-diff", "--no-renames", "--name-only")
    changed, recorded = ((git_or_none(root, *names, *paths) or "").splitlines() for paths in (everything, experiment))
    left_out = ", ".join(sorted({*changed} - {*recorded}))
    return (f"{LEFT_OUT}{left_out}\n{diff}" if left_out else diff), left_out
