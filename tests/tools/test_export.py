"""transformers loads the exported files offline, as the same model with the same tokens."""

import hashlib
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from nanogpt.complete import complete
from nanogpt.corpus.bpe_training import train_bpe
from nanogpt.corpus.tokenizer import END_OF_TEXT, CharTokenizer, Gpt2Tokenizer, Tokenizer, TrainedTokenizer
from nanogpt.files import sha256_file, sha256_tree
from nanogpt.generate import Sampling, generate
from nanogpt.nanogpt_checkpoint import load_nanogpt
from nanogpt.saved_model import load_model, save_model
from tests.nanogpt import tiny
from tests.printed import run_python
from tools.__main__ import main
from tools.export import export, tokenizer_files
from tracking.dvc_files import directory_md5

CORPUS = ["Once upon a time it's 1234 o'clock,\n\n  and the café's cat sat.\n"] * 3
CHARACTERS = "".join(sorted(set("\n\t  .,!?'\"<|>abcdefghijklmnopqrstuvwxyzÄéß中文🙂\u0301")))
LETTERS = CharTokenizer("\n abcdefgh", True)
INFO = {"params": {"train.seed": 7, "model.activation": "gelu"}, "step": 40, "train_loss": 1.25, "val_loss": 1.5}


def published(folder: Path, tokenizer: Tokenizer = LETTERS, **changes) -> Path:
    """A model directory with random weights."""
    gpt = tiny.gpt(**{"std": 0.3, "vocab_size": tokenizer.vocab_size, "block_size": 32, **changes})
    folder.mkdir(exist_ok=True)
    tokenizer.save(folder / "saved.json")
    save_model(folder / "model", gpt.config, tiny.weights(gpt), folder / "saved.json", INFO)
    return folder / "model"


def auto(tokenizer: Tokenizer, folder: Path):
    """The tokenizer that AutoTokenizer loads from the exported files."""
    from transformers import AutoTokenizer

    for name, text in tokenizer_files(tokenizer, 32).items():
        (folder / name).write_bytes(text.encode())
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    tokenizer = train_bpe(CORPUS, 300, end_of_text=True)
    return tokenizer, auto(tokenizer, tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def char(tmp_path_factory):
    tokenizer = CharTokenizer(CHARACTERS, True)
    return tokenizer, auto(tokenizer, tmp_path_factory.mktemp("char"))


@pytest.fixture(scope="module")
def gpt2(gpt2_files, tmp_path_factory):
    return Gpt2Tokenizer(), auto(Gpt2Tokenizer(), tmp_path_factory.mktemp("gpt2"))


@pytest.fixture
def here(project):
    """A working directory with our params.yaml."""
    return project()


# --- tokenizers -------------------------------------------------------------------------------------------------------

TEXTS = st.one_of(st.text(), st.text(alphabet="aon ce'stupl\n\t 1é中"), st.lists(st.sampled_from(CORPUS)).map("".join))
SLOW = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def check_same(pair, text):
    tokenizer, exported = pair
    ids = tokenizer.encode(text).tolist()
    assert exported(text, split_special_tokens=True)["input_ids"] == ids
    if exported.eos_token is None or exported.eos_token not in text:
        assert exported(text)["input_ids"] == ids
    assert exported.decode(ids) == text == tokenizer.decode(ids)


@SLOW
@example(text=END_OF_TEXT)
@given(text=TEXTS)
def test_a_trained_tokenizer_gives_the_same_ids(bpe, text):
    check_same(bpe, text)


@SLOW
@example(text=END_OF_TEXT)
@given(text=TEXTS)
def test_gpt2s_tokenizer_gives_the_same_ids(gpt2, text):
    check_same(gpt2, text)


@SLOW
@example(text=END_OF_TEXT)
@given(text=st.text(alphabet=CHARACTERS))
def test_characters_give_the_same_ids_and_no_spaces_come_between(char, text):
    check_same(char, text)


@settings(deadline=None, max_examples=30)
@given(texts=st.lists(st.text(alphabet="ab c", min_size=5), min_size=1), text=st.text(alphabet="ab c"))
def test_any_trained_tokenizer_gives_the_same_ids(tmp_path_factory, texts, text):
    tokenizer = train_bpe(texts, 290, end_of_text=False)
    check_same((tokenizer, auto(tokenizer, tmp_path_factory.mktemp("any"))), text)


def test_a_token_that_no_merge_reaches_is_still_a_word(tmp_path):
    """tiktoken joins the parts that make the earliest token, and a word that is a token becomes that token."""
    a, b, c = b"abc"
    tokenizer = TrainedTokenizer([(a, b), (b, c), (a, 257), (258, c), (c, 258)], True)
    exported = auto(tokenizer, tmp_path)
    for text in ("abc", "abcc", "cabc", "aabc", "ababcabcc", "cabcc abc"):
        check_same((tokenizer, exported), text)


def test_gpt2s_files_are_gpt2s_own(gpt2_files):
    files = tokenizer_files(Gpt2Tokenizer(), 1024)
    own = {}
    for path in gpt2_files.iterdir():
        text = path.read_text(encoding="utf-8")
        own["vocab.json" if text.startswith("{") else "merges.txt"] = text
    assert files["merges.txt"] == own["merges.txt"]
    assert json.loads(files["vocab.json"]) == json.loads(own["vocab.json"])


def test_without_gpt2s_files_the_export_names_the_remedy(tmp_path, monkeypatch):
    import tiktoken

    model = published(tmp_path, Gpt2Tokenizer(), n_embd=2)

    def absent(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", absent)
    with pytest.raises(ValueError, match="set TIKTOKEN_CACHE_DIR to a folder that contains it"):
        export(model, "huggingface", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["bpe", "char", "gpt2"])
def test_the_end_of_text_is_one_token(request, name):
    """In transformers the text of a special token is that token; with split_special_tokens it is ordinary text."""
    tokenizer, exported = request.getfixturevalue(name)
    assert (exported.eos_token, exported.eos_token_id) == (END_OF_TEXT, tokenizer.end_of_text)
    assert exported.bos_token_id == tokenizer.end_of_text
    assert len(exported) == tokenizer.vocab_size
    assert exported(f"a{END_OF_TEXT}")["input_ids"][1:] == [tokenizer.end_of_text]
    split = exported(f"a{END_OF_TEXT}", split_special_tokens=True)["input_ids"]
    assert split == tokenizer.encode(f"a{END_OF_TEXT}").tolist()
    assert exported.decode([tokenizer.end_of_text]) == END_OF_TEXT
    assert exported.decode([tokenizer.end_of_text], skip_special_tokens=True) == ""


def test_one_text_has_no_end_of_text(tmp_path):
    exported = auto(CharTokenizer(CHARACTERS, False), tmp_path)
    assert exported.eos_token is None
    assert len(exported) == len(CHARACTERS)


def test_an_unknown_character_is_an_error_there_too(char):
    with pytest.raises(Exception, match="WordLevel error"):
        char[1]("Ω")


# --- whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"activation": "gelu_tanh"}, {"bias": False, "vocab_multiple": 64}, tiny.NANOCHAT]
)
def test_from_pretrained_gives_the_same_logits_and_the_same_greedy_tokens(tmp_path, changes):
    from transformers import AutoModelForCausalLM

    # No end of text, at which transformers' generate would stop.
    model = published(tmp_path, CharTokenizer("\n abcdefgh", False), **changes)
    export(model, "huggingface", tmp_path / "out")
    exported, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    ours = load_model(model).model
    tokens = torch.from_numpy(tiny.tokens(64, vocab_size=10).astype("int64")).view(2, 32)
    with torch.no_grad():
        assert (exported(tokens).logits - ours(tokens)[..., :10]).abs().max() < 1e-5
    greedy = exported.generate(torch.tensor([[0, 3, 0]]), do_sample=False, max_new_tokens=29)
    expected = [token for (token,) in generate(ours, [0, 3, 0], 1, 29, Sampling(temperature=0))]
    assert greedy[0, 3:].tolist() == expected
    assert len(set(expected)) > 2  # not one token for ever


@pytest.mark.parametrize("name", ["bpe", "char", "gpt2"])
def test_the_pipeline_continues_as_we_do(tmp_path, request, name):
    from transformers import pipeline

    tokenizer, _ = request.getfixturevalue(name)
    model = published(tmp_path, tokenizer, **({"n_embd": 4} if name == "gpt2" else {}))
    export(model, "huggingface", tmp_path / "out")
    continued = pipeline("text-generation", str(tmp_path / "out"))
    (answer,) = continued("a cat", do_sample=False, max_new_tokens=20)
    assert answer["generated_text"] == complete(load_model(model), "a cat", 20, temperature=0)
    assert continued("a cat")[0]["generated_text"].startswith("a cat")  # ends within the context
    # The empty prompt begins a text, as here: behind an end-of-text token.
    (answer,) = continued("", do_sample=False, max_new_tokens=20)
    assert answer["generated_text"] == complete(load_model(model), "", 20, temperature=0)


@pytest.mark.parametrize("format_name", ["huggingface", "nanogpt"])
def test_the_same_model_gives_the_same_bytes_and_no_path(tmp_path, format_name):
    models = [published(tmp_path / name) for name in ("first", "second")]
    for model in models:
        export(model, format_name, model.parent / "out")
    assert tiny.contents(models[0].parent / "out") == tiny.contents(models[1].parent / "out")
    for path in (models[0].parent / "out").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()


def test_the_weights_carry_the_one_mark_that_transformers_needs(tmp_path):
    export(published(tmp_path), "huggingface", tmp_path / "out")
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}


# --- nanoGPT ----------------------------------------------------------------------------------------------------------


def test_nanogpts_sampler_finds_weights_and_characters(tmp_path, monkeypatch):
    """Like sample.py, loads ckpt.pt and data/<dataset>/meta.pkl, which the command in the card makes."""
    tokenizer = CharTokenizer("\n \"'abcdé", True)
    model = published(tmp_path, tokenizer, bias=False)
    export(model, "nanogpt", tmp_path / "out")
    checkpoint = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "bias": False, "dropout": 0.0}
    assert checkpoint["model_args"] == {**shape, "vocab_size": tokenizer.vocab_size}
    ours = load_model(model).model
    state = {name.removeprefix("transformer."): tensor for name, tensor in checkpoint["model"].items()}
    assert torch.equal(state.pop("lm_head.weight"), state["wte.weight"])
    assert tiny.same(state, tiny.weights(ours))

    card = (tmp_path / "out" / "README.md").read_text()
    script = re.search(r"^python -c .*$", card, re.MULTILINE).group().replace("<this directory>", str(tmp_path / "out"))
    monkeypatch.chdir(tmp_path)
    run_python(script)
    meta = pickle.loads((tmp_path / "data" / checkpoint["config"]["dataset"] / "meta.pkl").read_bytes())
    text = "a\n'é\" d"
    assert [meta["stoi"][c] for c in text] == tokenizer.encode(text).tolist()
    assert "".join(meta["itos"][i] for i in range(tokenizer.vocab_size)) == tokenizer.characters + END_OF_TEXT
    assert meta["vocab_size"] == tokenizer.vocab_size


def test_gpt2s_tokens_are_what_the_sampler_takes_without_characters(tmp_path):
    export(published(tmp_path, Gpt2Tokenizer(), n_embd=2), "nanogpt", tmp_path / "out")
    assert "config" not in torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)


def test_of_tokens_that_the_sampler_does_not_know_the_command_warns(here, bpe):
    published(here, bpe[0])
    result = run("--format", "nanogpt", "out")
    assert result.exit_code == 0
    assert "warning: nanoGPT's sample.py cannot read or write this model's tokens (bpe)" in result.stderr
    assert "cannot read or write the tokens of this model" in Path("out/README.md").read_text()
    assert load_nanogpt(Path("out/ckpt.pt"))[0].vocab_size == bpe[0].vocab_size


# --- the card and the command -----------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


def test_the_card_says_what_the_model_is_and_where_from(here):
    model = published(here)
    result = run("--format", "huggingface", "out")
    assert result.exit_code == 0, result.output
    card = Path("out/README.md").read_text()
    for line in (
        f"| parameters | {load_model(model).model.parameter_count():,} |",
        "| steps | 40 |",
        "| validation loss at that step | 1.5 |",
        f"| model, sha256 | {sha256_tree(model)} |",
        f"python -m tools lineage {sha256_tree(model)}",
        "train.seed: 7",
    ):
        assert line in card
    assert "evaluation" not in card
    assert "| commit | unknown: no dvc.lock in git's history contains this model |" in card


def test_metrics_of_another_model_are_not_reported(here):
    model = published(here)
    metrics = here / "metrics" / "evaluate.json"
    metrics.parent.mkdir()
    metrics.write_text('{"perplexity": 4.5}')
    for md5, data, shown in (
        (directory_md5(model), metrics.read_bytes(), True),
        ("0" * 32 + ".dir", metrics.read_bytes(), False),
        (directory_md5(model), b"{}", False),
    ):
        outs = [{"path": "metrics/evaluate.json", "md5": hashlib.md5(data).hexdigest()}]
        stage = {"deps": [{"path": "model", "md5": md5}], "outs": outs}
        with Path("dvc.lock").open("w") as file:
            YAML().dump({"stages": {"evaluate": stage}}, file)
        out = here / f"out-{md5[:4]}-{len(data)}"
        assert run("--format", "huggingface", out).exit_code == 0
        assert ("| evaluation: perplexity | 4.5 |" in (out / "README.md").read_text()) is shown


def test_nothing_is_overwritten(here):
    published(here)
    out = here / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    for path in (out, out / "mine"):
        result = run("--format", "huggingface", path)
        assert result.exit_code == 1
        assert "exists and is not an empty directory; remove it, or choose another one" in result.output
    assert tiny.contents(out) == {"mine": sha256_file(out / "mine")}
    (out / "mine").unlink()
    assert run("--format", "nanogpt", out).exit_code == 0


def test_what_nanogpt_cannot_express_is_refused_and_nothing_is_left(here):
    published(here, activation="gelu_tanh")
    before = tiny.contents(here)
    result = run("--format", "nanogpt", "out")
    assert result.exit_code == 1
    assert "nanoGPT does not support model.activation = gelu_tanh" in result.output
    assert "Traceback" not in result.output
    assert tiny.contents(here) == before
    assert run("--format", "huggingface", "out").exit_code == 0


def test_a_model_that_is_not_there_is_reported(here):
    result = run("--format", "huggingface", "out")
    assert result.exit_code == 1
    assert "is missing; `dvc checkout` or `dvc repro` brings it back" in result.output
