"""The demo: real digits, a converged bridge, pictures that can be read again, and the same ones every time."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from matplotlib.figure import Figure
from PIL import Image

import sbot
from sbot import cli, demo, plot

FILES = ["bridge.safetensors", "convergence.png", "digits.png", "paths.png"]


def run(out: Path, *options: str) -> Result:
    return CliRunner().invoke(cli.commands, ["demo", "--out", str(out), *options])


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    return out, run(out)


def test_it_writes_what_it_says(shown: tuple[Path, Result]) -> None:
    out, result = shown
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert sorted(path.name for path in out.iterdir()) == FILES
    for name in FILES:
        assert f"wrote {out / name}" in result.stdout
    for name in FILES[1:]:
        with Image.open(out / name) as picture:
            assert min(picture.size) > 500
            assert np.asarray(picture.convert("L")).std() > 10  # not an empty page


def test_the_bridge_is_the_one_that_was_reported(shown: tuple[Path, Result]) -> None:
    out, result = shown
    bridge = sbot.load(out / "bridge.safetensors")
    assert bridge.report.converged
    assert str(bridge.report) in result.stdout
    assert f"cost {float(bridge.cost()):.6f}" in result.stdout
    assert f"linear cost {float(bridge.linear_cost()):.6f}" in result.stdout
    assert f"gap {float(bridge.gap()):.1e}" in result.stdout
    assert float(bridge.gap()) < 1e-6
    assert bridge.problem.dtype == torch.float64
    for points, digit in zip(bridge.problem.values, (demo.SOURCE, demo.TARGET), strict=True):
        assert points is not None
        assert torch.equal(points, demo.load(digit))


def test_the_digits_are_digits() -> None:
    zeros = demo.load(demo.SOURCE)
    assert zeros.shape == (178, demo.SIDE**2)
    assert float(zeros.min()) == 0
    assert float(zeros.max()) == 1
    middle = zeros.mean(0).reshape(demo.SIDE, demo.SIDE)
    assert float(middle[3:5, 3:5].mean()) < 0.2 < float(middle[3:5, 1:3].mean())  # a zero has a hole


def test_it_is_seeded_and_leaves_the_global_generator_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[np.ndarray]] = {}

    def keep(figure: Figure, path: Path) -> None:
        images = [image.get_array() for axes in figure.axes for image in axes.images]
        lines = [line.vertices for axes in figure.axes for c in axes.collections for line in c.get_paths()]
        drawn[f"{path.parent.name}/{path.name}"] = [np.asarray(part) for part in (*images, *lines)]

    monkeypatch.setattr(plot, "save", keep)
    state = torch.get_rng_state()
    for name, seed in (("one", "0"), ("same", "0"), ("other", "1")):
        assert run(tmp_path / name, "--seed", seed).exit_code == 0
    assert torch.equal(torch.get_rng_state(), state)
    for picture in ("digits.png", "paths.png"):
        one, same, other = (drawn[f"{name}/{picture}"] for name in ("one", "same", "other"))
        assert len(one) >= 30
        assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
        assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_without_scikit_learn_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    result = run(tmp_path / "none")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == ["sbot: the demo needs the digits of scikit-learn: pip install 'sbot[demo]'"]
    assert not (tmp_path / "none").exists()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("mine")
    result = run(tmp_path / "demo")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert (tmp_path / "demo").read_text() == "mine"
