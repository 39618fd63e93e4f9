"""Generate text: prefill the prompt, then decode a token at a time with a cache of keys and values (KV cache).

The result is that of the model without a cache. Beyond the block size each token needs the whole window again, because
every position in it has moved.
"""

import itertools
import math
from typing import NamedTuple

import torch
from torch import nn


def lay_out(model, n_decoded=None, dtype=torch.float32):
    """Store the weights of a model on a CPU in the order that suits decoding n_decoded sequences at once in dtype.

    n_decoded: None for training, the order of a new model. One sequence in float32 makes products of one row, which
    take as little as 0.6 times as long with weights stored column by column where a layer is wider at its output; two
    rows take twice as long that way. The values stay the same, but an optimizer that has taken steps must go on with
    the order in which it took them.
    """
    by_column = n_decoded == 1 and dtype == torch.float32
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.out_features > layer.in_features and not layer.weight.is_cuda:
            weight = layer.weight.data
            layer.weight.data = weight.t().contiguous().t() if by_column else weight.contiguous()


class KVCache:
    """The keys and values of each layer for the tokens seen so far, in tensors that are allocated once.

    batch_size: sequences. max_tokens: the most that they will hold, at most the model's block_size. few_shapes:
    attention after the prompt looks at a multiple of 128 places and masks the rest, so that few CUDA graphs suffice.
    Call `advance` before each forward pass.
    """

    STRIDE = 128

    def __init__(self, model, batch_size, max_tokens, few_shapes=False):
        config, weight = model.config, model.lm_head.weight
        # One place more than attention ever looks at: were all in view, torch.compile would compile that case apart.
        shape = (batch_size, config.kv_heads, max_tokens + 1, config.d_k)
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        # Not one tensor for all: torch.compile copies the whole of a tensor that a view of it writes to.
        kinds = ("both",) if config.values_are_keys else ("keys", "values")
        self.tensors = [
            [torch.zeros(shape, dtype=dtype, device=weight.device) for _ in kinds] for _ in range(config.n_layer)
        ]
        self.max_tokens, self.n_tokens, self.few_shapes = max_tokens, 0, few_shapes

    def advance(self, n_new):
        """Make room for the next n_new tokens of each sequence."""
        device, n_before = self.tensors[0][0].device, self.n_tokens
        self.positions = torch.arange(n_before, n_before + n_new, device=device)
        self.n_tokens = self.n_places = n_before + n_new
        if n_before and self.few_shapes:
            self.n_places = min(math.ceil(self.n_tokens / self.STRIDE) * self.STRIDE, self.max_tokens)
        # Attention without a mask has faster kernels: the first tokens are plainly causal, and a last one sees all.
        if n_before == 0:
            self.visible = dict(is_causal=True)
        elif n_new == 1 and not self.few_shapes:
            self.visible = {}
        else:
            places = torch.arange(self.n_places, device=device)
            self.visible = dict(attn_mask=places <= self.positions[:, None])  # (n_new, n_places)

    def repeat(self, n):
        """Give each sequence n copies, which stand next to each other."""
        self.tensors = [[kept.repeat_interleave(n, dim=0) for kept in layer] for layer in self.tensors]

    def layer(self, number):
        """The LayerCache of one layer, for the tokens of the last `advance`."""
        keys, values = self.tensors[number][0], self.tensors[number][-1]
        return LayerCache(keys, values, self.positions, self.n_places, self.visible)


class LayerCache(NamedTuple):
    """What attention needs of a KVCache."""

    keys: torch.Tensor  # (B, kv_heads, max_tokens + 1, d_k), as are the values
    values: torch.Tensor  # the same tensor as keys where values are keys
    positions: torch.Tensor  # (n_new,) int64, of the new tokens
    n_places: int  # that attention looks at
    visible: dict  # which of these a new token sees, for scaled_dot_product_attention

    def extend(self, k, v):
        """Keep the new tokens' k and v, (B, kv_heads, n_new, d_k); those of all n_places, and which are visible."""
        for kept, new in ((self.keys, k), (self.values, v))[: 1 if self.values is self.keys else 2]:
            kept.index_copy_(2, self.positions, new.to(kept.dtype))
        return self.keys[:, :, : self.n_places], self.values[:, :, : self.n_places], self.visible


@torch.no_grad()
def generate(
    model,
    idx,
    max_new_tokens,
    temperature=1.0,
    top_k=None,
    top_p=None,
    generator=None,
    num_samples=1,
    compile_step=False,
    progress=None,
):
    """Continue each row of idx, (B, T) int64 with T ≥ 1, num_samples times by max_new_tokens tokens.

    Returns (B · num_samples, T + max_new_tokens), the samples of a row next to each other; they share the work on the
    prompt. The model sees the last block_size tokens. temperature 0 takes the likeliest token; top_k keeps the k
    likeliest, top_p the smallest set of them whose probability reaches p. compile_step: torch.compile for the tokens
    after the prompt. progress is called after each token with the number of sequences. Nothing waits for a GPU.
    """
    block_size, n_prompt = model.config.block_size, idx.size(1)
    tokens = idx.new_empty(idx.size(0) * num_samples, n_prompt + max_new_tokens)
    tokens[:, :n_prompt] = idx.repeat_interleave(num_samples, dim=0)
    prompt = idx[:, -block_size:]
    max_tokens = min(block_size, prompt.size(1) + max(0, max_new_tokens - 1))
    cuda_graphs = compile_step and idx.is_cuda
    cache = KVCache(model, len(prompt), max_tokens, few_shapes=cuda_graphs)
    cache.advance(prompt.size(1))
    logits, _ = model(prompt, cache=cache)
    logits = logits.repeat_interleave(num_samples, dim=0)
    cache.repeat(num_samples)
    step = model
    if cuda_graphs:
        for kept in itertools.chain(*cache.tensors):
            torch._dynamo.mark_static_address(kept)  # the graphs may write to it
        step = torch.compile(model, mode="reduce-overhead")
    elif compile_step:
        step = torch.compile(model, dynamic=True, options={"cpp_wrapper": True})  # no Python from kernel to kernel
    for n in range(n_prompt, n_prompt + max_new_tokens):
        if n > n_prompt:
            if cache.n_tokens < block_size:
                cache.advance(1)
                logits, _ = step(tokens[:, n - 1 : n], cache=cache)
            else:
                logits, _ = model(tokens[:, n - block_size : n])
        tokens[:, n] = sample_token(logits[:, -1].float(), temperature, top_k, top_p, generator)
        if progress:
            progress(len(tokens))
    return tokens


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """A token for each row of logits (B, vocab_size), (B,) int64; the options of `generate`."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    values, tokens = logits / temperature, None
    if top_k is not None:
        values, tokens = values.topk(min(top_k, values.size(-1)))  # descending
    if top_p is not None:
        if tokens is None:
            values, tokens = values.sort(descending=True)
        p = values.softmax(dim=-1)
        # What is likelier already reaches top_p; the first token always stays.
        values = values.masked_fill(p.cumsum(dim=-1) - p >= top_p, -torch.inf)
    # torch.multinomial would wait for the device, and takes longer over a large vocabulary.
    dtype = torch.float32 if values.device.type == "mps" else torch.float64  # which Apple's GPUs do not have
    cumulative = values.to(dtype).softmax(dim=-1).cumsum(dim=-1)
    drawn = torch.rand(len(values), 1, dtype=dtype, device=values.device, generator=generator)
    place = torch.searchsorted(cumulative, drawn * cumulative[:, -1:], right=True).clamp(max=values.size(-1) - 1)
    return (place if tokens is None else tokens.gather(1, place))[:, 0]
