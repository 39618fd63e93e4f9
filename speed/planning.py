"""How much memory and how many days a run takes, by GPU: a model of cost, and what of it was measured.

A rate is utilisation × datasheet peak / operations a token. Operations are those of `cost.cost`; with recompute=True
the blocks' forward pass comes once more. Utilisation is that of a measured run (the JSON file of bench.py), or public.
"""

import dataclasses
import itertools

import configurator
from engine import linear_cross_entropy
from engine.files import read_json
from engine.flops import cost
from model import GPTConfig
from speed import hardware

SIZES = {"350M": "gpt3_medium", "760M": "gpt3_large", "1.3B": "gpt3_xl"}
GPUS = (1, 8)
SPARE = 0.1  # of a GPU's memory, for the CUDA context, kernels' workspaces and fragmentation
# Shares of the dense bfloat16 peak of public 124M trainers (T = 1,024), with nanoGPT's count of operations.
PUBLIC = {
    "NVIDIA H200": (0.423, "modded-nanogpt, 1 × H200"),
    "NVIDIA H100 80GB HBM3": (0.409, "modded-nanogpt with AdamW, per H100 of 8"),
    "NVIDIA GeForce RTX 4090": (0.746, "llm.c, 1 × RTX 4090"),
}
ELSEWHERE = (0.328, "nanoGPT, 1 × H100, for want of a public figure for this GPU")
FORMULAS = """\
Memory of one GPU, in bytes. N: parameters; M: those in matrix products (attention, MLP, LM head); d: n_embd; d_kv: the
keys' width; h: the MLP's hidden width, times the experts; b: sequences in a micro-batch; T: block_size; L: n_layer.

- states = 4 N (parameters) + 4 N (gradients) + 8 N (AdamW), shared by the GPUs with shard=full, + 2 M (bfloat16 copies)
- activations = b T (L B + 6 d + 8), a block's B = 12 d + 2 (d + 2 d_kv) + 2 d + 4 h + 4 n_head + 16: what eager PyTorch
  keeps of GPT-2's blocks in bfloat16 autocast; with recompute=True b T (4 d L + B + 6 d + 8)
- logits = 14 b T vocab_size: bfloat16 logits, float32 log-probabilities and the gradients of both; with
  chunked_loss=True 10 min(b T vocab_size, 2^26) + 4 d vocab_size + 2 b T d

torch.compile keeps less activations and logits; so what fits here, fits."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one GPU while it trains."""

    states: int  # parameters, gradients, optimizer and bfloat16 copies of the matrices
    activations: int
    logits: int

    @property
    def total(self):
        return self.states + self.activations + self.logits


def memory(config, batch_size, recompute=False, pieces=1, chunked_loss=False):
    """The Memory of a GPTConfig at a micro-batch of batch_size sequences; pieces: GPUs that share the states (FSDP).

    The terms are those of FORMULAS.
    """
    counts, d = cost(config), config.n_embd
    kv_width = config.kv_heads * config.d_k
    hidden = config.mlp_hidden * max(1, config.n_expert)
    tokens = batch_size * config.block_size
    states = 16 * counts.total // pieces + 2 * (counts.attn_mlp + config.vocab_size * d)
    # Two float32 residual streams with two bfloat16 norm outputs, and two float32 numbers a norm, in each block.
    block = 12 * d + 2 * (d + 2 * kv_width) + 2 * d + 4 * hidden + 4 * config.n_head + 16
    blocks = config.n_layer * 4 * d + block if recompute else config.n_layer * block
    logits = tokens * config.vocab_size
    if chunked_loss:
        logits_bytes = 10 * min(logits, linear_cross_entropy.CHUNK) + 4 * config.vocab_size * d + 2 * tokens * d
    else:
        logits_bytes = 14 * logits
    return Memory(states, tokens * (blocks + 6 * d + 8), logits_bytes)


def step_flops(config, recompute=False):
    """Operations that one token of training really takes: with recompute the blocks' forward pass comes once more."""
    counts = cost(config)
    head = 2 * config.n_embd * config.vocab_size
    return counts.training_flops + (counts.forward_flops - head if recompute else 0)


def read_measured(path):
    """The content of a JSON file of bench.py. Raises ValueError for another, or one without utilisation."""
    content = read_json(path)
    if content is None:
        raise ValueError(f"measured: there is no file {path}: make it with `python bench.py … --json={path}`")
    if not isinstance(content, dict) or not {"header", "config", "rows"} <= content.keys():
        raise ValueError(f"measured: {path} is no JSON file of bench.py")
    rows = {row["model"]: row for row in content["rows"] if row["what"] == "training step"}
    if not all(rows.get(model, {}).get("of_peak") for model in ("baseline", "reduced")):
        raise ValueError(
            f"measured: {path} has no utilisation of a training step ({content['header']['device']}): measure on a GPU "
            "whose datasheet is known"
        )
    if content["header"]["dtype"] != "bfloat16":
        raise ValueError(f"measured: {path} is of {content['header']['dtype']}, and the plan of bfloat16")
    return {"header": content["header"], "config": content["config"], "rows": rows}


def sizes(cfg):
    """name -> TrainConfig: cfg itself, and it in GPT-3's larger sizes."""
    configs = {f"{cost(cfg.model_config()).total / 1e6:,.0f}M (this configuration)": cfg}
    for name, file in SIZES.items():
        values = configurator.read_config_file(configurator.ROOT / "config" / f"{file}.py")
        configs[name] = dataclasses.replace(cfg, **{field: value for field, (value, _) in values.items()})
    return configs


def fitting_batch_size(cfg, limit, pieces):
    """The largest of cfg's micro-batch, its half, … that needs at most `limit` bytes; None where not even one fits."""
    batch_size = cfg.batch_size or max(1, 2**16 // cfg.block_size)
    while batch_size:
        if memory(cfg.model_config(), batch_size, cfg.recompute, pieces, cfg.chunked_loss).total <= limit:
            return batch_size
        batch_size //= 2
    return None


def utilisation(gpu, model, measured):
    """(share of the peak, its source) of a model, 'baseline' or 'reduced', on a GPU type."""
    if measured and measured["header"]["device"] == gpu:
        return measured["rows"][model]["of_peak"], f"a run of bench.py, {measured['header']['date']}"
    return PUBLIC.get(gpu, ELSEWHERE)


def was_measured(cfg, gpu, n_gpus, measured):
    """Whether it is cfg's own speed on this GPU type that the JSON file of bench.py has; W_Q may differ."""
    names = {field.name for field in dataclasses.fields(GPTConfig)} - {"wq_identity", "attn_scale"}
    names |= {"recompute", "batch_size"}
    chunked = bool(measured and measured["config"].get("chunked_loss"))
    return (
        measured is not None
        and (gpu, n_gpus) == (measured["header"]["device"], 1)
        and chunked == bool(cfg.chunked_loss)
        and all(measured["config"][name] == getattr(cfg, name) for name in names)
    )


def rows(cfg, measured=None):
    """A dict for each GPU type × size × model × number of GPUs; see `table`. measured: from `read_measured`."""
    planned = []
    for (gpu, sheet), (size, sized), wq_identity, n_gpus in itertools.product(
        hardware.DATASHEETS.items(), sizes(cfg).items(), (False, True), GPUS
    ):
        model = "reduced" if wq_identity else "baseline"
        arm = dataclasses.replace(sized, wq_identity=wq_identity)
        pieces = n_gpus if arm.shard == "full" else 1
        batch_size = fitting_batch_size(arm, (1 - SPARE) * sheet.memory, pieces)
        needs = memory(arm.model_config(), batch_size or 1, arm.recompute, pieces, arm.chunked_loss)
        share, source = utilisation(gpu, model, measured)
        tokens = n_gpus * share * sheet.peak["bfloat16"] / step_flops(arm.model_config(), arm.recompute)
        basis = "extrapolated"
        if was_measured(arm, gpu, n_gpus, measured):
            basis, tokens = "measured", measured["rows"][model]["tokens_per_second"]
        if batch_size is None:
            basis, tokens = "does not fit", None
        days = tokens and arm.max_iters * arm.tokens_per_step / tokens / 86_400
        row = dict(gpu=gpu, size=size, model=model, n_gpus=n_gpus, batch_size=batch_size, **dataclasses.asdict(needs))
        row |= dict(utilisation=share, source=source, tokens_per_second=tokens, days=days, basis=basis)
        planned.append(row)
    return planned


def table(cfg, planned):
    """The plan as Markdown: a table for each GPU type, and the formulas."""
    tokens = cfg.max_iters * cfg.tokens_per_step
    lines = [
        f"Days are those of {tokens / 1e9:,.1f} billion tokens (max_iters × tokens_per_step). Only what is marked as "
        "measured was measured. For the rest, the utilisation of the 124M model is taken for all sizes, and eight GPUs "
        "are eight times as fast as one, without the cost of their communication.",
        "",
        FORMULAS,
    ]
    for gpu, sheet in hardware.DATASHEETS.items():
        group = [row for row in planned if row["gpu"] == gpu]
        lines += [
            "",
            f"**{gpu}**: {sheet.memory / 1e9:.0f} GB, {sheet.peak['bfloat16'] / 1e12:,.1f} TFLOP/s in bfloat16 "
            f"({sheet.source}). Utilisation: {group[0]['source']}.",
            "",
            "| size | model | GPUs | micro-batch | memory of a GPU, GB: states + activations + logits | utilisation "
            "| tokens/s | days | |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
        ]
        for row in group:
            parts = [row[name] / 1e9 for name in ("states", "activations", "logits")]
            needs = " + ".join(f"{part:.1f}" for part in parts) + f" = {sum(parts):.1f}"
            cells = [row["size"], row["model"], row["n_gpus"], row["batch_size"] or "1", needs]
            speed = ["—"] * 2 if row["days"] is None else [f"{row['tokens_per_second']:,.0f}", f"{row['days']:,.2f}"]
            cells += [f"{row['utilisation']:.1%}", *speed, row["basis"]]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)
