"""Every preset through every stage, in this process, on stand-ins: small models, short texts, no network, no MLflow."""

import hashlib
import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from ruamel.yaml import YAML
from safetensors.torch import load_file

from nanogpt import flops
from nanogpt.corpus import grammar, sources
from nanogpt.params import Params, load_params
from nanogpt.pretrained import GPT2_REVISIONS
from stages import download, evaluate, sample, tokenize, train
from tests.conftest import BUILT_IN, REPOSITORY
from tools.preset import overlaid
from tracking import mlflow_process

PRESETS = {path.stem: path for path in sorted((REPOSITORY / "presets").glob("*.yaml"))}
BLOCK = 64  # tokens of context of the stand-ins

Laid = Callable[..., Params]


@pytest.fixture
def laid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Laid]:
    """`laid(name, shrink, **{"train.seed": 3, …})`: a folder to run stages in, with the preset's params so changed."""
    for name in ("nanogpt", "stages"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    shutil.copytree(REPOSITORY / "presets", tmp_path / "presets")  # links out of a source's folder are refused
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mlflow_process, "start", lambda *arguments: None)
    monkeypatch.setattr(mlflow_process, "wait", lambda *arguments: "not sent")
    monkeypatch.setattr("tracking.report.report", lambda *arguments: None)
    monkeypatch.setattr(flops, "measured_peak_flops", lambda *arguments: None)
    # torch is imported already, so its environment cannot be pinned; one thread is enough for what is so small.
    here = {"numerics.determinism": "off", "numerics.threads": 1, "numerics.compile": False, "runtime.device": "cpu"}

    def lay(name: str, shrink: bool = False, **changes: Any) -> Params:
        text, _ = overlaid(BUILT_IN.read_text(encoding="utf-8"), PRESETS[name])
        params = YAML(typ="safe").load(text)
        for key, value in {**here, **(small(params) if shrink else {}), **changes}.items():
            section, _, entry = key.partition(".")
            params[section][entry] = value
        with Path("params.yaml").open("w", encoding="utf-8") as file:
            YAML(typ="safe").dump(params, file)
        return load_params()

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield lay
    for number, handler in handlers.items():  # train sets its own
        signal.signal(number, handler)


def run_all() -> str:
    """Runs the five stages; returns what they said."""
    output = ""
    for stage in (download, tokenize, train, evaluate, sample):
        result = CliRunner().invoke(stage.main, [])
        output += result.output
        assert result.exit_code == 0, output
    return output


def metrics(stage: str) -> dict[str, float]:
    found: dict[str, float] = json.loads(Path(f"metrics/{stage}.json").read_text())
    return found


# --- nanoGPT's --------------------------------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some stories instead of tiny Shakespeare, in a mirror, and of OpenWebText's documents."""
    stories = ["".join(text) for text in grammar.documents(1, 12)]
    text = "".join(stories).encode()
    monkeypatch.setenv("NANOGPT_MIRROR", str(tmp_path / "mirror"))
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror/tinyshakespeare.txt").write_bytes(text)
    stand_in = sources.Remote("http://127.0.0.1:1/", "tinyshakespeare.txt", hashlib.sha256(text).hexdigest(), len(text))
    monkeypatch.setattr(sources, "SHAKESPEARE", stand_in)

    class Rows(list[dict[str, str]]):
        column_names = ("text",)

        def select_columns(self, names: list[str]) -> "Rows":
            assert names == ["text"]
            return self

    def load_dataset(path: str, *arguments: Any, **options: Any) -> Rows:
        assert (path, options["revision"]) == (sources.OPENWEBTEXT, sources.OPENWEBTEXT_REVISION)
        return Rows({"text": story} for story in stories)

    library = SimpleNamespace(disable_progress_bars=lambda: None, load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", library)


@pytest.fixture
def hub() -> Iterator[Callable[[str], Any]]:
    """`hub(name)` places a small GPT-2 where transformers looks for the one of that name that it has downloaded."""
    home = Path(os.environ["HF_HOME"]) / "hub"

    def place(name: str) -> Any:
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=BLOCK))
        model.save_pretrained(home / f"models--openai-community--{name}" / "snapshots" / GPT2_REVISIONS[name])
        return model

    yield place
    shutil.rmtree(home, ignore_errors=True)


def small(params: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What makes a preset a matter of a second: a small model, a few steps, short samples. All else is as it is."""
    train = params["train"]
    changes: dict[str, Any] = {"train.batch_size": 2, "train.eval_iters": 1, "evaluate.train_tokens": 200}
    changes |= {"sample.num_samples": 1, "sample.max_new_tokens": 8, "tracking.sample_tokens": 8}
    changes |= {"runtime.processes": 1}
    if not train["eval_only"]:
        changes |= {"train.processes": 1, "train.max_iters": 3, "train.eval_interval": 2}
        changes |= {"train.warmup_iters": min(train["warmup_iters"], 1)}
        changes |= {"train.gradient_accumulation_steps": min(train["gradient_accumulation_steps"], 2)}
    if train["init_from"] == "scratch":
        changes |= {"model.n_layer": 1, "model.n_head": 2, "model.n_embd": 8, "model.block_size": BLOCK}
    return changes


@pytest.mark.parametrize(
    "name",
    ["train_gpt2", "train_shakespeare_char", "shakespeare_cpu", "shakespeare_speedrun", "shakespeare_best"],
)
def test_one_trains_from_scratch(name: str, laid: Laid, texts: None, gpt2_files: Path) -> None:
    params = laid(name, shrink=True)
    output = run_all()
    assert metrics("train")["steps"] == 3
    assert 0 < metrics("evaluate")["val_loss"] < 12
    assert (params.train.publish == "last") == ("last at step 3" in output)
    assert len(json.loads(Path("samples/samples.json").read_text())) == 1


@pytest.mark.parametrize("has", [{}, {"amx_bf16": True}])
def test_a_cpu_without_bfloat16_is_warned_of(
    has: dict[str, bool], laid: Laid, texts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", **has})
    laid("shakespeare_speedrun", shrink=True, **{"numerics.dtype": "bfloat16"})
    told = "warning: this CPU has no instructions for numerics.dtype = bfloat16, and may take ten times as long"
    assert (told in run_all()) == (not has)


def test_gpt2_is_finetuned_at_a_constant_rate(laid: Laid, texts: None, gpt2_files: Path, hub: Any) -> None:
    theirs = hub("gpt2-xl")
    laid("finetune_shakespeare", shrink=True)
    run_all()
    (journal,) = Path(".runs").glob("*/attempt-1/journal.jsonl")
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [record["lr"] for record in records if record["kind"] == "step"] == [3e-5] * 3
    assert not torch.equal(load_file("model/weights.safetensors")["wpe.weight"], theirs.transformer.wpe.weight)
    assert math.isclose(metrics("evaluate")["val_loss"], math.log(50_257), rel_tol=0.05)  # it knows nothing yet


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_gpt2_is_scored_as_it_is(name: str, laid: Laid, texts: None, gpt2_files: Path, hub: Any) -> None:
    theirs = hub(name)
    preset = f"eval_{name.replace('-', '_')}"
    laid(preset, shrink=True)
    run_all()
    assert metrics("train")["steps"] == 0
    assert torch.equal(load_file("model/weights.safetensors")["wpe.weight"], theirs.transformer.wpe.weight)
    assert math.isclose(metrics("evaluate")["val_loss"], math.log(50_257), rel_tol=0.05)
    assert json.loads(Path("data/tokens/meta.json").read_text())["val"]["documents"] == 1


# --- for debugging ----------------------------------------------------------------------------------------------------


def test_one_step(laid: Laid) -> None:
    laid("debug_one_step")
    run_all()
    assert (metrics("train")["steps"], metrics("train")["step"]) == (1, 1)
    assert metrics("evaluate")["excess"] > 0


def test_one_batch_is_learnt_by_heart(laid: Laid) -> None:
    params = laid("debug_overfit")
    output = run_all()
    assert json.loads(Path("data/tokens/meta.json").read_text())["train"]["tokens"] == params.model.block_size + 1
    assert metrics("train")["train_loss"] < 0.01
    text = Path("presets/overfit.txt").read_text()
    assert text[1:100] in json.loads(Path("samples/samples.json").read_text())[0]["text"].replace("\n", "A")
    assert "the model overfits" in output


def test_ten_steps_are_traced_and_that_changes_no_weight(laid: Laid) -> None:
    tiny = {"model.n_layer": 1, "model.n_embd": 16, "model.block_size": 16, "download.documents": 60}
    laid("debug_profile", **tiny)
    output = run_all()
    (trace,) = Path(".runs").resolve().glob("*/attempt-1/trace.json")
    assert f"train: 10 steps traced, after 5 for warm-up -> {trace}" in output
    events = [event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]]
    assert sum(name.startswith("Optimizer.step#AdamW") for name in events) == 10
    traced = load_file("model/weights.safetensors")
    shutil.rmtree(".runs")
    laid("debug_profile", **tiny, **{"runtime.profile_steps": 0})
    assert "traced" not in run_all()
    plain = load_file("model/weights.safetensors")
    assert all(torch.equal(traced[name], plain[name]) for name in plain)


def test_each_preset_is_run_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in PRESETS if f'"{name}"' not in source and not name.startswith("eval_gpt2")] == []
