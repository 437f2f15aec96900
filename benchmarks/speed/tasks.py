"""The arrays of a problem, and the judgement of every answer: its plan, summed in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..problems import Array

#: Entries of the plan that are looked at together.
BLOCK = 2**22


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
    """Relative L1 error of both marginals, summed (of the worst problem of a batch), and ``<P, C>`` (their sum)."""

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
    """Sum the plan of an answer in float64, in blocks of rows."""
    x, y = (_stack(part, 3) for part in (task.x, task.y))
    log_a, log_b = (torch.from_numpy(part).double().log() for part in (task.a, task.b))
    worst, total = 0.0, 0.0
    cost = _stack(task.cost, 3) if answer.matrix else None
    duals = None if answer.plan is not None else tuple(_stack(part, 2) for part in (answer.f, answer.g))
    plan = None if answer.plan is None else _stack(answer.plan, 3)
    for k in range(len(x)):
        rows, columns = [], torch.zeros(len(log_b), dtype=torch.float64)
        step = max(1, BLOCK // len(log_b))
        for start in range(0, len(log_a), step):
            part = slice(start, start + step)
            c = _squares(x[k, part].double(), y[k].double()) if cost is None else cost[k, part].double()
            if plan is not None:
                p = plan[k, part].double()
            else:
                assert duals is not None
                f, g = duals[0][k, part].double(), duals[1][k].double()
                p = ((f / task.eps + log_a[part])[:, None] + (g / task.eps + log_b) - c / task.eps).exp()
            rows.append(p.sum(1))
            columns += p.sum(0)
            total += float((p * c).sum())
        off = (torch.cat(rows) - log_a.exp()).abs().sum() + (columns - log_b.exp()).abs().sum()
        error = float(off)
        worst = max(worst, error) if math.isfinite(error) and math.isfinite(worst) else math.nan
    return Verdict(worst, total)


def _stack(part: Any, ndim: int) -> Tensor:
    tensor = part.detach() if isinstance(part, Tensor) else torch.from_numpy(np.asarray(part))
    return tensor if tensor.ndim == ndim else tensor[None]


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """``|x - y|^2 / 2`` of float64 points, about their common centre."""
    centre = y.mean(-2, keepdim=True)
    x, y = x - centre, y - centre
    out = x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :]
    return ((out - 2 * x @ y.mT) / 2).clamp_(min=0)
