"""The journal: a crash-safe record of every step of a run, from which MLflow is filled."""

import errno
import json
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]
# A prefix of a journal: {"bytes": its length, "crc": the chained CRC-32 of its last record, in hex}.
Position = dict[str, Any]
START: Position = {"bytes": 0, "crc": "00000000"}

# Records of these kinds are a function of the params alone, so a step that is recomputed after a kill repeats them.
KEYED = frozenset({"step", "eval", "sample", "checkpoint"})
_SUFFIX = len(',"crc":"00000000"}')
_TAIL = 1 << 16  # bytes, which nearly always contain the last record


class JournalDamaged(ValueError):
    """A journal was changed after it was written; the message names file, line and remedy."""

    def __init__(self, path: Path, what: str):
        directory = path.parent.parent
        super().__init__(f"{path} is damaged: {what}; delete the run directory {directory} to train afresh")


class Journal:
    """An append-only JSONL file. Each line ends with a CRC-32 chained over all lines before it.

    Opening it raises JournalDamaged for an edited line, a flipped bit or a missing line. An incomplete last line, left
    by a kill in the middle of a write, is removed. Of the kinds in KEYED the first record of a step stays: appending it
    again only compares.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        self._offsets: dict[tuple[str, str], dict[int, int]] = {}  # kind, prompt -> step -> where its record begins
        self._divergence_recorded = False
        self._end = START
        try:
            self._catch_up()
        except BaseException:
            self.close()
            raise

    def append(self, kind: str, **fields: Any) -> list[str]:
        """Writes one record with a single write, and adds the time `t` in ms since the epoch.

        If there is a record of this (kind, step, prompt) already, compares instead and returns the names of the fields
        that differ. The first difference since the file was opened is recorded as kind "diverged". Raises OSError when
        the disk is full, and leaves the file as it was.
        """
        return self.append_many([{"kind": kind, **fields}])

    def append_many(self, records: Iterable[Record]) -> list[str]:
        """`append` for several records ({"kind": ..., ...}) in one write; none may occur twice."""
        if os.fstat(self._fd).st_size != self._end["bytes"]:
            self._catch_up()  # Ctrl-C came between the last write and its bookkeeping
        lines: list[bytes] = []
        added: list[tuple[Record, int]] = []
        differing: list[str] = []
        end = self._end
        now = time.time_ns() // 1_000_000
        for fields in records:
            record = {"kind": fields["kind"], "t": now, **fields}
            if (first := self._find(record)) is not None:
                names = _differences(first, record)
                differing += names
                if not names or self._divergence_recorded:
                    continue
                self._divergence_recorded = True
                values = {"field": names[0], "first": first.get(names[0]), "again": record.get(names[0])}
                record = {"kind": "diverged", "t": now, "of": record["kind"], "step": record["step"], **values}
            line, crc = _encode(record, end["crc"])
            added.append((record, end["bytes"]))
            lines.append(line)
            end = {"bytes": end["bytes"] + len(line), "crc": crc}
        if lines:
            self._write(b"".join(lines))
            for record, offset in added:
                self._index(record, offset)
            self._end = end
        return differing

    def sync(self) -> None:
        """Waits until all records are on disk; needed before a checkpoint that relies on them."""
        os.fsync(self._fd)

    def position(self) -> Position:
        """The end of the journal, for a checkpoint to remember."""
        return self._end

    def has_position(self, position: Position) -> bool:
        """Whether this journal begins with exactly the records up to that position."""
        length = position["bytes"]
        if length == 0 or length > self._end["bytes"]:
            return bool(position == START)
        return os.pread(self._fd, _SUFFIX + 1, length - _SUFFIX - 1) == _suffix(position["crc"]) + b"\n"

    def records(self) -> Iterator[Record]:
        """All records from the first, checked again as they are read."""
        return (record for record, _ in read_records(self.path))

    def records_of(self, kind: str) -> Iterator[Record]:
        """The records of a kind in KEYED that has one record a step, in the order of steps. Reads no others."""
        return (self._read(offset) for _, offset in sorted(self._offsets.get((kind, ""), {}).items()))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _catch_up(self) -> None:
        """Reads and checks what follows the last record read, and removes an incomplete last line."""
        for record, end in read_records(self.path, self._end):
            self._index(record, self._end["bytes"])
            self._end = end
        if os.fstat(self._fd).st_size > self._end["bytes"]:
            os.ftruncate(self._fd, self._end["bytes"])

    def _write(self, block: bytes) -> None:
        written = os.write(self._fd, block)
        if written < len(block):
            os.ftruncate(self._fd, self._end["bytes"])
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: free some space and start again", str(self.path))

    def _index(self, record: Record, offset: int) -> None:
        if record["kind"] in KEYED:
            key = (record["kind"], record.get("prompt", ""))
            self._offsets.setdefault(key, {}).setdefault(record["step"], offset)

    def _find(self, record: Record) -> Record | None:
        """The record of the same kind, step and prompt; None if there is none, or the kind is not in KEYED."""
        offsets = self._offsets.get((record["kind"], record.get("prompt", "")))
        return self._read(offsets[record["step"]]) if offsets and record["step"] in offsets else None

    def _read(self, offset: int) -> Record:
        with self.path.open("rb") as file:
            file.seek(offset)
            record: Record = json.loads(file.readline())
        return record


def _suffix(crc: str) -> bytes:
    return f',"crc":"{crc}"}}'.encode()


def _encode(record: Record, previous: str) -> tuple[bytes, str]:
    """The line of a record that follows one with CRC `previous`, and its own CRC."""
    body = json.dumps(record, separators=(",", ":")).encode()  # ASCII, so one line; floats by repr, so exact
    crc = f"{zlib.crc32(body, int(previous, 16)):08x}"
    return body[:-1] + _suffix(crc) + b"\n", crc


def _checked(line: bytes, previous: str) -> str | None:
    """The CRC of a line (without its newline) that follows one with CRC `previous`; None if it does not match."""
    crc = f"{zlib.crc32(line[:-_SUFFIX] + b'}', int(previous, 16)):08x}"
    return crc if line[-_SUFFIX:] == _suffix(crc) else None


def _differences(first: Record, again: Record) -> list[str]:
    names = [name for name in {**first, **again} if name not in {"t", "crc"}]
    return [name for name in names if json.dumps(first.get(name)) != json.dumps(again.get(name))]


def read_records(path: Path, start: Position = START) -> Iterator[tuple[Record, Position]]:
    """Yields each complete record after `start`, and the position after it. Another process may be writing meanwhile.

    Raises JournalDamaged where the chain breaks, and when `start` is no longer in the file.
    """
    number = 0
    with path.open("rb") as file:
        if start["bytes"]:
            file.seek(max(0, start["bytes"] - _SUFFIX - 1))
            if file.read(_SUFFIX + 1) != _suffix(start["crc"]) + b"\n":
                raise JournalDamaged(path, f"the records up to byte {start['bytes']} have changed since they were read")
        end = start
        while (line := file.readline()).endswith(b"\n"):
            number += 1
            crc = _checked(line[:-1], end["crc"])
            if crc is None:
                where = f"line {number}" if not start["bytes"] else f"the line at byte {end['bytes']}"
                raise JournalDamaged(path, f"{where} was changed")
            end = {"bytes": end["bytes"] + len(line), "crc": crc}
            yield json.loads(line), end
    # A kill leaves the beginning of a line. A complete line with something else in place of its newline is damage.
    if line and _checked(line[:-1], end["crc"]) is not None:
        raise JournalDamaged(path, f"line {number + 1} was changed at its end")


def last_record(path: Path) -> Record | None:
    """The last complete record, read from the end of the file and not checked; None if there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            for length in (min(size, _TAIL), size):
                file.seek(size - length)
                lines = file.read(length).split(b"\n")[length < size : -1]  # the first may lack its beginning
                if lines:
                    record: Record = json.loads(lines[-1])
                    return record
    except (FileNotFoundError, ValueError):
        pass
    return None
