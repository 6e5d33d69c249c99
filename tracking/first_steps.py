"""The first training steps of data/tokens and params.yaml at full precision; leaves nothing behind."""

from pathlib import Path
from typing import Any

from nanogpt.params import flatten, load_params

TOKENS = Path("data/tokens")
STEPS = 20


def first_steps() -> dict[str, Any]:
    """{"environment": ..., "made_of": hashes of params, tokens and code, "steps": records of the journal}"""
    params = load_params()
    from nanogpt import determinism

    numerics = determinism.pin(params.numerics, params.runtime.device)
    from nanogpt.files import sha256_json
    from nanogpt.recipe import load_recipe
    from tracking.fingerprint import environment, identify
    from tracking.retrace import VALUES, Retrace

    recipe = load_recipe(params, numerics, TOKENS)
    hashes = identify(recipe)
    made_of = {
        "params": sha256_json(flatten(params.model, "model.") | flatten(params.train, "train.")),
        "tokens": hashes["tokens.sha256"],
        "code": hashes["code.sha256"],
    }
    records = Retrace(recipe).to(min(STEPS, params.train.last_step))
    steps = [{name: record[name] for name in ("step", *VALUES)} for record in records]
    bits = bits_environment(environment(), numerics.of_the_bits())
    return {"environment": bits, "made_of": made_of, "steps": steps}


def bits_environment(environment: dict[str, str], numerics: dict[str, Any]) -> dict[str, str]:
    """The part of an environment that the bits may depend on."""
    names = ["torch", "numpy", "tiktoken", "tokenizers", "safetensors", "libc", "machine"]
    if numerics["determinism"] != "portable":
        names.append("cpu")
    python = ".".join(environment["python"].split(".")[:2])
    resolved = {f"numerics.{name}": str(value) for name, value in numerics.items() if name != "torch"}
    return {"python": python, **{name: environment[name] for name in names}, **resolved}
