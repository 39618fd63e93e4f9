"""Section 8.1 of the paper: what holds for LayerNorm, RMSNorm and Dynamic Tanh, and what does not."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import model
from theory import layernorm as ln
from theory import layernorm_linearity

seeds = st.integers(0, 2**31)
widths = st.integers(2, 40)
epsilons = st.sampled_from((1e-5, 1e-3, 0.5, 10.0))


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def basis(seed, d):
    """A random invertible matrix of moderate condition: orthogonal · diagonal · orthogonal."""
    left, right = torch.linalg.qr(randn(seed, 2, d, d)).Q
    return left * (0.3 + randn(seed + 1, d).abs()) @ right


def random_mlp(seed, d):
    up, down = randn(seed, d, 4 * d) / d**0.5, randn(seed + 1, 4 * d, d) / (4 * d) ** 0.5
    return lambda x: F.gelu(x @ up) @ down


def basis_with(row, seed, d):
    """A random invertible A with Aᵀ·row = 1, so that Lemma 8.1's v is row up to its length; row (d,) is not 0."""
    A = basis(seed, d)
    i = row.abs().argmax()
    A[i] += (1 - row @ A) / row[i]
    return A


@settings(max_examples=40)
@given(seed=seeds, d=widths, eps=epsilons, scale=st.sampled_from((1e-3, 1.0, 30.0)))
def test_the_norms_and_their_inverses(seed, d, eps, scale):
    x = scale * randn(seed, 3, 5, d) + 2
    torch.testing.assert_close(ln.layer_norm(x, eps), F.layer_norm(x, (d,), eps=eps))
    torch.testing.assert_close(ln.rms_norm(x, eps), F.rms_norm(x, (d,), eps=eps))
    gamma, beta, alpha = randn(seed + 1, 3, d)
    dyt = model.DynamicTanh(d).double()
    for parameter, value in ((dyt.alpha, alpha[:1]), (dyt.weight, gamma), (dyt.bias, beta)):
        parameter.data.copy_(value)
    with torch.no_grad():
        torch.testing.assert_close(ln.dynamic_tanh(x, alpha[:1], gamma, beta), dyt(x))
    # One way and back; the distance to the ball's surface sets the precision: see rms_norm_inverse.
    loss = 1e-14 * (1 + x.square().mean(-1).max().item() / eps)
    y = ln.layer_norm_inverse(ln.layer_norm(x, eps), eps)
    torch.testing.assert_close(y, ln.centre(x), rtol=loss, atol=loss * scale)
    torch.testing.assert_close(ln.rms_norm_inverse(ln.rms_norm(x, eps), eps), x, rtol=loss, atol=loss * scale)
    # And from any point of the ball.
    z = F.normalize(randn(seed + 2, 7, d), dim=-1) * math.sqrt(d) * (0.999 * torch.rand(7, 1, dtype=torch.float64))
    torch.testing.assert_close(ln.rms_norm(ln.rms_norm_inverse(z, eps), eps), z)
    z = ln.centre(z)
    torch.testing.assert_close(ln.layer_norm(ln.layer_norm_inverse(z, eps), eps), z)
    gamma, alpha, small = gamma + 0.1 * gamma.sign(), alpha.abs().clamp(0.1, 2), ln.rms_norm(x, eps)
    there = ln.dynamic_tanh(small, alpha, gamma, beta)
    torch.testing.assert_close(ln.dynamic_tanh_inverse(there, alpha, gamma, beta), small, rtol=1e-6, atol=1e-6)


def test_the_inverses_refuse_what_the_norms_do_not_reach():
    z = torch.tensor([3.0, -3.0])
    with pytest.raises(ValueError, match="open ball"):
        ln.layer_norm_inverse(z / 3, 1e-5)  # its length is √d exactly
    with pytest.raises(ValueError, match="mean 0"):
        ln.layer_norm_inverse(torch.tensor([0.1, 0.2]), 1e-5)
    with pytest.raises(ValueError, match="box"):
        ln.dynamic_tanh_inverse(z, 1.0, torch.tensor([4.0, 3.0]), 0.0)
    with pytest.raises(ValueError, match="no inverse"):
        ln.dynamic_tanh_inverse(z, torch.tensor([0.5, 0.0]), 4.0, 0.0)


@settings(max_examples=40)
@given(seed=seeds, d=widths, eps=epsilons, batch=st.sampled_from(((), (2,), (3, 2))))
def test_lemma_8_1_the_conjugation(seed, d, eps, batch):
    A = randn(seed, *batch, d, d) + 2 * torch.eye(d)
    v, scale, M = ln.lemma_8_1(A)
    torch.testing.assert_close(M, scale[..., None, None] * torch.diag_embed(v) @ A)
    torch.testing.assert_close(v.norm(dim=-1), torch.ones(batch, dtype=torch.float64))
    # M₀ maps H into H, with norm 1 there: by an orthonormal basis of H, as in the proof.
    Q = torch.linalg.qr(torch.cat((torch.ones(d, 1), torch.eye(d)[:, 1:]), 1).double()).Q[:, 1:]
    size = M.abs().amax((-2, -1)).max().item()
    assert (M @ Q).sum(-2).abs().max() < 1e-12 * size * d
    norms = torch.linalg.matrix_norm(Q.T @ M @ Q, ord=2)
    torch.testing.assert_close(norms, torch.ones(batch, dtype=torch.float64))
    for length in (1e-3, 1.0, 30.0):  # from below √ε to far above it
        x = length * randn(seed + 1, *batch, d) + 3
        f = ln.conjugate(x, M, eps)
        assert f.mean(-1).abs().max() <= 1e-12 * (1 + size * d) * length  # f maps to H
        want = ln.matvec(M, ln.layer_norm(x, eps))
        for h in (0.0, 7.0, x.sum(-1, keepdim=True)):  # f + h·1 solves (8) too
            torch.testing.assert_close(ln.layer_norm(f + h, eps), want, rtol=1e-6, atol=1e-6)
        # f is L⁻¹ ∘ M₀ ∘ L, where that can be computed.
        if length**2 < 1e4 * eps:
            torch.testing.assert_close(ln.layer_norm_inverse(ln.centre(want), eps), f, rtol=1e-6, atol=1e-8)
        # Any smaller |λ| works, with either sign; a larger one leaves the ball in the direction whose length M₀ keeps.
        g = ln.conjugate(x, -0.6 * M, eps)
        torch.testing.assert_close(ln.layer_norm(g, eps), -0.6 * want, rtol=1e-6, atol=1e-6)
    longest = torch.linalg.svd(M - M.mean(-1, keepdim=True)).Vh[..., 0, :]
    ln.conjugate(1e3 * longest, M, eps)
    with pytest.raises(ValueError, match="not defined there"):
        ln.conjugate(1e3 * math.sqrt(d * max(eps, 1)) * longest, 1.1 * M, eps)


def test_lemma_8_1_has_no_scale_when_a_row_is_constant():
    for d in (2, 3, 8):
        A = basis_with(torch.eye(d, dtype=torch.float64)[d - 1], seed=d, d=d)
        with pytest.raises(ValueError, match="constant"):
            ln.lemma_8_1(A)
        # Because Diag(v) A is 0 on H: only f = h·1 is left.
        assert (torch.diag(torch.eye(d, dtype=torch.float64)[d - 1]) @ ln.centre(A)).abs().max() < 1e-14
    for bad in (torch.ones(3, 3), torch.zeros(3, 3), randn(0, 6, 5) @ randn(1, 5, 6)):
        with pytest.raises(ValueError, match="singular"):
            ln.lemma_8_1(bad.double())
    with pytest.raises(ValueError, match="2 or more"):
        ln.lemma_8_1(torch.ones(1, 1))


@settings(max_examples=20)
@given(seed=seeds, d=st.integers(3, 12), zeros=st.integers(0, 1))
def test_lemma_8_1_f_is_one_to_one_only_where_v_has_no_zero(seed, d, zeros):
    row = randn(seed, d)
    row += row.sign()
    row[:zeros] = 0
    v, _, M = ln.lemma_8_1(basis_with(row, seed + 1, d))
    assert (v[:zeros].abs() < 1e-12).all()
    singular = torch.linalg.svdvals(M - M.mean(-1, keepdim=True))  # the last belongs to 1
    assert (singular[d - 2] > 1e-10) == (zeros == 0)


@settings(max_examples=40)
@given(seed=seeds, d=widths, eps=epsilons, scale=st.sampled_from((1.0, -1.0, 0.5, -0.01)))
def test_theorem_8_2_equation_9_and_the_freedom_of_scale(seed, d, eps, scale):
    theta, gain, mlp = basis(seed, d), randn(seed + 2, d).abs() + 0.2, random_mlp(seed + 3, d)
    x, norm = randn(seed + 5, 50, d), lambda u: gain * ln.layer_norm(u, eps)
    for h in (None, lambda x: x.sum(-1)):
        rewritten = ln.layernorm_theorem_8_2(theta, gain, mlp, eps, h, scale)
        cond = (rewritten.gain.abs().max() / rewritten.gain.abs().min()).item()
        assert ln.equation_9_gap(x, theta, norm, mlp, rewritten) < 1e-10 * cond / abs(scale)
    # The stream's mean is h's: what a skip can carry besides.
    torch.testing.assert_close((x + rewritten.mlp(x)).mean(-1), x.sum(-1))
    # D' is Diag(λv)⁻¹, and v spans all p with Diag(p)ΘD H ⊂ H: D' is fixed up to the scalar.
    p = torch.linalg.svd(ln.centre(theta * gain).T).Vh[-1]
    product = rewritten.gain * p
    torch.testing.assert_close(product, product[0].expand(d), rtol=1e-6, atol=0)
    # Another Θ, and the two sides differ.
    assert ln.equation_9_gap(x, theta + 0.1 * randn(seed + 6, d, d), norm, mlp, rewritten) > 1e-4


def test_theorem_8_2_has_no_solution_where_v_has_a_zero_except_for_a_constant_row():
    for seed, d in enumerate((3, 5, 9)):
        gain, mlp = randn(seed, d).abs() + 0.2, random_mlp(seed, d)
        row = randn(seed + 1, d)
        row[1] = 0
        theta = basis_with(row, seed, d) / gain
        with pytest.raises(ValueError, match="no diagonal D'"):
            ln.layernorm_theorem_8_2(theta, gain, mlp, 1e-5)
        # A constant row of ΘD: there is no λ₀ and no inverse of Diag(v), and yet a solution, with one 0 in D'.
        theta = basis_with(torch.eye(d, dtype=torch.float64)[2], seed, d) / gain
        for scale in (1.0, -0.5):
            rewritten = ln.layernorm_theorem_8_2(theta, gain, mlp, 1e-5, scale=scale)
            assert (rewritten.gain == 0).tolist() == [i == 2 for i in range(d)]
            x = randn(seed + 2, 40, d)
            assert ln.equation_9_gap(x, theta, lambda u, D=gain: D * ln.layer_norm(u, 1e-5), mlp, rewritten) < 1e-10


def test_theorem_8_2_refuses_what_it_does_not_cover():
    theta, gain = basis(0, 4), torch.ones(4, dtype=torch.float64)
    for scale in (0, 1.5, -2, math.nan):
        with pytest.raises(ValueError, match="scale"):
            ln.layernorm_theorem_8_2(theta, gain, torch.relu, 1e-5, scale=scale)
    with pytest.raises(ValueError, match="positive"):
        ln.layernorm_theorem_8_2(theta, -gain, torch.relu, 1e-5)


def test_theorem_8_2_in_float32_is_as_exact_as_float32_allows():
    theta, gain, mlp = basis(0, 32).float(), torch.ones(32), torch.relu
    x = randn(1, 100, 32).float()
    for theorem, norm in (
        (ln.layernorm_theorem_8_2, ln.layer_norm),
        (ln.rmsnorm_theorem_8_2, ln.rms_norm),
    ):
        rewritten = theorem(theta, gain, mlp, 1e-5)
        assert rewritten.gain.dtype == rewritten.mlp(x).dtype == torch.float32
        assert ln.equation_9_gap(x, theta, lambda u, norm=norm: norm(u, 1e-5), mlp, rewritten) < 1e-2


def test_theorem_8_2_leaves_the_residual_stream_bounded_so_skips_do_not_carry_the_old_one():
    theta, gain, mlp = basis(0, 16), torch.ones(16, dtype=torch.float64), random_mlp(1, 16)
    rewritten = ln.layernorm_theorem_8_2(theta, gain, mlp, 1e-5)
    x = randn(2, 100, 16)
    small, large = ((x + rewritten.mlp(x)).norm(dim=-1) for x in (x, 100 * x))
    assert (large / small).median() < 1.01  # of inputs 100 times as long
    assert small.median() < 0.1 * x.norm(dim=-1).median()


@settings(max_examples=30)
@given(seed=seeds, d=st.integers(1, 40), eps=epsilons)
def test_remark_4_rmsnorm_needs_no_v_and_takes_any_large_enough_gain(seed, d, eps):
    theta, gain, mlp = basis(seed, d), randn(seed + 2, d), random_mlp(seed + 3, d)
    x = randn(seed + 5, 50, d)
    norm = torch.linalg.matrix_norm(theta * gain, ord=2)
    chosen = 1.01 * norm * (1 + randn(seed + 6, d).abs()) * randn(seed + 7, d).sign()
    for new_gain in (None, chosen):
        rewritten = ln.rmsnorm_theorem_8_2(theta, gain, mlp, eps, new_gain)
        assert ln.equation_9_gap(x, theta, lambda u: gain * ln.rms_norm(u, eps), mlp, rewritten) < 1e-10
    with pytest.raises(ValueError, match="too small"):
        ln.rmsnorm_theorem_8_2(theta, gain, mlp, eps, 0.9 * norm * torch.ones_like(gain))


@settings(max_examples=30)
@given(seed=seeds, d=st.integers(2, 40))
def test_remark_4_dynamic_tanh_needs_a_box_in_a_box(seed, d):
    theta, mlp = basis(seed, d), random_mlp(seed + 3, d)
    gamma, beta = randn(seed + 1, 2, d)
    alpha = 0.5 * torch.ones(d, dtype=torch.float64) + 0.3 * torch.rand(d, dtype=torch.float64)
    rewritten = ln.dyt_theorem_8_2(theta, alpha, gamma, beta, mlp, new_alpha=torch.tensor(-0.7, dtype=torch.float64))
    x = randn(seed + 5, 50, d)
    assert ln.equation_9_gap(x, theta, lambda u: ln.dynamic_tanh(u, alpha, gamma, beta), mlp, rewritten) < 1e-10
    # It is not enough that the old norm is one to one onto its image: Θ maps out of a smaller box.
    worst = 30 * torch.sign(theta[0] * gamma) / alpha
    image = ln.matvec(theta, ln.dynamic_tanh(worst, alpha, gamma, 0.0))
    assert image[0].item() == pytest.approx(rewritten.gain[0].item())
    with pytest.raises(ValueError, match="box"):
        ln.dynamic_tanh_inverse(image, alpha, 0.99 * rewritten.gain, 0.0)


def test_remark_3_f_is_linear_for_an_isometry():
    for d in (2, 7, 30):
        M = torch.linalg.qr(randn(d, d, d)).Q
        x = 10 * randn(0, 50, d)
        torch.testing.assert_close(ln.conjugate(x, M, 1e-5, centred=False), ln.matvec(M, x), rtol=1e-6, atol=1e-6)
        lengths = x.norm(dim=-1)
        assert layernorm_linearity.linearity(lengths, lengths, d, 1e-5) == pytest.approx(
            dict(undefined=0, coefficient=1, distance=0), abs=1e-7
        )


def test_remark_3_the_experiment_measures_the_distance_from_the_best_linear_map():
    # By least squares over all linear maps, on far more inputs than dimensions, and by f itself.
    d, eps = 12, 1e-5
    A = randn(3, d, d) / math.sqrt(d)
    M = A / torch.linalg.matrix_norm(A, ord=2)
    x = randn(4, 60_000, d)
    f = ln.conjugate(x, M, eps, centred=False)
    best = torch.linalg.lstsq(x, f).solution
    distance = (f - x @ best).norm() / f.norm()
    measured = layernorm_linearity.linearity(x.norm(dim=-1), (x @ M.T).norm(dim=-1), d, eps)
    assert measured["distance"] >= distance
    assert measured["distance"] == pytest.approx(distance.item(), rel=0.1)


def test_remark_3_holds_for_unit_vectors_in_huge_dimensions_and_not_for_residual_streams(tmp_path, capsys):
    arguments = [f"--out_dir={tmp_path}", "--seeds=2", "--inputs=200"]
    layernorm_linearity.main([*arguments, "--dims=32,256", "--max_norm_dim=256"])
    assert capsys.readouterr().out.count("| gaussian |") == 6
    assert (tmp_path / "linearity.png").stat().st_size > 10_000
    assert (tmp_path / "table.md").read_text(encoding="utf-8").count("| lemma |") == 6
    cfg = layernorm_linearity.LinearityConfig(dims=(256, 30_000), seeds=1, inputs=200, max_norm_dim=256)
    summary = layernorm_linearity.summarise(layernorm_linearity.measure(cfg))
    near, far = summary["gaussian", "unit", 30_000], summary["gaussian", "unit", 256]
    assert near["undefined"][0] == 0
    assert near["distance"][0] < 0.05
    assert near["coefficient"][0] == pytest.approx(1, abs=0.02)
    assert far["undefined"][0] > 0.2
    assert far["distance"][0] > 0.2
    assert summary["gaussian", "rms1", 30_000]["undefined"][0] > 0.2
    # With the lemma's M₀ f is defined everywhere, and nearly linear on a sphere, but not across lengths.
    lemma = {inputs: summary["lemma", inputs, 256] for inputs in layernorm_linearity.INPUTS}
    assert all(row["undefined"][0] == 0 for row in lemma.values())
    assert lemma["unit"]["distance"][0] < 0.03
    assert lemma["varied"]["distance"][0] > 0.3


def test_remark_3_images_without_the_matrix_have_its_distribution():
    # Inner products of images of two vectors: mean x·y, variance (|x|²|y|² + (x·y)²)/d, however they are drawn.
    two = torch.tensor([[3.0, 0, 0, 0, 0, 0], [0.6, 0.8, 0, 0, 0, 0]], dtype=torch.float64)
    for x in (two, torch.cat((two, torch.ones(6, 6)))):  # fewer inputs than dimensions, then more
        generator = torch.Generator().manual_seed(0)
        images = torch.stack([layernorm_linearity.gaussian_images(x, generator) for _ in range(4000)])
        products = (images[:, 0] * images[:, 1]).sum(-1)
        assert products.mean().item() == pytest.approx(1.8, abs=0.08)
        assert products.var().item() == pytest.approx((9 + 1.8**2) / 6, rel=0.1)


def test_remark_3_a_users_mistake_is_one_line(refuses):
    refuses(layernorm_linearity.main, "--dims=1", words=["dims", "2 or more"])
