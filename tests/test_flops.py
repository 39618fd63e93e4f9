"""Parameters, operations and cache counted from the options are those of the model that is built from them."""

import contextlib
import dataclasses
import itertools
from unittest import mock

import pytest
import torch
from test_architectures import CHOICES, CONFIG, EVERY, SMALL, configs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import configurator
import cost as cost_command
from engine import decode
from engine.flops import cost
from model import GPT, GPTConfig
from train_config import TrainConfig

NOT_FOR_TRAINING = (
    "basis_transfer",
    "heal_",
    "study_",
)  # how the names of config files begin that train.py does not read
VARIANTS = [path.stem for path in sorted(CONFIG.glob("*.py")) if not path.stem.startswith(NOT_FOR_TRAINING)]
IDENTITIES = [flags for flags in itertools.product((False, True), repeat=3) if not all(flags)]  # of W_Q, W_K and W_V
# Options that `configs` and the flags below do not vary, because a model costs the same with any value.
FREE = {"dropout", "attn_scale", "attn_logit_std", "load_balance"}
NEWER = {"n_expert_active", "query_residual", "query_rotation", "wq_identity_from", "share_kv", "qk_norm", "activation"}
VARIED = {"bias", "tie_weights", "wq_identity", "wk_identity", "wv_identity", "mlp_ratio", "attn_skip", "mlp_skip"}


NEWER_OPTIONS = (
    [dict(activation="swiglu", mlp_ratio=2.625), dict(activation="relu_squared")]
    + [
        dict(wq_identity=True, **changes)
        for changes in (dict(query_residual="linear"), dict(query_residual="mlp"), dict(query_rotation=True))
    ]
    + [dict(wq_identity=True, wq_identity_from=1)]
)


@contextlib.contextmanager
def unset_weights():
    """Within `with`, models are built on the meta device, without drawing initial weights: four times faster."""
    names = ("normal_", "zeros_", "uniform_", "kaiming_uniform_")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(torch.nn.init, name, lambda tensor, *_, **__: tensor))
        stack.enter_context(torch.device("meta"))
        yield


def check_parameters(config):
    """The model has as many parameters as `cost` counts; returns it."""
    with unset_weights():
        built = GPT(config)
    assert (cost(config).total, cost(config).attn_mlp) == built.num_params(), config
    return built


def check_operations(config, built):
    """A forward pass takes as many operations as `cost` counts, here where all experts are computed."""
    config = dataclasses.replace(config, n_expert_active=max(1, config.n_expert))
    idx = torch.zeros(2, config.block_size, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        built.eval()(idx, idx)
    assert counter.get_total_flops() == cost(config).forward_flops * idx.numel(), config


def read(*names):
    """The GPTConfig of config files, by name."""
    return configurator.parse(TrainConfig, [str(CONFIG / f"{name}.py") for name in names]).model_config()


def test_every_option_is_varied_here_or_costs_nothing():
    """A new option of GPTConfig belongs in CHOICES, or in VARIED and a test, or in FREE."""
    chosen = {*SMALL, *CHOICES} - {"skips"}
    assert {field.name for field in dataclasses.fields(GPTConfig)} == chosen | VARIED | NEWER | FREE
    config = GPTConfig(**SMALL, n_expert=3)
    for changes in ({"dropout": 0.3}, {"attn_scale": 2.0}, {"activation": "relu"}, {"load_balance": 1.0}):
        assert cost(dataclasses.replace(config, **changes)) == cost(config)
        check_operations(config, check_parameters(dataclasses.replace(config, **changes)))


@pytest.mark.parametrize("n_active", [1, 2, 3])
def test_the_operations_of_a_mixture_are_those_of_an_mlp_as_wide_as_its_active_experts_and_the_router(n_active):
    mixture = GPTConfig(**SMALL, n_expert=3, n_expert_active=n_active)
    check_parameters(mixture)
    mlp = GPTConfig(**SMALL, mlp_ratio=4.0 * n_active)
    router = 2 * SMALL["n_embd"] * 3
    assert cost(mixture).forward_flops == cost(mlp).forward_flops + SMALL["n_layer"] * router


@pytest.mark.slow
@pytest.mark.parametrize("identities", IDENTITIES, ids=str)
@pytest.mark.parametrize("step", EVERY)
def test_parameters_of_every_architecture(identities, step):
    w_q, w_k, w_v = identities
    flags = dict(wq_identity=w_q, wk_identity=w_k, wv_identity=w_v)
    free = [dict(bias=bias, tie_weights=tied) for bias, tied in itertools.product((False, True), repeat=2)]
    for i, choice in enumerate(configs(step)):
        if choice["n_kv_head"] is None or not (w_k or w_v):
            for changes in free if step == 1 else [free[i % 4]]:
                check_parameters(GPTConfig(**choice, **flags, **changes, mlp_ratio=4.0 if i % 3 else 2.5))


def test_parameters_and_operations_of_architectures_from_the_whole_range():
    for i, choice in enumerate(configs()):
        if i % 29 == 0:
            flags = IDENTITIES[i % 7] if choice["n_kv_head"] is None else (i % 2 == 0, False, False)
            names = ("wq_identity", "wk_identity", "wv_identity")
            flags = dict(zip(names, flags, strict=True), bias=i % 3 == 0, tie_weights=i % 5 != 0)
            config = GPTConfig(**choice, **flags, mlp_ratio=4.0 if i % 4 else 2.5)
            check_operations(config, check_parameters(config))


@pytest.mark.parametrize("changes", NEWER_OPTIONS, ids=str)
def test_parameters_and_operations_of_every_query_and_activation(changes):
    for i, choice in enumerate(configs()):
        if (
            i % 41 == 0
            and not (changes.get("activation") == "swiglu" and choice["n_expert"])
            and not ("wq_identity_from" in changes and choice["share_layers"])
        ):
            config = GPTConfig(**choice, **changes, bias=i % 3 == 0, share_kv=i % 2 == 0, qk_norm=i % 5 == 0)
            check_operations(config, check_parameters(config))


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_and_operations_of_every_config_file(name):
    for files in ([name], ["quick", name], [name, "quick"]):
        config = read(*files)
        check_operations(config, check_parameters(config))


def test_train_py_reads_every_other_config_file():
    assert len(VARIANTS) > 20
    for path in CONFIG.glob("*.py"):
        if path.stem not in VARIANTS:
            with pytest.raises(ValueError):
                read(path.stem)


CHANGES = (
    dict(wq_identity=True),
    dict(n_kv_head=2, pos="rope"),
    dict(n_expert=3, n_expert_active=3, share_layers=True),
    dict(parallel=True, wv_identity=True),
    dict(share_kv=True, wq_identity=True),
    dict(share_kv=True, pos="rope", n_kv_head=2),
    dict(share_kv=True, qk_norm=True),
    dict(wq_identity=True, query_residual="mlp"),
    dict(causal=False, bias=True, tie_weights=False),
)


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_training_takes_three_times_the_operations(changes):
    config = GPTConfig(**SMALL, **changes)
    idx = torch.zeros(2, 12, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        GPT(config)(idx, idx)[1].backward()
    assert counter.get_total_flops() == cost(config).training_flops * idx.numel()


@pytest.mark.parametrize("changes", CHANGES[:-1], ids=str)
def test_the_cache_is_that_of_decoding(changes):
    config = GPTConfig(**SMALL, **changes)
    cache = decode.KVCache(GPT(config).bfloat16(), batch_size=1, max_tokens=7)
    assert sum(tensor[:, :, 0].nbytes for layer in cache.tensors for tensor in layer) == cost(config).kv_cache_bytes
    assert cost(GPTConfig(**SMALL, causal=False)).kv_cache_bytes == 0


def test_the_cost_table_says_what_the_paper_says(command):
    status, out, _ = command(cost_command.main, CONFIG / "baseline_tied.py")
    assert status == 0
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()]
    assert rows[2][1:3] == ["124.4 → 117.3 M (−5.7%)", "84.9 → 77.9 M (−8.3%)"]
    assert rows[2][4] == "36 KiB"
    assert rows[3][:2] == ["an encoder without an LM head", "124.4 → 117.3 M (−5.7%)"]
    saved = [float(row[3].split("−")[1].rstrip("%)")) for row in rows[2:4]]
    assert saved[1] > 1.2 * saved[0]  # of the operations
    caches = {row[0]: row[4] for row in rows[3:]}
    assert (caches["grouped-query, 4 heads, MLP"], caches["multi-query, MLP"]) == ("12 KiB", "3 KiB")


@pytest.mark.parametrize(
    ("size", "millions", "d_k"), [("medium", 355, 64), ("large", 758, 96), ("xl", 1313, 128)], ids=str
)
def test_gpt3_s_sizes(size, millions, d_k):
    config = read(f"gpt3_{size}", "baseline_tied")
    assert round(check_parameters(config).num_params().total / 1e6) == millions
    assert config.d_k == d_k
