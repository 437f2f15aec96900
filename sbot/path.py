"""One problem at many values of eps: solved from the largest down, each from the potentials of those before."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from .arrays import as_number
from .bridge import Bridge
from .coupling import DiscreteCoupling
from .errors import InvalidProblem, Unsupported
from .linalg import full_precision
from .measures import Discrete
from .potential_bridge import PotentialBridge
from .potentials import Atoms
from .problem import Problem, check_eps
from .reference import Reference
from .solvers import ClosedForm, Sinkhorn, Solver

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@final
@dataclass(frozen=True)
class BridgePath(Sequence[Bridge]):
    """The bridges of one problem at ``K`` values of eps, in the order in which these were given; made by `solve_path`.

    ``path[k]`` is a bridge.  Arrays are computed when they are first asked for, stream, and have no gradients.

    Attributes
    ----------
    bridges : the bridges.

    Examples
    --------
    >>> import torch, sbot
    >>> path = sbot.solve_path(torch.rand(30, 2), torch.rand(40, 2), [1.0, 0.1])
    >>> len(path), path[1].problem.eps, path.entropy.argmax().item()
    (2, 0.1, 1)
    """

    bridges: tuple[Bridge, ...]

    def __len__(self) -> int:
        """``K``."""
        return len(self.bridges)

    def __getitem__(self, index: Any) -> Any:
        """A bridge, or a path of fewer for a slice."""
        part = self.bridges[index]
        return BridgePath(part) if isinstance(part, tuple) else part

    def __iter__(self) -> Iterator[Bridge]:
        """The bridges."""
        return iter(self.bridges)

    @cached_property
    def eps(self) -> Tensor:
        """The values of eps, ``(K,)`` in float64."""
        return torch.tensor([bridge.problem.eps for bridge in self.bridges], dtype=torch.float64)

    @cached_property
    def cost(self) -> Tensor:
        """``<P, C> + eps KL(P | mu x nu)``, plus ``rho KL`` of relaxed marginals: `Bridge.cost`, ``(K, *b)``."""
        return self._each(lambda bridge: bridge.cost())

    @cached_property
    def linear_cost(self) -> Tensor:
        """``<P, C>``, ``(K, *b)``."""
        return self._each(lambda bridge: bridge.linear_cost())

    @cached_property
    def entropy(self) -> Tensor:
        """The relative entropy ``KL(P | mu x nu)`` in nats, ``(K, *b)``: 0 for independent ends, growing as eps falls."""
        return self._each(_information)

    @cached_property
    def perplexity(self) -> Tensor:
        """How many atoms of nu each atom of mu is spread over, ``(K, *b, n)``: `Bridge.perplexity`."""
        return self._each(lambda bridge: bridge.perplexity())

    @cached_property
    def error(self) -> Tensor:
        """`Report.error`, ``(K,)`` in float64."""
        return torch.tensor([bridge.report.error for bridge in self.bridges], dtype=torch.float64)

    @cached_property
    def converged(self) -> Tensor:
        """`Report.converged`, ``(K,)``."""
        return torch.tensor([bridge.report.converged for bridge in self.bridges])

    def plot(self) -> Figure:
        """Costs, entropy and quantiles of the perplexity against eps; raises `Unsupported` for batches."""
        from . import plot

        return plot.eps_path(self)

    def _each(self, value: Callable[[Bridge], Tensor]) -> Tensor:
        with torch.no_grad(), full_precision():
            return torch.stack([value(bridge) for bridge in self.bridges])

    def __repr__(self) -> str:
        ends = f"{self.bridges[0].problem.mu!r} -> {self.bridges[0].problem.nu!r}"
        done = int(self.converged.sum())
        return (
            f"BridgePath({len(self)} bridges, {ends}, eps {self.eps.max():g} to {self.eps.min():g}, {done} converged)"
        )


def solve_path(
    mu: Any,
    nu: Any,
    eps_values: Any,
    *,
    reference: Reference | None = None,
    cost: Any = None,
    relax: Any = None,
    mass: Any = None,
    solver: Solver = Sinkhorn(),  # noqa: B008
    progress: Any = None,
) -> BridgePath:
    """Solve one problem at several values of eps: from the largest down, each from the potentials of those before it.

    Potentials are smooth in eps: a solve starts from those of the last two, continued linearly in eps.

    Parameters
    ----------
    mu, nu, reference, cost, relax, mass : as for `solve_bridge`.
    eps_values : numbers > 0 in any order, at least one; the results come in this order.
    solver : `Sinkhorn`, with options if wanted.  Two Gaussians under a linear reference are solved in closed form.
    progress : as for `solve_bridge`; each solve reports.

    Raises
    ------
    InvalidProblem : an argument is wrong.
    Unsupported : a problem that neither `Sinkhorn` nor `ClosedForm` takes, or another solver.

    Warns
    -----
    NotConverged : once for each eps at which the tolerance was not reached.

    Examples
    --------
    >>> import torch, sbot
    >>> x, y = torch.rand(30, 2), torch.rand(40, 2)
    >>> path = sbot.solve_path(x, y, [0.01, 0.1, 1.0])
    >>> bool((path.linear_cost.diff() > 0).all()), path.perplexity.shape
    (True, torch.Size([3, 30]))
    """
    numbers = _numbers(eps_values)
    with full_precision():
        problem = Problem.of(mu, nu, numbers[0], reference, cost, relax, mass)
        problems = {eps: problem.with_eps(eps) for eps in sorted(numbers, reverse=True)}
        solver = _fitting(solver, problem)
        done: list[PotentialBridge] = []
        for eps, part in problems.items():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                bridge = solver.solve(part, init=_start(part, done), progress=progress)
            for warning in caught:
                warnings.warn(f"at eps = {eps:g}: {warning.message}", warning.category, stacklevel=2)
            assert isinstance(bridge, PotentialBridge)
            done.append(bridge)
    found = dict(zip(problems, done, strict=True))
    return BridgePath(tuple(found[eps] for eps in numbers))


def _numbers(eps_values: Any) -> list[float]:
    if isinstance(eps_values, Tensor) and eps_values.ndim == 1:
        eps_values = eps_values.tolist()
    try:
        listed = [] if isinstance(eps_values, str) else list(eps_values)
    except TypeError:
        listed = []
    if not listed or any(isinstance(eps, str) for eps in listed):
        raise InvalidProblem(f"eps_values is {eps_values!r}; give a sequence of numbers > 0, such as [1.0, 0.3, 0.1]")
    return [float(check_eps(as_number(eps, "eps"))) for eps in listed]


def _fitting(solver: Any, problem: Problem) -> Solver:
    if not isinstance(solver, (Sinkhorn, ClosedForm)):
        name = type(solver).__name__ if isinstance(solver, Solver) else repr(solver)
        raise Unsupported(
            f"solver is {name}; a path is solved by sbot.Sinkhorn(...), or in closed form between Gaussians"
        )
    refusals = []
    for candidate in (solver, ClosedForm()):
        refusal = candidate.accepts(problem)
        if refusal is None:
            return candidate
        refusals.append(f"{type(candidate).__name__}: {refusal}")
    raise Unsupported("no solver takes this path:\n" + "\n".join(dict.fromkeys(refusals)))


def _start(problem: Problem, done: list[PotentialBridge]) -> PotentialBridge | None:
    """A bridge to start from: g continued linearly in eps from the last two solutions."""
    if not done or not isinstance(problem.nu, Discrete):
        return None
    last = done[-1]
    g = _dual(last)
    if len(done) > 1:
        before = done[-2]
        share = (problem.eps - last.problem.eps) / (last.problem.eps - before.problem.eps)
        share = min(share, 1.0)  # no further than the last two are apart: what is guessed beyond that is noise
        g = g + share * (g - _dual(before))
    assert isinstance(last.phi, Atoms) and isinstance(last.psi, Atoms)
    weights = problem.nu.weights.detach()
    log_psi = torch.where(weights > 0, weights.log() + g / problem.eps, -torch.inf) + problem.log_normaliser()
    return PotentialBridge(problem, last.phi, Atoms(last.psi.points, log_psi, last.psi.values), last.report)


def _dual(bridge: PotentialBridge) -> Tensor:
    assert isinstance(bridge.coupling, DiscreteCoupling)
    return bridge.coupling.dual_values()[1]


def _information(bridge: Bridge) -> Tensor:
    assert isinstance(bridge, PotentialBridge)
    return bridge.coupling.information().to(bridge.problem.result_dtype)
