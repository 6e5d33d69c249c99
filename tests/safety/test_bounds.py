"""Small files that claim much: each is refused in seconds and little memory, in a process that has no more."""

import gzip
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from nanogpt.corpus.huggingface_tokenizer import read_huggingface
from nanogpt.corpus.meta_pickle import characters
from nanogpt.corpus.prepare import prepare
from nanogpt.corpus.raw_text import load_info, read_documents
from nanogpt.corpus.sources import write_corpus
from nanogpt.corpus.token_files import load_meta, load_split
from nanogpt.corpus.tokenizer import load_tokenizer
from nanogpt.files import sha256_file
from nanogpt.params import DownloadParams, load_params
from nanogpt.saved_model import load_model, save_model
from tests.nanogpt import tiny
from tests.nanogpt.corpus.made import write_raw, write_tokens
from tests.safety.test_parsers import SOURCE, TOKENIZE

REPOSITORY = Path(__file__).parents[2]
MEMORY = 200 * 2**20  # bytes beyond what the imports take
SECONDS = 20

# Imports this module once, and forks for each `read`.
PROCESSES = multiprocessing.get_context("forkserver")


def read(parse: Callable[[Path], Any], *paths: Path) -> list[str]:
    """A line per path: "accepted", or the error. The parser's process has no more address space than MEMORY."""
    PROCESSES.set_forkserver_preload([__name__])
    ours, theirs = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=read_all, args=(theirs, parse, paths))
    process.start()
    theirs.close()
    lines: list[str] = []
    try:
        for path in paths:
            assert ours.poll(SECONDS), f"{path} takes more than {SECONDS} s after {lines}"
            lines.append(ours.recv())
    finally:
        process.kill()
        process.join()
    return lines


def read_all(answers: Connection, parse: Callable[[Path], Any], paths: tuple[Path, ...]) -> None:
    os.chdir(REPOSITORY)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY,) * 2)
    for path in paths:
        try:
            parse(path)
            answers.send("accepted")
        except Exception as error:
            answers.send(f"{type(error).__name__} {' '.join(str(error).split())[-400:]}")


def all_refused(lines: list[str], number: int, error: str = "Damaged") -> None:
    assert len(lines) == number
    assert [line for line in lines if not line.startswith(error + " ")] == []


def allocate(path: Path) -> None:
    bytes(2 * MEMORY)


def test_a_reader_has_no_more_memory() -> None:
    assert read(allocate, Path()) == ["MemoryError "]


# --- model/ -----------------------------------------------------------------------------------------------------------

CONFIGS: list[dict[str, Any]] = [
    *({"n_layer": value} for value in (10**9, 2**12 + 1, 4000, 0, -1, True, 1.0, "1", None, [1])),
    *({"n_embd": value} for value in (2**40, 10**30, 0, -16, "16")),
    *({"n_head": value} for value in (0, 3, -1, 2**40, 1.0)),
    *({"block_size": value} for value in (2**40, 0, -8, 9)),
    *({"vocab_size": value} for value in (2**40, 0, -13, True)),
    *({"vocab_multiple": value} for value in (2**40, 0, -1, 0.1, "1")),
    *({"dropout": value} for value in (1, -0.1, "0", None, float("nan"), True)),
    *({"bias": 0}, {"activation": "relu"}, {"activation": []}),
]


def model(directory: Path, **changes: Any) -> Path:
    gpt = tiny.gpt(seed=1, std=0.5, bias=False)
    directory.mkdir()
    tiny.char_tokenizer(directory / "tokenizer.json")
    save_model(directory / "model", gpt.config, tiny.weights(gpt), directory / "tokenizer.json", {})
    config = json.loads((directory / "model/model.json").read_bytes())["config"]
    tiny.edit_json(directory / "model/model.json", config={**config, **changes})
    return directory / "model"


def test_a_config_that_is_no_model_s_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    paths = [model(tmp_path / str(number), **changes) for number, changes in enumerate(CONFIGS)]
    *lines, last = read(load_model, *paths, model(tmp_path / "good"))
    all_refused(lines, len(CONFIGS))
    assert last == "accepted"


def with_weights(directory: Path, data: bytes) -> Path:
    path = model(directory)
    (path / "weights.safetensors").write_bytes(data)
    tiny.edit_json(path / "model.json", weights_sha256=sha256_file(path / "weights.safetensors"))
    return path


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_weights_that_claim_much_or_are_something_else_are_refused(tmp_path: Path) -> None:
    def header(size: int, **tensors: Any) -> bytes:
        data = json.dumps(tensors).encode()
        return (size or len(data)).to_bytes(8, "little") + data

    large = {"dtype": "F32", "shape": [2**40, 16], "data_offsets": [0, 2**46]}
    files = [
        pickle.dumps(Bomb(tmp_path / "executed")),
        header(0, **{"wte.weight": large}),
        header(2**63, **{"wte.weight": large}),
        header(0, **{"wte.weight": {"dtype": "F32", "shape": [2**40, 0], "data_offsets": [0, 0]}}),
        header(0, **{f"h.{i}.x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(50_000)}),
        (8).to_bytes(8, "little") + b"[" * 10_000,
        b"",
    ]
    paths = [with_weights(tmp_path / str(number), data) for number, data in enumerate(files)]
    all_refused(read(load_model, *paths), len(files))
    assert not (tmp_path / "executed").exists()


def test_a_context_that_is_out_of_proportion_is_refused(tmp_path: Path) -> None:
    """A file of megabytes, each tensor of which is true, and whose cache of keys and values would take gigabytes."""
    gpt = tiny.gpt(n_layer=300, n_head=1, n_embd=1, block_size=500_000, bias=False)
    tiny.char_tokenizer(tmp_path / "tokenizer.json")
    save_model(tmp_path / "model", gpt.config, tiny.weights(gpt), tmp_path / "tokenizer.json", {})
    [line] = read(load_model, tmp_path / "model")
    assert "its context is too long for its size" in line


# --- tokenizer.json ---------------------------------------------------------------------------------------------------


def test_tokens_that_would_fill_the_memory_are_refused(tmp_path: Path) -> None:
    """Tokens of 64 KiB each, every one by a merge of its own."""
    doubling = [[97, 97], *([i, i] for i in range(256, 270))]
    tokens = [*doubling, *([270, token] for token in range(256)), *([token, 270] for token in range(256))] * 50
    many = doubling[:-1] + [[269 - i % 2, i % 256] for i in range(200_000)]
    for name, merges in (("tokens", tokens), ("many", many)):
        content = {"end_of_text": None, "merges": merges, "name": "bpe", "vocab_size": 256 + len(merges)}
        (tmp_path / f"{name}.json").write_text(json.dumps(content) + "\n")
    (tmp_path / "deep.json").write_bytes(b"[" * 1_000_000)
    sparse(tmp_path / "sparse.json")
    lines = read(load_tokenizer, *sorted(tmp_path.glob("*.json")))
    all_refused(lines, 4)
    assert "bytes together" in "".join(lines)


# --- data/ ------------------------------------------------------------------------------------------------------------


def sparse(path: Path, size: int = 2**40) -> None:
    """A file that takes no space and seems to be large."""
    with path.open("wb") as file:
        file.truncate(size)


def load_train(directory: Path) -> None:
    load_split(directory, "train")


def read_raw(directory: Path) -> None:
    list(read_documents(directory))


def test_a_meta_that_claims_2_to_the_40_tokens_is_refused(tmp_path: Path) -> None:
    claims: list[dict[str, Any]] = [{"tokens": 2**40}, {"tokens": 2**62}, {"tokens": 10**400}, {"bytes": 10**400}]
    paths = []
    for number, claim in enumerate(claims):
        paths.append(write_tokens(tmp_path / str(number)))
        meta = json.loads((paths[-1] / "meta.json").read_bytes())
        tiny.edit_json(paths[-1] / "meta.json", train={**meta["train"], **claim})
    paths += [write_tokens(tmp_path / name) for name in ("vocabulary", "deep", "sparse")]
    tiny.edit_json(tmp_path / "vocabulary/meta.json", vocab_size=2**40)
    (tmp_path / "deep/meta.json").write_bytes(b'{"a":' * 100_000)
    sparse(tmp_path / "sparse/meta.json")
    all_refused(read(load_train, *paths), len(paths))


def test_an_inventory_that_is_large_or_deep_is_refused(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("sparse", "deep", "line")]
    for path in paths:
        write_raw(path, ["one", "two"])
    sparse(tmp_path / "sparse/corpus.json")
    (tmp_path / "deep/corpus.json").write_bytes(b'{"files":' * 100_000)
    line = tmp_path / "line/documents-00000.jsonl"
    line.write_bytes(b'{"text":' * 100_000)
    tiny.edit_json(tmp_path / "line/corpus.json", files={line.name: sha256_file(line)})
    all_refused(read(read_raw, *paths), 3)


# --- meta.pkl ---------------------------------------------------------------------------------------------------------


def read_vocabulary(path: Path) -> None:
    characters(path.read_bytes())


def test_a_vocabulary_that_grows_or_calls_is_refused(tmp_path: Path) -> None:
    """Each of a few bytes, or of the 4 MiB that are read at most."""
    size = 2**22 - 100
    laughs = b"".join(b"(" + b"h\x00K\x01" * 10 + b"u}q\x00" for _ in range(10_000))
    keys = [b"\x04itos", b"\x04stoi", b"\x0avocab_size"]
    contents = {
        "global": b"cos\nsystem\n(X\x0e\x00\x00\x00touch executedtR.",
        "stack_global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0etouch executed\x85R.",
        "instance": b"(X\x0e\x00\x00\x00touch executedios\nsystem\n.",
        "persistent": b"Pa\n.",
        "extension": b"\x82\x01.",
        "build": b"}}b.",
        "tuple": b"(" * 1000 + b"t" * 1000 + b".",
        "laughs": b"\x80\x02}q\x00" + laughs + b".",
        "itself": b"\x80\x02}q\x00(" + b"".join(b"\x8c" + name + b"h\x00" for name in keys) + b"u.",
        "deep": b"\x80\x02}" + b"K\x01}" * (size // 3) + b"s" * 10 + b".",
        "nested": b"\x80\x02}" + b"K\x01}" * 500_000 + b"s" * 500_000 + b".",
        "marks": b"(" * size + b".",
        "sets": b"\x80\x02" + b"K\x01" * (size // 5) + b"}" + b"(u" * (size // 4) + b".",
        "memo": b"\x80\x04}" + b"\x94" * size + b".",
        "far": b"\x80\x02}r\xff\xff\xff\x7f.",
        "long": b"\x8b\x00\x00\x3f\x00" + b"\x7f" * 0x3F0000 + b".",
        "digits": b"I" + b"9" * size + b"\n.",
        "text": b"X\xff\xff\xff\x7fa.",
        "text8": b"\x8d" + b"\xff" * 7 + b"\x7fa.",
        "frame": b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f}.",
        "truncated": pickle.dumps({"vocab_size": 1, "itos": {0: "a"}, "stoi": {"a": 0}})[:-3],
        # What pickle.Unpickler, kept from finding any class, would take gigabytes or hours for.
        "bytearray": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",
        "hash": b"\x80\x02}K\x01" + b"".join(bytes([0x71, i, 0x68, i, 0x86]) for i in range(60)) + b"K\x01s.",
        "objects": b"\x80\x04" + b"\x8f" * size + b".",
    }
    paths = []
    for name, content in contents.items():
        paths.append(tmp_path / f"{name}.pkl")
        paths[-1].write_bytes(content)
        assert len(content) <= 2**22, name
    all_refused(read(read_vocabulary, *paths), len(contents), "ValueError")
    assert not list(REPOSITORY.glob("executed"))


def prepare_pair(path: Path) -> None:
    values = {**SOURCE["download"], "source": f"bin:{path}", "max_gigabytes": 0.05}
    write_corpus(DownloadParams(**values), path / "raw")
    prepare(path / "raw", path / "made", TOKENIZE, 1)


def test_token_files_that_are_huge_are_refused(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("vocabulary", "tokens")]
    sizes = {"vocabulary": {"meta.pkl": 2**23}, "tokens": {"train.bin": 2**40}}
    for path in paths:
        path.mkdir()
        for name, size in ({"train.bin": 2, "val.bin": 2, "meta.pkl": 1} | sizes[path.name]).items():
            sparse(path / name, size)
    lines = read(prepare_pair, *paths)
    all_refused(lines, 2, "ValueError")
    assert "it is larger than 4,194,304 bytes" in lines[0]
    assert "larger than download.max_gigabytes = 0.05" in lines[1]


# --- params.yaml ------------------------------------------------------------------------------------------------------


def test_params_that_grow_are_refused(tmp_path: Path) -> None:
    text = json.dumps(SOURCE)
    laughs = "a0: &a0 [ha, ha]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30))
    contents = {
        "laughs": f"{laughs}train: {{seed: *a29}}\n",
        "known": text.replace('"prompts": [""]', '"prompts": &p ["", *p]', 1),
        "long": text.replace('"revision": null', '"max": "' + "x" * 100_000 + '"'),
        "digits": text.replace('"documents": 8000', '"documents": 0x' + "f" * 50_000),
        "deep": "[" * 100_000,
        "deep-block": "- " * 50_000,
        "deep-value": text.replace('"documents": 8000', '"documents": ' + "[" * 500 + "]" * 500),
        "layers": re.sub(r'"n_layer": \d+', '"n_layer": 1000000000', text),
        "code": "a: !!python/object/apply:os.system ['touch executed']",
        "key": text.replace('"documents"', r'"\e[2Jdocu\nments"'),
    }
    paths = []
    for name, content in contents.items():
        assert content != text, name
        paths.append(tmp_path / f"{name}.yaml")
        paths[-1].write_text(content)
    sparse(tmp_path / "sparse.yaml")
    lines = read(load_params, *paths, tmp_path / "sparse.yaml")
    wrong = [name for name, line in zip([*contents, "sparse"], lines, strict=True) if line.startswith("ParamsError ")]
    assert wrong == ["long", "digits", "layers", "key"]
    all_refused([line for line in lines if not line.startswith("ParamsError ")], len(contents) + 1 - len(wrong))


# --- what is no file --------------------------------------------------------------------------------------------------

READERS: dict[str, Callable[[Path], Any]] = {
    "tokens/meta.json": lambda path: load_meta(path.parent),
    "tokens/train.bin": lambda path: load_train(path.parent),
    "raw/corpus.json": lambda path: load_info(path.parent),
    "raw/text.txt": lambda path: read_raw(path.parent),
    "params/params.yaml": load_params,
    "model/model.json": lambda path: load_model(path.parent),
    "model/weights.safetensors": lambda path: load_model(path.parent),
    "model/tokenizer.json": lambda path: load_model(path.parent),
    "tokenizers/tokenizer.json": load_tokenizer,
    "theirs/tokenizer.json": read_huggingface,
}


def read_any(path: Path) -> None:
    """A file in a folder named after it, such as "raw/text.txt/text.txt"."""
    READERS["/".join(path.parts[-3:-1])](path)


@pytest.mark.parametrize("target", ["/dev/zero", "pipe", "/etc", "nowhere"])
def test_a_link_to_what_is_no_file_is_refused_at_once(tmp_path: Path, target: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    whole = tmp_path / "whole"
    model(whole)
    write_tokens(whole / "tokens")
    write_raw(whole / "raw", ["one"])
    for name, text in (
        ("params/params.yaml", json.dumps(SOURCE)),
        ("tokenizers/tokenizer.json", ""),
        ("theirs/tokenizer.json", ""),
    ):
        (whole / name).parent.mkdir()
        (whole / name).write_text(text)
    paths = []
    for name in READERS:  # beside each link, the other files of its folder are as they were
        shutil.copytree((whole / name).parent, tmp_path / name)
        paths.append(tmp_path / name / Path(name).name)
        paths[-1].unlink()
        paths[-1].symlink_to(tmp_path / target)
    all_refused(read(read_any, *paths), len(paths))


def test_a_link_to_a_file_is_read_as_that_file(tmp_path: Path) -> None:
    """DVC's cache may be of type symlink."""
    write_tokens(tmp_path / "tokens")
    for path in sorted((tmp_path / "tokens").iterdir()):
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    assert read(load_train, tmp_path / "tokens") == ["accepted"]


# --- sources of text --------------------------------------------------------------------------------------------------


def write_bomb(path: Path) -> None:
    values = {**SOURCE["download"], "source": f"file:{path}", "max_gigabytes": 0.01}
    write_corpus(DownloadParams(**values), path.parent / "raw")


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "csv"])
def test_a_gzip_bomb_stops_at_max_gigabytes(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"bomb.{suffix}.gz"
    start = {"txt": b"", "jsonl": b'{"text": "', "json": b'[{"text": "', "csv": b'text\n"'}[suffix]
    path.write_bytes(gzip.compress(start) + gzip.compress(b"x" * 2**20) * 2000)
    [line] = read(write_bomb, path)
    assert line.startswith("ValueError")
    assert "max_gigabytes" in line
    assert sum(file.stat().st_size for file in (tmp_path / "raw").iterdir()) < 2e7
