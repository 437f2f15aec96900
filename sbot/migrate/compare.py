"""What is compared of two results: values, plans, maps and log-scalings, whatever they come in."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]
#: Values below it are held against it: an objective that is 0 up to rounding has no relative error.
SMALL = 1e-3
#: Log-scalings below it are those of a mass that exp has lost.
LOST = -600.0
LOGS = (("log_u", "log_v"), ("logu", "logv"))
#: Entries of a plan that is made only to be compared.
PAIRS = 2**24
#: What a result object is asked for.
ASKED = ("value", "value_linear", "plan")

Parts = dict[str, Any]


def parts(out: Any, pairs: int = 0, names: Collection[str] = ASKED) -> Parts:
    """A result by kind: "value", "value_linear", "plan" (``(..., n, m)``), "potentials" (a pair).

    Of a result object with lazy parts those of ``names`` are made; ``pairs`` says how large its plan would be.
    """
    if isinstance(out, tuple) and out and isinstance(out[-1], dict):
        return {**parts(out[0] if len(out) == 2 else out[:-1], pairs, names), **_scalings(out[-1])}
    if isinstance(out, tuple) and len(out) == 2:
        return {"potentials": out}
    if hasattr(out, "coupling_"):
        return {"plan": out.coupling_, **_scalings(getattr(out, "log_", None) or {})}
    if hasattr(type(out), "plan"):
        return dict(_attributes(out, pairs, names))
    return {} if out is None else {"plan" if getattr(out, "ndim", 0) >= 2 else "value": out}


def _attributes(out: Any, pairs: int, names: Collection[str]) -> Iterator[tuple[str, Any]]:
    for name in ASKED:
        if name not in names or (name == "plan" and pairs > PAIRS):
            continue
        try:
            value = getattr(out, name, None)
        except NotImplementedError:
            continue
        if value is not None:
            yield name, value


def _scalings(log: dict[str, Any]) -> Parts:
    for u, v in LOGS:
        if u in log and getattr(log[u], "ndim", 0) == 1:
            return {"potentials": (log[u], log[v])}
    return {}


def plain(value: Any) -> Array:
    """As an array of NumPy, in double precision."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().double().numpy()
    return np.asarray(value, dtype=np.float64)


def deviations(one: Parts, other: Parts) -> dict[str, tuple[float, float]]:
    """The largest absolute difference of each part that both have, and the same relative to the largest entry of ``other``.

    Infinite where shapes differ, or one of them is not finite.  Potentials are compared up to the constant between them.
    """
    found = {}
    for kind in one:
        if kind not in other:
            continue
        if kind == "potentials":
            found[kind] = _apart(one[kind], other[kind])
            continue
        x, y = plain(one[kind]), plain(other[kind])
        gap = float(np.abs(x - y).max(initial=0.0)) if x.shape == y.shape else math.inf
        if not math.isfinite(gap):
            found[kind] = math.inf, math.inf
            continue
        size = max(float(np.abs(y).max(initial=0.0)), 0.0 if y.ndim else SMALL)
        found[kind] = gap, gap / size if size else math.inf if gap else 0.0
    return found


def _apart(one: tuple[Any, Any], other: tuple[Any, Any]) -> tuple[float, float]:
    """``max |(u_i + v_j) - (u'_i + v'_j)|`` over atoms whose mass exp can hold, without the matrix; and relative."""
    low = high = size = 0.0
    for x, y in zip(map(plain, one), map(plain, other), strict=True):
        if x.shape != y.shape or np.isnan(x).any() or np.isnan(y).any():
            return math.inf, math.inf
        live = np.isfinite(x) & np.isfinite(y) & (y > LOST)
        off = (x - y)[live]
        low, high = low + float(off.min(initial=math.inf)), high + float(off.max(initial=-math.inf))
        size += float(np.abs(y[live]).max(initial=0.0))
    gap = max(high, -low) if low <= high else 0.0
    return gap, gap / max(size, 1e-300)
