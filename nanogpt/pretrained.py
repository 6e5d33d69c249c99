"""What a training begins with: a new model, or the weights that train.init_from names, checked against params.yaml."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from nanogpt import seeds
from nanogpt.corpus.tokenizer import GPT2_VOCAB_SIZE, Tokenizer
from nanogpt.gpt_config import Attention, GPTConfig
from nanogpt.huggingface import from_huggingface, load_huggingface
from nanogpt.model import GPT, without_weights
from nanogpt.nanogpt_checkpoint import load_nanogpt
from nanogpt.params import ModelParams
from nanogpt.saved_model import load_model
from nanogpt.weights import OtherVocabulary, Weights

# Commits of the hub's repositories, so that the same name always gives the same weights.
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
    """A model's shape and, unless it is new, its weights and the sha256 of both."""

    config: GPTConfig
    weights: Weights | None = None
    sha256: str = "none"

    def build(self, seed: int, attention: Attention, device: torch.device) -> GPT:
        """The model; the weights of a new one are a function of the seed, train.seed."""
        torch.manual_seed(seeds.derived_seed(seed, seeds.WEIGHTS))
        if self.weights is None:
            return GPT(self.config, attention).to(device)
        model = without_weights(self.config, attention)
        model.load_state_dict(self.weights, assign=True)
        return model.requires_grad_(True).to(device)


def planned_config(init_from: str, params: ModelParams, vocab_size: int) -> GPTConfig:
    """The shape of what load_initial gives. Of GPT-2's sizes it is known without their weights; files are read.

    Raises ValueError as load_initial does.
    """
    kind, _, name = init_from.partition(":")
    if kind == "scratch":
        return GPTConfig(vocab_size=vocab_size, **params.model_dump())
    if kind in GPT2_SHAPES:
        config, weights = (
            GPTConfig(*GPT2_SHAPES[kind], 1024, 50257, True, activation="gelu_tanh", dropout=0.1),
            Weights(),
        )
    elif kind == "model":
        config, weights = load_model(name).model.config, Weights()
    else:
        config, weights = _load_foreign(init_from, vocab_size)
    return _fitted(init_from, config, weights, params)[0]


def load_initial(init_from: str, params: ModelParams, tokenizer: Tokenizer) -> Initial:
    """What train.init_from names, for text of that tokenizer.

    A model of fewer positions than the source is cropped, and dropout may be another; all else that params name must
    be the source's. Raises ValueError, naming key, value and remedy, if it is not, or if the source cannot be read.
    """
    kind, _, name = init_from.partition(":")
    if kind == "scratch":
        return Initial(GPTConfig(vocab_size=tokenizer.vocab_size, **params.model_dump()))
    if kind == "model":
        published = load_model(name)
        if published.tokenizer.sha256 != tokenizer.sha256:
            raise ValueError(
                f"train.init_from = {init_from} has another tokenizer than the tokens; "
                f"set tokenize.tokenizer to file:{name}/tokenizer.json"
            )
        config = published.model.config
        weights: Weights = {name: p.detach() for name, p in published.model.named_parameters()}
    else:
        config, weights = _load_foreign(init_from, tokenizer.vocab_size)
    config, weights = _fitted(init_from, config, weights, params)
    return Initial(config, weights, sha256_of(config, weights))


def _load_foreign(init_from: str, vocab_size: int) -> tuple[GPTConfig, Weights]:
    """A model of another program, for a tokenizer of that many tokens."""
    kind, _, name = init_from.partition(":")
    if kind == "nanogpt":
        return load_nanogpt(Path(name), vocab_size)
    try:
        return load_gpt2(name if kind == "hf" else kind, vocab_size)
    except OtherVocabulary as error:
        remedy = "set tokenize.tokenizer to the source's (GPT-2's: gpt2)"
        if error.tokens == GPT2_VOCAB_SIZE < error.rows:
            remedy = (
                'cut the rows that are no tokens of GPT-2: `python -c "from transformers import GPT2LMHeadModel as M; '
                f"m = M.from_pretrained('{name}'); m.resize_token_embeddings({GPT2_VOCAB_SIZE}); "
                f"m.save_pretrained('{name}')\"`"
            )
        raise ValueError(
            f"train.init_from = {init_from} has a vocabulary of {error.rows:,}, the tokens one of {error.tokens:,}; "
            f"{remedy}"
        ) from error


def load_gpt2(name: str, vocab_size: int | None = None) -> tuple[GPTConfig, Weights]:
    """A GPT-2 of Hugging Face: a directory here, one of GPT-2's four sizes, or the name of a model on the hub.

    `name@revision` names a commit of the hub. vocab_size: the tokenizer's, where the embedding has rows for
    more. Raises ValueError if there is no such model, OtherVocabulary if its tokens are others.
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
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{name} is neither a directory here nor a GPT-2 that the hub gives ({reason}); "
            "correct the name, or check the network"
        ) from error


def crop_block_size(config: GPTConfig, weights: Weights, block_size: int) -> tuple[GPTConfig, Weights]:
    """The same model for shorter contexts: learned positions beyond are dropped."""
    if "wpe.weight" in weights:
        weights = {**weights, "wpe.weight": weights["wpe.weight"][:block_size].clone()}
    return replace(config, block_size=block_size), weights


def sha256_of(config: GPTConfig, weights: Weights) -> str:
    """The sha256 of a model: its config, and the names, dtypes, shapes and numbers of its weights."""
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for name in sorted(weights):
        tensor = weights[name].detach().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _fitted(init_from: str, config: GPTConfig, weights: Weights, params: ModelParams) -> tuple[GPTConfig, Weights]:
    """The source with what params change of it. Raises ValueError for what cannot be changed."""
    given = {name: value for name, value in params.model_dump().items() if value is not None}
    changed = {name: value for name, value in given.items() if getattr(config, name) != value}
    if "dropout" in changed:
        config = replace(config, dropout=changed.pop("dropout"))
    if changed.get("block_size", config.block_size) < config.block_size:
        config, weights = crop_block_size(config, weights, changed.pop("block_size"))
    changed.pop("zero_init", None)  # how a new model begins, which this one does not
    for name, value in changed.items():
        theirs = asdict(config)[name]
        raise ValueError(
            f"model.{name} = {value} is not that of train.init_from = {init_from}, {theirs}; set it to {theirs} or null"
        )
    return config, weights
