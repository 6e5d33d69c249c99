"""Benchmarks that are only run by hand: that they run, and that their figures fit together."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import checkpoint_stall, sizing, step_memory, tracking_overhead
from benchmarks.text import write_tokens
from nanogpt.params import load_params
from tests.conftest import GPT2

TINY = GPT2 | {
    "model.n_layer": 1,
    "model.n_head": 2,
    "model.n_embd": 8,
    "model.block_size": 8,
    "train.batch_size": 2,
    "train.max_iters": 6,
    "train.warmup_iters": 0,
    "train.eval_interval": 6,
    "train.eval_iters": 1,
    "numerics.determinism": "off",  # so that pin comes after torch
    "numerics.threads": 1,
    "runtime.device": "cpu",
    "runtime.checkpoint_interval": 2,
    "tokenize.tokenizer": "char",
    "tracking.prompts": [],
}


@pytest.fixture(autouse=True)
def repository(project: Callable[..., Path]) -> Path:
    return project(**TINY)


def test_every_checkpoint_is_counted_and_timed() -> None:
    Path("text.txt").write_text("A text of some letters, " * 40)
    write_tokens(Path("text.txt"), load_params(), Path("data"))
    options = ["--steps", "4", "--json", "stall.json"]
    result = CliRunner().invoke(checkpoint_stall.main, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(Path("stall.json").read_text())
    assert (found["steps"], found["checkpoints"]) == (4, 2)
    assert found["share"] == pytest.approx(2 * found["ms_per_checkpoint"] / 1e3 / found["seconds"])
    assert 0 < found["share"] < 1


@pytest.mark.parametrize("steps", ["0", "3", "8"])
def test_steps_that_do_not_end_with_a_checkpoint_are_refused(steps: str) -> None:
    result = CliRunner().invoke(checkpoint_stall.main, ["--steps", steps])
    assert result.exit_code == 2
    assert "give a multiple of runtime.checkpoint_interval = 2 of up to train.max_iters = 6" in result.output


@pytest.mark.parametrize("steps", ["0", "7"])
def test_steps_that_no_training_takes_are_refused(steps: str) -> None:
    result = CliRunner().invoke(tracking_overhead.main, ["--steps", steps])
    assert result.exit_code == 2
    assert f"--steps {steps}: train.max_iters = 6 allows 1 to that many" in result.output


def test_the_processor_s_time_of_a_process_is_told() -> None:
    program = "sum(i * i for i in range(10**6)); print('done', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        assert tracking_overhead.processor_seconds(process) > 0
        process.communicate(b"\n")
    assert tracking_overhead.processor_seconds(None) == 0


def test_a_run_and_its_prediction_are_of_one_shape() -> None:
    shape, numerics = sizing.Shape(1, 16, 1, 8, 64, 1), load_params().numerics
    run = sizing.child("train", shape, numerics, steps=2)
    assert run.keys() == {"mb", "ms", "predicted_mb"}
    assert run["ms"] > 0
    # weights, gradients and two moments of 12 x 16 x 16 + (64 + 8) x 16 + 3 x 16 parameters at the least
    assert run["predicted_mb"] > 4 * 4 * (12 * 256 + 72 * 16 + 48) / 1e6


def test_what_is_told_of_the_peak_is_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_memory, "SHAPE", {"n_layer": 1, "n_head": 2, "n_embd": 8, "bias": True})
    monkeypatch.setattr(step_memory, "VOCABULARY", 64)
    monkeypatch.setattr(step_memory, "THREADS", 1)
    found = step_memory.ours({"batch": 1, "block": 8, "steps": 3})
    assert found["seconds"] > 0
    parts = [value for name, value in found.items() if name.startswith("told activations, ")]
    assert parts
    assert found["told activations"] == pytest.approx(sum(parts))
    assert found["told peak"] > found["told weights"] + found["told moments"]
