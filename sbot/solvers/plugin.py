"""The plug-in bridge: Sinkhorn on samples, and its potentials as a bridge between the measures themselves.

Pooladian and Niles-Weed, "Plug-in estimation of Schrödinger bridges", 2024, arXiv 2408.11686.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor

from ..arrays import as_count, require_finite
from ..bridge import Bridge
from ..errors import InvalidProblem, Unsupported
from ..measures import Discrete, Measure
from ..potential_bridge import PotentialBridge
from ..potentials import Atoms
from ..problem import Problem
from .base import Solver
from .lightsb import refuse_unlike_points
from .sinkhorn import Sinkhorn


@final
@dataclass(frozen=True)
class PlugIn(Solver):
    r"""Sinkhorn between samples of any two measures; the bridge starts from fresh samples of mu and goes where ``psi`` says.

    With samples ``y_j`` of nu and the dual potential g of the discrete problem,

    .. math:: \psi = \frac1m \sum_j e^{g_j/\varepsilon} \delta_{y_j}, \qquad
        X_1 \mid X_0 = x \;\sim\; \text{psi tilted at } x,

    for every x: drift, map and pairs exist out of sample, and always end in the ``y_j``.  For a fixed eps the error of the
    plan falls as ``1 / sqrt(samples)``, with a constant that grows fast as eps falls and the dimension rises.

    With ``batches = B > 1`` it is the mini-batch estimator: B independent problems of ``samples`` points, solved side by side,
    and the average ``psi = (1/B) sum_b psi_b`` of their potentials, each with the constant that makes ``E f_b = E g_b``;
    ``phi`` is then ``mu / psi_0`` on all points drawn of mu.  It estimates the potential of a problem of size ``samples``: its
    variance falls as ``1/B``, its bias, that of the potential of one mini-batch, does not and is of order ``1 / samples``.
    Sinkhorn takes B times less memory and time than on ``B samples`` points, where the bias would be B times smaller.

    Parameters
    ----------
    samples : points drawn of each measure (without replacement where weights are equal); a discrete measure with no more
        atoms is taken whole, and None takes all atoms of both.
    batches : independent mini-batches.
    solver : how the discrete problems are solved.
    seed : of the draws.

    Raises
    ------
    InvalidProblem : an option out of range, samples with NaN or of the wrong shape.

    Warns
    -----
    NotConverged : from the solver of the discrete problems; ``report`` is theirs, in sample.

    Examples
    --------
    >>> import torch, sbot
    >>> one = sbot.Gaussian(torch.zeros(2), torch.eye(2))
    >>> bridge = sbot.solve_bridge(one, one, 1.0, solver=sbot.PlugIn(samples=500))
    >>> bridge.transport(torch.tensor([[1.0, 0.0]])).shape
    torch.Size([1, 2])
    >>> x0, x1 = sbot.PlugIn(samples=64, batches=4).pairs(bridge.problem, 100)
    >>> x0.shape, x1.shape
    (torch.Size([100, 2]), torch.Size([100, 2]))
    """

    samples: int | None = 4096
    batches: int = 1
    solver: Solver = field(default_factory=Sinkhorn)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples is not None:
            as_count(self.samples, "samples")
        as_count(self.batches, "batches")
        as_count(self.seed, "seed", least=0)
        if not isinstance(self.solver, Solver) or isinstance(self.solver, PlugIn):
            raise InvalidProblem(f"solver is {self.solver!r}; give one for points, such as sbot.Sinkhorn(tol=1e-4)")
        if self.samples is None and self.batches > 1:
            raise InvalidProblem("samples is None with several batches, which would all be the same; give their size")

    def accepts(self, problem: Problem) -> str | None:
        refusal = refuse_unlike_points(problem)
        if refusal is not None:
            return refusal
        for name, end in (("mu", problem.mu), ("nu", problem.nu)):
            if self.samples is None and not isinstance(end, Discrete):
                return f"samples is None and {name} is {type(end).__name__}, which has no atoms to take; give a number"
        return None

    def solve(self, problem: Problem, *, init: Bridge | None = None, progress: Any = None) -> Bridge:
        """Solve on samples, from the potentials of ``init`` where one is given (for one batch)."""
        if init is not None and self.batches > 1:
            raise InvalidProblem("mini-batches do not start from a bridge; drop init=, or give batches=1")
        begun = time.perf_counter()
        generator = torch.Generator(problem.device).manual_seed(self.seed)
        inner = self._on_samples(problem, generator, init, progress)
        phi, psi = inner.phi, inner.psi
        assert isinstance(phi, Atoms) and isinstance(psi, Atoms)
        if self.batches > 1:
            phi, psi = _pooled(inner.problem, phi, psi)
        drawn = tuple(_size(end) for end in (inner.problem.mu, inner.problem.nu))
        note = f"on {self.batches} x {drawn[0]} and {drawn[1]} points; the error is that of the plan between them"
        report = replace(
            inner.report,
            solver=repr(self),
            seconds=time.perf_counter() - begun,
            notes=(*inner.report.notes, note),
        )
        return PotentialBridge(problem, phi, psi, report)

    def pairs(
        self, problem: Problem, n: int, *, generator: torch.Generator | None = None, progress: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Draw ``n`` pairs ``(x0, x1)``, ``(n, d)`` each, from the plans of ``batches`` fresh mini-batches, in equal parts.

        Every call draws new mini-batches: the pairs follow the *mean* of mini-batch plans, whose marginals are mu and nu
        exactly, and which is more spread out than the plan itself the smaller the mini-batches are.
        """
        n = as_count(n, "n")
        inner = self._on_samples(problem, generator, None, progress)
        x, y = inner.sample_pairs(-(-n // self.batches), generator=generator)
        if self.batches == 1:
            return x, y
        # one of each mini-batch in turn, so that what is cut off is an equal part of each
        return x.transpose(0, 1).flatten(0, 1)[:n], y.transpose(0, 1).flatten(0, 1)[:n]

    def _on_samples(
        self, problem: Problem, generator: torch.Generator | None, init: Bridge | None, progress: Any
    ) -> PotentialBridge:
        refusal = self.accepts(problem)
        if refusal is not None:
            raise InvalidProblem(f"PlugIn: {refusal}")
        mu, nu = (self._draw(end, name, generator) for name, end in (("mu", problem.mu), ("nu", problem.nu)))
        drawn = Problem.of(mu, nu, problem.one_eps, problem.reference)
        refusal = self.solver.accepts(drawn)
        if refusal is not None:
            raise InvalidProblem(f"PlugIn with {type(self.solver).__name__}: {refusal}")
        bridge = self.solver.solve(drawn, init=init, progress=progress)
        if not isinstance(bridge, PotentialBridge) or not isinstance(bridge.psi, Atoms):
            raise Unsupported(f"{type(self.solver).__name__} gives no potentials on atoms; use sbot.Sinkhorn()")
        return bridge

    @torch.no_grad()
    def _draw(self, measure: Measure, name: str, generator: torch.Generator | None) -> Discrete:
        """One measure on samples, or a batch of them."""
        whole = isinstance(measure, Discrete) and (self.samples is None or measure.n <= self.samples)
        if whole and self.batches == 1:
            assert isinstance(measure, Discrete)
            return Discrete(measure.points, measure.weights)
        size = self.samples
        assert size is not None
        mass = float(measure.mass) if isinstance(measure, Discrete) else 1.0
        if isinstance(measure, Discrete) and not whole and bool((measure.weights == measure.weights[0]).all()):
            parts = [_without_replacement(measure, size, generator) for _ in range(self.batches)]
            points = torch.stack(parts)
        else:
            points = require_finite(measure.sample(self.batches * size, generator=generator), f"a draw of {name}")
            points = points.view(self.batches, size, *measure.event_shape)
        points = points if self.batches > 1 else points[0]
        weights = torch.full(points.shape[:-1], mass / size, dtype=points.dtype, device=points.device)
        return Discrete(points.detach(), weights)


def _without_replacement(measure: Discrete, size: int, generator: torch.Generator | None) -> Tensor:
    assert measure.points is not None
    order = torch.randperm(measure.n, generator=generator, device=measure.device)
    return measure.points[order[:size]]


def _size(measure: Measure) -> int:
    assert isinstance(measure, Discrete)
    return measure.n


@torch.no_grad()
def _pooled(problem: Problem, phi: Atoms, psi: Atoms) -> tuple[Atoms, Atoms]:
    """The mean of the potentials psi of a batch, and ``phi = mu / psi_0`` on all points of mu."""
    assert isinstance(problem.mu, Discrete)
    count = len(psi.log_weights)
    pooled = Atoms(psi.points.flatten(0, 1), psi.log_weights.flatten() - torch.tensor(float(count)).log())
    x = phi.points.flatten(0, 1)
    pulled = problem.reference.pull_back(pooled, 0.0, x, problem.one_eps).log_mass
    return Atoms(x, (problem.mu.weights.flatten() / count).log() - pulled), pooled
