"""How arms differ: computed from the configurations of their runs, never from a list of what usually differs."""

from studies.runs import is_number
from studies.texts import distinct_texts, value_text
from train_config import TrainConfig


def without_replaced(options):
    """A dict of options, name -> value, without those that another one replaces."""
    replaced = () if options.get("attn_logit_std") in (None, "paper") else ("attn_scale",)
    return {name: value for name, value in options.items() if name not in replaced}


def in_effect(cell):
    """The options that determine the result of a cell's runs, without those that another one replaces."""
    return without_replaced(cell.example.experiment)


def differing(cells):
    """The options that determine a result and are not the same in all cells, in the order of TrainConfig."""
    found = [in_effect(cell) for cell in cells]
    order = list(TrainConfig.__dataclass_fields__)
    names = dict.fromkeys(name for each in found for name in each)
    names = sorted(names, key=lambda name: order.index(name) if name in order else len(order))
    return [name for name in names if len({repr(each.get(name)) for each in found}) > 1]


def option_texts(cells):
    """For each cell: the options in which the cells differ, where they are not the defaults of train.py.

    The options that name its point of a grid are left out. Two cells with equal texts are of different points.
    """
    defaults = {name: field.default for name, field in TrainConfig.__dataclass_fields__.items()}
    words = [[] for _ in cells]
    for name in differing(cells):
        values = [in_effect(cell).get(name, defaults.get(name)) for cell in cells]
        for row, cell, value, text in zip(words, cells, values, distinct_texts(values), strict=True):
            if name not in cell.point and (name not in defaults or value != defaults[name]):
                row.append(name if value is True else f"{name} {text}")
    for row, cell in zip(words, cells, strict=True):
        row += changes(cell)
    return [", ".join(row) or "–" for row in words]


def changes(cell):
    """The options that were changed on the way in a cell's runs: ['changed on the way: beta1 0.9 → 0.5 …']."""
    found = {}
    for run in cell.runs.values():
        if run.changes:
            found.setdefault(run.changes_text, []).append(str(run.config["seed"]))
    return [f"changed on the way (seed {', '.join(seeds)}): {text}" for text, seeds in found.items()]


def summary(cells, most=6):
    """What the cells differ in, as text: 'wq_identity, attn_scale (1 / 0.5)'; None where there is nothing.

    An option with more than so many values is named alone.
    """
    parts = []
    for name in differing(cells):
        known = (options[name] for options in map(in_effect, cells) if name in options)
        values = list({repr(value): value for value in known}.values())
        values = sorted(values) if all(map(is_number, values)) else values
        is_switch = all(isinstance(value, bool) for value in values)
        parts.append(name if is_switch or len(values) > most else f"{name} ({' / '.join(distinct_texts(values))})")
    return ", ".join(parts) or None


def mismatches(cell, control, about=None, grid=()):
    """What makes the comparison of two cells' losses unfair, as phrases: other tokens, block_size or precision.

    about, grid: the options in which arms are meant to differ, and those of the grid; None: not known. Every other
    option in which the two differ is one of the phrases.
    """
    a, b = (each.example for each in (cell, control))
    found = []
    a_tokens, b_tokens = (run.summary["tokens"] for run in (a, b))
    if a_tokens != b_tokens:
        found.append(f"{a_tokens / b_tokens:.3g} × the training tokens" if b_tokens else "training tokens against none")
    if a.config["block_size"] != b.config["block_size"]:
        found.append(f"block_size {a.config['block_size']} against {b.config['block_size']}")
    if a.precision != b.precision:
        found.append(f"{a.precision} against {b.precision}")
    if about is not None:
        one, other = map(in_effect, (cell, control))
        for name in differing([cell, control]):
            if name not in {*about, *grid, "block_size"}:
                found.append(f"{name} {value_text(one.get(name))} against {value_text(other.get(name))}")
    return found
