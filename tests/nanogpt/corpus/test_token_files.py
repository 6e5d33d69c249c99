import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanogpt.corpus.token_files import SplitName, load_meta, load_split
from nanogpt.files import Damaged

TOKENS = np.arange(1000) % 7


def write(directory: Path, tokens: Any = TOKENS, dtype: str = "uint16", **changes: Any) -> Path:
    """A directory of tokens with a true meta.json, or one that is changed."""
    directory.mkdir(exist_ok=True)
    splits = {}
    for name in ("train", "val"):
        data = np.asarray(tokens).astype(np.dtype(dtype).newbyteorder("<")).tobytes()
        (directory / f"{name}.bin").write_bytes(data)
        splits[name] = {
            "tokens": len(tokens),
            "bytes": len(tokens),
            "documents": 1,
            "sha256": hashlib.sha256(data).hexdigest(),
            "first_context": None,
        }
    meta = {
        "dtype": dtype,
        "vocab_size": 7,
        "tokenizer": "char",
        "tokenizer_sha256": "0" * 64,
        "end_of_text": None,
        "corpus": {"source": "grammar", "documents": 1},
    }
    (directory / "meta.json").write_text(json.dumps(meta | splits | changes))
    return directory


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("name", ["train", "val"])
def test_a_split_is_opened_as_it_was_written(tmp_path: Path, dtype: str, name: SplitName):
    split = load_split(write(tmp_path, dtype=dtype), name)
    assert (split.name, split.tokens.dtype, split.meta.tokens) == (name, np.dtype(dtype), 1000)
    assert split.tokens.tolist() == TOKENS.tolist()
    assert isinstance(split.tokens, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        split.tokens[0] = 1


def test_a_cut_file_is_refused_by_its_size(tmp_path: Path):
    path = write(tmp_path / "tokens") / "val.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(Damaged, match=r"tokens/val\.bin has 1,998 bytes and meta\.json says 2,000$"):
        load_split(tmp_path / "tokens", "val")
    load_split(tmp_path / "tokens", "train")


def test_a_flipped_bit_is_refused_by_its_hash(tmp_path: Path):
    path = write(tmp_path) / "train.bin"
    data = bytearray(path.read_bytes())
    data[777] ^= 1
    path.write_bytes(data)
    with pytest.raises(Damaged, match=r"train\.bin has sha256 \w+ and meta\.json says \w+$"):
        load_split(tmp_path, "train")


@pytest.mark.parametrize("tokens", [[0, 7, 1], [65535], [6] * 600_000 + [7]])
def test_a_token_that_is_not_of_the_vocabulary_is_refused(tmp_path: Path, tokens: list[int]):
    with pytest.raises(Damaged, match=r"val\.bin has token [\d,]+ and meta\.json a vocabulary of 7$"):
        load_split(write(tmp_path, tokens), "val")


def test_missing_files_are_named(tmp_path: Path):
    with pytest.raises(Damaged, match=r"meta\.json cannot be read \(No such file or directory\)$"):
        load_meta(tmp_path)
    (write(tmp_path) / "train.bin").unlink()
    with pytest.raises(Damaged, match=r"train\.bin cannot be read \(No such file or directory\)$"):
        load_split(tmp_path, "train")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"dtype": "float32"}, "dtype"),
        ({"end_of_text": -1}, "end_of_text"),
        ({"vocab_size": "7"}, "vocab_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"extra": 1}, "extra"),
        ({"tokenizer_sha256": "../x"}, "tokenizer_sha256"),
        ({"train": {}}, r"train\.tokens"),
    ],
)
def test_a_damaged_meta_is_refused(tmp_path: Path, changes: dict[str, Any], problem: str):
    with pytest.raises(Damaged, match=rf"meta\.json is damaged \({problem}: ") as error:
        load_meta(write(tmp_path, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"\xff\xfe", b"[" * 10_000])
def test_a_meta_that_is_no_json_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "meta.json").write_bytes(content)
    with pytest.raises(Damaged, match=r"meta\.json is damaged"):
        load_meta(tmp_path)


def test_data_needs_no_torch():
    code = "import sys, nanogpt.corpus.token_files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
