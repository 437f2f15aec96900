"""The judge of the conformance run of GeomLoss finds the one that is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from sbot.compat.geomloss import ot
from tests.conformance.geomloss.geomloss_judge import bounds, judged


@pytest.mark.parametrize("unbalanced", [None, 0.5])
def test_the_wrong_one_is_found(unbalanced):
    draw = np.random.default_rng(0)
    C, a, b = draw.random((5, 7)), draw.random(5), draw.random(7)
    a, b = (2 * a / a.sum(), 2 * b / b.sum()) if unbalanced is None else (a, b)
    solution = ot.solve(C, a=a, b=b, reg=0.1, unbalanced=unbalanced, tol=1e-13)
    right = dict(
        zip(
            ("f", "g", "value", "plan"),
            (solution.potential_a, solution.potential_b, solution.value, solution.plan),
            strict=True,
        )
    )
    lower, upper, _ = bounds(C, a, b, 0.1, unbalanced, right["f"], right["g"])
    assert upper - lower < 1e-10
    assert lower - 1e-10 <= right["value"] <= upper + 1e-10
    plan = np.outer(right["plan"].sum(1), right["plan"].sum(0)) / right["plan"].sum()
    wrong = {**right, "plan": plan, "value": (plan * C).sum()}
    ask = (C, a, b, 0.1, unbalanced)
    assert judged(right, right, *ask)[0] == "agree"
    assert judged(right, wrong, *ask)[0] == "theirs is off"
    assert judged(wrong, right, *ask)[0] == "differ"
    assert judged({**right, "value": right["value"] + 1e-6}, right, *ask)[0] == "differ"
    assert judged({**right, "plan": plan}, right, *ask)[0] == "differ"


def test_where_a_large_rho_amplifies_what_a_tolerance_leaves_the_bounds_say_who_is_further_off():
    draw = np.random.default_rng(0)
    C, a, b = draw.random((5, 7)), draw.random(5), draw.random(7)
    ask = (C, a, b, 0.01, 100.0)
    names = ("potential_a", "potential_b", "value", "plan")
    rough, fine = (ot.solve(C, a=a, b=b, reg=0.01, unbalanced=100.0, tol=tol) for tol in (1e-10, 1e-12))
    rough, fine = (dict(zip("fgvp", (getattr(r, name) for name in names), strict=True)) for r in (rough, fine))
    rough, fine = ({"f": r["f"], "g": r["g"], "value": r["v"], "plan": r["p"]} for r in (rough, fine))
    far = {**fine, "plan": fine["plan"] * (1 + 1e-3 * draw.random((5, 7)))}
    assert judged(rough, far, *ask)[0] == "theirs is off"
    assert judged(far, rough, *ask)[0] == "differ"
