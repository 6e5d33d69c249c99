import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanogpt import seeds, sizing
from nanogpt.corpus.tokenizer import CharTokenizer, Gpt2Tokenizer
from nanogpt.model import GPT
from nanogpt.nanogpt_checkpoint import save_nanogpt, to_nanogpt
from nanogpt.params import ModelParams
from nanogpt.pretrained import GPT2_REVISIONS, crop_block_size, load_initial, planned_config, sha256_of
from nanogpt.saved_model import save_model
from tests.nanogpt import tiny
from tests.printed import run_python

NOTHING = ModelParams(**dict.fromkeys(ModelParams.model_fields))  # all as the source has it
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "bias": True}
CPU = torch.device("cpu")


def params(**given) -> ModelParams:
    return NOTHING.model_copy(update=given)


@pytest.fixture
def tokenizer(tmp_path) -> CharTokenizer:
    return tiny.char_tokenizer(tmp_path / "tokenizer.json")


def hugging_face(directory: Path, seed: int = 0, vocab_size: int = 13) -> torch.nn.Module:
    """Writes a GPT-2 of transformers, with weights large enough for every part to matter."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=8, vocab_size=vocab_size)
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.from_numpy(tiny.tokens(16).reshape(2, 8).astype("int64"))
    with torch.no_grad():
        found = model.eval()(tokens)
    return found if isinstance(found, torch.Tensor) else found.logits


def test_from_scratch_the_model_is_that_of_params(tokenizer):
    given = replace(tiny.config(zero_init=True), vocab_size=13)
    fields = {name: value for name, value in vars(given).items() if name != "vocab_size"}
    initial = load_initial("scratch", ModelParams(**fields), tokenizer)
    assert (initial.config, initial.weights, initial.sha256) == (given, None, "none")
    built = initial.build(3, "fused", CPU)
    torch.manual_seed(seeds.derived_seed(3, seeds.WEIGHTS))
    assert tiny.same(tiny.weights(built), tiny.weights(GPT(given)))


def test_a_directory_of_hugging_faces(tmp_path, tokenizer):
    theirs = hugging_face(tmp_path / "gpt2")
    initial = load_initial(f"hf:{tmp_path / 'gpt2'}", params(n_layer=2, bias=True), tokenizer)
    ours = initial.build(0, "fused", CPU)
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-5
    assert all(parameter.requires_grad for parameter in ours.parameters())
    assert initial.sha256 == sha256_of(ours.config, tiny.weights(ours))


@pytest.fixture
def hub(monkeypatch):
    """Places a model where transformers looks for one that it has downloaded: no network is needed then."""
    home = Path(os.environ["HF_HOME"]) / "hub"

    def place(name: str, revision: str) -> torch.nn.Module:
        return hugging_face(home / f"models--{name.replace('/', '--')}" / "snapshots" / revision)

    yield place
    shutil.rmtree(home, ignore_errors=True)


@pytest.mark.parametrize("name", ["gpt2", "gpt2-xl"])
def test_gpt2_of_the_hub_is_taken_at_its_pinned_commit(hub, tokenizer, name):
    theirs = hub(f"openai-community/{name}", GPT2_REVISIONS[name])
    initial = load_initial(name, NOTHING, tokenizer)
    assert initial.config.activation == "gelu_tanh"
    assert (logits(initial.build(0, "fused", CPU)) - logits(theirs)).abs().max() < 1e-5


def test_a_directory_of_the_same_name_is_not_taken_for_gpt2(hub, tokenizer, tmp_path, monkeypatch):
    theirs = hub("openai-community/gpt2", GPT2_REVISIONS["gpt2"])
    hugging_face(tmp_path / "gpt2", seed=1)
    monkeypatch.chdir(tmp_path)
    found = load_initial("gpt2", NOTHING, tokenizer).build(0, "fused", CPU)
    assert (logits(found) - logits(theirs)).abs().max() < 1e-5


def test_a_model_of_the_hub_at_a_commit(hub, tokenizer):
    revision = "0123456789abcdef0123456789abcdef01234567"
    theirs = hub("someone/small", revision)
    found = load_initial(f"hf:someone/small@{revision}", NOTHING, tokenizer).build(0, "fused", CPU)
    assert (logits(found) - logits(theirs)).abs().max() < 1e-5


def test_an_unknown_name_is_reported_in_one_line(tokenizer):
    with pytest.raises(ValueError, match=r"nobody/nothing is neither a directory nor a GPT-2 on the hub"):
        load_initial("hf:nobody/nothing", NOTHING, tokenizer)


def test_a_checkpoint_of_nanogpt_with_its_padded_vocabulary(tmp_path, tokenizer):
    model = tiny.gpt(std=0.3, vocab_multiple=64)
    checkpoint = to_nanogpt(replace(model.config, vocab_size=64, vocab_multiple=1), tiny.weights(model))
    checkpoint["model"] = {f"_orig_mod.{name}": tensor for name, tensor in checkpoint["model"].items()}
    save_nanogpt(checkpoint, tmp_path / "ckpt.pt")
    initial = load_initial(f"nanogpt:{tmp_path / 'ckpt.pt'}", NOTHING, tokenizer)
    assert (initial.config.vocab_size, initial.config.padded_vocab_size) == (13, 64)
    assert torch.equal(logits(initial.build(0, "fused", CPU)), logits(model))


@pytest.fixture
def published(tmp_path, tokenizer):
    """One of ours, with options that GPT-2 has not."""
    model = tiny.gpt(
        std=0.3, position="rotary", qk_norm=True, tie_embeddings=False, previous_tokens=2, ngrams=3, bias=False
    )
    save_model(tmp_path / "ours", model.config, tiny.weights(model), tmp_path / "tokenizer.json", {})
    return model


def test_one_of_ours(tmp_path, tokenizer, published):
    initial = load_initial(f"model:{tmp_path / 'ours'}", NOTHING, tokenizer)
    assert initial.config == published.config
    assert torch.equal(logits(initial.build(0, "fused", CPU)), logits(published))
    assert initial.sha256 == sha256_of(published.config, tiny.weights(published))


def test_one_of_ours_with_another_tokenizer_is_refused_with_the_remedy(tmp_path, published):
    other = CharTokenizer("\n ABCDEFGHIJ", end_of_text=True)
    with pytest.raises(
        ValueError, match=r"another tokenizer than data/tokens; set tokenize.tokenizer to file:.*ours/tok"
    ):
        load_initial(f"model:{tmp_path / 'ours'}", NOTHING, other)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"n_layer": 3}, "model.n_layer = 3, but train.init_from = hf:.* has 2; set it to 2 or null"),
        ({"bias": False}, "model.bias = False, but train"),
        ({"activation": "gelu"}, "model.activation = gelu, but .* has gelu_tanh; set it to gelu_tanh or null"),
        ({"block_size": 9}, "model.block_size = 9, but"),
        ({"vocab_multiple": 64}, "model.vocab_multiple = 64, but"),
    ],
)
def test_what_params_say_of_the_model_must_be_the_sources(tmp_path, tokenizer, given, told):
    hugging_face(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=told):
        load_initial(f"hf:{tmp_path / 'gpt2'}", params(**given), tokenizer)


def test_dropout_may_be_another_and_the_context_shorter(tmp_path, tokenizer):
    theirs = hugging_face(tmp_path / "gpt2")
    initial = load_initial(f"hf:{tmp_path / 'gpt2'}", params(dropout=0.25, block_size=5), tokenizer)
    assert (initial.config.dropout, initial.config.block_size) == (0.25, 5)
    model = initial.build(0, "fused", CPU).eval()
    assert model.wpe.weight.shape == (5, 16)
    tokens = torch.from_numpy(tiny.tokens(10).reshape(2, 5).astype("int64"))
    with torch.no_grad():
        assert (model(tokens) - theirs(tokens).logits).abs().max() < 1e-5


def test_rotary_positions_are_cropped_by_the_config_alone(published):
    config, weights = crop_block_size(published.config, tiny.weights(published), 4)
    assert config.block_size == 4
    assert tiny.same(weights, tiny.weights(published))


def test_another_vocabulary_is_refused(tmp_path, tokenizer):
    hugging_face(tmp_path / "gpt2", vocab_size=14)
    with pytest.raises(ValueError, match=r"has a vocabulary of 14, but data/tokens one of 13; set tokenize.tokenizer"):
        load_initial(f"hf:{tmp_path / 'gpt2'}", NOTHING, tokenizer)


def test_the_remedy_for_rows_that_are_no_tokens_of_gpt2_makes_a_model_that_is_taken(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    source = f"hf:{tmp_path / 'gpt2'}"
    config = GPT2Config(n_layer=1, n_head=1, n_embd=2, n_positions=8, vocab_size=50400)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(
        ValueError, match=r"a vocabulary of 50,400, but data/tokens one of 50,257; remove the rows"
    ) as error:
        load_initial(source, NOTHING, Gpt2Tokenizer())
    command = re.search("`(.*)`", str(error.value))
    assert command
    run_python(command[1])
    assert load_initial(source, NOTHING, Gpt2Tokenizer()).config.vocab_size == 50257


def test_rows_added_to_gpt2_are_taken_as_a_plan_says(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_head=1, n_embd=2, n_positions=8, vocab_size=50258)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    initial = load_initial(f"hf:{tmp_path / 'gpt2'}", NOTHING, Gpt2Tokenizer())
    assert (initial.config.vocab_size, initial.config.padded_vocab_size) == (50257, 50258)
    assert planned_config(f"hf:{tmp_path / 'gpt2'}", NOTHING, 50257) == initial.config


def test_the_hash_sees_every_bit(published):
    weights = tiny.weights(published)
    name = "h.0.attn.c_attn.weight"
    changed = {**weights, name: weights[name].clone()}
    changed[name].view(torch.int32)[0, 0] ^= 1
    config = published.config
    assert sha256_of(config, weights) == sha256_of(config, dict(reversed(weights.items())))
    assert sha256_of(config, changed) != sha256_of(config, weights)
    assert sha256_of(replace(config, n_head=1), weights) != sha256_of(config, weights)
    assert math.isclose(changed[name][0, 0], weights[name][0, 0], rel_tol=1e-6)


@pytest.mark.parametrize(("name", "count"), zip(GPT2_REVISIONS, [size[-1] for size in tiny.GPT2_SIZES], strict=True))
def test_what_gpt2_will_be_is_computed_without_its_weights(name, count):
    config = planned_config(name, params(dropout=0.0, block_size=512), 50257)
    assert sum(sizing.parameters(config).values()) == count - 512 * config.n_embd
    assert (config.dropout, config.activation) == (0.0, "gelu_tanh")


def test_a_plan_reads_local_files(tmp_path, tokenizer, published):
    hugging_face(tmp_path / "gpt2")
    for source in (f"hf:{tmp_path / 'gpt2'}", f"model:{tmp_path / 'ours'}"):
        assert planned_config(source, NOTHING, 13) == load_initial(source, NOTHING, tokenizer).config
    with pytest.raises(ValueError, match=r"model.n_head = 3, but train"):
        planned_config("gpt2-xl", params(n_head=3), 50257)
