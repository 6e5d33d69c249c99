"""A full disk, a folder that cannot be written, no more file handles: a clear line, nothing lost, and on it goes."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.pipeline.clones import Clone

pytestmark = pytest.mark.pipeline

ENDS = {"tracking.wait_seconds": 1}  # the tracking process has no handles and no disk either


def failed(output: str, stage: str, told: str) -> None:
    assert re.search(rf"^Error: {stage}: .*{told}", output, re.MULTILINE), output
    assert "Traceback" not in output


def assert_intact_and_goes_on(clone: Clone, seed: Clone, before: dict[str, str]) -> None:
    # The loss curve is kept up to date during a training, for DVC's live plots.
    assert {name: sha256 for name, sha256 in clone.outs().items() if name != "plots/loss.csv"} == before
    assert clone.leftovers() == []
    clone.set_params(**{"tracking.wait_seconds": 60})  # a busy machine takes longer than ENDS allows
    clone.repro()
    assert clone.outs() == seed.outs()
    assert clone.lock() == seed.lock()
    assert {run.info.status for run in clone.runs()} <= {"FINISHED"}


# --- the disk ---------------------------------------------------------------------------------------------------------


SIZES = [("download", 16_000), ("tokenize", 16_000), ("train", 64_000), ("evaluate", 200), ("sample", 200)]


@pytest.mark.parametrize(("stage", "size"), SIZES)
def test_files_cannot_grow(seed: Clone, copy_of: Callable[..., Clone], stage: str, size: int) -> None:
    clone = copy_of(seed)
    clone.set_params(**ENDS)
    clone.forget(stage)
    before = {name: sha256 for name, sha256 in clone.outs().items() if name != "plots/loss.csv"}
    output = clone.run(f"exec prlimit --fsize={size} python -m stages.{stage}", check=1)
    failed(output, stage, "(disk is full|No space left|File too large|log cannot be written)")
    assert_intact_and_goes_on(clone, seed, before)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here; the limit on the size of files stands for it")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_the_disk_is_full(seed: Clone, small_disk: Path) -> None:
    clone = seed.copy(small_disk / "clone", runs=False)
    clone.set_params(**ENDS)
    clone.forget("train")
    before = {name: sha256 for name, sha256 in clone.outs().items() if name != "plots/loss.csv"}
    ballast = small_disk / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small_disk).free - 600_000)
    output = clone.run("python -m stages.train", check=1)
    failed(output, "train", "(disk is full|No space left).*start again")
    clone.end_processes()
    ballast.unlink()
    assert_intact_and_goes_on(clone, seed, before)


# --- permissions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "folder"), [("download", "data"), ("train", ".runs"), ("train", "."), ("sample", ".")]
)
def test_a_folder_cannot_be_written(seed: Clone, copy_of: Callable[..., Clone], stage: str, folder: str) -> None:
    # Root may write anywhere, unless that capability is taken away.
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"] if os.geteuid() == 0 else []
    if drop and subprocess.run([*drop, "true"], capture_output=True).returncode:
        pytest.skip("root's capabilities cannot be dropped here")
    clone = copy_of(seed, runs=False)
    clone.set_params(**ENDS)
    clone.forget(stage)
    before = {name: sha256 for name, sha256 in clone.outs().items() if name != "plots/loss.csv"}
    path = clone.path / folder
    path.mkdir(exist_ok=True)
    mode = path.stat().st_mode
    path.chmod(0o555)
    try:
        output = clone.run(f"exec {' '.join(drop)} python -m stages.{stage}", check=1)
    finally:
        path.chmod(mode)
    failed(output, stage, "(Permission denied|Read-only).*(check)")
    assert_intact_and_goes_on(clone, seed, before)


# --- file handles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [6, 10])
def test_no_more_file_handles(seed: Clone, copy_of: Callable[..., Clone], number: int) -> None:
    clone = copy_of(seed, runs=False)
    clone.set_params(**ENDS)
    clone.forget("train")
    before = {name: sha256 for name, sha256 in clone.outs().items() if name != "plots/loss.csv"}
    output = clone.run(f"ulimit -n {number}; exec python -m stages.train", check=1)
    failed(output, "train", r"Too many open files.*allow more open files \(`ulimit -n`\)")
    clone.end_processes()
    assert_intact_and_goes_on(clone, seed, before)
