r"""Whether the allowed pairs can carry the masses (Hall's condition, the maximal flow), and which atoms stand in the way.

A plan with marginals a and b on the allowed pairs exists exactly where ``a(S) <= b(N(S))`` for every set S of atoms of mu,
``N(S)`` being what they may go to; one of mass s within bounds a and b where ``a(S) - b(N(S)) <= sum a - s``.  A set that
breaks this is a proof, however it was found: from the pattern, by its connected parts and a maximal flow, or from the
potentials of a solve, which grow without bound on such a set.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from .arrays import as_array, in_problem
from .kernels import LogKernel

#: Allowed pairs, after atoms with the same pairs are taken as one, up to which a maximal flow is computed.
PAIRS = 200_000
#: Atoms that a message lists.
LISTED = 8
#: Capacities of the flow are whole numbers that sum to this; what they find is checked with the masses themselves.
UNITS = 2**30
#: Relative difference of two ratios of masses that whole capacities can tell.
RESOLVED = 1e-7


@final
@dataclass(frozen=True)
class Shortage:
    """Atoms ``here`` whose ``mass`` exceeds the ``room`` of all that they may go to, ``there``, by more than may stay behind.

    What may stay behind, ``spare``, is None where the plan is not partial.
    """

    here: tuple[int, ...]
    there: tuple[int, ...]
    mass: float
    room: float
    spare: float | None
    how: str
    problem: tuple[int, ...] = ()
    flipped: bool = False

    def __str__(self) -> str:
        names = ("nu", "mu") if self.flipped else ("mu", "nu")
        where = f"may only {'come from' if self.flipped else 'go to'} {_atoms(self.there)} of {names[1]}, whose mass is"
        partial = self.spare is not None
        held = f" (and {self.spare:.6g} may stay behind)" if partial else ""
        remedy = "allow a pair, or carry less: mass=" if partial else "allow a pair, or relax the marginals: relax="
        return (
            f"the forbidden pairs (+inf) leave no plan{in_problem(self.problem)}: "
            f"{_atoms(self.here)} of {names[0]} hold {self.mass:.6g} and {where} {self.room:.6g}{held}; "
            f"found by {self.how}; {remedy}"
        )


def _atoms(index: tuple[int, ...]) -> str:
    if not index:
        return "no atoms"
    shown = ", ".join(str(i) for i in index[:LISTED])
    return f"atoms [{shown}{', ...' if len(index) > LISTED else ''}]" + (
        f" ({len(index)} of them)" if len(index) > LISTED else ""
    )


def by_pattern(allowed: Tensor, a: Tensor, b: Tensor, mass: Tensor | None, slack: float) -> Shortage | None:
    """A set of atoms without room among ``allowed`` ``(*b, n, m)``, where the pattern is small enough to tell; else None.

    ``mass`` is that of a partial plan, None where both marginals are met; ``slack`` is what rounding explains.
    """
    batch = tuple(a.shape[:-1])
    n, m = a.shape[-1], b.shape[-1]
    flat = as_array(allowed.reshape(-1, n, m))
    sides = as_array(a.double().reshape(-1, n)), as_array(b.double().reshape(-1, m))
    wanted = None if mass is None else as_array(mass.double().reshape(-1))
    for k, (pattern, supply, demand) in enumerate(zip(flat, *sides, strict=True)):
        spare = None if wanted is None else max(0.0, float(supply.sum() - wanted[k]))
        found = _one(pattern, supply, demand, spare, slack, _place(k, batch))
        if found is not None:
            return found
    return None


def _place(k: int, batch: tuple[int, ...]) -> tuple[int, ...]:
    """The index of the k-th problem of a batch."""
    return tuple(int(i) for i in np.unravel_index(k, batch)) if batch else ()


def _one(allowed: Any, a: Any, b: Any, spare: float | None, slack: float, problem: tuple[int, ...]) -> Shortage | None:
    live = np.flatnonzero(a > 0), np.flatnonzero(b > 0)
    pattern = allowed[np.ix_(*live)]
    # atoms with the same pairs are one atom
    rows, row_of = _alike(pattern)
    columns, column_of = _alike(rows.T)
    small = columns.T
    supply = np.bincount(row_of, a[live[0]], len(small))
    demand = np.bincount(column_of, b[live[1]], small.shape[1])
    margin = slack * float(a.sum())

    def shortage(chosen: Any, how: str, flipped: bool = False) -> Shortage | None:
        grid = small.T if flipped else small
        reached = grid[chosen].any(0)
        own, other = (demand, supply) if flipped else (supply, demand)
        mass, room = float(own[chosen].sum()), float(other[reached].sum())
        if mass - room - (spare or 0.0) <= margin:
            return None
        of = (column_of, row_of) if flipped else (row_of, column_of)
        ends = live[::-1] if flipped else live
        here, there = (ends[side][flags[of[side]]] for side, flags in enumerate((chosen, reached)))
        return Shortage(tuple(here.tolist()), tuple(there.tolist()), mass, room, spare, how, problem, flipped)

    if spare is None:
        for part in _parts(small):
            found = shortage(part, "the connected parts of the allowed pairs")
            other = shortage(small[part].any(0), "the connected parts of the allowed pairs", True)
            if found or other:
                return found or other
    if np.count_nonzero(small) > PAIRS:
        return None
    return shortage(_cut(small, supply, demand), "a maximal flow through the allowed pairs")


class Limit(NamedTuple):
    """Where alternating half-steps end where no plan has both marginals: rows of a, columns of ``factor b``, and zeros outside
    the pairs ``kept``."""

    factor: Tensor
    kept: Tensor


def limit(allowed: Tensor, a: Tensor, b: Tensor) -> Limit | None:
    """What alternating half-steps on the pairs ``allowed`` ``(n, m)`` end at, the rows last, for weights ``(n,)`` and ``(m,)``.

    They are alternating projections, and end at the plan with rows of a whose columns b' are nearest to b in relative entropy:
    the set S of atoms of mu with the largest ``a(S) / b(N(S))`` fills ``N(S)`` to that multiple of b, no other atom sends
    anything there, and so on with the rest (Fujishige 1980: the lexicographically optimal base).  None where an atom has no
    partner, or the pattern is too large to tell.
    """
    supply, demand = (as_array(side.double()) for side in (a, b))
    live = np.flatnonzero(supply > 0), np.flatnonzero(demand > 0)
    rows, row_of = _alike(as_array(allowed)[np.ix_(*live)])
    columns, column_of = _alike(rows.T)
    small = columns.T
    if np.count_nonzero(small) > PAIRS or not (small.any(0).all() and small.any(1).all()):
        return None
    masses = np.bincount(row_of, supply[live[0]], len(small)), np.bincount(column_of, demand[live[1]], small.shape[1])
    factor, blocks = np.ones(len(demand)), [np.full(len(side), -1) for side in (supply, demand)]
    for k, (here, there) in enumerate(_blocks(small, *masses)):
        ends = live[0][here[row_of]], live[1][there[column_of]]
        factor[ends[1]] = supply[ends[0]].sum() / demand[ends[1]].sum()
        for block, end in zip(blocks, ends, strict=True):
            block[end] = k
    mine, other = (torch.from_numpy(block).to(allowed.device) for block in blocks)
    apart = (mine[:, None] != other) & (mine >= 0)[:, None] & (other >= 0)
    return Limit(torch.from_numpy(factor).to(b), allowed & ~apart)


def _blocks(pattern: Any, supply: Any, demand: Any) -> Iterator[tuple[Any, Any]]:
    """Rows and columns of the sets of `limit`; every row and column has a partner."""
    left = [(np.ones(len(pattern), dtype=bool), np.ones(pattern.shape[1], dtype=bool))]
    while left:
        here, there = left.pop()
        parts = [
            np.isin(np.arange(len(pattern)), np.flatnonzero(here)[part])
            for part in _parts(pattern[np.ix_(here, there)])
        ]
        if parts:
            left += [(part, pattern[part].any(0) & there) for part in parts]
            continue
        best = here
        while True:  # as Dinkelbach does: a set of a larger ratio than the last, until there is none
            reached = pattern[best].any(0) & there
            ratio = supply[best].sum() / demand[reached].sum()
            grid = np.ix_(here, there)
            found = np.zeros_like(here)
            found[np.flatnonzero(here)[_cut(pattern[grid], supply[here], ratio * demand[there])]] = True
            if not found.any():
                break
            higher = supply[found].sum() / demand[pattern[found].any(0) & there].sum()
            if not higher > ratio * (1 + RESOLVED):
                break
            best = found
        yield best, reached
        rest = here & ~best, there & ~reached
        if rest[0].any():
            left.append(rest)


def _alike(pattern: Any) -> tuple[Any, Any]:
    """The different rows of a pattern, and which of them each row is."""
    packed = np.ascontiguousarray(np.packbits(pattern, axis=1))
    keys = packed.view([("", f"V{packed.shape[1]}")])[:, 0]
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    return pattern[first], which.reshape(-1)


def _parts(pattern: Any) -> list[Any]:
    """The rows of each connected part."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    n, m = pattern.shape
    where = np.nonzero(pattern)
    graph = coo_matrix((np.ones(len(where[0]), bool), (where[0], where[1] + n)), shape=(n + m, n + m))
    count, label = connected_components(graph, directed=False)
    if count == 1:
        return []
    order = np.argsort(label[:n], kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(label[:n][order])) + 1)
    return [np.isin(np.arange(n), part) for part in parts]


def _cut(pattern: Any, supply: Any, demand: Any) -> Any:
    """The rows on the side of the source of a smallest cut."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    n, m = pattern.shape
    source, sink = n + m, n + m + 1
    scale = UNITS / max(supply.sum(), demand.sum())
    ends = [np.floor(side * scale).astype(np.int32) for side in (supply, demand)]
    where = np.nonzero(pattern)
    many = np.full(len(where[0]), 2 * UNITS - 1, dtype=np.int32)
    start = np.concatenate([np.full(n, source), where[0], np.arange(n, n + m)])
    end = np.concatenate([np.arange(n), where[1] + n, np.full(m, sink)])
    graph = coo_matrix((np.concatenate([ends[0], many, ends[1]]), (start, end)), shape=(sink + 1, sink + 1)).tocsr()
    rest = graph.astype(np.int64) - maximum_flow(graph, source, sink).flow.astype(np.int64)
    rest.data = np.where(rest.data > 0, rest.data, 0)
    rest.eliminate_zeros()
    reached = breadth_first_order(rest, source, return_predecessors=False)
    return np.isin(np.arange(n), reached)


@torch.no_grad()
def by_potentials(
    kernel: LogKernel, f: Tensor, a: Tensor, b: Tensor, mass: Tensor | None, slack: float
) -> Shortage | None:
    """A set ``{f_i >= t}`` without room, for any t; one pass over the cost.  f is ``(*b, n)``."""
    height = torch.where(a > 0, f.double(), -torch.inf)
    # t for each column, below which it is among what the set may go to
    highest = torch.full(b.shape, -torch.inf, dtype=torch.float64, device=b.device)
    for rows in kernel.tiles():
        open_ = torch.isfinite(kernel.entries(rows))
        highest = torch.maximum(highest, torch.where(open_, height[..., rows, None], -torch.inf).amax(-2))
    n, m = a.shape[-1], b.shape[-1]
    batch = tuple(a.shape[:-1])
    flat = [part.reshape(-1, part.shape[-1]) for part in (height, highest, a.double(), b.double())]
    spares = torch.zeros(len(flat[0])) if mass is None else (a.double().sum(-1) - mass).clamp(min=0).reshape(-1)
    for k, (h, top, supply, demand) in enumerate(zip(*flat, strict=True)):
        levels, order = h.sort(descending=True)
        held = supply[order].cumsum(0)
        tops, far = top.sort()
        beyond = torch.cat([demand[far].flip(0).cumsum(0).flip(0), demand.new_zeros(1)])
        room = beyond[torch.searchsorted(tops, levels.contiguous())]
        short = torch.where(levels > -torch.inf, held - room, -torch.inf)
        # of equal heights the last one counts all
        best = int(short.argmax())
        level = levels[best]
        here, there = (h >= level) & (supply > 0), (top >= level) & (demand > 0)
        mass_here, room_there, spare = float(supply[here].sum()), float(demand[there].sum()), float(spares[k])
        if mass_here - room_there - spare > slack * float(supply.sum()):
            index = torch.arange(max(n, m), device=h.device)
            return Shortage(
                tuple(index[:n][here].tolist()),
                tuple(index[:m][there].tolist()),
                mass_here,
                room_there,
                None if mass is None else spare,
                "the potentials, which grow without bound on these atoms",
                _place(k, batch),
            )
    return None


@torch.no_grad()
def reached(kernel: LogKernel, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Which atoms have weight and an allowed pair with another that has, ``(*b, n)`` and ``(*b, m)``; one pass over the cost."""
    rows, columns = torch.zeros_like(a, dtype=torch.bool), torch.zeros_like(b, dtype=torch.bool)
    for tile in kernel.tiles():
        open_ = torch.isfinite(kernel.entries(tile)) & (a[..., tile, None] > 0) & (b[..., None, :] > 0)
        rows[..., tile] = open_.any(-1)
        columns |= open_.any(-2)
    return rows, columns
