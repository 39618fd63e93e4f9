"""The table of arms: the losses and options of each, and the paper's Table 2 beside those of its setting."""

import dataclasses

from model import GPTConfig
from studies import comparison, options, page
from studies.texts import millions, point_text, value_text, with_interval
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


def scales(config):
    """The attention scale of each kind of layer as text: '0.5/√32'; with attn_logit_std, the scale that it sets."""
    cfg = TrainConfig(**{f.name: config[f.name] for f in dataclasses.fields(TrainConfig)})
    found = dict.fromkeys(value_text(cfg.attn_scale_in(layer), 3) for layer in range(cfg.n_layer))
    return f"{', then '.join(found)}/√{cfg.d_k}"


def table_2(cells):
    """A row for each cell, with the paper's numbers beside those that have its setting.

    The loss comes first, so that a narrow screen shows it. Columns that are empty for all cells are left out.
    """
    several = any(len(cell.runs) > 1 for cell in cells)
    rows = []
    for cell, own in zip(cells, options.option_texts(cells), strict=True):
        config, parameters = cell.example.config, cell.example.facts["parameters"]
        bits = [run.summary.get("bits_per_byte") for run in cell.runs.values()]
        point = {name: value for name, value in cell.point.items() if name != "learning_rate"}  # it has a column
        dates = sorted({run.date for run in cell.runs.values() if run.date})
        row = {
            "arm": f"{cell.arm} ({point_text(point)})" if point else cell.arm,
            f"validation loss{' (mean ± 95 %)' * several}": with_interval(comparison.summarise(cell.losses.values())),
            "bits per byte": "–" if None in bits else f"{sum(bits) / len(bits):.4f}",
            "seeds": f"{len(cell.runs)}",
            "learning rate": value_text(config["learning_rate"]),
            "decay over the run": decays(config, over_the_run=True),
            "weight decay": decays(config),
            "scale": scales(config),
            "parameters": millions(parameters["total"]),
            "attn + MLP": millions(parameters["attn_mlp"]),
            "tokens": millions(cell.example.summary["tokens"]),
            "date": " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "–",
            "options": own,
        }
        rows.append(row)
    columns = [paper_column(cell.example.config) for cell in cells]
    if any(column and not differs for column, differs in columns):
        for row, (column, differs) in zip(rows, columns, strict=True):
            numbers = PAPER[column] if column and not differs else ["–"] * 3
            row |= dict(zip(("paper: parameters", "paper: attn + MLP", "paper: loss"), numbers, strict=True))
    head = [name for name in rows[0] if any(row[name] != "–" for row in rows)]
    return page.Table(head, [[row[name] for name in head] for row in rows], words=("arm", "options"))


def reading(table):
    """What the columns of table_2 are, as a sentence."""
    text = "Decay over the run is the weight decay times the sum of the learning rates of all steps: by decay alone "
    text += "weights shrink to exp(−it)."
    if "options" in table.head:
        text = f"Options are those in which the arms differ, where they are not the defaults of train.py. {text}"
    return text


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
