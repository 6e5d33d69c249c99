import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from benchmarks import against_nanogpt
from benchmarks.against_nanogpt import MEASURES, main, measure_nanogpt, measure_ours, nanogpt_loss, whole_loss
from benchmarks.checkout import prepare, training_command
from nanogpt.nanogpt_checkpoint import save_nanogpt, to_nanogpt
from nanogpt.params import Params, flatten, with_values
from tests.conftest import REPOSITORY
from tools.preset import preset_params

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
TINY = {"model.n_layer": 1, "model.n_head": 2, "model.n_embd": 8, "model.block_size": 8, "numerics.threads": 1}
TINY |= {"train.max_iters": 30, "train.warmup_iters": 15, "train.eval_interval": 30}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like nanoGPT's."""
    data = tmp_path / "checkout/data/shakespeare_char"
    data.mkdir(parents=True)
    (data / "prepare.py").write_text(PREPARE)
    (data / "train.bin").write_bytes(b"the user's own")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "checkout"


@pytest.fixture
def params(project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Params:
    """Those of the preset, small, in a working directory whose params.yaml is another training's."""
    monkeypatch.setenv("DVC_ROOT", ".")  # so that what is set is unset afterwards
    root = project(**{"tracking.prompts": ["not of these characters: 12345"], "model.vocab_multiple": 64})
    shutil.copytree(REPOSITORY / "presets", root / "presets")
    return with_values(preset_params("shakespeare_cpu"), TINY)


def invoke(checkout: Path, *arguments: str) -> Result:
    both = ["--nanogpt", str(checkout), "--text", str(checkout.parent / "text.txt")]
    tiny = [f"--set={key}={value}" for key, value in TINY.items()]
    return CliRunner().invoke(main, [*both, *tiny, *arguments])


# --- the settings -----------------------------------------------------------------------------------------------------


def test_both_have_the_same_settings(params: Params) -> None:
    sections = (params.model, params.train, params.numerics)
    ours = {name: str(value) for section in sections for name, value in flatten(section).items()}
    _, unbuffered, script, config, *options = training_command(params, Path("out"))
    theirs = dict(option.removeprefix("--").split("=") for option in options)
    assert (unbuffered, script, config) == ("-u", "train.py", "config/train_shakespeare_char.py")
    assert len(theirs) == 25
    own = {"device": "cpu", "log_interval": "1", "always_save_checkpoint": "True", "out_dir": "out"}
    assert theirs == {name: ours[name] for name in theirs.keys() & ours.keys()} | own | {"lr_decay_iters": "30"}
    assert (params.model.norm, params.train.optimizer, params.model.vocab_multiple) == ("layernorm", "adamw", 1)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--determinism", "of"), "of is none of off, machine, portable"),
        (("-S", "model.norm=rmsnorm"), "model.norm = rmsnorm; give --set model.norm=layernorm too"),
        (
            ("-S", "train.eval_interval=20"),
            "no multiple of train.eval_interval = 20; give --set train.eval_interval=30",
        ),
        (("-S", "train.max_iters=21"), "train.max_iters = 21 leaves no step to time"),
        (("-S", "numerics.dtype=bfloat16", "--determinism", "portable"), "numerics.dtype = bfloat16"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple[str, ...], told: str, checkout: Path, params: Params) -> None:
    result = invoke(checkout, *arguments)
    assert result.exit_code != 0
    assert told in " ".join(result.output.split())


def test_a_checkout_and_a_text_are_needed(params: Params) -> None:
    result = CliRunner().invoke(main, [])
    assert result.exit_code == 2
    assert "both are needed: --nanogpt and --text" in result.output


# --- data -------------------------------------------------------------------------------------------------------------


def test_the_text_is_prepared_in_a_copy(checkout: Path, params: Params, tmp_path: Path) -> None:
    copy, tokens = prepare(checkout, checkout.parent / "text.txt", params, tmp_path / "work")
    assert (copy / "data/shakespeare_char/train.bin").read_bytes() == (tokens / "train.bin").read_bytes()
    assert (checkout / "data/shakespeare_char/train.bin").read_bytes() == b"the user's own"
    assert not (checkout / "data/shakespeare_char/input.txt").exists()


def test_other_tokens_than_ours_are_refused(checkout: Path, params: Params, tmp_path: Path) -> None:
    (checkout.parent / "text.txt").write_bytes(TEXT.replace("\n", "\r\n").encode())
    with pytest.raises(ValueError, match=r"gives another train.bin than nanoGPT's"):
        prepare(checkout, checkout.parent / "text.txt", params, tmp_path / "work")


# --- training and scores ----------------------------------------------------------------------------------------------


def test_ours_trains_and_is_scored(checkout: Path, params: Params, tmp_path: Path) -> None:
    _, tokens = prepare(checkout, checkout.parent / "text.txt", params, tmp_path / "work")
    off = with_values(params, {"numerics.determinism": "off", **against_nanogpt.OURS})
    figures = measure_ours(off.model_dump(mode="json"), str(tokens))
    assert figures.keys() == MEASURES.keys()
    assert 1 < figures["val_loss"] < 3.5
    assert min(figures.values()) > 0


def test_nanogpt_s_weights_are_scored_by_the_same_measure(checkout: Path, params: Params, tmp_path: Path) -> None:
    from nanogpt.gpt_config import GPTConfig
    from nanogpt.model import GPT

    _, tokens = prepare(checkout, checkout.parent / "text.txt", params, tmp_path / "work")
    gpt = GPT(GPTConfig(vocab_size=len(set(TEXT)), **params.model.model_dump()))
    save_nanogpt(to_nanogpt(gpt.config, gpt.state_dict()), tmp_path / "ckpt.pt")
    off = with_values(params, {"numerics.determinism": "off"}).model_dump(mode="json")
    theirs = nanogpt_loss(off, str(tmp_path / "ckpt.pt"), str(tokens))
    assert theirs == pytest.approx(whole_loss(gpt, tokens), rel=1e-6)


def test_nanogpt_s_times_are_read_as_it_prints_them(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(command: list[str], directory: Path, variables: dict[str, str]) -> tuple[str, int]:
        assert variables == {"OMP_NUM_THREADS": "1"}
        times = [1000.0] * against_nanogpt.WARM_UP + [18.0, 17.5, 30.0]
        return "\n".join(f"iter {i}: loss 1.0, time {ms:.2f}ms, mfu 1%" for i, ms in enumerate(times)), 2_000_000

    monkeypatch.setattr(against_nanogpt, "run", train)
    monkeypatch.setattr(against_nanogpt, "call", lambda function, **arguments: (1.5, 0))
    figures = measure_nanogpt(params, Path("checkout"), Path("tokens"))
    assert figures == {"val_loss": 1.5, "ms_per_step": 18.0, "peak_memory_mb": 2.0}


# --- what is printed --------------------------------------------------------------------------------------------------


def test_medians_of_candidates_that_take_turns(checkout: Path, params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []

    def measured(name: str) -> dict[str, float]:
        turns.append(name)
        value = {"nanogpt": 10.0, "off": 5.0, "machine": 20.0}[name]
        return dict.fromkeys(MEASURES, value * [1, 2, 4][(len(turns) - 1) // 3])

    def call(function: Any, params: dict[str, Any], tokens: str) -> tuple[dict[str, float], int]:
        assert (params["tracking"]["prompts"], params["runtime"]["log_interval"]) == ([], 1)
        return measured(params["numerics"]["determinism"]), 0

    monkeypatch.setattr(against_nanogpt, "measure_nanogpt", lambda *_: measured("nanogpt"))
    monkeypatch.setattr(against_nanogpt, "call", call)
    short = ("-S", "numerics.dtype=bfloat16", "-S", "numerics.determinism=off")
    options = ("--rounds", "3", "--determinism", "off,machine", *short, "--json", "out.json")
    result = invoke(checkout, *options)
    assert result.exit_code == 0, result.output
    assert turns == ["nanogpt", "off", "machine"] * 3
    content = json.loads(Path("out.json").read_text())
    assert content.keys() == {"params", "rounds", "median", "all"}
    assert content["median"]["off"] == dict.fromkeys(MEASURES, 10.0)
    assert [figures["ms_per_step"] for figures in content["all"]["machine"]] == [20, 40, 80]
    row = next(line for line in result.output.splitlines() if line.startswith("ms per step"))
    assert row.split() == ["ms", "per", "step,", "median", "20", "10", "(0.50)", "40", "(2.00)"]
    assert "nanoGPT computes in float32" in result.output


def test_beside_a_real_checkout(params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nanogpt = os.environ.get("NANOGPT_CHECKOUT")
    if not nanogpt:
        pytest.skip("NANOGPT_CHECKOUT names no checkout of nanoGPT")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "nanogpt").symlink_to(nanogpt)
    result = invoke(tmp_path / "nanogpt", "--json", "out.json")
    assert result.exit_code == 0, result.output
    figures = json.loads(Path("out.json").read_text())["median"]
    assert figures["machine"]["val_loss"] == pytest.approx(figures["nanogpt"]["val_loss"], abs=0.2)
