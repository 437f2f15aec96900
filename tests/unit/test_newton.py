"""Every way that the Sinkhorn solver has to move, against a plain float64 solve in the log domain."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import sbot
from sbot.kernels import Conditionals, DenseKernel
from sbot.pace import FASTEST, Pace
from sbot.solvers import sinkhorn
from sbot.solvers.halfsteps import Exact, HalfSteps, State
from sbot.solvers.newton import Newton

from ..conftest import clouds, half_squares, weights

INF = math.inf


def plain(c, a, b, eps, rho=(INF, INF), tol=1e-13, most=200_000):
    """Half-steps and nothing else, eps halved from the mean cost down; potentials of every problem of a batch."""
    lam = [1.0 if math.isinf(r) else r / (r + eps) for r in rho]
    log_a, log_b, g = a.log(), b.log(), torch.zeros_like(b)
    now = max(eps, float(c[torch.isfinite(c)].mean()))
    while True:
        last = now <= eps
        now = max(now, eps)
        if math.isfinite(max(rho)):
            now, last = eps, True
        for _ in range(most if last else 200):
            f = -lam[0] * now * ((g[..., None, :] - c) / now + log_b[..., None, :]).logsumexp(-1)
            new = -lam[1] * now * ((f[..., None] - c) / now + log_a[..., None]).logsumexp(-2)
            new = torch.where(b > 0, new, 0.0)
            change, g = float((new - g).abs().max()), new
            if change < tol * max(1.0, float(g.abs().max())):
                break
        if last:
            return f, g
        now /= 2


def plan(c, a, b, eps, f, g):
    return torch.where(
        (a[..., None] > 0) & (b[..., None, :] > 0),
        a[..., None] * b[..., None, :] * torch.exp((f[..., None] + g[..., None, :] - c) / eps),
        0.0,
    )


def solve_by(step_for, c, a, b, eps, rho=(INF, INF), tol=1e-12, most=400, memory=2**30):
    """One kind of step over and over."""
    kernel = DenseKernel(c)
    model = Conditionals(kernel, memory)
    state = State(kernel, a, b, rho, torch.zeros_like(b), model if model.possible else None)
    for now in [
        eps * 2.0**k for k in range(max(0, math.ceil(math.log2(float(c[torch.isfinite(c)].mean()) / eps))), -1, -1)
    ]:
        state.eps = now
        state.settle()
        for k in range(most if now == eps else 5):
            if state.error() <= tol:
                break
            step_for(k, now == eps).advance(state, 30, lambda *_: False)
            if not state.fresh or not state.known:
                state.settle()
    return state


STEPS = {
    "exact": lambda k, last: Exact(),
    "half-steps": lambda k, last: HalfSteps(),
    "newton": lambda k, last: Newton() if last and k > 0 else HalfSteps(),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("rho", [(INF, INF), (1.0, 1.0), (INF, 0.3), (0.2, INF)], ids=str)
@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_every_step_ends_at_the_plain_solution(name, rho, batch, generator):
    x, y = clouds(30, 25, 2, generator, batch)
    a, b = weights(*batch, 30, generator=generator), weights(*batch, 25, generator=generator)
    a[..., 4], b[..., 7] = 0, 0
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    c = half_squares(x, y)
    f, g = plain(c, a, b, 0.1, rho)
    state = solve_by(STEPS[name], c, a, b, 0.1, rho)
    assert state.error() <= 1e-12
    torch.testing.assert_close(plan(c, a, b, 0.1, state.f, state.g), plan(c, a, b, 0.1, f, g), rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("rel", [1e-1, 1e-2, 2e-3])
@pytest.mark.parametrize("sparse", [False, True])
def test_the_default_agrees_with_the_plain_solve(rel, sparse, generator, monkeypatch):
    """Also when the model of the plan is sparse, which small problems are spared."""
    if sparse:
        for limit in ("SMALL", "DOUBLE", "DOUBLE_WHERE_FEW"):
            monkeypatch.setattr(f"sbot.kernels.conditionals.{limit}", 0)
        monkeypatch.setattr("sbot.kernels.conditionals.SPARSE", 0.6)
    x, y = clouds(60, 50, 2, generator)
    a, b = weights(60, generator=generator), weights(50, generator=generator)
    c = half_squares(x, y)
    eps = rel * float(c.mean())
    f, g = plain(c, a, b, eps)
    bridge = sbot.solve_bridge((x, a), (y, b), eps, solver=sbot.Sinkhorn(tol=1e-12))
    assert bridge.report.converged
    assert ("kept at the end" in bridge.report.notes[-1]) == (sparse and rel < 1e-1)
    torch.testing.assert_close(bridge.plan(), plan(c, a, b, eps, f, g), rtol=1e-6, atol=1e-12)
    value = (plan(c, a, b, eps, f, g) * c).sum()
    torch.testing.assert_close(bridge.linear_cost(), value, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_corner_where_plain_kernels_fail(dtype, generator):
    """eps = 5e-4 of the largest cost, uniform weights: exp(-C / eps) underflows in whole rows."""
    x, y = clouds(100, 100, 2, generator)
    c = half_squares(x, y)
    c = (c / c.max()).to(dtype)
    a = torch.full((100,), 0.01, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bridge = sbot.solve_bridge(a, a, 5e-4, cost=c)
    assert bridge.report.converged
    measured = (bridge.plan().double().sum(0) - 0.01).abs().sum() + (bridge.plan().double().sum(1) - 0.01).abs().sum()
    assert float(measured) <= (1e-6 if dtype == torch.float64 else 2e-3)


def test_small_eps_takes_newton_and_says_so(generator):
    x, y = clouds(80, 80, 2, generator)
    bridge = sbot.solve_bridge(x, y, 1e-3 * float(half_squares(x, y).mean()), solver=sbot.Sinkhorn(tol=1e-11))
    assert bridge.report.converged
    assert "Newton steps" in bridge.report.notes[-1]
    assert bridge.report.iterations < 3000


def test_forbidden_pairs_and_newton(generator):
    """A chain of forbidden pairs leaves a sparse pattern; the plan keeps to it."""
    n = 30
    c = torch.rand(n, n, generator=generator, dtype=torch.float64)
    c = torch.where((torch.arange(n)[:, None] - torch.arange(n)).abs() <= 3, c, INF)
    a = torch.full((n,), 1 / n, dtype=torch.float64)
    f, g = plain(c, a, a, 0.05)
    bridge = sbot.solve_bridge(a, a, 0.05, cost=c, solver=sbot.Sinkhorn(tol=1e-12))
    assert bridge.report.converged
    assert float(bridge.plan()[torch.isinf(c)].abs().max()) == 0
    torch.testing.assert_close(bridge.plan(), plan(c, a, a, 0.05, f, g), rtol=1e-6, atol=1e-12)


def test_a_step_that_cannot_gain_is_taken_back(generator):
    """A model that lies about the plan gives a direction that is none: the dual must not fall."""
    x, y = clouds(30, 30, 2, generator)
    c = half_squares(x, y)
    a = torch.full((30,), 1 / 30, dtype=torch.float64)
    kernel = DenseKernel(c)
    state = State(kernel, a, a, (INF, INF), torch.zeros_like(a), Conditionals(kernel, 2**30), eps=0.05)
    state.settle()
    HalfSteps().advance(state, 20, lambda *_: False)
    state.settle()
    before = float(state.dual())
    assert state.model is not None
    state.model.dense.copy_(state.model.dense.flip(0).flip(1))
    Newton().advance(state, 50, lambda *_: False)
    if not state.fresh:
        state.settle()
    assert float(state.dual()) >= before - 1e-12


def test_over_relaxation_learns_the_rate():
    """Gauss-Seidel on two blocks at a known rate: omega tends to the best one, and the rates it predicts come true."""
    theta, used = 0.9, []
    error, x, y = math.sqrt(2), 1.0, 1.0
    pace = Pace(torch.tensor(error, dtype=torch.float64))
    for k in range(1, 61):
        omega = float(pace.factor)
        x = (1 - omega) * x + omega * math.sqrt(theta) * y
        y = (1 - omega) * y + omega * math.sqrt(theta) * x
        if k % 5 == 0:
            error = math.hypot(x, y)
            pace.look(torch.tensor(error, dtype=torch.float64), 5)
            used.append(float(pace.factor))
    best = 2 / (1 + math.sqrt(1 - theta))
    assert 1 < used[0] < best + 0.1
    assert max(used) <= FASTEST
    assert min(abs(omega - best) for omega in used) < 0.1
    assert error < theta**60 * 1e-3


def test_the_pace_of_one_problem_is_that_of_a_batch():
    errors = torch.rand(12, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64).cumprod(0)
    errors[6, 1] = 2.0  # it grew
    together, alone = Pace(errors[0]), [Pace(errors[0, k]) for k in range(3)]
    for row in errors[1:]:
        together.look(row, 4)
        for k, pace in enumerate(alone):
            pace.look(row[k], 4)
            assert isinstance(pace.factor, float)
        assert [pace.factor for pace in alone] == pytest.approx(together.factor.tolist(), rel=1e-14)
        omega = together.omega
        assert [pace.omega or 1.0 for pace in alone] == pytest.approx(
            [1.0] * 3 if omega is None else omega[:, 0].tolist()
        )


RELAXED = [(1e-3, 1e-3), (1.0, 1.0), (1e3, 1e3), (0.1, 10.0), (INF, 2.0), (2.0, INF)]


@pytest.mark.parametrize("rho", RELAXED, ids=str)
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_no_error_is_left_in_the_constant_between_the_potentials(rho, batch, generator):
    """Where all pairs cost the same a solution is two constants, and one iteration finds both, whatever the masses are."""
    a, b = (scale * weights(*batch, n, generator=generator) for n, scale in ((7, 1.0), (9, 3.0)))
    a[..., 2] = b[..., 4] = 0
    kernel = DenseKernel(torch.full((*batch, 7, 9), 0.4, dtype=torch.float64))
    state = State(kernel, a, b, rho, torch.zeros_like(b), Conditionals(kernel, 2**30), eps=1.0)
    state.settle()
    assert state.error() > 1e-3
    HalfSteps().advance(state, 1, lambda *_: True)
    found, landed = (state.rows, state.columns), state.fresh
    assert landed == (min(rho) < 1e3)  # a step that is too far for the model is judged by a pass
    state.settle()
    for one, other in zip(found, (state.rows, state.columns), strict=True):
        assert not landed or torch.allclose(one, other, rtol=1e-10, atol=1e-15)
    assert state.error() < 1e-13 * max(1.0, 1 / min(rho))
    assert float(state.imbalance(state.g).abs().max()) < 1e-12 * max(1.0, min(rho))


@pytest.mark.parametrize("rate", [1e-1, 1e-3, 1e-7])
def test_the_error_is_looked_at_where_it_is_foreseen_to_be_small(rate):
    """No later than four iterations on, and no sooner than it is a hundredth of the tolerance."""
    wait = HalfSteps()._wait(1e-6, 1e-10, -math.log(rate))
    assert wait == min(4, math.ceil(math.log(1e-4) / math.log(rate)))
    assert HalfSteps()._wait(1e-6, 0.0, 1.0) == HalfSteps()._wait(1e-6, 1e-10, 0.0) == 4


def test_a_solve_that_gains_quickly_ends_between_two_looks_of_a_slow_one(generator):
    x, y = clouds(30, 40, 2, generator)
    bridge = sbot.solve_bridge(x, y, 3.0, relax=3.0, solver=sbot.Sinkhorn(tol=1e-10))
    looks = [iteration for iteration, _, _ in bridge.report.history]
    assert looks[:3] == [0, 2, 4] and looks[-1] in (5, 6, 7)
    assert bridge.report.error <= 0.1 * bridge.report.tolerance


def test_no_pass_finds_what_is_not_there(generator):
    """An atom of nu a thousand e-folds beyond all others: its column underflows and is found in the log domain."""
    x = torch.rand(20, 1, generator=generator, dtype=torch.float64)
    y = torch.cat([x[:-1], torch.full((1, 1), 60.0, dtype=torch.float64)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bridge = sbot.solve_bridge(x, y, 0.5, solver=sbot.Sinkhorn(tol=1e-10, anneal=None))
    assert bridge.report.converged
    assert float((bridge.plan().sum(0) - 1 / 20).abs().max()) < 1e-9
    assert sinkhorn.PATIENCE > 1


def test_anderson_spares_passes(generator):
    """Streamed iterations: as accurate, and far fewer than plain ones."""
    x, y = clouds(200, 180, 2, generator)
    eps = 0.02 * float(half_squares(x, y).mean())
    solver = sbot.Sinkhorn(tol=1e-9, memory=0, anneal=None)
    streamed = sbot.solve_bridge(x, y, eps, solver=solver)
    kept = sbot.solve_bridge(x, y, eps, solver=sbot.Sinkhorn(tol=1e-12))
    assert streamed.report.converged
    torch.testing.assert_close(streamed.plan(), kept.plan(), rtol=1e-5, atol=1e-11)
    a = torch.full((200,), 1 / 200, dtype=torch.float64)
    b = torch.full((180,), 1 / 180, dtype=torch.float64)
    state = State(DenseKernel(half_squares(x, y)), a, b, (INF, INF), torch.zeros_like(b), eps=eps)
    state.settle()
    step = Exact(memory=0)
    for _ in range(streamed.report.iterations):
        step.advance(state, 1, lambda *_: False)
        state.settle()
    assert state.error() > 100 * streamed.report.error


@pytest.mark.parametrize("weighted", [False, True])
def test_a_streamed_problem_starts_from_a_few_of_its_atoms(weighted, generator, monkeypatch):
    monkeypatch.setattr(sinkhorn, "COARSEST", 50)
    x, y = clouds(400, 300, 2, generator)
    a = weights(400, generator=generator) if weighted else torch.full((400,), 1 / 400, dtype=torch.float64)
    b = weights(300, generator=generator) if weighted else torch.full((300,), 1 / 300, dtype=torch.float64)
    before = torch.random.get_rng_state()
    bridge = sbot.solve_bridge((x, a), (y, b), 0.1, solver=sbot.Sinkhorn(tol=1e-9, memory=0))
    assert torch.equal(before, torch.random.get_rng_state())
    assert "started from a solution between 100 and 75 of the atoms" in bridge.report.notes
    cold = sbot.solve_bridge((x, a), (y, b), 0.1, solver=sbot.Sinkhorn(tol=1e-12))
    torch.testing.assert_close(bridge.plan(), cold.plan(), rtol=1e-5, atol=1e-11)
    thin = sinkhorn._thinned(sbot.Discrete(x, a))
    torch.testing.assert_close(thin.mass, a.sum())
    if not weighted:
        assert len(thin.points.unique(dim=0)) == 100  # no atom twice


@pytest.mark.parametrize("name", ["quadratic", "l1", "matrix"])
@pytest.mark.parametrize("rho", [(INF, INF), (1.0, INF)], ids=str)
def test_problems_of_a_batch_that_are_done_are_left_behind(name, rho, generator):
    """One problem of a batch is far harder than the others, and each comes out as if it were alone."""
    x, y = clouds(20, 30, 2, generator, (6,))
    x[4], y[4] = 30 * x[4], 30 * y[4]
    a, b = weights(6, 20, generator=generator), weights(6, 30, generator=generator)
    solver = sbot.Sinkhorn(tol=1e-11)

    def solve(x, y, a, b):
        if name == "matrix":
            return sbot.solve_bridge(a, b, 0.5, cost=half_squares(x, y), relax=rho, solver=solver)
        return sbot.solve_bridge(
            (x, a), (y, b), 0.5, cost=sbot.Lp(1) if name == "l1" else None, relax=rho, solver=solver
        )

    whole = solve(x, y, a, b)
    assert whole.report.converged
    for k in range(6):
        one = solve(x[k], y[k], a[k], b[k])
        torch.testing.assert_close(whole.plan()[k], one.plan(), rtol=1e-7, atol=1e-11)
        torch.testing.assert_close(whole.cost()[k], one.cost(), rtol=1e-10, atol=1e-10)
    columns = whole.plan().sum(-2)
    if rho[1] == INF:
        assert float((columns - b).abs().sum(-1).max()) <= 1.1 * whole.report.error + 1e-12


@pytest.mark.parametrize("rho", [(INF, INF), (2.0, INF), (INF, 2.0), (1.0, 3.0)], ids=str)
def test_the_factorised_step_solves_the_schur_complement(rho, generator):
    x, y = clouds(25, 20, 2, generator)
    a, b = weights(25, generator=generator), weights(20, generator=generator)
    kernel, eps = DenseKernel(half_squares(x, y)), 0.2
    state = State(kernel, a, b, rho, 0.05 * torch.randn(20, generator=generator).double(), Conditionals(kernel, 2**30))
    state.eps = eps
    state.settle()
    rest = state.goal() - state.columns
    rest = rest - rest.mean() if rho == (INF, INF) else rest
    z = Newton(trust=1e9).solution(state, rest)
    plan = torch.exp(state.log_a[:, None] + state.log_b + (state.f[:, None] + state.g - kernel.matrix) / eps)
    lam = 1.0 if math.isinf(rho[0]) else rho[0] / (rho[0] + eps)
    s = torch.diag(plan.sum(0)) - lam * plan.T @ (plan / plan.sum(1)[:, None])
    if not math.isinf(rho[1]):
        s = s + eps / rho[1] * torch.diag(state.goal())
    assert z is not None
    torch.testing.assert_close(s @ z, rest, rtol=1e-4, atol=1e-5 * float(rest.abs().max()))
    short = Newton(trust=0.9 * float(z.abs().max())).solution(state, rest)
    assert short is not None
    assert float(short.abs().max()) <= 0.9 * float(z.abs().max())
    assert float(short @ rest) > 0  # and the dual rises along it


def test_no_factor_has_denormal_numbers(monkeypatch):
    """Along a chain of weak ties the entries of a factor fall for ever: what is denormal takes a hundred times as long."""
    x = torch.linspace(0, 1, 200, dtype=torch.float64)[:, None]
    kernel, a = DenseKernel(half_squares(x, x)), torch.full((200,), 1 / 200, dtype=torch.float64)
    state = State(kernel, a, a, (INF, INF), torch.zeros_like(a), Conditionals(kernel, 2**30))
    state.eps = 5e-7
    state.settle()
    factors, plain = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda s: factors.append(plain(s)) or factors[-1])
    rest = torch.randn(200, generator=torch.Generator().manual_seed(0)).double()
    z = Newton(trust=1e12).solution(state, 1e-9 * (rest - rest.mean()))
    assert z is not None and len(factors) > 0
    size = factors[-1][0].abs()
    assert int(((size > 0) & (size < 1e-300)).sum()) == 0
    assert float(size[-1, 0]) > 0


@pytest.mark.parametrize("eps", [1e-3, 1e-4])
def test_a_measure_to_itself_at_small_eps(eps, generator):
    """Groups of atoms that hardly share mass: conjugate gradients alone do not get there."""
    x = torch.randn(300, 2, generator=generator).double()
    bridge = sbot.solve_bridge(x, x, eps, solver=sbot.Sinkhorn(max_iter=3000))
    assert bridge.report.converged
    plan = bridge.plan()
    torch.testing.assert_close(plan, plan.T, rtol=0, atol=bridge.report.tolerance)


def test_an_atom_too_far_to_be_worth_any_mass(generator):
    """Its goal is e^{-g / rho} with g in the hundreds, which is no number of float64."""
    x = 0.3 * torch.randn(120, 2, generator=generator).double()
    near = 0.3 * torch.randn(99, 2, generator=generator).double()
    y = torch.cat([near, torch.tensor([[40.0, 40.0]], dtype=torch.float64)])
    b = torch.full((100,), 0.01, dtype=torch.float64)
    far = sbot.solve_bridge(x, (y, b), 0.1, relax=1.0)
    alone = sbot.solve_bridge(x, (near, b[:99]), 0.1, relax=1.0)
    assert far.report.converged
    torch.testing.assert_close(far.plan()[:, :99], alone.plan(), rtol=1e-6, atol=1e-12)
    assert float(far.plan()[:, 99].sum()) == 0


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_a_model_that_lacks_nothing_is_as_good_as_a_pass(generator, scale):
    """No pass follows the last half-step, and what is reported is still the error of the plan."""
    x, y = clouds(60, 50, 2, generator)
    a = torch.rand(60, dtype=torch.float64, generator=generator)
    a[7] = 0
    a, x, y = a / a.sum(), scale * x, scale * y
    bridge = sbot.solve_bridge((x, a), y, 0.5 * scale**2, solver=sbot.Sinkhorn(tol=1e-10, anneal=None))
    assert "1 passes" in bridge.report.notes[-1]
    plan = bridge.plan()
    rows, columns = plan.sum(1), plan.sum(0)
    torch.testing.assert_close(rows, a, rtol=1e-13, atol=1e-16)
    error = float((columns - 1 / 50).abs().sum())
    assert abs(error - bridge.report.error) <= 1e-14 and error <= 1e-10


def true_error(bridge, b):
    return float((bridge.plan().sum(0) - b).abs().sum())


@pytest.mark.parametrize("seed", range(3))
def test_a_look_for_forbidden_pairs_leaves_the_solve_alone(seed):
    """It makes passes of its own, at other potentials."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.rand(60, 1, dtype=torch.float64, generator=generator) for _ in range(2))
    cost = (x - y.T) ** 2
    cost[torch.rand(60, 60, generator=generator) < 0.3] = INF
    w = torch.full((60,), 1 / 60, dtype=torch.float64)
    bridge = sbot.solve_bridge(w, w, 1e-3, cost=cost, solver=sbot.Sinkhorn(tol=1e-9))
    assert bridge.report.converged and true_error(bridge, w) <= 1.1e-9
    bridge = sbot.solve_bridge(x, y, 1e-3, cost=lambda x, y: (x - y.mT).abs() ** 1.5, solver=sbot.Sinkhorn(tol=1e-9))
    assert bridge.report.converged and true_error(bridge, w) <= 1.1e-9


@pytest.mark.parametrize("tol", [1e-8, 1e-10])
def test_a_sparse_model_is_not_taken_for_the_plan(generator, tol):
    """Blocks that exchange little mass, in entries that the sparse form leaves out."""
    block = torch.arange(400) // 80
    cost = 0.2 * torch.rand(400, 400, dtype=torch.float64, generator=generator)
    cost = cost + 1.15 * (block[:, None] != block)
    w = torch.full((400,), 1 / 400, dtype=torch.float64)
    bridge = sbot.solve_bridge(w, w, 0.05, cost=cost, solver=sbot.Sinkhorn(tol=tol))
    assert abs(true_error(bridge, w) - bridge.report.error) <= 1e-2 * tol


@pytest.mark.parametrize("rho", [(1.0, 1.0), (0.5, INF), (INF, 0.3)], ids=str)
def test_relaxed_runs_end_where_they_were(generator, rho):
    """The constant between f and g is moved at the potentials of the end: no run undoes the one before."""
    cost = torch.rand(6, 7, dtype=torch.float64, generator=generator)
    a, b = torch.full((6,), 1 / 6, dtype=torch.float64), torch.full((7,), 1 / 7, dtype=torch.float64)
    bridge = sbot.solve_bridge(a, b, 0.1, cost=cost, relax=rho, solver=sbot.Sinkhorn(tol=1e-11))
    assert bridge.report.converged and bridge.report.iterations <= 60


@pytest.mark.parametrize("rho", [(INF, INF), (0.5, 2.0), (INF, 1.0)], ids=str)
def test_the_error_that_is_reported_is_that_of_the_plan(rho, generator):
    """What half-steps say of where they land is what the plan says, as it is made of the potentials alone."""
    x, y = clouds(60, 50, 2, generator)
    a, b = weights(60, generator=generator), weights(50, generator=generator)
    for tol in (1e-2, 1e-6):
        bridge = sbot.solve_bridge((x, a), (y, b), 0.1, relax=rho, solver=sbot.Sinkhorn(tol=tol))
        g, plan = bridge.potentials().g.values, bridge.plan()
        goal = bridge.problem.nu.weights if math.isinf(rho[1]) else b * torch.exp(-g / rho[1])
        error = float((plan.sum(0) - goal).abs().sum() / goal.sum())
        assert bridge.report.error == pytest.approx(error, rel=1e-4, abs=1e-13) and error <= tol
