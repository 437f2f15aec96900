"""The Schrödinger bridge between two Gaussians under a linear reference, in closed form."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from .. import linalg
from ..bridge import Bridge, Report
from ..errors import InvalidProblem
from ..gaussian import couple
from ..measures import Gaussian
from ..potential_bridge import PotentialBridge
from ..potentials import Quadratics
from ..problem import Problem
from ..reference import LinearReference
from .base import Solver, reporting


@final
@dataclass(frozen=True)
class ClosedForm(Solver):
    """Gaussian to Gaussian, exactly: plan, potentials, drift, density, paths; singular covariances are legal.

    Examples
    --------
    >>> import torch, sbot
    >>> one = sbot.Gaussian(torch.zeros(1, dtype=torch.float64), torch.eye(1, dtype=torch.float64))
    >>> bridge = sbot.solve_bridge(one, one, 1.0, solver=sbot.ClosedForm())
    >>> round(float(bridge.plan().cov[0, 1]), 6)                # (sqrt 5 - 1) / 2
    0.618034
    """

    def accepts(self, problem: Problem) -> str | None:
        for name, measure in (("mu", problem.mu), ("nu", problem.nu)):
            if not isinstance(measure, Gaussian):
                return f"{name} is {type(measure).__name__}, needs Gaussian; try sbot.Gaussian.from_samples(x)"
        if not isinstance(problem.reference, LinearReference):
            return f"the reference is {problem.reference!r}, needs a linear one; try reference=sbot.Brownian()"
        if not problem.hard:
            return (
                "relaxed marginals and partial plans have no closed form here; try Sinkhorn on samples: mu.sample(4096)"
            )
        return None

    def solve(self, problem: Problem, *, init: Bridge | None = None, progress: Any = None) -> Bridge:
        """Potentials of the plan; ``init`` is refused, since nothing is iterated."""
        if init is not None:
            raise InvalidProblem("ClosedForm() iterates nothing; drop init=")
        start = time.perf_counter()
        mu, nu, reference, eps = problem.mu, problem.nu, problem.reference, problem.free_eps
        assert isinstance(mu, Gaussian) and isinstance(nu, Gaussian) and isinstance(reference, LinearReference)
        with reporting(progress, "ClosedForm"):
            plan = couple(mu, nu, reference, eps)
        step = reference.transition(0.0, 1.0).to(mu.mean)
        d = mu.event_shape[0]
        flow = linalg.matrix(step.phi, d)
        origin = torch.linalg.solve(flow, (nu.mean - step.shift)[..., None])[..., 0]
        # X_1 | X_0 = x is N(m1 + K W (obs - E obs), K): the quadratic whose tilt at s = 0 is this law
        psi = _quadratic(nu.mean, plan.ahead, plan.growth_ahead, plan.landing)
        phi = _quadratic(mu.mean, plan.behind, plan.growth_behind, origin)
        half = (plan.linear_cost + eps * plan.information) / (2 * eps)
        # f = -eps log psi_0 and g = -eps log(Z phi_1); their means under mu and nu share the cost equally
        pulled = reference.pull_back(psi, 0.0, mu.mean[..., None, :], eps).log_mass[..., 0]
        pushed, jacobian = reference.push_forward(phi, 1.0, nu.mean[..., None, :], eps)
        link = plan.growth_ahead @ flow
        hessian_f = link.mT @ plan.ahead @ link - plan.growth_behind  # of log psi_0
        hessian_g = link @ plan.behind @ link.mT - plan.growth_ahead  # of log phi_1
        mean_psi = pulled + _trace(hessian_f, mu.cov) / 2
        mean_phi = (pushed.log_mass + problem.log_normaliser(eps))[..., 0] + jacobian + _trace(hessian_g, nu.cov) / 2
        psi = Quadratics((-half - mean_psi)[..., None], psi.means, psi.covs, psi.growth)
        phi = Quadratics((-half - mean_phi)[..., None], phi.means, phi.covs, phi.growth)
        report = Report("ClosedForm()", True, "exact", seconds=time.perf_counter() - start, notes=problem.notes)
        return PotentialBridge(problem, phi, psi, report)


def _quadratic(mean: Tensor, cov: Tensor, growth: Tensor, anchor: Tensor) -> Quadratics:
    shift = (anchor[..., None, :] @ growth @ cov)[..., 0, :]
    logits = torch.zeros((*mean.shape[:-1], 1), dtype=mean.dtype, device=mean.device)
    return Quadratics(logits, (mean - shift)[..., None, :], cov[..., None, :, :], growth.expand(cov.shape))


def _trace(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-2, -1))
