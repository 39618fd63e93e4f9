"""The tables and sentences of a report: what was trained, the losses, and the differences from control."""

from studies import comparison, page
from studies.arms import common_seeds, compare_cells, is_number, mismatches, point_text, value_text


def differences(pairs, comparisons):
    """A table of the Comparisons of (cell, control) pairs."""
    head = ["arm", "control", "difference", "95 % interval", "p", "p (Holm)", "seeds", "verdict"]
    rows = []
    for (cell, control), result in zip(pairs, comparisons, strict=True):
        d = result.difference
        difference = "–" if d.mean is None else signed(d.mean)
        interval = "–" if d.low is None else f"{signed(d.low)} to {signed(d.high)}"
        rows.append(
            [
                cell.label,
                at_its_point(control, cell),
                difference,
                interval,
                p_text(d.p),
                p_text(result.p_holm),
                f"{d.n}",
                result.verdict,
            ]
        )
    return page.Table(head, rows, words=("arm", "control", "verdict"))


def verdicts(pairs, comparisons):
    """A sentence for each (cell, control): the verdict, then the numbers, then a warning if they do not match."""
    sentences, family = [], sum(result.p_holm is not None for result in comparisons)
    for (cell, control), result in zip(pairs, comparisons, strict=True):
        d, reference = result.difference, at_its_point(control, cell)
        if result.is_significant:
            text = f"{cell.label} is {result.conclusion} than {reference}"
        elif d.sd:
            text = f"{cell.label} and {reference} are {result.conclusion}"
        else:
            text = f"{cell.label} against {reference} is {result.conclusion}"
        if d.mean is not None:
            numbers = f"{signed(d.mean)} nats per token"
            if d.sd:
                p = p_phrase(result.p_holm, family)
                numbers += f", 95 % interval {signed(d.low)} to {signed(d.high)}, {p}"
                numbers += f", {d.n} seeds" if result.is_significant else ""  # other conclusions have the number
            text += f" (difference {numbers})"
        if result.power_note:
            text += f"; {result.power_note}"
        if found := mismatches(cell, control):
            text += f". Warning: the runs of the two arms do not match: {', '.join(found)}"
        sentences.append(text + ".")
    return sentences


def headlines(results, comparisons):
    """The sentences that the report begins with: verdicts for default settings and best points, trends, warnings.

    comparisons: those of results.best_pairs.
    """
    pairs = results.configured_pairs
    sentences = [f"With each arm's default settings, {text}" for text in verdicts(pairs, compare_cells(pairs))]
    found = verdicts(results.best_pairs, comparisons)
    if results.tuned_fields:
        for i, pair in enumerate(results.best_pairs):
            ours, theirs = (len(results.candidates(cell)) for cell in pair)
            tried = ours if ours == theirs else f"{ours} and {theirs}"
            found[i] = f"At each arm's best grid point (of {tried}), chosen by these same losses, {found[i]}"
    compared = [cell for cell, _ in results.best_pairs]
    for cell in results.best:
        if cell.arm != cell.control and cell not in compared:
            known = any(other.arm == cell.control for other in results.best)
            why = "has a different objective or no finished run of that size" if known else "has no finished run"
            found.append(f"{cell.label} is not compared: its control {cell.control} {why}.")
    return sentences + found + trends(results) + changed_options(results)


def changed_options(results, most=12):
    """A warning for each run whose options changed on the way; where there are more than `most`, one with their number.

    The tables describe such a run by its last options, with which only a part of it was made.
    """
    changed = [run for _, run in results.runs if run.changes]
    if len(changed) > most:
        return [f"Warning: options changed on the way in {len(changed)} runs; runs.csv has them (changed_options)."]
    return [f"Warning: options changed on the way in {run.folder}: {run.changes_text}." for run in changed]


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
            f" ({signed(change.mean)} per doubling, 95 % interval {signed(change.low)} to {signed(change.high)}, "
            f"{p_phrase(p, len(found))}, {change.n} seeds, {len(sizes)} sizes"
        )
        if left_out:
            text += f"; {name} {', '.join(map(value_text, left_out))} left out, with too few seeds"
        if results.tuned_fields:
            text += "; between points chosen by these same losses"
        sentences.append(text + ").")
    return sentences


def reading_notes(pairs, comparisons):
    """How to read the differences: their definition, the noise over seeds, Holm's correction, the seeds needed."""
    notes = [
        "A difference is arm − control in final validation loss, in nats per token, paired by seed; below zero the arm "
        "is better. Intervals and p-values are Student's t over seeds, two-sided."
    ]
    controls = dict.fromkeys(control for _, control in pairs)
    spreads = [(control.label, comparison.summarise(control.losses.values())) for control in controls]
    spreads = [f"{spread.sd:.4f} for {label}" for label, spread in spreads if spread.sd is not None]
    if spreads:
        notes.append(f"Standard deviation over seeds of a control's losses (the noise floor): {', '.join(spreads)}.")
    paired = [
        f"{result.difference.sd:.4f} for {cell.label}"
        for (cell, _), result in zip(pairs, comparisons, strict=True)
        if result.difference.sd is not None
    ]
    if paired:
        notes.append(f"Standard deviation over seeds of the paired differences: {', '.join(paired)}.")
    if any(result.difference.n == 1 for result in comparisons):
        notes.append("One seed gives neither an interval nor a p-value: the difference may be due to chance.")
    family = sum(result.p_holm is not None for result in comparisons)
    if family > 1:
        notes.append(
            f"There are {family} comparisons. The verdicts use p (Holm), which keeps the probability of any false "
            "positive among them at 5 %; the intervals are not corrected."
        )
    if any(result.power_note for result in comparisons):
        level = f" divided by the {family} comparisons" if family > 1 else ""
        notes.append(
            f"The number of seeds needed is that with which a paired t-test at 5 %{level} detects a difference of "
            f"{comparison.DIFFERENCE:g} with probability {100 * comparison.POWER:.0f} %, given the standard deviation "
            "over seeds of these differences; in brackets, given the ends of the 95 % interval of that."
        )
    return notes


def tuning_notes(results):
    """Each arm's best point, whether it is at the edge of the grid, and the bias of choosing it by these losses."""
    notes = []
    for cell in results.best:
        points, candidates = results.points(cell), results.candidates(cell)
        text = f"{cell.arm} is best at {point_text(cell.point)}"
        missing = sum(not point.runs and not point.n_diverged for point in points)
        diverged = sum(point.n_diverged > 0 for point in points)
        if diverged:
            text += f"; excluded, since a run diverged: {diverged} of {len(points)} points"
        if missing:
            text += f"; provisional, since {missing} of {len(points)} points have no finished run"
        elif edge := results.at_the_edge(cell):
            text += (
                f". Warning: {' and '.join(edge)} {'is' if len(edge) == 1 else 'are'} at the edge of the grid there, "
                "so the optimum may lie outside: extend the grid"
            )
        if len(common := common_seeds(candidates)) < max(len(point.runs) for point in candidates):
            seeds = ", ".join(str(seed) for seed, _ in common)
            if common:
                text += f". Chosen by the seeds that all points have: {seeds}"
            else:
                text += ". Chosen by each point's mean over its own seeds, since no seed is at all points"
        notes.append(text + ".")
    notes.append(
        "Comparing each arm at its best point is fair, but the best points were chosen by the same losses that are "
        "compared: these are biased low, the more so the larger the grid, and the p-values ignore that. Repeat the "
        "best points with new seeds to confirm a difference."
    )
    for cell, control in results.best_pairs:
        losses, reference = results.leave_one_out_losses(cell), results.leave_one_out_losses(control)
        unbiased = comparison.difference(losses, reference)
        if unbiased.n > 1:
            size = results.size(cell)
            where = f" at {point_text(size)}" if size else ""
            notes.append(
                f"With the points for each seed chosen by the other seeds alone, {cell.arm} − {control.arm}{where} is "
                f"{with_interval(unbiased, signed)} ({unbiased.n} seeds)."
            )
    return notes


def at_its_point(control, cell):
    """A control's label, without the point where the cell has the same one."""
    return control.arm if control.point == cell.point else control.label


def every_point(results):
    """A table of the whole grid: loss and difference from control at the same point, with Holm's p over the table."""
    pairs = results.point_pairs
    found = {cell: result for (cell, _), result in zip(pairs, compare_cells(pairs), strict=True)}
    rows = []
    for cell in results.cells:
        result = found.get(cell)
        d = result.difference if result else comparison.Mean(0, None)
        loss = with_interval(comparison.summarise(cell.losses.values()))
        if results.tuned_fields and cell in results.best:
            loss += " (best)"
        rows.append(
            [
                cell.arm,
                *(value_text(cell.point[name]) for name in results.grid),
                f"{len(cell.runs)}",
                loss,
                "–" if d.mean is None else with_interval(d, signed),
                p_text(result.p_holm if result else None),
            ]
        )
    head = ["arm", *results.grid, "seeds", "validation loss (± 95 %)", "difference at this point (± 95 %)", "p (Holm)"]
    return page.Table(head, rows, words=("arm",))


def setting(results):
    """Sentences on the data, sizes and software of the runs, with a warning where the software was not the same."""

    def values(get):  # the different values that a function of a run has
        return list(dict.fromkeys(str(get(run)) for _, run in results.runs))

    first = results.cells[0].example  # the data of all runs is the same
    data = "{tokenizer}, fingerprint {fingerprint}".format(**first.facts["data"])
    sizes = values(
        lambda r: f"n_layer {r.config['n_layer']}, n_embd {r.config['n_embd']}, block_size {r.config['block_size']:,}"
    )
    steps = values(lambda r: f"{r.summary['steps']:,} steps of {r.config['tokens_per_step']:,} tokens")
    made = {
        "commit": values(lambda r: r.facts["git_commit"]),
        "torch": values(lambda r: r.facts["versions"]["torch"]),
        "device": values(lambda r: r.facts["device"]),
        "dtype": values(lambda r: r.precision),
    }
    sentences = [
        f"{len(results.runs)} finished runs on {first.config['dataset']} ({data}): {' or '.join(sizes)}; "
        f"{' or '.join(steps)}. Losses are in nats per token, over the whole validation split at the end of a run.",
        "Made with " + "; ".join(f"{name} {', '.join(found)}" for name, found in made.items()) + ".",
    ]
    mixed = [name for name, found in made.items() if len(found) > 1]
    diverged = sum(why.startswith("diverged") for _, why in results.unfinished)
    if diverged:
        sentences.append(f"Runs that diverged, and are excluded from all numbers: {diverged}.")
    if left := len(results.unfinished) - diverged:
        sentences.append(f"Runs that are not finished: {left}. This report is provisional.")
    if mixed:
        sentences.append(f"Warning: not all runs have the same {' and '.join(mixed)}; runs.csv has that of each run.")
    return sentences


def run_table(results, most=30):
    """A table of the finished runs and a note, as a list; where there are more than `most`, a sentence instead."""
    if len(results.runs) > most:
        return [page.Paragraph(f"The {len(results.runs)} finished runs are in runs.csv.")]
    rows = []
    for cell, run in results.runs:
        error, speed = run.summary["val_loss_se"], run.summary["tokens_per_second"]
        rows.append(
            [
                cell.label,
                f"{run.config['seed']}",
                f"{run.summary['val_loss']:.4f}" + ("" if error is None else f" ± {error:.4f}"),
                "–" if run.summary["train_loss"] is None else f"{run.summary['train_loss']:.4f}",
                "–" if speed is None else f"{speed:,.0f}",
            ]
        )
    head = ["run", "seed", "validation loss", "training loss", "tokens/s"]
    note = "Here ± is the standard error of one run's loss over validation windows, not the variation over seeds."
    return [page.Table(head, rows, words=("run",)), page.Paragraph(note)]


def unfinished_runs(results, most=12):
    """A line for each run that is not finished; where there are more than `most`, the number in each state instead."""
    lines = [f"{folder}: {why}" for folder, why in results.unfinished]
    if len(lines) <= most:
        return lines
    states = [why.partition(",")[0] for _, why in results.unfinished]
    return [f"{states.count(state)} {state} (see runs.csv)" for state in dict.fromkeys(states)]


def millions(count):
    """A number of parameters or tokens as in Table 2: 124.4M, 0.780M."""
    return f"{count / 1e6:.1f}M" if count >= 10e6 else f"{count / 1e6:.3f}M"


def signed(value):
    """A difference in loss with its sign: +0.0804, −0.0012."""
    return f"{value:+.4f}".replace("-", "−")


def with_interval(mean, text="{:.4f}".format):
    """A comparison.Mean with half of its interval's width: '1.9135 ± 0.0102'; without it for one seed."""
    return text(mean.mean) + ("" if mean.half_width is None else f" ± {mean.half_width:.4f}")


def p_phrase(p, family):
    """A p-value in a sentence: 'p = 0.031', or 'p (Holm) < 0.0001' where there are several comparisons (family)."""
    text = p_text(p)
    return f"{'p (Holm)' if family > 1 else 'p'} {text if '<' in text else f'= {text}'}"


def p_text(p):
    """A p-value with two digits, more of them near 5 %; '–' for None."""
    if p is None:
        return "–"
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}" if 0.045 < p < 0.055 else f"{p:.2g}"
