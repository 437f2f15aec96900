"""Grids, chains and pinned bridges, against the transitions they come from."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import sbot
from sbot.reference import LinearReference
from sbot.sde import TABLE, Chain, PinnedTable, TimeGrid, as_grid, walk
from sbot.steering import BridgeBase, Steering

F64 = torch.float64
LIKE = torch.empty((), dtype=F64)

REFERENCES: dict[str, LinearReference] = {
    "brownian": sbot.Brownian(),
    "ou": sbot.OrnsteinUhlenbeck(1.5, 0.3),
    "vp": sbot.LinearSDE.vp(0.1, 8.0),
    "ve": sbot.LinearSDE.ve(0.1, 2.0),
    "matrix": sbot.LinearSDE(
        torch.tensor([[-0.5, 1.0], [-1.0, -0.2]], dtype=F64),
        torch.tensor([0.4, -0.3], dtype=F64),
        torch.tensor([[1.0, 0.0], [0.3, 0.8]], dtype=F64),
    ),
}
each_reference = pytest.mark.parametrize("reference", REFERENCES.values(), ids=REFERENCES)


@pytest.mark.parametrize("kind", ["uniform", "linear", "geometric", "symmetric"])
@pytest.mark.parametrize("n", [1, 2, 5, 20])
def test_grids_increase_from_0_to_1(kind: str, n: int) -> None:
    times = TimeGrid(n, kind, ratio=7.0).times(0.5)
    assert len(times) == n + 1 and times[0] == 0 and times[-1] == 1
    sizes = [b - a for a, b in itertools.pairwise(times)]
    assert min(sizes) > 0
    if n > 2 and kind != "uniform":
        assert max(sizes) / min(sizes) == pytest.approx(7.0)
    if kind == "symmetric":
        assert sizes == pytest.approx(sizes[::-1])


@pytest.mark.parametrize("kind", ["linear", "geometric", "symmetric"])
def test_the_smallest_step_is_given_as_a_variance(kind: str) -> None:
    times = TimeGrid(12, kind, least=1e-3).times(0.4)
    assert min(b - a for a, b in itertools.pairwise(times)) * 0.4 == pytest.approx(1e-3, rel=1e-6)


def test_an_eps_too_small_for_its_steps_is_refused() -> None:
    with pytest.raises(sbot.InvalidProblem, match="eps is too small for 10 steps"):
        TimeGrid(10, "symmetric", least=0.02).times(0.1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TimeGrid(0),
        lambda: TimeGrid(5, "cosine"),
        lambda: TimeGrid(5, "linear", ratio=0.5),
        lambda: TimeGrid(5, least=-1.0),
        lambda: TimeGrid(2000, "geometric", ratio=1e9).times(1.0),
        lambda: as_grid(0),
        lambda: as_grid(True),
        lambda: as_grid(2.5),
        lambda: as_grid([0.0, 0.5, 0.5, 1.0]),
        lambda: as_grid([0.1, 1.0]),
        lambda: as_grid("20"),
    ],
)
def test_bad_grids_are_refused(make) -> None:
    with pytest.raises(sbot.InvalidProblem):
        make()


@each_reference
def test_a_chain_that_nothing_steers_has_the_law_of_the_reference(reference: LinearReference) -> None:
    """Exactly, however few the steps: moments carried through the means and noises of three uneven steps."""
    eps, d = 0.7, 2
    chain = Chain(reference, [0.0, 0.1, 0.45, 1.0], eps, LIKE, (d,))
    x = torch.tensor([[0.3, -1.0]], dtype=F64)
    cov, eye = torch.zeros(d, d, dtype=F64), torch.eye(d, dtype=F64)
    for k in chain.order(1):
        origin = chain.base(k, torch.zeros(1, d, dtype=F64), 1)
        flow = (chain.base(k, eye, 1) - origin).mT
        root = chain.noise(k, eye).mT
        x, cov = chain.base(k, x, 1), flow @ cov @ flow.mT + root @ root.mT
    exact = reference.transition(0.0, 1.0)
    torch.testing.assert_close(x, exact.mean(torch.tensor([[0.3, -1.0]], dtype=F64)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(cov, eps * sbot.linalg.matrix(exact.cov, d), rtol=1e-9, atol=1e-9)


@each_reference
def test_backwards_undoes_forwards(reference: LinearReference) -> None:
    chain = Chain(reference, [0.0, 0.3, 1.0], 0.7, LIKE, (2,))
    x = torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    for k in chain.order(1):
        torch.testing.assert_close(chain.base(k, chain.base(k, x, 1), -1), x)
        torch.testing.assert_close(chain.unpush(k, chain.push(k, x)), x)


@each_reference
@pytest.mark.parametrize("way", [1, -1])
def test_controls_move_as_the_equation_says(reference: LinearReference, way: int) -> None:
    """Without noise a chain is an ODE solver: order 1 and order 2 against the finest solution."""

    def control(t: float, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(2 * x) + t

    start = torch.tensor([[0.5, -0.2]], dtype=F64)

    def end(n: int, order: int) -> torch.Tensor:
        # the last step is always Euler's: leave it out of the count by making it tiny
        times = [*torch.linspace(0, 1 - 1e-6, n + 1, dtype=F64).tolist(), 1.0]
        if way < 0:
            times = [1 - t for t in times[::-1]]
            times[0], times[-1] = 0.0, 1.0
        chain = Chain(reference, times, 1e-300, LIKE, (2,))
        x = start
        for *_, x in walk(chain, control, start, way, order=order):  # noqa: B007
            pass
        return x

    exact = end(3000, 2)
    for order, least in ((1, 1.7), (2, 3.4)):
        errors = [float((end(n, order) - exact).abs().max()) for n in (40, 80)]
        assert errors[0] / errors[1] > least, (order, errors)


@each_reference
@pytest.mark.parametrize("way", [1, -1])
def test_heuns_scheme_gives_covariances_to_second_order(reference: LinearReference, way: int) -> None:
    """The steps of an exact Gaussian bridge carry its law to within O(dt^2), noise included, in both directions.

    Drift and noise are affine, so the covariance is known from the images of a basis: nothing is random here.
    """
    mu = sbot.Gaussian(torch.tensor([-0.5, 0.2], dtype=F64), torch.tensor([[0.6, 0.1], [0.1, 1.0]], dtype=F64))
    nu = sbot.Gaussian(torch.tensor([0.5, 0.0], dtype=F64), torch.tensor([[1.1, -0.2], [-0.2, 0.5]], dtype=F64))
    bridge = sbot.solve_bridge(mu, nu, 1.0, reference=reference)
    control = Steering(way, BridgeBase(bridge, reference, way), None)
    start, end = (mu, nu) if way > 0 else (nu, mu)
    assert isinstance(start, sbot.Gaussian) and isinstance(end, sbot.Gaussian)
    exact = bridge.plan().cov if way > 0 else bridge.plan().cov.roll((2, 2), (0, 1))

    def error(n: int) -> float:
        # the last step is Euler's: leave it out by making it tiny
        times = [*torch.linspace(0, 1 - 1e-7 / n, n, dtype=F64).tolist(), 1.0]
        times = times if way > 0 else [0.0, *(1 - t for t in times[-2::-1])]
        chain = Chain(reference, times, 1.0, LIKE, (2,))
        count, d = len(chain) + 1, 2
        unit = torch.cat([torch.zeros(1, d * count, dtype=F64), torch.eye(d * count, dtype=F64)]).view(-1, count, d)
        order = {k: place + 1 for place, k in enumerate(chain.order(way))}
        begin = unit[:, 0] @ torch.linalg.cholesky(start.cov).mT
        *_, (*_, x) = walk(chain, control, begin, way, order=2, noise=lambda k: unit[:, order[k]])
        ends = torch.cat([begin, x], 1)
        images = ends[1:] - ends[0]
        return float((images.mT @ images - exact).abs().max())

    errors = [error(n) for n in (20, 40)]
    assert errors[0] < 0.1
    assert errors[0] / errors[1] > 3.4 or errors[0] < 1e-9, errors


@each_reference
@pytest.mark.parametrize("way", [1, -1])
def test_a_pinned_bridge_asks_for_the_drift_of_the_bridge_to_a_point(reference: LinearReference, way: int) -> None:
    """The target of matching is the drift of the Schroedinger bridge whose far end is one atom."""
    eps = 0.6
    ends = torch.tensor([[0.4, -0.7]], dtype=F64), torch.tensor([[1.0, 0.2]], dtype=F64)
    bridge = sbot.solve_bridge(*ends, eps, reference=reference)
    table = PinnedTable(reference, eps, LIKE)
    x = torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    for index in (3, 200, TABLE - 5):
        t = (index + 0.5) / TABLE
        k = torch.full((4,), index)
        target, noise = table.target(k, x, ends[1 if way > 0 else 0].expand(4, 2), way)
        root = sbot.linalg.root(reference.spread(t))
        drift = way * reference.drift(t, x) + sbot.linalg.apply(root, target)
        exact = bridge.drift(t, x) if way > 0 else bridge.reverse_drift(t, x)
        torch.testing.assert_close(drift, exact, rtol=1e-7, atol=1e-7)
        assert noise.shape == (4,) and bool((noise > 0).all())


@each_reference
def test_places_on_a_pinned_bridge_have_its_law(reference: LinearReference) -> None:
    eps, n = 0.6, 40_000
    table = PinnedTable(reference, eps, LIKE)
    generator = torch.Generator().manual_seed(2)
    x0, x1 = torch.tensor([0.4, -0.7], dtype=F64), torch.tensor([1.0, 0.2], dtype=F64)
    index = 150
    z = torch.randn(n, 2, generator=generator, dtype=F64)
    x = table.place(torch.full((n,), index), x0.expand(n, 2), x1.expand(n, 2), z)
    law = reference.pin(0.0, (index + 0.5) / TABLE)
    want = sbot.linalg.apply(law.near, x0[None]) + sbot.linalg.apply(law.far, x1[None]) + law.shift
    cov = eps * sbot.linalg.matrix(law.cov, 2)
    scale = math.sqrt(float(cov.diagonal().max()))
    assert float((x.mean(0) - want).abs().max()) < 5 * scale / math.sqrt(n)
    torch.testing.assert_close(x.T.cov(), cov, atol=5 * scale**2 * math.sqrt(2 / n), rtol=0)
    # the stated size of a target's noise is its mean square around its mean
    target, noise = table.target(torch.full((n,), index), x, x1.expand(n, 2), 1)
    assert float(target.var(0).mean()) == pytest.approx(float(noise[0]), rel=0.03)


def test_a_path_that_explodes_is_an_error() -> None:
    chain = Chain(sbot.Brownian(), [0.0, 0.5, 1.0], 1.0, LIKE, (1,))
    with pytest.raises(sbot.NumericalError, match="left the finite numbers"):
        list(walk(chain, lambda t, x: x * torch.inf, torch.ones(2, 1, dtype=F64), 1))


def test_a_diffusion_is_stepped_by_euler() -> None:
    well = sbot.Diffusion(lambda t, x: x - x**3, noise=lambda t: 1 + t)
    chain = Chain(well, [0.0, 0.25, 1.0], 0.5, LIKE, (1,))
    x = torch.tensor([[2.0]], dtype=F64)
    assert float(chain.base(0, x, 1)) == pytest.approx(2 - 0.25 * 6)
    assert float(chain.base(0, x, -1)) == pytest.approx(2 + 0.25 * 6)
    assert float(chain.noise(1, x)) == pytest.approx(2 * 1.25 * math.sqrt(0.75 * 0.5))


def test_a_diffusion_says_what_it_lacks() -> None:
    well = sbot.Diffusion(lambda t, x: x - x**3)
    x = torch.randn(5, 1)
    with pytest.raises(sbot.Unsupported, match="DSB"):
        sbot.solve_bridge(x, x + 1, 1.0, reference=well, solver="sinkhorn")
    with pytest.raises(sbot.Unsupported, match="non-linear reference"):
        well.cost().matrix(x, x)
    with pytest.raises(sbot.InvalidProblem, match="return a tensor like the points"):
        sbot.Diffusion(lambda t, x: x[:, 0]).drift(0.5, torch.zeros(3, 2))
    with pytest.raises(sbot.InvalidProblem, match="noise is -1"):
        sbot.Diffusion(lambda t, x: x, noise=-1.0)
    with pytest.raises(sbot.InvalidProblem, match="give a function"):
        sbot.Diffusion(3.0)  # type: ignore[arg-type]
