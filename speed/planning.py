"""How much memory and how many days a training run takes on each GPU: computed, or measured where that was done.

tokens/s = number of GPUs × utilisation × the datasheet's peak FLOP/s / FLOPs per token. FLOPs are those of
`engine.flops.cost`; with recompute=True the forward pass of the blocks counts twice. The utilisation is that of a
measured training step (from the JSON file of bench.py) or a published one.
"""

import dataclasses
import itertools

import torch

import configurator
from engine import devices, linear_cross_entropy
from engine.files import read_json
from engine.flops import cost
from model import GPTConfig
from speed import hardware
from studies import page

SIZES = {"350M": "gpt3_medium", "760M": "gpt3_large", "1.3B": "gpt3_xl"}  # GPT-3's sizes -> files in config/
GPU_COUNTS = (1, 8)
MEMORY_RESERVE = 0.1  # of a GPU's memory, for the CUDA context, kernels' workspaces and fragmentation
# Published utilisation of 124M models (T = 1,024) in training, as a share of the dense bfloat16 peak, with nanoGPT's
# formula for FLOPs: share, source.
PUBLISHED = {
    "NVIDIA H200": (0.423, "modded-nanogpt, 1 × H200"),
    "NVIDIA H100 80GB HBM3": (0.409, "modded-nanogpt with AdamW, per H100 of 8"),
    "NVIDIA GeForce RTX 4090": (0.746, "llm.c, 1 × RTX 4090"),
}
UNPUBLISHED = (0.328, "nanoGPT, 1 × H100 (no published figure for this GPU)")
FORMULAS = [
    page.Paragraph(
        "Memory of one GPU, in bytes. N: parameters; M: those in matrix products (attention, MLP, LM head); d: n_embd; "
        "d_kv: the keys' width; h: the MLP's hidden width, times the experts; b: sequences in a micro-batch; "
        "T: block_size; L: n_layer."
    ),
    page.Items(
        [
            "states = 4 N (parameters) + 4 N (gradients) + 8 N (AdamW), sharded over the GPUs with shard=full, "
            "+ 2 M (bfloat16 copies)",
            "activations = b T (L B + 6 d + 8), with B = 12 d + 2 (d + 2 d_kv) + 2 d + 4 h + 4 n_head + 16 per block: "
            "what eager PyTorch keeps of GPT-2's blocks in bfloat16 autocast; with recompute=True "
            "b T (4 d L + B + 6 d + 8)",
            "logits = 14 b T vocab_size: bfloat16 logits, float32 log-probabilities and the gradients of both; with "
            "chunked_loss=True 10 min(b T vocab_size, 2^26) + 4 d vocab_size + 2 b T d",
        ]
    ),
    page.Paragraph("With torch.compile activations and logits take less memory: these are upper bounds."),
]
MEMORY_COLUMN = "memory of a GPU, GB: states + activations + logits"
COLUMNS = ["size", "model", "GPUs", "micro-batch", MEMORY_COLUMN, "utilisation", "tokens/s", "days", "basis"]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one GPU during training."""

    states: int  # parameters, gradients, optimizer and bfloat16 copies of the matrices
    activations: int
    logits: int

    @property
    def total(self):
        return self.states + self.activations + self.logits


def training_memory(config, batch_size, recompute=False, n_shards=1, chunked_loss=False):
    """The Memory of a GPTConfig with micro-batches of batch_size sequences, by FORMULAS.

    n_shards: the number of GPUs over which the states are sharded (FSDP).
    """
    counts, d = cost(config), config.n_embd
    kv_width = config.kv_heads * config.d_k
    hidden = config.mlp_hidden * max(1, config.n_expert)
    tokens = batch_size * config.block_size
    states = 16 * counts.total // n_shards + 2 * (counts.attn_mlp + config.vocab_size * d)
    # 12 d: two float32 residual streams and two bfloat16 outputs of norms. 16: two float32 numbers for each norm.
    block = 12 * d + 2 * (d + 2 * kv_width) + 2 * d + 4 * hidden + 4 * config.n_head + 16
    blocks = config.n_layer * 4 * d + block if recompute else config.n_layer * block
    logits = tokens * config.vocab_size
    if chunked_loss:
        logits_bytes = 10 * min(logits, linear_cross_entropy.CHUNK) + 4 * config.vocab_size * d + 2 * tokens * d
    else:
        logits_bytes = 14 * logits
    return Memory(states, tokens * (blocks + 6 * d + 8), logits_bytes)


def executed_flops(config, recompute=False):
    """The FLOPs of training that are executed per token; with recompute the blocks' forward pass counts twice."""
    counts = cost(config)
    head = 2 * config.n_embd * config.vocab_size
    return counts.training_flops + (counts.forward_flops - head if recompute else 0)


def read_measured(path):
    """A JSON file of bench.py: its header and config, and as rows model -> the row of its training step.

    Raises ValueError for any other file, and for one from which the utilisation in bfloat16 cannot be taken.
    """
    content = read_json(path)
    if content is None:
        raise ValueError(f"--measured: there is no file {path}: write it with `python bench.py … --json={path}`")
    if not isinstance(content, dict) or not {"header", "config", "rows"} <= content.keys():
        raise ValueError(
            f"--measured must name a JSON file of measurements, got {path}: write one with `python bench.py … --json=…`"
        )
    header = content["header"]
    rows = {row["model"]: row for row in content["rows"] if row["what"] == "training step"}
    if not all(rows.get(model, {}).get("of_peak") for model in ("baseline", "reduced")):
        raise ValueError(
            f"--measured must have the utilisation of a training step, got {path} without it (device: "
            f"{header['device']}): measure with train in --only, on a GPU that speed/hardware.py lists"
        )
    if header["dtype"] != "bfloat16":
        raise ValueError(
            f"--measured must be in bfloat16, as the plan is, got {path} in {header['dtype']}: measure with "
            "--dtype=bfloat16"
        )
    return {"header": header, "config": content["config"], "rows": rows}


def sizes(cfg):
    """name -> TrainConfig: cfg itself, and with each of GPT-3's larger sizes."""
    configs = {f"{cost(cfg.model_config()).total / 1e6:,.0f}M (this configuration)": cfg}
    for name, file in SIZES.items():
        values = configurator.read_config_file(configurator.ROOT / "config" / f"{file}.py")
        configs[name] = dataclasses.replace(cfg, **{field: value for field, (value, _) in values.items()})
    return configs


def fitting_batch_size(cfg, limit, n_shards):
    """cfg's micro-batch, halved until its memory is at most `limit` bytes; None where not even one sequence fits."""
    batch_size = cfg.batch_size or max(1, devices.first_tokens(torch.device("cuda")) // cfg.block_size)
    while batch_size:
        if training_memory(cfg.model_config(), batch_size, cfg.recompute, n_shards, cfg.chunked_loss).total <= limit:
            return batch_size
        batch_size //= 2
    return None


def utilisation(gpu, model, measured):
    """(share of the datasheet's peak, its source) of a model, 'baseline' or 'reduced', on a GPU of this name."""
    if measured and measured["header"]["device"] == gpu:
        return measured["rows"][model]["of_peak"], f"a run of bench.py, {measured['header']['date']}"
    return PUBLISHED.get(gpu, UNPUBLISHED)


def was_measured(cfg, gpu, n_gpus, measured):
    """Whether `measured` has the speed of this very configuration, with or without W_Q, on this GPU."""
    if not measured or n_gpus != 1 or gpu != measured["header"]["device"]:
        return False
    names = {field.name for field in dataclasses.fields(GPTConfig)} - {"wq_identity", "attn_scale"}
    names |= {"recompute", "batch_size"}
    theirs = measured["config"]
    same_loss = bool(theirs.get("chunked_loss")) == bool(cfg.chunked_loss)  # none means False on a GPU
    return same_loss and all(theirs.get(name) == getattr(cfg, name) for name in names)


def plan_rows(cfg, measured=None):
    """A dict for each GPU, size, model and number of GPUs, from a TrainConfig.

    measured: of `read_measured`. basis: 'measured', 'extrapolated' or 'does not fit'; batch_size, tokens_per_second and
    days are None where it does not fit, and the memory is then that of one sequence.
    """
    rows = []
    for (gpu, sheet), (size, sized), model, n_gpus in itertools.product(
        hardware.DATASHEETS.items(), sizes(cfg).items(), ("baseline", "reduced"), GPU_COUNTS
    ):
        variant = dataclasses.replace(sized, wq_identity=model == "reduced")
        config = variant.model_config()
        n_shards = n_gpus if variant.shard == "full" else 1
        batch_size = fitting_batch_size(variant, (1 - MEMORY_RESERVE) * sheet.memory, n_shards)
        needed = training_memory(config, batch_size or 1, variant.recompute, n_shards, variant.chunked_loss)
        share, source = utilisation(gpu, model, measured)
        if batch_size is None:
            basis, rate, days = "does not fit", None, None
        else:
            basis, rate = "extrapolated", n_gpus * share * sheet.peak["bfloat16"]
            rate /= executed_flops(config, variant.recompute)
            if was_measured(variant, gpu, n_gpus, measured):
                basis, rate = "measured", measured["rows"][model]["tokens_per_second"]
            days = variant.max_iters * variant.tokens_per_step / rate / 86_400
        row = dict(gpu=gpu, size=size, model=model, n_gpus=n_gpus, batch_size=batch_size, **dataclasses.asdict(needed))
        row |= dict(utilisation=share, source=source, tokens_per_second=rate, days=days, basis=basis)
        rows.append(row)
    return rows


def plan_table(cfg, rows):
    """The rows of `plan_rows` as Markdown: what they assume, the formulas, and a table for each GPU."""
    tokens = cfg.max_iters * cfg.tokens_per_step
    parts = [
        page.Paragraph(
            f"Days are those of {tokens / 1e9:,.1f} billion tokens (max_iters × tokens_per_step). Only the rows marked "
            "'measured' were measured. The others take the utilisation of the 124M model for all sizes and count eight "
            "GPUs as eight times one, without the cost of communication."
        ),
        *FORMULAS,
    ]
    for gpu, sheet in hardware.DATASHEETS.items():
        own = [row for row in rows if row["gpu"] == gpu]
        parts += [
            page.Heading(gpu),
            page.Paragraph(
                f"{sheet.memory / 1e9:.0f} GB, {sheet.peak['bfloat16'] / 1e12:,.1f} TFLOP/s in bfloat16 "
                f"({sheet.source}). Utilisation: {own[0]['source']}."
            ),
            page.Table(COLUMNS, [_cells(row) for row in own], words=("size", "model", "basis")),
        ]
    return page.markdown(parts)


def _cells(row):
    memory = [row[name] / 1e9 for name in ("states", "activations", "logits")]
    needed = " + ".join(f"{part:.1f}" for part in memory) + f" = {sum(memory):.1f}"
    speed = ["—", "—"] if row["days"] is None else [f"{row['tokens_per_second']:,.0f}", f"{row['days']:,.2f}"]
    cells = [row["size"], row["model"], str(row["n_gpus"]), str(row["batch_size"] or 1), needed]
    return [*cells, f"{row['utilisation']:.1%}", *speed, row["basis"]]
