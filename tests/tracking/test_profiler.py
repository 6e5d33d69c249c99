import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tracking.profiler import WARM_UP, profiled


@pytest.fixture
def loop(tmp_path: Path) -> Callable[..., tuple[int, list[str]]]:
    """`loop(iters, steps)` asks, as the training loop does, before each step; gives steps done, lines told."""

    def run(iters: int, steps: int, stop_at: int | None = None) -> tuple[int, list[str]]:
        told: list[str] = []
        done = 0
        with profiled(
            lambda: "Ctrl-C" if done == stop_at else None, steps, tmp_path / "trace.json", told.append
        ) as stop:
            while stop() is None and done < iters:
                torch.ones(2, 3) @ torch.ones(3, 4)
                done += 1
        return done, told

    return run


def products(path: Path) -> int:
    """How many matrix products a trace holds."""
    events = json.loads(path.read_text())["traceEvents"]
    return [event.get("name") for event in events].count("aten::mm")


def test_so_many_steps_after_the_warm_up_are_in_the_trace(tmp_path: Path, loop):
    done, told = loop(WARM_UP + 9, 3)
    assert done == WARM_UP + 9
    assert products(tmp_path / "trace.json") == 3
    line = f"3 steps traced, after 5 for warm-up -> {tmp_path}/trace.json (open it in ui.perfetto.dev)"
    assert told == [line]
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_a_training_that_ends_before_has_a_trace_of_what_there_was(tmp_path: Path, loop):
    _, told = loop(WARM_UP + 2, 10)
    assert products(tmp_path / "trace.json") == 2
    assert [line.split(",")[0] for line in told] == ["2 steps traced"]


def test_a_wish_to_stop_comes_through(tmp_path: Path, loop):
    done, told = loop(WARM_UP + 9, 3, stop_at=WARM_UP + 1)
    assert done == WARM_UP + 1
    assert told[0].startswith("1 steps traced")


@pytest.mark.parametrize("iters", [0, 1, WARM_UP])
def test_a_training_that_ends_in_the_warm_up_has_none(tmp_path: Path, loop, iters: int):
    _, told = loop(iters, 3)
    assert told == ["no step was traced, as no more than the 5 for warm-up were taken"]
    assert list(tmp_path.iterdir()) == []


def test_without_it_the_question_is_the_given_one(tmp_path: Path):
    def stop() -> str | None:
        return None

    with profiled(stop, 0, tmp_path / "trace.json", print) as asked:
        assert asked is stop
    assert list(tmp_path.iterdir()) == []
