"""Pictures: what is drawn is what the bridge says, every axis is labelled, and nothing global is touched."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from PIL import Image

import sbot
from sbot import plot

F64 = torch.float64


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def cloud(n: int, d: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(n), dtype=F64) + shift


def gaussian(d: int) -> sbot.Bridge:
    one = sbot.Gaussian(torch.zeros(d, dtype=F64), torch.diag(torch.arange(1.0, d + 1, dtype=F64)))
    return sbot.solve_bridge(one, sbot.Gaussian(torch.full((d,), 3.0, dtype=F64), torch.eye(d, dtype=F64)), 0.5)


def make(name: str) -> sbot.Bridge:
    if name.startswith("gaussian"):
        return gaussian(int(name[-1]))
    if name.startswith("points"):
        d = int(name[-1])
        return sbot.solve_bridge(cloud(30, d), cloud(40, d, 2.0), 0.5)
    if name == "static":
        return sbot.solve_bridge(cloud(30, 2), cloud(40, 2, 2.0), 0.5, cost=sbot.Lp(1))
    if name == "relaxed":
        return sbot.solve_bridge(
            cloud(30, 1), (cloud(40, 1, 2.0), torch.full((40,), 0.1, dtype=F64)), 0.5, relax=(1.0, 1.0)
        )
    if name == "batch":
        return sbot.solve_bridge(cloud(24, 2).reshape(2, 12, 2), cloud(30, 2).reshape(2, 15, 2), 0.5)
    if name == "histogram":
        place = torch.linspace(0, 1, 7, dtype=F64)
        a, b = torch.rand(7, generator=seeded(), dtype=F64), torch.linspace(1, 2, 7, dtype=F64)
        return sbot.solve_bridge(a / a.sum(), b / b.sum(), 0.1, cost=(place[:, None] - place).square())
    assert name == "unfinished"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sbot.NotConverged)
        return sbot.solve_bridge(cloud(30, 2), cloud(40, 2, 2.0), 0.05, solver=sbot.Sinkhorn(max_iter=2))


DRAWABLE = {
    "points1": ["plan", "paths", "marginals", "convergence"],
    "points2": ["plan", "paths", "marginals", "convergence"],
    "points5": ["plan", "paths", "marginals", "convergence"],
    "gaussian1": ["plan", "paths", "marginals"],
    "gaussian2": ["plan", "paths", "marginals"],
    "gaussian5": ["plan", "paths", "marginals"],
    "static": ["plan", "convergence"],
    "histogram": ["plan", "convergence"],
    "relaxed": ["plan", "paths", "marginals", "convergence"],
    "batch": ["convergence"],
    "unfinished": ["plan", "paths", "marginals", "convergence"],
}


def options(kind: str) -> dict[str, object]:
    return {} if kind == "convergence" else {"n": 20, "generator": seeded()}


def words(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def main_axes(figure: Figure) -> Axes:
    return figure.axes[0]


# ---- every picture of every bridge ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(plot.KINDS))
@pytest.mark.parametrize("name", list(DRAWABLE))
def test_every_kind_draws_or_says_why_not(name: str, kind: str) -> None:
    bridge = make(name)
    if kind not in DRAWABLE[name]:
        with pytest.raises(sbot.Unsupported, match=r"reference=sbot\.Brownian\(\)|draw '|take one alone"):
            plot.draw(bridge, kind, **options(kind))
        return
    figure = plot.draw(bridge, kind, **options(kind))
    title = figure.get_suptitle()
    assert f"eps = {bridge.problem.eps:g} in units of the cost" in title
    assert repr(bridge.problem.reference) in title
    assert any(axes.get_xlabel() for axes in figure.axes)
    assert all(axes.get_ylabel() for axes in figure.axes if kind != "marginals" or axes is main_axes(figure))
    text = words(figure)
    assert ("NOT converged" in text) == (name == "unfinished")
    assert "mu" in text or kind in ("marginals", "convergence")


@pytest.mark.parametrize("name", list(DRAWABLE))
def test_auto_is_the_first_that_exists(name: str) -> None:
    bridge = make(name)
    first = DRAWABLE[name][0]
    want = plot.draw(bridge, first, **options(first))
    got = plot.draw(bridge, n=20, generator=seeded())
    assert got.get_suptitle() == want.get_suptitle()
    assert bridge.plot(n=20).get_suptitle() == want.get_suptitle()


def test_unknown_kinds_and_options_list_the_choices() -> None:
    bridge = make("points2")
    with pytest.raises(sbot.InvalidProblem, match="'auto', 'plan', 'paths', 'marginals', 'convergence'"):
        plot.draw(bridge, "pie")
    with pytest.raises(sbot.InvalidProblem, match="it takes n, steps, generator"):
        plot.draw(bridge, "paths", colour="red")
    with pytest.raises(sbot.InvalidProblem, match="it takes no options"):
        plot.draw(bridge, "convergence", n=3)
    with pytest.raises(sbot.InvalidProblem, match="'colour' is not an option"):
        plot.draw(bridge, colour="red")
    with pytest.raises(sbot.InvalidProblem, match="n must be an integer"):
        plot.draw(bridge, "paths", n=0)


# ---- what is drawn is what the bridge says -------------------------------------------------------------------------


def test_the_heat_map_of_a_histogram_is_the_plan() -> None:
    bridge = make("histogram")
    image = main_axes(plot.draw(bridge, "plan")).images[0]
    np.testing.assert_allclose(np.asarray(image.get_array()), bridge.plan().numpy())
    assert image.origin == "upper"  # row 0 on top, as the axis counts


@pytest.mark.parametrize("name", ["points1", "points5", "relaxed"])
def test_the_heat_map_of_points_has_the_mass_of_the_plan(name: str) -> None:
    bridge = make(name)
    values = np.asarray(main_axes(plot.draw(bridge, "plan")).images[0].get_array())
    assert values.sum() == pytest.approx(float(bridge.plan().sum()))


def test_points_on_a_line_fall_into_their_cells() -> None:
    x = torch.tensor([[0.0], [10.0]], dtype=F64)
    light_first, heavy_first = torch.tensor([0.25, 0.75], dtype=F64), torch.tensor([0.75, 0.25], dtype=F64)
    image = main_axes(plot.draw(sbot.solve_bridge((x, light_first), (x + 5, heavy_first), 0.1), "plan")).images[0]
    values = np.asarray(image.get_array())
    assert image.get_extent() == [0, 10, 5, 15]
    assert image.origin == "lower"
    assert values[0, 0] == pytest.approx(0.25)
    assert values[0, -1] == pytest.approx(0.5)  # from 10 to 5: x_0 to the right, x_1 upwards
    assert values[-1, -1] == pytest.approx(0.25)


def test_many_atoms_share_cells_and_rows_stay_in_order() -> None:
    # in three dimensions, along a line: sorted by the principal component the plan of x to x is near its diagonal
    x = cloud(300, 1) * torch.tensor([1.0, 2.0, -1.0], dtype=F64)
    axes = main_axes(plot.draw(sbot.solve_bridge(x, x, 0.01, solver=sbot.Sinkhorn(tol=1e-3)), "plan"))
    values = np.asarray(axes.images[0].get_array())
    assert values.shape == (plot.CELLS, plot.CELLS)
    rows, columns = np.indices(values.shape)
    assert (values * abs(rows - columns)).sum() < 3
    assert "principal component" in axes.get_xlabel()


def test_few_pairs_are_all_drawn_as_dark_as_their_mass() -> None:
    x = torch.tensor([[0.0, 0.0], [4.0, 0.0]], dtype=F64)
    bridge = sbot.solve_bridge(x, x + torch.tensor([0.0, 1.0], dtype=F64), 2.0)
    lines = next(c for c in main_axes(plot.draw(bridge, "plan")).collections if isinstance(c, LineCollection))
    mass = bridge.plan().flatten().numpy()
    np.testing.assert_allclose(lines.get_alpha(), mass / mass.max())
    segments = np.stack(lines.get_segments())
    np.testing.assert_allclose(segments[1], [[0, 0], [4, 1]])


def test_many_pairs_are_drawn_from_the_plan() -> None:
    bridge = make("points2")
    figure = plot.draw(bridge, "plan", n=33, generator=seeded())
    assert "33 pairs drawn" in figure.get_suptitle()
    lines = next(c for c in main_axes(figure).collections if isinstance(c, LineCollection))
    x, y = bridge.sample_pairs(33, generator=seeded())
    np.testing.assert_allclose(np.stack(lines.get_segments()), torch.stack([x, y], 1).numpy())


def test_the_density_of_two_gaussians() -> None:
    bridge = make("gaussian1")
    axes = main_axes(plot.draw(bridge, "plan"))
    values = np.asarray(axes.images[0].get_array())
    left, right, bottom, top = axes.images[0].get_extent()
    cell = (right - left) / (values.shape[1] - 1) * (top - bottom) / (values.shape[0] - 1)
    assert values.sum() * cell == pytest.approx(1, abs=2e-3)
    x, y = axes.lines[0].get_data()
    np.testing.assert_allclose(y, bridge.transport(torch.from_numpy(np.asarray(x))[:, None])[:, 0].numpy())


def test_a_point_mass_has_no_density_and_is_drawn_as_pairs() -> None:
    dirac = sbot.Gaussian(torch.zeros(1, dtype=F64), torch.zeros(1, 1, dtype=F64))
    bridge = sbot.solve_bridge(dirac, sbot.Gaussian(torch.ones(1, dtype=F64), torch.eye(1, dtype=F64)), 0.5)
    assert "pairs" in plot.draw(bridge, "plan", n=9).get_suptitle()
    plot.draw(bridge, "marginals", n=9)


def test_the_covariance_of_a_plan() -> None:
    bridge = make("gaussian5")
    image = main_axes(plot.draw(bridge, "plan")).images[0]
    np.testing.assert_allclose(np.asarray(image.get_array()), bridge.plan().cov.numpy())
    low, high = image.get_clim()
    assert low == -high  # white is zero


def test_ellipses_are_one_and_two_deviations() -> None:
    figure = plot.draw(make("gaussian2"), "plan", n=5)
    ellipses = [patch for patch in main_axes(figure).patches if isinstance(patch, Ellipse)]
    sizes = [sorted((e.width, e.height)) for e in ellipses]
    np.testing.assert_allclose(sizes, [[2, 2 * 2**0.5], [4, 4 * 2**0.5], [2, 2], [4, 4]])
    # the first coordinate has variance 1, the second 2: the long axis stands upright
    first = ellipses[0]
    upright = first.angle % 180 if first.width > first.height else (first.angle + 90) % 180
    assert upright == pytest.approx(90)


@pytest.mark.parametrize("name", ["points1", "points2"])
def test_paths_are_the_paths(name: str) -> None:
    bridge = make(name)
    figure = plot.draw(bridge, "paths", n=3, steps=4, generator=seeded())
    lines = next(c for c in main_axes(figure).collections if isinstance(c, LineCollection))
    want = bridge.sample_paths(3, np.linspace(0, 1, 5), generator=seeded()).numpy()
    if name == "points1":
        want = np.stack([np.broadcast_to(np.linspace(0, 1, 5), (3, 5)), want[..., 0]], -1)
    segments = np.stack(lines.get_segments()).reshape(3, 4, 2, 2)
    np.testing.assert_allclose(segments[:, :, 0], want[:, :-1])
    np.testing.assert_allclose(segments[:, :, 1], want[:, 1:])
    np.testing.assert_allclose(np.asarray(lines.get_array()).reshape(3, 4)[0], [0.125, 0.375, 0.625, 0.875])
    assert "3 sample paths" in figure.get_suptitle()


def test_beyond_two_dimensions_the_axes_say_what_they_are() -> None:
    axes = main_axes(plot.draw(make("points5"), "paths", n=3, steps=3))
    assert axes.get_xlabel().startswith("principal component 1 of 5")
    assert axes.get_ylabel().startswith("principal component 2 of 5")
    assert "% of the variance" in axes.get_xlabel()


def test_principal_directions() -> None:
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    points = np.random.default_rng(1).normal(size=(500, 4)) * [5, 3, 0.1, 0.1] @ basis.T + 7
    centre, directions, share = plot._principal(points, 2)
    np.testing.assert_allclose(centre, points.mean(0))
    np.testing.assert_allclose(directions.T @ directions, np.eye(2), atol=1e-12)
    assert np.all(abs((directions * basis[:, :2]).sum(0)) > 0.99)
    np.testing.assert_allclose(share, np.linalg.eigvalsh(np.cov(points.T))[:1:-1] / np.cov(points.T).trace())
    for seed in range(20):  # the sign is not left to LAPACK
        directions = plot._principal(np.random.default_rng(seed).normal(size=(9, 4)), 2)[1]
        assert np.all(directions[abs(directions).argmax(0), [0, 1]] > 0)


def test_atoms_are_as_large_as_their_weights_and_empty_ones_are_left_out() -> None:
    weights = torch.tensor([0.0, 1.0, 3.0], dtype=F64) / 4
    bridge = sbot.solve_bridge((cloud(3, 2), weights), cloud(4, 2), 0.5)
    dots = [c for c in main_axes(plot.draw(bridge, "paths", n=2)).collections if isinstance(c, PathCollection)]
    sizes = dots[0].get_sizes()
    assert len(sizes) == 2
    assert sizes[1] == pytest.approx(3 * sizes[0])


@pytest.mark.parametrize("name", ["gaussian1", "points1", "relaxed"])
def test_marginals_on_a_line_are_exact_densities(name: str) -> None:
    bridge = make(name)
    axes = main_axes(plot.draw(bridge, "marginals", n=200, times=[0.0, 0.5, 1.0], generator=seeded()))
    middle = next(line for line in axes.lines if line.get_label() == "t = 0.5")
    x, y = (np.asarray(part) for part in middle.get_data())
    want = bridge.log_prob(0.5, torch.from_numpy(x)[:, None]).exp().numpy()
    np.testing.assert_allclose(y, want)
    mass = float(bridge.plan().sum()) if name != "gaussian1" else 1.0
    assert y.sum() * (x[1] - x[0]) == pytest.approx(mass, rel=0.05)
    if name != "gaussian1":  # atoms have no density: histograms of the right mass
        for patch in axes.patches:
            values, edges, _ = patch.get_data()
            assert (values * np.diff(edges)).sum() == pytest.approx(mass)
        assert len(axes.patches) == 2


def test_marginals_have_a_panel_a_time() -> None:
    bridge = make("points2")
    figure = plot.draw(bridge, "marginals", n=11, times=[0, 0.3, 0.9], generator=seeded())
    assert [axes.get_title() for axes in figure.axes] == ["t = 0", "t = 0.3", "t = 0.9"]
    want = bridge.sample_paths(11, [0, 0.3, 0.9], generator=seeded()).numpy()
    for k, axes in enumerate(figure.axes):
        np.testing.assert_allclose(np.asarray(axes.collections[0].get_offsets()), want[:, k])


def test_convergence_is_the_history() -> None:
    report = make("points2").report
    axes = main_axes(plot.draw(make("points2"), "convergence"))
    *stages, tolerance = axes.lines
    got = [(x, y) for line in stages for x, y in zip(*line.get_data(), strict=True)]
    np.testing.assert_allclose(got, [(iteration, error) for iteration, _, error in report.history])
    assert len(stages) == len({eps for _, eps, _ in report.history})
    assert stages[-1].get_label() == "eps = 0.5"
    assert axes.get_yscale() == "log"
    assert tolerance.get_linestyle() == "--"
    assert float(np.asarray(tolerance.get_ydata())[0]) == report.tolerance


# ---- nothing global ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plan", "paths", "marginals"])
def test_a_generator_is_all_the_randomness(kind: str) -> None:
    bridge = make("points5" if kind != "plan" else "points2")
    state = torch.get_rng_state()
    first, second = (plot.draw(bridge, kind, n=7, generator=seeded()) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    drawn = [
        [path.vertices for axes in figure.axes for c in axes.collections for path in c.get_paths()]
        for figure in (first, second)
    ]
    spots = [[c.get_offsets() for axes in figure.axes for c in axes.collections] for figure in (first, second)]
    assert len(drawn[0]) > 1
    for one, other in zip([*drawn[0], *spots[0]], [*drawn[1], *spots[1]], strict=True):
        np.testing.assert_array_equal(one, other)


def test_neither_pyplot_nor_a_backend_nor_a_setting(tmp_path: Path) -> None:
    code = f"""
import sys, torch, matplotlib
before = matplotlib.rcParams.copy()  # copy() does not resolve the backend, reading does
import sbot
assert "sbot.plot" not in sys.modules
bridge = sbot.solve_bridge(torch.rand(9, 2), torch.rand(9, 2), 0.5)
from sbot import plot
plot.save(bridge.plot("paths"), {str(tmp_path / "p.png")!r})
plot.animation(bridge, {str(tmp_path / "p.gif")!r}, frames=2, n=3)
assert "matplotlib.pyplot" not in sys.modules
assert dict.__eq__(before, matplotlib.rcParams.copy())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "magic"),
    [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml"), (".jpg", b"\xff\xd8"), (".PNG", b"\x89PNG")],
)
def test_save(tmp_path: Path, suffix: str, magic: bytes) -> None:
    path = tmp_path / f"p{suffix}"
    plot.save(plot.draw(make("points2"), "convergence"), path, dpi=40)
    assert path.read_bytes().startswith(magic)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["p.bmp", "p"])
def test_save_lists_its_formats(tmp_path: Path, name: str) -> None:
    with pytest.raises(sbot.InvalidProblem, match=r"\.png, \.pdf, \.svg, \.jpg"):
        plot.save(Figure(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["points1", "points2", "points5", "gaussian2"])
def test_animation(tmp_path: Path, name: str) -> None:
    path = tmp_path / "p.gif"
    plot.animation(make(name), path, n=8, frames=4, generator=seeded())
    with Image.open(path) as film:
        assert film.n_frames == 4  # type: ignore[attr-defined]
        assert film.info["loop"] == 0
    with pytest.raises(sbot.InvalidProblem, match=r"\.gif"):
        plot.animation(make(name), tmp_path / "p.mp4")


def test_digits() -> None:
    images = torch.rand(2, 3, 4, 5, generator=seeded())
    figure = plot.digits(images, [0, 0.5, 1], "a title")
    assert figure.get_suptitle() == "a title"
    assert [axes.get_title() for axes in figure.axes] == ["t = 0", "t = 0.5", "t = 1", "", "", ""]
    for axes, want in zip(figure.axes, images.flatten(0, 1), strict=True):
        np.testing.assert_allclose(np.asarray(axes.images[0].get_array()), want.numpy())
        assert axes.images[0].get_clim() == (0, 1)
    with pytest.raises(sbot.InvalidProblem, match="rows, 2, height, width"):
        plot.digits(images, [0, 1])


def test_a_batch_has_no_animation(tmp_path):
    x = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(0))
    bridge = sbot.solve_bridge(x, x + 1, 1.0)
    with pytest.raises(sbot.Unsupported, match="take one alone"):
        plot.animation(bridge, tmp_path / "a.gif")
