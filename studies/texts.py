"""Numbers as a report writes them: losses with four decimals, a true minus sign, no sign before zero."""

from studies.runs import is_number


def value_text(value, digits=6):
    """A value of an option as text, a number with at most so many digits."""
    return f"{value:.{digits}g}".replace("-", "−") if is_number(value) else str(value).lower()


def distinct_texts(values):
    """Values of an option as texts, which are equal only where the values are."""
    for digits in (6, 9, 17):
        texts = [value_text(value, digits) for value in values]
        if len(set(texts)) == len({repr(value) for value in values}):
            break
    return texts


def point_text(point):
    """A point of the grid as text: 'weight_decay 0.03125, attn_scale 0.5'."""
    return ", ".join(f"{name} {value_text(value)}" for name, value in point.items())


def listed(words):
    """Words in a sentence: 'a, b and c'."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def signed(value, decimals=4):
    """A number with its sign, such as a difference in loss: +0.0804, −0.0012; 0.0000 without one."""
    text = f"{value:+,.{decimals}f}"
    return text.replace("-", "−") if any(digit in "123456789" for digit in text) else text[1:]


def with_interval(mean, text="{:.4f}".format, decimals=4):
    """A comparison.Mean with half of its interval's width: '1.9135 ± 0.0102'; without it for one seed."""
    return text(mean.mean) + ("" if mean.half_width is None else f" ± {mean.half_width:,.{decimals}f}")


def millions(count):
    """A number of parameters or tokens as in Table 2: 124.4M, 0.780M."""
    return f"{count / 1e6:.1f}M" if count >= 10e6 else f"{count / 1e6:.3f}M"


def p_phrase(p, family):
    """A p-value in a sentence: 'p = 0.031', or 'p (Holm) < 0.0001' where there are several comparisons (family)."""
    text = p_text(p)
    return f"{'p (Holm)' if family > 1 else 'p'} {text if '<' in text else f'= {text}'}"


def p_text(p):
    """A p-value with two digits, more of them near 5 %; '–' for None."""
    if p is None:
        return "–"
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}" if 0.045 < p < 0.055 else f"{p:.2g}"
