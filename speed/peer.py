"""Other GPT-2s in the place of ours, for a comparison of speeds: same sizes, loop, optimizer and data."""

import contextlib
import importlib.util
import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

NAMES = {"hf": "Hugging Face", "nanogpt": "nanoGPT"}
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}  # ours -> those of transformers
GPT2 = dict(n_kv_head=None, norm="layernorm", pos="learned", parallel=False, share_layers=False, causal=True)
GPT2 |= dict(attn_skip=True, mlp_skip=True, n_expert=0, wk_identity=False, wv_identity=False)
NANOGPT = GPT2 | dict(tie_weights=True, activation="gelu", mlp_ratio=4, recompute=False)


def check(peer, cfg):
    """Raise ValueError where the peer, one of NAMES, is not installed or is not the architecture of a BenchConfig."""
    if peer == "hf" and importlib.util.find_spec("transformers") is None:
        raise ValueError("peer=hf needs the package transformers: `pip install transformers`, or leave peer out")
    if peer == "nanogpt" and not (Path(cfg.nanogpt) / "model.py").is_file():
        raise ValueError(
            f"peer=nanogpt needs a clone of nanoGPT, and there is no {Path(cfg.nanogpt) / 'model.py'}: "
            "`git clone https://github.com/karpathy/nanoGPT`, then --nanogpt=FOLDER"
        )
    for name, value in (NANOGPT if peer == "nanogpt" else GPT2).items():
        if getattr(cfg, name) != value:
            raise ValueError(f"peer={peer} has {name}={value}, not {getattr(cfg, name)}: leave {name} or the peer out")


class HuggingFaceGPT2(nn.Module):
    """transformers.GPT2LMHeadModel of a BenchConfig's sizes, called as `model.GPT` is. It always has biases."""

    description = (
        "GPT2LMHeadModel with SDPA; it has biases, and its own loss in training and its own generate in decoding, "
        "with a cache and compiled on a GPU alone"
    )

    def __init__(self, cfg):
        super().__init__()
        import transformers

        transformers.logging.set_verbosity_error()  # it warns of settings that it chose itself
        self.gpt2 = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=cfg.vocab_size,
                n_positions=cfg.block_size,
                n_embd=cfg.n_embd,
                n_layer=cfg.n_layer,
                n_head=cfg.n_head,
                n_inner=cfg.mlp_hidden,
                activation_function=ACTIVATIONS[cfg.activation],
                resid_pdrop=cfg.dropout,
                embd_pdrop=cfg.dropout,
                attn_pdrop=cfg.dropout,
                tie_word_embeddings=cfg.tie_weights,
                bos_token_id=None,
                eos_token_id=None,  # so that a generation does not end early
                pad_token_id=0,
                attn_implementation="sdpa",
            )
        )
        if cfg.recompute:
            self.gpt2.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, idx, targets, reduction="mean"):
        """(None, loss): its own loss over the T − 1 targets within idx, (B, T); with 'none' that of each target."""
        if reduction == "mean":
            return None, self.gpt2(input_ids=idx, labels=idx, use_cache=False).loss
        logits = self.gpt2(input_ids=idx, use_cache=False).logits
        return None, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, compile_step=False):
        """Its own cached generation, greedy, of exactly max_new_tokens after idx, (B, T).

        compile_step: on a GPU with its static cache, which transformers compiles there and nowhere else.
        """
        return self.gpt2.generate(
            idx,
            attention_mask=torch.ones_like(idx),
            max_new_tokens=max_new_tokens,
            min_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            cache_implementation="static" if compile_step and idx.is_cuda else None,
        )


class NanoGPT(nn.Module):
    """The GPT of the model.py in the folder cfg.nanogpt, of a BenchConfig's sizes, called as `model.GPT` is."""

    description = (
        "the GPT of its model.py, with its own loss in training and its own generate in decoding, without a cache and "
        "never compiled"
    )

    def __init__(self, cfg):
        super().__init__()
        spec = importlib.util.spec_from_file_location("nanogpt_model", Path(cfg.nanogpt) / "model.py")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # torch.compile looks for it there
        spec.loader.exec_module(module)
        names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # it prints its size
            self.gpt = module.GPT(module.GPTConfig(**{name: getattr(cfg, name) for name in names}))

    def forward(self, idx, targets, reduction="mean"):
        """(logits, loss): its own mean loss over targets, (B, T); with 'none' this mean for each, (B·T,)."""
        logits, loss = self.gpt(idx, targets)
        return logits, loss if reduction == "mean" else loss.expand(targets.numel())

    def generate(self, idx, max_new_tokens, compile_step=False):
        """Its own generation, the likeliest token each time, of max_new_tokens after idx, (B, T); never compiled."""
        return self.gpt.generate(idx, max_new_tokens, top_k=1)


MODELS = {"hf": HuggingFaceGPT2, "nanogpt": NanoGPT}


def replace_model(run, model, make_optimizer):
    """Have a train.Trainer train the model of a peer, one of MODELS, in place of its own, in the same way."""
    run.model = model.to(run.device)
    run.fast_model = torch.compile(run.model) if run.compute.compile else run.model
    run.optimizer = make_optimizer(run.model, run.cfg, run.device.type)
