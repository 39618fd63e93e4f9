"""How far an ordinary trained model is from the theorems' assumptions, and what W_Q = I costs it: measurements.

    python -m theory.trained_model --ckpt=out/quick-baseline_tied/ckpt.pt

No theorem covers such a model. For each layer this measures the condition number and the singular values of W_Q; how
far the layer is from the assumptions of Theorem 4.1, which has no normalisation and no skip connection around the MLP;
and the loss if W_Q is replaced by the identity and W_K by the one that fits best. Writes report.md, layers.json and
spectra.png to out_dir. `python eliminate.py --approximate` writes a checkpoint with the fitted W_K, for fine-tuning.

Matrices are in the paper's orientation, Y = XW with W of shape (in, out).
"""

import contextlib
import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import configurator
import data
from configurator import FilePath, require
from engine import checkpoint, devices
from engine.files import write_json, write_text
from studies import drawing, page
from theory.weights import build_model, check_known, condition_number, read_weights

N_LOGITS = 2**26  # logits in a batch: 256 MiB in float32
COLUMNS = (
    "layer",
    "cond(W_Q)",
    "singular values of W_Q: largest, median, smallest",
    "norm from linear",
    "skip / attention",
    "skip / MLP",
    "logit error",
    "W_Q = I, W_K kept",
    "W_Q = I, W_K fitted",
    "W_K = 0",
)
LEGEND = (
    "Norm from linear: ‖n − xA‖ / ‖n‖ with the best matrix A, where x is the residual stream and n the normalised x "
    "that attention reads; 0 means linear. Skip / attention and skip / MLP: the length of the stream divided by the "
    "length of what the layer adds to it; Theorem 4.1 assumes 0 for the MLP. Logit error: ‖logits − new logits‖ / "
    "‖logits‖ of attention with W_Q = I and the fitted W_K, over all pairs of tokens of the training windows. The "
    "last three columns are differences in validation loss, in nats per target: W_Q = I and nothing else changed; W_Q "
    "= I and the fitted W_K; W_K = 0, which makes attention uniform. In the row `all` every layer is changed, and "
    "each is fitted after the layers before it."
)


@dataclass
class TrainedModelConfig:
    """Which checkpoint to measure, and on how much text."""

    ckpt: FilePath | None = None  # the checkpoint to measure, such as out/run/ckpt.pt
    windows: int = 64  # windows of training text for the fit, and of validation text for the losses
    data_dir: FilePath | None = None  # where the text is; none: the checkpoint's data_dir
    dataset: str | None = None  # the folder in data_dir; needed if the checkpoint does not name its dataset
    device: str = "auto"  # cpu, cuda, cuda:1, …; auto: cuda if there is a GPU
    out_dir: FilePath = "out/trained_model"  # where report.md, layers.json and spectra.png are written

    def __post_init__(self):
        if self.ckpt is None:
            raise ValueError("ckpt is not given: name the checkpoint to measure with --ckpt=…")
        require(self, positive="windows")


@dataclass
class Layer:
    """The measurements of one block; lengths are root mean squares over the tokens of the training windows."""

    cond: float  # of W_Q
    singular_values: list[float]  # of W_Q, descending
    norm_from_linear: float  # how far ln_1 is from a linear map: 0 is linear, 1 the maximum
    skip_over_attention: float  # length of the stream / of what attention adds to it
    skip_over_mlp: float  # length of the stream / of what the MLP adds to it
    logit_error: float  # relative error of the attention logits with W_Q = I and the best W_K
    loss_kept: float  # validation loss with W_Q = I in this layer and W_K unchanged
    loss_fitted: float  # the same with the best W_K
    loss_uniform: float  # the same with W_K = 0, which makes attention uniform


def recorded_windows(state, split, n_windows, data_dir=None, dataset=None):
    """Inputs and targets, (n, block_size) int64 each, of windows of the data that a checkpoint was trained on.

    state: the dict of a checkpoint, which records where its data is and its fingerprint. split: 'train' or 'val'.
    n_windows: that many, evenly spaced; None: all. data_dir, dataset: used instead of what the checkpoint records, for
    data that has moved or a checkpoint that does not name its dataset. For an encoder (objective=mlm) tokens are masked
    as in training. Raises ValueError if the dataset is not named, not found, or not the one of the fingerprint.
    """
    config = state.get("config") or {}
    data_dir, dataset = data_dir or config.get("data_dir", "data"), dataset or config.get("dataset")
    if dataset is None:
        raise ValueError("the checkpoint does not name its dataset: name it with --dataset=…")
    bins = data.load_bins(data_dir, dataset)
    if bins.fingerprint != state.get("data_fingerprint", bins.fingerprint):
        raise ValueError(
            f"{data_dir}/{dataset} is not the data that the checkpoint was trained on: name it with --data_dir=… and "
            "--dataset=…"
        )
    tokens, block_size = getattr(bins, split), state["model_config"]["block_size"]
    offsets = data.evaluation_offsets(len(tokens), block_size, n_windows)
    x, y = data.windows(tokens, offsets, block_size)
    if config.get("objective") == "mlm":
        return data.mask_tokens(x, bins.manifest["vocab_size"], 0, offsets)
    return x, y


class Moments:
    """Sums over tokens, in float64, of what a block reads and writes; filled by forward hooks (`record_moments`).

    x is the residual stream before the block, (tokens, d); n is ln_1(x), which attention reads.
    """

    def __init__(self, d):
        self.read = torch.zeros(d + 1, d + 1, dtype=torch.float64)  # [n, 1]ᵀ[n, 1]
        self.stream = torch.zeros(d, d, dtype=torch.float64)  # xᵀx
        self.cross = torch.zeros(d, d, dtype=torch.float64)  # xᵀn
        self.attn = self.mlp = 0.0  # squared lengths of what attention and MLP add to the stream
        self.before_mlp = 0.0  # squared length of the stream to which the MLP adds

    def on_norm(self, module, inputs, output):
        x, n = (t.flatten(0, -2).double() for t in (inputs[0], output))
        with_one = torch.cat((n, n.new_ones(len(n), 1)), dim=1)
        self.read += (with_one.T @ with_one).cpu()
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
        """‖n − xA‖ / ‖n‖ over all tokens, with the matrix A that minimises it."""
        total = self.read.diagonal()[:-1].sum()
        explained = (torch.linalg.pinv(self.stream, hermitian=True) @ self.cross * self.cross).sum()
        return (1 - explained / total).clamp(min=0).sqrt().item()


@contextlib.contextmanager
def record_moments(model):
    """Within `with`, record the Moments of each block while model runs; a list in the order of the blocks."""
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
def mean_loss(model, x, y):
    """The mean loss of model on inputs x and targets y, (n, T) int64 each, in nats per target."""
    device = model.lm_head.weight.device
    batch_size = max(1, N_LOGITS // (x.size(1) * model.config.vocab_size))
    total = 0.0
    for inputs, targets in zip(x.split(batch_size), y.split(batch_size), strict=True):
        _, losses = model(inputs.to(device), targets.to(device), reduction="none")
        total += losses.double().sum().item()
    return total / (y >= 0).sum().item()


def best_keys(w_q, w_k, moments, n_kv_head):
    """The W_K with which W_Q = I gives the attention logits of (W_Q, W_K) best, and the relative error that remains.

    w_q: (d + 1, n_head·d_k), w_k: (d + 1, n_kv_head·d_k), with the biases as last rows. moments: (d + 1, d + 1), the
    sum of [n, 1]ᵀ[n, 1] over the tokens n that attention reads. Returns (w_k, ‖logits − new logits‖ / ‖logits‖).

    Head i has the logits n·W_Q,i·(m·W_K,i)ᵀ. With W_Q = I its query is n_i, the head's d_k coordinates of n. The least-
    squares solution over all pairs (n, m) of tokens is W_K,i·Pᵀ, where n_i·P is the regression of n·W_Q,i on n_i; P
    does not depend on W_K,i. Heads that share a key share P. The error ignores the part of the logits that is the same
    for all keys of a query, as softmax does.
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


def best_keys_of_block(model, number, moments):
    """`best_keys` for block `number` of a GPT, given the Moments of that block."""
    block = read_weights(model).blocks[number]
    rows = [torch.cat((block[name].weight, block[name].bias[None])).cpu() for name in "qk"]
    return best_keys(*rows, moments.read, model.config.kv_heads)


@torch.no_grad()
def set_keys(model, number, w_k=None):
    """Set W_Q = I and W_K = w_k in block `number` of a GPT, in place.

    w_k: (d + 1, n_kv_head·d_k), with the bias as last row; None: W_K is not changed.
    """
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
    """The GPT with wq_identity=True that is equal to model, a GPT in which W_Q is I in every block."""
    weights = read_weights(model)
    for block in weights.blocks:
        q = block.pop("q")
        assert torch.equal(q.weight, torch.eye(len(q.weight)).to(q.weight)) and not q.bias.any()
    return build_model(weights, replace(model.config, wq_identity=True), model)


def check_keys_can_be_fitted(model):
    """Raise ValueError for a GPT in which W_Q cannot be replaced by the identity and a fitted W_K."""
    config = model.config
    check_known(model)
    for name in ("wq_identity", "wk_identity"):
        if getattr(config, name):
            raise ValueError(f"{name} must be False, got True: use a model with W_Q and W_K, such as a baseline")
    if config.qk_norm:
        raise ValueError(
            "qk_norm=True normalises queries and keys, and W_K is fitted without that: use a model without"
        )
    if config.pos == "rope":
        raise ValueError(
            "pos=rope rotates queries and keys by their distance, and no single W_K fits all distances: use a model "
            "with pos=learned or pos=none"
        )


def fit_keys(model, x):
    """A copy of a GPT in which W_Q, still a parameter, is I in every block and W_K is fitted.

    x: (n, T) int64, the tokens of the fit. Each block is fitted to what it reads after the blocks before it have been
    changed. Raises ValueError (`check_keys_can_be_fitted`).
    """
    check_keys_can_be_fitted(model)
    fitted = copy.deepcopy(model)
    for number in range(len(model.transformer.h)):
        with record_moments(fitted) as moments:
            mean_loss(fitted, x, x)
        set_keys(fitted, number, best_keys_of_block(fitted, number, moments[number])[0])
    return fitted


def measure(model, train, val):
    """Measure a trained GPT: {'loss', 'loss_fitted', 'loss_uniform', 'layers': [Layer]}.

    train: inputs and targets, (n, T) int64 each, on which W_K is fitted. val: the same for the losses, in nats per
    target: of the model itself, with W_Q = I and fitted W_K in all layers, and with uniform attention in all layers.
    Raises ValueError (`check_keys_can_be_fitted`).
    """
    check_keys_can_be_fitted(model)
    with record_moments(model) as moments:
        mean_loss(model, *train)
    layers, blocks = [], read_weights(model).blocks
    all_uniform = copy.deepcopy(model)
    for number, (block, sums) in enumerate(zip(blocks, moments, strict=True)):
        w_k, logit_error = best_keys_of_block(model, number, sums)
        losses = []
        for keys in (None, w_k, torch.zeros_like(w_k)):
            changed = copy.deepcopy(model)
            set_keys(changed, number, keys)
            losses.append(mean_loss(changed, *val))
        set_keys(all_uniform, number, torch.zeros_like(w_k))
        squares = sums.stream.diagonal().sum().item()
        layers.append(
            Layer(
                condition_number(block["q"].weight),
                torch.linalg.svdvals(block["q"].weight).tolist(),
                sums.norm_from_linear(),
                (squares / sums.attn) ** 0.5,
                (sums.before_mlp / sums.mlp) ** 0.5,
                logit_error,
                *losses,
            )
        )
    return {
        "loss": mean_loss(model, *val),
        "loss_fitted": mean_loss(fit_keys(model, train[0]), *val),
        "loss_uniform": mean_loss(all_uniform, *val),
        "layers": layers,
    }


def table(found):
    """The result of `measure` as a Markdown table, a row per layer; losses as differences from the model's own."""

    def difference(loss):
        return f"{loss - found['loss']:+.4f}"

    rows = []
    for number, layer in enumerate(found["layers"]):
        values = layer.singular_values
        spectrum = f"{values[0]:.3g}, {values[len(values) // 2]:.3g}, {values[-1]:.3g}"
        distances = (layer.norm_from_linear, layer.skip_over_attention, layer.skip_over_mlp, layer.logit_error)
        losses = (layer.loss_kept, layer.loss_fitted, layer.loss_uniform)
        rows.append([str(number), f"{layer.cond:.3g}", spectrum, *(f"{distance:.2f}" for distance in distances)])
        rows[-1] += [difference(loss) for loss in losses]
    rows.append(["all", *7 * [""], difference(found["loss_fitted"]), difference(found["loss_uniform"])])
    return page.Table(COLUMNS, rows).markdown()


def draw(found, path):
    """Write the singular values of W_Q in each layer to a PNG."""
    from matplotlib import colormaps

    layers, figure = found["layers"], drawing.new_figure(7, 4.2)
    panel = figure.subplots()
    colours = colormaps["viridis"](torch.linspace(0, 0.9, len(layers)).tolist())
    for number, (layer, colour) in enumerate(zip(layers, colours, strict=True)):
        values = layer.singular_values
        panel.plot(range(1, len(values) + 1), values, color=colour, label=f"layer {number}")
    panel.set(yscale="log", xlabel="index, from the largest", ylabel="singular value of W_Q")
    panel.set_title("Singular values of W_Q in each layer")
    panel.legend(frameon=False, ncols=2 if len(layers) > 6 else 1)
    drawing.save(figure, path)


def main(argv):
    """The command; see the module's docstring."""
    cfg = configurator.parse(TrainedModelConfig, argv)
    state = checkpoint.load(cfg.ckpt)
    model = checkpoint.build_model(state).eval().to(devices.choose_device(cfg.device))
    check_keys_can_be_fitted(model)
    train, val = (recorded_windows(state, split, cfg.windows, cfg.data_dir, cfg.dataset) for split in data.SPLITS)
    found = measure(model, train, val)
    text = (
        f"{cfg.ckpt}, step {state['step']}: loss {found['loss']:.4f} nats per target on {len(val[0])} validation "
        f"windows. Differences from it, with one layer changed and with all:\n\n{table(found)}"
    )
    folder = Path(cfg.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    entries = {**found, "layers": [asdict(layer) for layer in found["layers"]], "options": asdict(cfg)}
    write_json(folder / "layers.json", entries)
    draw(found, folder / "spectra.png")
    write_text(folder / "report.md", f"{text}\n\n{LEGEND}\n\n![Spectra](spectra.png)\n")
    print(f"{text}\n\nwrote {folder}/report.md, {folder}/layers.json, {folder}/spectra.png")


if __name__ == "__main__":
    configurator.run(main)
