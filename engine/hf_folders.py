"""Folders of the transformers library: a model of ours written as one, compared with it, and one read as ours.

Weights are read from safetensors, or from a file of torch.save by the loader for tensors and plain values, which runs
no code; the code that a folder may bring is never run.
"""

import contextlib
import dataclasses
import json
import struct
from pathlib import Path

import torch

from engine import hf_classes, torch_file
from engine.files import read_json, reason

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
RECORD = "exported_from"  # in config.json: what the model was before, so that an import is what was exported
LARGEST_DIFFERENCE = 1e-5  # of logits, relative to the largest
N_GREEDY = 20  # tokens
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # in old files, beside the weights


def write(folder, model, n_vocab, end_of_text, record):
    """Write a GPT into a folder as config.json, generation_config.json and model.safetensors of its stock class.

    n_vocab: the rows of the embedding that mean something; the others are left out. end_of_text: its id, or None.
    record: plain values that `read` returns. Raises ValueError if no stock class holds the model (`class_of`).
    """
    import transformers

    stock = hf_classes.class_of(model.config)
    full = hf_classes.expanded(model, stock.repeats_heads)
    for name in ("wte.weight", "lm_head.weight"):
        full[name] = full[name][:n_vocab]
    kind = getattr(transformers, stock.name)
    config = dataclasses.replace(model.config, vocab_size=n_vocab)
    marks = dict(bos_token_id=end_of_text, eos_token_id=end_of_text, pad_token_id=None)
    record = {**record, "model_config": dataclasses.asdict(config)}
    theirs = build(stock, kind.config_class(**hf_classes.settings(stock, config, **marks, **{RECORD: record})))
    weights = hf_classes.to_stock(stock, full, theirs.state_dict())
    load(theirs, weights, assign=True)
    if theirs.can_generate():
        theirs.generation_config = transformers.GenerationConfig(**marks)
    with quiet():
        theirs.save_pretrained(folder)
    for path in Path(folder).glob("*.safetensors"):  # which safetensors makes for the owner's eyes alone
        path.chmod((Path(folder) / CONFIG).stat().st_mode)


def build(stock, theirs, device="meta"):
    """A model of a stock class with a configuration of transformers, on a device."""
    import transformers

    with torch.device(device):
        return getattr(transformers, stock.name)(theirs).eval()


def load(theirs, weights, assign=False):
    """Put weights into a model of transformers. Raises ValueError if it needs others."""
    expected = theirs.state_dict()
    tied = {"lm_head.weight"} if theirs.config.tie_word_embeddings else set()
    for what, names in (
        ("it lacks the weight", expected.keys() - weights.keys() - tied),
        ("its configuration leaves no place for the weight", weights.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(f"{what} {min(names)}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""))
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            shapes = tuple(expected[name].shape), tuple(tensor.shape)
            raise ValueError(f"its weight {name} must have the shape {shapes[0]}, got {shapes[1]}")
    theirs.load_state_dict(weights, strict=False, assign=assign)
    theirs.tie_weights()


@contextlib.contextmanager
def quiet():
    """A context in which transformers shows no progress bars and no advice, but errors."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@torch.no_grad()
def compare(model, theirs, n_vocab):
    """{'logits': the largest difference of logits over the largest logit, 'greedy': how many tokens were compared}.

    model: a GPT. theirs: a model of transformers. Both read random tokens below n_vocab, in float32; then theirs
    continues some of them greedily, with its cache, and each token that it takes must be the likeliest of ours. Raises
    ValueError if the logits differ by more than LARGEST_DIFFERENCE, or a token is another than rounding explains.
    """
    generator = torch.Generator().manual_seed(0)
    T = min(model.config.block_size, 256)
    tokens = torch.randint(n_vocab, (2, T), generator=generator)
    expected = logits(model, tokens, n_vocab)
    largest = expected.abs().max()
    difference = ((theirs(tokens).logits - expected).abs().max() / largest).item()
    if not difference <= LARGEST_DIFFERENCE:
        raise ValueError(
            f"the logits of transformers must be ours up to {LARGEST_DIFFERENCE:.0e} of the largest, got a difference "
            f"of {difference:.1e}: the two do not compute the same model"
        )
    n = min(N_GREEDY, T - 1) if model.config.causal else 0
    if n:
        from transformers import GenerationConfig

        settings = GenerationConfig(do_sample=False, max_new_tokens=n)
        theirs.generation_config = GenerationConfig()  # without an end-of-text, at which it would stop
        start = tokens[:1, : T - n]
        taken = theirs.generate(start, attention_mask=torch.ones_like(start), generation_config=settings)
        ours = logits(model, taken[:, :-1], n_vocab)[:, -n:]
        below = ours.max(-1).values - ours.gather(-1, taken[:, -n:, None])[..., 0]
        if not (below <= 2 * LARGEST_DIFFERENCE * largest).all():
            raise ValueError(
                f"the {n} tokens that transformers generates greedily must be ours, got "
                f"{taken[0, -n:].tolist()} where ours are {ours.argmax(-1)[0].tolist()} after the same ones"
            )
    return {"logits": difference, "greedy": n}


def logits(model, tokens, n_vocab):
    """Our logits of all positions, (B, T, n_vocab)."""
    return model(tokens, tokens)[0][..., :n_vocab]


def read(folder):
    """(StockClass, configuration of transformers, name -> float32 tensor, record of the export or {}) of a folder.

    Raises ValueError for a folder without a model, for one of a class that is not in hf_classes.CLASSES, and for files
    that are damaged or hold something else than tensors.
    """
    import transformers

    folder = Path(folder)
    content = read_json(folder / CONFIG)
    if content is None:
        raise ValueError(f"{folder} has no {CONFIG}: name a folder that transformers has saved a model in")
    kinds = {getattr(transformers, stock.name).config_class.model_type: stock for stock in hf_classes.CLASSES}
    stock = kinds.get(content.get("model_type"))
    if stock is None:
        raise ValueError(
            f"{folder / CONFIG}: model_type must be one of {', '.join(kinds)}, got {content.get('model_type')!r}: no "
            "model of ours computes that"
        )
    try:
        theirs = getattr(transformers, stock.name).config_class.from_dict(content)
    except Exception as error:  # its own validation has several kinds
        raise ValueError(f"{folder / CONFIG} is no configuration of {stock.name}: {reason(error)}") from error
    weights = {
        name: tensor.to(torch.float32)
        for name, tensor in tensors(folder).items()
        if not (f".{name}").endswith(BUFFERS) and tensor.is_floating_point()
    }
    prefix = stock.modules["wte"].partition(".")[0] + "."
    if not any(name.startswith(prefix) for name in weights):  # as in the files of GPT-2 itself
        weights = {name if name.startswith("lm_head.") else prefix + name: tensor for name, tensor in weights.items()}
    embedding = f"{stock.modules['wte']}.weight"
    if theirs.tie_word_embeddings and embedding in weights:
        weights["lm_head.weight"] = weights[embedding]
    record = content.get(RECORD)
    return stock, theirs, weights, record if isinstance(record, dict) else {}


def tensors(folder):
    """name -> tensor of the weight files in a folder, be they several with an index."""
    for name in WEIGHTS:
        if (folder / name).exists():
            return read_tensors(folder / name)
        index = read_json(folder / f"{name}.index.json")
        if index is not None:
            parts = index.get("weight_map")
            parts = set(parts.values()) if isinstance(parts, dict) else {None}
            if not all(isinstance(part, str) and Path(part).name == part for part in parts):
                raise ValueError(f"{folder / name}.index.json must name files beside it in its weight_map")
            return {key: tensor for part in sorted(parts) for key, tensor in read_tensors(folder / part).items()}
    raise ValueError(f"{folder} has no weights: neither {' nor '.join(WEIGHTS)}")


def read_tensors(path):
    """name -> tensor of a safetensors file, or of a file of torch.save. Raises ValueError for anything else."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError, json.JSONDecodeError, struct.error) as error:
            raise ValueError(f"{path} is not a safetensors file, or damaged: {reason(error)}") from error
    found = torch_file.read(path, legacy=True)
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise ValueError(f"{path} must contain weights, name -> tensor")
    return found
