"""Damaged checkpoints: cut short, or with one bit changed."""

from engine import checkpoint

from . import training
from .full_disks import write_run


def damages(folder, n, rng, kind):
    """Load n damaged copies of a checkpoint; kind: 'truncation' or 'flip'.

    Each must be refused in one line. A copy that loads must have the same content: then nothing was damaged.
    """
    (folder / "trial").mkdir()
    write_run(folder / "trial")
    path = folder / "trial/run/ckpt.pt"
    content, expected = path.read_bytes(), checkpoint.load(path)
    damaged = folder / "damaged.pt"
    damaged.write_bytes(content)
    assert judge(damaged, expected) == ("", "identical")
    for _ in range(n):
        if kind == "truncation":
            what, found = f"cut to {(size := rng.randrange(len(content)))} of {len(content)} bytes", content[:size]
        else:
            bit = rng.randrange(8 * len(content))
            what, found = f"bit {bit} of {8 * len(content)}", bytearray(content)
            found[bit // 8] ^= 1 << bit % 8
        damaged.write_bytes(found)
        yield what, *judge(damaged, expected)


def judge(path, expected):
    """(what is wrong with loading a damaged checkpoint, '' if nothing; 'identical' where it loads as it was)."""
    try:
        state = checkpoint.load(path)
    except ValueError as error:
        text = str(error)
        return ("" if "\n" not in text and path.name in text else f"not one line with the path: {text!r}"), "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}", None
    return ("", "identical") if training.are_equal(state, expected) else ("loads with other content", None)
