"""How far a simulated end is from its marginal."""

from __future__ import annotations

import torch

from ..metrics import energy_distance
from ..problem import Problem
from ..sde import Chain, Control, walk
from .controls import draw

#: Samples compared; the statistical floor of the residual is about one over this.
SAMPLES = 2048


@torch.no_grad()
def marginal_residual(problem: Problem, chain: Chain, control: Control, way: int, seed: int, order: int = 1) -> float:
    """Energy distance between simulated and true ends, relative to ``E|Y - Y'| / 2`` of the truth; below 0 by chance.

    It draws from a generator of its own, so that looking does not change the training.
    """
    generator = torch.Generator(problem.device).manual_seed(seed)
    ends = ("mu", "nu") if way > 0 else ("nu", "mu")
    x, truth = (draw(problem, side, SAMPLES, generator) for side in ends)
    for *_, after in walk(chain, control, x, way, generator=generator, order=order):
        x = after
    distance = float(energy_distance(x, truth))
    spread = float(torch.pdist(truth[:512].double()).mean()) / 2
    return distance / spread if spread > 0 else distance / problem.one_eps**0.5
