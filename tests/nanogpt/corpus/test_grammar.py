import functools
import hashlib
import itertools
import math
import re
import string
from collections import Counter, defaultdict
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest

from nanogpt import seeds
from nanogpt.corpus import grammar
from nanogpt.corpus.grammar import FULL, Lexicon, Options
from tests.nanogpt.corpus.made import refuses

SEED = 1

# Two languages small enough to list: one with places to go to, one in a single place but with longer stories.
ONE = {
    **{"girls": "Ann", "boys": "Ben", "sisters": "", "brothers": "", "friends": "friend", "traits": "shy"},
    **{"weathers": "cold", "hours": "day", "openers": "Then", "motions": "ran", "manners": "late", "finds": "found"},
    **{"looks": "old", "sides": "near", "landmarks": "oak", "animals": "owl", "pursuits": "saw", "thanks": "Thanks"},
}
WIDE = Lexicon(
    **{name: tuple(words.split()) for name, words in ONE.items()},
    **{"places": ("mill", "pond"), "things": ("kite", "hat"), "foods": ("plum", "egg"), "endings": ("At last",)},
    people=2,
    most_food=2,
    events=(1, 2),
)
LONG = WIDE._replace(places=("mill",), openers=(), things=("kite",), foods=("plum",), events=(2, 3))


def enumerate_documents(lexicon: Lexicon) -> Iterator[tuple[str, Fraction]]:
    """All documents, each with its exact probability: the choices count up like an odometer, the last one fastest."""
    path: list[int] = []
    while True:
        sizes: list[int] = []
        weights: list[tuple[int, int]] = []

        def choose(options: Options) -> int:
            if len(sizes) == len(path):  # noqa: B023 - used up within this turn of the loop
                path.append(0)
            index = path[len(sizes)]  # noqa: B023
            if not index:
                assert_prefix_free(options)
            sizes.append(len(options))  # noqa: B023
            weights.append((options[index][0], sum(weight for weight, _, _ in options)))  # noqa: B023
            return index

        text, nats = grammar.derive(lexicon, choose)
        chosen, totals = zip(*weights, strict=True)
        probability = Fraction(math.prod(chosen), math.prod(totals))
        assert math.isclose(nats, math.log(probability), rel_tol=1e-6)
        yield text, probability
        while path and path[-1] + 1 == sizes[len(path) - 1]:
            path.pop()
        if not path:
            return
        path[-1] += 1


PREFIX_FREE: set[tuple[tuple[int, str], ...]] = set()  # those that were looked at


def assert_prefix_free(options: Options) -> None:
    key = tuple((weight, text) for weight, text, _ in options)
    if key not in PREFIX_FREE:
        texts = sorted(text for _, text in key)
        assert all(weight > 0 for weight, _ in key)
        assert all(texts)
        assert not [pair for pair in itertools.pairwise(texts) if pair[1].startswith(pair[0])]
        PREFIX_FREE.add(key)


@functools.cache
def document(index: int) -> tuple[str, float]:
    """Like grammar.document(SEED, index); checks that no option of a choice is a prefix of another."""
    choose = grammar.sampler(SEED, index)

    def checked(options: Options) -> int:
        assert_prefix_free(options)
        return choose(options)

    return grammar.derive(FULL, checked)


@pytest.fixture(scope="module")
def corpus() -> list[tuple[str, float]]:
    return [document(index) for index in range(1000)]


@pytest.mark.parametrize("lexicon", [WIDE, LONG], ids=["wide", "long"])
def test_all_documents_of_a_small_language(lexicon: Lexicon) -> None:
    language = dict(listed := list(enumerate_documents(lexicon)))
    assert len(language) == len(listed) > 1000
    assert sum(language.values()) == 1  # exactly
    in_order = sorted(language)  # a text comes directly before those it begins
    assert not [pair for pair in itertools.pairwise(in_order) if pair[1].startswith(pair[0])]
    for text in in_order[::97]:
        assert grammar.log_probability(text, lexicon) == pytest.approx(math.log(language[text]), rel=1e-12)

    count = 4000
    drawn = Counter(grammar.documents(SEED, count, lexicon))
    assert drawn.keys() <= language.keys()
    groups: list[tuple[float, int]] = []  # of documents, in order of probability: expected and observed draws, ...
    expected, observed = 0.0, 0
    for text in sorted(language, key=lambda text: (float(language[text]), text)):
        expected, observed = expected + count * float(language[text]), observed + drawn[text]
        if expected >= 20:  # ... enough for the chi-square approximation
            groups.append((expected, observed))
            expected, observed = 0.0, 0
    chi_square = sum((observed - expected) ** 2 / expected for expected, observed in groups)
    freedom = len(groups) - 1
    assert freedom > 50
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


def test_reading_gives_exactly_the_log_probability_of_writing(corpus: list[tuple[str, float]]) -> None:
    for text, nats in corpus[:400]:
        assert grammar.log_probability(text) == nats < -40


def test_no_option_begins_another() -> None:
    assert all(document(index) for index in range(1000))  # those of `corpus`, made once


def test_words_do_not_repeat() -> None:
    for name, words in FULL._asdict().items():
        if isinstance(words, tuple) and isinstance(words[0], str):
            assert len(set(words)) == len(words), name
    assert not set(FULL.girls) & set(FULL.boys)
    assert not set(FULL.sisters) & set(FULL.brothers)


def test_sampler_is_unbiased_and_rejects_the_incomplete_last_multiple(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = np.array([2**64 - 1, 0, 1, 2, 5], dtype=np.uint64)  # 2**64 is 1 more than a multiple of 3
    monkeypatch.setattr(seeds, "bits", lambda *_: draws)
    choose = grammar.sampler(0, 0)
    options = ((1, "a", None), (2, "b", None))
    assert [choose(options) for _ in range(4)] == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda text: "Once" + text[3:],
            "at character 2 expected 'e warm ' or 'e cold ' or 'e sunny ' or 'e windy ' or ..., found 'ce ",
        ),
        (lambda text: text + "\n", "expected the end, found '\\n'"),
        (lambda text: text[:-1], "expected '.', found ''"),
        (lambda text: "", "at character 0 expected 'One "),
        (lambda text: text.replace(" was at the ", " was at a ", 1), " expected 'the mill.' or 'the pond.' or "),
        (lambda text: text.replace("What a", "What an"), "expected ' "),
        (lambda text: text + text, "expected the end, found 'One "),
    ],
)
def test_other_texts_are_rejected(corpus, change, message: str) -> None:  # type: ignore[no-untyped-def]
    with refuses(re.escape(message)):
        grammar.log_probability(change(corpus[0][0]))


def test_error_names_the_first_wrong_character(corpus: list[tuple[str, float]]) -> None:
    for at in range(0, 300, 7):
        text = corpus[1][0]
        with refuses(f"at character {at} expected '"):
            grammar.log_probability(text[:at] + "#" + text[at + 1 :])


def test_a_document_depends_on_its_seed_and_index_only(corpus: list[tuple[str, float]]) -> None:
    few, many = list(grammar.documents(SEED, 3)), list(grammar.documents(SEED, 10))
    assert few == many[:3] == [text for text, _ in corpus[:3]]
    assert grammar.document(SEED, 7) == corpus[7]
    assert corpus[7][0] == many[7]
    assert not set(many) & set(grammar.documents(SEED + 1, 10))
    assert list(grammar.documents(SEED, 0)) == []


def test_the_corpus_is_pinned() -> None:
    """A change of the language or the generator changes the corpus of all users; if intended, pin the new hash."""
    digest = hashlib.sha256("\0".join(grammar.documents(SEED, 200)).encode()).hexdigest()
    assert digest == "bccfac313fd682a24131b65bcbf161d1e3afc65c8808ebed3bf76066c7608323"


def test_shape_of_the_corpus(corpus: list[tuple[str, float]]) -> None:
    texts = [text for text, _ in corpus]
    characters = sum(map(len, texts))
    assert len(set(texts)) == len(texts)
    assert all(250 <= len(text) <= 1000 for text in texts)
    assert 0.28 < -math.fsum(nats for _, nats in corpus) / characters < 0.32  # the floor, nats per character
    alphabet = set("".join(texts))
    assert alphabet <= set(string.ascii_letters + ' \n.,!?"')
    assert alphabet == set("".join(texts[:300]))  # so a part of the corpus has all of it


def test_the_documents_agree_with_themselves(corpus: list[tuple[str, float]]) -> None:
    """Tracks owners, counts and places with regular expressions, independently of the grammar."""
    checked: Counter[str] = Counter()
    for text, _ in corpus:
        opening, *lines = text.split("\n")
        place: dict[str, str] = {}
        for name, where in re.findall(r"(\w+) was (there too|at the \w+)\.", opening):
            place[name] = where if where != "there too" else next(iter(place.values()))
        owner: dict[str, str] = {}
        count: dict[str, int] = defaultdict(int)
        actor = ""
        for line in lines:
            if deed := re.match(rf"(?:(?:{'|'.join(FULL.openers)}) )?(\w+) (?=[a-z])", line):
                pronoun = deed[1] in ("He", "She")
                if pronoun:
                    assert (deed[1] == "She") == (actor in FULL.girls)
                    checked["pronoun"] += 1
                actor = actor if pronoun else deed[1]
            if found := re.search(rf" (?:{'|'.join(FULL.finds)}) (an?) (\w+ \w+) (?:{'|'.join(FULL.sides)}) ", line):
                assert (found[1] == "an") == (found[2][0] in "aeiou")
                owner[found[2]] = actor
            if gave := re.search(r" gave the (\w+ \w+) to (\w+)\. ", line):
                assert owner[gave[1]] == actor
                assert place[actor] == place[gave[2]]
                owner[gave[1]] = gave[2]
            if got := re.search(r" got (\w+) (\w+)(?: and now had (\w+)\.| )", line):
                count[actor] += grammar.NUMBERS.index(got[1])
                assert got[3] in (None, grammar.NUMBERS[count[actor]])
            if handed := re.search(r" handed (\w+) \w+ to (\w+) and had (\w+) (\w+) left", line):
                number = grammar.NUMBERS.index(handed[1])
                count[actor], count[handed[2]] = count[actor] - number, count[handed[2]] + number
                assert grammar.NUMBERS[count[actor]] == handed[3]
                assert handed[4].endswith("s") == (handed[3] != "one")
                checked["left"] += 1
            if went := re.search(r"ly to the (\w+)\.|(?:alone|early|late) to the (\w+)\.", line):
                place[actor] = f"at the {went[1] or went[2]}"
                here = [name for name in place if name != actor and place[name] == place[actor]]
                assert line.endswith(" there.") == bool(here)
                assert all(name in line for name in here)
                assert (" were there." in line) == (len(here) > 1)
            if visit := re.search(r" visited (?:.* )?(\w+) (at the \w+)\.", line):
                assert place[visit[1]] == visit[2]
                place[actor] = visit[2]
            if asked := re.match(r'"Who has the (\w+ \w+)\?" asked (\w+)\. "(\w+) \w+ it," said (\w+)\.', line):
                assert {"I": asked[4], "You": asked[2]}.get(asked[3], asked[3]) == owner[asked[1]]
                assert place[asked[2]] == place[asked[4]]
                checked["owner"] += 1
            if asked := re.match(r'"Where is (\w+)\?" asked \w+\. "(He|She) is (at the \w+)," said', line):
                assert asked[3] == place[asked[1]]
                assert (asked[2] == "She") == (asked[1] in FULL.girls)
                checked["where"] += 1
            if asked := re.match(r'"How many \w+ do you have, (\w+)\?" asked \w+\. "I have (\w+) ', line):
                assert grammar.NUMBERS[count[asked[1]]] == asked[2]
                checked["count"] += 1
        assert all(re.search(rf"{name} had [^.]*the {thing}", lines[-2]) for thing, name in owner.items())
        assert not re.search(r"\b(?:[Aa] [aeiou]|[Aa]n [^aeiou])", text)
        assert f"{opening.split(',')[0].removeprefix('One ')}!" in lines[-1]
    assert all(checked[kind] > 50 for kind in ("pronoun", "left", "owner", "where", "count")), checked
