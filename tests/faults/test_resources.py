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

FULL = "(disk is full|No space left|File too large|log cannot be written)"


def outs(clone: Clone) -> dict[str, str]:
    """All but the loss curve, which is kept up to date during a training, for DVC's live plots."""
    return {name: sha256 for name, sha256 in clone.outs().items() if name != "plots/loss.csv"}


def fails(clone: Clone, command: str, stage: str, told: str) -> None:
    before = outs(clone)
    output = clone.run(f"{command} python -m stages.{stage}", check=1)
    assert re.search(rf"^Error: {stage}: .*{told}", output, re.MULTILINE), output
    assert "Traceback" not in output
    clone.end_processes()
    assert outs(clone) == before
    assert clone.leftovers() == []


def goes_on(clone: Clone, seed: Clone) -> None:
    clone.repro()
    assert clone.outs() == seed.outs()
    assert clone.lock() == seed.lock()


# --- what takes something away from a stage: that, and what it says then ----------------------------------------------


def file_size(clone: Clone, stage: str, limit: int) -> None:
    fails(clone, f"exec prlimit --fsize={limit}", stage, FULL)


def writing_to(clone: Clone, stage: str, folder: str) -> None:
    # Root may write anywhere, unless that capability is taken away.
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"] if os.geteuid() == 0 else []
    if drop and subprocess.run([*drop, "true"], capture_output=True).returncode:
        pytest.skip("root's capabilities cannot be dropped here")
    path = clone.path / folder
    path.mkdir(exist_ok=True)
    mode = path.stat().st_mode
    path.chmod(0o555)
    try:
        fails(clone, f"exec {' '.join(drop)}", stage, "(Permission denied|Read-only).*(check)")
    finally:
        path.chmod(mode)


def file_handles(clone: Clone, stage: str, limit: int) -> None:
    told = r"Too many open files.*allow more open files \(`ulimit -n`\)"
    fails(clone, f"ulimit -n {limit}; exec", stage, told)


LACKS = {
    "download": [(file_size, 16_000), (writing_to, "data")],
    "tokenize": [(file_size, 16_000)],
    "train": [(writing_to, "."), (writing_to, ".runs"), (file_handles, 6), (file_handles, 10), (file_size, 64_000)],
    "evaluate": [(file_size, 200)],
    "sample": [(file_size, 200), (writing_to, ".")],
}


@pytest.mark.parametrize("stage", LACKS)
def test_a_stage_lacks_something(seed: Clone, copy_of: Callable[..., Clone], stage: str) -> None:
    """The only test that finds a stage that, without it, leaves half an output or says nothing that can be used."""
    clone = copy_of(seed, runs=False, mlflow=False)
    clone.forget(stage)
    for lack, what in LACKS[stage]:
        lack(clone, stage, what)
    goes_on(clone, seed)
    if stage == "train":  # which publishes now what it has trained
        clone.forget(stage)
        file_size(clone, stage, 64_000)
        goes_on(clone, seed)


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
    """The only test that finds a training, or the process that fills MLflow, that loses a run with a full disk."""
    clone = seed.copy(small_disk / "clone", runs=False)
    clone.set_params(**{"tracking.wait_seconds": 1})  # the tracking process has no disk either
    clone.forget("train")
    ballast = small_disk / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small_disk).free - 600_000)
    fails(clone, "exec", "train", "(disk is full|No space left).*start again")
    ballast.unlink()
    clone.set_params(**{"tracking.wait_seconds": 60})  # a busy machine takes longer than that
    goes_on(clone, seed)
    assert {run.info.status for run in clone.runs()} <= {"FINISHED"}
