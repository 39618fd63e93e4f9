"""The figures of a report about the course of training: losses and differences, and what attention does.

Each function writes one PNG and returns True, or returns False where it does not apply. Bands are 95 % t-intervals over
seeds; studies/drawing.py has what the figures share.
"""

import math

import numpy as np

from studies import drawing
from studies.texts import point_text

MANY = 6  # arms in a panel: with more of them training losses and intervals would hide the lines
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
    """Loss against training tokens of each arm at its best point, with the difference from control below.

    A pair of panels for each control and size: above, validation loss (thick) and training loss (thin); below, the
    validation loss of an arm minus its control's, paired by seed; see _scale_differences. Of more than MANY arms only
    the means of the validation losses are drawn. False where no arm was evaluated more than once.
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
        tuned = results.tuned_fields if len(cells) <= MANY else ()  # else the legend has no room for the points
        labels = {cell.arm: point_text({name: cell.point[name] for name in tuned}) for cell in cells}
        labels = {arm: drawing.label(f"{arm} ({text})" if text else arm) for arm, text in labels.items()}
        style = drawing.styles([cell.arm for cell in cells])
        _losses(upper, cells, labels, style, unit)
        if len(groups) > 1 and results.size_fields:
            upper.set_title(point_text(results.size(cells[0])), fontsize=10)
        if i % columns == 0:
            upper.set_ylabel("loss (nats per token)" if columns == 1 else "loss")
        if pairs:
            lower[0].sharex(upper)
            upper.tick_params(labelbottom=False)
            found = lower[0], *_differences(lower[0], pairs, style, unit)
            compared.setdefault(pairs[0][1].arm, []).append(found)
            if i % columns == 0:
                more = f"\nfrom {drawing.label(pairs[0][1].arm)}\n(nats per token)" if columns == 1 else ""
                lower[0].set_ylabel(f"difference{more}", fontsize=8.5)
        elif lower:
            lower[0].remove()
        for panel in panels[i] if columns == 3 else ():
            panel.tick_params(labelsize=drawing.SMALL)
    for panel in panels[len(groups) :].flat:
        panel.remove()
    _scale_differences(compared)
    figure.align_ylabels()
    if columns == 1:
        panels[0, -1].set_xlabel(f"training tokens ({unit_name})", fontsize=10)
    else:
        figure.supxlabel(f"training tokens ({unit_name})", fontsize=10)
    below = "; below, the difference from control" if compared and columns > 1 else ""
    most = max(map(len, groups.values()))
    lines = "Validation loss" if most > MANY else "Validation loss (thick) and training loss (thin)"
    figure.suptitle(f"{lines}{below}{' (nats per token)' if columns > 1 else ''}", fontsize=11)
    if most > MANY and len(groups) == 1:
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8.5)
    drawing.save(figure, path)
    return True


def _losses(panel, cells, labels, style, unit):
    """Draw the training and validation losses of cells. unit: the number of tokens in a unit of the x axis."""
    lowest, highest = math.inf, -math.inf
    for cell in cells:
        look = {name: style[cell.arm][name] for name in ("color", "linestyle")}
        tokens_per_step = cell.example.config["tokens_per_step"] / unit
        steps, losses = drawing.thinned(*cell.curve("train", "loss"))
        if len(steps) and len(cells) <= MANY:
            faint = dict(linewidth=0.8, alpha=0.5 if len(cells) <= 4 else 0.25, zorder=1)
            panel.plot(steps * tokens_per_step, losses.mean(axis=0), **faint, **look)
            lowest = min(lowest, losses.mean(axis=0).min())
        steps, losses = cell.curve("eval", "val_loss")
        x = steps * tokens_per_step
        look |= dict(linewidth=2, label=labels[cell.arm])
        mean, low, high = drawing.line_with_band(panel, x, losses, has_band=len(cells) <= MANY, **look)
        # The first losses would flatten the later ones, so they may be cut off, up to a quarter of the training.
        begin = np.interp(x[-1] / 4 if len(x) > 3 else 0, x, mean)
        lowest = min(lowest, mean.min(), low[-1])
        highest = max(highest, mean[np.searchsorted(x, x[-1] / 10) :].max(), high[-1], begin)
    margin = 0.05 * (highest - lowest) or 0.1
    panel.set_ylim(lowest - margin, highest + margin)
    if len(cells) > MANY and panel.get_gridspec().ncols == 1:
        return
    small = panel.get_gridspec().ncols == 3
    look = dict(fontsize=drawing.SMALL, handlelength=1.2, labelspacing=0.3) if small else dict(fontsize=9)
    panel.legend(loc="best" if small else "upper right", edgecolor="none", ncols=2 if len(cells) > 6 else 1, **look)


def _differences(panel, pairs, style, unit):
    """Draw differences in nats per token; returns (the largest |mean|, low, high), with low <= 0 <= high.

    All means and the last interval of each arm are between low and high; earlier intervals may be cut off.
    """
    low = high = furthest = 0.0
    ends = []
    for cell, control in pairs:
        look = {name: style[cell.arm][name] for name in ("color", "linestyle")}
        tokens, values = difference(cell, control)
        if len(tokens):
            has_band = len(pairs) <= MANY
            mean, least, most = drawing.line_with_band(panel, tokens / unit, values, has_band=has_band, **look)
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
        margin = 0.05 * (high - low) or 0.01
        for panel in panels:
            panel.set_ylim(low - margin, high + margin)
            panel.axhline(0, color="black", linewidth=0.8)
    for panel in (panel for panels, _, _ in alone for panel in panels if len(alone + together) > 1):
        panel.text(0.02, 0.97, "own scale", transform=panel.transAxes, va="top", fontsize=drawing.SMALL, color="0.4")


def difference(cell, control):
    """(tokens, (n,); validation loss − the control's, (seeds, n)) where both were evaluated after as many tokens.

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
    return common, a[:, np.isin(a_tokens, common)] - b[:, np.isin(b_tokens, common)]


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
