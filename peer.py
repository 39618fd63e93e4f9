"""Hugging Face's GPT-2 in the place of ours, for a comparison of speeds: same sizes, optimizer and data."""

import importlib.util

import torch
from torch import nn
from torch.nn import functional as F

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}
GPT2 = dict(n_kv_head=None, norm="layernorm", pos="learned", parallel=False, share_layers=False, causal=True)
GPT2 |= dict(attn_skip=True, mlp_skip=True, n_expert=0, wk_identity=False, wv_identity=False)


def check(config):
    """Raise ValueError where transformers is missing, or when a GPTConfig is not GPT-2's architecture."""
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("peer=hf needs the package transformers: `pip install transformers`, or leave peer out")
    for name, value in GPT2.items():
        if getattr(config, name) != value:
            raise ValueError(f"peer=hf is GPT-2, which has {name}={value}, not {getattr(config, name)}")


class HuggingFaceGPT2(nn.Module):
    """transformers.GPT2LMHeadModel of a GPTConfig's sizes, called as `model.GPT` is. It always has biases."""

    def __init__(self, config):
        super().__init__()
        import transformers

        transformers.logging.set_verbosity_error()  # it warns of settings that it chose itself
        self.config = config
        self.gpt2 = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=config.vocab_size,
                n_positions=config.block_size,
                n_embd=config.n_embd,
                n_layer=config.n_layer,
                n_head=config.n_head,
                n_inner=round(config.mlp_ratio * config.n_embd),
                activation_function=ACTIVATIONS[config.activation],
                resid_pdrop=config.dropout,
                embd_pdrop=config.dropout,
                attn_pdrop=config.dropout,
                tie_word_embeddings=config.tie_weights,
                bos_token_id=None,
                eos_token_id=None,  # so that a generation does not end early
                pad_token_id=0,
                attn_implementation="sdpa",
            )
        )

    def forward(self, idx, targets, reduction="mean"):
        """(None, loss): its own loss over the T − 1 targets within idx, (B, T); with 'none' that of each target."""
        if reduction == "mean":
            return None, self.gpt2(input_ids=idx, labels=idx, use_cache=False).loss
        logits = self.gpt2(input_ids=idx, use_cache=False).logits
        return None, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=reduction)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, compile_step=False):
        """Its own cached generation, greedy, of exactly max_new_tokens after idx, (B, T).

        compile_step: with its static cache, which transformers compiles on a GPU.
        """
        return self.gpt2.generate(
            idx,
            attention_mask=torch.ones_like(idx),
            max_new_tokens=max_new_tokens,
            min_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            cache_implementation="static" if compile_step else None,
        )


def put_into(run, make_optimizer):
    """Have a train.Trainer train Hugging Face's model in place of its own, in the same way."""
    run.model = HuggingFaceGPT2(run.cfg.model_config()).to(run.device)
    if run.cfg.recompute:
        run.model.gpt2.gradient_checkpointing_enable({"use_reentrant": False})
    run.fast_model, run.synchronise = (torch.compile(run.model) if run.compiled else run.model), lambda on: None
    run.optimizer = make_optimizer(run.model, run.cfg, run.device.type)
