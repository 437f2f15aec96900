"""One run of a library's tests in a process of its own, under a plugin that swaps sbot in and writes what happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def report_of(
    folder: Path,
    files: Sequence[str],
    mode: str,
    plugins: Sequence[str],
    *,
    python: str = sys.executable,
    paths: Sequence[Path] = (),
    arguments: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
    inside: bool = True,
) -> dict[str, Any]:
    """The report of the last of ``plugins``, and the output of pytest; ``inside`` says whether it runs in ``folder``."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "report.json"
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(path) for path in (ROOT, *paths)),
            "SBOT_CONFORMANCE_MODE": mode,
            "SBOT_CONFORMANCE_OUT": str(out),
            **(variables or {}),
        }
        command = [python, "-m", "pytest", "-q", "--tb=short", *(part for name in plugins for part in ("-p", name))]
        command += ["-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(folder), *arguments]
        done = subprocess.run(
            [*command, *(str(folder / file) for file in files)],
            env=environment,
            cwd=folder if inside else place,
            capture_output=True,
            text=True,
        )
        if not out.exists():
            raise RuntimeError(f"the tests did not run:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
        report: dict[str, Any] = json.loads(out.read_text())
        report["output"] = done.stdout
        return report
