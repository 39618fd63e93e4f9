"""The figures of a report. Each function writes one PNG and returns True, or returns False where it does not apply.

Bands and bars are 95 % t-intervals over seeds; studies/drawing.py has what the figures share.
"""

import math
import os
import re
from collections import Counter

import numpy as np

from studies import comparison, drawing
from studies.arms import are_comparable, point_text, value_text

FAR = 0.1  # of the best loss: losses that are no further from it than this are always in view
LOSS = "validation loss (nats per token)"
DIAGNOSTICS = {  # metric in the records of kind "diagnostics" (engine/diagnostics.py) -> label of its axis
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
    """Loss against training tokens of each arm at its best point, with the relative difference from control below.

    A pair of panels for each control and size: above, validation loss (thick) and training loss (thin); below, the
    validation loss of an arm divided by its control's, minus one, paired by seed; see _scale_differences. False where
    no arm was evaluated more than once.
    """
    groups = {}
    for cell in results.best:
        if len(cell.curve("eval", "val_loss")[0]) > 1:
            groups.setdefault((cell.control, *results.size(cell).values()), []).append(cell)
    if not groups:
        return False
    columns = 2 if len(groups) == 4 else min(3, len(groups))
    rows, deep = math.ceil(len(groups) / columns), 2 if results.best_pairs else 1
    height = 6.2 if columns == 1 else 4.2 if rows == 1 else 3.6 if columns == 2 else 2.6  # of a row with differences
    height = rows * height * (1 if deep == 2 else 0.7) + (0 if columns == 1 else 0.5)
    figure = drawing.new_figure(drawing.WIDTH if columns == 1 else drawing.WIDEST, height)
    panels = figure.subplots(rows * deep, columns, squeeze=False, height_ratios=rows * [2.2, 1][:deep])
    panels = panels.reshape(rows, deep, columns).swapaxes(1, 2).reshape(-1, deep)
    most = max(cell.example.summary["tokens"] for cells in groups.values() for cell in cells)
    unit, unit_name = (1e9, "billions") if most >= 2e9 else (1e6, "millions")
    compared = {}  # control -> for each size (lower panel, the largest |mean|, low, high)
    for i, cells in enumerate(groups.values()):
        upper, *lower = panels[i]
        pairs = [(cell, control) for cell, control in results.best_pairs if cell in cells and control in cells]
        labels = {cell.arm: point_text({name: cell.point[name] for name in results.tuned_fields}) for cell in cells}
        labels = {arm: drawing.label(f"{arm} ({text})" if text else arm) for arm, text in labels.items()}
        style = drawing.styles([cell.arm for cell in cells])
        _losses(upper, cells, labels, style, unit)
        if len(groups) > 1 and results.size_fields:
            upper.set_title(point_text(results.size(cells[0])), fontsize=10)
        if i % columns == 0:
            upper.set_ylabel("loss (nats per token)")
        if pairs:
            lower[0].sharex(upper)
            upper.tick_params(labelbottom=False)
            found = lower[0], *_differences(lower[0], pairs, style, unit)
            compared.setdefault(pairs[0][1].arm, []).append(found)
            if i % columns == 0:
                control = f"\nfrom {drawing.label(pairs[0][1].arm)}" if columns == 1 else ""
                lower[0].set_ylabel(f"difference{control} (%)", fontsize=8.5)
        elif lower:
            lower[0].remove()
        for panel in panels[i] if columns == 3 else ():
            panel.tick_params(labelsize=drawing.SMALL)
    for panel in panels[len(groups) :].flat:
        panel.remove()
    _scale_differences(compared)
    figure.align_ylabels()
    figure.supxlabel(f"training tokens ({unit_name})", fontsize=10)
    below = "; below, the difference from control" if compared and columns > 1 else ""
    figure.suptitle(f"Validation loss (thick) and training loss (thin){below}", fontsize=11)
    drawing.save(figure, path)
    return True


def _losses(panel, cells, labels, style, unit):
    """Draw the training and validation losses of cells. unit: the number of tokens in a unit of the x axis."""
    lowest, highest = math.inf, -math.inf
    for cell in cells:
        look = {name: style[cell.arm][name] for name in ("color", "linestyle")}
        tokens_per_step = cell.example.config["tokens_per_step"] / unit
        steps, losses = drawing.thinned(*cell.curve("train", "loss"))
        if len(steps):
            faint = dict(linewidth=0.8, alpha=0.5 if len(cells) <= 4 else 0.25, zorder=1)
            panel.plot(steps * tokens_per_step, losses.mean(axis=0), **faint, **look)
            lowest = min(lowest, losses.mean(axis=0).min())
        steps, losses = cell.curve("eval", "val_loss")
        x = steps * tokens_per_step
        mean, low, high = drawing.line_with_band(panel, x, losses, linewidth=2, label=labels[cell.arm], **look)
        # The first losses would flatten the later ones, so they may be cut off, up to a quarter of the training.
        begin = np.interp(x[-1] / 4 if len(x) > 3 else 0, x, mean)
        lowest = min(lowest, mean.min(), low[-1])
        highest = max(highest, mean[np.searchsorted(x, x[-1] / 10) :].max(), high[-1], begin)
    margin = 0.05 * (highest - lowest) or 0.1
    panel.set_ylim(lowest - margin, highest + margin)
    small = panel.get_gridspec().ncols == 3
    look = dict(fontsize=drawing.SMALL, handlelength=1.2, labelspacing=0.3) if small else dict(fontsize=9)
    panel.legend(loc="best" if small else "upper right", edgecolor="none", ncols=2 if len(cells) > 6 else 1, **look)


def _differences(panel, pairs, style, unit):
    """Draw relative differences in per cent; returns (the largest |mean|, low, high), with low <= 0 <= high.

    All means and the last interval of each arm are between low and high; earlier intervals may be cut off.
    """
    low = high = furthest = 0.0
    ends = []
    for cell, control in pairs:
        look = {name: style[cell.arm][name] for name in ("color", "linestyle")}
        tokens, relative = relative_difference(cell, control)
        if len(tokens):
            mean, least, most = drawing.line_with_band(panel, tokens / unit, 100 * relative, **look)
            furthest = max(furthest, abs(mean).max())
            low, high = min(low, least.min()), max(high, most.max())
            ends += [least[-1], most[-1]]
    reach = 3 * furthest  # a band of two seeds may be ten times as wide
    return furthest, min(max(low, -reach), *ends, 0), max(min(high, reach), *ends, 0)


def _scale_differences(compared):
    """Give the panels of differences one y scale that includes zero, so that they can be compared across sizes.

    compared: control -> for each size (panel, the largest |mean|, low, high). Two kinds of panels keep a scale of their
    own, and say so: those whose last interval reaches ten times as far as any mean of the same control (that of two
    seeds, for example), and those of a control whose differences are much larger than the others'.
    """
    alone, together = [], []  # (panels, low, high)
    for sizes in compared.values():
        reach = 10 * max(furthest for _, furthest, _, _ in sizes)
        alone += [([panel], low, high) for panel, _, low, high in sizes if max(-low, high) > reach]
        if fits := [(panel, low, high) for panel, _, low, high in sizes if max(-low, high) <= reach]:
            panels, lows, highs = zip(*fits, strict=True)
            together.append((panels, min(lows), max(highs)))
    if together:
        far = drawing.far_off([high - low for _, low, high in together])
        alone += [each for each, is_far in zip(together, far, strict=True) if is_far]
        together = [each for each, is_far in zip(together, far, strict=True) if not is_far]
        panels, lows, highs = zip(*together, strict=True)
        together = [(sum(panels, ()), min(lows), max(highs))]
    for panels, low, high in alone + together:
        margin = 0.05 * (high - low) or 1
        for panel in panels:
            panel.set_ylim(low - margin, high + margin)
            panel.axhline(0, color="black", linewidth=0.8)
    for panel in (panel for panels, _, _ in alone for panel in panels if len(alone + together) > 1):
        panel.text(0.02, 0.97, "own scale", transform=panel.transAxes, va="top", fontsize=drawing.SMALL, color="0.4")


def relative_difference(cell, control):
    """(tokens, (n,); validation loss / the control's − 1, (seeds, n)) where both were evaluated after as many tokens.

    Only the seeds that both have.
    """
    seeds = [seed for seed in cell.runs if seed in control.runs]
    if not seeds:
        return np.array([]), np.array([])
    both = (cell, control)
    (a_steps, a), (b_steps, b) = (each.curve("eval", "val_loss", seeds) for each in both)
    a_tokens, b_tokens = (
        steps * each.example.config["tokens_per_step"] for steps, each in zip((a_steps, b_steps), both, strict=True)
    )
    common = np.intersect1d(a_tokens, b_tokens)
    return common, a[:, np.isin(a_tokens, common)] / b[:, np.isin(b_tokens, common)] - 1


def heat_maps(results, path):
    """The mean loss at each point of a grid of two fields, one panel per arm, on one colour scale; best points framed.

    False unless the grid has exactly two fields with several values.
    """
    fields = [name for name, values in results.grid.items() if len(values) > 1]
    if len(fields) != 2:
        return False
    rows, columns = (drawing.in_order(results.grid[name]) for name in fields)
    means = {arm: np.full((len(rows), len(columns)), math.nan) for arm in results.arms}
    places = [(c, rows.index(c.point[fields[0]]), columns.index(c.point[fields[1]])) for c in results.cells]
    for cell, i, j in places:
        means[cell.arm][i, j] = np.mean(list(cell.losses.values()))
    losses = np.array([means[cell.arm][i, j] for cell, i, j in places])
    # Very high losses must not hide the differences between the others.
    low, cut = losses.min(), losses.min() + drawing.SPREAD * (np.median(losses) - losses.min())
    high = min(losses.max(), cut) if cut > low else losses.max()
    across = min(len(means), 3 if len(columns) < 5 else 2)
    down = math.ceil(len(means) / across)
    figure = drawing.new_figure(1.5 + across * (0.8 + 0.62 * len(columns)), down * (1.1 + 0.42 * len(rows)))
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for panel, arm in zip(panels.flat, means, strict=False):
        look = dict(cmap="viridis_r", vmin=low, vmax=high, aspect="auto", origin="lower")
        image = panel.imshow(means[arm], **look)
        panel.set_title(drawing.label(arm), fontsize=11)
        panel.set_xticks(range(len(columns)), map(value_text, columns))
        panel.set_yticks(range(len(rows)), map(value_text, rows))
        panel.set_xlabel(fields[1])
        panel.set_ylabel(fields[0])
    for cell, i, j in places:
        panel, loss = panels.flat[list(means).index(cell.arm)], means[cell.arm][i, j]
        is_best = cell in results.best
        colour = "white" if loss - low > 0.5 * (high - low) else "black"
        weight = "bold" if is_best else "normal"
        panel.text(j, i, f"{loss:.3f}", ha="center", va="center", fontsize=8.5, color=colour, fontweight=weight)
        if is_best:
            corners = [j - 0.46, j + 0.46, j + 0.46, j - 0.46], [i - 0.46, i - 0.46, i + 0.46, i + 0.46]
            panel.fill(*corners, fill=False, edgecolor=drawing.COLOURS[1], linewidth=2.5)
    for panel in panels.flat[len(means) :]:
        panel.remove()
    figure.colorbar(image, ax=panels, label=LOSS, extend="max" if high < losses.max() else "neither")
    for panel in panels.flat[: len(means)]:
        panel.label_outer()
    drawing.save(figure, path)
    return True


def lines(results, path):
    """The loss against the one field of the grid, one line per arm, with the paired difference from control below.

    Where the field is tuned, the best point of an arm is filled. False unless the grid has exactly one field with
    several values.
    """
    fields = [name for name, values in results.grid.items() if len(values) > 1]
    if len(fields) != 1:
        return False
    (name,) = fields
    values = drawing.in_order(results.grid[name])
    places, is_log = drawing.places(values)
    pairs, style = results.point_pairs, drawing.styles(results.arms)
    figure = drawing.new_figure(drawing.WIDTH, 6.2 if pairs else 4.5)
    ratios = [1.7, 1] if pairs else [1]
    panels = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)
    upper, lower = panels[0, 0], panels[-1, 0]

    def draw(panel, arm, means, text):  # means: value of the field -> Mean; returns the spots for drawing.fit
        beside = drawing.beside(places, is_log, results.arms.index(arm), len(results.arms))
        known = {value: x for value, x in zip(values, beside, strict=True) if value in means}
        look = dict(style[arm], markerfacecolor="white")
        drawing.points(panel, list(known.values()), [means[value] for value in known], label=drawing.label(arm), **look)
        for cell in results.best if panel is upper and results.tuned_fields else ():
            if cell.arm == arm:
                best = cell.point[name]
                panel.plot(known[best], means[best].mean, **dict(style[arm], markersize=8, zorder=5))
        return [(x, means[value], style[arm]["color"], text(means[value].mean)) for value, x in known.items()]

    losses, differences = [], []
    for arm in results.arms:
        means = {c.point[name]: comparison.summarise(c.losses.values()) for c in results.cells if c.arm == arm}
        losses += draw(upper, arm, means, "{:.2f}".format)
        found = {a.point[name]: comparison.difference(a.losses, b.losses) for a, b in pairs if a.arm == arm}
        if found := {value: difference for value, difference in found.items() if difference.n}:
            differences += draw(lower, arm, found, lambda value: f"{value:+.2f}".replace("-", "−"))
    if is_log:
        drawing.log_axis(upper.xaxis)
    lower.set_xticks(places, map(value_text, values))
    lower.set_xlabel(name)
    least = FAR * min(mean.mean for _, mean, *_ in losses)
    upper.set_ylim(drawing.fit(upper, losses, least))
    upper.set_ylabel(LOSS)
    upper.legend(frameon=False, fontsize=9, ncols=2 if len(results.arms) > 6 else 1)
    if pairs:
        if differences:
            lower.set_ylim(drawing.fit(lower, differences, least, around_zero=True))
        lower.axhline(0, color="black", linewidth=0.8)
        lower.set_ylabel("difference from control\nat the same value (nats per token)", fontsize=9)
    drawing.save(figure, path)
    return True


def cost(results, training_flops, path):
    """The loss of each arm at its best point against the parameters of attention and MLP, and against training FLOPs.

    training_flops: run folder -> floating-point operations of the training. The sizes of an arm are connected by its
    line, an arm and its control by a thin one. A cost that is the same for all arms, or for all sizes of an arm, gets
    no panel. Only arms with the objective of the first are drawn. False for fewer than three points, and where all
    costs are the same.
    """
    best = [cell for cell in results.best if are_comparable(cell, results.best[0])]
    power = 3 * int(math.log10(max(1, *(training_flops[cell.example.folder] for cell in best))) // 3)
    costs = {
        "attention + MLP parameters (millions)": lambda cell: cell.example.facts["parameters"]["attn_mlp"] / 1e6,
        f"training FLOPs ({drawing.power_of_ten(power)})": lambda cell: training_flops[cell.example.folder] / 10**power,
    }
    apart = best if not results.size_fields else [cell for cell in best if cell.arm == best[0].arm]
    costs = {label: of for label, of in costs.items() if len(set(map(of, apart))) > 1}
    if not costs or len(best) < 3:
        return False
    arms = list(dict.fromkeys(cell.arm for cell in best))
    pairs = [pair for pair in results.best_pairs if all(cell in best for cell in pair)]
    named = len(arms) > 6  # too many for a legend: then each pair has one colour, and its name beside its points
    names = _pair_names(arms, pairs)
    style = drawing.styles(dict.fromkeys(names.values()) if named else arms)
    style = {arm: dict(style[names[arm] if named else arm]) for arm in arms}
    if named:
        for cell, _ in pairs:
            style[cell.arm]["markerfacecolor"] = "white"
    figure = drawing.new_figure(drawing.WIDTH, 5.4 if named else 4.6)
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    means = {cell: comparison.summarise(cell.losses.values()) for cell in best}
    limits = []
    for panel, (label, of) in zip(panels, costs.items(), strict=True):
        places = sorted(set(map(of, best)))
        for arm in arms:
            own = sorted((cell for cell in best if cell.arm == arm), key=of)
            look = dict(style[arm], label=drawing.label(arm)) | ({} if results.size_fields else {"linestyle": "none"})
            drawing.points(panel, list(map(of, own)), [means[cell] for cell in own], **look)
        for pair in pairs:
            panel.plot([of(c) for c in pair], [means[c].mean for c in pair], color="0.6", linewidth=0.8, zorder=1)
        if places[-1] > 3 * places[0]:
            drawing.log_axis(panel.xaxis)
            if results.size_fields:
                ticks = drawing.apart(map(of, apart))
                panel.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
        panel.set_xlabel(label)
        spots = []
        for cell in best:
            mean = means[cell]
            text = f"{cell.arm} {mean.mean:.2f}" if named else f"{mean.mean:.2f}"
            spots.append((of(cell), mean, style[cell.arm]["color"], text))
        limits.append(drawing.fit(panel, spots, FAR * min(mean.mean for mean in means.values())))
    low, high = min(low for low, _ in limits), max(high for _, high in limits)
    panels[0].set_ylim(low, high)
    panels[0].set_ylabel(LOSS)
    handles, labels = panels[0].get_legend_handles_labels()
    if named:
        look = dict(color="0.4", marker="o", linestyle="none")
        handles = [panels[0].plot([], [], markerfacecolor=face, **look)[0] for face in ("0.4", "white")]
        labels = ["control", "compared with it"]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False, fontsize=9)
    for panel, of in zip(panels, costs.values(), strict=True) if named else ():
        groups = {}
        for cell in best:
            if means[cell].mean < high:
                spot = of(cell), means[cell].mean
                groups.setdefault((names[cell.arm], style[cell.arm]["color"]), []).append(spot)
        drawing.name_groups(panel, [(name, group, colour) for (name, colour), group in groups.items()])
    drawing.save(figure, path)
    return True


def _pair_names(arms, pairs):
    """arm -> the name of its pair: what both names begin with (rope for rope-baseline and rope-reduced), or both names.

    A control of several arms keeps its own name.
    """
    names, compared = {arm: arm for arm in arms}, {}
    for cell, control in pairs:
        compared.setdefault(control.arm, {})[cell.arm] = None
        same = os.path.commonprefix([cell.arm, control.arm])  # noqa: RUF071 (of names, not of paths)
        if words := re.match(r"(.+)[-_.+]", same):
            names[cell.arm] = words[1]
    counts = Counter(names.values())
    names = {arm: name if counts[name] == 1 else arm for arm, name in names.items()}
    for control, (arm, *others) in compared.items():
        if not others:
            names[arm] = names[control] = f"{control} / {arm}" if names[arm] == arm else names[arm]
    return names


def diagnostics(cell, control, path):
    """Attention diagnostics of each layer against training tokens, the control left, the arm right; means over seeds.

    False unless both were trained with --diagnostics.
    """
    import matplotlib

    pair = (control, cell)
    rows = {}  # metric -> for each of the two (steps, (n,); values, (n, layers))
    for name in DIAGNOSTICS:
        found = [c.curve("diagnostics", name) for c in pair]
        if any(np.isfinite(values).any() for _, values in found):
            rows[name] = [(steps, values.mean(axis=0)) for steps, values in found]
    if not all(any(np.isfinite(row[side][1]).any() for row in rows.values()) for side in (0, 1)) or not rows:
        return False
    figure = drawing.new_figure(drawing.WIDTH, 0.9 + 1.35 * len(rows))
    panels = figure.subplots(len(rows), 2, sharex=True, sharey="row", squeeze=False)
    layers = max(c.example.config["n_layer"] for c in pair)
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, layers))
    for row, (name, found) in zip(panels, rows.items(), strict=True):
        for panel, c, (steps, values) in zip(row, pair, found, strict=True):
            if not np.isfinite(values).any():
                text = "identity" if name in ("W_Q_norm", "W_K_norm") else "not recorded"
                panel.text(0.5, 0.5, text, ha="center", transform=panel.transAxes, color="0.4")
                continue
            for layer, colour in zip(values.T, colours, strict=False):
                panel.plot(steps * c.example.config["tokens_per_step"] / 1e6, layer, color=colour, linewidth=1.4)
        known = np.concatenate([values[np.isfinite(values)] for _, values in found])
        if known.min() > 0 and known.max() > 20 * known.min():
            drawing.log_axis(row[0].yaxis)
        row[0].set_ylabel(DIAGNOSTICS[name], fontsize=8.5)
    for panel, c in zip(panels[0], pair, strict=True):
        panel.set_title(drawing.label(c.label), fontsize=10.5)
    for panel in panels[-1]:
        panel.set_xlabel("training tokens (millions)")
    handles = [panels[0, 0].plot([], [], color=colour, label=f"{i}")[0] for i, colour in enumerate(colours)]
    figure.legend(handles=handles, title="layer", loc="outside right upper", frameon=False)
    drawing.save(figure, path)
    return True
