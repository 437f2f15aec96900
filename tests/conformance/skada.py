"""Run skada's own tests with POT's entropic functions swapped for sbot's: ``python -m tests.conformance.skada --conftest FILE``.

The tests are in skada's wheel; their fixtures are in FILE, the ``conftest.py`` of its public source.  ``--python`` names an
interpreter that has skada, where this one has not.  Nothing is fetched.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from .harness import report_of
from .pot import summary

FILES = ("test_mapping.py", "test_ot.py", "test_label_prop.py", "test_pipeline.py", "test_gradual_da.py")
MODES = ("pot", "sbot", "wrong")


def place(python: str) -> Path | None:
    """The folder of skada's tests as this interpreter has it."""
    code = "import importlib.util as u; s = u.find_spec('skada'); print(s.submodule_search_locations[0] if s else '')"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    folder = Path(done.stdout.strip() or "absent") / "tests"
    return folder if folder.is_dir() else None


def run(python: str, conftest: Path, mode: str, files: tuple[str, ...] = FILES) -> dict[str, Any]:
    """One run of pytest in a process of its own; what `pot_swap.Plugin` wrote."""
    tests = place(python)
    assert tests is not None
    plugins = (conftest.stem, "tests.conformance.pot_swap")
    return report_of(tests, files, mode, plugins, python=python, paths=(conftest.parent,), inside=False)


def failures(report: dict[str, Any]) -> set[str]:
    return {name for name, outcome in report["outcomes"].items() if outcome == "failed"}


def verdict(reports: dict[str, dict[str, Any]]) -> int:
    """0 where all tests pass with sbot and reach it, and with the independent coupling they do not."""
    bad = 0
    if "sbot" in reports:
        bad += bool(failures(reports["sbot"])) + (not reports["sbot"]["solves"])
    if "wrong" in reports:
        bad += not failures(reports["wrong"])
    return int(bad > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--conftest", type=Path, default=os.environ.get("SBOT_SKADA_CONFTEST"))
    parser.add_argument("--python", default=os.environ.get("SBOT_SKADA_PYTHON", sys.executable))
    parser.add_argument("--modes", nargs="*", default=MODES, choices=(*MODES, "differential"))
    asked = parser.parse_args()
    if place(asked.python) is None or not asked.conftest or not Path(asked.conftest).is_file():
        print("skipped: give an interpreter that has skada (--python) and the conftest.py of its source (--conftest)")
        return 0
    reports = {}
    for mode in asked.modes:
        reports[mode] = run(asked.python, Path(asked.conftest).resolve(), mode)
        print(summary(reports[mode]), flush=True)
        for found in reports[mode]["differences"]:
            if found["verdict"] == "differ" and mode == "differential":
                print(f"  differs by {found['gap']:.1e}: {found['name']} {found['options']} in {found['test']}")
    return verdict(reports)


if __name__ == "__main__":
    sys.exit(main())
