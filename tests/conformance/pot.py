"""Run POT's own tests with its entropic functions swapped for sbot's: ``python -m tests.conformance.pot --tests DIR``.

DIR is POT's ``test`` folder, from its public source.  Nothing is fetched.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .harness import report_of

FILES = (
    "test_bregman.py",
    "unbalanced/test_sinkhorn.py",
    "test_da.py",
    "test_solvers.py",
    "test_partial.py",
    "batch/test_solve_batch.py",
)
#: Tests of POT that pin one of its defects, or that what is solved here cannot be.
PINNED = ("test_empirical_sinkhorn_divergence[", "test_solve_sample_NotImplemented[")
AGREED = ("agree", "agree where POT is run to the end", "not compared: not float64")


@dataclass(frozen=True)
class Defect:
    """A deviation that is POT's: the verdict on it, of which functions, with which options, up to which gap, and why."""

    verdict: str
    why: str
    name: str = ""
    options: tuple[str, ...] = ()
    most: float = math.inf

    def explains(self, found: dict[str, Any]) -> bool:
        """Whether a deviation is this one."""
        options = " ".join(f"{key}={value}" for key, value in found["options"].items())
        fits = found["verdict"] == self.verdict and self.name in found["name"]
        gap = found["gap"] if found["gap"] is not None else math.nan
        return fits and all(part in options for part in self.options) and not gap > self.most


#: Every deviation beyond 1e-8 is one of these, or fails.
DEFECTS = (
    Defect(
        "POT stops short of the solution",
        "after 5000 iterations its plan still breaks the conditions of the problem, that of sbot meets them; it warns",
    ),
    Defect("POT stops short of the solution, and does not say so", "the same without a warning"),
    Defect(
        "POT does not converge in 5000 iterations",
        "it warns, and returns no plan that could be held against the conditions",
    ),
    Defect(
        "POT failed numerically", "its kernel underflows, or its absorption does: it warns and returns an older iterate"
    ),
    Defect(
        "POT raised",
        "a lazy unbalanced problem, which POT does not solve",
        "solve_sample",
        ("lazy=True", "unbalanced="),
    ),
    Defect("differ", "not covered: POT's own, drawn at random on each call", "solve_sample", ("nystroem",)),
    Defect("differ", "not covered: POT's own, drawn at random on each call", "solve_sample", ("factored",)),
    Defect("POT's value is below that of exact transport", "its plan has lost its mass, at a reg of 1e-9 of the costs"),
    Defect(
        "differ",
        "several targets and an infinite first reg_m: the translation-invariant method divides by the number of targets",
        "unbalanced.sinkhorn_unbalanced",
        ("translation_invariant", "reg_m=", "inf"),
    ),
    Defect(
        "differ",
        "a tensor as reg_m: the translation-invariant method rounds its factors to float32",
        "unbalanced.sinkhorn_unbalanced",
        ("translation_invariant",),
        1e-7,
    ),
)


def unexplained(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The deviations that no known defect explains."""
    return [found for found in report["differences"] if not any(defect.explains(found) for defect in DEFECTS)]


def run(tests: Path, mode: str, files: tuple[str, ...] = FILES, select: str = "") -> dict[str, Any]:
    """One run of pytest in a process of its own; what `pot_swap.Plugin` wrote."""
    variables = {f"POT_BACKEND_DISABLE_{name}": "1" for name in ("JAX", "TENSORFLOW", "CUPY")}
    arguments = ("-k", select) if select else ()
    return report_of(tests, files, mode, ("tests.conformance.pot_swap",), arguments=arguments, variables=variables)


def summary(report: dict[str, Any]) -> str:
    outcomes = list(report["outcomes"].values())
    counts = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in ("passed", "failed", "skipped"))
    lines = [f"{report['mode']}: {counts}; {sum(report['calls'].values())} calls, {report['solves']} solves by sbot"]
    lines += [f"  {count:6d} {verdict}" for verdict, count in sorted(report["verdicts"].items())]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tests", type=Path, default=os.environ.get("SBOT_POT_TESTS"), help="POT's test folder")
    parser.add_argument("--modes", default="pot,sbot,differential,wrong")
    parser.add_argument("--select", default="", help="as pytest -k")
    parser.add_argument("--files", default=",".join(FILES))
    parser.add_argument("--out", type=Path, help="a folder for the reports, as JSON")
    asked = parser.parse_args()
    if not asked.tests or not Path(asked.tests).is_dir():
        print("skipped: POT's tests are not here; give --tests or SBOT_POT_TESTS, the folder test/ of POT's source")
        return 0
    reports = {}
    for mode in asked.modes.split(","):
        reports[mode] = run(Path(asked.tests).resolve(), mode, tuple(asked.files.split(",")), asked.select)
        print(summary(reports[mode]), flush=True)
        if asked.out:
            asked.out.mkdir(parents=True, exist_ok=True)
            (asked.out / f"{mode}.json").write_text(json.dumps(reports[mode], indent=1))
    return verdict(reports)


def verdict(reports: dict[str, dict[str, Any]]) -> int:
    """0 where sbot passes what POT passes, agrees with it, and the wrong drop-in does not."""
    bad = 0
    if "sbot" in reports:
        theirs = reports.get("pot", {}).get("outcomes", {})
        for test, outcome in reports["sbot"]["outcomes"].items():
            if outcome == "failed" and theirs.get(test, "passed") == "passed":
                pinned = any(name in test for name in PINNED)
                print(f"fails with sbot only: {test}{' (pins a defect of POT)' if pinned else ''}")
                bad += not pinned
        if not reports["sbot"]["solves"]:
            print("nothing reached sbot: the swap did nothing")
            bad += 1
    if "differential" in reports:
        for found in unexplained(reports["differential"]):
            print(f"{found['verdict']}, {found['gap']:.1e}: {found['name']} {found['options']} in {found['test']}")
            print(f"  {found['detail']}" if found["detail"] else "", end="\n" if found["detail"] else "")
            bad += 1
    if "wrong" in reports and not unexplained(reports["wrong"]):
        print("the independent coupling was not noticed")
        bad += 1
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
