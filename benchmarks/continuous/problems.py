"""Problems with known answers, or with known difficulty: Gaussians, mixtures with a known plan, toys, cells, digits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn import datasets
from torch import Tensor

import sbot

# ---- Gaussians -----------------------------------------------------------------------------------------------------------


def gaussian_pair(d: int) -> tuple[sbot.Gaussian, sbot.Gaussian]:
    """``N(-0.1, I)`` and ``N(0.1, I)``, float64."""
    eye = torch.eye(d, dtype=torch.float64)
    return tuple(sbot.Gaussian(torch.full((d,), m, dtype=torch.float64), eye) for m in (-0.1, 0.1))  # type: ignore


# ---- mixtures with a known plan ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MixturePair:
    """mu = N(0, I) and the nu that a potential ``sum_k N(y; r_k, s I) / K`` makes of it: every conditional is known.

    The construction of Gushchin et al. (2023): ``pi(y | x)`` is the potential times ``N(y; x, eps I)``, normalised.  The
    centres ``r_k`` are drawn uniformly on a sphere; ``s = 0.01`` brings the scores of the exact drift near to the
    published ones, with which these pairs share no numbers: the published parameters are not in the repository.
    """

    d: int
    eps: float
    seed: int = 0
    spread: float = 0.01
    radius: float = 5.0
    components: int = 5

    @property
    def centres(self) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.d + self.seed)
        r = torch.randn(self.components, self.d, generator=generator, dtype=torch.float64)
        return self.radius * r / r.norm(dim=1, keepdim=True)

    @property
    def variance(self) -> float:
        """Of each component of ``pi(. | x)``."""
        return 1 / (1 / self.eps + 1 / self.spread)

    def start(self, n: int, generator: torch.Generator | None) -> Tensor:
        return torch.randn(n, self.d, generator=generator)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Shares ``(n, K)`` and means ``(n, K, d)`` of the components of ``pi(. | x)``."""
        r = self.centres.to(x)
        share = self._logits(x, r, self.spread + self.eps).softmax(-1)
        return share, self.variance * (x[:, None] / self.eps + r / self.spread)

    @staticmethod
    def _logits(x: Tensor, r: Tensor, variance: float) -> Tensor:
        return (x @ r.T - r.square().sum(1) / 2) / variance

    def draw(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """One ``X_1`` for each ``X_0 = x``."""
        share = self._logits(x, self.centres.to(x), self.spread + self.eps).softmax(-1)
        pick = torch.multinomial(share, 1, generator=generator)[:, 0]
        mean = self.variance * (x / self.eps + self.centres.to(x)[pick] / self.spread)
        return mean + math.sqrt(self.variance) * torch.randn(x.shape, generator=generator, dtype=x.dtype)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draws of nu."""
        return self.draw(self.start(n, generator), generator)

    def conditional(self, x: Tensor) -> sbot.Gaussian:
        """Mean and covariance of ``pi(. | x_i)``, exactly."""
        share, means = self.parts(x.double())
        mean = (share[..., None] * means).sum(1)
        apart = means - mean[:, None]
        cov = (share[..., None] * apart).mT @ apart + self.variance * torch.eye(self.d, dtype=torch.float64)
        return sbot.Gaussian(mean, cov)

    def end(self, generator: torch.Generator, n: int = 20_000) -> sbot.Gaussian:
        """Mean and covariance of nu, from the exact conditionals of ``n`` starts."""
        share, means = self.parts(self.start(n, generator).double())
        mean = (share[..., None] * means).sum(1).mean(0)
        apart = (means - mean) * (share[..., None] / n).sqrt()
        flat = apart.reshape(-1, self.d)
        return sbot.Gaussian(mean, flat.T @ flat + self.variance * torch.eye(self.d, dtype=torch.float64))

    def drift(self, t: float, x: Tensor) -> Tensor:
        """``eps grad log sum_k N(x; r_k, (s + eps (1 - t)) I)``, the drift of the bridge."""
        r, variance = self.centres.to(x), self.spread + self.eps * (1 - t)
        return self.eps / variance * (self._logits(x, r, variance).softmax(-1) @ r - x)


# ---- toys ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Toy:
    """A law in the plane: independent draws, and the even sets of points that the runner of TorchCFM scores against."""

    draw: Callable[[int, torch.Generator | None], Tensor]
    even: Callable[[int, int], Tensor]

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        return self.draw(n, generator)


def _normal() -> Toy:
    return Toy(
        lambda n, generator: torch.randn(n, 2, generator=generator),
        lambda n, seed: torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)),
    )


def _eight(radius: float, std: float) -> Toy:
    def place(pick: Tensor, noise: Tensor) -> Tensor:
        angle = pick * (math.pi / 4)
        return radius * torch.stack([angle.cos(), angle.sin()], 1) + std * noise

    def draw(n: int, generator: torch.Generator | None) -> Tensor:
        return place(torch.randint(8, (n,), generator=generator), torch.randn(n, 2, generator=generator))

    def even(n: int, seed: int) -> Tensor:
        noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
        return place(torch.arange(n) % 8, noise)

    return Toy(draw, even)


def _moons(noise: float, shift: tuple[float, float], scale: float) -> Toy:
    def adjust(x: Tensor) -> Tensor:
        return (x - torch.tensor(shift)) * scale

    def draw(n: int, generator: torch.Generator | None) -> Tensor:
        angle, inner = math.pi * torch.rand(n, generator=generator), torch.rand(n, generator=generator) < 0.5
        outer = torch.stack([angle.cos(), angle.sin()], 1)
        x = torch.where(inner[:, None], torch.tensor([1.0, 0.5]) - outer, outer)
        return adjust(x + noise * torch.randn(n, 2, generator=generator))

    def even(n: int, seed: int) -> Tensor:
        return adjust(torch.from_numpy(datasets.make_moons(n, noise=noise, random_state=seed)[0]).float())

    return Toy(draw, even)


def _scurve() -> Toy:
    def draw(n: int, generator: torch.Generator | None) -> Tensor:
        angle = 3 * math.pi * (torch.rand(n, generator=generator) - 0.5)
        x = torch.stack([angle.sin(), angle.sign() * (angle.cos() - 1)], 1)
        return 1.5 * (x + 0.05 * torch.randn(n, 2, generator=generator))

    def even(n: int, seed: int) -> Tensor:
        x = datasets.make_s_curve(n, noise=0.05, random_state=seed)[0]
        return 1.5 * torch.from_numpy(x[:, [0, 2]]).float()

    return Toy(draw, even)


def _standard_moons() -> Toy:
    """Moons of noise 0.1, both coordinates less their common mean 0.375 and divided by their common deviation, times 7.

    Squares: of x (1/2 + 3/2) / 2 = 1, of y (1/2 + 3/4 - 2/pi) / 2, and the noise.
    """
    squares = (1 + (1.25 - 2 / math.pi) / 2) / 2 + 0.01
    return _moons(0.1, (0.375, 0.375), 7 / math.sqrt(squares - 0.375**2))


#: The settings of TorchCFM's runner: its data modules "gaussians", "moons" and "scurve", and "twodim" for the last pair.
TOYS: dict[str, tuple[Toy, Toy]] = {
    "normal-8gaussians": (_normal(), _eight(5.0, 1.0)),
    "normal-moons": (_normal(), _moons(0.05, (0.5, 0.0), 2.0)),
    "normal-scurve": (_normal(), _scurve()),
    "moons-8gaussians": (_standard_moons(), _eight(12.0, 1.5)),
}

# ---- cells ---------------------------------------------------------------------------------------------------------------


def load_cells(folder: Path) -> dict[int, Tensor]:
    """Days 2, 3 and 4, each ``(n, 50)``."""
    files = {day: folder / f"full_cite_pcas_50_day_{day}.npy" for day in (2, 3, 4)}
    return {day: torch.from_numpy(np.load(file)).float() for day, file in files.items()}


def cell_scale(days: dict[int, Tensor]) -> float:
    """The mean over coordinates of the standard deviation of all days together."""
    return float(torch.cat(list(days.values())).double().std(0, unbiased=False).mean())


# ---- digits --------------------------------------------------------------------------------------------------------------


def digits(label: int | None = None) -> Tensor:
    """Handwritten digits of scikit-learn, ``(n, 1, 8, 8)`` in [-1, 1]."""
    data = datasets.load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    return images if label is None else images[torch.from_numpy(data.target) == label]


def image_sampler(images: Tensor) -> sbot.Sampler:
    """Draws with replacement from a stack of images."""

    def draw(n: int, generator: torch.Generator | None) -> Tensor:
        return images[torch.randint(len(images), (n,), generator=generator)]

    return sbot.Sampler(draw, tuple(images.shape[1:]), like=images)
