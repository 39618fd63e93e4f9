import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from studies import comparison


@pytest.mark.parametrize("n", [3, 5])
def test_the_interval_covers_a_known_difference_in_95_percent_of_trials(n):
    generator = np.random.default_rng(n)
    trials, covered = 2000, 0
    for _ in range(trials):
        shared = generator.normal(2.0, 0.05, n)  # the effect of the seed on both arms
        control = dict(enumerate(shared + generator.normal(0, 0.004, n)))
        arm = dict(enumerate(shared + 0.01 + generator.normal(0, 0.004, n)))
        found = comparison.difference(arm, control)
        covered += found.low <= 0.01 <= found.high
    assert 0.93 <= covered / trials <= 0.97


@given(st.lists(st.tuples(st.floats(1, 5), st.floats(1, 5)), min_size=2, max_size=8))
@settings(max_examples=50)
def test_a_difference_is_that_of_the_common_seeds(pairs):
    a, b = np.array(pairs).T
    losses = dict(enumerate(a)) | {"only here": 9.0}
    control = {"only there": 0.1} | dict(enumerate(b))
    found = comparison.difference(losses, control)
    d = a - b
    assert found.n == len(pairs)
    assert found.mean == pytest.approx(np.mean(d), abs=1e-12)
    assert found.sd == pytest.approx(np.std(d, ddof=1), abs=1e-12)
    reach = stats.t.ppf(0.975, len(d) - 1) * np.std(d, ddof=1) / np.sqrt(len(d))
    assert (found.low, found.high) == pytest.approx((np.mean(d) - reach, np.mean(d) + reach), abs=1e-9)
    if np.std(d) > 1e-6:
        assert found.p == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-6, abs=1e-12)


def test_a_band_is_the_interval_of_each_column():
    values = np.random.default_rng(0).normal(size=(4, 6))
    mean, low, high = comparison.band(values)
    for i in range(6):
        one = comparison.summarise(values[:, i])
        assert (mean[i], low[i], high[i]) == pytest.approx((one.mean, one.low, one.high))
    assert comparison.band(values[:1])[1:] == (None, None)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
@settings(max_examples=60)
def test_holm_is_the_closed_test_of_bonferroni(p_values):
    # A hypothesis is rejected when every set of hypotheses that contains it is, by Bonferroni's test.
    n = range(len(p_values))
    subsets = [subset for size in n for subset in itertools.combinations(n, size + 1)]
    for i, adjusted in enumerate(comparison.holm(p_values)):
        bounds = [len(subset) * min(p_values[j] for j in subset) for subset in subsets if i in subset]
        assert adjusted == pytest.approx(min(1.0, max(bounds)))


def test_a_comparison_without_a_p_value_does_not_count():
    assert comparison.holm([0.01, None, 0.02]) == [0.02, None, 0.02]
    one_seed = ({1: 2.0}, {1: 1.0})
    clear = ({1: 2.0, 2: 2.1, 3: 2.0}, {1: 1.0, 2: 1.1, 3: 1.001})
    alone, beside = comparison.compare([clear])[0], comparison.compare([one_seed, clear])[1]
    assert alone == beside
    assert alone.p_holm == alone.difference.p


@pytest.mark.parametrize("sd", [0.004, 0.01, 0.02])
def test_the_seeds_needed_have_the_power_stated(sd):
    generator = np.random.default_rng(1)

    def power(n):
        differences = generator.normal(0.01, sd, (40_000, n))
        return (stats.ttest_1samp(differences, 0, axis=1).pvalue < 0.05).mean()

    n = comparison.seeds_needed(sd)
    assert power(n) >= 0.79
    assert power(n - 1) < 0.81


def test_seeds_needed_at_the_extremes():
    assert comparison.seeds_needed(0.0) == comparison.seeds_needed(1e-12) == 2
    assert comparison.seeds_needed(1.0) == pytest.approx((1.959964 + 0.841621) ** 2 * 1e4, rel=1e-3)
    assert comparison.seeds_needed(0.1, difference=0.1) == comparison.seeds_needed(0.01, difference=-0.01)


def verdict(*differences, family=1):
    """The verdict on an arm with these differences from its control, one per seed, among `family` equal comparisons."""
    control = dict.fromkeys(range(len(differences)), 2.0)
    arm = {seed: 2.0 + difference for seed, difference in enumerate(differences)}
    return comparison.compare([(arm, control)] * family)[0].verdict


def test_verdicts_in_words():
    assert verdict(0.1, 0.11, 0.09) == "worse"
    assert verdict(-0.1, -0.11, -0.09) == "better"
    assert verdict(0.1) == "inconclusive: one seed"
    assert verdict() == "inconclusive: no finished seed in common"
    assert verdict(0.0, 0.0) == "identical in each of 2 seeds"
    assert verdict(0.25, 0.25) == "inconclusive: the same difference in each of 2 seeds"
    d = [0.02, -0.01, 0.01]
    sd = np.std(d, ddof=1)
    ends = sd * np.sqrt(2 / stats.chi2.ppf([0.975, 0.025], 2))  # the interval of a standard deviation
    needed, least, most = (comparison.seeds_needed(value) for value in (sd, *ends))
    expected = f"detecting a difference of 0.01 needs about {needed} seeds ({least} to {most})"
    assert verdict(*d) == f"3 seeds are not enough to call it; {expected}"
    assert verdict(0.002, -0.001, 0.002) == (
        "3 seeds are not enough to call it; detecting a difference of 0.01 needs 3 to 12 seeds"
    )
    unseen = "no difference is seen with 3 seeds; enough seeds to detect a difference of 0.01"
    assert verdict(1e-4, -1e-4, 1e-4) == unseen
    assert verdict(0.02, 0.03, 0.025, family=1) == "worse"
    assert "after Holm's correction; detecting" in verdict(0.02, 0.03, 0.025, family=20)


def test_many_comparisons_need_more_seeds():
    control = {1: 2.0, 2: 2.0, 3: 2.0}
    arm = {1: 2.02, 2: 1.99, 3: 2.01}
    alone, *_ = comparison.compare([(arm, control)])
    among, *_ = comparison.compare([(arm, control)] * 10)
    assert among.seeds_needed[0] == comparison.seeds_needed(among.difference.sd, level=0.005) > alone.seeds_needed[0]


def test_the_slope_is_that_of_the_differences_of_each_seed():
    generator = np.random.default_rng(0)
    by_size = {size: {seed: generator.normal() for seed in range(4)} for size in (100, 200, 800)}
    by_size[800][9] = 5.0  # a seed that the other sizes lack
    slopes = [
        stats.linregress(np.log2([100, 200, 800]), [by_size[size][seed] for size in (100, 200, 800)]).slope
        for seed in range(4)
    ]
    found = comparison.slope(by_size)
    assert found.n == 4
    assert found.mean == pytest.approx(np.mean(slopes))
    assert found.p == pytest.approx(stats.ttest_1samp(slopes, 0).pvalue)


@pytest.mark.parametrize("shift", [-0.03, 0.0, 0.012, 0.019, 0.021, 0.03])
def test_arms_are_equal_where_the_90_percent_interval_is_within_the_margin(shift):
    generator = np.random.default_rng(int(1e3 * abs(shift)))
    control = dict(enumerate(generator.normal(2.0, 0.05, 6)))
    arm = {seed: loss + shift + generator.normal(0, 0.004) for seed, loss in control.items()}
    d = np.array([arm[seed] - control[seed] for seed in control])
    margin = 0.01 * np.mean(list(control.values()))
    (found,) = comparison.compare([(arm, control)], equal_within=0.01)
    same = found.equivalence
    assert same.margin == pytest.approx(margin)
    assert (same.low, same.high) == pytest.approx(stats.t.interval(0.9, 5, d.mean(), stats.sem(d)))
    assert found.is_equal == (-margin < same.low and same.high < margin)
    one_sided = [
        stats.ttest_1samp(d, -margin, alternative="greater").pvalue,
        stats.ttest_1samp(d, margin, alternative="less").pvalue,
    ]
    assert same.p == pytest.approx(max(one_sided))
    beside = comparison.compare([(arm, control)] * 4, equal_within=0.01)
    assert [each.equivalence.p_holm for each in beside] == comparison.holm([same.p] * 4)
    (unfixed,) = comparison.compare([(arm, control)])
    assert unfixed.equivalence is None and not unfixed.is_equal


def test_equal_is_a_verdict_only_within_a_margin_that_was_fixed():
    control = dict.fromkeys(range(4), 2.0)
    arm = dict(zip(control, (2.001, 1.999, 2.002, 2.0), strict=True))
    assert comparison.compare([(arm, control)], 0.005)[0].verdict == "equal within 0.5 %"
    assert comparison.compare([(arm, control)])[0].verdict.startswith("4 seeds are not enough to call it")
    arm = dict(zip(control, (2.004, 2.005, 2.006, 2.005), strict=True))
    assert comparison.compare([(arm, control)], 0.005)[0].verdict == "worse, but equal within 0.5 %"
    assert comparison.compare([({1: 2.0}, control)], 0.005)[0].verdict == "inconclusive: one seed"
