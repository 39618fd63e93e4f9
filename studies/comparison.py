"""What losses of several seeds can tell: means with intervals, differences paired by seed, and a verdict in words.

Two runs with one seed read the same data in the same order, and begin with the same weights where they have the same
matrices in the same order: everything here is about the differences of such pairs.
Losses are in nats a token. Intervals and p-values are Student's t as scipy computes it, two-sided, which takes the
differences of the seeds to be normal and independent.
"""

import math
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
POWER = 0.8
DIFFERENCE = 0.01  # nats a token: the difference for which the necessary number of seeds is stated


@dataclass(frozen=True)
class Mean:
    """A mean over n seeds, with their standard deviation, its interval and a t-test; None where n is too small."""

    n: int
    mean: float | None
    sd: float | None = None  # of one seed, not of the mean
    low: float | None = None
    high: float | None = None
    p: float | None = None  # of the hypothesis that the mean is zero

    @property
    def half_width(self):
        """Half of the interval, or None."""
        return None if self.low is None else (self.high - self.low) / 2


@dataclass(frozen=True)
class Comparison:
    """An arm against its control."""

    difference: Mean  # arm − control over the seeds that both have: below zero the arm is better
    p_holm: float | None  # difference.p, adjusted for the number of comparisons made together
    # To see a difference of DIFFERENCE with probability POWER: the number of seeds if their standard deviation is the
    # true one, and if that is at the lower or upper end of its interval.
    seeds_needed: tuple[int, int, int] | None

    @property
    def is_clear(self):
        """Whether the difference can be told from zero."""
        return self.p_holm is not None and self.p_holm < 1 - CONFIDENCE and self.difference.sd > 0

    @property
    def verdict(self):
        """What the comparison says, in words."""
        d = self.difference
        if d.n == 0:
            return "no finished seed in common with the control"
        if d.n == 1:
            return "one seed cannot tell"
        if d.sd == 0:
            return f"{'the same' if d.mean == 0 else 'the same difference'} in each of {d.n} seeds"
        if self.is_clear:
            return "better" if d.mean < 0 else "worse"
        text = f"not distinguishable with {d.n} seeds"
        if d.p < 1 - CONFIDENCE:
            text += " among so many comparisons"
        needed, least, most = self.seeds_needed
        if most <= d.n:
            return f"{text}, which would do for a difference of {DIFFERENCE:g}"
        if needed <= d.n:
            return f"{text}, which may do for a difference of {DIFFERENCE:g} ({least:,} to {most:,} are needed)"
        return f"{text}; about {needed:,} ({least:,} to {most:,}) would be needed to see a difference of {DIFFERENCE:g}"


def summarise(values):
    """The Mean of values, one a seed."""
    from scipy import stats

    values = np.array(list(values), dtype=float)
    if len(values) < 2:
        return Mean(len(values), float(values[0]) if len(values) else None)
    mean, sd = float(values.mean()), float(values.std(ddof=1))
    if np.ptp(values) == 0:  # runs that are the same to the last bit: a t-test would divide by zero
        return Mean(len(values), mean, 0.0, mean, mean, 1.0 if mean == 0 else 0.0)
    test = stats.ttest_1samp(values, 0.0)
    interval = test.confidence_interval(CONFIDENCE)
    return Mean(len(values), mean, sd, float(interval.low), float(interval.high), float(test.pvalue))


def band(values):
    """(mean, low, high) over the seeds of values, (seeds, n): the mean and its interval, which is None for one seed."""
    from scipy import stats

    values = np.asarray(values, dtype=float)
    mean = values.mean(axis=0)
    if len(values) < 2:
        return mean, None, None
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stats.sem(values, axis=0)
    return mean, mean - half, mean + half


def difference(losses, control):
    """The Mean of losses − control over the seeds of both; each a dict from seed to loss."""
    return summarise(losses[seed] - control[seed] for seed in losses if seed in control)


def compare(pairs):
    """A Comparison for each (losses, control) in pairs, dicts from seed to loss; together they are one family."""
    differences = [difference(losses, control) for losses, control in pairs]
    adjusted = holm([d.p for d in differences])
    family = sum(p is not None for p in adjusted)
    return [
        Comparison(d, p, None if d.sd is None else seeds_range(d, (1 - CONFIDENCE) / family))
        for d, p in zip(differences, adjusted, strict=True)
    ]


def slope(differences):
    """The Mean over seeds of the slope of their differences against log2 of a size: what a doubling changes.

    differences: size (a positive number) -> seed -> difference. The seeds are those of all sizes, of which there must
    be two.
    """
    sizes = sorted(differences)
    seeds = set.intersection(*(set(differences[size]) for size in sizes))
    doublings = np.log2(sizes)
    return summarise(
        np.polyfit(doublings, [differences[size][seed] for size in sizes], deg=1)[0] for seed in sorted(seeds)
    )


def holm(p_values):
    """Holm's step-down adjustment of p-values; None stays None and does not count.

    Rejecting what is below a level keeps the probability of any false rejection at that level, however the tests
    depend on each other (S. Holm, 1979).
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted, largest = [None] * len(p_values), 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = largest
    return adjusted


def seeds_needed(sd, level=1 - CONFIDENCE, difference=DIFFERENCE):
    """The least number of seeds with which a paired t-test at a level sees `difference` with probability POWER.

    sd: the standard deviation of the paired differences, taken for the true one. The search begins at the normal
    approximation, which is never too large, and goes by scipy's noncentral t-distribution.
    """
    from scipy import stats

    effect = abs(difference) / sd if sd else math.inf
    n = max(2, math.floor(((stats.norm.ppf(1 - level / 2) + stats.norm.ppf(POWER)) / effect) ** 2))
    while True:
        critical = stats.t.ppf(1 - level / 2, n - 1)
        noncentrality = min(effect * math.sqrt(n), 50 * critical)  # beyond, the power is 1 and scipy's range ends
        if stats.nct.sf(critical, n - 1, noncentrality) >= POWER:
            return n
        n += 1


def seeds_range(mean, level):
    """seeds_needed for the standard deviation of a Mean, and for the ends of that one's interval (chi-squared)."""
    from scipy import stats

    tails = stats.chi2.ppf([(1 + CONFIDENCE) / 2, (1 - CONFIDENCE) / 2], mean.n - 1)
    low, high = mean.sd * np.sqrt((mean.n - 1) / tails)
    return tuple(seeds_needed(float(sd), level) for sd in (mean.sd, low, high))
