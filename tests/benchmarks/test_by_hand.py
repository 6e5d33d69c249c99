"""Benchmarks that are only run by hand: that they run, and that their figures fit together."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import sharding, sizing, tracking_overhead
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
    shape = dict(zip(sizing.NAMES, sizing.SHAPES[0], strict=True))
    run = sizing.trained(shape, {"numerics.determinism": "off", "numerics.threads": 1}, steps=2)
    assert run.keys() == {"mb", "ms", "predicted_mb", "mfu"}
    assert run["ms"] > 0
    # weights, gradients and two moments of 12 x 16 x 16 + (64 + 8) x 16 + 3 x 16 parameters at the least
    assert run["predicted_mb"] > 4 * 4 * (12 * 256 + 72 * 16 + 48) / 1e6


def test_a_process_that_trains_alone_sends_nothing_and_its_prediction_is_of_the_same_shape(tmp_path: Path) -> None:
    shape = {"size": 1, "vocab_size": 64, "block_size": 8, "layers": 1, "channels": 64, "optimizer": "adamw"}
    sharding.trained(str(tmp_path), **shape)
    found = json.loads((tmp_path / "0.json").read_text())
    held = 16 * (12 * 64**2 + (64 + 8) * 64)  # of the matrices, in weights, gradients and two moments
    assert held < found["held"] < 1.1 * held
    assert (found["sent"], sharding.predict(**shape)["sent"]) == ({}, {})
    assert sharding.predict(**shape)["peak"] > found["held"]
