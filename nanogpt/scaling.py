"""A scaling law, L(N, D) = E + A / N^alpha + B / D^beta: the loss of N parameters trained on D tokens, fitted to runs.

The form and the fit are those of Hoffmann et al. 2022 (approach 3, arXiv:2203.15556): the sum over runs of Huber's loss
of the logarithms' difference, whose DELTA makes runs that do not fit count little, minimised from many starts, since it
has local minima. Besiroglu et al. 2024 (arXiv:2404.10102) found that theirs had ended before the minimum; this one
ends where no step lowers it.

Intervals come from Rubin's Bayesian bootstrap: the fit is repeated with random weights of the runs. Unlike resampling
it never leaves a constant without the runs that determine it. They hold if the law does: they show what seeds change,
not whether the form is right.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

DELTA = 1e-3  # of Huber's loss, in log(nats)
EXPONENTS = (0.15, 0.4, 0.8, 1.6)  # where alpha and beta start
HIGHEST_EXPONENT = 4.0
CONSTANTS = 5  # of the law
SAMPLES = 200  # of the bootstrap
LEVEL = 0.95


@dataclass(frozen=True)
class Point:
    """What a run adds to the fit: parameters, tokens seen in training, and the loss in nats per token."""

    parameters: int
    tokens: int
    loss: float


@dataclass(frozen=True)
class Law:
    """The constants of L = floor + a / N^alpha + b / D^beta, in nats per token."""

    floor: float
    a: float
    alpha: float
    b: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """The loss of a model of that size trained on so many tokens."""
        return float(self.floor + self.a * parameters**-self.alpha + self.b * tokens**-self.beta)

    def optimum(self, flops: float, per_parameter_and_token: float = 6.0) -> tuple[float, float]:
        """Parameters and tokens of the lowest loss for a number of FLOPs, of which a training takes 6 N D."""
        product = flops / per_parameter_and_token
        ratio = self.alpha * self.a / (self.beta * self.b)
        parameters = (ratio * product**self.beta) ** (1 / (self.alpha + self.beta))
        return parameters, product / parameters


@dataclass(frozen=True)
class Fit:
    """A law, and what other weights of the runs make of it."""

    law: Law
    points: tuple[Point, ...]
    others: tuple[Law, ...]  # of the bootstrap

    @property
    def residuals(self) -> Array:
        """log(loss) - log(law) of each run."""
        return np.array([math.log(p.loss / self.law.loss(p.parameters, p.tokens)) for p in self.points])

    def interval(self, constant: str) -> tuple[float, float]:
        """The interval of a constant, such as "floor"."""
        return _interval([getattr(law, constant) for law in self.others])

    def prediction(self, parameters: float, tokens: float) -> tuple[float, float]:
        """The interval of the loss of one run: that of the law, and a run's distance from it.

        A fit comes nearer to its own runs than to others, so their distances are widened by sqrt(n / (n - 5)).
        """
        n = len(self.points)
        widened = self.residuals * math.sqrt(n / max(1, n - CONSTANTS))
        drawn = np.random.default_rng(1).choice(widened, len(self.others))
        return _interval([o.loss(parameters, tokens) * math.exp(r) for o, r in zip(self.others, drawn, strict=True)])


def _interval(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def fit(points: Sequence[Point], samples: int = SAMPLES) -> Fit:
    """Fits the law. Raises ValueError if the runs do not determine its constants."""
    check_determined([(p.parameters, p.tokens) for p in points])
    n, d, losses = (np.array(column, dtype=float) for column in zip(*map(_row, points), strict=True))
    found = min((_descend(start, n, d, losses) for start in _starts(n, d, losses)), key=lambda each: each[1])[0]
    weights = np.random.default_rng(0).dirichlet(np.ones(len(points)), samples) * len(points)
    others = (_descend(found, n, d, losses, each)[0] for each in weights)
    return Fit(_law(found), tuple(points), tuple(map(_law, others)))


def check_determined(trainings: Sequence[tuple[int, int]]) -> None:
    """Raises ValueError if trainings, as (parameters, tokens), are too few or too alike to determine the law."""
    shapes = len(set(trainings))
    sizes, lengths = (len(set(column)) for column in zip(*trainings, strict=True)) if trainings else (0, 0)
    if shapes <= CONSTANTS or sizes < 3 or lengths < 3:
        raise ValueError(
            f"{shapes} different trainings, of {sizes} sizes and {lengths} numbers of tokens, do not determine the "
            f"{CONSTANTS} constants of a scaling law: {CONSTANTS + 1} trainings, of 3 sizes and 3 numbers of tokens, "
            "are the least"
        )


def _row(point: Point) -> tuple[float, float, float]:
    return math.log(point.parameters), math.log(point.tokens), point.loss


def _law(constants: Array) -> Law:
    """The law of [log E, log A, alpha, log B, beta]."""
    e, a, alpha, b, beta = constants.tolist()
    return Law(math.exp(e), math.exp(a), alpha, math.exp(b), beta)


def _starts(n: Array, d: Array, losses: Array) -> list[Array]:
    """For each pair of exponents the constants that fit best: with them, the law is linear in E, A and B."""
    from scipy.optimize import nnls

    starts = []
    for alpha, beta in itertools.product(EXPONENTS, repeat=2):
        columns = [np.ones_like(n), np.exp(-alpha * (n - n.mean())), np.exp(-beta * (d - d.mean()))]
        linear, _ = nnls(np.stack(columns, axis=1), losses)
        e, a, b = np.log(np.maximum(linear, 1e-3 * losses.min()))
        starts.append(np.array([e, a + alpha * n.mean(), alpha, b + beta * d.mean(), beta]))
    return starts


def _descend(start: Array, n: Array, d: Array, losses: Array, weights: Array | float = 1.0) -> tuple[Array, float]:
    """The constants at the minimum next to a start, and the value there."""
    from scipy.optimize import least_squares

    zero = np.zeros_like(n)
    centre = np.array([0, n.mean(), d.mean()])  # makes A independent of alpha, and B of beta, near the runs

    def parts(x: Array) -> Array:
        return np.exp([x[0] + zero, x[1] - x[2] * (n - centre[1]), x[3] - x[4] * (d - centre[2])])

    def residuals(x: Array) -> Array:
        return np.asarray(np.log(parts(x).sum(0) / losses))

    def slopes(x: Array) -> Array:
        e, a, b = parts(x) / parts(x).sum(0)
        return np.stack([e, a, -a * (n - centre[1]), b, -b * (d - centre[2])], axis=1)

    def huber(z: Array) -> Array:
        far = np.maximum(z, 1.0)
        return np.asarray(
            weights * np.stack([np.where(z > 1, 2 * far**0.5 - 1, z), far**-0.5, -0.5 * far**-1.5 * (z > 1)])
        )

    shift = np.array([0, start[2] * centre[1], 0, start[4] * centre[2], 0])
    bounds = [-20, -20, 0.01, -20, 0.01], [20, 20, HIGHEST_EXPONENT, 20, HIGHEST_EXPONENT]
    inside = np.clip(start - shift, *bounds)
    found = least_squares(residuals, inside, slopes, bounds, loss=huber, f_scale=DELTA, xtol=1e-10, max_nfev=300)
    x = found.x + np.array([0, found.x[2] * centre[1], 0, found.x[4] * centre[2], 0])
    return x, float(found.cost)
