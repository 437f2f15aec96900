"""Plans that a caller can use as they are: exactly feasible ones, and sparse ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from .arrays import as_index
from .kernels import COPIES, LogKernel, require_memory
from .linalg import Eps, along

ATOMS_ONLY = (
    "this plan has no entries, since a marginal has no atoms; draw pairs with sample_pairs(n), or solve between samples: "
    "sbot.solve_bridge(mu.sample(1000), nu.sample(1000), eps)"
)


@final
@dataclass(frozen=True)
class FeasiblePlan:
    """``P'_ij = exp(left_i + right_j - C_ij / eps) + rest_mu_i rest_nu_j``: a plan with the marginals of its problem.

    ``P' = diag(u) P diag(v) + r s' / |r|_1``, with rows and then columns of P scaled down to what they may hold, and what is
    then missing filled up (Altschuler, Weed and Rigollet 2017, algorithm 2).  Everything streams; numbers are float64.

    Attributes
    ----------
    left, right : ``(*b, n)`` and ``(*b, m)``.
    rest_mu, rest_nu : the factors of the rank-one part.

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

    @torch.no_grad()
    def plan(self, rows: Any = None) -> Tensor:
        """The matrix ``(*b, n, m)``, or some of its rows."""
        n, m = self.kernel.shape
        if rows is not None:
            index = as_index(rows, n, "rows", self.left.device)
            return torch.cat([self._tile(slice(int(i), int(i) + 1)) for i in index], -2)
        size = 8 * self.rest_mu.numel() * m
        require_memory(size, self.left.device, f"a dense plan of shape {(n, m)}", "ask for plan(rows=...) in parts")
        return torch.cat([self._tile(tile) for tile in self.kernel.tiles()], -2)

    def _tile(self, rows: slice) -> Tensor:
        part = _log_part(self.kernel, rows, self.left, self.right, self.eps).exp_()
        return part.addcmul_(self.rest_mu[..., rows, None], self.rest_nu[..., None, :])

    @torch.no_grad()
    def linear_cost(self) -> Tensor:
        """``<P', C>``, ``(*b,)``: from above, unregularised transport; infinite where the filling uses a forbidden pair."""
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
) -> FeasiblePlan:
    """Round ``exp(left_i + right_j - C_ij / eps)`` to the marginals that are hard; float64 in and out."""
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
    rest_a, rest_b = torch.zeros_like(a), torch.zeros_like(b)
    if all(hard):
        rest_a = (a - sums(0, left, right)).clamp(min=0)
        rest_b = (b - sums(1, right, left)).clamp(min=0)
        rest_b = rest_b / rest_a.sum(-1, keepdim=True).clamp(min=1e-300)
    return FeasiblePlan(left, right, rest_a, rest_b, eps, kernel)


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
    """The permutation of largest ``sum_i logits`` among the entries ``(n, k)`` of these columns; None where there is none."""
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
