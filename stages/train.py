"""The third stage: trains a GPT on data/tokens/."""

if __name__ == "__main__" and not __package__:
    raise SystemExit("Error: start this stage with `python -m stages.train`, in the root of the repository")

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt.files import replacing, sha256_tree, write_json, write_text
from tracking.console import Console, command, repository
from tracking.dvc_files import directory_md5
from tracking.journal import Journal
from tracking.launch import check_world_size, launch, run_to_exit, world_size
from tracking.lock import RunLock
from tracking.mlflow_server import check_variables
from tracking.run import Run

if TYPE_CHECKING:
    from nanogpt.checkpoint import Checkpoints
    from nanogpt.determinism import Numerics
    from nanogpt.distributed import Ranks
    from nanogpt.params import Params
    from nanogpt.recipe import Recipe
    from nanogpt.train_state import TrainState

TOKENS, MODEL, METRICS, CURVE = Path("data/tokens"), Path("model"), Path("metrics/train.json"), Path("plots/loss.csv")
NOT_METRICS = {"published", "model_sha256", "model_md5"}  # of a result


@command("train")
def main(console: Console) -> None:
    """Trains a GPT on data/tokens: model/, metrics/train.json, plots/loss.csv. Continues an interrupted training."""
    from nanogpt import determinism
    from nanogpt.params import load_params

    params = load_params()
    check_variables(params.tracking.experiment)
    numerics = determinism.pin(params.numerics, params.runtime.device)
    if params.train.processes > 1 and world_size() is None:
        sys.exit(launch(params.train.processes, params.tracking.wait_seconds, "-m", "stages.train"))
    check_world_size(params.train.processes)
    from nanogpt.distributed import PeerFailed, join

    try:
        with join(numerics.device) as ranks:
            run(console, params, numerics, ranks)
    except PeerFailed as error:  # the process that failed reports its error
        console.record(str(error))
        sys.exit(1)


def run(console: Console, params: "Params", numerics: "Numerics", ranks: "Ranks") -> None:
    """Trains, or publishes a finished training. Only rank 0 reads and writes the run directory."""
    from nanogpt.recipe import load_recipe
    from tracking.fingerprint import check_agreement, identify
    from tracking.resume import choose

    recipe = load_recipe(params, numerics, TOKENS)
    hashes = identify(recipe)
    check_agreement(recipe, hashes, ranks)
    if not ranks.first:
        if ranks.broadcast(None) != "finished":
            follow(recipe, ranks)
        return

    def on_wait(pid: int) -> None:
        console.say(f"process {pid} runs the same training; waiting for its result")

    directory = repository() / ".runs" / hashes["fingerprint"][:16]
    with RunLock(directory, on_wait):
        chosen = choose(console, directory, hashes["fingerprint"])
        console.record(f"run directory: {chosen.directory}")
        if ranks.broadcast(chosen.status) == "finished":
            place = chosen.directory.relative_to(repository())
            console.say(f"this training is finished already ({place}): publishing its model")
            publish(console, chosen)
        else:
            warn_of_emulation(console, numerics)
            lead(console, recipe, hashes, chosen, ranks)


def follow(recipe: "Recipe", ranks: "Ranks") -> None:
    """Trains as another rank than 0."""
    from nanogpt.checkpoint import restore_on_all_ranks
    from nanogpt.train import Observer, Stopped, train
    from tracking.observers import SamplePreview, StopRequest

    stop = StopRequest(ranks.max)
    state = recipe.new_state(ranks)
    restore_on_all_ranks(state)
    observers: list[Observer] = [stop]
    if state.sharded:  # a sample takes the weights of all ranks
        observers.append(SamplePreview(None, recipe.params.tracking, recipe.data.tokenizer))
    try:
        train(state, recipe.batches(state), recipe.params, recipe.evaluator(), observers)
    except Stopped:
        sys.exit(stop.exit_code)


def lead(console: Console, recipe: "Recipe", hashes: dict[str, str], run: Run, ranks: "Ranks") -> None:
    """Trains as rank 0, which records the run and publishes its model."""
    from nanogpt.checkpoint import Checkpoints
    from nanogpt.train import Stopped, train
    from tracking.observers import StopRequest, check_prompts, observing
    from tracking.recording import recording
    from tracking.resume import restore_newest

    stop = StopRequest(ranks.max)
    check_prompts(recipe)
    with Journal(run.journal) as journal:
        state, checkpoints = recipe.new_state(ranks), Checkpoints(run.checkpoints, hashes["fingerprint"])
        restore_newest(console, state, checkpoints, journal, recipe.params.train.last_step)
        try:
            with recording(console, recipe, hashes, run, journal, state) as record:
                with observing(console, recipe, run, journal, state, CURVE) as observers:
                    batches, evaluator = recipe.batches(state), recipe.evaluator()
                    train(state, batches, recipe.params, evaluator, [*observers, stop], checkpoints)
                if state.progress.step < recipe.params.train.last_step:
                    say_ended_early(console, recipe, state)
                record.result = save_models(recipe, hashes, run, state, checkpoints)
        except Stopped:
            sys.exit(stop.exit_code)
    publish(console, run)
    console.say(record.wait())


def say_ended_early(console: Console, recipe: "Recipe", state: "TrainState") -> None:
    train = recipe.params.train
    console.say(
        f"ended at step {state.progress.step:,} of {train.last_step:,}: no new best validation loss in "
        f"{train.patience} evaluations (train.patience)"
    )


def save_models(
    recipe: "Recipe", hashes: dict[str, str], run: Run, state: "TrainState", checkpoints: "Checkpoints"
) -> dict[str, Any]:
    """Writes models/best and models/last of the run; returns the result for the end of the journal."""
    from nanogpt.saved_model import save_model

    params, progress = recipe.params, state.progress
    evaluations = {record["step"]: record for record in run.records("eval")}
    steps = {"best": progress.best_step, "last": progress.step}
    for name, step in steps.items():
        info = {
            "step": step,
            "train_loss": evaluations[step]["train_loss"],
            "val_loss": evaluations[step]["val_loss"],
            "tokens_sha256": hashes["tokens.sha256"],
            "params": recipe.settings(),
        }
        weights = checkpoints.read(step).weights()
        save_model(run.models / name, state.model.config, weights, recipe.data.tokenizer_path, info)
    published = params.train.publish
    chosen = evaluations[steps[published]]
    return {
        "published": published,
        "step": chosen["step"],
        "train_loss": chosen["train_loss"],
        "val_loss": chosen["val_loss"],
        "best_step": progress.best_step,
        "best_val_loss": progress.best_val_loss,
        "steps": progress.step,
        "tokens": evaluations[progress.step]["tokens"],
        "parameters": state.model.parameter_count(),
        "model_sha256": sha256_tree(run.models / published),
        "model_md5": directory_md5(run.models / published),
    }


def publish(console: Console, run: Run) -> None:
    """Copies the run's result to the outs in dvc.yaml, with the same bytes each time."""
    from nanogpt.evaluate import loss_curve

    result = run.result
    write_text(CURVE, loss_curve(run.records("eval")))
    source = run.models / result["published"]
    if sha256_tree(source) != result["model_sha256"]:
        raise ValueError(f"{source} has changed since the training; remove {run.directory} to train afresh")
    with replacing(MODEL) as temporary:
        shutil.copytree(source, temporary)
    write_json(METRICS, {name: result[name] for name in result if name not in NOT_METRICS})
    console.say(
        f"{result['parameters']:,} parameters, {result['steps']:,} steps, {result['tokens']:,} tokens; "
        f"{result['published']} at step {result['step']:,}: val loss {result['val_loss']:.4f} -> {MODEL}"
    )


def warn_of_emulation(console: Console, numerics: "Numerics") -> None:
    """Warns of a slow training if the CPU has no instructions for its dtype."""
    from nanogpt.determinism import is_emulated

    if numerics.device == "cpu" and is_emulated(numerics.dtype):
        console.warn(
            f"this CPU has no instructions for numerics.dtype = {numerics.dtype}, and may take ten times as long; "
            "set it to float32, or let `python -m tools fastest --write` find the fastest setting"
        )


if __name__ == "__main__":
    run_to_exit(main)
