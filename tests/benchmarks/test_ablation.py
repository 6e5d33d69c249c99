"""The ablation's training, on a model that takes no time: what it tells, and that options reach it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.ablation import VARIANTS, told, with_changes
from nanogpt.params import check_combinations
from tests.conftest import REPOSITORY
from tools.preset import preset_params

SMALL = {
    "model.n_layer": 1,
    "model.n_head": 1,
    "model.n_embd": 8,
    "model.block_size": 16,
    "train.batch_size": 2,
    "numerics.dtype": "float32",
    "numerics.compile": "false",
    "numerics.threads": 1,
}


def test_each_variant_is_another_experiment_that_is_allowed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)
    preset = preset_params("shakespeare_speedrun")
    changed = [with_changes(preset, changes) for changes in VARIANTS.values()]
    for params in changed:
        check_combinations(params, Path("params.yaml"))
    assert changed[0] == preset
    assert len({str(params) for params in changed}) == len(VARIANTS)


def test_a_run_tells_loss_and_time(tmp_path: Path):
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 40)

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "benchmarks.ablation", "--text", str(tmp_path / "text.txt")]
        command += [f"--set={key}={value}" for key, value in SMALL.items()]
        return subprocess.run([*command, *options], cwd=REPOSITORY, capture_output=True, text=True)

    losses = []
    for name in ("the preset", "previous_tokens: 0"):
        result = run("--only", json.dumps({"name": name, "steps": 4, "seed": 1}))
        assert result.returncode == 0, result.stderr
        found = json.loads(result.stdout.splitlines()[-1])
        assert 0 < found["loss"] < 4
        assert found["ms"] > 0
        losses.append(found["loss"])
    assert losses[0] != losses[1]
    result = run("--set", "train.max_iter=3")
    assert result.returncode == 1
    assert result.stderr.startswith("Error: --set train.max_iter=3: params.yaml has no train.max_iter")


def test_one_seed_has_no_spread():
    assert told([1.5]) == "1.5000"
    assert told([1.5, 1.7]) == "1.6000 ± 0.1414"
