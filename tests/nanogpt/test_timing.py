from typing import Any

import numpy as np
import pytest

from nanogpt import timing
from nanogpt.determinism import Numerics
from nanogpt.timing import WARM_UP, median_seconds, step_seconds
from tests.nanogpt.tiny import config, tokens, train_params

RESOLVED = Numerics("off", 1, "float32", False, "fused", "cpu", "", "", "")


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of each call of the loop, which runs all the same."""
    calls: list[tuple[Any, ...]] = []
    train = timing.train

    def spy(*arguments: Any) -> None:
        calls.append(arguments)
        train(*arguments)

    monkeypatch.setattr(timing, "train", spy)
    return calls


def test_it_is_the_loop_that_is_timed(loops: list[tuple[Any, ...]]) -> None:
    text, done = tokens(100), []
    seconds = step_seconds(
        config(), train_params(gradient_accumulation_steps=2), RESOLVED, 4, text, on_step=done.append
    )
    assert len(seconds) == 4
    assert all(second > 0 for second in seconds)
    assert done == [*range(1, WARM_UP + 5)]
    assert any(argument is text for argument in loops[0])


def test_the_first_steps_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    stamps = [0.0]

    def train(*arguments: Any) -> None:
        on_report = arguments[-3]
        for step in range(1, 100):
            stamps.append(stamps[-1] + step)
            on_report(timing.Progress(step=step))

    monkeypatch.setattr(timing, "train", train)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: stamps[-1])
    assert step_seconds(config(), train_params(), RESOLVED, 5) == [4, 5, 6, 7, 8]
    stamps[:] = [0.0]
    assert median_seconds(config(), train_params(), RESOLVED, 5) == 6
    stamps[:] = [0.0]
    assert step_seconds(config(), train_params(), RESOLVED, 5, budget=15) == [4, 5]  # 1 + 2 + 3 + 4 + 5 = 15
    stamps[:] = [0.0]
    assert step_seconds(config(), train_params(), RESOLVED, 5, budget=0) == [4]


def test_nothing_is_evaluated_or_written_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    save = timing.Checkpoints.save

    def spy(self: Any, *arguments: Any) -> str:
        saved.append(arguments[3].step)
        return save(self, *arguments)

    monkeypatch.setattr(timing.Checkpoints, "save", spy)
    params = train_params(max_iters=3, warmup_iters=0, eval_interval=1, eval_only=True)
    assert len(step_seconds(config(), params, RESOLVED, 2)) == 2
    assert saved == []
    assert len(step_seconds(config(), params, RESOLVED, 2, checkpoint=True)) == 2
    assert saved == [WARM_UP + 2]


def test_random_tokens_are_of_the_vocabulary_and_always_the_same() -> None:
    found = timing.random_tokens(config())
    assert set(np.unique(found)) == set(range(13))
    assert np.array_equal(found, timing.random_tokens(config()))
