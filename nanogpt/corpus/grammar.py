"""The built-in corpus: short children's stories from a probabilistic grammar, so the best possible loss is known.

A story is a Python generator. It yields the options that may come next, each a (weight, text, value), and is sent the
index of the chosen one, whose probability is weight / total. The same generator writes documents (`document`) and
scores them (`log_probability`), so the two always agree. No option of a choice is a prefix of another, so a text has
one derivation, found from left to right, and no document is a prefix of another: a token at its end costs 0 nats.

The state of a story (who is where, has what, saw what) determines much of the text that follows. Such text has
probability 1, but a model must keep track of the state to predict it. The mean of -log_probability per character is the
loss that no model can beat; the distance from it shows how much of the structure a model has not learned.
"""

import bisect
import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np

from nanogpt import seeds

T = TypeVar("T")
Option = tuple[int, str, T]  # weight, text, value
Options = Sequence[Option[object]]
Scene = Generator[Options, int, T]  # yields options, is sent the index of one, returns what the caller needs

# --- words ---
Words = tuple[str, ...]


def _words(text: str) -> Words:
    return tuple(text.split())


class Lexicon(NamedTuple):
    """The words of the language, each list from frequent to rare, and the limits of a story.

    No name or noun is a prefix of another in its list; foods form the plural with s; words that begin with a vowel
    letter take "an".
    """

    girls: Words = _words("Ann Mia Sue Eva Zoe Lily Rose Ida Nora Ruby Cora Hana Kate Jane Vera Olga Dina Faye")
    boys: Words = _words("Ben Tom Max Sam Leo Jack Finn Omar Hugo Paul Ivan Karl Noah Dan Ravi Axel Emil Gus")
    sisters: Words = _words("sister aunt niece")  # relations of a girl to the hero
    brothers: Words = _words("brother uncle nephew")  # of a boy
    friends: Words = _words("friend cousin neighbor teacher")  # of either
    traits: Words = _words("""kind brave shy clever merry quiet tall proud gentle wise lazy polite honest bold calm
        eager funny silly loud busy neat fussy tidy stubborn jolly patient curious careful cheeky strong daring nosy""")
    weathers: Words = _words("""warm cold sunny windy rainy foggy bright dark mild snowy gray dull hot icy damp dry
        cool cloudy stormy crisp fine fair gloomy hazy lovely dreary chilly misty""")
    hours: Words = _words("morning day evening afternoon night")
    places: Words = _words("""mill pond farm well barn shop bridge inn lake market school beach gate tower castle
        harbor park church station library bakery zoo fair camp dam quarry forge abbey palace port museum theater""")
    openers: Words = _words("Then Soon Next Later Now Again Suddenly Meanwhile")
    motions: Words = _words("went ran walked rode raced rushed hurried hiked strolled danced marched wandered crept")
    manners: Words = _words("""slowly quickly happily quietly gladly sadly boldly calmly alone early late bravely
        eagerly lazily proudly softly briskly wearily shyly cheerfully carefully gently loudly nervously""")
    finds: Words = _words("found made bought won borrowed mended")
    looks: Words = _words("""big old red small blue green white black brown new gray pink yellow odd round long shiny
        tiny short wet soft plain dark pale thin fat huge ugly pretty dusty muddy dirty clean golden purple orange
        heavy light strange lovely funny spotted striped crooked cold warm wide tall fancy famous silver ragged""")
    things: Words = _words("""kite ball hat book drum key bell boat doll cup coin lamp rope ring map flute box basket
        fan top net clock scarf button jar spoon pen whistle puppet shell mask sack vase ladder violin umbrella""")
    sides: Words = _words("near under behind by beside past below")
    landmarks: Words = _words("""tree wall oak rock log fence hedge bush stump pine hill ditch cart bench post arch
        shed stile willow tent pillar fountain statue stair barrel rosebush chimney haystack""")
    foods: Words = _words("apple plum egg pear bun nut fig cake carrot lemon pie onion bean cookie muffin olive quince")
    animals: Words = _words("""dog fox cat owl hen duck goat crow pig mouse frog bear wolf rabbit sheep goose horse rat
        mole otter swan deer badger toad donkey lizard squirrel hedgehog""")
    pursuits: Words = _words("chase follow watch meet help tease lick kiss push scare wake hear pass trick feed")
    thanks: Words = ("Thank you", "How kind", "Lovely", "Thanks a lot", "What fun", "You are so good", "Oh my")
    endings: Words = ("In the end", "At last", "By sunset", "Before bedtime", "When it got dark", "Finally")
    people: int = 3  # in a story; 2 or more
    most_food: int = 6  # that a person gets at a time; 2 or more
    events: tuple[int, int] = (5, 9)  # minimum and maximum between the opening and the ending


FULL = Lexicon()
NUMBERS = _words("no one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen")


def article(phrase: str) -> str:
    """The phrase with its indefinite article: "a red kite", "an old hat"."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def quantity(number: int, food: str) -> str:
    """Such as "one apple" or "two apples"."""
    return f"{NUMBERS[number]} {food}" + ("" if number == 1 else "s")


def listing(items: Sequence[str]) -> str:
    """Such as "a", "a and b" or "a, b and c"."""
    return " and ".join([*filter(None, [", ".join(items[:-1])]), *items[-1:]])


# --- choices ---
def say(text: str) -> Scene[None]:
    """Text without a choice."""
    yield ((1, text, None),)


def pick(options: Sequence[Option[T]]) -> Scene[T]:
    """A choice among the options; returns the value of the chosen one."""
    index = yield options
    return options[index][2]


def ranked(words: Sequence[str], after: str = "", before: str = "") -> list[Option[str]]:
    """Options for the words, each between two fixed texts, weighted by rank with the Zipf-Mandelbrot law."""
    return [(1000 // (20 + rank), before + word + after, word) for rank, word in enumerate(words)]


def one_of(words: Sequence[str], after: str = "", before: str = "") -> Scene[str]:
    return (yield from pick(ranked(words, after, before)))


def described(adjectives: Sequence[str], nouns: Sequence[str]) -> Scene[str]:
    """A noun phrase such as "an old kite"; returns it without the article."""
    adjective = yield from one_of([article(word) for word in adjectives], " ")
    noun = yield from one_of(nouns)
    return f"{adjective.split()[1]} {noun}"


# --- people ---
@dataclass(slots=True, eq=False)
class Person:
    """A person, and their state in the story."""

    name: str
    trait: str
    pronouns: tuple[str, str]  # such as "She" and "her"
    title: str  # in relation to the hero, such as "her brother Ben"
    place: str = ""
    things: list[str] = field(default_factory=list)  # such as "red kite"
    food: int = 0
    sight: str = ""  # the last animal they saw, such as "sly fox"


@dataclass(slots=True)
class World:
    """The state of a story."""

    lexicon: Lexicon
    people: list[Person]  # the hero comes first
    food: str = ""  # the only kind of food in a story, once it is mentioned
    subject: Person | None = None  # the last person who did something
    asked: str = ""  # the last question

    def company(self, who: Person) -> list[Person]:
        """The other people at the same place."""
        return [p for p in self.people if p.place == who.place and p is not who]

    def new_things(self) -> list[str]:
        """The nouns not used yet, so that "the kite" is never ambiguous."""
        used = {thing.split()[1] for p in self.people for thing in p.things}
        return [noun for noun in self.lexicon.things if noun not in used]


# --- what people do: each scene continues after the verb that `act` chooses ---
def go(world: World, who: Person) -> Scene[None]:
    yield from one_of(world.lexicon.manners, " to the ")
    who.place = yield from one_of([place for place in world.lexicon.places if place != who.place], ".")
    if met := world.company(who):
        yield from say(f" {listing([p.name for p in met])} {'was' if len(met) == 1 else 'were'} there.")


def visit(world: World, who: Person) -> Scene[None]:
    away = [p for p in world.people if p.place != who.place]
    other = yield from pick([(1, p.title if who is world.people[0] else p.name, p) for p in away])
    who.place = other.place
    yield from say(f" at the {who.place}.")


def spot(lexicon: Lexicon) -> Scene[None]:
    yield from one_of(lexicon.sides, " ", before=" ")
    yield from described(lexicon.looks, lexicon.landmarks)
    yield from say(".")


def find(world: World, who: Person) -> Scene[None]:
    who.things.append((yield from described(world.lexicon.looks, world.new_things())))
    yield from spot(world.lexicon)


def watch(world: World, who: Person) -> Scene[None]:
    who.sight = yield from described(world.lexicon.looks, world.lexicon.animals)
    yield from one_of(world.lexicon.pursuits, " ", before=" ")
    yield from described(world.lexicon.looks, world.lexicon.animals)
    yield from spot(world.lexicon)


def give(world: World, who: Person) -> Scene[None]:
    thing = yield from pick([(1, f"the {thing} to ", thing) for thing in who.things])
    other = yield from pick([(1, p.name, p) for p in world.company(who)])
    who.things.remove(thing)
    other.things.append(thing)
    yield from one_of(world.lexicon.thanks, f', {who.name}!" said {other.name}.', before='. "')


def gather(world: World, who: Person) -> Scene[None]:
    number = yield from one_of(NUMBERS[2 : world.lexicon.most_food + 1], " ")
    who.food += NUMBERS.index(number)
    if world.food:
        yield from say(f"{world.food}s and now had {NUMBERS[who.food]}.")
    else:
        world.food = yield from one_of(world.lexicon.foods, "s")
        yield from spot(world.lexicon)


def share(world: World, who: Person) -> Scene[None]:
    number = yield from pick([(1, quantity(n, world.food) + " to ", n) for n in range(1, who.food + 1)])
    other = yield from pick([(1, p.name, p) for p in world.company(who)])
    who.food, other.food = who.food - number, other.food + number
    yield from say(f" and had {quantity(who.food, world.food)} left.")


def act(world: World, who: Person) -> Scene[None]:
    """Chooses something that the person can do now; an option is a weight, a verb and the scene after it."""
    world.subject, company = who, world.company(who)
    options = [(18, "saw ", watch(world, who))]
    if len(world.lexicon.places) > 1:
        options += [(1, verb + " ", go(world, who)) for verb in world.lexicon.motions]
    if len(company) + 1 < len(world.people):
        options += [(6, "visited ", visit(world, who))]
    if world.new_things():
        options += [(2, verb + " ", find(world, who)) for verb in world.lexicon.finds]
    if sum(p.food for p in world.people) + world.lexicon.most_food < len(NUMBERS):
        options += [(6, "got ", gather(world, who))]
    if company and who.food:
        options += [(10, "handed ", share(world, who))]
    if company and who.things:
        options += [(20, "gave ", give(world, who))]
    yield from (yield from pick(options))


# --- what people ask: the state determines the answer; only who asks and who answers are choices ---

Answer = tuple[Person, Person, str]  # who asks, who answers, the answer


def questions(world: World) -> Iterator[tuple[str, list[Answer]]]:
    """All questions about the state, with their possible answers."""
    pairs = [(asker, other) for asker in world.people for other in world.company(asker)]
    for who in world.people:
        where = f"{who.pronouns[0]} is at the {who.place}"
        yield f"Where is {who.name}", [(p, q, where) for p, q in pairs if p.place != who.place]
        for thing in who.things:
            has = f"{who.name} has it"
            answers = [(p, q, "I have it" if q is who else "You have it" if p is who else has) for p, q in pairs]
            yield f"Who has the {thing}", answers
        if who.sight:
            yield f"What did you see, {who.name}", [(p, q, f"I saw {article(who.sight)}") for p, q in pairs if q is who]
        if world.food:
            own = f"I have {quantity(who.food, world.food)}"
            yield f"How many {world.food}s do you have, {who.name}", [(p, q, own) for p, q in pairs if q is who]


def talk(world: World, question: str, answers: list[Answer]) -> Scene[None]:
    world.asked = question
    askers = dict.fromkeys(asker for asker, _, _ in answers)
    who = yield from pick([(1, f'{asker.name}. "', asker) for asker in askers])
    yield from pick([(1, f'{text}," said {other.name}.', None) for asker, other, text in answers if asker is who])


# --- story ---
def introduce(lexicon: Lexicon, others: Sequence[Person]) -> Scene[Person]:
    """Introduces a person: a trait, the relation to the hero unless it is the hero, and a matching name."""
    trait = yield from one_of(lexicon.traits, " ")
    kinds, title = [(lexicon.girls, ("She", "her")), (lexicon.boys, ("He", "his"))], ""
    if others:
        relations = ((lexicon.sisters, kinds[:1]), (lexicon.brothers, kinds[1:]), (lexicon.friends, kinds))
        relation, kinds = yield from pick([(1, word + " ", (word, fit)) for words, fit in relations for word in words])
        title = f"{others[0].pronouns[1]} {relation} "
    names = [(weight, name, (name, pronouns)) for words, pronouns in kinds for weight, name, _ in ranked(words)]
    name, pronouns = yield from pick([option for option in names if all(option[1] != p.name for p in others)])
    return Person(name, trait, pronouns, title + name)


def opening(lexicon: Lexicon) -> Scene[tuple[World, str]]:
    """Introduces everybody; returns the world and the time, such as "windy night"."""
    weather = yield from one_of(lexicon.weathers, " ", before="One ")
    hour = yield from one_of(lexicon.hours, ", ")
    hero = yield from introduce(lexicon, ())
    hero.place = yield from one_of(lexicon.places, ".", before=" was at the ")
    people = [hero]
    while len(people) < lexicon.people:
        yield from say(f" {hero.pronouns[1].capitalize()} ")
        person = yield from introduce(lexicon, people)
        elsewhere = ranked([place for place in lexicon.places if place != hero.place], ".", before=" was at the ")
        person.place = yield from pick([(1000, " was there too.", hero.place), *elsewhere])
        people.append(person)
    yield from say("\n")
    return World(lexicon, people), f"{weather} {hour}"


def beginnings(world: World) -> list[Option[Scene[None]]]:
    """How a line other than the last may begin; all questions together have about the same weight."""
    asked = [(question, answers) for question, answers in questions(world) if answers and question != world.asked]
    options = [(80 // len(asked) + 1, f'"{words}?" asked ', talk(world, words, answers)) for words, answers in asked]
    starts = [(40, ""), *((5, opener + " ") for opener in world.lexicon.openers)]
    options += [(weight, f"{start}{p.name} ", act(world, p)) for p in world.people for weight, start in starts]
    if world.subject:
        options.append((80, world.subject.pronouns[0] + " ", act(world, world.subject)))
    return options


def ending(world: World, time: str) -> Scene[None]:
    """What everybody has in the end, and the time again; the only choice is who speaks."""
    ends = []
    for who in world.people:
        food = [quantity(who.food, world.food)] if who.food else []
        if goods := listing([*("the " + thing for thing in who.things), *food]):
            ends.append(f"{who.trait} {who.name} had {goods}")
    yield from say((listing(ends) or "nobody had anything") + ".\n")
    yield from pick([(1, f'"What {article(time)}!" said {who.name}.', None) for who in world.people])


def story(lexicon: Lexicon) -> Scene[None]:
    """A whole story: an opening, some events and an ending, each on its own line."""
    world, time = yield from opening(lexicon)
    fewest, most = lexicon.events
    for events in itertools.count():
        end = ending(world, time)
        ends = [(8, f"{words}, ", end) for words in lexicon.endings]
        scene = yield from pick(beginnings(world) * (events < most) + ends * (events >= fewest))
        yield from scene
        if scene is end:
            return
        yield from say("\n")


# --- writing and reading ---
def derive(lexicon: Lexicon, choose: Callable[[Options], int]) -> tuple[str, float]:
    """Runs a story; `choose` makes the choices, by index. Returns the text and its log-probability in nats."""
    running, texts, nats = story(lexicon), [], []
    options = next(running)
    while True:
        index = choose(options)
        weight, text, _ = options[index]
        texts.append(text)
        nats.append(math.log(weight / sum(weight for weight, _, _ in options)))
        try:
            options = running.send(index)
        except StopIteration:
            return "".join(texts), math.fsum(nats)


def sampler(seed: int, index: int) -> Callable[[Options], int]:
    """Chooses in exact proportion to the weights: a 64-bit draw past the last multiple of the total is drawn again."""
    blocks = (seeds.bits(seed, index, np.arange(start, start + 256)) for start in itertools.count(step=256))
    draws = (draw for block in blocks for draw in block.tolist())

    def choose(options: Options) -> int:
        upto = list(itertools.accumulate(weight for weight, _, _ in options))
        draw = next(draw for draw in draws if draw < 2**64 - 2**64 % upto[-1])
        return bisect.bisect_right(upto, draw % upto[-1])

    return choose


def document(seed: int, index: int, lexicon: Lexicon = FULL) -> tuple[str, float]:
    """Document number `index` (from 0) of the corpus `seed`: its text and its log-probability in nats."""
    return derive(lexicon, sampler(seed, index))


def documents(seed: int, count: int, lexicon: Lexicon = FULL) -> Iterator[str]:
    """The first `count` documents of the corpus `seed`; each depends only on the seed and its index."""
    return (document(seed, index, lexicon)[0] for index in range(count))


def _misfit(text: str, at: int, options: Sequence[str]) -> ValueError:
    """The error for a text that continues at `at` unlike all options; no options mean that it should end there."""
    while nearest := [option for option in options if text[at : at + 1] == option[:1]]:
        options, at = [option[1:] for option in nearest], at + 1
    expected = " or ".join([*map(repr, options[:4]), *["..."] * (len(options) > 4)]) or "the end"
    return ValueError(f"not a document: at character {at} expected {expected}, found {text[at : at + 20]!r}")


def log_probability(text: str, lexicon: Lexicon = FULL) -> float:
    """The log-probability in nats (<= 0) of a whole document, without an end-of-text token.

    Raises ValueError if the text is not a document; the message has the character (from 0) and what was expected there.
    """
    at = 0

    def choose(options: Options) -> int:
        nonlocal at
        for index, (_, option, _) in enumerate(options):
            if text.startswith(option, at):
                at += len(option)
                return index
        raise _misfit(text, at, [option for _, option, _ in options])

    _, nats = derive(lexicon, choose)
    if at < len(text):
        raise _misfit(text, at, ())
    return nats
