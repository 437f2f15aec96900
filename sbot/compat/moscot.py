"""A backend of moscot: after ``sbot.compat.moscot.register()``, ``problem.solve(backend="sbot", ...)`` of linear problems.

moscot's cost is ``|x - y|^2`` divided by ``scale_cost`` and ``epsilon`` is in these units; ``tau = rho / (rho + eps)``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..api import solve_bridge
from ..arrays import as_tensor
from ..bridge import Bridge
from ..errors import Unsupported
from ..measures import Discrete
from ..relaxed import dual_term
from ..solvers import Sinkhorn

#: Options of moscot's own backend that change nothing here, with the values at which they ask for nothing.
IDLE: dict[str, Any] = {
    "rank": -1,
    "batch_size": None,
    "initializer": None,
    "initializer_kwargs": {},
    "jit": True,
    "lse_mode": True,
    "inner_iterations": 10,
    "min_iterations": None,
    "relative_epsilon": None,
    "cost_kwargs": {},
    "cost_matrix_rank": None,
}
SCALES = ("mean", "median", "max_cost")


def register(name: str = "sbot") -> None:
    """Add this backend to moscot's registry under ``name``; raises `ImportError` where moscot is not installed.

    Linear problems between points with the squared Euclidean cost, or with a cost matrix; ``epsilon``, ``tau_a``, ``tau_b``,
    ``scale_cost``, ``threshold`` (relative L1 error of the marginals) and ``max_iterations`` are read, others are refused
    unless they are at their defaults.
    """
    try:
        from moscot.backends import get_available_backends, register_solver
        from moscot.base.output import MatrixSolverOutput
        from moscot.base.solver import OTSolver
    except ImportError as missing:
        raise ImportError("sbot.compat.moscot needs moscot: pip install moscot") from missing

    class SinkhornSolver(OTSolver):  # type: ignore[misc]
        """Sinkhorn of sbot as moscot calls a linear solver."""

        def __init__(self, **options: Any) -> None:
            super().__init__()
            self._options = check(options)

        @property
        def problem_kind(self) -> str:
            return "linear"

        @classmethod
        def _call_kwargs(cls) -> tuple[set[str], set[str]]:
            return {"epsilon", "tau_a", "tau_b", "scale_cost"}, set()

        def _prepare(self, xy: Any = None, x: Any = None, y: Any = None, **asked: Any) -> dict[str, Any]:
            return problem(xy, asked)

        def _solve(self, data: dict[str, Any]) -> Any:
            bridge = solve_bridge(**data, solver=Sinkhorn(**self._options))
            return MatrixSolverOutput(
                bridge.plan().numpy(),
                cost=float(bridge.cost()) if data["relax"] is None else value(bridge),
                converged=bridge.report.converged,
                is_linear=True,
            )

    if name in get_available_backends():
        return

    @register_solver(name)  # type: ignore[untyped-decorator]
    def _(problem_kind: str) -> type[SinkhornSolver]:
        if problem_kind != "linear":
            raise Unsupported(f"sbot solves no {problem_kind} problems; use backend='ott'")
        return SinkhornSolver


def problem(xy: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `solve_bridge` for those of moscot."""
    if any(getattr(asked.get("time_scales_heat_kernel"), part, None) is not None for part in ("x", "y", "xy")):
        raise Unsupported("graph distances are not there; use backend='ott'")
    c = scaled(cost_matrix(xy), asked.get("scale_cost", 1.0))
    a, b = (as_tensor(asked[side], side).to(c) for side in ("a", "b"))
    epsilon = float(asked["epsilon"])
    relax = relaxation(asked, epsilon)
    if relax is not None:
        # the entropy there is relative to the counting measure, here to mu x nu: the mass of a relaxed plan depends on it
        c = c + epsilon * (a[:, None].log() + b.log()).clamp(min=-1e4)
    return {"cost": c, "mu": a, "nu": b, "eps": epsilon, "relax": relax}


def check(options: dict[str, Any]) -> dict[str, Any]:
    """The options of `Sinkhorn` for those of moscot; raises `Unsupported` for one that asks for something else."""
    given = dict(options)
    out: dict[str, Any] = {"tol": given.pop("threshold", 1e-3)}
    limit = given.pop("max_iterations", None)
    if limit is not None:
        out["max_iter"] = limit
    for key, value in given.items():
        if key not in IDLE or value != IDLE[key]:
            raise Unsupported(f"{key}={value!r} is not supported; drop it, or use backend='ott'")
    return out


def cost_matrix(data: Any) -> Tensor:
    """The cost of a tagged array, float64."""
    if data.is_cost_matrix:
        return as_tensor(data.data_src, "cost").double()
    if not data.is_point_cloud or (
        data.cost not in (None, "sq_euclidean") and type(data.cost).__name__ != "SqEuclidean"
    ):
        raise Unsupported("give points with cost='sq_euclidean', or a cost matrix; for others use backend='ott'")
    x = as_tensor(data.data_src, "x").double()
    y = x if data.data_tgt is None else as_tensor(data.data_tgt, "y").double()
    middle = x.mean(0)
    return torch.cdist(x - middle, y - middle).square()


def scaled(cost: Tensor, scale: Any) -> Tensor:
    """The cost over a number, or over its mean, median or maximum."""
    if isinstance(scale, str):
        if scale not in SCALES:
            raise Unsupported(f"scale_cost={scale!r} is not there; give a number or one of {', '.join(SCALES)}")
        # torch takes the lower of two middle entries for the median
        middle = (cost.median() - (-cost).median()) / 2
        scale = cost.mean() if scale == "mean" else middle if scale == "median" else cost.max()
    return cost / scale


def value(bridge: Bridge) -> float:
    """What OTT reports of a relaxed problem: ``sum F(a, f - eps log a) + sum F(b, g - eps log b) + eps (m_a m_b - m)``.

    ``F(a, h)`` is ``a rho (1 - e^{-h / rho})``, or ``a h`` where the marginal is hard, for the potentials of the plan with
    respect to the counting measure.  It is the dual of the problem whose entropy is relative to ``a x b``, at the potentials
    of this one, and so the value of neither.
    """
    problem = bridge.problem
    assert isinstance(problem.mu, Discrete) and isinstance(problem.nu, Discrete)
    total = problem.one_eps * float(problem.mu.mass * problem.nu.mass - bridge.plan().sum())
    for side, potential, rho in zip((problem.mu, problem.nu), bridge.potentials(), problem.relax, strict=True):
        a, f = side.weights, potential.values
        live = a > 0
        shifted = torch.where(live, f - problem.one_eps * torch.where(live, a, 1.0).log(), 0.0)
        total += float((a * dual_term(shifted, rho)).sum())
    return total


def relaxation(asked: dict[str, Any], eps: float) -> tuple[float, float] | None:
    """``rho = eps tau / (1 - tau)`` of both sides; None for two hard ones."""
    taus = [float(asked.get(side, 1.0)) for side in ("tau_a", "tau_b")]
    if taus == [1.0, 1.0]:
        return None
    left, right = (math.inf if tau == 1 else eps * tau / (1 - tau) for tau in taus)
    return left, right
