"""`python -m tools`: its list of commands, its imports, and its handling of errors."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from tools.__main__ import COMMANDS, main

REPOSITORY = Path(__file__).parents[2]
STAGES = ("download", "tokenize", "train", "evaluate", "sample")
SLOW = {"torch", "numpy", "pydantic", "ruamel", "mlflow", "rich", "transformers", "datasets", "tokenizers", "tiktoken"}
TEXTS = {".md", ".py", ".yaml", ".yml"}
MENTION = re.compile(r'-m(?: |", ")tools((?:\.| |", ")[a-z][a-z_-]*)')  # in prose, a shell, or a list of arguments

IMPORTED = """
import atexit, runpy, sys
atexit.register(lambda: print("imported", *sys.modules))
sys.argv = ["tools", *sys.argv[1:]]
runpy.run_module("tools", run_name="__main__")
"""


def module_of(name: str) -> str:
    return f"tools.{name.replace('-', '_')}"


def imported(*arguments: str) -> set[str]:
    """The modules that the command line has imported at its end."""
    command = [sys.executable, "-c", IMPORTED, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.fixture
def size(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], Result]:
    """Runs the command `size`; its first step raises the given error."""

    def run_with(error: BaseException) -> Result:
        def load_params() -> None:
            raise error

        monkeypatch.setattr("nanogpt.params.load_params", load_params)
        return run("size")

    return run_with


# --- the list of commands


def test_the_list_of_commands_waits_for_no_library_and_no_command() -> None:
    found = imported("--help")
    assert "click" in found
    assert not found & SLOW
    assert not found & set(map(module_of, COMMANDS))


def test_a_command_imports_no_other_one() -> None:
    assert imported("sync", "--help") & set(map(module_of, COMMANDS)) == {"tools.sync"}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_says_of_a_command_what_its_docstring_says(name: str) -> None:
    command: click.Command = import_module(module_of(name)).main
    assert command.help is not None
    assert command.help.splitlines()[0] == COMMANDS[name]
    assert f"\n  {name} " in run("--help").output
    assert run(name, "--help").output.startswith(f"Usage: main {name} ")


@pytest.mark.parametrize(("wrong", "near"), [("verfy", "verify"), ("first_steps", "first-steps")])
def test_a_misspelt_command_is_answered_with_the_near_one(wrong: str, near: str) -> None:
    result = run(wrong)
    assert result.exit_code == 2
    assert result.output.endswith(f"Error: No such command '{wrong}'. Did you mean '{near}'?\n")


def test_every_mention_of_a_command_names_one_that_exists() -> None:
    folders = (".github", "benchmarks", "docs", "nanogpt", "presets", "stages", "tests", "tools", "tracking")
    paths = [REPOSITORY / name for name in ("Makefile", "README.md", "params.yaml")]
    paths += [path for folder in folders for path in (REPOSITORY / folder).rglob("*.*") if path.suffix in TEXTS]
    found = {name.lstrip(' ",'): path for path in paths for name in MENTION.findall(path.read_text(encoding="utf-8"))}
    assert not {name: path for name, path in found.items() if name not in COMMANDS}
    assert {"preset", "sync", "summary"} <= found.keys()


def test_a_process_has_the_same_name_exit_code_and_line(tmp_path: Path) -> None:
    """Checks for all tests here that CliRunner sees the same as a shell."""
    command = [sys.executable, "-m", "tools", "size"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: size: params.yaml ")
    assert done.stderr.count("\n") == 1
    done = subprocess.run([*command, "--what"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: python -m tools size [OPTIONS]\n")


# --- errors


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("train.seed = x\n  is no number"), "train.seed = x is no number"),
        (FileNotFoundError(2, "No such file", "a.yaml"), "[Errno 2] No such file: 'a.yaml'"),
        (OSError(28, "the disk is full"), "[Errno 28] the disk is full; free some space and start again"),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    size: Callable[[BaseException], Result], error: Exception, line: str
) -> None:
    result = size(error)
    assert result.exit_code == 1
    assert result.output == f"Error: size: {line}\n"


@pytest.mark.parametrize("error", [RuntimeError("a defect"), KeyError("a"), AssertionError("a")])
def test_a_defect_shows_its_traceback(size: Callable[[BaseException], Result], error: Exception) -> None:
    result = size(error)
    assert result.exception is error  # nobody has caught it, so Python prints it
    assert result.output == ""


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_ctrl_c_ends_with_130(size: Callable[[BaseException], Result], error: BaseException) -> None:
    result = size(error)
    assert result.exit_code == 130
    assert result.output == "size: warning: interrupted\n"


def test_a_wrong_use_ends_with_2() -> None:
    for arguments in ("size --measure --mfu 0.3", "size --what", "verify --varied --layer lock"):
        result = run(*arguments.split())
        assert result.exit_code == 2, arguments
        assert "Error: " in result.output


def test_a_commands_own_exit_code_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tools import verify
    from tracking.verdict import Report

    monkeypatch.setattr(verify, "check", lambda *arguments: Report("lock", "", error="it could not be run"))
    assert run("verify", "--layer", "lock", "--out", str(tmp_path)).exit_code == 2


def test_a_closed_pipe_ends_a_command_silently(
    size: Callable[[BaseException], Result],
) -> None:
    result = size(BrokenPipeError(32, "Broken pipe"))
    assert result.exit_code == 1
    assert result.output == ""


def test_a_module_that_is_run_by_itself_names_its_command() -> None:
    alone = [sys.executable, "-m", module_of("first-steps"), "--help"]
    done = subprocess.run(alone, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "Error: this command is `python -m tools first-steps`\n")


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        *((f"stages/{name}.py", f"python -m stages.{name}") for name in STAGES),
        ("tools", "python -m tools"),
        ("tools/__main__.py", "python -m tools"),
    ],
)
def test_what_is_started_as_a_file_says_how_to_start_it(path: str, remedy: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for place in (REPOSITORY, tmp_path):
        command = [sys.executable, str(REPOSITORY / path), "--help"]
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("Error: ")
        assert done.stderr.endswith(f" with `{remedy}`, in the root of the repository\n")
        assert len(done.stderr.splitlines()) == 1
