"""Which of two answers is sound, by what a plan must satisfy and not by the other answer.

A plan of Sinkhorn's form ``diag(u) exp(-M / reg) diag(v)`` is optimal for its own marginals, so that how far these are from
what was asked says how far it has converged.  With relaxed marginals there is nothing to miss, and the objective, which is
strictly convex, is compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from .compare import PAIRS, Array, Parts, plain

#: Relative deviation that counts as none, by dtype; and marginal error (L1, relative to the mass) that does.
FLOOR = {"float64": 1e-6, "float32": 1e-4}
MET = {"float64": 1e-8, "float32": 1e-4}
COARSE = 1e-2
#: Times the tolerance that was asked for: a deviation that counts as none, and a marginal error that does.
NEAR, SLACK = 10, 2
#: A plan with less than this share of the mass has none.
NOTHING = 1e-3
TOLERANCES = ("stopThr", "stopInnerThr", "tol")


@dataclass(frozen=True)
class Question:
    """What a call asked: weights (``(..., n)``, ``(..., m)``; None is uniform), tolerance, cost, and how marginals are held."""

    a: Any
    b: Any
    asked: float = 1e-9
    M: Any = None
    reg: float = 0.0
    relax: tuple[float, float] | None = None
    reference: Any = None
    mass: float | None = None
    floor: float = FLOOR["float64"]
    met: float = MET["float64"]

    @property
    def limit(self) -> float:
        """The relative deviation that counts as none."""
        return max(self.floor, NEAR * self.asked)


def question(name: str, given: dict[str, Any]) -> Question | None:
    """What a call of a function asked, by its arguments; None where nothing is known that its plan must satisfy."""
    a, b, M = (_present(given.get(key)) for key in ("a", "b", "M"))
    M = _present(given.get("C")) if M is None else M
    several = b is not None and M is not None and getattr(b, "ndim", 1) > 1 and M.ndim == 2
    kind, other = (str(given.get(key, "KL")).lower() for key in ("reg_type", "unbalanced_type"))
    if given.get("debias") or several or kind not in ("kl", "entropy") or other != "kl":
        return None
    stop = next((given[key] for key in TOLERANCES if isinstance(given.get(key), (int, float))), 1e-9)
    reg = given.get("reg")
    known = Question(
        a,
        b,
        float(stop),
        M,
        float(reg) if isinstance(reg, (int, float)) else 0.0,
        None,
        None,
        None,
        floor(given),
        floor(given, MET),
    )
    if "reg_m" in given or given.get("unbalanced") is not None:
        relax = _pair(given["reg_m"] if "reg_m" in given else given["unbalanced"])
        if relax is None or M is None or name.startswith("geomloss"):
            return None
        reference = _present(given.get("c"))
        return replace(known, relax=relax, reference=1.0 if kind == "entropy" and reference is None else reference)
    if "partial" in name:
        whole = min(float(plain(w).sum()) if w is not None else 1.0 for w in (a, b))
        return replace(known, mass=whole if given.get("m") is None else float(given["m"]))
    # the cost of sinkhorn_lpl1_mm is another one at the end
    return replace(known, M=None) if name.endswith("sinkhorn_lpl1_mm") else known


def _present(value: Any) -> Any:
    return None if value is None or (hasattr(value, "__len__") and len(value) == 0) else value


def floor(given: dict[str, Any], floors: dict[str, float] = FLOOR) -> float:
    """What is not held against an answer, by the coarsest dtype among the arguments."""
    kinds = {str(value.dtype).rpartition(".")[2] for value in given.values() if hasattr(value, "dtype")}
    kinds = {kind for kind in kinds if "float" in kind}
    return max((floors.get(kind, COARSE) for kind in kinds), default=floors["float64"])


def _pair(value: Any) -> tuple[float, float] | None:
    try:
        values = plain(value).ravel().tolist() if not isinstance(value, (tuple, list)) else [float(x) for x in value]
    except (TypeError, ValueError):
        return None
    return (values[0], values[-1]) if len(values) in (1, 2) else None


# ---- one answer ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """What is wrong with an answer, or ""; its marginal error and its objective, where they can be told."""

    fault: str = ""
    kind: str = ""
    error: float | None = None
    objective: float | None = None


def examine(asked: Question | None, found: Parts) -> Finding:
    """Finite, of the mass that was asked for, with the marginals that were asked for."""
    for key, part in found.items():
        for array in part if isinstance(part, tuple) else (part,):
            values = plain(array)
            # a log-scaling of a weight 0 is -inf
            if np.isnan(values).any() or (key != "potentials" and not np.isfinite(values).all()):
                return Finding(f"{key} is not finite", "not finite")
    if asked is None or "plan" not in found:
        return Finding()
    plan = plain(found["plan"])
    a, b = (_weights(w, plan, axis) for w, axis in ((asked.a, -2), (asked.b, -1)))
    if a.shape != plan.shape[:-1] or b.shape != (*plan.shape[:-2], plan.shape[-1]):
        return Finding()
    whole = a.sum(-1)
    if asked.relax is not None:
        return Finding(objective=_relaxed_objective(asked, plan, a, b))
    rows, columns = plan.sum(-1) - a, plan.sum(-2) - b * (whole / b.sum(-1))[..., None]
    if asked.mass is not None:
        rows, columns, whole = rows.clip(min=0), columns.clip(min=0), np.asarray(asked.mass)
        columns = np.concatenate([columns, (plan.sum((-2, -1)) - asked.mass)[..., None]], -1)
    error = float(((np.abs(rows).sum(-1) + np.abs(columns).sum(-1)) / np.maximum(whole, 1e-300)).max(initial=0.0))
    objective = None if asked.M is None or asked.mass is not None else _objective(asked, plan)
    if float((plan.sum((-2, -1)) / np.maximum(whole, 1e-300)).min(initial=1.0)) < NOTHING:
        return Finding("the plan is zero", "no mass", error, objective)
    norm = float(max(np.linalg.norm(rows, axis=-1).max(initial=0.0), np.linalg.norm(columns, axis=-1).max(initial=0.0)))
    if error > asked.met and norm > SLACK * asked.asked:
        return Finding(f"marginal error {error:.1e}", "marginals missed", error, objective)
    return Finding("", "", error, objective)


def _weights(w: Any, plan: Array, axis: int) -> Array:
    shape = (*plan.shape[:-2], plan.shape[axis])
    if w is None:
        return np.full(shape, 1.0 / plan.shape[axis])
    values = plain(w)
    if values.ndim == 2 and values.shape[-1] == 1 and plan.ndim == 2:
        values = values[:, 0]
    return np.broadcast_to(values, shape) if values.ndim < len(shape) else values


def _objective(asked: Question, plan: Array) -> float | None:
    """``<P, M> + reg sum P log P``, summed over a batch."""
    M = plain(asked.M)
    if M.shape != plan.shape:
        return None
    return float((np.where(plan > 0, plan * M, 0.0) + asked.reg * _xlogy(plan, plan)).sum())


def _relaxed_objective(asked: Question, plan: Array, a: Array, b: Array) -> float | None:
    M = plain(asked.M)
    if M.shape != plan.shape or asked.relax is None:
        return None
    c = (
        a[..., :, None] * b[..., None, :]
        if asked.reference is None
        else np.broadcast_to(plain(asked.reference), plan.shape)
    )
    total = np.where(plan > 0, plan * M, 0.0).sum() + asked.reg * _divergence(plan, c)
    for rho, got, want in zip(asked.relax, (plan.sum(-1), plan.sum(-2)), (a, b), strict=True):
        if math.isfinite(rho):
            total += rho * _divergence(got, want)
    return float(total)


def _xlogy(x: Array, y: Array) -> Array:
    live = x > 0
    return np.where(live, x * np.log(np.where(live, y, 1.0)), 0.0)


def _divergence(p: Array, q: Array) -> float:
    """``sum p log(p / q) - p + q``."""
    tiny = np.finfo(np.float64).tiny
    return float((_xlogy(p, p) - _xlogy(p, np.maximum(q, tiny)) - p + q).sum())


# ---- two answers ---------------------------------------------------------------------------------------------------


def higher(one: Finding, other: Finding, asked: Question | None) -> float:
    """How much the objective of ``one`` lies above that of ``other``, relative; 0 where that says nothing.

    An objective says something where marginals are relaxed, or met by both.
    """
    if asked is None or one.objective is None or other.objective is None or one.fault or other.fault:
        return 0.0
    excess = (one.objective - other.objective) / max(abs(other.objective), abs(one.objective), 1e-3)
    missed = max(one.error or 0.0, other.error or 0.0)
    return excess if excess > asked.floor + missed * _steepness(asked) else 0.0


def _steepness(asked: Question) -> float:
    """How much, at most, a relative objective moves with a marginal error: the spread of the cost in units of reg, amply."""
    if asked.relax is not None or asked.M is None:
        return 0.0
    M = plain(asked.M)
    live = M[np.isfinite(M)]
    return 10 * (1 + float(np.ptp(live)) / max(asked.reg, 1e-300)) if live.size else 0.0


def potentials_judge(
    points: tuple[Any, Any], weights: tuple[Any, Any], p: float, eps: float
) -> Callable[[Any], float | None]:
    """The marginal error of a pair of potentials of a SamplesLoss, as a function; None where the plan would be too large."""

    def error(pair: Any) -> float | None:
        (x, y), (a, b), (f, g) = ([part.detach().double().cpu() for part in both] for both in (points, weights, pair))
        if x.ndim != 2 or len(x) * len(y) > PAIRS:
            return None
        a, b, f, g = (part.flatten() for part in (a, b, f, g))
        distance = torch.cdist(x, y)
        cost = distance if p == 1 else distance.square() / 2
        plan = a[:, None] * b * ((f[:, None] + g - cost) / eps).exp()
        return float(((plan.sum(1) - a).abs().sum() + (plan.sum(0) - b).abs().sum()) / a.sum())

    return error
