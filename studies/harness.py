"""A run in EleutherAI's lm-evaluation-harness (the package lm_eval), without an export: any architecture of ours.

    python -m studies.harness --model wq --model_args run=out/demo/reduced_tied/seed1337 --tasks wikitext
    python -m studies.harness --model wq --model_args run=out/demo/reduced_tied/seed1337,ckpt=best.pt,dtype=bfloat16 \
        --tasks hellaswag,lambada_openai,wikitext --batch_size 16 \
        --output_path out/demo/reduced_tied/seed1337/eval/results.json

All options are those of the command `lm_eval`, in which this registers the model `wq`. A context that is longer than
the model's is cut from the left; a text to be scored is cut into windows of block_size tokens, the first of which
begins after an end-of-text.
"""

import functools
import itertools
import sys
from pathlib import Path

import torch

import configurator
from corpus import tokenizers
from engine import checkpoint, decode, devices, run_files


@functools.cache
def register():
    """Make the model `wq` known to lm_eval; its class. Raises ValueError where the package is missing."""
    try:
        from lm_eval import utils
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
        from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    except ImportError as error:
        raise ValueError(f"the harness needs the package lm_eval ({error}): pip install lm_eval[hf]==0.4.13") from error

    class Run(TemplateLM):
        """A run folder's checkpoint. dtype: of matrix products, as in sample.py. batch_size: windows at once."""

        def __init__(
            self, run, ckpt=run_files.CHECKPOINT, tokenizer=None, dtype="float32", device="auto", batch_size=1, **others
        ):
            super().__init__()
            if others or not str(batch_size).isdigit():
                raise ValueError(
                    f"model_args must be among run, ckpt, tokenizer, dtype and batch_size a number, got "
                    f"{', '.join(others) or batch_size}"
                )
            path = Path(run, ckpt)
            self.gpt = checkpoint.build_model(checkpoint.load(path)).eval()
            if not self.gpt.config.causal:
                raise ValueError(f"{path} is an encoder (causal=False), and the harness scores and continues texts")
            self.text = tokenizers.tokenizer_of(path, tokenizer, self.gpt.config.vocab_size)
            self.max_length, self.n_at_once = self.gpt.config.block_size, int(batch_size)
            self.compute = devices.resolve_decoding(device, dtype, self.gpt.config, self.n_at_once, False)
            self.gpt.to(self.compute.device)

        @property
        def eot_token_id(self):
            return self.text.eot_token

        def tok_encode(self, string, add_special_tokens=None, **_):
            return self.text.encode(string, allowed_special="all")

        @torch.no_grad()
        def _loglikelihood_tokens(self, requests, disable_tqdm=False):
            """(log-probability, whether greedy decoding gives it) of each (texts, context, continuation), in tokens."""
            found = {}
            order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
            for some in chunks(order, self.n_at_once):
                rows = [(requests[i][1] + requests[i][2])[-self.max_length - 1 :] for i in some]
                padded = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)  # what follows changes nothing
                for row, tokens in zip(padded, rows, strict=True):
                    row[: len(tokens)] = torch.tensor(tokens)
                x = padded[:, :-1].to(self.compute.device)
                with self.compute.autocast:
                    logits, _ = self.gpt(x, x)
                log_p = logits[..., : self.text.n_vocab].float().log_softmax(-1).cpu()
                for i, row, tokens in zip(some, log_p, rows, strict=True):
                    n = len(requests[i][2])
                    own, targets = row[len(tokens) - 1 - n : len(tokens) - 1], torch.tensor(tokens[-n:])
                    p = own.gather(-1, targets[:, None]).sum().item()
                    found[i] = p, torch.equal(own.argmax(-1), targets)
            return [found[i] for i in range(len(requests))]

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            """The log-probability of each text, in windows."""
            windows = [
                (None, *utils.make_disjoint_window(window), number)
                for number, request in enumerate(requests)
                for window in utils.get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
                )
            ]
            sums = [0.0] * len(requests)
            for (*_, number), (p, _) in zip(windows, self._loglikelihood_tokens(windows), strict=True):
                sums[number] += p
            return sums

        @torch.no_grad()
        def generate_until(self, requests, disable_tqdm=False):
            """The continuation of each text up to a stop sequence; texts of equal length at once."""
            groups, texts = {}, {}
            for i, request in enumerate(requests):
                options = normalize_gen_kwargs(request.args[1])
                n_new = options["max_gen_toks"]
                if n_new >= self.max_length:
                    raise ValueError(f"max_gen_toks must be below block_size={self.max_length}, got {n_new}")
                tokens = (self.tok_encode(request.args[0]) or [self.eot_token_id])[n_new - self.max_length :]
                key = len(tokens), n_new, options.get("temperature", 1.0) if options["do_sample"] else 0.0
                groups.setdefault(key, []).append((i, tokens, options["until"]))
            for (n_prompt, n_new, temperature), group in groups.items():
                for some in chunks(group, self.n_at_once):
                    prompts = torch.tensor([tokens for _, tokens, _ in some], device=self.compute.device)
                    with self.compute.autocast:
                        rows = decode.generate(self.gpt, prompts, n_new, temperature)[:, n_prompt:].tolist()
                    for (i, _, until), row in zip(some, rows, strict=True):
                        kept = itertools.takewhile(lambda token: token != self.eot_token_id, row)
                        text = self.text.decode([token for token in kept if token < self.text.n_vocab])
                        texts[i] = postprocess_generated_text(text, until, None)
            return [texts[i] for i in range(len(requests))]

    return register_model("wq")(Run)


def chunks(items, n):
    """A list in pieces of n, the last one of what is left."""
    return [items[i : i + n] for i in range(0, len(items), n)]


def main(argv):
    """The command `lm_eval`, which then knows the model `wq`."""
    register()
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *argv]
    cli_evaluate()


if __name__ == "__main__":
    configurator.run(main)
