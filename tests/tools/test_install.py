"""The set-up installs the build of torch that fits the machine; stubs replace pip and uv."""

import os
import re
import shutil
import subprocess
import tomllib
from importlib.metadata import metadata, requires
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

TORCH = re.search(r"^torch==.*", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)[0]
INSTALL_UV = "pip install --quiet --constraint constraints.txt uv"
REST = "uv pip install --system-certs --python {python} --quiet --constraint constraints.txt .[dev]"
OFFERED = f"pip install --dry-run --quiet --no-deps {TORCH}"
OF_UV = f"uv pip install --system-certs --python {{python}} --no-deps --torch-backend cpu {TORCH}"
without_gpu = pytest.mark.skipif(
    bool(shutil.which("nvidia-smi") or list(Path("/dev").glob("nvidia*"))) or os.uname().sysname != "Linux",
    reason="this machine has a GPU, or is a Mac",
)


@pytest.fixture
def install(tmp_path):
    """`install(...)`: exit code, output and commands of the set-up where `failing` words make pip and uv fail."""

    def run(
        torch: str = "", gpu: bool = False, installed: str = "", failing: str = "none", extras: str = ""
    ) -> tuple[int, str, list]:
        stub = f'#!/bin/sh\necho "$(basename "$0") $*" >>{tmp_path}/calls\ncase "$*" in *{failing}*) exit 1;; esac\n'
        stubs = {"pip": stub, "uv": stub, "sleep": stub}
        stubs["python"] = f"#!/bin/sh\necho {installed}"
        if gpu:
            stubs["nvidia-smi"] = stub
        for name, text in stubs.items():
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TORCH": torch, "EXTRAS": extras}
        command = [REPOSITORY / "tools" / "install.sh"]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        calls = (tmp_path / "calls").read_text().replace(str(tmp_path / "python"), "{python}")
        return done.returncode, done.stdout + done.stderr, calls.splitlines()

    return run


@without_gpu
def test_without_a_gpu_pips_own_places_are_asked_for_the_cpu_build(install):
    code, output, calls = install()
    assert (code, calls) == (0, [INSTALL_UV, f"{OFFERED}+cpu", f"pip install --no-compile --no-deps {TORCH}+cpu", REST])
    assert 'the build "cpu" (200 MB), as no NVIDIA GPU is found' in output
    assert "0.3 GB to download" in output
    assert "make setup TORCH=default" in output


@without_gpu
def test_if_pip_has_no_cpu_build_uv_gets_it(install):
    code, _, calls = install(failing="+cpu")
    assert (code, calls) == (0, [INSTALL_UV, f"{OFFERED}+cpu", OF_UV, REST])


@without_gpu
def test_if_no_index_has_it_gigabytes_are_announced_before_they_are_taken(install):
    code, output, calls = install(failing="*cpu")
    assert (code, calls) == (0, [INSTALL_UV, f"{OFFERED}+cpu", OF_UV, "sleep 10", REST])
    assert "gigabytes with CUDA, follows in 10 seconds" in output


def test_a_build_that_was_asked_for_is_not_replaced_by_another(install):
    code, output, calls = install(torch="cu126", gpu=True, failing="*cu126")
    assert code == 1
    assert REST not in calls
    assert output.splitlines()[-1].startswith(f"{TORCH}+cu126 cannot be downloaded: set PIP_FIND_LINKS")


def test_with_a_gpu_pip_takes_its_default(install):
    code, output, calls = install(gpu=True)
    assert (code, calls) == (0, [INSTALL_UV, REST])
    assert 'the build "default".' in output


@pytest.mark.parametrize("build", ["cpu", "default"])
def test_a_second_set_up_installs_no_torch_and_announces_nothing(install, build):
    code, output, calls = install(torch=build, installed=f"{TORCH}+cpu")
    assert (code, calls) == (0, [INSTALL_UV, REST])
    assert output == ""


def test_what_uv_cannot_get_pip_gets_with_its_own_configuration(install):
    code, _, calls = install(gpu=True, failing="pip?install")
    assert (code, calls[-1]) == (0, "pip install --quiet --no-compile --constraint constraints.txt .[dev]")


def test_extras_are_those_of_dvc_and_mlflow():
    """A name that DVC or MLflow drops would be ignored by pip, with a warning."""
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    provided = metadata("dvc").get_all("Provides-Extra")
    for name in ("s3", "ssh"):
        assert extras[name][0] == f"dvc[{name}]"
        assert name in provided
    for package, extra in ((extras["s3"][1], "extras"), (extras["postgres"][0], "db")):
        assert f'{package}; extra == "{extra}"' in requires("mlflow")
    assert extras["server"][0].removeprefix("mlflow[").removesuffix("]") in metadata("mlflow").get_all("Provides-Extra")


def test_ci_installs_the_extras_that_its_tests_need(install):
    assert install(extras="dev,s3")[2][-1] == REST.replace("dev", "dev,s3")
