"""Bridges of drifts in files: what goes in comes out, and nothing else does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sbot

MU, NU = sbot.Gaussian(torch.zeros(2), torch.eye(2)), sbot.Gaussian(torch.ones(2), torch.eye(2))
SHORT = sbot.FitConfig(steps=3, batch=16)
X = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))


class Mine(nn.Module):
    """A network of the caller's."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t[:, None]], 1))


def same(a: sbot.Bridge, b: sbot.Bridge) -> None:
    for t in (0.2, 0.9):
        torch.testing.assert_close(a.drift(t, X), b.drift(t, X), atol=0, rtol=0)
        torch.testing.assert_close(a.reverse_drift(t, X), b.reverse_drift(t, X), atol=0, rtol=0)
    assert a.report == b.report
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    drawn = [bridge.sample_paths(3, [0.0, 0.4, 1.0], generator=g) for bridge, g in zip((a, b), generators, strict=True)]
    torch.testing.assert_close(*drawn, atol=0, rtol=0)


def round_trip(bridge: sbot.Bridge, folder: Path, **given) -> sbot.Bridge:
    bridge.save(folder / "bridge.safetensors")
    return sbot.load(folder / "bridge.safetensors", **given)


@pytest.mark.parametrize(
    "solver",
    [
        sbot.DSB(rounds=1, steps=sbot.TimeGrid(5, "symmetric", ratio=3.0), fit=SHORT, tol=100.0),
        sbot.DSB(half_steps=1, steps=[0.0, 0.3, 1.0], fit=SHORT, tol=100.0),
        sbot.DSBM(fit=SHORT, pairs=32, tol=100.0),
    ],
    ids=["dsb", "half step", "dsbm"],
)
def test_networks_of_sbot_need_nothing_else(solver: sbot.Solver, tmp_path: Path) -> None:
    bridge = sbot.solve_bridge(MU, NU, 0.7, solver=solver)
    same(bridge, round_trip(bridge, tmp_path))


def test_one_network_for_both_ways_is_stored_once(tmp_path: Path) -> None:
    bridge = sbot.solve_bridge(MU, NU, 0.7, solver=sbot.DSBM(fit=SHORT, pairs=32, tol=100.0))
    again = round_trip(bridge, tmp_path)
    assert isinstance(again, sbot.DriftBridge) and again.forward.net is again.backward.net
    weights = sum(p.numel() * 4 for p in bridge.forward.net.parameters())
    assert (tmp_path / "bridge.safetensors").stat().st_size < 1.5 * weights


@pytest.mark.parametrize("solver_class", [sbot.DSB, sbot.DSBM])
def test_a_network_of_the_callers_is_given_again(solver_class, tmp_path: Path) -> None:
    bridge = sbot.solve_bridge(MU, NU, 0.7, solver=solver_class(net=Mine(), fit=SHORT, tol=100.0))
    same(bridge, round_trip(bridge, tmp_path, net=Mine()))
    path = tmp_path / "bridge.safetensors"
    with pytest.raises(sbot.InvalidProblem, match=r"network of your own, Mine.*net="):
        sbot.load(path)
    with pytest.raises(sbot.InvalidProblem, match="does not fit the file"):
        sbot.load(path, net=Mine(9))
    with pytest.raises(sbot.InvalidProblem, match=r"give a torch\.nn\.Module"):
        sbot.load(path, net=3)


def test_bases_are_stored_with_the_bridge(tmp_path: Path) -> None:
    base = sbot.solve_bridge(MU, NU, 0.7)
    first = sbot.solve_bridge(MU, NU, 0.7, solver=sbot.DSBM(fit=SHORT, pairs=32, tol=100.0), init=base)
    same(first, round_trip(first, tmp_path))
    second = sbot.solve_bridge(MU, NU, 0.7, solver=sbot.DSB(fit=SHORT, rounds=1, tol=100.0), init=first)
    same(second, round_trip(second, tmp_path))


def test_a_score_network_is_given_again(tmp_path: Path) -> None:
    bridge = sbot.solve_bridge(MU, NU, 0.7, solver=sbot.DSB(half_steps=2, score=Mine(), fit=SHORT, tol=1e9))
    same(bridge, round_trip(bridge, tmp_path, score=Mine()))
    with pytest.raises(sbot.InvalidProblem, match="score="):
        sbot.load(tmp_path / "bridge.safetensors")


def test_a_sampler_and_a_diffusion_are_given_again(tmp_path: Path) -> None:
    drawn = sbot.Sampler(lambda n, generator: torch.randn(n, 2, generator=generator))
    well = sbot.Diffusion(lambda t, x: -x)
    bridge = sbot.solve_bridge(drawn, NU, 0.7, reference=well, solver=sbot.DSB(rounds=1, fit=SHORT, tol=1e9))
    same(bridge, round_trip(bridge, tmp_path, reference=well, mu=drawn))
    again = sbot.load(tmp_path / "bridge.safetensors", reference=well)
    torch.testing.assert_close(again.drift(0.5, X), bridge.drift(0.5, X))
    with pytest.raises(sbot.SbotError):
        again.sample_pairs(3)


def test_images_and_their_network(tmp_path: Path) -> None:
    image = sbot.Sampler(lambda n, generator: torch.randn(n, 1, 8, 8, generator=generator))
    solver = sbot.DSB(rounds=1, steps=3, fit=sbot.FitConfig(steps=1, batch=4), cache=sbot.Cache(paths=4), tol=1e9)
    bridge = sbot.solve_bridge(image, image, 1.0, solver=solver)
    x = torch.randn(2, 1, 8, 8)
    again = round_trip(bridge, tmp_path, mu=image, nu=image)
    torch.testing.assert_close(again.drift(0.5, x), bridge.drift(0.5, x), atol=0, rtol=0)


def test_a_bridge_of_potentials_takes_no_network(tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    sbot.solve_bridge(MU, NU, 0.7).save(path)
    with pytest.raises(sbot.InvalidProblem, match="without networks"):
        sbot.load(path, net=Mine())


@pytest.mark.parametrize("where", [40, 400, 2000, -50])
def test_a_flipped_bit_is_found(where: int, tmp_path: Path) -> None:
    path = tmp_path / "bridge.safetensors"
    sbot.solve_bridge(MU, NU, 0.7, solver=sbot.DSBM(fit=SHORT, pairs=32, tol=100.0)).save(path)
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    with pytest.raises(sbot.InvalidFile):
        sbot.load(path)


def test_it_moves_and_draws(tmp_path: Path) -> None:
    bridge = sbot.solve_bridge(MU, NU, 0.7, solver=sbot.DSBM(fit=SHORT, pairs=32, tol=100.0))
    double = bridge.to(dtype=torch.float64)
    torch.testing.assert_close(double.drift(0.5, X.double()).float(), bridge.drift(0.5, X), atol=1e-5, rtol=1e-5)
    for kind in ("auto", "paths", "marginals", "convergence", "plan"):
        assert bridge.plot(kind).axes


def test_a_network_of_the_callers_below_another_is_given_again(tmp_path: Path) -> None:
    first = sbot.solve_bridge(MU, NU, 0.7, solver=sbot.DSBM(net=Mine(), fit=SHORT, tol=100.0))
    second = sbot.solve_bridge(MU, NU, 0.7, solver=sbot.DSBM(fit=SHORT, pairs=32, tol=100.0), init=first)
    same(second, round_trip(second, tmp_path, net=Mine()))
    scored = sbot.solve_bridge(MU, NU, 0.7, solver=sbot.DSB(half_steps=2, score=Mine(), fit=SHORT, tol=1e9))
    third = sbot.solve_bridge(MU, NU, 0.7, solver=sbot.DSBM(fit=SHORT, pairs=32, tol=100.0), init=scored)
    same(third, round_trip(third, tmp_path, score=Mine()))


def test_a_network_for_both_ways_stays_one_in_another_dtype() -> None:
    bridge = sbot.solve_bridge(MU, NU, 0.7, solver=sbot.DSBM(fit=SHORT, pairs=32, tol=100.0))
    moved = bridge.to(dtype=torch.float64)
    assert moved.forward.net is moved.backward.net
