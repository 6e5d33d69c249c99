import pickle
import pickletools
from collections import OrderedDict
from typing import Any

import pytest

from nanogpt.corpus.meta_pickle import characters

TEXT = "\n !aé你🙂" + "".join(map(chr, range(0x400, 0x400 + 400)))  # of each size of number and of text
SORTED = "".join(sorted(set(TEXT)))


def content(found: str = SORTED, **changes: Any) -> dict[str, Any]:
    """As nanoGPT's prepare.py makes it."""
    itos = dict(enumerate(found))
    return {"vocab_size": len(found), "itos": itos, "stoi": {c: i for i, c in itos.items()}} | changes


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_python_pickles_is_read(protocol: int):
    assert characters(pickle.dumps(content(), protocol)) == SORTED
    assert characters(pickletools.optimize(pickle.dumps(content("ab"), protocol))) == "ab"
    assert characters(pickle.dumps(content("a"), protocol)) == "a"


def test_as_many_characters_as_two_bytes_can_number():
    most = "".join(chr(code) for code in range(0x10000, 0x10000 + 2**16))
    assert characters(pickle.dumps(content(most))) == most
    with pytest.raises(ValueError, match="more than 65,536"):
        characters(pickle.dumps(content(most + chr(0x20000))))


class Call:
    def __init__(self, *how: Any):
        self.how = how

    def __reduce__(self) -> Any:
        return self.how


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize(
    "value", [Call(print, ("executed",)), print, OrderedDict(), {1, 2}, [1], (1,), None, True, 0.5]
)
def test_what_is_more_than_dicts_texts_and_numbers_is_refused(
    value: Any, protocol: int, capsys: pytest.CaptureFixture[str]
):
    for hostile in (value, content(vocab_size=value), content(itos=value)):
        with pytest.raises(ValueError, match=r"its instruction \w+ makes more than|does not hold|damaged"):
            characters(pickle.dumps(hostile, protocol))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (1, "does not hold vocab_size, itos and stoi alone"),
        ({}, "does not hold"),
        (content(meta="of another program"), "does not hold"),
        (content(vocab_size=1), r"numbers are not 0 to vocab_size - 1"),
        (content(itos={}), "not 0 to"),
        (content(itos={1: "a", 2: "b"}), "not 0 to"),
        (content(itos={"0": "a"}), "not 0 to"),
        (content(itos={0: "ab"}), "single characters"),
        (content(itos={0: 1}), "single characters"),
        (content(itos=5), "single characters"),
        (content("ab", stoi={"a": 1, "b": 0}), "stoi is not the inverse of itos"),
        (content("aa"), "not numbered in code point order, each once"),
        (content("ba"), "not numbered in code point order"),
        (content("", vocab_size=0), "not 0 to"),
    ],
)
def test_another_content_is_refused(wrong: Any, message: str):
    with pytest.raises(ValueError, match=message):
        characters(pickle.dumps(wrong))


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_cut_file_is_refused(protocol: int):
    whole = pickle.dumps(content("abc"), protocol)
    for length in range(len(whole)):
        with pytest.raises(ValueError):  # noqa: PT011
            characters(whole[:length])
