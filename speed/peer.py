"""Other implementations of GPT-2 (peers), to compare speeds with: of the same sizes, in the same training loop."""

import contextlib
import importlib.util
import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

NAMES = {"hf": "Hugging Face", "nanogpt": "nanoGPT"}
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}  # our names -> those of transformers
# Options of the architecture that a peer does not offer: name -> the only value that it implements.
GPT2 = dict(n_kv_head=None, norm="layernorm", pos="learned", parallel=False, share_layers=False, causal=True)
GPT2 |= dict(attn_skip=True, mlp_skip=True, n_expert=0, wk_identity=False, wv_identity=False)
GPT2 |= dict(share_kv=False, qk_norm=False)
NANOGPT = GPT2 | dict(tie_weights=True, activation="gelu", mlp_ratio=4, recompute=False)


def check(peer, cfg):
    """Raise ValueError where a peer, a key of NAMES, is not installed or cannot have a BenchConfig's architecture."""
    if peer == "hf" and importlib.util.find_spec("transformers") is None:
        raise ValueError(
            "--peer=hf needs the package transformers, which is not installed: run `pip install transformers`, or "
            "leave the peer out"
        )
    if peer == "nanogpt" and not (Path(cfg.nanogpt) / "model.py").is_file():
        raise ValueError(
            f"--peer=nanogpt needs a clone of nanoGPT, and there is no {Path(cfg.nanogpt) / 'model.py'}: run "
            "`git clone https://github.com/karpathy/nanoGPT`, then name its folder with --nanogpt=…"
        )
    for name, value in (NANOGPT if peer == "nanogpt" else GPT2).items():
        if getattr(cfg, name) != value:
            raise ValueError(
                f"--peer={peer} needs {name}={value}, got {getattr(cfg, name)}: leave the option or the peer out"
            )
    if cfg.activation not in ACTIVATIONS:
        raise ValueError(
            f"--peer={peer} needs activation={' or '.join(ACTIVATIONS)}, got {cfg.activation}: leave it or the peer out"
        )


class HuggingFaceGPT2(nn.Module):
    """transformers.GPT2LMHeadModel of a BenchConfig's sizes, with `model.GPT`'s interface; it always has biases."""

    description = (
        "GPT2LMHeadModel with SDPA, which always has biases; training uses its own loss, decoding its own generate, "
        "which has a cache and is compiled on a GPU only"
    )

    def __init__(self, cfg):
        super().__init__()
        import transformers

        transformers.logging.set_verbosity_error()  # it would warn of its own defaults
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
                eos_token_id=None,  # so that generation never ends early
                pad_token_id=0,
                attn_implementation="sdpa",
            )
        )
        if cfg.recompute:
            self.gpt2.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, idx, targets, reduction="mean"):
        """(None, loss in nats), for idx and targets (B, T) int64.

        'mean': its own loss over the T − 1 targets that idx itself contains. 'none': that of each target, (B·T,).
        """
        if reduction == "mean":
            return None, self.gpt2(input_ids=idx, labels=idx, use_cache=False).loss
        logits = self.gpt2(input_ids=idx, use_cache=False).logits
        return None, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, compile_step=False):
        """(B, T + max_new_tokens): idx, (B, T) int64, greedily continued by its own generation with a cache.

        compile_step: use its static cache on a GPU, for which transformers compiles the model; no effect on a CPU.
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
    """The GPT of the model.py in the folder cfg.nanogpt, of a BenchConfig's sizes, with `model.GPT`'s interface."""

    description = (
        "the GPT of its model.py; training uses its own loss, decoding its own generate, which has no cache and is "
        "never compiled"
    )

    def __init__(self, cfg):
        super().__init__()
        spec = importlib.util.spec_from_file_location("nanogpt_model", Path(cfg.nanogpt) / "model.py")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # torch.compile looks it up there
        spec.loader.exec_module(module)
        names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
        ):  # it prints its number of parameters
            self.gpt = module.GPT(module.GPTConfig(**{name: getattr(cfg, name) for name in names}))

    def forward(self, idx, targets, reduction="mean"):
        """(logits, loss in nats), for idx and targets (B, T) int64: its own mean loss.

        With reduction='none' the same mean is repeated for each target, (B·T,): nanoGPT computes no other.
        """
        logits, loss = self.gpt(idx, targets)
        return logits, loss if reduction == "mean" else loss.expand(targets.numel())

    def generate(self, idx, max_new_tokens, compile_step=False):
        """(B, T + max_new_tokens): idx, (B, T) int64, continued by its own generation; compile_step has no effect."""
        return self.gpt.generate(idx, max_new_tokens, top_k=1)  # top_k=1: greedy


MODELS = {"hf": HuggingFaceGPT2, "nanogpt": NanoGPT}


def replace_model(trainer, model, make_optimizer):
    """Replace the model of a train.Trainer by a peer's, an instance of one of MODELS, and its optimizer accordingly."""
    trainer.model = model.to(trainer.device)
    trainer.fast_model = torch.compile(trainer.model) if trainer.compute.compile else trainer.model
    trainer.optimizer = make_optimizer(trainer.model, trainer.cfg, trainer.device.type)
