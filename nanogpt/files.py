"""Writes files atomically (temporary name, sync, rename), reads them with checks, and hashes them."""

import errno
import glob
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import BaseModel

Model = TypeVar("Model", bound="BaseModel")


class Damaged(ValueError):
    """A file is missing or damaged: its `path`, and `what`, a predicate such as "is cut off".

    The command that restores the file depends on what made it, so tracking/remedies.py adds it.
    """

    def __init__(self, path: Path, what: str):
        super().__init__(path, what)  # needed to unpickle an error from another process
        self.path, self.what = path, what

    def __str__(self) -> str:
        return f"{self.path} {self.what}"


class Missing(ValueError):
    """A file that a parameter names cannot be read; the message names the parameter."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises Damaged in place of an OSError or UnicodeDecodeError in the block."""
    try:
        yield
    except OSError as error:
        raise Damaged(path, f"cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise Damaged(path, "is damaged (it is not UTF-8)") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path; the file or directory that the block writes there replaces `path` at its end.

    An exception leaves `path` unchanged and nothing else behind. A file is replaced atomically; a directory is absent
    for an instant. If the disk is full, the OSError names `path` and the remedy. The leftovers of killed processes are
    removed by the next one that writes to `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    workspace = Path(tempfile.mkdtemp(prefix=f".{path.name}.{os.getpid()}.", suffix=".tmp", dir=path.parent))
    try:
        temporary = workspace / path.name
        yield temporary
        _sync_tree(temporary)
        if path.is_dir() and not path.is_symlink():
            path.rename(workspace / "replaced")
        try:
            temporary.replace(path)
        except BaseException:
            if (workspace / "replaced").exists():
                (workspace / "replaced").rename(path)
            raise
        _sync(path.parent)
    except Exception as error:
        if _disk_is_full(error):
            message = f"the disk is full; {path} is as it was; free some space and start again"
            raise OSError(errno.ENOSPC, message) from error
        raise
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Atomically replaces `path` with the text in UTF-8, newlines unchanged."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Atomically replaces `path` by indented JSON with sorted keys."""
    write_text(path, json.dumps(value, sort_keys=True, indent=1) + "\n")


def _remove_leftovers(path: Path) -> None:
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        owner = leftover.name.removeprefix(f".{path.name}.").partition(".")[0]
        if owner.isdecimal() and not _is_alive(int(owner)):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    import psutil

    try:  # in a container, a process that nobody waits for stays a zombie
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def check_regular(path: Path) -> None:
    """Raises OSError unless `path` is a file or a link to one: reading a pipe may block, and a device may never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def read_bytes(path: Path, largest: int) -> bytes:
    """The content of a regular file. Raises Damaged if it is not one, or has more than `largest` bytes."""
    with reading(path):
        check_regular(path)
        with path.open("rb") as file:
            data = file.read(largest + 1)
        if len(data) > largest:
            raise OSError(errno.EINVAL, f"it is larger than {largest:,} bytes", str(path))
    return data


def read_model(path: Path, model: type[Model], largest: int) -> Model:
    """Reads a JSON file of at most `largest` bytes as a pydantic model. Raises Damaged."""
    from pydantic import ValidationError

    data = read_bytes(path, largest)
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part)[:40] for part in first["loc"])
        problem = " ".join(f"{where}: {first['msg']}".removeprefix(": ").split())
        raise Damaged(path, f"is damaged ({problem})") from error


def reason(error: Exception) -> str:
    """The message of another library's error on one line, shortened."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _disk_is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    # safetensors raises errors of its own, with the number in the text.
    return any(f"(os error {number})" in str(error) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


def _sync_tree(path: Path) -> None:
    if path.is_dir():
        for child in sorted(path.iterdir()):
            _sync_tree(child)
    else:
        # safetensors creates files that only the owner may read; use the same mode for all artifacts.
        path.chmod(0o666 & ~_umask())
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tree(directory: Path) -> str:
    """The hash of the names and contents of all files in a directory."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return sha256_json({path.relative_to(directory).as_posix(): sha256_file(path) for path in files})


def sha256_json(value: Any) -> str:
    """The hash of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
