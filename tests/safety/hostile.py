"""Files that a stranger could have made, and what must hold for whoever parses them."""

import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.common import forget_peak, own_peak
from nanogpt.files import Damaged
from nanogpt.params_errors import ParamsError
from tracking.journal import JournalDamaged

TRIED: dict[str, list[int]] = {}  # parser -> [inputs, accepted ones]
LAST: list[bytes] = []  # the last input, which the message of a failure shows
OURS = {ValueError, Damaged, ParamsError, JournalDamaged}  # not their subclasses, such as a bare UnicodeDecodeError
MOST_MEMORY = 300 * 2**20  # bytes that all inputs of a parser may take at once, on top of what this process holds

VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 2**16, 2**31, 2**40, 2**63, 10**30, 0.5, 1e308, float("inf"), float("nan")),
    *("", "text", "../../outside", "/etc/passwd", "\ud800", "\x00", "\x1b[2J", "a\nb", "x" * 10_000),
    *([], {}, [[]], [0], ["a"], {"a": 1}, [[97, 98]], {"../outside": "0" * 64}),
]
SPLINTERS = [
    *(b"null", b"NaN", b"-1", b"1e999", b"9" * 30, b"9" * 5000, b"[" * 1200, b"{", b'"', b"\n", b"\x00", b"\xff"),
    *(b"\\", b'"\\ud800"', b'"../outside"', b"&a [*a]", b"*a", b"!!python/object/apply:os.system [touch outside]"),
    *(b"!!binary x", b"!!set {a}", b"2026-11-31", b"0x" + b"f" * 5000, b"? ", b"- ", b"---\n", b"<<: "),
]


def inputs(number: int, *makers: bytes | Callable[[Random], bytes]) -> Iterator[tuple[bytes, Random]]:
    """So many inputs, the same ones each time, and what drew them. Bytes: mutants of that file; it comes first."""
    for seed in range(number):
        draw = Random(seed)
        maker = draw.choice(makers) if seed else makers[0]
        LAST[:] = [maker(draw) if callable(maker) else mutant(draw, maker) if seed else maker]
        yield LAST[0], draw


def mutant(draw: Random, whole: bytes) -> bytes:
    """Arbitrary bytes, or the file with up to three bits flipped, parts cut out, doubled, moved or replaced."""
    if draw.random() < 0.1:
        return draw.randbytes(draw.randrange(200))
    data = whole
    for _ in range(draw.randint(1, 3)):
        start = draw.randrange(max(1, len(data)))
        end = start + draw.randint(1, 30)
        kind = draw.choice(["flip", "truncate", "cut", "double", "move", "replace", "insert"])
        splinter = draw.choice(SPLINTERS) if kind in {"replace", "insert"} else b""
        if kind == "flip" and data:
            data = data[:start] + bytes([data[start] ^ 1 << draw.randrange(8)]) + data[start + 1 :]
        elif kind == "truncate":
            data = data[:start]
        elif kind == "double":
            data = data[:end] + data[start:]
        elif kind == "move":
            data = data[end:] + data[start:end] + data[:start]
        else:
            data = data[:start] + splinter + data[start if kind == "insert" else end :]
    return data


def swapped(draw: Random, content: Any) -> Any:
    """JSON content of which one or two values, at any depth, are others."""
    content = copy.deepcopy(content)
    for _ in range(draw.randint(1, 2)):
        inner: Any = content
        while inner:
            key = draw.choice(sorted(inner) if isinstance(inner, dict) else range(len(inner)))
            if isinstance(inner[key], dict | list) and inner[key] and draw.randrange(4):
                inner = inner[key]
                continue
            inner[key] = copy.deepcopy(draw.choice(VALUES))
            break
    return content


def dumped(content: Any) -> bytes:
    return (json.dumps(content, sort_keys=True) + "\n").encode()


def changed_json(content: Any) -> Callable[[Random], bytes]:
    """Makes files of that content with other values."""
    return lambda draw: dumped(swapped(draw, content))


def parsed(parser: str, parse: Callable[[], Any]) -> Any:
    """What the parser returns, or None if it refuses: with an error of ours, in one line that can be shown."""
    counts = TRIED.setdefault(parser, [0, 0])
    counts[0] += 1
    try:
        result = parse()
    except ValueError as error:
        refusal = error
    else:
        counts[1] += 1
        return result
    assert type(refusal) in OURS, repr(refusal)
    assert "\n" not in str(refusal)
    assert len(str(refusal)) < 1500
    return None


@contextlib.contextmanager
def harmless(parser: str, folder: Path, writes: bool = False) -> Iterator[None]:
    """Of the inputs in the block some are accepted and some refused; no memory is lost, and no file comes or goes."""
    before = sorted(folder.rglob("*"))
    forget_peak()  # else what this process, or the one that started it, held before would hide what an input takes
    held = own_peak()
    tried, accepted = TRIED.setdefault(parser, [0, 0])
    try:
        yield
    except BaseException as error:
        error.add_note(f"with {LAST!r:.2000}")
        raise
    now, now_accepted = TRIED[parser]
    assert accepted < now_accepted, "none is accepted"
    assert now - tried > now_accepted - accepted, "none is refused"
    assert own_peak() - held < MOST_MEMORY, "too much memory is taken"
    assert not list(folder.parent.rglob("outside*"))
    assert writes or sorted(folder.rglob("*")) == before
