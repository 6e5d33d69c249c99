"""The initial model of a training: a new one or that of train.init_from, checked against params.yaml."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from nanogpt import seeds
from nanogpt.corpus.tokenizer import GPT2_VOCAB_SIZE, Tokenizer
from nanogpt.files import reason
from nanogpt.gpt_config import Attention, GPTConfig
from nanogpt.huggingface import from_huggingface, load_huggingface
from nanogpt.model import GPT, without_weights
from nanogpt.nanogpt_checkpoint import load_nanogpt
from nanogpt.params import ModelParams
from nanogpt.saved_model import load_model
from nanogpt.weights import OtherVocabulary, Weights

# Commits on the hub, so that a name always gives the same weights.
GPT2_REVISIONS = {
    "gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2",
}
GPT2_SHAPES = {  # n_layer, n_head, n_embd
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


@dataclass(frozen=True)
class Initial:
    """The shape of a model and, unless it is new, its weights and the sha256 of both."""

    config: GPTConfig
    weights: Weights | None = None
    sha256: str = "none"

    def build(self, seed: int, attention: Attention, device: torch.device) -> GPT:
        """Builds the model; `seed`, train.seed, determines the weights of a new one."""
        torch.manual_seed(seeds.derived_seed(seed, seeds.WEIGHTS))
        if self.weights is None:
            return GPT(self.config, attention).to(device)
        model = without_weights(self.config, attention)
        model.load_state_dict(self.weights, assign=True)
        return model.requires_grad_(True).to(device)


def planned_config(init_from: str, params: ModelParams, vocab_size: int) -> GPTConfig:
    """The shape of the model that load_initial returns, without loading GPT-2's weights. Raises ValueError."""
    kind, _, name = init_from.partition(":")
    if kind == "scratch":
        return GPTConfig(vocab_size=vocab_size, **params.model_dump())
    if kind in GPT2_SHAPES:
        config = GPTConfig(*GPT2_SHAPES[kind], 1024, 50257, True, activation="gelu_tanh", dropout=0.1)
    elif kind == "model":
        config = load_model(name).model.config
    else:
        config, _ = _load_foreign(init_from, vocab_size)
    return _fitted(init_from, config, {}, params)[0]


def load_initial(init_from: str, params: ModelParams, tokenizer: Tokenizer) -> Initial:
    """The model of train.init_from, for text of that tokenizer.

    `params` may set another dropout and a smaller block_size, which crops the model; all other values must be those of
    the source, or null. Raises ValueError if they are not, or if the source cannot be read.
    """
    kind, _, name = init_from.partition(":")
    if kind == "scratch":
        return Initial(GPTConfig(vocab_size=tokenizer.vocab_size, **params.model_dump()))
    if kind == "model":
        published = load_model(name)
        if published.tokenizer.sha256 != tokenizer.sha256:
            raise ValueError(
                f"train.init_from = {init_from} has another tokenizer than data/tokens; "
                f"set tokenize.tokenizer to file:{name}/tokenizer.json"
            )
        config = published.model.config
        weights: Weights = {name: p.detach() for name, p in published.model.named_parameters()}
    else:
        config, weights = _load_foreign(init_from, tokenizer.vocab_size)
    config, weights = _fitted(init_from, config, weights, params)
    return Initial(config, weights, sha256_of(config, weights))


def _load_foreign(init_from: str, vocab_size: int) -> tuple[GPTConfig, Weights]:
    """Loads a model of another program, for a tokenizer of `vocab_size` tokens."""
    kind, _, name = init_from.partition(":")
    if kind == "nanogpt":
        return load_nanogpt(Path(name), vocab_size)
    try:
        return load_gpt2(name if kind == "hf" else kind, vocab_size)
    except OtherVocabulary as error:
        remedy = "set tokenize.tokenizer to that of the source (GPT-2's is gpt2)"
        if error.tokens == GPT2_VOCAB_SIZE < error.rows:
            remedy = (
                'remove the rows that are no tokens: `python -c "from transformers import GPT2LMHeadModel as M; '
                f"m = M.from_pretrained('{name}'); m.resize_token_embeddings({GPT2_VOCAB_SIZE}); "
                f"m.save_pretrained('{name}')\"`"
            )
        raise ValueError(
            f"train.init_from = {init_from} has a vocabulary of {error.rows:,}, but data/tokens one of "
            f"{error.tokens:,}; {remedy}"
        ) from error


def load_gpt2(name: str, vocab_size: int | None = None) -> tuple[GPTConfig, Weights]:
    """Loads a GPT-2 of Hugging Face: a directory, one of GPT-2's four sizes, or `name` or `name@revision` on the hub.

    vocab_size: as for from_huggingface. Raises ValueError if there is no such model, OtherVocabulary if its
    vocabulary does not fit.
    """
    repository, _, revision = name.partition("@")
    if name in GPT2_REVISIONS:
        repository, revision = f"openai-community/{name}", GPT2_REVISIONS[name]
    elif Path(name).exists():
        return load_huggingface(Path(name), vocab_size)
    from transformers import GPT2LMHeadModel

    try:
        model = GPT2LMHeadModel.from_pretrained(repository, revision=revision or None, use_safetensors=True)
        return from_huggingface(model.config.to_dict(), model.state_dict(), vocab_size)
    except OtherVocabulary:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        problem = f"is neither a directory nor a GPT-2 on the hub ({reason(error)})"
        raise ValueError(f"{name} {problem}; correct the name, or check the network") from error


def crop_block_size(config: GPTConfig, weights: Weights, block_size: int) -> tuple[GPTConfig, Weights]:
    """The same model for a shorter context: drops the learned positions after block_size."""
    if "wpe.weight" in weights:
        weights = {**weights, "wpe.weight": weights["wpe.weight"][:block_size].clone()}
    return replace(config, block_size=block_size), weights


def sha256_of(config: GPTConfig, weights: Weights) -> str:
    """The hash of the config, and of the names, dtypes, shapes and values of the weights."""
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for name in sorted(weights):
        tensor = weights[name].detach().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _fitted(init_from: str, config: GPTConfig, weights: Weights, params: ModelParams) -> tuple[GPTConfig, Weights]:
    """Applies the values of params that may differ from the source. Raises ValueError for others that differ."""
    given = {name: value for name, value in params.model_dump().items() if value is not None}
    changed = {name: value for name, value in given.items() if getattr(config, name) != value}
    if "dropout" in changed:
        config = replace(config, dropout=changed.pop("dropout"))
    if changed.get("block_size", config.block_size) < config.block_size:
        config, weights = crop_block_size(config, weights, changed.pop("block_size"))
    changed.pop("zero_init", None)  # affects new models only
    for name, value in changed.items():
        theirs = asdict(config)[name]
        raise ValueError(
            f"model.{name} = {value}, but train.init_from = {init_from} has {theirs}; set it to {theirs} or null"
        )
    return config, weights
