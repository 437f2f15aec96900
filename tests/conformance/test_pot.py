"""The swap of POT's functions: it reaches every binding, it is counted, and a wrong drop-in is noticed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import ot
import pytest

from tests.conformance import pot as runner
from tests.conformance.pot_swap import MODES, Swap, difference

TESTS = os.environ.get("SBOT_POT_TESTS", "")


def calls() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.random((8, 2)), rng.random((9, 2))
    M = ot.dist(x, y)
    ot.sinkhorn([], [], M, 0.1)
    ot.bregman.sinkhorn_log([], [], M, 0.1, log=True)
    ot.da.SinkhornTransport(reg_e=0.5).fit(Xs=x, Xt=y)
    ot.solve(M, reg=0.1)
    ot.solvers.solve(M, reg=0.5, unbalanced=1.0)
    ot.batch.solve_batch(M[None], reg=0.1)


def test_it_reaches_every_binding_and_is_undone():
    before = ot.sinkhorn, ot.da.sinkhorn, ot.gromov._bregman.sinkhorn, ot.da.SinkhornTransport
    with Swap("sbot") as swap:
        for was, now in zip(before, (ot.sinkhorn, ot.da.sinkhorn, ot.gromov._bregman.sinkhorn), strict=False):
            assert now is not was
            assert now.__original__ is was
        calls()
        assert swap.calls["bregman.sinkhorn"] == 1
        assert swap.calls["da.SinkhornTransport"] == 1
        assert swap.calls["solvers.solve"] == 2
        assert swap.solves == 6
        # what is forwarded finds POT, and not its way back
        assert np.isfinite(ot.solve(np.eye(3)).value)
    assert before == (ot.sinkhorn, ot.da.sinkhorn, ot.gromov._bregman.sinkhorn, ot.da.SinkhornTransport)


def test_both_agree_and_the_independent_coupling_does_not():
    with Swap("differential") as swap:
        calls()
    assert not [found for found in swap.differences if found["verdict"] == "differ"], swap.differences
    with Swap("wrong") as swap:
        calls()
    assert swap.verdicts["differ"] >= 4


def test_differences_are_seen():
    assert difference(np.ones(3), np.ones(3)) == 0
    assert difference(np.ones(3), np.full(3, np.nan)) == float("inf")
    one, other = ({"log_u": np.full(2, c), "log_v": np.full(2, -c)} for c in (0.0, 1.0))
    assert difference((np.ones(2), one), (np.ones(2), other)) == 0


def test_without_the_tests_of_pot_the_script_says_so(monkeypatch, capsys):
    monkeypatch.delenv("SBOT_POT_TESTS", raising=False)
    monkeypatch.setattr("sys.argv", ["pot"])
    assert runner.main() == 0
    assert "skipped" in capsys.readouterr().out


@pytest.mark.skipif(not TESTS, reason="POT's tests are not here: set SBOT_POT_TESTS to the folder test/ of its source")
@pytest.mark.timeout(3600)
def test_tests_of_pot():
    reports = {mode: runner.run(Path(TESTS), mode) for mode in MODES}
    assert runner.verdict(reports) == 0
