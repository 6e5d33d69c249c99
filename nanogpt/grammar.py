"""The built-in corpus: short children's stories from a probabilistic grammar whose entropy is known exactly.

A story is a Python generator. It yields the options that may come next, each a (weight, text, value), and is sent the
index of the one taken, with probability weight / total. The same generator is run to write a document (`document`),
to read one (`log_probability`) and to list them all (`enumerate_documents`), so that these cannot disagree.

At every choice no option's text is the beginning of another's. So a text has one derivation, found from left to right;
no document is the beginning of another; and its end is implied: a token after it that marks the end costs 0 nats.

What a story has told so far (who is where, who has what, who saw what) decides much of what follows. Such text has
probability 1, and a model pays for it until it keeps track as well. So the mean of -log_probability per character is
the loss that no model can beat, and the distance from it tells how much structure a model has yet to learn.

The file reads top down as a description of the language: words, state, scenes, story; what runs it comes last.
"""

import bisect
import functools
import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TypeVar

import numpy as np

from nanogpt import counter

T = TypeVar("T")
Option = tuple[int, str, T]  # weight, text, value
Options = Sequence[Option[object]]
Telling = Generator[Options, int, T]  # yields options, is sent the index taken, returns what was told


# --- words ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lexicon:
    """The words of the language, the most frequent first, and the limits of a story.

    `foods` are singular and take a plain s; adjectives take "an" before a written vowel, "a" otherwise.
    """

    girls: tuple[str, ...]
    boys: tuple[str, ...]
    relations: tuple[tuple[str, str], ...]  # the word, and whom it fits: "girl", "boy" or "any"
    traits: tuple[str, ...]  # of people
    weathers: tuple[str, ...]
    hours: tuple[str, ...]
    months: tuple[str, ...]
    places: tuple[str, ...]
    openers: tuple[str, ...]
    motions: tuple[str, ...]
    manners: tuple[str, ...]
    finds: tuple[str, ...]
    looks: tuple[str, ...]  # of things
    things: tuple[str, ...]
    sides: tuple[str, ...]
    textures: tuple[str, ...]  # of landmarks
    landmarks: tuple[str, ...]
    foods: tuple[str, ...]
    trades: tuple[str, ...]
    tempers: tuple[str, ...]  # of animals
    animals: tuple[str, ...]
    pursuits: tuple[str, ...]
    moods: tuple[str, ...]
    thanks: tuple[str, ...]
    endings: tuple[str, ...]
    most_people: int  # 2 or more
    most_food: int  # that one gets at a time, 2 or more
    events: tuple[int, int]  # fewest and most between a story's opening and its ending


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FULL = Lexicon(
    girls=_words("Ann Mia Sue Eva Zoe Lily Rose Ida Nora Ruby Cora Hana Kate Jane Vera Olga Dina Faye Gwen Yuki Tess"),
    boys=_words("Ben Tom Max Sam Leo Jack Finn Omar Hugo Paul Ivan Karl Noah Dan Ravi Axel Emil Gus Zack Walt Quinn"),
    relations=(("friend", "any"), ("brother", "boy"), ("sister", "girl"), ("cousin", "any"), ("uncle", "boy"),
               ("aunt", "girl"), ("neighbor", "any"), ("pupil", "any")),
    traits=_words("kind brave shy clever merry quiet tall proud gentle wise lazy polite honest bold calm eager funny "
                  "silly loud busy neat fussy tidy stubborn jolly patient curious careful cheeky strong tiny daring"),
    weathers=_words("warm cold sunny windy rainy foggy bright dark mild snowy gray dull hot icy damp dry cool cloudy "
                    "stormy crisp fine fair gloomy hazy lovely dreary chilly misty"),
    hours=_words("morning day evening afternoon night"),
    months=_words("May June April July March August October September January February November December"),
    places=_words("mill pond farm well barn shop bridge inn lake market school beach gate tower castle harbor park "
                  "church station library bakery zoo fair camp dam quarry forge abbey palace port museum theater"),
    openers=_words("Then Soon Next Later Now Again Suddenly Meanwhile"),
    motions=_words("went ran walked rode raced rushed hurried hiked strolled danced marched wandered crept skipped"),
    manners=_words("slowly quickly happily quietly gladly sadly boldly calmly alone early late bravely eagerly lazily "
                   "proudly softly briskly wearily shyly cheerfully carefully gently loudly nervously"),
    finds=_words("found made bought won spotted borrowed uncovered"),
    looks=_words("red old blue big new green small shiny yellow black pink white odd round long soft heavy purple rusty "
                 "ugly broken golden orange thin wooden muddy fancy cheap painted striped sticky empty spotted dusty"),
    things=_words("kite ball hat book drum key bell boat doll cup coin lamp rope ring map flute box basket fan top net "
                  "clock scarf button jar spoon pen whistle puppet shell mask sack vase ladder violin umbrella wagon "
                  "bucket mirror pillow crown sled brush candle"),
    sides=_words("near under behind by beside past below"),
    textures=_words("tall mossy gray wet crooked thick stone broken low hollow fallen thorny leafy sandy rocky lonely "
                    "pointed ancient wide shady icy steep bare narrow smooth"),
    landmarks=_words("tree wall oak rock log fence hedge bush stump pine hill ditch cart bench post arch shed stile "
                     "willow tent pillar fountain statue stair"),
    foods=_words("apple plum egg pear bun nut fig cake carrot lemon pie onion bean cookie muffin olive melon date"),
    trades=_words("farmer baker sailor miller cook nurse pilot painter singer grocer tailor monk king queen hunter "
                  "teacher guard weaver dancer butcher judge fisher doctor smith"),
    tempers=_words("big sly gray brown wild fat young lost hungry sleepy noisy angry white fast clumsy lame grumpy tame "
                   "wet plump scruffy timid playful skinny greedy spotted"),
    animals=_words("dog fox cat owl hen duck goat crow pig mouse frog bear wolf rabbit sheep goose horse rat mole otter "
                   "swan deer badger toad donkey lizard squirrel hedgehog"),
    pursuits=_words("chase follow watch meet help tease lick kiss push scare wake hear pass trick nudge feed"),
    moods=_words("happy sad tired hungry glad sleepy cold lucky bored angry cheerful lonely dizzy excited hopeful upset "
                 "afraid cozy jealous thirsty surprised puzzled"),
    thanks=("Thank you", "How kind", "Lovely", "Thanks a lot", "What a surprise", "You are so good", "Oh my"),
    endings=("In the end", "At last", "That night", "At sunset", "Before bedtime", "When it got dark", "Finally"),
    most_people=3,
    most_food=6,
    events=(4, 8),
)  # fmt: skip

NUMBERS = _words("no one two three four five six seven eight nine ten eleven twelve")


def article(word: str) -> str:
    """The word with its indefinite article: "a red", "an old"."""
    return ("an " if word[0] in "aeio" or word in ("ugly", "upset") else "a ") + word


def quantity(number: int, food: str) -> str:
    """Such as "no apples", "one apple" or "two apples"."""
    return f"{NUMBERS[number]} {food}" + ("" if number == 1 else "s")


def listing(items: Sequence[str]) -> str:
    """Such as "nothing", "a", "a and b" or "a, b and c"."""
    return " and ".join(filter(None, (", ".join(items[:-1]), items[-1]))) if items else "nothing"


# --- choices ----------------------------------------------------------------------------------------------------------


def say(text: str) -> Telling[None]:
    """Text that what came before has already decided."""
    yield ((1, text, None),)


def pick(options: Sequence[Option[T]]) -> Telling[T]:
    """One of the options; returns its value."""
    index = yield options
    return options[index][2]
