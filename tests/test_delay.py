"""A difference in loss as a delay in steps and tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_folders import REDUCED, write_study

from studies import arms, comparison, delay


@given(st.floats(1.0, 3.0), st.floats(0.1, 1.0))
def test_an_arm_that_needs_more_steps_everywhere_is_behind_by_these(factor, slope):
    """A loss that is linear in the logarithm of the steps, reached `factor` times as late."""
    steps = np.arange(1, 41)
    control, losses = 5 - slope * np.log(steps), 5 - slope * np.log(steps / factor)
    late, percent = delay.delay(steps, losses, control)
    assert percent == pytest.approx(100 * (factor - 1), abs=1e-6)
    assert late == pytest.approx(40 - 40 / factor, abs=1e-6)
    assert delay.delay(steps, control, losses) == pytest.approx((-late, -percent), abs=1e-6)


def test_a_loss_that_is_reached_twice_counts_from_the_last_time():
    assert delay.reached([1, 2, 4, 8, 16], [5, 3, 4, 3, 1], 3.5) == pytest.approx(32**0.5)
    assert delay.reached([1, 2, 4], [3, 2, 1], 0.5) is None, "not yet"
    assert delay.reached([1, 2, 4], [3, 2, 1], 3.5) is None, "before the first"
    assert delay.reached([1, 2, 4], [3, 2, 1], 1) == pytest.approx(4)


def test_delays_are_of_each_seed_s_own_curves(tmp_path):
    """Losses fall by 1 from step 20 to step 40; the step 0 has no logarithm."""
    gap = {1: 0.25, 2: 0.5, 3: -0.25}
    folder = write_study(
        tmp_path / "s", {"a": {}, "b": REDUCED}, lambda arm, seed: 2 + seed / 10 + gap[seed] * (arm == "b")
    )
    results = arms.load([folder])
    steps, tokens = delay.delays(results, *results.best_pairs[0])
    ratios = 2 ** np.array([0.25, 0.5, 0.25])
    signs = np.array([1, 1, -1])
    assert tokens == comparison.summarise(tokens_ := signs * 100 * (ratios - 1)) or tokens.mean == pytest.approx(
        tokens_.mean()
    )
    assert steps.mean == pytest.approx((signs * (40 - 40 / ratios)).mean())
    assert steps.n == 3
    results.best_pairs[0][0].runs[2, 2].metrics[-1]["val_loss"] += 5
    assert delay.delays(results, *results.best_pairs[0]) is None, "one seed's is beyond the curve"


def test_with_several_lengths_a_delay_is_read_off_their_final_losses(tmp_path):
    late = {100: 1.07, 200: 1.24, 400: 0.9}

    def loss(arm, seed, max_iters):
        return 5 - 0.4 * np.log(max_iters / (late[max_iters] if arm == "b" else 1)) + seed / 10

    folder = write_study(tmp_path / "s", {"a": {}, "b": REDUCED}, loss, {"max_iters": list(late)}, seeds=(1, 2))
    results = arms.load([folder])
    found = [delay.delays(results, *pair) for pair in results.best_pairs]
    assert found[0] is None, "there is nothing shorter"
    assert (found[1][0].mean, found[1][1].mean) == pytest.approx((200 - 200 / 1.24, 24))
    ours = [5 - 0.4 * np.log(200 / 1.24), 5 - 0.4 * np.log(400 / 0.9)]
    share = (ours[0] - (5 - 0.4 * np.log(400))) / (ours[0] - ours[1])
    then = 200 * 2**share  # where b had the loss that a has after 400
    assert found[2][1].mean == pytest.approx(-100 * (400 / then - 1))
    assert "shorter trainings" in delay.definition(results)
