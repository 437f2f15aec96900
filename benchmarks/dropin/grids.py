"""The jobs: each call on two clouds in the plane, from mild to small reg, sbot first."""

from __future__ import annotations

from ..speed.grids import Job
from .calls import CALLS

#: reg over the largest cost; at the last one kernels underflow.
RATIOS = (1e-1, 1e-2, 1e-3, 1e-4)
SIZES = {"POT": (500, 1000, 2000), "GeomLoss": (500, 1000, 2000), "TorchCFM": (256, 512, 1000)}
PART = "dropin"


def jobs(names: list[str], seed: int, quick: bool, sizes: tuple[int, ...] = ()) -> list[Job]:
    """What is to be run of the calls with these names."""
    out = []
    for name in names:
        call = CALLS[name]
        for dtype in call.dtypes[:1] if quick else call.dtypes:
            for n in (40,) if quick else sizes or SIZES[call.library]:
                base = {"part": PART, "kind": name, "cloud": "gaussians", "n": n, "d": 2, "dtype": dtype, "tol": 0.0}
                base |= {"seed": seed, **({"batch": call.batch} if call.batch else {})}
                for ratio in RATIOS[:1] if call.exact or quick else RATIOS:
                    out += [{**base, "ratio": ratio, "contender": who} for who in ("sbot", call.library)]
    return out
