"""Reads the vocabulary in nanoGPT's meta.pkl without executing code.

A pickle is a program for a stack machine. This interpreter implements only the instructions that make nested dicts of
texts and integers, as Python writes them in protocols 2 to 5, and none that import, call or build anything.
"""

import itertools
import pickletools
from typing import Any, cast

LARGEST_FILE = 2**22  # bytes; the largest vocabulary takes half of it
_INSTRUCTIONS = 2**19  # the largest vocabulary takes two thirds of it
_MOST = 2**16  # characters; the tokens in nanoGPT's files are uint16
_CONSTANTS = {"BININT", "BININT1", "BININT2", "BINUNICODE", "SHORT_BINUNICODE"}
_IGNORED = {"PROTO", "FRAME"}


def characters(data: bytes) -> str:
    """The characters in the order of their ids. Raises ValueError for anything else than nanoGPT's meta.pkl.

    They must be in code point order, as nanoGPT's prepare.py and `CharTokenizer` number them.
    """
    content = _unpickled(data)
    if not isinstance(content, dict) or set(content) != {"vocab_size", "itos", "stoi"}:
        raise ValueError("it does not hold exactly vocab_size, itos and stoi")
    itos = content["itos"]
    if not isinstance(itos, dict) or not all(isinstance(text, str) and len(text) == 1 for text in itos.values()):
        raise ValueError("itos does not map numbers to single characters")
    found = "".join(itos[number] for number in range(len(itos)) if number in itos)
    if len(found) != len(itos) or content["vocab_size"] != len(itos) or not 0 < len(found) <= _MOST:
        raise ValueError(f"its numbers are not 0 to vocab_size - 1, or more than {_MOST:,}")
    if content["stoi"] != {character: number for number, character in enumerate(found)}:
        raise ValueError("stoi is not the inverse of itos")
    if list(found) != sorted(set(found)):
        raise ValueError("its characters are not numbered in code point order, each once")
    return found


def _unpickled(data: bytes) -> Any:
    """The value of a pickle of texts, integers and dicts.

    Memory is bounded: a reference to the memo copies nothing, and `characters` looks only two levels deep.
    """
    stack: list[Any] = []
    marks: list[int] = []  # lengths of the stack
    memo: dict[int, Any] = {}
    try:
        for opcode, operand, _ in itertools.islice(pickletools.genops(data), _INSTRUCTIONS):
            name, argument = opcode.name, cast(Any, operand)
            if name in _CONSTANTS:
                stack.append(argument)
            elif name == "EMPTY_DICT":
                stack.append({})
            elif name == "MARK":
                marks.append(len(stack))
            elif name in {"BINPUT", "LONG_BINPUT"}:
                memo[argument] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in {"BINGET", "LONG_BINGET"}:
                stack.append(memo[argument])
            elif name == "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set(stack[-1], [key, value])
            elif name == "SETITEMS":
                start = marks.pop()
                _set(stack[start - 1], stack[start:])
                del stack[start:]
            elif name == "STOP":
                return stack.pop()
            elif name not in _IGNORED:
                raise ValueError(f"its instruction {name} makes other things than dicts of texts and numbers")
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError("it is damaged") from error
    raise ValueError(f"it has more than {_INSTRUCTIONS:,} instructions")


def _set(target: Any, items: list[Any]) -> None:
    if type(target) is not dict or len(items) % 2:
        raise ValueError("it is damaged")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int):
            raise ValueError("a key of its dicts is neither a text nor a number")
        target[key] = value
