"""Weights of other programs give the same logits, and hostile files do no harm."""

import contextlib
import json
import os
import pickle
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanogpt.gpt_config import GPTConfig
from nanogpt.huggingface import from_huggingface, load_huggingface, to_huggingface
from nanogpt.model import GPT
from nanogpt.nanogpt_checkpoint import from_nanogpt, load_nanogpt, save_nanogpt, to_nanogpt
from tests.nanogpt import tiny
from tests.printed import run_python

STD = 0.5  # of the weights: with 0.2 the two GELUs are only 1e-5 apart
TOKENS = torch.from_numpy(tiny.tokens(24).astype("int64")).view(3, 8)


def theirs(config, tensors):
    """Hugging Face's model of a config and state dict."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(**config))
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    return model.eval()


def random_theirs(**changes):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 8, "vocab_size": 13}
    shape |= {"bos_token_id": 12, "eos_token_id": 12}
    model = GPT2LMHeadModel(GPT2Config(**shape, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=STD)
    return model.eval()


def ours(config: GPTConfig, weights: dict[str, Tensor]) -> GPT:
    model = GPT(config)
    model.load_state_dict(weights)
    return model.eval()


@torch.no_grad()
def apart(model, other) -> float:
    """The largest difference between our logits and theirs."""
    logits = other(TOKENS)
    logits = getattr(logits, "logits", logits)
    return float((model(TOKENS)[..., : logits.size(-1)] - logits).abs().max())


# --- Hugging Face -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"activation": "gelu_tanh"}, {"bias": False}, {"vocab_multiple": 8}, {"dropout": 0.2}]
)
def test_our_logits_are_hugging_faces(changes):
    model = tiny.gpt(std=STD, **changes)
    config, tensors = to_huggingface(model.config, tiny.weights(model), 12)
    assert apart(model, theirs(config, tensors)) < 1e-5
    # The comparison sees the other GELU, and a projection that is not transposed.
    other = {"gelu": "gelu_new", "gelu_new": "gelu"}[config["activation_function"]]
    assert apart(model, theirs({**config, "activation_function": other}, tensors)) > 1e-4
    name = "transformer.h.1.attn.c_proj.weight"
    assert apart(model, theirs(config, {**tensors, name: tensors[name].t()})) > 1e-2


@pytest.mark.parametrize("changes", [{}, {"vocab_multiple": 8}, {"dropout": 0.2}])
def test_our_logits_are_nanochats(changes):
    from transformers import NanoChatConfig, NanoChatForCausalLM

    def theirs(config, tensors):
        other = NanoChatForCausalLM(NanoChatConfig(**config)).eval()
        assert other.load_state_dict(tensors, strict=True)
        return other

    model = tiny.gpt(std=STD, **tiny.NANOCHAT, **changes)
    config, tensors = to_huggingface(model.config, tiny.weights(model), 12)
    assert apart(model, theirs(config, tensors)) < 1e-5
    # The comparison sees what the config says, and queries that were taken for keys.
    for wrong in ({"final_logit_softcapping": 1.0}, {"hidden_act": "relu"}, {"rms_norm_eps": 0.1}):
        assert apart(model, theirs({**config, **wrong}, tensors)) > 1e-4
    q, k = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")
    assert apart(model, theirs(config, {**tensors, q: tensors[k], k: tensors[q]})) > 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"previous_tokens": 2},
            "NanoChat does not support model.previous_tokens = 2; train with model.previous_tokens = 0",
        ),
        (
            {"ngrams": 2},
            "NanoChat does not support model.ngrams = 2; train with model.ngrams = 1",
        ),
        ({"bias": True}, "NanoChat does not support model.bias = True"),
        ({"norm": "layernorm"}, "NanoChat does not support model.norm = layernorm; train with model.norm = rmsnorm"),
        ({"activation": "gelu"}, "NanoChat does not support model.activation = gelu"),
        ({"qk_norm": False}, "NanoChat does not support model.qk_norm = False"),
        ({"tie_embeddings": True}, "NanoChat does not support model.tie_embeddings = True"),
        ({"embedding_norm": False}, "NanoChat does not support model.embedding_norm = False"),
        ({"position": "learned"}, "GPT-2 does not support model.norm = rmsnorm"),
    ],
)
def test_what_neither_gpt2_nor_nanochat_has_is_refused(changes, message):
    model = tiny.gpt(**{**tiny.NANOCHAT, **changes})
    with pytest.raises(ValueError, match=re.escape(message)):
        to_huggingface(model.config, tiny.weights(model), 12)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_hugging_faces_logits_are_ours(activation):
    other = random_theirs(activation_function=activation)
    config, weights = from_huggingface(other.config.to_dict(), other.state_dict())
    assert config == tiny.config(activation={"gelu_new": "gelu_tanh", "gelu": "gelu"}[activation], dropout=0.1)
    assert apart(ours(config, weights), other) < 1e-5
    wrong = replace(config, activation={"gelu_tanh": "gelu", "gelu": "gelu_tanh"}[config.activation])
    assert apart(ours(wrong, weights), other) > 1e-4


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_there_and_back_is_the_same_model(activation):
    model = tiny.gpt(std=0.2, activation=activation, dropout=0.3)
    config, weights = from_huggingface(*to_huggingface(model.config, tiny.weights(model), None)[:2])
    assert config == model.config
    assert tiny.same(weights, tiny.weights(model))


def test_a_saved_directory_is_read_as_published_ones_are(tmp_path):
    """With an untied copy of names: GPT2Model's have no prefix, and old files hold the causal masks."""
    from safetensors.torch import save_file

    other = random_theirs()
    other.save_pretrained(tmp_path)
    config, weights = load_huggingface(tmp_path)
    assert apart(ours(config, weights), other) < 1e-5
    old = {name.removeprefix("transformer."): t.contiguous().clone() for name, t in other.state_dict().items()}
    old |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 8, 8).tril() for layer in range(2)}
    save_file(old, tmp_path / "model.safetensors")
    assert tiny.same(load_huggingface(tmp_path)[1], weights)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="is not a readable GPT-2"):
        load_huggingface(tmp_path)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_the_prefixes_of_torchs_wrappers_are_taken_off(tmp_path, wrapper):
    from safetensors.torch import save_file

    other = random_theirs()
    other.save_pretrained(tmp_path)
    weights = load_huggingface(tmp_path)[1]
    wrapped = {wrapper + name: t.contiguous().clone() for name, t in other.state_dict().items()}
    save_file(wrapped, tmp_path / "model.safetensors")
    assert tiny.same(load_huggingface(tmp_path)[1], weights)
    checkpoint = to_nanogpt(tiny.config(), tiny.weights(tiny.gpt()))
    unwrapped = from_nanogpt(checkpoint)[1]
    checkpoint["model"] = {wrapper + name: tensor for name, tensor in checkpoint["model"].items()}
    assert tiny.same(from_nanogpt(checkpoint)[1], unwrapped)
    bias = "transformer.ln_f.bias"
    with pytest.raises(ValueError, match="two tensors have the same name"):
        from_huggingface(other.config.to_dict(), {**wrapped, bias: torch.zeros(16)})


def test_shards_are_read_as_one_file(tmp_path):
    other = random_theirs()
    other.save_pretrained(tmp_path / "whole")
    other.save_pretrained(tmp_path / "sharded", max_shard_size="4KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    config, weights = load_huggingface(tmp_path / "sharded")
    assert config == load_huggingface(tmp_path / "whole")[0]
    assert tiny.same(weights, load_huggingface(tmp_path / "whole")[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda places: {**places, "transformer.wpe.weight": "../x.safetensors"}, "which is not a file beside it"),
        (lambda places: {**places, "transformer.wpe.weight": "."}, "which is not a file beside it"),
        (lambda places: {**places, "transformer.wpe.weight": "absent.safetensors"}, "No such file"),
        (lambda places: {**places, "transformer.wpe.weight": 1}, "has no weight_map"),
        (lambda places: {**places, "extra": places["transformer.wpe.weight"]}, "extra is not where"),
        (lambda places: list(places), "has no weight_map"),
    ],
)
def test_a_wrong_index_of_shards_is_refused(tmp_path, change, message):
    random_theirs().save_pretrained(tmp_path, max_shard_size="4KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "weight_map": change(content["weight_map"])}))
    with pytest.raises(ValueError, match=message):
        load_huggingface(tmp_path)


@pytest.mark.parametrize("rows", [50258, 50261, 50264, 50304])
def test_added_and_padded_rows_of_gpt2_are_kept_apart_from_its_tokens(rows):
    """A padding token, padding to a multiple of 8 or 64: one rule for Hugging Face and nanoGPT."""
    model = tiny.gpt(std=0.2, n_embd=2, n_layer=1, vocab_size=rows)
    theirs = to_huggingface(model.config, tiny.weights(model), None)
    checkpoint = to_nanogpt(model.config, tiny.weights(model))
    for vocab_size in (None, 50257):
        for config, weights in (from_huggingface(*theirs, vocab_size), from_nanogpt(checkpoint, vocab_size)):
            assert (config.vocab_size, config.padded_vocab_size) == (50257, rows)
            assert tiny.same(weights, tiny.weights(model))
    for other in (65, 1024, 50240, rows + 1):
        with pytest.raises(ValueError, match=f"its vocabulary has {rows} tokens, but the tokenizer has {other}"):
            from_huggingface(*theirs, other)
    assert from_huggingface(*theirs, rows)[0].vocab_multiple == 1


def test_half_precision_becomes_float32():
    model = tiny.gpt(std=0.2)
    half = {name: tensor.bfloat16() for name, tensor in tiny.weights(model).items()}
    config, tensors = to_huggingface(model.config, half, None)
    assert config["dtype"] == "bfloat16"
    _, weights = from_huggingface(config, tensors)
    assert tiny.same(weights, {name: tensor.float() for name, tensor in half.items()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"n_inner": 100}, "n_inner is 100"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"activation_function": ["gelu"]}, "activation_function is"),
        ({"attn_pdrop": 0.5}, "differ, but our GPT has one dropout"),
        ({"resid_pdrop": []}, r"dropout is \[\]"),
        ({"n_head": 3}, "n_embd 16 is not a multiple of n_head 3"),
        ({"n_layer": 3}, "h.2.ln_1.weight is absent"),
        ({"n_layer": 10**9}, "n_layer is 1000000000; it must be an integer from 1 to 4096"),
        ({"n_embd": 2**40}, r"wte.weight is \(13, 16\), but its config says"),
        ({"n_positions": "8"}, "n_positions is '8'"),
    ],
)
def test_what_our_gpt_has_not_is_refused(changes, message):
    other = random_theirs()
    with pytest.raises(ValueError, match=message):
        from_huggingface({**other.config.to_dict(), **changes}, other.state_dict())


def test_four_times_the_channels_may_be_spelt_out():
    other = random_theirs(n_inner=64)
    assert from_huggingface(other.config.to_dict(), other.state_dict())[0].n_embd == 16


def test_wrong_tensors_are_refused_by_name():
    model = tiny.gpt(std=0.2)
    config, tensors = to_huggingface(model.config, tiny.weights(model), None)
    bias = "transformer.h.0.ln_1.bias"
    for changes, message in (
        ({bias: torch.zeros(17)}, r"h.0.ln_1.bias is \(17,\), but its config says \(16,\)"),
        ({bias: torch.zeros(16, dtype=torch.int64)}, "h.0.ln_1.bias is not a tensor of floating-point numbers"),
        ({bias: torch.zeros(1).expand(16)}, "h.0.ln_1.bias has fewer numbers than its shape"),
        ({"transformer.extra": torch.zeros(1)}, r"extra is \(1,\), but its config says absent"),
        ({"lm_head.weight": torch.zeros(13, 16)}, "lm_head.weight is not wte.weight"),
    ):
        with pytest.raises(ValueError, match=message):
            from_huggingface(config, {**tensors, **changes})
    with pytest.raises(ValueError, match="n_layer is 2, but there are 0 tensors"):
        from_huggingface(config, {})


@pytest.mark.parametrize(("n_layer", "n_head", "n_embd", "parameters"), tiny.GPT2_SIZES)
def test_the_four_sizes_of_gpt2_are_what_is_published(n_layer, n_head, n_embd, parameters):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPTConfig(n_layer, n_head, n_embd, block_size=1024, vocab_size=50257, bias=True, activation="gelu_tanh")
    with torch.device("meta"):
        model = GPT(config)
        exported, tensors = to_huggingface(config, dict(model.named_parameters()), 50256)
        other = GPT2LMHeadModel(GPT2Config(**exported))
    assert model.parameter_count() == parameters
    assert sum(parameter.numel() for parameter in other.parameters()) == parameters
    assert {name: t.shape for name, t in tensors.items()} == {name: t.shape for name, t in other.named_parameters()}


# --- nanoGPT ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_has_what_nanogpts_sampler_loads(tmp_path):
    """GPTConfig(**model_args), then load_state_dict with every name and shape of nanoGPT's model.py."""
    model = tiny.gpt(std=0.2, dropout=0.1, bias=False, vocab_multiple=8)
    save_nanogpt(to_nanogpt(model.config, tiny.weights(model)), tmp_path / "ckpt.pt")
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8}
    assert checkpoint["model_args"] == {**shape, "bias": False, "vocab_size": 13, "dropout": 0.1}
    layer = {"ln_1": (16,), "attn.c_attn": (48, 16), "attn.c_proj": (16, 16)}
    layer |= {"ln_2": (16,), "mlp.c_fc": (64, 16), "mlp.c_proj": (16, 64)}
    expected = {"transformer.wte.weight": (13, 16), "transformer.wpe.weight": (8, 16), "lm_head.weight": (13, 16)}
    expected |= {f"transformer.h.{i}.{name}.weight": size for i in range(2) for name, size in layer.items()}
    expected |= {"transformer.ln_f.weight": (16,)}
    assert {name: tuple(tensor.shape) for name, tensor in checkpoint["model"].items()} == expected
    for name, tensor in tiny.weights(model).items():
        assert torch.equal(checkpoint["model"][f"transformer.{name}"], tensor[:13] if name == "wte.weight" else tensor)


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_of_a_compiled_training_is_read(tmp_path, bias):
    """As train.py writes it: with the optimizer's state, under the names of torch.compile, and old masks."""
    model = tiny.gpt(std=0.2, bias=bias)
    optimizer = torch.optim.AdamW(model.parameters())
    model(TOKENS, TOKENS).backward()
    optimizer.step()
    checkpoint = to_nanogpt(model.config, tiny.weights(model))
    checkpoint["model"] = {f"_orig_mod.{name}": tensor for name, tensor in checkpoint["model"].items()}
    checkpoint["model"]["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    training = {"iter_num": 7, "best_val_loss": torch.tensor(1.5), "config": {"dataset": "x"}}
    torch.save({**checkpoint, **training, "optimizer": optimizer.state_dict()}, tmp_path / "ckpt.pt")
    config, weights = load_nanogpt(tmp_path / "ckpt.pt")
    assert config == model.config
    assert tiny.same(weights, tiny.weights(model))
    assert apart(model, ours(config, weights)) == 0


def test_nanogpts_padding_is_kept_apart_from_the_tokens():
    model = tiny.gpt(std=0.2, n_embd=2, n_layer=1, vocab_size=50304)
    checkpoint = to_nanogpt(model.config, tiny.weights(model))
    config, weights = from_nanogpt(checkpoint)
    assert (config.vocab_size, config.vocab_multiple, config.padded_vocab_size) == (50257, 64, 50304)
    assert tiny.same(weights, tiny.weights(model))
    assert from_nanogpt(checkpoint, 50304)[0].vocab_multiple == 1
    assert to_nanogpt(config, weights)["model_args"]["vocab_size"] == 50257
    for other in (65, 1024, 50305):
        with pytest.raises(ValueError, match=f"its vocabulary has 50304 tokens, but the tokenizer has {other}"):
            from_nanogpt(checkpoint, other)


def test_a_gelu_that_nanogpt_has_not_is_refused():
    model = tiny.gpt(activation="gelu_tanh")
    with pytest.raises(
        ValueError, match=r"nanoGPT does not support model.activation = gelu_tanh; train with model.activation = gelu"
    ):
        to_nanogpt(model.config, tiny.weights(model))


def checkpoint_file(path: Path, **changes) -> Path:
    model = tiny.gpt(std=0.2)
    checkpoint = to_nanogpt(model.config, tiny.weights(model))
    torch.save({**checkpoint, **changes}, path)
    return path


class Harm:
    """Unpickled, it would make a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    harm = tmp_path / "harm"
    path = checkpoint_file(tmp_path / "ckpt.pt", extra=Harm(harm))
    with pytest.raises(ValueError, match="it names 'posix mkdir'"):
        load_nanogpt(path)
    torch.save({"extra": Harm(harm)}, path, pickle_protocol=4)
    with pytest.raises(ValueError, match="it makes objects with STACK_GLOBAL"):
        load_nanogpt(path)
    path.write_bytes(pickle.dumps(Harm(harm)))  # older than torch's archives
    with pytest.raises(ValueError, match="not a zip file"):
        load_nanogpt(path)
    assert not harm.exists()
    pickle.loads(path.read_bytes())
    assert harm.exists()  # it is harmful indeed


def unusual(path: Path, kind: str) -> None:
    """A ckpt.pt with a number of numpy's beside the weights, or in the format of torch before 1.6."""
    import numpy as np

    checkpoint_file(path, iter_num=3, **({"best_val_loss": np.float64(1.5)} if kind == "numpy" else {}))
    if kind == "old":
        torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("kind", ["numpy", "old"])
def test_the_remedy_for_an_unusual_checkpoint_makes_one_that_is_read(tmp_path, kind):
    path = tmp_path / "ckpt.pt"
    unusual(path, kind)
    with pytest.raises(ValueError, match="if you trust the file, save it again") as error:
        load_nanogpt(path)
    command = re.search("`(.*)`", str(error.value))
    assert command
    assert "\n" not in str(error.value)
    run_python(command[1])
    assert tiny.same(load_nanogpt(path)[1], tiny.weights(tiny.gpt(std=0.2)))


def test_a_checkpoint_of_other_tokens_is_refused_with_where_they_come_from(tmp_path):
    with pytest.raises(
        ValueError, match=r"13 tokens, but the tokenizer has 65\); use the tokenizer of its training: tok"
    ):
        load_nanogpt(checkpoint_file(tmp_path / "ckpt.pt"), 65)


class Large:
    """Harmless, and allowed by torch, but as large as it likes."""

    def __reduce__(self):
        return (bytearray, (2**40,))


def test_a_checkpoint_takes_no_more_memory_than_it_is_large(tmp_path):
    path = checkpoint_file(tmp_path / "ckpt.pt", extra=Large())
    with pytest.raises(ValueError, match="bytearray"):
        load_nanogpt(path)
    packed = tmp_path / "packed.pt"
    with (
        zipfile.ZipFile(checkpoint_file(path)) as archive,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other,
    ):
        for name in archive.namelist():
            other.writestr(name, archive.read(name))
    with pytest.raises(ValueError, match="its tensors are compressed"):
        load_nanogpt(packed)


def rewritten(path: Path, old: bytes, new: bytes) -> Path:
    """The checkpoint with its pickle changed."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            if name.endswith("data.pkl"):
                assert old in data
                data = data.replace(old, new)
            archive.writestr(name, data)
    return path


def test_a_flipped_bit_is_found(tmp_path):
    path = checkpoint_file(tmp_path / "ckpt.pt")
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    tiny.flip_bit(path, largest.header_offset + 1000)
    with pytest.raises(ValueError, match="in it is damaged"):
        load_nanogpt(path)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=3))
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_changed_pickle_is_read_or_refused(tmp_path, changes):
    path = checkpoint_file(tmp_path / "ckpt.pt")
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        data = bytearray(archive.read(name))
    original = bytes(data)
    for position, byte in changes:
        data[position % len(data)] = byte
    with contextlib.suppress(ValueError):
        config, weights = load_nanogpt(rewritten(path, original, bytes(data)))
        assert sum(tensor.numel() for tensor in weights.values()) == GPT(config).parameter_count()


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path):
    path = checkpoint_file(tmp_path / "ckpt.pt")
    # K 16 is the number of values in the storage of a bias, and its shape.
    with pytest.raises(ValueError, match="is not a readable checkpoint of nanoGPT"):
        load_nanogpt(rewritten(path, b"K\x10", b"J\x00\x00\x00\x70"))
    huge = torch.zeros(1).expand(2**40, 16)
    arguments = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 2**40, "bias": True}
    state = {"transformer.wte.weight": huge}
    with pytest.raises(ValueError, match=f"its vocabulary has {2**40} tokens"):
        load_nanogpt(checkpoint_file(path, model_args=arguments, model=state))
    with pytest.raises(ValueError, match="fewer numbers than its shape"):
        load_nanogpt(checkpoint_file(path, model_args={**arguments, "vocab_size": 13, "n_embd": 2**40}, model=state))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_args": []}, "must be dictionaries"),
        ({"model": {}}, "n_layer is 2, but there are 0 tensors"),
        ({"model_args": {"vocab_size": True}}, "vocab_size is True"),
        ({"model_args": {**tiny.SHAPE, "bias": 1}}, "bias is 1"),
        ({"model_args": {**tiny.SHAPE, "dropout": 1.0}}, "dropout is 1.0"),
        ({"model_args": {**tiny.SHAPE, "n_embd": 32}}, r"wte.weight is \(13, 16\), but its config says \(13, 32\)"),
        ({"model_args": {**tiny.SHAPE, "bias": False}}, "h.0.attn.c_attn.bias is"),
    ],
)
def test_a_checkpoint_whose_parts_disagree_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_nanogpt(checkpoint_file(tmp_path / "ckpt.pt", **changes))


@pytest.mark.parametrize("damage", [b"", b"no archive", json.dumps({"model": 1}).encode()])
def test_a_file_that_is_no_checkpoint_is_reported(tmp_path, damage):
    (tmp_path / "ckpt.pt").write_bytes(damage)
    with pytest.raises(ValueError, match="is not a readable checkpoint of nanoGPT"):
        load_nanogpt(tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=r"give its ckpt\.pt"):
        load_nanogpt(tmp_path / "absent.pt")
