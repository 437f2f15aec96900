"""The command line: files in and out, options, exit codes, and one line on stderr for everything that goes wrong."""

from __future__ import annotations

import fcntl
import functools
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result

import sbot
from sbot import cli, files, plot

F64 = torch.float64


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(cli.commands, [str(argument) for argument in arguments], prog_name="sbot")


def fails(result: Result, *phrases: str, code: int = 1) -> None:
    """The contract of every failure: its code, one line on stderr, nothing that looks like Python."""
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("sbot: ")
    assert "Traceback" not in result.output
    for phrase in phrases:
        assert phrase in lines[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two clouds, one with weights, and the bridge between them."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.normal(size=(30, 2)))
    weights = rng.uniform(0.5, 1.5, size=40)
    np.savez(tmp_path / "y.npz", points=rng.normal(size=(40, 2)) + 1, weights=weights / weights.sum())
    result = run("solve", tmp_path / "x.npy", tmp_path / "y.npz", "--eps", 0.3, "--out", tmp_path / "b.safetensors")
    assert result.exit_code == 0, result.output
    return tmp_path


def solve(folder: Path, *options: Any) -> Result:
    out = folder / "new.safetensors"
    return run("solve", folder / "x.npy", folder / "y.npz", "--eps", 0.3, "--out", out, *options)


def solved(folder: Path, *options: Any) -> sbot.Bridge:
    result = solve(folder, *options)
    assert result.exit_code == 0, result.output
    return sbot.load(folder / "new.safetensors")


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", files.ARRAYS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_points_survive_every_format(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    points = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=dtype) * 1e-7
    weights = torch.rand(7, generator=torch.Generator().manual_seed(1), dtype=dtype)
    path = tmp_path / f"p{suffix}"
    files.write_points(path, points, weights)
    back, back_weights = files.read_points(path)
    assert torch.equal(back.to(dtype), points)
    if suffix != ".csv":
        assert back.dtype == dtype
    if suffix in (".npz", ".safetensors"):
        assert back_weights is not None
        assert torch.equal(back_weights, weights)
    else:
        assert back_weights is None


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("1,2\n3,4\n", [[1, 2], [3, 4]]),
        ("x,y\n1,2\n3,4", [[1, 2], [3, 4]]),
        ("\ufeffx,y\r\n1,2\r\n\r\n3,4\r\n", [[1, 2], [3, 4]]),
        ("# made by hand\n1, 2\n3, 4\n\n", [[1, 2], [3, 4]]),
        ("5\n6\n", [[5], [6]]),
        ("5,6\n", [[5, 6]]),
    ],
)
def test_csv(tmp_path: Path, text: str, want: list[list[float]]) -> None:
    (tmp_path / "p.csv").write_text(text, encoding="utf-8", newline="")
    assert files.read_points(tmp_path / "p.csv")[0].tolist() == want


def test_a_slip_in_the_first_line_is_not_a_header(folder: Path) -> None:
    (folder / "p.csv").write_text("1,2O\n3,4\n")
    fails(run("solve", folder / "p.csv", folder / "y.npz", "--eps", 1, "--out", folder / "o"), "p.csv", "2O")


def test_a_file_with_one_array_needs_no_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "p.npz", anything=np.ones((2, 2)))
    safetensors.torch.save_file({"anything": torch.ones(2, 2)}, tmp_path / "p.safetensors")
    for name in ("p.npz", "p.safetensors"):
        assert files.read_points(tmp_path / name)[0].tolist() == [[1, 1], [1, 1]]


def test_a_file_with_several_arrays_says_what_it_holds(folder: Path) -> None:
    np.savez(folder / "two.npz", a=np.ones((2, 2)), b=np.ones((2, 2)))
    fails(run("solve", folder / "two.npz", folder / "y.npz", "--eps", 1, "--out", folder / "o"), "a, b", "'points'")


def _damaged(folder: Path, kind: str) -> Path:
    good = folder / f"good{kind}"
    files.write_points(good, torch.randn(50, 2, dtype=F64))
    path = folder / f"bad{kind}"
    path.write_bytes(good.read_bytes()[:-100] if kind != ".csv" else b"1,2\n3,banana\n")
    return path


@pytest.mark.parametrize("kind", files.ARRAYS)
def test_damaged_input(folder: Path, kind: str) -> None:
    path = _damaged(folder, kind)
    fails(run("solve", path, folder / "y.npz", "--eps", 1, "--out", folder / "o"), f"bad{kind}")
    path.write_bytes(b"")
    result = run("solve", path, folder / "y.npz", "--eps", 1, "--out", folder / "o")
    fails(result, f"bad{kind}", "holds no numbers" if kind == ".csv" else f"cannot be read as {kind}")
    assert ("cannot be read" in result.stderr) == (kind != ".csv")  # a message that says it better is kept as it is
    path.write_bytes(os.urandom(64) + b"\xff")
    fails(run("solve", path, folder / "y.npz", "--eps", 1, "--out", folder / "o"), f"bad{kind}")
    assert not (folder / "o").exists()


@pytest.mark.parametrize("kind", files.ARRAYS)
def test_no_damage_escapes_as_a_traceback(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"p{kind}"
    files.write_points(path, torch.ones(6, 2, dtype=F64), torch.ones(6, dtype=F64))
    good, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(100):
        data = bytearray(good)
        for place in rng.integers(min(len(data), 150), size=3):
            data[place] = rng.integers(256)
        path.write_bytes(data)
        try:
            files.read_points(path)
        except (sbot.SbotError, OSError, MemoryError):
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("kind", [".npy", ".npz"])
def test_pickles_are_refused(folder: Path, kind: str) -> None:
    trap = np.array([print], dtype=object)
    path = folder / f"trap{kind}"
    np.save(path, trap) if kind == ".npy" else np.savez(path, points=trap)
    fails(run("solve", path, folder / "y.npz", "--eps", 1, "--out", folder / "o"), "Object arrays")


def test_a_damaged_bridge(folder: Path) -> None:
    path = folder / "b.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    for command in (["info"], ["sample", "--t", 0.5, "--n", 2, "--out", folder / "s.npy"]):
        fails(run(command[0], path, *command[1:]), "damaged")
    path.write_bytes(data[:40])
    fails(run("info", path), "safetensors")


# ---- solve ---------------------------------------------------------------------------------------------------------


def test_solve_is_the_library(folder: Path) -> None:
    x = torch.from_numpy(np.load(folder / "x.npy"))
    with np.load(folder / "y.npz") as archive:
        y, w = torch.from_numpy(archive["points"]), torch.from_numpy(archive["weights"])
    want = sbot.solve_bridge(x, (y, w), 0.3)
    got = sbot.load(folder / "b.safetensors")
    torch.testing.assert_close(got.plan(), want.plan())
    assert got.problem.eps == 0.3
    assert got.problem.dtype == F64


def test_the_report_is_printed_unless_quiet(folder: Path) -> None:
    loud, quiet = solve(folder), solve(folder, "--quiet")
    assert str(sbot.load(folder / "new.safetensors").report).splitlines()[0][:20] in loud.stdout
    assert "converged (tolerance)" in loud.stdout
    assert loud.stderr == ""  # not a terminal: no progress bar
    assert quiet.output == ""
    assert quiet.exit_code == 0


def test_not_converged_is_exit_2_and_written(folder: Path) -> None:
    result = solve(folder, "--max-iter", 2)
    fails(result, "NOT converged (max_iter)", "--max-iter", code=2)
    assert "Warning" not in result.output
    report = sbot.load(folder / "new.safetensors").report
    assert not report.converged
    assert report.iterations == 2
    assert "NO (max_iter)" in run("info", folder / "new.safetensors").stdout
    fails(solve(folder, "--max-iter", 2, "--quiet"), "NOT converged", code=2)


def test_solver_options_reach_the_solver(folder: Path) -> None:
    report = solved(folder, "--solver", "sinkhorn", "--tol", 1e-3, "--max-iter", 77).report
    assert report.tolerance == 1e-3
    assert "max_iter=77" in report.solver
    fails(solve(folder, "--gaussian", "--tol", 1e-3), "ClosedForm has no --tol")
    fails(solve(folder, "--solver", "closedform"), "mu is Discrete")


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("brownian", "Brownian()"),
        ("ou:1.5", "OrnsteinUhlenbeck(rate=1.5, mean=0.0)"),
        ("OU:-1,2", "OrnsteinUhlenbeck(rate=-1, mean=2.0)"),
        ("vp", "LinearSDE.vp(0.1, 20)"),
        ("vp:0.2,3", "LinearSDE.vp(0.2, 3)"),
        ("ve:0.5,2", "LinearSDE.ve(0.5, 2)"),
    ],
)
def test_references(folder: Path, text: str, want: str) -> None:
    assert repr(solved(folder, "--reference", text, "--tol", 1e-2).problem.reference) == want


@pytest.mark.parametrize("text", ["ou", "ou:x", "ou:1,2,3", "brownian:1", "levy", ""])
def test_bad_references_list_the_good_ones(folder: Path, text: str) -> None:
    fails(solve(folder, "--reference", text), "--reference", "ou:RATE")


@pytest.mark.parametrize(
    ("name", "want"),
    [("quadratic", "Quadratic()"), ("l1", "Lp(p=1, power=1)"), ("l2", "Lp(p=2, power=1)"), ("cosine", "Cosine()")],
)
def test_costs(folder: Path, name: str, want: str) -> None:
    assert repr(solved(folder, "--cost", name, "--tol", 1e-2).problem.reference) == f"Static({want})"


def test_relax(folder: Path) -> None:
    assert solved(folder, "--relax", 2, "inf").problem.relax == (2.0, float("inf"))
    fails(solve(folder, "--relax", 0, 1), "relax")
    fails(solve(folder, "--relax", 1), "--relax", "2")


def test_mass(folder: Path) -> None:
    bridge = solved(folder, "--mass", 0.25)
    assert float(bridge.plan().sum()) == pytest.approx(0.25)
    said = run("info", folder / "new.safetensors").output
    assert "bounds, mass 0.25" in said and "hard" not in said
    assert "hard, hard" in run("info", folder / "b.safetensors").output
    solved(folder, "--relax", 2, "inf")
    assert "relaxed by 2, hard" in run("info", folder / "new.safetensors").output
    fails(solve(folder, "--mass", 1.5), "mass is 1.5", "give 0 < mass <= 1")
    fails(solve(folder, "--mass", 0.5, "--relax", 1, 1), "drop one of them")
    fails(solve(folder, "--mass", 0.5, "--gaussian"), "atoms on both sides")


def test_dtype(folder: Path) -> None:
    assert solved(folder, "--dtype", "float32").problem.dtype == torch.float32
    np.save(folder / "x.npy", np.load(folder / "x.npy").astype(np.float32))
    np.save(folder / "z.npy", np.load(folder / "x.npy") + 1)
    out = folder / "f.safetensors"
    for options, want in (((), torch.float32), (("--dtype", "float64"), F64)):
        result = run("solve", folder / "x.npy", folder / "z.npy", "--eps", 1, "--out", out, *options)
        assert result.exit_code == 0, result.output
        assert sbot.load(out).problem.dtype == want


def test_precision_warning_is_one_line(folder: Path) -> None:
    result = solve(folder, "--dtype", "float32", "--tol", 1e-12)
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("sbot: warning: tolerance raised")


def test_init_starts_from_a_bridge(folder: Path) -> None:
    cold = solved(folder).report.iterations
    assert solved(folder, "--init", folder / "b.safetensors").report.iterations < cold
    fails(solve(folder, "--init", folder / "x.npy"), "x.npy", "safetensors")


def test_gaussian_fits_both_sides(folder: Path) -> None:
    bridge = solved(folder, "--gaussian")
    assert bridge.report.solver == "ClosedForm()"
    mu, nu = bridge.problem.mu, bridge.problem.nu
    assert isinstance(mu, sbot.Gaussian)
    assert isinstance(nu, sbot.Gaussian)
    want = sbot.Gaussian.from_samples(np.load(folder / "x.npy"))
    torch.testing.assert_close(mu.mean, want.mean)
    torch.testing.assert_close(mu.cov, want.cov)
    with np.load(folder / "y.npz") as archive:
        points, weights = archive["points"], archive["weights"]
    np.testing.assert_allclose(nu.mean.numpy(), np.average(points, axis=0, weights=weights))
    np.testing.assert_allclose(nu.cov.numpy(), np.cov(points.T, aweights=weights))


def test_gaussian_excludes_what_it_cannot_have(folder: Path) -> None:
    fails(solve(folder, "--gaussian", "--cost", "l1"), "ClosedForm", "linear")
    np.save(folder / "one.npy", np.zeros((1, 2)))
    command = ("solve", folder / "one.npy", folder / "y.npz", "--eps", 1, "--out", folder / "o", "--gaussian")
    fails(run(*command), "one.npy", "at least two")


@pytest.mark.parametrize("kind", [".npy", ".csv", ".npz"])
def test_histograms_with_a_cost_matrix(tmp_path: Path, kind: str) -> None:
    a, b = torch.tensor([0.2, 0.8], dtype=F64), torch.tensor([0.5, 0.25, 0.25], dtype=F64)
    cost = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 1.0]], dtype=F64)
    for name, values in (("a", a), ("b", b), ("c", cost)):
        files.write_points(tmp_path / f"{name}{kind}", values)
    paths = [tmp_path / f"{name}{kind}" for name in "abc"]
    out = tmp_path / "h.safetensors"
    assert run("solve", *paths[:2], "--cost-matrix", paths[2], "--eps", 0.5, "--out", out).exit_code == 0
    bridge = sbot.load(out)
    torch.testing.assert_close(bridge.plan(), sbot.solve_bridge(a, b, 0.5, cost=cost).plan())
    result = run("sample", out, "--t", 1, "--n", 50, "--out", tmp_path / "s.csv", "--seed", 0)
    assert result.exit_code == 0, result.output
    assert set(np.loadtxt(tmp_path / "s.csv")) <= {0.0, 1.0, 2.0}
    fails(run("sample", out, "--t", 0.5, "--n", 5, "--out", tmp_path / "s.csv"), "reference=sbot.Brownian()")
    for option in (["--gaussian"], ["--cost", "l1"]):
        command = ("solve", *paths[:2], "--cost-matrix", paths[2], "--eps", 0.5, "--out", out, *option)
        fails(run(*command), "--cost-matrix excludes " + option[0])


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "phrase"),
    [
        ("", "Missing command"),
        ("bogus", "No such command 'bogus'"),
        ("solve x.npy y.npz --out o", "--eps"),
        ("solve x.npy y.npz --eps 1", "--out"),
        ("solve x.npy --eps 1 --out o", "TARGET"),
        ("solve x.npy y.npz --eps banana --out o", "is not a number, nor 'auto'"),
        ("solve x.npy y.npz --eps -1 --out o", "eps is -1"),
        ("solve x.npy y.npz --eps nan --out o", "eps is NaN"),
        ("solve x.npy y.npz --eps 1 --out o --frobnicate", "--frobnicate"),
        ("solve x.npy y.npz --eps 1 --out o --solver magic", "sinkhorn"),
        ("solve x.npy y.npz --eps 1 --out o --cost l7", "quadratic"),
        ("solve x.npy y.npz --eps 1 --out o --cost l1 --reference vp", "drop one"),
        ("solve x.npy y.npz --eps 1 --out o --max-iter 0", "max_iter"),
        ("solve x.npy missing.npy --eps 1 --out o", "missing.npy"),
        ("solve x.npy words.txt --eps 1 --out o", ".txt"),
        ("solve x.npy flat.npy --eps 1 --out o", "--cost-matrix"),
        ("solve x.npy holes.csv --eps 1 --out o", "holes.csv points has 1 entries that are NaN"),
        ("solve x.npy wide.csv --eps 1 --out o", "both must live in the same space"),
        ("solve x.npy y.npz --eps 1 --out o.npy", ".npy"),
        ("solve x.npy y.npz --eps 1 --out nowhere/o", "nowhere"),
        ("solve x.npy y.npz --eps 1 --out .", "directory"),
        ("sample b.safetensors --t 2 --n 3 --out s.npy", "[0, 1]"),
        ("sample b.safetensors --t 0.5 --n 0 --out s.npy", "--n"),
        ("sample b.safetensors --t 0.5 --n 3 --out s.txt", ".txt"),
        ("sample b.safetensors --t 0.5 --n 3 --out s.npy --seed -1", "--seed"),
        ("sample x.npy --t 0.5 --n 3 --out s.npy", "x.npy"),
        ("transport b.safetensors --in wide.csv --out t.npy", "shape"),
        ("plot b.safetensors --out p.bmp", ".bmp"),
        ("plot b.safetensors --out p.png --kind pie", "marginals"),
        ("plot b.safetensors --out p.png --kind convergence --n 3", "'n' is not an option"),
        ("info missing.safetensors", "missing.safetensors"),
    ],
)
def test_bad_input_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch, command: str, phrase: str) -> None:
    monkeypatch.chdir(folder)
    np.save("flat.npy", np.ones(3))
    Path("words.txt").write_text("hello")
    Path("holes.csv").write_text("1,2\nnan,3\n")
    Path("wide.csv").write_text("1,2,3\n4,5,6\n")
    before = sorted(folder.iterdir())
    fails(run(*command.split()), phrase)
    assert sorted(folder.iterdir()) == before  # and nothing is left behind


@pytest.mark.parametrize("out", ["o.npy", "nowhere/o.safetensors", "."])
def test_the_output_is_checked_before_the_work(folder: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    def late(*_: Any, **__: Any) -> None:
        raise AssertionError("worked first")

    monkeypatch.chdir(folder)
    monkeypatch.setattr(cli, "_problem", late)
    monkeypatch.setattr(cli, "load", late)
    fails(run("solve", "x.npy", "y.npz", "--eps", 1, "--out", out))
    fails(run("sample", "b.safetensors", "--t", 0, "--n", 1, "--out", out.replace(".npy", ".txt")))
    fails(run("transport", "b.safetensors", "--in", "x.npy", "--out", out.replace(".npy", ".txt")))
    fails(run("plot", "b.safetensors", "--out", out))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a directory that even root cannot write into")
def test_an_unwritable_directory(folder: Path) -> None:
    command = ("solve", folder / "x.npy", folder / "y.npz", "--eps", 1, "--out", "/proc/self/o.safetensors")
    fails(run(*command), "cannot write into /proc/self")


@pytest.mark.parametrize(
    ("error", "phrase"),
    [
        (MemoryError("a dense plan needs 9 GiB; ask for less"), "out of memory: a dense plan needs 9 GiB"),
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (OSError(28, "No space left on device", "b.npy"), "b.npy: No space left on device"),
        (sbot.NumericalError("first\n  second"), "first; second"),
    ],
)
def test_what_fails_midway_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, phrase: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "load", fail)
    fails(run("info", folder / "b.safetensors"), phrase)


def test_ctrl_c_is_130(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sbot.Sinkhorn, "solve", interrupt)
    fails(solve(folder), "interrupted", code=130)
    assert not (folder / "new.safetensors").exists()


def test_a_bug_is_not_hidden(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: Any, **__: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(cli, "load", bug)
    assert isinstance(run("info", folder / "b.safetensors").exception, RuntimeError)


# ---- the other commands --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", files.ARRAYS)
def test_sample_is_the_process_and_is_seeded(folder: Path, suffix: str) -> None:
    drawn = []
    for seed in (1, 1, 2):
        out = folder / f"s{suffix}"
        result = run("sample", folder / "b.safetensors", "--t", 0.5, "--n", 9, "--out", out, "--seed", seed)
        assert result.exit_code == 0, result.output
        assert f"seed {seed}" in result.stdout
        drawn.append(files.read_points(out)[0])
    want = sbot.load(folder / "b.safetensors").interpolate(0.5, 9, generator=torch.Generator().manual_seed(1))
    assert torch.equal(drawn[0], want)
    assert torch.equal(drawn[1], want)
    assert not torch.equal(drawn[2], want)


def test_sample_without_a_seed_is_new_each_time(folder: Path) -> None:
    state = torch.get_rng_state()
    for name in ("s.npy", "t.npy"):
        run("sample", folder / "b.safetensors", "--t", 0.5, "--n", 9, "--out", folder / name)
    assert not np.array_equal(np.load(folder / "s.npy"), np.load(folder / "t.npy"))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("t", [0, 1])
def test_samples_of_the_ends_are_atoms(folder: Path, t: int) -> None:
    run("sample", folder / "b.safetensors", "--t", t, "--n", 20, "--out", folder / "s.npy")
    atoms = sbot.load(folder / "b.safetensors").problem.values[t]
    assert atoms is not None
    assert float(torch.cdist(torch.from_numpy(np.load(folder / "s.npy")), atoms).min(1)[0].max()) < 1e-7


@pytest.mark.parametrize("suffix", files.ARRAYS)
def test_transport(folder: Path, suffix: str) -> None:
    points, weights = torch.linspace(-1, 1, 8, dtype=F64).reshape(4, 2), torch.arange(1.0, 5.0, dtype=F64)
    files.write_points(folder / f"in{suffix}", points, weights)
    result = run(
        "transport", folder / "b.safetensors", "--in", folder / f"in{suffix}", "--out", folder / f"out{suffix}"
    )
    assert result.exit_code == 0, result.output
    moved, kept = files.read_points(folder / f"out{suffix}")
    torch.testing.assert_close(moved, sbot.load(folder / "b.safetensors").transport(points), rtol=0, atol=1e-14)
    if suffix in (".npz", ".safetensors"):
        assert kept is not None
        assert torch.equal(kept, weights)


def test_info_says_everything(folder: Path) -> None:
    text = run("info", folder / "b.safetensors").stdout
    bridge = sbot.load(folder / "b.safetensors")
    for value in (bridge.cost(), bridge.linear_cost(), bridge.gap()):
        assert f"{float(value):.9g}" in text
    report = bridge.report
    for phrase in (
        "Discrete(n=30, d=2",
        "Brownian()",
        "hard, hard",
        report.solver,
        "yes (tolerance)",
        f"{report.error:.3e}",
        f"{report.tolerance:.3e}",
        f"{len(report.history)} checks",
        f"sbot {sbot.__version__}, torch {torch.__version__}",
    ):
        assert phrase in text


@pytest.mark.parametrize("kind", ["auto", "plan", "paths", "marginals", "convergence"])
def test_plot(folder: Path, kind: str) -> None:
    result = run("plot", folder / "b.safetensors", "--kind", kind, "--out", folder / "p.png")
    assert result.exit_code == 0, result.output
    assert (folder / "p.png").read_bytes().startswith(b"\x89PNG")


def test_plot_of_an_animation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "animation", functools.partial(plot.animation, frames=2))
    result = run("plot", folder / "b.safetensors", "--n", 5, "--out", folder / "p.gif")
    assert result.exit_code == 0, result.output
    assert (folder / "p.gif").read_bytes().startswith(b"GIF89a")


def test_plot_of_what_does_not_exist(folder: Path) -> None:
    solve(folder, "--cost", "l1", "--tol", 1e-2)
    command = ("plot", folder / "new.safetensors", "--kind", "paths", "--out", folder / "p.png")
    fails(run(*command), "sbot.Brownian()")
    assert not (folder / "p.png").exists()


def test_version_and_help() -> None:
    assert run("--version").stdout == f"sbot {sbot.__version__}\n"
    assert run("--help").exit_code == 0
    for name in ("solve", "sample", "transport", "info", "plot", "demo"):
        assert name in run("--help").stdout
        assert run(name, "--help").exit_code == 0


# ---- the real thing ------------------------------------------------------------------------------------------------


def _python(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **options)


def test_help_imports_no_library_it_does_not_need() -> None:
    result = _python("-X", "importtime", "-m", "sbot", "--help")
    assert result.returncode == 0
    assert "Usage: sbot" in result.stdout
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in result.stderr.splitlines()}
    assert "torch" in imported  # the list is a list
    assert not imported & {"matplotlib", "ot", "sklearn", "scipy"}


def test_in_a_pipe_not_converged_is_one_line_and_exit_2(folder: Path) -> None:
    out = folder / "new.safetensors"
    command = ("-m", "sbot", "solve", folder / "x.npy", folder / "y.npz", "--eps", 0.3, "--max-iter", 2, "--out", out)
    result = _python(*command)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("sbot: warning: NOT converged")
    assert "wrote" in result.stdout
    assert not sbot.load(out).report.converged


def test_on_a_terminal_there_is_a_progress_bar(folder: Path) -> None:
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # a new terminal has no width
    command = [sys.executable, "-m", "sbot", "solve", "x.npy", "y.npz", "--eps", "0.3", "--out", "o"]
    subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=follower, check=True, timeout=120)
    os.close(follower)
    seen = b""
    try:
        while chunk := os.read(leader, 4096):
            seen += chunk
    except OSError:  # Linux says so at the end of a terminal
        pass
    os.close(leader)
    assert b"Sinkhorn" in seen
    assert b"it/s" in seen
