"""Training that begins with a model that exists."""

import json

import pytest

from tests.pipeline.clones import Clone
from tracking.run import Run

pytestmark = pytest.mark.pipeline

BASE = {
    "train.init_from": "model:inputs/pretrained/base",
    "tokenize.tokenizer": "file:inputs/pretrained/base/tokenizer.json",
}
TALE = "One sunny morning, the old dog was at the mill. Nobody knew why.\n" * 60


def test_a_model_is_finetuned_on_other_text_and_judged_without_training(seed: Clone, copy_of) -> None:
    """The only test that finds a given model that is lost, or not trained on, between DVC's stages."""
    clone = copy_of(seed, runs=False, mlflow=False)
    clone.run("cp -r model inputs/pretrained/base && git add inputs/pretrained")
    clone.write("inputs/texts/tale.txt", TALE)
    clone.set_params(**BASE, **{"download.source": "file:inputs/texts/tale.txt", "train.eval_only": True})
    clone.repro("evaluate")
    before = json.loads(clone.read("metrics/evaluate.json"))
    assert clone.read("model/tokenizer.json") == clone.read("inputs/pretrained/base/tokenizer.json")
    assert json.loads(clone.read("metrics/train.json"))["steps"] == 0
    given, published = (clone.path / name / "weights.safetensors" for name in ("inputs/pretrained/base", "model"))
    assert given.read_bytes() == published.read_bytes()

    clone.set_params(**{"train.eval_only": False})
    clone.repro()
    after = json.loads(clone.read("metrics/evaluate.json"))
    assert json.loads(clone.read("metrics/train.json"))["steps"] == 30
    assert after["val_loss"] < before["val_loss"] - 0.3
    assert len({Run(attempt).info["tags"]["initial.sha256"] for attempt in clone.attempts()}) == 1
    assert len(clone.attempts()) == 2

    assert "up to date" in clone.run("dvc status")
    (clone.path / "inputs/pretrained/base/model.json").unlink()
    assert "pretrained" in clone.run("dvc status")
    assert "model.json is missing" in clone.repro("train", check=None)
