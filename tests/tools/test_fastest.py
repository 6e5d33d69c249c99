import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nanogpt import timing
from nanogpt.params import load_params
from tests.conftest import BUILT_IN, REPOSITORY
from tools import fastest
from tools.__main__ import main
from tools.fastest import CHARACTERS, Row, Timed, candidates, in_a_process, training_seconds

TINY = {
    "model.n_layer": 1,
    "model.n_head": 2,
    "model.n_embd": 8,
    "model.block_size": 8,
    "train.batch_size": 3,
    "train.gradient_accumulation_steps": 2,
    "numerics.threads": 1,
    "runtime.device": "cpu",
}


@pytest.fixture
def off(project: Callable[..., Path]) -> Path:
    return project(**TINY, **{"numerics.determinism": "off"})


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[Any, ...], Timed | str]:
    """What each candidate's process reports, filled by a test; the limits it was given are under "limits"."""
    table: dict[Any, Any] = {"limits": []}

    def stand_in(settings: dict[str, Any], params: Any, seconds: float, limit: float) -> Row:
        table["limits"].append(limit)
        timed = table.get(tuple(settings.values()), Timed(1.0, 0.0, False))
        return Row(settings, timed) if isinstance(timed, Timed) else Row(settings, None, timed)

    monkeypatch.setattr(fastest, "in_a_process", stand_in)
    monkeypatch.setattr(fastest, "is_emulated", lambda dtype: False)
    return table


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["fastest", *arguments])


# --- candidates -------------------------------------------------------------------------------------------------------


def test_portable_leaves_the_attention_to_be_compared(project: Callable[..., Path]) -> None:
    project(**TINY)
    found = [tuple(settings.values()) for settings, _ in candidates(load_params())]
    assert found == [("float32", False, "fused"), ("float32", False, "plain")]


def test_off_leaves_all_and_the_eager_ones_come_first(off: Path) -> None:
    found = list(candidates(load_params()))
    assert len({tuple(settings.values()) for settings, _ in found}) == 3 * 2 * 2
    assert [settings["compile"] for settings, _ in found] == [False] * 6 + [True] * 6
    for settings, params in found:
        assert {key: getattr(params.numerics, key) for key in settings} == settings
        assert params.train == load_params().train


# --- the choice -------------------------------------------------------------------------------------------------------


def test_the_training_that_ends_first_is_chosen_compilation_included(off: Path, times: dict[Any, Any]) -> None:
    steps = load_params().train.max_iters * 2  # micro-batches
    times["float32", False, "plain"] = Timed(0.9, 0.0, False)
    times["float32", True, "fused"] = Timed(0.8, 0.15 * steps, False)  # compiles for longer than it saves
    assert "numerics.dtype: float32, numerics.compile: false, numerics.attention: plain" in run().output
    times["float32", True, "fused"] = Timed(0.8, 0.05 * steps, False)
    assert "numerics.dtype: float32, numerics.compile: true, numerics.attention: fused" in run().output


def test_micro_batches_are_those_of_one_process(project: Callable[..., Path]) -> None:
    project(**{**TINY, "train.gradient_accumulation_steps": 6, "train.processes": 2, "train.max_iters": 100})
    assert training_seconds(Timed(0.5, 7.0, False), load_params()) == 7 + 100 * 3 * 0.5


def test_what_is_far_behind_is_not_compiled_and_not_chosen(off: Path, times: dict[Any, Any]) -> None:
    times["bfloat16", False, "fused"] = Timed(0.01, 0.0, True)  # even if its last step was a fast one
    result = run("--json", "out.json")
    assert "numerics.dtype: float32" in result.output.splitlines()[-1]
    rows = {tuple(row["settings"].values()): row for row in json.loads(Path("out.json").read_text())}
    assert rows["bfloat16", True, "fused"]["note"] == "skipped: far behind without compilation"
    assert rows["bfloat16", True, "plain"]["timed"]
    assert "far behind" in next(row for row in result.output.splitlines() if row.startswith("bfloat16"))


@pytest.mark.parametrize(("device", "left_out"), [("cpu", 4), ("mps", 0)])
def test_a_dtype_without_instructions_is_not_tried_on_a_cpu(
    device: str, left_out: int, project: Callable[..., Path], times: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    project(**{**TINY, "numerics.determinism": "off", "runtime.device": device})
    monkeypatch.setattr(fastest, "is_emulated", lambda dtype: dtype == "bfloat16")
    output = run().output.splitlines()
    assert len(times["limits"]) == 12 - left_out
    skipped = [line for line in output if line.endswith("skipped: this CPU has no instructions for it")]
    assert len(skipped) == left_out
    assert all(line.startswith("bfloat16") for line in skipped)


def test_the_limit_follows_from_the_fastest_step_so_far(off: Path, times: dict[Any, Any]) -> None:
    times["float32", False, "plain"] = Timed(0.5, 0.0, False)
    run()
    assert times["limits"] == [float("inf"), 3.0] + [1.5] * 10


def test_a_candidate_that_fails_is_reported_and_the_others_go_on(off: Path, times: dict[Any, Any]) -> None:
    times["float32", True, "fused"] = "failed: no C++ compiler"
    result = run("--write")
    assert result.exit_code == 0, result.output
    assert "float32   true     fused        failed: no C++ compiler" in result.output.splitlines()


def test_if_nothing_can_be_timed_nothing_is_written(off: Path, times: dict[Any, Any]) -> None:
    before = Path("params.yaml").read_bytes()
    for settings, _ in candidates(load_params()):
        times[tuple(settings.values())] = "failed: out of memory"
    result = run("--write")
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == "Error: fastest: no candidate could be timed (failed: out of memory)"
    assert Path("params.yaml").read_bytes() == before


# --- params.yaml ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("determinism", ["machine", "off"])
def test_the_fastest_is_written_and_comments_stay(
    determinism: str, off: Path, times: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = BUILT_IN.read_text().replace("determinism: portable ", f"determinism: {determinism} ")
    Path("params.yaml").write_text(text)
    times["bfloat16", True, "plain"] = Timed(0.1, 1.0, False)
    result = run("--write")
    assert result.exit_code == 0, result.output
    before, after = text.splitlines(), Path("params.yaml").read_text().splitlines()
    changed = {line.split("#")[0].strip() for line in set(after) - set(before)}
    assert changed == {"dtype: bfloat16", "compile: true", "attention: plain"}
    assert [line.partition("#")[2] for line in after] == [line.partition("#")[2] for line in before]
    assert "  numerics.dtype: float32 -> bfloat16" in result.output.splitlines()
    assert load_params().numerics.dtype == "bfloat16"
    assert run("--write").output.splitlines()[-1] == "params.yaml has these values already"


def test_without_write_nothing_is_written(off: Path, times: dict[Any, Any]) -> None:
    before = Path("params.yaml").read_bytes()
    times["bfloat16", True, "plain"] = Timed(0.1, 1.0, False)
    assert run().exit_code == 0
    assert Path("params.yaml").read_bytes() == before


def test_portable_is_not_written_over(project: Callable[..., Path], times: dict[Any, Any]) -> None:
    project(**TINY)
    result = run("--write")
    assert result.exit_code == 1
    assert result.output.startswith("Error: fastest: numerics.determinism = portable needs")
    assert len(result.output.splitlines()) == 1
    assert times["limits"] == []
    assert run().exit_code == 0


# --- a candidate ------------------------------------------------------------------------------------------------------


def test_a_process_of_its_own_takes_steps_of_the_model(off: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    row = in_a_process({"dtype": "float32"}, load_params(), 300, float("inf"))
    assert row.timed, row.note
    assert row.timed.step > 0
    assert (row.timed.compiling, row.timed.given_up) == (0.0, False)


def test_one_that_does_not_end_is_killed_with_all_it_started(off: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    popen, pids = subprocess.Popen, []
    endless = (
        "import subprocess, time; p = subprocess.Popen(['sleep', '1000']); print(p.pid, flush=True); time.sleep(1000)"
    )

    def started(command: list[str], **options: Any) -> Any:
        process = popen([sys.executable, "-c", endless], **options)
        pids.append(int(process.stdout.readline()))
        return process

    monkeypatch.setattr(subprocess, "Popen", started)
    row = in_a_process({}, load_params(), 0.1, 1.0)
    assert (row.timed, row.note) == (None, "not finished in 0.1 s (--seconds)")
    for _ in range(1000):
        if not alive(pids[0]):
            break
        time.sleep(0.01)
    assert not alive(pids[0])


def alive(pid: int) -> bool:
    """Whether the process runs, and is not a zombie."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_one_that_fails_shows_its_last_line(off: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    popen = subprocess.Popen
    failing = "raise SystemExit('a traceback\\nno C++ compiler')"
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **options: popen([sys.executable, "-c", failing], **options)
    )
    assert in_a_process({}, load_params(), 60, 1.0) == Row({}, None, "failed: no C++ compiler")


@pytest.mark.parametrize(
    ("stamps", "limit", "expected"),
    [
        ([9.0, 1.0, 1.0, 1.0, 1.0, 1.0], 2.0, Timed(1.0, 0.0, False)),
        ([9.0, 3.0], 2.0, Timed(3.0, 0.0, True)),  # the first step is for free
        ([1.0, 1.0, 1.0, 1.0, 5.0], 2.0, Timed(3.0, 0.0, True)),
    ],
)
def test_it_gives_up_at_the_first_step_that_is_too_slow(
    stamps: list[float], limit: float, expected: Timed, off: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    def train(state: Any, batches: Any, params: Any, evaluator: Any, observers: Any) -> None:
        assert params.train.gradient_accumulation_steps == 1
        for seconds in stamps:
            observers[0].should_stop()
            clock[0] += seconds
            observers[0].on_steps(state, [])

    monkeypatch.setattr(fastest, "STEPS", len(stamps) - timing.WARM_UP)
    monkeypatch.setattr(timing, "train", train)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    assert fastest.measure(load_params(), limit) == expected


def test_characters_that_were_not_counted_are_assumed(project: Callable[..., Path]) -> None:
    project(**{"tokenize.tokenizer": "char"})
    assert fastest.approximate_vocabulary(load_params().tokenize) == CHARACTERS
    project(**{"tokenize.tokenizer": "gpt2"})
    assert fastest.approximate_vocabulary(load_params().tokenize) == 50_257
