import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from benchmarks.common import Missed, benchmark, call, forget_peak, measuring, own_peak, row, run, with_params
from nanogpt.params import Params
from tests.conftest import REPOSITORY

# Whoever holds, or has held, much memory: pytest, for one.
LARGE = """
import sys
from pathlib import Path
from benchmarks.common import own_peak, run

b"x" * 400_000_000
print(run([sys.executable, "-c", "print('hello')"], Path.cwd())[1], own_peak())
"""


# --- processes and their memory ---------------------------------------------------------------------------------------


def test_a_process_reports_its_own_memory(tmp_path: Path) -> None:
    small = run([sys.executable, "-c", "print('hello')"], tmp_path)
    large = run(
        [sys.executable, "-c", "import os; x = b'x' * 300_000_000; print(os.environ['A'])"], tmp_path, {"A": "b"}
    )
    assert (small[0], large[0]) == ("hello\n", "b\n")
    assert small[1] < 100_000_000 < 300_000_000 < large[1]


def test_its_memory_does_not_depend_on_who_starts_it() -> None:
    done = subprocess.run([sys.executable, "-c", LARGE], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    started, own = map(int, done.stdout.split())
    assert started < 100_000_000 < 400_000_000 < own


def test_a_process_that_fails_shows_its_last_lines(tmp_path: Path) -> None:
    with pytest.raises(click.ClickException, match=r"exited with 3:\nno such thing"):
        run([sys.executable, "-c", "print('no such thing'); raise SystemExit(3)"], tmp_path)
    with pytest.raises(click.ClickException, match="exited with 137"):
        run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], tmp_path)


def test_a_function_is_called_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    found, peak = call(own_peak)
    assert found == pytest.approx(peak, rel=0.05)
    assert call(row, name="a name of “two” words")[0] == row("a name of “two” words")


def test_a_block_is_measured_with_the_processes_that_it_starts() -> None:
    bytearray(b"x" * 300_000_000).clear()
    with measuring() as spent:
        code = "import time; x = b'x' * 500_000_000; time.sleep(0.5); sum(i * i for i in range(10**6))"
        subprocess.run([sys.executable, "-c", code], check=True)
    assert spent.seconds > 0.5
    assert spent.cpu_seconds > 0.01
    assert spent.peak > 500_000_000


def test_a_peak_begins_anew() -> None:
    bytearray(b"x" * 300_000_000).clear()
    before = own_peak()
    forget_peak()
    assert own_peak() < before - 200_000_000


# --- the command line -------------------------------------------------------------------------------------------------


@benchmark
@with_params()
def timed(params: Params) -> dict[str, Any]:
    """A benchmark."""
    if params.train.seed == 1:
        raise Missed("it took too long", {"seconds": 2})
    return {"seconds": 1}


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(timed, arguments)
    return result.exit_code, result.output


def test_the_figures_are_written_also_where_they_are_not_what_was_asked_for(project: Callable[..., Path]) -> None:
    project()
    assert invoke("--json", "out.json") == (0, "")
    assert json.loads(Path("out.json").read_text()) == {"seconds": 1}
    assert invoke("--json", "out.json", "-S", "train.seed=1") == (1, "Error: it took too long\n")
    assert json.loads(Path("out.json").read_text()) == {"seconds": 2}


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("numerics.dtpye=float32", "numerics.dtpye = 'float32' is not a known parameter; did you mean numerics.dtype?"),
        ("batch_size", "-S batch_size is invalid: write section.key=value"),
        ("train.batch_size=many", "train.batch_size"),
        ("model.n_head=5", "model.n_embd = 96 is not divisible by model.n_head = 5"),
    ],
)
def test_a_value_that_cannot_be_set_is_refused_in_one_line(value: str, told: str, project: Callable[..., Path]) -> None:
    project()
    code, output = invoke("-S", value)
    assert code == 1
    assert told in output
    assert len(output.splitlines()) == 1


def test_a_preset_is_laid_over_the_params(project: Callable[..., Path]) -> None:
    project(**{"model.n_layer": 1, "model.n_embd": 8})
    Path("presets").mkdir()
    Path("presets/deep.yaml").write_text("model: {n_layer: 2}\ntrain: {learning_rate: 3e-5, min_lr: 3e-6}\n")
    Path("presets/wrong.yaml").write_text("model: {layers: 2}\n")
    found: list[Params] = []
    command = benchmark(with_params("deep")(lambda params: found.append(params)))
    for arguments in ([], ["-S", "model.n_embd=16"]):
        assert CliRunner().invoke(command, arguments).exit_code == 0
    assert [(p.model.n_layer, p.model.n_embd, p.train.learning_rate) for p in found] == [(2, 8, 3e-5), (2, 16, 3e-5)]
    assert "presets/wrong.yaml sets model.layers, which" in invoke("--preset", "wrong")[1]
    assert invoke("--preset", "missing") == (1, "Error: there is no preset missing; use one of deep, wrong\n")


def test_the_pages_name_benchmarks_that_there_are() -> None:
    pages = {path: path.read_text() for path in (REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md"))}
    named = {name for text in pages.values() for name in re.findall(r"benchmarks[./](\w+)", text)}
    # A page of a study that names the last commit with its command may have one that is gone.
    of_studies = {
        name
        for text in pages.values()
        if re.search(r"last\s+commit\s+that\s+has", text)
        for name in re.findall(r"benchmarks[./](\w+)", text)
    }
    commands = {path.stem for path in (REPOSITORY / "benchmarks").glob("*.py") if "@benchmark\n" in path.read_text()}
    assert commands <= named <= commands | of_studies
