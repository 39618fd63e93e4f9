"""Is a rewriting exact? How far rounding alone can move the logits of two models that are equal in exact arithmetic.

The theorems are about the functions that model.py computes. Whether the code still is that, and whether a rewriting is
right, shows in the logits: `largest_difference` of the two models, in float64, must not exceed `rounding_bound`.
"""

import copy

import torch

N_LOGITS = 2**24  # logits in a batch: 128 MiB in float64
STEP = 2.0**-40  # the relative change of the weights that measures the sensitivity: small, but 4096 times float64's ε
MULTIPLE = 2
LARGEST_BOUND = 1e-6  # logits that differ by more than this are not called equal, whatever the reason


@torch.no_grad()
def largest_difference(model, other, x):
    """The largest difference between the logits of two GPTs on x, (n, T) int64, divided by the first's largest logit.

    NaN if one of the logits is.
    """
    differences, sizes = [], []
    for idx in x.split(max(1, N_LOGITS // (x.size(1) * model.config.vocab_size))):
        logits = model(idx, idx)[0]
        differences.append((other(idx, idx)[0] - logits).abs().max())
        sizes.append(logits.abs().max())
    difference, size = torch.stack(differences).max(), torch.stack(sizes).max()
    return (difference / size).item() if size > 0 else difference.item()


def sensitivity(model, x):
    """The relative change of a GPT's logits on x, (n, T) int64, per relative change of its weights.

    model: in float64. The largest of three, each with random changes of all weights (the random state of torch is not
    touched): one alone can miss the weights that matter. It grows with depth and with sharp attention.
    """
    found = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        changed = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in changed.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.mul_(1 + STEP * noise)
        found.append(largest_difference(model, changed, x) / STEP)
    return max(found)


def rounding_bound(model, x, conditions):
    """The largest relative difference of logits in float64 that counts as rounding, for an exact rewriting of a GPT.

    model: the original, in float64. x: tokens, (n, T) int64. conditions: the condition numbers of the matrices that
    were inverted (that of a gauge need not be among them). The bound is 2·√n_embd · ε · max(10, the largest of them) ·
    `sensitivity`, at most 1e-6, with ε = 2⁻⁵². Depth is in the sensitivity; √n_embd is how rounding errors of a sum
    grow.

    Chosen from measurements on random models of all results and gauges, with condition numbers up to 1e6. Of 2,850
    exact rewritings (n_embd 8 to 32, up to 8 layers) those with a bound below 1e-6 came to at most 0.075 of it, and the
    others to 0.54; with n_embd=768 to 0.03, after training to 0.02. With the input added to the queries, which no
    result allows, the difference was at least 235 times the bound, in models before training, whose attention is nearly
    uniform, and 1,100 times in others. A thousandth of the input can go unnoticed before training.
    """
    condition = max([10.0, *conditions])  # 10: for the rounding of the forward passes themselves
    bound = MULTIPLE * model.config.n_embd**0.5 * torch.finfo(torch.float64).eps * condition * sensitivity(model, x)
    return min(bound, LARGEST_BOUND)
