"""From GeomLoss's measures, in the core's units, to bridges and GeomLoss's values."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from ...api import solve_bridge
from ...bridge import Bridge
from ...costs import MatrixCost
from ...divergence import sinkhorn_divergence
from ...errors import PrecisionWarning
from ...measures import Discrete
from ...parts import joined
from ...problem import INF
from ...solvers import Sinkhorn

#: Relative difference of two masses that GeomLoss takes for equal; and what single precision explains.
SLACK, ROUNDING = 2e-3, 1e-5
#: The tolerance is this power of the machine epsilon.
FINE = 0.75
#: Pairs up to which single precision is solved in double: its potentials are then known at any eps, at no cost.
SMALL = 2**16
#: Masses below this many tolerances are not known.
UNRESOLVED = 1e3

Cloud = tuple[Tensor | None, Tensor]


@final
class Transport:
    """What a call asks for, each part solved when it is wanted: from alpha to beta, and of each to itself.

    ``alpha`` and ``beta`` are (points or None, weights); ``costs`` the cost from alpha to beta, and of each to itself.
    """

    def __init__(
        self,
        alpha: Cloud,
        beta: Cloud,
        costs: tuple[Any, Any, Any],
        eps: float,
        relax: tuple[float, float],
        debias: bool,
        solver: Sinkhorn,
        progress: Any = None,
        fine: bool = True,
    ) -> None:
        if _is_small(alpha[1], beta[1]) and not callable(costs[0]):
            alpha, beta = (_wide(alpha[0]), alpha[1].double()), (_wide(beta[0]), beta[1].double())
            costs = _wide(costs[0]), _wide(costs[1]), _wide(costs[2])
        self.eps, self.relax, self.debias, self.costs = eps, relax, debias, costs
        self.hard = relax == (INF, INF)
        if self.hard:
            beta = beta[0], _levelled(alpha[1], beta[1])
        self.ends = Discrete(*alpha), Discrete(*beta)
        self._options: dict[str, Any] = {
            "relax": relax,
            "solver": _fine(solver, alpha[1].dtype) if fine else solver,
            "progress": progress,
        }
        self._own_tol = solver.tol is None
        self._moving: dict[int, Bridge] = {}

    @cached_property
    def xy(self) -> Bridge:
        """From alpha to beta."""
        return self._solved(*self.ends, self.costs[0])

    @cached_property
    def own(self) -> tuple[Bridge, Bridge]:
        """From each to itself."""
        return self._solved(self.ends[0], self.ends[0], self.costs[1]), self._solved(
            self.ends[1], self.ends[1], self.costs[2]
        )

    def _solved(self, mu: Discrete, nu: Discrete, cost: Any) -> Bridge:
        with self._quiet():
            return solve_bridge(mu, nu, self.eps, cost=cost, **self._options)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """A tolerance that nobody asked for is raised to what the dtype can reach without a warning."""
        with warnings.catch_warnings():
            if self._own_tol:
                warnings.simplefilter("ignore", PrecisionWarning)
            yield

    def value(self) -> Tensor:
        """The cost or the divergence, ``(*b,)``, with its gradient in points, weights and costs."""
        if self.debias:
            cost = self.costs if isinstance(self.costs[0], Tensor) else self.costs[0]
            with self._quiet():
                return sinkhorn_divergence(*self.ends, self.eps, cost=cost, **self._options)
        total = self.xy.cost()
        if self.hard:
            # the relative entropy of GeomLoss has no mass terms here: the dual is <a, f> + <b, g>, its slopes f and g
            a, b = (end.weights.sum(-1).to(total.dtype) for end in self.ends)
            total = total - self.eps * (a * b - a - b + (a + b).detach() / 2)
        return total

    def potentials(self, bridge: Bridge) -> tuple[Tensor, Tensor]:
        """``f`` and ``g`` at the atoms; they follow the data where something wants a gradient."""
        f, g = (side.values for side in self.moving(bridge).potentials())
        return _joined(bridge, f, g) if self.hard and _is_small(f, g) else (f, g)

    def shown_potentials(self) -> tuple[Tensor, Tensor]:
        """``f_ba - f_aa`` and ``g_ab - g_bb`` where the value is debiased, else ``f`` and ``g``."""
        f, g = self.potentials(self.xy)
        if not self.debias:
            return f, g
        return f - self.potentials(self.own[0])[0], g - self.potentials(self.own[1])[1]

    def moving(self, bridge: Bridge) -> Bridge:
        """``bridge`` with derivatives in the data, where these are wanted."""
        if not (torch.is_grad_enabled() and _wants_gradient(bridge)):
            return bridge
        if id(bridge) not in self._moving:
            self._moving[id(bridge)] = bridge.differentiable()
        return self._moving[id(bridge)]


def _joined(bridge: Bridge, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """With the constants between parts of the plan that exchange next to no mass, which the marginal error does not see."""
    problem = bridge.problem
    mu, nu = problem.mu, problem.nu
    assert isinstance(mu, Discrete) and isinstance(nu, Discrete)
    with torch.no_grad():
        a, b = mu.weights.double(), nu.weights.double()
        density = (f[..., :, None] + g[..., None, :] - problem.cost.matrix(*problem.sites)) / problem.eps
        log_plan = density.double() + a.log()[..., :, None] + b.log()[..., None, :]
        n, m = log_plan.shape[-2:]
        each = zip(log_plan.reshape(-1, n, m), a.reshape(-1, n), b.reshape(-1, m), strict=True)
        found = [joined(*one, UNRESOLVED * bridge.report.tolerance) for one in each]
        if all(move is None for move in found):
            return f, g
        shift = torch.stack([a.new_zeros(n + m) if move is None else move for move in found])
        shift = shift.reshape(*log_plan.shape[:-2], n + m) * problem.eps
        up, down = shift[..., :n], shift[..., n:]
        # <a, f> = <b, g> again
        level = ((a * up).sum(-1) + (b * down).sum(-1)) / (2 * a.sum(-1))
    return f + (up - level[..., None]).to(f), g - (down - level[..., None]).to(g)


def _is_small(a: Tensor, b: Tensor) -> bool:
    return a.numel() * b.shape[-1] <= SMALL and a.device.type in ("cpu", "cuda")


def _wide(part: Any) -> Any:
    return part.double() if isinstance(part, Tensor) else part


def _fine(solver: Sinkhorn, dtype: torch.dtype) -> Sinkhorn:
    """With a tolerance of its own where none was given: potentials are results here, and want more than values do."""
    if solver.tol is not None:
        return solver
    return replace(solver, tol=torch.finfo(dtype).eps ** FINE)


def _wants_gradient(bridge: Bridge) -> bool:
    problem = bridge.problem
    parts = [problem.cost.values] if isinstance(problem.cost, MatrixCost) else [*problem.values]
    parts += [end.weights for end in (problem.mu, problem.nu) if isinstance(end, Discrete)]
    return any(part is not None and part.requires_grad for part in parts)


def _levelled(a: Tensor, b: Tensor) -> Tensor:
    """``b`` with the mass of ``a``, where GeomLoss takes them for equal; the rest is refused by the core."""
    mass_a, mass_b = (w.detach().double().sum(-1) for w in (a, b))
    apart = float(((mass_a - mass_b).abs() / torch.maximum(mass_a, mass_b)).max())
    if not 0 < apart <= SLACK:
        return b
    if apart > ROUNDING:
        warnings.warn(
            f"the masses differ by {apart:.1e} relative: the second was rescaled to the first; "
            "normalise the weights, or relax the marginals",
            PrecisionWarning,
            stacklevel=5,
        )
    return b * (mass_a / mass_b)[..., None].to(b.dtype)
