"""Statistics over seeds: means with intervals, differences paired by seed, and a verdict in words.

Runs of two arms with the same seed read the same data in the same order, and each matrix that both have starts from the
same weights (`GPT.draw_weights`). So the statistics are of the differences of such pairs.
Losses are in nats per token. Intervals and p-values are Student's t (scipy's), two-sided; they assume that the
differences of the seeds are normal and independent.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

CONFIDENCE = 0.95
POWER = 0.8
DIFFERENCE = 0.01  # nats per token: the difference for which the number of seeds needed is stated


@dataclass(frozen=True)
class Mean:
    """A mean over n seeds, with its 95 % interval and a t-test; None where n is too small for one."""

    n: int
    mean: float | None
    sd: float | None = None  # the standard deviation over seeds, not that of the mean
    low: float | None = None  # the interval's ends
    high: float | None = None
    p: float | None = None  # of the null hypothesis that the true mean is zero

    @property
    def half_width(self):
        """Half of the interval's width, or None."""
        return None if self.low is None else (self.high - self.low) / 2


@dataclass(frozen=True)
class Equivalence:
    """Whether an arm's loss is within a margin of its control's: two one-sided t-tests (D. J. Schuirmann, 1987)."""

    within: float  # the margin as a fraction of the control's mean loss
    margin: float  # nats per token
    low: float  # the ends of the 90 % interval, which lies within ± margin where p is below 5 %
    high: float
    p: float  # of the null hypothesis that the true difference is at least as large as the margin
    p_holm: float  # p, adjusted for the number of comparisons made together

    @property
    def is_shown(self):
        """Whether the arms are equal within the margin."""
        return self.p_holm < 1 - CONFIDENCE


@dataclass(frozen=True)
class Comparison:
    """An arm against its control."""

    difference: Mean  # arm − control over the seeds that both have: below zero the arm is better
    p_holm: float | None  # difference.p, adjusted for the number of comparisons made together
    # The number of seeds that detects a difference of DIFFERENCE with probability POWER, if the true standard deviation
    # is that of these seeds, and if it is at the lower or upper end of its interval.
    seeds_needed: tuple[int, int, int] | None
    equivalence: Equivalence | None = None  # None where no margin was fixed, or where there are too few seeds

    @property
    def is_equal(self):
        """Whether the difference is shown to be within the margin that was fixed before."""
        return self.equivalence is not None and self.equivalence.is_shown

    @property
    def is_significant(self):
        """Whether the difference is significantly different from zero."""
        return self.p_holm is not None and self.p_holm < 1 - CONFIDENCE and self.difference.sd > 0

    @property
    def conclusion(self):
        """The verdict in a few words, without numbers of seeds needed."""
        d = self.difference
        if d.n == 0:
            return "inconclusive: no finished seed in common"
        if d.n == 1:
            return "inconclusive: one seed"
        if d.sd == 0:
            return f"{'identical' if d.mean == 0 else 'inconclusive: the same difference'} in each of {d.n} seeds"
        if self.is_significant:
            conclusion = "better" if d.mean < 0 else "worse"
            return f"{conclusion}, but equal within {self.within}" if self.is_equal else conclusion
        if self.is_equal:
            return f"equal within {self.within}"
        corrected = " after Holm's correction" if d.p < 1 - CONFIDENCE else ""
        if self.seeds_needed[-1] <= d.n:
            return f"no difference is seen with {d.n} seeds{corrected}"
        return f"{d.n} seeds are not enough to call it{corrected}"

    @property
    def within(self):
        """The margin of the equivalence, as text: '0.5 %'."""
        return f"{100 * self.equivalence.within:g} %"

    @property
    def power_note(self):
        """How many seeds would detect a difference of DIFFERENCE, as text; '' where the conclusion needs no note."""
        if self.is_significant or self.is_equal or not self.difference.sd:
            return ""
        needed, least, most = self.seeds_needed
        if most <= self.difference.n:
            return f"enough seeds to detect a difference of {DIFFERENCE:g}"
        if needed <= self.difference.n:
            return f"detecting a difference of {DIFFERENCE:g} needs {least:,} to {most:,} seeds"
        return f"detecting a difference of {DIFFERENCE:g} needs about {needed:,} seeds ({least:,} to {most:,})"

    @property
    def verdict(self):
        """The conclusion and the power note."""
        return f"{self.conclusion}; {self.power_note}" if self.power_note else self.conclusion


def summarise(values):
    """The Mean of values, one for each seed."""
    from scipy import stats

    values = np.array(list(values), dtype=float)
    if len(values) < 2:
        return Mean(len(values), float(values[0]) if len(values) else None)
    mean, sd = float(values.mean()), float(values.std(ddof=1))
    if np.ptp(values) == 0:  # bitwise identical runs: a t-test would divide by zero
        return Mean(len(values), mean, 0.0, mean, mean, 1.0 if mean == 0 else 0.0)
    test = stats.ttest_1samp(values, 0.0)
    interval = test.confidence_interval(CONFIDENCE)
    return Mean(len(values), mean, sd, float(interval.low), float(interval.high), float(test.pvalue))


def band(values):
    """(mean, low, high), each (n,), of values, (seeds, n): the mean over seeds and its interval; None for one seed."""
    from scipy import stats

    values = np.asarray(values, dtype=float)
    mean = values.mean(axis=0)
    if len(values) < 2:
        return mean, None, None
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stats.sem(values, axis=0)
    return mean, mean - half, mean + half


def difference(losses, control):
    """The Mean of losses − control over the seeds that both have; each is a dict, seed -> loss."""
    return summarise(losses[seed] - control[seed] for seed in losses if seed in control)


def compare(pairs, equal_within=None):
    """A Comparison for each (losses, control) in pairs, dicts seed -> loss; together they are one family of tests.

    equal_within: the fraction of the control's mean loss within which two arms count as equal; None: not fixed.
    """
    differences = [difference(losses, control) for losses, control in pairs]
    adjusted = holm([d.p for d in differences])
    family = sum(p is not None for p in adjusted)
    equal = [
        equivalence(d, equal_within, np.mean([control[seed] for seed in losses if seed in control]))
        if equal_within and d.sd
        else None
        for d, (losses, control) in zip(differences, pairs, strict=True)
    ]
    both = holm([each and each.p for each in equal])
    equal = [each and replace(each, p_holm=p) for each, p in zip(equal, both, strict=True)]
    return [
        Comparison(d, p, None if d.sd is None else seeds_range(d, (1 - CONFIDENCE) / family), same)
        for d, p, same in zip(differences, adjusted, equal, strict=True)
    ]


def equivalence(mean, within, reference):
    """The Equivalence of the Mean of paired differences. within: the margin, a fraction of the control's loss."""
    from scipy import stats

    margin, error = within * abs(reference), mean.sd / math.sqrt(mean.n)
    p = float(stats.t.sf((margin - abs(mean.mean)) / error, mean.n - 1))
    reach = float(stats.t.ppf(CONFIDENCE, mean.n - 1)) * error
    return Equivalence(within, float(margin), mean.mean - reach, mean.mean + reach, p, p)


def slope(differences):
    """The Mean over seeds of the slope of the differences against log2 of a size: the change per doubling.

    differences: size (a positive number) -> seed -> difference. Takes the seeds that all sizes have; there must be at
    least two sizes.
    """
    sizes = sorted(differences)
    seeds = set.intersection(*(set(differences[size]) for size in sizes))
    doublings = np.log2(sizes)
    return summarise(
        np.polyfit(doublings, [differences[size][seed] for size in sizes], deg=1)[0] for seed in sorted(seeds)
    )


def holm(p_values):
    """Holm's step-down adjustment of p-values; None stays None and does not count.

    Rejecting those below a level keeps the probability of any false rejection at that level, whatever the dependence
    between the tests (S. Holm, 1979).
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted, largest = [None] * len(p_values), 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = largest
    return adjusted


def seeds_needed(sd, level=1 - CONFIDENCE, difference=DIFFERENCE):
    """The least number of seeds with which a paired t-test at a level detects `difference` with probability POWER.

    sd: the true standard deviation of the paired differences. The search starts from the normal approximation, which is
    never too large, and computes the power with scipy's noncentral t-distribution.
    """
    from scipy import stats

    effect = abs(difference) / sd if sd else math.inf
    n = max(2, math.floor(((stats.norm.ppf(1 - level / 2) + stats.norm.ppf(POWER)) / effect) ** 2))
    while True:
        critical = stats.t.ppf(1 - level / 2, n - 1)
        noncentrality = min(effect * math.sqrt(n), 50 * critical)  # beyond this the power is 1, and scipy returns NaN
        if stats.nct.sf(critical, n - 1, noncentrality) >= POWER:
            return n
        n += 1


def seeds_range(mean, level):
    """seeds_needed for the standard deviation of a Mean, and for both ends of its interval (chi-squared)."""
    from scipy import stats

    tails = stats.chi2.ppf([(1 + CONFIDENCE) / 2, (1 - CONFIDENCE) / 2], mean.n - 1)
    low, high = mean.sd * np.sqrt((mean.n - 1) / tails)
    return tuple(seeds_needed(float(sd), level) for sd in (mean.sd, low, high))
