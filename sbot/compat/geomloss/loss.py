"""``SamplesLoss`` with GeomLoss's signature."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from ...arrays import HALF, as_number
from ...costs import Lp
from ...errors import InvalidProblem, Unsupported
from ...problem import INF
from ...solvers import Sinkhorn
from .transport import Transport

LOSSES = ("sinkhorn", "hausdorff", "energy", "gaussian", "laplacian")
BACKENDS = ("auto", "tensorized", "online", "multiscale")
#: The formulas of KeOps that GeomLoss names as its costs, and their exponents.
FORMULAS = {"Norm2(X-Y)": 1, "(SqDist(X,Y)/IntCst(2))": 2}
#: Pairs up to which GeomLoss stores the cost of its own accord.
STORED = 5000**2

Measures = tuple[Tensor, Tensor, Tensor, Tensor]


@final
class SamplesLoss(torch.nn.Module):
    r"""A loss between weighted samples, with the signature, units and shapes of GeomLoss's class of this name.

    .. math:: OT = \min_P \langle P, C\rangle + \varepsilon\, KL(P \,|\, \alpha\otimes\beta)
        + \rho\, KL(P 1 | \alpha) + \rho\, KL(P' 1 | \beta)

    with ``C = |x - y|^2 / 2`` for p = 2 and ``|x - y|`` for p = 1, ``eps = blur^p`` and ``rho = reach^p``; by default debiased:
    ``OT(a, b) - OT(a, a) / 2 - OT(b, b) / 2 + eps (m_a - m_b)^2 / 2``.

    The call is ``loss(x, y)``, ``loss(a, x, b, y)`` or ``loss(l_x, a, x, l_y, b, y)``, with points ``(N, D)`` or ``(B, N, D)``
    and weights ``(N,)`` or ``(B, N)``; it returns ``()`` or ``(B,)``, or with
    ``potentials=True`` two tensors shaped as the weights.

    Parameters
    ----------
    loss : "sinkhorn"; "hausdorff", "energy", "gaussian" and "laplacian" are forwarded to GeomLoss where it is installed.
    p : 1 or 2; with a ``cost`` of your own any exponent > 0, for blur and reach.
    blur, reach : ``eps = blur^p``; ``rho = reach^p``, None for hard marginals.
    diameter, scaling, truncate, cluster_scale : how GeomLoss anneals, and what its multiscale scheme leaves out.  They are
        checked and have nothing to set: the solve here ends when the marginals are met, and leaves nothing out.
    cost : None, a function ``(B, N, D), (B, M, D) -> (B, N, M)``, or GeomLoss's own two KeOps formulas.
    kernel : for the forwarded losses only.
    debias, potentials : as above; debiased potentials are ``f_ba - f_aa`` and ``g_ab - g_bb``.
    verbose : show progress bars.
    backend : "auto", "tensorized", "online" (memory O(N + M)) or "multiscale" (as "auto").
    solver : a `Sinkhorn` with tolerance and limits; not in GeomLoss.

    Raises
    ------
    InvalidProblem : an option or a shape is wrong, or the masses of hard marginals differ.
    Unsupported : a formula of KeOps, or a forwarded loss without GeomLoss.

    Examples
    --------
    >>> import torch
    >>> from sbot.compat.geomloss import SamplesLoss
    >>> x = torch.tensor([[0.0], [1.0]], dtype=torch.float64, requires_grad=True)
    >>> value = SamplesLoss(blur=0.1)(x, x.detach() + 3)
    >>> value.detach()
    tensor(4.5000, dtype=torch.float64)
    >>> value.backward()
    >>> x.grad.flatten()
    tensor([-1.5000, -1.5000], dtype=torch.float64)
    """

    def __init__(
        self,
        loss: str = "sinkhorn",
        p: float = 2,
        blur: float = 0.05,
        reach: float | None = None,
        diameter: float | None = None,
        scaling: float = 0.5,
        truncate: float | None = 5,
        cost: Callable[[Tensor, Tensor], Tensor] | str | None = None,
        kernel: Any = None,
        cluster_scale: float | None = None,
        debias: bool = True,
        potentials: bool = False,
        verbose: bool = False,
        backend: str = "auto",
        *,
        solver: Sinkhorn | None = None,
    ) -> None:
        super().__init__()
        self.loss, self.p, self.blur, self.reach = loss, p, blur, reach
        self.diameter, self.scaling, self.truncate, self.cluster_scale = diameter, scaling, truncate, cluster_scale
        self.cost, self.kernel = cost, kernel
        self.debias, self.potentials, self.verbose, self.backend = debias, potentials, verbose, backend
        self.solver = solver
        self._check()

    def forward(self, *args: Any) -> Any:
        """The loss, or the potentials; see the class."""
        self._check()  # options are attributes, and may have been changed
        if self.loss != "sinkhorn":
            return self._forwarded(*args)
        labels, (a, x, b, y) = _unpacked(args)
        batched = _check_shapes(labels, a, x, b, y)
        if any(label is not None for label in labels) and self.backend not in ("auto", "multiscale"):
            raise InvalidProblem(
                f"cluster labels are for the backends 'auto' and 'multiscale', not {self.backend!r}; leave them out"
            )
        a, b = (w.squeeze(-1) if w.ndim == 2 + batched else w for w in (a, b))
        transport = self._solve(a, x, b, y)
        if self.potentials:
            f, g = transport.shown_potentials()
            return f.to(x.dtype), g.to(x.dtype)
        return transport.value().to(x.dtype)

    def _solve(self, a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Transport:
        eps = float(self.blur) ** self.p
        rho = INF if self.reach is None else float(self.reach) ** self.p
        solver = self.solver or (Sinkhorn(memory=0) if self.backend == "online" else Sinkhorn())
        own = (self._cost(x, x), self._cost(y, y)) if self.debias else (None, None)
        costs = self._cost(x, y), *(_even(cost) if isinstance(cost, Tensor) else cost for cost in own)
        x, y, a, b = (part.float() if part.dtype in HALF else part for part in (x, y, a, b))
        return Transport(
            (x, a), (y, b), costs, eps, (rho, rho), self.debias, solver, True if self.verbose else None, self.potentials
        )

    def _cost(self, x: Tensor, y: Tensor) -> Any:
        """The cost between two clouds as the core takes it; None for its own."""
        if callable(self.cost):
            pairs = x.shape[-2] * y.shape[-2]
            if self.backend == "online" or (self.backend != "tensorized" and pairs > STORED):
                return lambda u, v: _as_batch(self.cost, u, v)
            return _as_batch(self.cost, x, y)
        exponent = self.p if self.cost is None else FORMULAS[self.cost.replace(" ", "")]
        return None if exponent == 2 else Lp(2)

    def _check(self) -> None:
        """Every option, by name."""
        for name, value, known in (("loss", self.loss, LOSSES), ("backend", self.backend, BACKENDS)):
            if value not in known:
                raise InvalidProblem(f"{name} is {value!r}; give one of {', '.join(map(repr, known))}")
        sizes = {"blur": self.blur, "p": self.p}
        optional = ("reach", "diameter", "truncate", "cluster_scale")
        sizes |= {name: getattr(self, name) for name in optional if getattr(self, name) is not None}
        for name, size in sizes.items():
            if not 0 < as_number(size, name) < math.inf:
                raise InvalidProblem(f"{name} is {size}; give a finite number > 0")
        if not 0 < as_number(self.scaling, "scaling") < 1:
            raise InvalidProblem(f"scaling is {self.scaling}; give a number in (0, 1)")
        if self.loss == "sinkhorn":
            self._check_sinkhorn()

    def _check_sinkhorn(self) -> None:
        if self.kernel is not None:
            raise InvalidProblem("kernel is for the other losses; loss='sinkhorn' takes cost=")
        if isinstance(self.cost, str) and self.cost.replace(" ", "") not in FORMULAS:
            raise Unsupported(
                f"cost is the KeOps formula {self.cost!r}; give a function of two clouds of points, or one of "
                f"{', '.join(map(repr, FORMULAS))}"
            )
        if self.cost is None and self.p not in (1, 2):
            raise InvalidProblem(f"p is {self.p}; give 1 or 2, or a cost")
        if self.solver is not None and not isinstance(self.solver, Sinkhorn):
            raise InvalidProblem(f"solver is {self.solver!r}; give sbot.Sinkhorn(...)")

    def _forwarded(self, *args: Any) -> Any:
        try:
            import geomloss
        except ImportError:
            raise Unsupported(
                f"loss={self.loss!r} is not optimal transport and is computed by GeomLoss: pip install geomloss; "
                "or use loss='sinkhorn'"
            ) from None
        names = (
            "loss p blur reach diameter scaling truncate cost kernel cluster_scale debias potentials verbose backend"
        )
        theirs = geomloss.SamplesLoss(**{name: getattr(self, name) for name in names.split()})
        # GeomLoss switches autograd off and on by itself: what was set is set again, whatever happens inside
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            return theirs(*args)

    def extra_repr(self) -> str:
        reach = "" if self.reach is None else f", reach={self.reach}"
        return f"{self.loss!r}, p={self.p}, blur={self.blur}{reach}, debias={self.debias}"


def _as_batch(cost: Any, x: Tensor, y: Tensor) -> Tensor:
    """A cost function of batches, on one problem or on many."""
    values: Tensor = cost(x, y) if x.ndim == 3 else cost(x[None], y[None])
    want = (*(x.shape[:1] if x.ndim == 3 else (1,)), x.shape[-2], y.shape[-2])
    if not isinstance(values, Tensor) or tuple(values.shape) != want:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InvalidProblem(f"the cost function returned {got}; return a tensor of shape {want}")
    return values if x.ndim == 3 else values[0]


def _even(cost: Tensor) -> Tensor:
    """What rounding left of the symmetry of a cost within a cloud, mended; a cost without it is for the core to refuse."""
    even = (cost + cost.mT) / 2
    off = (cost - even).detach().abs().amax()
    return even if bool(off <= math.sqrt(torch.finfo(cost.dtype).eps) * even.detach().abs().amax()) else cost


def _unpacked(args: tuple[Any, ...]) -> tuple[tuple[Any, Any], Measures]:
    """Labels, weights and points, whichever of the three calls it was."""
    if len(args) == 6:
        l_x, a, x, l_y, b, y = args
    elif len(args) == 4:
        (a, x, b, y), l_x, l_y = args, None, None
    elif len(args) == 2:
        (x, y), a, b, l_x, l_y = args, None, None, None, None
    else:
        raise InvalidProblem(
            f"a SamplesLoss was called with {len(args)} arguments; give (x, y), (a, x, b, y) or (l_x, a, x, l_y, b, y)"
        )
    given = {"x": x, "y": y} if len(args) == 2 else {"a": a, "x": x, "b": b, "y": y}
    for name, part in given.items():
        if not isinstance(part, Tensor):
            raise InvalidProblem(f"{name} is {type(part).__name__}; give a tensor: torch.as_tensor({name})")
        if not part.dtype.is_floating_point:
            raise InvalidProblem(f"{name} has dtype {part.dtype}; give floating numbers: {name}.float()")
    if len(args) == 2:
        a, b = (torch.full(z.shape[:-1], 1 / max(z.shape[-2], 1)).to(z) if z.ndim > 1 else z for z in (x, y))
    return (l_x, l_y), (a, x, b, y)


def _check_shapes(labels: tuple[Any, Any], a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> bool:
    """Whether this is a batch; InvalidProblem where the shapes do not fit each other."""
    if x.ndim not in (2, 3) or x.ndim != y.ndim:
        raise InvalidProblem(
            f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}; give (N, D) and (M, D), or (B, N, D) and (B, M, D)"
        )
    if x.dtype != y.dtype:
        raise InvalidProblem(f"x has dtype {x.dtype} and y {y.dtype}; give both the same: y.to(x)")
    if x.shape[-1] != y.shape[-1] or x.shape[:-2] != y.shape[:-2]:
        raise InvalidProblem(
            f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}; give both the same batch and dimension"
        )
    for name, w, points in (("a", a, x), ("b", b, y)):
        want = tuple(points.shape[:-1])
        if tuple(w.shape) not in (want, (*want, 1)) or w.ndim != (a.ndim):
            raise InvalidProblem(
                f"{name} has shape {tuple(w.shape)}; give {want} or {(*want, 1)}, as the other weights"
            )
    for name, label, points in (("l_x", labels[0], x), ("l_y", labels[1], y)):
        if label is None:
            continue
        if x.ndim == 3:
            raise Unsupported("cluster labels of a batch do not exist; leave them out")
        if not isinstance(label, Tensor) or tuple(label.shape) not in ((len(points),), (len(points), 1)):
            raise InvalidProblem(f"{name} are not {len(points)} labels; give a tensor of shape {(len(points),)}")
    return x.ndim == 3
