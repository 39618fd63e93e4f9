"""The sentences that a report begins with: what was found in plain words, the numbers after it, then the warnings."""

from studies import comparison, delay, options
from studies.arms import compare_cells
from studies.interactions import interactions
from studies.runs import is_number, named
from studies.texts import listed, p_phrase, point_text, signed, value_text

MOST = 5  # verdicts that a report begins with; where there are more, one sentence counts them


def names(results, pair, is_best=True):
    """What the (cell, control) of a pair are called, as texts: by arm and size, and where both have one size by arm.

    is_best: whether they are at the best point of each, which best_points says; else their points are named, too.
    """
    points = [results.size(cell) if is_best else cell.point for cell in pair]
    first = f"{pair[0].arm} ({point_text(points[0])})" if points[0] else pair[0].arm
    return first, pair[1].arm if points[0] == points[1] else f"{pair[1].arm} ({point_text(points[1])})"


def amount(difference):
    """A difference in plain words: '0.0663 nats per token worse than'."""
    return f"{abs(difference):.4f} nats per token {'worse' if difference > 0 else 'better'} than"


def delay_text(found):
    """The delays of delay.delays in words: 'a delay of 26 ± 12 steps, 7 ± 3 % of the tokens'; '' for None."""
    if found is None or found[0].mean == 0:
        return ""

    def number(mean):
        form = "{:,.0f}" if abs(mean.mean) >= 10 else "{:.1f}"
        return form.format(abs(mean.mean)) + ("" if mean.half_width is None else f" ± {form.format(mean.half_width)}")

    steps, tokens = found
    name = "a delay" if steps.mean > 0 else "a lead"
    return f"{name} of {number(steps)} steps, {number(tokens)} % of the tokens"


def verdict(results, pair, result, family, where="", is_best=True):
    """A sentence for a (cell, control) pair: the verdict, then the numbers. where: what it begins with."""
    d, (own, control) = result.difference, names(results, pair, is_best)
    behind = delay_text(delay.delays(results, *pair))
    behind = behind and f", {behind}"
    if d.n == 0:
        return f"{where}{own} and {control} are not compared: they have no finished seed in common."
    if d.n == 1:
        found = f"{amount(d.mean)} {control} in it{behind}" if d.mean else f"as good as {control}"
        return f"Inconclusive: one seed. {where}{own} is {found}."
    if d.sd == 0:
        return f"{where}{own} against {control} is {result.conclusion} ({signed(d.mean)} nats per token)."
    p, interval = p_phrase(result.p_holm, family), f"95 % CI {signed(d.low)} to {signed(d.high)}"
    if result.is_equal:
        same = result.equivalence
        text = f"{where}{own} and {control} are equal within {result.within}: {signed(d.mean)} nats per token"
        text += f" (90 % CI {signed(same.low)} to {signed(same.high)}, within ± {same.margin:.4f}; {d.n} seeds){behind}"
        also = f"; {own} is {result.conclusion.partition(',')[0]} all the same, {p}" * result.is_significant
        return f"{text}{also}."
    if result.is_significant:
        numbers = f"by {abs(d.mean):.4f} nats per token ({interval}, {p}, {d.n} seeds){behind}"
        return f"{where}{own} is {result.conclusion} than {control}, {numbers}."
    text = f"{where}{own} is {amount(d.mean)} {control}{behind}; {result.conclusion} ({interval}, {p})"
    return f"{text}; {result.power_note}."


def verdicts(results, pairs, comparisons, where="", is_best=True):
    """A sentence for each (cell, control) in pairs; see verdict."""
    family = sum(result.p_holm is not None for result in comparisons)
    both = zip(pairs, comparisons, strict=True)
    return [verdict(results, pair, result, family, where, is_best) for pair, result in both]


def count(results, pairs, comparisons, where="", is_best=True):
    """One sentence that counts the verdicts of many pairs and names those that are clear."""
    groups, called = {}, [names(results, pair, is_best) for pair in pairs]
    controls = {control for _, control in called}
    for (name, control), result in zip(called, comparisons, strict=True):
        d = result.difference
        if len(controls) > 1:
            name += f" against {control}"
        if result.is_significant:
            kind = "better" if d.mean < 0 else "worse"
        else:
            kind = f"equal within {result.within}" if result.is_equal else "open"
        groups.setdefault(kind, []).append((d.mean, name, d.n))
    parts = []
    for kind, found in sorted(groups.items(), key=lambda item: item[0] == "open"):
        known = sorted((mean, name) for mean, name, _ in found if mean is not None)
        be = "is" if len(found) == 1 else "are"
        if kind == "open":
            seeds = {n for *_, n in found}
            text = f"{len(found)} cannot be called with {listed([str(n) for n in sorted(seeds)])} seeds"
            if known:
                text += f" (differences from {signed(known[0][0])} to {signed(known[-1][0])})"
        else:
            ends = known if kind == "better" else known[::-1]
            text = f"{len(found)} {be} {kind}: {listed([f'{name} ({signed(mean)})' for mean, name in ends])}"
        parts.append(text)
    reference = controls.pop() if len(controls) == 1 else "their controls"
    text = f"{where}of {len(pairs)} comparisons with {reference}, {'; '.join(parts)}."
    return f"{text} Differences are in nats per token."


def shortly(results, pairs, comparisons, where="", is_best=True):
    """The verdicts of pairs, or where there are more than MOST of them a sentence that counts them."""
    say = verdicts if len(pairs) <= MOST else count
    found = say(results, pairs, comparisons, where, is_best)
    found = [found] if isinstance(found, str) else found
    return [text[0].upper() + text[1:] if where else text for text in found]


def where_best(results):
    """What a verdict about best points begins with: "At each arm's best learning rate, "."""
    if not results.tuned_fields:
        return ""
    names = results.tuned_fields
    words = {"learning_rate": "learning rate", "weight_decay": "weight decay"}
    return f"At each arm's best {words.get(names[0], names[0]) if len(names) == 1 else 'point of the grid'}, "


def best_points(results):
    """The best point of each arm, and by which losses it was chosen, as a sentence."""
    groups = {}
    for cell in results.best:
        size = point_text(results.size(cell))
        point = point_text({name: cell.point[name] for name in results.tuned_fields})
        groups.setdefault(point, []).append(f"{cell.arm} ({size})" if size else cell.arm)
    tried = sorted({len(results.candidates(cell)) for cell in results.best})
    if results.tuning_seeds:
        seeds = listed([str(seed) for seed in results.tuning_seeds])
        how = f"by the seeds {seeds}, which are not among those that are reported"
    else:
        how = "by these same losses"
    best = "; ".join(f"{point} for {listed(arms)}" for point, arms in groups.items())
    return f"Best of {' or '.join(map(str, tried))} points, chosen {how}: {best}."


def headlines(results, comparisons):
    """The sentences that the report begins with: verdicts for best points and default settings, trends, warnings.

    comparisons: those of results.best_pairs.
    """
    pairs = results.best_pairs
    found = shortly(results, pairs, comparisons, where_best(results)) if pairs else []
    if results.tuned_fields:
        found.append(best_points(results))
    if (own := results.configured_pairs) and own != pairs:
        where = "With each arm's default settings, "
        found += shortly(results, own, compare_cells(own, results.equal_within), where, is_best=False)
    compared = [cell for cell, _ in pairs]
    for cell in results.best:
        if cell.arm != cell.control and cell not in compared:
            known = any(other.arm == cell.control for other in results.best)
            why = "has a different objective or no finished run of that size" if known else "has no finished run"
            found.append(f"{cell.label} is not compared: its control {cell.control} {why}.")
    return found + trends(results) + interactions(results, MOST) + unfair(results) + changed_options(results)


def unfair(results):
    """A warning for each way in which arms and their controls do not match, beside what the study is about."""
    found = {}
    for cell, control in results.best_pairs:
        if phrases := options.mismatches(cell, control, results.about, cell.point):
            own, reference = names(results, (cell, control))
            found.setdefault((", ".join(phrases), reference), []).append(own)
    return [f"Warning: {listed(cells)} and {control} do not match: {text}." for (text, control), cells in found.items()]


def changed_options(results, most=12):
    """A warning for each run whose options changed on the way; where there are more than `most`, one with their number.

    The tables describe such a run by its last options, with which only a part of it was made.
    """
    changed = [run for _, run in results.runs if run.changes]
    if len(changed) > most:
        return [f"Warning: options changed on the way in {len(changed)} runs; runs.csv has them (changed_options)."]
    texts = [f"{named(run.folder, results.base)}: {run.changes_text}" for run in changed]
    return [f"Warning: options changed on the way in {text}." for text in texts]


def trends(results):
    """A sentence for each arm and size field: how the difference between best points changes with the size."""
    found = []  # (the difference in words, size field, Mean of the slopes, sizes that count, sizes that do not)
    for name in results.size_fields:
        groups = {}  # (arm, its control, the other sizes as text) -> size -> seed -> difference
        for cell, control in results.best_pairs:
            size = results.size(cell)
            others = point_text({other: value for other, value in size.items() if other != name})
            groups.setdefault((cell.arm, control.arm, others), {})[size[name]] = {
                seed: loss - control.losses[seed] for seed, loss in cell.losses.items() if seed in control.losses
            }
        for (arm, control, others), by_size in groups.items():
            if not all(is_number(size) and size > 0 for size in by_size):
                continue
            known = {size: differences for size, differences in by_size.items() if len(differences) > 1}
            if len(known) < 2 or len(set.intersection(*map(set, known.values()))) < 2:
                continue
            which = f"{arm} − {control} (with {others})" if others else f"{arm} − {control}"
            left_out = [size for size in by_size if size not in known]
            found.append((which, name, comparison.slope(known), list(known), left_out))
    adjusted = comparison.holm([change.p for _, _, change, _, _ in found])
    sentences = []
    for (which, name, change, sizes, left_out), p in zip(found, adjusted, strict=True):
        if p < 1 - comparison.CONFIDENCE and change.sd > 0:
            text = f"The difference {which} {'rises' if change.mean > 0 else 'falls'} with {name}"
        else:
            text = f"The difference {which} shows no significant trend with {name}"
        text += (
            f" ({signed(change.mean)} per doubling, 95 % CI {signed(change.low)} to {signed(change.high)}, "
            f"{p_phrase(p, len(found))}, {change.n} seeds, {len(sizes)} sizes"
        )
        if left_out:
            text += f"; {name} {', '.join(map(value_text, left_out))} left out, with too few seeds"
        if results.tuned_fields and not results.tuning_seeds:
            text += "; between points chosen by these same losses"
        sentences.append(text + ").")
    return sentences
