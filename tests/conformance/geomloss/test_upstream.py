"""GeomLoss's own tests, from its public source, with sbot's functions in the place of its own.

``SBOT_GEOMLOSS_SOURCE`` names a checkout of github.com/jeanfeydy/geomloss; nothing is fetched.  The counts are in
docs/compat/geomloss.md.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SOURCE = os.environ.get("SBOT_GEOMLOSS_SOURCE", "")
MISSING = [name for name in ("geomloss", "pytest_check", "hypothesis") if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.skipif(
        not (Path(SOURCE) / "tests" / "test_ot_solve_matrix.py").is_file(),
        reason="SBOT_GEOMLOSS_SOURCE does not name a checkout of GeomLoss with its tests",
    ),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.timeout(3600),
]


def run(mode: str, folder: Path) -> tuple[int, dict, str]:
    """Exit status of the tests, the calls that reached what was put in place and what was found, and the output."""
    log = folder / f"{mode}.json"
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    plugins = ("-p", "no:cacheprovider", "-p", "geomloss_swap")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=line", *plugins, "-c", os.devnull, "--rootdir", SOURCE, "tests"],
        cwd=SOURCE,
        env={**os.environ, "PYTHONPATH": path, "SBOT_SWAP": mode, "SBOT_SWAP_LOG": str(log), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    return done.returncode, json.loads(log.read_text(encoding="utf-8")), done.stdout[-4000:]


@pytest.mark.parametrize("mode", ["ours", "both"])
def test_their_tests_pass(tmp_path, mode):
    """With "both" each problem is solved by GeomLoss too: where they differ ours is right, by bounds that need no solver."""
    status, found, output = run(mode, tmp_path)
    assert status == 0, output
    assert set(found["calls"]) == {"solve", "solve_batch", "solve_sample"}
    assert min(found["calls"].values()) >= 100, found["calls"]
    assert "differ" not in found["verdicts"], [one for one in found["differences"] if one["verdict"] == "differ"][:10]


def test_an_impostor_is_found_out(tmp_path):
    status, found, output = run("impostor", tmp_path)
    assert status == 1, output
    assert sum(found["calls"].values()) >= 8, found["calls"]
