"""What is asked: two measures, eps, a reference.  Everything a caller can get wrong is found here, once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from . import linalg
from .arrays import HALF, as_number, as_tensor, in_problem, refuse_forward_mode, require_finite
from .costs import Cosine, Cost, Lp, MatrixCost
from .errors import InvalidProblem, Unsupported
from .feasibility import by_pattern
from .linalg import Eps
from .measures import Discrete, Gaussian, Measure, as_measure, suffix
from .reference import Reference, Static, as_reference
from .spread import natural_eps

INF = math.inf
#: What is said of a problem without a pair to go between; the argument says which of a batch.
NO_PAIR = "every pair of atoms that have weight is forbidden (+inf){}; allow some"


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
    eps : variance of the reference path over [0, 1], in the units of the cost: a number, or ``(*b,)`` with one for each
        problem of a batch; what "auto" gave.
    eps_leaf : the tensor that eps was given as, where it wants a gradient.
    reference : the reference process, or a static cost.
    relax : ``(rho_mu, rho_nu)``, the strength of ``rho KL(marginal | given)``; infinite for a hard constraint.
    result_dtype : dtype of what a bridge returns; half precisions are computed in float32 and cast back.
    notes : what was done to the input, for the report.
    mass : what a partial plan carries, ``(*b,)`` in float64: the marginals are then bounds; None where they are not.
    """

    mu: Measure
    nu: Measure
    eps: Eps
    reference: Reference
    relax: tuple[float, float] = (INF, INF)
    result_dtype: torch.dtype = torch.float64
    notes: tuple[str, ...] = ()
    eps_leaf: Tensor | None = None
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
        automatic = isinstance(eps, str) and eps == "auto"
        epsilon = 1.0 if automatic else check_eps(eps)
        rho = _check_relax(relax)
        ref = as_reference(reference, cost)
        charge = ref.cost()
        if isinstance(charge, MatrixCost) and (isinstance(cost, Cost) or reference is not None):
            charge.look_again()
        a, b = (
            as_measure(side, name, histogram=_histogram(side, charge, axis, name))
            for side, name, axis in ((mu, "mu", -2), (nu, "nu", -1))
        )
        _check_devices(a, b, charge, eps)
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
            ref = Static(fitted(charge, batch, dtype=dtype))
        epsilon, leaf = _settle_eps(epsilon, a)
        problem = cls(a, b, epsilon, ref, rho, result, tuple(notes), leaf)
        problem._check_shapes()
        coarsest = max(torch.finfo(source).eps for source in sources)
        if mass is not None:
            problem = problem._partial(mass, coarsest)
        elif rho == (INF, INF):
            problem = problem._balance(coarsest)
        problem._check_feasible()
        return problem._automatic() if automatic else problem

    def with_eps(self, eps: Any) -> Problem:
        """The same problem with another eps; raises `InvalidProblem` as `of` does."""
        epsilon, leaf = _settle_eps(check_eps(eps), self.mu)
        return replace(self, eps=epsilon, eps_leaf=leaf)

    # ---- what solvers and bridges read -----------------------------------------------------------------------------

    @cached_property
    def cost(self) -> Cost:
        """The cost the reference charges."""
        return self.reference.cost()

    @property
    def may_forbid(self) -> bool:
        """Whether the cost of a pair may be infinite."""
        if isinstance(self.cost, (Lp, Cosine)):
            return False
        return self.cost.forbids if isinstance(self.cost, MatrixCost) else self.cost.embed(*self.sites) is None

    @property
    def free_eps(self) -> Eps:
        """`eps` with its graph."""
        return self.eps if self.eps_leaf is None else self.eps_leaf

    @property
    def one_eps(self) -> float:
        """`eps` where it is one number; raises `Unsupported` for a batch with several."""
        if isinstance(self.eps, Tensor):
            raise Unsupported("each problem of the batch has its own eps; solve the problems one by one")
        return self.eps

    @property
    def said_eps(self) -> str:
        """`eps` in a few characters."""
        if not isinstance(self.eps, Tensor):
            return f"{self.eps:g}"
        return f"{float(self.eps.min()):g}..{float(self.eps.max()):g}"

    @cached_property
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

    def log_normaliser(self, eps: Eps | None = None) -> Tensor:
        """``log Z`` of the reference's transition density, see `Reference.log_normaliser`; ``eps`` may be `free_eps`."""
        like = torch.empty((), dtype=self.dtype, device=self.device)
        return self.reference.log_normaliser(
            math.prod(self.mu.event_shape) if self.mu.event_shape else 0, self.eps if eps is None else eps, like
        )

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Problem:
        """The same problem in another dtype or on another device."""
        reference = self.reference
        if isinstance(self.cost, MatrixCost):
            reference = Static(fitted(self.cost, self.batch_shape, dtype=dtype, device=device))
        eps, leaf = self.eps, self.eps_leaf
        moved = replace(
            self,
            eps=eps.to(dtype=dtype, device=device) if isinstance(eps, Tensor) else eps,
            eps_leaf=None if leaf is None else leaf.to(dtype=dtype, device=device),
            mu=self.mu.to(dtype=dtype, device=device),
            nu=self.nu.to(dtype=dtype, device=device),
            reference=reference,
            mass=None if self.mass is None else self.mass.to(device=device),
        )
        # what was equal in the old dtype is made equal in the new one
        coarsest = max(torch.finfo(self.dtype).eps, torch.finfo(moved.dtype).eps)
        return moved._balance(coarsest) if self.hard else moved

    def pick(self, index: tuple[int, ...]) -> Problem:
        """One problem of a batch, without padding; a shorter ``index`` picks along the first batch dimensions."""
        assert isinstance(self.mu, (Discrete, Gaussian)) and isinstance(self.nu, (Discrete, Gaussian))
        mu, nu, reference = self.mu.pick(index), self.nu.pick(index), self.reference
        leaf = self.eps_leaf if self.eps_leaf is None or not self.eps_leaf.ndim else self.eps_leaf[index]
        if isinstance(self.cost, MatrixCost) and isinstance(mu, Discrete) and isinstance(nu, Discrete):
            reference = Static(self.cost.pick(index, mu.n, nu.n))
        mass = None if self.mass is None else self.mass[index]
        return replace(self, mu=mu, nu=nu, reference=reference, eps=_part(self.eps, index), eps_leaf=leaf, mass=mass)

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
        problem = self.with_eps(each if self.batch_shape else float(each))
        said = " to ".join(dict.fromkeys(f"{float(end):.3g}" for end in torch.aminmax(each)))
        note = f'eps="auto": {said}, a twentieth of {of_what}{" of each problem" if self.batch_shape else ""}'
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

    def _check_reach(self, cost: MatrixCost) -> None:
        """Atoms that may go nowhere are refused where their marginal is hard; elsewhere they stay where they are."""
        mu, nu, values = self.mu, self.nu, cost.values
        assert isinstance(mu, Discrete) and isinstance(nu, Discrete)
        allowed = torch.isfinite(values).to(self.dtype)
        sides = ("mu", "row", mu, nu, allowed, self.relax[0]), ("nu", "column", nu, mu, allowed.mT, self.relax[1])
        for name, line, here, there, table, rho in sides:
            live = (there.weights.detach() > 0).to(self.dtype)
            # one product for all problems that share the matrix, without a copy of it for each
            reachable = (live @ table.mT if table.ndim == 2 else (table @ live[..., None])[..., 0]) > 0
            lost = ~reachable & (here.weights > 0)
            if rho == INF and self.mass is None and bool(lost.any()):
                place = torch.nonzero(lost)[0].tolist()
                *which, index = place
                each = table.expand(*here.batch_shape, *table.shape[-2:])
                if bool(each[tuple(place)].any()):
                    raise InvalidProblem(lost_atom(name, place))
                raise InvalidProblem(
                    f"the cost matrix has no finite entry in {line} {index}{in_problem(which)}; every {line} needs a pair that "
                    "is allowed: drop the atom, allow one, or relax the marginals: relax="
                )
            closed = torch.nonzero(~(reachable & (here.weights > 0)).any(-1))
            if len(closed):
                raise InvalidProblem(NO_PAIR.format(in_problem(closed[0].tolist())))

    def _check_feasible(self) -> None:
        """Masses that the allowed pairs cannot carry are refused, where the pattern is small enough to tell."""
        cost = self.cost
        if not isinstance(cost, MatrixCost) or not cost.forbids:
            return
        self._check_reach(cost)
        if self.relax != (INF, INF):
            return
        assert isinstance(self.mu, Discrete) and isinstance(self.nu, Discrete)
        allowed = torch.isfinite(cost.values).expand(*self.batch_shape, self.mu.n, self.nu.n)
        found = by_pattern(allowed, self.mu.weights, self.nu.weights, self.mass, self.slack)
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
        return replace(self, mass=s if bool((s <= most).all()) else torch.minimum(s, most))

    def _which(self, k: int) -> str:
        """The k-th problem of the batch, in words."""
        shape = self.batch_shape
        return in_problem([int(i) for i in np.unravel_index(k, shape)]) if shape else ""

    def _balance(self, rounding: float) -> Problem:
        """Equal masses up to what the input's ``rounding`` explains are made equal; others are refused."""
        if not isinstance(self.mu, Discrete) or not isinstance(self.nu, Discrete):
            return self
        a, b = self.mu.weights.detach().double().sum(-1), self.nu.weights.detach().double().sum(-1)
        apart = ((a - b).abs() / torch.maximum(a, b)).flatten()
        worst = float(apart.max())
        if worst > _slack(rounding):
            k = int(apart.argmax())
            which = self._which(k)
            raise InvalidProblem(
                f"sum(mu) = {float(a.flatten()[k]):.9g} and sum(nu) = {float(b.flatten()[k]):.9g}{which}: a balanced problem "
                "needs equal masses; normalise the weights, relax the marginals: relax=(rho_mu, rho_nu), or carry a part: mass="
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


def fitted(
    cost: MatrixCost,
    batch: tuple[int, ...],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> MatrixCost:
    """The matrix in a dtype and on a device, for each problem of the batch where they share it."""
    return cost.to(dtype, device).expand(batch) if suffix(cost.batch_shape, batch) else cost.to(dtype, device)


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


def _part(eps: Eps, index: tuple[int, ...]) -> Eps:
    """What a problem of a batch has of eps: the number for all, or its own."""
    if not isinstance(eps, Tensor) or not eps.ndim:
        return eps
    part = eps[index]
    return part if part.ndim else float(part)


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


def check_eps(eps: Any) -> Eps:
    """A number, or a tensor: of one dimension at least, or one that wants a gradient."""
    if isinstance(eps, str):
        raise InvalidProblem(f"eps is the string {eps!r}; give a number > 0 in the units of the cost, or 'auto'")
    if isinstance(eps, (list, tuple)) or getattr(eps, "ndim", 0) > 0:
        each = as_tensor(eps, "eps", like=torch.zeros((), dtype=torch.float64, device="cpu"))
        refuse_forward_mode(each)
        values = each.detach()
        bad = torch.nonzero(~((values > 0) & torch.isfinite(values)))
        if len(bad):
            where = tuple(bad[0].tolist())
            raise InvalidProblem(
                f"eps is {float(values[where]):g} in problem {_index(where)} of the batch; give finite numbers > 0 in the "
                "units of the cost"
            )
        return each
    wanted = isinstance(eps, Tensor) and eps.requires_grad
    number = as_number(eps.detach() if wanted else eps, "eps")
    if number == 0:
        raise InvalidProblem("eps is 0, which is unregularised transport; give eps > 0, or use ot.emd from POT")
    if number < 0 or number == INF:
        raise InvalidProblem(f"eps is {number}; give a finite number > 0 in the units of the cost")
    return as_tensor(eps, "eps") if wanted else number


def _settle_eps(eps: Eps, mu: Measure) -> tuple[Eps, Tensor | None]:
    """eps as the computation wants it, and the tensor that wants its gradient, checked against mu."""
    leaf = eps.to(dtype=mu.dtype, device=mu.device) if isinstance(eps, Tensor) and eps.requires_grad else None
    if isinstance(eps, Tensor) and eps.ndim:
        want = mu.batch_shape
        if tuple(eps.shape) != want:
            shape = f"the batch {want}; give a number, or shape {want}" if want else "a single problem; give a number"
            raise InvalidProblem(f"eps has shape {tuple(eps.shape)} for {shape}")
    least, plain = 4 / torch.finfo(mu.dtype).max, linalg.plain(eps)
    if not isinstance(plain, Tensor):
        if not least < plain < 1 / least:
            raise _out_of_range(plain, "", mu.dtype)
        return plain, leaf
    out = torch.nonzero(~((plain > least) & (plain < 1 / least)))
    if len(out):
        where = tuple(out[0].tolist())
        raise _out_of_range(float(plain[where]), f" in problem {_index(where)} of the batch", mu.dtype)
    return plain.to(dtype=mu.dtype, device=mu.device).clone(), leaf


def _out_of_range(eps: float, where: str, dtype: torch.dtype) -> InvalidProblem:
    return InvalidProblem(
        f"eps is {eps:g}{where}, outside the range of {dtype}; rescale the points and eps, or use float64"
    )


def _index(where: tuple[int, ...]) -> str:
    return str(where[0]) if len(where) == 1 else str(where)


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


def _check_devices(mu: Measure, nu: Measure, cost: Cost, eps: Any) -> None:
    places = {"mu": mu.device, "nu": nu.device}
    if isinstance(eps, Tensor) and eps.ndim:
        places["eps"] = eps.device
    if isinstance(cost, MatrixCost):
        places["cost"] = cost.values.device
    if len(set(places.values())) > 1:
        raise InvalidProblem(
            "the input lies on several devices ("
            + ", ".join(f"{name} on {place}" for name, place in places.items())
            + "); move all of it to one with .to(device)"
        )
