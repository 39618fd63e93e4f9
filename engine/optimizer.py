"""The optimizer of a run: AdamW, or Muon for the matrices of the blocks beside AdamW for the rest."""

import torch


def make_optimizer(model, cfg, device_type):
    """The optimizer of cfg.optimizer, with a group for each row of Table 2 (attention, MLP, embeddings).

    1-D parameters do not decay. muon (torch.optim.Muon, arXiv 2502.16982) takes the matrices of the blocks, each
    orthogonalised as it is stored: W_Q, W_K and W_V of a layer together. Its steps are scaled to the size of AdamW's,
    so that learning_rate and weight_decay mean the same. Raises ValueError where torch has no Muon.
    """
    decays = {".attn.": cfg.weight_decay_attn, ".mlp.": cfg.weight_decay_mlp, "": cfg.weight_decay_embd, "1-D": 0.0}
    groups = {
        kind: {"params": [], "weight_decay": cfg.weight_decay if decay is None else decay}
        for kind, decay in decays.items()
    }
    for name, parameter in model.named_parameters():
        kind = "1-D" if parameter.dim() < 2 else next(kind for kind in groups if kind in name)
        groups[kind]["params"].append(parameter)
    of_muon = (".attn.", ".mlp.") if cfg.optimizer == "muon" else ()
    parts = [
        [group for kind, group in groups.items() if group["params"] and (kind in of_muon) == is_muon]
        for is_muon in (False, True)
    ]
    betas, fused = (cfg.beta1, cfg.beta2), device_type in ("cpu", "cuda")
    adamw = torch.optim.AdamW(parts[0], lr=cfg.learning_rate, betas=betas, fused=fused)
    if not of_muon:
        return adamw
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"optimizer=muon needs a torch that has torch.optim.Muon, got {torch.__version__}: use adamw")
    muon = torch.optim.Muon(parts[1], lr=cfg.learning_rate, adjust_lr_fn="match_rms_adamw")
    return SideBySide(muon, adamw)


class SideBySide:
    """Optimizers of different parameters as one, with one state dict: parameters and groups are numbered through."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers

    @property
    def param_groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self):
        state, groups, first = {}, [], 0
        for optimizer in self.optimizers:
            own = optimizer.state_dict()
            state |= {first + index: entry for index, entry in own["state"].items()}
            groups += [
                group | {"params": [first + index for index in group["params"]]} for group in own["param_groups"]
            ]
            first += sum(len(group["params"]) for group in own["param_groups"])
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state):
        groups, first = list(state["param_groups"]), 0
        for optimizer in self.optimizers:
            own, groups = groups[: len(optimizer.param_groups)], groups[len(optimizer.param_groups) :]
            indices = {index: index - first for group in own for index in group["params"]}
            optimizer.load_state_dict(
                {
                    "state": {indices[index]: entry for index, entry in state["state"].items() if index in indices},
                    "param_groups": [
                        group | {"params": [indices[index] for index in group["params"]]} for group in own
                    ],
                }
            )
            first += len(indices)
