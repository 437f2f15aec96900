"""The calls, each written once for both sides: it takes the module, the original or sbot's, and the arrays of a user.

All of them pose ``min <P, M> + reg sum P log P`` in the units of their library, with every option at its default but those that
make the problem.  A call ends with what a pipeline reads: a plan, a value with its plan or its gradient, samples that moved.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ..problems import Array
from ..speed.tasks import points

#: The module of each side: the original's, and the one that is imported instead.
MODULES = {
    "POT": ("ot", "sbot.compat.pot"),
    "GeomLoss": ("geomloss", "sbot.compat.geomloss"),
    "TorchCFM": ("torchcfm.optimal_transport", "sbot.compat.torchcfm"),
}
#: Mass of a partial plan; strength of relaxed marginals over the largest cost; targets of one call.
MASS, RELAX, TARGETS = 0.5, 0.1, 4


@dataclass(frozen=True)
class Data:
    """Two clouds ``(n, d)`` and what is made of them, as NumPy arrays or, for a call on tensors, as tensors of torch."""

    x: Array = field(repr=False)
    y: Array = field(repr=False)
    ratio: float
    tensors: bool = False

    @staticmethod
    def of(job: dict[str, Any], tensors: bool) -> Data:
        x, y = (part.astype(job["dtype"]) for part in points(job))
        return Data(x, y, job["ratio"], tensors)

    def kind(self, array: Any) -> Any:
        return torch.from_numpy(array) if self.tensors else array

    @cached_property
    def squares(self) -> Array:
        """``|x - y|^2``, ``(n, n)``."""
        x, y = self.x.astype(np.float64), self.y.astype(np.float64)
        heights = (x**2).sum(-1)[..., :, None] + (y**2).sum(-1)[..., None, :]
        return np.maximum(heights - 2 * x @ np.swapaxes(y, -1, -2), 0).astype(self.x.dtype)

    @property
    def top(self) -> float:
        return float(self.squares.max())

    @property
    def reg(self) -> float:
        return self.ratio * self.top

    @cached_property
    def M(self) -> Any:
        return self.kind(self.squares)

    @cached_property
    def a(self) -> Any:
        return self.kind(np.full(self.x.shape[-2], 1 / self.x.shape[-2], self.x.dtype))

    @cached_property
    def b(self) -> Any:
        return self.kind(np.full(self.y.shape[-2], 1 / self.y.shape[-2], self.y.dtype))

    @cached_property
    def X(self) -> Any:
        return self.kind(self.x)

    @cached_property
    def Y(self) -> Any:
        return self.kind(self.y)

    @cached_property
    def labels(self) -> Array:
        """Three classes of the source, by the first coordinate."""
        return np.digitize(self.x[:, 0], np.quantile(self.x[:, 0], (1 / 3, 2 / 3)))

    @cached_property
    def targets(self) -> Array:
        """Weights ``(n, TARGETS)``."""
        weights = np.random.default_rng(0).random((len(self.y), TARGETS)) + 0.5
        return (weights / weights.sum(0)).astype(self.y.dtype)


Plan = Callable[[Any, Data, Any], Any]


@dataclass(frozen=True)
class Call:
    """``make(module, data)`` is timed; ``plan(module, data, what it returned)`` is the plan that its error is read from."""

    library: str
    make: Callable[[Any, Data], Any]
    plan: Plan = lambda module, data, out: out
    #: what the plan is to satisfy: "balanced", "relaxed" or "partial" marginals
    kind: str = "balanced"
    dtypes: tuple[str, ...] = ("float64",)
    tensors: bool = False
    batch: int = 0
    #: eps does not enter
    exact: bool = False

    def module(self, ours: bool) -> ModuleType:
        """That of sbot, or the original's."""
        return importlib.import_module(MODULES[self.library][int(ours)])


def _first(module: Any, data: Data, out: Any) -> Any:
    return out[0]


def _same(module: Any, data: Data, out: Any) -> Any:
    """The plan behind a value: the same solve, asked for its plan."""
    return module.sinkhorn(data.a, data.b, data.M, data.reg)


def _scalings(module: Any, data: Data, out: Any) -> Any:
    """From ``log u`` and ``log v``."""
    f, g = (np.asarray(part, dtype=np.float64) for part in out[:2])
    return np.exp(f[:, None] + g - data.squares / data.reg)


def _sinkhorn(method: str, **more: Any) -> Call:
    return Call("POT", lambda ot, p: ot.sinkhorn(p.a, p.b, p.M, p.reg, method=method), **more)


def _unbalanced(method: str) -> Call:
    def make(ot: Any, p: Data) -> Any:
        return ot.unbalanced.sinkhorn_unbalanced(p.a, p.b, p.M, p.reg, RELAX * p.top, method=method)

    return Call("POT", make, kind="relaxed")


def _result(made: Any) -> tuple[Any, Any]:
    """Value and plan of a result object: sbot makes them when they are asked for."""
    return made.plan, made.value


def _adapted(name: str, relaxed: bool = False) -> Call:
    """A fit, and the source samples where it takes them."""

    def make(ot: Any, p: Data) -> Any:
        more = {"reg_m": RELAX * p.top} if relaxed else {}
        transport = getattr(ot.da, name)(reg_e=p.reg, **more).fit(Xs=p.X, ys=p.labels, Xt=p.Y)
        return transport.coupling_, transport.transform(Xs=p.X)

    return Call("POT", make, _first, "relaxed" if relaxed else "balanced")


BOTH = ("float64", "float32")
POT: dict[str, Call] = {
    "sinkhorn": _sinkhorn("sinkhorn", dtypes=BOTH),
    "sinkhorn_log": _sinkhorn("sinkhorn_log", dtypes=BOTH),
    "sinkhorn_stabilized": _sinkhorn("sinkhorn_stabilized"),
    "sinkhorn_epsilon_scaling": _sinkhorn("sinkhorn_epsilon_scaling"),
    "greenkhorn": _sinkhorn("greenkhorn"),
    "sinkhorn, tensors": _sinkhorn("sinkhorn", tensors=True),
    "sinkhorn_log, tensors": _sinkhorn("sinkhorn_log", tensors=True),
    "sinkhorn, several targets": Call(
        "POT",
        lambda ot, p: ot.sinkhorn(p.a, p.targets, p.M, p.reg),
        lambda ot, p, out: ot.sinkhorn(p.a, np.ascontiguousarray(p.targets[:, 0]), p.M, p.reg),
        "first target",
    ),
    "sinkhorn2": Call("POT", lambda ot, p: ot.sinkhorn2(p.a, p.b, p.M, p.reg), _same),
    "empirical_sinkhorn": Call("POT", lambda ot, p: ot.bregman.empirical_sinkhorn(p.X, p.Y, p.reg)),
    "empirical_sinkhorn, lazy": Call(
        "POT", lambda ot, p: ot.bregman.empirical_sinkhorn(p.X, p.Y, p.reg, isLazy=True), _scalings
    ),
    "empirical_sinkhorn2": Call("POT", lambda ot, p: ot.bregman.empirical_sinkhorn2(p.X, p.Y, p.reg), _same),
    "empirical_sinkhorn_divergence": Call(
        "POT", lambda ot, p: ot.bregman.empirical_sinkhorn_divergence(p.X, p.Y, p.reg), _same
    ),
    "solve": Call("POT", lambda ot, p: _result(ot.solve(p.M, p.a, p.b, reg=p.reg)), _first, dtypes=BOTH),
    "solve, tensors": Call("POT", lambda ot, p: _result(ot.solve(p.M, p.a, p.b, reg=p.reg)), _first, tensors=True),
    "solve, unbalanced": Call(
        "POT",
        lambda ot, p: _result(ot.solve(p.M, p.a, p.b, reg=p.reg, unbalanced=RELAX * p.top)),
        _first,
        "relaxed",
    ),
    "solve_sample": Call("POT", lambda ot, p: _result(ot.solve_sample(p.X, p.Y, reg=p.reg)), _first),
    "solve_sample, lazy": Call(
        "POT", lambda ot, p: ot.solve_sample(p.X, p.Y, reg=p.reg, lazy=True).lazy_plan, lambda ot, p, out: out[:]
    ),
    "solve_batch": Call("POT", lambda ot, p: _result(ot.solve_batch(p.M, p.reg)), _first, batch=TARGETS),
    "sinkhorn_unbalanced": _unbalanced("sinkhorn"),
    "sinkhorn_unbalanced, stabilized": _unbalanced("sinkhorn_stabilized"),
    "sinkhorn_unbalanced, translation invariant": _unbalanced("sinkhorn_translation_invariant"),
    "sinkhorn_unbalanced2": Call(
        "POT",
        lambda ot, p: ot.unbalanced.sinkhorn_unbalanced2(p.a, p.b, p.M, p.reg, RELAX * p.top),
        lambda ot, p, out: ot.unbalanced.sinkhorn_unbalanced(p.a, p.b, p.M, p.reg, RELAX * p.top),
        "relaxed",
    ),
    "entropic_partial_wasserstein": Call(
        "POT",
        lambda ot, p: ot.partial.entropic_partial_wasserstein(p.a, p.b, p.M, p.reg, m=MASS),
        kind="partial",
    ),
    "da.SinkhornTransport": _adapted("SinkhornTransport"),
    "da.SinkhornLpl1Transport": _adapted("SinkhornLpl1Transport"),
    "da.UnbalancedSinkhornTransport": _adapted("UnbalancedSinkhornTransport", relaxed=True),
}


# ---- GeomLoss --------------------------------------------------------------------------------------------------------


def _loss(p: int = 2, reach: bool = False, **options: Any) -> Call:
    """The loss with its gradient in x; its plan is that between the two clouds, which debiasing does not change."""

    def settings(data: Data) -> dict[str, Any]:
        top = data.top / 2 if p == 2 else math.sqrt(data.top)
        more = {"reach": (RELAX * top) ** (1 / p)} if reach else {}
        return {"loss": "sinkhorn", "p": p, "blur": (data.ratio * top) ** (1 / p), "backend": "tensorized", **more}

    def make(module: Any, data: Data) -> Any:
        x = data.X.clone().requires_grad_()
        value = module.SamplesLoss(**settings(data), **options)(x, data.Y)
        return value.detach(), torch.autograd.grad(value, x)[0]

    def plan(module: Any, data: Data, out: Any) -> Any:
        # where potentials are asked for sbot would solve more exactly than for a value
        more = {"solver": _default()} if module.__name__.startswith("sbot") else {}
        said = settings(data)
        loss = module.SamplesLoss(**said, debias=False, potentials=True, **more)
        f, g = (part.reshape(-1).double().numpy() for part in loss(data.X, data.Y))
        cost, eps = data.squares.astype(np.float64), said["blur"] ** p
        cost = cost / 2 if p == 2 else np.sqrt(cost)
        return np.exp((f[:, None] + g - cost) / eps) / cost.size

    kind = "relaxed" if reach else "balanced"
    return Call("GeomLoss", make, plan, kind, BOTH, tensors=True)


def _default() -> Any:
    import sbot

    return sbot.Sinkhorn()


GEOMLOSS: dict[str, Call] = {
    "SamplesLoss": _loss(),
    "SamplesLoss, not debiased": _loss(debias=False),
    "SamplesLoss, reach": _loss(reach=True),
    "SamplesLoss, p = 1": _loss(p=1),
}


# ---- TorchCFM --------------------------------------------------------------------------------------------------------


def _sampler(method: str, kind: str = "balanced") -> Call:
    """Pairs of two mini-batches in float32, as they are drawn in training."""

    def sampler(module: Any, data: Data) -> Any:
        return module.OTPlanSampler(method, reg=data.reg, reg_m=RELAX * data.top, warn=False)

    def make(module: Any, data: Data) -> Any:
        return sampler(module, data).sample_plan(data.X, data.Y)

    def plan(module: Any, data: Data, out: Any) -> Any:
        return sampler(module, data).get_map(data.X, data.Y)

    return Call("TorchCFM", make, plan, kind, ("float32",), tensors=True, exact=method == "exact")


TORCHCFM: dict[str, Call] = {
    "OTPlanSampler exact": _sampler("exact"),
    "OTPlanSampler sinkhorn": _sampler("sinkhorn"),
    "OTPlanSampler partial": _sampler("partial"),
    "OTPlanSampler unbalanced": _sampler("unbalanced", "relaxed"),
}

CALLS = {**POT, **GEOMLOSS, **TORCHCFM}
