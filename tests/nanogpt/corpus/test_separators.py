from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogpt.corpus.raw_text import check_size
from nanogpt.corpus.separators import documents_between, watched
from tests.nanogpt.corpus.made import refuses


def cut(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


@given(st.text("ab<>|\n ", max_size=60), st.sampled_from(["<|>", "<", "\n\n", "a<|>b"]), st.integers(1, 9))
def test_the_documents_do_not_depend_on_the_pieces(text: str, separator: str, size: int):
    expected = [part.strip("\r\n") for part in text.split(separator) if part.strip()]
    assert list(documents_between(cut(text, size), separator, lambda size: None)) == expected


def test_a_document_without_end_is_refused():
    def endless():
        while True:
            yield "x" * 1000

    with refuses("a document is larger than"):
        next(documents_between(endless(), "<|endoftext|>", partial(check_size, 1e-4, "a document")))


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("a\n<|endoftext|>\nb<|endoftext|>", "<|endoftext|>"),
        ("a<|end_of_text|>", "<|end_of_text|>"),
        ("<s>a</s>\nb", "</s>"),
        ("a<eos>\n", "<eos>"),
        ("<s>a</s> b", None),
        ("<|endofte", None),
    ],
)
@pytest.mark.parametrize("size", [1, 5, 100])
def test_the_first_common_separator_is_found_once(text: str, mark: str | None, size: int):
    found: list[str] = []
    assert list(watched(cut(text, size), found.append)) == cut(text, size)
    assert found == ([mark] if mark else [])
