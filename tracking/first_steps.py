"""The first training steps of data/tokens and params.yaml at full precision; leaves nothing behind."""

from pathlib import Path
from typing import Any

from nanogpt.params import flatten, load_params
from tracking.console import Console
from tracking.retrace import Retrace

TOKENS = Path("data/tokens")
STEPS = 20


def first_steps() -> dict[str, Any]:
    """{"environment": ..., "made_of": hashes of params, tokens and code, "steps": records of the journal}"""
    params = load_params()
    from nanogpt import determinism
    from nanogpt.files import sha256_json, sha256_tree
    from tracking.fingerprint import code_hash, environment

    resolved = determinism.pin(params.numerics, params.runtime.device)
    read = flatten(params.model, "model.") | flatten(params.train, "train.")
    made_of = {
        "params": sha256_json(read),
        "tokens": sha256_tree(TOKENS),
        "code": code_hash(Path.cwd(), "stages.train"),
    }
    with Retrace(Console("first-steps"), params, resolved, TOKENS, made_of["code"]) as retrace:
        records = retrace.to(min(STEPS, params.train.last_step))
    steps = [{name: record[name] for name in ("step", "loss", "grad_norm", "lr")} for record in records]
    bits = bits_environment(environment(), resolved.as_dict())
    return {"environment": bits, "made_of": made_of, "steps": steps}


def bits_environment(environment: dict[str, str], numerics: dict[str, Any]) -> dict[str, str]:
    """The part of an environment that the bits may depend on."""
    names = ["torch", "numpy", "tiktoken", "tokenizers", "safetensors", "libc", "machine"]
    if numerics["determinism"] != "portable":
        names.append("cpu")
    python = ".".join(environment["python"].split(".")[:2])
    resolved = {f"numerics.{name}": str(value) for name, value in numerics.items() if name != "torch"}
    return {"python": python, **{name: environment[name] for name in names}, **resolved}
