import pickle
import pickletools
from collections import OrderedDict
from typing import Any

import pytest

from nanogpt.corpus.meta_pickle import characters
from tests.nanogpt.corpus.made import refuses, vocabulary

TEXT = "\n !aé你🙂" + "".join(map(chr, range(0x400, 0x400 + 400)))  # of each size of number and of text
SORTED = "".join(sorted(set(TEXT)))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_python_pickles_is_read(protocol: int):
    assert characters(pickle.dumps(vocabulary(SORTED), protocol)) == SORTED
    assert characters(pickletools.optimize(pickle.dumps(vocabulary("ab"), protocol))) == "ab"
    assert characters(pickle.dumps(vocabulary("a"), protocol)) == "a"


def test_as_many_characters_as_two_bytes_can_number():
    most = "".join(chr(code) for code in range(0x10000, 0x10000 + 2**16))
    assert characters(pickle.dumps(vocabulary(most))) == most
    with refuses("more than 65,536"):
        characters(pickle.dumps(vocabulary(most + chr(0x20000))))


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
    for hostile in (value, vocabulary(SORTED, vocab_size=value), vocabulary(SORTED, itos=value)):
        with refuses(r"its instruction \w+ makes other things|does not hold|damaged"):
            characters(pickle.dumps(hostile, protocol))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (1, "does not hold exactly vocab_size, itos and stoi"),
        ({}, "does not hold"),
        (vocabulary(SORTED, meta="of another program"), "does not hold"),
        (vocabulary(SORTED, vocab_size=1), r"numbers are not 0 to vocab_size - 1"),
        (vocabulary(SORTED, itos={}), "not 0 to"),
        (vocabulary(SORTED, itos={1: "a", 2: "b"}), "not 0 to"),
        (vocabulary(SORTED, itos={"0": "a"}), "not 0 to"),
        (vocabulary(SORTED, itos={0: "ab"}), "single characters"),
        (vocabulary(SORTED, itos={0: 1}), "single characters"),
        (vocabulary(SORTED, itos=5), "single characters"),
        (vocabulary("ab", stoi={"a": 1, "b": 0}), "stoi is not the inverse of itos"),
        (vocabulary("aa"), "not numbered in code point order, each once"),
        (vocabulary("ba"), "not numbered in code point order"),
        (vocabulary("", vocab_size=0), "not 0 to"),
    ],
)
def test_another_content_is_refused(wrong: Any, message: str):
    with refuses(message):
        characters(pickle.dumps(wrong))


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_cut_file_is_refused(protocol: int):
    whole = pickle.dumps(vocabulary("abc"), protocol)
    for length in range(len(whole)):
        with pytest.raises(ValueError):  # noqa: PT011
            characters(whole[:length])
