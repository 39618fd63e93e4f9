"""The model card of an export: README.md in its folder, in Markdown under a YAML head."""

from engine.hf_classes import class_of

USE = """\
```python
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = {auto}.from_pretrained("{folder}")
```
"""
DECODERS = """\
Benchmarks, with `lm_eval` 0.4.13 or newer:

```sh
lm_eval --model hf --model_args pretrained={folder},dtype=float32 --tasks hellaswag,lambada_openai,wikitext
```
"""
LLAMA_CPP = """\
llama.cpp: `python convert_hf_to_gguf.py {folder} --outfile model.gguf`. {equal}
"""
EQUAL = {
    "gelu_tanh": "It computes GPT-2's activation by the tanh form, as this model does.",
    "gelu": "It computes GPT-2's activation by the tanh form, this model by the exact one: expect small differences.",
    "relu": "It computes GPT-2's activation by the tanh form of GELU, and this model has ReLU: do not use it there.",
}
QUERIES = (
    "In training the queries were the block's normalised input itself (W_Q = I, [arXiv 2510.23912]"
    "(https://arxiv.org/abs/2510.23912)){layers}. The class has a query matrix: {scale:g}, the attention scale, times "
    "the identity; fine-tuning trains it unless it is frozen."
)


def card(folder, model, facts, summary, source):
    """The text of a model card.

    folder: its name. model: the GPT. facts, summary: the contents of run.json and summary.json, {} where there are
    none. source: what else is known: dataset, step, license, difference (of logits).
    """
    config, stock = model.config, class_of(model.config).name
    data, loss = facts.get("data", {}), summary.get("val_loss")
    is_reduced = config.query(config.n_layer - 1) == "identity"
    rows = {
        "architecture": f"{config.n_layer} layers, {config.n_head} heads, n_embd {config.n_embd}, context "
        f"{config.block_size}, norm {config.norm}, positions {config.pos}, activation {config.activation}",
        "queries": "W_Q = I" if is_reduced else "trained W_Q",
        "parameters in training": f"{model.num_params().total:,}",
        "class": f"`{stock}`, no custom code",
        "trained on": f"{source.get('dataset') or 'unknown'}, fingerprint {data.get('fingerprint') or 'unknown'}",
        "tokenizer": data.get("tokenizer") or "unknown",
        "steps": f"{source['step']:,}",
        "tokens": f"{summary['tokens']:,}" if summary.get("tokens") else "unknown",
        "validation loss": f"{loss:.4f} ± {summary.get('val_loss_se') or 0:.4f} nats per token" if loss else "unknown",
        "commit of the training code": facts.get("git_commit") or "unknown",
        "logits": f"those of the training code, up to {max(source['difference'], 1e-7):.0e} of the largest (float32)",
    }
    tag = "text-generation" if config.causal else "fill-mask"
    head = ["library_name: transformers", f"license: {source['license']}", "tags:", f"- {tag}", "- wq-identity"]
    auto = "AutoModelForCausalLM" if config.causal else "AutoModelForMaskedLM"
    parts = [
        "\n".join(["---", *head, "---"]),
        f"# {folder}",
        "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())]),
    ]
    if is_reduced:
        first = config.wq_identity_from
        layers = f" in the layers from {first} on" if first else ""
        parts.append(QUERIES.format(layers=layers, scale=config.attn_scale_in(config.n_layer - 1)))
    parts.append(USE.format(auto=auto, folder=folder).rstrip())
    if config.causal:
        parts.append(DECODERS.format(folder=folder).rstrip())
    if stock == "GPT2LMHeadModel":
        parts.append(LLAMA_CPP.format(folder=folder, equal=EQUAL[config.activation]).rstrip())
    return "\n\n".join(parts) + "\n"
