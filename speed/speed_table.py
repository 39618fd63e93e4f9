"""What bench.py measured as a table: its conditions, its lines, and sentences on what they mean."""

import torch

from engine import devices
from engine.flops import cost
from speed import peer, timing

REFERENCES = ("baseline", *peer.NAMES.values())  # whose speed others are given as multiples of


def conditions(cfg, timed, models):
    """What the table must say of what was done: name -> text."""
    # With batch_size=0 models may have ended with different micro-batches.
    batch_sizes = {model.run.batch_size for model in models.values()}
    micro_batches = " or ".join(f"{models['baseline'].run.n_own // size} × {size}" for size in sorted(batch_sizes))
    said = {
        "model": f"{cfg.n_layer} layers, {cfg.n_head} heads, n_embd {cfg.n_embd}, vocabulary {cfg.vocab_size:,}",
        "step": f"{timed.tokens_per_step:,} tokens, {micro_batches} sequences of {cfg.block_size:,} (in a run "
        f"{cfg.tokens_per_step:,} tokens)",
        "data": f"{timed.data_dir}/{timed.dataset}" if timed.dataset == cfg.dataset else "random (no dataset is here)",
        "turns": f"{cfg.repeats} of each, in turn: median [middle half]; ratios are of turns in the same round",
    }
    if "decode" in cfg.only and cfg.causal:
        said["decoding"] = (
            f"{cfg.decode_tokens} tokens after a prompt of {cfg.decode_prompt}, greedy, the prompt's time included, "
            f"in {decoding_dtypes(cfg, models['baseline'])}, "
            f"{'ours compiled' if cfg.decode_compile else 'not compiled'}"
        )
    return said


def decoding_dtypes(cfg, model):
    """The precision in which a model decodes: 'float32 at batch 1, bfloat16 at batch 8'."""
    batch_sizes = sorted({1, cfg.decode_batch})
    return ", ".join(f"{devices.dtype_name(model.decoding_dtype(cfg, n))} at batch {n}" for n in batch_sizes)


def make_rows(what, works, timings, limits):
    """A dict for each line of the table, from what `timing.interleave` gives.

    limits: dtype -> operations a second of the datasheet (None: not known) and of a large matrix product.
    """
    rows = []
    for name, work in works.items():
        timed = timings[name]
        rate, *half = timing.middle(timed.rates)
        row = dict(what=what, model=name, tokens_per_second=rate, middle_half=half, rates=timed.rates)
        row |= dict(calls=timed.calls, tokens=work.tokens, flops=work.flops, peak_bytes=timed.peak_bytes)
        of_peak, of_product = (
            timing.utilisation(rate, work.flops, limit) for limit in limits.get(work.dtype, (None, None))
        )
        row |= dict(of_peak=of_peak, of_product=of_product)
        for reference in REFERENCES:
            if reference in works and reference != name:
                row[f"over {reference}"] = timing.middle(timing.ratios(timed, timings[reference]))
        rows.append(row)
    return rows


def notes(cfg, models, rows):
    """What the table's lines mean for decoding and for a mixture of experts: a list of sentences."""
    by_name = {(row["what"], row["model"]): row for row in rows}
    found = []
    reduced = by_name.get(("decoding, batch 1", "reduced"))
    if reduced:
        sizes = []
        for wq_identity in (False, True):
            config = cfg.train_config(wq_identity=wq_identity).model_config()
            layers = config.n_layer if config.share_layers else 1
            sizes.append(cost(config).attn_mlp * layers * models["baseline"].decoding_dtype(cfg, 1).itemsize)
        ratio, lower, upper = reduced["over baseline"]
        found.append(
            f"Decoding: a token at batch 1 reads {sizes[0] / 1e6:,.2f} MB of block weights with W_Q and "
            f"{sizes[1] / 1e6:,.2f} MB with W_Q = I, {1 - sizes[1] / sizes[0]:.1%} fewer. Were that all its time, it "
            f"would be {sizes[0] / sizes[1]:.3f} times as fast; measured: {ratio:.3f} [{lower:.3f}, {upper:.3f}]."
        )
    ideal = by_name.get(("training step", "active experts"))
    if ideal:
        ratio, lower, upper = ideal["over baseline"]
        operations = by_name["training step", "baseline"]["flops"] / ideal["flops"]
        found.append(
            f"Mixture: all {cfg.n_expert} experts are computed. A training step takes {ratio:.2f} [{lower:.2f}, "
            f"{upper:.2f}] times that of an ideal MLP of the {cfg.n_expert_active} active ones alone (mlp_ratio "
            f"{cfg.mlp_ratio * cfg.n_expert_active:g}, {operations:.2f} times fewer operations)."
        )
    for each in cfg.peer:
        model = models[peer.NAMES[each]]
        dtypes = []
        if {"train", "eval"} & set(cfg.only):
            dtypes.append(
                f"in the same loop, with the same optimizer, in {devices.dtype_name(model.run.compute.dtype)}"
            )
        if "decode" in cfg.only:
            dtypes.append(f"decoding in {decoding_dtypes(cfg, model)}")
        if dtypes:
            found.append(f"{model.name}, {'; '.join(dtypes)}: {model.run.model.description}.")
    if "decode" in cfg.only and not cfg.causal:
        found.append("Decoding: n/a, as an encoder (causal=False) generates nothing.")
    if any(row["peak_bytes"] is None for row in rows):
        found.append(f"Memory of a model alone is counted on a GPU. {process_memory()}")
    return found


def process_memory():
    """A sentence with the memory of this process."""
    used = devices.peak_memory_bytes(torch.device("cpu"))
    return f"This process held up to {used / 1e9:.2f} GB with all models."


def table(result):
    """The content of the JSON file as Markdown."""
    lines = [f"- {name}: {value}" for name, value in result["header"].items()]
    rows = result["rows"]
    references = [name for name in REFERENCES if any(f"over {name}" in row for row in rows)]
    columns = ["tokens/s", *(f"times {name}" for name in references)]
    columns += ["of the datasheet's peak", "of a large product", "peak memory"]
    lines += ["", "| what | model | " + " | ".join(columns) + " |", "| --- | --- |" + " ---: |" * len(columns)]
    for row in rows:
        lower, upper = row["middle_half"]
        digits = 0 if upper >= 1000 else 1
        speeds = [f"{rate:,.{digits}f}" for rate in (row["tokens_per_second"], lower, upper)]
        cells = [row["what"], row["model"], f"{speeds[0]} [{speeds[1]}, {speeds[2]}]"]
        for reference in references:
            median, lower, upper = row.get(f"over {reference}", (None,) * 3)
            cells.append("" if median is None else f"{median:.3f} [{lower:.3f}, {upper:.3f}]")
        cells += ["n/a" if row[name] is None else f"{row[name]:.1%}" for name in ("of_peak", "of_product")]
        cells.append("n/a" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f} GB")
        lines.append("| " + " | ".join(cells) + " |")
    if "profile" in result:
        names = list(result["profile"])
        lines += ["", "| time of training steps | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
        for kind in result["profile"][names[0]]:
            cells = [f"{result['profile'][name][kind]:.1%}" for name in names]
            lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    for note in result["notes"]:
        lines += ["", note]
    return "\n".join(lines)
