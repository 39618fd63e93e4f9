"""Change the basis of the residual stream so that one attention projection becomes the identity (Sections 3 and 4).

A transformer without normalisation computes the same function in every basis of its residual stream: with X̃ = XΘ in
place of X, Θ invertible, replace every W that reads the stream by Θ⁻¹W and every W that writes to it by WΘ, and the
logits do not change. With Θ = W_Q the queries are X̃ itself, and W_Q is no longer needed; likewise for W_K and W_V.
A skip connection carries the stream past a layer unchanged, so all points of the stream that are joined by skip
connections need the same Θ. That decides how many layers can lose their W_Q (`stream_groups`). What acts between the
projections, within a head, is not affected: rotary positions, masks, the scale, dropout.

Biases are treated exactly. The queries XW_Q + b_Q are the stream itself in the affine coordinates X̃ = XW_Q + b_Q, and
the next bias that writes to the stream moves its origin back. So b_Q is removed with W_Q, unless a layer without a bias
would have to do that.

Matrices are in the paper's orientation, Y = XW with W of shape (in, out); d is n_embd and d_k = d / n_head. Functions
that take a GPT compute in float64.
"""

import dataclasses
from typing import NamedTuple

import torch

from theory.weights import Affine, build_model, check_known, condition_number, read_weights

MAX_COND = 1e6
BY_CHANGE_OF_BASIS = ("Theorem 4.1", "Theorem 4.2", "Lemma 8.4")


class Basis(NamedTuple):
    """Coordinates X̃ = X·theta + shift of the residual stream; theta (d, d), invertible; shift (d,)."""

    theta: torch.Tensor
    shift: torch.Tensor

    def read(self, layer):
        """The Affine that maps X̃ to what layer maps X to."""
        weight = torch.linalg.solve(self.theta, layer.weight)
        return Affine(weight, layer.bias - self.shift @ weight)

    def write(self, layer, skipped=0.0):
        """The Affine that writes in these coordinates what layer writes in the old ones.

        skipped: the shift of the coordinates of the skip connection's input, to which the layer's output is added.
        """
        return Affine(layer.weight @ self.theta, layer.bias @ self.theta + self.shift - skipped)


def change_of_basis(w_q, w_k, w_v):
    """Lemma 3.1: (Θ, W̃_K, W̃_V) such that (XΘ, XΘW̃_K, XΘW̃_V) = (XW_Q, XW_K, XW_V) for all X.

    Θ = W_Q, (d, d), invertible; W̃_K = W_Q⁻¹W_K and W̃_V = W_Q⁻¹W_V, each (d, any width): keys and values may be
    narrower, as in grouped-query attention.
    """
    return w_q, torch.linalg.solve(w_q, w_k), torch.linalg.solve(w_q, w_v)


def merge_query_into_key(w_q, w_k):
    """Proposition 4.1: W̃_K = W_KW_Qᵀ, with which a single head has the same scores with W_Q = I; (d, d) each.

    XW_Q(XW_K)ᵀ = X(XW_KW_Qᵀ)ᵀ: no inverse is needed, and nothing outside attention changes, so any norm and skips are
    allowed. Rotary positions are not: the scores are then XW_Q·R·(XW_K)ᵀ with another rotation R for each pair of
    positions, and no single W̃_K gives all of them. Nor are normalised queries and keys (qk_norm).
    """
    return w_k @ w_q.T


def merge_value_into_output(w_v, w_o):
    """Remark 1: W̃_O = W_VW_O, with which a single head has the same output with W_V = I; (d, d) each.

    No inverse is needed. Any norm, skips and positions are allowed.
    """
    return w_v @ w_o


def stream_groups(config):
    """For each point of the residual stream the number of its group: a list of 2·n_layer + 1 integers.

    Points in one group must have the same basis. Point 2l is what attention of layer l reads, 2l + 1 what its MLP
    reads, 2·n_layer what the LM head reads. A skip connection puts the points at its ends into one group; shared
    layers do the same with the corresponding points of all layers.
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
        join(0, 2 * config.n_layer)  # the last layer writes in the same basis as the others
    return groups


def covering_result(model, which="q", layer=None):
    """The name of the result by which `eliminate` can rewrite model. Raises ValueError with the reason if none applies.

    which: 'q', 'k' or 'v'. layer: a block's number, from 0; None: all blocks.
    """
    config, blocks = model.config, model.transformer.h
    check_known(model)
    if which not in ("q", "k", "v"):
        raise ValueError(f"which must be q, k or v, got {which!r}")
    if layer is not None and not 0 <= layer < len(blocks):
        raise ValueError(f"layer must be at least 0 and below {len(blocks)}, the number of blocks, got {layer}")
    identities = [name for name in "qkv" if getattr(config, f"w{name}_identity")]
    if which in identities:
        raise ValueError(f"w{which}_identity=True: the model already has no W_{which.upper()}, nothing can be removed")
    if which != "q" and config.n_kv_head not in (None, config.n_head):
        raise ValueError(
            f"W_{which.upper()} is not square (n_kv_head={config.n_kv_head}, n_head={config.n_head}), so it cannot be "
            "the identity: with grouped-query heads only which=q is possible"
        )
    altered = (config.pos == "rope" or config.qk_norm) and which != "v"  # what is between X·W_Q and the scores
    # A single head has the scores (XW_Q + b_Q)(XW_K + b_K)ᵀ. Softmax ignores terms that are the same for all keys, but
    # not b_Q(XW_K)ᵀ. With W_K = I it comes from the new query bias b_QW_Kᵀ; with W_Q = I no parameter can give it.
    biased = which == "q" and config.bias and any(has_query_bias(blocks[i]) for i in block_numbers(blocks, layer))
    if config.n_head == 1 and not altered and not biased and not (which != "v" and {*identities} & {*"qk"}):
        return "Remark 1" if which == "v" else "Proposition 4.1"
    if config.norm != "none":
        approximately = ", or rewrite it with --approximate and fine-tune" if which == "q" else ""
        basis, exact = "only an orthogonal change of basis passes", "and --triangular --layer=… are exact"
        if config.norm == "dyt":
            basis, exact = "only permutations and changes of sign pass", "is exact"
        part = "of W_V" if config.pos == "rope" or config.qk_norm else "of W_Q and of W_V"
        raise ValueError(
            f"norm={config.norm}: {basis} through a norm exactly (Remark 5), so W_{which.upper()} cannot be removed "
            f"from these weights; --heads, with which a part {part} becomes I, {exact}; or use a model with norm=none, "
            f"or train with w{which}_identity=True from the start{approximately}"
        )
    if identities:
        names = ", ".join(f"w{name}_identity" for name in identities)
        raise ValueError(
            f"{names}=True: W_{which.upper()} becomes the identity only in another basis of the residual stream, where "
            f"W_{identities[0].upper()} would not be the identity; use a model with W_Q, W_K and W_V"
        )
    if config.share_layers:
        return "Theorem 4.2"
    groups = stream_groups(config)
    if layer is None and len({groups[2 * number] for number in range(len(blocks))}) < len(blocks):
        raise ValueError(
            f"the skip connections join all {len(blocks)} layers into one residual stream with one basis, so "
            f"W_{which.upper()} can become the identity in one layer only: choose it with layer=0 to layer="
            f"{len(blocks) - 1} (in all layers only with share_layers=True, attn_skip=False or mlp_skip=False)"
        )
    return "Theorem 4.1" if groups[0] != groups[-1] else "Lemma 8.4"


def has_query_bias(block):
    """Whether a block with a W_Q and biases has a query bias that is not zero."""
    return bool(block.attn.split_qkv(block.attn.c_attn.bias)[0].any())


def block_numbers(blocks, layer):
    """The numbers of the blocks that `layer` selects: one, or all for None."""
    return range(len(blocks)) if layer is None else [layer]


def condition_numbers(model, which="q", layer=None):
    """{block number: condition number of Θ} for each Θ that `eliminate` inverts: W_Q for which='q'; inf: singular."""
    weights = read_weights(model)
    return {i: condition_number(weights.blocks[i][which].weight) for i in block_numbers(weights.blocks, layer)}


def eliminate(model, which="q", layer=None, max_cond=MAX_COND):
    """A GPT with the same logits as model in which W_Q (which='k': W_K, 'v': W_V) is the identity.

    model: a GPT of any dtype, not changed; the result has the same dtype. Computed in float64.
    layer: the only block, counted from 0, whose projection is removed; None: all blocks.
    max_cond: the largest condition number of a Θ that is inverted. In a floating-point format with unit roundoff u the
    logits agree to about cond(Θ)·u, relative: in float32, u = 6e-8, a condition number of 1e6 can cost a few percent.

    `covering_result` tells which result applies:

    - Proposition 4.1 and Remark 1: a single head; any norm, skips and depth. W_Q and W_K are merged (not with rotary
      positions or qk_norm, and for which='q' not with a query bias), or W_V and W_O. Nothing is inverted.
    - Theorem 4.1: norm='none' and a skip connection around attention only. Each layer has its own Θ. A tied model stays
      tied, with Θ_{L+1} = Θ_1⁻ᵀ at the end of the stream; in an untied one Θ_{L+1} = I. The same proof covers models
      with a skip connection around the MLP only or with none, sequential or parallel, where fewer bases must be equal.
    - Theorem 4.2: norm='none' and share_layers=True, any skips. All layers are one block and have the same Θ. The
      stream ends in the basis in which it begins, so a tied model becomes untied: W̃_LM = Θ⁻¹Eᵀ and Ẽ = EΘ (Remark 2),
      which are the same matrix only if ΘΘᵀ = I.
    - Lemma 8.4: norm='none', skip connections around both halves, separate layers. There is one residual stream and so
      one Θ, that of `layer`; the other layers are written in its basis and keep their W_Q. Tied models become untied.

    If the projection is removed from every block, the result has wq_identity=True and d² fewer parameters per block,
    and d fewer for a query bias; a model that becomes untied has V·d more. If it is removed from some blocks only
    (`layer`), GPTConfig has no flag for it: the flag stays False, and W_Q of those blocks is exactly I. A tied model
    with biases and no learned positions becomes untied: the shift of the stream's origin is then in the embedding.
    Encoders, grouped-query heads (which='q' only), rotary positions and mixtures of experts are covered as well. With
    experts, rounding can change which expert is chosen when two are almost equally likely.

    Raises ValueError with the reason if no result applies, and, naming the layer, if a Θ is singular or its condition
    number exceeds max_cond.
    """
    result = covering_result(model, which, layer)
    weights = read_weights(model)
    blocks = block_numbers(weights.blocks, layer)
    tied = model.config.tie_weights
    if result not in BY_CHANGE_OF_BASIS:
        for i in blocks:
            merge_single_head(weights.blocks[i], which)
    else:
        for i, cond in condition_numbers(model, which, layer).items():
            name = f"layer {i}: W_{which.upper()}"
            if cond == float("inf"):
                raise ValueError(f"{name} is singular, so it has no inverse: choose another of q, k and v")
            if cond > max_cond:
                raise ValueError(
                    f"{name} is badly conditioned (condition number {cond:.3g}, max_cond={max_cond:g}), so inverting "
                    "it would make the logits imprecise: accept that with a larger max_cond, or choose another of q, "
                    "k and v"
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
    """Apply Proposition 4.1 or Remark 1 to one block, in place; the caller then removes the projection `which`."""
    q, k, v, o = (block.get(name) for name in "qkvo")
    if which == "q":
        block["k"] = Affine(merge_query_into_key(q.weight, k.weight), torch.zeros_like(k.bias))
    elif which == "k":
        block["q"] = Affine(merge_query_into_key(k.weight, q.weight), q.bias @ k.weight.T)
    else:  # the attention weights of a token sum to 1, so the value bias is added once
        block["o"] = Affine(merge_value_into_output(v.weight, o.weight), v.bias @ o.weight + o.bias)


def change_stream(weights, config, which, blocks):
    """Change weights, in place, to the bases in which the projection `which` of these blocks is I.

    Each point of the stream has the basis of its group (`stream_groups`). Its origin is shifted only at the input of a
    block whose projection is removed, by that projection's bias; the next bias that writes to the stream undoes it.
    Returns whether the model is tied afterwards.
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
    # Without a position embedding the shift is added to the token embedding; if tied, it would be in the LM head, too.
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
        if config.parallel:  # both write to one sum, so only one of them shifts its origin
            block["o"] = after.write(block["o"], skipped)
            block["down"] = after.write(block["down"], after.shift)
        else:
            block["o"] = middle.write(block["o"], skipped)
            block["down"] = after.write(block["down"])  # the shift of `middle` is zero
    weights.head = bases[end].read(weights.head)
    return tied
