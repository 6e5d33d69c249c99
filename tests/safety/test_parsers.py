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
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from nanogpt.batches import batch
from nanogpt.corpus.meta_pickle import characters
from nanogpt.corpus.prepare import prepare
from nanogpt.corpus.raw_text import Writer, load_info, read_documents, read_text
from nanogpt.corpus.sources import write_corpus
from nanogpt.corpus.token_files import load_meta, load_split
from nanogpt.corpus.tokenizer import CharTokenizer, TrainedTokenizer, load_tokenizer
from nanogpt.files import sha256_file, sha256_json
from nanogpt.model import KVCache
from nanogpt.params import DownloadParams, TokenizeParams, load_params
from nanogpt.saved_model import load_model, save_model
from tests.nanogpt import tiny
from tests.nanogpt.corpus.test_token_files import write as write_tokens
from tests.safety.hostile import dumped, harmless, limits, mutants, parsed, swapped

REPOSITORY = Path(__file__).parents[2]
SOURCE = YAML(typ="safe").load((REPOSITORY / "params.yaml").read_text(encoding="utf-8"))


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

    @limits(500)
    @given(mutants(text.getvalue()) | swapped(SOURCE).map(lambda content: json.dumps(content).encode()))
    def holds(data: bytes) -> None:
        path.write_bytes(data)
        found = parsed("load_params", lambda: load_params(path))
        assert found is None or type(found) is type(expected)

    with harmless("load_params", folder):
        holds()


# --- data/tokens ------------------------------------------------------------------------------------------------------


def test_meta(folder: Path) -> None:
    path = write_tokens(folder) / "meta.json"
    whole = path.read_bytes()

    @limits(1000)
    @given(mutants(whole) | swapped(json.loads(whole)).map(dumped))
    def holds(data: bytes) -> None:
        path.write_bytes(data)
        if (meta := parsed("load_meta", lambda: load_meta(folder))) is not None:
            assert meta.vocab_size <= 2**21
            assert f"{meta.train.tokens:,} {meta.train.bytes:,}"

    with harmless("load_meta", folder):
        holds()


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_split(folder: Path, dtype: str) -> None:
    """Also of a stranger whose meta.json confirms whatever the file is."""
    path = write_tokens(folder, dtype=dtype) / "val.bin"
    whole, meta = path.read_bytes(), json.loads((folder / "meta.json").read_bytes())

    @limits(500)
    @given(mutants(whole), st.booleans(), st.sampled_from([0, 6, 7, 2**31, None]))
    def holds(data: bytes, confirmed: bool, first_context: int | None) -> None:
        path.write_bytes(data)
        split = {**meta["val"], "first_context": first_context}
        if confirmed:
            size = np.dtype(dtype).itemsize
            split |= {"sha256": hashlib.sha256(data).hexdigest(), "tokens": max(1, len(data) // size)}
        (folder / "meta.json").write_text(json.dumps({**meta, "val": split}))
        if (found := parsed("load_split", lambda: load_split(folder, "val"))) is not None:
            assert found.tokens.tobytes() == data
            assert found.tokens.max() < 7
            assert first_context in (0, 6, None)
            if len(found.tokens) > 1:
                assert batch(found.tokens, tiny.train_params(), 2, range(3), 1)[0].max() < 7

    with harmless("load_split", folder):
        holds()


# --- data/raw ---------------------------------------------------------------------------------------------------------


def write_raw(raw: Path, documents: list[str]) -> Path:
    writer = Writer(raw, 1.0, lambda done: None)
    for document in documents:
        writer.add([document])
    writer.close("grammar")
    [text] = [path for path in raw.iterdir() if path.name != "corpus.json"]
    return text


DOCUMENTS = ["one\n", "zwölf 🙂", '"three" \\']


@pytest.mark.parametrize("documents", [DOCUMENTS, DOCUMENTS[1:2]])
def test_info(folder: Path, documents: list[str]) -> None:
    write_raw(folder / "raw", documents)
    path = folder / "raw/corpus.json"
    whole = path.read_bytes()

    @limits(400)
    @given(mutants(whole) | swapped(json.loads(whole)).map(dumped))
    def holds(data: bytes) -> None:
        path.write_bytes(data)
        if (info := parsed("load_info", lambda: load_info(folder / "raw"))) is not None:
            assert all((folder / "raw" / name).resolve().parent == (folder / "raw").resolve() for name in info.files)
            texts = parsed("read_documents", lambda: list(read_documents(folder / "raw")))
            assert texts in (None, documents)
            parsed("read_text", lambda: list(read_text(folder / "raw")))

    with harmless("load_info", folder):
        holds()


@pytest.mark.parametrize("documents", [DOCUMENTS, DOCUMENTS[1:2]])
def test_documents(folder: Path, documents: list[str]) -> None:
    path = write_raw(folder / "raw", documents)
    whole, info = path.read_bytes(), json.loads((folder / "raw/corpus.json").read_bytes())
    parser = "read_documents" if len(documents) > 1 else "read_text"
    read: Callable[[Path], Any] = read_documents if len(documents) > 1 else read_text
    lines = st.lists(swapped({"text": "one\n"}).map(dumped), min_size=3, max_size=3).map(b"".join)

    @limits(600)
    @given(mutants(whole) | lines, st.booleans())
    def holds(data: bytes, confirmed: bool) -> None:
        path.write_bytes(data)
        files = {path.name: hashlib.sha256(data).hexdigest()} if confirmed else info["files"]
        (folder / "raw/corpus.json").write_text(json.dumps({**info, "files": files}))
        texts = parsed(parser, lambda: list(read(folder / "raw")))
        if texts is not None:
            assert all(text.encode() for text in texts if text)
            assert confirmed or "".join(texts) == "".join(documents)

    with harmless(parser, folder):
        holds()


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pickletools, for escapes in instructions we refuse
@pytest.mark.parametrize("whole", PICKLES, ids=["protocol 2", "protocol 4"])
def test_vocabulary(folder: Path, whole: bytes) -> None:
    instructions = st.lists(st.sampled_from([code.code.encode("latin1") for code in pickletools.opcodes]), max_size=40)
    made = st.tuples(instructions.map(b"".join), st.binary(max_size=8)).map(lambda parts: whole[:-1] + b"".join(parts))

    @limits(1000)
    @given(mutants(whole) | made | made.map(lambda data: data + whole))
    def holds(data: bytes) -> None:
        if (found := parsed("meta.pkl", lambda: wrapped(data))) is not None:
            assert len(found) >= 1
            assert list(found) == sorted(set(found))

    def wrapped(data: bytes) -> str:
        try:
            return characters(data)
        except ValueError as error:  # as `prepare` tells it
            raise ValueError(" ".join(str(error).split())[:200]) from error

    with harmless("meta.pkl", folder):
        holds()


def test_token_files(folder: Path) -> None:
    """The whole way, of files whose hashes are right since they were copied here."""
    whole = np.array([0, 1, 2, 0, 2], dtype="<u2").tobytes()

    @limits(150)
    @given(mutants(whole), mutants(PICKLES[1]))
    def holds(data: bytes, vocabulary: bytes) -> None:
        raw = with_pair(folder, vocabulary, data)
        shutil.rmtree(folder / "tokens", ignore_errors=True)
        if parsed("bin:", lambda: prepare(raw, folder / "tokens", TOKENIZE, 1)) is not None:
            assert load_split(folder / "tokens", "train").tokens.tobytes() == data

    with harmless("bin:", folder, writes=True):
        holds()


# --- tokenizer.json ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokenizer", [CharTokenizer("\n abcé", True), TrainedTokenizer([(97, 98), (256, 256), (257, 99)], True)]
)
def test_tokenizer(folder: Path, tokenizer: Any) -> None:
    path = folder / "tokenizer.json"
    tokenizer.save(path)
    whole = path.read_bytes()

    @limits(800)
    @given(mutants(whole) | swapped(json.loads(whole)).map(dumped))
    def holds(data: bytes) -> None:
        path.write_bytes(data)
        if (found := parsed("load_tokenizer", lambda: load_tokenizer(path))) is not None:
            assert found.to_json().encode() == data
            assert len(found.decode_bytes(range(found.vocab_size))) >= 1 or found.name == "gpt2"

    with harmless("load_tokenizer", folder):
        holds()


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

    config = swapped(content["config"]).map(lambda config: rehashed({**content, "config": config}))

    @limits(1000)
    @given(mutants(whole) | config | swapped(content).map(rehashed))
    def holds(data: bytes) -> None:
        path.write_bytes(data)
        if (found := parsed("load_model (model.json)", lambda: load_model(model))) is not None:
            run(found)

    with harmless("load_model (model.json)", folder):
        holds()


def test_weights(folder: Path, model: Path) -> None:
    """Also of a stranger whose model.json confirms whatever the file is."""
    path = model / "weights.safetensors"
    whole, expected = path.read_bytes(), load_model(model)
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])

    def with_header(content: Any) -> bytes:
        data = dumped(content)
        return len(data).to_bytes(8, "little") + data + whole[8 + length :]

    @limits(1000)
    @given(mutants(whole) | mutants(whole[: 8 + length]) | swapped(header).map(with_header), st.booleans())
    def holds(data: bytes, confirmed: bool) -> None:
        path.write_bytes(data)
        digest = sha256_file(path) if confirmed else hashlib.sha256(whole).hexdigest()
        tiny.edit_json(model / "model.json", weights_sha256=digest)
        if (found := parsed("load_model (weights)", lambda: load_model(model))) is not None:
            run(found)
            assert confirmed or tiny.same(tiny.weights(found.model), tiny.weights(expected.model))

    with harmless("load_model (weights)", folder):
        holds()


# --- sources of text --------------------------------------------------------------------------------------------------


def parquet(texts: list[Any]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), sink)
    return sink.getvalue()


LINES = b'{"text": "one"}\n{"text": "zw\xc3\xb6lf", "id": 2}\n'
SOURCES = {
    "txt": b"some text\nand z\xc3\xb6re\n",
    "txt.gz": gzip.compress(b"some text\nand more\n", mtime=0),
    "jsonl": LINES,
    "jsonl.gz": gzip.compress(LINES, mtime=0),
    "parquet": parquet(["one", "two"]),
}


@pytest.mark.parametrize("suffix", SOURCES)
def test_source(folder: Path, suffix: str) -> None:
    path = folder / f"text.{suffix}"
    params = DownloadParams(**{**SOURCE["download"], "source": f"file:{path}", "max_gigabytes": 1e-4})
    number = iter(range(10_000))

    @limits(500)
    @given(mutants(SOURCES[suffix]))
    def holds(data: bytes) -> None:
        path.write_bytes(data)
        raw = folder / f"raw-{next(number)}"
        info = parsed(f"corpus (.{suffix})", lambda: write_corpus(params, raw))
        assert info is None or len(list(read_documents(raw))) == info.documents

    with harmless(f"corpus (.{suffix})", folder, writes=True):
        holds()
