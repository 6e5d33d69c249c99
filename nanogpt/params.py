"""params.yaml as frozen, strict sections: all parameters of an experiment, checked before any work starts."""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent

from nanogpt.files import Damaged, read_bytes
from nanogpt.gpt_config import (
    LARGEST_INTEGER,
    LONGEST_NGRAM,
    MOST_LAYERS,
    MOST_PREVIOUS_TOKENS,
    Activation,
    Attention,
    Norm,
    Position,
)
from nanogpt.params_errors import ParamsError, explain, shortened

_LARGEST_FILE = 2**17  # bytes of params.yaml
_DEEPEST = 10  # levels of nesting; three are used


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


Natural = Annotated[int, Field(ge=1, le=LARGEST_INTEGER)]
Seed = Annotated[int, Field(ge=0, le=LARGEST_INTEGER)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


def _check_encoding(name: str) -> str:
    try:
        "a".encode(name)
    except (LookupError, ValueError) as error:
        raise ValueError("Python has no text encoding of this name; use one such as cp1252, or null") from error
    return name


class DownloadParams(Section):
    source: Annotated[str, Field(pattern=r"^(grammar|shakespeare|openwebtext|hf:.+|file:.+|bin:.+)$")]
    documents: Annotated[int, Field(ge=2, le=LARGEST_INTEGER)]
    seed: Seed
    texts: Text
    text_column: Text
    separator: Text | None
    encoding: Annotated[str, AfterValidator(_check_encoding)] | None
    skip_bad_rows: bool
    follow_links: bool
    split: Text
    revision: Text | None
    max_gigabytes: Positive


class TokenizeParams(Section):
    tokenizer: Annotated[str, Field(pattern=r"^(char|gpt2|bpe|file:.+)$")]
    vocab_size: Annotated[int, Field(ge=257, le=2**20)]
    val_fraction: Annotated[float, Field(gt=0, lt=1)]
    split_seed: Seed


class ModelParams(Section):
    """The shape of the model; null takes the value of train.init_from."""

    n_layer: Annotated[int, Field(ge=1, le=MOST_LAYERS)] | None
    n_head: Natural | None
    n_embd: Natural | None
    block_size: Natural | None
    bias: bool | None
    norm: Norm | None
    activation: Activation | None
    position: Position | None
    qk_norm: bool | None
    tie_embeddings: bool | None
    zero_init: bool | None
    previous_tokens: Annotated[int, Field(ge=0, le=MOST_PREVIOUS_TOKENS)] | None
    ngrams: Annotated[int, Field(ge=1, le=LONGEST_NGRAM)] | None
    ngram_rows: Natural | None
    embedding_norm: bool | None
    dropout: BelowOne | None
    vocab_multiple: Natural | None


class TrainParams(Section):
    init_from: Annotated[
        str, Field(pattern=r"^(scratch|gpt2|gpt2-medium|gpt2-large|gpt2-xl|hf:.+|nanogpt:.+|model:.+)$")
    ]
    pretrained: Text
    eval_only: bool
    seed: Seed
    processes: Natural
    parallel: Literal["ddp", "fsdp"]
    max_iters: Natural
    batch_size: Natural
    gradient_accumulation_steps: Natural
    data_order: Literal["random", "epochs"]
    optimizer: Literal["adamw", "muon"]
    learning_rate: Positive
    min_lr: NonNegative
    warmup_iters: Annotated[int, Field(ge=0, le=LARGEST_INTEGER)]
    lr_decay: Literal["cosine", "linear"]
    lr_decay_iters: Natural | None
    weight_decay: NonNegative
    ngram_weight_decay: NonNegative
    beta1: BelowOne
    beta2: BelowOne
    muon_learning_rate: Positive
    muon_momentum: BelowOne
    muon_weight_decay: NonNegative
    grad_clip: NonNegative
    eval_interval: Natural
    eval_iters: Natural
    patience: Natural | None
    publish: Literal["best", "last"]

    @property
    def last_step(self) -> int:
        """The step at which training ends; with eval_only that is where it starts."""
        return 0 if self.eval_only else self.max_iters


class EvaluateParams(Section):
    batch_size: Natural
    stride: Natural | None
    # At least two, because the first token of a long text has no context and so no score.
    train_tokens: Annotated[int, Field(ge=2, le=LARGEST_INTEGER)]
    max_gap: NonNegative


class SampleParams(Section):
    prompts: Annotated[list[str], Field(min_length=1)]
    num_samples: Natural
    max_new_tokens: Natural
    temperature: NonNegative
    top_k: Natural | None
    top_p: Annotated[float, Field(gt=0, le=1)] | None
    seed: Seed
    stop_at_end: bool


class NumericsParams(Section):
    determinism: Literal["portable", "machine", "off"]
    threads: Natural | None
    dtype: Literal["float32", "bfloat16", "float16"]
    compile: bool
    attention: Attention


class RuntimeParams(Section):
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda|cuda:\d+)$")]
    processes: Natural
    log_interval: Natural
    checkpoint_interval: Natural
    profile_steps: Annotated[int, Field(ge=0, le=10_000)]


class TrackingParams(Section):
    experiment: Text
    prompts: list[str]
    sample_tokens: Natural
    wait_seconds: NonNegative


class Params(Section):
    download: DownloadParams
    tokenize: TokenizeParams
    model: ModelParams
    train: TrainParams
    evaluate: EvaluateParams
    sample: SampleParams
    numerics: NumericsParams
    runtime: RuntimeParams
    tracking: TrackingParams


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Reads and checks the whole file. Raises ParamsError for an unknown key or an invalid value.

    Raises Damaged if the file cannot be read, is not YAML, or lacks a key.
    """
    data = read_bytes(path, _LARGEST_FILE)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Damaged(path, f"cannot be read ({error})") from error
    return parse_params(text, path)


def parse_params(text: str, path: Path) -> Params:
    """Parses the content of params.yaml; errors call it `path`."""
    try:
        _check_structure(text)
        values = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, TypeError, RecursionError) as error:
        line = shortened(" ".join(str(error).split()), 300)
        raise Damaged(path, f"is not valid YAML ({line}); correct it") from error
    if not isinstance(values, dict):
        raise Damaged(path, "has no sections")
    return _validated(values, path)


def with_values(
    params: Params, values: Mapping[str, Any], source: Path = Path("params.yaml"), combined: bool = True
) -> Params:
    """A copy with values by "section.key", checked each and `combined`. Raises ParamsError, which names `source`."""
    sections = params.model_dump()
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return _validated(sections, source, combined)


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Parses assignments such as "train.max_iters=100"; the value is YAML. Raises ParamsError."""
    values = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or "." not in key:
            raise ParamsError(f"-S {assignment} is invalid: write section.key=value, such as train.max_iters=100")
        try:
            values[key] = YAML(typ="safe", pure=True).load(text)
        except YAMLError as error:
            raise ParamsError(f"-S {assignment} is invalid: the value is not YAML") from error
    return values


def _validated(values: dict[str, Any], path: Path, combined: bool = True) -> Params:
    try:
        params = Params.model_validate(values)
    except ValidationError as error:
        # Of several errors, report a misspelt key before the missing one that it causes.
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        if first["type"] == "missing":
            raise Damaged(path, f"is incomplete: {explain(first, Params)}") from error
        raise ParamsError(f"{path}: {explain(first, Params)}") from error
    if combined:
        check_combinations(params, path)
    return params


def _check_structure(text: str) -> None:
    """Raises ValueError for aliases and deep nesting, with which a short text can grow without bounds."""
    depth = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if isinstance(event, AliasEvent):
            raise ValueError(f"an alias, *{event.anchor}, at line {event.start_mark.line + 1}: write out its value")
        if depth > _DEEPEST:
            raise ValueError(f"too deeply nested at line {event.start_mark.line + 1}")


def flatten(params: Section, prefix: str = "") -> dict[str, Any]:
    """The sections as one flat dict: {"train.learning_rate": 0.001, ...}."""
    flat: dict[str, Any] = {}
    for name in type(params).model_fields:
        value = getattr(params, name)
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Section) else {f"{prefix}{name}": value}
    return flat


def check_combinations(params: Params, path: Path) -> None:
    """Raises ParamsError for values that are valid alone but not together."""
    for conflict in (*_conflicts(params), *_portable_conflicts(params.numerics, params.runtime.device)):
        raise ParamsError(f"{path}: {conflict}")


def _conflicts(params: Params) -> Iterator[str]:
    download, model, train, stride = params.download, params.model, params.train, params.evaluate.stride
    yield from _model_conflicts(model, train)
    if train.warmup_iters >= train.max_iters:
        yield (
            f"train.warmup_iters = {train.warmup_iters} is not below train.max_iters = {train.max_iters}; "
            "shorten the warm-up or lengthen the run"
        )
    if train.lr_decay_iters is not None and train.warmup_iters >= train.lr_decay_iters:
        yield (
            f"train.lr_decay_iters = {train.lr_decay_iters} is not above train.warmup_iters = {train.warmup_iters}; "
            "end the decay later or set it to null"
        )
    if train.min_lr > train.learning_rate:
        yield (
            f"train.min_lr = {train.min_lr} is above train.learning_rate = {train.learning_rate}; lower train.min_lr"
        )
    if train.gradient_accumulation_steps % train.processes:
        yield (
            f"train.gradient_accumulation_steps = {train.gradient_accumulation_steps} is not divisible by "
            f"train.processes = {train.processes}, which share them; set train.gradient_accumulation_steps to "
            f"{math.ceil(train.gradient_accumulation_steps / train.processes) * train.processes}"
        )
    if train.processes > 1 and params.runtime.device not in {"auto", "cpu", "cuda"}:
        yield (
            f"runtime.device = {params.runtime.device} is one device for train.processes = {train.processes}; set it "
            "to cuda (one GPU for each process) or cpu"
        )
    if stride is not None and model.block_size is not None and stride > model.block_size:
        yield (
            f"evaluate.stride = {stride} is above model.block_size = {model.block_size}, which would skip tokens; "
            "lower it or set it to null"
        )
    if download.source.startswith(("file:", "bin:")):
        yield from _outside("download.source", download.source, "download.texts", download.texts)
    if params.tokenize.tokenizer.startswith("file:"):
        yield from _outside("tokenize.tokenizer", params.tokenize.tokenizer, "train.pretrained", train.pretrained)


def _model_conflicts(model: ModelParams, train: TrainParams) -> Iterator[str]:
    if train.init_from == "scratch":
        for name, value in model.model_dump().items():
            if value is None:
                yield f"model.{name} = null takes the value of train.init_from, which is scratch; set it to a value"
    if model.n_embd is not None and model.n_head is not None:
        unit = model.n_head * (2 if model.position == "rotary" else 1)  # rotary positions rotate pairs of channels
        if train.init_from == "scratch":
            remedy = f"set model.n_embd to {unit * max(1, round(model.n_embd / unit))}"
        else:
            remedy = f"set both to null to take those of train.init_from = {train.init_from}"
        if model.n_embd % model.n_head:
            yield f"model.n_embd = {model.n_embd} is not divisible by model.n_head = {model.n_head}; {remedy}"
        elif model.n_embd % unit:
            yield (
                f"model.position = rotary needs an even head size, and model.n_embd / model.n_head is "
                f"{model.n_embd // model.n_head}; {remedy}"
            )
    kind, _, name = train.init_from.partition(":")
    if kind in {"nanogpt", "model"} or (kind == "hf" and Path(name).exists()):
        yield from _outside("train.init_from", train.init_from, "train.pretrained", train.pretrained)


def _portable_conflicts(numerics: NumericsParams, device: str) -> Iterator[str]:
    if numerics.determinism != "portable":
        return
    remedy = "or numerics.determinism to machine"
    if numerics.dtype != "float32":
        yield f"numerics.dtype = {numerics.dtype} is not portable; set it to float32, {remedy}"
    if numerics.compile:
        yield f"numerics.compile = true is not portable; set it to false, {remedy}"
    if device not in {"auto", "cpu"}:
        yield f"runtime.device = {device} is not portable; set it to cpu, {remedy}"


def _outside(key: str, value: str, folder_key: str, folder: str) -> Iterator[str]:
    """The conflict of a path that is not inside the folder that is watched for changes; nothing if it is."""
    inside, outside = Path(value.partition(":")[2]).absolute().parts, Path(folder).absolute().parts
    if ".." in inside or inside[: len(outside)] != outside:
        yield (
            f"{key} = {value} is not inside {folder_key} = {folder}, so changes to it would go unnoticed; move it "
            f"there, or set {folder_key} to its folder"
        )
