"""Every architecture that the paper names, with and without W_Q."""

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from test_model import randomise, with_identity_query
from torch.nn import functional as F

import configurator
import data
import model
import prepare_owt
import sample
import train
from engine import checkpoint, run_files
from engine.files import sha256_of
from model import GPT, GPTConfig

CONFIG = Path(__file__).resolve().parents[1] / "config"
OVERLAYS = ("rope", "gqa", "mqa", "rmsnorm", "dyt", "nonorm", "parallel", "shared", "moe", "encoder")
OVERLAYS += ("share_kv", "qk_norm", "modern")
QUERIES = ("residual_linear_tied", "residual_mlp_tied", "rotated_tied", "reduced_tied_from1")
SMALL = dict(block_size=12, vocab_size=29, n_layer=2, n_head=4, n_embd=16)
CHOICES = dict(
    norm=("layernorm", "rmsnorm", "dyt", "none"),
    pos=("learned", "rope", "none"),
    n_kv_head=(None, 2, 1),
    skips=((True, True), (True, False), (False, True), (False, False)),
    parallel=(False, True),
    share_layers=(False, True),
    causal=(True, False),
    n_expert=(0, 3),
)


# Of the combinations, each fifth is tried by default (no number of choices is a multiple of five), all with -m long.
EVERY = (5, pytest.param(1, marks=pytest.mark.long))


def configs(step=1):
    """Every valid combination of CHOICES, or each step-th of all, as keyword arguments of GPTConfig."""
    for values in itertools.islice(itertools.product(*CHOICES.values()), 0, None, step):
        choice = dict(zip(CHOICES, values, strict=True))
        choice["attn_skip"], choice["mlp_skip"] = choice.pop("skips")
        if not choice["parallel"] or choice["attn_skip"] == choice["mlp_skip"]:
            yield {**SMALL, **choice}


@pytest.mark.slow
@pytest.mark.parametrize("step", EVERY)
def test_identity_is_the_baseline_with_its_query_block_set_to_the_identity_in_every_architecture(step):
    for i, choice in enumerate(configs(step)):
        torch.manual_seed(i)
        # The other flags take turns: doubling the product for each would buy nothing.
        config = GPTConfig(**choice, wq_identity=True, bias=i % 2 == 0, tie_weights=i % 3 == 0, attn_scale=0.5 + i % 2)
        reduced = randomise(GPT(config)).double()
        full = with_identity_query(reduced).double()
        idx = torch.randint(29, (2, 12))
        with torch.no_grad():
            logits, expected = reduced(idx, idx)[0], full(idx, idx)[0]
        torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10, msg=str(config))
        n_block = 1 if config.share_layers else 2
        assert full.num_params().total - reduced.num_params().total == n_block * (16 * 16 + 16 * config.bias)
    assert step > 1 or i + 1 == 4 * 3 * 3 * (4 + 2) * 2 * 2 * 2


@pytest.mark.parametrize("which", ["wk_identity", "wv_identity"])
def test_the_other_identities_replace_their_block_alone(which):
    torch.manual_seed(0)
    config = GPTConfig(**SMALL, **{which: True})
    reduced = randomise(GPT(config)).double()
    full = GPT(dataclasses.replace(config, **{which: False})).double().eval()
    state = dict(reduced.state_dict())
    for name in [name for name in state if name.endswith("c_attn.weight")]:
        first, second = state[name].chunk(2)
        identity = torch.eye(16, dtype=torch.float64)
        blocks = (first, identity, second) if which == "wk_identity" else (first, second, identity)
        state[name] = torch.cat(blocks)
    full.load_state_dict(state)
    idx = torch.randint(29, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(reduced(idx, idx)[0], full(idx, idx)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_rotary_grouped_attention_is_llama_s(n_kv_head):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    torch.manual_seed(1)
    d, T = 32, 20
    theirs_config = LlamaConfig(
        hidden_size=d,
        num_attention_heads=4,
        num_key_value_heads=n_kv_head,
        max_position_embeddings=T,
        attention_bias=False,
        attn_implementation="eager",
    )
    theirs = llama.LlamaAttention(theirs_config, layer_idx=0).eval()
    ours = model.SelfAttention(GPTConfig(block_size=T, n_head=4, n_embd=d, n_kv_head=n_kv_head, pos="rope")).eval()
    with torch.no_grad():
        blocks = [theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight]
        ours.c_attn.weight.copy_(torch.cat([block.normal_() for block in blocks]))
        ours.c_proj.weight.copy_(theirs.o_proj.weight.normal_())
        x = torch.randn(2, T, d)
        angles = llama.LlamaRotaryEmbedding(theirs_config)(x, torch.arange(T)[None])
        mask = torch.full((T, T), -math.inf).triu(1)[None, None]
        expected, _ = theirs(x, position_embeddings=angles, attention_mask=mask)
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)


def test_rotation_depends_on_distance_alone():
    torch.manual_seed(2)
    rotate = model.Rotary(8, 40).double()
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    products = rotate(q.expand(1, 1, 40, 8))[0, 0] @ rotate(k.expand(1, 1, 40, 8))[0, 0].T
    for distance in (0, 1, 7):
        along = products.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=0, atol=1e-5)  # its table is float32


@pytest.mark.parametrize("causal", [True, False])
def test_grouped_query_attention_is_each_group_s_own(causal):
    torch.manual_seed(3)
    attention = model.SelfAttention(GPTConfig(block_size=9, n_head=4, n_embd=16, n_kv_head=2, causal=causal)).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    q, k, v = (x @ attention.c_attn.weight.T).split([16, 8, 8], dim=-1)
    heads = []
    for head in range(4):
        own, shared = slice(4 * head, 4 * head + 4), slice(4 * (head // 2), 4 * (head // 2) + 4)
        logits = q[..., own] @ k[..., shared].transpose(1, 2) / 2
        if causal:
            logits = logits.masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
        heads.append(logits.softmax(-1) @ v[..., shared])
    torch.testing.assert_close(attention(x), torch.cat(heads, -1) @ attention.c_proj.weight.T)


def test_norms_are_what_their_papers_say():
    torch.manual_seed(4)
    x = torch.randn(3, 16) * 2
    config = GPTConfig(**SMALL)
    rms, dyt = model.NORMS["rmsnorm"](config), model.NORMS["dyt"](config)
    weight = torch.rand(16)
    with torch.no_grad():
        rms.weight.copy_(weight)
        torch.testing.assert_close(dyt(x), torch.tanh(0.5 * x))
        dyt.weight.copy_(weight)
        dyt.bias.fill_(0.3)
        dyt.alpha.fill_(1.5)
    assert isinstance(rms, torch.nn.RMSNorm)
    torch.testing.assert_close(rms(x), weight * x / x.square().mean(-1, keepdim=True).add(1e-5).sqrt())
    torch.testing.assert_close(dyt(x), weight * torch.tanh(1.5 * x) + 0.3)


@pytest.mark.parametrize("n_active", [1, 2, 4])
def test_a_mixture_of_experts_is_the_weighted_sum_of_the_chosen_mlps(n_active):
    torch.manual_seed(5)
    config = GPTConfig(**SMALL, n_expert=4, n_expert_active=n_active)
    mixture = randomise(model.MixtureOfExperts(config).double())
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    p = (x @ mixture.router.weight.T).softmax(-1)
    expected, counts = torch.zeros_like(x), torch.zeros(4, dtype=torch.float64)
    for b, t in itertools.product(range(2), range(6)):
        for expert in p[b, t].argsort(descending=True)[:n_active].tolist():
            rows = slice(64 * expert, 64 * expert + 64)
            hidden = F.gelu(mixture.c_fc.weight[rows] @ x[b, t])
            expected[b, t] += p[b, t, expert] * (mixture.c_proj.weight[:, rows] @ hidden)
            counts[expert] += 1
    found, balance_loss = mixture(x)
    torch.testing.assert_close(found, expected)
    balance = 4 * (counts / counts.sum() * p.mean((0, 1))).sum()
    torch.testing.assert_close(balance_loss, balance)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped products")
@pytest.mark.parametrize(("n_expert", "n_active"), [(4, 1), (4, 2), (3, 3), (40, 2)])
def test_in_bfloat16_the_active_experts_alone_are_as_exact_as_all(n_expert, n_active, monkeypatch):
    torch.manual_seed(8)
    options = dict(SMALL, n_embd=32, n_expert=n_expert, n_expert_active=n_active)
    grouped = randomise(model.MixtureOfExperts(GPTConfig(**options))).bfloat16().float()
    assert grouped.can_group
    monkeypatch.setattr(model, "is_fast", lambda logits: logits.dtype == torch.bfloat16)  # as on a GPU
    monkeypatch.setattr(model, "can_group", lambda config: False)
    dense = model.MixtureOfExperts(GPTConfig(**options))
    dense.load_state_dict(grouped.state_dict())
    x = torch.randn(3, 12, 32).bfloat16().float()  # 36 tokens, fewer than 40 experts: some have none

    def results(mixture, in_bfloat16):
        """Output, the balance loss, and the gradients of both in the input and in each parameter."""
        inputs = x.clone().requires_grad_()
        mixture.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
            out, balance_loss = mixture(inputs)
        (out.float().square().sum() + balance_loss).backward()
        return [out, balance_loss, inputs.grad, *(parameter.grad.clone() for parameter in mixture.parameters())]

    exact = results(dense, False)
    for ours, theirs, expected in zip(results(grouped, True), results(dense, True), exact, strict=True):
        assert (ours - expected).norm() <= 2 * (theirs - expected).norm() + 1e-3 * expected.norm()
        assert (theirs - expected).norm() <= 0.1 * expected.norm(), "the same experts were chosen"


def test_widths_without_grouped_products_compute_all_experts(monkeypatch):
    monkeypatch.setattr(model, "is_fast", lambda logits: True)
    for changes in (dict(n_embd=36, n_head=4), dict(mlp_ratio=2.75), dict(bias=True)):
        mixture = model.MixtureOfExperts(GPTConfig(**{**SMALL, "n_expert": 3, **changes}))
        assert not mixture.can_group
        with torch.autocast("cpu", torch.bfloat16):
            assert mixture(torch.randn(2, 5, mixture.c_fc.in_features))[0].dtype == torch.bfloat16


def test_the_balance_loss_is_the_one_of_transformers():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    torch.manual_seed(6)
    mixture = model.MixtureOfExperts(GPTConfig(**SMALL, n_expert=4, n_expert_active=2))
    x = torch.randn(3, 12, 16) * 30
    _, balance_loss = mixture(x)
    theirs = mixtral.load_balancing_loss_func((mixture.router(x).flatten(0, 1),), num_experts=4, top_k=2)
    torch.testing.assert_close(balance_loss, theirs / 2)  # theirs counts each token once for every choice


def test_the_balance_loss_counts_in_training_only_and_reaches_the_router():
    torch.manual_seed(7)
    gpt = GPT(GPTConfig(**SMALL, n_expert=4, n_expert_active=1, load_balance=0.5, share_layers=True))
    idx = torch.randint(29, (2, 12))
    _, plain = gpt.eval()(idx, idx)
    _, loss = gpt.train()(idx, idx)
    assert loss.item() == pytest.approx(plain.item() + 0.5, abs=0.05)  # at the start experts are nearly balanced
    loss.backward()
    assert gpt.transformer.h[0].mlp.router.weight.grad.abs().sum() > 0


def test_an_encoder_sees_both_sides_and_a_decoder_one():
    torch.manual_seed(8)
    idx = torch.randint(29, (1, 12))
    changed = idx.clone()
    changed[0, -1] = (idx[0, -1] + 1) % 29
    for causal in (True, False):
        gpt = randomise(GPT(GPTConfig(**SMALL, causal=causal)))
        with torch.no_grad():
            difference = gpt(idx, idx)[0] - gpt(changed, changed)[0]
        assert (difference[0, 0].abs().max() == 0) == causal


def test_shared_layers_are_one_block_applied_again():
    torch.manual_seed(9)
    shared = randomise(GPT(GPTConfig(**{**SMALL, "n_layer": 3}, share_layers=True)))
    separate = GPT(GPTConfig(**{**SMALL, "n_layer": 3})).eval()
    state = {}
    for name, tensor in shared.state_dict().items():
        for layer in range(3):
            state[name.replace(".h.0.", f".h.{layer}.")] = tensor
    separate.load_state_dict(state)
    idx = torch.randint(29, (2, 12))
    with torch.no_grad():
        assert torch.equal(shared(idx, idx)[0], separate(idx, idx)[0])


def test_skips_and_parallel_blocks_are_the_formulas():
    torch.manual_seed(10)
    x = torch.randn(2, 12, 16)
    for attn_skip, mlp_skip in itertools.product((0, 1), (0, 1)):
        block = randomise(model.Block(GPTConfig(**SMALL, attn_skip=bool(attn_skip), mlp_skip=bool(mlp_skip))))
        y = attn_skip * x + block.attn(block.ln_1(x))
        torch.testing.assert_close(block(x)[0], mlp_skip * y + block.mlp(block.ln_2(y)))
    block = randomise(model.ParallelBlock(GPTConfig(**SMALL, parallel=True)))
    torch.testing.assert_close(block(x)[0], x + block.attn(block.ln_1(x)) + block.mlp(block.ln_1(x)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(n_kv_head=3), ["n_kv_head=3", "n_head=4", "1, 2, 4"]),
        (dict(n_kv_head=2, wk_identity=True), ["wk_identity", "n_kv_head"]),
        (dict(wq_identity=True, wk_identity=True, wv_identity=True), ["at most two"]),
        (dict(pos="rope", n_embd=12), ["rope", "even"]),
        (dict(parallel=True, mlp_skip=False), ["parallel", "attn_skip", "mlp_skip"]),
        (dict(n_expert=2, n_expert_active=3), ["n_expert_active=3", "n_expert=2"]),
        (dict(n_expert=-1), ["n_expert must be zero or positive, got -1"]),
        (dict(norm="batchnorm"), ["norm", "rmsnorm"]),
        (dict(pos="alibi"), ["pos", "rope"]),
    ],
)
def test_architectures_that_cannot_be_built_are_refused(changes, words):
    with pytest.raises(ValueError) as refusal:
        GPTConfig(**{**SMALL, **changes})
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_masks_hide_15_percent_the_way_bert_does():
    x = torch.randint(0, 50, (200, 100))
    inputs, targets = data.mask_tokens(x, 50, data_seed=3, numbers=range(200))
    predicted = targets >= 0
    assert (predicted.sum(1) == 15).all()
    assert torch.equal(targets[predicted], x[predicted])
    assert torch.equal(inputs[~predicted], x[~predicted])
    masked = (inputs[predicted] == 50).float().mean().item()
    own = (inputs[predicted] == x[predicted]).float().mean().item()
    assert masked == pytest.approx(0.8, abs=0.03)
    assert own == pytest.approx(0.1 + 0.1 / 50, abs=0.03)
    assert inputs.max() == 50
    again, _ = data.mask_tokens(x[50:60], 50, data_seed=3, numbers=range(50, 60))
    assert torch.equal(again, inputs[50:60]), "the masks of a sequence are its own"
    other, _ = data.mask_tokens(x, 50, data_seed=4, numbers=range(200))
    assert not torch.equal(other, inputs)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(causal=False), ["objective=clm", "causal=False"]),
        (dict(objective="mlm"), ["objective=mlm", "causal=True"]),
        (dict(objective="mlm", causal=False, vocab_size=50), ["vocab_size=51", "objective=mlm"]),
    ],
)
def test_objectives_that_do_not_fit_are_refused(tiny, changes, words):
    with pytest.raises(ValueError) as refusal:
        train.Trainer(tiny(**changes))
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """The embedded corpus, prepared once, with a short validation split."""
    folder = tmp_path_factory.mktemp("data")
    prepare_owt.main(["--source=stdlib", f"--out_dir={folder / 'whole'}"])
    bins = data.load_bins(folder, "whole")
    (folder / "stdlib").mkdir()
    splits = {}
    for split, tokens in (("train", bins.train), ("val", bins.val[:20_000])):
        path = folder / "stdlib" / f"{split}.bin"
        tokens.tofile(path)
        splits[split] = {"tokens": len(tokens), "sha256": sha256_of(path)}
    data.write_manifest(folder / "stdlib", **{**bins.manifest, "splits": splits})
    return folder


@pytest.mark.parametrize(
    ("overlay", "variant"),
    [*itertools.product(OVERLAYS, ("baseline_tied", "reduced_tied")), *itertools.product(("rope",), QUERIES)],
)
def test_every_overlay_trains_resumes_and_generates(overlay, variant, data_dir, tmp_path, monkeypatch, refuses):
    monkeypatch.chdir(tmp_path)
    files = [str(CONFIG / f"{name}.py") for name in ("quick", overlay, variant)]
    size = "--n_layer=2 --n_embd=32 --block_size=32 --tokens_per_step=512 --batch_size=8 --eval_windows=16"
    schedule = "--max_iters=16 --warmup_iters=2 --learning_rate=1e-2 --eval_interval=8 --log_interval=1 --dtype=float32"
    cfg = configurator.parse(train.TrainConfig, [*files, *size.split(), *schedule.split(), f"--data_dir={data_dir}"])

    straight = train.train(dataclasses.replace(cfg, out_dir="straight"))
    update = train.Trainer.update

    def update_and_stop(self, *batch):
        done = update(self, *batch)
        if self.step == 11:
            raise KeyboardInterrupt
        return done

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "update", update_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train.train(dataclasses.replace(cfg, out_dir="parts"))
    train.train(dataclasses.replace(cfg, out_dir="parts", resume=True))
    weights = [checkpoint.load(f"{name}/ckpt.pt")["model"] for name in ("straight", "parts")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    losses = [record["val_loss"] for record in run_files.read_metrics("straight") if record["kind"] == "eval"]
    assert losses[-1] < losses[0] - 0.7
    assert math.isfinite(straight["val_loss"])

    if overlay == "encoder":
        refuses(sample.main, "--out_dir=straight", words=["straight/ckpt.pt is an encoder"])
    else:
        (text,) = sample.sample(sample.SampleConfig(out_dir="straight", start="def ", num_samples=1, max_new_tokens=40))
        assert text.startswith("def ")
