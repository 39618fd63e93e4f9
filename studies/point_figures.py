"""The figures of a report about points, one for each arm or point of a grid: differences, grids, costs.

Each function writes one PNG and returns True, or returns False where it does not apply. Bars are 95 % t-intervals over
seeds; studies/drawing.py has what the figures share.
"""

import math
import os
import re
from collections import Counter

import numpy as np

from studies import comparison, drawing, verdicts
from studies.arms import are_comparable
from studies.texts import signed, value_text

MANY = 6  # arms: bars of more would hide each other
FAR = 0.1  # of the best loss: losses that are no further from it than this are always in view
LOSS = "validation loss (nats per token)"
DIFFERENCE = "difference in validation loss (nats per token)"


def differences(results, comparisons, path):
    """The difference of each arm from its control at their best points, the best arm on top, with its interval.

    A filled marker is a significant difference; a grey band is the margin within which arms count as equal.
    comparisons: those of results.best_pairs. False for fewer than three arms, and where sizes differ.
    """
    found = [
        (result, cell, control)
        for (cell, control), result in zip(results.best_pairs, comparisons, strict=True)
        if result.difference.n
    ]
    if len(found) < 3 or results.size_fields:
        return False
    found.sort(key=lambda item: -item[0].difference.mean)
    called = [verdicts.names(results, pair) for _, *pair in found]
    controls = dict.fromkeys(control for _, control in called)
    means = np.array([result.difference.mean for result, *_ in found])
    half_widths = [result.difference.half_width or 0 for result, *_ in found]
    far = drawing.far_off(abs(means), least=max(0.01, 6 * np.median(half_widths)))  # bars of a sixth are still seen
    figure = drawing.new_figure(drawing.WIDTH, 1.3 + 0.32 * len(found))
    panel = figure.subplots()
    ends = [0.0, *means[~far]]
    for y, ((result, *_), is_far) in enumerate(zip(found, far, strict=True)):
        d = result.difference
        if is_far:
            continue
        look = dict(color=drawing.COLOURS[1 if d.mean > 0 else 0] if result.is_significant else "0.25")
        bar = None if d.half_width is None else [[d.half_width]]
        face = look["color"] if result.is_significant else "white"
        panel.errorbar([d.mean], [y], xerr=bar, fmt="o", markersize=6, capsize=3, markerfacecolor=face, **look)
        reach = 3 * max(abs(means[~far]))  # an interval of two seeds may be ten times as wide
        ends += [] if d.low is None else [max(d.low, -reach), min(d.high, reach)]
    low, high = min(ends), max(ends)
    margin = 0.06 * (high - low) or 0.01
    panel.set_xlim(low - margin, high + margin)
    for y, ((result, *_), is_far) in enumerate(zip(found, far, strict=True)):
        if is_far:
            at_right = result.difference.mean > 0
            place, align = (0.99, "right") if at_right else (0.01, "left")
            arrow = f"{signed(result.difference.mean)} →" if at_right else f"← {signed(result.difference.mean)}"
            panel.text(place, y, arrow, ha=align, va="center", transform=panel.get_yaxis_transform(), fontsize=9)
    panel.axvline(0, color="black", linewidth=0.8, zorder=0)
    if margins := [result.equivalence.margin for result, *_ in found if result.equivalence]:
        panel.axvspan(-np.mean(margins), np.mean(margins), color="0.9", zorder=-1)
    panel.set_ylim(-0.6, len(found) - 0.4)
    texts = [own if len(controls) == 1 else f"{own} − {control}" for own, control in called]
    panel.set_yticks(range(len(found)), map(drawing.label, texts), fontsize=9)
    panel.set_xlabel(f"{DIFFERENCE}{f', arm − {drawing.label(*controls)}' if len(controls) == 1 else ''}", fontsize=9.5)
    shown = {
        "significant": any(result.is_significant for result, *_ in found),
        "not significant": any(not result.is_significant for result, *_ in found),
    }
    for name, is_shown in shown.items():
        look = dict(color="0.25", markerfacecolor="0.25" if name == "significant" else "white", linestyle="none")
        if is_shown:
            panel.plot([], [], marker="o", label=name, **look)
    if margins:
        panel.fill_between([], [], [], color="0.9", label=f"margin of equality, {100 * results.equal_within:g} %")
    figure.legend(loc="outside upper right", ncols=3, fontsize=9, frameon=False)
    drawing.save(figure, path)
    return True


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
        means[cell.arm][i, j] = np.mean(list(cell.choosing_losses.values()))
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
        is_best = cell in results.chosen
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

    is_many = len(results.arms) > MANY

    def draw(panel, arm, means, text):  # means: value of the field -> Mean; returns the spots for drawing.fit
        beside = places if is_many else drawing.beside(places, is_log, results.arms.index(arm), len(results.arms))
        known = {value: x for value, x in zip(values, beside, strict=True) if value in means}
        look = dict(style[arm], markerfacecolor="white")
        if is_many:
            means = {value: comparison.Mean(mean.n, mean.mean) for value, mean in means.items()}
        drawing.points(panel, list(known.values()), [means[v] for v in known], label=drawing.label(arm), **look)
        for cell in results.chosen if panel is upper and results.tuned_fields else ():
            if cell.arm == arm:
                best = cell.point[name]
                panel.plot(known[best], means[best].mean, **dict(style[arm], markersize=8, zorder=5))
        return [(x, means[value], style[arm]["color"], text(means[value].mean)) for value, x in known.items()]

    losses, differences = [], []
    for arm in results.arms:
        means = {c.point[name]: comparison.summarise(c.choosing_losses.values()) for c in results.cells if c.arm == arm}
        losses += draw(upper, arm, means, "{:.2f}".format)
        own = [pair for pair in pairs if pair[0].arm == arm]
        found = {a.point[name]: comparison.difference(a.choosing_losses, b.choosing_losses) for a, b in own}
        if found := {value: difference for value, difference in found.items() if difference.n}:
            differences += draw(lower, arm, found, lambda value: signed(value, 2))
    if is_log:
        drawing.log_axis(upper.xaxis)
    lower.set_xticks(places, map(value_text, values))
    lower.set_xlabel(name)
    least = FAR * min(mean.mean for _, mean, *_ in losses)
    upper.set_ylim(drawing.fit(upper, losses, least))
    upper.set_ylabel(LOSS)
    handles, labels = upper.get_legend_handles_labels()
    if results.tuned_fields:
        handles += upper.plot([], [], marker="o", color="0.4", linestyle="none", markersize=8)
        labels.append("filled: an arm's best point")
    if is_many:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8.5, frameon=False)
    else:
        upper.legend(handles, labels, frameon=False, fontsize=9)
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
    compared = best if not results.size_fields else [cell for cell in best if cell.arm == best[0].arm]
    costs = {label: of for label, of in costs.items() if len(set(map(of, compared))) > 1}
    if not costs or len(best) < 3:
        return False
    arms = list(dict.fromkeys(cell.arm for cell in best))
    pairs = [pair for pair in results.best_pairs if all(cell in best for cell in pair)]
    named = len(arms) > MANY  # too many for a legend: then each pair has one colour, and its name beside its points
    names = _pair_names(arms, pairs)
    style = drawing.styles(dict.fromkeys(names.values()) if named else arms)
    style = {arm: dict(style[names[arm] if named else arm]) for arm in arms}
    if named:
        for cell, _ in pairs:
            style[cell.arm]["markerfacecolor"] = "white"
    figure = drawing.new_figure(drawing.WIDTH, 5.4 if named else 4.6)
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    means = {cell: comparison.summarise(cell.losses.values()) for cell in best}
    if named:
        means = {cell: comparison.Mean(mean.n, mean.mean) for cell, mean in means.items()}
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
