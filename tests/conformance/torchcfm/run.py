"""One run of TorchCFM's tests in a process of its own, and what it means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..harness import report_of

FILES = ("test_optimal_transport.py", "test_conditional_flow_matcher.py", "test_time_t.py")


def run(tests: Path, mode: str, path: Path | None = None, files: tuple[str, ...] = FILES) -> dict[str, Any]:
    """What `swap.Plugin` wrote, and the output."""
    return report_of(tests, files, mode, ("tests.conformance.torchcfm.swap",), paths=(path,) if path else ())


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
