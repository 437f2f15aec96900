"""A path of eps: equal to separate solves, cheaper, in the order asked for; its arrays by their definitions."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import sbot
from tests.conftest import clouds, half_squares, kl, spd, weights

EPS = [0.05, 2.0, 0.2, 0.5, 0.1]
TIGHT = sbot.Sinkhorn(tol=1e-11)


@pytest.fixture
def problem(generator):
    x, y = clouds(20, 30, 2, generator)
    return (x, weights(20, generator=generator)), (y, weights(30, generator=generator))


def test_results_are_those_of_separate_solves_in_the_order_given(problem):
    path = sbot.solve_path(*problem, EPS, solver=TIGHT)
    assert len(path) == 5 and path.eps.tolist() == EPS and bool(path.converged.all())
    for eps, bridge in zip(EPS, path, strict=True):
        alone = sbot.solve_bridge(*problem, eps, solver=TIGHT)
        assert bridge.problem.eps == eps
        torch.testing.assert_close(bridge.plan(), alone.plan(), atol=1e-10, rtol=0)
        torch.testing.assert_close(bridge.cost(), alone.cost())


def test_arrays_by_their_definitions(problem):
    (x, a), (y, b) = problem
    c = half_squares(x, y)
    path = sbot.solve_path(*problem, EPS, solver=TIGHT)
    for k, bridge in enumerate(path):
        plan = bridge.plan()
        torch.testing.assert_close(path.linear_cost[k], (plan * c).sum())
        torch.testing.assert_close(path.entropy[k], kl(plan, a[:, None] * b))
        torch.testing.assert_close(path.cost[k], (plan * c).sum() + EPS[k] * kl(plan, a[:, None] * b))
        law = plan / plan.sum(1, keepdim=True)
        torch.testing.assert_close(path.perplexity[k], torch.special.entr(law).sum(1).exp())
        torch.testing.assert_close(bridge.perplexity(), path.perplexity[k])
        assert path.error[k] == bridge.report.error
    order = path.eps.argsort()
    assert bool((path.entropy[order].diff() < 0).all()) and bool((path.linear_cost[order].diff() > 0).all())


@pytest.mark.parametrize("memory", [2**30, 0])
def test_it_is_cheaper_than_separate_solves(memory, generator):
    x, y = clouds(40, 40, 2, generator)
    values = [0.03 * 10 ** (k / 4) for k in range(8)]
    solver = sbot.Sinkhorn(memory=memory)
    path = sbot.solve_path(x, y, values, solver=solver)
    alone = [sbot.solve_bridge(x, y, eps, solver=solver) for eps in values]
    total, separate = (sum(bridge.report.iterations for bridge in some) for some in (path, alone))
    assert total < 0.8 * separate, (total, separate)


def test_values_far_apart_and_together_and_repeated(problem):
    values = [1.0, 0.999, 0.01, 1.0, 10.0]
    path = sbot.solve_path(*problem, values)
    assert path[0] is path[3] and bool(path.converged.all())
    alone = sbot.solve_bridge(*problem, 0.01)
    torch.testing.assert_close(path.cost[2], alone.cost())


@pytest.mark.parametrize(
    "options",
    [
        {"relax": (1.0, math.inf)},
        {"reference": sbot.OrnsteinUhlenbeck(rate=1.0)},
        {"cost": sbot.Lp(1)},
    ],
    ids=str,
)
def test_other_problems(problem, options):
    path = sbot.solve_path(*problem, [0.1, 1.0, 0.3], **options, solver=TIGHT)
    for eps, bridge in zip(path.eps.tolist(), path, strict=True):
        alone = sbot.solve_bridge(*problem, eps, **options, solver=TIGHT)
        torch.testing.assert_close(bridge.plan(), alone.plan(), atol=1e-9, rtol=0)
    (_, a), (_, b) = problem
    torch.testing.assert_close(path.entropy[1], kl(path[1].plan(), a[:, None] * b))


def test_matrices_forbidden_pairs_and_empty_atoms(generator):
    c = torch.rand(6, 8, generator=generator, dtype=torch.float64)
    c[0, 3:] = torch.inf
    a, b = weights(6, generator=generator), weights(8, generator=generator)
    b[1] = 0
    b = b / b.sum()
    path = sbot.solve_path(a, b, [0.02, 0.1, 1.0], cost=c, solver=TIGHT)
    assert bool(path.converged.all()) and bool(torch.isfinite(path.entropy).all())
    assert float(path.perplexity[:, 0].max()) <= 3
    torch.testing.assert_close(path[0].plan(), sbot.solve_bridge(a, b, 0.02, cost=c, solver=TIGHT).plan())


def test_batches_and_low_precision(generator):
    x, y = clouds(9, 11, 2, generator, (3,))
    path = sbot.solve_path(x, y, [0.3, 1.0])
    assert path.cost.shape == (2, 3) and path.perplexity.shape == (2, 3, 9) and path.error.shape == (2,)
    single = sbot.solve_path(x[0].half(), y[0].half(), [0.3, 1.0, 3.0])
    assert single.cost.dtype == single.perplexity.dtype == torch.float16
    assert bool(single.converged.all())
    torch.testing.assert_close(single.cost.double()[:2], path.cost[:, 0], rtol=5e-3, atol=0)


def test_gaussians_are_solved_in_closed_form(generator):
    mu = sbot.Gaussian(torch.zeros(2, dtype=torch.float64), spd(2, generator))
    nu = sbot.Gaussian(torch.ones(2, dtype=torch.float64), spd(2, generator))
    path = sbot.solve_path(mu, nu, [0.1, 1.0])
    assert [bridge.report.reason for bridge in path] == ["exact", "exact"]
    torch.testing.assert_close(path.cost, path.linear_cost + path.eps * path.entropy)
    with pytest.raises(sbot.Unsupported, match="has no entries"):
        path.perplexity  # noqa: B018
    assert len(path.plot().axes) == 2


def test_a_slice_is_a_path_and_a_path_says_what_it_is(problem):
    path = sbot.solve_path(*problem, EPS)
    part = path[1:3]
    assert isinstance(part, sbot.BridgePath) and part.eps.tolist() == EPS[1:3]
    assert path[-1] is list(path)[-1]
    assert "5 bridges" in repr(path) and "eps 2 to 0.05, 5 converged" in repr(path)
    with pytest.raises(IndexError):
        path[5]


def test_each_failure_is_told_once_with_its_eps(problem):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = sbot.solve_path(*problem, [1e-3, 5.0, 1e-2], solver=sbot.Sinkhorn(max_iter=8))
    failed = [eps for eps, done in zip(path.eps.tolist(), path.converged.tolist(), strict=True) if not done]
    assert failed == [1e-3, 1e-2]
    assert [str(warning.message).split(":")[0] for warning in caught] == ["at eps = 0.01", "at eps = 0.001"]
    assert all(warning.category is sbot.NotConverged and warning.filename == __file__ for warning in caught)


def test_progress_is_seen_for_each_eps(problem):
    seen = []
    sbot.solve_path(*problem, [1.0, 0.3], progress=seen.append)
    assert {step.eps for step in seen} >= {1.0, 0.3}


def test_the_picture(problem):
    path = sbot.solve_path(*problem, EPS)
    figure = path.plot()
    cost, entropy, spread = figure.axes
    assert [axes.get_xscale() for axes in figure.axes] == ["log"] * 3
    assert list(cost.lines[0].get_xdata()) == sorted(EPS)
    assert list(cost.lines[0].get_ydata()) == path.cost[path.eps.argsort()].tolist()
    assert list(entropy.lines[0].get_ydata()) == path.entropy[path.eps.argsort()].tolist()
    median = torch.quantile(path.perplexity[path.eps.argsort()], 0.5, dim=1)
    assert spread.lines[0].get_ydata() == pytest.approx(median.numpy())
    negative = sbot.solve_path([0.5, 0.5], [0.5, 0.5], [0.1, 1.0], cost=torch.tensor([[-1.0, 0.0], [0.0, 1.0]]))
    assert negative.plot().axes[0].get_yscale() == "symlog"
    x, y = clouds(4, 5, 2, torch.Generator().manual_seed(0), (2,))
    with pytest.raises(sbot.Unsupported, match="batch"):
        sbot.solve_path(x, y, [1.0]).plot()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([], "give a sequence of numbers > 0"),
        (0.5, "give a sequence of numbers > 0"),
        ("auto", "give a sequence of numbers > 0"),
        ([0.1, "auto"], "give a sequence of numbers > 0"),
        ([0.1, 0.0], "eps is 0"),
        ([0.1, -1.0], "eps is -1"),
        ([0.1, math.nan], "eps is NaN"),
        ([0.1, None], "eps must be a real number"),
    ],
)
def test_bad_values(problem, values, said):
    with pytest.raises(sbot.InvalidProblem, match=said):
        sbot.solve_path(*problem, values)


def test_other_solvers_are_refused(problem):
    with pytest.raises(sbot.Unsupported, match="solver is PlugIn"):
        sbot.solve_path(*problem, [0.1], solver=sbot.PlugIn())
    mixture = sbot.Mixture(torch.zeros(2), torch.zeros(2, 2), torch.eye(2).expand(2, 2, 2))
    with pytest.raises(sbot.Unsupported, match=r"(?s)no solver takes this path.*Sinkhorn: mu is Mixture.*ClosedForm"):
        sbot.solve_path(mixture, mixture, [0.1])
