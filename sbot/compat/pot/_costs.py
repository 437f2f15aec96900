"""POT's metrics: matrices of distances, and the costs of sbot that stream them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...costs import Cost, Lp, Quadratic, augmented
from ...errors import Unsupported
from ._arrays import covers, enter, pot

#: Metrics that are computed here; the others are POT's.
METRICS = ("sqeuclidean", "euclidean", "cityblock")


def unif(n: int, type_as: Any = None) -> Any:
    """Weights ``1 / n``, ``(n,)``, of the kind of ``type_as``; NumPy float64 by default.

    Examples
    --------
    >>> import sbot.compat.pot as ot
    >>> ot.unif(4)
    array([0.25, 0.25, 0.25, 0.25])
    """
    if type_as is None or (isinstance(type_as, np.ndarray) and type_as.dtype in (np.float32, np.float64)):
        return np.full((n,), 1.0 / n, dtype=np.float64 if type_as is None else type_as.dtype)
    if not isinstance(type_as, Tensor) and type(type_as).__module__ != "numpy":
        return pot("unif")(n, type_as=type_as)
    home, (like,) = enter(type_as)
    return home.back(torch.full((n,), 1.0 / n, dtype=like.dtype, device=like.device))


@covers("dist")
def dist(
    x1: Any,
    x2: Any = None,
    metric: Any = "sqeuclidean",
    p: Any = 2,
    w: Any = None,
    backend: Any = "auto",
    nx: Any = None,
    use_tensor: Any = False,
) -> Any:
    """Distances ``(n1, n2)`` between samples ``(n1, d)`` and ``(n2, d)``; "sqeuclidean" is the whole square.

    Metrics other than "sqeuclidean", "euclidean" and "cityblock" are POT's.  Squares of integers are int64.

    Examples
    --------
    >>> import numpy as np, sbot.compat.pot as ot
    >>> ot.dist(np.array([[0.0], [1.0]]), np.array([[3.0]]))
    array([[9.],
           [4.]])
    """
    if metric not in METRICS or backend == "scipy" or w is not None or nx is not None:
        return pot("dist")(x1, x2, metric=metric, p=p, w=w, backend=backend, nx=nx, use_tensor=use_tensor)
    home, (x, y) = enter(x1, x1 if x2 is None else x2)
    for name, points in (("x1", x), ("x2", y)):
        if points.ndim != 2 or points.shape[1] != x.shape[1]:
            raise ValueError(
                f"{name} has shape {tuple(points.shape)}; give two arrays of samples (n, d) with the same d"
            )
    if metric == "sqeuclidean" and all(_is_integer(points) for points in (x1, x1 if x2 is None else x2)):
        x, y = (torch.as_tensor(points).long() for points in (x1, x1 if x2 is None else x2))
        return home.back(sum((a[:, None] - b) ** 2 for a, b in zip(x.T, y.T, strict=True)))
    return home.back(distances(x, y, metric))


def _is_integer(points: Any) -> bool:
    if isinstance(points, Tensor):
        return not (points.dtype.is_floating_point or points.dtype.is_complex or points.dtype == torch.bool)
    return isinstance(points, np.ndarray) and points.dtype.kind in "iu"


def distances(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """`dist` of tensors, ``(*b, n, d)``; a pair of equal points has distance 0 and no gradient."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    x, y = x.to(dtype), y.to(dtype)
    if metric == "cityblock":
        return Lp(1.0).matrix(x, y)
    centre = y.detach().mean(-2, keepdim=True)
    x, y = x - centre, y - centre
    near, far = augmented(x, y)
    squares = (2 * near @ far.mT).clamp_(min=0)
    if x.shape == y.shape and torch.equal(x, y):
        squares = (squares + squares.mT) / 2  # to the last digit
        squares.diagonal(dim1=-2, dim2=-1).zero_()
    if metric == "sqeuclidean":
        return squares
    apart = squares > 0
    return torch.where(apart, torch.where(apart, squares, 1.0).sqrt(), 0.0)


@dataclass(frozen=True)
class Streamed:
    """A cost of sbot for a metric of POT: ``M = scale * C``, so that eps is reg / scale."""

    cost: Cost
    scale: float


def streamed(metric: Any) -> Streamed:
    """The cost that streams ``metric`` between points; `Unsupported` lists the ones there are."""
    known = {
        "sqeuclidean": Streamed(Quadratic(), 2.0),
        "euclidean": Streamed(Lp(2.0), 1.0),
        "cityblock": Streamed(Lp(1.0), 1.0),
    }
    if metric not in known:
        raise Unsupported(
            f"metric {metric!r} does not stream; give one of {', '.join(METRICS)}, or lazy=False (isLazy=False)"
        )
    return known[metric]
