"""One run of TorchCFM's tests in a process of its own, and what it means."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
FILES = ("test_optimal_transport.py", "test_conditional_flow_matcher.py", "test_time_t.py")


def run(tests: Path, mode: str, path: Path | None = None, files: tuple[str, ...] = FILES) -> dict[str, Any]:
    """What `swap.Plugin` wrote, and the output."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *([str(path)] if path else [])]),
            "SBOT_CONFORMANCE_MODE": mode,
            "SBOT_CONFORMANCE_OUT": str(out),
        }
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "tests.conformance.torchcfm.swap"]
        command += ["-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tests)]
        done = subprocess.run(
            [*command, *(str(tests / file) for file in files)],
            env=environment,
            cwd=tests,
            capture_output=True,
            text=True,
        )
        if not out.exists():
            raise RuntimeError(f"the tests did not run:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
        report: dict[str, Any] = json.loads(out.read_text())
        report["output"] = done.stdout
        return report


def summary(report: dict[str, Any]) -> str:
    """Counts of outcomes, of calls, and of what differed."""
    outcomes = list(report["outcomes"].values())
    told = [f"{outcomes.count(kind)} {kind}" for kind in ("passed", "failed", "skipped")]
    told += [f"{name}: {count}" for name, count in sorted(report["counts"].items())]
    return ", ".join([*told, f"different: {len(report['differences'])}"])


def judge(mode: str, report: dict[str, Any]) -> bool:
    """Whether a run is as it should be: all tests pass and sbot was reached, or for a wrong coupling neither."""
    failed = [name for name, outcome in report["outcomes"].items() if outcome == "failed"]
    reached = report["counts"].get("plan exact", 0) > 0 and report["counts"].get("Sinkhorn.solve", 0) > 0
    if mode == "torchcfm":
        return not failed and not reached
    if mode == "wrong":
        return bool(failed) and bool(report["differences"]) and not report["counts"].get("as theirs")
    return not failed and reached and not report["differences"]
