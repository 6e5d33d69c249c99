"""A clone of a commit, in which nothing has been run, without cache and settings of the user's; for `tools verify`."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

# What must not change a bit (docs/reproducibility.md); for the second run of a check.
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


# What of DVC, MLflow, git and Python is set outside belongs to another checkout; a git hook sets GIT_DIR.
_FOREIGN = ("DVC_", "MLFLOW_", "GIT_", "PYTHONPATH", "PYTHONHASHSEED")


class CouldNotRun(ValueError):
    """The check itself failed, so nothing is known of the result."""


class CleanClone:
    def __init__(self, path: Path, varied: bool):
        self.path, self.varied = path, varied

    def run(self, *command: str) -> str:
        """Runs a command to its end; returns what it printed. Raises CouldNotRun, with the end of that, if it fails."""
        nowhere = str(self.path / ".dvc" / "tmp" / "nowhere")
        environment = _own_environment() | {
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
            _end(process)
            raise
        if process.returncode:
            tail = "\n".join(output.splitlines()[-15:])
            raise CouldNotRun(f"`{' '.join(command)}` failed with exit code {process.returncode}:\n{tail}")
        return output

    def repro(self, stage: str) -> float:
        """Runs one stage, surely and not from any cache; returns the seconds that it took."""
        begin = time.monotonic()
        # Without --force DVC would take outs that a committed configuration's cache has for those of dvc.lock.
        self.run("dvc", "repro", "--force", "--no-run-cache", "--single-item", stage)
        return time.monotonic() - begin


def _end(process: "subprocess.Popen[str]") -> None:
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


def _own_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}


@contextmanager
def clean_clone(root: Path, commit: str, varied: bool = False) -> Iterator[CleanClone]:
    """A clone of `root` at that commit, in a temporary folder. Raises CouldNotRun."""
    folder = Path(tempfile.mkdtemp(prefix="verify-"))
    path = folder / ("a clone elsewhere, ü" if varied else "clone")
    try:
        git(folder, "clone", "--quiet", "--no-checkout", str(root), str(path))
        git(path, "fetch", "--quiet", "origin", commit)
        git(path, "checkout", "--quiet", "--detach", commit)
        yield CleanClone(path, varied)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def git(root: Path, *arguments: str) -> str:
    """What a git command prints, without the last newline. Raises CouldNotRun."""
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, env=_own_environment(), capture_output=True, text=True, check=False)
    except OSError as error:
        raise CouldNotRun(f"git cannot be run ({error})") from error
    if done.returncode:
        raise CouldNotRun(f"`{' '.join(command)}` failed: {' '.join(done.stderr.split())}")
    return done.stdout.rstrip("\n")


def read_yaml(text: str, name: str) -> dict[str, Any]:
    try:
        content = YAML(typ="safe").load(text)
    except YAMLError as error:
        raise CouldNotRun(f"{name} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise CouldNotRun(f"{name} is empty")
    return content


def locked_outs(text: str) -> dict[str, dict[str, str]]:
    """Of a dvc.lock: stage -> artifact -> md5. Raises CouldNotRun."""
    stages: Any = read_yaml(text, "dvc.lock").get("stages")
    try:
        return {stage: {out["path"]: out["md5"] for out in entry.get("outs", [])} for stage, entry in stages.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise CouldNotRun("dvc.lock names no stages; `git checkout dvc.lock`, or `dvc repro` and commit it") from error


def stage_names(dvc_yaml: str) -> list[str]:
    """Of a dvc.yaml, in the order in which it lists them."""
    return list(read_yaml(dvc_yaml, "dvc.yaml").get("stages", {}))
