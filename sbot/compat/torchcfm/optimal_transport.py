"""TorchCFM's sampler of transport plans, on the device of the points.

The cost there is ``|x - y|^2`` and half of it here, so that ``eps = reg / 2`` and ``rho = reg_m / 2``; a Schrödinger bridge of
noise sigma has ``reg = 2 sigma^2``, that is ``eps = sigma^2``.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...api import solve_bridge
from ...arrays import HALF, as_count, as_number, as_tensor, require_finite
from ...bridge import Bridge
from ...errors import InvalidProblem, NotConverged, PrecisionWarning, Unsupported
from ...pairing import distinct, match, quantile
from ...solvers import Sinkhorn

METHODS = ("exact", "sinkhorn", "unbalanced", "partial")
#: The exact method starts from an entropic plan of this eps, in units of the mean cost, left at this marginal error;
#: below this number of points it needs no start.
NEAR, ROUGH, FEW = 5e-4, 0.05, 32
#: Points up to which POT's network simplex is quicker, on the CPU.
SIMPLEX = 400
#: Marginal error that float32 may leave; where it leaves more the plan is computed in float64.
RESOLVED = 1e-3
#: A plan with less mass than this is scaled to mass 1.
LIGHT = 1e-8


class OTPlanSampler:
    """Pairs of two mini-batches, drawn from a transport plan for the cost ``|x - y|^2``.

    Parameters
    ----------
    method : "exact" (a permutation of least cost), "sinkhorn" (entropic), "unbalanced" (entropic, marginals relaxed by
        ``reg_m KL``), or "partial" (entropic; all mass moves, which is "sinkhorn").
    reg : strength of the entropy, in units of ``|x - y|^2``: ``eps = reg / 2``.
    reg_m : strength of the relaxed marginals, in the same units.
    normalize_cost : divide the cost by its largest entry.
    num_threads : a number of threads or "max"; torch's own setting decides here, `torch.set_num_threads`.
    warn : warn `NotConverged` where a solve stops early, and where a plan has next to no mass.
    permutation : draw each point once, in the order of ``x0``, instead of pairs from the plan; for the exact method, where
        it is the whole plan.

    Raises
    ------
    ValueError : an unknown method, an option out of range, a permutation of another method.

    Examples
    --------
    >>> import torch
    >>> from sbot.compat.torchcfm import OTPlanSampler
    >>> x0, x1 = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.1], [0.1]])
    >>> OTPlanSampler("exact").get_map(x0, x1)
    tensor([[0.0000, 0.5000],
            [0.5000, 0.0000]])
    >>> OTPlanSampler("exact", permutation=True).sample_plan(x0, x1)[1].flatten()
    tensor([0.1000, 1.1000])
    """

    def __init__(
        self,
        method: str,
        reg: float = 0.05,
        reg_m: float = 1.0,
        normalize_cost: bool = False,
        num_threads: int | str = 1,
        warn: bool = True,
        *,
        permutation: bool = False,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"Unknown method: {method}; give one of {', '.join(METHODS)}")
        if num_threads != "max" and (isinstance(num_threads, (str, bool)) or num_threads < 1):
            raise ValueError(f'num_threads is {num_threads!r}; give a number >= 1 or "max"')
        if permutation and method != "exact":
            raise ValueError(
                f'the likeliest permutation of the {method} plan is the exact one, whatever reg is; give method="exact", '
                "or draw distinct pairs with replace=False"
            )
        self.method, self.permutation = method, permutation
        self.reg, self.reg_m = as_number(reg, "reg"), as_number(reg_m, "reg_m")
        if method != "exact" and not 0 < self.reg < math.inf:
            raise ValueError(f"reg is {self.reg}; give a finite number > 0")
        if method == "unbalanced" and not self.reg_m > 0:
            raise ValueError(f"reg_m is {self.reg_m}; give a number > 0")
        self.normalize_cost, self.num_threads, self.warn = bool(normalize_cost), num_threads, bool(warn)

    # ---- plans -----------------------------------------------------------------------------------------------------

    def get_map(self, x0: Tensor, x1: Tensor) -> Tensor:
        """The plan between uniform weights on ``x0 (n, *dim)`` and ``x1 (m, *dim)``, ``(n, m)``, without gradient."""
        x, y = self._points(x0), self._points(x1)
        return self._plan(x, y).to(x.dtype)

    def _plan(self, x: Tensor, y: Tensor) -> Tensor:
        """That of one problem, or those of a batch ``(b, n, d)``, ``(b, m, d)``, as ``(b, n, m)``."""
        if self.method != "exact":
            return self._entropic(x, y)
        if x.ndim == 2:
            return _exact(_half_cost(x, y))
        return torch.stack([_exact(_half_cost(*pair)) for pair in zip(x, y, strict=True)])

    def _entropic(self, x: Tensor, y: Tensor) -> Tensor:
        eps, rho = self.reg / 2, self.reg_m / 2
        if self.normalize_cost:
            size = torch.cdist(x, y).amax((-2, -1))[..., None, None]
            size = torch.where(size > 0, size, 1.0)
            x, y = x / size, y / size
        if x.dtype == torch.float32 and torch.finfo(x.dtype).eps * _reach(x, y) > 2 * eps * RESOLVED:
            x, y = x.double(), y.double()
        solver = Sinkhorn(tol=1e-10 if x.dtype == torch.float64 else None)
        relax = rho if self.method == "unbalanced" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PrecisionWarning)  # the tolerance is not the caller's
            if not self.warn:
                warnings.simplefilter("ignore", NotConverged)
            bridge = solve_bridge(x, y, eps, relax=relax, solver=solver)
        plan = bridge.plan()
        mass = plan.sum((-2, -1))
        if relax is None or bool((mass >= LIGHT).all()):
            return plan
        if self.warn:
            warnings.warn(
                f"a plan has mass {float(mass.min()):.1e}: the points are far apart for this reg_m; it is scaled to mass 1",
                stacklevel=4,
            )
        return torch.where((mass < LIGHT)[..., None, None], _scaled(bridge, x, y, eps), plan)

    def _points(self, x: Any) -> Tensor:
        points = as_tensor(x, "x").detach()
        if points.ndim < 2:
            raise InvalidProblem(f"points have shape {tuple(points.shape)}; give (n, *dim), such as x[:, None]")
        points = points.flatten(1)
        return points.float() if points.dtype in HALF else points

    # ---- pairs -----------------------------------------------------------------------------------------------------

    def sample_map(
        self, pi: Any, batch_size: int, replace: bool = True, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rows and columns of ``batch_size`` cells of the plan ``pi (n, m)``; without replacement no cell comes twice."""
        plan, count = as_tensor(pi, "pi").detach(), as_count(batch_size, "batch_size")
        low, high = (float(end) for end in torch.aminmax(plan)) if plan.numel() else (0.0, 0.0)
        if not math.isfinite(high - low):
            require_finite(plan, "pi")
        if plan.ndim != 2 or low < 0 or high <= 0:
            raise InvalidProblem("pi must be a plan (n, m) with entries >= 0 and some mass")
        if replace:
            cell = quantile(plan.flatten(), _levels(count, plan.device, generator))
        else:
            cell = distinct(plan.flatten(), count, generator=_seeded(plan.device, generator))
        columns = plan.shape[1]
        return torch.div(cell, columns, rounding_mode="floor"), cell % columns

    def sample_plan(
        self, x0: Tensor, x1: Tensor, replace: bool = True, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """``n`` pairs from the plan, ``x0[i]`` and ``x1[j]``, in the shapes of ``x0`` and ``x1``."""
        i, j = self._pairs(x0, x1, replace, generator)
        return x0[i], x1[j]

    def sample_plan_with_labels(
        self,
        x0: Tensor,
        x1: Tensor,
        y0: Tensor | None = None,
        y1: Tensor | None = None,
        replace: bool = True,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """`sample_plan` with the labels of both ends, None where there are none."""
        i, j = self._pairs(x0, x1, replace, generator)
        return x0[i], x1[j], None if y0 is None else y0[i], None if y1 is None else y1[j]

    def sample_plan_with_scipy(self, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        """``x0`` as it is and ``x1`` in the order of the permutation of least cost; needs no SciPy here."""
        x, y = self._points(x0), self._points(x1)
        return x, y[self._permuted(x, y)[1]]

    def _pairs(self, x0: Tensor, x1: Tensor, replace: bool, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        if self.permutation:
            return self._permuted(self._points(x0), self._points(x1))
        if self.method == "exact" and replace and len(x0) == len(x1):
            rows, columns = self._permuted(self._points(x0), self._points(x1))
            # the draw of `sample_map`, without the plan, whose cells are those of the rows
            drawn = quantile(torch.ones_like(rows), _levels(len(rows), rows.device, generator))
            return rows[drawn], columns[drawn]
        return self.sample_map(self.get_map(x0, x1), x0.shape[0], replace=replace, generator=generator)

    def _permuted(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if len(x) != len(y):
            raise Unsupported(f"{len(x)} and {len(y)} points have no permutation; draw pairs from the plan")
        return torch.arange(len(x), device=x.device), _assignment(_half_cost(x, y))

    def sample_trajectory(self, X: Tensor, *, generator: torch.Generator | None = None) -> Any:
        """Chains through ``X (n, times, *dim)``: each point goes on to one drawn from its row of the plan to the next time.

        All plans of an entropic method are solved as one batch.  Returns a NumPy array as TorchCFM does, or for points on
        another device, where it fails, a tensor there.
        """
        points = as_tensor(X, "X").detach()
        if points.ndim < 3:
            raise InvalidProblem(f"X has shape {tuple(points.shape)}; give (n, times, *dim)")
        flat = points.transpose(0, 1).flatten(2)
        flat = flat.float() if flat.dtype in HALF else flat
        here = torch.arange(points.shape[0], device=points.device)
        taken = [here]
        for plan in self._plan(flat[:-1], flat[1:]) if len(flat) > 1 else ():
            law = plan[taken[-1]]
            if not bool((law.sum(-1) > 0).all()):
                raise InvalidProblem("a point has no mass to send on; raise reg_m or bring the points nearer")
            taken.append(quantile(law, _levels(len(law), law.device, generator)[:, None])[:, 0])
        out = torch.stack([points[index, t] for t, index in enumerate(taken)], 1)
        return out.numpy() if out.device.type == "cpu" and out.dtype != torch.bfloat16 else out


def _levels(n: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers; without a generator those that NumPy's global one, which TorchCFM draws pairs from, has next."""
    if generator is not None:
        return torch.rand(n, dtype=torch.float64, device=device, generator=generator)
    return torch.from_numpy(np.random.random_sample(n)).to(device)  # noqa: NPY002


def _seeded(device: torch.device, generator: torch.Generator | None) -> torch.Generator:
    """The generator, or a new one with its seed from NumPy's global one: torch's stream of times and noise is left alone."""
    if generator is not None:
        return generator
    return torch.Generator(device).manual_seed(int(np.random.randint(2**31)))  # noqa: NPY002


def _half_cost(x: Tensor, y: Tensor) -> Tensor:
    """``|x - y|^2 / 2`` in float64."""
    x, y = x.double(), y.double()
    middle = x.mean(-2, keepdim=True)
    return torch.cdist(x - middle, y - middle).square() / 2


def _reach(x: Tensor, y: Tensor) -> float:
    """About the largest ``|x - y|^2 / 2`` of a batch."""
    middle = x.mean(-2, keepdim=True)
    return float(((x - middle).norm(dim=-1).max() + (y - middle).norm(dim=-1).max()).square() / 2)


def _exact(cost: Tensor) -> Tensor:
    """A plan of least cost between uniform weights: a permutation where there is one, else POT's."""
    n, m = cost.shape
    if n == m:
        return torch.zeros_like(cost).scatter_(-1, _assignment(cost)[:, None], 1 / n)
    import ot

    a, b = (torch.full((k,), 1 / k, dtype=torch.float64) for k in (n, m))
    return ot.emd(a, b, cost.cpu()).to(cost.device)


def _assignment(cost: Tensor) -> Tensor:
    """The permutation of least cost, by POT's network simplex, and where this is slower from an entropic plan of small eps."""
    n, mean = len(cost), float(cost.mean())
    if FEW < n <= SIMPLEX and cost.device.type == "cpu" and (found := _vertex(cost)) is not None:
        return found
    if n <= FEW or NEAR * mean < 1e-30:
        return match(cost)
    weights = cost.new_full((n,), 1 / n, dtype=torch.float32)
    with warnings.catch_warnings():
        # a start, judged by what is made of it
        warnings.simplefilter("ignore", NotConverged)
        warnings.simplefilter("ignore", PrecisionWarning)
        unit = (cost / mean).float()
        near = solve_bridge(weights, weights, NEAR, cost=unit, solver=Sinkhorn(tol=ROUGH))
    return match(cost, near.potentials().g.values.double() * mean)


def _vertex(cost: Tensor) -> Tensor | None:
    """The permutation that POT's plan is; None where it stopped early."""
    import ot

    weights = torch.full((len(cost),), 1 / len(cost), dtype=torch.float64)
    plan, log = ot.emd(weights, weights, cost, numItermax=1_000_000, log=True)
    found: Tensor = plan.argmax(1)
    return found if log["warning"] is None and len(set(found.tolist())) == len(cost) else None


def _scaled(bridge: Bridge, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """The plan scaled to mass 1, whatever its mass."""
    f, g = bridge.potentials()
    logits = (f.values[..., :, None] + g.values[..., None, :] - _half_cost(x, y)) / eps
    return logits.flatten(-2).softmax(-1).reshape(logits.shape)


def wasserstein(
    x0: Tensor, x1: Tensor, method: str | None = None, reg: float = 0.05, power: int = 2, **unknown: Any
) -> float:
    """The Wasserstein distance of order ``power`` (1 or 2) between uniform weights on two clouds, for ``|x - y|``.

    ``method`` is "exact" (the default), or "sinkhorn": ``(<P, C>)^(1 / power)`` of the entropic plan for ``C = |x - y|^power``
    and ``reg`` in units of C.

    Raises
    ------
    ValueError : an unknown method or power.
    TypeError : an option that is not known.

    Examples
    --------
    >>> import torch
    >>> from sbot.compat.torchcfm import wasserstein
    >>> wasserstein(torch.zeros(3, 1), torch.ones(3, 1))
    1.0
    """
    if unknown:
        raise TypeError(f"wasserstein has no {', '.join(unknown)}; give method, reg and power")
    if power not in (1, 2):
        raise ValueError(f"power is {power!r}; give 1 or 2")
    if method not in (None, "exact", "sinkhorn"):
        raise ValueError(f"Unknown method: {method}; give exact or sinkhorn")
    sampler = OTPlanSampler("exact" if method is None else method, reg=reg)
    cost = torch.cdist(sampler._points(x0), sampler._points(x1)).pow(power).double()
    if method == "sinkhorn":
        a, b = (cost.new_full((k,), 1 / k) for k in cost.shape)
        value = float(solve_bridge(a, b, sampler.reg, cost=cost, solver=Sinkhorn(tol=1e-10)).linear_cost())
    else:
        value = float((_exact(cost) * cost).sum())
    return math.sqrt(value) if power == 2 else value
