import pytest

from nanogpt.corpus.tokenizer import CharTokenizer
from tracking.observers import check_prompts


def test_prompts_that_can_be_continued_pass():
    assert check_prompts(CharTokenizer("\nab", end_of_text=False), ["", "ab"]) is None


def test_a_prompt_with_an_unknown_character_is_refused_before_training():
    with pytest.raises(ValueError, match=r"tracking.prompts = 'cab' cannot be continued: character 'c' \(U\+0063\)"):
        check_prompts(CharTokenizer("\nab", end_of_text=False), ["cab"])
