"""A run directory's lock and its journal: the crash-safe record of every step, from which MLflow is filled."""

import bisect
import errno
import fcntl
import json
import os
import time
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

Record = dict[str, Any]
# A prefix of a journal: {"bytes": its length, "crc": the chained CRC-32 of its last record, in hex}.
Position = dict[str, Any]

# Records of these kinds are a function of the params alone, so a step that is recomputed after a kill must repeat them.
KEYED = frozenset({"step", "eval", "sample", "checkpoint"})
_SUFFIX = len(',"crc":"00000000"}')


class JournalDamaged(ValueError):
    """A journal is not what was written; the message names file, line and remedy."""


START: Position = {"bytes": 0, "crc": "00000000"}


class RunLock:
    """An exclusive lock on `<directory>/<name>`, held until the block or the process ends, however it ends.

    If another process holds it, `on_wait(its pid)` is called once (0: unknown), and the lock waited for; Ctrl-C works.
    """

    def __init__(self, directory: Path, on_wait: Callable[[int], None] | None = None, name: str = "lock"):
        self.path = directory / name
        self.on_wait = on_wait
        self._fd = -1

    def __enter__(self) -> "RunLock":
        waited = self.on_wait is None
        while not self._try():
            if not waited:
                waited = True
                assert self.on_wait is not None
                self.on_wait(holder(self.path))
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
            finally:
                os.close(fd)
        return self

    def acquire_now(self) -> bool:
        """Takes the lock if it is free; `release` gives it back."""
        return self._try()

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _try(self) -> bool:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever prunes old runs may have removed the file that was opened: a lock on it would protect nothing.
            held = self.path.exists() and os.fstat(fd).st_ino == self.path.stat().st_ino
        except BlockingIOError:
            held = False
        except BaseException:
            os.close(fd)
            raise
        if not held:
            os.close(fd)
            return False
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._fd = fd
        # A child that is forked without exec would share the lock and keep it when this process is killed.
        os.register_at_fork(after_in_child=self.release)
        return True


def holder(path: Path) -> int:
    """The pid that was written into a lock file by who holds it, or held it last; 0 if there is none."""
    try:
        return int(path.read_text() or 0)
    except (OSError, ValueError):
        return 0


class _Steps:
    """Where the record of each step lies: step -> offset, 16 bytes a step."""

    def __init__(self) -> None:
        self.steps, self.offsets = array("q"), array("q")

    def find(self, step: int) -> int | None:
        index = bisect.bisect_left(self.steps, step)
        return self.offsets[index] if index < len(self.steps) and self.steps[index] == step else None

    def add(self, step: int, offset: int) -> None:
        index = len(self.steps) if not self.steps or step > self.steps[-1] else bisect.bisect_left(self.steps, step)
        self.steps.insert(index, step)
        self.offsets.insert(index, offset)


class Journal:
    """An append-only JSONL file. Each line ends with a CRC-32 chained over all lines before it.

    So an edit, a flipped bit and a missing line are noticed when the file is opened: JournalDamaged. A last line that
    is cut short, as a kill in the middle of a write leaves it, is removed. Of the kinds in KEYED the first record of a
    step wins: appending it again writes nothing and compares.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        self._index: dict[tuple[str, str], _Steps] = {}
        self._told = False
        self._end = START
        try:
            self._catch_up()
        except BaseException:
            self.close()
            raise

    def append(self, kind: str, **fields: Any) -> list[str]:
        """Writes one record (time `t` in ms since the epoch is added) with a single write.

        A record whose (kind, step, prompt) exists already is not written but compared; returns the names of the fields
        that differ, none if all is well. The first difference since this file was opened is recorded: kind "diverged".
        Raises OSError, with the file as it was before, when the disk is full.
        """
        return self.append_many([{"kind": kind, **fields}])

    def append_many(self, records: Iterable[Record]) -> list[str]:
        """`append` for several records ({"kind": ..., ...}), none twice, in one write."""
        if os.fstat(self._fd).st_size != self._end["bytes"]:
            self._catch_up()  # Ctrl-C came between the last write and its bookkeeping
        lines: list[bytes] = []
        added: list[tuple[Record, int]] = []
        differing: list[str] = []
        end = self._end
        now = time.time_ns() // 1_000_000
        for fields in records:
            record = {"kind": fields["kind"], "t": now, **fields}
            offset = self._find(record)
            if offset is not None:
                first = self._read(offset)
                names = _differences(first, record)
                differing += names
                if not names or self._told:
                    continue
                self._told = True
                values = {"field": names[0], "first": first.get(names[0]), "again": record.get(names[0])}
                record = {"kind": "diverged", "t": now, "of": record["kind"], "step": record["step"], **values}
            line, crc = _encode(record, end["crc"])
            added.append((record, end["bytes"]))
            lines.append(line)
            end = {"bytes": end["bytes"] + len(line), "crc": crc}
        if lines:
            self._write(b"".join(lines))
            for record, offset in added:
                self._remember(record, offset)
            self._end = end
        return differing

    def sync(self) -> None:
        """Waits until all records are on the disk; called before a checkpoint that counts on them."""
        os.fsync(self._fd)

    def position(self) -> Position:
        """All records up to here, for a checkpoint to remember."""
        return self._end

    def has_position(self, position: Position) -> bool:
        """Whether this journal begins with exactly the records of that position."""
        length = position["bytes"]
        if length == 0 or length > self._end["bytes"]:
            return bool(position == START)
        found = os.pread(self._fd, _SUFFIX + 1, length - _SUFFIX - 1)
        return found == f',"crc":"{position["crc"]}"}}\n'.encode()

    def records(self) -> Iterator[Record]:
        """All records from the first, checked again as they are read."""
        return (record for record, _ in read_records(self.path))

    def records_of(self, kind: str) -> Iterator[Record]:
        """The records of a kind in KEYED that has one record a step, in the order of steps. Reads no others."""
        steps = self._index.get((kind, ""))
        return (self._read(offset) for offset in steps.offsets) if steps else iter(())

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _catch_up(self) -> None:
        """Reads and checks what follows the last known record, and cuts off a line that was not finished."""
        for record, end in read_records(self.path, self._end):
            self._remember(record, self._end["bytes"])
            self._end = end
        if os.fstat(self._fd).st_size > self._end["bytes"]:
            os.ftruncate(self._fd, self._end["bytes"])

    def _write(self, block: bytes) -> None:
        written = os.write(self._fd, block)
        if written < len(block):
            os.ftruncate(self._fd, self._end["bytes"])
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: free some space and start again", str(self.path))

    def _find(self, record: Record) -> int | None:
        if record["kind"] not in KEYED:
            return None
        steps = self._index.get((record["kind"], record.get("prompt", "")))
        return steps.find(record["step"]) if steps else None

    def _remember(self, record: Record, offset: int) -> None:
        if record["kind"] in KEYED:
            steps = self._index.setdefault((record["kind"], record.get("prompt", "")), _Steps())
            if steps.find(record["step"]) is None:
                steps.add(record["step"], offset)

    def _read(self, offset: int) -> Record:
        line = bytearray()
        while not line.endswith(b"\n"):
            # Nearly all records fit one read; a long sample takes some more.
            chunk = os.pread(self._fd, 1024, offset + len(line))
            assert chunk, f"{self.path}: a record that was written is gone"
            line += chunk[: chunk.find(b"\n") + 1 or None]
        record: Record = json.loads(line)
        return record


def _encode(record: Record, previous: str) -> tuple[bytes, str]:
    body = json.dumps(record, separators=(",", ":"))  # ASCII, so one line whatever the text; floats by repr, so exact
    crc = f"{zlib.crc32(body.encode(), int(previous, 16)):08x}"
    return f'{body[:-1]},"crc":"{crc}"}}\n'.encode(), crc


def _checked(line: bytes, previous: str) -> str | None:
    """The chained CRC of a line (without its newline) that follows one with CRC `previous`; None if it does not."""
    crc = f"{zlib.crc32(line[:-_SUFFIX] + b'}', int(previous, 16)):08x}"
    return crc if line[-_SUFFIX:] == f',"crc":"{crc}"}}'.encode() else None


def _differences(first: Record, again: Record) -> list[str]:
    names = [name for name in {**first, **again} if name not in {"t", "crc"}]
    return [name for name in names if json.dumps(first.get(name)) != json.dumps(again.get(name))]


def read_records(path: Path, start: Position = START) -> Iterator[tuple[Record, Position]]:
    """Yields each whole record after `start`, with the position behind it; another process may be writing meanwhile.

    Raises JournalDamaged where the chain breaks, also when `start` is no longer in the file.
    """
    number = 0
    with path.open("rb") as file:
        if start["bytes"]:
            file.seek(max(0, start["bytes"] - _SUFFIX - 1))
            if file.read(_SUFFIX + 1) != f',"crc":"{start["crc"]}"}}\n'.encode():
                raise damaged(path, f"the records up to byte {start['bytes']} are not those read before")
        end = start
        while (line := file.readline()).endswith(b"\n"):
            number += 1
            crc = _checked(line[:-1], end["crc"])
            if crc is None:
                where = f"line {number}" if not start["bytes"] else f"the line at byte {end['bytes']}"
                raise damaged(path, f"{where} is not what was written")
            end = {"bytes": end["bytes"] + len(line), "crc": crc}
            yield json.loads(line), end
    # A kill leaves the beginning of a line. A whole line with something else in place of its newline is damage.
    if line and _checked(line[:-1], end["crc"]) is not None:
        raise damaged(path, f"line {number + 1} does not end as it was written")


def damaged(path: Path, what: str) -> JournalDamaged:
    """The error to raise: `what` is wrong with the journal at `path`."""
    return JournalDamaged(f"{path} is damaged: {what}; delete the run directory {path.parent.parent} to train afresh")


def last_record(path: Path) -> Record | None:
    """The last whole record, read from the end of the file and not checked; None if there is none."""
    try:
        with path.open("rb") as file:
            position, tail = file.seek(0, os.SEEK_END), b""
            while position > 0 and tail.count(b"\n") < 2:
                step = min(position, 1 << 16)
                position -= step
                file.seek(position)
                tail = file.read(step) + tail
                tail = tail[: tail.rfind(b"\n") + 1]
        lines = tail.splitlines()
        record: Record = json.loads(lines[-1])
        return record
    except (FileNotFoundError, IndexError, ValueError):
        return None
