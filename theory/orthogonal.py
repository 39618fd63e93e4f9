"""Changes of basis that pass through a normalisation exactly: the orthogonal ones.

RMSNorm(xU) = RMSNorm(x)U for an orthogonal U, once its gain is folded into the matrices that read it. LayerNorm is
RMSNorm of a stream without a mean, and the stream has none once every matrix that writes to it removes it. So any model
with these norms can be written in another orthonormal basis of its residual stream (arXiv 2401.15024 prunes models that
way). One basis serves the whole stream: in one layer W_Q becomes upper triangular, or, where it is a multiple of an
orthogonal matrix, that multiple of I.

Matrices are in the paper's orientation, Y = XW with W of shape (in, out).
"""

import dataclasses

import torch

from theory.weights import Affine, Weights, build_model, read_weights


def triangular_query(model, layer):
    """A GPT with the same logits in which W_Q of one layer is upper triangular, without negative diagonal entries.

    model: norm layernorm, rmsnorm or none; any heads, skips and positions. The result has norm=rmsnorm in place of
    layernorm, gains of 1, and is untied if the last norm had another gain; d(d − 1)/2 numbers of that W_Q are 0. Raises
    ValueError for dyt, for W_Q, W_K or W_V = I, and for shifts of norms that nothing after them can take up.
    """
    config = model.config
    for name in ("wq_identity", "wk_identity", "wv_identity"):
        if getattr(config, name):
            raise ValueError(f"{name}=True: in another basis that projection would not be the identity")
    if config.norm == "dyt":
        raise ValueError("norm=dyt: Dynamic Tanh acts on each coordinate, so no other basis passes through it")
    if not 0 <= layer < len(model.transformer.h):
        raise ValueError(f"layer must be at least 0 and below {len(model.transformer.h)}, got {layer}")
    weights, tied = fold_norms(model)
    basis, r = torch.linalg.qr(weights.blocks[layer]["q"].weight)
    signs = r.diagonal().sign()
    change_basis(weights, basis * torch.where(signs == 0, 1.0, signs))
    q = weights.blocks[layer]["q"]
    weights.blocks[layer]["q"] = q._replace(weight=q.weight.triu())  # below are rounding errors
    norm = "none" if config.norm == "none" else "rmsnorm"
    return build_model(weights, dataclasses.replace(config, norm=norm, tie_weights=tied), model, unit_norms=True)


def fold_norms(model):
    """(Weights, tied) of an equal GPT whose norms are RMSNorm with gains of 1, or none: see `triangular_query`."""
    weights, state, d = read_weights(model), model.state_dict(), model.config.n_embd

    def gain(name):
        return state.get(f"{name}.weight", torch.ones(d)).double(), state.get(f"{name}.bias", torch.zeros(d)).double()

    for number, block in enumerate(weights.blocks):
        norms = [f"transformer.h.{number}.ln_{i}" for i in ((1, 1) if model.config.parallel else (1, 2))]
        for norm, readers in zip(norms, (("q", "k", "v"), ("router", "up")), strict=True):
            scale, shift = gain(norm)
            for name in {*readers} & {*block}:
                block[name] = read_scaled(
                    block[name], scale, shift, f"the router of layer {number}" if name == "router" else None
                )
    scale, shift = gain("transformer.ln_f")
    tied = model.config.tie_weights and bool((scale == 1).all())
    weights.head = read_scaled(weights.head, scale, shift, "the LM head")
    if model.config.norm == "layernorm":
        change_basis(weights, torch.eye(d, dtype=torch.float64) - 1 / d)
    return weights, tied


def read_scaled(layer, scale, shift, without_bias):
    """The Affine that maps x to what layer maps x·scale + shift to. without_bias: the name of a layer that has none."""
    if without_bias and shift.any():
        raise ValueError(
            f"the norm before {without_bias} has a shift, which it cannot take up, as it has no bias: exact only for "
            "models whose shift there is zero, such as those with bias=False"
        )
    return Affine(scale[:, None] * layer.weight, layer.bias + shift @ layer.weight)


def change_basis(weights: Weights, basis):
    """Write a model in the coordinates x·basis, in place; basis (d, d): orthogonal, or a projection on the stream."""
    weights.tokens = weights.tokens @ basis
    weights.positions = None if weights.positions is None else weights.positions @ basis
    weights.head = weights.head._replace(weight=basis.T @ weights.head.weight)
    for block in weights.blocks:
        for name in block:
            layer = block[name]
            if name in ("o", "down"):
                block[name] = Affine(layer.weight @ basis, layer.bias @ basis)
            else:
                block[name] = layer._replace(weight=basis.T @ layer.weight)
