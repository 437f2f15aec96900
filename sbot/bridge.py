"""The result of every solver: one class of methods, whatever found the bridge."""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, ParamSpec, SupportsIndex, TypeVar, final

import torch
from torch import Tensor

from . import io
from .arrays import HALF, as_count, as_index, as_number, as_tensor, require_finite
from .bounds import Bounds
from .costs import MatrixCost
from .errors import InvalidProblem, NumericalError, Unsupported
from .linalg import full_precision
from .measures import Discrete, Measure, Sampler
from .potentials import Tilted
from .problem import Problem
from .rounding import ATOMS_ONLY, FeasiblePlan, SparsePlan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Times nearer than this to an end are refused: the noise left there is beyond what a dtype can hold.
NEAR = 1e-15

P = ParamSpec("P")
R = TypeVar("R")


@final
@dataclass(frozen=True)
class Report:
    """What a solver did, and how far it got.

    Attributes
    ----------
    solver : the solver as it was called.
    converged : whether ``error <= tolerance`` was reached.
    reason : why it stopped: "tolerance", "max_iter", "stalled" (rounding), "precision" (the dtype
        cannot resolve eps), or "exact".
    iterations : number of iterations (for Sinkhorn, pairs of half-steps).
    error : relative L1 error of both marginals, summed; of a batch, that of the problem furthest from its tolerance.  Of a
        partial plan: violation of bounds, slackness and mass.
    errors, tolerances : those of each problem of a batch, in row-major order; empty for one problem.
    tolerance : what was aimed at; never below what the dtype can reach.  Of a batch, that of the same problem.
    history : ``(iteration, eps, error)`` at each check; the largest eps of a batch.
    seconds : wall time.
    notes : what was done to the input or to the settings.
    """

    solver: str
    converged: bool
    reason: str
    iterations: int = 0
    error: float = 0.0
    tolerance: float = 0.0
    history: tuple[tuple[int, float, float], ...] = ()
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    errors: tuple[float, ...] = ()
    tolerances: tuple[float, ...] = ()

    def __str__(self) -> str:
        state = "converged" if self.converged else "NOT converged"
        lines = [
            f"{self.solver}: {state} ({self.reason}) after {self.iterations} iterations, {self.seconds:.2f} s",
            f"marginal error {self.error:.2e} (tolerance {self.tolerance:.2e})",
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


@final
@dataclass(frozen=True)
class DualPotential:
    """A dual potential in cost units: a function of points, and its values at the atoms of a discrete measure.

    ``f(x)`` is defined everywhere, off the support by the c-transform of the other potential.
    """

    _function: Callable[[Tensor], Tensor] = field(repr=False)
    _values: Callable[[], Tensor] = field(repr=False)

    def __call__(self, x: Any) -> Tensor:
        """At ``x`` ``(*b, n, d)``, as ``(*b, n)``."""
        return self._function(x)

    @property
    def values(self) -> Tensor:
        """At the atoms, ``(*b, n)``; raises `Unsupported` for a measure without atoms."""
        return self._values()


@final
class Potentials(NamedTuple):
    """The pair of dual potentials; ``P = exp((f + g - C) / eps) mu nu``."""

    f: DualPotential
    g: DualPotential


def narrow(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to a half precision; a number beyond its range is an error, not an infinity."""
    out = value if not value.dtype.is_floating_point else value.to(dtype)
    if bool((torch.isinf(out) & torch.isfinite(value)).any()):
        raise NumericalError(f"a result is beyond the range of {dtype}; use bridge.to(dtype=torch.float32)")
    return out


def in_result_dtype(
    method: Callable[Concatenate[Any, P], R],
) -> Callable[Concatenate[Any, P], R]:
    """Return tensors in the dtype the caller gave, where that is a half precision computed in float32."""

    @functools.wraps(method)
    def cast(self: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        with full_precision():
            out: Any = method(self, *args, **kwargs)
        dtype = self.problem.result_dtype
        if dtype not in HALF:
            return out
        if isinstance(out, tuple):
            return tuple(narrow(part, dtype) for part in out)  # type: ignore[return-value]
        return narrow(out, dtype) if isinstance(out, Tensor) else out  # type: ignore[return-value]

    return cast  # type: ignore[return-value]


class Bridge(ABC):
    """A Schrödinger bridge: a process on [0, 1] from mu to nu, nearest to the reference.

    Times are numbers in [0, 1]; points are ``(*b, n, d)`` tensors or arrays.  Everything that draws takes a
    ``generator``.  What does not exist for a problem raises `Unsupported` and names the alternative.

    Attributes
    ----------
    problem : the problem that was solved.
    report : what the solver did.
    """

    problem: Problem
    report: Report

    # ---- what a kind of bridge has to say ------------------------------------------------------------------------

    @abstractmethod
    def condition(self, x: Any = None, s: float = 0.0) -> Tilted:
        """The law of ``X_1`` given ``X_s = x``: `log_mass`, `mean`, `sample`; ``x=None`` means the atoms of mu."""

    @abstractmethod
    def drift(self, t: float, x: Any) -> Tensor:
        """Drift of the bridge, ``dX = drift dt + sqrt(eps) B dW``, ``(*b, n, d)``."""

    @abstractmethod
    def reverse_drift(self, t: float, x: Any) -> Tensor:
        """Drift of the bridge run backwards from nu: ``Y_s = X_{1-s}``, ``dY = reverse_drift(1 - s, Y) ds + ...``."""

    @abstractmethod
    def log_prob(self, t: float, x: Any) -> Tensor:
        """Log-density of ``X_t`` at ``x``, ``(*b, n)``."""

    @abstractmethod
    def plan(self, rows: Any = None) -> Any:
        """The plan: ``(*b, n, m)`` for atoms (``rows`` picks some), a `Gaussian` on ``R^{2d}`` for Gaussians.

        The dense plan carries no gradient; `cost` does, and so does the plan of `PotentialBridge.differentiable`.
        """

    @abstractmethod
    def potentials(self) -> Potentials:
        """The dual potentials f and g, in cost units."""

    @abstractmethod
    def cost(self) -> Tensor:
        """``<P, C> + eps KL(P | mu x nu)`` (plus ``rho KL`` of relaxed marginals), ``(*b,)``."""

    @abstractmethod
    def linear_cost(self) -> Tensor:
        """``<P, C>``, ``(*b,)``."""

    @abstractmethod
    def gap(self) -> Tensor:
        """How far `cost` can be from the optimum, ``(*b,)``, never negative."""

    @abstractmethod
    def sample_paths(self, n: int, times: Any, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` paths at the given increasing times, ``(*b, n, len(times), d)``."""

    @abstractmethod
    def sample_pairs(
        self, n: int, *, generator: torch.Generator | None = None, replace: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Draw ``n`` pairs ``(X_0, X_1)`` from the plan, each ``(*b, n, d)``."""

    @abstractmethod
    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Bridge:
        """The same bridge in another dtype or on another device."""

    @abstractmethod
    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What `save` writes: plain data and tensors."""

    # ---- batches ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of problems along the first batch dimension; raises `InvalidProblem` for a bridge of one problem."""
        return self._batch()[0]

    def __bool__(self) -> bool:
        return True  # a bridge without batch dimensions has no length

    def __getitem__(self, index: Any) -> Bridge:
        """The bridge of one problem of a batch, without padding, as if it had been solved alone.

        ``index`` is an integer, or a tuple for several batch dimensions; fewer than there are give the bridge of a smaller
        batch.  Raises `IndexError` beyond the batch, `InvalidProblem` for anything else and for a bridge of one problem.
        """
        batch = self._batch()
        given = index if isinstance(index, tuple) else (index,)
        if not 1 <= len(given) <= len(batch):
            raise InvalidProblem(
                f"the index {index!r} has {len(given)} parts; give 1 to {len(batch)} for the batch {batch}"
            )
        place = []
        for part, size in zip(given, batch, strict=False):
            if isinstance(part, bool) or not isinstance(part, SupportsIndex):
                raise InvalidProblem(
                    f"the index is {index!r}; give an integer, or a tuple of integers, for the batch {batch}"
                )
            k = part.__index__()
            if not -size <= k < size:
                raise IndexError(f"there is no problem {index!r} in a batch {batch}")
            place.append(k % size)
        return self._pick(tuple(place))

    def __iter__(self) -> Iterator[Bridge]:
        return (self[k] for k in range(len(self)))

    def _batch(self) -> tuple[int, ...]:
        if not self.problem.batch_shape:
            raise InvalidProblem("the bridge is of one problem, not of a batch; use it as it is")
        return self.problem.batch_shape

    def _pick(self, index: tuple[int, ...]) -> Bridge:
        raise Unsupported(f"a {type(self).__name__} has no parts; solve the problems one by one")

    # ---- what exists between atoms only ----------------------------------------------------------------------------

    def round(self) -> FeasiblePlan:
        """A plan with exactly the marginals of mu and nu."""
        raise Unsupported(ATOMS_ONLY)

    def bounds(self) -> Bounds:
        """Bounds on unregularised transport."""
        raise Unsupported(ATOMS_ONLY)

    def sample_indices(
        self, n: int, *, generator: torch.Generator | None = None, replace: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Draw ``n`` pairs of atoms from the plan by their numbers, each ``(*b, n)``."""
        raise Unsupported(ATOMS_ONLY)

    def sparse_plan(self, mass: float = 0.99, *, max_per_row: int | None = None) -> SparsePlan:
        """The largest entries of the plan."""
        raise Unsupported(ATOMS_ONLY)

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """The ``k`` largest entries of each row and their columns, each ``(*b, n, k)``."""
        raise Unsupported(ATOMS_ONLY)

    def assignment(self) -> Tensor:
        """An atom of nu for each atom of mu, ``(n,)``."""
        raise Unsupported(ATOMS_ONLY)

    def perplexity(self) -> Tensor:
        """How many atoms of nu each atom of mu is spread over, ``(*b, n)``."""
        raise Unsupported(ATOMS_ONLY)

    def apply(self, v: Any, *, transpose: bool = False) -> Tensor:
        """``P v``, or ``P' v``."""
        raise Unsupported(ATOMS_ONLY)

    def differentiable(self, *, unroll: int | None = None) -> Bridge:
        """The same bridge, with derivatives in the data."""
        raise Unsupported("derivatives in the data are known for plans between atoms only; see solver=sbot.Sinkhorn()")

    # ---- what follows from it, once ------------------------------------------------------------------------------

    @in_result_dtype
    def transport(self, x: Any = None) -> Tensor:
        """The entropic map ``E[X_1 | X_0 = x]``, ``(*b, n, d)``; ``x=None`` means the atoms of mu, 0 at padding."""
        mean, mu = self.condition(x).mean, self.problem.mu
        return mu.blank(mean, 1) if x is None and isinstance(mu, Discrete) else mean

    def interpolate(self, t: float, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` samples of ``X_t``, ``(*b, n, d)``."""
        paths = self.sample_paths(n, [self._time(t)], generator=generator)
        return paths.select(-1 - len(self.problem.mu.event_shape), 0)

    def marginal(self, t: float) -> Measure:
        """The law of ``X_t`` as a measure."""
        time = self._time(t)
        return Sampler(
            lambda n, generator: self.interpolate(time, n, generator=generator),
            self.problem.mu.event_shape,
            like=torch.empty(0, dtype=self.problem.result_dtype, device=self.problem.device),
            batch_shape=self.problem.batch_shape,
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write the bridge to a safetensors file, atomically; `sbot.load` reads it."""
        header, tensors = self.state()
        io.write(path, "bridge", header, tensors)

    def plot(self, kind: str = "auto", **options: Any) -> Figure:
        """Draw the bridge: "plan", "paths", "marginals" or "convergence"; "auto" takes the first that exists."""
        from . import plot

        return plot.draw(self, kind, **options)

    def __repr__(self) -> str:
        p = self.problem
        state = "converged" if self.report.converged else "NOT converged"
        return f"{type(self).__name__}({p.mu!r} -> {p.nu!r}, eps={p.said_eps}, {p.reference!r}, {state})"

    # ---- the door for queries ------------------------------------------------------------------------------------

    def _time(self, t: Any, name: str = "t") -> float:
        time = as_number(t, name)
        if not 0 <= time <= 1:
            raise InvalidProblem(f"{name} is {time}; times lie in [0, 1]")
        if 0 < time < NEAR or NEAR > 1 - time > 0:
            raise InvalidProblem(f"{name} is {time!r}, within {NEAR:.0e} of an end; give the end itself, 0 or 1")
        return time

    def _times(self, times: Any) -> list[float]:
        if not isinstance(times, (list, tuple)):
            times = (
                as_tensor(times, "times", like=torch.zeros((), dtype=torch.float64, device="cpu")).flatten().tolist()
            )
        checked = [self._time(t, "times") for t in times]
        if not checked or any(b < a for a, b in itertools.pairwise(checked)):
            raise InvalidProblem(f"times are {checked}; give at least one, in increasing order")
        return checked

    def _points(self, x: Any, name: str = "x") -> Tensor:
        """Points as the computation wants them; the numbers of atoms where the cost is a matrix."""
        p = self.problem
        if isinstance(p.cost, MatrixCost):
            what = f"the cost is a matrix, known only between atoms: the atoms in {name}"
            return as_index(x, p.cost.values.shape[-2 if name == "x" else -1], what, p.device)
        points = as_tensor(x, name, like=torch.empty((), dtype=p.dtype, device=p.device))
        if points.device != p.device:
            raise InvalidProblem(f"{name} is on {points.device} and the bridge on {p.device}; move one of them")
        want = (*p.batch_shape, "n", *p.mu.event_shape)
        if points.ndim != len(want) or any(a not in (b, "n") for a, b in zip(want, points.shape, strict=True)):
            shape = "(" + ", ".join(str(size) for size in want) + ")"
            raise InvalidProblem(f"{name} has shape {tuple(points.shape)}; give {shape}")
        points = require_finite(points.to(p.dtype), name, 1 + len(p.mu.event_shape))
        if points.numel() and float(points.detach().abs().max()) > math.sqrt(torch.finfo(p.dtype).max) / 2**10:
            raise InvalidProblem(f"{name} reaches so far that its square overflows {p.dtype}; rescale, or use float64")
        if isinstance(p.mu, Discrete) and isinstance(p.nu, Discrete):
            sites = p.sites
            p.cost.check(points if name == "x" else sites[0], points if name == "y" else sites[1])
        return points

    @staticmethod
    def _count(n: Any) -> int:
        return as_count(n, "n")
