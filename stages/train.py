"""Trains a GPT on data/tokens: model/, metrics/train.json, plots/loss.csv. Continues what was interrupted."""

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracking.console import Console, command, repository
from tracking.launch import check_started, launch, run_to_exit, started
from tracking.stop import StopRequest

if TYPE_CHECKING:
    from nanogpt.corpus.token_files import Split, SplitName
    from nanogpt.determinism import Numerics
    from nanogpt.distributed import Ranks
    from nanogpt.params import Params
    from nanogpt.pretrained import Initial

TOKENS, MODEL, METRICS, CURVE = Path("data/tokens"), Path("model"), Path("metrics/train.json"), Path("plots/loss.csv")


@command("train")
def main(console: Console) -> None:
    """Trains a GPT on data/tokens: model/, metrics/train.json, plots/loss.csv. Continues what was interrupted."""
    from nanogpt import determinism
    from nanogpt.params import load_params

    params = load_params()
    resolved = determinism.pin(params.numerics, params.runtime.device)
    if params.train.processes > 1 and started() is None:
        sys.exit(launch(params.train.processes, params.tracking.wait_seconds, "-m", "stages.train"))
    check_started(params.train.processes)
    from nanogpt.distributed import PeerFailed, join

    try:
        with join(resolved.device) as ranks:
            train(console, params, resolved, ranks)
    except PeerFailed as error:  # which tells the user
        console.record(str(error))
        sys.exit(1)


def train(console: Console, params: "Params", resolved: "Numerics", ranks: "Ranks") -> None:
    """Goes on with the training that params and data stand for, or publishes it if it is done."""
    from nanogpt import determinism
    from nanogpt.batches import check_block_size
    from nanogpt.corpus.token_files import SplitName, load_meta, load_split
    from nanogpt.corpus.tokenizer import load_tokenizer
    from nanogpt.files import sha256_tree
    from nanogpt.params import flatten
    from nanogpt.pretrained import load_initial
    from tracking.fingerprint import code_hash, fingerprint
    from tracking.journal import RunLock, state
    from tracking.resume import choose

    names: tuple[SplitName, ...] = ("train", "val")
    splits = {name: load_split(TOKENS, name) for name in names}
    tokenizer = load_tokenizer(TOKENS / "tokenizer.json", load_meta(TOKENS).tokenizer_sha256)
    initial = load_initial(params.train.init_from, params.model, tokenizer)
    for split in splits.values():
        check_block_size(split, initial.config.block_size)
    inputs = {"tokens": sha256_tree(TOKENS), "initial": initial.sha256}
    code = code_hash(Path.cwd(), "stages.train")
    read = flatten(params.model, "model.") | flatten(params.train, "train.")
    if params.numerics.determinism == "off":
        del read["train.processes"]  # it changes the last bits alone, so more or fewer of them may go on with a run
    # All processes must come to the same decisions, so also those that change no result.
    intervals = (params.runtime.log_interval, params.runtime.checkpoint_interval)
    same = fingerprint(read | {"intervals": intervals}, inputs, code, params.numerics.model_dump())
    if ranks.tell(same) != same:
        raise ValueError(
            "not all processes of this training have the same code, parameters and data; on each machine check out the "
            "same commit and `dvc pull`"
        )
    key = fingerprint(read, inputs, code, resolved.as_dict())
    directory = repository() / ".runs" / key[:16]

    def tell_wait(pid: int) -> None:
        console.say(f"process {pid} is training exactly this; waiting for its result")

    if not ranks.first:
        if ranks.tell(None) != "finished":
            accompany(console, directory, key, params, resolved, splits, initial, ranks)
        return
    directory.mkdir(parents=True, exist_ok=True)
    with RunLock(directory, tell_wait):
        attempt = choose(console, directory, key)
        console.record(f"run directory: {attempt}")
        if ranks.tell(state(attempt / "journal.jsonl")) == "finished":
            console.say(f"this training is done already ({attempt.relative_to(repository())}): publishing its model")
            publish(console, attempt)
        else:
            hashes = {"fingerprint": key, "tokens.sha256": inputs["tokens"], "code.sha256": code}
            if initial.weights is not None:
                hashes["initial.sha256"] = initial.sha256
            if resolved.device == "cpu" and determinism.is_emulated(resolved.dtype):
                console.warn(
                    f"this CPU has no instructions for numerics.dtype = {resolved.dtype}, and may take ten times as "
                    "long; set it to float32, or let `python -m tools fastest --write` measure what is fastest"
                )
            run(console, attempt, params, resolved, splits, initial, hashes, ranks)


def accompany(
    console: Console,
    directory: Path,
    fingerprint: str,
    params: "Params",
    resolved: "Numerics",
    splits: "dict[SplitName, Split]",
    initial: "Initial",
    ranks: "Ranks",
) -> None:
    """Trains along with the first process, which does all reading and writing."""
    from nanogpt.train import Stopped
    from tracking.journal import NoJournal
    from tracking.training import Training

    stop = StopRequest(ranks.highest)
    training = Training(
        console, directory, fingerprint, params, resolved, TOKENS, splits, initial, NoJournal(), CURVE, ranks
    )
    training.resume()
    try:
        training.run(stop.reason)
    except Stopped:
        sys.exit(stop.exit_code)


def run(
    console: Console,
    attempt: Path,
    params: "Params",
    resolved: "Numerics",
    splits: "dict[SplitName, Split]",
    initial: "Initial",
    hashes: dict[str, str],
    ranks: "Ranks",
) -> None:
    """Trains, with MLflow's replica filled by a process beside, and publishes."""
    from nanogpt.train import Diverged, Stopped
    from tracking import mlflow_process
    from tracking.fingerprint import environment
    from tracking.journal import Journal
    from tracking.resume import describe
    from tracking.training import Training

    stop = StopRequest(ranks.highest)
    with Journal(attempt / "journal.jsonl") as journal:
        fingerprint = hashes["fingerprint"]
        training = Training(
            console, attempt, fingerprint, params, resolved, TOKENS, splits, initial, journal, CURVE, ranks
        )
        training.resume()
        journal.append(
            "start",
            step=training.progress.step,
            resumed=training.progress.step > 0,
            fingerprint=fingerprint,
            environment=environment(),
            numerics=resolved.as_dict(),
            processes=ranks.size,
        )
        journal.sync()  # what run.json describes has a journal
        describe(attempt, params, hashes, dataset(hashes["tokens.sha256"]))
        console.say(mlflow_process.describe_system_metrics())
        follower = mlflow_process.start(attempt, repository(), params.tracking.wait_seconds)
        try:
            training.run(stop.reason)
            result = training.finish(hashes["tokens.sha256"])
            journal.append("end", status="FINISHED", message="", step=training.progress.step, result=result)
        except Stopped as reason:
            journal.append("end", status="KILLED", message=str(reason), step=training.progress.step, result={})
            mlflow_process.wait(follower, params.tracking.wait_seconds)
            console.say(
                f"stopped at step {training.progress.step} ({reason}), all is saved; `dvc repro` goes on from there"
            )
            sys.exit(stop.exit_code)
        except BaseException as error:
            cause = ranks.cause(error)
            result = {"diverged": cause.step} if isinstance(cause, Diverged) else {}
            message = " ".join(f"{type(cause).__name__}: {cause}".split())
            journal.append("end", status="FAILED", message=message, step=training.progress.step, result=result)
            mlflow_process.wait(follower, params.tracking.wait_seconds)
            raise
    publish(console, attempt)
    console.say(mlflow_process.wait(follower, params.tracking.wait_seconds))


def dataset(sha256: str) -> dict[str, Any]:
    """The tokens, as MLflow shows them."""
    from nanogpt.corpus.token_files import load_meta

    meta = load_meta(TOKENS)
    return {"name": meta.corpus.source, "source": str(TOKENS), "sha256": sha256, "profile": meta.model_dump()}


def publish(console: Console, attempt: Path) -> None:
    """Copies the attempt's result to where DVC expects it. The same bytes each time."""
    from nanogpt.files import replacing, sha256_tree, write_text
    from tracking.journal import Journal, end_of
    from tracking.training import loss_curve

    with Journal(attempt / "journal.jsonl") as journal:
        end = end_of(journal.records())
        assert end is not None, f"{attempt} is not finished"
        write_text(CURVE, loss_curve(journal))
    result = end["result"]
    source = attempt / "models" / result["published"]
    if sha256_tree(source) != result["model_sha256"]:
        raise ValueError(f"{source} is damaged: it is not what was trained; remove {attempt} to train afresh")
    with replacing(MODEL) as temporary:
        shutil.copytree(source, temporary)
    metrics = {name: value for name, value in result.items() if name not in {"published", "model_sha256", "model_md5"}}
    write_text(METRICS, json.dumps(metrics, sort_keys=True, indent=1) + "\n")
    console.say(
        f"{result['parameters']:,} parameters, {result['steps']:,} steps, {result['tokens']:,} tokens; "
        f"{result['published']} at step {result['step']:,}: val loss {result['val_loss']:.4f} -> {MODEL}"
    )


if __name__ == "__main__":
    run_to_exit(main)
