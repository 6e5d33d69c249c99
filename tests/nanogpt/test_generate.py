import functools
import math

import numpy as np
import pytest
import torch

from nanogpt import seeds
from nanogpt.generate import Decoder, Sampling, choose, generate, uniforms
from nanogpt.huggingface import from_huggingface
from nanogpt.model import GPT, KVCache
from tests.nanogpt import tiny
from tests.nanogpt.test_model import OPTIONS

GREEDY = Sampling(temperature=0.0)
PROMPT = [3, 1, 4]


def talker(**changes):
    """A model whose likeliest token really changes with the context; with biases one token wins everywhere."""
    return tiny.gpt(seed=1, std=0.5, bias=False, **changes)


def grown(model, prompt, number, sampling=GREEDY, samples=1):
    """The new tokens of each sample, (samples, number)."""
    return np.array(list(generate(model, prompt, samples, number, sampling))).T


def plain(model, context):
    with torch.no_grad():
        return model(torch.tensor([context]))[0, -1, : model.config.vocab_size]


def reference(model, prompt, number, pick):
    """Without a cache, by the documented rule: past block_size the older half of the context is dropped."""
    block_size = model.config.block_size
    context, new = prompt[-block_size:], []
    for position in range(number):
        if len(context) > block_size:
            context = context[-math.ceil(block_size / 2) :]
        new.append(pick(plain(model, context), position))
        context = [*context, new[-1]]
    return new


def draw(seed, sample):
    """Inverts the cumulative distribution with the number that belongs to (seed, sample, position)."""

    def pick(logits, position):
        cumulative = torch.softmax(logits.double(), dim=-1).cumsum(dim=-1)
        return int((cumulative <= seeds.uniform(seed, sample, position)[0] * cumulative[-1]).sum())

    return pick


@pytest.mark.parametrize("block_size", [1, 2, 7, 8])
@pytest.mark.parametrize("prompt", [[5], PROMPT, list(range(8)), list(range(13))])
def test_greedy_tokens_are_the_likeliest_of_plain_forward_passes_also_past_the_context(block_size, prompt):
    model = talker(block_size=block_size)
    expected = reference(model, prompt, 30, lambda logits, _: int(logits.argmax()))
    assert grown(model, prompt, 30)[0].tolist() == expected
    assert block_size < 7 or len(set(expected)) > 3


@pytest.mark.parametrize("number", [5, 30])
def test_drawn_tokens_invert_the_distribution_at_the_numbers_of_their_sample_and_position(number):
    model = talker()
    found = grown(model, PROMPT, number, Sampling(seed=7), samples=3)
    for sample in range(3):
        assert found[sample].tolist() == reference(model, PROMPT, number, draw(7, sample))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("attention", ["fused", "plain"])
def test_with_every_option_of_the_model_the_cache_changes_no_token(options, attention):
    model = talker(attention=attention, **options)
    greedy = grown(model, PROMPT, 20, samples=2)  # over the edge of the context, three times
    expected = reference(model, PROMPT, 20, lambda logits, _: int(logits.argmax()))
    assert greedy.tolist() == [expected, expected]
    drawn = grown(model, PROMPT, 20, Sampling(seed=5), samples=2)
    assert drawn.tolist() == [reference(model, PROMPT, 20, draw(5, sample)) for sample in (0, 1)]


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_one_more_token_by_plain_functions_has_the_logits_of_the_modules(samples, options, bias):
    model = tiny.gpt(seed=1, std=0.2, n_embd=64, bias=bias, **options)
    caches = [KVCache(model.config, samples, torch.device("cpu"), torch.float32) for _ in range(2)]
    decoder = Decoder(model, caches[1])
    tokens = torch.from_numpy(tiny.tokens(samples * 8).reshape(samples, 8).astype("int64"))
    with torch.no_grad():
        for cache in caches:
            model(tokens[:, :3], cache=cache)
        for i in range(3, 8):
            expected, found = model(tokens[:, i : i + 1], cache=caches[0]), decoder(tokens[:, i : i + 1])
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert caches[1].length == i + 1


def test_a_matrix_is_copied_by_columns_only_for_one_sample_and_where_that_is_faster(monkeypatch):
    model = tiny.gpt()
    block = model.h[0]

    def by_columns(samples):
        decoder = Decoder(model, KVCache(model.config, samples, torch.device("cpu"), torch.float32))
        products = [
            decoder.product(linear.weight)
            for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        ]
        return [
            isinstance(product, functools.partial) and not product.keywords["weight"].is_contiguous()
            for product in products
        ]

    assert by_columns(1) == [True, False, True, False]
    assert by_columns(2) == [False] * 4
    monkeypatch.setattr("nanogpt.generate.LARGE", 3 * 16 * 16)
    assert by_columns(1) == [True, False, False, False]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_single_sample_of_a_wider_model_too_is_drawn_as_without_a_cache(options):
    model = tiny.gpt(seed=1, std=0.2, bias=False, n_embd=64, **options)
    drawn = grown(model, PROMPT, 20, Sampling(seed=5))  # over the edge of the context, three times
    assert drawn[0].tolist() == reference(model, PROMPT, 20, draw(5, 0))


def test_greedy_tokens_are_those_of_transformers_and_beyond_the_context_those_of_its_forward_passes():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(4)
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=16, vocab_size=13)).eval()
    for name, parameter in theirs.named_parameters():  # with biases one token would win everywhere
        torch.nn.init.normal_(parameter, std=0.0 if name.endswith("bias") else 1.0)
    config, weights = from_huggingface(theirs.config.to_dict(), theirs.state_dict())
    ours = GPT(config)
    ours.load_state_dict(weights)
    found = grown(ours, PROMPT, 40)[0].tolist()

    prompt = torch.tensor([PROMPT])
    with torch.no_grad():
        within = theirs.generate(prompt, max_new_tokens=13, do_sample=False, eos_token_id=None, pad_token_id=0)
        context = list(PROMPT)
        for token in found:
            context = context if len(context) <= 16 else context[-8:]
            assert token == int(theirs(torch.tensor([context])).logits[0, -1].argmax())
            context.append(token)
    assert found[:13] == within[0, 3:].tolist()
    assert len(set(found)) > 3


def test_up_to_the_edge_of_the_context_it_is_nanogpts_cropping_rule():
    model = talker()
    sequence = list(PROMPT)
    for _ in range(6):  # the last token is predicted from a full context
        sequence.append(int(plain(model, sequence[-8:]).argmax()))
    assert grown(model, PROMPT, 6)[0].tolist() == sequence[3:]


def test_of_a_long_prompt_the_end_counts():
    model, prompt = talker(), tiny.tokens(50).tolist()
    assert grown(model, prompt, 20).tolist() == grown(model, prompt[-8:], 20).tolist()


def test_a_sample_does_not_depend_on_how_many_there_are():
    model = talker()
    many = grown(model, PROMPT, 20, Sampling(seed=3), samples=5)
    for number in (1, 2, 4):
        assert grown(model, PROMPT, 20, Sampling(seed=3), samples=number).tolist() == many[:number].tolist()
    assert len({tuple(row) for row in many.tolist()}) == 5


def test_a_longer_text_begins_with_the_shorter_one():
    model = talker()
    long = grown(model, PROMPT, 30, Sampling(seed=3))
    assert grown(model, PROMPT, 11, Sampling(seed=3)).tolist() == long[:, :11].tolist()


def test_the_seed_decides_the_text_and_torchs_generator_neither_matters_nor_moves():
    model = talker()
    torch.manual_seed(1)
    first = grown(model, PROMPT, 20, Sampling(seed=3)).tolist()
    state = torch.get_rng_state()
    assert grown(model, PROMPT, 20, Sampling(seed=3)).tolist() == first
    assert torch.equal(torch.get_rng_state(), state)
    assert grown(model, PROMPT, 20, Sampling(seed=4)).tolist() != first


@pytest.mark.parametrize("training", [True, False])
def test_it_drops_nothing_and_leaves_the_model_as_it_was(training):
    model = talker(dropout=0.5).train(training)
    assert grown(model, PROMPT, 9).tolist() == grown(talker(), PROMPT, 9).tolist()
    assert model.training is training


def test_a_training_model_that_stops_early_at_its_end_of_text_is_still_training():
    model = tiny.gpt(dropout=0.5).train()
    for _ in generate(model, PROMPT, 1, 10, GREEDY):
        break
    assert model.training


def test_padding_of_the_vocabulary_is_never_sampled():
    model = tiny.gpt(std=0.3, vocab_size=5, vocab_multiple=64)
    with torch.no_grad():
        model.wte.weight[5:] *= 100
        assert model(torch.tensor([PROMPT]))[0, -1].argmax() >= 5
    for sampling in (GREEDY, Sampling(), Sampling(top_k=60), Sampling(top_p=0.99), Sampling(temperature=50.0)):
        assert grown(model, PROMPT, 20, sampling, samples=4).max() < 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(top_k=5, top_p=0.9)])
def test_on_a_gpu_it_runs_with_deterministic_algorithms_and_says_the_same(sampling):
    # torch has no deterministic cumulative sum on CUDA and would raise.
    expected = grown(talker(), PROMPT, 30, sampling, samples=2).tolist()
    torch.use_deterministic_algorithms(True)
    try:
        assert grown(talker().to("cuda"), PROMPT, 30, sampling, samples=2).tolist() == expected
    finally:
        torch.use_deterministic_algorithms(False)


def test_numbers_drawn_ahead_are_those_of_their_positions():
    found = torch.stack(list(uniforms(3, 2, 300)))
    assert found.shape == (300, 2)
    for position in (0, 255, 256, 299):
        assert found[position].tolist() == [seeds.uniform(3, sample, position)[0] for sample in (0, 1)]


# --- one token --------------------------------------------------------------------------------------------------------

PROBABILITIES = [0.05, 0.4, 0.15, 0.3, 0.1]
DRAWS = 20_000
# Chi-square of at most four degrees of freedom: above 23.5 once in 10,000 times, and the draws are always the same.
UNLIKELY = 23.5


def drawn(sampling, probabilities=PROBABILITIES, seed=11):
    """How often each token is chosen in DRAWS draws."""
    logits = torch.tensor(probabilities).log().expand(DRAWS, -1)
    uniform = torch.from_numpy(seeds.uniform(seed, np.arange(DRAWS)))
    return np.bincount(choose(logits, uniform, sampling).flatten(), minlength=len(probabilities))


def chi_square(counts, expected):
    expected = np.array(expected) / sum(expected) * DRAWS
    possible = expected > 0
    assert counts[~possible].sum() == 0
    return ((counts - expected)[possible] ** 2 / expected[possible]).sum()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), PROBABILITIES),
        (Sampling(temperature=2.0), np.sqrt(PROBABILITIES)),
        (Sampling(temperature=0.5), np.square(PROBABILITIES)),
        (Sampling(top_k=2), [0, 0.4, 0, 0.3, 0]),
        (Sampling(top_k=99), PROBABILITIES),
        (Sampling(top_p=0.69), [0, 0.4, 0, 0.3, 0]),
        (Sampling(top_p=0.71), [0, 0.4, 0.15, 0.3, 0]),
        (Sampling(top_p=1.0), PROBABILITIES),
        (Sampling(top_k=3, top_p=0.5), [0, 0.4, 0, 0.3, 0]),  # of what top_k left, 0.4 is 47 %
        (Sampling(temperature=0.5, top_k=3), [0, 0.16, 0.0225, 0.09, 0]),
    ],
)
def test_draws_follow_the_distribution(sampling, expected):
    counts = drawn(sampling)
    assert chi_square(counts, expected) < UNLIKELY
    slightly_wrong = np.array(expected) * [1, 1.06, 1, 1, 1]
    assert chi_square(counts, slightly_wrong) > UNLIKELY


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(top_k=1), Sampling(top_p=1e-9)])
def test_the_narrowest_settings_all_take_the_likeliest(sampling):
    assert drawn(sampling).tolist() == [0, DRAWS, 0, 0, 0]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-40, 1e-320])
def test_the_colder_the_closer_to_the_likeliest_down_to_the_smallest_number(temperature):
    assert drawn(Sampling(temperature=temperature)).tolist() == [0, DRAWS, 0, 0, 0]


def test_an_impossible_token_is_not_drawn_at_either_end_of_the_unit_interval():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]]).expand(2, -1)
    uniform = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    assert choose(logits, uniform, Sampling()).flatten().tolist() == [1, 3]
