"""Plans that a caller can use as they are: exactly feasible ones, and sparse ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from .arrays import as_index
from .kernels import COPIES, LogKernel
from .linalg import Eps, along
from .memory import require_memory
from .pace import TINY, Pace, half_step

ATOMS_ONLY = (
    "this plan has no entries, since a marginal has no atoms; draw pairs with sample_pairs(n), or solve between samples: "
    "sbot.solve_bridge(mu.sample(1000), nu.sample(1000), eps)"
)


#: Beside forbidden pairs: by how many times the mass that is missing a plan is scaled down at first, by how many times more
#: where this leaves no way to fill it up, and how often that is tried: from rounding to all of it.
MARGIN, GROWTH, TRIES = 8.0, 32.0, 12
#: Iterations of filling up between looks at the error, looks after which it has to have fallen to nine tenths, and iterations in
#: all, where the pattern is kept and where it streams.
LOOK, PATIENCE, KEPT, STREAMED = 4, 8, 4096, 128
#: What a plan may lack of its mass, in L1: rounding of float64 sums.
ROUNDED = 1e-14
#: Pairs up to which those of no use are looked for.
PAIRS = 4_000_000


@final
@dataclass(frozen=True)
class FeasiblePlan:
    """``P'_ij = exp(left_i + right_j - C_ij / eps) + rest_mu_i rest_nu_j``: a plan with the marginals of its problem.

    ``P' = diag(u) P diag(v) + r s' / |r|_1``, with rows and then columns of P scaled down to what they may hold, and what is
    then missing filled up (Altschuler, Weed and Rigollet 2017, algorithm 2).  Beside forbidden pairs all of P is scaled down a
    little more, so that the second term can be zero on these: its factors are then those of the plan closest to ``r s'`` with
    such marginals.  Pairs which are allowed and of no use, since their mass would be lacking elsewhere, are zero as well.
    Everything streams; numbers are float64.

    Attributes
    ----------
    left, right : ``(*b, n)`` and ``(*b, m)``.
    rest_mu, rest_nu : the factors of the second term.
    within : ``(*b,)``, whether the second term is on allowed pairs only: where none was found, the cost is infinite.  None where
        no pair is forbidden.
    parts : ``(*b, n)`` and ``(*b, m)``, the numbers of the parts between which nothing may go; None where there is one.

    Examples
    --------
    >>> import torch, sbot
    >>> x, y = torch.rand(20, 2), torch.rand(30, 2)
    >>> rounded = sbot.solve_bridge(x, y, 0.1, solver=sbot.Sinkhorn(tol=1e-2)).round()
    >>> bool((rounded.plan().sum(1) - 1 / 20).abs().max() < 1e-8)
    True
    """

    left: Tensor
    right: Tensor
    rest_mu: Tensor
    rest_nu: Tensor
    eps: Eps
    kernel: LogKernel
    within: Tensor | None = None
    parts: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def plan(self, rows: Any = None) -> Tensor:
        """The matrix ``(*b, n, m)``, or some of its rows."""
        n, m = self.kernel.shape
        if rows is not None:
            index = as_index(rows, n, "rows", self.left.device)
            none = self.left.new_empty((*self.left.shape[:-1], 0, m))
            return torch.cat([none, *(self._tile(slice(int(i), int(i) + 1)) for i in index)], -2)
        size = 8 * self.rest_mu.numel() * m
        require_memory(size, self.left.device, f"a dense plan of shape {(n, m)}", "ask for plan(rows=...) in parts")
        return torch.cat([self._tile(tile) for tile in self.kernel.tiles()], -2)

    def _tile(self, rows: slice) -> Tensor:
        part = _log_part(self.kernel, rows, self.left, self.right, self.eps)
        if self.parts is not None:
            part.masked_fill_(self.apart(rows), -torch.inf)
        if self.within is not None:
            return part.exp_().add_(self.added(rows, self.kernel.entries(rows)))
        return part.exp_().addcmul_(self.rest_mu[..., rows, None], self.rest_nu[..., None, :])

    def added(self, rows: slice, cost: Tensor) -> Tensor:
        """The second term in these rows, given their cost."""
        term = self.rest_mu[..., rows, None] * self.rest_nu[..., None, :]
        if self.within is None:
            return term
        return term.masked_fill_(self.within[..., None, None] & ~self.open(rows, cost), 0)

    def open(self, rows: slice, cost: Tensor) -> Tensor:
        """Between which pairs something may go."""
        return cost < torch.inf if self.parts is None else (cost < torch.inf) & ~self.apart(rows)

    def apart(self, rows: slice) -> Tensor:
        """Pairs of different parts."""
        assert self.parts is not None
        return self.parts[0][..., rows, None] != self.parts[1][..., None, :]

    @torch.no_grad()
    def linear_cost(self) -> Tensor:
        """``<P', C>``, ``(*b,)``: from above, unregularised transport; infinite where a forbidden pair is used."""
        total = torch.zeros(self.left.shape[:-1], dtype=torch.float64, device=self.left.device)
        for rows in self.kernel.tiles():
            p, c = self._tile(rows), self.kernel.entries(rows).double()
            total += torch.where(p > 0, p * c, 0.0).sum((-2, -1))
        return total

    @torch.no_grad()
    def marginals(self) -> tuple[Tensor, Tensor]:
        """Sums of rows and of columns, ``(*b, n)`` and ``(*b, m)``."""
        rows, columns = torch.empty_like(self.left), torch.zeros_like(self.right)
        for tile in self.kernel.tiles():
            p = self._tile(tile)
            rows[..., tile] = p.sum(-1)
            columns += p.sum(-2)
        return rows, columns


def _log_part(kernel: LogKernel, rows: slice, left: Tensor, right: Tensor, eps: Eps) -> Tensor:
    """``left_i + right_j - C_ij / eps`` of these rows in float64, in memory of its own."""
    part = kernel.entries(rows).to(torch.float64, copy=True).mul_(along(-1 / eps, 2))
    return part.add_(left[..., rows, None]).add_(right[..., None, :])


def feasible(
    kernel: LogKernel,
    left: Tensor,
    right: Tensor,
    eps: Eps,
    marginals: tuple[Tensor, Tensor],
    hard: tuple[bool, bool],
    may_forbid: bool,
) -> FeasiblePlan:
    """Round ``exp(left_i + right_j - C_ij / eps)`` to the marginals that are hard; float64 in and out.

    ``may_forbid`` says whether pairs may be forbidden.
    """
    a, b = marginals
    kernel.copies = COPIES

    def sums(side: int, here: Tensor, there: Tensor) -> Tensor:
        turned = kernel if side == 0 else kernel.T
        turned.copies = COPIES
        # one tensor for all sums: small ones that stay between the tiles would keep their memory from being used again
        out = torch.empty_like(here)
        for rows in turned.tiles():
            out[..., rows] = _log_part(turned, rows, here, there, eps).exp_().sum(-1)
        return out

    def shift(ratio: Tensor, weights: Tensor, cap: bool) -> Tensor:
        # where there is no mass a row is left as it is
        ratio = torch.where((weights > 0) & torch.isfinite(ratio), ratio, 1.0)
        return (ratio.clamp(max=1.0) if cap else ratio).log()

    if hard[0]:
        left = left + shift(a / sums(0, left, right), a, hard[1])
    if hard[1]:
        right = right + shift(b / sums(1, right, left), b, hard[0])
    bare = FeasiblePlan(left, right, torch.zeros_like(a), torch.zeros_like(b), eps, kernel)
    if not all(hard):
        return bare
    full = bare.marginals()
    rest_a, rest_b = (a - full[0]).clamp(min=0), (b - full[1]).clamp(min=0)
    plan = replace(bare, rest_mu=rest_a, rest_nu=rest_b / rest_a.sum(-1, keepdim=True).clamp(min=1e-300))
    if not may_forbid or not any(bool((kernel.entries(rows) == torch.inf).any()) for rows in kernel.tiles()):
        return plan
    found = _filled(plan, (a, b), full)
    assert found.within is not None
    if bool(found.within.all()) or a.shape[:-1].numel() * a.shape[-1] * b.shape[-1] > PAIRS:
        return found
    # the allowed pairs of no use stand in the way
    parts = _parts(bare, rest_a.sum(-1), found.within)
    bare = replace(bare, parts=parts)
    again = _filled(bare, (a, b), bare.marginals())
    assert again.within is not None
    # where they do not help the plan is the one without parts
    new = (again.within & ~found.within)[..., None]
    return replace(
        found,
        left=torch.where(new, again.left, found.left),
        rest_mu=torch.where(new, again.rest_mu, found.rest_mu),
        rest_nu=torch.where(new, again.rest_nu, found.rest_nu),
        within=again.within | found.within,
        parts=(torch.where(new, parts[0], 0), torch.where(new, parts[1], 0)),
    )


def _parts(plan: FeasiblePlan, lost: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the parts between which no plan with these marginals has mass; one part where the problem is ``whole``.

    Where atoms S of mu have no more room than their own mass, ``a(S) = b(N(S))``, all that ``N(S)`` holds comes from S, and a
    plan that lacks ``lost`` has no more than that on each of the other pairs with ``N(S)``.  Parts are those of the graph that
    goes from rows to columns over allowed pairs, and back over entries that are larger.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    n, m = plan.kernel.shape
    first, second = (torch.zeros(side.shape, dtype=torch.int64) for side in (plan.left, plan.right))
    allowed, entries = plan.kernel.entries(slice(0, n)) < torch.inf, plan.plan()
    for k in (~whole).flatten().nonzero()[:, 0].tolist():
        at = np.unravel_index(k, whole.shape)
        there = allowed[at].nonzero().cpu().numpy()
        back = (entries[at] > 2 * lost[at]).nonzero().cpu().numpy()
        tails, heads = np.r_[there[:, 0], n + back[:, 1]], np.r_[n + there[:, 1], back[:, 0]]
        graph = coo_matrix((np.ones(len(tails), dtype=np.int8), (tails, heads)), shape=(n + m, n + m))
        labels = torch.from_numpy(connected_components(graph, connection="strong")[1]).long()
        first[at], second[at] = labels[:n], labels[n:]
    return first.to(plan.left.device), second.to(plan.left.device)


def _filled(plan: FeasiblePlan, marginals: tuple[Tensor, Tensor], sums: tuple[Tensor, Tensor]) -> FeasiblePlan:
    """The plan filled up on allowed pairs, where a way is found; ``sums`` are those of its first term."""
    a, b = marginals
    whole = a.sum(-1, keepdim=True)
    lost = torch.maximum(*((w - held).clamp(min=0).sum(-1, keepdim=True) for w, held in zip((a, b), sums, strict=True)))
    left, u, v = plan.left, plan.rest_mu, plan.rest_nu
    within = torch.zeros(a.shape[:-1], dtype=torch.bool, device=a.device)
    pattern, rounds = _Pattern(plan), 0
    for k in range(TRIES):
        share = (MARGIN * GROWTH**k * lost / whole).clamp(max=1.0)
        rest_a, rest_b = ((w - (1 - share) * held).clamp(min=0) for w, held in zip((a, b), sums, strict=True))
        # the masses of both sides are equal but for rounding, which no filling could make up for
        rest_b = rest_b * (rest_a.sum(-1, keepdim=True) / rest_b.sum(-1, keepdim=True).clamp(min=TINY))
        *found, done, used = _on_pattern(pattern, rest_a, rest_b, ROUNDED * whole[..., 0], pattern.most - rounds)
        rounds += used
        new = (done & ~within)[..., None]
        left = torch.where(new, plan.left + torch.log1p(-share), left)
        u, v = torch.where(new, found[0], u), torch.where(new, found[1], v)
        within = within | done
        if bool((within[..., None] | (share == 1)).all()) or rounds >= pattern.most:
            break
    return replace(plan, left=left, rest_mu=u, rest_nu=v, within=within)


class _Pattern:
    """The pairs of a plan between which something may go, as a matrix of ones and zeros: kept where it is small."""

    def __init__(self, plan: FeasiblePlan) -> None:
        self._sides = plan, replace(plan, kernel=plan.kernel.T, parts=None if plan.parts is None else plan.parts[::-1])
        kernel = plan.kernel
        kept = plan.left.numel() * kernel.shape[1] <= PAIRS
        every = slice(0, kernel.shape[0])
        self._kept = plan.open(every, kernel.entries(every)).to(plan.left) if kept else None
        #: iterations that it may be used for
        self.most = KEPT if kept else STREAMED

    def sums(self, v: Tensor, side: int) -> Tensor:
        """``sum_j v_j`` over the pairs of each row, or of each column for ``side`` 1."""
        if self._kept is not None:
            return ((self._kept if side == 0 else self._kept.mT) @ v[..., None])[..., 0]
        plan = self._sides[side]
        plan.kernel.copies = COPIES
        out = v.new_empty((*v.shape[:-1], plan.kernel.shape[0]))
        for rows in plan.kernel.tiles():
            out[..., rows] = (plan.open(rows, plan.kernel.entries(rows)).to(v) @ v[..., None])[..., 0]
        return out


def _on_pattern(
    pattern: _Pattern, r: Tensor, s: Tensor, tolerance: Tensor, most: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """``u`` and ``v`` such that ``u_i v_j`` on the pattern has sums r and s, whether it does, ``(*b,)``, and the iterations.

    Sinkhorn's iterations, over-relaxed, and given up where they do not get there soon.
    """
    u, v, best, pace = torch.ones_like(r), s, torch.full_like(tolerance, torch.inf), Pace(torch.ones_like(tolerance))
    used, done = 0, torch.zeros_like(tolerance, dtype=torch.bool)
    while used < most:
        for left in reversed(range(LOOK)):
            omega = pace.omega
            u = half_step(u, r, pattern.sums(v, 0) + TINY, 1.0, omega)
            # exact where the error is looked at
            v = half_step(v, s, pattern.sums(u, 1) + TINY, 1.0, omega if left else None)
        error = (u * pattern.sums(v, 0) - r).abs().sum(-1)
        done, used = error <= tolerance, used + LOOK
        if bool(done.all()) or not bool(torch.isfinite(error).all()):
            break
        pace.look(error, LOOK)
        if used % (LOOK * PATIENCE) == LOOK:
            if bool((done | ~(error <= 0.9 * best)).all()):
                break
            best = error
    return u, v, done, used


@final
@dataclass(frozen=True)
class SparsePlan:
    """The largest entries of a plan, in the order of its rows.

    Attributes
    ----------
    rows, columns : ``(k,)`` atom numbers of mu and of nu.
    values : ``(k,)``, the entries ``P_ij`` as they are: nothing is rescaled.
    shape : ``(n, m)``.
    dropped : mass of the plan that is left out.

    Examples
    --------
    >>> import torch, sbot
    >>> x = torch.linspace(0, 1, 50)[:, None]
    >>> sparse = sbot.solve_bridge(x, x, 1e-3).sparse_plan(mass=0.9)
    >>> sparse.to_torch().shape, sparse.dropped <= 0.1
    (torch.Size([50, 50]), True)
    """

    rows: Tensor
    columns: Tensor
    values: Tensor
    shape: tuple[int, int]
    dropped: float

    def to_torch(self) -> Tensor:
        """A sparse COO tensor, coalesced."""
        return torch.sparse_coo_tensor(
            torch.stack([self.rows, self.columns]), self.values, self.shape, check_invariants=True
        ).coalesce()

    def to_scipy(self) -> Any:
        """A `scipy.sparse.csr_matrix`; needs SciPy."""
        from scipy.sparse import csr_matrix

        index = (self.rows.cpu().numpy(), self.columns.cpu().numpy())
        return csr_matrix((self.values.cpu().numpy(), index), shape=self.shape)


def permutation(logits: Tensor, columns: Tensor) -> Tensor | None:
    """The permutation of largest ``sum_i logits`` among the finite entries ``(n, k)`` of these columns; None if there is none."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    n, k = logits.shape
    # one entry of each row: a constant of the row changes nothing, and a weight of zero would be no edge
    worth = (logits.amax(-1, keepdim=True) - logits + 1).double().cpu()
    row = torch.arange(n)[:, None].expand(n, k)
    live = torch.isfinite(worth)
    graph = csr_matrix((worth[live].numpy(), (row[live].numpy(), columns.cpu()[live].numpy())), shape=(n, n))
    try:
        rows, matched = min_weight_full_bipartite_matching(graph)
    except ValueError:
        return None
    out = torch.empty(n, dtype=torch.int64)
    out[torch.from_numpy(rows).long()] = torch.from_numpy(matched).long()
    return out
