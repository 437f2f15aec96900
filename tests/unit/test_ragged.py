"""Clouds of different sizes in one batch: equal to single solves, padding without weight, gradients that stay out of it."""

from __future__ import annotations

import pytest
import torch

import sbot
from tests.conftest import weights

TIGHT = sbot.Sinkhorn(tol=1e-11)
LEFT, RIGHT = (3, 8, 1, 5), (6, 2, 4, 9)


@pytest.fixture
def parts(generator):
    def cloud(n, shift):
        return torch.randn(n, 2, generator=generator, dtype=torch.float64) + shift

    x, y = [cloud(n, 0) for n in LEFT], [cloud(n, 1) for n in RIGHT]
    return x, y, [weights(n, generator=generator) for n in LEFT], [weights(n, generator=generator) for n in RIGHT]


def singles(parts, eps, **options):
    return [sbot.solve_bridge((p, a), (q, b), eps, **options) for p, q, a, b in zip(*parts, strict=True)]


def test_padding_repeats_an_atom_without_weight(parts):
    x, _, a, _ = parts
    mu = sbot.Discrete.from_list(x, a)
    assert mu.sizes.tolist() == list(LEFT) and mu.points.shape == (4, 8, 2)
    assert repr(mu) == "Discrete(n<=8, d=2, batch=(4,), torch.float64)"
    for k, n in enumerate(LEFT):
        assert torch.equal(mu.points[k, :n], x[k]) and torch.equal(mu.weights[k, :n], a[k])
        assert bool((mu.points[k, n:] == x[k][-1]).all()) and bool((mu.weights[k, n:] == 0).all())
        assert mu.mask[k].tolist() == [True] * n + [False] * (8 - n)
    torch.testing.assert_close(sbot.Discrete.from_list(x).mass, torch.ones(4, dtype=torch.float64))
    flat = sbot.Discrete.ragged(torch.cat(x), torch.tensor([0, 3, 11, 12, 17]), torch.cat(a))
    assert torch.equal(flat.points, mu.points) and torch.equal(flat.weights, mu.weights)
    half = sbot.Discrete.from_list([part.half() for part in x])
    assert half.source_dtype == torch.float16 and half.dtype == torch.float32


@pytest.mark.parametrize(
    "options",
    [{}, {"relax": (1.0, 0.5)}, {"cost": sbot.Lp(1)}, {"reference": sbot.OrnsteinUhlenbeck(rate=1.0)}],
    ids=["balanced", "relaxed", "Lp", "OU"],
)
@pytest.mark.parametrize("memory", [2**30, 0])
def test_a_ragged_batch_is_its_singles(parts, options, memory):
    solver = sbot.Sinkhorn(tol=1e-11, memory=memory)
    x, y, a, b = parts
    batch = sbot.solve_bridge(
        sbot.Discrete.from_list(x, a), sbot.Discrete.from_list(y, b), 0.2, **options, solver=solver
    )
    assert batch.report.converged
    for k, alone in enumerate(singles(parts, 0.2, **options, solver=TIGHT)):
        part = batch[k]
        n, m = LEFT[k], RIGHT[k]
        assert part.problem.batch_shape == () and part.problem.mu.sizes is None
        assert torch.equal(part.problem.mu.points, x[k])
        for ours, theirs in (
            (part.plan(), alone.plan()),
            (part.potentials().f.values, alone.potentials().f.values),
            (part.potentials().g.values, alone.potentials().g.values),
            (part.transport(), alone.transport()),
            (part.cost(), alone.cost()),
            (part.gap(), alone.gap()),
            (part.perplexity(), alone.perplexity()),
            (batch.plan()[k, :n, :m], alone.plan()),
            (batch.cost()[k], alone.cost()),
            (batch.linear_cost()[k], alone.linear_cost()),
            (batch.round().plan()[k, :n, :m], alone.round().plan()),
        ):
            torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-8)
        assert float(batch.plan()[k, n:].abs().sum()) == float(batch.plan()[k, :, m:].abs().sum()) == 0
        torch.testing.assert_close(part.plan(rows=[0]), part.plan()[:1], rtol=1e-13, atol=0)


def test_padding_does_not_widen_the_scale_of_the_cost(parts):
    far = [part + 1e4 for part in parts[0]], [part + 1e4 for part in parts[1]]
    batch = sbot.solve_bridge(*(sbot.Discrete.from_list(side) for side in far), 0.2, solver=TIGHT)
    near = sbot.solve_bridge(*(sbot.Discrete.from_list(side) for side in parts[:2]), 0.2, solver=TIGHT)
    torch.testing.assert_close(batch.cost(), near.cost(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("relax", [None, 0.7])
def test_answers_are_zero_at_padding_whatever_it_holds(parts, relax):
    x, y, a, b = parts
    mu, nu = sbot.Discrete.from_list(x, a), sbot.Discrete.from_list(y, b)
    rough = mu.points.clone()
    rough[~mu.mask] = torch.tensor([torch.nan, 1e30], dtype=torch.float64)
    weights_ = mu.weights.clone().requires_grad_()
    rough.requires_grad_()
    other = sbot.Discrete(rough, weights_, sizes=mu.sizes)
    plain = sbot.solve_bridge(mu, nu, 0.2, relax=relax, solver=TIGHT)
    bridge = sbot.solve_bridge(other, nu, 0.2, relax=relax, solver=TIGHT)
    for name in ("plan", "cost", "gap", "perplexity", "transport"):
        torch.testing.assert_close(getattr(bridge, name)(), getattr(plain, name)(), atol=1e-12, rtol=1e-10)
    empty, beyond = ~mu.mask, ~nu.mask
    f, g = (part.values for part in bridge.potentials())
    for value in (f[empty], g[beyond], bridge.transport()[empty], bridge.perplexity()[empty], bridge.plan()[empty]):
        assert bool((value == 0).all())
    assert bool((bridge.top(1)[0][empty] == 0).all()) and bool((bridge.apply(nu.points)[empty] == 0).all())
    bridge.cost().sum().backward()
    assert bool((rough.grad[empty] == 0).all()) and bool((weights_.grad[empty] == 0).all())
    assert bool((rough.grad[mu.mask] != 0).any()) and bool((weights_.grad[mu.mask] != 0).all())


@pytest.mark.parametrize("unroll", [None, 60])
def test_gradients_are_those_of_the_singles_and_stay_out_of_the_padding(parts, unroll):
    def leaves():
        return [[part.clone().requires_grad_() for part in side] for side in parts]

    def look(bridge):
        moving = bridge.differentiable(unroll=unroll)
        return moving.plan().square().sum() + moving.cost().sum()

    inputs = leaves()
    mu = sbot.Discrete.from_list(inputs[0], inputs[2])
    nu = sbot.Discrete.from_list(inputs[1], inputs[3])
    mu.points.retain_grad(), mu.weights.retain_grad()
    look(sbot.solve_bridge(mu, nu, 0.3, solver=TIGHT)).backward()
    assert bool((mu.points.grad[~mu.mask] == 0).all())
    alone = leaves()
    for k in range(4):
        one = sbot.solve_bridge((alone[0][k], alone[2][k]), (alone[1][k], alone[3][k]), 0.3, solver=TIGHT)
        look(one).backward()
    for side in range(4):
        for ours, theirs in zip(inputs[side], alone[side], strict=True):
            got, want = ours.grad, theirs.grad
            if side >= 2:  # masses are held equal: a constant is free
                got, want = got - got.mean(), want - want.mean()
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_the_envelope_gradient_too(parts):
    x = [part.clone().requires_grad_() for part in parts[0]]
    a = [part.clone().requires_grad_() for part in parts[2]]
    nu = sbot.Discrete.from_list(parts[1], parts[3])
    batch = sbot.solve_bridge(sbot.Discrete.from_list(x, a), nu, 0.3, solver=TIGHT)
    batch.cost().sum().backward()
    for k, alone in enumerate(singles(parts, 0.3, solver=TIGHT)):
        f, plan = alone.potentials().f.values, alone.plan()
        torch.testing.assert_close(a[k].grad, f, atol=1e-8, rtol=0)
        torch.testing.assert_close(
            x[k].grad, plan.sum(1, keepdim=True) * x[k].detach() - plan @ parts[1][k], atol=1e-8, rtol=0
        )


def test_a_zero_weight_that_is_no_padding_is_still_refused(parts):
    x, y, a, _ = parts
    a = [part.clone() for part in a]
    a[1][2] = 0.0
    a = [(part / part.sum()).requires_grad_() for part in a]
    bridge = sbot.solve_bridge(sbot.Discrete.from_list(x, a), sbot.Discrete.from_list(y), 0.3)
    with pytest.raises(sbot.InvalidProblem, match="mu has weights that are zero and want a gradient"):
        bridge.differentiable()


def test_one_cloud_against_many(parts):
    x, y, a, b = parts
    batch = sbot.solve_bridge((x[1], a[1]), sbot.Discrete.from_list(y, b), 0.2, solver=TIGHT)
    for k in range(4):
        alone = sbot.solve_bridge((x[1], a[1]), (y[k], b[k]), 0.2, solver=TIGHT)
        torch.testing.assert_close(batch[k].plan(), alone.plan(), atol=1e-10, rtol=0)


def test_a_matrix_with_ragged_weights(generator):
    sizes = torch.tensor([2, 4])
    a = torch.zeros(2, 4, dtype=torch.float64)
    a[0, :2], a[1] = weights(2, generator=generator), weights(4, generator=generator)
    c = torch.rand(2, 4, 3, generator=generator, dtype=torch.float64)
    mu = sbot.Discrete(None, a, sizes=sizes)
    b = weights(3, generator=generator)
    batch = sbot.solve_bridge(mu, b, 0.2, cost=c, solver=TIGHT)
    alone = sbot.solve_bridge(a[0, :2], b, 0.2, cost=c[0, :2], solver=TIGHT)
    assert batch[0].plan().shape == (2, 3)
    torch.testing.assert_close(batch[0].plan(), alone.plan(), atol=1e-10, rtol=0)


def test_a_file_and_another_dtype_keep_the_sizes(parts, tmp_path):
    batch = sbot.solve_bridge(*(sbot.Discrete.from_list(side) for side in parts[:2]), 0.2)
    batch.save(tmp_path / "bridge.safetensors")
    again = sbot.load(tmp_path / "bridge.safetensors")
    assert again.problem.mu.sizes.tolist() == list(LEFT)
    assert again.report.errors == batch.report.errors
    assert torch.equal(again[3].plan(), batch[3].plan())
    single = batch.to(dtype=torch.float32)
    assert single[0].plan().shape == (3, 6) and single[0].plan().dtype == torch.float32


def test_float32_is_finite(parts):
    batch = sbot.solve_bridge(*(sbot.Discrete.from_list([p.float() for p in side]) for side in parts[:2]), 1e-3)
    for value in (batch.plan(), batch.transport(), batch.cost(), batch.gap(), batch.perplexity()):
        assert bool(torch.isfinite(value).all())


X = torch.zeros(5, 2)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: sbot.Discrete.ragged(X, [0, 2, 4]), "from 0 to 5, the number of points"),
        (lambda: sbot.Discrete.ragged(X, [1, 5]), "from 0 to 5"),
        (lambda: sbot.Discrete.ragged(X, [0, 2, 2, 5]), "no points in problem 1"),
        (lambda: sbot.Discrete.ragged(X, [0, 4, 2, 5]), "no points in problem 1"),
        (lambda: sbot.Discrete.ragged(X, [0.0, 5.0]), "give integers"),
        (lambda: sbot.Discrete.ragged(X, [5]), "give integers"),
        (lambda: sbot.Discrete.ragged(X, "all"), "offsets must be integers"),
        (lambda: sbot.Discrete.ragged(X, [0, 2, 5], torch.ones(4)), r"weights of shape \(4,\); give \(5,\)"),
        (lambda: sbot.Discrete.ragged(X[None], [0, 5]), r"give \(N, d\)"),
        (lambda: sbot.Discrete.ragged(torch.full((5, 2), torch.nan), [0, 2, 5]), "NaN"),
        (lambda: sbot.Discrete.from_list([]), "give a list of at least one cloud"),
        (lambda: sbot.Discrete.from_list(X), "Tensor; give a list"),
        (lambda: sbot.Discrete.from_list([X, X[:0]]), r"Discrete\[1\] points have shape \(0, 2\)"),
        (lambda: sbot.Discrete.from_list([X, X[:, :1]]), r"clouds of shapes \(5, 2\), \(5, 1\)"),
        (lambda: sbot.Discrete.from_list([X, X], [torch.ones(5)]), "has 2 clouds"),
        (
            lambda: sbot.Discrete.from_list([X, X], [torch.ones(5), torch.ones(4)]),
            r"Discrete\[1\] has weights of shape \(4,\)",
        ),
        (lambda: sbot.Discrete.from_list([X, X], [torch.ones(5), torch.zeros(5)]), "all zero"),
        (lambda: sbot.Discrete(X[None], torch.ones(1, 5), sizes=[3]), "padding with weight"),
        (lambda: sbot.Discrete(X[None], sizes=[6]), "sizes go from 6 to 6; give 1 to 5"),
        (lambda: sbot.Discrete(X[None], sizes=[1, 2]), r"one for each problem of \(1,\)"),
        (lambda: sbot.Discrete(X, sizes=3), r"one for each problem of \(\)"),
    ],
)
def test_bad_clouds(make, said):
    with pytest.raises(sbot.InvalidProblem, match=said):
        make()
