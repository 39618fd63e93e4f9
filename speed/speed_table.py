"""The table that bench.py prints: the conditions of the measurement, a row for each speed, and sentences about them."""

import torch

from engine import devices
from engine.flops import cost
from speed import peer, timing
from studies import page

REFERENCES = ("baseline", *peer.NAMES.values())  # the models by whose speed others are divided


def conditions(cfg, timed, models):
    """What was measured, and how: name -> text. cfg: a BenchConfig; timed: the TrainConfig of its models."""
    # With batch_size=0 the models may have found different micro-batches.
    batch_sizes = sorted({model.trainer.batch_size for model in models.values()})
    micro_batches = " or ".join(f"{models['baseline'].trainer.n_own // size} × {size}" for size in batch_sizes)
    found = {
        "model": f"{cfg.n_layer} layers, {cfg.n_head} heads, n_embd {cfg.n_embd}, vocabulary {cfg.vocab_size:,}",
        "step": f"{timed.tokens_per_step:,} tokens, {micro_batches} sequences of {cfg.block_size:,} (in a run "
        f"{cfg.tokens_per_step:,} tokens)",
        "data": f"{timed.data_dir}/{timed.dataset}" if timed.dataset == cfg.dataset else "random tokens (no bins here)",
        "turns": f"{cfg.repeats} of each model, interleaved: median [interquartile range]; ratios are of turns in the "
        "same round",
    }
    if "decode" in cfg.only and cfg.causal:
        found["decoding"] = (
            f"{cfg.decode_tokens} tokens after a prompt of {cfg.decode_prompt}, greedy, prefill included, "
            f"in {decoding_dtypes(cfg, models['baseline'])}, "
            f"{'ours compiled' if cfg.decode_compile else 'not compiled'}"
        )
    return found


def decoding_dtypes(cfg, model):
    """The dtypes in which a bench.BenchModel decodes: 'float32 at batch 1, bfloat16 at batch 8'."""
    batch_sizes = sorted({1, cfg.decode_batch})
    return ", ".join(f"{devices.dtype_name(model.decoding_dtype(cfg, n))} at batch {n}" for n in batch_sizes)


def make_rows(what, workloads, timings, limits):
    """A dict for each row of the table; timings: of `timing.interleave` for workloads.

    limits: dtype -> FLOP/s of the datasheet (None: not known) and of a large matrix product.
    """
    rows = []
    for name, workload in workloads.items():
        timed = timings[name]
        rate, *quartiles = timing.median_and_iqr(timed.rates)
        row = dict(what=what, model=name, tokens_per_second=rate, interquartile_range=quartiles, rates=timed.rates)
        row |= dict(calls=timed.calls, tokens=workload.tokens, flops=workload.flops, peak_bytes=timed.peak_bytes)
        peak, product = limits.get(workload.dtype, (None, None))
        row["of_peak"] = timing.utilisation(rate, workload.flops, peak)
        row["of_product"] = timing.utilisation(rate, workload.flops, product)
        for reference in REFERENCES:
            if reference in workloads and reference != name:
                row[f"over {reference}"] = timing.median_and_iqr(timing.ratios(timed, timings[reference]))
        rows.append(row)
    return rows


def notes(cfg, models, rows):
    """Sentences on what the rows say about decoding, a mixture of experts, the peers and memory."""
    by_name = {(row["what"], row["model"]): row for row in rows}
    found = []
    reduced = by_name.get(("decoding, batch 1", "reduced"))
    if reduced:
        n_bytes = []
        for wq_identity in (False, True):
            config = cfg.train_config(wq_identity=wq_identity).model_config()
            layers = config.n_layer if config.share_layers else 1
            n_bytes.append(cost(config).attn_mlp * layers * models["baseline"].decoding_dtype(cfg, 1).itemsize)
        full, less = n_bytes
        ratio, lower, upper = reduced["over baseline"]
        found.append(
            f"Decoding: at batch 1 each token reads {full / 1e6:,.2f} MB of block weights with W_Q and "
            f"{less / 1e6:,.2f} MB with W_Q = I, {1 - less / full:.1%} less. If this were all of its time, W_Q = I "
            f"would decode {full / less:.3f} times as fast; measured: {ratio:.3f} [{lower:.3f}, {upper:.3f}]."
        )
    ideal = by_name.get(("training step", "active experts"))
    if ideal:
        ratio, lower, upper = ideal["over baseline"]
        found.append(
            f"Mixture of {cfg.n_expert} experts: a training step takes {ratio:.2f} [{lower:.2f}, {upper:.2f}] times as "
            f"long as with an ideal MLP of only the {cfg.n_expert_active} active ones (mlp_ratio "
            f"{cfg.mlp_ratio * cfg.n_expert_active:g})."
        )
    for name in cfg.peer:
        model = models[peer.NAMES[name]]
        ways = []
        if {"train", "eval"} & set(cfg.only):
            ways.append(
                f"in the same loop, with the same optimizer, in {devices.dtype_name(model.trainer.compute.dtype)}"
            )
        if "decode" in cfg.only:
            ways.append(f"decoding in {decoding_dtypes(cfg, model)}")
        if ways:
            found.append(f"{model.name}, {'; '.join(ways)}: {model.trainer.model.description}.")
    if "decode" in cfg.only and not cfg.causal:
        found.append("Decoding: n/a, because an encoder (causal=False) generates nothing.")
    if any(row["peak_bytes"] is None for row in rows):
        used = devices.peak_memory_bytes(torch.device("cpu"))
        found.append(
            "The peak memory of a single model is measured on a GPU only. This process, with all models, used up to "
            f"{used / 1e9:.2f} GB."
        )
    return found


def markdown(result):
    """The content of bench.py's JSON file as Markdown."""
    rows = result["rows"]
    references = [name for name in REFERENCES if any(f"over {name}" in row for row in rows)]
    head = ["what", "model", "tokens/s", *(f"times {name}" for name in references)]
    head += ["of the datasheet's peak", "of a large product", "peak memory"]
    table = page.Table(head, [_cells(row, references) for row in rows], words=("what", "model"))
    parts = [page.Items([f"{name}: {value}" for name, value in result["header"].items()]), table]
    if "profile" in result:
        profiles = result["profile"]  # model -> kind of operation -> share
        kinds = next(iter(profiles.values()))
        shares = [[kind, *(f"{profile[kind]:.1%}" for profile in profiles.values())] for kind in kinds]
        parts.append(page.Table(["time of training steps", *profiles], shares, words=("time of training steps",)))
    parts += [page.Paragraph(note) for note in result["notes"]]
    return page.markdown(parts)


def _cells(row, references):
    lower, upper = row["interquartile_range"]
    digits = 0 if upper >= 1000 else 1
    rate, lower, upper = (f"{speed:,.{digits}f}" for speed in (row["tokens_per_second"], lower, upper))
    cells = [row["what"], row["model"], f"{rate} [{lower}, {upper}]"]
    for reference in references:
        ratio = row.get(f"over {reference}")
        cells.append("{:.3f} [{:.3f}, {:.3f}]".format(*ratio) if ratio else "")
    cells += ["n/a" if row[name] is None else f"{row[name]:.1%}" for name in ("of_peak", "of_product")]
    return [*cells, "n/a" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f} GB"]
