"""A pytest plugin that puts sbot's functions in the place of GeomLoss's, in every module that holds them, and counts the calls.

``SBOT_SWAP`` says what is put there: "theirs" (the originals, counted), "ours", "both" (ours; theirs is called too, and the
largest deviation of the values is kept), or "impostor" (the value of the independent coupling, which the tests must find out).
``SBOT_SWAP_LOG`` is a file that the counts are written to.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import warnings

import hypothesis
import numpy as np
import torch

from sbot.compat import geomloss as ours
from sbot.compat.swap import Bindings

NAMES = ("solve", "solve_batch", "solve_sample")
MODE = os.environ.get("SBOT_SWAP", "ours")
COUNTS: dict[str, int] = {}
DEVIATIONS: dict[str, float] = {}

# the same examples on every machine, however slow it is
PHASES = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
hypothesis.settings.register_profile(
    "conformance", deadline=None, derandomize=True, database=None, phases=PHASES, report_multiple_bugs=False
)
hypothesis.settings.load_profile("conformance")


def as_array(x):
    return np.asarray(x.detach().cpu() if isinstance(x, torch.Tensor) else x, dtype=np.float64)


def deviation(name, mine, theirs):
    a, b = as_array(mine.value), as_array(theirs.value)
    if np.isfinite(b).all():
        off = float((np.abs(a - b) / np.maximum(1.0, np.abs(b))).max())
        DEVIATIONS[name] = max(DEVIATIONS.get(name, 0.0), off)


class Impostor:
    """A result whose plan is the independent coupling."""

    def __init__(self, result):
        self._result = result

    def __getattr__(self, name):
        return getattr(self._result, name)

    @property
    def density(self):
        return 0 * self._result.density + 1

    @property
    def plan(self):
        marginals = self._result.marginal_a, self._result.marginal_b
        return marginals[0][..., :, None] * marginals[1][..., None, :] / marginals[0].sum(-1)[..., None, None]

    @property
    def value(self):
        problem = self._result.bridge.problem
        cost = problem.cost.matrix(*problem.sites)
        plan = self.plan if isinstance(self.plan, torch.Tensor) else torch.from_numpy(self.plan)
        value = self._result._unit * (plan * cost).sum((-2, -1))
        return value if isinstance(self._result.value, torch.Tensor) else value.numpy()


def counted(name, original):
    mine = getattr(ours.ot, name)

    @functools.wraps(original)
    def call(*args, **kwargs):
        COUNTS[name] = COUNTS.get(name, 0) + 1
        if MODE == "theirs":
            return original(*args, **kwargs)
        result = mine(*args, **kwargs)
        if MODE == "both":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                deviation(name, result, original(*args, **kwargs))
        return Impostor(result) if MODE == "impostor" else result

    return call


def pytest_configure(config):
    del config
    for name in NAMES:
        original = getattr(importlib.import_module("geomloss.ot"), name)
        replacement = counted(name, original)
        places = Bindings().replace(original, replacement, "geomloss")
        assert places >= 2, f"{name} was found in {places} modules of GeomLoss"


def pytest_unconfigure(config):
    del config
    path = os.environ.get("SBOT_SWAP_LOG")
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"calls": COUNTS, "deviations": DEVIATIONS}, file)
