"""Prompts are checked before a training: those of its preview and those of the sample stage."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanogpt.corpus.tokenizer import CharTokenizer
from nanogpt.params import load_params
from tracking.observers import check_prompts


@pytest.fixture
def check(project: Callable[..., Path]) -> Callable[..., None]:
    """Checks the prompts of these params for a corpus of the characters a and b."""

    def run(**values: Any) -> None:
        project(**values)
        data = SimpleNamespace(tokenizer=CharTokenizer("ab", end_of_text=False))
        check_prompts(SimpleNamespace(params=load_params(), data=data))

    return run


def test_prompts_that_can_be_continued_pass(check, tmp_path: Path):
    (tmp_path / "inputs/prompts").mkdir(parents=True)
    (tmp_path / "inputs/prompts/one.txt").write_text("ba")
    check(**{"tracking.prompts": ["", "ab"], "sample.prompts": ["", "b", "FILE:inputs/prompts/one.txt"]})


@pytest.mark.parametrize("key", ["tracking.prompts", "sample.prompts"])
def test_a_prompt_with_an_unknown_character_is_rejected(check, key: str):
    message = rf"{key} = 'cab' cannot be continued: character 'c' \(U\+0063\) at position 0 .* remove it"
    with pytest.raises(ValueError, match=message):
        check(**{key: ["ab", "cab"]})


def test_a_file_with_an_unknown_character_is_rejected_by_name(check, tmp_path: Path):
    (tmp_path / "inputs/prompts").mkdir(parents=True)
    (tmp_path / "inputs/prompts/one.txt").write_text("abc")
    with pytest.raises(ValueError, match=r"sample\.prompts = 'FILE:inputs/prompts/one\.txt' cannot be continued: char"):
        check(**{"sample.prompts": ["FILE:inputs/prompts/one.txt"]})


def test_a_missing_file_is_rejected(check):
    with pytest.raises(ValueError, match=r"FILE:inputs/prompts/one\.txt cannot be read \(No such file or directory\)"):
        check(**{"sample.prompts": ["FILE:inputs/prompts/one.txt"]})
