"""Property tests: for any bytes a parser returns what was written, or refuses in one line; nothing else happens."""

import gzip
import hashlib
import io
import json
import pickle
import pickletools
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from ruamel.yaml import YAML

from nanogpt.batches import batch
from nanogpt.corpus.huggingface_tokenizer import read_huggingface
from nanogpt.corpus.meta_pickle import characters
from nanogpt.corpus.prepare import prepare
from nanogpt.corpus.raw_text import load_info, read_documents, read_text
from nanogpt.corpus.sources import write_corpus
from nanogpt.corpus.token_files import load_meta, load_split
from nanogpt.corpus.tokenizer import CharTokenizer, TrainedTokenizer, load_tokenizer
from nanogpt.files import sha256_file, sha256_json
from nanogpt.model import KVCache
from nanogpt.params import DownloadParams, TokenizeParams, load_params
from nanogpt.saved_model import load_model, save_model
from tests.conftest import BUILT_IN
from tests.nanogpt import tiny
from tests.nanogpt.corpus.made import write_raw, write_tokens
from tests.safety.hostile import changed_json, dumped, harmless, inputs, mutant, parsed, swapped

SOURCE = YAML(typ="safe").load(BUILT_IN.read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


# --- params.yaml ------------------------------------------------------------------------------------------------------


def test_params(folder: Path) -> None:
    path, text = folder / "params.yaml", io.BytesIO()
    YAML(typ="safe").dump(SOURCE, text)
    path.write_bytes(text.getvalue())
    expected = load_params(path)
    with harmless("load_params", folder):
        for data, _ in inputs(500, text.getvalue(), changed_json(SOURCE)):
            path.write_bytes(data)
            found = parsed("load_params", lambda: load_params(path))
            assert found is None or type(found) is type(expected)


# --- data/tokens ------------------------------------------------------------------------------------------------------


def test_meta(folder: Path) -> None:
    path = write_tokens(folder) / "meta.json"
    whole = path.read_bytes()
    with harmless("load_meta", folder):
        for data, _ in inputs(1000, whole, changed_json(json.loads(whole))):
            path.write_bytes(data)
            if (meta := parsed("load_meta", lambda: load_meta(folder))) is not None:
                assert meta.vocab_size <= 2**21
                assert f"{meta.train.tokens:,} {meta.train.bytes:,}"


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_split(folder: Path, dtype: str) -> None:
    """Also of a stranger whose meta.json confirms whatever the file is."""
    path = write_tokens(folder, dtype=dtype) / "val.bin"
    whole, meta = path.read_bytes(), json.loads((folder / "meta.json").read_bytes())
    with harmless("load_split", folder):
        for data, draw in inputs(500, whole):
            path.write_bytes(data)
            split = {**meta["val"], "first_context": (first_context := draw.choice([0, 6, 7, 2**31, None]))}
            if draw.randrange(2):
                size = np.dtype(dtype).itemsize
                split |= {"sha256": hashlib.sha256(data).hexdigest(), "tokens": max(1, len(data) // size)}
            (folder / "meta.json").write_text(json.dumps({**meta, "val": split}))
            if (found := parsed("load_split", lambda: load_split(folder, "val"))) is not None:
                assert found.tokens.tobytes() == data
                assert found.tokens.max() < 7
                assert first_context in (0, 6, None)
                if len(found.tokens) > 1:
                    assert batch(found.tokens, tiny.train_params(), 2, range(3), 1)[0].max() < 7


# --- data/raw ---------------------------------------------------------------------------------------------------------


DOCUMENTS = ["one\n", "zwölf 🙂", '"three" \\']


@pytest.mark.parametrize("documents", [DOCUMENTS, DOCUMENTS[1:2]])
def test_info(folder: Path, documents: list[str]) -> None:
    write_raw(raw := folder / "raw", documents, source="grammar")
    whole = (raw / "corpus.json").read_bytes()
    with harmless("load_info", folder):
        for data, _ in inputs(400, whole, changed_json(json.loads(whole))):
            (raw / "corpus.json").write_bytes(data)
            if (info := parsed("load_info", lambda: load_info(raw))) is not None:
                assert all((raw / name).resolve().parent == raw.resolve() for name in info.files)
                assert parsed("read_documents", lambda: list(read_documents(raw))) in (None, documents)
                parsed("read_text", lambda: list(read_text(raw)))


@pytest.mark.parametrize("documents", [DOCUMENTS, DOCUMENTS[1:2]])
def test_documents(folder: Path, documents: list[str]) -> None:
    [name] = write_raw(raw := folder / "raw", documents, source="grammar").files
    path = raw / name
    whole, info = path.read_bytes(), json.loads((raw / "corpus.json").read_bytes())
    read: Callable[[Path], Any] = read_documents if len(documents) > 1 else read_text
    parser = "read_documents" if len(documents) > 1 else "read_text"

    def lines(draw: Random) -> bytes:
        return b"".join(dumped(swapped(draw, {"text": "one\n"})) for _ in range(3))

    with harmless(parser, folder):
        for data, draw in inputs(600, whole, lines):
            path.write_bytes(data)
            confirmed = draw.randrange(2)
            files = {path.name: hashlib.sha256(data).hexdigest()} if confirmed else info["files"]
            (raw / "corpus.json").write_text(json.dumps({**info, "files": files}))
            if (texts := parsed(parser, lambda: list(read(raw)))) is not None:
                assert all(text.encode() for text in texts if text)
                assert confirmed or "".join(texts) == "".join(documents)


# --- token files of a stranger ----------------------------------------------------------------------------------------


def with_pair(folder: Path, vocabulary: bytes, train: bytes, val: bytes = b"\0\0") -> Path:
    """data/raw with token files of a stranger."""
    given, raw = folder / "given", folder / "raw"
    for directory in (given, raw):
        shutil.rmtree(directory, ignore_errors=True)
    given.mkdir()
    for name, data in (("train.bin", train), ("val.bin", val), ("meta.pkl", vocabulary)):
        (given / name).write_bytes(data)
    write_corpus(DownloadParams(**{**SOURCE["download"], "source": f"bin:{given}"}), raw)
    return raw


VOCABULARY = {"vocab_size": 3, "itos": dict(enumerate("aéñ")), "stoi": {c: i for i, c in enumerate("aéñ")}}
PICKLES = [pickle.dumps(VOCABULARY, protocol) for protocol in (2, 4)]
TOKENIZE = TokenizeParams(**{**SOURCE["tokenize"], "tokenizer": "char"})
OPCODES = [code.code.encode("latin1") for code in pickletools.opcodes]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pickletools, for escapes in instructions we refuse
@pytest.mark.parametrize("whole", PICKLES, ids=["protocol 2", "protocol 4"])
def test_vocabulary(folder: Path, whole: bytes) -> None:
    def program(draw: Random) -> bytes:
        made = b"".join(draw.choices(OPCODES, k=draw.randrange(41))) + draw.randbytes(draw.randrange(9))
        return whole[:-1] + made + draw.choice([b"", whole])

    def vocabulary(data: bytes) -> str:
        try:
            return characters(data)
        except ValueError as error:  # as `prepare` reports it
            raise ValueError(" ".join(str(error).split())[:200]) from error

    with harmless("meta.pkl", folder):
        for data, _ in inputs(1000, whole, program, program):
            if (found := parsed("meta.pkl", lambda data=data: vocabulary(data))) is not None:
                assert len(found) >= 1
                assert list(found) == sorted(set(found))


def test_token_files(folder: Path) -> None:
    """The whole way, of files whose hashes are right since they were copied here."""
    ids, npy = np.array([0, 1, 2, 0, 2], dtype="<u2"), io.BytesIO()
    np.save(npy, ids)
    with harmless("bin:", folder, writes=True):
        for data, draw in [*inputs(150, ids.tobytes()), *inputs(150, npy.getvalue())]:
            raw = with_pair(folder, draw.choice([PICKLES[1], mutant(draw, PICKLES[1])]), data)
            shutil.rmtree(folder / "tokens", ignore_errors=True)
            if parsed("bin:", lambda raw=raw: prepare(raw, folder / "tokens", TOKENIZE, 1)) is not None:
                assert data.endswith(load_split(folder / "tokens", "train").tokens.tobytes())


# --- tokenizer.json ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokenizer", [CharTokenizer("\n abcé", True), TrainedTokenizer([(97, 98), (256, 256), (257, 99)], True)]
)
def test_tokenizer(folder: Path, tokenizer: Any) -> None:
    path = folder / "tokenizer.json"
    tokenizer.save(path)
    whole = path.read_bytes()
    with harmless("load_tokenizer", folder):
        for data, _ in inputs(800, whole, changed_json(json.loads(whole))):
            path.write_bytes(data)
            if (found := parsed("load_tokenizer", lambda: load_tokenizer(path))) is not None:
                assert found.to_json().encode() == data
                assert len(found.decode_bytes(range(found.vocab_size))) >= 1 or found.name == "gpt2"


def test_tokenizer_of_hugging_face(folder: Path) -> None:
    path, model = folder / "theirs.json", {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    theirs = {"model": model, "normalizer": None, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}
    path.touch()
    with harmless("read_huggingface", folder):
        for data, _ in inputs(500, dumped(theirs), changed_json(theirs)):
            path.write_bytes(data)
            if (found := parsed("read_huggingface", lambda: read_huggingface(path))) is not None:
                assert found.decode(found.encode("ab")) == "ab"


# --- model ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(folder: Path) -> Path:
    gpt = tiny.gpt(seed=1, std=0.5, bias=False, n_layer=1)
    tiny.char_tokenizer(folder / "tokenizer.json")
    save_model(folder / "model", gpt.config, tiny.weights(gpt), folder / "tokenizer.json", {"step": 7})
    return folder / "model"


def run(gpt: Any) -> None:
    """A loaded model gives logits."""
    cache = KVCache(gpt.model.config, 1, torch.device("cpu"), gpt.model.wte.weight.dtype)
    assert gpt.model(torch.tensor([[0]]), cache=cache).shape[:2] == (1, 1)


def test_model_json(folder: Path, model: Path) -> None:
    """Also of a stranger who makes its hash anew."""
    path = model / "model.json"
    whole = path.read_bytes()
    content = json.loads(whole)
    content.pop("meta_sha256")

    def rehashed(content: dict[str, Any]) -> bytes:
        return dumped({**content, "meta_sha256": sha256_json(content)})

    def other_config(draw: Random) -> bytes:
        return rehashed({**content, "config": swapped(draw, content["config"])})

    with harmless("load_model (model.json)", folder):
        for data, _ in inputs(1000, whole, other_config, lambda draw: rehashed(swapped(draw, content))):
            path.write_bytes(data)
            if (found := parsed("load_model (model.json)", lambda: load_model(model))) is not None:
                run(found)


def test_weights(folder: Path, model: Path) -> None:
    """Also of a stranger whose model.json confirms whatever the file is."""
    path = model / "weights.safetensors"
    whole, expected = path.read_bytes(), load_model(model)
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])

    def other_header(draw: Random) -> bytes:
        data = dumped(swapped(draw, header))
        return len(data).to_bytes(8, "little") + data + whole[8 + length :]

    with harmless("load_model (weights)", folder):
        for data, draw in inputs(1000, whole, whole[: 8 + length], other_header):
            path.write_bytes(data)
            confirmed = draw.randrange(2)
            digest = sha256_file(path) if confirmed else hashlib.sha256(whole).hexdigest()
            tiny.edit_json(model / "model.json", weights_sha256=digest)
            if (found := parsed("load_model (weights)", lambda: load_model(model))) is not None:
                run(found)
                assert confirmed or tiny.same(tiny.weights(found.model), tiny.weights(expected.model))


# --- sources of text --------------------------------------------------------------------------------------------------


def parquet(texts: list[Any]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), sink)
    return sink.getvalue()


def changed_lines(draw: Random) -> bytes:
    return b"".join(dumped(swapped(draw, {"text": "one", "id": 2})) for _ in range(2))


TEXT = b"some text\nand z\xc3\xb6re\n"
LINES = b'{"text": "one"}\n{"text": "zw\xc3\xb6lf", "id": 2}\n'
ARRAY = [{"text": "one"}, {"text": "two", "id": 2}]
SOURCES: dict[str, list[bytes | Callable[[Random], bytes]]] = {
    "txt": [TEXT],
    "txt.gz": [gzip.compress(TEXT, mtime=0), lambda draw: gzip.compress(mutant(draw, TEXT))],
    "jsonl": [LINES, changed_lines],
    "jsonl.gz": [gzip.compress(LINES, mtime=0), lambda draw: gzip.compress(mutant(draw, LINES))],
    "json": [b'[{"text": "one"}, {"text": "zw\xc3\xb6lf", "id": 2}]', lambda draw: dumped(swapped(draw, ARRAY))],
    "csv": [b'id,text\n1,one\n2,"zw\xc3\xb6lf, ""or"" so"\n'],
    "parquet": [parquet(["one", "two"])],
}


@pytest.mark.parametrize("suffix", SOURCES)
def test_source(folder: Path, suffix: str) -> None:
    path = folder / f"text.{suffix}"
    params = DownloadParams(**{**SOURCE["download"], "source": f"file:{path}", "max_gigabytes": 1e-4})
    with harmless(f"corpus (.{suffix})", folder, writes=True):
        for number, (data, _) in enumerate(inputs(500, *SOURCES[suffix])):
            path.write_bytes(data)
            raw = folder / f"raw-{number}"
            info = parsed(f"corpus (.{suffix})", lambda raw=raw: write_corpus(params, raw))
            assert info is None or len(list(read_documents(raw))) == info.documents
