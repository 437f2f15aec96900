"""Pairs of atoms drawn from a plan, with and without replacement, against the plan itself."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import sbot

from ..conftest import clouds, half_squares, weights

INF = math.inf


def small(generator, batch=(), n=5, m=4, **options):
    x, y = clouds(n, m, 2, generator, batch)
    a, b = weights(*batch, n, generator=generator), weights(*batch, m, generator=generator)
    return sbot.solve_bridge((x, a), (y, b), 0.5, **options)


def table(rows, columns, shape):
    """How often each pair was drawn, ``(*b, n, m)``."""
    flat = rows * shape[1] + columns
    counts = torch.zeros((*flat.shape[:-1], shape[0] * shape[1]), dtype=torch.float64)
    return counts.scatter_add_(-1, flat, torch.ones(flat.shape, dtype=torch.float64)).unflatten(-1, shape)


@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
@pytest.mark.parametrize("relax", [None, 0.3])
def test_with_replacement_pairs_have_the_law_of_the_plan(batch, relax, generator):
    bridge = small(generator, batch, relax=relax)
    n = 40_000
    rows, columns = bridge.sample_indices(n, generator=generator)
    assert rows.shape == columns.shape == (*batch, n)
    plan = bridge.plan()
    want = plan / plan.sum((-2, -1), keepdim=True)
    got = table(rows, columns, (5, 4)) / n
    assert bool(((got - want).abs() <= 5 * (want / n).sqrt()).all())


def test_without_replacement_pairs_come_one_after_the_other():
    # first and second pair against the probabilities written out
    c = torch.tensor([[0.0, 1.0], [2.0, 0.5]], dtype=torch.float64)
    many = 20_000
    a = torch.tensor([0.3, 0.7], dtype=torch.float64).expand(many, 2)
    b = torch.tensor([0.4, 0.6], dtype=torch.float64).expand(many, 2)
    bridge = sbot.solve_bridge(a, b, 1.0, cost=c.expand(many, 2, 2).clone())
    rows, columns = bridge.sample_indices(2, generator=torch.Generator().manual_seed(0), replace=False)
    p = bridge.plan()[0].flatten()
    drawn = rows * 2 + columns
    for i, j in itertools.permutations(range(4), 2):
        want = float(p[i] * p[j] / (1 - p[i]))
        got = float(((drawn[:, 0] == i) & (drawn[:, 1] == j)).double().mean())
        assert abs(got - want) < 5 * math.sqrt(want / many)


@pytest.mark.parametrize("tile", [None, 8 * 4])
def test_without_replacement_no_pair_comes_twice(tile, dtype, generator, monkeypatch):
    if tile:
        monkeypatch.setattr("sbot.kernels.base.TILE_BYTES", tile)
    x, y = clouds(5, 4, 2, generator, (3,))
    bridge = sbot.solve_bridge(x.to(dtype), y.to(dtype), 0.5)
    for n in (1, 7, 20):
        rows, columns = bridge.sample_indices(n, generator=generator, replace=False)
        assert rows.shape == columns.shape == (3, n)
        assert int(table(rows, columns, (5, 4)).max()) == 1
    with pytest.raises(sbot.InvalidProblem, match="n <= 20"):
        bridge.sample_indices(21, generator=generator, replace=False)


def test_pairs_without_mass_are_never_drawn(generator):
    c = torch.rand(4, 4, generator=generator, dtype=torch.float64)
    c[torch.arange(4), torch.arange(4)] = INF
    bridge = sbot.solve_bridge([0.5, 0.0, 0.25, 0.25], [0.25] * 4, 0.5, cost=c)
    rows, columns = bridge.sample_indices(9, generator=generator, replace=False)
    assert not bool((rows == columns).any() | (rows == 1).any())
    with pytest.raises(sbot.InvalidProblem, match="n <= 9"):
        bridge.sample_indices(10, generator=generator, replace=False)
    rows, columns = bridge.sample_indices(500, generator=generator)
    assert not bool((rows == columns).any() | (rows == 1).any())


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_pairs_are_the_points_of_the_numbers(replace, batch, generator):
    bridge = small(generator, batch)
    draw = lambda call: call(6, generator=torch.Generator().manual_seed(3), replace=replace)  # noqa: E731
    rows, columns = draw(bridge.sample_indices)
    x, y = draw(bridge.sample_pairs)
    torch.testing.assert_close(x, torch.take_along_dim(bridge.problem.mu.points, rows[..., None], -2))
    torch.testing.assert_close(y, torch.take_along_dim(bridge.problem.nu.points, columns[..., None], -2))
    # a batch with a cost matrix, with points and without
    problem = bridge.problem
    c = half_squares(problem.mu.points, problem.nu.points)
    tabled = sbot.solve_bridge(problem.mu, problem.nu, 0.5, cost=c)
    assert draw(tabled.sample_pairs)[1].shape == (*batch, 6, 2)
    bins = sbot.solve_bridge(problem.mu.weights, problem.nu.weights, 0.5, cost=c)
    assert torch.equal(draw(bins.sample_pairs)[0], draw(bins.sample_indices)[0])


def test_one_target_for_each_source(generator):
    bridge = small(generator)
    ends = bridge.condition().sample(generator=generator)
    assert ends.shape == (5, 2)
    assert bool((ends[:, None] == bridge.problem.nu.points).all(-1).any(1).all())


def test_bad_questions(generator):
    bridge = small(generator)
    for call in (bridge.sample_pairs, bridge.sample_indices):
        with pytest.raises(sbot.InvalidProblem, match="n must be"):
            call(0)
        with pytest.raises(sbot.InvalidProblem, match="True or False"):
            call(2, replace="no")
    one = sbot.Gaussian(torch.zeros(2), torch.eye(2))
    gaussian = sbot.solve_bridge(one, one, 0.5)
    with pytest.raises(sbot.Unsupported, match="atoms"):
        gaussian.sample_indices(3)
    with pytest.raises(sbot.Unsupported, match="atoms"):
        gaussian.sample_pairs(3, replace=False)
