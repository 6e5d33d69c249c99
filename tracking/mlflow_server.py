"""Which MLflow server to use, how to connect to it, and what its errors mean."""

import os
import re
import shlex
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from nanogpt.collector import collector_paused
from tracking.journal import JournalDamaged
from tracking.lock import RunLock
from tracking.mlflow_client import StoreClient
from tracking.redaction import redact

# A dead server must be noticed in seconds, not in MLflow's four minutes. No telemetry, no progress bars.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # a URL may hold a password
    "GIT_PYTHON_REFRESH": "quiet",
}

# The columns in which MLflow stores locations of artifacts, all of them absolute.
_LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
# A pattern in an error of MLflow, its database or its connection -> what to report; the first that matches counts.
_ERRORS = (
    (
        r"malformed|not a database|Can't locate revision|out-of-date database",
        "{where} is damaged or of another MLflow version ({text:.200}): move it away (with its -wal and -shm), then "
        "`python -m tools sync` fills a new one from the journals",
    ),
    (
        r"Max retries exceeded.*?(timed out|too many \d+ error|\[Errno -?\d+\] [\w ]+)",
        "MLflow at {where} cannot be reached ({found[1]})",
    ),
    (
        r"failed with error code 401 ",
        "{where} refuses these credentials: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    ),
    (
        r"failed with error code 403 .*Invalid Host",
        "{where} does not accept this host name: ask its administrator to add it to MLFLOW_SERVER_ALLOWED_HOSTS",
    ),
    (
        r"failed with error code 403 |PERMISSION_DENIED",
        "{where} does not allow this account to do that: correct MLFLOW_TRACKING_USERNAME, or ask to become a member",
    ),
    (
        r"response body was not in a valid JSON format|failed with error code 404 .*<html|Exceeded 30 redirects",
        "{where} does not answer like an MLflow server: correct MLFLOW_TRACKING_URI",
    ),
    (r"Connection broken|Connection aborted", "{where} cut the connection before its answer was complete"),
    (r"", "MLflow at {where} failed ({kind}: {text:.300})"),
)
_SQLITE = re.compile(r"(sqlite(?:\+\w+)?:///)(.*)")  # scheme, path


class TrackingError(ValueError):
    """MLflow could not be reached or reported an error; one line with the reason and the remedy. Try again later."""


def prepare_environment() -> None:
    """Limits how long MLflow waits, unless the user has set it; must run before mlflow is imported."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def resolve_uri(repository: Path) -> str:
    """MLFLOW_TRACKING_URI, by default a database in the original repository; relative paths start there."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    # A relative path would land in the temporary workspace of `dvc exp run --temp`, which is deleted.
    if (database := _SQLITE.match(uri)) and database[2]:
        return f"{database[1]}{_quoted(repository) / database[2]}"
    if uri.startswith("file:") and not uri.startswith("file:/"):
        return (repository / uri.removeprefix("file:")).as_uri()
    if "://" not in uri and not re.match(r"(file:|databricks)", uri):
        return (repository / uri).as_uri()
    return uri


def is_server(uri: str) -> bool:
    """Whether the URI is a server's, which also stores the artifacts; otherwise it is a database or a folder."""
    return uri.startswith(("http://", "https://", "databricks", "uc:"))


def store_name(uri: str, repository: Path) -> str:
    """The name of a store in records: without a password, and the same after the repository was moved."""
    return redact(uri.replace(f"{_quoted(repository)}/", "", 1))


def _quoted(path: Path) -> Path:
    """A path for a database's URI; Jenkins names folders like feature%2Fname."""
    return Path(str(path).replace("%", "%25").replace("?", "%3F"))


def local_folder(location: str) -> Path | None:
    """The folder on this machine at an artifact location; None for another kind of store."""
    address = urlsplit(location)
    if address.scheme not in {"", "file"}:
        return None
    return Path(unquote(address.path) if address.scheme else location)


def connect(uri: str, repository: Path) -> Any:
    """Returns a StoreClient; first creates an SQLite database if there is none. Raises TrackingError."""
    prepare_environment()
    with explained(uri), collector_paused():
        if path := sqlite_path(uri):
            with RunLock(repository / ".runs", name="mlflow.lock"):
                _prepare_sqlite(path)
                if path.parent == repository:
                    _move_locations(path, repository)
        client = StoreClient(uri)
        client.search_experiments(max_results=1)
        return client


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite database; None for another store."""
    database = _SQLITE.match(uri)
    return Path(unquote(database[2].split("?")[0])) if database else None


def _prepare_sqlite(path: Path) -> None:
    if not path.exists() or path.stat().st_size == 0:
        # Under another name first, so that a kill cannot leave an incomplete database.
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.new")
        for leftover in (new, new.with_name(f"{new.name}-journal")):
            leftover.unlink(missing_ok=True)
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        SqlAlchemyStore(f"sqlite:///{_quoted(new)}", f"{path.parent}/mlartifacts/default").engine.dispose()
        new.replace(path)
    database = sqlite3.connect(path, timeout=30)
    try:
        if database.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            database.execute("PRAGMA journal_mode=wal")  # lets several runs write at once; stored in the file
    finally:
        database.close()


def _move_locations(path: Path, repository: Path) -> None:
    """Updates the absolute locations of artifacts after the repository, with the database in it, was moved or copied.

    Locations outside of the repository stay.
    """
    database = sqlite3.connect(path, timeout=30)
    try:
        with database:
            for (old,) in database.execute(
                "SELECT artifact_location FROM experiments WHERE artifact_location LIKE '%/mlartifacts/%'"
            ).fetchall():
                root, _, folder = old.rpartition("/mlartifacts/")
                new = f"{repository.as_uri()}/mlartifacts/{folder}"
                was = local_folder(root)
                here = (repository / "mlartifacts" / folder).is_dir()
                if was is None or was == repository or (was.is_dir() and not here):
                    continue
                for table, column in _LOCATIONS:
                    database.execute(
                        f"UPDATE {table} SET {column} = :new || substr({column}, length(:old) + 1) "
                        f"WHERE {column} = :old OR substr({column}, 1, length(:old) + 1) = :old || '/'",
                        {"old": old, "new": new},
                    )
    finally:
        database.close()


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turns errors of MLflow, its database or its connection into a TrackingError of one line."""
    try:
        yield
    except (TrackingError, JournalDamaged):
        raise
    except Exception as error:
        text, where = redact(str(error)), str(sqlite_path(uri) or redact(uri))
        message, found = next((message, found) for p, message in _ERRORS if (found := re.search(p, text)))
        raise TrackingError(message.format(where=where, text=text, found=found, kind=type(error).__name__)) from error


def experiment_id(client: Any, uri: str, repository: Path, name: str) -> str:
    """The id of the experiment of that name, which is created if it is new.

    Never Default, whose artifacts could be anywhere.
    """
    from mlflow.exceptions import MlflowException

    for _ in range(2):
        experiment = client.get_experiment_by_name(name)
        if experiment is not None:
            if experiment.lifecycle_stage != "active":
                other = _current_experiment(repository)
                if other not in {None, name}:
                    return experiment_id(client, uri, repository, str(other))
                raise TrackingError(
                    f"the MLflow experiment {name!r} is deleted: restore it (`mlflow experiments restore "
                    f"--experiment-id {experiment.experiment_id}`), or set tracking.experiment in params.yaml"
                )
            _check_location(uri, repository, experiment.artifact_location)
            return str(experiment.experiment_id)
        # Not quoted, since MLflow takes a % in a path for an escape when it loads a model. Each run has its own folder
        # in it, so names may clash.
        folder = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:100]
        # A server has its own place for artifacts; with a database it would be the working directory, which DVC may
        # delete.
        location = None if is_server(uri) else (repository / "mlartifacts" / folder).as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
    raise TrackingError(f"the MLflow experiment {name!r} can neither be created nor found")


def _current_experiment(repository: Path) -> str | None:
    """tracking.experiment of params.yaml, to replace the recorded name of a deleted experiment."""
    from nanogpt.params import load_params

    try:
        return load_params(repository / "params.yaml").tracking.experiment
    except (OSError, ValueError):
        return None


def check_variables(experiment: str) -> None:
    """Raises ValueError for environment variables of MLflow that have no effect here."""
    for name, remedy in {
        "MLFLOW_EXPERIMENT_NAME": "set tracking.experiment in params.yaml",
        "MLFLOW_EXPERIMENT_ID": "set tracking.experiment in params.yaml to the experiment's name",
        "MLFLOW_RUN_ID": "each training is a run of its own",
    }.items():
        value = os.environ.get(name)
        if value and (name, value) != ("MLFLOW_EXPERIMENT_NAME", experiment):
            raise ValueError(f"{name} = {value} has no effect here: {remedy}, and `unset {name}`")


def _check_location(uri: str, repository: Path, location: str) -> None:
    """Raises TrackingError if the artifacts are in a repository that is gone; MLflow would create a folder there."""
    root, found, _ = location.rpartition("/mlartifacts/")
    was = local_folder(root)
    if found and was and not is_server(uri) and not was.exists():
        raise TrackingError(
            f"MLflow at {redact(uri)} keeps artifacts in {location}, and {was} is gone; if this repository was moved "
            f"from there, `{shlex.join(['ln', '-s', str(repository), str(was)])}` makes the old path work"
        )


def has_run(client: Any, run_id: str | None) -> bool:
    """Whether the server has that run, deleted or not; false for None."""
    from mlflow.exceptions import MlflowException

    try:
        return run_id is not None and client.get_run(run_id) is not None
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def find_run(client: Any, experiment: str, filter_string: str) -> Any | None:
    """The newest matching run, deleted or not, so that a run that the user has deleted is not sent again."""
    from mlflow.entities import ViewType

    order = ["attributes.start_time DESC"]
    found = client.search_runs([experiment], filter_string, ViewType.ALL, max_results=1, order_by=order)
    return found[0] if found else None
