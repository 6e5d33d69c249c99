import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result

from benchmarks import gpu
from benchmarks.gpu import OURS, THEIRS, line, main, missing
from nanogpt import optimizer, timing
from tests.conftest import GPT2

PRESET = """# Small enough for a test
tokenize: {tokenizer: char}
model: {n_layer: 1, n_head: 2, n_embd: 8, block_size: 8, dropout: 0.2}
train: {batch_size: 3, gradient_accumulation_steps: 4, eval_interval: 7}
numerics: {determinism: off, threads: 1}
"""
# What stands for nanoGPT's model.py: the same calls, a model of one table.
THEIR_MODEL = """
import torch
from torch import nn

class GPTConfig:
    def __init__(self, **shape):
        assert shape == {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8, "bias": False, "dropout": 0.2,
                         "vocab_size": 65}

class GPT(nn.Module):
    calls = []

    def __init__(self, config):
        super().__init__()
        self.table = nn.Embedding(65, 65)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)

    def forward(self, x, y):
        self.calls.append(tuple(x.shape))
        assert torch.equal(x[:, 1:], y[:, :-1])
        return None, nn.functional.cross_entropy(self.table(x).flatten(0, 1), y.flatten())
"""


@pytest.fixture(autouse=True)
def repository(project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a small preset and a checkout of what stands for nanoGPT."""
    root = project(**GPT2)
    (root / "presets").mkdir()
    (root / "presets/tiny.yaml").write_text(PRESET)
    (root / "nanogpt").mkdir()
    (root / "nanogpt/model.py").write_text(THEIR_MODEL)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "model", raising=False)
    return root


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def trained(who: str, **settings: Any) -> dict[str, Any]:
    """What is measured of the eager candidate of that name, in this process."""
    candidates = ((s, p) for s, p in gpu.plan("tiny", Path("nanogpt"), "cpu") if s["who"] == who and not s["compile"])
    found, params = next(candidates)
    numerics = {key: value for key, value in settings.items() if key in params["numerics"]}
    params = {**params, "numerics": {**params["numerics"], **numerics}}
    return gpu.trained(params=params, checkout="nanogpt", **{**found, **settings})


# --- a machine without a GPU ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuda", "told"), [(None, "is built without CUDA; install"), ("13.0", "is built for CUDA 13.0 and sees no GPU")]
)
def test_without_a_gpu_one_line_says_what_is_missing(
    cuda: str | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    result = run()
    assert result.exit_code == 1
    assert result.output == f"Error: {missing(torch.__version__, cuda)}\n"
    assert told in result.output


def test_a_preset_that_does_not_exist_is_refused_in_one_line() -> None:
    result = run("--device", "cpu", "--preset", "missing")
    assert result.exit_code == 1
    assert result.output.splitlines()[1:] == ["Error: there is no preset missing; use one of tiny"]


# --- what is measured -------------------------------------------------------------------------------------------------


def test_all_is_planned_once_and_nanogpt_s_comes_first() -> None:
    planned = list(gpu.plan("tiny", Path("nanogpt"), "cuda"))
    assert len({json.dumps(settings) for settings, _ in planned}) == len(planned) == len(OURS) + len(THEIRS)
    assert [settings["who"] for settings, _ in planned] == ["nanogpt"] * 5 + ["ours"] * 7
    assert all(p["numerics"][key] == s[key] for s, p in planned for key in ("dtype", "compile", "attention"))
    alone = list(gpu.plan("tiny", None, "cuda"))
    assert [settings["who"] for settings, _ in alone] == ["ours"] * len(OURS)


def test_nanogpt_s_float32_is_tf32_whose_peak_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "their_reports", lambda *_: [float(number) for number in range(9)])
    monkeypatch.setattr("nanogpt.flops.peak_flops", lambda *_: 1e12)
    assert trained("nanogpt", dtype="float32")["mfu"] is None
    assert trained("nanogpt", dtype="bfloat16")["mfu"] > 0


def test_our_steps_are_timed_from_report_to_report(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    train = timing.train

    def spy(*arguments: Any) -> None:
        seen.append(arguments)
        train(*arguments)

    monkeypatch.setattr(timing, "train", spy)
    figures = trained("ours")
    assert figures["tokens_per_second"] == pytest.approx(3 * 8 / (figures["ms_per_step"] / 1e3))
    assert (figures["mfu"], figures["waits"]) == (None, None)  # a CPU's peak is in no table
    state, _, params = seen[0][:3]
    assert (params.train.batch_size, params.train.gradient_accumulation_steps) == (3, 1)
    assert params.runtime.log_interval == gpu.EVERY
    assert state.model.config.dropout == 0.2


def test_an_optimizer_that_is_not_fused_is_one_of_ours() -> None:
    found: list[Any] = []

    class Spy(optimizer.AdamW):
        def step(self, closure: Any = None) -> None:
            found.append([(group["fused"], group["foreach"]) for group in self.param_groups])
            super().step(closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "AdamW", Spy)
        trained("ours", adamw="foreach")
    assert set(map(tuple, found)) == {((False, True),) * len(found[0])}


def test_nanogpt_s_steps_are_as_many() -> None:
    figures = trained("nanogpt")
    calls = sys.modules["model"].GPT.calls
    assert calls == [(3, 8)] * gpu.EVERY * (timing.WARM_UP + gpu.TIMED)
    assert figures.keys() == trained("ours").keys()
    assert figures["ms_per_step"] > 0


# --- what is told -----------------------------------------------------------------------------------------------------


def test_the_table_and_the_json_hold_all_and_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(function: Any, who: str, dtype: str, **settings: Any) -> tuple[dict[str, Any], int]:
        if dtype == "float16":
            raise click.ClickException("exited with 1:\nout of memory")
        rest = {"ms_per_step": 1.0, "mfu": 0.5, "peak_memory_mb": 7.0, "first_seconds": 30.0, "waits": 1}
        return {"tokens_per_second": 100.0 if who == "nanogpt" else 150.0, **rest}, 0

    monkeypatch.setattr(gpu, "call", stand_in)
    result = run("--device", "cpu", "--preset", "tiny", "--nanogpt", "nanogpt", "--json", "out.json")
    assert result.exit_code == 0, result.output
    lines, content = result.output.splitlines(), json.loads(Path("out.json").read_text())
    assert len(lines) - 2 == len(content["rows"]) == len(OURS) + len(THEIRS)
    assert not [row for row in content["rows"] if {"checkout", "params"} & row.keys()]
    ours = [text for text in lines if " ours " in text]
    assert sum(text.split()[-6:] == ["1.5", "1", "7", "0.5", "30", "1"] for text in ours) == len(OURS) - 1
    assert sum(text.endswith("failed: out of memory") for text in lines) == 2


def test_no_ratio_is_told_of_what_was_not_measured() -> None:
    alike = {"preset": "tiny", "dtype": "float32", "compile": False, "attention": "fused", "adamw": "fused"}
    row = {**alike, "who": "ours", "tokens_per_second": 1.0, "ms_per_step": 1.0, "mfu": None, "peak_memory_mb": 1.0}
    row |= {"first_seconds": 1.0, "waits": None}
    found = line(row, [{**alike, "who": "nanogpt", "failed": "out of memory"}, row])
    assert found.partition("AdamW")[2].split() == ["1", "1", "1", "not", "known", "1"]


def test_a_candidate_s_process_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(gpu.__file__).parents[1]))
    monkeypatch.setattr(gpu, "plan", lambda *_: [({"preset": "tiny", "who": "nobody"}, {})])
    monkeypatch.setattr(gpu, "line", lambda found, rows: found["failed"])
    assert run("--device", "cpu", "--preset", "tiny").output.splitlines()[-1]
