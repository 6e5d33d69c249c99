"""What a command imports before it does anything, told by a new process. Times are benchmarks/startup.py's."""

import subprocess
import sys

import pytest

from benchmarks.startup import STAGES
from tests.test_architecture import REPOSITORY, own
from tools.__main__ import COMMANDS as TOOLS

COMMANDS = [*(f"stages.{name}" for name in STAGES), *(f"tools {name}" for name in TOOLS)]
SLOW = {
    *("torch", "transformers", "datasets", "mlflow", "tokenizers", "tiktoken", "matplotlib", "pyarrow", "pandas"),
    *("sqlalchemy", "safetensors", "rich"),
}

HELP = """
import atexit, runpy, sys
atexit.register(lambda: print("imported", *sys.modules))
sys.argv = [*sys.argv[1].split(), "--help"]
runpy.run_module(sys.argv[0], run_name="__main__")
"""

IMPORTS = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print("imported", *sys.modules)
"""

# What train and evaluate do with torch, by the functions that they call; and the modules that they import.
STEPS = """
import importlib, sys
from pathlib import Path
from nanogpt import determinism
from nanogpt.params import load_params

params = load_params(Path("params.yaml"))
determinism.pin(params.numerics, "cpu")
import numpy as np
import torch
from nanogpt.evaluate import score, windows
from nanogpt import model as model_module
from nanogpt.gpt_config import GPTConfig
from nanogpt.model import GPT, without_weights
from nanogpt.optimizer import make_optimizer
for name in sys.argv[1:]:
    importlib.import_module(name)

config = GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=20, bias=True, activation="gelu")
tokens = np.arange(60, dtype=np.uint16) % 20
for chosen in ("adamw", "muon"):
    model = GPT(config)
    optimizer = make_optimizer(model, params.train.model_copy(update={"optimizer": chosen}), "cpu", "float32")
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batch = torch.from_numpy(tokens[:16].astype(np.int64)).view(2, 8)
    scaler.scale(model(batch, batch)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    optimizer.load_state_dict(optimizer.state_dict())
    copy = without_weights(config)
    copy.load_state_dict(model.state_dict(), assign=True)
    model_module.RECOMPUTED, large = 0, model_module.RECOMPUTED
    score(copy, tokens, windows(59, 8, 8), 2)
    model_module.RECOMPUTED = large
print("imported", *sys.modules)
"""


def imported(*command: str) -> set[str]:
    """The modules that a script has imported in the end, by its last line."""
    done = subprocess.run([sys.executable, "-c", *command], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    first, *modules = done.stdout.splitlines()[-1].split()
    assert first == "imported"
    return set(modules)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_waits_for_no_slow_library(command: str) -> None:
    found = imported(HELP, command)
    assert "click" in found
    assert not found & (SLOW | ({"pydantic", "numpy"} if command.startswith("stages.") else set()))


def test_the_commands_are_all_that_there_are() -> None:
    for folder, names in (("stages", STAGES), ("tools", ("__main__",))):
        commands = [
            path.stem for path in (REPOSITORY / folder).glob("*.py") if '__name__ == "__main__"' in path.read_text()
        ]
        assert sorted(commands) == sorted(names), folder
    tools = [path.stem for path in (REPOSITORY / "tools").glob("*.py") if "@command()" in path.read_text()]
    assert sorted(tools) == sorted(name.replace("-", "_") for name in TOOLS)


def test_eager_training_and_evaluation_do_not_import_torchs_compiler() -> None:
    stages = [REPOSITORY / "stages" / f"{name}.py" for name in ("train", "evaluate")]
    found = imported(STEPS, *sorted(set().union(*map(own, stages))))
    assert "torch" in found
    assert not {name.split(".")[0] for name in found} & {"mlflow", "transformers", "datasets", "sympy"}
    assert not {"torch._dynamo", "torch._inductor"} & found


def test_what_compares_results_does_not_wait_for_torch() -> None:
    names = ("tracking.verification", "tools.bisect_checks", "tools.champion", "tools.compare", "tools.lineage")
    found = imported(IMPORTS, *names)
    assert "tracking.divergence" in found
    assert "torch" not in found
