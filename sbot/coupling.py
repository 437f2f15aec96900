"""The static half of a bridge: the plan, its marginals and its values, from two potentials.

``log dP = log phi(dx) - C(x, y) / eps - log Z + log psi(dy)``.  One class for each family of potentials.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from . import derivatives, implicit, linalg
from .arrays import as_index, refuse_vmap, transformed
from .bounds import Bounds, lower_bound
from .costs import MatrixCost
from .errors import InvalidProblem, Unsupported
from .gaussian import GaussianPlan, couple
from .kernels import COPIES, LN2, DenseKernel, Laws, LogKernel, make_kernel, share_of, weigh
from .linalg import Eps, along
from .measures import Discrete, Gaussian, Measure, categorical
from .memory import require_memory
from .metrics import Estimate
from .partial import ceiling, masses, support
from .potentials import Atoms, Potential
from .problem import Problem
from .reference import LinearReference
from .relaxed import damping, dual_term, target_weights
from .rounding import ATOMS_ONLY, FeasiblePlan, SparsePlan, feasible


class Coupling(ABC):
    """The plan of a bridge."""

    @abstractmethod
    def plan(self, rows: Any = None) -> Tensor | Gaussian:
        """The plan itself."""

    @property
    @abstractmethod
    def ends(self) -> tuple[Measure, Measure]:
        """The marginals of the plan; they differ from mu and nu where those are relaxed."""

    @abstractmethod
    def cost(self) -> Tensor:
        """The entropic objective, ``(*b,)``."""

    @abstractmethod
    def linear_cost(self) -> Tensor:
        """``<P, C>``, ``(*b,)``."""

    @abstractmethod
    def gap(self) -> Tensor:
        """Objective of a feasible plan minus `cost`, ``(*b,)``."""

    def round(self) -> FeasiblePlan:
        """A plan that has the marginals to rounding."""
        raise Unsupported(ATOMS_ONLY)

    def bounds(self) -> Bounds:
        """Bounds on unregularised transport."""
        raise Unsupported(ATOMS_ONLY)

    def draw(self, n: int, replace: bool, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Rows and columns of ``n`` entries drawn in proportion to their mass, ``(*b, n)``."""
        raise Unsupported(ATOMS_ONLY)

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """The largest entries of each row, and their columns."""
        raise Unsupported(ATOMS_ONLY)

    def top_logits(self, k: int) -> tuple[Tensor, Tensor]:
        """`top`, in logarithms, up to a constant of each row."""
        raise Unsupported(ATOMS_ONLY)

    def sparse(self, mass: float, most: int | None) -> SparsePlan:
        """The largest entries."""
        raise Unsupported(ATOMS_ONLY)

    def apply(self, v: Tensor, transpose: bool) -> Tensor:
        """``P v`` or ``P' v`` for ``(*b, m, p)``."""
        raise Unsupported(ATOMS_ONLY)

    def perplexity(self) -> Tensor:
        """``exp`` of the entropy of each row, ``(*b, n)``."""
        raise Unsupported(ATOMS_ONLY)

    def information(self) -> Tensor:
        """``KL(P | mu x nu)``, ``(*b,)``."""
        raise Unsupported(
            "the information of a plan that is known by its samples is not; solve with Sinkhorn on samples"
        )

    @abstractmethod
    def between(self, t: float) -> Measure | None:
        """The law at ``0 < t < 1`` where it has a name, else None."""


#: Bytes of a tile of products with lent laws: what stays in the cache needs no fresh memory, which costs more than they do.
CACHED = 2**18


@final
class DiscreteCoupling(Coupling):
    """``P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)``; everything streams over tiles of rows."""

    def __init__(self, problem: Problem, phi: Atoms, psi: Atoms) -> None:
        assert isinstance(problem.mu, Discrete) and isinstance(problem.nu, Discrete)
        self.problem, self.eps = problem, problem.eps
        #: attached potentials follow the data; else they are constants
        self._attached = phi.log_weights.requires_grad or psi.log_weights.requires_grad
        log_z = problem.log_normaliser(problem.free_eps if self._attached else problem.eps)
        left, right = phi.log_weights, psi.log_weights - log_z
        self._free, self._logs = (left, right), (left.detach(), right.detach())
        self._mu, self._nu = problem.mu, problem.nu
        #: what a solver has left for the first caller that wants the whole plan, see `lend`
        self._lent: Laws | None = None

    def lend(self, laws: Laws | None) -> None:
        """Conditional laws of this plan, which `plan` may make the plan in, once, and `linear_cost` read."""
        self._lent = laws

    def _kernel(self) -> LogKernel:
        return make_kernel(self.problem.cost, *(site.detach() for site in self.problem.sites))

    @cached_property
    def _whole(self) -> LogKernel:
        """The kernel of all rows, which any number of `plan` calls share: some rows are then those of the whole plan."""
        return self._kernel()

    @property
    def ceilings(self) -> tuple[Tensor, Tensor] | None:
        """``max f`` and ``max g`` of a partial plan, ``(*b, 1)``."""
        with torch.no_grad():
            return self.moving_ceilings

    @property
    def moving_ceilings(self) -> tuple[Tensor, Tensor] | None:
        """`ceilings` that follow the data."""
        if self.problem.mass is None:
            return None
        ends, unit = zip((self._mu.weights, self._nu.weights), self._free, strict=True), along(self.problem.free_eps, 1)
        tops = [ceiling(unit * (log - torch.where(w > 0, w, 1.0).log()), w) for w, log in ends]
        return (tops[0], tops[1]) if self._attached else (tops[0].detach(), tops[1].detach())

    def attached(self, unroll: int | None) -> tuple[Atoms, Atoms]:
        """The potentials as functions of the data, see `PotentialBridge.differentiable`."""
        if self.problem.mass is not None and unroll is not None:
            raise Unsupported(
                "a partial plan is not differentiated through its iterations, which have kinks; drop unroll="
            )
        a, b, (x, y) = self._mu.weights, self._nu.weights, self.problem.sites
        if (which := self._empty_wanted()) is not None:
            raise InvalidProblem(f"{which}; drop these atoms")
        values, eps = self.dual_values(), self.problem.free_eps
        part, unit = tuple(torch.isfinite(value) for value in values), along(eps, 1)
        if unroll is None:
            f, g = self._moving(*values)
        else:
            kernel = make_kernel(self.problem.cost, x, y)
            f, g = (torch.where(live, value, 0.0) for live, value in zip(part, values, strict=True))
            f, g = f.detach(), g.detach()
            scale = [damping(rho, unit) * unit for rho in self.problem.relax]
            for _ in range(unroll):
                g = torch.where(part[1], -scale[1] * kernel.T.reduce(a.log() + f / unit, eps)[0], 0.0)
                f = torch.where(part[0], -scale[0] * kernel.reduce(b.log() + g / unit, eps)[0], 0.0)
        # atoms that forbidden pairs leave where they are have no part in the plan
        left, right = (
            torch.where(live | (weights == 0), _log_weights(weights, value, unit), -torch.inf)
            for live, weights, value in zip(part, (a, b), (f, g), strict=True)
        )
        numbered = not x.dtype.is_floating_point
        at_x, at_y = self.problem.values
        return (
            Atoms(x, left, at_x if numbered else None),
            Atoms(y, right + self.problem.log_normaliser(eps), at_y if numbered else None),
        )

    def _moving(self, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """The solution ``f``, ``g`` as a function of the data; 0 where it is infinite."""
        f, g = (torch.where(torch.isfinite(value), value, 0.0) for value in (f, g))
        problem, a, b = self.problem, self._mu.weights, self._nu.weights
        kernel = make_kernel(problem.cost, *problem.sites)
        return implicit.potentials(kernel, problem.relax, problem.free_eps, f, g, a, b, problem.mass)

    def dual_values(self) -> tuple[Tensor, Tensor]:
        """``f`` and ``g`` at the atoms; atoms of zero weight take the value of the c-transform, and padding 0."""
        with torch.no_grad():
            return self._values(self._kernel(), self._logs, self.eps, self.ceilings)

    def _values(
        self, kernel: LogKernel, logs: tuple[Tensor, Tensor], eps: Eps, tops: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """`dual_values` from ``log a + f / eps`` and the like, with the derivatives of these."""
        unit, out = along(eps, 1), []
        for side, (measure, here, there) in enumerate(zip((self._mu, self._nu), logs, logs[::-1], strict=True)):
            weights = measure.weights
            live = weights > 0
            known = live & (here > -torch.inf)
            f = unit * (torch.where(known, here, 0.0) - torch.where(known, weights, 1.0).log())
            # an atom that forbidden pairs leave where it is
            f = torch.where(known, f, torch.inf if tops is None else tops[side])
            if not bool(live.all()):
                transform = (kernel if side == 0 else kernel.T).reduce(there, eps)[0]
                other = -damping(self.problem.relax[side], unit) * unit * transform
                if tops is not None:
                    other = torch.minimum(other, tops[side])
                f = torch.where(live, f, other)
            out.append(measure.blank(f))
        return out[0], out[1]

    def attached_values(self) -> tuple[Tensor, Tensor]:
        """`dual_values` that follow the data, up to a constant that is settled by ``<a, f> = <b, g>`` where all is hard.

        In a partial plan it is settled by the parts that both sides have of the dual, see `partial`.
        """
        if not self._attached:
            return self.dual_values()
        kernel = make_kernel(self.problem.cost, *self.problem.sites)
        return self._settled(*self._values(kernel, self._free, self.problem.free_eps, self.moving_ceilings))

    def _settled(self, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """With the constant that is free."""
        if self.problem.relax == (math.inf, math.inf):
            a, b = self._mu.weights, self._nu.weights
            if (s := self.problem.mass) is None:
                # an atom of zero weight that nothing reaches has an infinite potential, and no part in this
                means = [(w * torch.where(w > 0, p, 0.0)).sum(-1) / w.sum(-1) for w, p in ((a, f), (b, g))]
                shift = (means[1] - means[0]) / 2
            else:
                shift = (support(g, b, s) - support(f, a, s)) / s.to(f) / 2
            f, g = f + shift[..., None], g - shift[..., None]
        return f, g

    def plan(self, rows: Any = None) -> Tensor:
        if self._attached and torch.is_grad_enabled():
            left, right = self._free
            x, y = self.problem.sites
            if rows is not None:
                index = as_index(rows, self._mu.n, "rows", left.device)
                left, x = left[..., index], x[index] if not x.dtype.is_floating_point else x[..., index, :]
            self._require_memory((left.shape[-1], right.shape[-1]), 3)
            return _dense_plan(
                left, right, self.problem.free_eps, self.problem.cost.matrix(x, y), self.problem.may_forbid
            )
        return self._plan(rows)

    @torch.no_grad()
    def _plan(self, rows: Any) -> Tensor:
        if rows is None and self._lent is not None:
            lent, self._lent = self._lent, None
            return lent.scaled(*lent.scales(*self._logs))
        kernel, (left, right), unit = self._whole, self._logs, self.eps * LN2
        index = None if rows is None else as_index(rows, self._mu.n, "rows", left.device)
        shape = (self._mu.n if index is None else len(index), self._nu.n)
        self._require_memory(shape)
        out = torch.empty((*kernel.batch_shape, *shape), dtype=kernel.dtype, device=kernel.device)
        # as a pass of the solver has it: its marginals are those that were solved for
        column, step = kernel.column(right / LN2, unit), next(kernel.tiles()).stop
        for start in range(0, shape[0], step):
            tile = slice(start, min(start + step, shape[0]))
            part = tile if index is None else index[tile]
            level, offset = left[..., part] / LN2, kernel.offset(unit, part)
            level = level if offset is None else level + offset
            kernel.logits(part, column, unit, out[..., tile, :]).add_(level[..., None]).exp2_()
        return out

    def _require_memory(self, shape: tuple[int, int], arrays: int = 1) -> None:
        """`MemoryError` where so many arrays of the size of these rows of the plan do not fit."""
        size = arrays * math.prod((*self.problem.batch_shape, *shape)) * torch.finfo(self.problem.dtype).bits // 8
        require_memory(size, self.problem.device, f"a dense plan of shape {shape}", "ask for plan(rows=...) in parts")

    @property
    def ends(self) -> tuple[Measure, Measure]:
        a, b = self.target_marginals()
        if bool((a.sum(-1) <= 0).any()) or bool((b.sum(-1) <= 0).any()):
            raise Unsupported(
                "the plan has no mass left to draw from or to look at; raise relax or bring the points nearer"
            )
        return self._mu.reweighted(a), self._nu.reweighted(b)

    def target_marginals(self) -> tuple[Tensor, Tensor]:
        """``a e^{-f / rho}`` and ``b e^{-g / rho}``: what the marginals are at the solution."""
        rho = self.problem.relax
        if self.problem.mass is not None:
            return self._partial_marginals(self.problem.mass.detach())
        if rho == (math.inf, math.inf):
            return self._mu.weights.detach(), self._nu.weights.detach()
        sides = zip((self._mu, self._nu), self.dual_values(), rho, strict=True)
        a, b = (target_weights(m.weights.detach(), p, r) for m, p, r in sides)
        return a, b

    @torch.no_grad()
    def _partial_marginals(self, mass: Tensor) -> tuple[Tensor, Tensor]:
        """Of both sides what a half-step makes of them: within the bounds, and of the prescribed mass."""
        kernel, (left, right) = self._kernel(), self._logs
        a, b = (measure.weights.detach() for measure in (self._mu, self._nu))
        rows = masses(a.log(), kernel.reduce(right, self.eps)[0], mass)
        return rows.to(a), masses(b.log(), kernel.T.reduce(left, self.eps)[0], mass).to(b)

    def cost(self) -> Tensor:
        """The dual objective, with the gradients of the envelope theorem, and derivatives of these by `implicit`.

        With f and g held, the dual is ``<a, F(f)> + <b, F(g)> - eps (sum_ij P_ij - sum a sum b)``, with
        ``F(f) = f`` or ``rho (1 - e^{-f / rho})``; its partial derivatives are the gradients at the solution.  The ones
        in the weights are written out, since ``log b`` has none at an atom of zero weight.
        """
        inputs = self._inputs()
        if not torch.is_grad_enabled() or not any(map(_wants, inputs)):
            return self._dual_at(*self.dual_values(), inputs)[0]
        once = None
        if not self._attached and (empty := self._empty_wanted()) is not None:
            once = f"the cost has first derivatives only where {empty}; drop these atoms"
        # how they follow the data is of use to second derivatives only, and inside transforms out of their sight later
        eager = not once and (self._attached or transformed())
        f, g = self.following() if eager else self.dual_values()
        value: Tensor = _Value.apply(self, once, [], f, g, *inputs)  # type: ignore[no-untyped-call]
        return value

    def following(self) -> tuple[Tensor, Tensor]:
        """`attached_values`, of potentials that are not attached too."""
        if self._attached:
            return self.attached_values()
        values = self.dual_values()
        moving = zip(values, self._moving(*values), (self._mu.weights, self._nu.weights), strict=True)
        # at an atom of zero weight a c-transform, and a constant
        f, g = (torch.where((w > 0) & value.isfinite(), part, value) for value, part, w in moving)
        return self._settled(f, g)

    def _inputs(self) -> tuple[Any, ...]:
        """eps, both weights, the mass and what the cost is made of, as given."""
        problem = self.problem
        leaves = make_kernel(problem.cost, *problem.sites).leaves
        return problem.free_eps, self._mu.weights, self._nu.weights, problem.mass, *leaves

    def _empty_wanted(self) -> str | None:
        """Where a weight that is zero wants a gradient, in words."""
        for name, side in (("mu", self._mu), ("nu", self._nu)):
            if side.weights.requires_grad and bool(((side.weights == 0) & side.mask).any()):
                return f"{name} has weights that are zero and want a gradient"
        return None

    def written_out(
        self, f: Tensor, g: Tensor, eps: Eps, a: Tensor, b: Tensor, mass: Tensor | None, *leaves: Tensor
    ) -> Tensor:
        """The dual objective as one dense expression of everything it depends on."""
        if mass is not None:
            terms = support(f, a, mass) + support(g, b, mass)
        else:
            terms = (a * dual_term(f, self.problem.relax[0])).sum(-1)
            terms = terms + (b * dual_term(g, self.problem.relax[1])).sum(-1)
        c = self._kernel().on(leaves).entries(slice(None))
        whole = a.sum(-1) * b.sum(-1)
        return terms - eps * (implicit.plan_between(f, g, eps, a, b, c).sum((-2, -1)) - whole)

    def _dual_at(
        self, f: Tensor, g: Tensor, inputs: Sequence[Any], wanted: Sequence[bool] = (), scale: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The dual objective at constants f and g, ``(*b,)``, and its slopes in those ``inputs`` that are ``wanted``.

        One pass finds both.  Slopes are times ``scale``, ``(*b,)``; without it those that are dear, or large, are left out.
        """
        given, a, b, mass, *leaves = (part.detach() if isinstance(part, Tensor) else part for part in inputs)
        kernel, eps = self._kernel().on(leaves), linalg.plain(given)
        f, g, tops, unit = f.detach(), g.detach(), self.ceilings, along(eps, 1)
        if tops is None:
            term_a, term_b = (dual_term(p, rho) for p, rho in zip((f, g), self.problem.relax, strict=True))
        else:
            # see `partial`: <a, f - max f> + s max f
            term_a, term_b = f - tops[0], g - tops[1]
        to_eps, to_a, to_b, to_mass, *to_leaves = wanted or (False,) * len(inputs)
        if scale is None and not kernel.pulls_quickly:
            to_leaves = [False] * len(leaves)
        slopes: list[Tensor | None] = [None] * len(inputs)
        # row sums of P over a; none where there is no weight, as the potential is no dual variable there
        live = (a > 0) & torch.isfinite(f)
        if to_eps or any(to_leaves):
            density, height, slopes[4:] = self._pulled(kernel, f, g, eps, a, b, scale, to_eps, to_leaves)
            slopes[0] = None if height is None else height + (a * (b.sum(-1, keepdim=True) - density)).sum(-1)
        elif self._lent is not None:
            scales = self._lent.scales(*self._logs)
            density = scales[0] * linalg.product(self._lent.laws, scales[1]) / torch.where(live, a, 1.0)
        else:
            lse = kernel.reduce(_log_weights(b, g, unit), eps)[0]
            density = torch.exp(torch.where(live, torch.where(live, f, 0.0) / unit + lse, -torch.inf))
        here = term_a + unit * (b.sum(-1, keepdim=True) - density)
        total = (a * _finite(here)).sum(-1) + (b * _finite(term_b)).sum(-1)
        if tops is not None and mass is not None:
            peak = (tops[0] + tops[1])[..., 0]
            total, slopes[3] = total + mass.to(f) * peak, peak if to_mass else None
        if to_a:
            density = density if bool(live.all()) else self._density(kernel, f, _log_weights(b, g, unit))
            slopes[1] = self._slope(0, term_a, density, a, b, g, kernel)
        if to_b:
            density = self._density(kernel.T, g, _log_weights(a, f, unit))
            slopes[2] = self._slope(1, term_b, density, b, a, f, kernel.T)
        if scale is not None:
            slopes[:4] = (None if part is None else part * along(scale, part.ndim - scale.ndim) for part in slopes[:4])
        return total, slopes

    def _pulled(
        self,
        kernel: LogKernel,
        f: Tensor,
        g: Tensor,
        eps: Eps,
        a: Tensor,
        b: Tensor,
        scale: Tensor | None,
        to_eps: bool,
        to_leaves: Sequence[bool],
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]:
        """Sums of rows of P over a, ``<P, f + g - C> / eps`` where that is wanted, and P, times ``scale``, pulled back."""
        unit = along(eps, 1)
        left, right = _log_weights(a, f, unit), _log_weights(b, g, unit)
        rows_of, columns = torch.zeros_like(left), torch.zeros_like(right)
        inner = torch.zeros(kernel.batch_shape, dtype=left.dtype, device=left.device)
        # tiles of half the size fit where those of the solve were, though small tensors may lie there now
        kernel.copies = max(2, kernel.copies)

        def tiles() -> Iterator[tuple[slice, Tensor]]:
            for rows, p in kernel.softmax_tiles(right, eps, -left):
                rows_of[..., rows] = p.sum(-1)
                if to_eps:
                    columns.add_(p.sum(-2))
                    inner.add_(kernel.inner(rows, p))
                yield rows, p if scale is None else p.mul_(along(scale, 2))

        with torch.no_grad(), linalg.full_precision():
            grads = kernel.pulled(tiles(), to_leaves)
        height = (rows_of * _finite(f)).sum(-1) + (columns * _finite(g)).sum(-1) - inner if to_eps else None
        return rows_of / torch.where(a > 0, a, 1.0), None if height is None else height / eps, grads

    def _density(self, kernel: LogKernel, potential: Tensor, bias: Tensor) -> Tensor:
        """Sums of P over the weights, also where these are zero."""
        return torch.exp(_finite(potential) / along(self.eps, 1) + kernel.reduce(bias, self.eps)[0])

    def _slope(
        self, side: int, term: Tensor, density: Tensor, w: Tensor, other: Tensor, potential: Tensor, kernel: LogKernel
    ) -> Tensor:
        """The derivative of the dual in the weights of one side, checked where these are zero; ``kernel`` has that side as rows.

        It is infinite at an atom that alone reaches one which stays where it is: with any weight it would take it along.  An
        atom that no pair joins to the rest may not have weight where its marginal is hard; its part of the dual is left out.
        """
        slope = _finite(term) + along(self.eps, 1) * (other.sum(-1, keepdim=True) - density)
        measure = (self._mu, self._nu)[side]
        empty = measure.mask & (w == 0)
        if not bool(empty.any()):
            return measure.blank(slope)
        stays = (other > 0) & (potential == torch.inf)
        if bool(stays.any()):
            lse = kernel.reduce(torch.where(stays, 0.0, torch.full_like(potential, -torch.inf)), self.eps)[0]
            slope = torch.where(empty & (lse > -torch.inf), -torch.inf, slope)
        wrong = (measure.mask & ~torch.isfinite(slope)).nonzero()
        if len(wrong):
            *batch, atom = wrong[0].tolist()
            where = f" of problem {batch[0] if len(batch) == 1 else tuple(batch)}" if batch else ""
            raise InvalidProblem(
                f"{('mu', 'nu')[side]} has zero weight at atom {atom}{where}, and the derivative of the cost in it is infinite; "
                "drop this atom, or give it weight"
            )
        return measure.blank(slope)

    def _tiles(self, left: Tensor, right: Tensor, unit: Eps | None = None) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows, ``left_i + right_j - C_ij / unit``, and their costs, in float64; ``unit`` is eps unless given."""
        kernel, unit = self._kernel(), self.eps if unit is None else unit
        unit = unit.double() if isinstance(unit, Tensor) else unit
        kernel.copies = COPIES
        left, right = left.double(), right.double()
        for rows in kernel.tiles():
            c = kernel.entries(rows).double()
            logits = weigh(c, right, unit, torch.empty_like(c))
            yield rows, logits.add_(left[..., rows, None]), c

    def linear_cost(self) -> Tensor:
        if self._attached and torch.is_grad_enabled():
            leaves = make_kernel(self.problem.cost, *self.problem.sites).leaves
            value: Tensor = _Linear.apply(self, *self._free, self.problem.free_eps, *leaves)  # type: ignore[no-untyped-call]
            return value
        return self._linear_cost()

    @torch.no_grad()
    def _linear_cost(self) -> Tensor:
        total = torch.zeros(self.problem.batch_shape, dtype=torch.float64, device=self.problem.device)
        left, right = self._logs
        plain = not self.problem.may_forbid
        if self._lent is not None and plain and isinstance(self.problem.cost, MatrixCost):
            laws, charges, scales = self._lent.laws, self.problem.cost.values.detach(), self._lent.scales(left, right)
            kernel = self._kernel()
            kernel.tile_bytes = CACHED
            for rows in kernel.tiles():
                each = linalg.product(laws[..., rows, :] * charges[..., rows, :], scales[1])
                total += torch.linalg.vecdot(scales[0][..., rows], each)
            return total.to(self.problem.dtype)
        for _, log2_p, c in self._tiles(left.double() / LN2, right.double() / LN2, self.eps * LN2):
            p = log2_p.exp2_()
            if not plain:
                c = torch.where(torch.isfinite(c), c, 0.0)
            total += torch.linalg.vecdot(p.flatten(-2), c.flatten(-2))
        return total.to(self.problem.dtype)

    def _linear_gradients(
        self, left: Tensor, right: Tensor, given: Tensor | None, grad: Tensor, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """Those of `_Linear` in both logarithms, eps and what the cost is made of, by tiles."""
        rows_of, columns = torch.zeros_like(left, dtype=torch.float64), torch.zeros_like(right, dtype=torch.float64)
        slope = torch.zeros(self.problem.batch_shape, dtype=torch.float64, device=left.device)
        unit, scale = along(self.eps, 2), grad.double()[..., None, None]

        def tiles() -> Iterator[tuple[slice, Tensor]]:
            for rows, log_p, c in self._tiles(left, right):
                c = torch.where(torch.isfinite(c), c, 0.0)
                w = log_p.exp_().mul_(scale)
                each = w * c
                rows_of[..., rows] = each.sum(-1)
                columns.add_(each.sum(-2))
                slope.add_((each * c).sum((-2, -1)))
                yield rows, w.sub_(each.div_(unit)).to(left)

        kernel = self._kernel()
        kernel.copies = COPIES  # tiles as those of `_tiles`
        grads = kernel.pulled(tiles(), wanted[3:])
        in_eps = share_of(given, slope / self.eps, self.eps)
        return [rows_of.to(left), columns.to(right), in_eps, *grads]

    @torch.no_grad()
    def gap(self) -> Tensor:
        """``eps KL(P' | P)`` with P' feasible, plus ``rho KL(P' 1 | a e^{-f / rho})`` where a marginal is relaxed, or
        ``<a - P' 1, max f - f>`` where it is a bound.

        This is the objective of P' minus the dual, term by term non-negative.  P' is the rounding of Altschuler, Weed and
        Rigollet (2017): rows and columns scaled down to their marginals, then a rank-one correction; it is infinite
        where no correction was found on the allowed pairs.
        """
        eps, (rho_a, rho_b) = self.eps, self.problem.relax
        rounded = self.round()
        left, right = (log.double() for log in self._logs)
        excess = torch.zeros(self.problem.batch_shape, dtype=torch.float64, device=left.device)
        if self.ceilings is not None:
            # what is left of an atom below the cap: the bound's multiplier says that it should be nothing
            for measure, top, f, sums in zip(
                (self._mu, self._nu), self.ceilings, self.dual_values(), rounded.marginals(), strict=True
            ):
                excess += ((measure.weights.detach() - sums).clamp(min=0) * (top - f).double()).sum(-1)
        relaxed = (rho_a, rho_b) != (math.inf, math.inf)
        sides = zip((rho_a, rho_b), rounded.marginals(), self.target_marginals(), strict=True) if relaxed else ()
        for rho, sums, target in sides:
            if not math.isinf(rho):
                excess += rho * divergence(sums, target.double())
        shift = rounded.left - left, rounded.right - right
        for rows, log_p, c in self._tiles(left, right):
            move = shift[0][..., rows, None].nan_to_num() + shift[1][..., None, :].nan_to_num()
            p, added = log_p.exp(), rounded.added(rows, c)
            kept = p if rounded.parts is None else p.masked_fill(rounded.apart(rows), 0)
            new = kept * move.exp() + added
            change = torch.where(added > 0, new.log() - log_p, move)
            term = torch.where(new > 0, new * change, 0.0) - new + p
            excess += eps * term.sum((-2, -1))
        # where the plan overflows nothing is known
        return excess.clamp(min=0).nan_to_num(nan=math.inf, posinf=math.inf).to(self.problem.dtype)

    def between(self, t: float) -> None:
        return None

    @torch.no_grad()
    def round(self) -> FeasiblePlan:
        left, right = (log.double() for log in self._logs)
        hard = math.isinf(self.problem.relax[0]), math.isinf(self.problem.relax[1])
        a, b = (w.double() for w in self.target_marginals())
        return feasible(self._kernel(), left, right, self.eps, (a, b), hard, self.problem.may_forbid)

    @torch.no_grad()
    def bounds(self) -> Bounds:
        if self.problem.relax != (math.inf, math.inf):
            raise Unsupported(
                "bounds() is about transport with both marginals hard, and here they are relaxed; solve without relax=, or "
                "use cost() and gap(), which bracket the relaxed problem"
            )
        (f, g), a, b = self.dual_values(), self._mu.weights.detach(), self._nu.weights.detach()
        return Bounds(lower_bound(self._kernel(), a, b, f, g, self.problem.mass), self.round().linear_cost())

    @torch.no_grad()
    def draw(self, n: int, replace: bool, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        if not replace:
            return self._draw_once(n, generator)
        start = self.ends[0]
        assert isinstance(start, Discrete)
        rows = categorical(start.weights.log(), n, generator)
        kernel, right = self._kernel_of(rows), self._logs[1]
        kernel.copies = COPIES
        columns = [
            categorical(right[..., None, :] - kernel.entries(tile) / along(self.eps, 2), 1, generator)[..., 0]
            for tile in kernel.tiles()
        ]
        return rows, torch.cat(columns, -1)

    def _kernel_of(self, rows: Tensor) -> LogKernel:
        """The kernel of these rows, ``(*b, n)``, in their order."""
        x, y = (site.detach() for site in self.problem.sites)
        if isinstance(self.problem.cost, MatrixCost):
            values = self.problem.cost.values.detach()
            return DenseKernel(torch.take_along_dim(values, rows[..., None], -2))
        return make_kernel(self.problem.cost, torch.take_along_dim(x, rows[..., None], -2), y)

    def _draw_once(self, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Entries drawn one after the other, none twice: the largest of ``log P_ij`` with Gumbel noise (Kool et al. 2019)."""
        left, right = self._logs
        batch, m = self.problem.batch_shape, right.shape[-1]
        keys = torch.empty((*batch, 0), dtype=torch.float64, device=left.device)
        index = torch.empty((*batch, 0), dtype=torch.int64, device=left.device)
        for rows, log_p, _ in self._tiles(left, right):
            noise = torch.empty_like(log_p).exponential_(generator=generator).log_().neg_()
            tile = noise.add_(log_p).flatten(-2)
            keys = torch.cat([keys, tile], -1)
            index = torch.cat(
                [index, torch.arange(tile.shape[-1], device=left.device).expand(tile.shape) + rows.start * m], -1
            )
            keys, order = keys.topk(min(n, keys.shape[-1]), -1)
            index = index.gather(-1, order)
        have = int((keys > -torch.inf).sum(-1).min())
        if have < n:
            raise InvalidProblem(
                f"n is {n} and the plan has {have} pairs to draw without replacement; give n <= {have}"
            )
        return index // m, index % m

    @torch.no_grad()
    def top(self, k: int) -> tuple[Tensor, Tensor]:
        values, index = self.top_logits(k)
        return torch.exp(values + self._logs[0][..., None]), index

    @torch.no_grad()
    def top_logits(self, k: int) -> tuple[Tensor, Tensor]:
        kernel, right = self._kernel(), self._logs[1]
        # what is kept of the tiles is written in one place here and below: small tensors that stay between large ones would
        # keep their memory from being used again
        values = right.new_empty((*self._logs[0].shape, k))
        index = torch.empty_like(values, dtype=torch.int64)
        for rows in kernel.tiles():
            best = (right[..., None, :] - kernel.entries(rows) / along(self.eps, 2)).topk(k, -1)
            values[..., rows, :], index[..., rows, :] = best.values, best.indices
        return values, index

    @torch.no_grad()
    def sparse(self, mass: float, most: int | None) -> SparsePlan:
        kernel, (left, right) = self._kernel(), self._logs
        lse = kernel.reduce(right, self.eps)[0]
        row, column, value = (_Column(kind, left.device) for kind in (torch.int64, torch.int64, left.dtype))
        kept = torch.zeros((), dtype=torch.float64, device=left.device)
        scale, most = torch.exp(left + lse), min(most or kernel.shape[1], kernel.shape[1])
        for rows, law in kernel.softmax_tiles(right, self.eps, lse):
            order = law.topk(most, -1)
            before = order.values.cumsum(-1, dtype=torch.float64) - order.values
            chosen = order.values > 0
            if mass < 1:
                chosen &= before < mass * law.sum(-1, keepdim=True, dtype=torch.float64)
            where = chosen.nonzero()
            own = where[:, 0] + rows.start
            entries = order.values[chosen] * scale[own]
            kept += entries.sum(dtype=torch.float64)
            row.add(own)
            column.add(order.indices[chosen])
            value.add(entries)
        whole = torch.exp(left.double() + lse.double()).sum()
        lost = float((whole - kept).clamp(min=0))
        return SparsePlan(row.whole(), column.whole(), value.whole(), kernel.shape, lost)

    @torch.no_grad()
    def apply(self, v: Tensor, transpose: bool) -> Tensor:
        kernel, (left, right) = self._kernel(), self._logs
        here, there = (right, left) if transpose else (left, right)
        kernel = kernel.T if transpose else kernel
        lse = kernel.reduce(there, self.eps)[0]
        out = v.new_empty((*lse.shape, v.shape[-1]))
        for rows, law in kernel.softmax_tiles(there, self.eps, lse):
            out[..., rows, :] = law @ v
        return out.mul_(torch.exp(here + lse)[..., None])

    @torch.no_grad()
    def perplexity(self) -> Tensor:
        kernel, right = self._kernel(), self._logs[1]
        lse = kernel.reduce(right, self.eps)[0]
        entropy = torch.empty_like(lse, dtype=torch.float64)
        for rows, law in kernel.softmax_tiles(right, self.eps, lse):
            entropy[..., rows] = torch.special.entr(law).sum(-1, dtype=torch.float64)
        return self._mu.blank(torch.where(lse == -torch.inf, 0.0, entropy.exp()).to(lse))

    @torch.no_grad()
    def information(self) -> Tensor:
        a, b = (m.weights.detach().double() for m in (self._mu, self._nu))
        total = torch.zeros(self.problem.batch_shape, dtype=torch.float64, device=self.problem.device)
        for rows, log_p, _ in self._tiles(*self._logs):
            p, q = log_p.exp(), a[..., rows, None] * b[..., None, :]
            # an entry too small to be written is 0, and its logarithm is kept out
            total += (torch.where(p > 0, p * (log_p - q.log()), 0.0) - p + q).sum((-2, -1))
        return total.to(self.problem.dtype)


class _Column:
    """A vector that grows by doubling."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._held, self._used = torch.empty(2**16, dtype=dtype, device=device), 0

    def add(self, part: Tensor) -> None:
        end = self._used + len(part)
        if end > len(self._held):
            held = self._held.new_empty(max(end, 2 * len(self._held)))
            held[: self._used] = self._held[: self._used]
            self._held = held
        self._held[self._used : end] = part
        self._used = end

    def whole(self) -> Tensor:
        return self._held[: self._used].clone()


def _log_weights(weights: Tensor, potential: Tensor, eps: Eps) -> Tensor:
    """``log w + f / eps`` for an eps along the potential; without weight or finite potential, nothing is in the graph."""
    live = (weights > 0) & torch.isfinite(potential)
    return torch.where(
        live, torch.where(live, weights, 1.0).log() + torch.where(live, potential, 0.0) / eps, -torch.inf
    )


def _finite(term: Tensor) -> Tensor:
    """Without what is infinite."""
    return torch.where(torch.isfinite(term), term, 0.0)


def _dense_plan(left: Tensor, right: Tensor, eps: Eps, c: Tensor, may_forbid: bool) -> Tensor:
    """``exp(left_i + right_j - C_ij / eps)``, with derivatives of any order."""
    if not may_forbid:
        return torch.exp(left[..., None] + right[..., None, :] - c / along(eps, 2))
    # an infinite cost over eps has no derivative, though its exponential has
    allowed = torch.isfinite(c)
    exponent = left[..., None] + right[..., None, :] - torch.where(allowed, c, 0.0) / along(eps, 2)
    return torch.exp(torch.where(allowed, exponent, -torch.inf))


class _Linear(torch.autograd.Function):
    """``<P, C>`` of attached potentials; the gradient of the cost is ``P_ij (1 - C_ij / eps)``."""

    @staticmethod
    def forward(coupling: DiscreteCoupling, left: Tensor, right: Tensor, eps: Eps, *leaves: Tensor) -> Tensor:
        return coupling._linear_cost()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.coupling, left, right, eps, *leaves = inputs
        ctx.eps = None if isinstance(eps, Tensor) else eps
        ctx.save_for_backward(left, right, eps if ctx.eps is None else None, *leaves)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_vmap(grads[0], "the gradient of the linear cost")
        left, right, given, *leaves = ctx.saved_tensors
        inputs = [left, right, ctx.eps if given is None else given, *leaves]
        wanted, coupling = ctx.needs_input_grad[1:], ctx.coupling
        kernel = coupling._kernel()

        def number(*moved: Tensor) -> Tensor:
            left, right, eps, *leaves = derivatives.filled(inputs, wanted, moved)
            c = kernel.on(leaves).entries(slice(None))
            plan = _dense_plan(left, right, eps, c, coupling.problem.may_forbid)
            return (grads[0] * (plan * torch.where(torch.isfinite(c), c, 0.0)).sum((-2, -1))).sum()

        def stream() -> list[Tensor | None]:
            return coupling._linear_gradients(left, right, given, grads[0], wanted)

        return None, *derivatives.of_number(number, inputs, wanted, stream, grads, kernel.size)


def _wants(part: Any) -> bool:
    return isinstance(part, Tensor) and part.requires_grad


class _Value(torch.autograd.Function):
    """The dual at potentials that follow the data: by the envelope theorem their motion has no part in the first derivative, and
    is all of the rest of the second.

    The first derivative streams.  Where it is cheap it is found in the pass that finds the value, and saved by way of ``kept``.
    ``once`` says why there is no second one, where there is none.
    """

    @staticmethod
    def forward(
        coupling: DiscreteCoupling, once: str | None, kept: list[Any], f: Tensor, g: Tensor, *inputs: Any
    ) -> Tensor:
        # inside a transform what is wanted is out of sight, and nothing is kept
        value, slopes = coupling._dual_at(f, g, inputs, [_wants(part) and not transformed() for part in inputs])
        kept += slopes
        return value

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.coupling, ctx.once, kept, f, g, eps, *rest = inputs
        ctx.eps = None if isinstance(eps, Tensor) else eps
        ctx.save_for_backward(f, g, eps if ctx.eps is None else None, *rest, *kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_vmap(grads[0], "the gradient of the cost")
        wanted = ctx.needs_input_grad[5:]
        f, g, given, *saved = ctx.saved_tensors
        rest, kept = saved[: len(wanted) - 1], saved[len(wanted) - 1 :] or [None] * len(wanted)
        inputs = [ctx.eps if given is None else given, *rest]

        def number(*moved: Tensor) -> Tensor:
            at = (f, g) if f.requires_grad or g.requires_grad or transformed() else ctx.coupling.following()
            value: Tensor = ctx.coupling.written_out(*at, *derivatives.filled(inputs, wanted, moved))
            return (grads[0] * value).sum()

        def stream() -> list[Tensor | None]:
            scale = grads[0]
            found = [None if part is None else part * along(scale, part.ndim - scale.ndim) for part in kept]
            left = [asked and part is None for asked, part in zip(wanted, found, strict=True)]
            if any(left):
                more = ctx.coupling._dual_at(f, g, inputs, left, scale)[1]
                found = [one if two is None else two for one, two in zip(found, more, strict=True)]
            eps = linalg.plain(inputs[0])
            return [share_of(inputs[0], None if found[0] is None else eps * found[0], eps), *found[1:]]

        if ctx.once is not None:
            with torch.no_grad():
                found = stream()
            return None, None, None, None, None, *derivatives.refused(found, [*inputs, *grads], ctx.once)
        size = ctx.coupling._kernel().size
        return None, None, None, None, None, *derivatives.of_number(number, inputs, wanted, stream, grads, size)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """``KL(p | q) = sum p log(p / q) - p + q`` over the last dimension."""
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q) - p + q).sum(-1)


@final
class GaussianCoupling(Coupling):
    """The plan between two Gaussians, itself a Gaussian on ``R^{2d}``."""

    def __init__(self, problem: Problem) -> None:
        mu, nu, reference = problem.mu, problem.nu, problem.reference
        assert isinstance(mu, Gaussian) and isinstance(nu, Gaussian) and isinstance(reference, LinearReference)
        self.problem, self._mu, self._nu, self._reference = problem, mu, nu, reference

    @property
    def pieces(self) -> GaussianPlan:
        """Computed anew each time: each caller gets a graph of its own to differentiate."""
        return couple(self._mu, self._nu, self._reference, self.problem.free_eps)

    def plan(self, rows: Any = None) -> Gaussian:
        if rows is not None:
            raise Unsupported("the plan of two Gaussians is a Gaussian and has no rows; use plan() or condition(x)")
        cross = self.pieces.cross
        cov = torch.cat([torch.cat([self._mu.cov, cross], -1), torch.cat([cross.mT, self._nu.cov], -1)], -2)
        return Gaussian(torch.cat([self._mu.mean, self._nu.mean], -1), cov)

    @property
    def ends(self) -> tuple[Measure, Measure]:
        return self._mu, self._nu

    def cost(self) -> Tensor:
        pieces = self.pieces
        return pieces.linear_cost + self.problem.free_eps * pieces.information

    def linear_cost(self) -> Tensor:
        return self.pieces.linear_cost

    def gap(self) -> Tensor:
        return torch.zeros_like(self.pieces.linear_cost)

    def information(self) -> Tensor:
        return self.pieces.information

    def between(self, t: float) -> Gaussian:
        law = self._reference.pin(0.0, t)
        d = self._mu.event_shape[0]
        like = self._mu.mean
        near, far = (linalg.matrix(part.to(like), d) for part in (law.near, law.far))
        mixed = near @ self.pieces.cross @ far.mT
        cov = near @ self._mu.cov @ near.mT + far @ self._nu.cov @ far.mT + mixed + mixed.mT
        cov = cov + linalg.scaled(self.problem.free_eps, linalg.matrix(law.cov.to(like), d))
        shift = law.shift.to(like)
        mean = (near @ self._mu.mean[..., None] + far @ self._nu.mean[..., None])[..., 0] + shift
        return Gaussian(mean, (cov + cov.mT) / 2)


#: Draws of each marginal behind the values of a `SampledCoupling`, and the seed of their generator.
DRAWS, SEED = 4096, 0


@final
class SampledCoupling(Coupling):
    r"""The plan ``mu(dx) psi(dy) p(y | x) / psi_0(x)`` of potentials whose marginals are known only through samples.

    Its values are Monte Carlo estimates with a generator of their own, the same at every call; `estimate` takes more draws
    and has a standard error.  Expectations over a discrete measure of at most as many atoms are sums.
    """

    def __init__(self, problem: Problem, phi: Potential, psi: Potential) -> None:
        self.problem, self._phi, self._psi = problem, phi, psi

    def plan(self, rows: Any = None) -> Gaussian:
        raise Unsupported(
            "this plan has no matrix: its marginals are not the atoms of its potentials; draw pairs with "
            "sample_pairs(n), or ask for the law of X_1 given points: condition(x)"
        )

    @property
    def ends(self) -> tuple[Measure, Measure]:
        return self.problem.mu, self.problem.nu

    def cost(self) -> Tensor:
        return self._as_tensor(self.estimate(DRAWS))

    def linear_cost(self) -> Tensor:
        return self._as_tensor(self.estimate_linear(DRAWS))

    def gap(self) -> Tensor:
        raise Unsupported(
            "no feasible plan is known here, and so no gap; hold the samples of sample_pairs(n) against nu: "
            "metrics.energy_distance, or see report.error"
        )

    def between(self, t: float) -> None:
        return None

    @torch.no_grad()
    def estimate(self, n: int, *, generator: torch.Generator | None = None) -> Estimate:
        """The dual ``<f, mu> + <g, nu> + eps (m^2 - m)``, m their mass, from ``n`` draws of each, with its standard error.

        ``g`` is the c-transform of ``f`` over the atoms of ``phi``, so that this bounds the entropic cost from below, up to
        the noise of those atoms: it is as reliable as ``phi`` is dense at the scale ``sqrt(eps)``.
        """
        generator = self._seeded(generator)
        reference, eps = self.problem.reference, self.problem.one_eps
        x, a = self._draw(self.problem.mu, n, generator)
        y, b = self._draw(self.problem.nu, n, generator)
        f = -eps * reference.pull_back(self._psi, 0.0, x, eps).log_mass
        pushed, jacobian = reference.push_forward(self._phi, 1.0, y, eps)
        g = -eps * (pushed.log_mass + jacobian.to(y.device) + self.problem.log_normaliser())
        (mean_f, var_f), (mean_g, var_g) = _moments(f, a, self._mass), _moments(g, b, self._mass)
        # the plan has the mass m of its marginals and is held against their product, of mass m^2
        return Estimate(mean_f + mean_g + eps * (self._mass**2 - self._mass), math.sqrt(var_f + var_g))

    @torch.no_grad()
    def estimate_linear(self, n: int, *, generator: torch.Generator | None = None) -> Estimate:
        """``<P, C>`` from ``n`` pairs, with its standard error."""
        generator = self._seeded(generator)
        x = self.problem.mu.sample(n, generator=generator)
        y = self.problem.reference.pull_back(self._psi, 0.0, x, self.problem.eps).sample(generator=generator)
        # each pair on its own: a batch of n problems with one atom on each side
        charge = self.problem.cost.matrix(x[:, None], y[:, None])[:, 0, 0]
        mean, variance = _moments(charge, None, self._mass)
        return Estimate(mean, math.sqrt(variance))

    @property
    def _mass(self) -> float:
        mu = self.problem.mu
        return float(mu.mass) if isinstance(mu, Discrete) else 1.0

    def _seeded(self, generator: torch.Generator | None) -> torch.Generator:
        return torch.Generator(self.problem.device).manual_seed(SEED) if generator is None else generator

    @staticmethod
    def _draw(measure: Measure, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Places and their weights; None for draws, which weigh the same."""
        if isinstance(measure, Discrete) and measure.n <= n:
            assert measure.points is not None
            return measure.points, measure.weights
        return measure.sample(n, generator=generator), None

    def _as_tensor(self, estimate: Estimate) -> Tensor:
        return torch.tensor(estimate.value, dtype=self.problem.dtype, device=self.problem.device)


def _moments(values: Tensor, weights: Tensor | None, mass: float) -> tuple[float, float]:
    """The integral over a measure of ``mass`` and the variance of its error; a weighted sum is exact."""
    values = values.double()
    if weights is not None:
        live = weights > 0
        return float((weights.double()[live] * values[live]).sum()), 0.0
    return mass * float(values.mean()), mass**2 * float(values.var()) / len(values)
