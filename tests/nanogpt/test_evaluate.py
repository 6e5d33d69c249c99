import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.evaluate import Score, score, spread, windows
from tests.nanogpt import tiny

BLOCK = tiny.SHAPE["block_size"]


@st.composite
def cuts(draw):
    block_size = draw(st.integers(1, 40))
    return draw(st.integers(1, 300)), block_size, draw(st.integers(1, block_size))


@settings(deadline=None, derandomize=True, max_examples=300)
@given(cuts())
def test_windows_score_every_target_once_with_all_the_context_that_was_promised(cut):
    targets, block_size, stride = cut
    found = windows(targets, block_size, stride)
    assert [i for window in found for i in range(window.scored, window.end)] == list(range(targets))
    assert all(0 <= window.begin <= window.scored < window.end <= targets for window in found)
    assert all(window.end - window.begin <= block_size for window in found)
    assert found[0].begin == 0
    assert all(window.scored - window.begin == block_size - stride for window in found[1:])
    assert all(window.end - window.scored == stride for window in found[1:-1])


def stream_of(tokens, first_context):
    head = [] if first_context is None else [first_context]
    return [*head, *tokens.tolist()]


def reference(model, stream, stride):
    """Token by token in float64: the window that scores target i, by counting, and nothing else of the module's."""
    model = copy.deepcopy(model).double().eval()
    nats = []
    for i in range(len(stream) - 1):
        begin = 0 if i < BLOCK else math.ceil((i + 1 - BLOCK) / stride) * stride
        with torch.no_grad():
            logits = model(torch.tensor([stream[begin : i + 1]]))[0, -1]
        nats.append(-F.log_softmax(logits, dim=-1)[stream[i + 1]].item())
    return math.fsum(nats), len(nats)


@pytest.mark.parametrize("first_context", [None, 12])
@pytest.mark.parametrize("stride", [BLOCK, 5, 1])
@pytest.mark.parametrize("number", [2, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 5])
def test_the_score_is_that_of_a_token_by_token_reference(number, stride, first_context):
    model, tokens = tiny.gpt(std=0.2), tiny.tokens(number, seed=1)
    stream = stream_of(tokens, first_context)
    found = score(model, tokens, windows(len(stream) - 1, BLOCK, stride), 3, first_context)
    nats, count = reference(model, stream, stride)
    assert found.tokens == count == len(stream) - 1
    # Float32 against float64: a relative error of 1e-7 in each of a few dozen operations.
    assert found.nats == pytest.approx(nats, rel=2e-6)


def test_chosen_windows_alone_are_scored():
    model, tokens = tiny.gpt(std=0.2), tiny.tokens(50)
    every = windows(49, BLOCK, BLOCK)
    parts = [score(model, tokens, [window], 1) for window in every]
    some = score(model, tokens, [every[4], every[6]], 8)  # the second of them is the short last one
    assert some.tokens == parts[4].tokens + parts[6].tokens == 9
    assert some.nats == pytest.approx(parts[4].nats + parts[6].nats, rel=1e-6)


@pytest.mark.parametrize("stride", [BLOCK, 3])
def test_the_batch_size_does_not_matter(stride):
    model, tokens = tiny.gpt(std=0.2), tiny.tokens(101)
    chosen = windows(100, BLOCK, stride)
    one_by_one = score(model, tokens, chosen, 1)
    for batch_size in (2, 7, 1000):
        batched = score(model, tokens, chosen, batch_size)
        assert batched.tokens == one_by_one.tokens == 100
        assert batched.nats == pytest.approx(one_by_one.nats, rel=1e-6)


def test_a_long_split_is_summed_in_float64():
    model = tiny.gpt(block_size=1, n_layer=1)
    torch.nn.init.zeros_(model.wte.weight)  # logits 0: every token costs ln 13
    found = score(model, tiny.tokens(50_001), windows(50_000, 1, 1), 50_000)
    # A float32 sum of so many equal numbers is wrong by 1e-7, and their own rounding by 3e-8.
    assert found.nats == pytest.approx(50_000 * math.log(13), rel=5e-8)


@pytest.mark.parametrize("training", [True, False])
def test_it_draws_nothing_drops_nothing_and_leaves_the_model_as_it_was(training):
    model, tokens = tiny.gpt(std=0.2, dropout=0.5).train(training), tiny.tokens(30)
    chosen = windows(29, BLOCK, BLOCK)
    torch.manual_seed(1)
    np.random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1]
    found = score(model, tokens, chosen, 2)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert found == score(tiny.gpt(std=0.2, dropout=0.0), tokens, chosen, 2)


def test_each_batch_runs_in_the_given_context_and_windows_are_taken_as_they_are_scored():
    entered, taken = [], []

    class Autocast:
        def __enter__(self):
            entered.append(len(taken))

        def __exit__(self, *error):
            pass

    model, tokens = tiny.gpt(), tiny.tokens(40)
    chosen = (taken.append(window) or window for window in windows(39, BLOCK, BLOCK))
    score(model, tokens, chosen, 2, precision=Autocast())
    assert len(taken) == 5
    assert entered == [3, 5, 5]  # five windows, the last one shorter; a batch ends when the next window is seen


def test_mixed_precision_changes_the_score_a_little():
    model, tokens = tiny.gpt(std=0.2), tiny.tokens(65)
    chosen = windows(64, BLOCK, BLOCK)
    exact = score(model, tokens, chosen, 4)
    half = score(model, tokens, chosen, 4, precision=torch.autocast("cpu", dtype=torch.bfloat16))
    assert half.nats != exact.nats
    assert half.nats == pytest.approx(exact.nats, rel=0.01)


def test_a_spread_is_even_repeats_itself_and_takes_no_window_twice():
    every = windows(1000, BLOCK, BLOCK)
    some = spread(every, 10)
    assert some == spread(every, 10)
    indices = [every.index(window) for window in some]
    gaps = np.diff(indices)
    assert len(some) == 10
    assert indices[0] == 0
    assert set(gaps) <= {12, 13}  # 125 windows
    assert spread(every, 125) == spread(every, 126) == every


def test_perplexity_and_bits_per_byte():
    half = Score(nats=100 * math.log(2), tokens=50)  # 100 bits
    assert half.loss == pytest.approx(2 * math.log(2))
    assert half.perplexity == pytest.approx(4)
    assert half.bits_per_byte(25) == pytest.approx(4)


def test_a_hopeless_model_has_an_infinite_perplexity_and_no_exception():
    assert Score(nats=1e6, tokens=1000).perplexity > 1e300
