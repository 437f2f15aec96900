"""The bridge that two potentials and a reference make: exact plan, drift, density and paths, without time stepping."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from . import linalg
from .arrays import DTYPES, as_count, as_number, as_tensor, compute_dtype
from .bounds import Bounds
from .bridge import Bridge, DualPotential, Potentials, Report, in_result_dtype
from .costs import MatrixCost
from .coupling import Coupling, DiscreteCoupling, GaussianCoupling, SampledCoupling
from .errors import InvalidProblem, Unsupported
from .linalg import along
from .measures import Discrete, Gaussian, Measure
from .pack import pack
from .potentials import Atoms, Potential, Tilted
from .problem import Problem
from .reference import LinearReference
from .relaxed import damping
from .rounding import ATOMS_ONLY, FeasiblePlan, SparsePlan, permutation

#: Entries of each row among which a permutation is first looked for.
NEAREST = 16


@final
class PotentialBridge(Bridge):
    """``dP = phi(dx) p(X_1 = y | X_0 = x) psi(dy)`` filled with bridges of the reference.

    With ``phi = mu e^{f/eps}`` pushed forward and ``psi = nu e^{g/eps}`` pulled back by the reference,
    ``p_t = phi_t psi_t`` and the drift is ``b + eps B B' grad log psi_t``.
    """

    def __init__(self, problem: Problem, phi: Potential, psi: Potential, report: Report) -> None:
        self.problem, self.phi, self.psi, self.report = problem, phi, psi, report
        self.coupling: Coupling = _coupling(problem, phi, psi)
        self._attached = False
        # where potentials are constants, so is eps
        self._eps = problem.free_eps if isinstance(self.coupling, GaussianCoupling) else problem.eps

    def differentiable(self, *, unroll: int | None = None) -> PotentialBridge:
        """The same bridge, with derivatives in the data: potentials, plan, map, drift and density follow points, weights, eps.

        ``df``, ``dg`` solve the linearised Schrödinger system (`sbot.implicit`): memory and time do not depend on how many
        iterations the solver took.  On the bridge as it was solved the potentials are constants, and only `cost` has
        derivatives in the data.  Derivatives of higher order (``create_graph=True``) are dense; `cost` has them on either
        bridge.  The potentials of a partial plan have kinks where the set of atoms that are used up changes; at a kink the
        derivative is that of one side.

        Parameters
        ----------
        unroll : differentiate through this many Sinkhorn iterations from the solution instead: a truncated series, for
            comparison; its error falls like the error of Sinkhorn's iterations.

        Raises
        ------
        Unsupported : a plan that does not couple atoms; ``unroll`` for a partial plan.
        InvalidProblem : weights that want a gradient where some are zero.

        Examples
        --------
        >>> import torch, sbot
        >>> y = torch.tensor([[0.0], [1.0]], dtype=torch.float64, requires_grad=True)
        >>> bridge = sbot.solve_bridge(torch.zeros(1, 1, dtype=torch.float64), y, 0.5).differentiable()
        >>> bridge.transport().sum().backward()                                        # the mean of y
        >>> y.grad.flatten()
        tensor([0.5000, 0.5000], dtype=torch.float64)
        """
        if not isinstance(self.coupling, DiscreteCoupling) or not isinstance(self.psi, Atoms):
            raise Unsupported("derivatives in the data are known for atoms; Gaussians have theirs without this call")
        phi, psi = self.coupling.attached(None if unroll is None else as_count(unroll, "unroll"))
        return PotentialBridge(self.problem, phi, psi, self.report)._following(True)

    def _following(self, attached: bool) -> PotentialBridge:
        """This bridge, whose potentials follow the data where ``attached``: then atoms and eps do so too."""
        if attached:
            self._attached, self._eps = True, self.problem.free_eps
        return self

    def _pick(self, index: tuple[int, ...]) -> PotentialBridge:
        whole, problem, report = self.problem.batch_shape, self.problem.pick(index), self.report
        sizes = (m.n if isinstance(m, Discrete) else 0 for m in (problem.mu, problem.nu))
        phi, psi = (part.pick(index, n) for part, n in zip((self.phi, self.psi), sizes, strict=True))
        which = index[0] if len(index) == 1 else index
        notes = (*report.notes, f"problem {which} of a batch {whole}, of which iterations, history and seconds are")
        if report.errors:
            pair = torch.tensor([report.errors, report.tolerances], dtype=torch.float64).reshape(2, *whole)
            errors, tolerances = (part[index].flatten() for part in pair)
            worst = int((errors / tolerances.clamp(min=1e-300)).argmax())
            done = bool((errors <= tolerances).all()) and report.reason != "precision"
            report = replace(
                report,
                error=float(errors[worst]),
                tolerance=float(tolerances[worst]),
                errors=tuple(errors.tolist()) if problem.batch_shape else (),
                tolerances=tuple(tolerances.tolist()) if problem.batch_shape else (),
                converged=done,
                reason="tolerance" if done else report.reason,
            )
        return PotentialBridge(problem, phi, psi, replace(report, notes=notes))._following(self._attached)

    # ---- static ----------------------------------------------------------------------------------------------------

    @in_result_dtype
    def plan(self, rows: Any = None) -> Any:
        return self.coupling.plan(rows)

    @in_result_dtype
    def cost(self) -> Tensor:
        """The dual objective: a lower bound that `gap` closes.  Differentiable in points, weights, cost matrix, eps."""
        return self.coupling.cost()

    @in_result_dtype
    def linear_cost(self) -> Tensor:
        return self.coupling.linear_cost()

    @in_result_dtype
    def gap(self) -> Tensor:
        return self.coupling.gap()

    def round(self) -> FeasiblePlan:
        """A plan with exactly the marginals of mu and nu, near this one: `FeasiblePlan`.

        ``cost() <= OT_eps`` from the dual and ``OT_0 <= round().linear_cost()``, whatever the solver reached.  A relaxed
        marginal is left as it is.  Raises `Unsupported` for marginals without atoms.
        """
        return self.coupling.round()

    def bounds(self) -> Bounds:
        """``lower <= OT_0 <= upper`` for unregularised transport, whatever the solver reached; `Bounds`, in float64.

        From above the cost of `round`, from below ``<a, f> + <b, g>`` with ``f_i = min_j C_ij - g_j``.  Both close in on
        ``OT_0`` like ``eps``; of a partial plan ``OT_0`` is over plans of its mass.  Raises `Unsupported` for relaxed marginals
        and for marginals without atoms.
        """
        return self.to(dtype=torch.float64).coupling.bounds()

    def sparse_plan(self, mass: float = 0.99, *, max_per_row: int | None = None) -> SparsePlan:
        """The largest entries of each row that hold ``mass`` of it together, at most ``max_per_row``; streamed.

        Raises `InvalidProblem` for a mass outside (0, 1], `Unsupported` for batches and for marginals without atoms.
        """
        share = as_number(mass, "mass")
        if not 0 < share <= 1:
            raise InvalidProblem(f"mass is {share:g}; give the share of each row to keep, in (0, 1]")
        most = None if max_per_row is None else as_count(max_per_row, "max_per_row")
        if self.problem.batch_shape:
            raise Unsupported("a sparse plan of a batch has no shape; take them one by one, bridge[k], or use top(k)")
        return self.coupling.sparse(share, most)

    @in_result_dtype
    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """The ``k`` largest entries ``P_ij`` of each row and their columns j, each ``(*b, n, k)``; streamed.

        Raises `InvalidProblem` for k below 1 or above m, `Unsupported` for marginals without atoms.
        """
        count = as_count(k, "k")
        nu = self.problem.nu
        if isinstance(nu, Discrete) and count > nu.n:
            raise InvalidProblem(f"k is {count} and nu has {nu.n} atoms; give k <= {nu.n}")
        return self.coupling.top(count)

    def assignment(self) -> Tensor:
        """An atom of nu for each atom of mu, ``(n,)``: for n = m a permutation of large likelihood under the plan.

        ``max over permutations s of sum_i log P_{i, s(i)}`` among the 16 largest entries of each row, or twice as many until
        they hold a permutation: memory is O(n k).  An atom of weight goes to one that has some; those without may go to each
        other over any pair, as they take nothing along.  For n other than m it is the largest entry of each row.  Uses SciPy.
        Raises `Unsupported` for batches, for marginals without atoms, where forbidden pairs leave an atom of weight without a
        partner, or no permutation, and where mu has more atoms of weight than nu.
        """
        if self.problem.batch_shape:
            raise Unsupported("assignments are made one problem at a time; take them one by one: bridge[k]")
        logit, best = (part[:, 0] for part in self.coupling.top_logits(1))
        mu, nu = self.problem.mu, self.problem.nu
        assert isinstance(mu, Discrete) and isinstance(nu, Discrete)
        assert isinstance(self.psi, Atoms)
        live, taken = mu.weights > 0, self.psi.log_weights > -torch.inf
        closed = torch.nonzero((logit == -torch.inf) & live)
        if len(closed):
            said = f"mu[{int(closed[0])}] has no allowed pair with an atom that has weight"
            raise Unsupported(f"{said}, so none of nu is its own; use plan() or top(k)")
        if mu.n != nu.n or len(set(best.tolist())) == len(best):
            return best
        if (have := int(live.sum())) > (room := int(taken.sum())):
            raise Unsupported(
                f"mu has {have} atoms of weight and nu has {room}, and a permutation would take one of them to an atom without; "
                "use plan() or top(k)"
            )
        k, rest = min(NEAREST, mu.n), torch.nonzero(~taken)[:, 0]
        while True:
            logits, columns = self.coupling.top_logits(k)
            # it is all the same where an atom without weight goes
            logits = torch.where(live[:, None] | (logits == -torch.inf), logits, 0.0)
            if len(rest):
                # as well as to its best it may go to some without weight
                some = torch.arange(min(k, len(rest)), device=rest.device)
                others = rest[((~live).cumsum(0)[:, None] - 1 + some) % len(rest)]
                free = logits.new_zeros(others.shape).masked_fill(live[:, None], -torch.inf)
                logits = torch.cat([logits, free], -1)
                columns = torch.cat([columns, others], -1)
            found = permutation(logits, columns)
            if found is not None:
                return found.to(best)
            if k == mu.n:
                raise Unsupported("forbidden pairs leave no permutation; use plan() or top(k)")
            k = min(2 * k, mu.n)

    @in_result_dtype
    def perplexity(self) -> Tensor:
        """How many atoms of nu each atom of mu is spread over, ``(*b, n)``: the exponential of the entropy of the law of its end.

        ``exp(-sum_j p_j log p_j)`` with ``p_j = P_ij / (P 1)_i``: 1 for a single target, m for all alike.  Streamed, no gradient.
        It is 0 where every pair is forbidden.  Raises `Unsupported` for marginals without atoms.
        """
        return self.coupling.perplexity()

    @in_result_dtype
    def apply(self, v: Any, *, transpose: bool = False) -> Tensor:
        """``P v`` for v ``(*b, m)`` or ``(*b, m, p)``; with ``transpose`` ``P' v`` for ``(*b, n)``.  Streamed, no gradient."""
        p = self.problem
        side = p.mu if transpose else p.nu
        vector = as_tensor(v, "v", like=torch.empty((), dtype=p.dtype, device=p.device)).to(p.dtype)
        size = side.n if isinstance(side, Discrete) else 0
        flat = vector.ndim == len(p.batch_shape) + 1
        columns = vector[..., None] if flat else vector
        if tuple(columns.shape[:-1]) != (*p.batch_shape, size) and size:
            want = (*p.batch_shape, size)
            raise InvalidProblem(f"v has shape {tuple(vector.shape)}; give {want} or {(*want, 'p')}")
        out = self.coupling.apply(columns, transpose)
        return out[..., 0] if flat else out

    def potentials(self) -> Potentials:
        eps, (rho_mu, rho_nu) = self._eps, self.problem.relax
        unit = along(eps, 1)

        tops = self.coupling.moving_ceilings if isinstance(self.coupling, DiscreteCoupling) else None

        def f(x: Any) -> Tensor:
            value = -damping(rho_mu, unit) * unit * self.condition(x).log_mass
            return value if tops is None else torch.minimum(value, tops[0])

        def g(y: Any) -> Tensor:
            points = self._points(y, "y")
            tilted, jacobian = self.problem.reference.push_forward(self.phi, 1.0, points, eps)
            log_mass = tilted.log_mass + jacobian.to(self.problem.device) + self.problem.log_normaliser(eps)
            value = -damping(rho_nu, unit) * unit * log_mass
            return value if tops is None else torch.minimum(value, tops[1])

        return Potentials(
            DualPotential(self._cast(f), lambda: self._dual_values()[0]),
            DualPotential(self._cast(g), lambda: self._dual_values()[1]),
        )

    def _cast(self, function: Any) -> Any:
        return lambda x: function(x).to(self.problem.result_dtype)

    @in_result_dtype
    def _dual_values(self) -> tuple[Tensor, Tensor]:
        if not isinstance(self.coupling, DiscreteCoupling):
            raise Unsupported("the plan has no atoms; call the potential at points: potentials().f(x)")
        return self.coupling.attached_values()

    # ---- dynamic ---------------------------------------------------------------------------------------------------

    def condition(self, x: Any = None, s: float = 0.0) -> Tilted:
        time = self._time(s, "s")
        if x is None and time > 0:
            raise Unsupported(f"the atoms of mu are places at s = 0, not at s = {time:g}; give points x")
        if x is None and not isinstance(self.problem.mu, Discrete):
            raise Unsupported("mu has no atoms; give points x, such as mu.sample(1000)")
        # at the atoms the map moves with them through psi too: no gradient is better than a part of one
        points = self._atoms() if x is None else self._points(x)
        if time == 1:
            raise Unsupported("given X_1 = x there is nothing left to know; ask at s < 1")
        return self.problem.reference.pull_back(self.psi, time, points, self._eps)

    def _atoms(self) -> Tensor:
        here = self.problem.sites[0]
        return here if self._attached else here.detach()

    @in_result_dtype
    def drift(self, t: float, x: Any) -> Tensor:
        """``b(t, x) + eps B B' Phi(1, t)' score``, with the score of the tilted end (Tweedie); finite for t < 1."""
        time, points, reference = *self._place(t, x), self._linear()
        if time == 1:
            score = self.psi.score(points)
        else:
            phi = reference.transition(time, 1.0).phi.to(points)
            tilted = reference.pull_back(self.psi, time, points, self._eps)
            score = linalg.apply(linalg.transpose(phi), tilted.score)
        return reference.drift(time, points) + self._spread(time, score)

    @in_result_dtype
    def reverse_drift(self, t: float, x: Any) -> Tensor:
        """``-b(t, x) + eps B B' grad log phi_t``, in forward time t; finite for t > 0."""
        time, points, reference = *self._place(t, x), self._linear()
        if time == 0:
            score = self.phi.score(points)
        else:
            phi = reference.transition(0.0, time).phi.to(points)
            tilted, _ = reference.push_forward(self.phi, time, points, self._eps)
            score = linalg.apply(linalg.inverse(linalg.transpose(phi)), tilted.score)
        return self._spread(time, score) - reference.drift(time, points)

    @in_result_dtype
    def log_prob(self, t: float, x: Any) -> Tensor:
        """``log phi_t(x) + log psi_t(x)``; an unbalanced bridge integrates to the mass of its plan."""
        time, points, reference = *self._place(t, x), self._linear()
        eps = self._eps
        if time == 0:
            ahead = self.phi.log_density(points)
        else:
            tilted, jacobian = reference.push_forward(self.phi, time, points, eps)
            ahead = tilted.log_mass + jacobian
        if time == 1:
            return ahead + self.psi.log_density(points)
        return ahead + reference.pull_back(self.psi, time, points, eps).log_mass

    def _place(self, t: Any, x: Any) -> tuple[float, Tensor]:
        self._linear()
        return self._time(t), self._points(x)

    def _linear(self) -> LinearReference:
        reference = self.problem.reference
        if not isinstance(reference, LinearReference):
            if isinstance(self.problem.cost, MatrixCost):
                raise Unsupported("a cost matrix has no process; solve with points and reference=sbot.Brownian()")
            raise Unsupported(
                f"{reference!r} knows only its two ends: no drift, density or path; solve with reference=sbot.Brownian()"
            )
        return reference

    def _spread(self, t: float, score: Tensor) -> Tensor:
        noise = self._linear().coefficients(t)[2].to(score)
        return linalg.apply(linalg.scaled(self._eps, noise), score)

    # ---- sampling --------------------------------------------------------------------------------------------------

    def marginal(self, t: float) -> Measure:
        time = self._time(t)
        if time in (0.0, 1.0):
            return self.coupling.ends[int(time)]
        self._linear()
        return self.coupling.between(time) or super().marginal(time)

    def _pairs(self, n: Any, generator: torch.Generator | None, replace: bool = True) -> tuple[Tensor, Tensor]:
        if isinstance(self.coupling, DiscreteCoupling):
            pairs = zip(self.sample_indices(n, generator=generator, replace=replace), self.problem.values, strict=True)
            first, second = (index if points is None else _taken(points, index) for index, points in pairs)
            return first, second
        if not replace:
            raise Unsupported(ATOMS_ONLY)
        with torch.no_grad():
            x = self.coupling.ends[0].sample(self._count(n), generator=generator)
            return x, self.condition(x).sample(generator=generator)

    @in_result_dtype
    def sample_pairs(
        self, n: int, *, generator: torch.Generator | None = None, replace: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Draw ``n`` pairs ``(X_0, X_1)`` from the plan, each ``(*b, n, d)``; bin numbers ``(*b, n)`` for histograms.

        Without replacement (between atoms only) as in `sample_indices`.
        """
        return self._pairs(n, generator, replace)

    def sample_indices(
        self, n: int, *, generator: torch.Generator | None = None, replace: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Draw ``n`` pairs of atoms from the plan by their numbers: rows and columns, each ``(*b, n)``.

        With ``replace=False`` no pair comes twice: each is drawn in proportion to ``P_ij`` among those that are left, in this
        order; streamed, in O(n) memory beside a tile.  Raises `InvalidProblem` where fewer than ``n`` pairs have mass,
        `Unsupported` for marginals without atoms.
        """
        if not isinstance(replace, bool):
            raise InvalidProblem(f"replace is {replace!r}; give True or False")
        return self.coupling.draw(self._count(n), replace, generator)

    @in_result_dtype
    def sample_paths(self, n: int, times: Any, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` paths ``(*b, n, len(times), d)``: ends from the plan, between them the pinned reference; exact."""
        listed, reference = self._times(times), self._linear()
        x, end = self._pairs(n, generator)
        now, path = 0.0, []
        with torch.no_grad():
            for t in listed:
                if t == 1:
                    x = end
                elif t > now:
                    x = reference.pin(now, t).sample(x, end, self.problem.eps, generator=generator)
                now = t
                path.append(x)
        return torch.stack(path, -2)

    # ---- keeping ---------------------------------------------------------------------------------------------------

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> PotentialBridge:
        if dtype is not None and dtype not in DTYPES:
            raise InvalidProblem(f"dtype is {dtype!r}; give torch.float64, float32, float16 or bfloat16")
        inner = None if dtype is None else compute_dtype(dtype)
        return PotentialBridge(
            replace(
                self.problem.to(dtype=inner, device=device),
                result_dtype=self.problem.result_dtype if dtype is None else dtype,
            ),
            self.phi.to(dtype=inner, device=device),
            self.psi.to(dtype=inner, device=device),
            self.report,
        )._following(self._attached)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return pack(self.problem, self.phi, self.psi, self.report)


def _taken(points: Tensor, index: Tensor) -> Tensor:
    return torch.take_along_dim(points.detach(), index[..., None], -2)


def _coupling(problem: Problem, phi: Potential, psi: Potential) -> Coupling:
    mu, nu = problem.mu, problem.nu
    if isinstance(phi, Atoms) and isinstance(psi, Atoms):
        if phi.lies_on(mu) and psi.lies_on(nu):
            return DiscreteCoupling(problem, phi, psi)
    elif isinstance(mu, Gaussian) and isinstance(nu, Gaussian) and not isinstance(phi, Atoms):
        return GaussianCoupling(problem)
    return SampledCoupling(problem, phi, psi)
