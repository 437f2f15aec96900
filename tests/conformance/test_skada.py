"""skada's own tests over sbot; an interpreter that has skada and the file of its fixtures are named by two variables."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from . import skada as runner

PYTHON = os.environ.get("SBOT_SKADA_PYTHON", sys.executable)
CONFTEST = Path(os.environ.get("SBOT_SKADA_CONFTEST", "absent"))


@pytest.mark.timeout(3600)
def test_upstream():
    if not CONFTEST.is_file():
        pytest.skip("skada's fixtures are not here: name the conftest.py of its source in SBOT_SKADA_CONFTEST")
    if runner.place(PYTHON) is None:
        pytest.skip("skada is not installed: name an interpreter that has it in SBOT_SKADA_PYTHON")
    reports = {mode: runner.run(PYTHON, CONFTEST.resolve(), mode) for mode in ("sbot", "wrong")}
    assert runner.verdict(reports) == 0, reports["sbot"]["output"][-4000:]


def test_without_skada_the_script_says_so(monkeypatch, capsys):
    monkeypatch.delenv("SBOT_SKADA_CONFTEST", raising=False)
    monkeypatch.setattr("sys.argv", ["skada"])
    assert runner.main() == 0
    assert "skipped" in capsys.readouterr().out


@pytest.mark.parametrize(("failed", "solves", "wrong", "bad"), [(0, 3, 1, 0), (1, 3, 1, 1), (0, 0, 1, 1), (0, 3, 0, 1)])
def test_the_verdict(failed, solves, wrong, bad):
    def report(failed):
        return {"outcomes": {"one": "passed", "two": "failed" if failed else "passed"}, "solves": solves}

    assert runner.verdict({"sbot": report(failed), "wrong": report(wrong)}) == bad
