"""Files that are there whole or not at all: temporary name, sync, rename; and the errors for those that are not."""

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
    """A file is missing or not what was written: its `path`, and `what`, a predicate such as "is cut off".

    The core knows no more; the command that restores the file depends on what made it (tracking/remedies.py).
    """

    def __init__(self, path: Path, what: str):
        super().__init__(path, what)  # the arguments with which another process's error is rebuilt here
        self.path, self.what = path, what

    def __str__(self) -> str:
        return f"{self.path} {self.what}"


class Missing(ValueError):
    """A file that a parameter names does not exist; the message names the parameter."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an OSError or a UnicodeDecodeError of the block into Damaged."""
    try:
        yield
    except OSError as error:
        raise Damaged(path, f"cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise Damaged(path, "is damaged (it is not UTF-8)") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; when the block ends well, what was written there takes its place.

    A file or a directory. After an exception nothing is left behind and what was at `path` is untouched. A file's
    replacement is atomic; a directory's has an instant in which neither exists. A full disk raises an OSError that
    names `path` and the remedy. What a killed process left behind is removed by the next one that writes there.
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
    """Atomically replaces `path` by UTF-8 text, newlines as given."""
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

    try:  # a zombie is one that nobody waits for, as in a container
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def check_regular(path: Path) -> None:
    """Raises OSError unless there is a file, or a link to one: a pipe would be waited for, a device never ends."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))


def read_bytes(path: Path, largest: int) -> bytes:
    """The whole of a regular file. Raises Damaged if it is none, or has more than `largest` bytes."""
    with reading(path):
        check_regular(path)
        with path.open("rb") as file:
            data = file.read(largest + 1)
        if len(data) > largest:
            raise OSError(errno.EINVAL, f"it is larger than {largest:,} bytes", str(path))
    return data


def read_model(path: Path, model: type[Model], largest: int) -> Model:
    """A JSON file of at most `largest` bytes as a pydantic model. Raises Damaged."""
    from pydantic import ValidationError

    data = read_bytes(path, largest)
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part)[:40] for part in first["loc"])
        problem = " ".join(f"{where}: {first['msg']}".removeprefix(": ").split())
        raise Damaged(path, f"is damaged ({problem})") from error


def _disk_is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    # safetensors' own errors carry no number; these are the same three in its words.
    return any(f"(os error {number})" in str(error) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


def _sync_tree(path: Path) -> None:
    if path.is_dir():
        for child in sorted(path.iterdir()):
            _sync_tree(child)
    else:
        # safetensors creates files that only their owner may read; an artifact's mode must not depend on its writer.
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
    """One hash for a directory: of the names and contents of all its files."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return sha256_json({path.relative_to(directory).as_posix(): sha256_file(path) for path in files})


def sha256_json(value: Any) -> str:
    """Hash of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
