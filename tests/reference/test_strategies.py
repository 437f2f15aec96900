"""Every strategy of the Sinkhorn solver ends at the plain solution, and is really the one that was used."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

import sbot
from sbot.kernels import Conditionals, conditionals
from sbot.solvers import cells, scalings, sinkhorn
from sbot.solvers.halfsteps import Exact, State
from sbot.solvers.newton import Newton

from ..conftest import clouds, half_squares, weights
from .plain import plain

INF = math.inf
MODES = [(INF, INF), (1.0, 2.0), (INF, 0.5), (0.5, INF)]


@dataclass(frozen=True)
class Short(Newton):
    """Conjugate gradients that never do, so that S is factorised."""

    inner: int = 2
    near: float = 1e-1


@dataclass(frozen=True)
class Case:
    """How a strategy is asked for, and what shows that it was used: words of the notes, and counts."""

    options: dict = field(default_factory=dict)
    set: dict = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    seen: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    most: float = INF  # passes over the cost: a step in a wrong direction is taken back, and shows in nothing else
    n: int = 40
    m: int = 30
    rel: float = 0.05
    cost: str = "quadratic"
    dtype: torch.dtype = torch.float64


ONLY_HALF_STEPS = {"sinkhorn._next": lambda step, *_: step}
FEW_HALF_STEPS = {"sinkhorn.RUN": 1}
SINGLE = {
    "conditionals.SMALL": 0,
    "conditionals.DOUBLE": 0,
    "conditionals.DOUBLE_WHERE_FEW": 0,
    "conditionals.SPARSE": 0.0,
}
SPARSE = {
    "conditionals.SMALL": 0,
    "conditionals.DOUBLE": 0,
    "conditionals.DOUBLE_WHERE_FEW": 0,
    "conditionals.SPARSE": 0.9,
}
COARSE = {"sinkhorn.COARSEST": 20}
BIG = {"n": 120, "m": 90, "rel": 0.1}

CASES = {
    "annealed": Case(notes=("3 values of eps",), rel=0.01),
    "not annealed": Case({"anneal": None}, notes=("1 value of eps",)),
    "own ladder": Case({"anneal": sbot.Schedule(0.8)}, notes=("5 values of eps",)),
    "cost stored": Case(cost="l1", notes=("cost stored", "on a kept model")),
    "cost given as a matrix": Case(cost="matrix", notes=("cost stored", "on a kept model")),
    "cost by tiles": Case(notes=("cost computed by tiles", "on a kept model")),
    "cost by tiles, nothing kept": Case({"memory": 0}, cost="l1", notes=("computed by tiles", "streamed")),
    "dense double model": Case(seen=("dense float64",), unseen=("dense float32", "sparse")),
    "dense single model": Case(set=SINGLE, seen=("dense float32",), unseen=("dense float64", "sparse")),
    "sparse model": Case(set=SPARSE, seen=("sparse",), notes=("entries kept at the end",), rel=0.01),
    "only a sparse model fits": Case(
        {"memory": 4 * 40 * 30 - 1}, set=SPARSE | {"conditionals.SPARSE_BYTES": 8}, seen=("sparse", "nothing"),
        unseen=("dense float32", "dense float64"), notes=("passes,", "entries kept at the end"), rel=0.01,
    ),
    "over-relaxed half-steps": Case(
        set=ONLY_HALF_STEPS, notes=("half-steps",), without=("Newton",), seen=("over-relaxed",)
    ),
    "half-steps on a single model": Case(
        set=ONLY_HALF_STEPS | SINGLE, without=("Newton",), seen=("over-relaxed", "dense float32")
    ),
    "Newton by conjugate gradients": Case(
        set=FEW_HALF_STEPS, notes=("Newton steps",), seen=("conjugate gradients",), unseen=("factorised",), rel=0.02, most=30
    ),
    "Newton on a sparse model": Case(
        set=FEW_HALF_STEPS | SPARSE, notes=("Newton steps",), seen=("conjugate gradients", "sparse", "arrays"), rel=0.01, most=30
    ),
    "Newton on a sparse model of tensors": Case(
        set=FEW_HALF_STEPS | SPARSE | {"conditionals.FEW": 0}, notes=("Newton steps",), unseen=("arrays",),
        seen=("conjugate gradients", "sparse"), rel=0.01, most=30,
    ),
    "Newton on a single model": Case(
        set=FEW_HALF_STEPS | SINGLE, notes=("Newton steps",), seen=("conjugate gradients", "dense float32"), rel=0.02, most=30
    ),
    "Newton factorised": Case(
        set=FEW_HALF_STEPS | {"sinkhorn.Newton": Short}, notes=("Newton steps",), seen=("factorised",), rel=0.02, most=30
    ),
    "Anderson": Case({"memory": 0, "anneal": None}, notes=("streamed", "passes"), seen=("Anderson",)),
    "Anderson, annealed": Case({"memory": 0}, notes=("streamed", "3 values"), seen=("Anderson",), rel=0.02),
    "start from some of the atoms": Case(
        {"memory": 0}, set=COARSE | {"cells.SMOOTH": 0.0}, notes=("between 30 and 22 of the atoms", "streamed"), **BIG
    ),
    "start from cells, corrected": Case(
        {"memory": 40_000}, set=COARSE, notes=("between 32 and 32 cells", "streamed"), seen=("corrected",), most=15, **BIG
    ),
    "start from cells of cells, corrected": Case(
        {"memory": 1100}, set={"sinkhorn.COARSEST": 10, "cells.SMOOTH": 9.0}, seen=("corrected",), most=20, **BIG,
        notes=("between 32 and 32 cells", "from one between 8 and 8"),
    ),
    "float32": Case(dtype=torch.float32, seen=("dense float64",)),
    "float32, streamed": Case({"memory": 0}, dtype=torch.float32, notes=("streamed",), seen=("Anderson",)),
    "float32, Newton": Case(set=FEW_HALF_STEPS, dtype=torch.float32, notes=("Newton",), rel=0.02, most=30),
    "float32, sparse": Case(set=SPARSE, dtype=torch.float32, seen=("sparse",), rel=0.01),
}  # fmt: skip


@pytest.fixture
def seen(monkeypatch):
    """What was used, counted where it is done."""
    count: Counter[str] = Counter()

    def spy(owner, name: str, said: Callable):
        real = getattr(owner, name)

        def wrapped(*args, **kwargs):
            out = real(*args, **kwargs)
            count[said(out, *args)] += 1
            return out

        monkeypatch.setattr(owner, name, wrapped)

    def model(known, self, *made_with):
        return "nothing" if not known else "sparse" if self.sparse else f"dense {str(self.dense.dtype)[6:]}"

    spy(Conditionals, "close", model)
    spy(Conditionals, "products", lambda found, self: "arrays" if self.sparse and found[0] is not self else "tensors")
    spy(scalings, "half_step", lambda _, *given: "plain" if given[-1] is None else "over-relaxed")
    spy(Exact, "_mixed", lambda _, self, goal: "Anderson" if len(self._past) > 1 else "plain pass")
    spy(Newton, "direction", lambda *_: "conjugate gradients")
    spy(Newton, "solution", lambda z, *_: "no factor" if z is None else "factorised")
    spy(cells.Correction, "__call__", lambda *_: "corrected")
    spy(State, "take", lambda *_: "left behind")
    return count


def data(case: Case, generator):
    x, y = (points.to(case.dtype) for points in clouds(case.n, case.m, 2, generator))
    a, b = weights(case.n, generator=generator), weights(case.m, generator=generator)
    a[3], b[5] = 0, 0
    a, b = (a / a.sum()).to(case.dtype), (b / b.sum()).to(case.dtype)
    c = sbot.Lp(1).matrix(x.double(), y.double()) if case.cost == "l1" else half_squares(x.double(), y.double())
    return x, y, a, b, c


@pytest.mark.parametrize("rho", MODES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_strategy_ends_at_the_plain_solution(name, rho, seen, generator, monkeypatch):
    case = CASES[name]
    for target, value in case.set.items():
        place, attribute = target.split(".")
        monkeypatch.setattr(
            {"sinkhorn": sinkhorn, "conditionals": conditionals, "cells": cells}[place], attribute, value
        )
    x, y, a, b, c = data(case, generator)
    eps = case.rel * float(c.mean())
    single = case.dtype == torch.float32
    solver = sbot.Sinkhorn(tol=5e-5 if single else 1e-12, **case.options)
    if case.cost == "matrix":
        bridge = sbot.solve_bridge(a, b, eps, cost=c, relax=rho, solver=solver)
    else:
        cost = sbot.Lp(1) if case.cost == "l1" else None
        bridge = sbot.solve_bridge((x, a), (y, b), eps, cost=cost, relax=rho, solver=solver)
    assert bridge.report.converged
    said = "; ".join(bridge.report.notes)
    assert all(words in said for words in case.notes), said
    assert not any(words in said for words in case.without), said
    assert all(seen[what] for what in case.seen) and not any(seen[what] for what in case.unseen), (said, seen)
    assert int(said.split()[-5]) <= case.most, said
    a, b = a.double(), b.double()
    b = b * a.sum() / b.sum() if rho == (INF, INF) else b
    want = plain(c, a, b, eps, rho)
    assert float((bridge.plan().double() - want.plan).abs().sum()) <= (5e-4 if single else 1e-10)
    assert float(bridge.cost()) == pytest.approx(want.value, rel=1e-5 if single else 1e-11)


@pytest.mark.parametrize("rho", MODES, ids=str)
@pytest.mark.parametrize("options", [{}, {"memory": 0}], ids=["kept", "streamed"])
def test_a_batch_that_leaves_problems_behind_ends_at_the_plain_solutions(options, rho, seen, generator):
    x, y = clouds(20, 24, 2, generator, (5,))
    eps = torch.tensor([0.3, 0.4, 1.0, 0.03, 0.5], dtype=torch.float64)
    a, b = weights(5, 20, generator=generator), weights(5, 24, generator=generator)
    bridge = sbot.solve_bridge((x, a), (y, b), eps, relax=rho, solver=sbot.Sinkhorn(tol=1e-12, **options))
    assert bridge.report.converged
    assert seen["left behind"]
    for k in range(5):
        want = plain(half_squares(x[k], y[k]), a[k], b[k], float(eps[k]), rho)
        assert float((bridge.plan()[k] - want.plan).abs().sum()) <= 1e-10
        assert float(bridge.cost()[k]) == pytest.approx(want.value, rel=1e-11)


def test_a_correction_between_few_cells_is_given_up(generator, monkeypatch):
    """It throws the potentials far from a good start; what follows has to get there without it."""
    monkeypatch.setattr(sinkhorn, "COARSEST", 40)
    generator.manual_seed(3)
    x = torch.randn(1500, 1, generator=generator, dtype=torch.float64)
    y = 0.7 * torch.randn(16, 1, generator=generator, dtype=torch.float64) + 1
    eps = 0.01 * float((x - y.T).square().mean() / 2)
    bridge = sbot.solve_bridge(x, y, eps, solver=sbot.Sinkhorn(memory=60_000, tol=1e-4, max_iter=60))
    assert bridge.report.converged
    assert "correct the passes at first" in bridge.report.notes[1]


def test_cells_of_cells_only_where_these_are_streamed(generator, monkeypatch):
    """Where a problem between small cells fits in memory it has no correction to give: cells as few as give one are better."""
    monkeypatch.setattr(sinkhorn, "COARSEST", 40)
    generator.manual_seed(3)
    x = torch.randn(1500, 2, generator=generator, dtype=torch.float64)
    y = 0.7 * torch.randn(60, 2, generator=generator, dtype=torch.float64) + 1
    eps = 0.1 * float(torch.cdist(x, y).square().mean() / 2)
    bridge = sbot.solve_bridge(x, y, eps, solver=sbot.Sinkhorn(memory=100_000))
    said = bridge.report.notes[1]
    assert "cells of atoms, whose Newton steps correct the passes" in said and "that from" not in said
    assert int(bridge.report.notes[-1].split()[-5]) <= 10
