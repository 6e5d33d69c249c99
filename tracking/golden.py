"""Golden files: what this commit's training gives in each environment. golden/README.md describes their use."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt.files import sha256_json, write_json
from nanogpt.params import load_params
from tracking.dvc_files import DvcLock

if TYPE_CHECKING:
    from torch import nn

FOLDER, TOKENS = Path("golden"), Path("data/tokens")
STEPS = 20
Golden = dict[str, Any]


def first_steps() -> dict[str, Any]:
    """Trains the first steps of data/tokens and params.yaml, and leaves nothing behind.

    Returns {"environment": ..., "made_of": hashes of params, tokens and code, "kernels": known answers by kernel,
    "steps": records, exact to the bit, "tensors": [name, hash] of each weight before and after each step}.
    """
    params = load_params()
    from nanogpt import determinism

    numerics = determinism.pin(params.numerics, params.runtime.device)
    from nanogpt import known_answers
    from nanogpt.recipe import load_recipe
    from tracking.divergence import VALUES
    from tracking.fingerprint import environment, identify
    from tracking.retrace import Retrace

    recipe = load_recipe(params, numerics, TOKENS)
    hashes = identify(recipe)
    made_of = {
        "params": sha256_json(recipe.settings()),
        "tokens": hashes["tokens.sha256"],
        "code": hashes["code.sha256"],
    }
    retrace = Retrace(recipe)
    tensors = [tensor_hashes(retrace.state.model)]
    for step in range(1, min(STEPS, params.train.last_step) + 1):
        retrace.to(step)
        tensors.append(tensor_hashes(retrace.state.model))
    steps = [{name: record[name] for name in ("step", *VALUES)} for record in retrace.steps]
    return {
        "environment": bits_environment(environment(), numerics.as_dict()),
        "made_of": made_of,
        "kernels": known_answers.answers() if numerics.is_portable else {},
        "steps": steps,
        "tensors": tensors,
    }


def tensor_hashes(model: "nn.Module") -> list[tuple[str, str]]:
    """The name of each tensor of a model, in its order, and the first digits of the sha256 of its bytes."""
    import torch

    return [
        (name, hashlib.sha256(tensor.flatten().cpu().view(torch.uint8).numpy()).hexdigest()[:16])
        for name, tensor in model.state_dict().items()
    ]


def bits_environment(environment: dict[str, str], numerics: dict[str, Any]) -> dict[str, str]:
    """The part of an environment that the bits may depend on."""
    names = ["torch", "numpy", "tiktoken", "tokenizers", "safetensors", "libc", "machine"]
    portable = numerics["determinism"] == "portable"
    left_out = {"torch", "threads"} if portable else {"torch"}
    if not portable:
        names.append("cpu")
    python = ".".join(environment["python"].split(".")[:2])
    resolved = {f"numerics.{name}": str(value) for name, value in numerics.items() if name not in left_out}
    return {"python": python, **{name: environment[name] for name in names}, **resolved}


def write_golden() -> tuple[Path, Golden]:
    """Writes the golden file of this environment: the first steps, and the metrics of the model in dvc.lock.

    Raises ValueError, OSError.
    """
    model = DvcLock.parse(Path("dvc.lock").read_text()).model_md5
    if model is None:
        raise ValueError("dvc.lock has no model; run `dvc repro` first")
    golden = {**first_steps(), "model": model, "metrics": read_metrics(Path())}
    del golden["tensors"]  # a line for each, which `bisect` alone reads
    path = FOLDER / file_name(golden["environment"])
    write_json(path, golden)
    return path, golden


def file_name(environment: dict[str, str]) -> str:
    """The parts of an environment that a person looks for, and eight digits of the hash of all of it."""
    torch = environment["torch"].partition("+")[0]
    kind = environment["numerics.determinism"]
    if "numerics.threads" in environment:
        kind += f"-{environment['numerics.threads']}threads"
    return f"python{environment['python']}-torch{torch}-{kind}-{sha256_json(environment)[:8]}.json"


def load_goldens(folder: Path) -> list[Golden]:
    """All golden files in a folder. Raises ValueError for a damaged one."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            golden = json.loads(path.read_bytes())
            if file_name(golden["environment"]) != path.name:
                raise ValueError("its name does not match its environment")
            if not (golden["steps"] and golden["metrics"]):
                raise ValueError("it has no steps or no metrics")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}); `git checkout {path}`, or `make golden`") from error
        found.append(golden)
    return found


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """ "torch 2.13.0+cpu -> 2.14.0" for each entry that differs."""
    return [
        f"{name} {expected.get(name, 'none')} -> {found.get(name, 'none')}"
        for name in sorted({*expected, *found})
        if expected.get(name) != found.get(name)
    ]


def nearest(goldens: list[Golden], environment: dict[str, str]) -> Golden:
    """The golden file whose environment differs least."""
    return min(goldens, key=lambda golden: len(differences(golden["environment"], environment)))


def read_metrics(folder: Path) -> dict[str, float]:
    """The content of metrics/evaluate.json."""
    metrics: dict[str, float] = json.loads((folder / "metrics" / "evaluate.json").read_bytes())
    return metrics
