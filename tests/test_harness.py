"""lm_eval on a run folder and on its export: the same metrics. Skipped where the package is not installed."""

import json

import pytest
import torch

import hf
from engine import checkpoint
from model import GPT, GPTConfig
from studies import harness

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")
CHOICES = """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.json}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: label
doc_to_choice: choices
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.json}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""
GENERATION = """
task: generation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/generation.json}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: {until}, max_gen_toks: 20, do_sample: false}}
metric_list: [{{metric: exact_match}}, {{metric: chrf}}]
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(run folder, its export, a TaskManager of three tasks on files); weights are random, the stop string occurs."""
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("harness")
    torch.manual_seed(0)
    model = GPT(GPTConfig(64, 320, 2, 2, None, 32, wq_identity=True, attn_scale=0.5)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.transformer.wte.weight.data[128:256] *= 0.2  # rather ASCII than halves of characters
    model.transformer.wte.weight.data[257:] = 0
    (folder / "run").mkdir()
    options = {name: getattr(model.config, name) for name in vars(model.config)}
    checkpoint.save(folder / "run/ckpt.pt", model=model.state_dict(), model_config=options, step=1)
    (folder / "run/run.json").write_text('{"data": {"tokenizer": "bytes"}}')
    hf.main(["export", f"--run={folder / 'run'}", f"--out={folder / 'hf'}"])

    questions = [f"What is {i} and {'x' * (3 * i)}? " for i in range(12)]
    labels = [{"question": q, "choices": [f"a{i}", "bb", "of it"], "label": i % 3} for i, q in enumerate(questions)]
    texts = [{"text": "The cat sat. " * n + "é"} for n in (1, 5, 17)] + [{"text": "a"}]
    prompts = [{"text": question, "answer": "of it"} for question in questions]
    for name, rows in (("choices", labels), ("texts", texts), ("generation", prompts)):
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    continuation = harness.register()(run=folder / "run").generate_until([request(questions[0])])[0]
    for name, text in (("choices", CHOICES), ("rolling", ROLLING), ("generation", GENERATION)):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder, until=json.dumps([continuation[14]])))
    return folder / "run", folder / "hf", TaskManager(include_path=str(folder), include_defaults=False)


def request(text):
    """A request to continue a text greedily by 20 tokens."""
    from lm_eval.api.instance import Instance

    arguments = (text, {"until": [], "max_gen_toks": 20, "do_sample": False})
    return Instance(request_type="generate_until", doc={}, arguments=arguments, idx=0)


def evaluated(model, tasks, manager, **arguments):
    """(metrics, responses) of a model in tasks."""
    found = lm_eval.simple_evaluate(
        model, arguments, tasks, task_manager=manager, batch_size=4, device="cpu", bootstrap_iters=0, log_samples=True
    )
    samples = [sample["resps"] for name in tasks for sample in found["samples"][name]]
    metrics = {
        f"{name} {metric}": value
        for name, values in found["results"].items()
        for metric, value in values.items()
        if isinstance(value, float)
    }
    return metrics, samples


def test_a_run_and_its_export_have_the_same_metrics(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    run, export, manager = runs
    tasks = ["choices", "rolling", "generation"]
    theirs, their_samples = evaluated("hf", tasks, manager, pretrained=str(export), dtype="float32")
    ours, our_samples = evaluated("wq", tasks, manager, run=str(run))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name
    assert {"choices acc,none", "rolling word_perplexity,none", "generation chrf,none"} <= ours.keys()
    assert our_samples[-12:] == their_samples[-12:]  # the generated texts
    assert len({len(text) for ((text,),) in our_samples[-12:]}) > 3  # which the stop string has cut


def test_what_the_harness_cannot_use_is_refused(runs):
    kind = harness.register()
    run, _, _ = runs
    with pytest.raises(ValueError, match="max_gen_toks must be below block_size=64, got 256"):
        from lm_eval.api.instance import Instance

        kind(run=run).generate_until([Instance("generate_until", {}, ("a", {"until": []}), 0)])
    with pytest.raises(ValueError, match="got best"):
        kind(run=run, best=True)
    with pytest.raises(ValueError, match="there is no checkpoint"):
        kind(run=run, ckpt="best.pt")
