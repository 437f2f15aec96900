"""The demonstration: handwritten zeros become sixes, in pixel space, along a Schrödinger bridge."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .api import solve_bridge
from .bridge import Bridge
from .errors import Unsupported

#: Which digit becomes which.
SOURCE, TARGET = 0, 6
#: Pixels lie in [0, 1]; half-way the noise in each has standard deviation sqrt(eps) / 2, about 0.07: digits stay legible.
EPS = 0.02
SIDE = 8
TIMES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)


def load(digit: int) -> Tensor:
    """All pictures of a digit among scikit-learn's handwritten ones, ``(n, 64)`` in float64, ink in [0, 1]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise Unsupported("the demo needs the digits of scikit-learn: pip install 'sbot[demo]'") from None
    bunch = load_digits()
    return torch.from_numpy(bunch.data[bunch.target == digit]).double() / 16


def run(out: Path, *, eps: float = EPS, seed: int = 0, progress: bool = False) -> Bridge:
    """Solve, print the report and the values, and write the bridge and its pictures into the folder ``out``."""
    from . import plot

    zeros, sixes = load(SOURCE), load(TARGET)
    out.mkdir(parents=True, exist_ok=True)
    print(f"{len(zeros)} pictures of {SOURCE} to {len(sixes)} of {TARGET}, {zeros.shape[1]} pixels, eps = {eps:g}")
    bridge = solve_bridge(zeros, sixes, eps, progress=progress or None)
    print(bridge.report)
    print(
        f"cost {float(bridge.cost()):.6f}   linear cost {float(bridge.linear_cost()):.6f}   gap {float(bridge.gap()):.1e}"
    )
    generator = torch.Generator().manual_seed(seed)
    paths = bridge.sample_paths(8, TIMES, generator=generator)
    title = f"Handwritten {SOURCE}s become {TARGET}s: 8 sample paths, eps = {eps:g} in units of the cost"
    pictures = {
        "digits.png": plot.digits(paths.reshape(8, len(TIMES), SIDE, SIDE), TIMES, title),
        "paths.png": plot.draw(bridge, "paths", n=30, generator=generator),
        "convergence.png": plot.draw(bridge, "convergence"),
    }
    bridge.save(out / "bridge.safetensors")
    for name, figure in pictures.items():
        plot.save(figure, out / name)
    for name in ("bridge.safetensors", *pictures):
        print(f"wrote {out / name}")
    return bridge
