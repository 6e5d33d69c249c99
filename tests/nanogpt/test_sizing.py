import itertools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nanogpt import flops, loss, model, sizing
from nanogpt.checkpoint import Checkpoints
from nanogpt.model import GPT
from nanogpt.optimizer import make_optimizer
from nanogpt.train_state import TrainState
from tests.nanogpt.tiny import config, train_params

WIDE = config(n_layer=3, n_head=4, n_embd=64, block_size=32, vocab_size=257)


def gpt2(n_layer, n_head, n_embd, **changes):
    return config(
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        block_size=1024,
        vocab_size=50257,
        activation="gelu_tanh",
        **changes,
    )


def parameter_count(shape):
    with torch.device("meta"):
        return GPT(shape).parameter_count()


# --- parameters and FLOPs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bias", "multiple", "n_layer", "vocab_size", "block_size"),
    [*itertools.product((True, False), (1, 64), (1, 5), (13, 257), (8, 100))],
)
def test_parameters_are_those_of_the_model(bias, multiple, n_layer, vocab_size, block_size):
    sizes = {"n_layer": n_layer, "vocab_size": vocab_size, "block_size": block_size}
    for ngrams in (1, 3):
        shape = config(bias=bias, vocab_multiple=multiple, ngrams=ngrams, ngram_rows=70, **sizes)
        assert sum(sizing.parameters(shape).values()) == parameter_count(shape)


def test_parameters_by_part_are_those_of_the_model_s_modules():
    shape = config(n_layer=3)
    model, part = GPT(shape), sizing.parameters(shape)
    count = {
        "token_embedding": [model.wte],
        "positions": [model.wpe],
        "attention": [block.attn for block in model.h],
        "mlp": [block.mlp for block in model.h],
        "norms": [model.ln_f, *(norm for block in model.h for norm in (block.ln_1, block.ln_2))],
    }
    for name, modules in count.items():
        assert part[name] == sum(p.numel() for module in modules for p in module.parameters()), name
    per_layer = sizing.parameters_per_layer(shape)
    assert sum(per_layer.values()) == sum(p.numel() for p in model.h[0].parameters())


@pytest.mark.parametrize("multiple", [1, 64])
@pytest.mark.parametrize("recomputed", [False, True])  # which repeats no product
def test_flops_are_what_torch_counts(monkeypatch, recomputed, multiple):
    monkeypatch.setattr(model, "RECOMPUTED", 0 if recomputed else 2**40)
    shape = config(n_layer=3, n_embd=32, vocab_multiple=multiple)
    gpt, batch = GPT(shape), 5
    tokens = torch.zeros(batch, shape.block_size, dtype=torch.long)
    per_token = sum(sizing.forward_flops(shape).values())
    # The fused kernel of a CPU has no formula in torch's counter; the products one by one have.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            value = gpt(tokens, tokens)
        with FlopCounterMode(display=False) as backward:
            value.backward()
    assert forward.get_total_flops() == per_token * tokens.numel()
    assert backward.get_total_flops() == 2 * per_token * tokens.numel()


def test_a_table_that_is_only_looked_up_takes_no_flops():
    with_table = config(ngrams=3, ngram_rows=70)
    assert sizing.palm_flops(with_table) == sizing.palm_flops(config())


def test_nanogpt_s_figure_differs_by_norms_and_biases_alone():
    for bias in (True, False):
        shape = config(n_layer=3, bias=bias)
        vectors = sum(p.numel() for p in GPT(shape).parameters() if p.dim() == 1)
        expected = 3 * sum(sizing.forward_flops(shape).values()) + 6 * vectors
        assert sizing.palm_flops(shape) == expected == flops.flops_per_token(shape, parameter_count(shape))


# --- memory -----------------------------------------------------------------------------------------------------------


def saved_bytes(model, batch, dtype):
    """Bytes of all storages that autograd saves, except those of parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    tokens = torch.zeros(batch, model.config.block_size, dtype=torch.long)
    precision = torch.autocast("cpu", dtype=getattr(torch, dtype), enabled=dtype != "float32")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), precision:
        model(tokens, tokens.clone())
    return sum(size for size, _ in saved.values())


@pytest.mark.parametrize(
    ("dtype", "dropout", "bias", "activation"),
    [*itertools.product(("float32", "bfloat16"), (0.0, 0.1), (True, False), ("gelu", "gelu_tanh"))],
)
@pytest.mark.parametrize("shape", [config(), WIDE, config(ngrams=4, ngram_rows=50)], ids=["narrow", "wide", "ngrams"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_activations_are_what_autograd_saves(monkeypatch, recomputed, shape, dtype, dropout, bias, activation):
    monkeypatch.setattr(model, "RECOMPUTED", 0 if recomputed else 2**40)
    shape = config(**{**vars(shape), "dropout": dropout, "bias": bias, "activation": activation})
    part = sizing.memory(shape, sizing.Setup(3, False, dtype))
    weight_of_loss = 4  # a number that cross_entropy keeps
    assert part["activations"] + part["autocast"] + weight_of_loss == saved_bytes(GPT(shape), 3, dtype)


def test_attention_that_is_not_fused_keeps_a_matrix_per_head():
    with sdpa_kernel(SDPBackend.MATH):
        kept = saved_bytes(GPT(WIDE), 3, "float32")
    setup = sizing.Setup(3, False, "float32", "cuda", "machine")
    assert sum(sizing.activations(WIDE, setup).values()) + 4 == kept


@pytest.mark.parametrize(
    ("device", "dtype", "determinism", "dropout", "fused"),
    [
        ("cpu", "float32", "portable", 0.0, True),
        ("cpu", "float32", "off", 0.1, False),
        ("cuda", "bfloat16", "machine", 0.1, True),
        ("cuda", "float32", "machine", 0.0, False),
        ("cuda", "float32", "off", 0.0, True),
        ("mps", "float32", "off", 0.0, False),
    ],
)
def test_where_attention_is_fused(device, dtype, determinism, dropout, fused):
    assert sizing.Setup(1, False, dtype, device, determinism).fused(dropout) is fused


def peak_of_a_step(shape, batch, micro_steps):
    """The most bytes that the CPU allocator had given out during a second training step, parameters included."""
    model = GPT(shape)
    optimizer = make_optimizer(model, train_params(), "cpu", "float32")
    tokens = torch.zeros(batch, shape.block_size, dtype=torch.long)

    def step():
        for _ in range(micro_steps):
            model(tokens, tokens.clone()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    held = highest = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest + 3 * 4 * model.parameter_count()


@pytest.mark.parametrize("micro_steps", [1, 2])
@pytest.mark.parametrize(
    ("what", "shape", "batch"),
    [
        ("logits", config(n_embd=32, block_size=64, vocab_size=4000), 4),
        ("blocks", config(n_layer=4, n_embd=64, block_size=64), 8),
        ("weights", config(n_layer=4, n_embd=128, block_size=8), 1),
        ("embedding", config(n_layer=1, n_embd=128, block_size=8, vocab_size=4000), 1),
    ],
)
def test_the_peak_is_what_the_allocator_gave_out(what, shape, batch, micro_steps):
    predicted = sizing.peak_bytes(shape, sizing.Setup(batch, micro_steps > 1))
    assert predicted == pytest.approx(peak_of_a_step(shape, batch, micro_steps), rel=0.05), what


def test_the_peak_with_activations_that_are_computed_again(monkeypatch):
    shape = config(n_layer=8, n_embd=64, block_size=64)
    kept = sizing.peak_bytes(shape, sizing.Setup(8, False))
    monkeypatch.setattr(model, "RECOMPUTED", 0)
    predicted = sizing.peak_bytes(shape, sizing.Setup(8, False))
    assert predicted == pytest.approx(peak_of_a_step(shape, 8, 1), rel=0.05)
    assert predicted < 0.9 * kept


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loss_in_chunks_keeps_gradients_and_no_logits(monkeypatch, dtype):
    monkeypatch.setattr(loss, "CHUNK", 5000)
    part = sizing.memory(WIDE, sizing.Setup(3, False, dtype))
    assert part["activations"] + part["autocast"] == saved_bytes(GPT(WIDE), 3, dtype)


def test_the_peak_with_a_loss_in_chunks(monkeypatch):
    shape = config(n_embd=32, block_size=64, vocab_size=4000)
    plain = sizing.peak_bytes(shape, sizing.Setup(4, False))
    monkeypatch.setattr(loss, "CHUNK", 200_000)
    predicted = sizing.peak_bytes(shape, sizing.Setup(4, False))
    assert predicted == pytest.approx(peak_of_a_step(shape, 4, 1), rel=0.08)
    assert predicted < 0.6 * plain


def test_a_checkpoint_has_the_size_that_was_predicted(tmp_path):
    model = GPT(WIDE)
    optimizer = make_optimizer(model, train_params(), "cpu", "float32")
    tokens = torch.zeros(2, WIDE.block_size, dtype=torch.long)
    model(tokens, tokens).backward()
    optimizer.step()
    checkpoints = Checkpoints(tmp_path / "checkpoints", "run")
    checkpoints.save(TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False)), {})
    size = (tmp_path / "checkpoints/step-00000000/state.safetensors").stat().st_size
    assert sizing.checkpoint_bytes(WIDE) == pytest.approx(size, rel=0.01)


# --- tokens and time --------------------------------------------------------------------------------------------------


def test_twenty_tokens_per_parameter():
    assert sizing.chinchilla_tokens(gpt2(12, 12, 768)) == 20 * 124_439_808


def test_time_and_share_of_the_peak_are_each_other_s_inverse():
    seconds = sizing.step_seconds(WIDE, tokens=1024, share=0.25, peak=1e12)
    assert seconds == 1024 * sizing.palm_flops(WIDE) / 0.25e12
    assert sizing.share_of_peak(WIDE, 1024, seconds, 1e12) == pytest.approx(0.25)
    assert sizing.share_of_peak(WIDE, 1024, seconds, None) is None
