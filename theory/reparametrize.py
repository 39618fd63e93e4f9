"""Change the basis of the residual stream so that one projection of attention becomes the identity (Sections 3 and 4).

A transformer without normalisation does not know the basis of its residual stream. Write X̃ = XΘ instead of X, Θ
invertible: what reads the stream reads Θ⁻¹W in place of W, what writes to it writes WΘ, and every logit stays. With
Θ = W_Q the queries are X̃ itself, so W_Q can go; just so for W_K and W_V. A skip connection carries the stream past a
layer in the basis that it has, so the points of the stream that skips connect share one Θ: that is what decides how
many layers can lose their W_Q (`stream_groups`). What lies between projections and stays inside a head (rotary
positions, masks, the scale, dropout) is not touched.

A bias is exact, too: the queries XW_Q + b_Q are the stream itself in the affine coordinates X̃ = XW_Q + b_Q. Every bias
that writes to the stream can move its origin back, so b_Q goes with W_Q, unless no bias stands where one is needed.

Matrices are in the paper's orientation, Y = XW with W of shape (in, out); d is n_embd and d_k = d / n_head. What takes
a GPT computes in float64.
"""

import dataclasses
from typing import NamedTuple

import torch

from theory.weights import Affine, build_model, read_weights

MAX_COND = 1e6
BY_CHANGE_OF_BASIS = ("Theorem 4.1", "Theorem 4.2", "Lemma 8.4")


class Basis(NamedTuple):
    """Coordinates X̃ = X·theta + shift of the residual stream; theta (d, d) invertible, shift (d,)."""

    theta: torch.Tensor
    shift: torch.Tensor

    def read(self, layer):
        """The Affine that makes of X̃ what layer makes of X."""
        weight = torch.linalg.solve(self.theta, layer.weight)
        return Affine(weight, layer.bias - self.shift @ weight)

    def write(self, layer, skipped=0.0):
        """The Affine that writes into these coordinates what layer writes into the old ones.

        skipped: the shift of the coordinates in which a skip connection brings the stream here, to which it is added.
        """
        return Affine(layer.weight @ self.theta, layer.bias @ self.theta + self.shift - skipped)


def change_of_basis(w_q, w_k, w_v):
    """Lemma 3.1: (Θ, W̃_K, W̃_V) such that a function of (XW_Q, XW_K, XW_V) is the same one of (XΘ, XΘW̃_K, XΘW̃_V).

    Θ = W_Q, (d, d) and invertible; W̃_K = W_Q⁻¹W_K and W̃_V = W_Q⁻¹W_V, (d, anything): keys and values may be narrower,
    as in grouped-query attention.
    """
    return w_q, torch.linalg.solve(w_q, w_k), torch.linalg.solve(w_q, w_v)


def merge_query_into_key(w_q, w_k):
    """Proposition 4.1: the W̃_K of a single head that leaves W_Q = I, W_KW_Qᵀ; (d, d) each, no inverse.

    XW_Q(XW_K)ᵀ = X(XW_KW_Qᵀ)ᵀ. This stays inside attention, so norms and skips do not matter. Rotary positions do: the
    scores are then XW_Q·R·(XW_K)ᵀ with a rotation R for each pair of positions, and no one W̃_K stands for them all.
    """
    return w_k @ w_q.T


def merge_value_into_output(w_v, w_o):
    """Remark 1: the W̃_O of a single head that leaves W_V = I, W_VW_O; (d, d) each. Any norm, skips and positions."""
    return w_v @ w_o


def apply_gauge(w_q, w_k, gauge):
    """Proposition 4.2: (W_QD, W_KD⁻ᵀ), which give the same attention scores as (W_Q, W_K), D block-diagonal.

    w_q: (rows, n_head·d_k). w_k: (rows, n_kv_head·d_k). gauge: the blocks of D, (n_kv_head, d_k, d_k), invertible; with
    grouped-query heads the queries that share a key head share its block. Not with rotary positions, unless every
    block commutes with the rotations.
    """
    q, k = split_heads(w_q, len(gauge)), split_heads(w_k, len(gauge))
    d_k = gauge.size(-1)
    q = (q.unflatten(-1, (-1, d_k)).transpose(1, 2) @ gauge[:, None]).transpose(1, 2).flatten(2)
    return join_heads(q), join_heads(torch.linalg.solve(gauge, k.mT).mT)


def balancing_gauge(w_q, w_k, n_kv_head):
    """The gauge of Proposition 4.2, (n_kv_head, d_k, d_k), that gives each head's W_Q and W_K the same Gram matrix.

    w_q: (d, n_head·d_k), w_k: (d, n_kv_head·d_k). With W_Q,iW_K,iᵀ = USVᵀ the balanced pair is US^½, VS^½, whose Gram
    matrices are both S, descending; the largest entry of each column of US^½ is positive. So two checkpoints that
    differ by a gauge have one balanced form (where no two singular values are equal). Query heads that share a key
    head stand one above the other, so W_Q's Gram matrix is then the sum of theirs.
    Raises ValueError for a head whose W_QW_Kᵀ has a rank below d_k: its balanced form is not W_QD for any D.
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
    """The gauge, (n_kv_head, d_k, d_k), after which the columns of each head of W_Q are orthogonal and of one length.

    Arguments as for `balancing_gauge`. `eliminate` then inverts W_QD: what made a head badly conditioned in itself has
    gone to W_K, and what is left is the angles between heads. Unless heads share keys, no D has a cond(W_QD) smaller
    by more than √n_head: if the columns of each head of A are orthonormal, ‖A‖ ≤ √n_head, and for any other choice AD
    ‖D‖ ≤ ‖AD‖ and σ_min(A) ≥ σ_min(AD)/‖D‖. Raises ValueError for a head whose columns are dependent.
    """
    r = torch.linalg.qr(stack_groups(w_q, w_k, n_kv_head)).R
    for head, values in enumerate(torch.linalg.svdvals(r)):
        check_rank(head, "W_Q", values)
    length = w_q.norm() / w_q.size(-1) ** 0.5  # the mean one stays, so that W_Q and W_K keep their sizes
    return torch.linalg.inv(r) * length


GAUGES = {"balanced": balancing_gauge, "orthonormal": orthonormal_gauge}


def stack_groups(w_q, w_k, n_kv_head):
    """W_Q, (d, n_head·d_k), with the heads that share a key head one above the other: (n_kv_head, group·d, d_k)."""
    d_k = w_k.size(-1) // n_kv_head
    return split_heads(w_q, n_kv_head).unflatten(-1, (-1, d_k)).transpose(1, 2).flatten(1, 2)


def has_full_rank(values):
    """Whether the smallest of a matrix's singular values, in descending order, is more than rounding."""
    return values[-1] > values[0] * len(values) * torch.finfo(values.dtype).eps


def check_rank(head, matrix, values):
    """Raise ValueError unless a head's matrix with these singular values has full rank."""
    if not has_full_rank(values):
        raise ValueError(
            f"head {head}: {matrix} has a rank below d_k={len(values)} (singular values {values[0]:.3g} to "
            f"{values[-1]:.3g}), so no invertible D of Proposition 4.2 gives the form asked for"
        )


def change_gauge(model, gauge="balanced"):
    """A GPT with the same logits in which W_Q and W_K of every block have another gauge (Proposition 4.2).

    gauge: 'balanced', each head's W_Q and W_K have equal Gram matrices (`balancing_gauge`), or 'orthonormal', which
    conditions W_Q for `eliminate` (`orthonormal_gauge`). Any norm, skips and depth; biases are carried along.
    Raises ValueError for rotary positions, an identity in place of W_Q or W_K, and a head of too small a rank.
    """
    config = model.config
    if config.pos == "rope":
        raise ValueError(
            "pos=rope rotates queries and keys after the projection, and the rotations do not commute with the "
            "block-diagonal D of Proposition 4.2: use pos=learned or none"
        )
    if config.wq_identity or config.wk_identity:
        raise ValueError("wq_identity and wk_identity leave W_Q and W_K no freedom: their gauge cannot be changed")
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


def stream_groups(config):
    """The points of the residual stream, numbered by the basis they must share: a list of 2·n_layer + 1 integers.

    Point 2l is what attention of layer l reads, 2l + 1 what its MLP reads, 2·n_layer what the LM head reads. A skip
    connection joins the points at its ends; so do blocks that are one and the same.
    """
    groups = list(range(2 * config.n_layer + 1))

    def join(i, j):
        groups[:] = [groups[i] if group == groups[j] else group for group in groups]

    for point in range(0, 2 * config.n_layer, 2):
        if config.parallel:
            join(point, point + 1)
            if config.attn_skip:
                join(point, point + 2)
        else:
            if config.attn_skip:
                join(point, point + 1)
            if config.mlp_skip:
                join(point + 1, point + 2)
        if config.share_layers and point:
            join(point - 2, point)
            join(point - 1, point + 1)
    if config.share_layers and config.n_layer > 1:
        join(0, 2 * config.n_layer)  # the last layer writes in the basis in which the others do
    return groups


def covering_result(model, which="q", layer=None):
    """The name of the result by which `eliminate` would rewrite model. Raises ValueError with the reason if none does.

    which: 'q', 'k' or 'v'. layer: a block's number, from 0; None: all of them.
    """
    config, blocks = model.config, model.transformer.h
    if which not in ("q", "k", "v"):
        raise ValueError(f"which must be q, k or v, not {which!r}")
    if layer is not None and not 0 <= layer < len(blocks):
        raise ValueError(f"layer={layer} is not one of the model's {len(blocks)} blocks: they count from 0")
    identities = [name for name in "qkv" if getattr(config, f"w{name}_identity")]
    if which in identities:
        raise ValueError(f"w{which}_identity=True: the model has no W_{which.upper()} already")
    if which != "q" and config.n_kv_head not in (None, config.n_head):
        raise ValueError(
            f"W_{which.upper()} is not square with n_kv_head={config.n_kv_head} below n_head={config.n_head}, and "
            "cannot be the identity: only which=q goes with grouped-query heads"
        )
    rotated = config.pos == "rope" and which != "v"
    # Of a single head's scores, (XW_Q + b_Q)(XW_K + b_K)ᵀ, the softmax ignores what is the same for all keys. What b_Q
    # adds is not, and with the queries X it has no place; with the keys X it is the bias of the queries.
    biased = which == "q" and config.bias and any(has_query_bias(blocks[i]) for i in chosen(blocks, layer))
    if config.n_head == 1 and not rotated and not biased and not (which != "v" and {*identities} & {*"qk"}):
        return "Remark 1" if which == "v" else "Proposition 4.1"
    if config.norm != "none":
        raise ValueError(
            f"norm={config.norm} between the layers: no change of basis goes through a normalisation exactly (Remark "
            f"5), so W_{which.upper()} cannot be taken out of these weights. What can be done: train with "
            f"w{which}_identity=True from the start{', or --approximate and fine-tune' * (which == 'q')}; exact are "
            "models with norm=none"
        )
    if identities:
        names = ", ".join(f"w{name}_identity" for name in identities)
        raise ValueError(
            f"{names}=True has fixed the basis of the residual stream: in the one where W_{which.upper()} is the "
            f"identity, W_{identities[0].upper()} would not be"
        )
    if config.share_layers:
        return "Theorem 4.2"
    groups = stream_groups(config)
    if layer is None and len({groups[2 * number] for number in range(len(blocks))}) < len(blocks):
        raise ValueError(
            f"the skip connections make one residual stream of all {len(blocks)} layers, which has one basis: "
            f"W_{which.upper()} of one layer can be the identity, not of each. Choose it with layer=0 to layer="
            f"{len(blocks) - 1}; with share_layers=True, attn_skip=False or mlp_skip=False all could go"
        )
    return "Theorem 4.1" if groups[0] != groups[-1] else "Lemma 8.4"


def has_query_bias(block):
    """Whether the query bias of a block with a W_Q is not zero."""
    return bool(block.attn.split_qkv(block.attn.c_attn.bias)[0].any())


def chosen(blocks, layer):
    """The numbers of the blocks that layer stands for."""
    return range(len(blocks)) if layer is None else [layer]


def condition_numbers(model, which="q", layer=None):
    """{block: cond(Θ)} of the matrices Θ that `eliminate` would invert, W_Q for which='q' (inf: singular)."""
    weights = read_weights(model)
    return {i: condition_number(weights.blocks[i][which].weight) for i in chosen(weights.blocks, layer)}


def condition_number(theta):
    """The largest singular value of a matrix over its smallest one; inf where that is no more than rounding."""
    values = torch.linalg.svdvals(theta)
    smallest = values[-1] if has_full_rank(values) else values.new_zeros(())
    return (values[0] / smallest).item() if values[0] > 0 else float("inf")


def eliminate(model, which="q", layer=None, max_cond=MAX_COND):
    """A GPT with the logits of model in which W_Q (which='k': W_K, 'v': W_V) is the identity; model is not changed.

    model: a GPT, in any dtype, which is also that of the result; computed in float64.
    layer: the one block, from 0, whose projection goes; None: all of them.
    max_cond: the largest condition number of a Θ that is inverted. Logits in a floating-point format with unit
    roundoff u agree to about cond(Θ)·u, relatively: float32 weights have u = 6e-8, so 1e6 leaves a percent.

    Which result covers the architecture (`covering_result`):

    - Proposition 4.1, Remark 1: a single head, any norm, skips and depth; W_Q and W_K merge (not with rotary positions;
      with which='q' not with a query bias), or W_V and W_O. Nothing is inverted.
    - Theorem 4.1: norm='none' and a skip connection around attention only, each layer with its own Θ. A tied model
      stays tied: the stream ends in Θ_{L+1} = Θ_1⁻ᵀ; untied Θ_{L+1} = I. The same proof covers a skip around the MLP
      only, and none at all (sequential or parallel): less binds the bases.
    - Theorem 4.2: norm='none', share_layers=True, any skips: all layers are one block and share one Θ. The stream ends
      in the basis in which it began, so a tied model comes out untied, W̃_LM = Θ⁻¹Eᵀ and Ẽ = EΘ (Remark 2): one matrix
      for both would ask for ΘΘᵀ = I.
    - Lemma 8.4: norm='none' and skips around both halves, separate layers: one residual stream and so one Θ, that of
      `layer`; all other layers are written in its basis and keep their W_Q. Tied models come out untied.

    The result has the flag wq_identity, and d² parameters less for each block, where every block's W_Q has gone;
    where only some have (`layer`), GPTConfig has no flag for it: the flag is off and the block's W_Q is I to the bit.
    An untied model has V·d more. With biases the query bias goes as well: d more are saved; and a tied model without
    learned positions, which have room for the bias, comes out untied.
    Encoders, grouped-query heads (which='q' only), rotary positions and mixtures of experts make no difference; the
    choice of experts, being discontinuous, can differ where two are equally likely to the last bit.

    Raises ValueError with the reason when no result covers the architecture, and, naming the layer, when a Θ is
    singular or its condition number exceeds max_cond.
    """
    result = covering_result(model, which, layer)
    weights = read_weights(model)
    blocks = chosen(weights.blocks, layer)
    tied = model.config.tie_weights
    if result not in BY_CHANGE_OF_BASIS:
        for i in blocks:
            merge_single_head(weights.blocks[i], which)
    else:
        for i, cond in condition_numbers(model, which, layer).items():
            if not cond <= max_cond:
                raise ValueError(
                    f"layer {i}: W_{which.upper()} is {'singular' if cond == float('inf') else 'badly conditioned'} "
                    f"(condition number {cond:.3g}, max_cond={max_cond:g}), and its inverse would take the logits' "
                    "precision. Allow it with a larger max_cond, or choose another of q, k and v"
                )
        tied = change_stream(weights, model.config, which, blocks)
    everywhere = len(blocks) == len(weights.blocks)
    d = model.config.n_embd
    for i in blocks:
        old = weights.blocks[i].pop(which)
        if not everywhere:
            weights.blocks[i][which] = Affine(torch.eye(d).to(old.weight), torch.zeros(d).to(old.weight))
    identity = {f"w{which}_identity": everywhere}
    return build_model(weights, dataclasses.replace(model.config, tie_weights=tied, **identity), model)


def merge_single_head(block, which):
    """Proposition 4.1 and Remark 1 in one block, in place; the projection `which` is left to be dropped."""
    q, k, v, o = (block.get(name) for name in "qkvo")
    if which == "q":
        block["k"] = Affine(merge_query_into_key(q.weight, k.weight), torch.zeros_like(k.bias))
    elif which == "k":
        block["q"] = Affine(merge_query_into_key(k.weight, q.weight), q.bias @ k.weight.T)
    else:  # the attention weights of a token add up to 1, so its value bias passes whole
        block["o"] = Affine(merge_value_into_output(v.weight, o.weight), v.bias @ o.weight + o.bias)


def change_stream(weights, config, which, blocks):
    """Write weights, in place, in the bases in which the projection `which` of these blocks is I; whether still tied.

    The basis of each point of the stream is that of its group (`stream_groups`). Its origin is moved only where a block
    reads whose projection goes, by that projection's bias, and is moved back by the next bias that writes.
    """
    groups, end = stream_groups(config), 2 * config.n_layer
    n_block = len(weights.blocks)
    zero = weights.tokens.new_zeros(config.n_embd)
    identity = torch.eye(config.n_embd).to(zero)
    thetas, shifts = {}, [zero] * (end + 1)
    for point in range(0, end, 2):
        if point // 2 % n_block in blocks:
            thetas[groups[point]], shifts[point] = weights.blocks[point // 2 % n_block][which]
            if config.parallel:
                shifts[point + 1] = shifts[point]
    if config.share_layers and config.n_layer > 1:
        shifts[end] = shifts[0]
    # Without an embedding of positions, a shift of the tied embedding would reach the LM head.
    tied = config.tie_weights and groups[0] != groups[end] and not (weights.positions is None and shifts[0].any())
    if tied:
        assert groups[end] not in thetas
        thetas[groups[end]] = torch.linalg.inv(thetas.get(groups[0], identity)).T
    bases = [Basis(thetas.get(group, identity), shift) for group, shift in zip(groups, shifts, strict=True)]

    weights.tokens = weights.tokens @ bases[0].theta
    if weights.positions is not None:
        weights.positions = weights.positions @ bases[0].theta + shifts[0]
    else:
        weights.tokens = weights.tokens + shifts[0]
    for i, block in enumerate(weights.blocks):
        start, middle, after = bases[2 * i : 2 * i + 3]
        for name in {"q", "k", "v"} & set(block):
            block[name] = start.read(block[name])
        for name in {"router", "up"} & set(block):
            block[name] = middle.read(block[name])
        skipped = start.shift if config.attn_skip else zero
        if config.parallel:  # both write to one sum, whose origin the first of them moves
            block["o"] = after.write(block["o"], skipped)
            block["down"] = after.write(block["down"], after.shift)
        else:
            block["o"] = middle.write(block["o"], skipped)
            block["down"] = after.write(block["down"])  # the middle's shift is zero
    weights.head = bases[end].read(weights.head)
    return tied


def split_heads(w, n_head):
    """(rows, n_head·d_k) to (n_head, rows, d_k)."""
    return w.unflatten(-1, (n_head, -1)).transpose(0, 1)


def join_heads(w):
    """(n_head, rows, d_k) to (rows, n_head·d_k)."""
    return w.transpose(0, 1).flatten(1)
