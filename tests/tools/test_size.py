import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from ruamel.yaml import YAML

from nanogpt import flops, timing
from tests.conftest import BUILT_IN, GPT2
from tools.__main__ import main
from tools.size import time_line

META = {
    "corpus": {"documents": 2, "source": "grammar"},
    "dtype": "uint16",
    "end_of_text": None,
    "tokenizer": "bpe",
    "tokenizer_sha256": "0" * 64,
    "train": {"bytes": 9, "documents": 1, "first_context": None, "sha256": "0" * 64, "tokens": 358_400},
    "val": {"bytes": 9, "documents": 1, "first_context": None, "sha256": "0" * 64, "tokens": 9},
    "vocab_size": 500,
}


@pytest.fixture(autouse=True)
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with only params.yaml, of a training whose figures are known."""
    shutil.copy(BUILT_IN, tmp_path)
    monkeypatch.chdir(tmp_path)
    change(train__max_iters=700, train__batch_size=8, model__block_size=128)
    return tmp_path


def change(**values: object) -> None:
    """Sets `section__key` in params.yaml."""
    path = Path("params.yaml")
    content = YAML().load(path)
    for name, value in values.items():
        section, key = name.split("__")
        content[section][key] = value
    with path.open("w") as file:
        YAML().dump(content, file)


def tokenized(**changes: object) -> None:
    Path("data/tokens").mkdir(parents=True)
    Path("data/tokens/meta.json").write_text(json.dumps(META | changes))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["size", *arguments])


def figures(*arguments: str) -> dict:
    result = run("--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


# --- the vocabulary ---------------------------------------------------------------------------------------------------


def test_the_vocabulary_is_that_of_the_tokens() -> None:
    tokenized()
    assert figures()["model"]["vocab_size"] == 500


def test_without_tokens_it_is_what_the_tokenizer_will_have() -> None:
    assert figures()["model"]["vocab_size"] == 1024
    change(tokenize__tokenizer="gpt2")
    assert figures()["model"]["vocab_size"] == 50_257


def test_tokens_of_another_tokenizer_are_ignored() -> None:
    tokenized()
    change(tokenize__tokenizer="gpt2")
    found = figures()
    assert found["model"]["vocab_size"] == 50_257
    assert found["tokens"]["epochs"] is None


def test_processes_share_the_time_and_not_the_memory() -> None:
    change(train__gradient_accumulation_steps=8)
    alone = figures("--mfu", "0.5", "--peak", "1")
    change(train__processes=4)
    shared = figures("--mfu", "0.5", "--peak", "1")
    assert shared["time"]["seconds"] == pytest.approx(alone["time"]["seconds"] / 4)
    assert shared["tokens"] == alone["tokens"]
    assert shared["bytes"]["buckets"] == shared["bytes"]["gradients"]
    assert shared["bytes"]["peak"] == alone["bytes"]["peak"] + shared["bytes"]["buckets"]
    change(train__processes=8)  # one micro-batch each
    assert figures()["bytes"]["peak"] < shared["bytes"]["peak"]


def test_characters_that_were_not_counted_are_asked_for() -> None:
    change(tokenize__tokenizer="char")
    result = run()
    assert result.exit_code == 1
    assert "tokenize.tokenizer = char" in result.output
    assert "--vocab-size" in result.output
    assert figures("--vocab-size", "65")["model"]["vocab_size"] == 65


def test_damaged_tokens_are_reported_in_one_line() -> None:
    tokenized(vocab_size="many")
    result = run()
    assert result.exit_code == 1
    assert len(result.output.splitlines()) == 1
    assert "meta.json is damaged" in result.output


# --- figures ----------------------------------------------------------------------------------------------------------


def test_gpt2_as_nanogpt_trains_it() -> None:
    change(**{key.replace(".", "__"): value for key, value in GPT2.items()})
    change(model__n_layer=12, model__n_head=12, model__n_embd=768, model__block_size=1024, model__bias=True)
    change(train__batch_size=12, train__gradient_accumulation_steps=40, train__max_iters=600_000)
    change(numerics__determinism="off", numerics__dtype="bfloat16", runtime__device="cuda")
    found = figures("--vocab-size", "50257", "--mfu", "0.4", "--peak", "2496")
    assert sum(found["parameters"]["total"].values()) == 124_439_808
    assert found["tokens"]["total"] == 600_000 * 491_520
    assert found["tokens"]["chinchilla"] == 20 * 124_439_808
    setup = {"device": "cuda", "dtype": "bfloat16", "batch_size": 12, "micro_steps": 40}
    assert found["setup"] == setup | {"processes": 1, "parallel": "ddp"}
    # 8 x A100 at 312 TFLOP/s: nanoGPT's README says some four days, which is an MFU of about 0.4
    assert found["time"]["seconds"] == pytest.approx(600_000 * 491_520 * 855_166_464 / (0.4 * 2496e12))
    assert found["bytes"]["checkpoint"] == 12 * 124_439_808


def test_epochs_are_of_the_train_split() -> None:
    tokenized()
    assert figures()["tokens"]["epochs"] == 700 * 1024 / 358_400


def test_the_lines_say_what_the_json_says() -> None:
    tokenized()
    found, text = figures("--mfu", "0.5", "--peak", "0.1"), run("--mfu", "0.5", "--peak", "0.1").output
    total = sum(found["parameters"]["total"].values())
    assert re.search(rf"^all +[\d,]+ +{total:,}$", text, re.MULTILINE)
    assert f"{found['flops_per_token']['palm']:,}" in text
    assert re.search(rf"^peak +{found['bytes']['peak'] / 1e6:,.1f} ", text, re.MULTILINE)
    assert "2.00 times the train split" in text
    assert "rule of thumb" in text
    assert f"{1e3 * found['time']['seconds_per_step']:,.4g} ms a step (from --mfu), MFU 0.500 of 0.1 TFLOP/s" in text


# --- time -------------------------------------------------------------------------------------------------------------


def test_unknown_times_come_with_the_way_to_get_them() -> None:
    found = figures()["time"]
    assert (found["seconds"], found["peak_flops"], found["mfu"]) == (None, None, None)
    assert "time        unknown: --measure times some steps here" in run().output


def test_a_share_of_an_unknown_peak_is_no_time() -> None:
    assert figures("--mfu", "0.3")["time"]["seconds"] is None
    assert "add --peak" in run("--mfu", "0.3").output


@pytest.mark.parametrize("arguments", [("--mfu", "30"), ("--mfu", "0"), ("--peak", "0"), ("--measure", "--mfu", "0.3")])
def test_what_makes_no_sense_is_refused(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


def test_the_time_at_the_speed_of_a_ladder() -> None:
    """Seeds average; between two sizes the speed is on their line in logarithms, beyond them it is the nearest's."""
    assert "experiments/ladders/some.json is missing: `python -m tools ladder" in run("--ladder", "some").output
    shape = figures()
    per_step = 3 * sum(shape["flops_per_token"]["forward"].values()) * shape["tokens"]["per_step"]
    channels = shape["model"]["n_embd"]
    size = shape["model"]["n_layer"] * 12 * channels**2 + shape["model"]["vocab_size"] * channels

    def ladder(*runs: tuple[float, float]) -> float:
        rows = [{"parameters": parameters, "flops": 2 * speed, "seconds": 2.0} for parameters, speed in runs]
        Path("experiments/ladders").mkdir(parents=True, exist_ok=True)
        Path("experiments/ladders/some.json").write_text(json.dumps({"runs": rows}))
        found = figures("--ladder", "some")["time"]
        assert (found["ladder"], found["seconds"]) == ("some", 700 * found["seconds_per_step"])
        return per_step / found["seconds_per_step"]

    assert ladder((size / 9, 1e9), (size / 3, 4e9)) == pytest.approx(4e9)
    assert ladder((size * 9, 4e9), (size * 3, 1e9)) == pytest.approx(1e9)
    assert ladder((size / 3, 1e9), (size * 3, 4e9)) == pytest.approx(2e9)
    assert ladder((size, 1e9), (size, 3e9), (size * 3, 4e9)) == pytest.approx(2e9)
    assert "at the speed of the ladder some)" in run("--ladder", "some").output
    assert "use only one of --measure, --mfu and --ladder" in run("--ladder", "some", "--mfu", "0.3").output


def test_a_measured_run_needs_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    change(numerics__determinism="off")  # so that pin comes after torch
    monkeypatch.setattr(timing, "median_seconds", lambda *_: 0.5)
    monkeypatch.setattr(flops, "device_peak", lambda _: None)
    found = figures("--measure")["time"]
    expected = {
        "measured": True,
        "ladder": None,
        "peak_flops": None,
        "mfu": None,
        "seconds_per_step": 0.5,
        "seconds": 350.0,
    }
    assert found == expected
    assert time_line(found).startswith("6 min for all steps")


# --- several processes ------------------------------------------------------------------------------------------------


def test_a_process_that_trains_in_shards_holds_its_part_and_sends_what_it_shows() -> None:
    alone, shards, copies = figures(), figures("--ranks", "8", "--parallel", "fsdp"), figures("--ranks", "8")
    assert shards["setup"]["processes"] == 8
    assert shards["setup"]["micro_steps"] == 1  # at least one for each process
    for name in ("weights", "gradients", "moments"):
        assert shards["bytes"][name] < 0.2 * alone["bytes"][name]
        assert copies["bytes"][name] == alone["bytes"][name]
    assert set(shards["bytes"]["sent"]) == {"all_gather", "reduce_scatter", "all_to_all"}
    assert copies["bytes"]["sent"] == {"all_reduce": 2 * alone["bytes"]["gradients"] * 7 // 8}
    assert "sent" not in alone["bytes"]
    text = run("--ranks", "8").output
    assert "in each of 8 processes (ddp)" in text
    assert re.search(r"^all reduce +[\d.]+   sent in a step", text, re.MULTILINE)
