"""Flow matching from eight Gaussians to two moons, a tutorial of TorchCFM: ``python docs/examples/flow_matching.py [library]``.

``library`` is "torchcfm" or "sbot"; nothing but the import depends on it.
"""

from __future__ import annotations

import math
import sys
import time

import numpy as np
import torch

LIBRARY = sys.argv[1] if len(sys.argv) > 1 else "sbot"
if LIBRARY == "torchcfm":
    from torchcfm.conditional_flow_matching import ExactOptimalTransportConditionalFlowMatcher
else:
    from sbot.compat.torchcfm import ExactOptimalTransportConditionalFlowMatcher


def sample_8gaussians(n: int) -> torch.Tensor:
    angle = 2 * math.pi * torch.randint(8, (n,)) / 8
    return 5 * torch.stack([angle.cos(), angle.sin()], 1) + math.sqrt(0.1) * torch.randn(n, 2)


def sample_moons(n: int) -> torch.Tensor:
    angle, upper = math.pi * torch.rand(n), torch.rand(n) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    return 3 * (torch.stack([x, y], 1) + 0.05 * torch.randn(n, 2)) - 1


def main() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    sigma, batch_size = 0.1, 256
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 64), torch.nn.SELU(), torch.nn.Linear(64, 64), torch.nn.SELU(), torch.nn.Linear(64, 2)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    matcher = ExactOptimalTransportConditionalFlowMatcher(sigma=sigma)
    steps, start = int(sys.argv[2]) if len(sys.argv) > 2 else 1500, time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        x0, x1 = sample_8gaussians(batch_size), sample_moons(batch_size)
        t, xt, ut = matcher.sample_location_and_conditional_flow(x0, x1)
        loss = (model(torch.cat([xt, t[:, None]], -1)) - ut).square().mean()
        loss.backward()
        optimizer.step()
    print(f"{LIBRARY}: loss {float(loss):.4f} after {steps} steps, {time.perf_counter() - start:.0f} s")
    draw(model)


@torch.no_grad()
def draw(model: torch.nn.Module) -> None:
    """Heun steps along the learned velocity, and a picture of the paths."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    steps, path = 100, [sample_8gaussians(1024)]
    for k in range(steps):
        x, h = path[-1], 1 / steps
        first = model(torch.cat([x, torch.full((len(x), 1), k * h)], -1))
        second = model(torch.cat([x + h * first, torch.full((len(x), 1), (k + 1) * h)], -1))
        path.append(x + h * (first + second) / 2)
    paths = torch.stack(path)
    fig, axes = plt.subplots(figsize=(5, 5))
    axes.plot(paths[:, :300, 0], paths[:, :300, 1], color="olive", alpha=0.2, lw=0.5)
    axes.scatter(*paths[0].T, s=4, color="black", label="eight Gaussians")
    axes.scatter(*paths[-1].T, s=4, color="tab:blue", label="two moons, generated")
    axes.set_title(f"flow matching with {LIBRARY}")
    axes.legend(loc="upper right", fontsize=8)
    axes.set_aspect("equal")
    fig.savefig(f"flow_matching_{LIBRARY}.png", dpi=80, bbox_inches="tight")


if __name__ == "__main__":
    main()
