"""Run a script of GeomLoss's gallery twice, as it is and with one import changed, and keep its pictures.

    python tests/conformance/geomloss/gallery.py PATH/TO/plot_gradient_flows_2D.py --out FOLDER

The change is ``from geomloss import`` to ``from sbot.compat.geomloss import``; generators are seeded alike before both runs.
"""

from __future__ import annotations

import argparse
import os
import random
import time
import warnings
from collections import Counter
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch

mpl.use("Agg")
BEFORE, AFTER = "from geomloss import", "from sbot.compat.geomloss import"


def run(script: Path, after: bool, out: Path) -> tuple[float, Counter]:
    from matplotlib import pyplot as plt

    from sbot.compat.geomloss import SamplesLoss

    source = script.read_text(encoding="utf-8")
    assert source.count(BEFORE) == 1, f"{script.name} imports from geomloss {source.count(BEFORE)} times"
    source = source.replace(BEFORE, AFTER) if after else source
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (what the scripts draw from)
    torch.manual_seed(0)
    calls: Counter = Counter()
    forward = SamplesLoss.forward
    SamplesLoss.forward = lambda self, *args: (calls.update([self.loss]), forward(self, *args))[1]
    start, here = time.perf_counter(), Path.cwd()
    os.chdir(script.parent)
    try:
        exec(compile(source, str(script), "exec"), {"__name__": "__main__"})
    finally:
        os.chdir(here)
        SamplesLoss.forward = forward
    seconds = time.perf_counter() - start
    for k in plt.get_fignums():
        plt.figure(k).savefig(out / f"{script.stem}_{k}_{'after' if after else 'before'}.png", dpi=50)
    plt.close("all")
    return seconds, calls


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("script", type=Path)
    parser.add_argument("--out", type=Path, default=Path())
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("default")
    for after in (False, True):
        seconds, calls = run(options.script.resolve(), after, options.out.resolve())
        print("after " if after else "before", f"{seconds:.1f} s", dict(calls), flush=True)
