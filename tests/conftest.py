"""Shared fixtures: one thread, seeded generators, every device that is here."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return request.param


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def clouds(n: int, m: int, d: int, generator: torch.Generator, batch: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Two point clouds that overlap in part, float64."""
    x = torch.randn(*batch, n, d, generator=generator, dtype=torch.float64)
    y = 0.7 * torch.randn(*batch, m, d, generator=generator, dtype=torch.float64) + 1
    return x, y


def weights(*shape: int, generator: torch.Generator) -> Tensor:
    w = torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.1
    return w / w.sum(-1, keepdim=True)


def spd(d: int, generator: torch.Generator, low: float = 0.1) -> Tensor:
    """A random covariance matrix."""
    a = torch.randn(d, d, generator=generator, dtype=torch.float64) / math.sqrt(d)
    return a @ a.T + low * torch.eye(d, dtype=torch.float64)


def half_squares(x: Tensor, y: Tensor) -> Tensor:
    """``|x - y|^2 / 2`` by the definition."""
    return (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1) / 2


def kl(p: Tensor, q: Tensor) -> Tensor:
    """``sum p log(p / q) - p + q``."""
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q) - p + q).sum()
