import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from benchmarks import steps, train_step
from benchmarks.train_step import main
from nanogpt import flops, timing
from nanogpt.timing import WARM_UP, Stopwatch
from nanogpt.train import Stopped
from tests.conftest import GPT2

TINY = GPT2 | {
    "model.n_layer": 1,
    "model.n_head": 2,
    "model.n_embd": 8,
    "model.block_size": 8,
    "train.batch_size": 3,
    "train.gradient_accumulation_steps": 2,
    "train.max_iters": 700,
    "numerics.determinism": "off",  # so that pin comes after torch
    "numerics.threads": 1,
    "runtime.device": "cpu",
    "tokenize.tokenizer": "char",
}
FIGURES = {
    *("tokens_per_second", "ms_per_step", "mfu", "peak_tflops", "peak_memory_mb", "steps", "tokens_per_step"),
    *("parameters", "device", "determinism", "dtype", "compile", "attention"),
}


@pytest.fixture(autouse=True)
def repository(project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(flops, "device_peak", lambda numerics: 1e12)
    return project(**TINY)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["--steps", "2", *arguments])


def figures(*arguments: str) -> dict:
    result = run("--json", "figures.json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(Path("figures.json").read_text())


def test_the_figures_follow_from_the_time_of_a_step() -> None:
    found = figures("--vocab-size", "65")
    assert found.keys() == FIGURES
    assert found["tokens_per_step"] == 3 * 2 * 8
    assert found["tokens_per_second"] == pytest.approx(48 / (found["ms_per_step"] / 1e3))
    # 65 x 8 and 8 x 8 looked up, 12 x 8 x 8 in the block, three LayerNorms of 8
    assert found["parameters"] == 65 * 8 + 8 * 8 + 12 * 64 + 3 * 8
    flops = 6 * (found["parameters"] - 8 * 8) + 12 * 8 * 8
    assert found["mfu"] == pytest.approx(found["tokens_per_second"] * flops / 1e12)
    assert found["peak_memory_mb"] > 50


def test_the_lines_say_what_the_json_says() -> None:
    result = run("--vocab-size", "65", "--json", "figures.json")
    found = json.loads(Path("figures.json").read_text())
    assert f"{'ms_per_step':20} {found['ms_per_step']:,.4g}" in result.output
    assert [line.split()[0] for line in result.output.splitlines()] == [*found]


def test_a_peak_that_is_not_known_makes_no_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "device_peak", lambda numerics: None)
    found = figures("--vocab-size", "65")
    assert (found["mfu"], found["peak_tflops"]) == (None, None)


def test_a_text_brings_its_vocabulary() -> None:
    Path("text.txt").write_text("abcd" * 500)
    found = figures("--text", "text.txt")
    assert found["parameters"] == figures("--vocab-size", "4")["parameters"]
    assert run("--text", "text.txt", "--vocab-size", "4").exit_code == 2


def test_values_are_set_on_top() -> None:
    found = figures("--vocab-size", "65", "-S", "train.batch_size=5", "--set", "numerics.attention=plain")
    assert (found["tokens_per_step"], found["attention"]) == (5 * 2 * 8, "plain")


def test_nanogpt_s_steps_come_between_ours_and_are_not_counted_as_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, taken = [0.0], []

    def their_step(checkout: Path, params: Any, config: Any, device: str) -> Callable[[], torch.Tensor]:
        def step() -> torch.Tensor:
            taken.append(params.train.batch_size)
            clock[0] += 100.0 + len(taken)
            return torch.zeros(())

        return step

    def step_seconds(state: Any, params: Any, stopwatch: Stopwatch, tokens: Any) -> list[float]:
        stopwatch.should_stop()
        with suppress(Stopped):
            while True:
                clock[0] += 10.0
                stopwatch.on_steps(state, [])
        return stopwatch.seconds()

    monkeypatch.setattr(steps, "their_step", their_step)
    monkeypatch.setattr(timing, "step_seconds", step_seconds)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    one = ("--vocab-size", "65", "-S", "train.gradient_accumulation_steps=1", "--nanogpt", ".")
    found = figures("--steps", "3", *one)
    assert found["ms_per_step"] == 10_000
    assert found["nanogpt_ms_per_step"] == 1000 * (100 + WARM_UP + 1)  # the middle one of three
    assert found["times_as_fast"] == (100 + WARM_UP + 1) / 10
    assert taken == [3] * (WARM_UP + 2)  # between two of ours
    assert found["peak_memory_mb"] is None  # nanoGPT's model is in the same process


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "train.gradient_accumulation_steps = 2; give --set train.gradient_accumulation_steps=1 too"),
        ("train.optimizer=muon", "train.optimizer = muon; give --set train.optimizer=adamw too"),
        ("numerics.determinism=portable", "numerics.determinism = portable; give --set numerics.determinism=off too"),
        ("model.norm=rmsnorm", "model.norm = rmsnorm; give --set model.norm=layernorm too"),
        ("model.tie_embeddings=false", "model.tie_embeddings = False; give --set model.tie_embeddings=true too"),
    ],
)
def test_what_nanogpt_does_not_do_is_not_compared_with_it(value: str | None, told: str) -> None:
    changes = ("-S", "train.gradient_accumulation_steps=1", "-S", value) if value else ()
    result = run("--vocab-size", "65", "--nanogpt", ".", *changes)
    assert result.exit_code == 1
    assert told in result.output


def test_a_shape_that_the_source_has_not_is_refused(project: Callable[..., Path]) -> None:
    project(**{**TINY, "model.n_layer": None, "train.init_from": "gpt2"})
    result = run("--vocab-size", "50257")
    assert result.exit_code == 1
    assert "but train.init_from = gpt2 has 12" in result.output


def test_the_trace_is_of_steps_that_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = figures("--vocab-size", "65", "--trace", "trace.json")
    events = json.loads(Path("trace.json").read_text())["traceEvents"]
    optimizer = [event for event in events if event["name"].startswith("Optimizer.step")]
    assert len(optimizer) == train_step.TRACED
    assert found["steps"] == 2
