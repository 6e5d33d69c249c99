"""A run directory, .runs/<fingerprint>/attempt-N: the only module that knows where its files lie.

.runs/<fingerprint>/lock            held by the process that trains here
.runs/<fingerprint>/attempt-1/      a training from step 0 to its end, over any number of kills; the newest one counts
    run.json                        what MLflow needs to create the run; written once, atomically, by the train stage
    journal.jsonl                   what happened, a line each; written only by the training process
    system.jsonl                    system metrics; written by the process that fills MLflow
    checkpoints/  models/best/  models/last/  artifacts/
    mlflow.json  tracking.log       how far MLflow has been filled, and the output of the process that fills it
    tracking.lock                   held by the process that fills MLflow from this attempt
"""

import json
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from nanogpt.files import write_json
from tracking.journal import Record, last_record, read_records
from tracking.lock import RunLock

# What a damaged run.json or journal may raise.
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError)
_HEAD = re.compile(rb'\{"kind":"(\w+)","t":(\d+),')


def as_text(value: Any) -> str:
    """A parameter or tag as MLflow stores it."""
    return value if isinstance(value, str) else json.dumps(value)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if the file is missing or damaged."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


class Run:
    """One attempt at a training, which is one run in MLflow. Its files need not exist; all but run.json may change."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.journal, self.system = directory / "journal.jsonl", directory / "system.jsonl"
        self.checkpoints, self.models, self.artifacts = (directory / n for n in ("checkpoints", "models", "artifacts"))
        self.diff = self.artifacts / "uncommitted.diff"
        self.mlflow_path, self.log = directory / "mlflow.json", directory / "tracking.log"
        self._info_path = directory / "run.json"

    def __str__(self) -> str:
        return str(self.directory)

    @property
    def number(self) -> int:
        """The N of attempt-N."""
        return int(self.directory.name.removeprefix("attempt-"))

    @property
    def repository(self) -> Path:
        """The repository that contains it; recorded nowhere, since a repository can be moved."""
        return self.directory.absolute().parents[2].resolve()

    # --- run.json

    @property
    def is_described(self) -> bool:
        """Whether run.json exists, so that the run can be created in MLflow."""
        return self._info_path.exists()

    @cached_property
    def info(self) -> dict[str, Any]:
        """The content of run.json. Raises OSError, ValueError."""
        info: dict[str, Any] = json.loads(self._info_path.read_bytes())
        return info

    def write_info(self, info: dict[str, Any]) -> None:
        """Writes run.json, atomically."""
        write_json(self._info_path, info)

    @property
    def params(self) -> dict[str, str]:
        """Its parameters as MLflow stores them. Raises an error of DAMAGE."""
        return {name: as_text(value) for name, value in self.info["params"].items()}

    @property
    def tags(self) -> dict[str, str]:
        """Its tags as MLflow stores them. Raises an error of DAMAGE."""
        return {name: as_text(value) for name, value in self.info["tags"].items()} | self.model_tags

    @property
    def model_tags(self) -> dict[str, str]:
        """The hashes of its model; none before it has finished."""
        result = self.result
        return {f"model.{name}": result[f"model_{name}"] for name in ("sha256", "md5") if f"model_{name}" in result}

    # --- the journal

    def records(self, kind: str | None = None) -> Iterator[Record]:
        """All records of the journal, or those of one kind, checked. Raises JournalDamaged, FileNotFoundError."""
        return (record for record, _ in read_records(self.journal) if kind in (None, record["kind"]))

    @property
    def end(self) -> Record | None:
        """The "end" record, not checked; None before the run ends."""
        record = last_record(self.journal)
        return record if record and record["kind"] == "end" else None

    @property
    def result(self) -> dict[str, Any]:
        """The result in the "end" record; empty without one."""
        return (self.end or {}).get("result") or {}

    @property
    def status(self) -> str:
        """new | open (running, or killed by SIGKILL) | finished | failed | killed."""
        record = last_record(self.journal)
        if record is None:
            return "new"
        return str(record["status"]).lower() if record["kind"] == "end" else "open"

    def timed(self, *kinds: str) -> Iterator[tuple[Record, float]]:
        """The records of some kinds, each with the seconds of training before it, without the time between two starts.

        Not checked, and other kinds, of which a journal may have many, are not parsed: for display. Empty without a
        journal.
        """
        if not self.journal.exists():
            return
        begun, before, seconds = 0, 0.0, 0.0
        with self.journal.open("rb") as file:
            for line in file:
                head = _HEAD.match(line)
                if head is None or not line.endswith(b"\n"):
                    continue
                kind, t = head[1].decode(), int(head[2])
                if kind == "start":
                    begun, before = t, seconds
                seconds = max(seconds, before + (t - begun) / 1000)
                if kind in kinds:
                    yield json.loads(line), seconds

    @property
    def environment(self) -> dict[str, str] | None:
        """The environment of the last start."""
        return next((record.get("environment") for record, _ in reversed([*self.timed("start")])), None)

    # --- MLflow

    @property
    def mlflow(self) -> dict[str, Any]:
        """How far MLflow has been filled; empty if the file is missing or damaged: then everything is sent again."""
        return read_object(self.mlflow_path)

    def write_mlflow(self, state: dict[str, Any]) -> None:
        """Writes mlflow.json, atomically."""
        write_json(self.mlflow_path, state)

    # --- locks

    def lock(self) -> RunLock:
        """The lock of the process that trains; one for all attempts of the fingerprint."""
        return RunLock(self.directory.parent)

    def sending_lock(self, on_wait: Callable[[int], None] | None = None) -> RunLock:
        """The lock of the process that fills MLflow from this attempt."""
        return RunLock(self.directory, on_wait, "tracking.lock")


def runs_in(root: Path) -> list[Run]:
    """All runs in a repository's `.runs` that have a run.json, oldest first."""
    found = list((root / ".runs").glob("*/attempt-*/run.json"))
    found.sort(key=lambda path: (path.stat().st_mtime_ns, path.parent.name))
    return [Run(path.parent) for path in found]


def attempts_of(directory: Path) -> list[Run]:
    """The attempts in `.runs/<fingerprint>`, with run.json or not, ordered by their numbers."""
    return sorted((Run(path) for path in directory.glob("attempt-*")), key=lambda run: run.number)
