"""How balanced is a trained model? Section 4.1.1: what weight decay does to the freedom of the heads, along a run.

    python -m theory.balance --run=out/quick-baseline_tied

No change of gauge (Proposition 4.2) changes the loss, but it changes the length of the weights. So where the loss plus
a decay of ‖W_Q‖² + ‖W_K‖² is stationary, the two lengths are in balance in every direction: W_QᵀW_Q = W_KᵀW_K in each
head, and in the same way W_VᵀW_V = W_OW_Oᵀ. W_Q = I is far from that form, which is why training does not find it.
AdamW's decay is decoupled from the gradient, so that this need not hold for it exactly; here is how far it is.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

import configurator
from configurator import FilePath
from engine import checkpoint, run_files
from model import GPT, GPTConfig
from studies import page
from theory import gauge
from theory.weights import OPTIONS_OF_HEADS, read_weights

COLUMNS = ["step", "W_Q and W_K: mean", "largest", "W_V and W_O: mean", "largest"]


@dataclass
class BalanceConfig:
    """Which run to measure."""

    run: FilePath | None = None  # a run folder; its checkpoints, those of save_steps among them, are the rows

    def __post_init__(self):
        if self.run is None:
            raise ValueError("run is not given: name the run folder with --run=…")


def imbalance(model, pair):
    """‖G − H‖ / (‖G‖ + ‖H‖) of each head's two Gram matrices, (n_layer, n_kv_head): 0 in balance, at most 1.

    model: a GPT. pair: 'qk' or 'vo'. Heads that share one are stacked. Raises ValueError where one is the identity.
    """
    gauge.check_pair(model.config, pair[0])
    n_kv_head, found = model.config.kv_heads, []
    for block in read_weights(model, OPTIONS_OF_HEADS).blocks:
        many, shared = (
            (block["o"].weight.T, block["v"].weight) if pair == "vo" else (block["q"].weight, block["k"].weight)
        )
        both = gauge.stack_groups(many, shared, n_kv_head), gauge.split_heads(shared, n_kv_head)
        first, second = (heads.mT @ heads for heads in both)
        distance = torch.linalg.matrix_norm(first - second)
        found.append(distance / (torch.linalg.matrix_norm(first) + torch.linalg.matrix_norm(second)))
    return torch.stack(found)


def along(folder):
    """[(step, GPT)] of a run folder's checkpoints, in order, with the run's initial weights first."""
    paths = [*sorted(folder.glob("step_*.pt")), folder / run_files.CHECKPOINT]
    models = {}
    for path in paths:
        if path.exists():
            state = checkpoint.load(path)
            models[state["step"]] = checkpoint.build_model(state)
    if not models:
        raise ValueError(f"{folder} holds no checkpoint of a run: name a run folder with --run=…")
    if "seed" in state.get("config", {}) and state["config"].get("init_from") == "scratch":
        torch.manual_seed(state["config"]["seed"])
        models.setdefault(0, GPT(GPTConfig(**state["model_config"])))
    return sorted(models.items())


def table(models):
    """The imbalance of [(step, GPT)] as a page.Table, a row each."""
    free = [pair for pair in ("qk", "vo") if gauge.is_free(models[0][1].config, pair[0])]
    if not free:
        raise ValueError(
            "wq_identity, wk_identity or qk_norm, and wv_identity are True: no head has a pair that could be in balance"
        )
    rows = []
    for step, model in models:
        cells = {pair: imbalance(model, pair) for pair in free}
        shown = {pair: [f"{values.mean():.3f}", f"{values.max():.3f}"] for pair, values in cells.items()}
        rows.append([f"{step:,}", *shown.get("qk", ["–", "–"]), *shown.get("vo", ["–", "–"])])
    return page.Table(COLUMNS, rows)


def main(argv):
    """The command; see the module's docstring."""
    cfg = configurator.parse(BalanceConfig, argv)
    print(f"{cfg.run}: ‖G − H‖ / (‖G‖ + ‖H‖) of the Gram matrices of each head's two matrices; 0: in balance\n")
    print(table(along(Path(cfg.run))).markdown())


if __name__ == "__main__":
    configurator.run(main)
