import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from benchmarks import against_nanogpt
from benchmarks.against_nanogpt import MEASURES, SETTINGS, judge, main, nanogpt_arguments, our_params, prepare, run
from nanogpt.nanogpt_checkpoint import save_nanogpt, to_nanogpt
from nanogpt.saved_model import load_model

TEXT = "to be, or not to be: that is the question\n" * 60
# What stands for nanoGPT's files: the same inputs and outputs, and nothing of what is in them.
PREPARE = """
import pathlib, numpy
folder = pathlib.Path(__file__).parent
text = (folder / "input.txt").read_text()
ids = numpy.array([sorted(set(text)).index(c) for c in text], dtype=numpy.uint16)
cut = int(len(text) * 0.9)
ids[:cut].tofile(folder / "train.bin"), ids[cut:].tofile(folder / "val.bin")
"""
THEIR_MODEL = """
class GPTConfig:
    def __init__(self, **arguments):
        assert arguments["n_embd"] == 8

class GPT:
    calls = []

    def __init__(self, config):
        pass

    def load_state_dict(self, weights):
        assert "transformer.wte.weight" in weights

    def eval(self):
        return self

    def generate(self, idx, max_new_tokens, temperature, top_k):
        self.calls.append((tuple(idx.shape), max_new_tokens))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like nanoGPT's."""
    data = tmp_path / "checkout/data/shakespeare_char"
    data.mkdir(parents=True)
    (data / "prepare.py").write_text(PREPARE)
    (data / "train.bin").write_bytes(b"the user's own")
    (tmp_path / "checkout/model.py").write_text(THEIR_MODEL)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "checkout"


@pytest.fixture
def tiny(project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with params.yaml, and a small model instead of nanoGPT's."""
    small = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8}
    shapes = {"4x128": {**small, "batch_size": 12}, "6x384": {**small, "batch_size": 8}}
    monkeypatch.setattr(against_nanogpt, "SHAPES", shapes)
    monkeypatch.setattr(against_nanogpt, "GENERATED", 10)
    monkeypatch.setenv("DVC_ROOT", ".")  # so that what is set is unset afterwards
    return project(**{"tracking.prompts": ["not of these characters: 12345"], "train.seed": 1})


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def work(**changes: Any) -> dict[str, Any]:
    values = {"candidate": "off", "steps": 500, "threads": 1, "dtype": "float32", "compile": False, "model": "out"}
    values |= {"shape": "4x128", "attention": "fused"}
    return {**values, **changes}


# --- the settings -----------------------------------------------------------------------------------------------------


def test_both_are_told_the_same(project: Callable[..., Path]) -> None:
    project(**{"model.norm": "rmsnorm", "train.optimizer": "muon", "train.seed": 1, "model.vocab_multiple": 64})
    config, *options = nanogpt_arguments(work(dtype="bfloat16", compile=True))
    theirs = dict(option.removeprefix("--").split("=") for option in options)
    ours = our_params(work(dtype="bfloat16", compile=True))
    assert config == "config/train_shakespeare_char.py"
    for section in (ours.model, ours.train):
        values = section.model_dump()
        for name in values.keys() & theirs.keys():
            assert str(values[name]) == theirs.pop(name), name
    assert (theirs.pop("dtype"), theirs.pop("compile")) == (ours.numerics.dtype, str(ours.numerics.compile))
    assert theirs == {"device": "cpu", "log_interval": "1", "always_save_checkpoint": "True", "out_dir": "out"}
    assert (ours.model.norm, ours.train.optimizer, ours.model.vocab_multiple) == ("layernorm", "adamw", 1)


@pytest.mark.parametrize(("steps", "interval"), [(2000, 250), (500, 250), (60, 60), (260, 260)])
def test_the_last_step_is_evaluated_so_that_nanogpt_saves_it(steps: int, interval: int) -> None:
    assert f"--eval_interval={interval}" in nanogpt_arguments(work(steps=steps))


@pytest.mark.parametrize(("steps", "warmup"), [(2000, 100), (100, 50), (30, 15)])
def test_the_warm_up_ends_before_the_training_in_both(steps: int, warmup: int, project: Callable[..., Path]) -> None:
    project()
    assert f"--warmup_iters={warmup}" in nanogpt_arguments(work(steps=steps))
    assert our_params(work(steps=steps)).train.warmup_iters == warmup


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "both are needed: --nanogpt and --text"),
        (("--settings", "float64-eager"), "float64-eager is none of float32-eager"),
        (("--determinism", "of"), "of is none of off, machine, portable"),
        (("--steps", "20"), "--steps"),
        (("--shapes", "5x5"), "5x5 is none of 4x128, 6x384"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple[str, ...], told: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert told in result.output


def test_portable_has_one_setting(checkout: Path) -> None:
    both = ["--nanogpt", str(checkout), "--text", str(checkout.parent / "text.txt"), "--determinism", "portable"]
    result = invoke(*both, "--settings", "float32-eager,bfloat16-eager")
    assert result.exit_code == 2
    assert "--determinism portable is for --settings float32-eager alone" in result.output


# --- data and processes -----------------------------------------------------------------------------------------------


def test_the_text_is_prepared_in_a_copy(checkout: Path, tiny: Path, tmp_path: Path) -> None:
    copy, tokens = prepare(checkout, checkout.parent / "text.txt", tmp_path / "work")
    assert (copy / "data/shakespeare_char/train.bin").read_bytes() == (tokens / "train.bin").read_bytes()
    assert (checkout / "data/shakespeare_char/train.bin").read_bytes() == b"the user's own"
    assert not (checkout / "data/shakespeare_char/input.txt").exists()


def test_other_tokens_than_ours_are_refused(checkout: Path, tiny: Path, tmp_path: Path) -> None:
    (checkout.parent / "text.txt").write_bytes(TEXT.replace("\n", "\r\n").encode())
    with pytest.raises(ValueError, match=r"gives another train.bin than nanoGPT's"):
        prepare(checkout, checkout.parent / "text.txt", tmp_path / "work")


def test_a_process_tells_its_own_memory(tmp_path: Path) -> None:
    small = run([sys.executable, "-c", "print('hello')"], tmp_path, {})
    large = run(
        [sys.executable, "-c", "import os; x = b'x' * 1_000_000_000; print(os.environ['A'])"], tmp_path, {"A": "b"}
    )
    assert (small[0], large[0]) == ("hello\n", "b\n")
    assert small[1] < 1_000_000_000 < large[1]  # Linux counts what the parent has too, and pytest has much


def test_a_process_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(click.ClickException, match=r"exited with 3:\nno such thing"):
        run([sys.executable, "-c", "print('no such thing'); raise SystemExit(3)"], tmp_path, {})


# --- training and judging ---------------------------------------------------------------------------------------------


def test_ours_trains_and_is_judged(checkout: Path, tiny: Path, tmp_path: Path) -> None:
    _, tokens = prepare(checkout, checkout.parent / "text.txt", tmp_path / "work")
    given = work(tokens=str(tokens), model=str(tmp_path / "model"), steps=30)
    times = against_nanogpt.train_ours(given)
    assert len(times) == 29
    assert all(ms > 0 for ms in times)
    assert load_model(tmp_path / "model").info["step"] == 30
    figures = judge(given)
    assert figures.keys() == MEASURES.keys() - {"ms_per_step", "peak_memory_mb"}
    assert 1 < figures["val_loss"] < 3.5
    assert min(figures.values()) > 0


def test_nanogpt_s_weights_are_scored_by_the_same_measure(
    checkout: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "model", raising=False)
    copy, tokens = prepare(checkout, checkout.parent / "text.txt", tmp_path / "work")
    ours = work(tokens=str(tokens), model=str(tmp_path / "model"), steps=22)
    against_nanogpt.train_ours(ours)
    gpt = load_model(tmp_path / "model").model
    (tmp_path / "theirs").mkdir()
    save_nanogpt(to_nanogpt(gpt.config, gpt.state_dict()), tmp_path / "theirs/ckpt.pt")
    theirs = {**ours, "candidate": "nanogpt", "model": str(tmp_path / "theirs"), "checkout": str(copy)}
    assert judge(theirs)["val_loss"] == pytest.approx(judge(ours)["val_loss"], rel=1e-6)
    calls = sys.modules.pop("model").GPT.calls
    assert [call for call in calls if call[1] == 10] == [((1, 1), 10)] * 3 + [((10, 1), 10)] * 3


# --- what is told -----------------------------------------------------------------------------------------------------


def test_medians_of_candidates_that_take_turns(
    checkout: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    turns: list[tuple[str, str]] = []

    def measure(work: dict[str, Any], speed: bool) -> dict[str, float]:
        turns.append((work["candidate"], f"{work['dtype']}-{'compiled' if work['compile'] else 'eager'}"))
        value = {"nanogpt": 10.0, "off": 5.0, "machine": 20.0}[work["candidate"]]
        return dict.fromkeys(MEASURES, value * [1, 2, 4][(len(turns) - 1) // 6])

    monkeypatch.setattr(against_nanogpt, "measure", measure)
    settings = ["float32-eager", "bfloat16-compiled"]
    both = ["--nanogpt", str(checkout), "--text", str(checkout.parent / "text.txt"), "--rounds", "3"]
    result = invoke(
        *both, "--determinism", "off,machine", "--settings", ",".join(settings), "--json", str(tmp_path / "out.json")
    )
    assert result.exit_code == 0, result.output
    assert turns == [(c, s) for s in settings for c in ("nanogpt", "off", "machine")] * 3
    content = json.loads((tmp_path / "out.json").read_text())
    assert content.keys() == {"steps", "threads", "rounds", "median", "all"}
    assert content["median"]["4x128, float32-eager"]["off"] == dict.fromkeys(MEASURES, 10.0)
    assert [figures["ms_per_step"] for figures in content["all"]["4x128, float32-eager"]["machine"]] == [20, 40, 80]
    row = next(line for line in result.output.splitlines() if line.startswith("ms per step"))
    assert row.split() == ["ms", "per", "step,", "median", "20", "10", "(0.50)", "40", "(2.00)"]
    assert "nanoGPT computes in float32" in result.output


@pytest.mark.parametrize("attention", ["fused", "plain"])
def test_the_speed_alone_is_that_of_each_shape(
    attention: str, checkout: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[dict[str, Any]] = []

    def stand_in(command: list[str], directory: Path, variables: dict[str, str]) -> tuple[str, int]:
        if command[-2] == "--only":
            given.append(json.loads(command[-1]))
            return json.dumps([9.0] * 50), 1_000_000
        return "\n".join(f"iter {i}: loss 1.0, time 18.00ms, mfu 1%" for i in range(50)), 2_000_000

    tokens = prepare(checkout, checkout.parent / "text.txt", tmp_path / "work")
    monkeypatch.setattr(against_nanogpt, "prepare", lambda *_: tokens)
    monkeypatch.setattr(against_nanogpt, "run", stand_in)
    both = ["--nanogpt", str(checkout), "--text", str(checkout.parent / "text.txt"), "--attention", attention]
    result = invoke(*both, "--speed", "--shapes", "4x128,6x384", "--json", str(tmp_path / "out.json"))
    assert result.exit_code == 0, result.output
    assert [(work["task"], work["shape"]) for work in given] == [("train", "4x128"), ("train", "6x384")]
    assert [our_params(work).train.batch_size for work in given] == [12, 8]
    assert our_params(given[0]).numerics.attention == attention
    figures = json.loads((tmp_path / "out.json").read_text())["median"]["6x384, float32-eager"]
    assert figures["machine"] == {"ms_per_step": 9.0, "peak_memory_mb": 1.0}
    assert [line.split()[0] for line in result.output.splitlines()] == [
        "4x128,",
        "ms",
        "training,",
        "6x384,",
        "ms",
        "training,",
    ]


def test_beside_a_real_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nanogpt = os.environ.get("NANOGPT_CHECKOUT")
    if not nanogpt:
        pytest.skip("NANOGPT_CHECKOUT names no checkout of nanoGPT")
    (tmp_path / "text.txt").write_text(TEXT)
    both = ["--nanogpt", nanogpt, "--text", str(tmp_path / "text.txt"), "--steps", "22", "--threads", "1"]
    result = invoke(*both, "--json", str(tmp_path / "out.json"))
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "out.json").read_text())["median"][f"4x128, {SETTINGS[0]}"]
    assert figures["machine"]["val_loss"] == pytest.approx(figures["nanogpt"]["val_loss"], abs=0.2)
