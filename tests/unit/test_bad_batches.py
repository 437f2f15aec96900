"""What is wrong in one problem of a batch is found at the door, and the problem is named; options that cannot work, too."""

from __future__ import annotations

import warnings

import pytest
import torch

import sbot

NAN, INF = float("nan"), float("inf")
X = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(0))
Y = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(1))
A, B = torch.full((3, 6), 1 / 6), torch.full((3, 5), 1 / 5)
M = torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(2))
ONE = "in problem 2 of the batch"


def at(tensor, index, value):
    out = tensor.clone()
    out[index] = value
    return out


def at_last(x, y, value):
    return at(torch.cdist(x, y), (2, 0, 0), value)


BAD = {
    "NaN point": (lambda: sbot.solve_bridge(at(X, (2, 1, 0), NAN), Y, 0.1), r"mu points .* first at \[1, 0\] " + ONE),
    "infinite point": (lambda: sbot.solve_bridge(X, at(Y, (2, 1, 0), INF), 0.1), r"nu points .* at \[1, 0\] " + ONE),
    "NaN weight": (lambda: sbot.solve_bridge((X, at(A, (2, 1), NAN)), Y, 0.1), r"mu weights .* at \[1\] " + ONE),
    "negative weight": (
        lambda: sbot.solve_bridge((X, at(A, (2, 1), -0.1)), Y, 0.1),
        r"negative weight at \[1\] " + ONE,
    ),
    "no mass": (lambda: sbot.solve_bridge(X, (Y, at(B, 2, 0.0)), 0.1), "nu has weights that are all zero " + ONE),
    "unequal masses": (lambda: sbot.solve_bridge((X, at(A, 2, 1 / 3)), (Y, B), 0.1), r"sum\(mu\) = 2.* " + ONE),
    "closed row": (lambda: sbot.solve_bridge(A, B, 0.1, cost=at(M, (2, 1), INF)), "no finite entry in row 1 " + ONE),
    "closed column": (
        lambda: sbot.solve_bridge(A, B, 0.1, cost=at(M, (2, slice(None), 1), INF)),
        "no finite entry in column 1 " + ONE,
    ),
    "row to no weight": (
        lambda: sbot.solve_bridge(
            A, at(B, 2, torch.tensor([0, 0.25, 0.25, 0.25, 0.25])), 0.1, cost=at(M, (2, 1, slice(1, 5)), INF)
        ),
        rf"atom \[1\] of mu {ONE} has weight but every pair",
    ),
    "no plan": (
        lambda: sbot.solve_bridge(A, B, 0.1, cost=at(M, (2, slice(0, 4), slice(1, 5)), INF)),
        rf"no plan {ONE}: atoms \[0, 1, 2, 3\] of mu hold 0.666667 and may only go to atoms \[0\] of nu",
    ),
    "NaN cost": (lambda: sbot.solve_bridge(A, B, 0.1, cost=at(M, (2, 1, 1), NAN)), "NaN or -inf " + ONE),
    "-inf cost": (lambda: sbot.solve_bridge(A, B, 0.1, cost=at(M, (2, 1, 1), -INF)), "NaN or -inf " + ONE),
    "NaN of a function": (lambda: sbot.solve_bridge(X, Y, 0.1, cost=lambda x, y: at_last(x, y, NAN)), "NaN " + ONE),
    "closed row of a function": (
        lambda: sbot.solve_bridge(X, Y, 0.1, cost=lambda x, y: at(torch.cdist(x, y), (2, 0), INF)),
        rf"atom \[0\] of mu {ONE}",
    ),
    "no direction": (
        lambda: sbot.solve_bridge(at(X, (2, 1), 0.0), Y, 0.1, cost=sbot.Cosine()),
        f"point at the origin {ONE}",
    ),
    "mass": (lambda: sbot.solve_bridge(X, Y, 0.1, mass=torch.tensor([0.5, 0.5, 1.5])), "mass is 1.5 " + ONE),
    "eps": (lambda: sbot.solve_bridge(X, Y, NAN), "eps is NaN"),
    "sizes of batches": (lambda: sbot.solve_bridge(X, Y[:2], 0.1), r"batch dimensions \(3,\) and nu \(2,\)"),
    "query": (lambda: sbot.solve_bridge(X, Y, 1.0).transport(at(X, (2, 1, 0), NAN)), r"x has .* at \[1, 0\] " + ONE),
}


@pytest.mark.parametrize("name", BAD)
def test_the_problem_is_named(name):
    call, said = BAD[name]
    with pytest.raises(sbot.InvalidProblem, match=said):
        call()


def test_of_several_batch_dimensions_all_are_named():
    weights = A.expand(2, 3, 6)
    with pytest.raises(sbot.InvalidProblem, match=r"in problem \[1, 2\] of the batch"):
        sbot.solve_bridge(
            (X.expand(2, 3, 6, 2), at(weights, (1, 2), 1 / 3)), (Y.expand(2, 3, 5, 2), B.expand(2, 3, 5)), 0.1
        )
    cost = M.expand(2, 3, 6, 5)
    closed = at(cost, (1, 0, slice(0, 4), slice(1, 5)), INF)
    with pytest.raises(sbot.InvalidProblem, match=r"no plan in problem \[1, 0\] of the batch"):
        sbot.solve_bridge(weights, B.expand(2, 3, 5), 0.1, cost=closed)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "many", None])
def test_a_number_of_iterations_that_is_none(value):
    with pytest.raises(sbot.InvalidProblem, match="max_iter must be an integer >= 1"):
        sbot.Sinkhorn(max_iter=value)


def test_memory_for_less_than_a_row_is_refused_with_the_number():
    x, y = X[0].double(), Y[0].double()
    with pytest.raises(
        sbot.InvalidProblem, match=r"memory is 47 and one row of costs .* takes 48 bytes; give memory >= 48"
    ):
        sbot.solve_bridge(x, y, 1.0, solver=sbot.Sinkhorn(memory=47))
    with pytest.raises(sbot.InvalidProblem, match="takes 144 bytes"):
        sbot.solve_bridge(X.double(), Y.double(), 1.0, solver=sbot.Sinkhorn(memory=143))
    plans = [sbot.solve_bridge(x, y, 1.0, solver=sbot.Sinkhorn(memory=m)).plan() for m in (0, 48, 2**30)]
    for plan in plans[1:]:
        torch.testing.assert_close(plan, plans[0], rtol=1e-6, atol=1e-9)
    with pytest.raises(sbot.InvalidProblem, match="memory must be an integer >= 0"):
        sbot.Sinkhorn(memory=-1)


@pytest.mark.parametrize("mass", [None, 0.5])
def test_a_tolerance_out_of_reach_warns_once_and_says_what_is_in_reach(mass):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bridge = sbot.solve_bridge(X, Y, 0.05, mass=mass, solver=sbot.Sinkhorn(tol=1e-12))
    assert [w.category for w in caught] == [sbot.PrecisionWarning]
    assert f"raised from 1.0e-12 to {max(bridge.report.tolerances):.1e}" in str(caught[0].message)
    assert bridge.report.converged and bridge.report.error <= bridge.report.tolerance
