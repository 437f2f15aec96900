"""``ot.da``: domain adaptation by entropic plans; what is not defined here is POT's."""

from __future__ import annotations

import inspect
import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._arrays import covers, enter, forwarder, pot
from ._costs import METRICS, dist, distances, unif
from ._solve import _outside, check_matrix, weights
from .bregman import LOG, Call, sinkhorn
from .unbalanced import sinkhorn_unbalanced
from .utils import cost_normalization

__getattr__ = forwarder("da")

#: The label of a sample whose class is not known.
MISSING_LABEL = -1
MAPS = ("ferradans", "continuous")
#: Iterations of `sinkhorn_unbalanced` that one of an `UnbalancedSinkhornTransport` stands for: its default is 10 of them.
EACH = 10


def distribution_estimation_uniform(X: Any) -> Any:
    """Weights ``1 / n`` for n samples, of their dtype and on their device."""
    return unif(X.shape[0], type_as=X)


@covers("da.sinkhorn_lpl1_mm")
def sinkhorn_lpl1_mm(
    a: Any,
    labels_a: Any,
    b: Any,
    M: Any,
    reg: Any,
    eta: float = 0.1,
    numItermax: int = 10,
    numInnerItermax: int = 200,
    stopInnerThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
) -> Any:
    """The plan that keeps the classes of the source apart: ``sum over classes and columns of (mass)^(1/2)`` weighs eta.

    Majorised by a linear term, it is Sinkhorn with another cost, ``numItermax`` times; the first is plain Sinkhorn.
    """
    home, (a, b, M) = enter(a, b, M)
    check_matrix(M)
    a, b = weights(a, M.shape[0], M, "a"), weights(b, M.shape[1], M, "b")
    members = _one_hot(labels_a, M)
    extra, start, out = torch.zeros_like(M), None, M
    told: dict[str, Any] = {}
    for _ in range(numItermax):
        call = Call(LOG, numInnerItermax, stopInnerThr, verbose, True, True, start)
        out, told = call.run(a, b, M + eta * extra, reg)
        start = told["log_u"], told["log_v"]
        extra = 0.5 * (members @ (members.T @ out) + 1e-3) ** -0.5
    kept = {key: told[key] for key in ("err", "niter", "u", "v") if key in told}
    kept = {key: home.back(part) if isinstance(part, Tensor) else part for key, part in kept.items()}
    return (home.back(out), kept) if log else home.back(out)


def _one_hot(labels: Any, like: Tensor) -> Tensor:
    y = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    _, index = np.unique(y, return_inverse=True)
    return torch.nn.functional.one_hot(torch.from_numpy(index.reshape(-1))).to(like)


# ---- the estimators ------------------------------------------------------------------------------------------------


class BaseTransport:
    """``fit(Xs, ys, Xt, yt)`` finds the plan ``coupling_``; `transform` and `inverse_transform` map samples by it.

    The attributes after a fit are POT's: ``cost_, norm_cost_, mu_s, mu_t, coupling_, log_, xs_, xt_``.
    """

    metric: Any
    norm: Any
    limit_max: Any
    distribution_estimation: Any
    coupling_: Any
    log_: dict[str, Any]
    xs_: Any
    xt_: Any
    mu_s: Any
    mu_t: Any
    cost_: Any
    norm_cost_: Any

    @property
    def nx(self) -> Any:
        """POT's backend of the samples."""
        return pot("backend.get_backend")(self.xs_)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        return {name: getattr(self, name) for name in sorted(inspect.signature(type(self)).parameters)}

    def set_params(self, **params: Any) -> BaseTransport:
        """Set arguments of the constructor; ValueError for an unknown one."""
        known = self.get_params()
        for name, value in params.items():
            if name not in known:
                raise ValueError(f"Invalid parameter {name} for {type(self).__name__}; it has {', '.join(known)}")
            setattr(self, name, value)
        return self

    def fit(self, Xs: Any = None, ys: Any = None, Xt: Any = None, yt: Any = None) -> Any:
        """Costs and weights; the classes below solve."""
        _needed(Xs=Xs, Xt=Xt)
        home, _ = enter(Xs, Xt)
        cost = dist(Xs, Xt, metric=self.metric)
        self.norm_cost_ = None
        if self.norm is not None:
            cost, self.norm_cost_ = cost_normalization(cost, self.norm, return_value=True)
        self._labelled_both = ys is not None and yt is not None
        if self._labelled_both:
            cost = home.back(self._labelled(enter(cost)[1][0], ys, yt))
        self.cost_, self.xs_, self.xt_ = cost, Xs, Xt
        self.mu_s, self.mu_t = self.distribution_estimation(Xs), self.distribution_estimation(Xt)
        return self

    def _labelled(self, cost: Tensor, ys: Any, yt: Any) -> Tensor:
        """Pairs of two known and different labels cost at least ``limit_max``, in units of the largest cost.

        -1 is no label, and neither is NaN, as where targets of a regression are missing.  Where ``limit_max`` is infinite it is
        the largest number of the dtype: products with a plan that has nothing there are 0, not NaN.
        """
        s, t = (torch.as_tensor(y).to(cost.device).flatten() for y in (ys, yt))
        there = [(y != MISSING_LABEL) & ~torch.isnan(y) for y in (s, t)]
        known = there[0][:, None] & there[1]
        apart = known & (s[:, None] != t)
        most = torch.finfo(cost.dtype).max
        limit = most if math.isinf(self.limit_max) else float(self.limit_max) * float(cost.detach().max())
        return torch.where(apart, cost.clamp(min=limit), cost)

    @property
    def _forbidding(self) -> Any:
        """``cost_`` with infinities where labels keep apart."""
        if not self._labelled_both:
            return self.cost_
        home, (cost,) = enter(self.cost_)
        return home.back(torch.where(cost == torch.finfo(cost.dtype).max, math.inf, cost))

    def fit_transform(self, Xs: Any = None, ys: Any = None, Xt: Any = None, yt: Any = None) -> Any:
        """`fit`, then `transform` of the same samples."""
        return self.fit(Xs, ys, Xt, yt).transform(Xs, ys, Xt, yt)

    def transform(self, Xs: Any = None, ys: Any = None, Xt: Any = None, yt: Any = None, batch_size: int = 128) -> Any:
        """Source samples to the target: barycentric means; new samples move as the nearest one that was seen."""
        _needed(Xs=Xs)
        return _ferradans(self.coupling_, self.xs_, self.xt_, Xs, batch_size)

    def inverse_transform(
        self, Xs: Any = None, ys: Any = None, Xt: Any = None, yt: Any = None, batch_size: int = 128
    ) -> Any:
        """Target samples to the source, in the same way."""
        _needed(Xt=Xt)
        return _ferradans(self.coupling_.T, self.xt_, self.xs_, Xt, batch_size)

    def transform_labels(self, ys: Any = None) -> Any:
        """Shares of the classes of ys that each target sample receives, ``(n_t, n_classes)``."""
        _needed(ys=ys)
        home, (plan,) = enter(self.coupling_)
        return home.back(_means(plan.T, _one_hot(ys, plan)))

    def inverse_transform_labels(self, yt: Any = None) -> Any:
        """The same from the target, ``(n_s, n_classes)``."""
        _needed(yt=yt)
        home, (plan,) = enter(self.coupling_)
        return home.back(_means(plan, _one_hot(yt, plan)))

    def _keep(self, returned: Any, log: bool) -> None:
        self.coupling_, self.log_ = returned if log else (returned, {})


def _needed(**given: Any) -> None:
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be given")


def _means(plan: Tensor, values: Tensor) -> Tensor:
    """The mean of ``values`` by each row of the plan; 0 for a row without mass."""
    # moments and masses in one product, from the left: the plan is read once, by rows
    sums = torch.cat([values.mT, values.new_ones(1, len(values))]) @ plan.mT
    return (sums[:-1] / sums[-1:].clamp(min=torch.finfo(plan.dtype).tiny)).mT


def _ferradans(plan: Any, seen: Any, there: Any, new: Any, size: int) -> Any:
    home, (p, x, y, z) = enter(plan, seen, there, new)
    moved = _means(p, y)
    if z.shape == x.shape and torch.equal(z, x):
        return home.back(moved)
    out = moved.new_empty(len(z), moved.shape[1])
    for k, part in enumerate(torch.split(z, size)):
        near = distances(part, x, "sqeuclidean").argmin(1)
        out[k * size : k * size + len(part)] = moved[near] + part - x[near]
    return home.back(out)


class SinkhornTransport(BaseTransport):
    """Domain adaptation by the plan of `ot.sinkhorn`.

    ``out_of_sample_map="continuous"`` maps any sample by its conditional law, ``softmax(-M(x, xt) / reg_e + log v)``.

    Examples
    --------
    >>> import numpy as np, sbot.compat.pot as ot
    >>> Xs = np.array([[0.0], [1.0]])
    >>> ot.da.SinkhornTransport(reg_e=0.1).fit(Xs=Xs, Xt=Xs + 5).transform(np.array([[0.5]])).round(3)
    array([[5.5]])
    """

    def __init__(
        self,
        reg_e: float = 1.0,
        method: str = "sinkhorn_log",
        max_iter: int = 1000,
        tol: float = 1e-8,
        verbose: bool = False,
        log: bool = False,
        metric: Any = "sqeuclidean",
        norm: Any = None,
        distribution_estimation: Any = distribution_estimation_uniform,
        out_of_sample_map: str = "continuous",
        limit_max: float = math.inf,
    ) -> None:
        if out_of_sample_map not in MAPS:
            raise ValueError(f"Unknown out_of_sample_map method {out_of_sample_map!r}; give one of {', '.join(MAPS)}")
        self.reg_e, self.method, self.max_iter, self.tol = reg_e, method, max_iter, tol
        self.verbose, self.log, self.metric, self.norm = verbose, log, metric, norm
        self.limit_max, self.distribution_estimation = limit_max, distribution_estimation
        self.out_of_sample_map = out_of_sample_map

    def fit(self, Xs: Any = None, ys: Any = None, Xt: Any = None, yt: Any = None) -> SinkhornTransport:
        """The plan between Xs ``(n_s, d)`` and Xt ``(n_t, d)``; labels keep classes apart where both sides have them."""
        super().fit(Xs, ys, Xt, yt)
        if self.out_of_sample_map == "continuous":
            self.log = True
            if self.method != "sinkhorn_log":
                self.method = "sinkhorn_log"
                warnings.warn(
                    "The method has been set to 'sinkhorn_log' as it is the only method available for "
                    "out_of_sample_map='continuous'",
                    stacklevel=_outside(),
                )
        returned = sinkhorn(
            self.mu_s,
            self.mu_t,
            self._forbidding,
            self.reg_e,
            method=self.method,
            numItermax=self.max_iter,
            stopThr=self.tol,
            verbose=self.verbose,
            log=self.log,
        )
        self._keep(returned, self.log)
        return self

    def transform(self, Xs: Any = None, ys: Any = None, Xt: Any = None, yt: Any = None, batch_size: int = 128) -> Any:
        if self.out_of_sample_map == "ferradans":
            return super().transform(Xs, ys, Xt, yt, batch_size)
        _needed(Xs=Xs)
        return self._continuous(Xs, self.xt_, self.log_["log_v"], batch_size)

    def inverse_transform(
        self, Xs: Any = None, ys: Any = None, Xt: Any = None, yt: Any = None, batch_size: int = 128
    ) -> Any:
        if self.out_of_sample_map == "ferradans":
            return super().inverse_transform(Xs, ys, Xt, yt, batch_size)
        _needed(Xt=Xt)
        return self._continuous(Xt, self.xs_, self.log_["log_u"], batch_size)

    def _continuous(self, new: Any, there: Any, logs: Any, size: int) -> Any:
        home, (z, y, g) = enter(new, there, logs)
        # filled piece by piece: small results kept between large temporaries would split the heap
        moved = y.new_empty(len(z), y.shape[1])
        for k, part in enumerate(torch.split(z, size)):
            M = distances(part, y, self.metric) if self.metric in METRICS else None
            if M is None:
                M = enter(dist(home.back(part), there, metric=self.metric))[1][0]
            M = enter(cost_normalization(M, self.norm, value=self.norm_cost_))[1][0]
            moved[k * size : k * size + len(part)] = torch.softmax(g - M / self.reg_e, 1) @ y
        return home.back(moved)


class UnbalancedSinkhornTransport(BaseTransport):
    """Domain adaptation by the plan of `ot.unbalanced.sinkhorn_unbalanced`; ``max_iter`` counts tens of its iterations."""

    def __init__(
        self,
        reg_e: float = 1.0,
        reg_m: Any = 0.1,
        method: str = "sinkhorn",
        max_iter: int = 10,
        tol: float = 1e-9,
        verbose: bool = False,
        log: bool = False,
        metric: Any = "sqeuclidean",
        norm: Any = None,
        distribution_estimation: Any = distribution_estimation_uniform,
        out_of_sample_map: str = "ferradans",
        limit_max: float = 10,
    ) -> None:
        self.reg_e, self.reg_m, self.method, self.max_iter, self.tol = reg_e, reg_m, method, max_iter, tol
        self.verbose, self.log, self.metric, self.norm = verbose, log, metric, norm
        self.distribution_estimation, self.out_of_sample_map = distribution_estimation, out_of_sample_map
        self.limit_max = limit_max

    def fit(  # type: ignore[override]
        self, Xs: Any, ys: Any = None, Xt: Any = None, yt: Any = None
    ) -> UnbalancedSinkhornTransport:
        """The plan between Xs and Xt."""
        super().fit(Xs, ys, Xt, yt)
        returned = sinkhorn_unbalanced(
            self.mu_s,
            self.mu_t,
            self._forbidding,
            self.reg_e,
            self.reg_m,
            method=self.method,
            numItermax=EACH * self.max_iter,
            stopThr=self.tol,
            verbose=self.verbose,
            log=self.log,
        )
        self._keep(returned, self.log)
        return self


class SinkhornLpl1Transport(BaseTransport):
    """Domain adaptation by the plan of `sinkhorn_lpl1_mm`, which keeps the classes of the source apart; needs ys."""

    def __init__(
        self,
        reg_e: float = 1.0,
        reg_cl: float = 0.1,
        max_iter: int = 10,
        max_inner_iter: int = 200,
        log: bool = False,
        tol: float = 1e-8,
        verbose: bool = False,
        metric: Any = "sqeuclidean",
        norm: Any = None,
        distribution_estimation: Any = distribution_estimation_uniform,
        out_of_sample_map: str = "ferradans",
        limit_max: float = math.inf,
    ) -> None:
        self.reg_e, self.reg_cl, self.max_iter, self.max_inner_iter = reg_e, reg_cl, max_iter, max_inner_iter
        self.tol, self.log, self.verbose, self.metric, self.norm = tol, log, verbose, metric, norm
        self.distribution_estimation, self.out_of_sample_map = distribution_estimation, out_of_sample_map
        self.limit_max = limit_max

    def fit(  # type: ignore[override]
        self, Xs: Any, ys: Any = None, Xt: Any = None, yt: Any = None
    ) -> SinkhornLpl1Transport:
        """The plan between Xs with classes ys and Xt."""
        _needed(Xs=Xs, Xt=Xt, ys=ys)
        super().fit(Xs, ys, Xt, yt)
        returned = sinkhorn_lpl1_mm(
            self.mu_s,
            ys,
            self.mu_t,
            self._forbidding,
            self.reg_e,
            eta=self.reg_cl,
            numItermax=self.max_iter,
            numInnerItermax=self.max_inner_iter,
            stopInnerThr=self.tol,
            verbose=self.verbose,
            log=self.log,
        )
        self._keep(returned, self.log)
        return self


#: POT's functions and classes that this module has; the others are forwarded.
COVERED = ("sinkhorn_lpl1_mm", "SinkhornTransport", "UnbalancedSinkhornTransport", "SinkhornLpl1Transport")
