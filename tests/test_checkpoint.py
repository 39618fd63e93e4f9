import dataclasses
import subprocess
import sys
import time

import pytest
import torch

import configurator
from engine import checkpoint, resuming
from engine.files import link
from model import GPT, GPTConfig

SMALL = GPTConfig(block_size=8, vocab_size=19, n_layer=2, n_head=2, n_embd=8)


def state_of(model, **entries):
    return {"model": model.state_dict(), "model_config": dataclasses.asdict(model.config), "step": 0, **entries}


def test_a_model_comes_back_as_it_was(tmp_path):
    for config in (SMALL, dataclasses.replace(SMALL, wq_identity=True, tie_weights=False, bias=True)):
        model = GPT(config)
        checkpoint.save(tmp_path / "ckpt.pt", **state_of(model, step=7))
        state = checkpoint.load(tmp_path / "ckpt.pt")
        assert state["step"] == 7
        loaded = checkpoint.build_model(state)
        assert loaded.config == config
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


def put(path, **changes):
    """A file of torch.save with the entries of a checkpoint, changed; None: left out."""
    state = {"format": checkpoint.FORMAT, **state_of(GPT(SMALL)), **changes}
    torch.save({name: value for name, value in state.items() if value is not None}, path)


def nested(depth):
    return [nested(depth - 1)] if depth else []


def endless():
    values = []
    values.append(values)
    return values


def wide():
    values = [0] * 10
    for _ in range(12):
        values = [values] * 10
    return values


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(format=2), "format=1, or model_args as nanoGPT's, got format 2"),
        (dict(format=torch.zeros(9, 9)), "got format Tensor"),
        (dict(format=None), "got neither, but model, model_config, step"),
        (dict(model=None), "it lacks model"),
        (dict(model_config=None, step=None), "it lacks model_config, step"),
        (dict(step="7"), "step must be a whole number, got str"),
        (dict(step=7.0), "step must be a whole number, got float"),
        (dict(step=True), "step must be a whole number, got bool"),
        (dict(model=[1]), "model must be a dict, got list"),
        (dict(model={"transformer.wte.weight": [0.0]}), "'transformer.wte.weight' -> list"),
        (dict(model={7: torch.zeros(2)}), "7 -> Tensor"),
        (dict(model={"a": torch.zeros(2, dtype=torch.int64)}), "weight a must be a dense tensor"),
        (dict(model={"a": torch.zeros(2, device="meta")}), "on meta"),
        (dict(model={"a": torch.eye(2).to_sparse()}), "sparse_coo"),
        (dict(model={"a": torch.zeros(2)}), "it lacks the weight transformer.wte.weight and "),
        (dict(model=GPT(dataclasses.replace(SMALL, bias=True)).state_dict()), "no place for the weight transformer"),
        (dict(model=GPT(dataclasses.replace(SMALL, n_embd=4)).state_dict()), "shape (19, 8) by its model options"),
        (dict(model=GPT(dataclasses.replace(SMALL, tie_weights=False)).state_dict()), "tie_weights must be False"),
        (dict(model_config="small"), "model_config must be a dict, got str"),
        (dict(model_config={**dataclasses.asdict(SMALL), "future_option": 1}), "does not know: future_option"),
        (dict(model_config={**dataclasses.asdict(SMALL), 3: 1}), "does not know: 3"),
        (dict(model_config={**dataclasses.asdict(SMALL), "n_layer": "two"}), "n_layer must be a whole number"),
        (dict(model_config={**dataclasses.asdict(SMALL), "n_layer": [2]}), "n_layer must be a plain value, got list"),
        (dict(model_config={**dataclasses.asdict(SMALL), "n_head": 3}), "does not divide into n_head=3"),
        (dict(model_config={**dataclasses.asdict(SMALL), "norm": "batchnorm"}), "norm must be one of"),
        (dict(optimizer=[]), "optimizer must be a dict, got list"),
        (dict(optimizer={"state": {}}), "optimizer must have param_groups, a list"),
        (dict(rng={"cpu": 1}), "rng must have cpu, a tensor"),
        (dict(best_val_loss="low"), "best_val_loss must be a number, got str"),
        (dict(config="plain"), "config must be a dict, got str"),
        (dict(config=nested(50)), "nested more than 16 deep"),
        (dict(model_config={"n_layer": nested(50)}), "nested more than 16 deep"),
        (dict(eliminated=endless()), "nested more than 16 deep"),
        (dict(eliminated=wide()), "or have more than 1,000,000 values"),
    ],
)
def test_a_file_with_other_entries_is_refused_in_one_line(tmp_path, changes, words):
    path = tmp_path / "ckpt.pt"
    put(path, **changes)
    for read in (checkpoint.load, checkpoint.model_options):
        with pytest.raises(ValueError) as refusal:
            read(path)
        assert words in str(refusal.value)
        assert str(path) in str(refusal.value)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.zeros(2), "must contain a dict to be a checkpoint, got Tensor"),
        ([1, 2], "got list"),
        ({1: 2}, "names as keys"),
        ({}, "got neither, but nothing"),
        (GPT(SMALL).state_dict(), "is a state dict, weights without the model's options"),
        ({"epoch": 3, "state_dict": {}}, "got neither, but epoch, state_dict"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(tmp_path, content, words):
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError) as refusal:
        checkpoint.load(tmp_path / "ckpt.pt")
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_entries_that_a_reader_needs_are_its_own(tmp_path):
    checkpoint.save(tmp_path / "run.pt", step=3, curve=[1.0])
    assert checkpoint.load(tmp_path / "run.pt", required=())["curve"] == [1.0]
    with pytest.raises(ValueError, match="it lacks model, model_config"):
        checkpoint.load(tmp_path / "run.pt")


def test_loading_draws_no_random_numbers(tmp_path):
    put(tmp_path / "ckpt.pt")
    before = torch.get_rng_state()
    checkpoint.load(tmp_path / "ckpt.pt")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_model_options_come_without_the_weights(tmp_path):
    path = tmp_path / "ckpt.pt"
    config = dataclasses.replace(SMALL, wq_identity=True, attn_scale=0.5, n_embd=128)
    options = dataclasses.asdict(config)
    del options["load_balance"]  # as in a file from before there was this option
    checkpoint.save(path, **state_of(GPT(config), model_config=options))
    content = bytearray(path.read_bytes())
    embedding = torch.load(path, weights_only=True)["model"]["transformer.wte.weight"].numpy().tobytes()
    content[content.index(embedding)] ^= 1
    path.write_bytes(content)
    assert checkpoint.model_options(path) == dataclasses.asdict(config)
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.load(path)


@pytest.mark.parametrize("pos", ["learned", "rope", "none"])
def test_a_smaller_block_size_crops_the_positions_and_nothing_else(pos):
    config = dataclasses.replace(SMALL, pos=pos, bias=True)
    model, shorter = GPT(config).eval(), GPT(dataclasses.replace(config, block_size=5)).eval()
    checkpoint.load_weights(shorter, state_of(model))
    idx = torch.randint(19, (3, 5))
    assert torch.equal(shorter(idx)[0], model(idx)[0])
    assert {name for name, w in model.state_dict().items() if not torch.equal(w, shorter.state_dict()[name][:])} <= {
        "transformer.wpe.weight"
    }


def test_a_larger_block_size_needs_positions_that_are_not_learned():
    longer = dataclasses.replace(SMALL, block_size=9)
    with pytest.raises(ValueError, match=r"block_size must be at most 8, as many positions as .* learned, got 9"):
        checkpoint.load_weights(GPT(longer), state_of(GPT(SMALL)))
    model = GPT(dataclasses.replace(SMALL, pos="rope")).eval()
    checkpoint.load_weights(longer := GPT(dataclasses.replace(longer, pos="rope")).eval(), state_of(model))
    idx = torch.randint(19, (3, 8))
    assert torch.equal(longer(idx)[0], model(idx)[0])


@pytest.mark.parametrize(
    ("there", "here", "words"),
    [  # the shapes are the same, and the weights mean something else
        (dict(wq_identity=True), dict(wk_identity=True), "wq_identity is True in the checkpoint and False here"),
        (dict(tie_weights=False), dict(tie_weights=True), "tie_weights is False in the checkpoint and True here"),
    ],
)
def test_weights_that_would_mean_something_else_are_refused(there, here, words):
    with pytest.raises(ValueError, match=words):
        checkpoint.load_weights(
            GPT(dataclasses.replace(SMALL, **here)), state_of(GPT(dataclasses.replace(SMALL, **there)))
        )


def test_options_that_leave_the_weights_as_they_are_may_differ():
    state = state_of(GPT(SMALL))
    model = GPT(dataclasses.replace(SMALL, dropout=0.1, attn_scale=0.5, tie_weights=False, n_kv_head=2))
    checkpoint.load_weights(model, state)
    assert torch.equal(model.lm_head.weight, state["model"]["transformer.wte.weight"])


def test_a_run_without_all_its_entries_is_not_resumed(tmp_path):
    put(tmp_path / "ckpt.pt", optimizer={"param_groups": []}, scaler={})
    state = checkpoint.load(tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=r"ckpt.pt cannot be resumed without rng, .*--init_from="):
        resuming.check_same_run(state, {}, tmp_path / "ckpt.pt")


def test_weights_of_another_shape_are_refused_with_the_options_that_differ(tmp_path):
    state = state_of(GPT(SMALL))
    other = GPT(dataclasses.replace(SMALL, n_embd=16, wq_identity=True))
    with pytest.raises(ValueError, match="n_embd is 8 in the checkpoint and 16 here; wq_identity is False") as refusal:
        checkpoint.load_weights(other, state)
    assert "\n" not in str(refusal.value)
    state["model_config"]["future_option"] = 1
    with pytest.raises(ValueError, match="future_option"):
        checkpoint.build_model(state)


def test_a_kill_while_writing_leaves_a_whole_checkpoint(tmp_path):
    # A process writes checkpoints without end; whenever it is killed, the one under the name is whole.
    program = (
        "import sys, torch\nfrom engine import checkpoint\n"
        "for step in range(10**6):\n"
        "    checkpoint.save(sys.argv[1], step=step, tensor=torch.full((300_000,), float(step)))\n"
        "    print(step, flush=True)\n"
    )
    path = tmp_path / "ckpt.pt"
    root = configurator.ROOT
    for delay in (0.0, 0.003, 0.007):
        with subprocess.Popen([sys.executable, "-c", program, path], cwd=root, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            process.stdout.readline()
            time.sleep(delay)
            process.kill()
        state = checkpoint.load(path, required=())
        assert torch.equal(state["tensor"], torch.full((300_000,), float(state["step"])))


def test_a_link_keeps_what_it_was_made_of(tmp_path):
    path = tmp_path / "ckpt.pt"
    for step in range(3):
        checkpoint.save(path, step=step)
        if step != 2:
            link(path, "best.pt")
    assert checkpoint.load(tmp_path / "best.pt", required=())["step"] == 1
    assert checkpoint.load(path, required=())["step"] == 2
