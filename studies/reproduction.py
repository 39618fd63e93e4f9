"""The plan of `reproduce.py`: what fits into a budget of time on a device, and the studies that it runs.

One schedule for all runs: warm-up over 2 % of the steps, constant, and a linear decay to zero over the last fifth, so
that every run is annealed to its end, whatever the budget.
"""

import math
from dataclasses import dataclass

from studies import page
from studies.table_2 import PAPER
from train_config import TrainConfig

COLUMNS = ("baseline_tied", "reduced_tied", "baseline_untied", "reduced_untied")  # of Table 2
QUERIES = ("reduced_tied_from1", "residual_linear_tied", "residual_mlp_tied", "rotated_tied")
# Each path of the code, by the config files that take it, from what most runs need to what few do.
ARCHITECTURES = (
    *COLUMNS,
    *QUERIES,
    *(
        f"{overlay} reduced_tied"
        for overlay in ("share_kv", "qk_norm", "modern", "rope", "gqa", "mqa", "rmsnorm", "dyt")
    ),
    *(f"{overlay} reduced_tied" for overlay in ("nonorm", "parallel", "shared", "moe", "encoder")),
)
SHARES = {
    "works": 0.12,
    "speed": 0.12,
    "table_2": 0.5,
    "section_5_1": 0.1,
}  # of the time; the rest: planning, the report
FEWEST_STEPS, FEWEST_OF_ALL = 200, 20  # of a run: below, fewer runs are planned; below the second, none
OVERHEAD = 1.3  # of a run over its steps: imports, compilation, evaluations, checkpoints
PAPER_TOKENS = 105_001 * 480 * 1024  # of each column of Table 2
H100_TOKENS_PER_SECOND = 480_000  # of the 124M baseline on one H100, from public trainers; an estimate


@dataclass(frozen=True)
class Plan:
    """What is run, and how long each part may take."""

    seconds: dict  # part -> seconds
    steps: int  # of each training run
    tokens_per_step: int
    seeds: int  # of the two tied columns; the untied ones have one
    queries: bool  # whether the other queries are trained, too, with one seed
    transfer_steps: int  # of the model of Section 5.1

    @property
    def runs(self):
        """How many training runs that are."""
        return 4 + 2 * (self.seeds - 1) + self.queries * len(QUERIES)

    @property
    def schedule(self):
        """The options of train.py that every run has."""
        decay, warmup = max(1, self.steps // 5), max(1, self.steps // 50)
        interval = max(1, self.steps // 10)
        return (
            f"--max_iters={self.steps} --warmup_iters={warmup} --schedule=wsd --decay_iters={decay} "
            f"--tokens_per_step={self.tokens_per_step} --eval_interval={interval} --save_steps="
        )


def make_plan(seconds, tokens_per_second, sizes_of_step, transfer_steps_per_second):
    """The Plan for a budget in seconds on a device of a measured speed.

    sizes_of_step: tokens_per_step that may be taken, ascending; the largest that leaves 500 steps, else the smallest.
    Raises ValueError for a budget that leaves a run fewer than FEWEST_OF_ALL steps.
    """
    shares = {part: share * seconds for part, share in SHARES.items()}

    def steps(seeds, queries, tokens):
        runs = 4 + 2 * (seeds - 1) + queries * len(QUERIES)
        return int(shares["table_2"] * tokens_per_second / OVERHEAD / runs / tokens)

    choices = [(5, True), (3, True), (2, True), (2, False), (1, False)]
    seeds, queries = next((c for c in choices if steps(*c, sizes_of_step[0]) >= FEWEST_STEPS), choices[-1])
    tokens = next((t for t in reversed(sizes_of_step) if steps(seeds, queries, t) >= 500), sizes_of_step[0])
    found = min(steps(seeds, queries, tokens), PAPER_TOKENS // tokens)
    if found < FEWEST_OF_ALL:
        raise ValueError(
            f"the budget of {seconds:.0f} seconds leaves each of four runs {found} steps at {tokens_per_second:,.0f} "
            f"tokens/s, and fewer than {FEWEST_OF_ALL} say nothing: allow at least "
            f"{math.ceil(FEWEST_OF_ALL / max(found, 1) * seconds / 60)} minutes"
        )
    transfer = max(20, int(shares["section_5_1"] * transfer_steps_per_second / 1.3))
    return Plan(shares, found, tokens, seeds, queries, min(transfer, 20_000))


def studies(plan, small):
    """name -> the text of a study's file for sweep.py, in the order in which they are run; small: of a CPU's size."""
    found = {"table_2": _study(COLUMNS, plan, [1], small)}
    if plan.seeds > 1:
        found["seeds"] = _study(COLUMNS[:2], plan, list(range(1, plan.seeds + 1)), small)
    if plan.queries:
        found["queries"] = _study((*COLUMNS[:2], *QUERIES), plan, [1], small)
    return found


def _study(arms, plan, seeds, small):
    files = {arm: f"config/{arm}.py" + small * " --attn_logit_std=small" for arm in arms}
    control = {arm: "baseline_untied" if "untied" in arm else "baseline_tied" for arm in arms}
    return f"arms = {files!r}\ncontrol = {control!r}\nsettings = {plan.schedule!r}\nseeds = {seeds!r}\n"


def plan_table(plan, tokens_per_second, device):
    """The plan as parts of a page."""
    share = plan.steps * plan.tokens_per_step / PAPER_TOKENS
    what = {
        "works": f"{len(ARCHITECTURES)} architectures and queries: train, evaluate, decode, resume",
        "speed": "training and decoding beside other implementations",
        "table_2": f"{plan.runs} runs of {plan.steps:,} steps of {plan.tokens_per_step:,} tokens ({share:.3%} of the "
        f"paper's): four columns{f', {plan.seeds} seeds of the tied pair' if plan.seeds > 1 else ''}"
        f"{', other queries' if plan.queries else ''}",
        "section_5_1": f"the model and its linear baseline, {plan.transfer_steps:,} of the paper's 20,000 steps",
    }
    rows = [[part, f"{seconds / 60:.1f}", what[part]] for part, seconds in plan.seconds.items()]
    return [
        page.Paragraph(f"On {device}, at a measured {tokens_per_second:,.0f} tokens/s of the size that is trained:"),
        page.Table(["part", "minutes", "what"], rows, words=("part", "what")),
    ]


def paper_days(tokens_per_second=None):
    """Sentences: how long Table 2's four columns take by the paper's own protocol."""
    days = 4 * PAPER_TOKENS / 86_400
    texts = [
        f"The paper's protocol is four columns of 105,001 steps of 491,520 tokens, {4 * PAPER_TOKENS / 1e9:.0f} "
        "billion tokens, of a cosine that would end at 600,000 steps.",
        f"On one H100, at {H100_TOKENS_PER_SECOND:,} tokens/s, which public trainers reach: about "
        f"{days / H100_TOKENS_PER_SECOND:.1f} days (an estimate, not a measurement).",
    ]
    if tokens_per_second:
        texts.append(
            f"On this device, at {tokens_per_second:,.1f} tokens/s: about {days / tokens_per_second:,.0f} days "
            "(extrapolated from a measurement of some seconds)."
        )
    return texts


def beside_the_paper(results):
    """A page.Table of Table 2's columns: the paper's loss, and the one here with its share of the paper's tokens.

    results: column -> (mean validation loss, tokens of a run, seeds).
    """
    rows = []
    for column, (loss, tokens, seeds) in results.items():
        key = (column.startswith("reduced"), not column.endswith("untied"))
        rows.append([column, PAPER[key][2], f"{loss:.4f}", f"{tokens / PAPER_TOKENS:.3%}", str(seeds)])
    head = ["column", "paper", "here", "of the paper's tokens", "seeds"]
    return page.Table(head, rows, words=("column",))


def sizes_of_step(on_gpu, size):
    """The tokens_per_step that a run of this TrainConfig may have: its own on a CPU, 65,536 to 491,520 on a GPU."""
    unit = size.block_size
    choices = [65_536, 131_072, 262_144, TrainConfig.tokens_per_step] if on_gpu else [size.tokens_per_step]
    return [tokens // unit * unit for tokens in choices]
