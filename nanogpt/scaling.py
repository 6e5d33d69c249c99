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
BOUNDS = (0.0, 0.0, 0.01, 0.0, 0.01), (math.inf, math.inf, 4.0, math.inf, 4.0)  # of E, A, alpha, B, beta
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
    n, d, losses = (np.array(column) for column in zip(*map(_row, points), strict=True))
    centre = n.mean(), d.mean()  # near the runs, A is then independent of alpha, and B of beta
    runs = _Runs(n - centre[0], d - centre[1], losses)
    found = min((runs.descend(start) for start in runs.starts()), key=lambda each: each[1])[0]
    weights = np.random.default_rng(0).dirichlet(np.ones(len(points)), samples) * len(points)
    others = (runs.descend(found, each)[0] for each in weights)
    return Fit(_law(found, *centre), tuple(points), tuple(_law(other, *centre) for other in others))


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


def _law(constants: Array, n: float, d: float) -> Law:
    """The law of [E, A, alpha, B, beta], where A and B are those at the centre of log N and log D."""
    e, a, alpha, b, beta = constants.tolist()
    return Law(e, a * math.exp(alpha * n), alpha, b * math.exp(beta * d), beta)


@dataclass(frozen=True)
class _Runs:
    """The runs of a fit: log N and log D less their means, and the losses."""

    n: Array
    d: Array
    losses: Array

    def starts(self) -> list[Array]:
        """For each pair of exponents the constants that fit best: with them, the law is linear in E, A and B."""
        from scipy.optimize import nnls

        starts = []
        for alpha, beta in itertools.product(EXPONENTS, repeat=2):
            columns = [np.ones_like(self.n), np.exp(-alpha * self.n), np.exp(-beta * self.d)]
            linear, _ = nnls(np.stack(columns, axis=1), self.losses)
            e, a, b = np.maximum(linear, 0.05 * self.losses.min())  # within the bounds
            starts.append(np.array([e, a, alpha, b, beta]))
        return starts

    def descend(self, start: Array, weights: Array | float = 1.0) -> tuple[Array, float]:
        """The constants at the minimum next to a start, and the value there."""
        from scipy.optimize import least_squares

        def huber(z: Array) -> Array:  # of the squares of residuals / DELTA, with two derivatives
            far = np.maximum(z, 1.0)
            value = np.where(z > 1, 2 * far**0.5 - 1, z)
            return np.asarray(weights * np.stack([value, far**-0.5, -0.5 * far**-1.5 * (z > 1)]))

        found = least_squares(
            lambda x: np.log(self._law(x) / self.losses),
            start,
            self._slopes,
            BOUNDS,
            loss=huber,
            f_scale=DELTA,
            xtol=1e-8,
            max_nfev=300,
        )
        return found.x, float(found.cost)

    def _law(self, x: Array) -> Array:
        e, a, alpha, b, beta = x
        return np.asarray(e + a * np.exp(-alpha * self.n) + b * np.exp(-beta * self.d))

    def _slopes(self, x: Array) -> Array:
        """The derivatives of log(law) by the constants."""
        _, a, alpha, b, beta = x
        by_a, by_b = np.exp(-alpha * self.n), np.exp(-beta * self.d)
        slopes = np.stack([1 + 0 * self.n, by_a, -a * self.n * by_a, by_b, -b * self.d * by_b])
        return np.asarray((slopes / self._law(x)).T)
