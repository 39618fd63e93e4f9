"""A transformer with and without its query matrix, in one file.

By default the architecture is GPT-2's, as in the paper's Section 5.2 (pre-LayerNorm blocks of attention and MLP); the
options of `GPTConfig` make it any other that the paper names. With `wq_identity` the queries are the block's normalised
input itself, W_Q = I: nothing takes its place, neither a parameter nor a product. `ATTENTION` has the other queries.
`attn_scale` multiplies the usual 1/sqrt(d_k). Parameters carry nanoGPT's names, so state dicts move between the two.

Shapes: B sequences, T tokens, d_k = n_embd / n_head.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F

from engine.attention import attend
from engine.experts import active_experts, can_group, is_fast
from engine.model_options import check

INITIAL_STD = 0.02  # of the weights, as in GPT-2
PAPER_WIDTH = 768  # n_embd of the paper's models
# Of new attention logits, with attn_logit_std=small: what suits n_embd 128 (results/study_scale; between 0.4 and 0.8
# for W_Q = I, by analogy for other queries). Checkpoints store the name: another value needs another name.
SMALL_LOGIT_STD, SMALL_LOGIT_STD_OF_TRAINED = 0.6, 0.2
ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "relu_squared": lambda: SquaredReLU(),
    "swiglu": lambda: SwiGLU(),
}
NORMS = {
    "layernorm": lambda config: nn.LayerNorm(config.n_embd, bias=config.bias),
    "rmsnorm": lambda config: nn.RMSNorm(config.n_embd, eps=1e-5),
    "dyt": lambda config: DynamicTanh(config.n_embd),
    "none": lambda config: nn.Identity(),
}


@dataclass
class GPTConfig:
    """The shape of a model. Raises ValueError, naming the fields, for a combination that cannot be built."""

    # model
    block_size: int = 1024  # context length T, in tokens
    vocab_size: int = 50304  # rows of the embedding; GPT-2's 50,257 padded to a multiple of 64
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads
    n_kv_head: int | None = None  # heads of keys and values; none: n_head; fewer: grouped-query; 1: multi-query
    n_embd: int = 768  # width of the residual stream; d_k = n_embd / n_head
    mlp_ratio: float = 4.0  # hidden width of the MLP / n_embd
    dropout: float = 0.0  # probability, on the embedding, the attention weights and both outputs of a block
    bias: bool = False  # biases in the Linear and LayerNorm layers
    tie_weights: bool = True  # the embedding matrix is also the LM head
    wq_identity: bool = False  # W_Q = I: the queries are the block's normalised input
    attn_scale: float = 1.0  # multiplies 1/sqrt(d_k) on the attention logits; the paper's reduced models have 0.5
    activation: Literal["gelu", "gelu_tanh", "relu", "relu_squared", "swiglu"] = "gelu"  # gelu_tanh is GPT-2's
    wk_identity: bool = False  # W_K = I, for comparison
    wv_identity: bool = False  # W_V = I, for comparison
    query_residual: Literal["linear", "mlp"] | None = None  # with wq_identity: the input plus W_Q's or an MLP's output
    query_rotation: bool | int = False  # with wq_identity: a fixed rotation of the input in each layer; 2, 3, …: others
    wq_identity_from: int = 0  # with wq_identity: the first layer that has W_Q = I; those before it train a W_Q
    share_kv: bool = False  # W_V = W_K: the values are the keys, before rotation and normalisation
    qk_norm: bool = False  # the queries and keys of each head are divided by their root mean square
    attn_logit_std: float | Literal["paper", "small"] | None = None  # of new logits; see attn_scale_in
    norm: Literal["layernorm", "rmsnorm", "dyt", "none"] = "layernorm"  # before attention, MLP and LM head; dyt: tanh
    pos: Literal["learned", "rope", "none"] = "learned"  # positions: an embedding, or rotated queries and keys
    attn_skip: bool = True  # the skip connection around attention
    mlp_skip: bool = True  # the skip connection around the MLP
    parallel: bool = False  # attention and MLP read the same normalised input and share one skip connection
    share_layers: bool = False  # one block's weights, applied n_layer times
    causal: bool = True  # a token sees those before it; False: all of them (an encoder, for objective=mlm)
    n_expert: int = 0  # experts of a mixture-of-experts MLP; 0: a plain MLP
    n_expert_active: int = 2  # experts that a token is routed to
    load_balance: float = 0.01  # weight of the load-balancing loss of a mixture of experts, in training

    def __post_init__(self):
        check(self)

    @property
    def d_k(self):
        """The width of a head."""
        return self.n_embd // self.n_head

    @property
    def kv_heads(self):
        """The number of heads of keys and values."""
        return self.n_kv_head or self.n_head

    @property
    def mlp_hidden(self):
        """The hidden width of the MLP, or of one expert."""
        return round(self.mlp_ratio * self.n_embd)

    @property
    def fc_width(self):
        """The width of what the MLP's first matrix computes: its hidden units, and with swiglu their gates."""
        return self.mlp_hidden * (2 if self.activation == "swiglu" else 1)

    @property
    def values_are_keys(self):
        """Whether attention reads one tensor as keys and as values, so that decoding caches half as much."""
        return self.share_kv and not self.qk_norm and self.pos != "rope"

    def query(self, layer):
        """What the queries of a layer are: a name in ATTENTION."""
        if not self.wq_identity or layer < self.wq_identity_from:
            return "trained"
        return "rotation" if self.query_rotation else self.query_residual or "identity"

    def attn_scale_in(self, layer):
        """What multiplies 1/sqrt(d_k) in a layer: attn_scale, or what gives new logits the standard deviation wanted.

        That is attn_logit_std; paper: what attn_scale gives at n_embd 768; small: what suits n_embd 128.
        """
        wanted = self.attn_logit_std
        if wanted is None:
            return self.attn_scale
        if wanted == "paper":
            wanted = self.attn_scale * self.unscaled_logit_std(layer, PAPER_WIDTH)
        elif wanted == "small":
            is_trained = self.query(layer) == "trained"
            wanted = 1.0 if self.qk_norm else SMALL_LOGIT_STD_OF_TRAINED if is_trained else SMALL_LOGIT_STD
        return wanted / self.unscaled_logit_std(layer, self.n_embd)

    def unscaled_logit_std(self, layer, n_embd):
        """The standard deviation of the attention logits of new models of a width, over 1/sqrt(d_k) times 1.

        A normalised input has variance 1, and its product with new weights n_embd·0.02².
        """
        product = n_embd * INITIAL_STD**2
        query = {"trained": product, "linear": 1 + product, "mlp": 2.0}.get(self.query(layer), 1.0)
        return 1.0 if self.qk_norm else math.sqrt(query * (1.0 if self.wk_identity else product))


def at_least_float32(x):
    """x in float32 if it is in a lower precision; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def draw_normal(tensor, std, text):
    """Fill the tensor with normal numbers of mean 0 from a generator that the text seeds."""
    if not tensor.is_meta:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
        tensor.copy_(std * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)))


class DynamicTanh(nn.Module):
    """γ·tanh(αx) + β in place of a normalisation; (…, n_embd) to the same. α starts at 0.5 (arXiv 2503.10622)."""

    def __init__(self, n_embd):
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor([0.5]))
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd))

    def forward(self, x):
        return self.weight * torch.tanh(self.alpha * x) + self.bias


class Rotary(nn.Module):
    """Rotary positions: turns the pairs (i, i + d_k/2) of (B, heads, T, d_k) by angles t·10000^(−2i/d_k) (RoFormer)."""

    def __init__(self, d_k, block_size):
        super().__init__()
        frequency = 10000.0 ** (-torch.arange(0, d_k, 2, dtype=torch.float32) / d_k)
        angle = torch.outer(torch.arange(block_size, dtype=torch.float32), frequency)  # (block_size, d_k / 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x, positions=None):
        """x at positions, (T,) int64; None: at 0 to T − 1."""
        rows = slice(x.size(2)) if positions is None else positions
        cos, sin = self.cos[rows], self.sin[rows]
        first, second = at_least_float32(x).chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return turned.type_as(x)


class SelfAttention(nn.Module):
    """Multi-head attention in a layer; (B, T, n_embd) to (B, T, n_embd).

    The rows of `c_attn.weight` are the blocks Q, K, V in this order. An identity projection has none: the layer's input
    takes the place of its output; nor have values that are the keys.
    """

    has_wq = True

    def __init__(self, config: GPTConfig, layer=0):
        super().__init__()
        kv_width = config.kv_heads * config.d_k
        q_width = config.n_embd if self.has_wq else 0
        k_width = 0 if config.wk_identity else kv_width
        v_width = 0 if config.wv_identity or config.share_kv else kv_width
        self.widths = (q_width, k_width, v_width)
        self.c_attn = nn.Linear(config.n_embd, sum(self.widths), bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.rotary = Rotary(config.d_k, config.block_size) if config.pos == "rope" else None
        self.resid_dropout = nn.Dropout(config.dropout)
        self.d_k, self.dropout, self.is_causal = config.d_k, config.dropout, config.causal
        self.wk_identity, self.wv_identity, self.share_kv = config.wk_identity, config.wv_identity, config.share_kv
        self.qk_norm, self.is_grouped = config.qk_norm, config.kv_heads < config.n_head
        self.scale = config.attn_scale_in(layer) / math.sqrt(config.d_k)

    def query(self, x, product):
        """The queries, (B, T, n_embd), of the layer's input x and, where the layer has a W_Q, its product with it."""
        return product

    def split_qkv(self, tensor, dim=-1):
        """The blocks Q, K, V of c_attn's output, weight or bias along `dim`; that of an identity is empty."""
        return tensor.split(self.widths, dim)

    def project(self, x, positions=None):
        """The queries, keys and values of x, (B, heads, T, d_k) each; positions: (T,) int64, None: 0 to T − 1."""
        q, k, v = self.split_qkv(self.c_attn(x))  # (B, T, width)
        q = self.query(x, q)  # (B, T, n_embd)
        k = x if self.wk_identity else k  # (B, T, kv_heads * d_k)
        v = x if self.wv_identity else k if self.share_kv else v  # (B, T, kv_heads * d_k)
        q, k, v = (t.unflatten(-1, (-1, self.d_k)).transpose(1, 2) for t in (q, k, v))  # (B, heads, T, d_k)
        if self.qk_norm:
            q, k = (F.rms_norm(t, (self.d_k,), eps=1e-6) for t in (q, k))
        if self.rotary:
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        return q, k, v

    def forward(self, x, cache=None):
        """x: the block's normalised input. cache: the decode.LayerCache of the tokens before x, or None."""
        q, k, v = self.project(x, None if cache is None else cache.positions)
        visible = dict(is_causal=self.is_causal)
        if cache is not None:
            k, v, visible = cache.extend(k, v)
        dropout_p = self.dropout if self.training else 0.0
        y = attend(q, k, v, scale=self.scale, enable_gqa=self.is_grouped, dropout_p=dropout_p, **visible)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))  # from (B, n_head, T, d_k)


class IdentityQuery(SelfAttention):
    """W_Q = I: the queries are the input itself."""

    has_wq = False

    def query(self, x, product):
        return x


class LinearResidualQuery(SelfAttention):
    """X + X·W_Q (the authors' `residual`)."""

    def query(self, x, product):
        return x + product


class MLPResidualQuery(IdentityQuery):
    """X + LN(GELU(RMSNorm(X)·W₁)·W₂), W₁ (n_embd, n_embd/2) (arXiv 2603.13381, the authors' `residual_gelu`)."""

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        self.residual_rmsnorm_input = nn.RMSNorm(config.n_embd, eps=1e-5)
        self.residual_in = nn.Linear(config.n_embd, config.n_embd // 2, bias=config.bias)
        self.residual_out = nn.Linear(config.n_embd // 2, config.n_embd, bias=config.bias)
        self.residual_layernorm_output = nn.LayerNorm(config.n_embd, bias=config.bias)

    def query(self, x, product):
        hidden = F.gelu(self.residual_in(self.residual_rmsnorm_input(x)))  # (B, T, n_embd / 2)
        return x + self.residual_layernorm_output(self.residual_out(hidden))


class RotatedQuery(IdentityQuery):
    """X·R with a random orthogonal R of the layer, neither trained nor stored: does the choice of basis matter?"""

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        drawn = torch.empty(config.n_embd, config.n_embd, dtype=torch.float64)
        draw_normal(drawn, 1.0, f"{int(config.query_rotation)} rotation {layer}")
        self.register_buffer("rotation", torch.linalg.qr(drawn).Q.float(), persistent=False)

    def query(self, x, product):
        return x @ self.rotation.type_as(x)


ATTENTION = {
    "trained": SelfAttention,
    "identity": IdentityQuery,
    "linear": LinearResidualQuery,
    "mlp": MLPResidualQuery,
    "rotation": RotatedQuery,
}


class SquaredReLU(nn.Module):
    """max(x, 0)² (arXiv 2109.08668)."""

    def forward(self, x):
        return F.relu(x).square()


class SwiGLU(nn.Module):
    """silu(gate)·x of (…, 2·hidden), whose halves are the gates and x, to (…, hidden) (arXiv 2002.05202)."""

    def forward(self, x):
        gate, x = x.chunk(2, dim=-1)
        return F.silu(gate) * x


class MLP(nn.Module):
    """Two linear layers with an activation between; (B, T, n_embd) to (B, T, n_embd)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.fc_width, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]()
        self.c_proj = nn.Linear(config.mlp_hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))


class MixtureOfExperts(nn.Module):
    """n_expert MLPs, of which each token takes n_expert_active, weighted by the router.

    (B, T, n_embd) to the same, and the load-balancing loss E · Σ (share of the tokens) · (mean probability), 1 where
    experts are used alike (Switch Transformer, arXiv 2101.03961). Weights are probabilities, a softmax over them all.

    The experts stand side by side in one wide MLP: rows i·hidden to (i+1)·hidden of c_fc, and these columns of c_proj,
    are expert i, and the router's weight multiplies its hidden units (a bias of c_proj belongs to all). The
    active experts alone are computed where that is fast, else all, n_expert / n_expert_active times as many operations.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_expert, self.n_active, self.can_group = config.n_expert, config.n_expert_active, can_group(config)
        self.router = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.c_fc = nn.Linear(config.n_embd, config.n_expert * config.mlp_hidden, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]()
        self.c_proj = nn.Linear(config.n_expert * config.mlp_hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        logits = self.router(x)
        p = at_least_float32(logits).softmax(dim=-1)  # (B, T, n_expert)
        weight, expert = p.topk(self.n_active, dim=-1)
        chosen = torch.zeros_like(p).scatter(-1, expert, 1.0)
        share = chosen.mean(dim=(0, 1)) / self.n_active  # (n_expert,)
        balance_loss = self.n_expert * (share * p.mean(dim=(0, 1))).sum()
        if self.can_group and is_fast(logits):
            c_fc = self.c_fc.weight.unflatten(0, (self.n_expert, -1)).mT  # (n_expert, n_embd, mlp_hidden)
            c_proj = self.c_proj.weight.unflatten(1, (self.n_expert, -1)).permute(1, 2, 0)
            return self.dropout(active_experts(x, weight, expert, c_fc, self.activation, c_proj)), balance_loss
        hidden = self.activation(self.c_fc(x)).unflatten(-1, (self.n_expert, -1))  # (B, T, n_expert, mlp_hidden)
        hidden = hidden * (p * chosen).unsqueeze(-1).type_as(hidden)
        return self.dropout(self.c_proj(hidden.flatten(-2))), balance_loss


class Block(nn.Module):
    """Attention, then MLP, each on the normalised residual stream; the paper's equation (1).

    (B, T, n_embd) to the same, and the load-balancing loss of its experts, 0 for a plain MLP.
    """

    def __init__(self, config: GPTConfig, layer=0):
        super().__init__()
        self.ln_1 = NORMS[config.norm](config)
        self.attn = ATTENTION[config.query(layer)](config, layer)
        self.ln_2 = None if config.parallel else NORMS[config.norm](config)
        self.mlp = MixtureOfExperts(config) if config.n_expert else MLP(config)
        self.attn_skip, self.mlp_skip = config.attn_skip, config.mlp_skip
        self.has_experts = config.n_expert > 0

    def forward(self, x, cache=None):
        y = self.attn(self.ln_1(x), cache)
        x = x + y if self.attn_skip else y
        y, balance_loss = self.mlp_and_balance(self.ln_2(x))
        return x + y if self.mlp_skip else y, balance_loss

    def mlp_and_balance(self, x):
        """The MLP's output and its load-balancing loss."""
        return self.mlp(x) if self.has_experts else (self.mlp(x), 0.0)


class ParallelBlock(Block):
    """Attention and MLP side by side on the same normalised input, in one skip connection; it has no ln_2."""

    def forward(self, x, cache=None):
        normalised = self.ln_1(x)
        y = self.attn(normalised, cache)
        z, balance_loss = self.mlp_and_balance(normalised)
        y = y + z
        return x + y if self.attn_skip else y, balance_loss


class ParamCount(NamedTuple):
    """Numbers of trainable parameters, as the paper's Table 2 counts them."""

    total: int  # every parameter once; a tied matrix is one matrix
    attn_mlp: int  # those of the attention and MLP layers


class GPT(nn.Module):
    """A transformer language model: a decoder, or with causal=False an encoder.

    linear_loss: engine.linear_cross_entropy, which takes the loss from a part of the logits at a time; None: from all.
    The initial weights follow from torch's seed, and models of one seed share those of every matrix that both have.
    """

    def __init__(self, config: GPTConfig, linear_loss=None):
        super().__init__()
        key = torch.randint(2**62, ())  # before the layers draw weights of their own
        self.config = config
        self.linear_loss = linear_loss
        block = ParallelBlock if config.parallel else Block
        n_block = 1 if config.share_layers else config.n_layer
        self.order = [layer % n_block for layer in range(config.n_layer)]  # the block that each layer is
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                **({"wpe": nn.Embedding(config.block_size, config.n_embd)} if config.pos == "learned" else {}),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList([block(config, layer) for layer in range(n_block)]),
                "ln_f": NORMS[config.norm](config),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        if not key.is_meta:
            self.draw_weights(key)

    @torch.no_grad()
    def draw_weights(self, key):
        """Draw each matrix from a generator of its own, keyed by `key` and its name; W_Q, W_K and W_V apart."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif name.endswith("attn.c_attn.weight"):
                attention = self.get_submodule(name.removesuffix(".c_attn.weight"))
                for part, matrix in zip("QKV", attention.split_qkv(parameter, dim=0), strict=True):
                    draw_normal(matrix, INITIAL_STD, f"{key} {name} {part}")
            elif parameter.dim() == 2:
                # Each block adds twice to the residual stream: smaller output projections keep its variance (GPT-2).
                smaller = math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 1.0
                draw_normal(parameter, INITIAL_STD / smaller, f"{key} {name}")

    def forward(self, idx, targets=None, reduction="mean", cache=None):
        """Logits, and with targets the cross-entropy in nats.

        idx: (B, T) int64, T at most block_size. targets: (B, T) int64; −1 is ignored. cache: the decode.KVCache of
        the tokens before idx, advanced by T; None: there are none before.
        Returns (logits, loss): with targets, logits (B, T, vocab_size) and the mean loss over the targets that count,
        or each token's loss, (B·T,), with reduction='none'; without, logits of the last position alone,
        (B, 1, vocab_size), and None. With linear_loss there are no logits beside a loss, and no gradient with
        reduction='none'. Raises ValueError when T exceeds block_size.
        """
        B, T = idx.shape
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit into the model's block_size={self.config.block_size}")
        x = self.transformer.wte(idx)  # (B, T, n_embd)
        if self.config.pos == "learned":
            x = x + self.transformer.wpe.weight[slice(T) if cache is None else cache.positions]
        x = self.transformer.drop(x)
        balance_loss = 0.0
        for layer, block in enumerate(self.order):
            x, balance = self.transformer.h[block](x, None if cache is None else cache.layer(layer))
            balance_loss = balance_loss + balance
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        if self.linear_loss:
            logits, loss = None, self.linear_loss(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), reduction)
        else:
            logits = self.lm_head(x)  # (B, T, vocab_size)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=reduction)
        if self.training:
            loss = loss + self.config.load_balance * balance_loss / self.config.n_layer
        return logits, loss

    def num_params(self) -> ParamCount:
        """Trainable parameters: in total, and of the attention and MLP layers (the rows of the paper's Table 2)."""
        sizes = {name: parameter.numel() for name, parameter in self.named_parameters()}
        in_layers = sum(size for name, size in sizes.items() if ".attn." in name or ".mlp." in name)
        return ParamCount(sum(sizes.values()), in_layers)
