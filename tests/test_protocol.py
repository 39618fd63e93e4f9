"""The paper's numbers, each with the place that has it, against all defaults, configurations and what they build."""

import dataclasses

import pytest
import torch

import configurator
import train
from configurator import ROOT
from model import GPT, GPTConfig
from theory.basis_transfer import BasisTransferConfig
from train_config import TrainConfig

MODEL = {  # Section 5.2.1, "Model architecture"
    **dict(n_layer=12, n_head=12, n_kv_head=None, n_embd=768, mlp_ratio=4.0, block_size=1024),
    **dict(activation="gelu", norm="layernorm", pos="learned", bias=False, dropout=0.0),
    **dict(attn_skip=True, mlp_skip=True, parallel=False, share_layers=False, causal=True, n_expert=0),
    **dict(wk_identity=False, wv_identity=False, share_kv=False, qk_norm=False, attn_logit_std=None),
    **dict(query_residual=None, query_rotation=False, wq_identity_from=0),
    "vocab_size": 50304,  # its 50,257 to a multiple of 64, as in the authors' configurations
}
TRAINING = {
    **dict(dataset="openwebtext", objective="clm", beta1=0.9, beta2=0.95, grad_clip=1.0),  # Section 5.2.1, "Training"
    **dict(schedule="cosine", decay_lr=True, decay_iters=None),  # the same: "warmup, cosine decay schedule"
    **dict(learning_rate=6e-4, warmup_iters=2000, min_lr=None, lr_decay_iters=600_000),  # the authors' configurations,
    **dict(max_iters=105_000, tokens_per_step=480 * 1024, init_from="scratch"),  # which have the rest, too
    **dict(save_steps=(50_000, 100_000, 105_000), eval_interval=1000, eval_windows=200 * 12),
    **dict.fromkeys(("weight_decay_attn", "weight_decay_mlp", "weight_decay_embd")),  # Section 5.2.2: all parameters
}
COLUMNS = {  # Table 2: scale · √64, decay of attention, MLP and embedding, whether W_Q is trained, tied, parameters
    "baseline_tied": (1.0, 0.1, True, True, 124e6, 86e6),
    "reduced_tied": (0.5, 2**-5, False, True, 117e6, 79e6),
    "baseline_untied": (1.0, 0.1, True, False, 163e6, 86e6),
    "reduced_untied": (0.5, 2**-5, False, False, 156e6, 79e6),
}
SECTION_5_1 = {  # "Experimental setup" and "Results"
    **dict(steps=20_000, batch=65_536, learning_rate=5e-3, weight_decay=0.1, grad_clip=3.0, h=(256, 512, 768)),
    **dict(ridge=1e-6, linear_samples=500_000, test_samples=32_768, activation="gelu", width_ratio=4.0),
    "targets": ("paper",),
}
# What a size or an architecture is about, and so may set; every other configuration has the paper's values.
GPT3 = {"n_layer", "n_head", "n_embd", "learning_rate", "recompute"}
CHANGES = {
    **{"quick": {"dataset", "vocab_size", "n_layer", "n_head", "n_embd", "block_size", "tokens_per_step", "max_iters"}},
    **{"gpt3_medium": GPT3, "gpt3_large": GPT3, "gpt3_xl": GPT3},
    **{"encoder": {"causal", "objective"}, "moe": {"n_expert", "n_expert_active"}, "parallel": {"parallel"}},
    **{"rope": {"pos"}, "rmsnorm": {"norm"}, "dyt": {"norm"}, "nonorm": {"norm"}, "shared": {"share_layers"}},
    **{
        "modern": {"pos", "norm", "qk_norm", "activation"},
        "share_kv": {"share_kv"},
        "qk_norm": {"qk_norm"},
        "residual_linear_tied": {"query_residual"},
    },
    **{"residual_mlp_tied": {"query_residual"}, "rotated_tied": {"query_rotation"}},
    **{"reduced_tied_from1": {"wq_identity_from"}},
    **{"gqa": {"n_kv_head"}, "mqa": {"n_kv_head"}, "attn_skip_only": {"norm", "mlp_skip"}},
    **{f"{column}_d744": {"n_embd"} for column in COLUMNS},
    **{f"{column}_mlp3p5": {"mlp_ratio"} for column in COLUMNS},
    **{f"{column}_mlp4p5": {"mlp_ratio"} for column in COLUMNS},
}
CHANGES["quick"] |= {"lr_decay_iters", "learning_rate", "warmup_iters", "eval_interval", "eval_windows", "save_steps"}
CONFIGS = sorted(path.stem for path in ROOT.glob("config/*.py"))
OF_TRAIN = [name for name in CONFIGS if not name.startswith(("study_", "heal_", "basis_transfer"))]


def resolved(*names, schema=TrainConfig):
    return configurator.parse(schema, [str(ROOT / "config" / f"{name}.py") for name in names])


def departures(config, expected):
    """The fields of a dataclass that do not have the expected values."""
    return {name for name, value in expected.items() if getattr(config, name) != value}


def test_the_defaults_are_the_paper_s():
    assert departures(GPTConfig(), MODEL) == departures(TrainConfig(), MODEL | TRAINING) == set()
    assert departures(BasisTransferConfig(), SECTION_5_1) == set()


@pytest.mark.parametrize("name", OF_TRAIN)
def test_a_configuration_departs_from_the_paper_in_what_it_is_about_alone(name):
    assert departures(resolved(name), MODEL | TRAINING) <= CHANGES.get(name, set())
    column = next((column for column in COLUMNS if name.startswith(column)), None)
    if column:
        scale, decay, has_query, tied, *_ = COLUMNS[column]
        expected = dict(attn_scale=scale, weight_decay=decay, wq_identity=not has_query, tie_weights=tied)
        assert departures(resolved(name), expected) == set()


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("basis_transfer")])
def test_section_5_1_departs_from_the_paper_in_its_size_alone(name):
    size = {"h", "steps", "batch"} if name.endswith("_quick") else set()
    assert departures(resolved(name, schema=BasisTransferConfig), SECTION_5_1) <= size


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_of_table_2_is_built_and_trained_as_it_says(name):
    cfg = resolved(name)
    scale, decay, has_query, tied, total, attn_mlp = COLUMNS[name]
    with torch.device("meta"):
        model = GPT(cfg.model_config())
    attention = model.transformer.h[0].attn
    of_the_column = {"attn_scale", "weight_decay", "wq_identity", "tie_weights"}
    assert departures(cfg, dataclasses.asdict(TrainConfig(data_seed=cfg.data_seed))) <= of_the_column
    assert len(model.transformer.h) == 12
    assert attention.scale == scale / 64**0.5
    assert attention.c_attn.weight.shape == ((3 if has_query else 2) * 768, 768)
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied
    counts = model.num_params()
    assert counts.total == pytest.approx(total, abs=0.5e6)
    assert counts.attn_mlp + 1024 * 768 == pytest.approx(attn_mlp, abs=0.5e6)  # with the position embedding
    optimizer = train.make_optimizer(model, cfg, "meta")
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {decays[id(p)] for p in model.parameters() if p.dim() >= 2} == {decay}
    assert {decays[id(p)] for p in model.parameters() if p.dim() < 2} == {0.0}  # the authors' code; the text has none
    assert cfg.learning_rate_at(2000) == pytest.approx(6e-4) == max(map(cfg.learning_rate_at, range(0, 105_000, 100)))
    assert cfg.learning_rate_at(600_000) == pytest.approx(6e-5)
    assert cfg.tokens_per_step * cfg.max_iters == pytest.approx(51.6e9, rel=1e-3)
