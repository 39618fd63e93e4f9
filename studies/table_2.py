"""The paper's Table 2 with the runs at hand: their arms, and the paper's numbers beside those of its setting."""

import dataclasses

from model import GPTConfig
from studies import comparison, page
from studies.sections import millions, with_interval
from train_config import TrainConfig

# The paper's Table 2 (arXiv 2510.23912), weight decay as in its Section 5.2.2; one run per column, on OpenWebText.
# (W_Q = I, tied) -> parameters, those of attention and MLP (with the position embedding), validation loss.
PAPER = {
    (False, True): ("124M", "86M", "2.90"),
    (True, True): ("117M", "79M", "2.88"),
    (False, False): ("163M", "86M", "2.87"),
    (True, False): ("156M", "79M", "2.86"),
}
# Options that must have the paper's value (the default of TrainConfig) for losses to be comparable with the paper's.
SETTING = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dataset", "tokens_per_step", "max_iters")


def paper_column(config):
    """(key in PAPER of the column to which a configuration belongs, the names in SETTING that differ from the paper).

    (None, []) for a model that at no size belongs to a column of the paper's table.
    """
    reduced, tied = config["wq_identity"], config["tie_weights"]
    model = GPTConfig(wq_identity=reduced, tie_weights=tied, attn_scale=0.5 if reduced else 1.0)
    if any(config[name] != value for name, value in dataclasses.asdict(model).items() if name not in SETTING):
        return None, []
    if decays(config) != (f"{2**-5:g}" if reduced else "0.1"):
        return None, []
    return (reduced, tied), [name for name in SETTING if config[name] != getattr(TrainConfig(), name)]


def decays(config, over_the_run=False):
    """The weight decay of attention, MLP and embeddings as text; one number where they are the same.

    over_the_run: times the sum of the learning rates of all steps, the d by which AdamW's decay alone shrinks weights
    to exp(−d) of what they were; in two digits.
    """
    own = [config[f"weight_decay_{part}"] for part in ("attn", "mlp", "embd")]
    values = [config["weight_decay"] if value is None else value for value in own]
    if over_the_run:
        total = TrainConfig(**{f.name: config[f.name] for f in dataclasses.fields(TrainConfig)}).learning_rate_sum()
        values = [value * total for value in values]
    form = "{:.2g}" if over_the_run else "{:g}"
    return " / ".join(form.format(value) for value in (values if len(set(values)) > 1 else values[:1]))


def table_2(cells):
    """The paper's Table 2 with a row for each cell, and the paper's numbers beside those that have its setting."""
    head = [
        "arm",
        "trainable",
        "scale",
        "weight decay",
        "decay over the run",
        "parameters",
        "attn + MLP",
        "tokens",
        "seeds",
        "validation loss (mean ± 95 %)" if any(len(cell.runs) > 1 for cell in cells) else "validation loss",
    ]
    rows = []
    for cell in cells:
        config, parameters = cell.example.config, cell.example.facts["parameters"]
        trained = [matrix for matrix in "QKVO" if not config.get(f"w{matrix.lower()}_identity")]
        rows.append(
            [
                cell.label,
                " ".join(f"W_{matrix}" for matrix in trained),
                f"{config['attn_scale']:g}/√{config['n_embd'] // config['n_head']}",
                decays(config),
                decays(config, over_the_run=True),
                millions(parameters["total"]),
                millions(parameters["attn_mlp"]),
                millions(cell.example.summary["tokens"]),
                f"{len(cell.runs)}",
                with_interval(comparison.summarise(cell.losses.values())),
            ]
        )
    columns = [paper_column(cell.example.config) for cell in cells]
    if any(column and not differs for column, differs in columns):
        head += ["paper: parameters", "paper: attn + MLP", "paper: loss"]
        for row, (column, differs) in zip(rows, columns, strict=True):
            row += PAPER[column] if column and not differs else ["–"] * 3
    return page.Table(head, rows, words=("arm", "trainable"))


def paper_note(cells):
    """What the paper's numbers are, or why they are not shown; None where no cell belongs to a column of its table."""
    columns = [differs for column, differs in (paper_column(cell.example.config) for cell in cells) if column]
    if not columns:
        return None
    if [] in columns:
        return (
            "The paper's numbers are those of its Table 2 (arXiv 2510.23912): OpenWebText, 124M to 163M parameters, "
            "one run each; its attn + MLP includes the position embedding."
        )
    return (
        "The losses of the paper's Table 2 (arXiv 2510.23912; OpenWebText, 124M to 163M parameters) are not shown, as "
        f"they are not comparable: these runs use a different {', '.join(columns[0])}."
    )
