"""TorchCFM with its sampler and matchers swapped for those of sbot, in every module that has bound them; a pytest plugin.

Modes: "torchcfm" (nothing is swapped), "sbot", "differential" (each plan is made by both and compared, in float64) and "wrong"
(sbot with the independent coupling for every plan, compared as well: it must fail).
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import warnings
from collections import Counter
from types import ModuleType
from typing import Any

import numpy as np
import torch

import sbot.compat.torchcfm as ours
from sbot.compat.swap import Bindings
from sbot.compat.torchcfm import optimal_transport
from sbot.solvers import Sinkhorn

MODES = ("torchcfm", "sbot", "differential", "wrong")
MODULES = ("torchcfm", "torchcfm.optimal_transport", "torchcfm.conditional_flow_matching")
#: Relative difference that counts as none.
CLOSE = 1e-8


class Near(float):
    """A number that equals another one to five digits: what POT reaches in 20,000 iterations where TorchCFM's test asks it."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, float) and abs(self - other) <= 1e-5 * max(abs(self), abs(other))

    __hash__ = float.__hash__


class Swap:
    """Names of TorchCFM replaced, with a count of what was called and of what reached the solvers of sbot."""

    def __init__(self, mode: str) -> None:
        assert mode in MODES, mode
        self.mode = mode
        self.counts: Counter[str] = Counter()
        self.differences: list[str] = []
        self._bindings = Bindings()

    def __enter__(self) -> Swap:
        modules = [importlib.import_module(name) for name in MODULES]
        self._theirs = vars(modules[1])["OTPlanSampler"]
        self._count(Sinkhorn, "solved", "Sinkhorn.solve")
        self._count(optimal_transport, "match", "match")
        if self.mode == "torchcfm":
            return self
        self._watch_plans()
        for name in ours.__all__:
            for module in modules:
                if name in vars(module):
                    self._set(module, name, getattr(ours, name))
        return self

    def __exit__(self, *_: object) -> None:
        self._bindings.undo()

    def bind(self, module: ModuleType) -> None:
        """What a test module has bound itself: POT, whose value of a Sinkhorn solve it holds ours against, bit for bit."""
        pot = vars(module).get("ot")
        if self.mode == "torchcfm" or not isinstance(pot, ModuleType):
            return

        log_domain = {"method": "sinkhorn_log", "numItermax": 20_000}

        class Pot:
            # in the log domain: the value that TorchCFM's test pins is 1e-31 for want of it
            sinkhorn2 = staticmethod(lambda *a, **k: Near(pot.sinkhorn2(*a, **{**k, **log_domain})))

            def __getattr__(self, name: str) -> Any:
                return getattr(pot, name)

        self._set(module, "ot", Pot())

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self._bindings.set(owner, name, value)

    def _count(self, owner: Any, name: str, label: str) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.counts[label] += 1
            return original(*args, **kwargs)

        self._set(owner, name, counted)

    def _watch_plans(self) -> None:
        plan, permuted = ours.OTPlanSampler._plan, ours.OTPlanSampler._permuted

        def seen(sampler: Any, x: torch.Tensor, y: torch.Tensor) -> None:
            pairs = [(x, y)] if x.ndim == 2 else list(zip(x, y, strict=True))
            self.counts[f"plan {sampler.method}"] += len(pairs)
            if self.mode in ("differential", "wrong"):
                for one, two in pairs:
                    self._compare(sampler, one.double(), two.double())

        def watched(sampler: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            seen(sampler, x, y)
            got = plan(sampler, x, y)
            return torch.ones_like(got) / (x.shape[-2] * y.shape[-2]) if self.mode == "wrong" else got

        def watched_pairs(sampler: Any, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            seen(sampler, x, y)
            rows, columns = permuted(sampler, x, y)
            return rows, columns.roll(1) if self.mode == "wrong" else columns

        self._set(ours.OTPlanSampler, "_plan", watched)
        self._set(ours.OTPlanSampler, "_permuted", watched_pairs)
        self._plan = plan

    def _compare(self, sampler: Any, x: torch.Tensor, y: torch.Tensor) -> None:
        """Both plans, in float64: cost and entries, or the marginals where theirs has not converged."""
        got = self._plan(sampler, x, y).numpy()
        if self.mode == "wrong":
            got = np.full_like(got, 1 / got.size)
        options = {name: getattr(sampler, name) for name in ("reg", "reg_m", "normalize_cost")}
        theirs = self._theirs(sampler.method, **options)
        if sampler.method != "exact":
            # where theirs stops early it is given more to do
            theirs.ot_fn = functools.partial(theirs.ot_fn, stopThr=1e-14, numItermax=20_000)
        with warnings.catch_warnings(record=True) as said, np.errstate(all="ignore"):
            warnings.simplefilter("always")
            expected = np.asarray(theirs.get_map(x, y))
        size = expected.max()
        off, their_off = (
            np.abs(p.sum(0) - 1 / p.shape[1]).sum() + np.abs(p.sum(1) - 1 / len(p)).sum() for p in (got, expected)
        )
        # first: TorchCFM then returns the independent coupling, which a wrong drop-in equals
        if off <= 1e-6 and any("umerical errors" in str(warning.message) for warning in said):
            self.counts["theirs broke down"] += 1
            return
        if np.abs(got - expected).max() <= CLOSE * size:
            self.counts["as theirs"] += 1
            return
        if off <= CLOSE / 10 and their_off > CLOSE:
            self.counts["theirs did not converge"] += 1
            return
        self.differences.append(
            f"{sampler.method}, reg={sampler.reg}, shape {expected.shape}: {np.abs(got - expected).max() / size:.1e}"
            f", marginal errors {off:.1e} and theirs {their_off:.1e}"
        )


class Plugin:
    """Swap before the tests are imported, and write what happened."""

    def __init__(self, swap: Swap, out: str) -> None:
        self.swap, self.out = swap, out
        self.outcomes: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        for module in {item.module for item in items}:
            self.swap.bind(module)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self) -> None:
        said = {"outcomes": self.outcomes, "counts": dict(self.swap.counts), "differences": self.swap.differences}
        with open(self.out, "w", encoding="utf-8") as file:
            json.dump(said, file)


def pytest_configure(config: Any) -> None:
    if "SBOT_CONFORMANCE_MODE" in os.environ:
        swap = Swap(os.environ["SBOT_CONFORMANCE_MODE"]).__enter__()
        config.pluginmanager.register(Plugin(swap, os.environ["SBOT_CONFORMANCE_OUT"]))
