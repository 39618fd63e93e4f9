"""The freedom of each head's weights: changes of (W_Q, W_K) and of (W_V, W_O) that change nothing outside the head.

Proposition 4.2: for every block-diagonal, invertible D the pair (W_QD, W_KD⁻ᵀ) gives the same attention scores as (W_Q,
W_K). Its twin, which the paper leaves for the future: (W_VD, D⁻¹W_O) gives the same output as (W_V, W_O), because a
head takes means of values over tokens, coordinate by coordinate. Both hold with every norm, all skips and any depth.
With rotary positions the second does, and the first for every D that commutes with the rotations, which turns each pair
(i, i + d_k/2) by an angle and scales it.

The choice of D is called the gauge; it is given by the blocks of D, one for each key head, of shape (n_kv_head, d_k,
d_k). With grouped-query attention the query heads that share a key head share its block. Transposed, (W_Oᵀ, W_V) is a
pair of the same kind as (W_Q, W_K): the first matrix has n_head heads and the second n_kv_head. So the functions below
take such a pair, w_many (d, n_head·d_k) and w_shared (d, n_kv_head·d_k).

Matrices are in the paper's orientation, Y = XW with W of shape (in, out); d is n_embd and d_k = d / n_head.
"""

import torch

from theory.weights import OPTIONS_OF_HEADS, Affine, build_model, condition_number, has_full_rank, read_weights


def apply_gauge(w_many, w_shared, gauge):
    """(W_manyD, W_sharedD⁻ᵀ): for (W_Q, W_K) the same scores (Proposition 4.2), for (W_Oᵀ, W_V) the same output.

    w_many: (rows, n_head·d_k). w_shared: (rows, n_kv_head·d_k). gauge: the blocks of D, (n_kv_head, d_k, d_k),
    invertible. For (W_Q, W_K) not valid with rotary positions, unless every block commutes with the rotations.
    """
    many, shared = split_heads(w_many, len(gauge)), split_heads(w_shared, len(gauge))
    many = many.unflatten(-1, (-1, gauge.size(-1))).transpose(1, 2) @ gauge[:, None]
    return join_heads(many.transpose(1, 2).flatten(2)), join_heads(torch.linalg.solve(gauge, shared.mT).mT)


def balancing_gauge(w_many, w_shared, n_kv_head):
    """The gauge, (n_kv_head, d_k, d_k), that gives the two matrices of each head the same Gram matrix.

    With the singular value decomposition W_Q,iW_K,iᵀ = USVᵀ of head i the balanced pair is (US^½, VS^½). Both have the
    Gram matrix S, in descending order; the largest entry of each column of US^½ is positive. So two checkpoints that
    differ only by a gauge have the same balanced form, if no two singular values are equal. Heads that share one are
    stacked, so their Gram matrix is the sum of theirs. Raises ValueError for a head whose product has a rank below d_k:
    no D gives it a balanced form.
    """
    many = stack_groups(w_many, w_shared, n_kv_head)
    r_many, r_shared = torch.linalg.qr(many).R, torch.linalg.qr(split_heads(w_shared, n_kv_head)).R
    _, s, vh = torch.linalg.svd(r_many @ r_shared.mT)
    check_rank("the product of its two matrices", s)
    gauge = r_shared.mT @ vh.mT / s.sqrt().unsqueeze(-2)
    columns = many @ gauge
    largest = columns.gather(1, columns.abs().argmax(dim=1, keepdim=True))  # (n_kv_head, 1, d_k)
    return gauge * largest.sign()


def orthonormal_gauge(heads):
    """The D, (n_kv_head, d_k, d_k), that makes the columns of each head of a projection orthogonal and equally long.

    heads: the projection, (n_kv_head, rows, d_k). This prepares it for `reparametrize.eliminate`, which inverts it: the
    part of its condition number that comes from within the heads moves to the other matrix of the pair, and the angles
    between heads remain. Unless heads share one, this is within a factor √n_head of the smallest cond(WD) for any D: if
    A has orthonormal columns in each head, then ‖A‖ ≤ √n_head, and for any other choice AD: ‖D‖ ≤ ‖AD‖ and σ_min(A) ≥
    σ_min(AD)/‖D‖. Raises ValueError for a head with linearly dependent columns.
    """
    r = torch.linalg.qr(heads).R
    check_rank("its matrix", torch.linalg.svdvals(r))
    length = heads.norm() / (len(heads) * heads.size(-1)) ** 0.5  # root mean square of the columns, which W keeps
    return torch.linalg.inv(r) * length


def rotary_pairs(heads):
    """(n_kv_head, rows, d_k) as complex numbers, (n_kv_head, rows, d_k/2): each pair that a position turns together."""
    return torch.complex(*heads.chunk(2, dim=-1))


def commuting_gauge(z):
    """The gauge, (n_kv_head, d_k, d_k), that multiplies the `rotary_pairs` of W_Q by z, (n_kv_head, d_k/2) complex."""
    real, imaginary = torch.diag_embed(z.real), torch.diag_embed(z.imag)
    return torch.cat((torch.cat((real, imaginary), -1), torch.cat((-imaginary, real), -1)), -2)


def balancing_rotary_gauge(w_many, w_shared, n_kv_head):
    """`balancing_gauge` among those that commute with the rotations: the pairs of W_Q and W_K become equally long.

    The entry of each pair of W_Q that is largest becomes real and positive, so that checkpoints that differ only by
    such a gauge have one form. Raises ValueError for a pair that is zero.
    """
    many, shared = (
        rotary_pairs(h) for h in (stack_groups(w_many, w_shared, n_kv_head), split_heads(w_shared, n_kv_head))
    )
    lengths = many.norm(dim=1), shared.norm(dim=1)  # (n_kv_head, d_k/2)
    check_rank("one of its rotary pairs", torch.cat(lengths, dim=-1).sort(descending=True).values)
    largest = many.gather(1, many.abs().argmax(dim=1, keepdim=True))[:, 0]
    return commuting_gauge((lengths[1] / lengths[0]).sqrt() * largest.conj() / largest.abs())


def orthonormal_rotary_gauge(heads):
    """`orthonormal_gauge` among those that commute with the rotations: all pairs become equally long."""
    lengths = rotary_pairs(heads).norm(dim=1)
    check_rank("one of its rotary pairs", lengths.sort(descending=True).values)
    return commuting_gauge(lengths.square().mean().sqrt() / lengths + 0j)


GAUGES = ("balanced", "orthonormal")


def change_gauge(model, gauge="balanced", which="q"):
    """A GPT with the same logits in which every block's (W_Q, W_K), or for which='v' (W_V, W_O), is in another gauge.

    gauge: 'balanced', the two matrices of each head have equal Gram matrices (`balancing_gauge`), or 'orthonormal',
    which conditions the projection `which`, 'q', 'k' or 'v', for `reparametrize.eliminate` (`orthonormal_gauge`). Any
    norm, skips, positions and depth; with or without biases. Raises ValueError where one of the two matrices is the
    identity, and for a head whose rank is too low.
    """
    config = model.config
    check_pair(config, which)
    rotary = config.pos == "rope" and which != "v"

    def blocks_of(many, shared):
        if gauge == "balanced":
            return (balancing_rotary_gauge if rotary else balancing_gauge)(many, shared, config.kv_heads)
        orthonormal = orthonormal_rotary_gauge if rotary else orthonormal_gauge
        if which == "q":
            return orthonormal(stack_groups(many, shared, config.kv_heads))
        return torch.linalg.inv(orthonormal(split_heads(shared, config.kv_heads))).mT

    weights = read_weights(model, OPTIONS_OF_HEADS)
    for number, block in enumerate(weights.blocks):
        change_block(number, block, which, blocks_of)
    return build_model(weights, config, model)


ROWS = ("top", "chosen")


def identity_in_heads(model, rows="top"):
    """A GPT with the same logits in which d_k rows of each head of W_Q and of W_V become I, and the conditions.

    Any norm, skips, MLPs and depth. W_Q's rows stay where the gauge is not free: with rotary positions, qk_norm, W_K =
    I or queries that are not X·W_Q; those of W_V with W_V = I. Of query heads that share a key head, the first has I.
    rows: 'top', the first d_k rows, or 'chosen', those that `pivot_rows` finds for each head. What is I need not be
    stored: n_kv_head·d_k² numbers a layer for each of the two, d·d_k without shared heads (for the chosen rows,
    n_kv_head·d_k indices are needed then). Returns (GPT, {(layer, 'q' or 'v'): the largest condition number of the rows
    that were inverted}). Raises ValueError where neither is free, and for singular rows.
    """
    config = model.config
    which = [name for name in "qv" if is_free(config, name) and not (name == "q" and config.pos == "rope")]
    if not which:
        raise ValueError(
            f"wv_identity={config.wv_identity}, wq_identity={config.wq_identity}, wk_identity={config.wk_identity}, "
            f"qk_norm={config.qk_norm}, pos={config.pos}: neither W_Q nor W_V has a free gauge, so no row of them can "
            "become I"
        )
    weights, conditions = read_weights(model, OPTIONS_OF_HEADS), {}
    head, eye = torch.arange(config.kv_heads)[:, None], torch.eye(config.d_k, dtype=torch.float64)
    for number, block in enumerate(weights.blocks):
        for name in which:
            first = split_heads(block[name].weight, config.kv_heads)[..., : config.d_k]  # (n_kv_head, d, d_k)
            row = pivot_rows(first) if rows == "chosen" else torch.arange(config.d_k).expand(config.kv_heads, -1)
            square = first[head, row]  # (n_kv_head, d_k, d_k)
            conditions[number, name] = max(map(condition_number, square))

            def blocks_of(many, shared, name=name, square=square):
                check_rank(f"the square of its {rows} rows", torch.linalg.svdvals(square))
                return torch.linalg.inv(square) if name == "q" else square.mT

            change_block(number, block, name, blocks_of)
            heads = split_heads(block[name].weight.clone(), config.kv_heads)
            heads[head, row, : config.d_k] = eye.to(heads)  # without rounding
            block[name] = block[name]._replace(weight=join_heads(heads))
    return build_model(weights, config, model), conditions


def pivot_rows(heads):
    """d_k rows of each head that no other row exceeds much, (n_kv_head, d_k) in ascending order; heads: (…, d, d_k).

    The pivots of Gaussian elimination, each the largest entry that is left in its column. Where they become I, the
    other entries of the head stay about 1, so that little is lost in low precision; where the top rows become I they
    can be thousands.
    """
    pivots = torch.linalg.lu(heads).P.argmax(dim=-2)  # P: (n_kv_head, d, d); row j of PᵀW is row pivots[j] of W
    return pivots[:, : heads.size(-1)].sort(dim=-1).values


def is_free(config, which):
    """Whether neither matrix of the pair of W_Q, W_K or W_V is fixed to the identity, nor their products normalised."""
    if which == "v":
        return not config.wv_identity
    return not (config.wq_identity or config.wk_identity or config.qk_norm)


def check_pair(config, which):
    """Raise ValueError unless the gauge of the pair of `which` is free."""
    if not is_free(config, which):
        pair = (
            "W_V and W_O needs wv_identity=False"
            if which == "v"
            else "W_Q and W_K needs both identities and qk_norm False"
        )
        raise ValueError(
            f"the gauge of {pair}, got wq_identity={config.wq_identity}, wk_identity={config.wk_identity}, "
            f"wv_identity={config.wv_identity}, qk_norm={config.qk_norm}"
        )


def change_block(number, block, which, blocks_of):
    """Change the gauge of one block's matrices in place; blocks_of(w_many, w_shared) gives the gauge.

    A bias of W_Q, W_K or W_V is one more row, and that of W_O is outside the heads.
    """
    many, shared = ("o", "v") if which == "v" else ("q", "k")
    try:
        w_many = block[many].weight.T if many == "o" else block[many].weight
        blocks = blocks_of(w_many, block[shared].weight)
    except ValueError as error:
        raise ValueError(f"layer {number}, {error}") from error
    with_bias = [torch.cat((block[name].weight, block[name].bias[None])) for name in (many, shared) if name != "o"]
    changed = apply_gauge(w_many if many == "o" else with_bias[0], with_bias[-1], blocks)
    block[shared] = Affine(changed[1][:-1], changed[1][-1])
    block[many] = Affine(changed[0].T, block["o"].bias) if many == "o" else Affine(changed[0][:-1], changed[0][-1])


def check_rank(matrix, values):
    """Raise ValueError, naming the head, unless a matrix of each has full rank; values: singular values, (heads, n)."""
    for head, own in enumerate(values):
        if not has_full_rank(own):
            raise ValueError(
                f"head {head}: {matrix} has a rank below {len(own)} (singular values {own[0]:.3g} to {own[-1]:.3g}), "
                "so no invertible D of Proposition 4.2 gives this gauge: keep the present one"
            )


def stack_groups(w_many, w_shared, n_kv_head):
    """W_many, (d, n_head·d_k), with the heads that share a head stacked: (n_kv_head, group·d, d_k)."""
    d_k = w_shared.size(-1) // n_kv_head
    return split_heads(w_many, n_kv_head).unflatten(-1, (-1, d_k)).transpose(1, 2).flatten(1, 2)


def split_heads(w, n_head):
    """(rows, n_head·d_k) to (n_head, rows, d_k)."""
    return w.unflatten(-1, (n_head, -1)).transpose(0, 1)


def join_heads(w):
    """(n_head, rows, d_k) to (rows, n_head·d_k)."""
    return w.transpose(0, 1).flatten(1)
