"""The space of a sweep: parameters with their ranges or choices, and constraints; checked before anything runs."""

import ast
import operator
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import exp, log, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from nanogpt.files import read_bytes
from nanogpt.params import Params, flatten, with_values
from nanogpt.params_errors import ParamsError, suggestion
from tracking.run_name import SEED

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Values = dict[str, Any]

_LARGEST_FILE = 2**16  # bytes of a space
_DIGITS = 3  # of a value from a range, so that names stay readable
_MANY = 10_000  # combinations up to this number are listed, of more some are drawn
_SECTIONS = ("tokenize", "model", "train")
_TOKENS = (
    "trials would train on different numbers of tokens; `python -m tools trial` compares them, with --budget flops"
)
_TEXT = "losses on different text cannot be compared"
# What all trials share, and why.
_SHARED = {
    SEED: "the sweep chooses the seeds",
    "train.max_iters": "all trials train for the same steps",
    "train.eval_interval": "trials are compared where they are evaluated",
    "train.eval_iters": "trials are compared by the same batches",
    "train.eval_only": "there would be no training",
    "train.pretrained": "it is no hyperparameter",
    "train.processes": "it is no hyperparameter",
    "train.parallel": "it is no hyperparameter",
    "train.batch_size": _TOKENS,
    "train.gradient_accumulation_steps": _TOKENS,
    "model.block_size": _TOKENS,
    "tokenize.val_fraction": _TEXT,
    "tokenize.split_seed": _TEXT,
}
_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


class SpaceError(ValueError):
    """The space is wrong; the message names file, key, value and remedy in one line."""


@dataclass(frozen=True)
class Dimension:
    """A parameter and the values that it may take: `choices`, or a range from `low` to `high`."""

    key: str
    choices: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False
    whole: bool = False  # integers only

    @property
    def is_ordered(self) -> bool:
        """Whether choices are numbers, of which neighbours are alike."""
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.choices)

    @property
    def distribution(self) -> "BaseDistribution":
        """For Optuna, which chooses among the positions of choices."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices and self.is_ordered:
            return IntDistribution(0, len(self.choices) - 1)
        if self.choices:
            return CategoricalDistribution(range(len(self.choices)))
        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)

    def decode(self, number: Any) -> Any:
        """The value for a number that Optuna chose; one of a range of floats has three digits."""
        if self.choices:
            return self.choices[int(number)]
        if self.whole:
            return int(number)
        return min(max(float(f"{number:.{_DIGITS}g}"), self.low), self.high)

    def encode(self, value: Any) -> Any:
        """Optuna's number for a value. Raises ValueError for one that is outside."""
        if self.choices:
            return self.choices.index(value)
        if not self.low <= value <= self.high:
            raise ValueError(value)
        return value

    def draw(self, rng: random.Random) -> Any:
        """A random value."""
        if self.choices:
            return rng.choice(self.choices)
        if self.log:
            number = exp(rng.uniform(log(self.low), log(self.high)))
            return self.decode(min(max(round(number) if self.whole else number, self.low), self.high))
        return (
            rng.randint(int(self.low), int(self.high)) if self.whole else self.decode(rng.uniform(self.low, self.high))
        )

    @property
    def all_values(self) -> tuple[Any, ...] | range | None:
        """All values; None for a range of floats."""
        if self.choices:
            return self.choices
        return range(int(self.low), int(self.high) + 1) if self.whole else None

    def __str__(self) -> str:
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        return f"{self.low} to {self.high}" + (", log scale" if self.log else "")


@dataclass(frozen=True)
class Space:
    """Dimensions and constraints, around the parameters of params.yaml."""

    path: Path
    params: Params
    dimensions: tuple[Dimension, ...]
    constraints: tuple[str, ...]

    @property
    def current(self) -> Values:
        """The values in params.yaml."""
        flat = flatten(self.params)
        return {dimension.key: flat[dimension.key] for dimension in self.dimensions}

    @cached_property
    def combinations(self) -> list[Values] | None:
        """All combinations that the constraints and params.yaml's rules allow; None if they are too many."""
        keys = [dimension.key for dimension in self.dimensions]
        values = [found for d in self.dimensions if (found := d.all_values) is not None]
        if len(values) < len(keys) or prod(map(len, values)) > _MANY:
            return None
        combined = (dict(zip(keys, each, strict=True)) for each in product(*values))
        return [each for each in combined if self.conflict(each) is None]

    def conflict(self, values: Values) -> str | None:
        """Which constraint, or which rule of params.yaml, these values break; None if they may be tried."""
        try:
            flat = flatten(with_values(self.params, values, self.path))
        except ParamsError as error:
            return str(error)
        return next((f"{self.path}: constraint {c!r}" for c in self.constraints if not holds(c, flat)), None)

    def draws(self, seed: int) -> Iterator[Values]:
        """Random combinations that may be tried; ends where nearly none may."""
        rng = random.Random(seed)
        for _ in range(_MANY):
            values = {dimension.key: dimension.draw(rng) for dimension in self.dimensions}
            if self.conflict(values) is None:
                yield values


def load_space(path: Path, params: Params) -> Space:
    """Reads and checks a space. Raises SpaceError, ParamsError."""
    try:
        content = YAML(typ="safe", pure=True).load(read_bytes(path, _LARGEST_FILE).decode("utf-8"))
    except (YAMLError, ValueError, TypeError, RecursionError) as error:
        raise SpaceError(f"{path} is not valid YAML ({' '.join(str(error).split())[:200]}); correct it") from error
    if not isinstance(content, dict):
        raise SpaceError(f"{path} is empty; docs/sweeps.md shows what to write")
    for name in content:
        if name not in ("parameters", "constraints"):
            raise SpaceError(f"{path}: {name} is not a known key; {suggestion(name, ['parameters', 'constraints'])}")
    parameters, constraints = content.get("parameters"), content.get("constraints") or []
    if not isinstance(parameters, dict) or not parameters:
        raise SpaceError(
            f"{path}: parameters is missing; add it, with a key of params.yaml and its values in each line"
        )
    if not isinstance(constraints, list) or not all(isinstance(each, str) for each in constraints):
        raise SpaceError(f"{path}: constraints must be a list of conditions such as model.n_head < 4")
    space = Space(
        path, params, tuple(_dimension(path, params, *each) for each in parameters.items()), tuple(constraints)
    )
    for constraint in constraints:
        _check_constraint(path, constraint, flatten(params))
    if not space.combinations and next(space.draws(0), None) is None:
        reason = space.conflict({dimension.key: dimension.draw(random.Random(0)) for dimension in space.dimensions})
        raise SpaceError(f"no combination may be tried: {reason}")
    return space


def _dimension(path: Path, params: Params, key: str, given: Any) -> Dimension:
    """One line of the space, checked."""
    if not isinstance(key, str) or "." not in key:
        raise SpaceError(f"{path}: {key} is not a key of params.yaml; write section.key, such as train.learning_rate")
    if isinstance(given, list):
        dimension = _choices(path, key, given)
        values: list[Any] = given
    elif isinstance(given, dict):
        dimension = _range(path, key, given, flatten(params).get(key))
        values = [dimension.low, dimension.high]
    else:
        raise SpaceError(f"{path}: {key} = {given!r} is one value; write a list, or {{low: …, high: …, log: true}}")
    for value in values:
        with_values(params, {key: value}, path, combined=False)
    if key.partition(".")[0] not in _SECTIONS:
        raise SpaceError(f"{path}: {key} is no hyperparameter; a sweep takes keys of {', '.join(_SECTIONS)}")
    if key in _SHARED:
        raise SpaceError(f"{path}: {key} cannot differ within a sweep: {_SHARED[key]}; remove the line")
    return dimension


def _choices(path: Path, key: str, given: list[Any]) -> Dimension:
    if not given or len({repr(value) for value in given}) < len(given):
        raise SpaceError(f"{path}: {key} = {given} is {'empty' if not given else 'a list with a value twice'}; mend it")
    dimension = Dimension(key, tuple(given))
    return Dimension(key, tuple(sorted(given))) if dimension.is_ordered else dimension


def _range(path: Path, key: str, given: dict[str, Any], current: Any) -> Dimension:
    names = ["low", "high", "log"]
    for name in given:
        if name not in names:
            raise SpaceError(f"{path}: {key}.{name} is not a known key; {suggestion(f'{key}.{name}', names)}")
    low, high, log = given.get("low"), given.get("high"), given.get("log", False)
    numbers = [value for value in (low, high) if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < 2 or not numbers[0] < numbers[1]:
        raise SpaceError(f"{path}: {key} has low = {low} and high = {high}; give two numbers, the lower one as low")
    if not isinstance(log, bool) or (log and numbers[0] <= 0):
        raise SpaceError(f"{path}: {key} has log = {log} with low = {low}; a log scale needs true and a low above 0")
    whole = all(isinstance(value, int) for value in numbers) and not isinstance(current, float)
    return Dimension(key, (), numbers[0], numbers[1], log, whole)


# --- constraints: comparisons and arithmetic with keys of params.yaml


def evaluate(constraint: str, flat: Mapping[str, Any]) -> Any:
    """The value of an expression, where "train.learning_rate" is the parameter. Raises SpaceError for other syntax."""

    def value(node: ast.AST) -> Any:
        match node:
            case ast.Expression():
                return value(node.body)
            case ast.Constant(value=int() | float() | str() | None):
                return node.value
            case ast.Attribute(value=ast.Name(id=section), attr=name):
                key = f"{section}.{name}"
                if key not in flat:
                    raise SpaceError(f"{key} is not a key of params.yaml; {suggestion(key, _names(section, flat))}")
                return flat[key]
            case ast.BinOp() if type(node.op) in _OPERATORS:
                return _OPERATORS[type(node.op)](value(node.left), value(node.right))
            case ast.UnaryOp() if type(node.op) in _OPERATORS:
                return _OPERATORS[type(node.op)](value(node.operand))
            case ast.BoolOp():
                join = all if isinstance(node.op, ast.And) else any
                return join(value(each) for each in node.values)
            case ast.Compare() if all(type(op) in _OPERATORS for op in node.ops):
                terms = [value(each) for each in (node.left, *node.comparators)]
                pairs = zip(node.ops, terms, terms[1:], strict=False)
                return all(_OPERATORS[type(op)](left, right) for op, left, right in pairs)
        raise SpaceError("write comparisons of keys and numbers, with + - * / // % and, or, not")

    return value(ast.parse(constraint, mode="eval"))


def holds(constraint: str, flat: Mapping[str, Any]) -> bool:
    """Whether parameters meet a constraint; none that cannot be computed with them, such as null < 1."""
    try:
        return bool(evaluate(constraint, flat))
    except (TypeError, ArithmeticError):
        return False


def _names(section: str, flat: Mapping[str, Any]) -> list[str]:
    """The keys of a section, or the sections if it is none."""
    names = [key.partition(".")[2] for key in flat if key.startswith(f"{section}.")]
    return names or sorted({key.partition(".")[0] for key in flat})


def _check_constraint(path: Path, constraint: str, flat: Mapping[str, Any]) -> None:
    try:
        evaluate(constraint, flat)
    except (SyntaxError, TypeError, ArithmeticError, RecursionError, SpaceError) as error:
        reason = str(error) if isinstance(error, SpaceError) else "it is not a condition on numbers"
        raise SpaceError(f"{path}: constraint {constraint!r} is invalid: {reason}") from error
