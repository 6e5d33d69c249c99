"""Whether two settings differ, or only their seeds: interval, test, verdict, and the number of seeds for a verdict.

The values are losses, so a negative difference is a gain. A seed that two settings share gives both the same order of
data, so differences are taken seed by seed.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

ALPHA = 0.01  # error rate of a verdict: how often it may call equal settings different
POWER = 0.9  # how often the suggested number of seeds would show a difference of the observed size
MOST_SEEDS = 10_000  # larger numbers are not suggested

Losses = Mapping[int, float]  # seed -> loss


@dataclass(frozen=True)
class Difference:
    """The difference of a setting's mean loss from a reference's, and its uncertainty.

    `low` and `high` bound the mean with confidence 1 - ALPHA, and `p` is that of a two-sided t test; None for one seed.
    """

    mean: float
    seeds: int  # of each setting, or of the one with fewer
    paired: bool  # compared by shared seeds; otherwise by Welch's test over all seeds
    effect: float | None = None  # `mean` over its standard deviation, for seeds_needed
    low: float | None = None
    high: float | None = None
    p: float | None = None
    more_seeds: int | None = None  # needed in each setting to show a difference of this size; None: none, or unknown

    @property
    def verdict(self) -> str:
        """better | worse | cannot tell"""
        if self.p is None or self.p >= ALPHA:
            return "cannot tell"
        return "better" if self.mean < 0 else "worse"


def difference(losses: Losses, reference: Losses) -> Difference:
    """Compares a setting's losses with a reference's.

    Uses a paired t test if at least half of the seeds of the smaller one are shared, and Welch's test otherwise. Both
    assume that losses are roughly normally distributed over seeds.
    """
    from scipy import stats

    shared = sorted(losses.keys() & reference.keys())
    first, second = list(losses.values()), list(reference.values())
    n, mean = min(len(first), len(second)), fmean(first) - fmean(second)
    paired = len(shared) >= 2 and 2 * len(shared) >= n
    if paired:
        pairs = [losses[seed] - reference[seed] for seed in shared]
        n, mean, spread = len(pairs), fmean(pairs), stdev(pairs)
    elif n < 2:
        return Difference(mean, n, paired)
    else:
        spread = math.sqrt((stdev(first) ** 2 + stdev(second) ** 2) / 2)
    if spread == 0:  # the seed has no effect, as without training
        return Difference(mean, n, paired, None, mean, mean, 1.0 if mean == 0 else 0.0)
    test = stats.ttest_1samp(pairs, 0) if paired else stats.ttest_ind(first, second, equal_var=False)
    interval = test.confidence_interval(1 - ALPHA)
    return Difference(mean, n, paired, mean / spread, float(interval.low), float(interval.high), float(test.pvalue))


def corrected(differences: Sequence[Difference], family: int) -> list[Difference]:
    """Corrects each p for multiple comparisons, and adds the number of seeds that are missing for a verdict.

    Holm's step-down method (1979) for the smallest p of a `family` of tests. Where the reference is the best of m
    settings, chosen by these losses, the family is all m (m - 1) / 2 pairs that might have been compared.
    """
    order = sorted((d.p, i) for i, d in enumerate(differences) if d.p is not None)
    results, highest = list(differences), 0.0
    for rank, (p, i) in enumerate(order):
        highest = min(1.0, max(highest, p * max(1, family - rank)))
        found = replace(differences[i], p=highest)
        if highest >= ALPHA and found.effect:
            needed = seeds_needed(found.effect, ALPHA / max(1, family - rank), found.paired)
            found = replace(found, more_seeds=None if needed is None else max(1, needed - found.seeds))
        results[i] = found
    return results


def seeds_needed(effect: float, alpha: float, paired: bool) -> int | None:
    """The number of seeds per setting with which a t test at level alpha finds a difference in 9 of 10 cases.

    `effect` is the difference over a standard deviation: for pairs that of the seeds' differences, otherwise that of
    the losses of one setting. None for more than 10,000. The power is that of the noncentral t distribution
    (Cohen 1988, chapter 2).
    """
    from scipy import stats

    def power(n: int) -> float:
        freedom = n - 1 if paired else 2 * n - 2
        noncentrality = abs(effect) * math.sqrt(n if paired else n / 2)
        return float(stats.nct.sf(stats.t.isf(alpha / 2, freedom), freedom, noncentrality))

    if not power(MOST_SEEDS) >= POWER:
        return None
    return bisect_left(range(MOST_SEEDS), POWER, lo=2, key=power)  # power grows with n


# --- looking after each seed


@dataclass(frozen=True)
class Evidence:
    """The evidence of the pairs of losses so far; valid after each pair, however often one looks.

    `odds` are the Bayes factor of a t test whose effect has a standard normal prior: how much more likely the
    differences are if the settings differ. Whatever the spread, the probability that two equal settings ever reach odds
    of 1 / a is at most a (Hendriksen, de Heide & Grünwald 2021). `low` and `high` bound the mean difference with 99 %
    confidence at all looks together; they are infinite until the odds can reach 100.
    """

    pairs: int
    mean: float
    odds: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """better | worse | cannot tell"""
        if self.odds < 1 / ALPHA:
            return "cannot tell"
        return "better" if self.mean < 0 else "worse"


def evidence(differences: Sequence[float]) -> Evidence:
    """The evidence of the differences between paired losses."""
    n = len(differences)
    mean = fmean(differences) if n else 0.0
    spread = stdev(differences) if n > 1 else 0.0
    if n < 2 or spread == 0:  # without a spread there is no estimate of the variance
        return Evidence(n, mean, 1.0, -math.inf, math.inf)
    freedom, ratio = n - 1, 1.0 + n
    error = spread / math.sqrt(n)
    x = (mean / error) ** 2 / freedom
    log_odds = (freedom + 1) / 2 * (math.log1p(x) - math.log1p(x / ratio)) - math.log(ratio) / 2
    # The odds are 1 / ALPHA where (1 + x) / (1 + x / ratio) equals this bound.
    bound = (math.sqrt(ratio) / ALPHA) ** (2 / (freedom + 1))
    half = error * math.sqrt(freedom * (bound - 1) / (1 - bound / ratio)) if bound < ratio else math.inf
    return Evidence(n, mean, math.exp(min(log_odds, 700.0)), mean - half, mean + half)
