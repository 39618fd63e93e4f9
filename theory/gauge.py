"""Proposition 4.2: change W_Q and W_K without changing any attention score.

For every block-diagonal, invertible D the pair (W_QD, W_KD⁻ᵀ) gives the same scores as (W_Q, W_K). The choice of D is
called the gauge; it is given by the blocks of D, one for each key head, of shape (n_kv_head, d_k, d_k). With
grouped-query attention the query heads that share a key head share its block.

Matrices are in the paper's orientation, Y = XW with W of shape (in, out); d is n_embd and d_k = d / n_head.
"""

import torch

from theory.weights import Affine, build_model, has_full_rank, read_weights


def apply_gauge(w_q, w_k, gauge):
    """Proposition 4.2: (W_QD, W_KD⁻ᵀ), which give the same attention scores as (W_Q, W_K).

    w_q: (rows, n_head·d_k). w_k: (rows, n_kv_head·d_k). gauge: the blocks of D, (n_kv_head, d_k, d_k), invertible.
    Not valid with rotary positions, unless every block commutes with the rotations.
    """
    q, k = split_heads(w_q, len(gauge)), split_heads(w_k, len(gauge))
    d_k = gauge.size(-1)
    q = (q.unflatten(-1, (-1, d_k)).transpose(1, 2) @ gauge[:, None]).transpose(1, 2).flatten(2)
    return join_heads(q), join_heads(torch.linalg.solve(gauge, k.mT).mT)


def balancing_gauge(w_q, w_k, n_kv_head):
    """The gauge, (n_kv_head, d_k, d_k), that gives each head's W_Q and W_K the same Gram matrix.

    w_q: (d, n_head·d_k), w_k: (d, n_kv_head·d_k). With the singular value decomposition W_Q,iW_K,iᵀ = USVᵀ of head i
    the balanced pair is (US^½, VS^½). Both have the Gram matrix S, in descending order; the largest entry of each
    column of US^½ is positive. So two checkpoints that differ only by a gauge have the same balanced form, if no two
    singular values are equal. Query heads that share a key head are stacked, so W_Q's Gram matrix is the sum of theirs.
    Raises ValueError for a head whose W_QW_Kᵀ has a rank below d_k: no D gives it a balanced form.
    """
    q = stack_groups(w_q, w_k, n_kv_head)
    r_q, r_k = torch.linalg.qr(q).R, torch.linalg.qr(split_heads(w_k, n_kv_head)).R
    _, s, vh = torch.linalg.svd(r_q @ r_k.mT)
    for head, values in enumerate(s):
        check_rank(head, "W_Q·W_Kᵀ", values)
    gauge = r_k.mT @ vh.mT / s.sqrt().unsqueeze(-2)
    columns = q @ gauge
    largest = columns.gather(1, columns.abs().argmax(dim=1, keepdim=True))  # (n_kv_head, 1, d_k)
    return gauge * largest.sign()


def orthonormal_gauge(w_q, w_k, n_kv_head):
    """The gauge, (n_kv_head, d_k, d_k), that makes the columns of each head of W_Q orthogonal and equally long.

    Arguments as for `balancing_gauge`. It prepares W_Q for `reparametrize.eliminate`, which inverts it: the part of
    cond(W_Q) that comes from within the heads moves to W_K, and the angles between heads remain. Unless heads share
    keys, this is within a factor √n_head of the smallest cond(W_QD) for any D: if A has orthonormal columns in
    each head, then ‖A‖ ≤ √n_head, and for any other choice AD: ‖D‖ ≤ ‖AD‖ and σ_min(A) ≥ σ_min(AD)/‖D‖.
    Raises ValueError for a head with linearly dependent columns.
    """
    r = torch.linalg.qr(stack_groups(w_q, w_k, n_kv_head)).R
    for head, values in enumerate(torch.linalg.svdvals(r)):
        check_rank(head, "W_Q", values)
    length = w_q.norm() / w_q.size(-1) ** 0.5  # the root mean square of the old lengths, so that W_Q keeps its norm
    return torch.linalg.inv(r) * length


GAUGES = {"balanced": balancing_gauge, "orthonormal": orthonormal_gauge}


def change_gauge(model, gauge="balanced"):
    """A GPT with the same logits in which W_Q and W_K of every block are in another gauge (Proposition 4.2).

    gauge: 'balanced', each head's W_Q and W_K have equal Gram matrices (`balancing_gauge`), or 'orthonormal', which
    conditions W_Q for `reparametrize.eliminate` (`orthonormal_gauge`). Any norm, skips and depth; with or without
    biases. Raises ValueError for rotary positions, wq_identity or wk_identity, and a head whose rank is too low.
    """
    config = model.config
    if config.pos == "rope":
        raise ValueError(
            "pos=rope: the rotations of queries and keys do not commute with the block-diagonal D of Proposition 4.2; "
            "use a model with pos=learned or pos=none"
        )
    if config.wq_identity or config.wk_identity:
        raise ValueError("the gauge can only be changed in a model with wq_identity=False and wk_identity=False")
    weights = read_weights(model)
    for number, block in enumerate(weights.blocks):
        try:
            blocks = GAUGES[gauge](block["q"].weight, block["k"].weight, config.kv_heads)
        except ValueError as error:
            raise ValueError(f"layer {number}, {error}") from error
        rows = [torch.cat((block[name].weight, block[name].bias[None])) for name in "qk"]  # a bias is one more row
        for name, changed in zip("qk", apply_gauge(*rows, blocks), strict=True):
            block[name] = Affine(changed[:-1], changed[-1])
    return build_model(weights, config, model)


def check_rank(head, matrix, values):
    """Raise ValueError unless a head's matrix with these singular values has full rank."""
    if not has_full_rank(values):
        raise ValueError(
            f"head {head}: {matrix} has a rank below d_k={len(values)} (singular values {values[0]:.3g} to "
            f"{values[-1]:.3g}), so no invertible D of Proposition 4.2 gives this gauge: keep the present one"
        )


def stack_groups(w_q, w_k, n_kv_head):
    """W_Q, (d, n_head·d_k), with the heads that share a key head stacked: (n_kv_head, group·d, d_k)."""
    d_k = w_k.size(-1) // n_kv_head
    return split_heads(w_q, n_kv_head).unflatten(-1, (-1, d_k)).transpose(1, 2).flatten(1, 2)


def split_heads(w, n_head):
    """(rows, n_head·d_k) to (n_head, rows, d_k)."""
    return w.unflatten(-1, (n_head, -1)).transpose(0, 1)


def join_heads(w):
    """(n_head, rows, d_k) to (rows, n_head·d_k)."""
    return w.transpose(0, 1).flatten(1)
