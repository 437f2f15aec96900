"""What is asked: two measures, eps, a reference.  Everything a caller can get wrong is found here, once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from .arrays import HALF, as_number, as_tensor, in_problem, require_finite
from .costs import Cost, MatrixCost
from .errors import InvalidProblem
from .feasibility import by_pattern
from .measures import Discrete, Measure, as_measure
from .reference import Reference, Static, as_reference

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
    eps : variance of the reference path over [0, 1], in the units of the cost.
    reference : the reference process, or a static cost.
    relax : ``(rho_mu, rho_nu)``, the strength of ``rho KL(marginal | given)``; infinite for a hard constraint.
    result_dtype : dtype of what a bridge returns; half precisions are computed in float32 and cast back.
    notes : what was done to the input, for the report.
    mass : what a partial plan carries, ``(*b,)`` in float64: the marginals are then bounds; None where they are not.
    """

    mu: Measure
    nu: Measure
    eps: float
    reference: Reference
    relax: tuple[float, float] = (INF, INF)
    result_dtype: torch.dtype = torch.float64
    notes: tuple[str, ...] = ()
    mass: Tensor | None = None

    @classmethod
    def of(
        cls,
        mu: Any,
        nu: Any,
        eps: Any,
        reference: Any = None,
        cost: Any = None,
        relax: Any = None,
        mass: Any = None,
    ) -> Problem:
        """Convert and check every argument; raises `InvalidProblem` with the argument, the fault and the way out."""
        epsilon = _check_eps(eps)
        rho = _check_relax(relax)
        ref = as_reference(reference, cost)
        charge = ref.cost()
        bins = charge.values.ndim - 1 if isinstance(charge, MatrixCost) else 0
        a, b = as_measure(mu, "mu", histogram=bins), as_measure(nu, "nu", histogram=bins)
        _check_devices(a, b, charge)
        sources = [a.source_dtype, b.source_dtype]
        dtypes = [a.dtype, b.dtype]
        if isinstance(charge, MatrixCost):
            sources.append(charge.source_dtype)
            dtypes.append(charge.values.dtype)
        result, dtype = _promote(sources), _promote(dtypes)
        notes = [f"computed in float32, results returned as {result}"] if result in HALF else []
        a, b = (m if m.dtype == dtype else m.to(dtype=dtype) for m in (a, b))
        if isinstance(charge, MatrixCost) and charge.values.dtype != dtype:
            ref = Static(MatrixCost(charge.values.to(dtype)))
        least = 4 / torch.finfo(dtype).max
        if not least < epsilon < 1 / least:
            raise InvalidProblem(
                f"eps is {epsilon}, outside the range of {dtype}; rescale the points and eps, or use float64"
            )
        problem = cls(a, b, epsilon, ref, rho, result, tuple(notes))
        problem._check_shapes()
        coarsest = max(torch.finfo(source).eps for source in sources)
        if mass is not None:
            problem = problem._partial(mass, coarsest)
        elif rho == (INF, INF):
            problem = problem._balance(coarsest)
        problem._check_feasible()
        return problem

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
    def hard(self) -> bool:
        """Whether the plan has exactly the marginals mu and nu."""
        return self.relax == (INF, INF) and self.mass is None

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
            reference = Static(MatrixCost(self.cost.values.to(dtype=dtype, device=device)))
        moved = replace(
            self,
            mu=self.mu.to(dtype=dtype, device=device),
            nu=self.nu.to(dtype=dtype, device=device),
            reference=reference,
            mass=None if self.mass is None else self.mass.to(device=device),
        )
        # what was equal in the old dtype is made equal in the new one
        coarsest = max(torch.finfo(self.dtype).eps, torch.finfo(moved.dtype).eps)
        return moved._balance(coarsest) if self.hard else moved

    # ---- checks ----------------------------------------------------------------------------------------------------

    def _site(self, measure: Measure) -> Tensor:
        assert isinstance(measure, Discrete)
        if isinstance(self.cost, MatrixCost):
            return torch.arange(measure.n, device=measure.device)
        assert measure.points is not None
        return measure.points

    def _check_shapes(self) -> None:
        mu, nu = self.mu, self.nu
        if mu.batch_shape != nu.batch_shape:
            raise InvalidProblem(
                f"mu has batch dimensions {mu.batch_shape} and nu {nu.batch_shape}; give both the same (nothing broadcasts)"
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
        if tuple(values.shape) != want:
            raise InvalidProblem(
                f"the cost matrix has shape {tuple(values.shape)} for {mu.n} and {nu.n} atoms; give shape {want}"
            )
        if not cost.forbids:
            return
        allowed = torch.isfinite(values)
        for name, here, there, axis in (("mu", mu, nu, -1), ("nu", nu, mu, -2)):
            reachable = (allowed & (there.weights > 0).unsqueeze(-2 if axis == -1 else -1)).any(axis)
            lost = torch.nonzero(~reachable & (here.weights > 0))
            if len(lost):
                raise InvalidProblem(lost_atom(name, lost[0].tolist()))

    def _check_feasible(self) -> None:
        """Masses that the allowed pairs cannot carry are refused, where the pattern is small enough to tell."""
        cost = self.cost
        if not isinstance(cost, MatrixCost) or not cost.forbids or self.relax != (INF, INF):
            return
        assert isinstance(self.mu, Discrete) and isinstance(self.nu, Discrete)
        found = by_pattern(torch.isfinite(cost.values), self.mu.weights, self.nu.weights, self.mass, self.slack)
        if found is not None:
            raise InvalidProblem(str(found))

    @property
    def slack(self) -> float:
        """Relative difference of masses that the rounding of the input explains."""
        return max(_slack(torch.finfo(side.source_dtype).eps) for side in (self.mu, self.nu))

    def _partial(self, mass: Any, rounding: float) -> Problem:
        """The problem with a prescribed ``mass``, at most that of either side."""
        if self.relax != (INF, INF):
            raise InvalidProblem("mass= bounds both marginals and relax= weighs them; drop one of them")
        if not isinstance(self.mu, Discrete) or not isinstance(self.nu, Discrete):
            raise InvalidProblem(
                "a prescribed mass needs atoms on both sides; draw some: sbot.Discrete(mu.sample(4096))"
            )
        s = as_tensor(mass, "mass", like=self.mu.weights.double())
        require_finite(s, "mass")
        if s.device != self.device or tuple(s.shape) not in {(), self.batch_shape}:
            where = f"shape {tuple(s.shape)} on {s.device}"
            raise InvalidProblem(f"mass has {where}; give a number, or one for each problem: {self.batch_shape}")
        s = s.double().expand(self.batch_shape)
        most = torch.minimum(self.mu.weights.detach().double().sum(-1), self.nu.weights.detach().double().sum(-1))
        wrong = torch.nonzero(((s <= 0) | (s > most * (1 + _slack(rounding)))).flatten())
        if len(wrong):
            k = int(wrong[0])
            asked, whole = float(s.flatten()[k]), float(most.flatten()[k])
            held = [float(side.mass.flatten()[k]) for side in (self.mu, self.nu)]
            raise InvalidProblem(
                f"mass is {asked:.9g}{self._which(k)}, and mu and nu hold {held[0]:.9g} and {held[1]:.9g}; "
                f"give 0 < mass <= {whole:.9g}"
            )
        return replace(self, mass=torch.minimum(s, most))

    def _which(self, k: int) -> str:
        """The k-th problem of the batch, in words."""
        shape = self.batch_shape
        return in_problem([int(i) for i in torch.unravel_index(torch.tensor(k), shape)]) if shape else ""

    def _balance(self, rounding: float) -> Problem:
        """Equal masses up to what the input's ``rounding`` explains are made equal; others are refused."""
        if not isinstance(self.mu, Discrete) or not isinstance(self.nu, Discrete):
            return self
        a, b = self.mu.weights.detach().double().sum(-1), self.nu.weights.detach().double().sum(-1)
        apart = ((a - b).abs() / torch.maximum(a, b)).flatten()
        k, worst = int(apart.argmax()), float(apart.max())
        which = self._which(k)
        if worst > _slack(rounding):
            raise InvalidProblem(
                f"sum(mu) = {float(a.flatten()[k]):.9g} and sum(nu) = {float(b.flatten()[k]):.9g}{which}: a balanced problem "
                "needs equal masses; normalise the weights, relax the marginals: relax=(rho_mu, rho_nu), or carry a part: mass="
            )
        if worst <= 4 * torch.finfo(self.dtype).eps:
            return self  # as equal as sums get
        nu = Discrete(self.nu.points, self.nu.weights * (a / b)[..., None].to(self.dtype))
        note = f"masses differed by {worst:.1e} relative: nu was rescaled to the mass of mu in float64"
        notes = self.notes if worst < 16 * rounding else (*self.notes, note)
        return replace(self, nu=nu, notes=notes)


def lost_atom(name: str, index: list[int]) -> str:
    """What is wrong with an atom, ``[*b, i]``, that no pair reaches."""
    return (
        f"atom {index[-1:]} of {name}{in_problem(index[:-1])} has weight but every pair it may take is forbidden "
        "(+inf) or empty; allow a pair or drop the atom"
    )


def _slack(rounding: float) -> float:
    """Relative difference of two masses that is taken for rounding, for input of this machine epsilon."""
    return 1e-8 if rounding < 1e-8 else 1e-5 if rounding < 1e-5 else 1e-2


def _promote(dtypes: list[torch.dtype]) -> torch.dtype:
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result


def _check_eps(eps: Any) -> float:
    if isinstance(eps, str):
        raise InvalidProblem(f"eps is the string {eps!r}; give a number > 0, such as a hundredth of the mean cost")
    number = as_number(eps, "eps")
    if number == 0:
        raise InvalidProblem("eps is 0, which is unregularised transport; give eps > 0, or use ot.emd from POT")
    if number < 0 or number == INF:
        raise InvalidProblem(f"eps is {number}; give a finite number > 0 in the units of the cost")
    return number


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
