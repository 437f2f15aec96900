"""Measures: what a bridge starts from and ends at.

Shapes: ``n`` atoms in dimension ``d``, and optional leading batch dimensions ``*b`` (independent problems side by side).
"""

from __future__ import annotations

import copy
import inspect
import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, final

import torch
from torch import Tensor
from torch import distributions as td

from . import linalg
from .arrays import DTYPES, as_count, as_tensor, compute_dtype, in_problem, once, require_finite
from .errors import InvalidProblem, Unsupported

Draw = Callable[[int, torch.Generator | None], Tensor]


class Measure(ABC):
    """A finite positive measure that can be sampled.

    Attributes
    ----------
    event_shape : shape of one sample; ``(d,)`` for points, ``()`` for the bins of a histogram.
    batch_shape : the leading batch dimensions ``*b``.
    dtype, device : where the computation runs.
    source_dtype : the dtype the measure was given in (half precisions are computed in float32).
    """

    event_shape: tuple[int, ...]
    batch_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    source_dtype: torch.dtype

    @abstractmethod
    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` samples, ``(*b, n, *event)``."""

    @abstractmethod
    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Measure:
        """The same measure in another dtype or on another device."""


def _settle(tensor: Tensor) -> Tensor:
    return tensor.to(compute_dtype(tensor.dtype))


def categorical(log_weights: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """Draw ``(*b, n)`` indices by inverse cumulative weights, in float64: `multinomial` stops at 2^24 categories."""
    weights = (log_weights - log_weights.amax(-1, keepdim=True)).double().exp()
    ladder = weights.cumsum(-1).contiguous()
    shape = (*log_weights.shape[:-1], n)
    u = torch.rand(shape, generator=generator, dtype=torch.float64, device=log_weights.device) * ladder[..., -1:]
    # right=True: an atom of zero weight spans an empty step of the ladder and is never drawn
    index = torch.searchsorted(ladder, u, right=True)
    last = (weights > 0).int().mul(torch.arange(1, weights.shape[-1] + 1, device=weights.device)).amax(-1, keepdim=True)
    return torch.minimum(index, last - 1)


@final
class Discrete(Measure):
    """Weighted atoms ``sum_i w_i delta(x_i)``.

    Parameters
    ----------
    points : ``(*b, n, d)``, finite.  None makes a histogram, whose atoms are known only by number: give a cost matrix.
    weights : ``(*b, n)``, non-negative with a positive sum; the default is ``1 / n`` each.  Either may lack leading batch
        dimensions that the other has: it is then shared by all problems, without copies.
    sizes : ``(*b,)``, how many atoms each problem has where they differ; the rest is padding, of zero weight: whatever points
        ``(*b, n, d)`` hold there is replaced by the last real one, without its gradient.  `ragged` and `from_list` pad for you.

    Attributes
    ----------
    sizes : as given, or None where every problem has ``n`` atoms.

    Raises
    ------
    InvalidProblem : wrong shapes, NaN or infinity, negative or all-zero weights, padding with weight.

    Examples
    --------
    >>> import torch, sbot
    >>> sbot.Discrete(torch.zeros(3, 2)).weights.tolist() == [torch.tensor(1 / 3).item()] * 3
    True
    """

    sizes: Tensor | None

    def __init__(self, points: Any = None, weights: Any = None, *, sizes: Any = None, name: str = "Discrete") -> None:
        if points is None and weights is None:
            raise InvalidProblem(f"{name} needs points (n, d) or weights (n,); pass at least one of them")
        p = None if points is None else as_tensor(points, f"{name} points")
        w = None if weights is None else as_tensor(weights, f"{name} weights", like=p)
        given = [t.dtype for t in (p, w) if t is not None]
        self.source_dtype = given[0] if len(given) == 1 else torch.promote_types(*given)
        dtype = compute_dtype(self.source_dtype)
        if p is not None:
            if sizes is not None:
                p = _padded(p, sizes, name)
            # a copy of its own: points changed later do not change the bridge
            p = once(require_finite(_check_points(p, name).to(dtype), f"{name} points", 2), torch.clone, 2)
        if w is None:
            assert p is not None
            w = torch.full(p.shape[:-1], 1 / p.shape[-2], dtype=dtype, device=p.device)
            if sizes is not None:
                count = _check_sizes(sizes, tuple(p.shape[:-2]), p.shape[-2], p.device, name)[..., None]
                real = torch.arange(p.shape[-2], device=p.device) < count
                w = torch.where(real, 1 / count.to(dtype), 0.0)
        w = once(_check_weights(w.to(dtype), p, name), torch.clone, 1)
        shapes = [tuple(w.shape[:-1]), () if p is None else tuple(p.shape[:-2])]
        shape = max(shapes, key=len)
        self.points = None if p is None else p.expand(*shape, *p.shape[-2:])
        self.weights = w if w.shape[:-1] == shape else w.expand(*shape, w.shape[-1])
        self.batch_shape, self.event_shape = shape, () if p is None else (p.shape[-1],)
        self.dtype, self.device = dtype, self.weights.device
        self.sizes = None if sizes is None else _check_sizes(sizes, shape, self.n, self.device, name)
        if sizes is not None and bool((self.weights.detach()[~self.mask] != 0).any()):
            raise InvalidProblem(f"{name} has padding with weight; weights beyond sizes must be 0")

    @classmethod
    def ragged(cls, points: Any, offsets: Any, weights: Any = None, *, name: str = "Discrete") -> Discrete:
        """A batch of clouds of different sizes that lie one after the other.

        Cloud k is ``points[offsets[k] : offsets[k + 1]]``.  It is padded with copies of its last point, of zero weight, to
        the size of the largest; `sizes` and `mask` tell which entries are real, and `Bridge[k]` has no padding.

        Parameters
        ----------
        points : ``(N, d)``.
        offsets : ``(B + 1,)`` integers from 0 to N, increasing.
        weights : ``(N,)``; the default is one over its size for each cloud.

        Raises `InvalidProblem` for offsets that do not cut the points into clouds of at least one.

        Examples
        --------
        >>> import torch, sbot
        >>> clouds = sbot.Discrete.ragged(torch.rand(5, 2), [0, 2, 5])
        >>> clouds.batch_shape, clouds.n, clouds.sizes.tolist()
        ((2,), 3, [2, 3])
        """
        p = _check_points(as_tensor(points, f"{name} points"), name)
        if p.ndim != 2:
            raise InvalidProblem(f"{name} points have shape {tuple(p.shape)}; give (N, d), one cloud after the other")
        cuts = _check_offsets(offsets, len(p), name).to(p.device)
        sizes = cuts.diff()
        n = int(sizes.max())
        place = torch.arange(n, device=p.device)
        real = place < sizes[:, None]
        index = cuts[:-1, None] + torch.minimum(place, sizes[:, None] - 1)
        padded = p[index]
        if weights is None:
            return cls(padded, sizes=sizes, name=name)
        w = as_tensor(weights, f"{name} weights", like=p)
        if w.shape != p.shape[:1]:
            raise InvalidProblem(f"{name} has weights of shape {tuple(w.shape)}; give ({len(p)},), one for each point")
        return cls(padded, torch.where(real, w[index], w.new_zeros(())), sizes=sizes, name=name)

    @classmethod
    def from_list(cls, points: Any, weights: Any = None, *, name: str = "Discrete") -> Discrete:
        """A batch of clouds of different sizes, given one by one; see `ragged`.

        Parameters
        ----------
        points : a list of ``(n_k, d)``.
        weights : a list of ``(n_k,)``; the default is ``1 / n_k`` each.

        Raises `InvalidProblem` for an empty list, clouds of different dimensions, and weights that do not fit.

        Examples
        --------
        >>> import torch, sbot
        >>> sbot.Discrete.from_list([torch.rand(2, 3), torch.rand(4, 3)]).mask.sum(-1)
        tensor([2, 4])
        """
        if isinstance(points, Tensor) or not isinstance(points, (list, tuple)) or not points:
            raise InvalidProblem(f"{name} is {type(points).__name__}; give a list of at least one cloud (n_k, d)")
        clouds = [_check_points(as_tensor(part, f"{name}[{k}]"), f"{name}[{k}]") for k, part in enumerate(points)]
        if any(part.ndim != 2 or part.shape[1] != clouds[0].shape[-1] for part in clouds):
            shapes = ", ".join(str(tuple(part.shape)) for part in clouds[:8])
            raise InvalidProblem(f"{name} has clouds of shapes {shapes}; give (n_k, d) with one d")
        sizes = [len(part) for part in clouds]
        flat = None
        if weights is not None:
            if not isinstance(weights, (list, tuple)) or len(weights) != len(clouds):
                raise InvalidProblem(f"{name} has {len(clouds)} clouds; give a list of as many weights (n_k,)")
            parts = [as_tensor(w, f"{name}[{k}] weights", like=clouds[k]) for k, w in enumerate(weights)]
            for k, (part, size) in enumerate(zip(parts, sizes, strict=True)):
                if part.shape != (size,):
                    raise InvalidProblem(f"{name}[{k}] has weights of shape {tuple(part.shape)}; give ({size},)")
            flat = torch.cat(parts)
        offsets = torch.tensor([0, *sizes]).cumsum(0)
        return cls.ragged(torch.cat(clouds), offsets, flat, name=name)

    @property
    def n(self) -> int:
        """Number of atoms."""
        return self.weights.shape[-1]

    @property
    def mass(self) -> Tensor:
        """Total weight ``(*b,)``."""
        return self.weights.sum(-1)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``(*b, n, d)`` atoms in proportion to their weights; a histogram gives bin numbers ``(*b, n)``."""
        index = categorical(self.weights.detach().log(), as_count(n, "n"), generator)
        if self.points is None:
            return index
        return torch.take_along_dim(self.points, index[..., None], dim=-2)

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Discrete:
        def move(part: Tensor) -> Tensor:
            return part.to(dtype=dtype, device=device)

        points, weights = None if self.points is None else once(self.points, move, 2), once(self.weights, move, 1)
        if weights.device != self.device or (self.dtype, weights.dtype) != (torch.float32, torch.float64):
            return Discrete(points, weights, sizes=self.sizes)
        # what was right stays right in a wider dtype
        out = copy.copy(self)
        out.points, out.weights, out.dtype = points, weights, weights.dtype
        out.source_dtype = out.dtype
        return out

    @property
    def mask(self) -> Tensor:
        """Which atoms are real and not padding, ``(*b, n)``."""
        if self.sizes is None:
            return torch.ones((), dtype=torch.bool, device=self.device).expand(self.weights.shape)
        return torch.arange(self.n, device=self.device) < self.sizes[..., None]

    def blank(self, values: Tensor, dims: int = 0) -> Tensor:
        """``values``, of ``dims`` dimensions at each atom, with zeros at padding."""
        if self.sizes is None:
            return values
        return torch.where(self.mask.reshape(self.mask.shape + (1,) * dims), values, 0.0)

    def reweighted(self, weights: Tensor) -> Discrete:
        """The same atoms with other weights, ``(*b, n)``; shares the points."""
        return self._like(self.points, weights, self.sizes)

    def expand(self, batch_shape: tuple[int, ...]) -> Discrete:
        """The same atoms for each problem of a larger batch; shares memory."""
        points = None if self.points is None else self.points.expand(*batch_shape, *self.points.shape[-2:])
        sizes = None if self.sizes is None else self.sizes.expand(batch_shape)
        return self._like(points, self.weights.expand(*batch_shape, self.n), sizes)

    def pick(self, index: tuple[int, ...]) -> Discrete:
        """One problem of a batch, without its padding; a shorter ``index`` picks along the first batch dimensions."""
        weights, points = self.weights[index], None if self.points is None else self.points[index]
        sizes = None if self.sizes is None else self.sizes[index]
        if sizes is not None and sizes.ndim == 0:
            n, sizes = int(sizes), None
            weights, points = weights[:n], None if points is None else points[:n]
        return self._like(points, weights, sizes)

    def _like(self, points: Tensor | None, weights: Tensor, sizes: Tensor | None) -> Discrete:
        """Parts of a measure that was checked; nothing is checked again or copied."""
        other = object.__new__(Discrete)
        other.points, other.weights, other.sizes = points, weights, sizes
        other.batch_shape, other.event_shape = tuple(weights.shape[:-1]), self.event_shape
        other.dtype, other.device, other.source_dtype = self.dtype, self.device, self.source_dtype
        return other

    def __repr__(self) -> str:
        shape = "histogram" if self.points is None else f"d={self.event_shape[0]}"
        n = f"n={self.n}" if self.sizes is None else f"n<={self.n}"
        return f"Discrete({n}, {shape}, batch={self.batch_shape}, {self.dtype})"


def _check_points(points: Tensor, name: str) -> Tensor:
    if points.ndim == 1:
        raise InvalidProblem(
            f"{name} points are 1-dimensional, shape ({points.shape[0]},); pass x[:, None] for points on a line, "
            "or a cost matrix (cost=M) if these are the weights of a histogram"
        )
    if points.ndim == 0 or 0 in points.shape:
        raise InvalidProblem(f"{name} points have shape {tuple(points.shape)}; give (n, d) with n >= 1 and d >= 1")
    return points


def _padded(points: Tensor, sizes: Any, name: str) -> Tensor:
    """Padding is a copy of the last point and not the point: it has no derivative."""
    points = _check_points(points, name)
    count = torch.as_tensor(sizes, device=points.device)
    if tuple(count.shape) != tuple(points.shape[:-2]):
        return points  # points that the problems share: beyond the sizes of one are those of another
    count = _check_sizes(sizes, tuple(points.shape[:-2]), points.shape[-2], points.device, name)
    last = torch.take_along_dim(points.detach(), (count - 1)[..., None, None], -2)
    real = torch.arange(points.shape[-2], device=points.device) < count[..., None]
    return torch.where(real[..., None], points, last)


def _check_sizes(sizes: Any, shape: tuple[int, ...], n: int, device: torch.device, name: str) -> Tensor:
    count = torch.as_tensor(sizes, device=device)
    if count.dtype.is_floating_point or count.dtype == torch.bool or tuple(count.shape) != shape or not shape:
        raise InvalidProblem(
            f"{name} sizes have shape {tuple(count.shape)}, {count.dtype}; give integers, one for each problem of {shape}"
        )
    if int(count.min()) < 1 or int(count.max()) > n:
        raise InvalidProblem(f"{name} sizes go from {int(count.min())} to {int(count.max())}; give 1 to {n} atoms")
    return count.long()


def _check_offsets(offsets: Any, n: int, name: str) -> Tensor:
    try:
        cuts = torch.as_tensor(offsets)
    except (TypeError, ValueError, RuntimeError):
        raise InvalidProblem(f"{name} offsets must be integers (B + 1,); give a tensor or a list") from None
    whole = cuts.ndim == 1 and len(cuts) >= 2 and not cuts.dtype.is_floating_point and cuts.dtype != torch.bool
    if not whole or int(cuts[0]) != 0 or int(cuts[-1]) != n:
        raise InvalidProblem(
            f"{name} offsets are {cuts.tolist()}; give integers (B + 1,) from 0 to {n}, the number of points"
        )
    empty = torch.nonzero(cuts.diff() < 1)
    if len(empty):
        raise InvalidProblem(
            f"{name} has no points in problem {int(empty[0])}; drop the problem, or give offsets that increase"
        )
    return cuts.long()


def suffix(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether ``shape`` is ``whole`` without some of its leading dimensions: what is shared lacks them, and no size differs."""
    return len(shape) <= len(whole) and tuple(whole[len(whole) - len(shape) :]) == tuple(shape)


def _check_weights(weights: Tensor, points: Tensor | None, name: str) -> Tensor:
    if points is not None and weights.shape == (*points.shape[:-1], 1):
        weights = weights.squeeze(-1)
    if weights.ndim == 0 or 0 in weights.shape:
        raise InvalidProblem(f"{name} weights have shape {tuple(weights.shape)}; give (n,) with n >= 1")
    if points is not None and not (
        suffix(weights.shape, points.shape[:-1]) or suffix(points.shape[:-1], weights.shape)
    ):
        raise InvalidProblem(
            f"{name} has weights of shape {tuple(weights.shape)} for points of shape {tuple(points.shape)}; "
            f"give weights of shape {tuple(points.shape[:-1])}"
        )
    if points is not None and weights.device != points.device:
        raise InvalidProblem(
            f"{name} has points on {points.device} and weights on {weights.device}; move them to one device"
        )
    if weights.ndim == 1 and not weights.requires_grad:
        low, high = (float(end) for end in torch.aminmax(weights))
        if low >= 0 and 0 < high < math.inf:  # nothing is NaN then
            return weights
    require_finite(weights, f"{name} weights", 1)
    if bool((weights < 0).any()):
        *which, index = torch.nonzero(weights < 0)[0].tolist()
        raise InvalidProblem(f"{name} has a negative weight at [{index}]{in_problem(which)}; weights must be >= 0")
    if bool((weights.sum(-1) <= 0).any()):
        which = torch.nonzero(weights.sum(-1) <= 0)[0].tolist()
        raise InvalidProblem(f"{name} has weights that are all zero{in_problem(which)}; at least one must be positive")
    return weights


def _check_cov(cov: Tensor, d: int, name: str) -> Tensor:
    """Symmetric and positive semi-definite up to rounding, or `InvalidProblem`."""
    if cov.shape[-2:] != (d, d):
        raise InvalidProblem(
            f"{name} covariance has shape {tuple(cov.shape)}; give a square (d, d) matrix with d = {d}, as the mean has"
        )
    require_finite(cov, f"{name} covariance")
    plain = cov.detach()
    scale = plain.abs().amax((-2, -1), keepdim=True)
    skew = (plain - plain.mT).abs()
    if bool((skew > 1e-6 * scale).any()):
        raise InvalidProblem(
            f"{name} covariance is not symmetric (off by {float(skew.max()):.3g}); pass (S + S.T) / 2 if that is meant"
        )
    if bool((skew > 0).any()):
        cov = linalg.symmetrise(cov)
    values, vectors = torch.linalg.eigh(cov.detach())
    rounding = 1e-8 if cov.dtype == torch.float64 else 1e-6
    if bool((values[..., 0] < -rounding * plain.diagonal(dim1=-2, dim2=-1).sum(-1).abs()).any()):
        raise InvalidProblem(
            f"{name} covariance is not positive semi-definite (eigenvalue {float(values.min()):.3g}); "
            "pass a covariance matrix, not a correlation estimate or a standard deviation"
        )
    if bool((values < 0).any()):
        cov = cov + (vectors * (-values.clamp(max=0))[..., None, :]) @ vectors.mT
    return cov


@final
class Gaussian(Measure):
    """``N(mean, cov)``; a singular covariance (even zero, a Dirac) is legal.

    Parameters
    ----------
    mean : ``(*b, d)``.
    cov : ``(*b, d, d)``, symmetric positive semi-definite.

    Raises
    ------
    InvalidProblem : wrong shapes, NaN or infinity, a covariance that is not symmetric or not positive semi-definite.

    Examples
    --------
    >>> import torch, sbot
    >>> sbot.Gaussian(torch.zeros(2), torch.eye(2)).sample(5).shape
    torch.Size([5, 2])
    """

    def __init__(self, mean: Any, cov: Any, *, name: str = "Gaussian") -> None:
        m = as_tensor(mean, f"{name} mean")
        c = as_tensor(cov, f"{name} covariance", like=m)
        if m.ndim == 0 or 0 in m.shape:
            raise InvalidProblem(f"{name} mean has shape {tuple(m.shape)}; give (d,) with d >= 1")
        if c.device != m.device:
            raise InvalidProblem(f"{name} has mean on {m.device} and covariance on {c.device}; move them to one device")
        self.source_dtype = torch.promote_types(m.dtype, c.dtype)
        self.dtype, self.device = compute_dtype(self.source_dtype), m.device
        if c.shape[:-2] != m.shape[:-1]:
            raise InvalidProblem(
                f"{name} mean {tuple(m.shape)} and covariance {tuple(c.shape)} differ in their leading dimensions; "
                "give mean (*b, d) and covariance (*b, d, d)"
            )
        self.mean = require_finite(m.to(self.dtype), f"{name} mean")
        self.cov = _check_cov(c.to(self.dtype), m.shape[-1], name)
        self.batch_shape, self.event_shape = tuple(m.shape[:-1]), (m.shape[-1],)

    @classmethod
    def from_samples(cls, x: Any) -> Gaussian:
        """Mean and (unbiased) covariance of the points ``(*b, n, d)``, n >= 2."""
        points = _settle(_check_points(as_tensor(x, "x"), "x"))
        if points.shape[-2] < 2:
            raise InvalidProblem("x has one point, which has no covariance; give at least two")
        mean = points.mean(-2)
        centred = points - mean[..., None, :]
        return cls(mean, centred.mT @ centred / (points.shape[-2] - 1))

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``(*b, n, d)``."""
        shape = (*self.batch_shape, as_count(n, "n"), *self.event_shape)
        noise = torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device)
        return self.mean[..., None, :] + noise @ linalg.sqrtm(self.cov)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density at ``x`` ``(*b, n, d)``; raises `Unsupported` where the covariance is singular."""
        x = as_tensor(x, "x", like=self.mean).to(self.mean)
        if x.ndim < 2 or x.shape[-1] != self.event_shape[0]:
            raise InvalidProblem(f"x has shape {tuple(x.shape)}; give (n, {self.event_shape[0]})")
        factor = linalg.cholesky(self.cov)
        if factor is None:
            raise Unsupported("a Gaussian with singular covariance has no density; add a little to its diagonal")
        centred = torch.linalg.solve_triangular(factor, (x - self.mean[..., None, :]).mT, upper=False)
        constant = linalg.log_gaussian_constant(self.cov, self.event_shape[0])
        return -centred.square().sum(-2) / 2 - constant[..., None]

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Gaussian:
        return Gaussian(self.mean.to(dtype=dtype, device=device), self.cov.to(dtype=dtype, device=device))

    def expand(self, batch_shape: tuple[int, ...]) -> Gaussian:
        """The same law for each problem of a larger batch; shares memory."""
        d = self.mean.shape[-1]
        return self._like(self.mean.expand(*batch_shape, d), self.cov.expand(*batch_shape, d, d))

    def pick(self, index: tuple[int, ...]) -> Gaussian:
        """One problem of a batch; a shorter ``index`` picks along the first batch dimensions."""
        return self._like(self.mean[index], self.cov[index])

    def _like(self, mean: Tensor, cov: Tensor) -> Gaussian:
        other = object.__new__(Gaussian)
        other.mean, other.cov = mean, cov
        other.batch_shape, other.event_shape = tuple(mean.shape[:-1]), self.event_shape
        other.dtype, other.device, other.source_dtype = self.dtype, self.device, self.source_dtype
        return other

    def __repr__(self) -> str:
        return f"Gaussian(d={self.event_shape[0]}, batch={self.batch_shape}, {self.dtype})"


@final
class Mixture(Measure):
    """``sum_k softmax(logits)_k N(means_k, covs_k)``.

    Parameters
    ----------
    logits : ``(K,)``.  means : ``(K, d)``.  covs : ``(K, d, d)``.

    Raises
    ------
    InvalidProblem : wrong shapes, NaN or infinity, a covariance that is not positive semi-definite.

    Examples
    --------
    >>> import torch, sbot
    >>> sbot.Mixture(torch.zeros(2), torch.randn(2, 3), torch.eye(3).expand(2, 3, 3)).sample(4).shape
    torch.Size([4, 3])
    """

    def __init__(self, logits: Any, means: Any, covs: Any, *, name: str = "Mixture") -> None:
        components = Gaussian(means, covs, name=name)
        logit = as_tensor(logits, f"{name} logits", like=components.mean)
        if components.mean.ndim != 2 or logit.shape != components.mean.shape[:1]:
            raise InvalidProblem(
                f"{name} has logits {tuple(logit.shape)} and means {tuple(components.mean.shape)}; "
                "give (K,), (K, d) and (K, d, d)"
            )
        self.logits = require_finite(logit.to(components.dtype), f"{name} logits")
        self.components = components
        self.batch_shape, self.event_shape = (), components.event_shape
        self.dtype, self.device, self.source_dtype = components.dtype, components.device, components.source_dtype

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``(n, d)``."""
        index = categorical(self.logits.detach(), as_count(n, "n"), generator)
        noise = torch.randn((n, *self.event_shape), generator=generator, dtype=self.dtype, device=self.device)
        roots = linalg.sqrtm(self.components.cov)
        return self.components.mean[index] + torch.einsum("nij,nj->ni", roots[index], noise)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density at ``x`` ``(n, d)``."""
        x = as_tensor(x, "x", like=self.logits)
        each = self.components.log_prob(x.expand(len(self.logits), *x.shape))
        return (self.logits.log_softmax(0)[:, None] + each).logsumexp(0)

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Mixture:
        g = self.components.to(dtype=dtype, device=device)
        return Mixture(self.logits.to(dtype=dtype, device=device), g.mean, g.cov)

    def __repr__(self) -> str:
        return f"Mixture(K={len(self.logits)}, d={self.event_shape[0]}, {self.dtype})"


@final
class Sampler(Measure):
    """A measure known only through samples.

    Parameters
    ----------
    draw : ``draw(n, generator) -> (n, *event)``; every draw is checked for shape, the first also for dtype and NaN.
    event_shape : shape of one sample; read off the first draw when not given.
    like : a tensor with the dtype and device of the draws; the draw that checks them at the start is then spared.
    batch_shape : leading batch dimensions of the draws; with ``like`` only.

    Raises
    ------
    InvalidProblem : a draw of the wrong type, shape or dtype, or with NaN or infinity in the first one.

    Examples
    --------
    >>> import torch, sbot
    >>> noise = sbot.Sampler(lambda n, generator: torch.randn(n, 2, generator=generator))
    >>> noise.sample(3).shape
    torch.Size([3, 2])
    """

    def __init__(
        self,
        draw: Draw,
        event_shape: tuple[int, ...] | None = None,
        *,
        like: Tensor | None = None,
        batch_shape: tuple[int, ...] = (),
    ) -> None:
        if not callable(draw):
            raise InvalidProblem(f"draw must be a function draw(n, generator), not {type(draw).__name__}")
        if event_shape is not None and not isinstance(event_shape, (tuple, list)):
            raise InvalidProblem(f"event_shape is {event_shape!r}; give a tuple such as (2,)")
        self._draw = draw
        self.batch_shape = batch_shape
        if like is not None:  # a draw of our own, known already: nothing is drawn before it is asked for
            self.event_shape = tuple(event_shape or ())
            self.source_dtype, self.dtype, self.device = like.dtype, compute_dtype(like.dtype), like.device
            return
        first = self._checked(draw(2, None), 2, None if event_shape is None else tuple(event_shape))
        require_finite(first, "the first draw of the sampler")
        self.event_shape = tuple(first.shape[1:])
        self.source_dtype, self.device = first.dtype, first.device
        self.dtype = compute_dtype(first.dtype)

    @classmethod
    def from_dataset(cls, dataset: Any) -> Sampler:
        """Draw with replacement from a map-style dataset whose items are tensors (or tuples that start with one)."""
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or len(dataset) == 0:
            raise InvalidProblem("the dataset is empty or has no length; give a map-style dataset, or use from_loader")
        size = len(dataset)

        def draw(n: int, generator: torch.Generator | None) -> Tensor:
            device = "cpu" if generator is None else generator.device
            index = torch.randint(size, (n,), generator=generator, device=device).tolist()
            return torch.stack([torch.as_tensor(_first(dataset[i])) for i in index])

        return cls(draw)

    @classmethod
    def from_loader(cls, loader: Iterable[Any]) -> Sampler:
        """Draw consecutive samples from a loader of batches, starting it again when it ends; the loader shuffles."""
        if not hasattr(loader, "__iter__"):
            raise InvalidProblem(
                f"the loader is {type(loader).__name__}; give something that yields batches (n, *event)"
            )
        stream = _endless(loader)
        first = torch.as_tensor(_first(next(stream)))
        if first.ndim < 2 or first.dtype not in DTYPES:
            raise InvalidProblem(
                f"the loader yields {tuple(first.shape)}, {first.dtype}; give floating batches (n, *event)"
            )
        rest = [require_finite(first, "the first batch of the loader")]

        def draw(n: int, generator: torch.Generator | None) -> Tensor:
            parts, have = list(rest), sum(len(part) for part in rest)
            while have < n:
                parts.append(torch.as_tensor(_first(next(stream))))
                have += len(parts[-1])
            batch = torch.cat(parts)
            rest[:] = [batch[n:]] if have > n else []
            return batch[:n]

        return cls(draw, tuple(first.shape[1:]), like=first)

    def _checked(self, draw: Any, n: int, event: tuple[int, ...] | None) -> Tensor:
        if not isinstance(draw, Tensor):
            raise InvalidProblem(f"the sampler returned {type(draw).__name__}; return a torch tensor (n, *event)")
        if self.batch_shape:
            fits = tuple(draw.shape) == (*self.batch_shape, n, *(event or ()))
        else:
            fits = draw.ndim >= 2 and draw.shape[0] == n and (event is None or tuple(draw.shape[1:]) == event)
        if not fits:
            want = "(n, d)" if event is None else str((n, *event))
            raise InvalidProblem(f"the sampler returned shape {tuple(draw.shape)} for n = {n}; return {want}")
        if draw.dtype not in DTYPES:
            raise InvalidProblem(f"the sampler returned dtype {draw.dtype}; return floating numbers")
        return draw

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``(n, *event)``."""
        draw = self._checked(self._draw(as_count(n, "n"), generator), n, self.event_shape)
        return draw.to(dtype=self.dtype, device=self.device)

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Sampler:
        inner = self._draw
        like = torch.empty(0, dtype=dtype or self.source_dtype, device=device or self.device)
        return Sampler(
            lambda n, generator: inner(n, generator).to(like),
            self.event_shape,
            like=like,
            batch_shape=self.batch_shape,
        )

    def __repr__(self) -> str:
        return f"Sampler(event_shape={self.event_shape}, {self.dtype})"


def _first(item: Any) -> Any:
    return item[0] if isinstance(item, (tuple, list)) else item


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise InvalidProblem("the loader is exhausted; pass a loader that can be iterated again, not an iterator")


def _seeded(distribution: td.Distribution) -> Draw:
    """torch.distributions draw from the global generator; a given generator seeds it for one draw only."""

    def draw(n: int, generator: torch.Generator | None) -> Tensor:
        if generator is None:
            return distribution.sample((n,))
        with torch.random.fork_rng():
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator, device=generator.device)))
            return distribution.sample((n,))

    return draw


def _from_distribution(distribution: td.Distribution) -> Measure:
    if isinstance(distribution, td.MultivariateNormal):
        return Gaussian(distribution.loc, distribution.covariance_matrix)
    if (
        isinstance(distribution, td.Independent)
        and isinstance(distribution.base_dist, td.Normal)
        and distribution.reinterpreted_batch_ndims == 1
    ):
        return Gaussian(distribution.base_dist.loc, torch.diag_embed(distribution.base_dist.scale.square()))
    if isinstance(distribution, td.MixtureSameFamily) and distribution.batch_shape == ():
        components = _from_distribution(distribution.component_distribution)
        if isinstance(components, Gaussian):
            return Mixture(distribution.mixture_distribution.logits, components.mean, components.cov)
    return Sampler(_seeded(distribution))


def as_measure(obj: Any, name: str = "mu", *, histogram: int = 0) -> Measure:
    """Make a measure of whatever the caller has.

    A `Measure` is returned as it is; a tensor or array ``(n, d)`` becomes `Discrete` with equal weights, a tuple of two
    is ``(points, weights)`` and becomes `Discrete`; an array of ``histogram`` dimensions is the weights of a histogram (a cost
    matrix was given); `torch.distributions` become `Gaussian`, `Mixture` or `Sampler`; a map-style dataset becomes a
    `Sampler`; so does a function of ``n`` or of ``(n, generator)``.  Raises `InvalidProblem` for anything else.

    Examples
    --------
    >>> import numpy as np, sbot
    >>> sbot.as_measure(np.zeros((4, 2)))
    Discrete(n=4, d=2, batch=(), torch.float64)
    """
    if isinstance(obj, Measure):
        return obj
    if isinstance(obj, td.Distribution):
        return _from_distribution(obj)
    if isinstance(obj, torch.utils.data.DataLoader):
        return Sampler.from_loader(obj)
    if isinstance(obj, torch.utils.data.IterableDataset):
        raise InvalidProblem(
            f"{name} is an iterable dataset; give sbot.Sampler.from_loader(DataLoader({name}, batch_size))"
        )
    if isinstance(obj, torch.utils.data.Dataset):
        return Sampler.from_dataset(obj)
    if isinstance(obj, tuple) and len(obj) == 2 and not isinstance(obj[0], numbers.Real):
        return Discrete(obj[0], obj[1], name=name)
    if callable(obj):
        try:
            wide = len(inspect.signature(obj).parameters) >= 2
        except (TypeError, ValueError):
            wide = False
        return Sampler(obj if wide else lambda n, generator: obj(n))
    array = as_tensor(obj, name)
    if histogram and array.ndim == histogram:
        return Discrete(None, array, name=name)
    return Discrete(array, name=name)
