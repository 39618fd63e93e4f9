"""The parts of a report in words and tables: what was trained, what it reached, and what the differences say."""

import dataclasses

from model import GPTConfig
from studies import comparison, page
from studies.arms import common_seeds, is_number, point_text, unlike, value_text
from train_config import TrainConfig

# The paper's Table 2 (arXiv 2510.23912), weight decay as in its Section 5.2.2; one run a column, on OpenWebText.
# (W_Q = I, tied) -> parameters, those of attention and MLP (with the position embedding), validation loss.
PAPER = {
    (False, True): ("124M", "86M", "2.90"),
    (True, True): ("117M", "79M", "2.88"),
    (False, False): ("163M", "86M", "2.87"),
    (True, False): ("156M", "79M", "2.86"),
}
# What else must be the paper's (the defaults of TrainConfig) for losses to be comparable.
SETTING = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dataset", "tokens_per_step", "max_iters")


def paper_column(config):
    """(the key in PAPER of the column that a configuration repeats, what of its size and training is not the paper's).

    None and nothing for a model that is no column of the paper's table at any size.
    """
    reduced, tied = config["wq_identity"], config["tie_weights"]
    model = GPTConfig(wq_identity=reduced, tie_weights=tied, attn_scale=0.5 if reduced else 1.0)
    if any(config[name] != value for name, value in dataclasses.asdict(model).items() if name not in SETTING):
        return None, []
    if decays(config) != (f"{2**-5:g}" if reduced else "0.1"):
        return None, []
    return (reduced, tied), [name for name in SETTING if config[name] != getattr(TrainConfig(), name)]


def decays(config):
    """The weight decay of attention, MLP and embeddings; one number where they are the same."""
    own = [config[f"weight_decay_{part}"] for part in ("attn", "mlp", "embd")]
    values = [config["weight_decay"] if value is None else value for value in own]
    return " / ".join(f"{value:g}" for value in (values if len(set(values)) > 1 else values[:1]))


def table_2(cells):
    """The paper's Table 2 for our cells, a row each, and beside it the paper's numbers where the setting is its own."""
    head = [
        "arm",
        "trainable",
        "scale",
        "weight decay",
        "parameters",
        "attn + MLP",
        "tokens",
        "seeds",
        "validation loss (mean ± 95 %)" if any(len(cell.runs) > 1 for cell in cells) else "validation loss",
    ]
    rows = []
    for cell in cells:
        config, parameters = cell.example.config, cell.example.facts["parameters"]
        trained = [matrix for matrix in "QKVO" if not config.get(f"w{matrix.lower()}_identity")]
        rows.append(
            [
                cell.label,
                " ".join(f"W_{matrix}" for matrix in trained),
                f"{config['attn_scale']:g}/√{config['n_embd'] // config['n_head']}",
                decays(config),
                millions(parameters["total"]),
                millions(parameters["attn_mlp"]),
                millions(cell.example.summary["tokens"]),
                f"{len(cell.runs)}",
                with_interval(comparison.summarise(cell.losses.values())),
            ]
        )
    columns = [paper_column(cell.example.config) for cell in cells]
    if any(column and not differs for column, differs in columns):
        head += ["paper: parameters", "paper: attn + MLP", "paper: loss"]
        for row, (column, differs) in zip(rows, columns, strict=True):
            row += PAPER[column] if column and not differs else ["–"] * 3
    return page.Table(head, rows, words=("arm", "trainable"))


def paper_note(cells):
    """What the paper's numbers are, or why they are not beside ours; None where no cell is a column of its table."""
    columns = [differs for column, differs in (paper_column(cell.example.config) for cell in cells) if column]
    if not columns:
        return None
    if [] in columns:
        return (
            "The paper's columns are those of its Table 2 (arXiv 2510.23912): OpenWebText, 124M to 163M parameters, "
            "one run each; its attn + MLP contains the position embedding."
        )
    return (
        "The losses of the paper's Table 2 (arXiv 2510.23912; OpenWebText, 124M to 163M parameters) are not beside "
        f"ours because the two cannot be compared: these runs have another {', '.join(columns[0])}."
    )


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
    """A sentence for each (cell, control): what its difference to the control says, and what else is unlike in them."""
    sentences, family = [], sum(result.p_holm is not None for result in comparisons)
    for (cell, control), result in zip(pairs, comparisons, strict=True):
        d, reference = result.difference, at_its_point(control, cell)
        if d.low is None:
            seen = "" if d.mean is None else f" (difference {signed(d.mean)})"
        else:
            p = p_phrase(result.p_holm, family)
            seen = f"95 % interval {signed(d.low)} to {signed(d.high)}, {p}, {d.n} seeds"
            seen = f" ({seen})" if result.is_clear else f" (difference {signed(d.mean)}, {seen})"
        if result.is_clear:
            text = f"{cell.label} is {result.verdict} than {reference} by {abs(d.mean):.4f} nats a token{seen}"
        else:
            text = f"{cell.label} against {reference}: {result.verdict}{seen}"
        if differs := unlike(cell, control):
            text += f". Warning: the two are not alike: {', '.join(differs)}"
        sentences.append(text + ".")
    return sentences


def headlines(results, comparisons):
    """What the report begins with: the arms as they were set up, at the best point of each, and how that changes."""
    pairs = results.configured_pairs
    planned = verdicts(pairs, comparison.compare([(cell.losses, control.losses) for cell, control in pairs]))
    sentences = [f"As the arms' own files set them: {text}" for text in planned]
    found = verdicts(results.best_pairs, comparisons)
    if results.tuned_fields:
        counts = [[len(results.candidates(cell)) for cell in pair] for pair in results.best_pairs]
        found = [
            f"Best of {ours} points against best of {theirs}, chosen by these losses: {text}"
            for (ours, theirs), text in zip(counts, found, strict=True)
        ]
    compared = [cell for cell, _ in results.best_pairs]
    for cell in results.best:
        if cell.arm != cell.control and not any(cell is other for other in compared):
            known = any(other.arm == cell.control for other in results.best)
            why = "has another objective or no run of that size" if known else "has no finished run"
            found.append(f"{cell.label} is not compared: its control {cell.control} {why}.")
    return sentences + found + trends(results)


def trends(results):
    """A sentence for each arm and size field: what a doubling does to the difference between best points."""
    found = []  # (what it is about, Mean of the slopes, sizes that count, sizes that do not)
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
            about = f"{arm} − {control}" + f" (with {others})" * bool(others), name
            found.append((about, comparison.slope(known), list(known), [size for size in by_size if size not in known]))
    adjusted = comparison.holm([change.p for _, change, _, _ in found])
    sentences = []
    for ((pair, name), change, sizes, left_out), p in zip(found, adjusted, strict=True):
        verdict = "a trend" if p < 1 - comparison.CONFIDENCE and change.sd > 0 else "not distinguishable from none"
        sentences.append(
            f"{pair} changes by {signed(change.mean)} a doubling of {name} (95 % interval {signed(change.low)} to "
            f"{signed(change.high)}, {p_phrase(p, len(found))}, {change.n} seeds, {len(sizes)} sizes"
            + f"; {', '.join(map(value_text, left_out))} left out, with too few seeds" * bool(left_out)
            + "; between points chosen by these losses" * bool(results.tuned_fields)
            + f"): {verdict}."
        )
    return sentences


def reading_notes(pairs, comparisons):
    """How to read the differences: what they are, the noise floor, several comparisons, the number of seeds."""
    notes = [
        "A difference is arm − control in final validation loss, nats a token, paired by seed; below zero the arm is "
        "better. Intervals and p-values are Student's t over seeds, two-sided."
    ]
    controls = {id(control): control for _, control in pairs}.values()
    spreads = [(control.label, comparison.summarise(control.losses.values())) for control in controls]
    spreads = [f"{spread.sd:.4f} for {label}" for label, spread in spreads if spread.sd is not None]
    if spreads:
        notes.append(f"The noise floor, the standard deviation of a control's losses over seeds: {', '.join(spreads)}.")
    paired = [
        f"{result.difference.sd:.4f} for {cell.label}"
        for (cell, _), result in zip(pairs, comparisons, strict=True)
        if result.difference.sd is not None
    ]
    if paired:
        notes.append(f"The standard deviation of the paired differences over seeds: {', '.join(paired)}.")
    if any(result.difference.n == 1 for result in comparisons):
        notes.append("One seed gives neither an interval nor a p-value: its difference may be chance.")
    family = sum(result.p_holm is not None for result in comparisons)
    if family > 1:
        notes.append(
            f"{family} comparisons are made together. Verdicts go by p (Holm), which keeps the chance of any false "
            "alarm among them at 5 %; an interval is about its own arm alone."
        )
    if any(result.seeds_needed is not None and not result.is_clear for result in comparisons):
        level = f" divided by the {family} comparisons" if family > 1 else ""
        notes.append(
            f"The number of seeds needed is that of a paired t-test at 5 %{level} which finds a difference of "
            f"{comparison.DIFFERENCE:g} with probability {100 * comparison.POWER:.0f} %, if the differences go on to "
            "vary as they do here; in brackets, if they vary as little or as much as their interval (95 %) allows."
        )
    return notes


def tuning_notes(results):
    """Where each arm's best point is, whether that is the edge of the grid, and what choosing it did to the losses."""
    notes = []
    for cell in results.best:
        points, candidates = results.points(cell), results.candidates(cell)
        text = f"{cell.arm} is best at {point_text(cell.point)}"
        missing = sum(not point.runs and not point.n_diverged for point in points)
        diverged = sum(point.n_diverged > 0 for point in points)
        if diverged:
            text += f"; points with a run that diverged, which are no candidates: {diverged} of {len(points)}"
        if missing:
            text += f"; points without a finished run: {missing} of {len(points)}, so this is provisional"
        elif edge := results.at_the_edge(cell):
            text += (
                f". Warning: {' and '.join(edge)} {'is' if len(edge) == 1 else 'are'} at the edge of the grid there, "
                "so that the optimum may lie outside: extend the grid"
            )
        if len(common := common_seeds(candidates)) < max(len(point.runs) for point in candidates):
            seeds = f"the seeds that all points have: {', '.join(str(seed) for seed, _ in common)}"
            text += (
                f". Chosen by {seeds if common else 'the mean of whatever seeds a point has, as none is everywhere'}"
            )
        notes.append(text + ".")
    notes.append(
        "Best against best is the fair comparison, but each best point was chosen by the very losses that are then "
        "compared: they are too low, in each arm, the more so the larger the grid, and the p-values do not know of the "
        "choice. Repeat the best points with new seeds to be sure."
    )
    for cell, control in results.best_pairs:
        left_out = comparison.difference(results.left_out_losses(cell), results.left_out_losses(control))
        if left_out.n > 1:
            notes.append(
                f"With the points for each seed chosen by the other seeds alone, {cell.arm} − {control.arm}"
                f"{at_size(results, cell)} is {with_interval(left_out, signed)} ({left_out.n} seeds)."
            )
    return notes


def at_its_point(control, cell):
    """A control's label, without the point where that is the cell's own."""
    return control.arm if control.point == cell.point else control.label


def at_size(results, cell):
    """' at n_embd 256', or nothing in a study of one size."""
    size = results.size(cell)
    return f" at {point_text(size)}" if size else ""


def every_point(results):
    """A table of the whole grid: loss and difference to the control at the same point, with Holm's p over the table."""
    pairs = results.point_pairs
    found = comparison.compare([(cell.losses, control.losses) for cell, control in pairs])
    found = {id(cell): result for (cell, _), result in zip(pairs, found, strict=True)}
    rows = []
    for cell in results.cells:
        result = found.get(id(cell))
        d = result.difference if result else comparison.Mean(0, None)
        is_best = results.tuned_fields and any(cell is best for best in results.best)
        rows.append(
            [
                cell.arm,
                *(value_text(cell.point[name]) for name in results.grid),
                f"{len(cell.runs)}",
                with_interval(comparison.summarise(cell.losses.values())) + " (best)" * bool(is_best),
                "–" if d.mean is None else with_interval(d, signed),
                p_text(result.p_holm if result else None),
            ]
        )
    head = ["arm", *results.grid, "seeds", "validation loss (± 95 %)", "difference there (± 95 %)", "p (Holm)"]
    return page.Table(head, rows, words=("arm",))


def setting(results):
    """What all runs have in common and what made them, as sentences, with a warning where that was not the same."""

    def values(get):
        return list(dict.fromkeys(str(get(run)) for _, run in results.runs))

    first = results.cells[0].example  # the data of all runs is the same
    data = "{tokenizer}, fingerprint {fingerprint}".format(**first.facts["data"])
    sizes = values(
        lambda r: f"{r.config['n_layer']} layers of {r.config['n_embd']}, context {r.config['block_size']:,}"
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
        f"{' or '.join(steps)}. Losses are in nats a token, over all of the validation split at the end of a run.",
        "Made with " + "; ".join(f"{name} {', '.join(found)}" for name, found in made.items()) + ".",
    ]
    mixed = [name for name, found in made.items() if len(found) > 1]
    diverged = sum(why.startswith("diverged") for _, why in results.unfinished)
    if diverged:
        sentences.append(f"Runs that diverged, and are in no number here: {diverged}.")
    if left := len(results.unfinished) - diverged:
        sentences.append(f"Runs that are not finished: {left}. What is said here is provisional.")
    if mixed:
        sentences.append(f"Warning: not all runs have the same {' and '.join(mixed)}; runs.csv says which has which.")
    return sentences


def run_table(results, most=30):
    """A table of the finished runs, with a note; a sentence where there are more than `most`, which runs.csv has."""
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
    note = "Here ± is the standard error of one run's loss over validation windows; it says nothing of other seeds."
    return [page.Table(head, rows, words=("run",)), page.Paragraph(note)]


def unfinished_runs(results, most=12):
    """A line for each run that is not finished; where there are more than `most`, for each state how many there are."""
    lines = [f"{folder}: {why}" for folder, why in results.unfinished]
    if len(lines) <= most:
        return lines
    states = [why.partition(",")[0] for _, why in results.unfinished]
    return [f"{states.count(state)} {state} (see runs.csv)" for state in dict.fromkeys(states)]


def millions(count):
    """A number of parameters or tokens, as Table 2 prints them: 124.4M, 0.780M."""
    return f"{count / 1e6:.1f}M" if count >= 10e6 else f"{count / 1e6:.3f}M"


def signed(value):
    """A difference in loss with its sign: +0.0804, −0.0012."""
    return f"{value:+.4f}".replace("-", "−")


def with_interval(mean, text="{:.4f}".format):
    """A comparison.Mean with half of its interval: '1.9135 ± 0.0102'; without it for one seed."""
    return text(mean.mean) + ("" if mean.half_width is None else f" ± {mean.half_width:.4f}")


def p_phrase(p, family):
    """A p-value in a sentence, one of a family of so many: 'p = 0.031', 'p (Holm) < 0.0001'."""
    text = p_text(p)
    return f"{'p (Holm)' if family > 1 else 'p'} {text if '<' in text else f'= {text}'}"


def p_text(p):
    """A p-value with two digits, and more near 5 %; '–' for None."""
    if p is None:
        return "–"
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}" if 0.045 < p < 0.055 else f"{p:.2g}"
