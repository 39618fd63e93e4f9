"""The tables and notes of a report: what was trained, the losses, and the differences from control."""

from functools import partial

from studies import comparison, delay, options, page
from studies.arms import common_seeds
from studies.runs import named
from studies.texts import listed, p_text, point_text, signed, value_text, with_interval
from studies.verdicts import MOST, names


def short_commit(commit):
    """A commit with twelve of its digits, and '+changes' where there were some."""
    digits, plus, changes = str(commit).partition("+")
    return digits[:12] + plus + changes


MADE = {  # with what a run was made
    "commit": lambda run: short_commit(run.facts["git_commit"]),
    "torch": lambda run: run.facts["versions"]["torch"],
    "device": lambda run: run.facts["device"],
    "dtype": lambda run: run.precision,
}


def interval(low, high):
    """The ends of an interval of differences as text; '–' where there is none."""
    return "–" if low is None else f"{signed(low)} to {signed(high)}"


def differences(results, comparisons):
    """A table of the Comparisons of results.best_pairs. Columns that would be empty are left out."""
    rows = []
    for (cell, control), result in zip(results.best_pairs, comparisons, strict=True):
        d, same = result.difference, result.equivalence
        own, reference = names(results, (cell, control))
        steps, tokens = delay.delays(results, cell, control) or (None, None)
        row = {
            "arm": own,
            "difference": "–" if d.mean is None else signed(d.mean),
            "95 % interval": interval(d.low, d.high),
            "90 % interval": same and interval(same.low, same.high),
            "margin": same and f"± {same.margin:.4f}",
            "verdict": result.conclusion,
            "delay (steps)": steps and with_interval(steps, partial(signed, decimals=0), 0),
            "delay (% of tokens)": tokens and with_interval(tokens, partial(signed, decimals=1), 1),
            "p": p_text(d.p),
            "p (Holm)": p_text(result.p_holm),
            "seeds": f"{d.n}",
            f"seeds for ± {comparison.DIFFERENCE:g}": result.seeds_needed and needed_text(result.seeds_needed),
            "points chosen by the other seeds": _of_others(results, cell, control),
            "control": reference,
        }
        rows.append(row)
    head = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    return page.Table(head, [[row[name] or "–" for name in head] for row in rows], words=("arm", "control", "verdict"))


def needed_text(seeds_needed):
    """The number of seeds that detects a difference, and its range, as text."""
    needed, least, most = seeds_needed
    return f"{needed:,} ({least:,} to {most:,})"


def _of_others(results, cell, control):
    """The difference with each seed's points chosen by the other seeds, as text; None where that is not known."""
    unbiased = comparison.difference(*map(results.leave_one_out_losses, (cell, control)))
    return with_interval(unbiased, signed) if unbiased.n > 1 else None


def reading_notes(results, comparisons):
    """How to read the differences: their definition, the noise over seeds, Holm's correction, the seeds needed."""
    pairs = results.best_pairs
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
        f"{result.difference.sd:.4f} for {names(results, pair)[0]}"
        for pair, result in zip(pairs, comparisons, strict=True)
        if result.difference.sd is not None
    ]
    if 0 < len(paired) <= MOST:
        notes.append(f"Standard deviation over seeds of the paired differences: {', '.join(paired)}.")
    if any(delay.delays(results, *pair) for pair in pairs):
        notes.append(delay.definition(results))
    if results.equal_within:
        notes.append(
            f"Two arms are equal within {100 * results.equal_within:g} % where the 90 % interval of their difference "
            "lies within that part of the control's loss, a margin that was fixed in the study's file (two one-sided "
            "t-tests at 5 %, with Holm's correction where there are several)."
        )
    if any(_of_others(results, *pair) for pair in pairs):
        notes.append(
            "Points chosen by the other seeds: the difference where each seed's points are those that are best for the "
            "other seeds alone, so that its losses had no part in the choice."
        )
    if any(result.difference.n == 1 for result in comparisons):
        notes.append("One seed gives neither an interval nor a p-value: the difference may be due to chance.")
    family = sum(result.p_holm is not None for result in comparisons)
    if family > 1:
        notes.append(
            f"There are {family} comparisons. The verdicts use p (Holm), which keeps the probability of any false "
            "positive among them at 5 %; the intervals are not corrected."
        )
    if any(result.seeds_needed for result in comparisons):
        level = f" divided by the {family} comparisons" if family > 1 else ""
        notes.append(
            f"The number of seeds for ± {comparison.DIFFERENCE:g} is that with which a paired t-test at 5 %{level} "
            f"detects a difference of {comparison.DIFFERENCE:g} with probability {100 * comparison.POWER:.0f} %, given "
            "the standard deviation over seeds of these differences; in brackets, given the ends of its 95 % interval."
        )
    return notes


def tuning_notes(results):
    """Which best points are at the edge of the grid, or provisional, and the bias of choosing them by these losses."""
    groups = {}  # (point, what is to be said of it) -> arms
    for cell in results.best:
        points, candidates = results.points(cell), results.candidates(cell)
        text = ""
        missing = sum(not point.choosing_losses and not point.n_diverged for point in points)
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
        if len(common := common_seeds(candidates)) < max(len(point.choosing_losses) for point in candidates):
            seeds = ", ".join(str(seed) for seed, _ in common)
            if common:
                text += f". Chosen by the seeds that all points have: {seeds}"
            else:
                text += ". Chosen by each point's mean over its own seeds, since no seed is at all points"
        groups.setdefault((point_text(cell.point), text), []).append(cell.arm)
    notes = [
        f"{listed(arms)} {'is' if len(arms) == 1 else 'are'} best at {point}{text}."
        for (point, text), arms in groups.items()
    ]
    if results.tuning_seeds:
        notes.append(
            "The best points were chosen by the losses of other seeds than those that are compared, so that the choice "
            "does not favour any arm. The table below has the losses by which they were chosen."
        )
    else:
        notes.append(
            "Comparing each arm at its best point is fair, but the best points were chosen by the same losses that are "
            "compared: these are biased low, the more so the larger the grid, and the p-values ignore that. Repeat the "
            "best points with new seeds to confirm a difference."
        )
    return notes


def every_point(results):
    """A table of the whole grid: loss and difference from control at the same point, with Holm's p over the table."""
    pairs = results.point_pairs
    compared = comparison.compare([(cell.choosing_losses, control.choosing_losses) for cell, control in pairs])
    found = {cell: result for (cell, _), result in zip(pairs, compared, strict=True)}
    rows = []
    for cell in results.cells:
        result = found.get(cell)
        d = result.difference if result else comparison.Mean(0, None)
        loss = with_interval(comparison.summarise(cell.choosing_losses.values()))
        if results.tuned_fields and cell in results.chosen:
            loss += " (best)"
        rows.append(
            [
                cell.arm,
                *(value_text(cell.point[name]) for name in results.grid),
                f"{len(cell.choosing_losses)}",
                loss,
                "–" if d.mean is None else with_interval(d, signed),
                p_text(result.p_holm if result else None),
            ]
        )
    head = ["arm", *results.grid, "seeds", "validation loss (± 95 %)", "difference at this point (± 95 %)", "p (Holm)"]
    return page.Table(head, rows, words=("arm",))


def setting(results):
    """Sentences on the data, sizes and software of the runs."""

    def values(get):  # the different values that a function of a run has
        return list(dict.fromkeys(str(get(run)) for _, run in results.runs))

    first = results.cells[0].example  # the data of all runs is the same
    data = "{tokenizer}, fingerprint {fingerprint}".format(**first.facts["data"])
    sizes = values(
        lambda r: f"n_layer {r.config['n_layer']}, n_embd {r.config['n_embd']}, block_size {r.config['block_size']:,}"
    )
    steps = values(lambda r: f"{r.summary['steps']:,} steps of {r.config['tokens_per_step']:,} tokens")
    made = {name: values(get) for name, get in MADE.items()}
    dates = sorted({run.date for _, run in results.runs if run.date})
    when = f" {dates[0]} to {dates[-1]}" if len(dates) > 1 else "".join(f" {date}" for date in dates)
    sentences = [
        f"{len(results.runs)} finished runs on {first.config['dataset']} ({data}): {' or '.join(sizes)}; "
        f"{' or '.join(steps)}. Losses are in nats per token, over the whole validation split at the end of a run.",
        f"Made{when} with " + "; ".join(f"{name} {', '.join(found)}" for name, found in made.items()) + ".",
    ]
    if found := options.summary(results.best):
        sentences.append(f"Arms differ in: {found}.")
    return sentences


def cautions(results):
    """Sentences on what is missing from the results, and a warning where not all were made with the same software."""
    sentences = []
    mixed = [name for name, get in MADE.items() if len({str(get(run)) for _, run in results.runs}) > 1]
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
                "–" if speed is None else f"{speed:,.0f}",
                run.date or "–",
                run.changes_text or "–",
            ]
        )
    head = ["run", "seed", "validation loss", "tokens/s", "date", "options changed on the way"]
    empty = [i for i in (4, 5) if all(row[i] == "–" for row in rows)]
    head, *rows = [[text for i, text in enumerate(row) if i not in empty] for row in (head, *rows)]
    note = "Here ± is the standard error of one run's loss over validation windows, not the variation over seeds."
    return [page.Table(head, rows, words=("run", "date", "options changed on the way")), page.Paragraph(note)]


def unfinished_runs(results, most=12):
    """A line for each run that is not finished; where there are more than `most`, the number in each state instead."""
    lines = [f"{named(folder, results.base)}: {why}" for folder, why in results.unfinished]
    if len(lines) <= most:
        return lines
    states = [why.partition(",")[0] for _, why in results.unfinished]
    return [f"{states.count(state)} {state} (see runs.csv)" for state in dict.fromkeys(states)]
