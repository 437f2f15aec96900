"""Batches: what problems share is not copied, `bridge[k]` is the problem alone, reports say which problem is the worst."""

from __future__ import annotations

import warnings

import pytest
import torch

import sbot
from sbot import kernels
from tests.conftest import clouds, half_squares, spd, weights

TIGHT = sbot.Sinkhorn(tol=1e-11)
B, N, M = 3, 7, 5


@pytest.fixture
def data(generator):
    x, y = clouds(N, M, 2, generator, (B,))
    return x, y, weights(B, N, generator=generator), weights(B, M, generator=generator)


def same(batch, alone, atol=1e-9):
    """The parts of a batch are the single bridges."""
    assert len(batch) == len(alone)
    for part, one in zip(batch, alone, strict=True):
        torch.testing.assert_close(part.plan(), one.plan(), atol=atol, rtol=0)
        torch.testing.assert_close(part.cost(), one.cost(), atol=atol, rtol=0)
        for ours, theirs in zip(part.potentials(), one.potentials(), strict=True):
            torch.testing.assert_close(ours.values, theirs.values, atol=atol, rtol=0)


# ---- sharing -------------------------------------------------------------------------------------------------------


def test_a_shared_cloud_is_that_cloud_in_each_problem(data):
    x, y, a, b = data
    for memory in (2**30, 0):
        solver = sbot.Sinkhorn(tol=1e-11, memory=memory)
        batch = sbot.solve_bridge((x[0], a[0]), (y, b), 0.3, solver=solver)
        same(batch, [sbot.solve_bridge((x[0], a[0]), (y[k], b[k]), 0.3, solver=TIGHT) for k in range(B)])
        back = sbot.solve_bridge((y, b), (x[0], a[0]), 0.3, solver=solver)
        torch.testing.assert_close(back.plan(), batch.plan().mT, atol=1e-9, rtol=0)


def test_weights_of_a_batch_on_shared_points(data):
    x, y, a, b = data
    batch = sbot.solve_bridge((x[0], a), (y[0], b), 0.3, solver=TIGHT)
    same(batch, [sbot.solve_bridge((x[0], a[k]), (y[0], b[k]), 0.3, solver=TIGHT) for k in range(B)])
    own = sbot.solve_bridge((x, a[0]), (y, b[0]), 0.3, solver=TIGHT)
    same(own, [sbot.solve_bridge((x[k], a[0]), (y[k], b[0]), 0.3, solver=TIGHT) for k in range(B)])
    # a cost in more dimensions than are cheap is stored, once
    wide = torch.randn(N, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batch = sbot.solve_bridge((wide, a), (wide[:M] + 1, b), 5.0, solver=TIGHT)
    same(batch, [sbot.solve_bridge((wide, a[k]), (wide[:M] + 1, b[k]), 5.0, solver=TIGHT) for k in range(B)])


@pytest.mark.parametrize("forbid", [False, True])
def test_a_shared_matrix_with_histograms(data, forbid, generator):
    _, _, a, b = data
    c = torch.rand(N, M, generator=generator, dtype=torch.float64)
    if forbid:
        c[0, 1:3] = torch.inf
    for nu in (b, b[0]):
        batch = sbot.solve_bridge(a, nu, 0.2, cost=c, solver=TIGHT)
        alone = [sbot.solve_bridge(a[k], nu[k] if nu.ndim > 1 else nu, 0.2, cost=c, solver=TIGHT) for k in range(B)]
        same(batch, alone)
        torch.testing.assert_close(
            batch.potentials().f([0, 3]), batch.potentials().f.values[:, [0, 3]], atol=1e-8, rtol=0
        )
        assert batch.problem.cost.values.shape == (N, M) and batch[1].problem.cost.values.shape == (N, M)
        torch.testing.assert_close(batch.plan(rows=[2]), batch.plan()[:, 2:3])
    own = sbot.solve_bridge(a[0], b, 0.2, cost=torch.stack([c, c + 1, 2 * c]), solver=TIGHT)
    torch.testing.assert_close(own[2].plan(), sbot.solve_bridge(a[0], b[2], 0.2, cost=2 * c, solver=TIGHT).plan())


def test_two_batch_dimensions_share_leading_ones(generator):
    x, y = clouds(4, 5, 2, generator, (2, 3))
    batch = sbot.solve_bridge(x, y[0], 0.3, solver=TIGHT)
    for i in range(2):
        for j in range(3):
            alone = sbot.solve_bridge(x[i, j], y[0, j], 0.3, solver=TIGHT)
            torch.testing.assert_close(batch[i, j].plan(), alone.plan(), atol=1e-10, rtol=0)
    c = torch.rand(3, 4, 5, generator=generator, dtype=torch.float64)
    a = weights(2, 3, 4, generator=generator)
    table = sbot.solve_bridge(a, torch.full((5,), 0.2, dtype=torch.float64), 0.3, cost=c, solver=TIGHT)
    alone = sbot.solve_bridge(a[1, 2], torch.full((5,), 0.2, dtype=torch.float64), 0.3, cost=c[2], solver=TIGHT)
    torch.testing.assert_close(table[1, 2].plan(), alone.plan(), atol=1e-10, rtol=0)
    torch.testing.assert_close(table[1][2].plan(), alone.plan(), atol=1e-10, rtol=0)


def test_gaussians_share_too(generator):
    mu = sbot.Gaussian(torch.zeros(2, dtype=torch.float64), spd(2, generator))
    means = torch.randn(B, 2, generator=generator, dtype=torch.float64)
    nu = sbot.Gaussian(means, torch.stack([spd(2, generator) for _ in range(B)]))
    batch = sbot.solve_bridge(mu, nu, 0.5)
    for k in range(B):
        alone = sbot.solve_bridge(mu, sbot.Gaussian(means[k], nu.cov[k]), 0.5)
        torch.testing.assert_close(batch[k].cost(), alone.cost())
        torch.testing.assert_close(batch[k].plan().cov, alone.plan().cov)
        z = torch.ones(1, 2, dtype=torch.float64)
        torch.testing.assert_close(batch[k].drift(0.4, z), alone.drift(0.4, z))
        torch.testing.assert_close(batch[k].log_prob(0.4, z), alone.log_prob(0.4, z))


def test_gradients_flow_to_what_is_shared(data, generator):
    x, y, a, b = data
    shared, mass = x[0].clone().requires_grad_(), a[0].clone().requires_grad_()
    c = torch.rand(N, M, generator=generator, dtype=torch.float64).requires_grad_()
    batch = sbot.solve_bridge((shared, mass), (y, b), 0.3, solver=TIGHT)
    batch.cost().sum().backward()
    table = sbot.solve_bridge(a, b, 0.3, cost=c, solver=TIGHT)
    (table.cost().sum() + table.differentiable().plan().square().sum()).backward()
    one, of, cc = (t.detach().clone().requires_grad_() for t in (shared, mass, c))
    for k in range(B):
        sbot.solve_bridge((one, of), (y[k], b[k]), 0.3, solver=TIGHT).cost().backward()
        alone = sbot.solve_bridge(a[k], b[k], 0.3, cost=cc, solver=TIGHT)
        (alone.cost() + alone.differentiable().plan().square().sum()).backward()
    torch.testing.assert_close(shared.grad, one.grad, atol=1e-9, rtol=0)
    torch.testing.assert_close(mass.grad, of.grad, atol=1e-8, rtol=0)
    torch.testing.assert_close(c.grad, cc.grad, atol=1e-8, rtol=0)
    plans = table.plan().sum(0)
    (grad,) = torch.autograd.grad(sbot.solve_bridge(a, b, 0.3, cost=c, solver=TIGHT).cost().sum(), c)
    torch.testing.assert_close(grad, plans, atol=1e-9, rtol=0)


def test_nothing_shared_is_copied(data):
    x, y, a, b = data
    mu = sbot.Discrete(x[0], a)
    assert mu.points.stride(0) == 0 and mu.points.untyped_storage().nbytes() == x[0].numel() * 8
    assert mu.to(dtype=torch.float32).points.untyped_storage().nbytes() == x[0].numel() * 4
    c = half_squares(x[0], y[0])
    problem = sbot.Problem.of(a, b, 0.3, cost=c)
    kernel = kernels.make_kernel(problem.cost, *problem.sites)
    for part in (kernel, kernel.T, kernel.take(torch.tensor([0, 2]))):
        assert part.matrix.untyped_storage().data_ptr() == problem.cost.values.untyped_storage().data_ptr()
    assert kernel.batch_shape == (B,) and kernel.take(torch.tensor([0, 2])).batch_shape == (2,)
    wide = torch.zeros(4, 50, dtype=torch.float64)
    points = wide.expand(B, 4, 50)
    stored = kernels.make_kernel(sbot.Quadratic(), points, points, memory=2**20)
    assert stored.matrix.shape == (B, 4, 4) and stored.matrix.untyped_storage().nbytes() == 4 * 4 * 8
    # an expanded leaf is not shared: its gradient has a place for each problem
    leaf = x[0].expand(B, N, 2).requires_grad_()
    sbot.solve_bridge((leaf, a), (y, b), 0.3).cost().sum().backward()
    assert float((leaf.grad[0] - leaf.grad[1]).abs().max()) > 0


X, Y = torch.rand(6, 2), torch.rand(5, 2)
A, H = torch.full((3, 6), 1 / 6), torch.full((3, 5), 0.2)


@pytest.mark.parametrize(
    ("solve", "said"),
    [
        (
            lambda: sbot.solve_bridge(X.expand(1, 6, 2), Y.expand(3, 5, 2), 0.1),
            r"mu has batch dimensions \(1,\) and nu \(3,\)",
        ),
        (lambda: sbot.solve_bridge(X.expand(2, 3, 6, 2), Y.expand(2, 5, 2), 0.1), r"\(2, 3\) and nu \(2,\)"),
        (lambda: sbot.solve_bridge((X, A[:, :5]), Y, 0.1), r"weights of shape \(3, 5\) for points of shape \(6, 2\)"),
        (lambda: sbot.solve_bridge((X.expand(2, 6, 2), A), Y, 0.1), r"weights of shape \(3, 6\)"),
        (
            lambda: sbot.solve_bridge(A, H, 0.1, cost=torch.rand(2, 6, 5)),
            r"shape \(2, 6, 5\).*give shape \(3, 6, 5\), or \(6, 5\)",
        ),
        (lambda: sbot.solve_bridge(A, H, 0.1, cost=torch.rand(1, 6, 5)), r"shape \(1, 6, 5\)"),
        (
            lambda: sbot.solve_bridge(torch.rand(6, 6), H[0], 0.1, cost=torch.rand(6, 5)),
            "6 points or the weights of 6 histograms",
        ),
        (
            lambda: sbot.solve_bridge(A, torch.stack([H[0], H[0], torch.eye(5)[4]]), 0.1, cost=forbidden()),
            r"atom \[0\] of mu in problem 2 of the batch has weight but every pair",
        ),
        (
            lambda: sbot.solve_bridge(A, torch.stack([H[0], 2 * H[0], H[0]]), 0.1, cost=torch.rand(6, 5)),
            "problem 1 of the batch",
        ),
    ],
)
def test_sizes_do_not_broadcast(solve, said):
    with pytest.raises(sbot.InvalidProblem, match=said):
        solve()


def forbidden():
    c = torch.rand(6, 5)
    c[0, 4] = torch.inf
    return c


def test_arrays_beside_a_matrix_are_points_or_weights_by_their_sizes(generator):
    c = torch.rand(6, 5, generator=generator)
    assert sbot.Problem.of(X, Y, 0.1, cost=c).mu.points.shape == (6, 2)
    assert sbot.Problem.of(A.tolist(), H.numpy(), 0.1, cost=c).batch_shape == (3,)
    assert sbot.Problem.of(A[0].tolist(), H, 0.1, cost=c).mu.weights.shape == (3, 6)
    own = sbot.Problem.of(X, H, 0.1, cost=c.expand(3, 6, 5))
    assert own.mu.points.shape == (3, 6, 2) and own.nu.points is None
    assert sbot.Problem.of(A[0], H[0], 0.1, cost=c.expand(3, 6, 5)).batch_shape == (3,)


# ---- one problem of a batch ----------------------------------------------------------------------------------------


def test_a_part_is_the_problem_alone(data):
    x, y, a, b = data
    batch = sbot.solve_bridge((x, a), (y, b), 0.3, solver=TIGHT)
    alone = [sbot.solve_bridge((x[k], a[k]), (y[k], b[k]), 0.3, solver=TIGHT) for k in range(B)]
    same(batch, alone)
    for k, (part, one) in enumerate(zip(batch, alone, strict=True)):
        assert part.problem.batch_shape == () and torch.equal(part.problem.mu.weights, a[k])
        z = torch.zeros(4, 2, dtype=torch.float64)
        torch.testing.assert_close(part.drift(0.3, z), one.drift(0.3, z), atol=1e-8, rtol=0)
        assert part.sparse_plan().shape == (N, M) and part.assignment().shape == (N,)
        pairs = [bridge.sample_pairs(6, generator=torch.Generator().manual_seed(k)) for bridge in (part, one)]
        assert torch.equal(pairs[0][1], pairs[1][1])
        assert part.report.error == batch.report.errors[k] and part.report.converged
        assert f"problem {k} of a batch (3,)" in part.report.notes[-1]
    assert torch.equal(batch[-1].plan(), batch[2].plan())
    again = sbot.solve_bridge((x[1], a[1]), (y[1], b[1]), 0.3, init=batch[1])
    assert again.report.iterations == 0


def test_a_part_of_a_table_with_points(data, generator):
    x, y, _, _ = data
    c = torch.rand(B, N, M, generator=generator, dtype=torch.float64)
    batch = sbot.solve_bridge(x, y, 0.3, cost=c, solver=TIGHT)
    alone = sbot.solve_bridge(x[1], y[1], 0.3, cost=c[1], solver=TIGHT)
    torch.testing.assert_close(batch[1].transport(), alone.transport(), atol=1e-9, rtol=0)
    assert batch[1].sample_pairs(4, generator=generator)[1].shape == (4, 2)


def test_a_part_of_a_differentiable_batch(data):
    x, y, _, _ = data
    leaf = x.clone().requires_grad_()
    sbot.solve_bridge(leaf, y, 0.3, solver=TIGHT).differentiable()[1].transport().sum().backward()
    assert float(leaf.grad[1].abs().sum()) > 0 and float(leaf.grad[[0, 2]].abs().sum()) == 0
    single = x[1].clone().requires_grad_()
    sbot.solve_bridge(single, y[1], 0.3, solver=TIGHT).differentiable().transport().sum().backward()
    torch.testing.assert_close(leaf.grad[1], single.grad, atol=1e-8, rtol=0)


def test_a_part_has_its_own_eps_and_tolerance(data):
    x, y, a, b = data
    eps = torch.tensor([0.1, 0.3, 1.0], dtype=torch.float64)
    batch = sbot.solve_bridge((x, a), (y, b), eps, solver=TIGHT)
    same(batch, [sbot.solve_bridge((x[k], a[k]), (y[k], b[k]), float(eps[k]), solver=TIGHT) for k in range(B)])
    assert [part.problem.eps for part in batch] == eps.tolist()
    shared = sbot.solve_bridge(a, b, eps, cost=half_squares(x[0], y[0]).requires_grad_(), solver=TIGHT)
    same(
        shared,
        [sbot.solve_bridge(a[k], b[k], float(eps[k]), cost=half_squares(x[0], y[0]), solver=TIGHT) for k in range(B)],
    )
    coarse = sbot.solve_bridge(x.float(), y.float(), torch.tensor([1e-5, 0.3, 1.0]), solver=sbot.Sinkhorn(max_iter=300))
    for k, part in enumerate(coarse):
        assert part.report.tolerance == coarse.report.tolerances[k]
        assert part.report.error == coarse.report.errors[k]
    assert coarse.report.tolerances[0] > coarse.report.tolerances[1] == coarse.report.tolerances[2]


def test_indices(data):
    x, y, _, _ = data
    batch = sbot.solve_bridge(x.expand(2, B, N, 2), y, 0.5)
    assert len(batch) == 2 and len(batch[0]) == B and batch[0].plan().shape == (B, N, M)
    assert batch[1, -1].plan().shape == (N, M) and len(batch[0].report.errors) == B
    for index in ((2, 0), 2, (0, 3), -3):
        with pytest.raises(IndexError, match="no problem"):
            batch[index]
    for index in (0.5, "a", slice(0, 1), (0, 0, 0), (), True, None):
        with pytest.raises(sbot.InvalidProblem, match="index"):
            batch[index]
    one = batch[0, 0]
    for ask in (lambda: one[0], lambda: len(one), lambda: list(one)):
        with pytest.raises(sbot.InvalidProblem, match="one problem, not of a batch"):
            ask()
    assert one and batch


# ---- reports -------------------------------------------------------------------------------------------------------


def test_the_report_says_which_problem_is_not_done(generator):
    x, y = clouds(20, 20, 2, generator, (4,))
    x[[0, 1, 3]], y[[0, 1, 3]] = 0.01 * x[[0, 1, 3]], 0.01 * y[[0, 1, 3]]  # nearly flat costs but for one
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batch = sbot.solve_bridge(x, y, 0.005, solver=sbot.Sinkhorn(max_iter=60))
    report = batch.report
    assert len(caught) == 1 and " in problem 2 of the batch for a tolerance" in str(caught[0].message)
    assert report.error == max(report.errors) == report.errors[2] and len(report.errors) == 4
    assert [part.report.converged for part in batch] == [True, True, False, True]
    assert [part.report.reason for part in batch] == ["tolerance", "tolerance", "max_iter", "tolerance"]
    with pytest.warns(sbot.NotConverged, match=r"in problem \(1, 0\) of the batch"):
        sbot.solve_bridge(x.reshape(2, 2, 20, 2), y.reshape(2, 2, 20, 2), 0.005, solver=sbot.Sinkhorn(max_iter=60))
    assert sbot.solve_bridge(x[0], y[0], 0.5).report.errors == ()


def test_shared_batches_are_kept_in_files(data, tmp_path, generator):
    _, _, a, b = data
    c = torch.rand(N, M, generator=generator, dtype=torch.float64)
    batch = sbot.solve_bridge(a, b, 0.2, cost=c)
    batch.save(tmp_path / "table.safetensors")
    again = sbot.load(tmp_path / "table.safetensors")
    assert again.problem.cost.values.shape == (N, M)
    assert torch.equal(again.plan(), batch.plan()) and torch.equal(again[1].plan(), batch[1].plan())
    assert batch.to(dtype=torch.float32)[2].plan().shape == (N, M)
    x, y = data[0], data[1]
    cloud = sbot.solve_bridge(x[0], y, 0.2)
    cloud.save(tmp_path / "cloud.safetensors")
    assert torch.equal(sbot.load(tmp_path / "cloud.safetensors")[2].plan(), cloud[2].plan())


def test_a_solve_leaves_the_weights_that_problems_share_alone(generator):
    """Where one problem takes longer than the others, and its result is put in among theirs."""
    t = torch.linspace(0, 1, 40, dtype=torch.float64)
    b = torch.ones(4, 40, dtype=torch.float64) / 40
    b[0] = torch.where(torch.arange(40) > 36, 1.0, 1e-3).double()
    b[0] /= b[0].sum()
    a = torch.rand(40, generator=generator, dtype=torch.float64).softmax(-1).requires_grad_()
    problem = sbot.Problem.of(a, b, 0.05, cost=(t[:, None] - t) ** 2)
    before = problem.mu.weights.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, two = (sbot.Sinkhorn(tol=1e-11).solve(problem).cost().sum() for _ in range(2))
    assert torch.equal(problem.mu.weights, before)
    (one + two).backward()


@pytest.mark.parametrize("batch", [(3,), (2, 3)], ids=str)
def test_a_plan_of_problems_that_share_a_matrix_may_be_lent(batch, generator):
    a = torch.rand(*batch, 5, generator=generator, dtype=torch.float64).softmax(-1)
    b = torch.rand(*batch, 6, generator=generator, dtype=torch.float64).softmax(-1)
    problem = sbot.Problem.of(a, b, 0.5, cost=torch.rand(5, 6, generator=generator, dtype=torch.float64))
    plain, lent = (sbot.Sinkhorn(tol=1e-12).solved(problem, lend=lend) for lend in (False, True))
    assert lent.coupling._lent.laws.shape == (5, 6)
    torch.testing.assert_close(lent.linear_cost(), plain.linear_cost(), rtol=1e-11, atol=0)
    torch.testing.assert_close(lent.plan(), plain.plan(), rtol=1e-11, atol=0)
    torch.testing.assert_close(lent.plan(), plain.plan(), rtol=1e-11, atol=0)


def test_what_is_kept_of_problems_that_share_a_matrix_fits_the_memory(generator):
    """No copy for each, and with no memory none at all; what is found is the same."""
    a, b = (torch.rand(50, n, generator=generator, dtype=torch.float64).softmax(-1) for n in (20, 30))
    problem = sbot.Problem.of(a, b, 0.5, cost=torch.rand(20, 30, generator=generator, dtype=torch.float64))
    kernel = kernels.DenseKernel(problem.cost.values, (50,))
    for memory, dense in ((0, False), (20 * 30 * 8, False), (2**30, False)):
        model = kernels.Conditionals(kernel, memory)
        assert (model.dense is not None) == dense
        assert model.possible == (memory > 0)
    made = []
    for memory in (0, 20 * 30 * 8, 2**30):
        made.append(sbot.Sinkhorn(tol=1e-11, memory=memory).solve(problem).potentials().f.values)
        torch.testing.assert_close(made[-1], made[0], rtol=1e-8, atol=1e-9)
