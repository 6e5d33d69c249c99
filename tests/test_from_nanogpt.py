"""docs/from-nanogpt.md names all that nanoGPT has, and of ours only what there is; presets have nanoGPT's values."""

import ast
import os
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from nanogpt.params import flatten
from tests.conftest import REPOSITORY, committed_params
from tools.preset import preset_params

PAGE = (REPOSITORY / "docs/from-nanogpt.md").read_text(encoding="utf-8")

FILES = {
    *("train.py", "model.py", "sample.py", "bench.py", "configurator.py", "scaling_laws.ipynb"),
    *(
        "transformer_sizing.ipynb",
        "train_gpt2.py",
        "train_shakespeare_char.py",
        "finetune_shakespeare.py",
        "eval_gpt2.py",
    ),
    *("eval_gpt2_medium.py", "eval_gpt2_large.py", "eval_gpt2_xl.py", "data/openwebtext/prepare.py"),
    *("data/shakespeare/prepare.py", "data/shakespeare_char/prepare.py", "data/openwebtext/readme.md"),
    *("data/shakespeare/readme.md", "data/shakespeare_char/readme.md"),
}
VARIABLES = {
    "train.py": {
        *("out_dir", "eval_interval", "log_interval", "eval_iters", "eval_only", "always_save_checkpoint", "init_from"),
        *("wandb_log", "wandb_project", "wandb_run_name", "dataset", "gradient_accumulation_steps", "batch_size"),
        *("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias", "learning_rate", "max_iters", "weight_decay"),
        *("beta1", "beta2", "grad_clip", "decay_lr", "warmup_iters", "lr_decay_iters", "min_lr", "backend", "device"),
        *("dtype", "compile"),
    },
    "sample.py": {
        *("init_from", "out_dir", "start", "num_samples", "max_new_tokens", "temperature", "top_k", "seed", "device"),
        *("dtype", "compile"),
    },
    "bench.py": {
        *("batch_size", "block_size", "bias", "real_data", "seed", "device", "dtype", "compile", "profile"),
    },
}
# What train.py sets, and what its configurations and its README's run for a CPU set besides.
DEFAULTS: dict[str, Any] = {
    **{"eval_interval": 2000, "eval_iters": 200, "eval_only": False, "always_save_checkpoint": True},
    **{"init_from": "scratch", "gradient_accumulation_steps": 40, "batch_size": 12, "block_size": 1024},
    **{"n_layer": 12, "n_head": 12, "n_embd": 768, "dropout": 0.0, "bias": False, "learning_rate": 6e-4},
    **{"max_iters": 600_000, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0, "decay_lr": True},
    **{"warmup_iters": 2000, "lr_decay_iters": 600_000, "min_lr": 6e-5, "compile": True},
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "train_gpt2": {"eval_interval": 1000},
    "train_shakespeare_char": {
        **{"eval_interval": 250, "always_save_checkpoint": False, "gradient_accumulation_steps": 1, "batch_size": 64},
        **{"block_size": 256, "n_layer": 6, "n_head": 6, "n_embd": 384, "dropout": 0.2, "learning_rate": 1e-3},
        **{"max_iters": 5000, "lr_decay_iters": 5000, "min_lr": 1e-4, "beta2": 0.99, "warmup_iters": 100},
    },
    "finetune_shakespeare": {
        **{"eval_interval": 5, "eval_iters": 40, "always_save_checkpoint": False, "init_from": "gpt2-xl"},
        **{"batch_size": 1, "gradient_accumulation_steps": 32, "max_iters": 20, "learning_rate": 3e-5},
        **{"decay_lr": False},
    },
    **{
        f"eval_{name.replace('-', '_')}": {"batch_size": 8, "eval_iters": 500, "eval_only": True, "init_from": name}
        for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    },
}
CPU = {
    **{"compile": False, "eval_iters": 20, "block_size": 64, "batch_size": 12, "n_layer": 4, "n_head": 4},
    **{"n_embd": 128, "max_iters": 2000, "lr_decay_iters": 2000, "dropout": 0.0},
}


def named(script: str) -> set[str]:
    """What stands in the first column of a script's table of variables."""
    section = PAGE.split(f"## Variables of {script}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}


@pytest.mark.parametrize("script", VARIABLES)
def test_every_variable_has_its_row(script: str) -> None:
    assert named(script) == VARIABLES[script]


@pytest.mark.parametrize("name", [*CONFIGURATIONS, "shakespeare_cpu"])
def test_a_preset_has_the_values_of_nanogpts_configuration(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    params = preset_params(name)
    ours = params.model.model_dump() | params.train.model_dump() | {"compile": params.numerics.compile}
    ours |= {"always_save_checkpoint": ours["publish"] == "last", "decay_lr": ours["min_lr"] < ours["learning_rate"]}
    ours |= {"lr_decay_iters": ours["lr_decay_iters"] or ours["max_iters"]}
    own = CONFIGURATIONS.get(name) or CONFIGURATIONS["train_shakespeare_char"] | CPU
    theirs = dict(own) if own.get("eval_only") else DEFAULTS | own
    if not theirs.get("decay_lr", True):
        theirs |= {"warmup_iters": 0, "lr_decay_iters": theirs["max_iters"], "min_lr": theirs["learning_rate"]}
    if theirs["init_from"] != "scratch":
        theirs |= dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "bias"))  # those of the weights
    assert {key: ours[key] for key in theirs} == theirs


def test_every_file_is_named() -> None:
    assert {name for name in FILES if f"`{name}`" not in PAGE.replace("config/", "")} == set()


def test_every_key_of_params_yaml_that_is_named_exists() -> None:
    known = flatten(committed_params()).keys()
    sections = "|".join(sorted({key.partition(".")[0] for key in known}))
    keys = set(re.findall(rf"(?:`|-S )((?:{sections})\.(?!py\b|bin\b)\w+)", PAGE))
    assert len(keys) > 40
    assert keys <= known


def test_every_module_and_file_of_ours_that_is_named_exists() -> None:
    paths = set(re.findall(r"`((?:nanogpt|stages|tools|benchmarks)/\w+\.py)`", PAGE))
    commands = set(re.findall(r"-m (stages|tools|benchmarks)[. ]([\w-]+)", PAGE))
    paths |= {f"{package}/{command.replace('-', '_')}.py" for package, command in commands}
    assert len(paths) > 15
    assert {path for path in paths if not (REPOSITORY / path).exists()} == set()


def test_the_lists_are_those_of_a_real_checkout() -> None:
    if not os.environ.get("NANOGPT_CHECKOUT"):
        pytest.skip("NANOGPT_CHECKOUT names no checkout of nanoGPT")
    checkout = Path(os.environ["NANOGPT_CHECKOUT"])
    defaults: dict[str, Any] = {}
    for script, names in VARIABLES.items():
        head = (checkout / script).read_text(encoding="utf-8").split("exec(open(")[0]
        assigned = {
            node.targets[0].id: ast.unparse(node.value)
            for node in ast.parse(head).body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        assert assigned.keys() - {"config_keys"} == names
        if script == "train.py":
            defaults = {key: eval(assigned[key], {}) for key in DEFAULTS}  # constants, and 5 * 8
    assert defaults == DEFAULTS
    for name, values in CONFIGURATIONS.items():
        theirs = runpy.run_path(str(checkout / f"config/{name}.py"))
        assert {key: value for key, value in theirs.items() if defaults.get(key, value) != value} == values
    (command,) = re.findall(
        r"train\.py .* --device=cpu (--compile.*)", (checkout / "README.md").read_text(encoding="utf-8")
    )
    options = {name: ast.literal_eval(value) for name, value in re.findall(r"--(\w+)=(\S+)", command)}
    assert options == CPU | {"log_interval": 1}
    found = [path.relative_to(checkout).as_posix() for path in checkout.rglob("*.*") if ".git" not in path.parts]
    code = {path.removeprefix("config/") for path in found if path.endswith((".py", ".ipynb", "readme.md"))}
    assert code == FILES
