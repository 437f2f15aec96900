"""Corners that broke once: each of these was wrong, or could have gone wrong unseen."""

from __future__ import annotations

import itertools
import os
import stat
import threading
import warnings

import pytest
import torch

import sbot
from sbot import linalg, metrics
from sbot.kernels import DenseKernel
from sbot.measures import categorical
from sbot.solvers.sinkhorn import STAGE_LIMIT

from ..conftest import clouds, half_squares, kl, weights

INF = float("inf")
F64 = torch.float64


# ---- what the report says --------------------------------------------------------------------------------------------


def test_the_error_is_relative_to_the_mass(generator):
    x, y = clouds(20, 25, 2, generator)
    a, b = 50 * weights(20, generator=generator), 50 * weights(25, generator=generator)
    with pytest.warns(sbot.NotConverged):
        bridge = sbot.solve_bridge((x, a), (y, b), 0.05, solver=sbot.Sinkhorn(max_iter=3))
    assert bridge.report.error == pytest.approx(float(metrics.marginal_error(bridge)), rel=1e-6)


def test_early_stages_are_short(generator):
    x, y = clouds(40, 50, 2, generator)
    bridge = sbot.solve_bridge(x, y, 0.05)
    last = bridge.problem.eps
    assert len({eps for _, eps, _ in bridge.report.history}) > 2
    for stage in {eps for _, eps, _ in bridge.report.history} - {last}:
        steps = [k for k, eps, _ in bridge.report.history if eps == stage]
        assert max(steps) - min(steps) <= STAGE_LIMIT + 1


def test_zero_weights_do_not_cost_the_stored_kernel(generator):
    """Checks of the scaled iteration are four apart, those of the log domain one."""
    x, y = clouds(30, 35, 2, generator)
    a = weights(30, generator=generator)
    a[3] = 0
    bridge = sbot.solve_bridge((x, a / a.sum()), y, 0.1)
    steps = [k for k, eps, _ in bridge.report.history if eps == bridge.problem.eps]
    assert max(b - a for a, b in itertools.pairwise(steps)) >= 4


def test_tolerance_follows_the_largest_cost():
    c = torch.ones(20, 20)
    c[0, 0] = 1e4
    uniform = torch.full((20,), 1 / 20)
    eps = 1.0
    bridge = sbot.solve_bridge(uniform, uniform, eps, cost=c)
    assert bridge.report.tolerance == pytest.approx(0.5 * torch.finfo(torch.float32).eps * 1e4 / eps, rel=0.1)


def test_a_dtype_that_cannot_resolve_eps_is_not_convergence(generator):
    x, y = (t.float() for t in clouds(50, 60, 2, generator))
    for tol in (None, 1e-6):
        with pytest.warns(sbot.NotConverged, match=r"stopped \(precision\)"):
            bridge = sbot.solve_bridge(x, y, 1e-7, solver=sbot.Sinkhorn(tol=tol))
        assert not bridge.report.converged
        assert bridge.report.reason == "precision"
        assert any("use float64" in note for note in bridge.report.notes)


def test_far_apart_in_float32_ends_honestly():
    gen = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 2, generator=gen), torch.randn(50, 2, generator=gen) + 1e4
    for memory in (0, 2**30):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            bridge = sbot.solve_bridge(x, y, 0.1, solver=sbot.Sinkhorn(memory=memory, max_iter=50))
        assert not bridge.report.converged
        assert [w.category for w in caught] == [sbot.NotConverged]
        assert not bool(torch.isnan(bridge.plan()).any())


def test_tolerances_below_rounding_are_raised(generator):
    x, y = clouds(10, 12, 2, generator)
    for dtype in (F64, torch.float32):
        with pytest.warns(sbot.PrecisionWarning):
            bridge = sbot.solve_bridge(x.to(dtype), y.to(dtype), 1e3, solver=sbot.Sinkhorn(tol=0))
        assert bridge.report.converged
        assert bridge.report.tolerance >= 8 * torch.finfo(dtype).eps


# ---- values ----------------------------------------------------------------------------------------------------------


def test_gap_of_a_semi_relaxed_problem_is_the_scaled_objective(generator):
    """Columns scaled exactly to b, in both directions, since a relaxed row sum need not be kept."""
    x, y = clouds(12, 15, 2, generator)
    a, b, eps, rho = weights(12, generator=generator), weights(15, generator=generator), 0.05, 1.0
    with pytest.warns(sbot.NotConverged):
        bridge = sbot.solve_bridge((x, a), (y, b), eps, relax=(rho, INF), solver=sbot.Sinkhorn(tol=1e-12, max_iter=1))
    plan = bridge.plan()
    p = plan * (b / plan.sum(0))
    objective = (p * half_squares(x, y)).sum() + eps * kl(p, a[:, None] * b) + rho * kl(p.sum(1), a)
    torch.testing.assert_close(bridge.gap(), objective - bridge.cost(), rtol=1e-9, atol=1e-9)


def test_a_dead_atom_that_nothing_reaches():
    cases = [
        ([1.0, 0.0], [1.0, 0.0], [[0.0, INF], [INF, 0.0]], [[1.0, 0.0], [0.0, 0.0]]),
        ([1.0, 0.0], [0.0, 1.0], [[0.0, 0.0], [0.0, INF]], [[0.0, 1.0], [0.0, 0.0]]),
    ]
    for a, b, cost, want in cases:
        for relax in (None, (1.0, INF)):
            matrix = torch.tensor(cost, dtype=F64, requires_grad=True)
            mass = torch.tensor(a, dtype=F64, requires_grad=True)
            bridge = sbot.solve_bridge(mass, torch.tensor(b, dtype=F64), 0.1, cost=matrix, relax=relax)
            torch.testing.assert_close(bridge.plan(), torch.tensor(want, dtype=F64))
            grads = torch.autograd.grad(bridge.cost(), (mass, matrix))
            assert torch.isfinite(bridge.cost())
            assert all(bool(torch.isfinite(grad).all()) for grad in grads)


def test_gaussian_cost_can_be_differentiated_again(generator):
    cov = torch.diag(torch.tensor([0.5, 2.0], dtype=F64)).requires_grad_()
    bridge = sbot.solve_bridge(
        sbot.Gaussian(torch.zeros(2, dtype=F64), cov),
        sbot.Gaussian(torch.ones(2, dtype=F64), torch.eye(2, dtype=F64)),
        0.5,
    )
    one, two = (torch.autograd.grad(bridge.cost(), cov)[0] for _ in range(2))
    assert torch.equal(one, two)


def test_cosine_sees_directions_only(generator):
    for dtype, scale in ((torch.float32, 1e20), (F64, 1e160), (F64, 1e-170), (torch.float32, 1e-25)):
        x, y = (t.to(dtype) for t in clouds(6, 5, 2, generator))
        want = sbot.Cosine().matrix(x, y)
        torch.testing.assert_close(sbot.Cosine().matrix(x * scale, y), want, rtol=1e-4, atol=1e-6)
    bridge = sbot.solve_bridge(x, y, 0.5, cost=sbot.Cosine())
    with pytest.raises(sbot.InvalidProblem, match="point at the origin"):
        bridge.transport(torch.zeros(1, 2))


def test_quadratic_costs_of_float32_points_keep_their_digits(generator):
    x = 1e3 + 1e-3 * torch.randn(20, 3, generator=generator)
    y = 1e3 + 1e-3 * torch.randn(20, 3, generator=generator)
    torch.testing.assert_close(
        sbot.Quadratic().matrix(x, y).double(), half_squares(x.double(), y.double()), rtol=1e-6, atol=0
    )


def test_scale_takes_absolute_values(generator):
    c = torch.rand(5, 6, generator=generator, dtype=F64)
    mean, top = DenseKernel(-c).scale()
    torch.testing.assert_close(mean, c.mean())
    assert float(top) == float(c.max())


# ---- warm starts, draws ----------------------------------------------------------------------------------------------


def test_a_warm_start_from_permuted_atoms(generator):
    """The potentials are read at the new places, not by number."""
    x, y = clouds(20, 25, 2, generator)
    order = torch.randperm(25, generator=generator)
    init = sbot.solve_bridge(x, y[order], 0.1, solver=sbot.Sinkhorn(tol=1e-8))
    again = sbot.solve_bridge(x, y, 0.1, init=init, solver=sbot.Sinkhorn(tol=1e-6))
    assert again.report.history[0][2] <= 1e-6


def test_dead_atoms_are_not_drawn_at_the_edge(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.zeros(*shape, dtype=F64))
    assert categorical(torch.tensor([0.0, 0.5, 0.5]).log(), 3, None).tolist() == [1, 1, 1]
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.ones(*shape, dtype=F64))
    assert categorical(torch.tensor([0.5, 0.5, 0.0]).log(), 3, None).tolist() == [1, 1, 1]


def test_equal_seeds_are_equal_draws(generator):
    x, y = clouds(20, 25, 2, generator)
    discrete = sbot.solve_bridge(x, y, 0.3)
    gaussian = sbot.solve_bridge(sbot.Gaussian.from_samples(x), sbot.Gaussian.from_samples(y), 0.3)
    mixture = sbot.Mixture(torch.zeros(2), torch.randn(2, 2), torch.eye(2).expand(2, 2, 2))
    for draw in (
        lambda g: discrete.condition(x).sample(generator=g),
        lambda g: discrete.sample_pairs(9, generator=g)[1],
        lambda g: discrete.marginal(0.3).sample(9, generator=g),
        lambda g: discrete.interpolate(0.3, 9, generator=g),
        lambda g: gaussian.condition(x).sample(generator=g),
        lambda g: gaussian.sample_pairs(9, generator=g)[1],
        lambda g: gaussian.sample_paths(9, [0.3, 0.6], generator=g),
        lambda g: mixture.sample(9, generator=g),
    ):
        one, two, other = (draw(torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
        assert torch.equal(one, two)
        assert not torch.equal(one, other)


def test_pairs_of_a_relaxed_bridge_start_from_its_own_marginal(generator):
    x, y = clouds(5, 6, 2, generator)
    bridge = sbot.solve_bridge(x, y, 0.5, relax=0.1)
    n = 100_000
    start = bridge.sample_pairs(n, generator=generator)[0]
    counts = torch.bincount(torch.cdist(start, x).argmin(1), minlength=5) / n
    want = bridge.plan().sum(1) / bridge.plan().sum()
    assert float((want - 0.2).abs().max()) > 0.05  # far from mu: the test would see it
    torch.testing.assert_close(counts.double(), want, atol=0.01, rtol=0)


def test_marginals_of_batches_and_of_nothing(generator):
    x, y = clouds(6, 5, 2, generator, (3,))
    law = sbot.solve_bridge(x, y, 0.5).marginal(0.5)
    assert law.batch_shape == (3,)
    assert law.sample(4, generator=generator).shape == (3, 4, 2)
    assert law.to(dtype=torch.float32).sample(4, generator=generator).dtype == torch.float32
    empty = sbot.solve_bridge(x[0], y[0] + 1e4, 0.1, relax=(1.0, 1.0))
    assert float(empty.plan().sum()) == 0
    with pytest.raises(sbot.Unsupported, match="no mass left"):
        empty.sample_pairs(3)


def test_a_loader_loses_nothing():
    data = torch.utils.data.TensorDataset(torch.arange(10.0)[:, None])
    sampler = sbot.Sampler.from_loader(torch.utils.data.DataLoader(data, batch_size=4))
    assert sampler.sample(3).flatten().tolist() == [0, 1, 2]
    assert sampler.to(dtype=F64).sample(3).flatten().tolist() == [3, 4, 5]


# ---- doors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x: sbot.solve_bridge(x, x, 1e-310), "eps is 1e-310, outside the range of torch.float64"),
        (lambda x: sbot.solve_bridge(x.float(), x.float(), 1e-40), "outside the range of torch.float32"),
        (lambda x: sbot.solve_bridge(x, x, 10**400), "eps is beyond the range of a float"),
        (lambda x: sbot.solve_bridge(x, x, 0.1, relax=torch.tensor(0.1, requires_grad=True)), "wants a gradient"),
        (lambda x: sbot.solve_bridge(x.to(torch.float8_e5m2), x, 0.1), "float8_e5m2, which has no arithmetic"),
        (lambda x: sbot.OrnsteinUhlenbeck(-400), "rate is -400.0; beyond 100"),
        (lambda x: sbot.solve_bridge(x, x, 1.0, reference=sbot.LinearSDE(-250.0)), "forgets where it started"),
        (lambda x: sbot.solve_bridge(x, x, 1.0, reference=sbot.LinearSDE(0.0, 0.0, torch.eye(3))), "dimension 3"),
        (lambda x: sbot.LinearSDE(lambda t: 0.0 if t < 0.5 else torch.eye(2)).transition(0.0, 1.0), "dimensions"),
        (lambda x: sbot.solve_bridge(x, x, 1.0, cost=lambda x: x), "it is called as cost"),
        (lambda x: sbot.solve_bridge(x, x, 1.0).drift(1e-40, x), "within 1e-15 of an end; give the end itself"),
        (lambda x: sbot.solve_bridge(x, x, 1.0).transport(x * 1e160), "square overflows"),
        (lambda x: sbot.solve_bridge(x, x, 1.0).to(dtype=torch.int32), "give torch.float64"),
        (lambda x: sbot.solve_bridge(x, x, 1.0).to(dtype="float32"), "give torch.float64"),
        (lambda x: sbot.load(3), "path is 3"),
        (lambda x: sbot.Sampler(lambda n, g: torch.zeros(n, 2), 3), "event_shape is 3"),
        (lambda x: sbot.Sampler.from_dataset([]), "the dataset is empty"),
        (lambda x: sbot.Sampler.from_loader(5), "the loader is int"),
        (lambda x: sbot.Gaussian(torch.zeros(2), torch.eye(2)).log_prob(torch.zeros(3, 1)), r"give \(n, 2\)"),
        (lambda x: sbot.choose_solver(x), "make one with sbot.Problem.of"),
        (
            lambda x: sbot.solve_bridge(
                (x.expand(2, 4, 2), torch.tensor([[0.25] * 4, [0.5] * 4])), x.expand(2, 4, 2), 1.0
            ),
            r"sum\(mu\) = 2 and sum\(nu\) = 1 in problem 1 of the batch",
        ),
    ],
)
def test_clear_refusals(call, match, generator):
    with pytest.raises(sbot.InvalidProblem, match=match):
        call(torch.randn(4, 2, generator=generator, dtype=F64))


@pytest.mark.parametrize(
    ("dtype", "off", "fine"),
    [(F64, 1e-6, False), (torch.float32, 1e-3, False), (torch.float16, 1e-3, True), (F64, 1e-10, True)],
)
def test_how_unequal_masses_may_be(dtype, off, fine):
    x = torch.zeros(4, 2, dtype=dtype)
    a = torch.full((4,), 0.25 * (1 + off), dtype=dtype)
    b = torch.full((4,), 0.25, dtype=dtype)
    if fine:
        assert sbot.solve_bridge((x, a), (x, b), 1.0).report.converged
    else:
        with pytest.raises(sbot.InvalidProblem, match="equal masses"):
            sbot.solve_bridge((x, a), (x, b), 1.0)


def test_indices_of_every_integer_kind(generator):
    x, y = (t.float() for t in clouds(6, 5, 2, generator))
    bridge = sbot.solve_bridge(x, y, 0.5)
    plan = bridge.plan()
    for kind in (torch.uint8, torch.int8, torch.int16, torch.int32):
        torch.testing.assert_close(bridge.plan(rows=torch.tensor([1, 4], dtype=kind)), plan[[1, 4]])
    torch.testing.assert_close(bridge.plan(rows=[-1]), plan[-1:])
    assert bridge.plan(rows=[]).shape == (0, 5)
    for wrong in ([True] * 6, "ab", [1.5], [[1, 2]], slice("a", "b"), {1: 2}):
        with pytest.raises(sbot.InvalidProblem):
            bridge.plan(rows=wrong)


def test_half_results_beyond_their_range_are_an_error(generator):
    x, y = (500 * t for t in clouds(6, 5, 2, generator))
    bridge = sbot.solve_bridge(x.half(), y.half(), 1e4)
    with pytest.raises(sbot.NumericalError, match=r"beyond the range of torch\.float16"):
        bridge.cost()
    assert torch.isfinite(bridge.to(dtype=torch.float32).cost())


def test_points_changed_later_do_not_change_the_bridge(generator):
    x, y = clouds(6, 5, 2, generator)
    bridge = sbot.solve_bridge(x, y, 0.5)
    before = bridge.plan()
    x.add_(5)
    y.mul_(2)
    assert torch.equal(bridge.plan(), before)


def test_zero_dimensional_times(generator):
    bridge = sbot.solve_bridge(*clouds(6, 5, 2, generator), 0.5)
    assert bridge.interpolate(torch.tensor(0.5), 3).shape == (3, 2)
    assert bridge.sample_paths(3, [torch.tensor(0.2), 0.5]).shape == (3, 2, 2)


def test_places_that_reach_nothing(generator):
    x, y = clouds(6, 5, 2, generator)
    near = lambda x, y: torch.where(torch.cdist(x, y) < 20, torch.cdist(x, y), INF)  # noqa: E731
    bridge = sbot.solve_bridge(x, y, 0.5, cost=near)
    for call in (lambda: bridge.transport(x + 1000), lambda: bridge.condition(x + 1000).sample()):
        with pytest.raises(sbot.Unsupported, match="every pair is forbidden"):
            call()


# ---- torch's own switches --------------------------------------------------------------------------------------------


def test_precision_switches_old_and_new(generator):
    x, y = (t.float() for t in clouds(40, 40, 8, generator))
    want = sbot.solve_bridge(x, y, 2.0).plan()
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        assert torch.equal(sbot.solve_bridge(x, y, 2.0).plan(), want)
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before


def test_autocast_outside_does_not_reach_inside(generator):
    x, y = (t.float() for t in clouds(40, 40, 3, generator))
    sde = sbot.LinearSDE(-torch.eye(3), 0.0, torch.eye(3))
    plain = [sbot.solve_bridge(x, y, 0.5, reference=sde, solver=sbot.Sinkhorn(memory=m)) for m in (0, 2**30)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = [sbot.solve_bridge(x, y, 0.5, reference=sde, solver=sbot.Sinkhorn(memory=m)) for m in (0, 2**30)]
        for one, two in zip(plain, cast, strict=True):
            assert torch.equal(one.plan(), two.plan())
            assert torch.equal(one.drift(0.5, x), two.drift(0.5, x))


def test_a_default_device_does_not_misplace_anything(generator):
    """Tensors made inside follow the input: with the default device set elsewhere, nothing of ours lands there."""
    x, y = clouds(10, 12, 2, generator)
    z = x[:3].clone()
    mu, nu = sbot.Gaussian.from_samples(x), sbot.Gaussian.from_samples(y)
    try:
        torch.set_default_device("meta")
        bridges = [
            sbot.solve_bridge(x, y, 0.5, reference=r)
            for r in (None, sbot.OrnsteinUhlenbeck(1.0), sbot.LinearSDE.vp(0.1, 2.0))
        ]
        bridges.append(sbot.solve_bridge(mu, nu, 0.5))
        for bridge in bridges:
            got = [bridge.drift(0.3, z), bridge.reverse_drift(0.3, z), bridge.log_prob(0.3, z), bridge.cost()]
            got += [
                bridge.potentials().f(z),
                bridge.potentials().g(z),
                bridge.gap(),
                bridge.sample_paths(3, [0.0, 0.5, 1.0], generator=generator),
            ]
            assert all(part.device.type == "cpu" for part in got)
        static = sbot.solve_bridge(x, y, 0.5, cost=sbot.Lp(1))
        assert static.potentials().g(y).device.type == "cpu"
    finally:
        torch.set_default_device(None)


def test_a_reference_shared_by_threads():
    sde = sbot.LinearSDE(lambda t: -1.0 - t)
    faults = []

    def work(seed):
        try:
            for k in range(300):
                sde.transition(0.5 * ((seed * 300 + k) % 997) / 997, 1.0)
        except Exception as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert len(sde._cache) <= 256


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_bridge_moved_to_another_dtype_can_be_kept(tmp_path, generator):
    x, y = (t.float() for t in clouds(6, 5, 2, generator))
    for dtype in (F64, torch.float32, torch.float16, torch.bfloat16):
        for start in (x, x.half()):
            bridge = sbot.solve_bridge(start, y.to(start.dtype), 0.3).to(dtype=dtype)
            bridge.save(tmp_path / "b")
            assert torch.equal(sbot.load(tmp_path / "b").plan(), bridge.plan())
            assert bridge.plan().dtype == dtype


@pytest.mark.skipif(os.name != "posix", reason="permissions are posix")
def test_files_have_ordinary_permissions(tmp_path, generator):
    sbot.solve_bridge(*clouds(3, 3, 2, generator), 0.5).save(tmp_path / "b")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(os.stat(tmp_path / "b").st_mode) == 0o666 & ~mask


def test_symmetrise_does_not_overflow():
    huge = torch.eye(2, dtype=F64) * 1.5e308
    assert torch.equal(linalg.symmetrise(huge), huge)
    wide = sbot.Gaussian(torch.zeros(2, dtype=F64), huge)
    with pytest.raises(sbot.NumericalError, match="the plan overflows"):
        sbot.solve_bridge(wide, wide, 1.0)
