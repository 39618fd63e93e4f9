"""What lm_eval wrote into run folders, eval/*.json (see harness.py): the benchmarks of a report, beside its losses."""

from pathlib import Path

from engine.files import read_json
from studies import comparison, page
from studies.runs import is_number
from studies.texts import p_text, signed, with_interval

FOLDER = "eval"
NOTE = (
    "Results of lm_eval in the run folders. A difference is arm − control, paired by seed; whether more is better "
    "depends on the metric (acc: more, perplexity: less). p (Holm) is corrected for all rows of this table."
)


def read(folder):
    """{(task, metric): value} of a run folder, {} where it has none; of a metric in several files, the last by name.

    Raises ValueError for a file that is not one of lm_eval's results.
    """
    found = {}
    for path in sorted(Path(folder, FOLDER).glob("*.json")):
        results = read_json(path).get("results")
        if not isinstance(results, dict) or not all(isinstance(metrics, dict) for metrics in results.values()):
            raise ValueError(f"{path} must have results, task -> metrics, as lm_eval writes them")
        for task, metrics in results.items():
            for name, value in metrics.items():
                metric, comma, way = name.partition(",")  # 'acc,none': a metric, and how answers are read
                if comma and is_number(value) and not metric.endswith("_stderr"):
                    found[task, metric if way == "none" else name] = value
    return found


def table(results):
    """A page.Table of the benchmarks of each arm, and its differences from control; None where no run has any."""
    found = {cell: {seed: read(run.folder) for seed, run in cell.runs.items()} for cell in results.best}
    controls = dict(results.best_pairs)
    names = dict.fromkeys(name for by_seed in found.values() for values in by_seed.values() for name in values)
    entries, pairs = [], []
    for name in names:
        for cell in results.best:
            ours = {seed: values[name] for seed, values in found[cell].items() if name in values}
            if not ours:
                continue
            theirs = {
                seed: values[name] for seed, values in found.get(controls.get(cell), {}).items() if name in values
            }
            entries.append((name, cell, comparison.summarise(ours.values())))
            pairs.append((ours, theirs))
    rows = [
        [
            *name,
            cell.label,
            f"{mean.n}",
            with_interval(mean),
            "–" if result.difference.mean is None else with_interval(result.difference, signed),
            p_text(result.p_holm),
        ]
        for (name, cell, mean), result in zip(entries, comparison.compare(pairs), strict=True)
    ]
    head = ["task", "metric", "arm", "seeds", "value (± 95 %)", "difference (± 95 %)", "p (Holm)"]
    return page.Table(head, rows, words=("task", "metric", "arm")) if rows else None
