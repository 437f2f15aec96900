"""From GeomLoss's measures, in the core's units, to bridges and GeomLoss's values."""

from __future__ import annotations

import warnings
from typing import Any, final

import torch
from torch import Tensor

from ...api import solve_bridge
from ...bridge import Bridge, Potentials
from ...costs import MatrixCost
from ...errors import PrecisionWarning
from ...measures import Discrete
from ...problem import INF
from ...solvers import Sinkhorn

#: Relative difference of two masses that GeomLoss takes for equal; and what single precision explains.
SLACK, ROUNDING = 2e-3, 1e-5


@final
class Transport:
    r"""The bridges behind a value: from alpha to beta and, where it is debiased, from each to itself.

    .. math:: S = OT(\alpha, \beta) - \tfrac12 OT(\alpha, \alpha) - \tfrac12 OT(\beta, \beta)
        + \tfrac{\varepsilon}{2} (m_\alpha - m_\beta)^2

    ``alpha`` and ``beta`` are (points or None, weights); ``costs`` the cost from alpha to beta, and of each to itself.
    """

    def __init__(
        self,
        alpha: tuple[Tensor | None, Tensor],
        beta: tuple[Tensor | None, Tensor],
        costs: tuple[Any, Any, Any],
        eps: float,
        relax: tuple[float, float],
        debias: bool,
        solver: Sinkhorn,
    ) -> None:
        self.relax = relax
        if relax == (INF, INF):
            beta = beta[0], _levelled(alpha[1], beta[1])

        def bridge(mu: tuple[Tensor | None, Tensor], nu: tuple[Tensor | None, Tensor], cost: Any) -> Bridge:
            return solve_bridge(Discrete(*mu), Discrete(*nu), eps, cost=cost, relax=relax, solver=solver)

        self.xy = bridge(alpha, beta, costs[0])
        self.own = (bridge(alpha, alpha, costs[1]), bridge(beta, beta, costs[2])) if debias else None
        self._moving: dict[int, Bridge] = {}

    @property
    def bridges(self) -> tuple[Bridge, ...]:
        """All that were solved."""
        return self.xy, *(self.own or ())

    def value(self) -> Tensor:
        """The cost or the divergence, ``(*b,)``, with its gradient in points, weights and costs."""
        total = self.xy.cost()
        a, b = _weights(self.xy)
        eps = self.xy.problem.eps
        mass_a, mass_b = a.sum(-1), b.sum(-1)
        if self.own is not None:
            total = total - (self.own[0].cost() + self.own[1].cost()) / 2
            return total if self.relax == (INF, INF) else total + eps / 2 * (mass_a - mass_b).square()
        if self.relax == (INF, INF):
            # the relative entropy of GeomLoss has no mass terms here: the dual is <a, f> + <b, g>, its slopes f and g
            mass = (mass_a + mass_b).detach() / 2
            total = total - eps * (mass_a * mass_b - mass_a - mass_b + mass)
        return total

    def potentials(self, bridge: Bridge) -> tuple[Tensor, Tensor]:
        """``f`` and ``g`` at the atoms; they follow the data where something wants a gradient."""
        f, g = self._followed(bridge)
        return f.values, g.values

    def debiased_potentials(self) -> tuple[Tensor, Tensor]:
        """``f_ba - f_aa`` and ``g_ab - g_bb``; or the potentials themselves where nothing is debiased."""
        f, g = self.potentials(self.xy)
        if self.own is None:
            return f, g
        return f - self.potentials(self.own[0])[0], g - self.potentials(self.own[1])[1]

    def moving(self, bridge: Bridge) -> Bridge:
        """``bridge`` with derivatives in the data, where these are wanted."""
        if not (torch.is_grad_enabled() and _wants_gradient(bridge)):
            return bridge
        if id(bridge) not in self._moving:
            self._moving[id(bridge)] = bridge.differentiable()
        return self._moving[id(bridge)]

    def _followed(self, bridge: Bridge) -> Potentials:
        return self.moving(bridge).potentials()


def _weights(bridge: Bridge) -> tuple[Tensor, Tensor]:
    mu, nu = bridge.problem.mu, bridge.problem.nu
    assert isinstance(mu, Discrete) and isinstance(nu, Discrete)
    return mu.weights, nu.weights


def _wants_gradient(bridge: Bridge) -> bool:
    parts: list[Tensor | None] = [*_weights(bridge), *bridge.problem.values]
    if isinstance(bridge.problem.cost, MatrixCost):
        parts.append(bridge.problem.cost.values)
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
