"""What figures share: matplotlib's set-up, colours, axes, error bars, marks for values off the scale, labels of points.

Bands and bars are 95 % t-intervals over seeds. The colours are those of Okabe and Ito and viridis, which colour-blind
readers can tell apart; line styles and markers change where colours repeat.
"""

import itertools
import math

import numpy as np

from engine.files import write_atomically
from studies import comparison
from studies.runs import is_number

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
LINES = ["-", "--", "-.", ":"]
MARKERS = "os^D"
WIDTH = 8  # inches, at 150 dots per inch: of a figure with one column of panels
WIDEST = 9  # of one with several; a README shows at most 900 pixels, 9.4 inches, so that type keeps its size
SMALL = 8  # points: the smallest type
SPREAD = 4  # times the median distance: values further off would flatten the others


def new_figure(width, height):
    """An empty matplotlib figure, width × height inches, with constrained layout; needs no display."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt.figure(figsize=(width, height), layout="constrained")


def save(figure, path):
    """Write a figure as PNG and close it. Its panels get a grid, and no spines above and on the right."""
    import matplotlib.pyplot as plt

    for panel in figure.axes:
        if not panel.images and panel.get_label() != "<colorbar>":
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))
    plt.close(figure)


def label(name, most=60):
    """A name as the label of a line or panel: at most so many characters, its middle left out where it is longer.

    It does not begin with an underscore, since matplotlib leaves such labels out of the legend.
    """
    if len(name) > most:
        name = f"{name[: most // 2]}…{name[len(name) - (most - 1) // 2 :]}"
    return f" {name}" if name.startswith("_") else name


def power_of_ten(exponent):
    """10¹² for 12, as text."""
    return "10" + str(exponent).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def log_axis(axis):
    """Make an axis logarithmic, with plain numbers at 1, 2 and 5 times the powers of ten."""
    from matplotlib import ticker

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(ticker.NullLocator())


def styles(names):
    """name -> dict of colour, line style and marker; up to 28 names have different ones."""
    turns = {name: divmod(i, len(COLOURS)) for i, name in enumerate(names)}
    return {
        name: dict(color=COLOURS[i], linestyle=LINES[turn % len(LINES)], marker=MARKERS[turn % len(MARKERS)])
        for name, (turn, i) in turns.items()
    }


def line_with_band(panel, x, values, has_band=True, **look):
    """Draw the mean of values, (seeds, len(x)), with its interval; (mean, low, high), which are equal without one."""
    mean, low, high = comparison.band(values)
    panel.plot(x, mean, **look)
    if low is None or not has_band:
        return mean, mean, mean
    panel.fill_between(x, low, high, color=look["color"], alpha=0.18, linewidth=0)
    return mean, low, high


def points(panel, x, means, **look):
    """Draw comparison.Means with their intervals; no bar for one seed."""
    bars = [math.nan if mean.half_width is None else mean.half_width for mean in means]
    look = dict(capsize=3, markersize=6) | look
    panel.errorbar(x, [mean.mean for mean in means], None if np.isnan(bars).all() else bars, **look)


def thinned(steps, values, most=100):
    """Steps and values averaged over neighbouring steps, in at most `most` groups: training losses are noisy.

    steps: (n,); values: (seeds, n).
    """
    size = max(1, math.ceil(len(steps) / most))
    groups = [slice(start, start + size) for start in range(0, len(steps), size)]
    if not groups:
        return steps, values
    means = np.stack([values[:, group].mean(axis=1) for group in groups], axis=1)
    return np.array([steps[group].mean() for group in groups]), means


def in_order(values):
    """The values of a field, numbers sorted and others in their order."""
    return sorted(values) if all(map(is_number, values)) else list(values)


def places(values):
    """(the place of each value on an axis, whether the axis is logarithmic); zero gets a place left of the others."""
    if not all(map(is_number, values)):
        return list(range(len(values))), False
    positive = [value for value in values if value > 0]
    if min(values) < 0 or len(positive) < 2 or max(positive) <= 4 * min(positive):
        return values, False
    return [positive[0] ** 2 / positive[1] if value == 0 else value for value in values], True


def beside(places, is_log, i, n):
    """places, moved a little for the i-th of n arms, so that their error bars do not overlap."""
    share = 0.012 * (i - (n - 1) / 2)
    if is_log:
        return [place * (places[-1] / places[0]) ** share for place in places]
    return [place + share * (places[-1] - places[0]) for place in places]


def far_off(distances, least=0.0):
    """A mask of the distances that would flatten the others: of losses from the best, or of differences from zero.

    least: distances up to this are never far off. All False where leaving them out would gain little room.
    """
    distances = np.asarray(distances, dtype=float)
    far = distances > max(SPREAD * np.median(distances), least)
    gains_room = far.any() and distances.max() > 1.5 * distances[~far].max()
    return far & gains_room


def fit(panel, spots, least, around_zero=False):
    """(low, high) limits of the y axis that show the spots; those far off get an arrow at the edge, with their text.

    spots: (x, comparison.Mean, colour, text) of each, already drawn; the error bars of those not far off are in view,
    too. least: see far_off. around_zero: they are differences, which may be far off on either side.
    """
    means = np.array([mean.mean for _, mean, *_ in spots])
    bars = np.array([mean.half_width or 0 for _, mean, *_ in spots])
    far = far_off(abs(means) if around_zero else means - means.min(), least)
    zero = [0.0] if around_zero else []
    low, high = min([*(means - bars)[~far], *zero]), max([*(means + bars)[~far], *zero])
    margin = 0.05 * (high - low) or 0.05
    low, high = low - margin, high + margin
    below, above = (
        [spot for spot, is_out in zip(spots, out, strict=True) if is_out] for out in (means < low, means > high)
    )
    at_bottom, at_top = _mark(panel, below, upward=False), _mark(panel, above, upward=True)
    height = (high - low) / (1 - at_bottom - at_top)
    return low - at_bottom * height, high + at_top * height


def _mark(panel, spots, upward):
    """Draw the arrows and texts of spots off the scale; returns the share of the panel's height that they take."""
    if not spots:
        return 0.0
    width, height = panel.get_window_extent().size / panel.figure.dpi * 72  # points
    edge, inward = (1, -1) if upward else (0, 1)
    panel.get_xlim()  # computes the limits, on which transData depends
    x_in_data = panel.get_xaxis_transform()  # y from 0 to 1
    ends = []  # of the last text in each row, so that texts do not overlap
    for x, _, colour, text in sorted(spots, key=lambda spot: spot[0]):
        share = panel.transAxes.inverted().transform(panel.transData.transform((x, 0.5)))[0]
        align, before = ("right", 1) if share > 0.85 else ("left", 0) if share < 0.15 else ("center", 0.5)
        long = 0.65 * SMALL * len(text) / width
        start = share - before * long
        row = next((row for row, end in enumerate(ends) if end < start), len(ends))
        ends[row : row + 1] = [start + long]
        look = dict(color=colour, transform=x_in_data, clip_on=False)
        panel.plot([x], [edge + inward * 4 / height], "^" if upward else "v", markersize=6, **look)
        place = (0, inward * (8 + 1.4 * SMALL * (row + 0.5)))
        box = dict(facecolor="white", edgecolor="none", alpha=0.8, pad=1)
        look = dict(color=colour, fontsize=SMALL, ha=align, va="center", bbox=box)
        panel.annotate(text, (x, edge), place, xycoords=x_in_data, textcoords="offset points", **look)
    return min(0.4, (10 + 1.4 * SMALL * len(ends)) / height)


def name_groups(panel, groups):
    """Write the name of each group of points beside one of them, where it covers neither points nor other names.

    groups: (name, [(x, y), …], colour) of each. The nearest free place is taken, with a line to the point if it is
    further away. Call this last, since places depend on the layout.
    """
    from matplotlib.transforms import Bbox

    panel.figure.draw_without_rendering()
    panel.set(xlim=panel.get_xlim(), ylim=panel.get_ylim())
    inside, point = panel.get_window_extent(), panel.figure.dpi / 72  # pixels

    def box(x, y, width, height):  # around (x, y)
        return Bbox.from_bounds(x - width / 2, y - height / 2, width, height)

    def is_free(place):
        return (
            inside.x0 < place.x0
            and place.x1 < inside.x1
            and inside.y0 < place.y0
            and place.y1 < inside.y1
            and not (any(place.overlaps(other) for other in taken))
        )

    groups = [(name, panel.transData.transform(spots), colour) for name, spots, colour in groups]
    taken = [box(*spot, 8 * point, 8 * point) for _, spots, _ in groups for spot in spots]
    for _, spots, _ in groups:  # the lines between them
        between = [a + (b - a) * k / 8 for a, b in itertools.pairwise(spots) for k in range(1, 8)]
        taken += [box(*spot, 2 * point, 2 * point) for spot in between]
    angles = [k * math.pi / 8 for k in (0, 8, 1, 15, 7, 9, 2, 14, 6, 10, 3, 13, 5, 11, 4, 12)]  # best first: beside
    for name, spots, colour in sorted(groups, key=lambda group: -group[1][:, 1].mean()):
        text = panel.text(0, 0, name, fontsize=SMALL)
        size = text.get_window_extent().size
        text.remove()
        places = []
        for distance, angle, spot in itertools.product((6, 16, 28, 42, 58, 76), angles, spots):
            shift = np.array([math.cos(angle), math.sin(angle)]) * (distance * point + size / 2)
            places.append((distance, spot, shift, box(*(spot + shift), *size)))
        distance, spot, shift, place = next((found for found in places if is_free(found[-1])), places[0])
        taken.append(place)
        line = dict(arrowstyle="-", color=colour, linewidth=0.6, shrinkA=0, shrinkB=4) if distance > 6 else None
        look = dict(ha="center", va="center", fontsize=SMALL, color=colour, arrowprops=line, in_layout=False)
        panel.annotate(
            name, panel.transData.inverted().transform(spot), shift / point, textcoords="offset points", **look
        )
