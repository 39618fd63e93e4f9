"""Section 8.2 of the paper: what is true, what is not, and the search for J."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from theory import relu_skip

seeds = st.integers(0, 2**31)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def points(h, seed=0):
    return torch.randn(200, h, generator=rng(seed), dtype=torch.float64) * 3


def all_masks(m):
    return torch.tensor(list(itertools.product((False, True), repeat=m)))


@settings(max_examples=40)
@given(seed=seeds, h=st.integers(1, 12), ratio=st.integers(1, 5), data=st.data())
def test_theorem_8_3_the_planted_subset_absorbs_the_skip(seed, h, ratio, data):
    m = ratio * h
    size = data.draw(st.integers(h, m))
    Z = torch.randn(h, h, generator=rng(seed + 1), dtype=torch.float64) if seed % 2 else None
    W1, W2, J = relu_skip.planted_instance(h, size, rng(seed), m, Z)
    assert J.sum() == size
    V1, V2 = relu_skip.theorem_8_3(W1, W2, J, Z, tol=1e-6)
    assert V1.shape == (m, h)
    assert V2.shape == (h, m)
    # The equation holds as well as W₁[J, :] is conditioned.
    condition = torch.linalg.cond(W1[J]).item()
    assert relu_skip.absorption_gap(points(h), W1, W2, V1, V2, Z) < 1e-13 * condition * m
    # Another subset does not, and is refused.
    J[data.draw(st.integers(0, m - 1))] ^= True
    with pytest.raises(ValueError, match="must equal −Z"):
        relu_skip.theorem_8_3(W1, W2, J, Z)


@settings(max_examples=25)
@given(seed=seeds, h=st.integers(2, 14), data=st.data())
def test_theorem_8_3_the_search_finds_a_subset_where_one_was_planted(seed, h, data):
    W1, W2, J = relu_skip.planted_instance(h, data.draw(st.integers(h, 4 * h)), rng(seed))
    search = relu_skip.find_subset(W1, W2, tol=1e-7)
    assert search.subset is not None, search
    assert search.exhaustive
    if h >= 4:  # at most one J then
        assert torch.equal(search.subset, J)
    # Changing a neuron in J leaves no J; changing another neuron does not matter.
    W2[0, 0] += 0.1 if J[0] else 0.0
    W1[0, 0] += 0.0 if J[0] else 0.1
    moved = relu_skip.find_subset(W1, W2, tol=1e-7)
    assert (moved.subset is None) == bool(J[0])
    assert moved.exhaustive


@settings(max_examples=60)
@given(seed=seeds, h=st.integers(1, 3), m=st.integers(1, 10))
def test_the_search_agrees_with_trying_every_subset_of_small_integer_weights(seed, h, m):
    # Small integers make dependent neurons, several J's, none, dead neurons: what a generic instance never shows.
    W1 = torch.randint(-1, 2, (m, h), generator=rng(seed)).double()
    W2 = torch.randint(-1, 2, (h, m), generator=rng(seed + 1)).double()
    outer = torch.einsum("im,mj->mij", W2, W1)
    sums = torch.einsum("sm,mij->sij", all_masks(m).double(), outer)
    exists = bool((sums == -torch.eye(h)).all(-1).all(-1).any())
    search = relu_skip.find_subset(W1, W2)
    assert search.exhaustive
    assert (search.subset is not None) == exists
    if exists:
        assert torch.equal(relu_skip.subset_product(W1, W2, search.subset), -torch.eye(h, dtype=torch.float64))


def test_the_search_is_exact_at_any_width_where_neurons_are_independent_and_says_so_when_it_gives_up():
    W1, W2, J = relu_skip.planted_instance(32, 50, rng(0))
    assert torch.equal(relu_skip.find_subset(W1, W2).subset, J)
    for seed in range(3):  # 19 unknowns, 4 equations: 2^15 cases
        W1, W2, J = relu_skip.planted_instance(2, 8, rng(seed), m=19)
        assert torch.equal(relu_skip.find_subset(W1, W2).subset, J)
    W1, W2 = relu_skip.random_mlp(2, 40, rng(0))  # 40 unknowns, 4 equations
    search = relu_skip.find_subset(W1, W2)
    assert search.subset is None
    assert not search.exhaustive
    assert "gave up" in search.reason
    assert "36" in search.reason
    assert relu_skip.absorb(W1, W2).exists is None
    assert relu_skip.find_subset(W1[:20], W2[:, :20]).exhaustive


@settings(max_examples=20)
@given(seed=seeds, m=st.integers(2, 7))
def test_theorem_8_3_only_if_signs_and_gains_are_all_there_is_when_kinks_are_distinct(seed, m):
    # Without using J: V must be W with rows scaled (which changes nothing) and some negated, and V₂ = W₂ by the sizes
    # of the kinks. Of the 2^m such V, one absorbs the skip if and only if the search finds a J.
    h, generator = 2, rng(seed)
    if seed % 2:
        W1, W2, _ = relu_skip.planted_instance(h, min(m, 2 + seed % 3), generator, m)
    else:
        W1, W2 = relu_skip.random_mlp(h, m, generator)
    assert relu_skip.distinct_neurons(W1, W2)
    signs = 1.0 - 2.0 * all_masks(m).double()
    gaps = [relu_skip.absorption_gap(points(h), W1, W2, sign.unsqueeze(-1) * W1, W2) for sign in signs]
    assert (min(gaps) < 1e-8) == bool(seed % 2) == (relu_skip.find_subset(W1, W2).subset is not None)


def test_theorem_8_3_only_if_is_false_with_dead_or_parallel_neurons():
    for seed, h in itertools.product(range(3), (2, 3, 5)):
        for spoil in ("dead row", "dead column", "parallel"):
            W1, W2 = relu_skip.random_mlp(h, 4 * h, rng(seed))
            if spoil == "dead row":
                W1[:h] = 0
            elif spoil == "dead column":
                W2[:, :h] = 0
            else:
                W1[:h] = 2 * W1[h : 2 * h]
            assert torch.linalg.matrix_rank(W1) == torch.linalg.matrix_rank(W2) == h  # as the theorem asks
            assert not relu_skip.distinct_neurons(W1, W2)
            search = relu_skip.find_subset(W1, W2)
            assert search.exhaustive
            assert search.subset is None
            found = relu_skip.absorb(W1, W2)
            assert found.exists
            assert found.V1.shape == W1.shape
            assert found.V2.shape == W2.shape
            assert relu_skip.absorption_gap(points(h), W1, W2, found.V1, found.V2) < 1e-10


def test_an_mlp_without_a_live_neuron_is_left_open():
    for W1, W2 in ((torch.zeros(4, 2), torch.ones(2, 4)), (torch.ones(4, 2), torch.zeros(2, 4))):
        assert len(relu_skip.merge_neurons(W1.double(), W2.double())[0]) == 0
        assert relu_skip.absorb(W1.double(), W2.double()).exists is None


def test_with_fewer_spare_neurons_than_the_width_the_question_is_left_open():
    W1, W2 = relu_skip.random_mlp(4, 16, rng(0))
    W2[:, 0] = 0
    found = relu_skip.absorb(W1, W2)
    assert found.exists is None
    assert "only if" in found.reason


@settings(max_examples=20)
@given(seed=seeds, h=st.integers(1, 10), extra=st.integers(0, 20))
def test_h_more_neurons_always_absorb_the_skip(seed, h, extra):
    W1, W2 = relu_skip.random_mlp(h, h + extra, rng(seed))
    V1, V2 = relu_skip.widened(W1, W2)
    assert V1.shape == (2 * h + extra, h)
    chosen = W1[relu_skip.independent_rows(W1)]
    assert relu_skip.absorption_gap(points(h), W1, W2, V1, V2) < 1e-13 * torch.linalg.cond(chosen).item()
    with pytest.raises(ValueError, match="rank"):
        relu_skip.widened(torch.zeros_like(W1), W2)


@settings(max_examples=30)
@given(seed=seeds, h=st.integers(1, 4))
def test_merging_neurons_keeps_the_function(seed, h):
    W1 = torch.randint(-1, 2, (12, h), generator=rng(seed)).double()
    W2 = torch.randint(-1, 2, (h, 12), generator=rng(seed + 1)).double()
    small1, small2 = relu_skip.merge_neurons(W1, W2)
    x = points(h)
    torch.testing.assert_close(relu_skip.mlp(x, small1, small2), relu_skip.mlp(x, W1, W2))
    if len(small1):
        assert (relu_skip.parallel_rows(small1) > 0).sum() == len(small1)


def test_corollary_8_3_1_random_weights_absorb_no_difference_of_two_random_skips():
    for h, m in ((2, 8), (3, 12), (4, 16), (6, 24), (3, 7), (5, 40)):
        assert relu_skip.corollary_8_3_1(h, 15, rng(h), m) == (0, 15, 0)


@settings(max_examples=40)
@given(seed=seeds, h=st.integers(2, 8), data=st.data())
def test_corollary_8_3_1_is_false_as_stated_every_weight_has_exceptions(seed, h, data):
    W1, W2 = relu_skip.random_mlp(h, 4 * h, rng(seed))
    Z = torch.randn(h, h, generator=rng(seed + 1), dtype=torch.float64)
    J = torch.zeros(4 * h, dtype=torch.bool)
    J[torch.randperm(4 * h, generator=rng(seed + 2))[: data.draw(st.integers(h, 4 * h))]] = True
    W1_new, W2_new, Z_new = relu_skip.corollary_8_3_1_exception(W1, W2, Z, J)
    assert torch.linalg.matrix_rank(Z - Z_new) == h  # Z' ≠ Z and Z − Z' is invertible: the corollary applies
    x = points(h)
    ours, theirs = relu_skip.mlp(x, W1, W2, Z), relu_skip.mlp(x, W1_new, W2_new, Z_new)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert relu_skip.absorb(W1, W2, Z - Z_new).exists


def test_a_planted_subset_has_between_h_and_m_elements():
    for size in (2, 13):
        with pytest.raises(ValueError, match="at least h=3"):
            relu_skip.planted_instance(3, size, rng(0))


@pytest.mark.parametrize("name", relu_skip.ABSORBING)
@pytest.mark.parametrize("h", [2, 5])
def test_theorem_8_3_holds_for_every_activation_that_is_its_reflection_plus_u(name, h):
    activation = relu_skip.ABSORBING[name]
    Z = torch.randn(h, h, generator=rng(3), dtype=torch.float64)
    W1, W2, J = relu_skip.planted_instance(h, 2 * h, rng(h), 4 * h, Z)
    V1, V2 = relu_skip.theorem_8_3(W1, W2, J, Z, tol=1e-6)
    assert relu_skip.absorption_gap(points(h), W1, W2, V1, V2, Z, activation) < 1e-9
    assert relu_skip.absorption_gap(points(h), W1, W2, V1, V2, Z, lambda u: torch.relu(u) ** 2) > 1e-3
    wide1, wide2 = relu_skip.widened(W1, W2, Z)
    assert relu_skip.absorption_gap(points(h), W1, W2, wide1, wide2, Z, activation) < 1e-9


@settings(max_examples=25, deadline=None)
@given(seed=seeds, h=st.integers(1, 4), m=st.integers(2, 8), name=st.sampled_from(list(relu_skip.ABSORBING)))
def test_theorem_8_3_only_if_neurons_and_linear_functions_are_independent_unless_rows_agree(seed, h, m, name):
    # So V has the neurons of W up to sign, and the linear functions that are left are those of J.
    W1 = torch.nn.functional.normalize(torch.randn(m, h, generator=rng(seed), dtype=torch.float64), dim=-1)
    W1 *= torch.linspace(1, 4, m).double()[:, None]  # distinct, though for h = 1 all are parallel
    x = torch.randn(4000, h, generator=rng(seed + 1), dtype=torch.float64) * 2
    functions = torch.cat((relu_skip.ABSORBING[name](x @ W1.T), x), dim=1)
    singular = torch.linalg.svdvals(functions / functions.norm(dim=0))
    distinct = relu_skip.distinct_neurons(W1, torch.ones(h, m).double(), name)
    assert distinct == (name != "relu" or h > 1)
    assert (singular[-1] > 1e-10) == distinct, singular
    W1[0] = -W1[1]  # f(−u) = f(u) − u
    functions = torch.cat((relu_skip.ABSORBING[name](x @ W1.T), x), dim=1)
    assert torch.linalg.svdvals(functions / functions.norm(dim=0))[-1] < 1e-13
    assert not relu_skip.distinct_neurons(W1, torch.ones(h, m).double(), name)


@pytest.mark.parametrize("name", relu_skip.ABSORBING)
def test_whether_a_skip_is_absorbed_depends_on_the_activation_where_rows_are_parallel(name):
    h = 3
    for factor in (1, 2):
        W1, W2 = relu_skip.random_mlp(h, 4 * h, rng(factor))
        W1[:h] = factor * W1[h : 2 * h]
        found = relu_skip.absorb(W1, W2, activation=name)
        assert found.exists == (factor == 1 or name == "relu")  # GELU(2u) is another neuron than GELU(u)
        if found.exists:
            gap = relu_skip.absorption_gap(points(h), W1, W2, found.V1, found.V2, None, relu_skip.ABSORBING[name])
            assert gap < 1e-10
    W1[0] = 0  # one spare neuron is fewer than h
    assert relu_skip.absorb(W1, W2, activation=name).exists == (True if name == "relu" else None)


@pytest.mark.parametrize("seed", range(3))
def test_squared_relu_and_gated_mlps_absorb_no_skip(seed):
    W1, W2 = relu_skip.random_mlp(4, 16, rng(seed))
    W3, _ = relu_skip.random_mlp(4, 16, rng(seed + 9))
    Z = torch.randn(4, 4, generator=rng(seed), dtype=torch.float64)
    squared = partial(relu_skip.mlp, W1=W1, W2=W2, activation=lambda u: torch.relu(u) ** 2)
    gated = [
        partial(relu_skip.gated_mlp, W1=W1, W3=W3, W2=W2, activation=activation)
        for activation in relu_skip.ABSORBING.values()
    ]
    for function in (squared, *gated):
        assert relu_skip.derivative_at_zero(function, 4).abs().max() == 0  # whatever W is
        with_skip = relu_skip.derivative_at_zero(lambda x, own=function: own(x) + Z @ x, 4)
        torch.testing.assert_close(with_skip, Z)
    plain = partial(relu_skip.mlp, W1=W1, W2=W2, activation=torch.nn.functional.gelu)
    torch.testing.assert_close(relu_skip.derivative_at_zero(plain, 4), W2 @ W1 / 2)
