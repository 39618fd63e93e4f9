"""The commands `hf.py export` and `hf.py import`: what they write is loaded by others, and nothing in a file is run."""

import json
import os
import pickle
import types
from pathlib import Path

import pytest
import torch
from run_folders import write_run
from safetensors.torch import load_file, save_file

import eliminate
import hf
import sample
import train
from corpus import hf_tokenizers, tokenizers
from engine import checkpoint, hf_classes, hf_folders
from model import GPT, GPTConfig
from theory import trained_model

transformers = pytest.importorskip("transformers")
SIZES = dict(block_size=32, vocab_size=320, n_layer=2, n_head=2, n_embd=16)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Makes a finished run folder, out/run, with random weights and the tokenizer bytes."""
    monkeypatch.chdir(tmp_path)

    def make(folder="out/run", **changes):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**{**SIZES, **changes})).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        objective = "clm" if model.config.causal else "mlm"
        write_run(folder, 1, 2.5, tokens_per_step=256, objective=objective, **{**SIZES, **changes})
        options = {name: getattr(model.config, name) for name in vars(model.config)}
        checkpoint.save(f"{folder}/ckpt.pt", model=model.state_dict(), model_config=options, step=40)
        return model

    return make


def gpt2(folder, **changes):
    """A GPT-2 that transformers itself has made and saved, with its own activation, biases and dropouts."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=257, n_positions=32, n_embd=16, n_layer=2, n_head=2, **changes)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with hf_folders.quiet():
        theirs.save_pretrained(folder)
        hf_tokenizers.fast_tokenizer(tokenizers.get_tokenizer("bytes"), 32).save_pretrained(folder)
    return theirs


def assert_same_logits(theirs, model, n_vocab=257):
    tokens = torch.randint(n_vocab, (2, 32))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert (model(tokens, tokens)[0][..., :n_vocab] - expected).abs().max() <= 1e-5 * expected.abs().max()


def imported(folder="out/in"):
    return checkpoint.build_model(checkpoint.load(f"{folder}/ckpt.pt")).eval()


def test_an_export_is_loaded_without_our_code_and_imported_as_what_it_was(run, command):
    model = run(wq_identity=True, attn_scale=0.7)
    status, out, error = command(hf.main, "export", "--run=out/run", "--out=out/hf", "--license=mit")
    assert status == 0, error
    assert "and 20 greedy tokens the same" in out
    assert "wrote out/hf" in out
    names = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert {path.name for path in Path("out/hf").iterdir()} == names | {"tokenizer.json", "tokenizer_config.json"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained("out/hf")
    assert_same_logits(theirs, model)
    tokenizer = transformers.AutoTokenizer.from_pretrained("out/hf")
    assert tokenizer("aé<|endoftext|>")["input_ids"] == [97, 195, 169, 256]
    assert (tokenizer.eos_token_id, tokenizer.model_max_length) == (256, 32)
    card = Path("out/hf/README.md").read_text()
    for words in ("license: mit", "W_Q = I", "fingerprint abc", "2.5000 ± 0.0100 nats", "0123abc", "GPT2LMHeadModel"):
        assert words in card

    status, out, error = command(hf.main, "import", "--from=out/hf", "--out=out/back")
    assert status == 0, error
    state = checkpoint.load("out/back/ckpt.pt")
    assert (state["step"], state["model_config"]["wq_identity"], state["model_config"]["attn_scale"]) == (40, True, 0.7)
    for name, tensor in model.state_dict().items():
        assert torch.equal(state["model"][name], tensor[:257] if len(tensor) == 320 else tensor)
    arguments = ["--num_samples=1", "--max_new_tokens=9", "--temperature=0", "--dtype=float32", "--start=ab"]
    status, text, error = command(sample.main, "--out_dir=out/back", *arguments)
    assert status == 0, error


def test_an_export_whose_logits_differ_is_not_written(run, refuses, monkeypatch):
    run()
    monkeypatch.setitem(hf_classes.ACTIVATIONS, "gelu", "gelu_new")
    refuses(hf.main, "export", "--run=out/run", "--out=out/hf", words=["logits of transformers must be ours", "1e-05"])
    assert sorted(path.name for path in Path("out").iterdir()) == ["run"]


def test_mistakes_are_one_line(run, refuses):
    run(norm="dyt")
    Path("full").mkdir()
    Path("full/file").touch()
    refuses(hf.main, words=["the first word must be export or import, got nothing"])
    refuses(hf.main, "convert", words=["export or import, got convert"])
    refuses(hf.main, "export", "--run=out/run", words=["--out="])
    refuses(hf.main, "export", "--out=out/hf", words=["--run="])
    refuses(hf.main, "export", "out/run", words=["written --key=value, got out/run"])
    refuses(hf.main, "export", "--run=out/run", "--out=full", words=["full already exists"])
    refuses(hf.main, "export", "--run=out/run", "--out=out/hf", words=["norm=dyt", "Dynamic Tanh"])
    refuses(hf.main, "import", "--out=out/in", words=["--from="])
    refuses(hf.main, "import", "--from=full", "--out=out/in", words=["full has no config.json"])
    refuses(hf.main, "import", "--from=./none", "--out=out/in", words=["there is no folder ./none"])
    refuses(hf.main, "import", "--from=full", "--out=out/run", words=["out/run already contains a run"])
    Path("full/config.json").write_text('{"model_type": "mistral"}')
    refuses(hf.main, "import", "--from=full", "--out=out/in", words=["model_type must be one of gpt2", "got 'mistral'"])
    assert not Path("out/in").exists()


def test_nothing_of_a_gpt2_is_lost(tiny, command):
    tiny(block_size=32, tokens_per_step=256)
    theirs = gpt2("theirs")
    status, out, error = command(hf.main, "import", "--from=theirs", "--out=out/in")
    assert status == 0, error
    model = imported()
    assert (model.config.activation, model.config.bias, model.config.dropout) == ("gelu_tanh", True, 0.1)
    assert_same_logits(theirs, model)
    arguments = ["--num_samples=1", "--max_new_tokens=9", "--temperature=0", "--dtype=float32", "--start=ab"]
    assert command(sample.main, "--out_dir=out/in", *arguments)[0] == 0
    tuned = [f"--init_from={'out/in/ckpt.pt'}", "--dataset=tiny", "--out_dir=out/tuned", "--max_iters=2"]
    tuned += ["--warmup_iters=1", "--tokens_per_step=256", "--batch_size=8", "--eval_windows=3", "--dtype=float32"]
    status, _, error = command(train.main, *tuned)
    assert status == 0, error
    assert checkpoint.load("out/tuned/ckpt.pt")["model_config"]["activation"] == "gelu_tanh"
    measured = ["--ckpt=out/in/ckpt.pt", "--dataset=tiny", "--windows=8"]
    assert command(trained_model.main, *measured, "--out_dir=out/report")[0] == 0
    assert command(eliminate.main, *measured, "--approximate", "--out=out/fitted/ckpt.pt")[0] == 0
    assert imported("out/fitted").config.wq_identity
    status, _, error = command(train.main, "--out_dir=out/in", "--resume")
    assert (status, error.count("\n")) == (2, 1)


def test_the_heads_of_a_gpt2_lose_their_freedom_and_it_goes_back(run, command):
    """GPT-2 to eliminate.py --heads to transformers: the same logits, and n_embd·d_k entries of W_Q and W_V are I."""
    theirs = gpt2("theirs")
    assert command(hf.main, "import", "--from=theirs", "--out=out/in")[0] == 0
    status, out, error = command(eliminate.main, "--ckpt=out/in/ckpt.pt", "--out=out/heads/ckpt.pt", "--heads")
    assert (status, error) == (0, "")
    assert "512 parameters are known" in out  # 2 layers · 2 projections · 16 · 8
    status, _, error = command(hf.main, "export", "--run=out/heads", "--out=out/back")
    assert status == 0, error
    back = transformers.AutoModelForCausalLM.from_pretrained("out/back")
    tokens = torch.randint(257, (2, 32))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert (back(tokens).logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    for mine, old in zip(back.transformer.h, theirs.transformer.h, strict=True):
        for start in (0, 32):  # Conv1D weights are (in, out): W_Q, W_K, W_V
            for head in range(2):
                columns = slice(start + 8 * head, start + 8 * (head + 1))
                assert torch.equal(mine.attn.c_attn.weight[:8, columns], torch.eye(8))
                assert not torch.equal(old.attn.c_attn.weight[:8, columns], torch.eye(8))


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_old_weight_files(run, command, legacy, prefix):
    """Files of torch.save, in the format before PyTorch 1.6, too, with masks and without the name of the base model."""
    theirs, mask_dtype = gpt2("theirs"), torch.float32 if legacy else torch.uint8
    weights = {
        name.removeprefix("transformer."): tensor for name, tensor in load_file("theirs/model.safetensors").items()
    }
    for layer in range(2):
        weights[f"h.{layer}.attn.bias"] = torch.ones(32, 32, dtype=mask_dtype).tril()[None, None]
        weights[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    Path("theirs/model.safetensors").unlink()
    weights = {prefix + name: tensor for name, tensor in weights.items()}
    torch.save(weights, "theirs/pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    status, _, error = command(hf.main, "import", "--from=theirs", "--out=out/in")
    assert status == 0, error
    assert_same_logits(theirs, imported())


def test_weights_in_several_files(run, command, refuses):
    theirs = gpt2("theirs")
    weights = load_file("theirs/model.safetensors")
    os.unlink("theirs/model.safetensors")
    halves = [dict(list(weights.items())[i::2]) for i in range(2)]
    for i, half in enumerate(halves):
        save_file(half, f"theirs/part{i}.safetensors")
    index = {name: f"part{i}.safetensors" for i, half in enumerate(halves) for name in half}
    Path("theirs/model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert command(hf.main, "import", "--from=theirs", "--out=out/in")[0] == 0
    assert_same_logits(theirs, imported())
    Path("theirs/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../part0.safetensors"}}))
    refuses(hf.main, "import", "--from=theirs", "--out=out/2", words=["index.json must name files beside it"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx must be False, got True"),
        (dict(layer_norm_epsilon=1e-6), "layer_norm_epsilon must be 1e-05, got 1e-06"),
        (dict(activation_function="silu"), "activation must be one of gelu, gelu_pytorch_tanh, relu, relu2, gelu_new"),
        (dict(n_inner=7), None),
        (dict(tie_word_embeddings=False), None),
    ],
    ids=str,
)
def test_what_a_gpt2_may_be(run, command, refuses, changes, words):
    theirs = gpt2("theirs", **changes)
    if words:
        refuses(hf.main, "import", "--from=theirs", "--out=out/in", words=[words, "cannot import theirs"])
        assert not Path("out/in").exists()
    else:
        assert command(hf.main, "import", "--from=theirs", "--out=out/in")[0] == 0
        assert_same_logits(theirs, imported())


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("Llama", dict(rms_norm_eps=1e-5), None),
        ("Llama", dict(rms_norm_eps=1e-5, attention_bias=True, num_key_value_heads=1), None),
        ("Llama", dict(rms_norm_eps=1e-6), "rms_norm_eps must be 1e-05"),
        ("Llama", dict(rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 5e5}), "rope_theta"),
        ("Llama", dict(rms_norm_eps=1e-5, head_dim=4), "head_dim must be n_embd/n_head"),
        ("Starcoder2", dict(sliding_window=None, num_key_value_heads=1), None),
        ("Phi", dict(), "partial_rotary_factor"),
        ("Arcee", dict(hidden_act="relu2"), None),
    ],
    ids=str,
)
def test_other_classes_that_transformers_made(run, command, refuses, kind, changes, words):
    torch.manual_seed(0)
    sizes = dict(vocab_size=257, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    config = getattr(transformers, f"{kind}Config")(**sizes, max_position_embeddings=32, **changes)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with hf_folders.quiet():
        theirs.save_pretrained("theirs")
    if words:
        refuses(hf.main, "import", "--from=theirs", "--out=out/in", words=[words, "cannot import theirs"])
    else:
        status, out, error = command(hf.main, "import", "--from=theirs", "--out=out/in")
        assert status == 0, error
        assert "--tokenizer=" in out  # which the folder does not have
        assert_same_logits(theirs, imported())


def test_weights_that_do_not_fit_are_refused(run, refuses):
    gpt2("theirs")
    weights = load_file("theirs/model.safetensors")
    name = "transformer.h.1.mlp.c_fc.weight"
    for changed, words in (
        ({n: w for n, w in weights.items() if n != name}, f"it lacks the weight {name}"),
        (weights | {name: weights[name][:, :9].contiguous()}, f"its weight {name} must have the shape (16, 64)"),
        (weights | {"transformer.h.2.ln_1.weight": torch.ones(16)}, "leaves no place for the weight transformer.h.2"),
    ):
        save_file(changed, "theirs/model.safetensors")
        refuses(hf.main, "import", "--from=theirs", "--out=out/in", words=[words])
    Path("theirs/model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{]")
    refuses(hf.main, "import", "--from=theirs", "--out=out/in", words=["model.safetensors is not a safetensors file"])
    assert not Path("out/in").exists()


class WritesAFile:
    """An object whose unpickling runs code."""

    def __reduce__(self):
        return open, ("harmed", "w")


def malicious(path, form):
    """Write a file in one of the forms that torch reads, which would write the file `harmed`."""
    content = {"transformer.wte.weight": torch.zeros(2, 2), "model": WritesAFile()}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")


@pytest.mark.parametrize("form", ["pickle", "zip", "legacy"])
def test_code_in_a_file_is_never_run(run, refuses, form):
    run()
    gpt2("theirs")
    Path("theirs/model.safetensors").unlink()
    malicious(Path("theirs/pytorch_model.bin"), form)
    refuses(hf.main, "import", "--from=theirs", "--out=out/in", words=["pytorch_model.bin"])
    malicious(Path("theirs/model.safetensors"), form)
    refuses(hf.main, "import", "--from=theirs", "--out=out/in", words=["model.safetensors"])
    malicious(Path("out/run/ckpt.pt"), form)
    refuses(hf.main, "export", "--run=out/run", "--out=out/hf", words=["out/run/ckpt.pt"])
    assert not any(Path(name).exists() for name in ("harmed", "out/in", "out/hf"))
    torch.load("theirs/pytorch_model.bin", weights_only=False) if form != "pickle" else pickle.loads(
        Path("theirs/pytorch_model.bin").read_bytes()
    )
    assert Path("harmed").exists()  # so it would have been


def test_code_in_a_folder_is_never_run(run, command):
    theirs = gpt2("theirs")
    code = "open('harmed', 'w')\n"
    Path("theirs/modeling.py").write_text(code)
    content = json.loads(Path("theirs/config.json").read_text())
    auto = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "modeling.Model")
    Path("theirs/config.json").write_text(json.dumps(content | {"auto_map": auto}))
    content = json.loads(Path("theirs/tokenizer_config.json").read_text())
    Path("theirs/tokenizer_config.json").write_text(
        json.dumps(content | {"auto_map": {"AutoTokenizer": ["modeling.Model", None]}})
    )
    assert command(hf.main, "import", "--from=theirs", "--out=out/in")[0] == 0
    assert_same_logits(theirs, imported())
    assert not Path("harmed").exists()


def test_a_name_on_the_hub_is_taken_from_its_cache(run, command, refuses, monkeypatch):
    import huggingface_hub.constants

    theirs = gpt2("hub/models--distilgpt2/snapshots/abc")
    Path("hub/models--distilgpt2/refs").mkdir()
    Path("hub/models--distilgpt2/refs/main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(Path("hub").resolve()))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    status, _, error = command(hf.main, "import", "--from=distilgpt2", "--out=out/in")
    assert status == 0, error
    assert_same_logits(theirs, imported())
    refuses(hf.main, "import", "--from=gpt2", "--out=out/2", words=["there is no folder gpt2", "cannot be downloaded"])


def test_push_uploads_what_was_written(run, command, monkeypatch):
    import huggingface_hub

    run()
    calls = []

    class Hub:
        def create_repo(self, name, **options):
            calls.append((name, options))

        def upload_folder(self, repo_id, folder_path):
            calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    status, _, error = command(hf.main, "export", "--run=out/run", "--out=out/hf", "--push=me/model")
    assert status == 0, error
    assert calls[0] == ("me/model", {"private": True, "exist_ok": True})
    assert calls[1][0] == "me/model"
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(calls[1][1])
    monkeypatch.setattr(huggingface_hub, "HfApi", types.SimpleNamespace)
    status, _, error = command(hf.main, "export", "--run=out/run", "--out=out/hf2", "--push=me/model")
    assert (status, Path("out/hf2").exists()) == (2, True)
    assert "hf upload me/model out/hf2" in error


def test_an_encoder_has_a_mask_token(run, command):
    model = run(causal=False, norm="rmsnorm", pos="rope")
    status, out, error = command(hf.main, "export", "--run=out/run", "--out=out/hf")
    assert status == 0, error
    assert_same_logits(transformers.AutoModelForMaskedLM.from_pretrained("out/hf"), model, 258)
    assert transformers.AutoTokenizer.from_pretrained("out/hf").mask_token_id == 257
