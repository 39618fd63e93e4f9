"""A transformer with and without its query matrix, in one file.

By default the architecture is GPT-2's, as in the paper's Section 5.2 (pre-LayerNorm blocks of attention and MLP); the
options of `GPTConfig` make it any other that the paper names. With `wq_identity` the queries are the block's normalised
input itself, W_Q = I: nothing takes its place, neither a parameter nor a product. `attn_scale` multiplies the usual
1/sqrt(d_k). Parameters carry nanoGPT's names, so state dicts move between the two.

Shapes: B sequences, T tokens, d_k = n_embd / n_head.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F

ACTIVATIONS = {"gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU(approximate="tanh"), "relu": nn.ReLU}
NORMS = {
    "layernorm": lambda config: nn.LayerNorm(config.n_embd, bias=config.bias),
    "rmsnorm": lambda config: nn.RMSNorm(config.n_embd, eps=1e-5),
    "dyt": lambda config: DynamicTanh(config.n_embd),
    "none": lambda config: nn.Identity(),
}


@dataclass
class GPTConfig:
    """The shape of a model. Raises ValueError, naming the fields, for a combination that cannot be built."""

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
    activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu"  # of the MLP; gelu_tanh is GPT-2's approximation
    wk_identity: bool = False  # W_K = I, for comparison
    wv_identity: bool = False  # W_V = I, for comparison
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
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "mlp_ratio", "n_expert_active"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name, choices in (("activation", ACTIVATIONS), ("norm", NORMS), ("pos", ("learned", "rope", "none"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if self.n_embd % self.n_head:
            lower = self.n_embd - self.n_embd % self.n_head
            near = " or ".join(str(width) for width in (lower, lower + self.n_head) if width)
            raise ValueError(
                f"n_embd={self.n_embd} does not divide into n_head={self.n_head} heads: make n_embd a multiple of "
                f"{self.n_head}, such as {near}"
            )
        if self.mlp_ratio * self.n_embd % 1:
            raise ValueError(
                f"mlp_ratio={self.mlp_ratio} times n_embd={self.n_embd} is not a whole hidden width: make mlp_ratio a "
                f"multiple of 1/{self.n_embd}, such as {round(self.mlp_ratio * self.n_embd)}/{self.n_embd}"
            )
        if self.n_kv_head is not None and (self.n_kv_head < 1 or self.n_head % self.n_kv_head):
            divisors = [str(n) for n in range(1, self.n_head + 1) if self.n_head % n == 0]
            raise ValueError(
                f"n_kv_head={self.n_kv_head} must divide n_head={self.n_head}: use one of {', '.join(divisors)}"
            )
        if self.n_kv_head not in (None, self.n_head) and (self.wk_identity or self.wv_identity):
            raise ValueError(
                f"wk_identity and wv_identity need n_kv_head=n_head={self.n_head}, not {self.n_kv_head}: with fewer "
                "heads keys and values are narrower than the block's input, which cannot take their place"
            )
        if self.wq_identity and self.wk_identity and self.wv_identity:
            raise ValueError(
                "wq_identity, wk_identity and wv_identity leave attention nothing to learn: set at most two"
            )
        if self.pos == "rope" and self.n_embd // self.n_head % 2:
            raise ValueError(
                f"pos=rope rotates pairs: n_embd/n_head must be even, not {self.n_embd}/{self.n_head} = "
                f"{self.n_embd // self.n_head}"
            )
        if self.parallel and self.attn_skip != self.mlp_skip:
            raise ValueError(
                "parallel=True has one skip connection: set attn_skip and mlp_skip both to True or to False"
            )
        if self.n_expert and not self.n_expert_active <= self.n_expert:
            raise ValueError(
                f"n_expert_active={self.n_expert_active} must not exceed n_expert={self.n_expert} (0: a plain MLP)"
            )


class ParamCount(NamedTuple):
    """Numbers of trainable parameters, as the paper's Table 2 counts them."""

    total: int  # every parameter once; a tied matrix is one matrix
    attn_mlp: int  # those of the attention and MLP layers


def at_least_float32(x):
    """x in float32 if it is in a lower precision; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


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


def unrotated(x, positions=None):
    """No rotary positions: x as it is."""
    return x


def attend(q, k, v, **options):
    """F.scaled_dot_product_attention of (B, heads, T, d_k) each; with gradients, on a CPU and at small T in float32."""
    # There its backward pass takes up to five times as long in bfloat16, more than the forward pass saves.
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.size(2) * q.size(3) <= 2**14:
        with torch.autocast("cpu", enabled=False):
            y = F.scaled_dot_product_attention(*map(at_least_float32, (q, k, v)), **options)
        return y.type_as(v)
    return F.scaled_dot_product_attention(q, k, v, **options)


class SelfAttention(nn.Module):
    """Multi-head attention; (B, T, n_embd) to (B, T, n_embd).

    The rows of `c_attn.weight` are the blocks Q, K, V in this order. The block of an identity projection is absent,
    and the layer's input takes its place.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        d, d_k = config.n_embd, config.n_embd // config.n_head
        self.d_k, self.dropout = d_k, config.dropout
        n_kv_head = config.n_kv_head or config.n_head
        self.is_causal = config.causal
        self.options = dict(scale=config.attn_scale / math.sqrt(d_k), enable_gqa=n_kv_head < config.n_head)
        self.is_identity = (config.wq_identity, config.wk_identity, config.wv_identity)
        widths = (d, n_kv_head * d_k, n_kv_head * d_k)
        self.widths = [width for width, identity in zip(widths, self.is_identity, strict=True) if not identity]
        self.c_attn = nn.Linear(d, sum(self.widths), bias=config.bias)
        self.c_proj = nn.Linear(d, d, bias=config.bias)
        self.rotate = Rotary(d_k, config.block_size) if config.pos == "rope" else unrotated
        self.resid_dropout = nn.Dropout(config.dropout)

    def project(self, x, positions=None):
        """Queries, keys and values of x, rotated if positions are rotary (`Rotary`); (B, heads, T, d_k) each."""
        projected = list(self.c_attn(x).split(self.widths, dim=-1))
        q, k, v = [x if identity else projected.pop(0) for identity in self.is_identity]
        q, k, v = (t.unflatten(-1, (-1, self.d_k)).transpose(1, 2) for t in (q, k, v))
        return self.rotate(q, positions), self.rotate(k, positions), v

    def forward(self, x, cache=None):
        if cache is None:
            q, k, v = self.project(x)
            visible = dict(is_causal=self.is_causal)
        else:
            q, k, v = self.project(x, cache.positions)
            k, v = cache.extend(k, v)
            visible = cache.visible
        dropout_p = self.dropout if self.training else 0.0
        y = attend(q, k, v, dropout_p=dropout_p, **visible, **self.options)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))  # from (B, n_head, T, d_k)


class MLP(nn.Module):
    """Two linear layers with an activation between; (B, T, n_embd) to (B, T, n_embd)."""

    balance_loss = 0.0  # there is nothing to balance

    def __init__(self, config: GPTConfig):
        super().__init__()
        hidden = round(config.mlp_ratio * config.n_embd)
        self.c_fc = nn.Linear(config.n_embd, hidden, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]()
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))


class MixtureOfExperts(nn.Module):
    """n_expert MLPs; a token's output is the sum of n_expert_active of them, weighted by the router; shapes as for MLP.

    The experts stand side by side in one wide MLP: rows i·hidden to (i+1)·hidden of c_fc, and these columns of c_proj,
    are expert i, and the router's weight multiplies its hidden units (a bias of c_proj belongs to all). So every expert
    is computed, n_expert / n_expert_active times the operations needed, but in two large products that nothing waits
    for. Weights are probabilities, a softmax over all experts; balance_loss is E · Σ (share of the tokens) · (mean
    probability), 1 where experts are used alike (Switch Transformer, arXiv 2101.03961).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_expert, self.n_active = config.n_expert, config.n_expert_active
        hidden = round(config.mlp_ratio * config.n_embd)
        self.router = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.c_fc = nn.Linear(config.n_embd, config.n_expert * hidden, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]()
        self.c_proj = nn.Linear(config.n_expert * hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        p = at_least_float32(self.router(x)).softmax(dim=-1)  # (B, T, n_expert)
        chosen = torch.zeros_like(p).scatter(-1, p.topk(self.n_active, dim=-1).indices, 1.0)
        share = chosen.mean(dim=(0, 1)) / self.n_active
        self.balance_loss = self.n_expert * (share * p.mean(dim=(0, 1))).sum()  # GPT.forward reads it
        hidden = self.activation(self.c_fc(x)).unflatten(-1, (self.n_expert, -1))  # (B, T, n_expert, hidden)
        hidden = hidden * (p * chosen).unsqueeze(-1).type_as(hidden)
        return self.dropout(self.c_proj(hidden.flatten(-2)))


def add(x, y):
    """A skip connection: x goes around the layer whose output is y."""
    return x + y


def replace(x, y):
    """No skip connection: the layer's output alone goes on."""
    return y


class Block(nn.Module):
    """Attention, then MLP, each on the normalised residual stream; the paper's equation (1)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = NORMS[config.norm](config)
        self.attn = SelfAttention(config)
        self.ln_2 = NORMS[config.norm](config)
        self.mlp = MixtureOfExperts(config) if config.n_expert else MLP(config)
        self.join_attn = add if config.attn_skip else replace
        self.join_mlp = add if config.mlp_skip else replace

    def forward(self, x, cache=None):
        x = self.join_attn(x, self.attn(self.ln_1(x), cache))
        return self.join_mlp(x, self.mlp(self.ln_2(x)))


class ParallelBlock(Block):
    """Attention and MLP side by side on the same normalised input, in one skip connection; it has no ln_2."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        del self.ln_2

    def forward(self, x, cache=None):
        normalised = self.ln_1(x)
        return self.join_attn(x, self.attn(normalised, cache) + self.mlp(normalised))


class GPT(nn.Module):
    """A transformer language model: a decoder, or with causal=False an encoder."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.chunked_loss = None  # or linear_cross_entropy: the loss with a part of the logits in memory at a time
        block = ParallelBlock if config.parallel else Block
        n_block = 1 if config.share_layers else config.n_layer
        self.order = [layer % n_block for layer in range(config.n_layer)]  # the block of each layer
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                **({"wpe": nn.Embedding(config.block_size, config.n_embd)} if config.pos == "learned" else {}),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList([block(config) for _ in range(n_block)]),
                "ln_f": NORMS[config.norm](config),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        self.apply(self._init_weights)
        # Each block adds twice to the residual stream: smaller output projections keep its variance level (GPT-2).
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init_weights(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None, reduction="mean", cache=None):
        """Logits, and with targets the cross-entropy in nats.

        idx: (B, T) int64, T at most block_size. targets: (B, T) int64; −1 is ignored. cache: the decode.KVCache of
        the tokens before idx, advanced by T; None: there are none before.
        Returns (logits, loss): with targets, logits (B, T, vocab_size) and the mean loss over the targets that count,
        or each token's loss, (B·T,), with reduction='none'; without, logits of the last position alone,
        (B, 1, vocab_size), and None. With chunked_loss there are no logits beside a loss, and no gradient with
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
            x = self.transformer.h[block](x, None if cache is None else cache.layer(layer))
            balance_loss = balance_loss + self.transformer.h[block].mlp.balance_loss
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        if self.chunked_loss:
            logits, weight = None, self.lm_head.weight
            loss = self.chunked_loss(x.flatten(0, 1), weight, targets.flatten(), reduction)
        else:
            logits = self.lm_head(x)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=reduction)
        if self.training:
            loss = loss + self.config.load_balance * balance_loss / self.config.n_layer
        return logits, loss

    def num_params(self) -> ParamCount:
        """Trainable parameters: in total, and of the attention and MLP layers (the rows of the paper's Table 2)."""
        sizes = {name: parameter.numel() for name, parameter in self.named_parameters()}
        in_layers = sum(size for name, size in sizes.items() if ".attn." in name or ".mlp." in name)
        return ParamCount(sum(sizes.values()), in_layers)
