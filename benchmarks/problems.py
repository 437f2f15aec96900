"""Problems for the benchmarks, as plain arrays, and the definitions that every answer is held against.

Nothing here comes from sbot: costs, values and marginals are written out again, so that a mistake there cannot hide here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

Array = NDArray[np.floating]

COSTS = ("quadratic", "l1", "cosine", "matrix")
WEIGHTS = ("uniform", "random", "zeros")
KINDS = ("balanced", "unbalanced", "semi-relaxed")
RATIOS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True)
class Cell:
    """One problem by its coordinates; ``ratio`` is eps over the mean cost."""

    n: int = 48
    m: int = 36
    d: int = 2
    cost: str = "quadratic"
    weights: str = "uniform"
    kind: str = "balanced"
    ratio: float = 0.1
    dtype: str = "float64"
    seed: int = 0


@dataclass(frozen=True)
class Task:
    """The arrays of a problem: ``min <P, C> + eps KL(P | a b)`` with marginals a and b, or ``rho KL`` to them."""

    cell: Cell
    x: Array = field(repr=False)
    y: Array = field(repr=False)
    a: Array = field(repr=False)
    b: Array = field(repr=False)
    cost: Array = field(repr=False)
    eps: float
    rho: tuple[float, float]

    def double(self) -> Task:
        """The same numbers in float64."""
        a, b, cost = (part.astype(np.float64) for part in (self.a, self.b, self.cost))
        return replace(self, a=a, b=b, cost=cost)


def make(cell: Cell) -> Task:
    """Two clouds that overlap in part, N(0, I) and N(1, 0.49 I); the masses differ where the problem allows it."""
    rng = np.random.default_rng([cell.seed, cell.n, cell.m, cell.d])
    dtype = np.dtype(cell.dtype)
    x = rng.normal(size=(cell.n, cell.d)).astype(dtype)
    y = (0.7 * rng.normal(size=(cell.m, cell.d)) + 1).astype(dtype)
    a, b = (_weights(cell.weights, size, rng) for size in (cell.n, cell.m))
    if cell.kind != "balanced":
        b = 1.3 * b
    # points and weights are rounded to the dtype first: the cost is theirs, and one rounding of it is unavoidable
    cost = rng.uniform(size=(cell.n, cell.m)) if cell.cost == "matrix" else _cost(cell.cost, x, y)
    mean = float(cost.mean())
    rho = {"balanced": (math.inf, math.inf), "unbalanced": (mean, mean), "semi-relaxed": (math.inf, mean)}[cell.kind]
    return Task(cell, x, y, a.astype(dtype), b.astype(dtype), cost.astype(dtype), cell.ratio * mean, rho)


def _weights(kind: str, size: int, rng: np.random.Generator) -> Array:
    w = np.ones(size) if kind == "uniform" else rng.uniform(0.1, 1, size)
    if kind == "zeros":
        w[rng.permutation(size)[: size // 5]] = 0
    return w / w.sum()


def _cost(name: str, x: Array, y: Array) -> Array:
    x, y = x.astype(np.float64), y.astype(np.float64)
    if name == "quadratic":
        return cdist(x, y, "sqeuclidean") / 2
    return cdist(x, y, {"l1": "cityblock", "cosine": "cosine"}[name])


def kl(p: Array, q: Array) -> float:
    """``sum p log(p / q) - p + q``; infinite where p has mass and q none."""
    live = p > 0
    if (q[live] == 0).any():
        return math.inf
    return float((p[live] * np.log(p[live] / q[live])).sum() - p.sum() + q.sum())


def objective(task: Task, plan: Array) -> float:
    """``<P, C> + eps KL(P | a b)`` and ``rho KL`` of each relaxed marginal, mass terms included."""
    t, p = task.double(), plan.astype(np.float64)
    total = float((p * t.cost).sum()) + t.eps * kl(p, np.outer(t.a, t.b))
    for rho, marginal, weights in zip(t.rho, (p.sum(1), p.sum(0)), (t.a, t.b), strict=True):
        if math.isfinite(rho):
            total += rho * kl(marginal, weights)
    return total


def marginal_error(task: Task, plan: Array, f: Array, g: Array) -> float:
    """Relative L1 error of both marginals, summed; a relaxed one is ``a e^{-f / rho}`` at the solution."""
    t, total = task.double(), 0.0
    for rho, weights, dual, sums in zip(t.rho, (t.a, t.b), (f, g), (plan.sum(1), plan.sum(0)), strict=True):
        target = weights
        if math.isfinite(rho):
            with np.errstate(over="ignore"):
                target = weights * np.exp(-np.where(weights > 0, dual, 0.0) / rho)
        total += float(abs(sums - target).sum() / target.sum())
    return total
