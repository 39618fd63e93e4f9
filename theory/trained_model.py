"""What an ordinary trained model still obeys of the theorems, though none covers it: a measurement, not a promise.

    python -m theory.trained_model --ckpt=out/quick-baseline_tied/ckpt.pt

For each layer: the condition number and the singular values of W_Q; how far the layer is from the hypotheses of
Theorem 4.1, which wants no normalisation and no skip connection around the MLP; and the loss when its W_Q is replaced
by the identity, with the W_K that fits best. Writes report.md, layers.json and spectra.png into out_dir.

`python eliminate.py --approximate` writes a checkpoint with the fitted W_K, to fine-tune from.
"""

import contextlib
import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import configurator
import data
from engine import checkpoint, devices
from engine.files import write_json
from theory import reparametrize
from theory.weights import build_model, read_weights

N_LOGITS = 2**26  # of a batch, 256 MiB in float32
LEGEND = (
    "Norm from linear: ‖n − xA‖ / ‖n‖ for the best matrix A, where n is the normalised input (0: linear). Skip / "
    "attention and skip / MLP: the length of the stream next to what the layer adds to it (Theorem 4.1 wants 0 at the "
    "MLP). Logit error: ‖logits − new logits‖ / ‖logits‖ with W_Q = I and the fitted W_K, over all pairs of tokens of "
    "the training windows. The last three columns are differences in validation loss: W_Q = I and nothing else "
    "changed, W_Q = I and the fitted W_K, attention that does not choose; the row `all` changes every layer, each "
    "fitted after the ones before it."
)


@dataclass
class TrainedModelConfig:
    """Which checkpoint to measure, and on how much text."""

    ckpt: str | None = None  # the checkpoint to measure, such as out/run/ckpt.pt
    windows: int = 64  # windows of training text for the fit, and of validation text for the losses
    data_dir: str | None = None  # where the text is; none: where the checkpoint says
    dataset: str | None = None  # the folder in data_dir, for a checkpoint that does not name its data
    device: str = "auto"  # cpu, cuda, cuda:1, …; auto: cuda where there is one
    out_dir: str = "out/trained_model"  # where report.md, layers.json and spectra.png go

    def __post_init__(self):
        if self.ckpt is None:
            raise ValueError("ckpt is not given: name the checkpoint to measure with --ckpt=…")
        if self.windows < 1:
            raise ValueError(f"windows must be at least 1, not {self.windows}")


@dataclass
class Layer:
    """What is measured of one block; lengths are root mean squares over the tokens of the training windows."""

    cond: float  # of W_Q
    singular_values: list[float]  # of W_Q, descending
    norm_from_linear: float  # how far ln_1 is from a linear map: 0 linear, 1 the most there is
    skip_over_attention: float  # length of the stream / of what attention adds to it
    skip_over_mlp: float  # length of the stream / of what the MLP adds to it
    logit_error: float  # of the attention logits with W_Q = I and the best W_K, relative
    loss_kept: float  # validation loss with W_Q = I in this layer and W_K as it is
    loss_fitted: float  # and with the best W_K
    loss_uniform: float  # and with W_K = 0, attention that does not choose


class Moments:
    """Sums over tokens, in float64, of what a block reads and writes; filled by forward hooks (`recorded`)."""

    def __init__(self, d):
        self.read = torch.zeros(d + 1, d + 1, dtype=torch.float64)  # of [normalised input, 1]: [n, 1]ᵀ[n, 1]
        self.stream = torch.zeros(d, d, dtype=torch.float64)  # xᵀx
        self.cross = torch.zeros(d, d, dtype=torch.float64)  # xᵀn
        self.attn = self.mlp = self.before_mlp = 0.0  # squared lengths

    def on_norm(self, module, inputs, output):
        x, n = (t.flatten(0, -2).double() for t in (inputs[0], output))
        ones = torch.cat((n, n.new_ones(len(n), 1)), dim=1)
        self.read += (ones.T @ ones).cpu()
        self.stream += (x.T @ x).cpu()
        self.cross += (x.T @ n).cpu()

    def on_attn(self, module, inputs, output):
        self.attn += output.double().square().sum().item()

    def on_mlp(self, module, inputs, output):
        self.mlp += output.double().square().sum().item()
        self.mlp_output = output

    def on_block(self, module, inputs, output):
        self.before_mlp += (output[0] - self.mlp_output).double().square().sum().item()

    def norm_from_linear(self):
        """‖n − xA‖ / ‖n‖ for the matrix A that makes it smallest, over all tokens."""
        total = self.read.diagonal()[:-1].sum()
        explained = (torch.linalg.pinv(self.stream, hermitian=True) @ self.cross * self.cross).sum()
        return (1 - explained / total).clamp(min=0).sqrt().item()


@contextlib.contextmanager
def recorded(model):
    """Record the Moments of each block of model while it runs; a list, in the order of the blocks."""
    blocks = model.transformer.h
    moments = [Moments(model.config.n_embd) for _ in blocks]
    handles = []
    for block, sums in zip(blocks, moments, strict=True):
        hooks = {block.ln_1: sums.on_norm, block.attn: sums.on_attn, block.mlp: sums.on_mlp, block: sums.on_block}
        handles += [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def loss(model, x, y):
    """The mean loss of model on inputs x and targets y, (n, T) int64, in nats a target."""
    device = model.lm_head.weight.device
    batch_size = max(1, N_LOGITS // (x.size(1) * model.config.vocab_size))
    total = 0.0
    for inputs, targets in zip(x.split(batch_size), y.split(batch_size), strict=True):
        _, losses = model(inputs.to(device), targets.to(device), reduction="none")
        total += losses.double().sum().item()
    return total / (y >= 0).sum().item()


def best_keys(w_q, w_k, moments, n_kv_head):
    """The W_K that stands in best for (W_Q, W_K) when W_Q = I, and the relative error of the attention logits.

    w_q: (d + 1, n_head·d_k), w_k: (d + 1, n_kv_head·d_k), their biases as last rows. moments: (d + 1, d + 1), the sum
    of [n, 1]ᵀ[n, 1] over the tokens n that attention reads. Returns the new w_k and ‖logits − new logits‖ / ‖logits‖.

    Head i's logits are n·W_Q,i·(m·W_K,i)ᵀ; with W_Q = I the query is n_i, the head's d_k coordinates of n. The least
    squares over all pairs (n, m) of tokens is solved by W_K,i·Pᵀ, where n_i·P is the regression of n·W_Q,i on n_i,
    whatever W_K,i is. Heads that share a key share P. Logits are counted without what is the same for all keys of a
    query, which softmax ignores.
    """
    d, d_k = len(w_q) - 1, w_k.size(1) // n_kv_head
    group = d // d_k // n_kv_head
    count, mean = moments[-1, -1], moments[-1]
    centred = moments - torch.outer(mean, mean) / count
    keys, error, total = [], 0.0, 0.0
    for key_head, k in enumerate(w_k.split(d_k, dim=1)):
        heads = [slice(h * d_k, (h + 1) * d_k) for h in range(key_head * group, (key_head + 1) * group)]
        own = sum(moments[h, h] for h in heads)
        p = torch.linalg.pinv(own, hermitian=True) @ sum(moments[h] @ w_q[:, h] for h in heads)  # (d_k, d_k)
        keys.append(k @ p.T)
        spread = k.T @ centred @ k
        for h in heads:
            wrong = w_q[:, h].clone()
            wrong[h] -= p
            error += ((wrong.T @ moments @ wrong) * spread).sum()
            total += ((w_q[:, h].T @ moments @ w_q[:, h]) * spread).sum()
    return torch.cat(keys, dim=1), (error / total).clamp(min=0).sqrt().item()


def keys_of(model, number, moments):
    """`best_keys` for one block of a GPT, given the Moments of that block."""
    block = read_weights(model).blocks[number]
    rows = [torch.cat((block[name].weight, block[name].bias[None])).cpu() for name in "qk"]
    return best_keys(*rows, moments.read, model.config.kv_heads)


@torch.no_grad()
def set_keys(model, number, w_k=None):
    """Set W_Q = I in block `number` of a GPT, in place, and its keys to w_k, (d + 1, ·), bias below; None: kept."""
    attn = model.transformer.h[number].attn
    q, k, _ = attn.split_qkv(attn.c_attn.weight, dim=0)
    q.copy_(torch.eye(len(q)))
    if w_k is not None:
        k.copy_(w_k[:-1].T)
    if attn.c_attn.bias is not None:
        q, k, _ = attn.split_qkv(attn.c_attn.bias)
        q.zero_()
        if w_k is not None:
            k.copy_(w_k[-1])


def without_queries(model):
    """The GPT with wq_identity=True that computes what model does, a GPT whose W_Q is I in every block."""
    weights = read_weights(model)
    for block in weights.blocks:
        q = block.pop("q")
        assert torch.equal(q.weight, torch.eye(len(q.weight)).to(q.weight)) and not q.bias.any()
    return build_model(weights, replace(model.config, wq_identity=True), model)


def check(model):
    """Raise ValueError for a GPT whose W_Q cannot be replaced by the identity and a fitted W_K."""
    config = model.config
    for name in ("wq_identity", "wk_identity"):
        if getattr(config, name):
            raise ValueError(f"{name}=True: the measurement needs a model with W_Q and W_K, such as a baseline")
    if config.pos == "rope":
        raise ValueError(
            "pos=rope rotates queries and keys by their distance, and no one W_K fits all distances: take a model with "
            "pos=learned or none"
        )


def fit_keys(model, x):
    """A copy of a GPT in which W_Q, still a parameter, is I in every block, and W_K fitted.

    x: (n, T) int64, the tokens of the fit. Each block is fitted on what it reads from the changed blocks before it.
    Raises ValueError (`check`).
    """
    check(model)
    fitted = copy.deepcopy(model)
    for number in range(len(model.transformer.h)):
        with recorded(fitted) as moments:
            loss(fitted, x, x)
        set_keys(fitted, number, keys_of(fitted, number, moments[number])[0])
    return fitted


def measure(model, train, val):
    """What a trained GPT obeys: {'loss', 'loss_fitted', 'loss_uniform', 'layers': [Layer]}, of all layers and of each.

    train: inputs and targets, (n, T) int64 each, on which W_K is fitted; val: those of the losses, in nats a target.
    Raises ValueError (`check`).
    """
    check(model)
    with recorded(model) as moments:
        loss(model, *train)
    layers, blocks = [], read_weights(model).blocks
    all_uniform = copy.deepcopy(model)
    for number, (block, sums) in enumerate(zip(blocks, moments, strict=True)):
        w_k, logit_error = keys_of(model, number, sums)
        losses = []
        for keys in (None, w_k, torch.zeros_like(w_k)):
            changed = copy.deepcopy(model)
            set_keys(changed, number, keys)
            losses.append(loss(changed, *val))
        set_keys(all_uniform, number, torch.zeros_like(w_k))
        squares = sums.stream.diagonal().sum().item()
        layers.append(
            Layer(
                reparametrize.condition_number(block["q"].weight),
                torch.linalg.svdvals(block["q"].weight).tolist(),
                sums.norm_from_linear(),
                (squares / sums.attn) ** 0.5,
                (sums.before_mlp / sums.mlp) ** 0.5,
                logit_error,
                *losses,
            )
        )
    return {
        "loss": loss(model, *val),
        "loss_fitted": loss(fit_keys(model, train[0]), *val),
        "loss_uniform": loss(all_uniform, *val),
        "layers": layers,
    }


def table(found):
    """The result of `measure` as Markdown: a row a layer; losses as differences from the model's own."""
    rows = [
        "| layer | cond(W_Q) | singular values of W_Q: largest, median, smallest | norm from linear | "
        "skip / attention | skip / MLP | logit error | W_Q = I, W_K kept | W_Q = I, W_K fitted | W_K = 0 |",
        "| ---: |" + " ---: |" * 9,
    ]
    own = found["loss"]
    for number, layer in enumerate(found["layers"]):
        values = layer.singular_values
        rows.append(
            f"| {number} | {layer.cond:.3g} | {values[0]:.3g}, {values[len(values) // 2]:.3g}, {values[-1]:.3g} | "
            f"{layer.norm_from_linear:.2f} | {layer.skip_over_attention:.2f} | {layer.skip_over_mlp:.2f} | "
            f"{layer.logit_error:.2f} | {layer.loss_kept - own:+.4f} | {layer.loss_fitted - own:+.4f} | "
            f"{layer.loss_uniform - own:+.4f} |"
        )
    fitted, uniform = (f"{found[name] - own:+.4f}" for name in ("loss_fitted", "loss_uniform"))
    return "\n".join([*rows, f"| all |{' |' * 7} {fitted} | {uniform} |"])


def draw(found, path):
    """Write the singular values of W_Q of each layer to a PNG."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    colours = plt.get_cmap("viridis")(torch.linspace(0, 0.9, len(found["layers"])).tolist())
    for number, (layer, colour) in enumerate(zip(found["layers"], colours, strict=True)):
        values = layer.singular_values
        axes.plot(range(1, len(values) + 1), values, color=colour, label=f"layer {number}")
    axes.set(yscale="log", xlabel="index", ylabel="singular value of W_Q", title="Spectrum of W_Q, layer by layer")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, ncols=2 if len(found["layers"]) > 6 else 1)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def recorded_windows(state, split, n_windows, data_dir=None, dataset=None):
    """Inputs and targets, (n, block_size) int64 each, from the data that a checkpoint says it was trained on.

    state: the dict of a checkpoint. split: 'train' or 'val'. n_windows: evenly spaced ones; None: all. Of an encoder's
    windows tokens are masked as in training. data_dir, dataset: where the data is, if not where the checkpoint says.
    Raises ValueError when the data is not known, not there, or another.
    """
    config = state.get("config") or {}
    data_dir, dataset = data_dir or config.get("data_dir", "data"), dataset or config.get("dataset")
    if dataset is None:
        raise ValueError("the checkpoint does not say what it was trained on: name it with --dataset=…")
    bins = data.load_bins(data_dir, dataset)
    if bins.fingerprint != state.get("data_fingerprint", bins.fingerprint):
        raise ValueError(f"{data_dir}/{dataset} is not the data of the checkpoint")
    tokens, block_size = getattr(bins, split), state["model_config"]["block_size"]
    offsets = data.evaluation_offsets(len(tokens), block_size, n_windows)
    x, y = data.windows(tokens, offsets, block_size)
    if config.get("objective") == "mlm":
        return data.mask_tokens(x, bins.manifest["vocab_size"], 0, offsets)
    return x, y


def main(argv):
    """The command; see the module's docstring."""
    cfg = configurator.parse(TrainedModelConfig, argv)
    state = checkpoint.load(cfg.ckpt)
    model = checkpoint.build_model(state).eval().to(devices.choose_device(cfg.device))
    check(model)
    train, val = (recorded_windows(state, split, cfg.windows, cfg.data_dir, cfg.dataset) for split in data.SPLITS)
    found = measure(model, train, val)
    text = (
        f"{cfg.ckpt}, step {state['step']}; {len(val[0])} validation windows: loss {found['loss']:.4f} nats a target. "
        f"Differences from it, of one layer and of all:\n\n{table(found)}"
    )
    folder = Path(cfg.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    entries = {**found, "layers": [asdict(layer) for layer in found["layers"]], "options": asdict(cfg)}
    write_json(folder / "layers.json", entries)
    (folder / "report.md").write_text(f"{text}\n\n{LEGEND}\n\n![Spectra](spectra.png)\n", encoding="utf-8")
    draw(found, folder / "spectra.png")
    print(f"{text}\n\n{folder}/report.md, {folder}/layers.json, {folder}/spectra.png")


if __name__ == "__main__":
    configurator.run(main)
