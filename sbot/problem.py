"""What is asked: two measures, eps, a reference.  Everything a caller can get wrong is found here, once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from .arrays import HALF, as_number
from .costs import Cost, MatrixCost
from .errors import InvalidProblem
from .measures import Discrete, Gaussian, Measure, as_measure, suffix
from .reference import Reference, Static, as_reference
from .spread import natural_eps

INF = math.inf


@final
@dataclass(frozen=True)
class Problem:
    """A validated problem; make it with `Problem.of`.

    Examples
    --------
    >>> import torch, sbot
    >>> sbot.Problem.of(torch.zeros(3, 2), torch.ones(4, 2), 0.5).reference
    Brownian()

    Attributes
    ----------
    mu, nu : the marginals, of one dtype, device and batch shape.
    eps : variance of the reference path over [0, 1], in the units of the cost; the number that "auto" gave.
    reference : the reference process, or a static cost.
    relax : ``(rho_mu, rho_nu)``, the strength of ``rho KL(marginal | given)``; infinite for a hard constraint.
    result_dtype : dtype of what a bridge returns; half precisions are computed in float32 and cast back.
    notes : what was done to the input, for the report.
    """

    mu: Measure
    nu: Measure
    eps: float
    reference: Reference
    relax: tuple[float, float] = (INF, INF)
    result_dtype: torch.dtype = torch.float64
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, mu: Any, nu: Any, eps: Any, reference: Any = None, cost: Any = None, relax: Any = None) -> Problem:
        """Convert and check every argument; raises `InvalidProblem` with the argument, the fault and the way out."""
        automatic = isinstance(eps, str) and eps == "auto"
        epsilon = 1.0 if automatic else check_eps(eps)
        rho = _check_relax(relax)
        ref = as_reference(reference, cost)
        charge = ref.cost()
        a, b = (
            as_measure(side, name, histogram=_histogram(side, charge, axis, name))
            for side, name, axis in ((mu, "mu", -2), (nu, "nu", -1))
        )
        _check_devices(a, b, charge)
        sources = [a.source_dtype, b.source_dtype]
        dtypes = [a.dtype, b.dtype]
        if isinstance(charge, MatrixCost):
            sources.append(charge.source_dtype)
            dtypes.append(charge.values.dtype)
        result, dtype = _promote(sources), _promote(dtypes)
        notes = [f"computed in float32, results returned as {result}"] if result in HALF else []
        a, b = (m if m.dtype == dtype else m.to(dtype=dtype) for m in (a, b))
        a, b, batch = _side_by_side(a, b, charge)
        if isinstance(charge, MatrixCost) and (charge.values.dtype != dtype or charge.batch_shape != batch):
            ref = Static(_fitted(charge, batch, dtype=dtype))
        _check_range(epsilon, dtype)
        problem = cls(a, b, epsilon, ref, rho, result, tuple(notes))
        problem._check_shapes()
        coarsest = max(torch.finfo(source).eps for source in sources)
        problem = problem._balance(coarsest) if rho == (INF, INF) else problem
        return problem._automatic() if automatic else problem

    def with_eps(self, eps: Any) -> Problem:
        """The same problem with another eps; raises `InvalidProblem` as `of` does."""
        epsilon = check_eps(eps)
        _check_range(epsilon, self.dtype)
        return replace(self, eps=epsilon)

    # ---- what solvers and bridges read -----------------------------------------------------------------------------

    @cached_property
    def cost(self) -> Cost:
        """The cost the reference charges."""
        return self.reference.cost()

    @property
    def sites(self) -> tuple[Tensor, Tensor]:
        """Where the atoms are, as the cost wants them: points, or their numbers where the cost is a matrix."""
        return self._site(self.mu), self._site(self.nu)

    @property
    def values(self) -> tuple[Tensor | None, Tensor | None]:
        """The points of the atoms, None for a histogram."""
        assert isinstance(self.mu, Discrete) and isinstance(self.nu, Discrete)
        return self.mu.points, self.nu.points

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading batch dimensions."""
        return self.mu.batch_shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the computation."""
        return self.mu.dtype

    @property
    def device(self) -> torch.device:
        """Device of the computation."""
        return self.mu.device

    def log_normaliser(self) -> Tensor:
        """``log Z`` of the reference's transition density, see `Reference.log_normaliser`."""
        like = torch.empty((), dtype=self.dtype, device=self.device)
        return self.reference.log_normaliser(
            math.prod(self.mu.event_shape) if self.mu.event_shape else 0, self.eps, like
        )

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Problem:
        """The same problem in another dtype or on another device."""
        reference = self.reference
        if isinstance(self.cost, MatrixCost):
            reference = Static(_fitted(self.cost, self.batch_shape, dtype=dtype, device=device))
        moved = replace(
            self,
            mu=self.mu.to(dtype=dtype, device=device),
            nu=self.nu.to(dtype=dtype, device=device),
            reference=reference,
        )
        # what was equal in the old dtype is made equal in the new one
        coarsest = max(torch.finfo(self.dtype).eps, torch.finfo(moved.dtype).eps)
        return moved._balance(coarsest) if self.relax == (INF, INF) else moved

    def pick(self, index: tuple[int, ...]) -> Problem:
        """One problem of a batch, without padding; a shorter ``index`` picks along the first batch dimensions."""
        assert isinstance(self.mu, (Discrete, Gaussian)) and isinstance(self.nu, (Discrete, Gaussian))
        mu, nu, reference = self.mu.pick(index), self.nu.pick(index), self.reference
        if isinstance(self.cost, MatrixCost) and isinstance(mu, Discrete) and isinstance(nu, Discrete):
            reference = Static(self.cost.pick(index, mu.n, nu.n))
        return replace(self, mu=mu, nu=nu, reference=reference, eps=_part(self.eps, index))

    # ---- checks ----------------------------------------------------------------------------------------------------

    def _site(self, measure: Measure) -> Tensor:
        assert isinstance(measure, Discrete)
        if isinstance(self.cost, MatrixCost):
            return torch.arange(measure.n, device=measure.device)
        assert measure.points is not None
        return measure.points

    def _automatic(self) -> Problem:
        """With eps from the spread of the cost, and a note that says so."""
        each, of_what = natural_eps(self.mu, self.nu, self.cost)
        problem = self.with_eps(float(each.mean()))
        over = "; the mean over the batch" if self.batch_shape else ""
        note = f'eps="auto": {problem.eps:.3g}, a twentieth of {of_what}{over}'
        return replace(problem, notes=(*self.notes, note))

    def _check_shapes(self) -> None:
        mu, nu = self.mu, self.nu
        if mu.batch_shape != nu.batch_shape:
            raise InvalidProblem(
                f"mu has batch dimensions {mu.batch_shape} and nu {nu.batch_shape}; give both the same, or leave out leading "
                "ones where the problems share a measure (sizes do not broadcast)"
            )
        if isinstance(self.cost, MatrixCost):
            self._check_matrix(self.cost)
            return
        for name, measure in (("mu", mu), ("nu", nu)):
            if measure.event_shape == ():
                raise InvalidProblem(f"{name} is a histogram without points; give the cost matrix: cost=M")
        if mu.event_shape != nu.event_shape:
            raise InvalidProblem(
                f"mu has samples of shape {mu.event_shape} and nu of shape {nu.event_shape}; "
                "both must live in the same space, or give a cost matrix: cost=M"
            )
        self.reference.check(math.prod(mu.event_shape))
        if isinstance(mu, Discrete) and isinstance(nu, Discrete):
            self.cost.check(*self.sites)

    def _check_matrix(self, cost: MatrixCost) -> None:
        mu, nu, values = self.mu, self.nu, cost.values
        if not isinstance(mu, Discrete) or not isinstance(nu, Discrete):
            raise InvalidProblem(
                "a cost matrix couples two histograms; pass weights (n,) and (m,), or Discrete measures"
            )
        want = (*mu.batch_shape, mu.n, nu.n)
        if (*cost.batch_shape, *values.shape[-2:]) != want:
            shared = f", or {want[-2:]} for one that the problems share" if mu.batch_shape else ""
            raise InvalidProblem(
                f"the cost matrix has shape {tuple(values.shape)} for {mu.n} and {nu.n} atoms; give shape {want}{shared}"
            )
        if not cost.forbids:
            return
        allowed = torch.isfinite(values).to(self.dtype)
        for name, here, there, table in (("mu", mu, nu, allowed), ("nu", nu, mu, allowed.mT)):
            live = (there.weights.detach() > 0).to(self.dtype)
            # one product for all problems that share the matrix, without a copy of it for each
            reachable = (live @ table.mT if table.ndim == 2 else (table @ live[..., None])[..., 0]) > 0
            lost = torch.nonzero(~reachable & (here.weights > 0))
            if len(lost):
                raise InvalidProblem(
                    f"atom {lost[0].tolist()} of {name} has weight but every pair it may take is forbidden (+inf) or empty; "
                    "allow a pair or drop the atom"
                )

    def _balance(self, rounding: float) -> Problem:
        """Equal masses up to what the input's ``rounding`` explains are made equal; others are refused."""
        if not isinstance(self.mu, Discrete) or not isinstance(self.nu, Discrete):
            return self
        a, b = self.mu.weights.detach().double().sum(-1), self.nu.weights.detach().double().sum(-1)
        apart = ((a - b).abs() / torch.maximum(a, b)).flatten()
        k, worst = int(apart.argmax()), float(apart.max())
        which = f" in problem {k} of the batch" if self.batch_shape else ""
        if worst > (1e-8 if rounding < 1e-8 else 1e-5 if rounding < 1e-5 else 1e-2):
            raise InvalidProblem(
                f"sum(mu) = {float(a.flatten()[k]):.9g} and sum(nu) = {float(b.flatten()[k]):.9g}{which}: a balanced problem "
                "needs equal masses; normalise the weights, or relax the marginals: relax=(rho_mu, rho_nu)"
            )
        if worst <= 4 * torch.finfo(self.dtype).eps:
            return self  # as equal as sums get
        nu = self.nu.reweighted(self.nu.weights * (a / b)[..., None].to(self.dtype))
        note = f"masses differed by {worst:.1e} relative: nu was rescaled to the mass of mu in float64"
        notes = self.notes if worst < 16 * rounding else (*self.notes, note)
        return replace(self, nu=nu, notes=notes)


def _side_by_side(mu: Measure, nu: Measure, cost: Cost) -> tuple[Measure, Measure, tuple[int, ...]]:
    """Leading batch dimensions that a measure lacks are those of the others: it is shared by these problems.

    Sizes never broadcast, 1 least of all; what does not fit is left as it is, for `Problem._check_shapes`.
    """
    shapes = [
        mu.batch_shape,
        nu.batch_shape,
        *([tuple(cost.values.shape[:-2])] if isinstance(cost, MatrixCost) else []),
    ]
    batch = max(shapes, key=len)
    if not all(suffix(shape, batch) for shape in shapes[:2]):
        return mu, nu, mu.batch_shape
    mu, nu = (
        m.expand(batch) if isinstance(m, (Discrete, Gaussian)) and m.batch_shape != batch else m for m in (mu, nu)
    )
    return mu, nu, batch


def _fitted(
    cost: MatrixCost,
    batch: tuple[int, ...],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> MatrixCost:
    """The matrix in a dtype and on a device, for each problem of the batch where they share it."""
    moved = MatrixCost(cost.values.to(dtype=dtype, device=device))
    return moved.expand(batch) if suffix(moved.batch_shape, batch) else moved


def _histogram(side: Any, cost: Cost, axis: int, name: str) -> int:
    """Dimensions that an array has if it is the weights of a histogram, beside a cost matrix; 0 where it is points."""
    if not isinstance(cost, MatrixCost):
        return 0
    try:
        shape = tuple(np.shape(side)) if isinstance(side, (list, np.ndarray)) else tuple(getattr(side, "shape", ()))
    except ValueError:
        return 0  # not rectangular, which is refused elsewhere
    batch, n, dims = tuple(cost.values.shape[:-2]), cost.values.shape[axis], len(shape)
    if dims < 2:
        return 1
    weights, points = shape[-1] == n, shape[-2] == n
    if dims == len(batch) + 1:
        return dims if weights or not points else 0
    weights = weights and (suffix(batch, shape[:-1]) or suffix(shape[:-1], batch))
    if weights and points and dims == len(batch) + 2:
        raise InvalidProblem(
            f"{name} has shape {shape}, which may be {n} points or the weights of {n} histograms; "
            "say which: sbot.Discrete(points) or sbot.Discrete(None, weights)"
        )
    return dims if weights else 0


def _part(eps: Any, index: tuple[int, ...]) -> Any:
    """What a problem of a batch has of eps: the number for all, or its own."""
    if not isinstance(eps, Tensor) or not eps.ndim:
        return eps
    part = eps[index]
    return part if part.ndim else float(part)


def _promote(dtypes: list[torch.dtype]) -> torch.dtype:
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result


def check_eps(eps: Any) -> float:
    if isinstance(eps, str):
        raise InvalidProblem(f"eps is the string {eps!r}; give a number > 0 in the units of the cost, or 'auto'")
    number = as_number(eps, "eps")
    if number == 0:
        raise InvalidProblem("eps is 0, which is unregularised transport; give eps > 0, or use ot.emd from POT")
    if number < 0 or number == INF:
        raise InvalidProblem(f"eps is {number}; give a finite number > 0 in the units of the cost")
    return number


def _check_range(eps: float, dtype: torch.dtype) -> None:
    least = 4 / torch.finfo(dtype).max
    if not least < eps < 1 / least:
        raise InvalidProblem(f"eps is {eps}, outside the range of {dtype}; rescale the points and eps, or use float64")


def _check_relax(relax: Any) -> tuple[float, float]:
    if relax is None:
        return INF, INF
    pair = tuple(relax) if isinstance(relax, (tuple, list)) else (relax, relax)
    if len(pair) != 2:
        raise InvalidProblem(f"relax has {len(pair)} entries; give (rho_mu, rho_nu), infinite for a hard marginal")
    rho = (as_number(pair[0], "relax[0]"), as_number(pair[1], "relax[1]"))
    if min(rho) <= 0:
        raise InvalidProblem(f"relax is {rho}; give numbers > 0, infinite for a hard marginal")
    return rho


def _check_devices(mu: Measure, nu: Measure, cost: Cost) -> None:
    places = {"mu": mu.device, "nu": nu.device}
    if isinstance(cost, MatrixCost):
        places["cost"] = cost.values.device
    if len(set(places.values())) > 1:
        raise InvalidProblem(
            "the input lies on several devices ("
            + ", ".join(f"{name} on {place}" for name, place in places.items())
            + "); move all of it to one with .to(device)"
        )
