"""Benchmarks that are only run by hand: that they run, and that their figures fit together."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import tracking_overhead
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
