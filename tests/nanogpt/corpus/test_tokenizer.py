import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.corpus.bpe_training import train_bpe
from nanogpt.corpus.tokenizer import (
    END_OF_TEXT,
    Alphabet,
    BytePairTokenizer,
    CharTokenizer,
    Gpt2Tokenizer,
    Tokenizer,
    TrainedTokenizer,
    byte_characters,
    load_tokenizer,
)
from nanogpt.files import Damaged
from tests.nanogpt.corpus.made import refuses

TEXT = "The cat sat on the mat. The dog's bone isn't on the mat, it's in the yard!\n\n  1234 ünïcödé 你好 🙂\n" * 20
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
# Pieces that a byte-pair tokenizer splits or joins in unlike ways, so that a wrong cut shows.
SPACES = [" ", "  ", "\n", "\n\n", "\t", "\u00a0", "\u3000"]
WORDS = ["the", "cat", "'s", "'", "'ll", "12", "...", "é", "你好", "🙂", ",", "\u3002", ")"]
TRICKY = st.lists(st.sampled_from(SPACES + WORDS), max_size=40).map("".join)


@pytest.fixture(scope="module")
def trained() -> TrainedTokenizer:
    return train_bpe([TEXT], vocab_size=400, end_of_text=True)


@pytest.fixture(params=["char", "gpt2", "bpe"])
def tokenizer(request: pytest.FixtureRequest, gpt2_files: Path, trained: TrainedTokenizer) -> Tokenizer:
    if request.param == "char":
        return CharTokenizer("".join(sorted({*TEXT, *END_OF_TEXT})), end_of_text=True)
    return Gpt2Tokenizer() if request.param == "gpt2" else trained


# --- what holds for every tokenizer -----------------------------------------------------------------------------------


def test_text_comes_back(tokenizer: Tokenizer):
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.dtype("<u2")
    assert ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.encode("").tolist() == []
    assert tokenizer.decode([]) == ""


def test_end_of_text_written_out_is_ordinary_text(tokenizer: Tokenizer):
    ids = tokenizer.encode(f"a{END_OF_TEXT}b".replace("b", "t"))
    assert tokenizer.end_of_text == tokenizer.vocab_size - 1
    assert tokenizer.end_of_text not in ids
    assert tokenizer.decode(ids) == f"a{END_OF_TEXT}t"
    assert tokenizer.decode([tokenizer.end_of_text]) == END_OF_TEXT


@pytest.mark.parametrize("size", [5, 60, 2**16])
@pytest.mark.parametrize("mark_ends", [True, False])
@pytest.mark.parametrize("gigatoken", [True, False])
def test_many_texts_at_once_have_the_tokens_of_each(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, size: int, mark_ends: bool, gigatoken: bool
):
    monkeypatch.setattr("nanogpt.corpus.tokenizer._PART", size)
    if gigatoken and isinstance(tokenizer, BytePairTokenizer):
        monkeypatch.setattr(tokenizer, "_batch", None)
        tokenizer.use_gigatoken(warn=pytest.fail)
    texts = ["", TEXT, " ", "the ", " \n", "", "cat's", END_OF_TEXT, "1234 ünïcödé 你好 🙂\n\n", ""]
    expected: list[int] = []
    for text in texts:
        expected += [*tokenizer.encode(text), *[tokenizer.vocab_size - 1] * mark_ends]
    ids = tokenizer.encode_all(texts, mark_ends)
    assert ids.dtype == tokenizer.dtype
    assert ids.tolist() == expected
    assert tokenizer.encode_all([], mark_ends).tolist() == []


def test_a_stream_holds_unfinished_characters_back(tokenizer: Tokenizer):
    parts = list(tokenizer.stream(int(token) for token in tokenizer.encode("🙂 你好")))
    assert "".join(parts) == "🙂 你好"
    assert not any("\ufffd" in part for part in parts)


def test_a_stream_that_ends_within_a_character_says_so(trained: TrainedTokenizer):
    ids = [int(token) for token in trained.encode("🙂")][:-1]
    assert "".join(trained.stream(ids)) == trained.decode(ids)
    assert trained.decode(ids).endswith("\ufffd")


@pytest.mark.parametrize("token", [-1, 10**6])
def test_an_id_out_of_range_is_refused(tokenizer: Tokenizer, token: int):
    with refuses(rf"token {token} is not in the vocabulary of {tokenizer.vocab_size} tokens"):
        tokenizer.decode([token])


def test_half_a_character_is_refused_not_replaced(tokenizer: Tokenizer):
    with refuses(r"U\+D83D.* at position 1 |position 1 is half a character"):
        tokenizer.encode("a\ud83d")


def test_a_saved_tokenizer_is_the_same(tokenizer: Tokenizer, tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = load_tokenizer(path, tokenizer.sha256)
    assert type(loaded) is type(tokenizer)
    assert (loaded.vocab_size, loaded.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)
    assert loaded.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == tokenizer.sha256 == loaded.sha256


def test_end_of_text_is_part_of_the_identity():
    assert CharTokenizer("ab", True).sha256 != CharTokenizer("ab", False).sha256
    assert CharTokenizer("ab", False).end_of_text is None


# --- characters -------------------------------------------------------------------------------------------------------


@given(ANY_TEXT.filter(bool))
@settings(max_examples=50, deadline=None)
def test_characters_are_numbered_in_code_point_order(text: str):
    alphabet = Alphabet()
    for start in range(0, len(utf8 := text.encode()), 3):
        alphabet.add(utf8[start : start + 3])
    tokenizer = CharTokenizer(alphabet.characters(), end_of_text=False)
    order = sorted(set(text))
    assert tokenizer.characters == "".join(order)
    assert tokenizer.encode(text).tolist() == [order.index(c) for c in text]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("abx", r"character 'x' \(U\+0078\) at position 2 is not one of the 3 characters of the vocabulary; remove"),
        ("aé", r"character 'é' \(U\+00E9\) at position 1"),
        ("ü🙂", r"character '🙂' \(U\+1F642\) at position 1"),
    ],
)
def test_an_unknown_character_is_named(text: str, message: str):
    with refuses(message):
        CharTokenizer("abü", end_of_text=True).encode(text)


def test_a_large_vocabulary_takes_four_bytes():
    characters = "".join(chr(code) for code in range(0x10000, 0x10000 + 2**16))
    assert CharTokenizer(characters, end_of_text=False).dtype == np.dtype("<u2")
    large = CharTokenizer(characters, end_of_text=True)
    assert large.dtype == np.dtype("<u4")
    assert large.encode(characters[-2:]).tolist() == [65534, 65535]


# --- byte pairs -------------------------------------------------------------------------------------------------------


def test_gpt2_is_gpt2(gpt2_files: Path):
    tokenizer = Gpt2Tokenizer()
    assert tokenizer.encode("Hello, world!").tolist() == [15496, 11, 995, 0]
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)


@given(left=TRICKY, right=TRICKY)
@settings(max_examples=150, deadline=None)
def test_a_cut_does_not_change_the_tokens(left: str, right: str, gpt2_files: Path, trained: TrainedTokenizer):
    for tokenizer in (Gpt2Tokenizer(), trained):
        cut = tokenizer.last_cut(left)
        head, tail = left[:cut], left[cut:] + right
        assert [*tokenizer.encode(head), *tokenizer.encode(tail)] == tokenizer.encode(left + right).tolist()


def test_a_cut_anywhere_would_change_the_tokens(gpt2_files: Path):
    tokenizer = Gpt2Tokenizer()
    assert [*tokenizer.encode("the c"), *tokenizer.encode("at")] != tokenizer.encode("the cat").tolist()


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("a b c", 3),
        ("a\n\nb", 1),
        ("ab", 0),
        ("", 0),
        ("  ", 0),
        ("a  b", 1),
        ("a ", 1),
        ("a,b", 2),
        ("你\u3002好吗", 2),
        (".'s", 0),
        ("1.2", 0),
    ],
)
def test_cuts_lie_before_white_space(text: str, cut: int, trained: TrainedTokenizer):
    assert trained.last_cut(text) == cut


def test_a_long_word_does_not_make_the_rest_one_part(trained: TrainedTokenizer, monkeypatch: pytest.MonkeyPatch):
    """Parts are longer only where they must be, which bounds memory."""
    monkeypatch.setattr("nanogpt.corpus.tokenizer._PART", 10)
    text = "some words " * 5 + "x" * 75 + " some words" * 30
    parts = list(trained.parts(text))
    assert "".join(parts) == text
    assert sorted(len(part) <= 10 for part in parts).count(False) == 1
    assert 75 < max(map(len, parts)) <= 160


@pytest.mark.parametrize("kind", ["gpt2", "bpe"])
def test_a_word_without_end_is_encoded_in_bounded_parts(
    kind: str, gpt2_files: Path, trained: TrainedTokenizer, monkeypatch: pytest.MonkeyPatch
):
    tokenizer = Gpt2Tokenizer() if kind == "gpt2" else trained
    text = "the cat " + "acgt" * 50_000 + " the cat"
    assert tokenizer.encode_all([text], False).tolist() == tokenizer.encode(text).tolist()
    monkeypatch.setattr("nanogpt.corpus.tokenizer._PART", 10)
    monkeypatch.setattr("nanogpt.corpus.tokenizer._LONGEST_PART", 999)
    assert max(map(len, tokenizer.parts(text))) == 999
    assert tokenizer.decode(tokenizer.encode_all([text], False)) == text


@given(text=ANY_TEXT)
@settings(max_examples=50, deadline=None)
def test_any_text_comes_back_from_bytes(text: str, trained: TrainedTokenizer):
    assert trained.decode(trained.encode(text)) == text
    assert "".join(trained.stream(int(token) for token in trained.encode(text))) == text


def test_the_library_that_trains_would_encode_alike(trained: TrainedTokenizer, shakespeare: Path):
    """tiktoken merges by token, the library by merge; on real text the result is the same."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers

    text = shakespeare.read_text()[:200_000]
    tokenizer = train_bpe([text], vocab_size=1000, end_of_text=False)
    spelt = byte_characters()
    for left, right in tokenizer.merges:
        spelt.append(spelt[left] + spelt[right])
    merges = [(spelt[left], spelt[right]) for left, right in tokenizer.merges]
    library = Library(models.BPE(vocab={token: i for i, token in enumerate(spelt)}, merges=merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert tokenizer.vocab_size == 1000
    assert library.encode(text).ids == tokenizer.encode(text).tolist()


def test_bytes_are_spelt_as_the_library_does():
    from tokenizers import pre_tokenizers

    assert sorted(byte_characters()) == sorted(pre_tokenizers.ByteLevel.alphabet())


def test_training_merges_what_is_frequent():
    tokenizer = train_bpe(["low lower lowest"] * 10, vocab_size=259, end_of_text=True)
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (259, 258)
    assert [tokenizer.decode([i]) for i in (256, 257)] == ["lo", "low"]


def test_a_small_text_yields_fewer_tokens():
    assert train_bpe(["aa"], vocab_size=1000, end_of_text=False).vocab_size == 257


def test_training_does_not_depend_on_threads(tmp_path: Path):
    text = tmp_path / "text"
    text.write_text(TEXT * 20, encoding="utf-8")
    code = (
        "import sys; from nanogpt.corpus.bpe_training import train_bpe\n"
        "text = open(sys.argv[1], encoding='utf-8').read()\n"
        "print(train_bpe([text[i:i + 999] for i in range(0, len(text), 999)], 420, True).sha256)"
    )
    hashes = set()
    for setting in ({"RAYON_NUM_THREADS": "1"}, {"RAYON_NUM_THREADS": "5"}, {"TOKENIZERS_PARALLELISM": "false"}):
        command = [sys.executable, "-c", code, str(text)]
        result = subprocess.run(command, env=os.environ | setting, capture_output=True, text=True, check=True)
        hashes.add(result.stdout)
    assert len(hashes) == 1


def test_gpt2_without_network_names_the_host_and_the_remedy(tmp_path: Path):
    code = (
        "from nanogpt.corpus.tokenizer import *\n"
        "try: Gpt2Tokenizer().encode('a')\nexcept ValueError as error: print(error)"
    )
    unreachable = {"TIKTOKEN_CACHE_DIR": str(tmp_path), "HTTPS_PROXY": "http://me:secret@127.0.0.1:1", "NO_PROXY": ""}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=os.environ | unreachable, capture_output=True, text=True, check=True)
    assert "could not be fetched from openaipublic.blob.core.windows.net" in result.stdout
    assert "TIKTOKEN_CACHE_DIR" in result.stdout
    assert "char and bpe need no network" in result.stdout
    assert "secret" not in result.stdout


def test_gpt2_is_loaded_only_when_it_encodes(tmp_path: Path):
    tokenizer = Gpt2Tokenizer()
    tokenizer.save(tmp_path / "tokenizer.json")
    assert isinstance(load_tokenizer(tmp_path / "tokenizer.json"), BytePairTokenizer)
    assert "_encoding" not in vars(tokenizer)


# --- damaged files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is damaged"),
        (b'{"name"', "is damaged"),
        (b"[]", "it is not a JSON object"),
        (b"\xff", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (b"{}", "vocab_size"),
        (b'{"vocab_size": 99999999999, "name": "char"}', "vocab_size is not a valid number"),
        (b'{"vocab_size": 2, "name": "words", "end_of_text": null}', "tokenizer 'words' is unknown"),
        (b'{"characters": "ba", "end_of_text": null, "name": "char", "vocab_size": 2}\n', "sorted and distinct"),
        (b'{"characters": "ab", "end_of_text": null, "name": "char", "vocab_size": 3}\n', "its entries contradict"),
        (b'{"characters": "ab", "end_of_text": null, "name": "char", "vocab_size": 2}', "its entries contradict"),
        (b'{"characters": 5, "end_of_text": null, "name": "char", "vocab_size": 2}', "is damaged"),
        (b'{"end_of_text": null, "merges": [[97]], "name": "bpe", "vocab_size": 257}\n', r"\[97\] is not a merge"),
        (
            b'{"end_of_text": null, "merges": [[97, 256]], "name": "bpe", "vocab_size": 257}\n',
            "uses a token that a later merge makes",
        ),
        (b'{"end_of_text": null, "merges": [[97, 98], [97, 98]], "name": "bpe", "vocab_size": 258}\n', "the same"),
        (b'{"end_of_text": 5, "name": "gpt2", "vocab_size": 50257}\n', "its entries contradict"),
    ],
)
def test_a_damaged_file_is_named(content: bytes, problem: str, tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with refuses(problem, Damaged) as error:
        load_tokenizer(path)
    assert str(error.value).startswith(f"{path} ")
    assert "\n" not in str(error.value)


def test_a_token_of_absurd_length_is_refused(tmp_path: Path):
    doubling = [[97, 97], *([i, i] for i in range(256, 300))]
    content = {"end_of_text": None, "merges": doubling, "name": "bpe", "vocab_size": 256 + len(doubling)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content) + "\n")
    with refuses("a token is longer than 65536 bytes", Damaged):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_missing_file_and_a_foreign_one_are_distinguished(tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    with refuses(r"tokenizer\.json cannot be read \(No such file or directory\)", Damaged):
        load_tokenizer(path)
    CharTokenizer("ab", False).save(path)
    with refuses("is not the expected tokenizer", Damaged):
        load_tokenizer(path, "0" * 64)


def test_a_file_of_hugging_faces_tokenizers_is_named_as_what_it_is(tmp_path: Path):
    from tokenizers import Tokenizer as Theirs
    from tokenizers import models

    Theirs(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(Damaged, match=r"is a Hugging Face tokenizer, but only one that the tokenize stage"):
        load_tokenizer(tmp_path / "tokenizer.json")
