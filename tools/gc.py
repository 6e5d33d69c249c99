"""Frees the space of old runs and caches: `python -m tools gc`."""

import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from tools.command import command
from tracking.lock import RunLock
from tracking.mlflow_run import Replica
from tracking.mlflow_server import connect, local_folder, resolve_uri
from tracking.redaction import redact
from tracking.run import attempts_of

DAY = 86_400


@dataclass(frozen=True)
class Garbage:
    path: Path
    why: str

    @property
    def megabytes(self) -> float:
        files = self.path.rglob("*") if self.path.is_dir() else [self.path]
        return sum(path.stat().st_size for path in files if path.is_file()) / 1e6


@command()
@click.option("--days", default=14, help="Keep run directories that are newer.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def main(days: int, yes: bool) -> None:
    """Frees the disk space of old runs and caches, after showing it.

    Lists old run directories, parts of interrupted tokenizing, deleted MLflow runs and unused DVC objects, and removes
    them if you agree. Keeps runs that were not sent to MLflow completely, and all objects of any commit or experiment.
    """
    repository = Path.cwd()
    uri = resolve_uri(repository)
    garbage = [*old_runs(repository, uri, days), *old_parts(repository, days), *deleted_runs(repository, uri)]
    for item in garbage:
        click.echo(f"{item.megabytes:10.1f} MB  {item.path.relative_to(repository)}  {item.why}")
    objects = unused_objects()
    megabytes = sum(item.megabytes for item in objects)
    click.echo(f"{megabytes:10.1f} MB  {len(objects)} objects in DVC's cache that no commit or experiment uses")
    if not garbage and not objects:
        click.echo("nothing to free")
        return
    if not yes and not click.confirm("Free this?"):
        return
    for item in garbage:
        if item.why != DELETED:
            shutil.rmtree(item.path)
    if folders := [item.path for item in garbage if item.why == DELETED]:
        free_deleted_runs(repository, uri, folders)
    dvc_gc("--force")
    click.echo("freed")


def old_runs(repository: Path, uri: str, days: int) -> list[Garbage]:
    """Run directories older than that whose attempts have all ended and were sent to MLflow."""
    found = []
    for directory in sorted((repository / ".runs").glob("????????????????")):
        runs = attempts_of(directory)
        if directory.is_symlink():
            click.echo(f"skipped: {directory.relative_to(repository)} is a link")
            continue
        newest = max((run.journal.stat().st_mtime for run in runs if run.journal.exists()), default=0.0)
        lock = RunLock(directory)
        if time.time() - newest < days * DAY or not lock.acquire_now():
            continue
        status = ", ".join(run.status for run in runs)
        lock.release()
        if runs and all(run.is_described and Replica(run, uri).finished_run() for run in runs):
            found.append(Garbage(directory, f"{status}, {(time.time() - newest) / DAY:.0f} days old"))
    return found


def old_parts(repository: Path, days: int) -> list[Garbage]:
    """Parts of token files that an interrupted stage left, none of which is newer than that."""
    found = []
    for folder in (path for path in sorted((repository / ".runs/tokens").glob("*")) if path.is_dir()):
        age = time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
        lock = RunLock(folder.parent, name=f"{folder.name}.lock")
        if age >= days * DAY and lock.acquire_now():
            lock.release()
            found.append(Garbage(folder, f"interrupted tokenizing, {age / DAY:.0f} days old"))
    return found


DELETED = "deleted in MLflow"


def deleted_runs(repository: Path, uri: str) -> list[Garbage]:
    """Artifacts and models, in this repository, of runs that were deleted in MLflow."""
    if not (repository / "mlflow.db").exists() or not uri.startswith("sqlite:"):
        return []
    client = connect(uri, repository)
    found = {location: inside(repository, location) for location in locations(client)}
    if elsewhere := [location for location, folder in found.items() if folder is None]:
        more = f" and {len(elsewhere) - 1} more" if len(elsewhere) > 1 else ""
        click.echo(f"skipped: artifacts of deleted runs outside of the repository ({redact(elsewhere[0])}{more})")
    folders = [folder for folder in found.values() if folder]
    return [Garbage(folder, DELETED) for folder in folders if any(path.is_file() for path in folder.rglob("*"))]


def locations(client: Any) -> list[str]:
    """The locations of the artifacts of deleted runs and of their models."""
    runs = deleted(client)
    found = [run.info.artifact_uri.removesuffix("/artifacts") for run in runs]
    return found + [model.artifact_location for model in models_of(client, runs)]


def inside(repository: Path, location: str) -> Path | None:
    """The folder of an artifact location; None if it is outside of the repository, for example because of a link."""
    folder = local_folder(location)
    held = folder and folder.resolve().is_relative_to(repository.resolve())
    return folder if held and folder and folder.is_relative_to(repository) else None


def free_deleted_runs(repository: Path, uri: str, folders: list[Path]) -> None:
    """Removes deleted runs with `mlflow gc`, which also removes them from the database.

    It would also remove artifacts outside of the repository; if there are any, removes only the folders.
    """
    from mlflow.entities import ViewType

    client = connect(uri, repository)
    experiments = client.search_experiments(view_type=ViewType.ALL)
    places = [each.artifact_location for each in experiments if each.name != "Default"]  # it has no run of the pipeline
    if not all(inside(repository, place) for place in [*places, *locations(client)]):
        for folder in folders:
            shutil.rmtree(folder)
        return
    for model in models_of(client, deleted(client)):
        client.delete_logged_model(model.model_id)
    command = ["mlflow", "gc", "--backend-store-uri", uri, "--tracking-uri", uri]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        killed = f"was killed ({signal.Signals(-done.returncode).name})" if done.returncode < 0 else ""
        reason = killed or f"failed: {redact(done.stderr)[-300:]}"
        raise ValueError(f"`mlflow gc` {reason}; run `make gc` again")


def deleted(client: Any) -> list[Any]:
    from mlflow.entities import ViewType

    experiments = [experiment.experiment_id for experiment in client.search_experiments(view_type=ViewType.ALL)]
    return list(client.search_runs(experiments, run_view_type=ViewType.DELETED_ONLY, max_results=1000))


def models_of(client: Any, runs: list[Any]) -> list[Any]:
    found = (client.search_logged_models([r.info.experiment_id], f"source_run_id = '{r.info.run_id}'") for r in runs)
    return [model for models in found for model in models]


def unused_objects() -> list[Garbage]:
    """Objects in DVC's cache that are used by neither the workspace nor any commit or experiment."""
    lines = dvc_gc("--dry").splitlines()
    paths = [Path(line.removeprefix("Removing ")) for line in lines if line.startswith("Removing ")]
    return [Garbage(path, "DVC object") for path in paths if path.exists()]


def dvc_gc(mode: str) -> str:
    command = ["dvc", "gc", "--workspace", "--all-commits", "--all-experiments", mode]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"`{' '.join(command)}` failed: {redact(done.stderr)}")
    return done.stdout
