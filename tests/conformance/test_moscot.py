"""The backend of moscot against moscot's own, on an AnnData; skipped where moscot is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("SBOT_MOSCOT_PYTHON", sys.executable)
PROGRAM = """
import warnings
warnings.simplefilter("ignore")
import anndata, numpy as np
from moscot.problems.generic import SinkhornProblem
from sbot.compat.moscot import register
from sbot.solvers import Sinkhorn

register()
register()
calls, solve = [], Sinkhorn.solve
Sinkhorn.solve = lambda *args, **options: (calls.append(1), solve(*args, **options))[1]
draw = np.random.default_rng(0)
x = np.vstack([draw.normal(size=(30, 3)), draw.normal(size=(40, 3)) + 1])
data = anndata.AnnData(x, obs={"t": np.repeat([0, 1], [30, 40])}, obsm={"X_pca": x})
data.obs["t"] = data.obs["t"].astype("category")
cases = [{"epsilon": 0.1}, {"epsilon": 0.05, "tau_a": 0.95, "tau_b": 0.9}, {"epsilon": 0.1, "tau_a": 0.9}]
cases += [{"epsilon": 0.1, "scale_cost": scale} for scale in (1.0, "max_cost", "median")]
for case in cases:
    ours, theirs = (
        SinkhornProblem(data)
        .prepare(key="t", joint_attr="X_pca")
        .solve(backend=name, threshold=1e-8, max_iterations=50_000, **case)[0, 1]
        .solution
        for name in ("sbot", "ott")
    )
    plan, other = (np.asarray(one.transport_matrix, dtype=float) for one in (ours, theirs))
    assert ours.converged and theirs.converged, case
    assert np.abs(plan - other).max() <= 1e-5 * other.max(), case
    assert abs(ours.cost - theirs.cost) <= 1e-6 * abs(theirs.cost), (case, ours.cost, theirs.cost)
assert len(calls) == len(cases), calls
print("done", len(calls))
"""


def test_an_anndata_with_either_backend():
    look = "import importlib.util as u, sys; sys.exit(u.find_spec('moscot') is None)"
    absent = subprocess.run([PYTHON, "-c", look], capture_output=True).returncode != 0
    if absent:
        pytest.skip("moscot is not installed: name an interpreter that has it in SBOT_MOSCOT_PYTHON")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_ENABLE_X64": "1"}
    done = subprocess.run([PYTHON, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "done 6" in done.stdout
