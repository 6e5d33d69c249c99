import json
import math
import shutil

import pytest
import torch

from nanogpt.complete import complete, continuations, encode_prompt, stream
from nanogpt.corpus.bpe_training import train_bpe
from nanogpt.corpus.tokenizer import CharTokenizer
from nanogpt.files import Damaged, sha256_file
from nanogpt.generate import Sampling
from nanogpt.saved_model import FILES, load_model, save_model
from tests.nanogpt import tiny

DEFAULTS = {"temperature": 1.0, "top_k": None, "top_p": None, "seed": 1337}
INFO = {"step": 7, "val_loss": 1 / 3, "params": {"model.n_layer": 2}}


def publish(directory, model=None, tokenizer=None, info=INFO):
    model = model or tiny.gpt(seed=1, std=0.5, bias=False)
    if tokenizer is None:
        tokenizer = directory.parent / "tokenizer.json"
        tiny.char_tokenizer(tokenizer)
    save_model(directory, model.config, tiny.weights(model), tokenizer, info)
    return model


@pytest.fixture
def directory(tmp_path):
    publish(tmp_path / "model")
    return tmp_path / "model"


def test_what_is_loaded_is_what_was_saved(tmp_path):
    model = publish(tmp_path / "model", tiny.gpt(std=0.5, dropout=0.1, activation="gelu_tanh", vocab_multiple=16))
    loaded = load_model(str(tmp_path / "model"))
    assert loaded.model.config == model.config
    assert tiny.same(tiny.weights(loaded.model), tiny.weights(model))
    assert loaded.info == INFO
    assert loaded.tokenizer.to_json() == (tmp_path / "tokenizer.json").read_text()
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_saving_twice_gives_the_same_bytes_and_loading_changes_none(tmp_path):
    publish(tmp_path / "a")
    publish(tmp_path / "b")
    before = tiny.contents(tmp_path / "a")
    loaded = load_model(tmp_path / "a")
    complete(loaded, "abc", 5)
    assert before == tiny.contents(tmp_path / "a") == tiny.contents(tmp_path / "b")
    assert set(before) == set(FILES)
    save_model(
        tmp_path / "c", loaded.model.config, tiny.weights(loaded.model), tmp_path / "tokenizer.json", loaded.info
    )
    assert tiny.contents(tmp_path / "c") == before


def test_publishing_again_replaces_the_model_completely(directory):
    (directory / "stray").write_text("of an older version")
    other = publish(directory, tiny.gpt(seed=5))
    assert set(tiny.contents(directory)) == set(FILES)
    assert tiny.same(tiny.weights(load_model(directory).model), tiny.weights(other))


def test_a_full_disk_is_an_oserror_and_leaves_the_old_model(directory):
    before = tiny.contents(directory.parent)
    with tiny.full_disk(), pytest.raises(OSError, match=r"disk is full.*free some space"):
        publish(directory, tiny.gpt(seed=5), tokenizer=directory.parent / "tokenizer.json")
    assert tiny.contents(directory.parent) == before


# --- text -------------------------------------------------------------------------------------------------------------


def test_a_text_is_completed_the_same_way_each_time(directory):
    text = complete(load_model(directory), "abc", max_new_tokens=50)
    assert text.startswith("abc")
    torch.manual_seed(3)
    assert complete(load_model(directory), "abc", max_new_tokens=50) == text
    assert complete(load_model(directory), "abc", max_new_tokens=50, seed=2) != text


@pytest.mark.parametrize(
    "setting", [{"temperature": 0.0}, {"temperature": 3.0}, {"top_k": 1}, {"top_p": 0.01}, {"max_new_tokens": 7}]
)
def test_each_setting_reaches_the_sampling(directory, setting):
    gpt = load_model(directory)
    sampling = {key: setting.get(key, default) for key, default in DEFAULTS.items()}
    expected = continuations(gpt, "abc", 1, setting.get("max_new_tokens", 200), Sampling(**sampling))
    assert complete(gpt, "abc", **setting) == "abc" + expected[0] != complete(gpt, "abc")


def scripted(monkeypatch, directory, rows):
    """The published model, which generates `rows` of tokens, one list per position."""
    asked = []

    def fake(model, prompt, samples, max_new_tokens, sampling):
        for row in rows[:max_new_tokens]:
            asked.append(row)
            yield row[:samples]

    monkeypatch.setattr("nanogpt.complete.generate", fake)
    return load_model(directory), asked


A, B, C, END = 2, 3, 4, 12


def test_each_sample_ends_at_its_own_end_of_text_and_the_batch_with_the_last(monkeypatch, directory):
    gpt, asked = scripted(monkeypatch, directory, [[A, B], [END, B], [A, END], [C, C]])
    assert continuations(gpt, "a", 2, 9, Sampling()) == ["a", "bb"]
    assert len(asked) == 3


def test_if_it_is_not_to_stop_the_end_of_text_is_shown(monkeypatch, directory):
    gpt, _ = scripted(monkeypatch, directory, [[A], [END], [B]])
    assert continuations(gpt, "a", 1, 9, Sampling(), stop_at_end=False) == ["a<|endoftext|>b"]
    assert "".join(stream(gpt, "a", 9, Sampling(), stop_at_end=False)) == "a<|endoftext|>b"


def test_without_an_end_of_text_nothing_stops_it(monkeypatch, tmp_path):
    tiny.char_tokenizer(tmp_path / "tokenizer.json", end_of_text=False)
    publish(tmp_path / "model", tiny.gpt(vocab_size=12), tmp_path / "tokenizer.json")
    gpt, _ = scripted(monkeypatch, tmp_path / "model", [[A], [11], [B]])
    assert continuations(gpt, "a", 1, 9, Sampling()) == ["ajb"]


@pytest.mark.parametrize("stop_at_end", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_a_stream_is_the_continuation_in_pieces(directory, seed, stop_at_end):
    gpt = load_model(directory)
    sampling = Sampling(temperature=2.0, seed=seed)
    pieces = list(stream(gpt, "ab", 60, sampling, stop_at_end))
    assert "".join(pieces) == continuations(gpt, "ab", 1, 60, sampling, stop_at_end)[0]
    assert all(pieces)


def test_a_character_of_several_tokens_is_streamed_when_it_is_complete(monkeypatch, tmp_path):
    tokenizer = train_bpe(["ab é"], 300, end_of_text=True)
    tokenizer.save(tmp_path / "tokenizer.json")
    publish(tmp_path / "model", tiny.gpt(vocab_size=tokenizer.vocab_size), tmp_path / "tokenizer.json")
    rows = [[byte] for byte in "x€é".encode()] + [["€".encode()[0]], [tokenizer.end_of_text]]
    gpt, _ = scripted(monkeypatch, tmp_path / "model", rows)
    assert list(stream(gpt, "a", 99, Sampling())) == ["x", "€", "é", "\ufffd"]
    assert continuations(gpt, "a", 1, 99, Sampling()) == ["x€é\ufffd"]


def test_an_empty_prompt_is_the_start_of_a_document(tmp_path):
    tokenizer = tiny.char_tokenizer(tmp_path / "tokenizer.json")
    assert encode_prompt(tokenizer, "") == [END]
    assert encode_prompt(tokenizer, "ab") == [A, B]


@pytest.mark.parametrize(
    ("characters", "first"), [("\nab", "\n"), ("\t\n ab", "\n"), (" ab", " "), ("ACGT", "A"), ("一二", "一")]
)
def test_an_empty_prompt_without_an_end_of_text_is_a_newline_or_a_character_of_the_corpus(characters: str, first: str):
    tokenizer = CharTokenizer(characters, end_of_text=False)
    assert tokenizer.decode(encode_prompt(tokenizer, "")) == first


def test_a_model_of_one_line_continues_an_empty_prompt(tmp_path):
    tokenizer = CharTokenizer("ACGT", end_of_text=False)
    tokenizer.save(tmp_path / "tokenizer.json")
    publish(tmp_path / "model", tiny.gpt(vocab_size=4), tmp_path / "tokenizer.json")
    assert len(complete(load_model(tmp_path / "model"), "", max_new_tokens=20)) == 20


def test_a_character_that_the_tokenizer_does_not_know_is_named(directory):
    with pytest.raises(ValueError, match=r"'é' \(U\+00E9\) at position 2"):
        complete(load_model(directory), "abé")


def test_a_stream_refuses_a_bad_prompt_before_the_first_piece(directory):
    with pytest.raises(ValueError, match="'é'"):
        stream(load_model(directory), "abé", 5, Sampling())


# --- damage: each error names the file --------------------------------------------------------------------------------


def refused(directory, name, why):
    with pytest.raises(Damaged, match=why) as caught:
        load_model(directory)
    assert caught.value.path == directory / name
    assert str(caught.value).startswith(f"{directory / name} ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(directory, name):
    (directory / name).unlink()
    refused(directory, name, "is missing")


def test_a_missing_directory(tmp_path):
    refused(tmp_path / "model", "weights.safetensors", "is missing")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("size", [0, 20, -1])
def test_a_truncated_file(directory, name, size):
    data = (directory / name).read_bytes()
    # model.json ends with a line feed, which carries nothing.
    (directory / name).write_bytes(data[: size if size >= 0 else -3])
    refused(directory, name, "damaged|sha256 in model.json")


@pytest.mark.parametrize("name", ["weights.safetensors", "tokenizer.json"])
def test_a_flipped_bit(directory, name):
    tiny.flip_bit(directory / name)
    refused(directory, name, "sha256 in model.json")


def test_no_flipped_bit_of_model_json_goes_unnoticed(directory):
    path = directory / "model.json"
    whole, expected = path.read_bytes(), load_model(directory)
    unnoticed = []
    for position in range(whole.index(b'"tokenizer_sha256"')):  # the rest is two hashes
        tiny.flip_bit(path, position, position % 7)
        try:
            found = load_model(directory)
        except ValueError:
            pass
        else:
            if (found.model.config, found.info) != (expected.model.config, expected.info):
                unnoticed.append(path.read_bytes()[position - 15 : position + 5])
        path.write_bytes(whole)
    assert not unnoticed, f"{len(unnoticed)} flips change the model, such as {unnoticed[:3]}"


@pytest.mark.parametrize("key", ["config", "info", "tokenizer_sha256", "weights_sha256"])
def test_a_model_json_without_one_of_its_parts(directory, key):
    tiny.edit_json(directory / "model.json", **{key: None})
    refused(directory, "model.json", "damaged")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"n_layer": 2},
        [1, 2],
        "n_layer",
        {**tiny.SHAPE, "n_layers": 2},
    ],
)
def test_an_invalid_config(directory, config):
    tiny.edit_json(directory / "model.json", config=config)
    refused(directory, "model.json", "damaged")


@pytest.mark.parametrize("change", [{"n_layer": 1}, {"n_layer": 3}, {"n_embd": 32}, {"block_size": 9}, {"bias": True}])
def test_weights_of_another_size(directory, change):
    config = json.loads((directory / "model.json").read_bytes())["config"]
    tiny.edit_json(directory / "model.json", config={**config, **change})
    refused(directory, "weights.safetensors", "does not match")


def test_a_foreign_tokenizer(directory, tmp_path):
    tiny.char_tokenizer(directory / "tokenizer.json", end_of_text=False)
    refused(directory, "tokenizer.json", "sha256 in model.json")


def test_a_foreign_tokenizer_that_was_made_to_look_right(directory):
    tiny.char_tokenizer(directory / "tokenizer.json", end_of_text=False)
    tiny.edit_json(directory / "model.json", tokenizer_sha256=sha256_file(directory / "tokenizer.json"))
    refused(directory, "tokenizer.json", "has 12 tokens, but the model has 13")


def test_files_of_two_models(tmp_path):
    publish(tmp_path / "a")
    publish(tmp_path / "b", tiny.gpt(seed=3, std=0.5, bias=False))
    shutil.copy(tmp_path / "b" / "weights.safetensors", tmp_path / "a" / "weights.safetensors")
    refused(tmp_path / "a", "weights.safetensors", "damaged or from another model")


def test_info_may_hold_what_a_failed_training_measured(tmp_path):
    publish(tmp_path / "model", info={"val_loss": math.inf})
    assert load_model(tmp_path / "model").info == {"val_loss": math.inf}
