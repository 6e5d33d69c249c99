"""docs/from-nanogpt.md names all that nanoGPT has, and of ours only what there is."""

import ast
import os
import re
from pathlib import Path

import pytest

from nanogpt.params import flatten, load_params

REPOSITORY = Path(__file__).parents[1]
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


def named(script: str) -> set[str]:
    """What stands in the first column of a script's table of variables."""
    section = PAGE.split(f"## Variables of {script}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}


@pytest.mark.parametrize("script", VARIABLES)
def test_every_variable_has_its_row(script: str) -> None:
    assert named(script) == VARIABLES[script]


def test_every_file_is_named() -> None:
    assert {name for name in FILES if f"`{name}`" not in PAGE.replace("config/", "")} == set()


def test_every_key_of_params_yaml_that_is_named_exists() -> None:
    known = flatten(load_params(REPOSITORY / "params.yaml")).keys()
    sections = "|".join(sorted({key.partition(".")[0] for key in known}))
    keys = set(re.findall(rf"(?:`|-S )((?:{sections})\.(?!py\b|bin\b)\w+)", PAGE))
    assert len(keys) > 40
    assert keys <= known


def test_every_module_and_file_of_ours_that_is_named_exists() -> None:
    paths = set(re.findall(r"`((?:nanogpt|stages|tools|benchmarks)/\w+\.py)`", PAGE))
    commands = set(re.findall(r"-m ((?:stages|tools|benchmarks)\.\w+)", PAGE))
    paths |= {f"{command.replace('.', '/')}.py" for command in commands}
    assert len(paths) > 15
    assert {path for path in paths if not (REPOSITORY / path).exists()} == set()


def test_the_lists_are_those_of_a_real_checkout() -> None:
    if not os.environ.get("NANOGPT_CHECKOUT"):
        pytest.skip("NANOGPT_CHECKOUT names no checkout of nanoGPT")
    checkout = Path(os.environ["NANOGPT_CHECKOUT"])
    for script, names in VARIABLES.items():
        head = (checkout / script).read_text(encoding="utf-8").split("exec(open(")[0]
        assigned = {
            node.targets[0].id
            for node in ast.parse(head).body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        assert assigned - {"config_keys"} == names
    found = [path.relative_to(checkout).as_posix() for path in checkout.rglob("*.*") if ".git" not in path.parts]
    code = {path.removeprefix("config/") for path in found if path.endswith((".py", ".ipynb", "readme.md"))}
    assert code == FILES
