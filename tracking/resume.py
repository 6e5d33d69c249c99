"""Which training a `train` stage stands for: a new one, one that was interrupted, or one that is done."""

import os
import time
import uuid
from pathlib import Path
from typing import Any

from nanogpt.checkpoint import Checkpoints
from nanogpt.files import write_text
from nanogpt.params import Params, flatten
from nanogpt.train_state import TrainState
from tracking.console import Console, repository
from tracking.dvc_files import DvcLock, experiment_name, is_cached, path_md5
from tracking.git import git_or_none
from tracking.journal import START, Journal, damaged
from tracking.run import Run, attempts_of
from tracking.run_name import committed_params, run_name, setting

DIFF_LIMIT = 1_000_000  # bytes of uncommitted changes that are kept with a run
# What an experiment consists of, in which no password belongs; of these, hidden files (.env) are not kept either.
EXPERIMENT = ("params.yaml", "dvc.yaml", "presets", "inputs", "nanogpt", "stages", "tracking", "tools")
LEFT_OUT = "# not kept, since it is no part of the experiment: "  # `git apply` passes over what precedes a diff


def choose(console: Console, directory: Path, fingerprint: str) -> Run:
    """The run to go on with, in a run directory whose lock is held. It may be new, unfinished or finished.

    A finished one is returned, to be published again, when DVC lost it, or when DVC runs the stage only because bytes
    of a dep changed that cannot change the result. Else the user wants to see it reproduced. Raises ValueError for a
    training that diverged: the same would happen again, and JournalDamaged.
    """
    attempts = attempts_of(directory)
    if not attempts:
        return Run(directory / "attempt-1")
    newest, following = attempts[-1], Run(directory / f"attempt-{attempts[-1].number + 1}")
    with Journal(newest.journal) as journal:
        check_journal(newest, journal, fingerprint)
    if "diverged" in newest.result:
        raise ValueError(
            f"this very training diverged at step {newest.result['diverged']} before ({newest.directory}); change "
            "train.learning_rate, train.warmup_iters or train.grad_clip, "
            f"or remove {directory} to see it again"
        )
    if newest.status == "finished" and has_been_taken(newest.result):
        if changed := changed_deps("train"):
            console.say(f"changed, but not in what they compute: {', '.join(changed)}")
            return newest
        console.say("dvc.lock holds this model already: training it afresh")
        return following
    return newest


def has_been_taken(result: dict[str, Any]) -> bool:
    """Whether DVC has taken a finished training's model: dvc.lock names it, and not only because a commit's did.

    DVC puts a model into its cache before it writes dvc.lock; evaluate and sample, which leave reports, run after that.
    """
    if DvcLock.of_workspace(Path()).out_md5("train", "model") != result["model_md5"]:
        return False
    # The model's hash is looked for in the text: a damaged report is `tools sync`'s business.
    reports = (path.read_bytes() for path in (repository() / ".runs" / "reports").glob("*.json"))
    sha256 = result["model_sha256"].encode()
    return is_cached(repository(), result["model_md5"]) or any(sha256 in report for report in reports)


def changed_deps(stage: str) -> list[str]:
    """Deps of a stage that are not what dvc.lock says, and so are why DVC runs it; none if the user forced it to.

    Only files and the folder of initial models: data is part of the fingerprint, and may be large.
    """
    locked = DvcLock.of_workspace(Path()).stages[stage]
    made = [path for other in DvcLock.of_workspace(Path()).stages.values() for path in other.outs]
    return [path for path, md5 in locked.deps.items() if path not in made and path_md5(Path(path)) != md5]


def check_journal(run: Run, journal: Journal, fingerprint: str) -> None:
    """Raises JournalDamaged if the journal is another run's, or lacks records that it had."""
    first = next(journal.records(), None)
    if first is not None and first.get("fingerprint") != fingerprint:
        raise damaged(journal.path, "it is another run's")
    # Where MLflow has nothing of it, what it has is sent again.
    sent = run.mlflow.get("journal", START)
    if (first is None and run.is_described) or not journal.has_position(sent):
        raise damaged(journal.path, "it lacks records that it had")


def restore_newest(
    console: Console, state: TrainState, checkpoints: Checkpoints, journal: Journal, last_step: int
) -> None:
    """Brings all ranks into the state of the newest checkpoint that is whole, if there is one."""
    checkpoint = checkpoints.newest(on_damage=console.warn)
    if checkpoint is not None:
        if not journal.has_position(checkpoint.extra["journal"]):
            raise ValueError(
                f"{journal.path} lacks records that checkpoint {checkpoint.directory.name} counts on; "
                f"remove {journal.path.parent} to train afresh"
            )
        checkpoint.restore(state)
    state.share()
    if checkpoint is not None:
        console.say(f"resuming at step {state.progress.step:,} of {last_step:,}")


def describe(run: Run, params: Params, hashes: dict[str, str], dataset: dict[str, Any]) -> None:
    """Writes run.json and artifacts/, from which MLflow's run is made, unless an interrupted attempt has them."""
    if run.is_described:
        return
    commit = git_or_none(Path.cwd(), "rev-parse", "HEAD") or ""
    diff, left_out = uncommitted(Path.cwd())
    write_text(run.artifacts / "params.yaml", Path("params.yaml").read_text(encoding="utf-8"))
    if diff:
        cut = "" if len(diff) <= DIFF_LIMIT else f"\n[cut: {len(diff):,} characters in all]"
        write_text(run.artifacts / "uncommitted.diff", diff[:DIFF_LIMIT] + cut + "\n")
    sections = ("download", "tokenize", "model", "train", "numerics")
    values = {k: v for name in sections for k, v in flatten(getattr(params, name), f"{name}.").items()}
    base = git_or_none(Path.cwd(), "log", "-1", "--format=%H", "--", *EXPERIMENT) or commit  # not one of dvc.lock alone
    differs = setting(values, committed_params(Path.cwd()), diff, base)
    tags = {
        "setting": differs,
        "git.commit": commit or "none",
        "git.dirty": str(bool(diff)).lower(),
        "dvc.experiment": experiment_name() or "none",
        "dvc.baseline": os.environ.get("DVC_EXP_BASELINE_REV", "none"),
        "attempt": str(run.directory.relative_to(repository())),
        **({"git.left_out": left_out} if left_out else {}),
        **hashes,
    }
    info = {
        "run_key": uuid.uuid4().hex,
        "name": run_name(experiment_name(), differs, params.train.seed, run.number),
        "experiment": params.tracking.experiment,
        "params": values,
        "tags": tags,
        "dataset": dataset,
        "started": time.time_ns() // 1_000_000,
        "max_iters": params.train.last_step,
    }
    run.write_info(info)


def uncommitted(root: Path) -> tuple[str, str]:
    """How what the experiment consists of differs from HEAD, as `git apply` takes it, and the other files that differ.

    These are named at the head of the difference and not shown in it: they may hold passwords.
    """
    # The stages before this one have just written dvc.lock: that is no change of the user's.
    everything = "HEAD", "--", ".", ":(exclude)dvc.lock"
    experiment = "HEAD", "--", *EXPERIMENT, ":(exclude,glob)**/.*", ":(exclude,glob)**/.*/**"
    # As `git apply` takes it, whatever the user's settings are.
    plain = ("-c", "diff.noprefix=false", "diff", "--no-ext-diff", "--no-color", "--binary")
    diff = git_or_none(root, *plain, *experiment) or ""
    names = ("diff", "--no-ext-diff", "--no-renames", "--name-only")
    changed, recorded = ((git_or_none(root, *names, *paths) or "").splitlines() for paths in (everything, experiment))
    left_out = ", ".join(sorted({*changed} - {*recorded}))
    return (f"{LEFT_OUT}{left_out}\n{diff}" if left_out else diff), left_out
