"""Whether pairs of arms that differ in the same options differ by as much, as Table 2's tied and untied pairs may."""

from studies import comparison, options
from studies.texts import listed, p_phrase, signed


def pairs_of_one_change(results):
    """Lists of two or more (cell, control) pairs of one size that differ in the same options in the same way.

    The grid's tuned options do not count. Arms of one control are compared with it already, so they are no such list;
    nor are pairs whose losses are of different objectives.
    """
    groups = {}
    for cell, control in results.best_pairs:
        one, other = map(options.in_effect, (cell, control))
        names = [name for name in options.differing([cell, control]) if name not in results.tuned_fields]
        change = repr([(name, one.get(name), other.get(name)) for name in names])
        key = (change, repr(results.size(cell)), cell.example.config["objective"])
        groups.setdefault(key, []).append((cell, control))
    return [pairs for pairs in groups.values() if len({control for _, control in pairs}) == len(pairs) > 1]


def interactions(results, most):
    """Sentences: the difference of each such pair against that of the first, paired by seed; of many, one sentence.

    most: where there are more, they are counted. Pairs with fewer than two seeds in common with the first are left out.
    """
    found = []  # (a pair's names, the first pair's names, Mean of the differences of the differences)
    for first, *others in pairs_of_one_change(results):
        reference = _differences(*first)
        for pair in others:
            change = comparison.difference(_differences(*pair), reference)
            if change.n > 1 and change.sd > 0:
                found.append((*(f"{cell.arm} − {control.arm}" for cell, control in (pair, first)), change))
    adjusted = comparison.holm([change.p for *_, change in found])
    if len(found) > most:
        return [_count(found, adjusted)]
    sentences = []
    for (name, reference, change), p in zip(found, adjusted, strict=True):
        numbers = f"by {signed(change.mean)} nats per token, 95 % CI {signed(change.low)} to {signed(change.high)}, "
        numbers += f"{p_phrase(p, len(found))}, {change.n} seeds"
        if p < 1 - comparison.CONFIDENCE:
            sentences.append(f"{name} is another difference than {reference} ({numbers}).")
        else:
            sentences.append(f"{name} is not seen to be another difference than {reference} ({numbers}).")
    return sentences


def _differences(cell, control):
    """seed -> loss of the cell minus that of its control."""
    return {seed: loss - control.losses[seed] for seed, loss in cell.losses.items() if seed in control.losses}


def _count(found, adjusted):
    both = zip(found, adjusted, strict=True)
    clear = [f"{name} ({signed(change.mean)})" for (name, _, change), p in both if p < 1 - comparison.CONFIDENCE]
    references = listed(dict.fromkeys(reference for _, reference, _ in found))
    what = f"by p (Holm) {len(clear)} clearly differ: {listed(clear)}" if clear else "by p (Holm) none clearly differs"
    means = [change.mean for *_, change in found]
    ends = f"{signed(min(means))} to {signed(max(means))} nats per token away"
    return f"{len(found)} differences were compared with {references}, {ends}; {what}."
