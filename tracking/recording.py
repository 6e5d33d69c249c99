"""Records a training: the start and end in the journal, and the process that fills MLflow meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from nanogpt.recipe import Recipe
from nanogpt.train import Diverged, Stopped
from nanogpt.train_state import TrainState
from tracking import mlflow_process
from tracking.console import Console, repository
from tracking.fingerprint import environment
from tracking.journal import Journal
from tracking.resume import describe
from tracking.run import Run


@dataclass
class Record:
    """A training that is being recorded; the block of `recording` sets the result for the journal's end."""

    follower: mlflow_process.Follower
    wait_seconds: float
    result: dict[str, Any] = field(default_factory=dict)

    def wait(self) -> str:
        """Waits until MLflow has the whole run, or tracking.wait_seconds; returns the line to print."""
        return mlflow_process.wait(self.follower, self.wait_seconds)


@contextmanager
def recording(
    console: Console, recipe: Recipe, hashes: dict[str, str], run: Run, journal: Journal, state: TrainState
) -> Iterator[Record]:
    """Records in the journal the start of a training and, whatever happens in the block, its end."""
    params, progress = recipe.params, state.progress
    journal.append(
        "start",
        step=progress.step,
        resumed=progress.step > 0,
        fingerprint=hashes["fingerprint"],
        environment=environment(),
        numerics=recipe.numerics.as_dict(),
        processes=state.ranks.size,
    )
    journal.sync()  # a run.json must have a journal
    describe(run, params, hashes, dataset(recipe, hashes["tokens.sha256"]))
    console.say(mlflow_process.describe_system_metrics())
    wait_seconds = params.tracking.wait_seconds
    record = Record(mlflow_process.start(run, repository(), wait_seconds), wait_seconds)
    status, message, result = "FINISHED", "", record.result
    try:
        yield record
        result = record.result
    except Stopped as reason:
        status, message = "KILLED", str(reason)
        raise
    except BaseException as error:
        cause = state.ranks.cause(error)
        status, message = "FAILED", " ".join(f"{type(cause).__name__}: {cause}".split())
        result = {"diverged": cause.step} if isinstance(cause, Diverged) else {}
        raise
    finally:
        journal.append("end", status=status, message=message, step=progress.step, result=result)
        if status != "FINISHED":
            record.wait()
        if status == "KILLED":
            console.say(f"stopped at step {progress.step} ({message}), everything is saved; `dvc repro` resumes it")


def dataset(recipe: Recipe, sha256: str) -> dict[str, Any]:
    """The description of the tokens for MLflow."""
    data = recipe.data
    return {
        "name": data.meta.corpus.source,
        "source": str(data.directory),
        "sha256": sha256,
        "profile": data.meta.model_dump(),
    }
