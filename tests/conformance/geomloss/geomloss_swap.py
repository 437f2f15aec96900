"""A pytest plugin that puts sbot's functions in the place of GeomLoss's, in every module that holds them, and counts the calls.

``SBOT_SWAP`` says what is put there: "theirs" (the originals, counted), "ours", "both" (ours; each problem is also solved by
both in float64, and `geomloss_judge` says which is right where they differ), or "impostor" (the value of the independent
coupling, which the tests must find out).
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

try:
    from .geomloss_judge import CLOSE, judged
except ImportError:  # a plugin has no package, and `tests` is that of GeomLoss where it runs
    from geomloss_judge import CLOSE, judged

NAMES = ("solve", "solve_batch", "solve_sample")
MODE = os.environ.get("SBOT_SWAP", "ours")
if MODE not in ("theirs", "ours", "both", "impostor"):
    raise ValueError(f"SBOT_SWAP is {MODE!r}; give theirs, ours, both or impostor")
COUNTS: dict[str, int] = {}
VERDICTS: dict[str, int] = {}
DIFFERENCES: list[dict] = []
INSIDE: list[int] = []

# the same examples on every machine, however slow it is
PHASES = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
hypothesis.settings.register_profile(
    "conformance", deadline=None, derandomize=True, database=None, phases=PHASES, report_multiple_bugs=False
)
hypothesis.settings.load_profile("conformance")


def as_it_is(original, args, kwargs):
    """A call of theirs, in which nothing is replaced."""
    INSIDE.append(1)
    try:
        return original(*args, **kwargs)
    finally:
        INSIDE.pop()


def doubled(x):
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu().numpy()
    return np.asarray(x, dtype=np.float64) if isinstance(x, np.ndarray) else x


def compare(name, original, args, kwargs):
    """One call on both, in float64, each problem of a batch by itself."""
    args, kwargs = [doubled(x) for x in args], {key: doubled(x) for key, x in kwargs.items()}
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        pair = getattr(ours.ot, name)(*args, **kwargs), as_it_is(original, args, kwargs)
    problem = pair[0].bridge.problem
    unit = pair[0]._unit
    C = unit * problem.cost.matrix(*problem.sites).double().numpy()
    a, b = (side.weights.double().numpy() for side in (problem.mu, problem.nu))
    batch = C.shape[:-2]
    for k in np.ndindex(*batch):
        mine, theirs = (
            {key: np.asarray(value)[k] for key, value in zip(("f", "g", "value", "plan"), parts, strict=True)}
            for parts in ((r.potential_a, r.potential_b, r.value, r.plan) for r in pair)
        )
        said, value_off, plan_off = judged(mine, theirs, C[k], a[k], b[k], kwargs["reg"], kwargs.get("unbalanced"))
        VERDICTS[said] = VERDICTS.get(said, 0) + 1
        VERDICTS["values alike"] = VERDICTS.get("values alike", 0) + (value_off <= CLOSE)
        off = {"name": name, "verdict": said, "value": value_off, "plan": plan_off}
        DIFFERENCES.append({**off, "reg": kwargs["reg"], "unbalanced": kwargs.get("unbalanced"), "shape": C[k].shape})


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
        if INSIDE:
            return original(*args, **kwargs)  # theirs calls itself by its public names
        COUNTS[name] = COUNTS.get(name, 0) + 1
        if MODE == "theirs":
            return as_it_is(original, args, kwargs)
        result = mine(*args, **kwargs)
        if MODE == "both":
            compare(name, original, args, kwargs)
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
            json.dump({"calls": COUNTS, "verdicts": VERDICTS, "differences": DIFFERENCES}, file)
