"""Run a tutorial notebook of TorchCFM as it is and with its import changed, and keep its last picture of each run.

    python -m tests.conformance.torchcfm.tutorial PATH/TO/Flow_matching_tutorial.ipynb --out FOLDER

The change is ``sbot.compat.torchcfm`` for ``torchcfm`` where the sampler and the matchers come from; models and pictures stay
TorchCFM's, which must be installed with torchdyn (or lie in folders on PYTHONPATH).  Generators are seeded alike before both
runs.  Nothing is fetched.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import ot
import torch

mpl.use("Agg")
BEFORE, AFTER = "from torchcfm.", "from sbot.compat.torchcfm."
MODULES = ("conditional_flow_matching", "optimal_transport")


def code(notebook: Path, cells: list[int] | None) -> str:
    """The code cells, or those at some places, without what belongs to the notebook's shell."""
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    kept = [
        "".join(cell["source"])
        for k, cell in enumerate(found)
        if cell["cell_type"] == "code" and (cells is None or k in cells)
    ]
    lines = "\n".join(kept).splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


def changed(source: str) -> str:
    """With sbot's sampler and matchers."""
    out = source
    for name in MODULES:
        out = out.replace(BEFORE + name, AFTER + name)
    assert out != source, "the notebook imports nothing that is replaced"
    return out


class Clock:
    """Calls of a sampler's method and the time they take."""

    def __init__(self, sampler: type) -> None:
        self.calls: Counter[str] = Counter()
        self.seconds = 0.0
        self.sampler, self.inner = sampler, sampler.sample_plan

    def __enter__(self) -> Clock:
        def timed(this: Any, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return self.inner(this, *args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start
                self.calls[this.method if hasattr(this, "method") else "plan"] += 1

        self.sampler.sample_plan = timed
        return self

    def __exit__(self, *_: object) -> None:
        self.sampler.sample_plan = self.inner


def run(source: str, library: str, picture: Path) -> dict[str, Any]:
    """Times, calls, and how far what the flow made is from its target."""
    from matplotlib import pyplot as plt

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (what pairs are drawn from)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "__main__"}
    module = importlib.import_module(f"{library}.optimal_transport")
    here, start = Path.cwd(), time.perf_counter()
    with Clock(module.OTPlanSampler) as clock, tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            exec(compile(source, "tutorial", "exec"), names)
        finally:
            os.chdir(here)
    seconds = time.perf_counter() - start
    plt.figure(plt.get_fignums()[-1]).savefig(picture, dpi=60, bbox_inches="tight")
    plt.close("all")
    report = {"seconds": seconds, "in the sampler": clock.seconds, "plans": dict(clock.calls)}
    if "traj" in names and "sample_moons" in names:
        made, draw = names["traj"][-1].cpu(), names["sample_moons"]
        report["W2 to the target"] = distance(made, draw(len(made)))
        report["W2 of two samples of the target"] = distance(draw(len(made)), draw(len(made)))
    return report


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """W2 between two samples."""
    value = ot.emd2([], [], ot.dist(x.double().numpy(), y.double().numpy()), numItermax=10**6)
    return float(value) ** 0.5


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--cells", type=int, nargs="*", help="places of the code cells to run; all unless given")
    parser.add_argument("--steps", type=int, help="of training, in place of the notebook's range(20000)")
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--only", choices=("before", "after"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("default")
    original = code(options.notebook, options.cells)
    if options.steps:
        assert "range(20000)" in original, "the notebook trains for another number of steps"
        original = original.replace("range(20000)", f"range({options.steps})")
    for label, library in (("before", "torchcfm"), ("after", "sbot.compat.torchcfm")):
        if options.only in (None, label):
            text = original if label == "before" else changed(original)
            said = run(text, library, (options.out / f"flow-matching-{label}.png").resolve())
            print(label, json.dumps(said, indent=1), flush=True)
