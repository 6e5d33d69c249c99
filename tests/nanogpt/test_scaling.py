import math

import numpy as np
import pytest

from nanogpt.scaling import Law, Point, fit

TRUE = Law(1.04, 60.0, 0.45, 900.0, 0.55)
SIZES, LENGTHS = (45_000, 164_000, 430_000), (200_000, 400_000, 800_000, 1_600_000)
# Hoffmann et al. 2022, table A3: FLOPs, parameters and tokens of approach 3
TABLE = [
    (2.21e19, 400e6, 9.2e9),
    (1.62e20, 1e9, 27.1e9),
    (2.46e22, 10e9, 410.1e9),
    (1.71e24, 67e9, 4.1e12),
    (1.26e25, 175e9, 12.0e12),
]


def losses(noise: float = 0.0) -> list[Point]:
    draw = np.random.default_rng(3).normal(size=(3, 4))
    return [
        Point(n, d, TRUE.loss(n, d) * math.exp(noise * draw[i, j]))
        for i, n in enumerate(SIZES)
        for j, d in enumerate(LENGTHS)
    ]


def test_the_constants_come_back():
    found = fit(losses(), samples=2).law
    for constant in ("floor", "a", "alpha", "b", "beta"):
        assert getattr(found, constant) == pytest.approx(getattr(TRUE, constant), rel=1e-4)


def test_a_run_that_failed_does_not_move_the_law():
    points = losses()
    points[5] = Point(points[5].parameters, points[5].tokens, 1.3 * points[5].loss)
    assert fit(points, samples=2).law.floor == pytest.approx(TRUE.floor, abs=0.015)


def test_intervals_hold_the_truth_and_a_prediction_far_from_the_runs():
    found = fit(losses(noise=0.002), samples=60)
    for constant in ("floor", "alpha", "beta"):
        low, high = found.interval(constant)
        assert low <= getattr(TRUE, constant) <= high
    low, high = found.prediction(900_000, 6e6)
    assert low <= TRUE.loss(900_000, 6e6) <= high
    assert high - low < 0.1
    assert found == fit(losses(noise=0.002), samples=60)  # the same each time


def test_chinchillas_table_comes_from_its_constants():
    """The constants are those of the paper's source, with the digits that it does not print (Besiroglu et al. 2024)."""
    law = Law(1.6934, 406.4, 0.3392, 410.7, 0.2849)
    for flops, parameters, tokens in TABLE:
        assert law.optimum(flops) == (pytest.approx(parameters, rel=0.07), pytest.approx(tokens, rel=0.07))


def test_the_optimum_is_the_lowest_loss_of_its_compute():
    n, d = TRUE.optimum(1e12)
    assert 6 * n * d == pytest.approx(1e12)
    assert all(TRUE.loss(n, d) < TRUE.loss(n * by, d / by) for by in (0.9, 1.1))


@pytest.mark.parametrize("few", [losses()[:4], losses()[:8], [p for p in losses() if p.tokens < 800_000], []])
def test_too_few_runs_are_refused(few):
    with pytest.raises(ValueError, match=r"do not determine the 5 constants of a scaling law: 6 trainings, of 3 sizes"):
        fit(few)
