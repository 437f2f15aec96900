"""Problems between cells: their masses and means, and what they save a streamed solve."""

from __future__ import annotations

import math

import pytest
import torch

import sbot
from sbot.kernels import Conditionals, DenseKernel
from sbot.solvers import cells, sinkhorn
from sbot.solvers.halfsteps import State
from sbot.solvers.newton import Newton

from ..conftest import clouds, half_squares, weights

INF = math.inf


@pytest.mark.parametrize(("n", "levels"), [(64, 3), (65, 3), (100, 4), (7, 2), (5, 0)])
@pytest.mark.parametrize("d", [1, 3])
def test_cells_have_equal_counts_and_hold_what_is_near(n, levels, d, generator):
    x = torch.rand(n, d, generator=generator, dtype=torch.float64)
    x[:, 0] *= 100  # the longest side is halved first
    label = cells.halved(x, levels)
    counts = label.bincount(minlength=2**levels)
    assert int(counts.max()) <= -(-n // 2**levels)
    assert int(counts.max() - counts.min()) <= n // 2**levels + 1
    if levels:
        half = label < 2 ** (levels - 1)
        assert float(x[half, 0].max()) <= float(x[~half, 0].min())


def test_groups_keep_mass_and_mean(generator):
    x, a = torch.randn(101, 3, generator=generator).double(), weights(101, generator=generator)
    a[:7] = 0
    group = cells.grouped(sbot.Discrete(x, a), x, 4)
    assert group.measure.n == 16
    torch.testing.assert_close(group.measure.mass, a.sum())
    torch.testing.assert_close(group.measure.weights @ group.measure.points, a @ x)
    within = (x - group.measure.points[group.label]).square().sum(1)
    assert math.isclose(group.spread, float((a * within).sum() / a.sum() / 2), rel_tol=1e-12)
    alone = cells.grouped(sbot.Discrete(x[:7], a[:7] + 1), x[:7], 2)
    assert alone.measure.n == 4


def test_a_cell_without_mass_keeps_its_place(generator):
    x = torch.arange(8.0, dtype=torch.float64)[:, None]
    a = torch.tensor([0.0, 0, 1, 1, 1, 1, 1, 1], dtype=torch.float64)
    group = cells.grouped(sbot.Discrete(x, a), x, 2)
    torch.testing.assert_close(group.measure.points[:, 0], torch.tensor([0.5, 2.5, 4.5, 6.5]).double())
    assert group.measure.weights.tolist() == [0, 2, 2, 2]


@pytest.mark.parametrize("rho", [(INF, INF), (INF, 2.0), (1.0, INF), (1.0, 2.0)], ids=str)
def test_with_one_atom_to_a_cell_the_correction_is_newtons_step(rho, generator):
    """The two-grid step is exact where the coarse problem is the problem itself."""
    x, y = clouds(40, 30, 2, generator)
    a, b = weights(40, generator=generator), weights(30, generator=generator)
    kernel, eps = DenseKernel(half_squares(x, y)), 0.3
    state = State(kernel, a, b, rho, 1e-4 * torch.randn(30, generator=generator).double(), Conditionals(kernel, 2**30))
    state.eps = eps
    for _ in range(50):  # near the solution, where a half-step is its linearisation
        state.settle()
        state.move(state.damp[1] * (state.goal() / state.columns).log())
        state.translate()
    state.move(1e-6 * torch.randn(30, generator=generator).double())
    state.settle()
    rest = state.goal() - state.columns
    half = state.damp[1] * (state.goal() / state.columns).log()
    correct = cells.Correction(state, torch.arange(30), kernel.T)
    got = correct(rest, half)
    newton = Newton(ridge=0.0)
    want, _ = newton.direction(state, rest, torch.tensor(1e-12, dtype=torch.float64), 300)
    if rho == (INF, INF):
        got, want = got - (b * got).sum() / b.sum(), want - (b * want).sum() / b.sum()
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * float(want.abs().max()))
    assert float((half - want).abs().max()) > 0.1 * float(want.abs().max())  # the half-step alone is not


@pytest.mark.parametrize("rho", [None, (1.0, INF)], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_cells_save_passes_and_change_nothing_else(rho, weighted, generator, monkeypatch):
    monkeypatch.setattr(sinkhorn, "COARSEST", 50)
    x, y = clouds(1500, 1200, 2, generator)
    a = weights(1500, generator=generator) if weighted else torch.full((1500,), 1 / 1500, dtype=torch.float64)
    b = weights(1200, generator=generator) if weighted else torch.full((1200,), 1 / 1200, dtype=torch.float64)
    before = torch.random.get_rng_state()

    def solve(**options):
        solver = sbot.Sinkhorn(tol=1e-7, memory=2**21, **options)
        return sbot.solve_bridge((x, a), (y, b), 0.1, relax=rho, solver=solver)

    bridge = solve()
    assert torch.equal(before, torch.random.get_rng_state())
    assert any("256 and 256 cells" in note for note in bridge.report.notes), bridge.report.notes
    with monkeypatch.context() as patch:
        patch.setattr(cells, "SMOOTH", 0.0)
        thinned = solve()
    assert any("of the atoms" in note for note in thinned.report.notes)
    assert bridge.report.converged
    assert thinned.report.converged
    assert bridge.report.iterations <= 0.7 * thinned.report.iterations
    torch.testing.assert_close(bridge.transport(), thinned.transport(), rtol=0, atol=1e-4)
    torch.testing.assert_close(bridge.cost(), thinned.cost(), rtol=1e-8, atol=1e-9)


def test_costs_without_an_embedding_and_small_eps_start_from_few_atoms(generator):
    x, y = clouds(200, 200, 2, generator)
    assert cells.coarsened(sbot.Problem.of(x, y, 0.1), 64) is not None
    assert cells.coarsened(sbot.Problem.of(x, y, 1e-4), 64) is None
    assert cells.coarsened(sbot.Problem.of(x, y, 0.1, cost=sbot.Lp(1)), 64) is None
    assert cells.coarsened(sbot.Problem.of(x, y, 0.1), 1) is None
