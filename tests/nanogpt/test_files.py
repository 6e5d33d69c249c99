import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from nanogpt.files import replacing, write_text
from tests.nanogpt.tiny import contents


def make(kind, path, text):
    """A file with the text, or a directory with such a file and a subdirectory."""
    if kind == "file":
        path.write_text(text)
    else:
        (path / "deep").mkdir(parents=True)
        (path / "a").write_text(text)
        (path / "deep" / "b").write_text(text)


@pytest.fixture(params=["file", "directory"])
def kind(request):
    return request.param


@pytest.fixture
def expected(kind, tmp_path_factory):
    """What the working directory holds when `target` was made with a text."""

    def look(text):
        directory = tmp_path_factory.mktemp("expected")
        make(kind, directory / "target", text)
        return contents(directory)

    return look


@pytest.mark.parametrize("before", [None, "old"])
def test_what_was_written_takes_the_place_and_nothing_else_is_left(kind, before, tmp_path, expected):
    target = tmp_path / "target"
    if before:
        make(kind, target, before)
    with replacing(target) as temporary:
        make(kind, temporary, "new")
        assert target.exists() is (before is not None)
    assert contents(tmp_path) == expected("new")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_exception_the_old_is_untouched_and_nothing_is_left(kind, error, tmp_path, expected):
    make(kind, tmp_path / "target", "old")
    with pytest.raises(error), replacing(tmp_path / "target") as temporary:  # noqa: PT012
        make(kind, temporary, "new")
        raise error
    assert contents(tmp_path) == expected("old")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize(
    "kind_of_error", [OSError, lambda number, text: RuntimeError(f"I/O error (os error {number})")]
)
def test_a_full_disk_is_reported_with_the_path_and_the_remedy(number, kind_of_error, tmp_path):
    told = r"the disk is full; .*target is as it was; free some space"
    with pytest.raises(OSError, match=told), replacing(tmp_path / "target"):
        raise kind_of_error(number, "as the library says it")


def test_another_error_stays_what_it_is(tmp_path):
    with pytest.raises(OSError, match="as it was raised"), replacing(tmp_path / "target"):
        raise OSError(errno.EACCES, "as it was raised")


@pytest.mark.parametrize("error", [OSError("no more inodes"), KeyboardInterrupt()])
def test_if_the_last_rename_fails_the_old_is_still_there(kind, error, tmp_path, expected, monkeypatch):
    make(kind, tmp_path / "target", "old")

    def fail(self, target):
        raise error

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(type(error)), replacing(tmp_path / "target") as temporary:
        make(kind, temporary, "new")
    assert contents(tmp_path) == expected("old")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_everything_is_on_the_disk_before_the_name_changes(kind, tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(Path(f"/proc/self/fd/{fd}").readlink().name) or fsync(fd))
    monkeypatch.setattr(Path, "replace", lambda self, to: events.append("rename") or replace(self, to))
    with replacing(tmp_path / "target") as temporary:
        make(kind, temporary, "new")
    inside = ["target"] if kind == "file" else ["a", "b", "deep", "target"]
    assert events == [*inside, "rename", tmp_path.name]


def test_parents_are_made_and_modes_follow_the_umask_whatever_the_writer_chose(tmp_path):
    old = os.umask(0o027)
    try:
        with replacing(tmp_path / "new" / "target") as temporary:
            make("directory", temporary, "text")
            (temporary / "a").chmod(0o700)
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "new").rglob("*")}
    assert modes == {"target": 0o750, "deep": 0o750, "a": 0o640, "b": 0o640}


def test_text_is_written_as_utf_8_with_the_newlines_given(tmp_path):
    write_text(tmp_path / "text", "é\r\n\n")
    assert (tmp_path / "text").read_bytes() == b"\xc3\xa9\r\n\n"


def test_what_a_killed_process_left_behind_is_removed_by_the_next_that_writes_there(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from nanogpt.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as temporary: temporary.write_text('half'); os.kill(os.getpid(), 9)"
    )
    target, other = tmp_path / "out", tmp_path / "output"
    for path in (target, other):
        killed = subprocess.Popen([sys.executable, "-c", script, str(path)])  # a zombie until somebody waits for it
        while psutil.Process(killed.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
    assert len(list(tmp_path.iterdir())) == 2
    with replacing(target) as mine, replacing(target) as second:  # what is alive is left alone
        mine.write_text("first")
        second.write_text("second")
    assert target.read_text() == "first"
    (leftover,) = [path for path in tmp_path.iterdir() if path != target]
    assert leftover.name.startswith(".output.")
