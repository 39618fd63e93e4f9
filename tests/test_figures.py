import numpy as np
import pytest
import run_folders
from run_folders import REDUCED, write_study

from studies import arms, comparison, drawing, figures, point_figures, writing

PAIR = {"base": {}, "reduced": REDUCED}


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw with a function of figures.py; returns the matplotlib figure as it was saved."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    close = plt.close
    monkeypatch.setattr(plt, "close", lambda figure: None)

    def draw(function, *arguments):
        assert function(*arguments, tmp_path / "figure.png")
        return plt.gcf()

    yield draw
    close("all")


@pytest.fixture
def study(tmp_path):
    """Write a study and load it; arguments of run_folders.write_study."""
    return lambda *arguments, **options: arms.load([write_study(tmp_path / "study", *arguments, **options)])


def many_pairs(n):
    """Arms and controls of n pairs that differ only in beta1."""
    own, control = {}, {}
    for i in range(n):
        own[f"kind{i}-base"] = {"beta1": 0.5 + i / 100}
        own[f"kind{i}-reduced"] = own[f"kind{i}-base"] | REDUCED
        control[f"kind{i}-reduced"] = f"kind{i}-base"
    return own, control


def texts(panel):
    """The texts drawn into a panel, beside those of its axes."""
    return [text.get_text() for text in panel.texts]


def loss_flops(results):
    """What point_figures.cost needs: run folder -> training operations."""
    return {run.folder: writing.training_flops(run) for _, run in results.runs}


@pytest.mark.parametrize("shift", [0.05, -0.05])
def test_zero_is_in_view_where_all_differences_are_on_one_side(study, drawn, shift):
    results = study(PAIR, lambda arm, seed: 2 + shift * (arm == "reduced"), seeds=(1,))
    low, high = drawn(figures.curves, results).axes[1].get_ylim()
    assert low < 0 < high
    assert min(low, -high) == pytest.approx(-abs(shift), rel=0.1), "and no more than that"


def test_sizes_share_the_scale_of_their_differences(study, drawn):
    gap = {16: 0.4, 32: 0.1, 64: 0.02}
    results = study(PAIR, lambda arm, seed, n_embd: 2 + gap[n_embd] * (arm == "reduced"), {"n_embd": list(gap)})
    panels = drawn(figures.curves, results).axes
    assert [panel.get_title() for panel in panels[:3]] == ["n_embd 16", "n_embd 32", "n_embd 64"]
    assert len({panel.get_ylim() for panel in panels[3:]}) == 1
    assert panels[3].get_ylim()[1] > 0.4


def test_a_size_with_far_wider_intervals_does_not_flatten_the_others_and_its_last_one_is_shown_whole(study, drawn):
    def loss(arm, seed, n_embd):
        return 2 + 0.02 * (arm == "reduced") * (1 + 40 * (seed - 2) * (n_embd == 64) + seed / 10)

    panels = drawn(figures.curves, study(PAIR, loss, {"n_embd": [16, 32, 64]})).axes[3:]
    assert panels[0].get_ylim() == panels[1].get_ylim() != panels[2].get_ylim()
    assert [texts(panel) for panel in panels] == [[], [], ["own scale"]]
    band = panels[2].collections[0].get_paths()[0].vertices
    last = band[band[:, 0] == band[:, 0].max(), 1]
    low, high = panels[2].get_ylim()
    assert low < last.min() < -1 and 1 < last.max() < high


def test_a_last_interval_wider_than_any_difference_is_shown_whole(study, drawn):
    generator = np.random.default_rng(1)
    results = study(PAIR, lambda arm, seed: 2 + 0.01 * (arm == "reduced") + generator.normal(0, 0.03))
    figure = drawn(figures.curves, results)
    for panel in figure.axes:
        for band in (collection.get_paths()[0].vertices for collection in panel.collections):
            last = band[band[:, 0] == band[:, 0].max(), 1]
            assert panel.get_ylim()[0] < last.min() < last.max() < panel.get_ylim()[1]
    _, values = figures.difference(*results.best_pairs[0])
    mean, low, high = comparison.band(values)
    assert high[-1] > 3 * abs(mean).max() or low[-1] < -3 * abs(mean).max(), "the limits would cut it"


def test_differences_are_after_the_same_number_of_tokens(study):
    results = study({"base": {}, "half": dict(tokens_per_step=64, batch_size=4)}, lambda arm, seed: 2.0, seeds=(1,))
    tokens, values = figures.difference(*results.best_pairs[0])
    assert tokens.tolist() == [0, 20 * 128], "40 steps of 64 tokens, 20 steps of 128"
    assert values == pytest.approx(np.array([[0, 2 - 3]]))


def test_differences_of_another_order_keep_a_scale_of_their_own(study, drawn):
    own, control = many_pairs(5)
    shift = {"kind3-reduced": 2.0}
    results = study(own, lambda arm, seed: 2 + shift.get(arm, 0.02 * (arm in control)), seeds=(1,), control=control)
    panels = [panel for panel in drawn(figures.curves, results).axes if not panel.get_legend()]
    heights = {(i, *texts(panel)): panel.get_ylim()[1] for i, panel in enumerate(panels)}
    assert heights.pop((3, "own scale")) > 1.9
    assert len(heights) == 4 and len(set(heights.values())) == 1 and max(heights.values()) < 0.03


def test_a_run_of_two_evaluations_fills_its_panel(study, drawn, monkeypatch):
    monkeypatch.setattr(run_folders, "STEPS", (0, 40))
    upper = drawn(figures.curves, study(PAIR, lambda arm, seed: 2.0, seeds=(1,))).axes[0]
    assert upper.get_ylim()[1] > 4


def test_a_long_run_is_seen_from_its_first_quarter_on(study, drawn, monkeypatch):
    monkeypatch.setattr(run_folders, "STEPS", tuple(range(0, 41, 10)))
    low, high = drawn(figures.curves, study(PAIR, lambda arm, seed: 2.0, seeds=(1,))).axes[0].get_ylim()
    assert 3.5 <= high < 4, "the line goes from 4 down to 2"


def test_a_figure_of_many_pairs_is_legible_in_a_readme(study, drawn):
    from matplotlib.text import Text

    own, control = many_pairs(11)
    figure = drawn(figures.curves, study(own, lambda arm, seed: 2.0, seeds=(1,), control=control))
    width, height = figure.get_size_inches() * 150
    assert height < 1.5 * width
    shown = 900 / 96 / (width / 150)  # a README's 900 pixels, of which 96 are an inch
    sizes = [text.get_fontsize() for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    assert min(sizes) * shown >= 8
    assert len(figure.axes) == 22


def diverging(arm, seed, learning_rate):
    loss = {0.001: 2.21, 0.002: 2.2, 0.004: 2.22, 0.008: 5.5}[learning_rate]
    return loss + (arm == "reduced") * (0.9 if loss > 5 else 0.01) + seed / 1000


def test_one_loss_that_diverged_does_not_flatten_the_grid(study, drawn):
    results = study(PAIR, diverging, {"learning_rate": [0.001, 0.002, 0.004, 0.008]})
    upper, lower = drawn(point_figures.lines, results).axes
    assert upper.get_ylim()[1] < 2.4 and texts(upper) == ["5.50", "6.40"]
    assert lower.get_ylim()[1] < 0.1 and texts(lower) == ["+0.90"]
    assert "(nats per token)" in lower.get_ylabel()
    _check_apart(upper, upper.texts)


def _check_apart(panel, labels):
    boxes = [label.get_window_extent() for label in labels]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert panel.get_window_extent().contains(*box.p0) and panel.get_window_extent().contains(*box.p1)


def test_far_off_is_further_than_only_worse():
    assert drawing.far_off([0, 0.01, 0.02, 3.3]).tolist() == [False, False, False, True]
    assert not drawing.far_off([0, 0.1, 0.2, 0.5]).any()
    assert not drawing.far_off([0, 0.01, 0.02, 0.1], least=0.2).any()
    assert not drawing.far_off([0, 1, 5, 6, 7]).any()


def test_many_pairs_are_named_and_coloured_as_pairs_in_the_cost(study, drawn):
    own, control = many_pairs(8)

    def loss(arm, seed):
        return 2 + int(arm[4]) / 100 + 0.03 * ("reduced" in arm) + 3 * arm.startswith("kind7")

    results = study(own, loss, seeds=(1,), control=control)
    figure = drawn(point_figures.cost, results, loss_flops(results))
    for panel in figure.axes:
        assert panel.get_ylim()[1] < 3
        assert {f"kind{i}" for i in range(7)} | {"kind7-base 5.07", "kind7-reduced 5.10"} == set(texts(panel))
        _check_apart(panel, panel.texts)
        points = {container.get_label(): container.lines[0] for container in panel.containers}
        looks = {arm: (line.get_color(), line.get_marker(), line.get_markerfacecolor()) for arm, line in points.items()}
        for i in range(8):
            (colour, marker, face), other = looks[f"kind{i}-base"], looks[f"kind{i}-reduced"]
            assert other == (colour, marker, "white") and face == colour
        assert len({look for arm, look in looks.items() if "base" in arm}) == 8
        assert all(container.has_yerr is False for container in panel.containers), "one seed has no bars"


def test_pairs_are_named_by_what_they_share():
    def cell(arm, control):
        return arms.Cell(arm, {}, control)

    def names(controls):
        pairs = [(cell(arm, control), cell(control, control)) for arm, control in controls.items()]
        return point_figures._pair_names([*controls, *controls.values()], pairs)

    assert names({"rope-reduced": "rope-base"}) == {"rope-reduced": "rope", "rope-base": "rope"}
    assert names({"reduced": "base"}) == dict.fromkeys(("reduced", "base"), "base / reduced")
    assert names({"base_narrow": "base"}) == dict.fromkeys(("base_narrow", "base"), "base / base_narrow")
    several = {"x-a": "x-base", "x-b": "x-base"}
    assert names(several) == {"x-a": "x-a", "x-b": "x-b", "x-base": "x-base"}


def test_the_axis_of_costs_has_round_ticks(study, drawn):
    results = study(PAIR, lambda arm, seed, n_embd: 2 + 1 / n_embd, {"n_embd": [16, 32, 64]}, seeds=(1,))
    for panel in drawn(point_figures.cost, results, loss_flops(results)).axes:
        assert panel.get_xscale() == "log"
        low, high = panel.get_xlim()
        ticks = [tick for tick in panel.get_xticks() if low <= tick <= high]
        assert len(ticks) >= 2
        assert all(f"{tick:e}"[0] in "125" and float(f"{tick:.0e}") == pytest.approx(tick) for tick in ticks)


def test_legends_say_what_filled_markers_mean(study, drawn):
    def loss(arm, seed, learning_rate):
        return 2 + abs(learning_rate - 0.002) + seed / 100 + 0.1 * (arm == "reduced")

    results = study(PAIR | {"narrow": dict(n_embd=8)}, loss, {"learning_rate": [0.001, 0.002]})
    upper = drawn(point_figures.lines, results).axes[0]
    handles, labels = upper.get_legend().legend_handles, [text.get_text() for text in upper.get_legend().get_texts()]
    assert labels == [*results.arms, "filled: an arm's best point"]
    assert handles[-1].get_markerfacecolor() == "0.4"
    best = [line for line in upper.lines if line.get_markersize() == 8 and len(line.get_xdata())]
    assert [line.get_xdata()[0] > 0.0015 for line in best] == [True] * 3


def test_differences_are_in_order_and_filled_where_they_are_significant(study, drawn):
    generator = np.random.default_rng(4)
    shift = {"base": 0, "worse": 0.2, "alike": 0.001, "better": -0.1, "awful": 3.0}
    fields = {arm: {"beta1": 0.5 + i / 100} for i, arm in enumerate(shift)}
    results = study(fields, lambda arm, seed: 2 + shift[arm] + generator.normal(0, 0.01))
    comparisons = arms.compare_cells(results.best_pairs, equal_within=0.02)
    results.equal_within = 0.02
    figure = drawn(lambda results, path: point_figures.differences(results, comparisons, path), results)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["significant", "not significant", "margin of equality, 2 %"]
    (panel,) = figure.axes
    names = [label.get_text() for label in panel.get_yticklabels()]
    assert names == ["awful", "worse", "alike", "better"], "from below"
    points = [line for line in panel.lines if line.get_marker() == "o" and len(line.get_xdata())]
    filled = {line.get_ydata()[0]: line.get_markerfacecolor() != "white" for line in points}
    assert filled == {1: True, 2: False, 3: True}
    assert texts(panel) == [f"{comparisons[-1].difference.mean:+.4f} →"], "far off"
    low, high = panel.get_xlim()
    assert low < -0.1 and 0.2 < high < 1
    band = next(patch for patch in panel.patches)
    assert band.get_width() == pytest.approx(2 * 0.02 * 2, rel=0.01)


def test_differences_of_a_few_bars_are_in_view_with_them(study, drawn):
    generator = np.random.default_rng(4)
    shift = {"base": 0, "alike": 0.001, "near": -0.002, "worse": 0.05}
    fields = {arm: {"beta1": 0.5 + i / 100} for i, arm in enumerate(shift)}
    results = study(fields, lambda arm, seed: 2 + shift[arm] + generator.normal(0, 0.005))
    comparisons = arms.compare_cells(results.best_pairs)
    figure = drawn(lambda results, path: point_figures.differences(results, comparisons, path), results)
    (panel,) = figure.axes
    assert texts(panel) == []
    assert panel.get_xlim()[1] > max(result.difference.high for result in comparisons) > 0.05


def test_zero_has_a_place_on_a_logarithmic_axis():
    assert drawing.places([0, 0.01, 0.02, 0.1]) == ([0.005, 0.01, 0.02, 0.1], True)
    assert drawing.places([1, 2, 4]) == ([1, 2, 4], False)
    assert drawing.places(["gelu", "relu"]) == ([0, 1], False)


def test_a_far_value_that_a_wide_bar_keeps_in_view_gets_no_arrow(tmp_path):
    figure = drawing.new_figure(4, 3)
    panel = figure.subplots()
    wide = comparison.Mean(2, 2.2, 0.5, -2.8, 7.2, 0.5)
    means = [wide, *(comparison.Mean(1, loss) for loss in (2.21, 2.22, 2.9))]
    low, high = drawing.fit(panel, [(i, mean, "black", "text") for i, mean in enumerate(means)], least=0.22)
    assert low < -2.8 and high > 7.2
    assert texts(panel) == []
    drawing.save(figure, tmp_path / "figure.png")
