"""The GPT of the paper's Section 5.2, with and without a query matrix, in one file.

The architecture is GPT-2's (pre-LayerNorm blocks of attention and MLP). With `wq_identity` the queries are the
block's normalised input itself, W_Q = I: nothing takes its place, neither a parameter nor a product. `attn_scale`
multiplies the usual 1/sqrt(d_k). Parameters carry nanoGPT's names, so state dicts move between the two.

Shapes: B sequences, T tokens, d_k = n_embd / n_head.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F

ACTIVATIONS = {"gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU(approximate="tanh"), "relu": nn.ReLU}


@dataclass
class GPTConfig:
    """The shape of a model. Raises ValueError, naming the fields, for a combination that cannot be built."""

    block_size: int = 1024  # context length T, in tokens
    vocab_size: int = 50304  # rows of the embedding; GPT-2's 50,257 padded to a multiple of 64
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # width of the residual stream; d_k = n_embd / n_head
    mlp_ratio: float = 4.0  # hidden width of the MLP / n_embd
    dropout: float = 0.0  # probability, on the embedding, the attention weights and both outputs of a block
    bias: bool = False  # biases in the Linear and LayerNorm layers
    tie_weights: bool = True  # the embedding matrix is also the LM head
    wq_identity: bool = False  # W_Q = I: the queries are the block's normalised input
    attn_scale: float = 1.0  # multiplies 1/sqrt(d_k) on the attention logits; the paper's reduced models have 0.5
    activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu"  # of the MLP; gelu_tanh is GPT-2's approximation

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "mlp_ratio"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            lower = self.n_embd - self.n_embd % self.n_head
            near = f"{lower} or {lower + self.n_head}" if lower else f"{self.n_head}"
            raise ValueError(
                f"n_embd={self.n_embd} does not divide into n_head={self.n_head} heads: make n_embd a multiple of "
                f"{self.n_head}, such as {near}"
            )
        if self.mlp_ratio * self.n_embd % 1:
            raise ValueError(
                f"mlp_ratio={self.mlp_ratio} times n_embd={self.n_embd} is not a whole hidden width: make mlp_ratio a "
                f"multiple of 1/{self.n_embd}, such as {round(self.mlp_ratio * self.n_embd)}/{self.n_embd}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {self.activation!r}")


class ParamCount(NamedTuple):
    """Numbers of trainable parameters, as the paper's Table 2 counts them."""

    total: int  # every parameter once; a tied matrix is one matrix
    attn_mlp: int  # those of the attention and MLP layers


class CausalSelfAttention(nn.Module):
    """Multi-head causal attention; (B, T, n_embd) to (B, T, n_embd).

    The rows of `c_attn.weight` are the blocks Q, K, V in this order. The block of an identity projection is absent,
    and the layer's input takes its place.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        d = config.n_embd
        self.n_head, self.dropout = config.n_head, config.dropout
        self.scale = config.attn_scale / math.sqrt(d // config.n_head)
        self.is_identity = (config.wq_identity, False, False)  # of Q, K, V
        self.widths = [d for identity in self.is_identity if not identity]
        self.c_attn = nn.Linear(d, sum(self.widths), bias=config.bias)
        self.c_proj = nn.Linear(d, d, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        B, T, d = x.shape
        projected = list(self.c_attn(x).split(self.widths, dim=-1))
        q, k, v = [x if identity else projected.pop(0) for identity in self.is_identity]
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in (q, k, v))  # (B, n_head, T, d_k)
        dropout_p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True, scale=self.scale)
        y = y.transpose(1, 2).reshape(B, T, d)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two linear layers with an activation between; (B, T, n_embd) to (B, T, n_embd)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        hidden = round(config.mlp_ratio * config.n_embd)
        self.c_fc = nn.Linear(config.n_embd, hidden, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]()
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))


class Block(nn.Module):
    """Attention, then MLP, each on the normalised residual stream; the paper's equation (1)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A decoder-only transformer language model."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
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

    def forward(self, idx, targets=None, reduction="mean"):
        """Logits, and with targets the cross-entropy in nats.

        idx: (B, T) int64, T at most block_size. targets: (B, T) int64; −1 is ignored.
        Returns (logits, loss): with targets, logits (B, T, vocab_size) and the mean loss over the targets that count,
        or each token's loss, (B·T,), with reduction='none'; without, logits of the last position alone,
        (B, 1, vocab_size), and None. Raises ValueError when T exceeds block_size.
        """
        B, T = idx.shape
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit into the model's block_size={self.config.block_size}")
        position = torch.arange(T, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(position))  # (B, T, n_embd)
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=reduction)
        return logits, loss

    def num_params(self) -> ParamCount:
        """Trainable parameters: in total, and of the attention and MLP layers (the rows of the paper's Table 2)."""
        sizes = {name: parameter.numel() for name, parameter in self.named_parameters()}
        in_layers = sum(size for name, size in sizes.items() if ".attn." in name or ".mlp." in name)
        return ParamCount(sum(sizes.values()), in_layers)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None, progress=None):
        """Continue each row of idx, (B, T) int64 with T ≥ 1, by max_new_tokens; (B, T + max_new_tokens).

        The model sees the last block_size tokens. temperature 0 takes the likeliest token; top_k keeps the k likeliest,
        top_p the smallest set of them whose probability reaches p. progress is called with 1 after each token.
        """
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size :])
            token = sample_token(logits[:, -1].float(), temperature, top_k, top_p, generator)
            idx = torch.cat((idx, token), dim=1)
            if progress:
                progress(1)
        return idx


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """One token a row, (B, 1) int64, from logits (B, vocab_size); the options of `GPT.generate`."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, [-1]]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        descending, order = logits.sort(descending=True)
        p = descending.softmax(dim=-1)
        beyond = p.cumsum(dim=-1) - p >= top_p  # what is likelier already reaches top_p; the first token always stays
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=generator)
