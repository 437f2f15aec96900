"""The arrays of a problem, and the judgement of every answer: its plan, summed in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..problems import Array

#: Entries of the plan that are looked at together.
BLOCK = 2**21
#: A plan of more entries is judged by so many rows and columns.
WHOLE, DRAWN = 10**9, 4096


@dataclass(frozen=True)
class Task:
    """``min <P, C> + eps KL(P | a b)`` with ``C = |x - y|^2 / 2``; points ``(*b, n, d)``, uniform weights ``(n,)``."""

    x: Array = field(repr=False)
    y: Array = field(repr=False)
    eps: float

    @property
    def dtype(self) -> str:
        return str(self.x.dtype)

    @cached_property
    def a(self) -> Array:
        return np.full(self.x.shape[-2], 1 / self.x.shape[-2], self.x.dtype)

    @cached_property
    def b(self) -> Array:
        return np.full(self.y.shape[-2], 1 / self.y.shape[-2], self.y.dtype)

    @cached_property
    def cost(self) -> Array:
        """The matrix ``(*b, n, m)``, computed in float64 and rounded once."""
        exact = _squares(*(torch.from_numpy(part).double() for part in (self.x, self.y)))
        return np.asarray(exact.numpy().astype(self.x.dtype))


@dataclass(frozen=True)
class Answer:
    """What a library returns: potentials with ``P = a b exp((f + g - C) / eps)``, or the plan itself.

    ``matrix``: the cost was given as a matrix, rounded to the dtype, and the plan is that of the rounded cost.
    """

    f: Any = None
    g: Any = None
    plan: Any = None
    matrix: bool = True
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """Relative L1 error of both marginals, summed (of the worst problem of a batch), and ``<P, C>`` (over all problems)."""

    error: float
    linear_cost: float


def make(job: dict[str, Any]) -> Task:
    """The problem of a job: ``cloud``, ``n``, ``d``, ``ratio`` (eps over the mean cost), ``dtype``, ``seed``, ``batch``."""
    x, y = points(job)
    dtype = np.dtype(job.get("dtype", "float64"))
    x, y = (np.ascontiguousarray(part.astype(dtype)) for part in (x, y))
    return Task(x, y, job["ratio"] * mean_cost(x, y))


def points(job: dict[str, Any]) -> tuple[Array, Array]:
    """Two clouds in float64."""
    n, d, kind = job["n"], job["d"], job["cloud"]
    rng = np.random.default_rng([job["seed"], n, d, job.get("batch", 0)])
    if kind == "gaussians":
        shape = (job["batch"], n, d) if job.get("batch") else (n, d)
        return rng.normal(size=shape), 0.7 * rng.normal(size=shape) + 1
    if kind == "cells":
        from ..continuous.problems import load_cells

        days = load_cells(Path(job["data"]))
        clouds = [days[day].double().numpy() for day in (2, 3)]
    else:
        from sklearn.datasets import load_digits

        data = load_digits()
        clouds = [data.data[data.target < 5], data.data[data.target >= 5]]
    return tuple(cloud[rng.permutation(len(cloud))[:n]] for cloud in clouds)  # type: ignore[return-value]


def mean_cost(x: Array, y: Array) -> float:
    """Mean of ``|x - y|^2 / 2`` over all pairs (and problems), without the pairs."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    squares = ((x**2).sum(-1).mean(-1) + (y**2).sum(-1).mean(-1)) / 2
    return float((squares - (x.mean(-2) * y.mean(-2)).sum(-1)).mean())


def judge(task: Task, answer: Answer) -> Verdict:
    """Sum the plan of an answer in float64; a very large one by some of its rows and of its columns, drawn at random."""
    parts = [_Plan.of(task, answer, k) for k in range(1 if task.x.ndim == 2 else len(task.x))]
    errors, total = [], 0.0
    for plan in parts:
        (rows, share), (columns, _) = plan.sums(), plan.T.sums()
        errors.append(_off(rows) + _off(columns))
        total += plan.cost / share
    finite = all(math.isfinite(error) for error in errors)
    return Verdict(max(errors) if finite else math.nan, total)


def _off(sums: tuple[Tensor, Tensor]) -> float:
    """Mean of the difference over the mean of the weights, of the rows that were looked at."""
    found, wanted = sums
    return float((found - wanted).abs().sum() / wanted.sum())


@dataclass
class _Plan:
    """One plan, given row by row: as it is, by potentials and a matrix, or by potentials and points."""

    a: Tensor
    b: Tensor
    tile: Callable[[Tensor], tuple[Tensor, Tensor]]
    turned: Callable[[Tensor], tuple[Tensor, Tensor]]
    cost: float = 0.0

    @staticmethod
    def of(task: Task, answer: Answer, k: int) -> _Plan:
        x, y = (_stack(part, 3)[k].double() for part in (task.x, task.y))
        a, b = (torch.from_numpy(part).double() for part in (task.a, task.b))
        if answer.matrix:
            matrix = _stack(task.cost, 3)[k]
            costs: Any = lambda i: matrix[i].double(), lambda j: matrix.T[j].double()
        else:
            costs = lambda i: _squares(x[i], y), lambda j: _squares(y[j], x)
        if answer.plan is not None:
            plan = _stack(answer.plan, 3)[k]
            plans: Any = lambda i: plan[i].double(), lambda j: plan.T[j].double()
            return _Plan(a, b, *(_both(p, c) for p, c in zip(plans, costs, strict=True)))
        f, g = (_stack(part, 2)[k].double() / task.eps for part in (answer.f, answer.g))
        return _Plan(a, b, _gibbs(f, g, a, b, task.eps, costs[0]), _gibbs(g, f, b, a, task.eps, costs[1]))

    @property
    def T(self) -> _Plan:
        return _Plan(self.b, self.a, self.turned, self.tile)

    def sums(self) -> tuple[tuple[Tensor, Tensor], float]:
        """Sums of rows beside what they should be, and the share of the rows that was looked at."""
        n, m = len(self.a), len(self.b)
        index = torch.arange(n)
        if n * m > WHOLE:
            index = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:DRAWN]
        found = []
        for rows in index.split(max(1, BLOCK // m)):
            plan, cost = self.tile(rows)
            found.append(plan.sum(1))
            self.cost += float((plan * cost).sum())
        return (torch.cat(found), self.a[index]), len(index) / n


def _both(
    plan: Callable[[Tensor], Tensor], cost: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda rows: (plan(rows), cost(rows))


def _gibbs(
    f: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: float, cost: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """``a b exp(f + g - C / eps)`` of some rows, and their costs."""

    def tile(rows: Tensor) -> tuple[Tensor, Tensor]:
        c = cost(rows)
        logits = torch.add((g + b.log())[None], c, alpha=-1 / eps)
        return logits.add_((f + a.log())[rows, None]).exp_(), c

    return tile


def _stack(part: Any, ndim: int) -> Tensor:
    tensor = part.detach() if isinstance(part, Tensor) else torch.from_numpy(np.asarray(part))
    return tensor if tensor.ndim == ndim else tensor[None]


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """``|x - y|^2 / 2`` of float64 points, about a common centre."""
    centre = y.mean(-2, keepdim=True)
    x, y = x - centre, y - centre
    half = (x.square().sum(-1) / 2)[..., :, None], (y.square().sum(-1) / 2)[..., None, :]
    return torch.matmul(x, y.mT).neg_().add_(half[0]).add_(half[1]).clamp_(min=0)
