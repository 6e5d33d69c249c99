"""What is wrong with a parameter, in one line that names the key, the value and the remedy."""

import difflib
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import BaseModel

_AS_IN_PYTHON = {"None": "null", "none": "null", "True": "true", "False": "false"}
_ABBREVIATIONS = {"lr": "learning_rate", "wd": "weight_decay"}  # as other trainers call them


class ParamsError(ValueError):
    """A parameter is wrong; the message names key, value and remedy in one line."""


def explain(error: Any, params: "type[BaseModel]") -> str:
    """Formats an error of pydantic about `params`, a model whose fields are the sections."""
    loc = [part if part.isprintable() else repr(part) for part in (str(part)[:60] for part in error["loc"])]
    # Pydantic appends the branch of a union that it tried; only the names in the file help the user.
    key = ".".join(loc[:2])
    if error["type"] == "extra_forbidden":
        value = "" if isinstance(error["input"], dict) else f" = {_value(error)}"
        return f"{key}{value} is not a known parameter; {_in_its_section(key, params)}"
    if error["type"] == "missing":
        return f"{key} is missing; add it"
    problem = error["msg"][0].lower() + error["msg"][1:]
    if error["type"] == "model_type":
        problem = "a section has its keys below it, indented"
    if error["type"] == "string_pattern_mismatch":
        choices = error["ctx"]["pattern"].strip("^$()").replace(".+", "…").split("|")
        problem = f"input should be one of {', '.join(choices)}"
    if isinstance(error["input"], str) and error["type"] in {"float_type", "int_type", "bool_type"}:
        problem += ", but this is text; if it is in quotes, remove them"
        if error["input"] in _AS_IN_PYTHON:
            problem += f", and write {_AS_IN_PYTHON[error['input']]}"
    return f"{key} = {_value(error)} is invalid: {problem}"


def _in_its_section(key: str, params: "type[BaseModel]") -> str:
    """The remedy for an unknown "section.key" or section: the key's own section if only that is wrong."""
    sections = {name: list(field.annotation.model_fields) for name, field in params.model_fields.items()}  # type: ignore[union-attr]
    section, _, name = key.rpartition(".")
    if others := [f"{other}.{name}" for other, names in sections.items() if name in names]:
        return f"did you mean {' or '.join(others)}?"
    return suggestion(key, sections.get(section, ()) if section else sections)


def suggestion(key: str, names: Collection[str]) -> str:
    """The remedy for an unknown key or "section.key": the most similar of the names in its place, or all of them."""
    section, dot, name = key.rpartition(".")
    in_full = {_in_full(each): each for each in names}
    near = difflib.get_close_matches(_in_full(name), in_full, n=1, cutoff=0.5)
    return f"did you mean {section}{dot}{in_full[near[0]]}?" if near else f"use one of {', '.join(names)}"


def _in_full(name: str) -> str:
    return "_".join(_ABBREVIATIONS.get(word, word) for word in name.split("_"))


def _value(error: Any) -> str:
    """The invalid value, shortened."""
    value = error["input"]
    try:
        return _AS_IN_PYTHON.get(shown := repr(value), shortened(shown, 100))
    except ValueError:  # Python limits the digits of an integer
        return "a number with thousands of digits"


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}…"
