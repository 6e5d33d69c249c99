import math

import numpy as np
import pytest
from scipy import integrate, stats

from tracking.significance import ALPHA, Difference, corrected, difference, evidence, seeds_needed


def test_shared_seeds_are_compared_in_pairs():
    found = difference({1: 5.0, 2: 7.0, 3: 9.0}, {1: 4.0, 2: 5.0, 3: 6.0, 4: 100.0})
    assert (found.mean, found.paired, found.seeds, found.effect) == (2.0, True, 3, 2.0)
    assert found.p == pytest.approx(0.0741799)  # t = 2 * sqrt(3), two degrees of freedom
    assert (found.low, found.high) == pytest.approx((2 - 9.924843 / math.sqrt(3), 2 + 9.924843 / math.sqrt(3)))


def test_different_seeds_are_compared_by_welchs_test():
    found = difference({1: 1.0, 2: 2.0, 3: 3.0}, {4: 2.0, 5: 4.0, 6: 6.0})
    freedom = (1 / 3 + 4 / 3) ** 2 / ((1 / 3) ** 2 / 2 + (4 / 3) ** 2 / 2)
    t = -2 / math.sqrt(1 / 3 + 4 / 3)
    assert not found.paired
    assert found.p == pytest.approx(2 * stats.t.cdf(t, freedom))
    assert found.effect == pytest.approx(-2 / math.sqrt(2.5))
    half = stats.t.ppf(0.995, freedom) * math.sqrt(5 / 3)
    assert (found.low, found.high) == pytest.approx((-2 - half, -2 + half))


@pytest.mark.parametrize(
    ("losses", "reference"),
    [({1: 1.0}, {1: 2.0}), ({1: 1.0}, {1: 2.0, 2: 2.1}), ({1: 1.0, 2: 1.2}, {3: 2.0})],
    ids=["one each", "one against two", "two against one"],
)
def test_one_seed_gives_no_verdict(losses, reference):
    found = difference(losses, reference)
    assert (found.p, found.low, found.high, found.verdict) == (None, None, None, "cannot tell")
    assert corrected([found], 1)[0].more_seeds is None


@pytest.mark.parametrize(("by", "verdict"), [(0.5, "worse"), (-0.5, "better"), (0.0, "cannot tell")])
def test_if_the_seed_has_no_effect_any_difference_is_certain(by, verdict):
    assert difference({1: 1 + by, 2: 1 + by}, {1: 1.0, 2: 1.0}).verdict == verdict
    assert difference({1: 1 + by, 2: 1 + by}, {3: 1.0, 4: 1.0}).verdict == verdict


def test_the_smallest_p_is_corrected_for_all_comparisons():
    raw = [Difference(0.1, 5, True, 0.5, p=p) for p in (0.02, 0.001, 0.004)]
    # Holm: 0.001 * 4, then 0.004 * 3, then 0.02 * 2, each at least the one before.
    assert [d.p for d in corrected(raw, 4)] == pytest.approx([0.04, 0.004, 0.012])
    assert [d.p for d in corrected([Difference(0.1, 5, True, 0.5, p=0.6)], 4)] == [1.0]


def test_the_numbers_of_seeds_are_those_of_published_tables():
    # Cohen 1988, table 2.4.1, and G*Power: d = 0.5 and 1, two-sided 5 %, power 0.9.
    assert seeds_needed(0.5, 0.05, paired=False) == 86
    assert seeds_needed(-0.5, 0.05, paired=True) == 44
    assert seeds_needed(1.0, 0.05, paired=True) == 13
    assert seeds_needed(0.001, 0.01, paired=True) is None


def test_an_unclear_difference_says_how_many_more_seeds_would_show_it():
    (found,) = corrected([difference({1: 1.0, 2: 1.3, 3: 1.1}, {1: 0.9, 2: 1.1, 3: 1.05})], 3)
    assert found.effect is not None
    needed = seeds_needed(found.effect, ALPHA / 3, paired=True)
    assert needed is not None
    assert found.more_seeds == needed - 3
    (clear,) = corrected([difference({1: 2.0, 2: 2.1, 3: 2.05}, {1: 1.0, 2: 1.1, 3: 1.051})], 1)
    assert (clear.verdict, clear.more_seeds) == ("worse", None)


def test_the_odds_are_those_of_a_normal_prior():
    differences = [0.3, -0.1, 0.5, 0.2, 0.4]
    n, t = 5, np.mean(differences) / (np.std(differences, ddof=1) / math.sqrt(5))
    with_effect, _ = integrate.quad(
        lambda effect: stats.nct.pdf(t, n - 1, effect * math.sqrt(n)) * stats.norm.pdf(effect), -8, 8
    )
    assert evidence(differences).odds == pytest.approx(with_effect / stats.t.pdf(t, n - 1), rel=1e-6)


def test_the_interval_ends_where_the_odds_reach_the_limit():
    differences = [0.3, -0.1, 0.5, 0.2, 0.4, 0.25, 0.31]
    found = evidence(differences)
    for end in (found.low, found.high):
        assert evidence([value - end for value in differences]).odds == pytest.approx(1 / ALPHA)


def test_without_a_spread_there_is_no_evidence_yet():
    for differences in ([], [0.2], [0.2, 0.2]):
        found = evidence(differences)
        assert (found.odds, found.low, found.high, found.verdict) == (1.0, -math.inf, math.inf, "cannot tell")


def test_looking_after_each_pair_keeps_the_error_rate_and_finds_a_gain():
    draws = np.random.default_rng(1).normal(size=(600, 30))

    def decided(shift: float) -> list[str]:
        verdicts = []
        for row in draws + shift:
            looks = (evidence(row[:n].tolist()).verdict for n in range(2, 31))
            verdicts.append(next((verdict for verdict in looks if verdict != "cannot tell"), "cannot tell"))
        return verdicts

    assert sum(verdict != "cannot tell" for verdict in decided(0.0)) <= 0.01 * 600
    gains = decided(-1.2)
    assert gains.count("better") >= 0.95 * 600
    assert "worse" not in gains
