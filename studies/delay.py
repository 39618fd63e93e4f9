"""A difference in loss as a delay: how many more steps, and tokens, an arm needs for the same loss.

With several lengths of training, each with a schedule of its own, that is read off the final losses of one arm over the
lengths; else off the losses that one arm had during training, on the same windows. Between two of them the loss is
taken as linear in the logarithm of the steps.
"""

import math

import numpy as np

from studies import comparison

LENGTH = "max_iters"


def reached(steps, losses, target):
    """The step at which losses, in the order of the steps, fell to a target for the last time; None: not among them."""
    for i in range(len(steps) - 2, -1, -1):
        if losses[i] >= target >= losses[i + 1]:
            share = (losses[i] - target) / (losses[i] - losses[i + 1]) if losses[i] > losses[i + 1] else 1.0
            return math.exp((1 - share) * math.log(steps[i]) + share * math.log(steps[i + 1]))
    return None


def delay(steps, losses, control):
    """(steps, per cent of tokens) by which an arm is behind its control at the last step; None where that is unknown.

    steps: in order, positive. losses, control: at these steps. Below zero: by which the control is behind.
    """
    last = steps[-1]
    behind = losses[-1] >= control[-1]
    then = reached(steps, control if behind else losses, losses[-1] if behind else control[-1])
    if then is None:
        return None
    sign = 1 if behind else -1
    return sign * (last - then), sign * 100 * (last / then - 1)


def over_lengths(results, cell):
    """seed -> {steps: final loss} of the best cells of a cell's arm that are of its size but for their length."""
    found = {}
    for other in results.best:
        sizes = [{k: v for k, v in results.size(each).items() if k != LENGTH} for each in (cell, other)]
        if other.arm == cell.arm and sizes[0] == sizes[1]:
            for seed, loss in other.losses.items():
                found.setdefault(seed, {})[other.example.summary["steps"]] = loss
    return found


def delays(results, cell, control):
    """(Mean of the steps, Mean of the per cent of tokens) over the seeds that both have; None unless all are known."""
    seeds = [seed for seed in cell.runs if seed in control.runs]
    sizes = [(each.example.config["tokens_per_step"], each.example.summary["steps"]) for each in (cell, control)]
    if not seeds or sizes[0] != sizes[1]:
        return None
    if LENGTH in results.size_fields:
        ours, theirs = (over_lengths(results, each) for each in (cell, control))
        found = []
        for seed in seeds:
            steps = sorted(step for step in ours[seed] if step in theirs[seed] and 0 < step <= sizes[0][1])
            found.append(delay(steps, [ours[seed][s] for s in steps], [theirs[seed][s] for s in steps]))
    else:
        (steps, losses), (others, reference) = (each.curve("eval", "val_loss", seeds) for each in (cell, control))
        common = [step for step in np.intersect1d(steps, others) if step > 0]
        if not common or common[-1] != sizes[0][1]:
            return None
        losses, reference = losses[:, np.isin(steps, common)], reference[:, np.isin(others, common)]
        found = [delay(common, *pair) for pair in zip(losses, reference, strict=True)]
    if None in found:
        return None
    return tuple(map(comparison.summarise, zip(*found, strict=True)))


def definition(results):
    """What a delay is in these results, as a sentence."""
    where = "the final losses of the shorter trainings of one arm, each with a schedule of its own, had"
    decay = ""
    if LENGTH not in results.size_fields:
        where = "one arm's losses during training had"
        decay = " Where the learning rate falls, losses fall faster, and delays are shorter."
    return (
        f"A delay is how many more steps, or per cent of the tokens, an arm needs for the same loss: {where} the "
        f"other's last loss that much earlier; below zero the control is behind. It is interpolated, seed by "
        f"seed.{decay}"
    )
