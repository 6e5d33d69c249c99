"""Any step of a training can be computed again alone, to the same bits."""

import json
import re

import pytest

from tests.pipeline.clones import Clone

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="session")
def trained(fresh: Clone, once) -> Clone:
    """A training whose steps have all that a step can have: dropout, several micro-batches, clipping."""

    def make(path):
        clone = fresh.copy(path, mlflow=False)
        clone.set_params(**{"model.dropout": 0.2, "train.gradient_accumulation_steps": 2})
        clone.set_params(**{"train.grad_clip": 0.5, "train.batch_size": 3})
        clone.commit()
        clone.repro("train")

    return once("trained", make)


def test_a_step_far_from_any_checkpoint_and_one_beside_it(trained, copy_of):
    clone = copy_of(trained)
    kept = clone.checkpoints().steps()
    assert kept[0] > 7
    before = clone.outs()
    records = {record["step"]: record for record in clone.records("step")}
    name = clone.attempts()[0].relative_to(clone.path)
    for step, origin, computed in ((7, "the initial weights", 7), (28, "checkpoint step-00000025", 3)):
        output = clone.run(f"python -m tools replay --step {step}" + (f" --attempt {name}" if step == 7 else ""))
        assert f"step {step} of 30, recomputed from {origin} ({computed} steps)" in output
        for name in ("loss", "grad_norm", "lr"):
            value = re.escape(repr(records[step][name]))
            assert re.search(rf"^{name} +{value} +{value}$", output, re.MULTILINE), output
        assert "journal.jsonl, bit for bit" in output
        assert output.count("before the step") == 6
    assert clone.outs() == before
    assert len(clone.attempts()) == 1
    assert clone.leftovers() == []


def test_the_text_is_that_of_the_batch(trained, copy_of):
    clone = copy_of(trained)
    output = clone.run("python -m tools replay --step 30")
    samples = re.split(r"\n--- sample \d: loss [\d.]+ before the step\n", output)[1:]
    text = "".join(json.loads(line)["text"] for line in clone.read("data/raw/documents-00000.jsonl").splitlines())
    inside = [sample.rstrip("\n").split("<|endoftext|>")[0] for sample in samples]
    assert all(len(part) > 3 for part in inside[:1])
    assert all(part in text for part in inside)


def test_a_step_that_comes_out_otherwise_is_told_with_the_first_that_did(trained, copy_of):
    clone = copy_of(trained)
    source = clone.read("nanogpt/train.py")
    assert source.count("lr = lr_at(") == 1
    # The loop's step 4 is the journal's step 5; its loss is computed before the rate is used.
    clone.write("nanogpt/train.py", source.replace("lr = lr_at(", "lr = 1e-9 * (step >= 4) + lr_at("))
    output = clone.run("python -m tools replay --step 7 --no-text", check=1)
    assert "the code of the train stage has changed since this run" in output
    assert re.search(r"DIFFERS from the journal, first in lr of step 5", output), output


def test_what_cannot_be_replayed_is_refused(trained, copy_of):
    clone = copy_of(trained)
    output = clone.run("python -m tools replay --step 31", check=1)
    assert re.search(r"--step 31 is not in .*journal.jsonl, which has 1 to 30", output)
    clone.set_params(**{"tokenize.vocab_size": 290})
    clone.repro("tokenize")
    output = clone.run("python -m tools replay --step 3", check=1)
    assert "data/tokens does not have the tokens of this run" in output
    clone.run("rm -r .runs")
    assert "holds no run" in clone.run("python -m tools replay --step 3", check=1)
