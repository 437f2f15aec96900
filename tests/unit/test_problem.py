"""The door: every bad input a clear error that names the argument and the way out; every good one accepted as it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sbot

from ..conftest import clouds, weights

X = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
Y = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
A = torch.full((6,), 1 / 6)
B = torch.full((5,), 1 / 5)
M = torch.rand(6, 5, generator=torch.Generator().manual_seed(2))
NAN, INF = float("nan"), float("inf")


def with_entry(tensor, value):
    out = tensor.clone()
    out.view(-1)[3] = value
    return out


class Frame:
    """What pandas looks like from here."""

    def __init__(self, values):
        self.values = values

    def to_numpy(self):
        return self.values


BAD = [
    # points
    (
        lambda: sbot.solve_bridge(with_entry(X, NAN), Y, 0.1),
        r"mu points has 1 entries that are NaN .* first at \[1, 1\]",
    ),
    (lambda: sbot.solve_bridge(X, with_entry(Y, INF), 0.1), "nu points has 1 entries that are NaN or infinite"),
    (lambda: sbot.solve_bridge(X[:, 0], Y[:, 0], 0.1), r"mu points are 1-dimensional, shape \(6,\); pass x\[:, None\]"),
    (lambda: sbot.solve_bridge(torch.tensor(1.0), Y, 0.1), r"mu points have shape \(\)"),
    (lambda: sbot.solve_bridge(X[:0], Y, 0.1), r"mu points have shape \(0, 2\); give \(n, d\) with n >= 1"),
    (lambda: sbot.solve_bridge(X[:, :0], Y[:, :0], 0.1), r"mu points have shape \(6, 0\)"),
    (lambda: sbot.solve_bridge(X, Y[:, :1], 0.1), r"mu has samples of shape \(2,\) and nu of shape \(1,\)"),
    (
        lambda: sbot.solve_bridge(X.expand(2, 6, 2), Y.expand(3, 5, 2), 0.1),
        r"mu has batch dimensions \(2,\) and nu \(3,\)",
    ),
    (lambda: sbot.solve_bridge(X.to(torch.complex64), Y, 0.1), "mu has dtype torch.complex64"),
    (lambda: sbot.solve_bridge(X > 0, Y, 0.1), "mu has dtype torch.bool"),
    (lambda: sbot.solve_bridge(X.to_sparse(), Y, 0.1), r"mu is a sparse tensor; pass mu.to_dense\(\)"),
    (lambda: sbot.solve_bridge(X.to("meta"), Y, 0.1), "mu is on the meta device"),
    (lambda: sbot.solve_bridge(np.array([["a", "b"]]), Y, 0.1), "mu has dtype <U1"),
    (lambda: sbot.solve_bridge(np.array([[1, None]], dtype=object), Y, 0.1), "mu has dtype object"),
    (lambda: sbot.solve_bridge(X.numpy().astype(complex), Y, 0.1), "mu has dtype complex128"),
    (lambda: sbot.solve_bridge(np.ma.masked_invalid(X.numpy()), Y, 0.1), "mu is a masked array"),
    (lambda: sbot.solve_bridge([[1.0, 2.0], [3.0]], Y, 0.1), "mu is not a rectangular array"),
    (lambda: sbot.solve_bridge("points.npy", Y, 0.1), "mu must be an array of real numbers, not str"),
    (lambda: sbot.solve_bridge(None, Y, 0.1), "mu must be an array of real numbers, not NoneType"),
    (lambda: sbot.solve_bridge({"x": 1}, Y, 0.1), "mu must be an array of real numbers, not dict"),
    (lambda: sbot.solve_bridge([X[0], X[1]], Y, 0.1), r"mu is a list of tensors; pass torch.stack\(mu\)"),
    (lambda: sbot.solve_bridge((X[:, 0], A), Y, 0.1), r"mu points are 1-dimensional, shape \(6,\)"),
    # weights
    (lambda: sbot.solve_bridge((X, with_entry(A, NAN)), Y, 0.1), "mu weights has 1 entries that are NaN"),
    (lambda: sbot.solve_bridge((X, with_entry(A, -0.1)), Y, 0.1), r"mu has a negative weight at \[3\]"),
    (lambda: sbot.solve_bridge((X, 0 * A), Y, 0.1), "mu has weights that are all zero"),
    (lambda: sbot.solve_bridge((X, B), Y, 0.1), r"weights of shape \(5,\) for points of shape \(6, 2\)"),
    (
        lambda: sbot.solve_bridge((X, 2 * A), (Y, B), 0.1),
        r"sum\(mu\) = 2.* and sum\(nu\) = 1.*relax=\(rho_mu, rho_nu\)",
    ),
    # eps
    (lambda: sbot.solve_bridge(X, Y, 0), "eps is 0, .*ot.emd"),
    (lambda: sbot.solve_bridge(X, Y, -1.0), "eps is -1.0; give a finite number > 0"),
    (lambda: sbot.solve_bridge(X, Y, NAN), "eps is NaN"),
    (lambda: sbot.solve_bridge(X, Y, INF), "eps is inf"),
    (lambda: sbot.solve_bridge(X, Y, "small"), "eps is the string 'small'"),
    (lambda: sbot.solve_bridge(X, Y, True), "eps must be a real number, not bool"),
    (lambda: sbot.solve_bridge(X, Y, [0.1]), "eps has shape \\(1,\\) for a single problem"),
    (lambda: sbot.solve_bridge(X, Y, torch.tensor([0.1])), "eps has shape \\(1,\\) for a single problem"),
    (lambda: sbot.solve_bridge(X, Y, None), "eps must be a real number, not NoneType"),
    # relax
    (lambda: sbot.solve_bridge(X, Y, 0.1, relax=0.0), r"relax is \(0.0, 0.0\); give numbers > 0"),
    (lambda: sbot.solve_bridge(X, Y, 0.1, relax=(1.0, -1.0)), "give numbers > 0"),
    (lambda: sbot.solve_bridge(X, Y, 0.1, relax=(1.0, 2.0, 3.0)), "relax has 3 entries"),
    (lambda: sbot.solve_bridge(X, Y, 0.1, relax=NAN), r"relax\[0\] is NaN"),
    # cost and reference
    (lambda: sbot.solve_bridge(A, B, 0.1), "mu points are 1-dimensional.*or a cost matrix"),
    (
        lambda: sbot.solve_bridge(A, B, 0.1, cost=M.T),
        r"cost matrix has shape \(5, 6\) for 6 and 5 atoms; give shape \(6, 5\)",
    ),
    (lambda: sbot.solve_bridge(A, B, 0.1, cost=with_entry(M, NAN)), "cost matrix holds NaN or -inf"),
    (lambda: sbot.solve_bridge(A, B, 0.1, cost=with_entry(M, -INF)), "cost matrix holds NaN or -inf"),
    (lambda: sbot.solve_bridge(A, B, 0.1, cost=torch.full((6, 5), INF)), "no finite entry in row 0"),
    (lambda: sbot.solve_bridge(A, B, 0.1, cost=M[0]), r"cost matrix has shape \(5,\)"),
    (lambda: sbot.solve_bridge(X, Y, 0.1, cost="sqeuclidean"), "cost is the string 'sqeuclidean'; pass an object"),
    (
        lambda: sbot.solve_bridge(X, Y, 0.1, cost=sbot.Quadratic),
        r"cost is the class Quadratic; pass an object: cost=Quadratic\(\)",
    ),
    (
        lambda: sbot.solve_bridge(X, Y, 0.1, cost=lambda x, y: x @ y.T @ y),
        r"cost function returned \(6, 2\); return a tensor of shape",
    ),
    (lambda: sbot.solve_bridge(X, Y, 0.1, cost=lambda x, y: M * NAN), "cost function returned NaN"),
    (lambda: sbot.solve_bridge(X, Y, 0.1, cost=M, reference=sbot.Brownian()), "both reference and cost are given"),
    (lambda: sbot.solve_bridge(X, Y, 0.1, reference=sbot.Brownian), r"pass an object such as Brownian\(\)"),
    (lambda: sbot.solve_bridge(X, Y, 0.1, reference="ou"), "reference must be a Reference, not 'ou'"),
    (lambda: sbot.solve_bridge(torch.zeros(2, 2), Y, 0.1, cost=sbot.Cosine()), "mu has a point at the origin"),
    (lambda: sbot.Lp(0.5), r"Lp\(p=0.5, power=1.0\) is not a cost"),
    # solver
    (lambda: sbot.solve_bridge(X, Y, 0.1, solver="simplex"), "solver is 'simplex'; give 'auto'"),
    (lambda: sbot.solve_bridge(X, Y, 0.1, solver=sbot.Sinkhorn), "solver is <class"),
    (lambda: sbot.solve_bridge(X, Y, 0.1, solver="closedform"), "ClosedForm: mu is Discrete, needs Gaussian"),
    # Gaussians
    (lambda: sbot.Gaussian(torch.zeros(2), torch.zeros(2, 3)), r"covariance has shape \(2, 3\); give a square"),
    (lambda: sbot.Gaussian(torch.zeros(2), torch.eye(3)), r"covariance has shape \(3, 3\)"),
    (lambda: sbot.Gaussian(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.2, 1.0]])), "is not symmetric"),
    (lambda: sbot.Gaussian(torch.zeros(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]])), "is not positive semi-definite"),
    (lambda: sbot.Gaussian(torch.zeros(2), -torch.eye(2)), "is not positive semi-definite"),
    (lambda: sbot.Gaussian(torch.zeros(2), NAN * torch.eye(2)), "covariance has 4 entries that are NaN"),
    (lambda: sbot.Gaussian(torch.tensor([0.0, NAN]), torch.eye(2)), "mean has 1 entries that are NaN"),
    (lambda: sbot.Gaussian(torch.tensor(0.0), torch.eye(1)), r"mean has shape \(\)"),
    (lambda: sbot.Gaussian(torch.zeros(3, 2), torch.eye(2)), "differ in their leading dimensions"),
    (
        lambda: sbot.Mixture(torch.zeros(3), torch.zeros(2, 2), torch.eye(2).expand(2, 2, 2)),
        r"logits \(3,\) and means \(2, 2\)",
    ),
    (lambda: sbot.Gaussian.from_samples(X[:1]), "one point, which has no covariance"),
    # samplers
    (lambda: sbot.Sampler(lambda n, g: [0.0] * n), "the sampler returned list"),
    (lambda: sbot.Sampler(lambda n, g: torch.zeros(n + 1, 2)), r"returned shape \(3, 2\) for n = 2"),
    (lambda: sbot.Sampler(lambda n, g: torch.zeros(n)), r"returned shape \(2,\)"),
    (lambda: sbot.Sampler(lambda n, g: torch.zeros(n, 2, dtype=torch.int64)), "returned dtype torch.int64"),
    (lambda: sbot.Sampler(lambda n, g: torch.full((n, 2), NAN)), "first draw of the sampler has 4 entries"),
    (lambda: sbot.Sampler(lambda n, g: torch.zeros(n, 2), (3,)), r"return \(2, 3\)"),
    (lambda: sbot.Sampler.from_loader([]), "the loader is exhausted"),
]


@pytest.mark.parametrize(("call", "match"), BAD, ids=[f"{k}: {match}"[:50] for k, (_, match) in enumerate(BAD)])
def test_bad_input(call, match):
    with pytest.raises(sbot.SbotError, match=match) as caught:
        call()
    assert isinstance(caught.value, (sbot.InvalidProblem, sbot.Unsupported))


def test_queries_are_checked_too():
    bridge = sbot.solve_bridge(X, Y, 0.5)
    for call, match in [
        (lambda: bridge.drift(1.5, X), "t is 1.5; times lie in"),
        (lambda: bridge.drift("now", X), "t must be a real number"),
        (lambda: bridge.drift(0.5, X[:, :1]), r"x has shape \(6, 1\); give \(n, 2\)"),
        (lambda: bridge.drift(0.5, X[0]), r"x has shape \(2,\)"),
        (lambda: bridge.drift(0.5, with_entry(X, NAN)), "x has 1 entries that are NaN"),
        (lambda: bridge.plan(rows=[7]), "rows go from 7 to 7 and there are 6"),
        (lambda: bridge.plan(rows=[0.5]), "rows must be numbers"),
        (lambda: bridge.sample_pairs(0), "n must be an integer >= 1"),
        (lambda: bridge.sample_paths(3, [0.5, 0.2]), "in increasing order"),
        (lambda: bridge.sample_paths(3, []), "give at least one"),
        (lambda: bridge.sample_paths(3, [-0.1]), "times is -0.1"),
        (lambda: bridge.interpolate(2, 3), "times lie in"),
    ]:
        with pytest.raises(sbot.InvalidProblem, match=match):
            call()
    for call, match in [
        (lambda: bridge.drift(1.0, X), "infinite at its own time"),
        (lambda: bridge.reverse_drift(0.0, X), "infinite at its own time"),
        (lambda: bridge.log_prob(0.0, X), "no density at its own time"),
        (lambda: bridge.condition(s=0.5), "give points x"),
    ]:
        with pytest.raises(sbot.Unsupported, match=match):
            call()


def test_a_static_cost_has_no_process():
    bridge = sbot.solve_bridge(X, Y, 0.5, cost=sbot.Lp(1))
    for call in (
        lambda: bridge.drift(0.5, X),
        lambda: bridge.reverse_drift(0.5, X),
        lambda: bridge.log_prob(0.5, X),
        lambda: bridge.sample_paths(3, [0.5]),
        lambda: bridge.interpolate(0.5, 3),
        lambda: bridge.marginal(0.5),
    ):
        with pytest.raises(sbot.Unsupported, match=r"sbot.Brownian\(\)"):
            call()
    assert bridge.transport(X).shape == (6, 2)
    assert bridge.sample_pairs(4)[1].shape == (4, 2)
    assert bridge.marginal(1.0).n == 5


def test_batches_are_drawn_side_by_side(generator):
    x, y = clouds(8, 9, 2, generator, (3,))
    bridge = sbot.solve_bridge(x, y, 0.5)
    assert bridge.sample_paths(5, [0.0, 0.3, 1.0], generator=generator).shape == (3, 5, 3, 2)
    assert bridge.plan(rows=[1]).shape == (3, 1, 9)
    draws = bridge.marginal(1.0).sample(200, generator=generator)
    for k in range(3):  # each from its own problem
        assert bool((draws[k][:, None] == y[k]).all(-1).any(1).all())
    late = bridge.condition(x[:, :2], 0.2)
    assert late.sample(generator=generator).shape == (3, 2, 2)
    one = sbot.solve_bridge(x[1], y[1], 0.5)
    torch.testing.assert_close(bridge.drift(0.3, x)[1], one.drift(0.3, x[1]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bridge.log_prob(0.3, x)[1], one.log_prob(0.3, x[1]), rtol=1e-6, atol=1e-6)


def test_at_the_atoms_there_is_no_part_of_a_gradient(generator):
    x, y = clouds(6, 7, 2, generator)
    bridge = sbot.solve_bridge(x.requires_grad_(), y, 0.5)
    assert not bridge.transport().requires_grad
    assert bridge.cost().requires_grad
    assert bridge.transport(x.detach().clone().requires_grad_()).requires_grad


def test_histograms_and_numbered_points():
    plain = sbot.solve_bridge(A, B, 0.5, cost=M)
    i, j = plain.sample_pairs(100)
    assert i.dtype == torch.int64
    assert int(i.max()) < 6
    assert int(j.max()) < 5
    with pytest.raises(sbot.Unsupported, match="bins of a histogram have no mean"):
        plain.transport()
    for wrong in (X, [0.5], [True] * 6, "ab"):
        with pytest.raises(sbot.InvalidProblem, match="known only between atoms: the atoms in x must be numbers"):
            plain.condition(wrong)
    f, g = plain.potentials()
    torch.testing.assert_close(f([1, 2]), f.values[1:3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(g(range(5)), g.values, rtol=1e-3, atol=1e-3)
    named = sbot.solve_bridge((X, A), (Y, B), 0.5, cost=M)
    torch.testing.assert_close(named.transport(), plain.plan() @ Y * 6, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(named.transport([2, 0]), named.transport()[[2, 0]])
    x, y = named.sample_pairs(50)
    assert bool((x[:, None] == X).all(-1).any(1).all())
    assert bool((y[:, None] == Y).all(-1).any(1).all())


def test_rows_of_the_plan():
    bridge = sbot.solve_bridge(X, Y, 0.5)
    plan = bridge.plan()
    for rows in ([0, 3], slice(1, 4), torch.tensor([5]), -1, np.array([2, 2])):
        want = plan[torch.as_tensor([rows])] if isinstance(rows, int) else plan[rows]
        torch.testing.assert_close(bridge.plan(rows=rows), want)


# ---- what is accepted ----------------------------------------------------------------------------------------------


def test_every_array_there_is():
    want = sbot.solve_bridge(X.double(), Y.double(), 0.5).plan()
    array = X.double().numpy()
    frozen = array.copy()
    frozen.setflags(write=False)
    for x in (
        array,
        frozen,
        array[::-1][::-1],
        np.asfortranarray(array),
        array.astype(">f8"),
        Frame(array),
        X.double(),
        X.double().T.contiguous().T,
    ):
        torch.testing.assert_close(sbot.solve_bridge(x, Y.double().numpy(), 0.5).plan(), want)


def test_dtypes_follow_the_input():
    assert sbot.solve_bridge(X, Y, 0.5).plan().dtype == torch.float32
    assert sbot.solve_bridge(X, Y.double(), 0.5).plan().dtype == torch.float64
    assert sbot.solve_bridge(X.numpy(), Y.numpy(), 0.5).plan().dtype == torch.float32
    assert sbot.solve_bridge([[0], [1]], [[1], [2]], 0.5).plan().dtype == torch.get_default_dtype()
    assert sbot.solve_bridge(np.array([[0], [1]]), np.array([[2.0]]), 0.5).plan().dtype == torch.float64
    assert sbot.solve_bridge(np.full(6, 1 / 6), np.full(5, 1 / 5), 0.5, cost=M).plan().dtype == torch.float64
    assert sbot.solve_bridge(X, Y, np.float32(0.5)).problem.eps == 0.5
    assert sbot.solve_bridge(X, Y, torch.tensor(0.5)).problem.eps == 0.5


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_halves_are_computed_in_float32_and_cast_back(half):
    bridge = sbot.solve_bridge(X.to(half), Y.to(half), 0.5)
    want = sbot.solve_bridge(X.to(half).float(), Y.to(half).float(), 0.5)
    assert any("computed in float32" in note for note in bridge.report.notes)
    for got, exact in (
        (bridge.plan(), want.plan()),
        (bridge.cost(), want.cost()),
        (bridge.linear_cost(), want.linear_cost()),
        (bridge.gap(), want.gap()),
        (bridge.transport(), want.transport()),
        (bridge.drift(0.5, X.to(half)), want.drift(0.5, X.to(half).float())),
        (bridge.log_prob(0.5, X.to(half)), want.log_prob(0.5, X.to(half).float())),
        (bridge.potentials().f.values, want.potentials().f.values),
        (bridge.potentials().g(Y.to(half)), want.potentials().g(Y.to(half).float())),
    ):
        assert got.dtype == half
        assert torch.equal(got, exact.to(half))
    generator = torch.Generator().manual_seed(0)
    assert bridge.interpolate(0.5, 4, generator=generator).dtype == half
    assert all(part.dtype == half for part in bridge.sample_pairs(4, generator=generator))


def test_mixed_devices_are_named():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    with pytest.raises(sbot.InvalidProblem, match="mu on cuda:0, nu on cpu"):
        sbot.solve_bridge(X.cuda(), Y, 0.1)


def test_rounding_of_the_masses_is_mended_and_noted():
    a, b = torch.full((6,), 1 / 6).double(), torch.full((5,), 1 / 5).double()
    a, b = a / a.sum() * (1 + 3e-9), b / b.sum()
    bridge = sbot.solve_bridge((X.double(), a), (Y.double(), b), 0.5)
    assert any("nu was rescaled to the mass of mu" in note for note in bridge.report.notes)
    torch.testing.assert_close(bridge.plan().sum(), a.sum())
    assert not any("rescaled" in note for note in sbot.solve_bridge(X, Y, 0.5).report.notes)


def test_unequal_masses_need_relaxing():
    sbot.solve_bridge((X, 2 * A), (Y, B), 0.5, relax=1.0)
    sbot.solve_bridge((X, 2 * A), (Y, B), 0.5, relax=(1.0, INF))


def test_inputs_are_never_modified(generator):
    x, y = clouds(10, 12, 2, generator)
    a, b = weights(10, generator=generator), weights(12, generator=generator)
    c = torch.rand(10, 12, generator=generator, dtype=torch.float64)
    arrays = [x.numpy(), y.numpy(), a.numpy(), b.numpy(), c.numpy()]
    before = [array.copy() for array in arrays]
    for bridge in (
        sbot.solve_bridge((x, a), (y, b), 0.1),
        sbot.solve_bridge(a, b, 0.1, cost=c),
        sbot.solve_bridge((x, a), (y, b), 0.1, relax=1.0, solver=sbot.Sinkhorn(memory=0)),
    ):
        bridge.cost(), bridge.gap(), bridge.plan(), bridge.linear_cost()
    for array, copy in zip(arrays, before, strict=True):
        assert np.array_equal(array, copy)


def test_no_global_state_is_touched(generator):
    x, y = clouds(10, 12, 2, generator)
    state = lambda: (  # noqa: E731
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.get_rng_state().tolist(),
        torch.get_float32_matmul_precision(),
    )
    before = state()
    bridge = sbot.solve_bridge(x.float(), y.float(), 0.1)
    bridge.sample_paths(5, [0.0, 0.5], generator=generator)
    assert bridge.marginal(0.5).sample(3, generator=generator).shape == (3, 2)
    with pytest.raises(sbot.InvalidProblem):
        sbot.solve_bridge(x, y, -1)
    assert state() == before
    with torch.no_grad():
        sbot.solve_bridge(x, y, 0.1)
        assert not torch.is_grad_enabled()


def test_seeds_decide_the_draws(generator):
    bridge = sbot.solve_bridge(X, Y, 0.5)
    draws = [bridge.sample_paths(8, [0.0, 0.4, 1.0], generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_pairs_have_the_plan_s_frequencies(generator):
    x, y = clouds(4, 5, 2, generator)
    for relax in (None, (0.5, 0.5)):
        bridge = sbot.solve_bridge((x, weights(4, generator=generator)), y, 0.5, relax=relax)
        plan = bridge.plan() / bridge.plan().sum()
        n = 200_000
        a, b = bridge.sample_pairs(n, generator=generator)
        i, j = (torch.cdist(p, q).argmin(1) for p, q in ((a, x), (b, y)))
        counts = torch.zeros(4, 5).double().index_put_((i, j), torch.ones(n).double(), accumulate=True) / n
        assert float(((counts - plan) / (plan / n).sqrt()).abs().max()) < 5


def test_solver_is_chosen_and_refusals_are_listed():
    g = sbot.Gaussian(torch.zeros(2), torch.eye(2))
    assert isinstance(sbot.choose_solver(sbot.Problem.of(g, g, 1.0)), sbot.ClosedForm)
    assert isinstance(sbot.choose_solver(sbot.Problem.of(X, Y, 1.0)), sbot.Sinkhorn)
    mixture = sbot.Mixture(torch.zeros(2), torch.zeros(2, 2), torch.eye(2).expand(2, 2, 2))
    with pytest.raises(
        sbot.Unsupported, match=r"(?s)ClosedForm: nu is Mixture.*Sinkhorn: mu is Gaussian, needs Discrete; try"
    ):
        sbot.solve_bridge(g, mixture, 1.0)


def test_a_matrix_that_is_kept_may_change_between_two_solves():
    """What a solve takes from its entries is looked at anew."""
    c = torch.rand(30, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w = torch.full((30,), 1 / 30, dtype=torch.float64)
    kept = sbot.MatrixCost(c)
    sbot.solve_bridge(w, w, 1.0, cost=kept)
    for factor, eps in ((1e6, 1.0), (1e-9, 1e-5)):
        c.mul_(factor)
        got, wanted = (
            float(sbot.solve_bridge(w, w, eps, cost=cost).linear_cost()) for cost in (kept, sbot.MatrixCost(c))
        )
        assert got == wanted
    c[0, 0] = torch.inf
    assert sbot.Problem.of(w, w, 1.0, cost=kept).may_forbid
