import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanogpt.corpus.token_files import SplitName, load_meta, load_split
from nanogpt.files import Damaged
from tests.nanogpt.corpus.made import TOKENS, refuses, write_tokens


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("name", ["train", "val"])
def test_a_split_is_opened_as_it_was_written(tmp_path: Path, dtype: str, name: SplitName):
    split = load_split(write_tokens(tmp_path, dtype=dtype), name)
    assert (split.name, split.tokens.dtype, split.meta.tokens) == (name, np.dtype(dtype), 1000)
    assert split.tokens.tolist() == TOKENS.tolist()
    assert isinstance(split.tokens, np.memmap)
    with refuses("read-only"):
        split.tokens[0] = 1


def test_a_cut_file_is_refused_by_its_size(tmp_path: Path):
    path = write_tokens(tmp_path / "tokens") / "val.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with refuses(r"tokens/val\.bin has 1,998 bytes, but meta\.json says 2,000$", Damaged):
        load_split(tmp_path / "tokens", "val")
    load_split(tmp_path / "tokens", "train")


def test_a_flipped_bit_is_refused_by_its_hash(tmp_path: Path):
    path = write_tokens(tmp_path) / "train.bin"
    data = bytearray(path.read_bytes())
    data[777] ^= 1
    path.write_bytes(data)
    with refuses(r"train\.bin has sha256 \w+, but meta\.json says \w+$", Damaged):
        load_split(tmp_path, "train")


@pytest.mark.parametrize("tokens", [[0, 7, 1], [65535], [6] * 600_000 + [7]])
def test_a_token_that_is_not_of_the_vocabulary_is_refused(tmp_path: Path, tokens: list[int]):
    with refuses(r"val\.bin has token [\d,]+, but meta\.json says that the vocabulary has 7$", Damaged):
        load_split(write_tokens(tmp_path, tokens), "val")


def test_missing_files_are_named(tmp_path: Path):
    with refuses(r"meta\.json cannot be read \(No such file or directory\)$", Damaged):
        load_meta(tmp_path)
    (write_tokens(tmp_path) / "train.bin").unlink()
    with refuses(r"train\.bin cannot be read \(No such file or directory\)$", Damaged):
        load_split(tmp_path, "train")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        *(({"dtype": "float32"}, "dtype"), ({"end_of_text": -1}, "end_of_text"), ({"vocab_size": "7"}, "vocab_size")),
        *(({"vocab_size": 0}, "vocab_size"), ({"extra": 1}, "extra"), ({"train": {}}, r"train\.tokens")),
        ({"tokenizer_sha256": "../x"}, "tokenizer_sha256"),
    ],
)
def test_a_damaged_meta_is_refused(tmp_path: Path, changes: dict[str, Any], problem: str):
    with refuses(rf"meta\.json is damaged \({problem}: ", Damaged) as error:
        load_meta(write_tokens(tmp_path, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"\xff\xfe", b"[" * 10_000])
def test_a_meta_that_is_no_json_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "meta.json").write_bytes(content)
    with refuses(r"meta\.json is damaged", Damaged):
        load_meta(tmp_path)


def test_an_unknown_key_does_not_break_the_line(tmp_path: Path):
    write_tokens(tmp_path)
    content = json.loads((tmp_path / "meta.json").read_bytes())
    (tmp_path / "meta.json").write_text(json.dumps({**content, "a\nb": 1}))
    with refuses(r"meta\.json is damaged \(a b: ", Damaged) as error:
        load_meta(tmp_path)
    assert "\n" not in str(error.value)


def test_data_needs_no_torch():
    code = "import sys, nanogpt.corpus.token_files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
