"""Runs every command of README.md and docs/ in a clone, with tiny params."""

import re
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.pipeline.clones import Clone, wait_until
from tools.reference import TAG_NOTES

pytestmark = pytest.mark.pipeline

PAGES = ["README.md", *sorted(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "docs").rglob("*.md"))]
MIRROR = REPOSITORY.parent / "shared" / "data"
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
VALUES = re.compile(r"=([^=,\s]+)(,[^=,\s]+)(?:,[^=,\s]+)*")  # of a parameter in a sweep
ELSEWHERE = {  # run by other tests
    "make verify-lock": "test_workflow.py",
    "python -m tools export --format huggingface build/for-transformers": "test_export.py",
    "python -m tools export --format huggingface build/exported": "test_export.py",
}
WITH_NANOGPT = "--nanogpt"  # needs a checkout of nanoGPT, which is not here
STAGES_WITH_TAGS = ("evaluate.", "sample.")  # their parameters, each with a row of its own


def blocks(page: str) -> list[tuple[str, str]]:
    return BLOCK.findall((REPOSITORY / page).read_text(encoding="utf-8"))


def commands(page: str) -> list[str]:
    """The commands of a page; a line that ends with a backslash goes on in the next one."""
    text = "\n".join(text for language, text in blocks(page) if language == "bash").replace("\\\n", " ")
    return [line for line in text.splitlines() if line]


def to_run(page: str) -> list[str]:
    """The commands of a page that its test runs, as it runs them.

    A command of our own, or an experiment, is run for the first page that has it. A sweep has two values of its first
    parameter and one of the others, and but for the README's first one experiments end with their training: evaluate
    and sample do not make them differ.
    """
    known = set(ELSEWHERE)
    for earlier in PAGES[: PAGES.index(page)]:
        known.update(
            command for command in commands(earlier) if command.startswith(("make", "python -m", "dvc exp run"))
        )
    chosen, seen = [], page != "README.md"
    for command in commands(page):
        if command in known or WITH_NANOGPT in command:
            continue
        if "download.source=shakespeare" in command and not (MIRROR / "tinyshakespeare.txt").exists():
            continue
        if swept := VALUES.search(command):
            first, rest = command[: swept.end(2)], command[swept.end() :]
            command = first + VALUES.sub(r"=\1", rest)
        if command.startswith("dvc exp run"):
            command, seen = f"{command} train" if seen else command, True
        chosen.append(command)
    return chosen


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A user's home with a text of their own."""
    line = "It was a bright cold day in April, and the clocks were striking.\n"
    for name, end in (("book.txt", ""), ("texts/book.txt", ""), ("stories.txt", "<|endoftext|>\n")):
        path = tmp_path / "home" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((line + end) * 200)
    return tmp_path / "home"


@pytest.fixture
def clone(seed: Clone, copy_of: Callable[..., Clone]) -> Clone:
    """A clone whose set-up is done: make finds an environment that is newer than what it was made from."""
    clone = copy_of(seed)
    (clone.path / ".venv").mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name != ".ready":
            (clone.path / ".venv" / entry.name).symlink_to(entry)
    (clone.path / ".venv" / ".ready").touch()
    return clone


@pytest.mark.parametrize("page", [page for page in PAGES if to_run(page)])
def test_every_command_works(page: str, clone: Clone, home: Path) -> None:
    """The only test that finds a command of the pages that fails as it stands there."""
    for command in to_run(page):
        variables = {"HOME": str(home), "NANOGPT_MIRROR": str(MIRROR)}
        if command == "make ui":
            check_page(clone)
            continue
        if command.startswith(("dvc", "make queue")):
            variables["WITHOUT_MLFLOW"] = "1"  # the seed's run is there, for the commands that look into MLflow
        clone.run(f"PATH={clone.path}/.venv/bin:$PATH; {command}", timeout=600, **variables)


def check_page(clone: Clone) -> None:
    """`make ui` serves MLflow's page with our experiment."""
    process = clone.start("exec make ui PORT=5057")
    try:
        wait_until(lambda: b"<title>MLflow" in get("/"), "the page", clone)
        body = b'{"max_results": 10}'
        assert b'"nanogpt"' in get("/api/2.0/mlflow/experiments/search", body)
    finally:
        process.terminate()
        clone.end_processes()
        process.communicate()


def get(path: str, body: bytes | None = None) -> bytes:
    request = urllib.request.Request(f"http://127.0.0.1:5057{path}", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            content: bytes = response.read()
            return content
    except OSError:
        return b""


@pytest.mark.parametrize("page", [page for page in PAGES if any(language == "python" for language, _ in blocks(page))])
def test_every_python_example_works(page: str, seed: Clone, copy_of: Callable[..., Clone]) -> None:
    clone = copy_of(seed)
    (published,) = [
        model
        for model in clone.client().search_logged_models([clone.runs()[0].info.experiment_id])
        if model.name == "best"
    ]
    for language, text in blocks(page):
        if language == "python":
            clone.write("example.py", text.replace("<model id>", published.model_id).replace("sunny", "rainy"))
            uri = f"sqlite:///{clone.path}/mlflow.db"
            output = clone.run("python example.py", MLFLOW_TRACKING_URI=uri, PYTHONPATH=str(clone.path))
            assert (
                "One rainy morning" if "sunny" in text else "66244031886"
            ) in output  # a model's text; a law's optimum


def test_the_tests_that_the_readme_names_are_what_ci_runs() -> None:
    script, readme = ((REPOSITORY / name).read_text(encoding="utf-8") for name in (".ci/run", "README.md"))
    for command in ("make test", "make test-pipeline", "make lint"):
        assert command in script
        assert f"`{command}`" in readme


def test_the_reference_names_every_tag_of_a_run(seed: Clone) -> None:
    tags = {tag for run in seed.runs() for tag in run.data.tags if not tag.startswith(("mlflow.", *STAGES_WITH_TAGS))}
    assert tags - TAG_NOTES.keys() == set()
