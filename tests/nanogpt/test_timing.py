from typing import Any

import numpy as np
import pytest

from nanogpt import timing
from nanogpt.timing import WARM_UP, Stopwatch, median_seconds, step_seconds, untrained
from nanogpt.train_state import TrainState
from tests.nanogpt import tiny
from tests.nanogpt.tiny import config, tokens, train_params

PARAMS = tiny.params(train_params())


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


def state() -> TrainState:
    return untrained(config(), PARAMS, tiny.numerics())


def test_it_is_the_loop_that_is_timed(loops: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    text, seen = tokens(100), []
    batches = timing.micro_batches
    monkeypatch.setattr(timing, "micro_batches", lambda *arguments: seen.append(arguments[0]) or batches(*arguments))
    params = tiny.params(train_params(gradient_accumulation_steps=2))
    training = state()
    seconds = step_seconds(training, params, Stopwatch(4), text)
    assert len(seconds) == 4
    assert all(second > 0 for second in seconds)
    assert training.progress.step == WARM_UP + 4
    assert seen[0] is text
    assert len(loops) == 1


def test_the_first_steps_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def train(state: Any, batches: Any, params: Any, evaluator: Any, observers: Any) -> None:
        for step in range(1, 100):
            observers[0].should_stop()
            clock[0] += step
            observers[0].on_steps(state, [])

    monkeypatch.setattr(timing, "train", train)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    assert step_seconds(state(), PARAMS, Stopwatch(5)) == [4, 5, 6, 7, 8]
    assert median_seconds(config(), PARAMS, tiny.numerics(), 5) == 6
    assert step_seconds(state(), PARAMS, Stopwatch(5, budget=15)) == [4, 5]  # 1 + 2 + 3 + 4 + 5 = 15
    assert step_seconds(state(), PARAMS, Stopwatch(5, budget=0)) == [4]
    slow = Stopwatch(5, limit=2.5)
    assert (step_seconds(state(), PARAMS, slow), slow.all_seconds()) == ([], [1, 2, 3])
    assert step_seconds(state(), PARAMS, Stopwatch(5, every=2)) == [2, 2.5, 3, 3.5, 4]


def test_a_report_is_of_so_many_steps(loops: list[tuple[Any, ...]]) -> None:
    training = state()
    assert len(step_seconds(training, PARAMS, Stopwatch(2, every=3))) == 2
    assert training.progress.step == 3 * (WARM_UP + 2)


def test_nothing_is_evaluated_or_saved_on_the_way(loops: list[tuple[Any, ...]]) -> None:
    params = tiny.params(train_params(max_iters=3, warmup_iters=0, eval_interval=1, eval_only=True, patience=1))
    training = state()
    assert len(step_seconds(training, params, Stopwatch(2))) == 2
    assert training.progress.evaluated == -1
    ((_, _, _, evaluator, _),) = loops  # and no checkpoints
    assert evaluator is None


def test_random_tokens_are_of_the_vocabulary_and_always_the_same() -> None:
    found = timing.random_tokens(config())
    assert set(np.unique(found)) == set(range(13))
    assert np.array_equal(found, timing.random_tokens(config()))
