"""A model of ours in a stock class of transformers: the same logits and greedy tokens, and the same weights back."""

import dataclasses
import itertools
import random

import pytest
import torch

from engine import decode, hf_classes, hf_folders
from model import GPT, GPTConfig

transformers = pytest.importorskip("transformers")
SIZES = dict(block_size=32, vocab_size=29, n_layer=2, n_head=4, n_embd=16)
GRID = dict(
    norm=("layernorm", "rmsnorm"),
    pos=("learned", "rope", "none"),
    parallel=(False, True),
    n_kv_head=(None, 2, 1),
    bias=(False, True),
    activation=("gelu", "gelu_tanh", "relu", "relu_squared", "swiglu"),
    wq_identity=(False, True),
    attn_scale=(1.0, 0.7),
    mlp_ratio=(4.0, 4.5),
    tie_weights=(True, False),
)
QUERIES = [
    dict(wq_identity=True, wq_identity_from=1, attn_scale=0.7),
    dict(wq_identity=True, wq_identity_from=1, attn_scale=0.5, bias=True),
    dict(wq_identity=True, query_residual="linear", attn_scale=0.7, bias=True),
    dict(wq_identity=True, query_rotation=True, attn_scale=0.7),
    dict(wq_identity=True, attn_logit_std="paper"),
    dict(wk_identity=True, bias=True, attn_scale=0.5),
    dict(wv_identity=True, wq_identity=True, bias=True, pos="rope"),
    dict(share_kv=True, bias=True, pos="rope", norm="rmsnorm", n_kv_head=2),
    dict(share_kv=True, n_kv_head=2),
    dict(share_layers=True, wq_identity=True, attn_scale=0.7),
    dict(share_layers=True, bias=True, pos="rope", parallel=True),
    *(
        dict(causal=False, pos="rope", norm="rmsnorm", **more)
        for more in (dict(), dict(bias=True, wq_identity=True, attn_scale=0.7, n_kv_head=2), dict(tie_weights=False))
    ),
]


def random_model(**changes):
    """A GPT whose weights are large enough for every part of it to matter."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SIZES, **changes})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def models_of(stock, most=7):
    """Options of models that a class holds: a sample of the grid."""
    every = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
    fitting = [choice for choice in every if stock.fits(GPTConfig(**SIZES, **choice))]
    return random.Random(0).sample(fitting, min(most, len(fitting)))


def loaded(folder, model):
    kind = transformers.AutoModelForCausalLM if model.config.causal else transformers.AutoModelForMaskedLM
    with hf_folders.quiet():
        return kind.from_pretrained(folder)


def assert_round_trip(folder, model):
    """An export has the model's logits and greedy tokens, and is imported as the model that it was."""
    n_vocab = model.config.vocab_size
    hf_folders.write(folder, model, n_vocab, 0, {})
    theirs = loaded(folder, model)
    assert type(theirs).__name__ == hf_classes.class_of(model.config).name
    tokens = torch.randint(n_vocab, (3, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, _ = model(tokens, tokens)
        assert (theirs(tokens).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    if model.config.causal:
        theirs.generation_config.eos_token_id = None
        ones = torch.ones_like(tokens[:, :5])
        taken = theirs.generate(tokens[:, :5], attention_mask=ones, max_new_tokens=20, do_sample=False)
        assert taken.tolist() == decode.generate(model, tokens[:, :5], 20, temperature=0).tolist()

    stock, settings, weights, record = hf_folders.read(folder)
    config, state = hf_classes.ours_from(stock, settings, weights, record["model_config"])
    kinds = {model.config.query(layer) for layer in range(2)}
    is_exact = model.config.attn_scale in (0.5, 1.0) and kinds <= {"trained", "identity"}
    if kinds == {"identity"} or is_exact:
        assert config == model.config
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
        return
    folded = dict(wq_identity=False, wq_identity_from=0, query_residual=None, query_rotation=False, attn_scale=1.0)
    assert config == dataclasses.replace(model.config, **folded)
    for name, tensor in model.state_dict().items():
        if ".c_attn." not in name:
            assert torch.equal(state[name], tensor)
            continue
        attention = model.get_submodule(name.rpartition(".c_attn.")[0])
        _, k, v = attention.split_qkv(tensor, dim=0)
        assert torch.equal(state[name][16:], torch.cat([k, v]))
    rebuilt = GPT(config).eval()
    rebuilt.load_state_dict(state)
    with torch.no_grad():
        assert torch.allclose(rebuilt(tokens, tokens)[0], expected, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("stock", hf_classes.CLASSES[:6], ids=lambda stock: stock.name)
def test_a_sample_of_the_grid(tmp_path, stock):
    for number, choice in enumerate(models_of(stock)):
        assert_round_trip(tmp_path / str(number), random_model(**choice))


@pytest.mark.long
@pytest.mark.parametrize("stock", hf_classes.CLASSES[:6], ids=lambda stock: stock.name)
def test_the_whole_grid(tmp_path, stock):
    for number, choice in enumerate(models_of(stock, most=10**6)):
        assert_round_trip(tmp_path / str(number), random_model(**choice))


@pytest.mark.parametrize("choice", QUERIES, ids=str)
def test_other_queries_keys_and_values_shared_layers_and_encoders(tmp_path, choice):
    assert_round_trip(tmp_path, random_model(**choice))


def test_the_padded_part_of_the_vocabulary_is_left_out(tmp_path):
    for number, tie_weights in enumerate((True, False)):
        model = random_model(tie_weights=tie_weights)
        hf_folders.write(tmp_path / str(number), model, 23, 22, {})
        theirs = loaded(tmp_path / str(number), model)
        tokens = torch.randint(23, (2, 32))
        with torch.no_grad():
            expected = model(tokens, tokens)[0][..., :23]
            assert torch.allclose(theirs(tokens).logits, expected, atol=1e-5 * expected.abs().max().item())
        assert theirs.get_output_embeddings().weight.shape == (23, 16)
        settings = theirs.config, theirs.generation_config
        assert all((each.bos_token_id, each.eos_token_id) == (22, 22) for each in settings)
        assert theirs.config.n_ctx == 32


def test_what_training_needs_is_in_the_configuration(tmp_path):
    model = random_model(dropout=0.3)
    hf_folders.write(tmp_path, model, 29, 0, {})
    theirs = loaded(tmp_path, model)
    assert {module.p for module in theirs.modules() if isinstance(module, torch.nn.Dropout)} == {0.3}


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (dict(norm="dyt"), "norm=dyt has no class in transformers: no stock class has Dynamic Tanh"),
        (dict(norm="none"), "norm=none"),
        (dict(n_expert=2), "n_expert=2 has no class in transformers: the experts of stock mixtures"),
        (dict(attn_skip=False), "attn_skip=False"),
        (dict(mlp_skip=False), "mlp_skip=False"),
        (dict(qk_norm=True), "qk_norm=True"),
        (dict(wq_identity=True, query_residual="mlp"), "query_residual=mlp"),
        (dict(norm="rmsnorm"), "norm=rmsnorm, pos=learned, parallel=False, causal=True"),
        (dict(activation="swiglu"), "activation=swiglu has no class in transformers: the stock class with such a gate"),
        (dict(parallel=True), "pos=learned, parallel=True, causal=True, activation=gelu has no class in transformers"),
        (dict(parallel=True, pos="rope", norm="rmsnorm"), "norm=rmsnorm, pos=rope, parallel=True"),
        (dict(causal=False), "norm=layernorm, pos=learned, parallel=False, causal=False"),
    ],
    ids=str,
)
def test_what_no_class_holds_is_refused_with_the_reason(choice, words):
    with pytest.raises(ValueError, match=words):
        hf_classes.class_of(GPTConfig(**SIZES, **choice))


def test_an_option_that_is_new_to_the_export_is_refused_unless_it_has_its_default():
    fields = [("sink", bool, dataclasses.field(default=False))]
    later = dataclasses.make_dataclass("Later", fields, bases=(GPTConfig,))
    assert hf_classes.class_of(later(**SIZES)).name == "GPT2LMHeadModel"
    with pytest.raises(
        ValueError, match="sink=True has no class in transformers: the export does not know this option"
    ):
        hf_classes.class_of(later(**SIZES, sink=True))


def test_a_fine_tuned_export_comes_back_with_its_query_matrix(tmp_path):
    model = random_model(wq_identity=True, attn_scale=0.5, pos="none")
    hf_folders.write(tmp_path / "export", model, 29, 0, {})
    theirs = loaded(tmp_path / "export", model)
    for parameter in theirs.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    with hf_folders.quiet():
        theirs.save_pretrained(tmp_path / "tuned")
    stock, settings, weights, record = hf_folders.read(tmp_path / "tuned")
    config, state = hf_classes.ours_from(stock, settings, weights, record["model_config"])
    assert (config.wq_identity, config.bias, config.pos) == (False, True, "learned")
    rebuilt = GPT(config).eval()
    rebuilt.load_state_dict(state)
    assert hf_folders.compare(rebuilt, theirs, 29)["greedy"] == 20


@pytest.mark.parametrize("spoil", ["activation_function", "c_attn", "n_head"])
def test_another_model_is_seen_by_the_comparison(tmp_path, spoil):
    model = random_model()
    hf_folders.write(tmp_path, model, 29, 0, {})
    theirs = loaded(tmp_path, model)
    if spoil == "c_attn":
        theirs.transformer.h[1].attn.c_attn.weight.data[0, 0] *= 1.001
    else:
        changed = {"activation_function": "gelu_new", "n_head": 2}[spoil]
        setattr(theirs.config, spoil, changed)
        with hf_folders.quiet():
            theirs = type(theirs).from_pretrained(tmp_path, config=theirs.config)
    with pytest.raises(ValueError, match="the logits of transformers must be ours up to 1e-05"):
        hf_folders.compare(model, theirs, 29)
