"""An exported W_Q = I model in other engines gives the same greedy tokens; skipped where one is not installed."""

import numpy as np
import pytest
import torch

from corpus import hf_tokenizers, tokenizers
from engine import decode, hf_folders
from model import GPT, GPTConfig

transformers = pytest.importorskip("transformers")
N_PROMPT, N_NEW = 8, 40


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(folder of an export, prompt, its greedy continuation by our code, our logits of both)."""
    torch.manual_seed(0)
    sizes = dict(block_size=64, vocab_size=320, n_layer=2, n_head=2, n_embd=32)
    model = GPT(GPTConfig(**sizes, wq_identity=True, attn_scale=0.5)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.lm_head.weight.data[257:] = 0  # no token has these rows
    folder = tmp_path_factory.mktemp("export") / "hf"
    hf_folders.write(folder, model, 257, 256, {})
    hf_tokenizers.fast_tokenizer(tokenizers.get_tokenizer("bytes"), 64).save_pretrained(folder)
    prompt = torch.randint(256, (1, N_PROMPT))
    with torch.no_grad():
        tokens = decode.generate(model, prompt, N_NEW, temperature=0)
        logits = hf_folders.logits(model, tokens, 257)
    return folder, prompt[0].tolist(), tokens[0, N_PROMPT:].tolist(), logits[0].double()


def test_ctranslate2(exported, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2", reason="CTranslate2 is not installed")
    folder, prompt, expected, logits = exported
    path = ctranslate2.converters.TransformersConverter(str(folder)).convert(str(tmp_path / "ct2"))
    generator = ctranslate2.Generator(path, device="cpu", compute_type="float32", intra_threads=1)
    words = transformers.AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(prompt + expected)
    options = dict(max_length=N_NEW, sampling_topk=1, include_prompt_in_result=False, end_token=[])
    (result,) = generator.generate_batch([words[:N_PROMPT]], **options)
    assert result.sequences_ids[0] == expected
    (scored,) = generator.score_batch([words])
    ours = logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(prompt + expected)[1:, None])[:, 0]
    assert np.abs(np.array(scored.log_probs) - ours.numpy()).max() < 1e-4


def test_onnx_runtime(exported, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript, which torch.onnx.export needs, is not installed")
    folder, prompt, expected, logits = exported

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            with hf_folders.quiet():
                self.model = transformers.AutoModelForCausalLM.from_pretrained(folder)

        def forward(self, tokens):
            return self.model(tokens, use_cache=False).logits

    example, length = torch.zeros(1, N_PROMPT, dtype=torch.int64), torch.export.Dim("length", min=2, max=64)
    program = torch.onnx.export(
        Logits().eval(), (example,), dynamo=True, dynamic_shapes=({1: length},), input_names=["tokens"], verbose=False
    )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    tokens = np.array([prompt])
    for _ in range(N_NEW):
        (theirs,) = session.run(None, {"tokens": tokens})
        tokens = np.append(tokens, theirs[:, -1:].argmax(-1), axis=1)
    assert tokens[0, N_PROMPT:].tolist() == expected
    (theirs,) = session.run(None, {"tokens": tokens})
    assert np.abs(theirs[0] - logits.numpy()).max() < 1e-5 * np.abs(logits.numpy()).max()
