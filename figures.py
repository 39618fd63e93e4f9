"""The figures of a report: each function draws one PNG, as far as the results support it.

Bands and bars are 95 % t-intervals over seeds. Colours are Okabe and Ito's and viridis, which colour-blind readers can
tell apart; line styles and markers change where colours repeat.
"""

import math

import numpy as np

import comparison
from arms import are_comparable, is_number, point_text, value_text

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
LINES = ["-", "--", "-.", ":"]
MARKERS = "os^D"
WIDTH = 8  # inches, of 150 dots each: what a README shows
LOSS = "validation loss (nats a token)"
DIAGNOSTICS = {  # metrics of the records of kind "diagnostics" (diagnostics.py), and what their axes say
    "attn_logit_max": "largest |logit|",
    "attn_logit_mean": "mean |logit|",
    "attn_logit_std": "standard deviation\nof a query's logits",
    "attn_entropy": "entropy (nats)",
    "query_norm": "norm of a query",
    "key_norm": "norm of a key",
    "W_Q_norm": "‖W_Q‖ (Frobenius)",
    "W_K_norm": "‖W_K‖ (Frobenius)",
    "grad_norm": "gradient norm\n(attention)",
}


def curves(results, path):
    """Loss against training tokens, of each arm at its best point, with the relative difference to the control below.

    A pair of panels for each control and size: above, validation loss (thick) and training loss (thin); below, the
    validation loss of an arm divided by its control's, less one, paired by seed. Writes nothing and returns False where
    no arm was evaluated more than once.
    """
    groups = {}
    for cell in results.best:
        if len(cell.curve("eval", "val_loss")[0]) > 1:
            groups.setdefault((cell.control, *results.size(cell).values()), []).append(cell)
    if not groups:
        return False
    columns = min(2, len(groups))
    rows = math.ceil(len(groups) / columns)
    height = 4.4 * rows if len(groups) > 1 else 6.2 if results.best_pairs else 4.5
    figure = _new_figure(WIDTH if columns == 1 else 11, height)
    for part, cells in zip(figure.subfigures(rows, columns, squeeze=False).flat, groups.values(), strict=False):
        pairs = [(cell, control) for cell, control in results.best_pairs if cell in cells and control in cells]
        if len(groups) > 1 and results.size_fields:
            part.suptitle(point_text(results.size(cells[0])), fontsize=10.5)
        labels = {cell.arm: point_text({name: cell.point[name] for name in results.tuned_fields}) for cell in cells}
        labels = {arm: f"{arm} ({text})" if text else arm for arm, text in labels.items()}
        _curves_of_group(part, cells, pairs, labels)
    figure.suptitle("Validation loss (thick) and training loss (thin)", fontsize=11)
    return _save(figure, path)


def _curves_of_group(figure, cells, pairs, labels):
    style = _styles([cell.arm for cell in cells])
    seen = max(cell.example.summary["tokens"] for cell in cells)
    unit, unit_name = (1e9, "billions") if seen >= 2e9 else (1e6, "millions")
    panels = figure.subplots(1 + bool(pairs), 1, sharex=True, squeeze=False, height_ratios=[2.2, 1][: 1 + bool(pairs)])
    upper, lower = panels[0, 0], panels[-1, 0]
    lowest, highest = math.inf, -math.inf
    for cell in cells:
        look = {name: style[cell.arm][name] for name in ("color", "linestyle")}
        tokens_per_step = cell.example.config["tokens_per_step"] / unit
        steps, losses = _thinned(*cell.curve("train", "loss"))
        if len(steps):
            faint = dict(linewidth=0.8, alpha=0.5 if len(cells) <= 4 else 0.25, zorder=1)
            upper.plot(steps * tokens_per_step, losses.mean(axis=0), **faint, **look)
            lowest = min(lowest, losses.mean(axis=0).min())
        steps, losses = cell.curve("eval", "val_loss")
        mean = _line_with_band(upper, steps * tokens_per_step, losses, linewidth=2, label=labels[cell.arm], **look)
        lowest = min(lowest, mean.min())
        highest = max(
            highest, mean[np.searchsorted(steps, steps[-1] / 10) :].max()
        )  # what comes before would flatten it
    margin = 0.05 * (highest - lowest) or 0.1
    upper.set_ylim(lowest - margin, highest + margin)
    upper.set_ylabel("loss (nats a token)")
    upper.legend(frameon=False, fontsize=9, loc="upper right", ncols=1 + (len(cells) > 6))
    reach = 0.0
    for cell, control in pairs:
        look = {name: style[cell.arm][name] for name in ("color", "linestyle")}
        steps, relative = relative_difference(cell, control)
        if len(steps):
            tokens = steps * cell.example.config["tokens_per_step"] / unit
            reach = max(reach, 3 * abs(_line_with_band(lower, tokens, 100 * relative, **look)).max())
    if pairs:
        low, high = lower.get_ylim()
        if reach:  # a band of two seeds may be ten times as wide
            lower.set_ylim(max(low, -reach), min(high, reach))
        lower.axhline(0, color="black", linewidth=0.8)
        lower.set_ylabel(f"difference to\n{pairs[0][1].arm} (%)", fontsize=8.5)
        figure.align_ylabels()
    lower.set_xlabel(f"training tokens ({unit_name})")


def relative_difference(cell, control):
    """(steps, validation loss / the control's − 1), (seeds, steps), of the seeds and steps that both have."""
    seeds = [seed for seed in cell.runs if seed in control.runs]
    if not seeds:
        return np.array([]), np.array([])
    (steps, a), (control_steps, b) = (c.curve("eval", "val_loss", seeds) for c in (cell, control))
    common = np.intersect1d(steps, control_steps)
    return common, a[:, np.isin(steps, common)] / b[:, np.isin(control_steps, common)] - 1


def heat_maps(results, path):
    """The mean loss over a grid of two fields, a panel an arm, on one colour scale; the best points have a frame.

    Writes nothing and returns False where the grid has not two fields of several values.
    """
    fields = [name for name, values in results.grid.items() if len(values) > 1]
    if len(fields) != 2:
        return False
    rows, columns = (_in_order(results.grid[name]) for name in fields)
    tables = {arm: np.full((len(rows), len(columns)), math.nan) for arm in results.arms}
    places = [(c, rows.index(c.point[fields[0]]), columns.index(c.point[fields[1]])) for c in results.cells]
    for cell, i, j in places:
        tables[cell.arm][i, j] = np.mean(list(cell.losses.values()))
    losses = np.array([tables[cell.arm][i, j] for cell, i, j in places])
    # A learning rate that diverges must not hide the differences elsewhere.
    low, cut = losses.min(), losses.min() + 4 * (np.median(losses) - losses.min())
    high = min(losses.max(), cut) if cut > low else losses.max()
    across = min(len(tables), 3 if len(columns) < 5 else 2)
    down = math.ceil(len(tables) / across)
    figure = _new_figure(1.5 + across * (0.8 + 0.62 * len(columns)), down * (1.1 + 0.42 * len(rows)))
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for panel, arm in zip(panels.flat, tables, strict=False):
        look = dict(cmap="viridis_r", vmin=low, vmax=high, aspect="auto", origin="lower")
        image = panel.imshow(tables[arm], **look)
        panel.set_title(arm, fontsize=11)
        panel.set_xticks(range(len(columns)), map(value_text, columns))
        panel.set_yticks(range(len(rows)), map(value_text, rows))
        panel.set_xlabel(fields[1])
        panel.set_ylabel(fields[0])
    for cell, i, j in places:
        panel, loss = panels.flat[list(tables).index(cell.arm)], tables[cell.arm][i, j]
        is_best = any(cell is best for best in results.best)
        colour = "white" if loss - low > 0.5 * (high - low) else "black"
        weight = "bold" if is_best else "normal"
        panel.text(j, i, f"{loss:.3f}", ha="center", va="center", fontsize=8.5, color=colour, fontweight=weight)
        if is_best:
            corners = [j - 0.46, j + 0.46, j + 0.46, j - 0.46], [i - 0.46, i - 0.46, i + 0.46, i + 0.46]
            panel.fill(*corners, fill=False, edgecolor=COLOURS[1], linewidth=2.5)
    for panel in panels.flat[len(tables) :]:
        panel.remove()
    figure.colorbar(image, ax=panels, label=LOSS, extend="max" if high < losses.max() else "neither")
    for panel in panels.flat[: len(tables)]:
        panel.label_outer()
    return _save(figure, path)


def lines(results, path):
    """The loss against the one field of the grid, a line an arm, with the paired difference to the control below.

    The best point of an arm is filled, where the field is tuned. Writes nothing and returns False where the grid has
    not one field of several values.
    """
    fields = [name for name, values in results.grid.items() if len(values) > 1]
    if len(fields) != 1:
        return False
    (name,) = fields
    values = _in_order(results.grid[name])
    places, is_log = _places(values)
    style, pairs = _styles(results.arms), results.point_pairs
    figure = _new_figure(WIDTH, 6.2 if pairs else 4.5)
    panels = figure.subplots(1 + bool(pairs), 1, sharex=True, squeeze=False, height_ratios=[1.7, 1][: 1 + bool(pairs)])
    upper, lower = panels[0, 0], panels[-1, 0]

    def draw(panel, arm, means):  # means: value of the field -> Mean
        known = [value for value in values if value in means]
        x = [
            _beside(places, is_log, results.arms.index(arm), len(results.arms))[values.index(value)] for value in known
        ]
        bars = [means[value].half_width or 0 for value in known]
        look = dict(style[arm], capsize=3, markersize=6, markerfacecolor="white")
        panel.errorbar(x, [means[value].mean for value in known], bars, label=arm, **look)
        for cell in results.best if panel is upper and results.tuned_fields else ():
            if cell.arm == arm:
                best, look = cell.point[name], dict(style[arm], markersize=8, zorder=5)
                panel.plot(x[known.index(best)], means[best].mean, **look)

    for arm in results.arms:
        cells = [cell for cell in results.cells if cell.arm == arm]
        draw(upper, arm, {cell.point[name]: comparison.summarise(cell.losses.values()) for cell in cells})
        found = {a.point[name]: comparison.difference(a.losses, b.losses) for a, b in pairs if a.arm == arm}
        if found := {value: difference for value, difference in found.items() if difference.n}:
            draw(lower, arm, found)
    if is_log:
        _log_axis(upper.xaxis)
    lower.set_xticks(places, map(value_text, values))
    lower.set_xlabel(name)
    upper.set_ylabel(LOSS)
    upper.legend(frameon=False, fontsize=9, ncols=1 + (len(results.arms) > 6))
    if pairs:
        lower.axhline(0, color="black", linewidth=0.8)
        lower.set_ylabel("difference to the control\nat the same value (nats)")
    return _save(figure, path)


def cost(results, training_flops, path):
    """The loss of each arm at its best point against what it costs: parameters of attention and MLP, operations.

    training_flops: run folder -> operations of the training. The sizes of an arm are joined by its line, an arm and its
    control by a thin one. What is the same for all arms, or for all sizes of an arm, gets no panel; only arms with the
    objective of the first are drawn. Writes nothing and returns False for two points, and where costs are the same.
    """
    best = [cell for cell in results.best if are_comparable(cell, results.best[0])]
    power = 3 * int(math.log10(max(1, *(training_flops[cell.example.folder] for cell in best))) // 3)
    costs = {
        "attention + MLP parameters (millions)": lambda cell: cell.example.facts["parameters"]["attn_mlp"] / 1e6,
        f"training operations ($10^{{{power}}}$ FLOPs)": lambda cell: training_flops[cell.example.folder] / 10**power,
    }
    apart = best if not results.size_fields else [cell for cell in best if cell.arm == best[0].arm]
    costs = {label: of for label, of in costs.items() if len(set(map(of, apart))) > 1}
    if not costs or len(best) < 3:
        return False
    arms = list(dict.fromkeys(cell.arm for cell in best))
    figure = _new_figure(WIDTH, 4.4 + 0.2 * math.ceil(len(arms) / 3))
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    style = _styles(arms)
    for panel, (label, of) in zip(panels, costs.items(), strict=True):
        places = sorted(set(map(of, best)))
        is_log = places[-1] > 4 * places[0]
        spots = [(of(cell), comparison.summarise(cell.losses.values())) for cell in best]
        for arm in arms:
            own = sorted((x, i) for i, (x, _) in enumerate(spots) if best[i].arm == arm)
            own = [(x, spots[i][1]) for x, i in own]
            bars = [mean.half_width or 0 for _, mean in own]
            look = dict(style[arm], capsize=3, markersize=6, alpha=0.8, label=arm)
            if not results.size_fields:
                look["linestyle"] = "none"
            panel.errorbar([x for x, _ in own], [mean.mean for _, mean in own], bars, **look)
        for pair in results.best_pairs:
            ends = [spots[i] for cell in pair for i, other in enumerate(best) if other is cell]
            panel.plot([x for x, _ in ends], [mean.mean for _, mean in ends], color="0.6", linewidth=0.8, zorder=1)
        if is_log:
            _log_axis(panel.xaxis)
        panel.set_xlabel(label)
    panels[0].set_ylabel(LOSS)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(3, len(names)), frameon=False, fontsize=9)
    return _save(figure, path)


def diagnostics(cell, control, path):
    """What happens in attention, layer by layer, in two arms side by side, the control on the left; means over seeds.

    Writes nothing and returns False where not both were trained with diagnostics.
    """
    import matplotlib

    pair = (control, cell)
    rows = {}  # metric -> for each of the two (steps, values of each layer)
    for name in DIAGNOSTICS:
        found = [c.curve("diagnostics", name) for c in pair]
        if any(np.isfinite(values).any() for _, values in found):
            rows[name] = [(steps, values.mean(axis=0)) for steps, values in found]
    if not all(any(np.isfinite(row[side][1]).any() for row in rows.values()) for side in (0, 1)) or not rows:
        return False
    figure = _new_figure(WIDTH, 0.9 + 1.35 * len(rows))
    panels = figure.subplots(len(rows), 2, sharex=True, sharey="row", squeeze=False)
    layers = max(c.example.config["n_layer"] for c in pair)
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, layers))
    for row, (name, found) in zip(panels, rows.items(), strict=True):
        for panel, c, (steps, values) in zip(row, pair, found, strict=True):
            if not np.isfinite(values).any():
                text = "the identity" if name in ("W_Q_norm", "W_K_norm") else "not recorded"
                panel.text(0.5, 0.5, text, ha="center", transform=panel.transAxes, color="0.4")
                continue
            for layer, colour in zip(values.T, colours, strict=False):
                panel.plot(steps * c.example.config["tokens_per_step"] / 1e6, layer, color=colour, linewidth=1.4)
        known = np.concatenate([values[np.isfinite(values)] for _, values in found])
        if known.min() > 0 and known.max() > 20 * known.min():
            _log_axis(row[0].yaxis)
        row[0].set_ylabel(DIAGNOSTICS[name], fontsize=8.5)
    for panel, c in zip(panels[0], pair, strict=True):
        panel.set_title(c.label, fontsize=10.5)
    for panel in panels[-1]:
        panel.set_xlabel("training tokens (millions)")
    handles = [panels[0, 0].plot([], [], color=colour, label=f"{i}")[0] for i, colour in enumerate(colours)]
    figure.legend(handles=handles, title="layer", loc="outside right upper", frameon=False)
    return _save(figure, path)


def _new_figure(width, height):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt.figure(figsize=(width, height), layout="constrained")


def _save(figure, path):
    import matplotlib.pyplot as plt

    for panel in figure.axes:
        if not panel.images and panel.get_label() != "<colorbar>":
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def _log_axis(axis):
    """Make an axis logarithmic, with plain numbers at 1, 2 and 5 times the powers of ten."""
    from matplotlib import ticker

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(ticker.NullLocator())


def _styles(names):
    """name -> colour, line style and marker; 28 differ from each other."""
    turns = {name: divmod(i, len(COLOURS)) for i, name in enumerate(names)}
    return {
        name: dict(color=COLOURS[i], linestyle=LINES[turn % len(LINES)], marker=MARKERS[turn % len(MARKERS)])
        for name, (turn, i) in turns.items()
    }


def _line_with_band(panel, x, values, **look):
    """Draw the mean of values, (seeds, len(x)), with its interval; the mean."""
    mean, low, high = comparison.band(values)
    panel.plot(x, mean, **look)
    if low is not None:
        panel.fill_between(x, low, high, color=look["color"], alpha=0.18, linewidth=0)
    return mean


def _thinned(steps, values, most=100):
    """Means over neighbouring steps, `most` groups at most: a training loss is of one batch, and noisy."""
    size = max(1, math.ceil(len(steps) / most))
    groups = [slice(start, start + size) for start in range(0, len(steps), size)]
    if not groups:
        return steps, values
    means = np.stack([values[:, group].mean(axis=1) for group in groups], axis=1)
    return np.array([steps[group].mean() for group in groups]), means


def _in_order(values):
    return sorted(values) if all(map(is_number, values)) else list(values)


def _places(values):
    """(where on an axis each value stands, whether the axis is logarithmic): zero stands a step left of the others."""
    if not all(map(is_number, values)):
        return list(range(len(values))), False
    positive = [value for value in values if value > 0]
    if min(values) < 0 or len(positive) < 2 or max(positive) <= 4 * min(positive):
        return values, False
    return [positive[0] ** 2 / positive[1] if value == 0 else value for value in values], True


def _beside(places, is_log, i, n):
    """places, moved a little for the i-th of n arms, so that their bars stand beside each other."""
    share = 0.012 * (i - (n - 1) / 2)
    if is_log:
        return [place * (places[-1] / places[0]) ** share for place in places]
    return [place + share * (places[-1] - places[0]) for place in places]
