"""Remark 3 as an experiment: how far f_M(x) = L⁻¹(M L(x)) is from linear for random matrices M, as d grows.

    python -m theory.layernorm_linearity

Writes table.md and linearity.png to out_dir. As in Section 8.1, matrices multiply column vectors from the left.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

import configurator
from configurator import FilePath, require
from engine.files import make_folder, write_text
from studies import drawing, page
from theory.layernorm import centre, lemma_8_1, operator_norm


@dataclass
class LinearityConfig:
    """Remark 3 as an experiment: how far f_M is from linear for random M."""

    dims: tuple[int, ...] = (16, 64, 256, 1024, 4096, 16384, 65536)  # dimensions d
    max_norm_dim: int = 4096  # the largest d for the matrices whose operator norm is computed
    seeds: int = 5  # random matrices in each case
    inputs: int = 512  # random vectors for each matrix
    eps: float = 1e-5  # the norm's ε
    out_dir: FilePath = "results/layernorm_linearity"  # where table.md and linearity.png are written

    def __post_init__(self):
        if not self.dims or min(self.dims) < 2:
            raise ValueError(f"dims must be one or more numbers of 2 or more, got {self.dims}")
        require(self, positive="seeds inputs eps")


INPUTS = {
    "unit": "length 1 (Remark 3)",
    "rms1": "entries N(0, 1)",
    "varied": "entries N(0, s²), s from ½ to 2",
}


def draw_inputs(kind, d, n, generator):
    """n random vectors in d dimensions, (n, d) float64, with the lengths that INPUTS describes for this kind."""
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    if kind == "unit":
        return x / x.norm(dim=-1, keepdim=True)
    if kind == "varied":
        return x * 2 ** (2 * torch.rand(n, 1, generator=generator, dtype=torch.float64) - 1)
    return x


def gaussian_images(x, generator):
    """M x for the rows of x (n, d) and one random M with entries N(0, 1/d), without drawing all of M if n < d.

    With xᵀ = QR, M xᵀ = (MQ)R, and MQ has independent entries N(0, 1/d) as well, because Q's columns are orthonormal.
    """
    n, d = x.shape
    rest = torch.linalg.qr(x.T, mode="r").R if n < d else x.T
    return (torch.randn(d, len(rest), generator=generator, dtype=x.dtype) / math.sqrt(d) @ rest).T


def linearity(lengths, image_lengths, d, eps):
    """How far f_M is from linear on inputs c, given their lengths ‖c‖ and ‖Mc‖, both (n,): a dict of three numbers.

    undefined: the share of inputs for which f_M is undefined. The others are over the remaining inputs:
    coefficient: the median of a(x), where f_M(x) = a(x)·Mx.
    distance: the root mean square of f_M(x) − bMx divided by that of f_M(x), with the number b that minimises it; 0
    means linear, 1 is the maximum.
    """
    room = d * eps + (lengths.square() - image_lengths.square())
    defined = room > 0
    a, w = (d * eps / room[defined]).sqrt(), image_lengths[defined].square()
    if not len(a):
        return {"undefined": 1.0, "coefficient": math.nan, "distance": math.nan}
    captured = (a * w).sum().square() / (w.sum() * (a.square() * w).sum())
    distance = (1 - captured).clamp(min=0).sqrt()
    return {
        "undefined": 1 - defined.double().mean().item(),
        "coefficient": a.median().item(),
        "distance": distance.item(),
    }


def measure(cfg):
    """Remark 3's experiment: one record per case (matrix, inputs, d) and seed, with the numbers of `linearity`.

    matrix: 'gaussian', entries N(0, 1/d); 'scaled', such a matrix divided by its operator norm; or 'lemma', Lemma 8.1's
    M₀ for such an A, on centred inputs.
    """
    records = []
    for d in cfg.dims:
        for seed in range(cfg.seeds):
            generator = torch.Generator().manual_seed(1_000_003 * seed + d)
            matrices = {"gaussian": None}
            if d <= cfg.max_norm_dim:
                A = torch.randn(d, d, generator=generator, dtype=torch.float64) / math.sqrt(d)
                matrices |= {"scaled": A / operator_norm(A), "lemma": lemma_8_1(A).M}
            for inputs in INPUTS:
                x = draw_inputs(inputs, d, cfg.inputs, generator)
                for matrix, M in matrices.items():
                    c = centre(x) if matrix == "lemma" else x
                    image = gaussian_images(c, generator) if M is None else c @ M.T
                    case = dict(matrix=matrix, inputs=inputs, d=d, seed=seed)
                    records.append(case | linearity(c.norm(dim=-1), image.norm(dim=-1), d, cfg.eps))
        print(f"d = {d} done", flush=True)
    return records


def summarise(records):
    """(matrix, inputs, d) -> name -> (mean, standard deviation over seeds, which is 0 for one seed); sorted."""
    cases = {}
    for record in records:
        cases.setdefault((record["matrix"], record["inputs"], record["d"]), []).append(record)
    summary = {}
    for case in sorted(cases):
        summary[case] = {}
        for name in ("undefined", "coefficient", "distance"):
            values = torch.tensor([record[name] for record in cases[case]], dtype=torch.float64)
            summary[case][name] = (values.mean().item(), values.std().item() if len(values) > 1 else 0.0)
    return summary


def table(summary):
    """A Markdown table of the summary, mean ± standard deviation over matrices."""
    rows = []
    for (matrix, inputs, d), row in summary.items():
        (undefined, its_deviation), *others = (row[name] for name in ("undefined", "coefficient", "distance"))
        texts = [f"{100 * undefined:.1f} ± {100 * its_deviation:.1f} %"]
        texts += [f"{mean:.3g} ± {deviation:.1g}" for mean, deviation in others]
        rows.append([matrix, inputs, f"{d:,}", *texts])
    head = ["M", "inputs", "d", "undefined for", "coefficient", "distance from linear"]
    return page.Table(head, rows, words=("M", "inputs")).markdown()


def draw(summary, path):
    """Write linearity.png: the distance from linear against d, one panel for each kind of input."""
    blue, orange, green, *_ = drawing.COLOURS
    styles = {
        "gaussian": dict(label="Gaussian M", color=orange, marker="o", markersize=5),
        "scaled": dict(label="Gaussian M / ‖M‖", color=blue, marker="^", markersize=11, markerfacecolor="none"),
        "lemma": dict(label="Lemma 8.1's M₀", color=green, marker="s", markersize=4),
    }
    figure = drawing.new_figure(9.5, 4.3)
    panels = figure.subplots(1, 3, sharey=True)
    for panel, (inputs, title) in zip(panels, INPUTS.items(), strict=True):
        for matrix, style in styles.items():
            points = sorted((d, row) for (m, i, d), row in summary.items() if (m, i) == (matrix, inputs))
            mean, spread = ([row["distance"][k] for _, row in points] for k in (0, 1))
            dims = [d for d, _ in points]
            panel.errorbar(dims, mean, spread, capsize=3, **style)
            if matrix == "gaussian":
                share = [row["undefined"][0] or math.nan for _, row in points]
                panel.plot(dims, share, ":", color="black", label="share of inputs with f undefined, Gaussian M")
        panel.set(xscale="log", yscale="log", xlabel="dimension d")
        panel.set_title(f"inputs: {title}", fontsize=11)
    panels[0].set_ylabel("distance of f from linear (0–1)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    drawing.save(figure, path)


def main(argv):
    """The command; see the module's docstring."""
    cfg = configurator.parse(LinearityConfig, argv)
    folder = Path(cfg.out_dir)
    make_folder(folder)
    summary = summarise(measure(cfg))
    text = table(summary)
    write_text(folder / "table.md", f"{text}\n")
    draw(summary, folder / "linearity.png")
    print(f"{text}\n\nwrote {folder}/table.md, {folder}/linearity.png")


if __name__ == "__main__":
    configurator.run(main)
