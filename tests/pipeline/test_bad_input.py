"""Wrong input through the real command line: one line that names it, exit code 1, nothing half-written."""

import re
from pathlib import Path

import pytest

from tests.pipeline.clones import Clone
from tests.pipeline.test_own_text import CHAR, TALE

pytestmark = pytest.mark.pipeline


def refused(clone: Clone, command: str, stage: str, expected: str) -> str:
    """Runs a command that must fail with one line of `stage` on the terminal, and with the traceback in its log."""
    output = clone.run(command, check=1 if command.startswith("python") else None)
    (line,) = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert re.match(f"Error: {stage}: .*{expected}", line), output
    assert "Traceback" not in output
    assert "Traceback" in clone.read(f".runs/logs/workspace/{stage}.log")
    assert clone.leftovers() == []
    assert clone.processes() == []
    return line


@pytest.fixture
def clone(seed, copy_of) -> Clone:
    return copy_of(seed)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"train.learning_rat": 1.0},
            "train.learning_rat = 1.0 is not a known parameter; did you mean train.learning_",
        ),
        ({"train.learning_rate": "abc"}, "train.learning_rate = 'abc' is invalid: .*number"),
        ({"model.n_embd": 33}, "model.n_embd = 33 is not divisible by model.n_head = 2; set model.n_embd to 32"),
    ],
)
def test_a_wrong_param_is_refused_before_the_first_stage(seed, clone, values, expected):
    clone.set_params(**values)
    refused(clone, "dvc repro --force --single-item download", "download", re.escape(expected).replace(r"\.\*", ".*"))
    assert clone.outs().items() <= seed.outs().items()


def test_a_param_that_dvc_does_not_track_is_refused_too(clone):
    clone.set_params(**{"runtime.device": "cuda"})
    refused(clone, "python -m stages.train", "train", "runtime.device = cuda is not portable; set it to cpu")
    clone.set_params(**{"numerics.determinism": "machine"})
    refused(clone, "python -m stages.train", "train", "runtime.device = cuda, but torch .* sees 0 CUDA devices")


def test_a_variable_of_mlflow_that_has_no_effect_is_refused(clone):
    refused(clone, "MLFLOW_RUN_ID=0123 python -m stages.train", "train", "MLFLOW_RUN_ID = 0123 has no effect here: ")


def test_set_param_with_a_wrong_value_changes_neither_model_nor_mlflow(seed, clone):
    output = clone.run("dvc exp run -S train.learning_rate=abc", check=None)
    assert "Error: train: params.yaml: train.learning_rate = 'abc' is invalid" in output
    assert "Traceback" not in output
    assert len(clone.runs()) == len(clone.attempts()) == 1
    output = clone.run("dvc exp run -S train.learning_rat=1", check=None)
    assert "Could not override 'train.learning_rat'" in output
    clone.run("git checkout --quiet params.yaml")
    clone.repro()
    assert clone.outs() == seed.outs()
    assert clone.read("dvc.lock") == seed.read("dvc.lock")


def test_a_block_longer_than_the_data_is_refused_before_training(clone):
    clone.set_params(**{"model.block_size": 5000})
    refused(clone, "dvc repro", "train", "model.block_size = 5000 needs at least 5001 tokens, but the val split has")
    assert len(clone.runs()) == len(clone.attempts()) == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "download.source = file:inputs/texts/mine.txt contains no text"),
        (
            TALE.encode() + b"caf\xe9",
            f"inputs/texts/mine.txt: byte 0xe9 at position {len(TALE) + 3} is not UTF-8; it may be cp1252",
        ),
    ],
)
def test_a_text_that_cannot_be_read_is_refused_by_name(clone, content, expected):
    clone.write("inputs/texts/mine.txt", content)
    clone.set_params(**CHAR)
    refused(clone, "dvc repro", "download", re.escape(expected))
    assert not (clone.path / "data/raw").exists()


def test_a_text_that_is_absent_is_refused_by_name(clone):
    clone.set_params(**{"download.source": "file:inputs/texts/absent*.txt"})
    refused(clone, "dvc repro", "download", r"no file matches inputs/texts/absent\*.txt")


def test_a_training_that_diverges_says_where_and_is_not_resumed(seed, clone):
    clone.set_params(**{"train.learning_rate": 1e30})
    expected = (
        r"training diverged at step \d+: loss .*; lower train.learning_rate \(and, with Muon, "
        r"train.muon_learning_rate\), lengthen train.warmup_iters or clip gradients \(train.grad_clip\)"
    )
    first = refused(clone, "dvc repro", "train", expected)
    step = int(re.search(r"at step (\d+)", first)[1])
    run = clone.runs()[-1]
    assert run.info.status == "FAILED"
    assert f"training diverged at step {step}" in run.data.tags["mlflow.note.content"]
    newest = clone.checkpoints().newest(on_damage=pytest.fail)
    assert newest is not None
    assert newest.progress.step < step
    records = Path(clone.attempts()[-1] / "journal.jsonl").read_bytes()

    again = refused(clone, "dvc repro", "train", f"this training has diverged before, at step {step}")
    assert "change train.learning_rate" in again
    assert (clone.attempts()[-1] / "journal.jsonl").read_bytes() == records
    assert len(clone.runs()) == 2

    clone.run("git checkout --quiet params.yaml")
    clone.repro()
    assert clone.outs() == seed.outs()


def test_tokens_of_another_tokenizer_than_the_models_are_refused(clone):
    clone.set_params(**{"tokenize.vocab_size": 290})
    clone.run("python -m stages.tokenize")
    refused(clone, "python -m stages.evaluate", "evaluate", "model has another tokenizer than data/tokens")
