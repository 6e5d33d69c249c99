"""A run's directory, .runs/<fingerprint>/attempt-N: where its files lie and how they are read, in one place.

.runs/<fingerprint>/lock            held by the one process that trains here
.runs/<fingerprint>/attempt-1/      a training from step 0 to its end, over as many kills as it takes; the newest counts
    run.json                        what MLflow needs to create the run; written once, atomically, by the train stage
    journal.jsonl                   what happened, one line each; written by the trainer alone
    system.jsonl                    system metrics; written by the process that fills MLflow
    checkpoints/  models/best/  models/last/  artifacts/
    mlflow.json  tracking.log       how far MLflow has been filled, and what the process that fills it printed
    tracking.lock                   held by the one process that fills MLflow from this attempt
"""

import json
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from nanogpt.files import write_text
from tracking.journal import Record, RunLock, last_record, read_records

_HEAD = re.compile(rb'\{"kind":"(\w+)","t":(\d+),')


class Run:
    """One attempt at a training, which is one run of MLflow. What may still change is read whenever it is asked for.

    str() gives the directory; its parts, named as above, need not exist.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.journal, self.system = directory / "journal.jsonl", directory / "system.jsonl"
        self.checkpoints, self.models, self.artifacts = (directory / n for n in ("checkpoints", "models", "artifacts"))
        self.mlflow_path, self.log = directory / "mlflow.json", directory / "tracking.log"
        self._info_path = directory / "run.json"

    def __str__(self) -> str:
        return str(self.directory)

    @property
    def number(self) -> int:
        """The N of attempt-N."""
        return int(self.directory.name.removeprefix("attempt-"))

    # --- run.json

    @property
    def repository(self) -> Path:
        """Where it lies now; recorded nowhere, since a repository can be moved."""
        return self.directory.absolute().parents[2].resolve()

    @property
    def is_described(self) -> bool:
        """Whether run.json exists, so that MLflow's run can be made."""
        return self._info_path.exists()

    @cached_property
    def info(self) -> dict[str, Any]:
        """run.json. Raises OSError, ValueError."""
        info: dict[str, Any] = json.loads(self._info_path.read_bytes())
        return info

    def write_info(self, info: dict[str, Any]) -> None:
        """Writes run.json, whole or not at all."""
        write_text(self._info_path, json.dumps(info, sort_keys=True, indent=1) + "\n")

    # --- the journal

    def records(self, kind: str | None = None) -> Iterator[Record]:
        """All records of the journal, or those of one kind, checked. Raises JournalDamaged, FileNotFoundError."""
        return (record for record, _ in read_records(self.journal) if kind in (None, record["kind"]))

    @property
    def end(self) -> Record | None:
        """The "end" record; None while the run goes on. Read from the end of the journal and not checked."""
        record = last_record(self.journal)
        return record if record and record["kind"] == "end" else None

    @property
    def result(self) -> dict[str, Any]:
        """What the training gave, as its "end" record says; empty without one."""
        return (self.end or {}).get("result") or {}

    @property
    def status(self) -> str:
        """new | open (running, or killed without a word) | finished | failed | killed."""
        record = last_record(self.journal)
        if record is None:
            return "new"
        return str(record["status"]).lower() if record["kind"] == "end" else "open"

    def timed(self, *kinds: str) -> Iterator[tuple[Record, float]]:
        """The records of some kinds, each with the seconds of training before it; the time between two starts is none.

        For who only shows them: they are not checked, and the other lines, of which a journal may have many, are not
        parsed. Nothing for a journal that does not exist.
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
        """How far MLflow has been filled; empty if that is lost or damaged: then everything may be sent again."""
        try:
            state = json.loads(self.mlflow_path.read_bytes())
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def write_mlflow(self, state: dict[str, Any]) -> None:
        """Writes mlflow.json, whole or not at all."""
        write_text(self.mlflow_path, json.dumps(state, sort_keys=True, indent=1) + "\n")

    # --- locks

    def lock(self, on_wait: Callable[[int], None] | None = None) -> RunLock:
        """The lock of who trains: it covers all attempts of the fingerprint."""
        return RunLock(self.directory.parent, on_wait)

    def sending_lock(self, on_wait: Callable[[int], None] | None = None) -> RunLock:
        """The lock of who fills MLflow from this attempt."""
        return RunLock(self.directory, on_wait, "tracking.lock")


def runs_in(root: Path) -> list[Run]:
    """All runs below a repository's `.runs` that tracking can replay, oldest first."""
    found = list((root / ".runs").glob("*/attempt-*/run.json"))
    found.sort(key=lambda path: (path.stat().st_mtime_ns, path.parent.name))
    return [Run(path.parent) for path in found]


def attempts_of(directory: Path) -> list[Run]:
    """The attempts in `.runs/<fingerprint>`, described or not, in the order of their numbers."""
    return sorted((Run(path) for path in directory.glob("attempt-*")), key=lambda run: run.number)
