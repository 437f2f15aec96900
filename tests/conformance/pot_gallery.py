"""Run a script of POT's gallery twice, as it is and with one import changed, and keep its pictures and what differs.

    python -m tests.conformance.pot_gallery PATH/TO/plot_otda_color_images.py --out FOLDER --figure 3 --name colour-transfer

The change is ``import ot`` to ``import sbot.compat.pot as ot``.  The script is POT's and stays where it is.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
BEFORE, AFTER = "\nimport ot\n", "\nimport sbot.compat.pot as ot\n"


def run(script: Path, after: bool) -> tuple[dict[str, Any], float, Counter[str]]:
    """What the script leaves in its variables, its seconds of processor time, and the solves that reached sbot."""
    from sbot.solvers import Sinkhorn

    source = script.read_text(encoding="utf-8")
    assert source.count(BEFORE) == 1, f"{script.name} imports ot {source.count(BEFORE)} times"
    source = source.replace(BEFORE, AFTER) if after else source
    reached: Counter[str] = Counter()
    solved = Sinkhorn.solved

    def counted(solver: Any, *args: Any, **kwargs: Any) -> Any:
        reached["solves by sbot"] += 1
        return solved(solver, *args, **kwargs)

    Sinkhorn.solved = counted  # type: ignore[method-assign]
    names: dict[str, Any] = {"__name__": "__main__", "__file__": str(script)}
    start, here = time.process_time(), Path.cwd()
    os.chdir(script.parent)
    try:
        exec(compile(source, str(script), "exec"), names)
    finally:
        os.chdir(here)
        Sinkhorn.solved = solved  # type: ignore[method-assign]
    return names, time.process_time() - start, reached


def main() -> None:
    from matplotlib import pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("script", type=Path)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--figure", type=int, help="only this one; else all")
    parser.add_argument("--name", help="of the pictures; else that of the script")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("default")
    both = []
    for after in (False, True):
        names, seconds, reached = run(asked.script.resolve(), after)
        both.append(names)
        when = "after" if after else "before"
        for k in plt.get_fignums():
            if asked.figure in (None, k):
                last = "" if asked.figure else f"-{k}"
                file = asked.out / f"{asked.name or asked.script.stem}{last}-{when}.png"
                plt.figure(k).savefig(file, dpi=70)
        plt.close("all")
        print(f"{when}: {seconds:.2f} s", dict(reached), flush=True)
    for name, value in both[0].items():
        other = both[1].get(name)
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and np.shape(other) == value.shape and value.size:
            print(f"{name} {value.shape}: differs by {np.abs(value - other).max():.1e} of {np.abs(value).max():.3g}")


if __name__ == "__main__":
    main()
