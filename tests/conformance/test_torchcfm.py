"""TorchCFM's own tests over sbot; the folders of its tests and of the package are named by two variables."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from .torchcfm.run import FILES, judge, run, summary

TESTS = Path(os.environ.get("SBOT_TORCHCFM_TESTS", "absent"))
SITE = Path(os.environ["SBOT_TORCHCFM_PATH"]) if "SBOT_TORCHCFM_PATH" in os.environ else None


@pytest.fixture(scope="module", autouse=True)
def _there():
    if not (TESTS / FILES[0]).exists():
        pytest.skip("TorchCFM's tests are not here: name their folder in SBOT_TORCHCFM_TESTS")
    if SITE is None and importlib.util.find_spec("torchcfm") is None:
        pytest.skip(
            "TorchCFM is not installed: pip install --no-deps torchcfm, or name its folder in SBOT_TORCHCFM_PATH"
        )


@pytest.mark.parametrize("mode", ["sbot", "differential", "wrong"])
def test_upstream(mode):
    report = run(TESTS, mode, SITE)
    assert judge(mode, report), summary(report) + report["output"][-2000:]
