import os
import re
import subprocess
import sys
from pathlib import Path

import pydantic
import pytest

from nanogpt.files import Damaged
from nanogpt.params import Params, flatten, load_params, with_values
from nanogpt.params_errors import ParamsError
from tests.conftest import BUILT_IN, committed_params

SOURCE = BUILT_IN
TEXT = SOURCE.read_text(encoding="utf-8")
SECTIONS = {name: field.annotation for name, field in Params.model_fields.items()}
KEYS = [f"{section}.{name}" for section, model in SECTIONS.items() for name in model.model_fields]


def line_of(key):
    """Number of the line of `section.name` in params.yaml."""
    section, _, name = key.partition(".")
    lines = TEXT.splitlines()
    start = next(i for i, line in enumerate(lines) if re.match(rf"{section}:", line))
    return next(i for i in range(start + 1, len(lines)) if re.match(rf"  {name}:", lines[i]))


def edited(**changes):
    """params.yaml with the lines of some keys (`section__name`) written as `name: value`; None removes a line."""
    lines = TEXT.splitlines()
    numbers = {line_of(key.replace("__", ".")): (key.split("__")[1], value) for key, value in changes.items()}
    for number, (name, value) in numbers.items():
        lines[number] = f"  {name}: {value}"
    return "\n".join(line for i, line in enumerate(lines) if numbers.get(i, ("", ""))[1] is not None) + "\n"


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "params.yaml"

    def write_and_load(text):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_params(path)

    return write_and_load


@pytest.fixture
def refused(load, tmp_path):
    """The error for a text, one line without the path; `error` is its type."""

    def message(text, error=ParamsError):
        with pytest.raises(error) as caught:
            load(text)
        assert type(caught.value) is error
        line = str(caught.value)
        assert "\n" not in line
        assert line.startswith(str(tmp_path / "params.yaml"))
        return line.removeprefix(str(tmp_path / "params.yaml")).removeprefix(":").strip()

    return message


# --- the file itself --------------------------------------------------------------------------------------------------


def test_our_own_file_is_good():
    assert isinstance(load_params(SOURCE).train.learning_rate, float)


def test_it_states_every_knob_and_no_other(refused):
    for key in KEYS:
        missing = refused(edited(**{key.replace(".", "__"): None}), Damaged)
        assert missing == f"is incomplete: {key} is missing; add it"
    assert len(KEYS) == sum(1 for line in TEXT.splitlines() if re.match(r"  \w+:", line))


def test_no_field_has_a_second_default():
    assert not [key for key in KEYS if not SECTIONS[key.split(".")[0]].model_fields[key.split(".")[1]].is_required()]


def test_each_knob_has_a_comment():
    lines = TEXT.splitlines()
    assert [key for key in KEYS if not re.search(r"\S +# \S{2,}", lines[line_of(key)])] == []


@pytest.mark.parametrize("section", SECTIONS)
def test_each_section_can_not_be_missing(section, refused):
    lines = TEXT.splitlines()
    start = next(i for i, line in enumerate(lines) if re.match(rf"{section}:", line))
    end = next((i for i in range(start + 1, len(lines)) if re.match(r"\w+:", lines[i])), len(lines))
    missing = refused("\n".join(lines[:start] + lines[end:]), Damaged)
    assert missing.startswith(f"is incomplete: {section} is missing; add it")


def test_params_are_frozen_at_every_level():
    params = load_params(SOURCE)
    with pytest.raises(pydantic.ValidationError):
        params.train.learning_rate = 1.0
    with pytest.raises(pydantic.ValidationError):
        params.train = params.train


def test_flattened_they_have_one_level():
    flat = flatten(load_params(SOURCE))
    assert list(flat) == KEYS
    assert flat["train.lr_decay_iters"] is None
    assert list(flatten(load_params(SOURCE).numerics, "numerics.")) == [k for k in KEYS if k.startswith("numerics.")]


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("3e-5", 3e-5),
        ("3e-05", 3e-5),
        ("1e-4", 1e-4),
        ("1E-3", 1e-3),
        ("1.0e-3", 1e-3),
        ("0.002", 0.002),
        (".5", 0.5),
        ("1", 1.0),
        ("1e+0", 1.0),
    ],
)
def test_a_number_is_a_float_however_it_is_written(written, value, load):
    params = load(edited(train__learning_rate=written, train__min_lr="0"))
    assert params.train.learning_rate == value
    assert isinstance(params.train.learning_rate, float)


def test_what_dvc_writes_for_a_small_number_is_read_back(load):
    # `dvc exp run -S train.learning_rate=3e-5` writes 3e-05, a text to YAML 1.1.
    assert load(edited(train__learning_rate="3e-05", train__min_lr="3e-06")).train.min_lr == 3e-6


# --- refusals: each names key, value and remedy -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "written", "message"),
    [
        # types
        ("train__learning_rate", '"3e-5"', "train.learning_rate = '3e-5' is invalid: .*number.*quotes, remove them"),
        ("train__learning_rate", "abc", "train.learning_rate = 'abc' is invalid: .*number"),
        ("train__learning_rate", "true", "train.learning_rate = true is invalid: .*number"),
        ("train__learning_rate", "null", "train.learning_rate = null is invalid: .*number"),
        ("train__learning_rate", "[1e-3]", r"train.learning_rate = \[0.001\] is invalid: .*number"),
        ("train__learning_rate", ".nan", "train.learning_rate = nan is invalid: .*finite number"),
        ("train__learning_rate", ".inf", "train.learning_rate = inf is invalid: .*finite number"),
        ("train__learning_rate", "1e999", "train.learning_rate = inf is invalid: .*finite number"),
        ("model__n_layer", "4.0", "model.n_layer = 4.0 is invalid: .*integer"),
        ("model__n_layer", "true", "model.n_layer = true is invalid: .*integer"),
        ("model__n_layer", "'4'", "model.n_layer = '4' is invalid: .*integer.*quotes, remove them"),
        ("model__bias", "1", "model.bias = 1 is invalid: .*boolean"),
        ("model__bias", "'true'", "model.bias = 'true' is invalid: .*boolean.*quotes, remove them"),
        ("model__bias", "yes", "model.bias = 'yes' is invalid: .*boolean"),
        ("train__lr_decay_iters", "None", "train.lr_decay_iters = 'None' is invalid: .*integer.*, and write null"),
        ("train__lr_decay_iters", "1.5", "train.lr_decay_iters = 1.5 is invalid: .*integer"),
        ("sample__top_p", "high", "sample.top_p = 'high' is invalid: .*number"),
        ("sample__prompts", "ROMEO", "sample.prompts = 'ROMEO' is invalid: .*list"),
        ("sample__prompts", "[1]", "sample.prompts = 1 is invalid: .*string"),
        ("tracking__experiment", "2026", "tracking.experiment = 2026 is invalid: .*string"),
        # ranges
        ("train__learning_rate", "0", "train.learning_rate = 0 is invalid: .*greater than 0"),
        ("train__max_iters", "0", "train.max_iters = 0 is invalid: .*greater than or equal to 1"),
        ("train__seed", "-1", "train.seed = -1 is invalid: .*greater than or equal to 0"),
        ("train__seed", str(2**63), f"train.seed = {2**63} is invalid: .*less than"),
        ("train__beta2", "1.0", "train.beta2 = 1.0 is invalid: .*less than 1"),
        ("model__dropout", "1", "model.dropout = 1 is invalid: .*less than 1"),
        ("download__documents", "1", "download.documents = 1 is invalid: .*greater than or equal to 2"),
        ("evaluate__train_tokens", "1", "evaluate.train_tokens = 1 is invalid: .*greater than or equal to 2"),
        ("tokenize__vocab_size", "256", "tokenize.vocab_size = 256 is invalid: .*greater than or equal to 257"),
        ("tokenize__val_fraction", "0", "tokenize.val_fraction = 0 is invalid: .*greater than 0"),
        ("tokenize__val_fraction", "1", "tokenize.val_fraction = 1 is invalid: .*less than 1"),
        ("evaluate__stride", "0", "evaluate.stride = 0 is invalid: .*greater than or equal to 1"),
        ("sample__top_k", "0", "sample.top_k = 0 is invalid: .*greater than or equal to 1"),
        ("sample__top_p", "0", "sample.top_p = 0 is invalid: .*greater than 0"),
        ("sample__top_p", "1.1", "sample.top_p = 1.1 is invalid: .*less than or equal to 1"),
        ("sample__temperature", "-0.1", "sample.temperature = -0.1 is invalid: .*greater than or equal to 0"),
        ("sample__prompts", "[]", r"sample.prompts = \[\] is invalid: .*at least 1 item"),
        # choices
        (
            "download__source",
            "internet",
            "download.source = 'internet' is invalid: .*grammar, shakespeare, .*hf:…, file:…, bin:…",
        ),
        ("download__source", '"hf:"', "download.source = 'hf:' is invalid: .*hf:…"),
        ("tokenize__tokenizer", "gpt-2", "tokenize.tokenizer = 'gpt-2' is invalid: .*char, gpt2, bpe, file:…"),
        ("model__activation", "relu", "model.activation = 'relu' is invalid: .*'gelu', 'gelu_tanh' or 'relu_squared'"),
        ("train__publish", "first", "train.publish = 'first' is invalid: .*'best' or 'last'"),
        ("numerics__dtype", "fp16", "numerics.dtype = 'fp16' is invalid: .*'float32', 'bfloat16' or 'float16'"),
        ("numerics__determinism", "full", "numerics.determinism = 'full' is invalid: .*'portable', 'machine' or 'off'"),
        ("runtime__device", "gpu", "runtime.device = 'gpu' is invalid: .*one of auto, cpu, mps, cuda"),
        ("runtime__device", "cuda:x", "runtime.device = 'cuda:x' is invalid: .*one of auto, cpu, mps, cuda"),
    ],
)
def test_a_wrong_value_is_refused(key, written, message, refused):
    assert re.match(message, refused(edited(**{key: written})))


@pytest.mark.parametrize(
    ("key", "misspelt", "nearest"),
    [
        ("train.learning_rate", "learning_rat", "train.learning_rate"),
        ("train.learning_rate", "lerning_rate", "train.learning_rate"),
        ("train.learning_rate", "learning-rate", "train.learning_rate"),
        ("train.learning_rate", "Learning_Rate", "train.learning_rate"),
        ("model.n_layer", "n_layers", "model.n_layer"),
        ("model.n_layer", "n layer", "model.n_layer"),
        ("evaluate.stride", "strides", "evaluate.stride"),
        ("sample.top_k", "topk", "sample.top_k"),
        ("train.muon_learning_rate", "muon_lr", "train.muon_learning_rate"),
        ("train.learning_rate", "lr", "train.learning_rate"),
        ("train.muon_weight_decay", "muon_wd", "train.muon_weight_decay"),
        ("train.max_iters", "dropout", "model.dropout"),
        ("model.n_layer", "batch_size", "train.batch_size or evaluate.batch_size"),
    ],
)
def test_a_misspelt_key_is_reported_with_the_nearest_one(key, misspelt, nearest, refused):
    section, name = key.split(".")
    lines = TEXT.splitlines()
    lines[line_of(key)] = lines[line_of(key)].replace(f"{name}:", f"{misspelt}:")
    message = refused("\n".join(lines))
    assert message.startswith(f"{section}.{misspelt} = ")
    assert message.endswith(f"is not a known parameter; did you mean {nearest}?")


@pytest.mark.parametrize("name", ["zzz", "dict", "str"])  # the last two are no names of types here
def test_a_key_that_resembles_none_is_reported_with_all_of_its_section(name, refused):
    message = refused(TEXT.replace("  n_layer:", f"  {name}: 1\n  n_layer:"))
    assert message == (
        f"model.{name} = 1 is not a known parameter; use one of n_layer, n_head, n_embd, block_size, bias, norm, "
        "activation, position, qk_norm, tie_embeddings, zero_init, previous_tokens, ngrams, ngram_rows, "
        "embedding_norm, dropout, vocab_multiple"
    )


@pytest.mark.parametrize(("name", "nearest"), [("trian", "train"), ("models", "model"), ("Runtime", "runtime")])
def test_a_misspelt_section_is_reported_with_the_nearest_one(name, nearest, refused):
    message = refused(re.sub(rf"(?m)^{nearest}:", f"{name}:", TEXT))
    assert message == f"{name} is not a known parameter; did you mean {nearest}?"


SHAPE = {"model__n_embd": 128, "model__n_head": 4, "model__block_size": 64}
SCHEDULE = {"train__max_iters": 100, "train__warmup_iters": 50, "train__learning_rate": "3e-3", "train__min_lr": "3e-4"}
SHARED = {"train__gradient_accumulation_steps": 4, "train__processes": 2}
PORTABLE = {"numerics__determinism": "portable"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            SHAPE | {"model__n_head": 3},
            "model.n_embd = 128 is not divisible by model.n_head = 3; set model.n_embd to 126",
        ),
        (SHAPE | {"model__n_embd": 2}, "model.n_embd = 2 is not divisible by model.n_head = 4; set model.n_embd to 8"),
        (
            SHAPE | {"model__n_head": 3, "model__position": "learned"},
            "model.n_embd = 128 is not divisible by model.n_head = 3; set model.n_embd to 129",
        ),
        (
            SHAPE | {"model__n_head": 3, "train__init_from": "gpt2"},
            "model.n_embd = 128 is not divisible by .*; set both to null to take those of train.init_from = gpt2",
        ),
        (SCHEDULE | {"train__max_iters": 50}, "train.warmup_iters = 50 is not below train.max_iters = 50; shorten"),
        (
            SCHEDULE | {"train__lr_decay_iters": 50},
            "train.lr_decay_iters = 50 is not above train.warmup_iters = 50; .*null",
        ),
        (SCHEDULE | {"train__min_lr": "4e-3"}, "train.min_lr = 0.004 is above train.learning_rate = 0.003; lower"),
        (
            {"train__gradient_accumulation_steps": 7, "train__processes": 2},
            "train.gradient_accumulation_steps = 7 is not divisible by train.processes = 2, .*_steps to 8",
        ),
        (
            SHARED | {"runtime__device": "cuda:1", "numerics__determinism": "machine"},
            "runtime.device = cuda:1 is one device for train.processes = 2; .*set it to cuda",
        ),
        (SHAPE | {"evaluate__stride": 65}, "evaluate.stride = 65 is above model.block_size = 64, .*lower it or .*null"),
        (
            {"download__source": "file:/etc/*.txt"},
            "download.source = .* is not inside download.texts = inputs/texts, .*set",
        ),
        ({"download__source": "file:inputs/texts/../x"}, "download.source = .* is not inside download.texts"),
        ({"download__source": "file:texts2/x"}, "download.source = .* is not inside download.texts"),
        (
            {"download__source": "bin:/etc"},
            "download.source = bin:/etc is not inside download.texts = inputs/texts, .*set",
        ),
        (
            {"tokenize__tokenizer": "file:model/tokenizer.json"},
            "tokenize.tokenizer = file:model/tokenizer.json is not inside train.pretrained = inputs/pretrained, "
            ".*set train",
        ),
        (
            PORTABLE | {"numerics__dtype": "bfloat16"},
            "numerics.dtype = bfloat16 is not portable; .*float32, or .*machine",
        ),
        (PORTABLE | {"numerics__dtype": "float16"}, "numerics.dtype = float16 is not portable; set it to float32"),
        (PORTABLE | {"numerics__compile": "true"}, "numerics.compile = true is not portable; .*false, or .*machine"),
        (
            PORTABLE | {"runtime__device": "cuda"},
            "runtime.device = cuda is not portable; set it to cpu, or .*machine",
        ),
        (PORTABLE | {"runtime__device": "mps"}, "runtime.device = mps is not portable"),
    ],
)
def test_values_that_do_not_go_together_are_refused(changes, message, refused):
    assert re.match(message, refused(edited(**changes)))


@pytest.mark.parametrize("position", ["learned", "rotary"])
@pytest.mark.parametrize("n_head", [1, 2, 3, 5, 7])
def test_the_number_in_the_error_of_a_shape_is_accepted(n_head, position):
    shape = {"model.n_head": n_head, "model.position": position}
    for n_embd in (1, 2, 3, 15, 64, 96, 99, 127, 128):
        try:
            with_values(committed_params(), {**shape, "model.n_embd": n_embd})
        except ParamsError as error:
            advised = re.search(r"; set model\.n_embd to (\d+)$", str(error))
            assert advised
            with_values(committed_params(), {**shape, "model.n_embd": int(advised[1])})


@pytest.mark.parametrize(
    "changes",
    [
        SHAPE | {"model__n_embd": 129, "model__n_head": 3, "model__position": "learned"},
        SCHEDULE | {"train__max_iters": 51},
        SCHEDULE | {"train__lr_decay_iters": 51},
        SCHEDULE | {"train__min_lr": "3e-3"},
        SHAPE | {"evaluate__stride": 64},
        SHARED | {"runtime__device": "cuda", "numerics__determinism": "machine"},
        {"train__patience": 1},
        {"download__source": "file:inputs/texts/a*.txt"},
        {"download__source": "bin:inputs/texts/pair"},
        {"tokenize__tokenizer": "file:inputs/pretrained/a/tokenizer.json"},
        {"numerics__determinism": "machine", "numerics__dtype": "bfloat16", "runtime__device": "cuda:7"},
        {"numerics__determinism": "'off'", "numerics__compile": "true", "runtime__device": "mps"},
        {"sample__temperature": 0, "sample__top_p": 1},
    ],
)
def test_values_at_the_edge_are_accepted(changes, load):
    load(edited(**changes))


def test_off_needs_no_quotes(load):
    assert load(edited(numerics__determinism="off")).numerics.determinism == "off"


# --- files that are no params -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"a: [1\n",
        b"model: {a: 1\nm:",
        b"\tmodel: 1",
        b"a: \x00",
        b"model: *nowhere",
        b"a: !!python/object/apply:os.system [true]",
        TEXT.replace("  n_head:", "  n_layer: 5\n  n_head:").encode(),  # a key twice
    ],
)
def test_broken_yaml_is_refused_with_its_place(content, refused):
    message = refused(content, Damaged)
    assert message.startswith("is not valid YAML (")
    assert re.search(r"line \d|position \d", message)
    assert message.endswith("); correct it")


def test_a_date_that_does_not_exist_is_refused_too(refused):
    # YAML takes it for a date, and Python's error says nothing of a file.
    assert refused(edited(tracking__experiment="2026-11-31"), Damaged).startswith("is not valid YAML (")


@pytest.mark.parametrize("content", [b"", b"# all commented out\n", b"- 1\n", b"hello\n"])
def test_a_file_that_holds_no_sections_is_refused(content, refused):
    assert refused(content, Damaged) == "has no sections"


def test_a_section_without_its_keys_is_refused(refused):
    lines = [line for line in TEXT.splitlines() if not line.startswith("  ")]
    assert refused("\n".join(lines)).startswith("download = null is invalid: a section has its keys below it, indented")


def test_a_file_that_is_no_utf_8_is_refused(refused):
    assert re.fullmatch(r"cannot be read \(.*utf-8.*\)", refused(b"\xff\xfe\x00", Damaged))


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir])
def test_a_file_that_cannot_be_read_is_refused(make, tmp_path):
    make(tmp_path / "params.yaml")
    with pytest.raises(Damaged, match=r"params\.yaml cannot be read \(.*\)$"):
        load_params(tmp_path / "params.yaml")


def test_reading_them_loads_neither_torch_nor_mlflow():
    program = "import sys, nanogpt.params; print({'torch', 'mlflow', 'numpy'} & sys.modules.keys())"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
