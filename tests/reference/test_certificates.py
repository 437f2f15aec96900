"""Certificates hold the truth between them, however early a solve stopped: the entropic value, and that of ot.emd2."""

from __future__ import annotations

import math
import warnings

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sbot

from ..conftest import half_squares, weights
from .plain import plain

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ot

INF = math.inf
drawn = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
problems = st.fixed_dictionaries(
    {
        "n": st.integers(1, 10),
        "m": st.integers(1, 10),
        "seed": st.integers(0, 10_000),
        "zeros": st.booleans(),
        "rel": st.floats(-1.3, 2).map(lambda e: 10**e),
        "tol": st.floats(-10, 0).map(lambda e: 10**e),
        "max_iter": st.sampled_from([1, 3, 10_000]),
        "memory": st.sampled_from([0, 2**30]),
    }
)


def make(p):
    gen = torch.Generator().manual_seed(p["seed"])
    x = torch.randn(p["n"], 2, generator=gen, dtype=torch.float64)
    y = torch.randn(p["m"], 2, generator=gen, dtype=torch.float64) + 0.5
    a, b = weights(p["n"], generator=gen), weights(p["m"], generator=gen)
    if p["zeros"]:
        a[1:2], b[2:4] = 0, 0
    c = half_squares(x, y)
    return x, a / a.sum(), y, b / b.sum(), c, p["rel"] * float(c.mean())


def solve(p, x, a, y, b, eps, relax=None, dtype=torch.float64):
    (x, a, y, b), solver = (
        (t.to(dtype) for t in (x, a, y, b)),
        sbot.Sinkhorn(p["tol"], p["max_iter"], memory=p["memory"]),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sbot.NotConverged)
        warnings.simplefilter("ignore", sbot.PrecisionWarning)
        return sbot.solve_bridge((x, a), (y, b), eps, relax=relax, solver=solver)


@drawn
@given(problems, st.sampled_from([(INF, INF), (1.0, 1.0), (INF, 0.7), (0.4, INF)]))
def test_the_entropic_value_lies_between(p, relax):
    x, a, y, b, c, eps = make(p)
    bridge, exact = solve(p, x, a, y, b, eps, relax), plain(c, a, b, eps, relax).value
    rounding = 1e-13 * float(c.max() + eps)
    assert float(bridge.cost()) <= exact + rounding
    assert exact <= float(bridge.cost() + bridge.gap()) + rounding
    if bridge.report.converged and p["tol"] < 1e-8:  # and they meet
        assert float(bridge.gap()) <= 1e-6 * float(c.max() + eps)


@drawn
@given(problems, st.sampled_from([torch.float64, torch.float32]))
def test_unregularised_transport_lies_between(p, dtype):
    x, a, y, b, _, eps = make({**p, "rel": p["rel"] / 5})
    bounds = solve(p, x, a, y, b, eps, dtype=dtype).bounds()
    # the problem as it was given, in the digits of the dtype
    x, a, y, b = (t.to(dtype).double() for t in (x, a, y, b))
    c = half_squares(x, y)
    exact = float(ot.emd2(a.numpy(), (b * a.sum() / b.sum()).numpy(), c.numpy()))
    rounding = (1e-13 if dtype == torch.float64 else 1e-6) * float(c.max())
    assert float(bounds.lower) <= exact + rounding
    assert exact <= float(bounds.upper) + rounding


def test_loose_and_tight_solves_are_both_met():
    """What the draws above are for: brackets of every width."""
    p = {"n": 9, "m": 8, "seed": 1, "zeros": True, "rel": 0.1, "memory": 2**30}
    x, a, y, b, c, eps = make(p)
    widths = [
        float(solve({**p, "tol": tol, "max_iter": most}, x, a, y, b, eps).gap()) / float(c.mean())
        for tol, most in ((1.0, 1), (1e-3, 10_000), (1e-10, 10_000))
    ]
    assert widths[0] > 1e-3 > widths[1] > 1e-10 > widths[2] >= 0
