import math

import pytest
import torch
import torch.nn.functional as F

from nanogpt import loss as loss_module
from nanogpt import model as model_module
from nanogpt.model import GPT, KVCache, RMSNorm, rotate, rotation, without_weights
from tests.nanogpt import tiny

TOKENS = torch.from_numpy(tiny.tokens(3 * 8).reshape(3, 8).astype("int64"))  # (B, T)


@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": False, "zero_init": True, "previous_tokens": 2, "ngrams": 3}]
)
def test_without_weights_there_are_the_same_shapes_and_nothing_is_drawn(changes):
    config, before = tiny.config(**changes), torch.get_rng_state()
    empty = without_weights(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.is_meta for parameter in empty.parameters())
    model = GPT(config)
    shapes = [{name: (p.shape, p.dtype, p.requires_grad) for name, p in m.named_parameters()} for m in (empty, model)]
    assert shapes[0] == shapes[1]
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(TOKENS % 13), model(TOKENS % 13))


# --- parity with Hugging Face -----------------------------------------------------------------------------------------

PARITY = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 50, "bias": True}


@pytest.fixture(scope="module")
def hugging_face():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=4, activation_function="gelu_new")
    return GPT2LMHeadModel(config).eval()


def copy_weights(ours, theirs, to_theirs):
    """Hugging Face's Conv1D holds (in, out), a Linear (out, in)."""
    for name, parameter in ours.named_parameters():
        other = theirs.get_parameter(f"transformer.{name}")
        transposed = parameter.dim() == 2 and name.startswith("h.")
        source, target = (parameter, other) if to_theirs else (other, parameter)
        with torch.no_grad():
            target.copy_(source.T if transposed else source)


@pytest.mark.parametrize("to_theirs", [True, False])
@pytest.mark.parametrize(
    # Relative to the largest logit: float32 rounds to 6e-8, and differently in two orders of the same sums. In float64
    # nothing but a true difference is left.
    ("dtype", "tolerance"),
    [(torch.float32, 2e-6), (torch.float64, 1e-14)],
)
def test_logits_equal_those_of_hugging_face_and_with_the_other_gelu_do_not(hugging_face, to_theirs, dtype, tolerance):
    theirs = hugging_face.to(dtype)
    ours = tiny.gpt(seed=1, std=0.4, activation="gelu_tanh", **PARITY).to(dtype)
    wrong = tiny.gpt(activation="gelu", **PARITY).to(dtype)
    if not to_theirs:
        torch.manual_seed(2)
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    copy_weights(ours, theirs, to_theirs)
    wrong.load_state_dict(ours.state_dict())

    tokens = torch.from_numpy(tiny.tokens(4 * 16, vocab_size=50).reshape(4, 16).astype("int64"))
    with torch.no_grad():
        expected = theirs(tokens).logits
        scale = expected.abs().max().item()
        assert scale > 1  # with weights as small as the initial ones a wrong GELU would pass
        assert (ours(tokens) - expected).abs().max().item() < tolerance * scale
        assert (wrong(tokens) - expected).abs().max().item() > 1e-4 * scale


def test_the_names_are_those_of_gpt2_and_the_head_is_the_embedding(hugging_face):
    theirs = {name.removeprefix("transformer.") for name, _ in hugging_face.named_parameters()}
    assert {name for name, _ in tiny.gpt(**PARITY, activation="gelu_tanh").named_parameters()} == theirs


MODERN = {
    "norm": "rmsnorm",
    "activation": "relu_squared",
    "position": "rotary",
    "qk_norm": True,
    "tie_embeddings": False,
    "previous_tokens": 3,
    "ngrams": 6,
    "embedding_norm": True,
}
OPTIONS = [{}, MODERN, *({name: value} for name, value in MODERN.items())]


# --- one model against itself -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("attention", ["fused", "plain"])
def test_a_token_changes_no_logits_before_it_and_all_from_it_on(options, attention):
    model = tiny.gpt(std=0.2, attention=attention, **options)
    changed = TOKENS.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 13
    with torch.no_grad():
        before, after = model(TOKENS), model(changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] != after[:, 4:]).any(dim=-1).all()


def test_the_position_of_a_token_matters():
    model = tiny.gpt(std=0.2)
    with torch.no_grad():
        logits = model(torch.full((1, 8), 3))[0]
    assert all(not torch.equal(logits[i], logits[i + 1]) for i in range(7))


@pytest.mark.parametrize("prefill", [1, 3, 8])
@pytest.mark.parametrize("options", OPTIONS)
def test_with_a_cache_the_logits_are_those_without(prefill, options):
    model = tiny.gpt(std=0.2, **options)
    cache = KVCache(model.config, 3, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        steps = [TOKENS[:, :prefill], *(TOKENS[:, i : i + 1] for i in range(prefill, 8))]
        cached = torch.cat([model(step, cache=cache) for step in steps], dim=1)
        # The products have other shapes with a cache and so round otherwise.
        torch.testing.assert_close(cached, model(TOKENS)[:, prefill - 1 :], rtol=1e-5, atol=1e-5)
        assert cache.length == 8
        cache.length = 0  # begins anew, and nothing of before is left
        again = model(TOKENS[:, 5:], cache=cache)
        torch.testing.assert_close(again, model(TOKENS[:, 5:])[:, -1:], rtol=1e-5, atol=1e-5)


def test_a_sequence_longer_than_the_context_is_refused():
    model = tiny.gpt()
    with pytest.raises(AssertionError, match="9 tokens do not exceed"):
        model(torch.zeros(1, 9, dtype=torch.long))


def test_a_filled_cache_takes_one_token_at_a_time():
    model = tiny.gpt()
    cache = KVCache(model.config, 1, torch.device("cpu"), torch.float32)
    model(TOKENS[:1, :2], cache=cache)
    with pytest.raises(AssertionError, match="one token at a time"):
        model(TOKENS[:1, 2:4], cache=cache)


def test_with_targets_it_gives_their_mean_cross_entropy():
    model = tiny.gpt(std=0.2)
    targets = TOKENS.roll(1)
    with torch.no_grad():
        log_probabilities = F.log_softmax(model(TOKENS).double(), dim=-1)
        expected = -log_probabilities.gather(-1, targets[..., None]).mean()
        assert model(TOKENS, targets).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_untrained_model_knows_nothing():
    with torch.no_grad():
        assert tiny.gpt()(TOKENS, TOKENS.roll(1)).item() == pytest.approx(math.log(13), abs=0.02)


# --- initial weights --------------------------------------------------------------------------------------------------


def test_initial_weights_are_normal_and_residual_projections_smaller():
    # 64 × 64 numbers and more in each matrix: their standard deviation is known to some 1 %.
    for name, parameter in tiny.gpt(n_layer=8, n_embd=64, block_size=64, vocab_size=100).named_parameters():
        if name.endswith("c_proj.weight"):
            assert parameter.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05), name
        elif parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, float("ln_" in name and "weight" in name))), name


def test_initial_weights_are_a_function_of_the_generator():
    assert tiny.same(tiny.weights(tiny.gpt(seed=3)), tiny.weights(tiny.gpt(seed=3)))
    assert not tiny.same(tiny.weights(tiny.gpt(seed=3)), tiny.weights(tiny.gpt(seed=4)))


# --- options ----------------------------------------------------------------------------------------------------------


def test_without_bias_there_is_none():
    with_bias, without = tiny.gpt(), tiny.gpt(bias=False)
    assert not [name for name, _ in without.named_parameters() if name.endswith("bias")]
    # Per layer 2 C in the norms, 3 C + C in the attention, 4 C + C in the MLP; C in the last norm.
    assert with_bias.parameter_count() - without.parameter_count() == 2 * 11 * 16 + 16


@pytest.mark.parametrize(("size", "multiple", "padded"), [(50257, 64, 50304), (13, 1, 13), (64, 64, 64), (65, 64, 128)])
def test_the_vocabulary_is_padded_to_a_multiple(size, multiple, padded):
    assert tiny.config(vocab_size=size, vocab_multiple=multiple).padded_vocab_size == padded


def test_a_padded_vocabulary_shows_in_the_embedding_and_the_logits():
    model = tiny.gpt(vocab_multiple=16)
    assert model.wte.weight.shape == (16, 16)
    assert model(TOKENS).shape == (3, 8, 16)


def test_dropout_acts_in_training_alone():
    model = tiny.gpt(dropout=0.5)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), tiny.gpt(dropout=0.0)(TOKENS))
        model.train()
        assert not torch.equal(model(TOKENS), model(TOKENS))
        plain = tiny.gpt(dropout=0.0).train()
        assert torch.equal(plain(TOKENS), plain(TOKENS))


def test_dropout_acts_on_embeddings_attention_and_both_residuals(monkeypatch):
    dropped, attended = [], []
    dropout, attention = F.dropout, F.scaled_dot_product_attention
    monkeypatch.setattr(F, "dropout", lambda x, p, training: dropped.append(p * training) or dropout(x, p, training))
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: attended.append(k["dropout_p"]) or attention(*a, **k)
    )
    tiny.gpt(dropout=0.3).train()(TOKENS)
    assert (dropped, attended) == ([0.3] * 5, [0.3] * 2)


# --- what came after GPT-2 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, MODERN])
@pytest.mark.parametrize("length", [1, 5, 8])
def test_attention_written_out_is_the_fused_one(options, length):
    fused, plain = (tiny.gpt(std=0.3, attention=attention, **options) for attention in ("fused", "plain"))
    with torch.no_grad():
        torch.testing.assert_close(plain(TOKENS[:, :length]), fused(TOKENS[:, :length]), rtol=1e-5, atol=1e-5)


def test_rms_norm_divides_by_the_root_of_the_mean_square():
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    expected = x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(RMSNorm()(x), expected)


def test_rotary_positions_turn_each_pair_by_its_own_angle():
    x = torch.randn(1, 1, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned = rotate(x, *rotation(2, 6, 8, torch.device("cpu")))
    for t in range(6):
        for i in range(4):  # as complex numbers: channel i with channel i + 4
            angle = (2 + t) * 10_000 ** (-2 * i / 8)
            expected = complex(x[0, 0, t, i], x[0, 0, t, i + 4]) * complex(math.cos(angle), -math.sin(angle))
            found = complex(turned[0, 0, t, i], turned[0, 0, t, i + 4])
            assert abs(found - expected) < 1e-6


def test_rotary_attention_sees_distances_and_not_places():
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def score(place, other):
        cpu = torch.device("cpu")
        return float((rotate(q, *rotation(place, 1, 8, cpu)) * rotate(k, *rotation(other, 1, 8, cpu))).sum())

    assert score(5, 3) == pytest.approx(score(105, 103), abs=1e-4)
    assert abs(score(5, 3) - score(5, 4)) > 1e-2


def test_qk_norm_makes_attention_blind_to_the_size_of_queries_and_keys():
    model = tiny.gpt(std=0.3, qk_norm=True, bias=False)
    with torch.no_grad():
        before = model(TOKENS)
        for block in model.h:
            block.attn.c_attn.weight[:32] *= 10  # queries and keys
        torch.testing.assert_close(model(TOKENS), before, rtol=1e-3, atol=1e-3)


def test_squared_relu():
    mlp = tiny.gpt(std=0.3, activation="relu_squared").h[0].mlp
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    hidden = F.linear(x, mlp.c_fc.weight, mlp.c_fc.bias)
    hidden = torch.where(hidden > 0, hidden * hidden, 0)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), F.linear(hidden, mlp.c_proj.weight, mlp.c_proj.bias))


def step(model):
    """Loss and gradients, dropout drawn anew."""
    torch.manual_seed(1)
    loss = model(TOKENS, TOKENS.roll(-1, 1))
    loss.backward()
    return {"loss": loss.detach(), **{name: parameter.grad for name, parameter in model.named_parameters()}}


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu_squared"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"bias": False}])
def test_what_is_computed_again_in_the_backward_pass_has_the_same_bits(monkeypatch, activation, dtype, options):
    found = []
    for limit in (2**40, 0):
        monkeypatch.setattr(model_module, "RECOMPUTED", limit)
        model = tiny.gpt(std=0.2, activation=activation, **options).train()
        with torch.autocast("cpu", dtype=getattr(torch, dtype), enabled=dtype != "float32"):
            found.append(step(model))
    assert tiny.same(*found)


def test_it_is_computed_again_in_training_alone(monkeypatch):
    monkeypatch.setattr(model_module, "RECOMPUTED", 0)
    gelu, calls = F.gelu, []
    monkeypatch.setattr(F, "gelu", lambda *arguments, **options: calls.append(1) or gelu(*arguments, **options))
    model = tiny.gpt(std=0.2)
    with torch.no_grad():
        model(TOKENS)
    assert len(calls) == 2  # one a layer
    model(TOKENS, TOKENS).backward()
    assert len(calls) == 2 + 4


SCALAR = {"cpp.simdlen": 0, "cpp.vec_isa_ok": True}  # kernels without SIMD, which compile in half the time


@pytest.mark.parametrize(
    ("compiler", "options"),
    [({"backend": "aot_eager"}, {}), ({"options": SCALAR}, {"attention": "plain", "n_layer": 1, **MODERN})],
    ids=["traced", "compiled"],
)
def test_compiled_it_is_the_same_model(monkeypatch, compiler, options):
    """The only test that finds code of the model that torch.compile cannot trace as one graph or computes wrongly.

    That includes activations that are recomputed and a loss in chunks of at most ten tokens.
    """
    monkeypatch.setattr(model_module, "RECOMPUTED", 0)
    monkeypatch.setattr(loss_module, "CHUNK", 10 * 13)
    model = tiny.gpt(std=0.2, **options)
    expected = step(model)
    model.zero_grad()
    loss = torch.compile(model, fullgraph=True, **compiler)(TOKENS, TOKENS.roll(-1, 1))
    loss.backward()
    torch.testing.assert_close(loss, expected["loss"], rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_an_untied_head_has_weights_of_its_own():
    tied, untied = tiny.gpt(), tiny.gpt(tie_embeddings=False)
    assert untied.parameter_count() - tied.parameter_count() == 13 * 16
    assert untied.head is untied.lm_head.weight
    assert tied.head is tied.wte.weight


def test_with_zero_init_the_first_loss_is_that_of_a_guess_and_gradients_flow():
    torch.manual_seed(0)
    model = GPT(tiny.config(zero_init=True, tie_embeddings=False))
    assert model(TOKENS, TOKENS.roll(-1, 1)).item() == pytest.approx(math.log(13), rel=1e-6)
    assert not model.lm_head.weight.any()
    assert not model.h[1].mlp.c_proj.weight.any()
    model(TOKENS, TOKENS.roll(-1, 1)).backward()
    assert model.lm_head.weight.grad.any()


@pytest.mark.parametrize("length", [1, 2, 3, 8])
def test_embeddings_of_previous_tokens_are_added(length):
    model = tiny.gpt(std=0.3, previous_tokens=3)
    tokens = TOKENS[:, :length]
    expected = model.wte(tokens) + model.wpe.weight[:length]
    for t in range(length):
        for distance in range(1, min(t, 3) + 1):
            expected[:, t] = expected[:, t] + model.previous[distance - 1](tokens[:, t - distance])
    torch.testing.assert_close(model.embed(tokens, 0, None), expected)
