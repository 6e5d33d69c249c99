import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tracking.observers import Profiler

WARM_UP = Profiler.WARM_UP


@pytest.fixture
def loop(tmp_path: Path) -> Callable[..., tuple[int, list[str]]]:
    """`loop(iters, steps)` calls should_stop before each step, as the training does; returns steps done and lines."""

    def run(iters: int, steps: int) -> tuple[int, list[str]]:
        lines: list[str] = []
        done = 0
        with Profiler(steps, tmp_path / "trace.json", lines.append) as profiler:
            while profiler.should_stop() is None and done < iters:
                torch.ones(2, 3) @ torch.ones(3, 4)
                done += 1
        return done, lines

    return run


def products(path: Path) -> int:
    """How many matrix products a trace holds."""
    events = json.loads(path.read_text())["traceEvents"]
    return [event.get("name") for event in events].count("aten::mm")


def test_the_trace_has_the_requested_steps_after_the_warm_up(tmp_path: Path, loop):
    done, lines = loop(WARM_UP + 9, 3)
    assert done == WARM_UP + 9
    assert products(tmp_path / "trace.json") == 3
    line = f"3 steps traced, after 5 for warm-up -> {tmp_path}/trace.json (open it in ui.perfetto.dev)"
    assert lines == [line]
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_a_training_that_ends_before_has_a_shorter_trace(tmp_path: Path, loop):
    _, lines = loop(WARM_UP + 2, 10)
    assert products(tmp_path / "trace.json") == 2
    assert [line.split(",")[0] for line in lines] == ["2 steps traced"]


@pytest.mark.parametrize("iters", [0, 1, WARM_UP])
def test_a_training_that_ends_in_the_warm_up_has_no_trace(tmp_path: Path, loop, iters: int):
    _, lines = loop(iters, 3)
    assert lines == ["no step was traced: the training took no more than the 5 for warm-up"]
    assert list(tmp_path.iterdir()) == []
