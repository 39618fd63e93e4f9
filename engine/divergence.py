"""Losses that are not finite, or that rise and stay finite: what is kept of a run that diverges."""

import math
from pathlib import Path

from engine import files, run_files

MARGIN = 1.0  # nats per token above a uniform guess over the vocabulary, which is the loss at initialisation
PATIENCE = 5  # train records in a row


class Watch:
    """Watches the training loss of a run.

    A run has diverged when PATIENCE train records in a row are above log(vocab_size) + MARGIN. The checkpoint from
    before the first of them stays as last_good.pt, since evaluations would replace it by worse ones.
    """

    def __init__(self, folder, vocab_size):
        self.folder, self.limit, self.count = Path(folder), math.log(vocab_size) + MARGIN, 0

    def warning(self, loss):
        """What to tell the user after a train record with this loss; None: nothing. Keeps or drops last_good.pt."""
        good = self.folder / run_files.LAST_GOOD
        if loss <= self.limit:
            if 0 < self.count < PATIENCE:
                good.unlink(missing_ok=True)
            self.count = 0
            return None
        self.count += 1
        latest = self.folder / run_files.CHECKPOINT
        if self.count == 1 and latest.exists():
            files.link(latest, run_files.LAST_GOOD)
        if self.count != PATIENCE:
            return None
        limit = f"{self.limit:.2f} (a uniform guess + {MARGIN:g})"
        text = f"warning: the training loss was above {limit} in {PATIENCE} records: the run has diverged; stop it"
        if not good.exists():
            return f"{text}, and begin again with a smaller learning_rate"
        return f"{text}, copy {good} over {latest}, and continue with --resume and a smaller learning_rate"


def dump(folder, step, values, learning_rate, offsets):
    """Write nonfinite.json: the step after `step` steps, whose loss or gradient norm is not finite, and its batch.

    values: (loss, gradient norm) of the steps up to it. offsets: where the sequences of its batch begin.
    """
    *before, here = [{"loss": str(loss), "grad_norm": str(norm)} for loss, norm in values]
    content = {"step": step + 1, **here, "learning_rate": learning_rate, "before": before, "offsets": offsets.tolist()}
    files.write_json(Path(folder) / run_files.NONFINITE, content)
