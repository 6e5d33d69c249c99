"""The pipeline's own model exported: transformers writes the text that we write, and the card leads back."""

import os
import re
from collections.abc import Callable

import pytest

from nanogpt.complete import complete
from nanogpt.saved_model import load_model
from tests.pipeline.clones import Clone

pytestmark = pytest.mark.pipeline


def test_transformers_continues_as_the_pipelines_model_does_and_the_card_leads_back(
    seed: Clone, copy_of: Callable[..., Clone]
) -> None:
    """The only test that finds an exported model of the pipeline that transformers reads otherwise, or a false card."""
    from transformers import pipeline

    clone = copy_of(seed)
    clone.run("python -m tools export --format huggingface build/exported")
    generate = pipeline("text-generation", str(clone.path / "build/exported"))
    (answer,) = generate("One sunny", do_sample=False, max_new_tokens=20)
    assert answer["generated_text"] == complete(load_model(clone.path / "model"), "One sunny", 20, temperature=0)
    assert clone.run("git status --porcelain") == ""

    card = clone.read("build/exported/README.md")
    for name, value in clone.scores().items():
        assert f"| evaluation: {name} | {value} |" in card
    commit = clone.run("git rev-parse HEAD").strip()
    assert f"| commit | {commit} |" in card
    for command in re.findall(r"^python -m tools lineage \w+$", card, re.MULTILINE):
        assert commit in clone.tool(*command.split()[3:])
    for secret in (str(clone.path), os.uname().nodename):
        assert secret not in card
