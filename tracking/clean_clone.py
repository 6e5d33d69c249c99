"""A fresh clone of a commit, without cache and without the user's settings; for `tools verify`."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tracking import git

# What must not change a bit (docs/reproducibility.md): the environment of a varied run.
VARIED = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "AUTO",
    "OMP_DYNAMIC": "TRUE",
    "OMP_THREAD_LIMIT": "1",
    "OMP_NUM_THREADS": "3",
    "LANG": "C",
    "LC_ALL": "C",
    "TZ": "Asia/Tokyo",
    "PYTHONHASHSEED": "7",
}
_FOREIGN = ("DVC_", "MLFLOW_", "PYTHONPATH", "PYTHONHASHSEED")  # variables that belong to another checkout


class CouldNotRun(ValueError):
    """The check itself failed, so the result is unknown."""


class CleanClone:
    def __init__(self, path: Path, varied: bool):
        self.path, self.varied = path, varied

    def run(self, *command: str) -> str:
        """Runs a command and returns its output. Raises CouldNotRun, with the end of the output, if it fails."""
        nowhere = str(self.path / ".dvc" / "tmp" / "nowhere")
        inherited = {name: value for name, value in git.environment().items() if not name.startswith(_FOREIGN)}
        environment = inherited | {
            "DVC_NO_ANALYTICS": "1",
            "DVC_GLOBAL_CONFIG_DIR": nowhere,
            "DVC_SYSTEM_CONFIG_DIR": nowhere,
            "DVC_SITE_CACHE_DIR": nowhere,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            **(VARIED if self.varied else {}),
        }
        process = subprocess.Popen(
            command, cwd=self.path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if self.varied and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(process.pid, {min(os.sched_getaffinity(0))})
        try:
            output, _ = process.communicate()
        except BaseException:
            _kill(process)
            raise
        if process.returncode:
            tail = "\n".join(output.splitlines()[-15:])
            raise CouldNotRun(f"`{' '.join(command)}` failed with exit code {process.returncode}:\n{tail}")
        return output

    def repro(self, *stages: str) -> float:
        """Runs stages in that order, without any cache; returns the seconds that they took."""
        begin = time.monotonic()
        # --force, since the cache of a committed configuration could provide the outs of dvc.lock.
        self.run("dvc", "repro", "--force", "--no-run-cache", "--single-item", *stages)
        return time.monotonic() - begin


def _kill(process: "subprocess.Popen[str]") -> None:
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


@contextmanager
def clean_clone(root: Path, commit: str, varied: bool = False) -> Iterator[CleanClone]:
    """Clones the commit of the repository `root` into a temporary folder. Raises GitError."""
    folder = Path(tempfile.mkdtemp(prefix="verify-"))
    path = folder / ("a clone elsewhere, ü" if varied else "clone")
    try:
        git.git(folder, "clone", "--quiet", "--no-checkout", str(root), str(path))
        git.git(path, "fetch", "--quiet", "origin", commit)
        git.git(path, "checkout", "--quiet", "--detach", commit)
        yield CleanClone(path, varied)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
