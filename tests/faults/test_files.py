"""Full disks, damaged and malicious checkpoints, folders of another run or in use or that cannot be written."""

from __future__ import annotations

import io as bytes_io
import pickle
import resource
import signal
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sbot
from sbot import io

from . import KINDS, LAST, PREVIOUS, STEPS, Child, assert_same, at, ends, leftovers, make, net, state, train
from . import few_samples as few_samples


@pytest.fixture(scope="module", params=KINDS)
def whole(request, tmp_path_factory) -> tuple[str, Path]:
    """A training of each kind that nothing disturbed."""
    from . import quick

    folder = tmp_path_factory.mktemp("whole") / request.param
    with quick():
        train(request.param, folder)
    return request.param, folder


# ---- the disk ----------------------------------------------------------------------------------------------------------


def disk_full(say, kind: str, folder: str, step: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    train(kind, folder, callbacks=(at(step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)),))


def test_a_full_disk_keeps_the_checkpoint_before_it(whole, tmp_path: Path) -> None:
    kind, straight = whole
    code, said = Child(disk_full, kind, str(tmp_path), 50).end()
    assert code == 1 and said[1] == "OSError" and "the one before it is kept" in said[2]
    assert leftovers(tmp_path) == []
    name = LAST if (tmp_path / LAST).exists() else PREVIOUS
    assert state(tmp_path, name)[0]["done"] == 49
    train(kind, tmp_path)
    assert_same(straight, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_cannot_be_written_is_found_before_any_training(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    calls: list[sbot.Progress] = []
    for bad in (tmp_path / "file", tmp_path / "file" / "run", "run\0"):
        with pytest.raises(sbot.InvalidProblem, match=r"cannot be written.*give another folder"):
            train(kind, bad, callbacks=(calls.append,))
    assert calls == [] and (tmp_path / "file").read_text() == "not a folder"


def test_a_folder_may_be_new_deep_and_of_any_script(tmp_path: Path) -> None:
    folder = tmp_path / "neu" / "brücke 橋"
    train("dsbm", folder, steps=8)
    assert state(folder)[0]["done"] == 8


# ---- damaged files -----------------------------------------------------------------------------------------------------


def copied(straight: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name in (LAST, PREVIOUS):
        (folder / name).write_bytes((straight / name).read_bytes())
    return folder / LAST


@pytest.mark.parametrize("damage", ["empty", "cut in the header", "cut in the tensors", "header", "first", "last"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(whole, tmp_path: Path, damage: str) -> None:
    kind, straight = whole
    file = copied(straight, tmp_path)
    data = bytearray(file.read_bytes())
    size = int.from_bytes(data[:8], "little")
    if damage == "empty":
        data = bytearray()
    elif damage == "cut in the header":
        data = data[: size // 2]
    elif damage == "cut in the tensors":
        data = data[:-100]
    else:
        data[{"header": size // 3, "first": 8 + size + 1, "last": -1}[damage]] ^= 0x10
    file.write_bytes(data)
    with pytest.warns(UserWarning, match=f"{LAST} .*going on from {PREVIOUS}"):
        train(kind, tmp_path)
    assert_same(straight, tmp_path)


def test_every_bit_of_a_checkpoint_is_under_the_digest(whole, tmp_path: Path) -> None:
    file = copied(whole[1], tmp_path)
    data = file.read_bytes()
    places = torch.randint(len(data), (60,), generator=torch.Generator().manual_seed(0)).tolist()
    for place in [0, 7, 8, len(data) - 1, *places]:
        flipped = bytearray(data)
        flipped[place] ^= 1 << (place % 8)
        file.write_bytes(flipped)
        with pytest.raises(sbot.InvalidFile, match=LAST):
            io.read(file, "checkpoint")
    for length in range(0, len(data), max(7, len(data) // 60)):
        file.write_bytes(data[:length])
        with pytest.raises(sbot.InvalidFile, match=LAST):
            io.read(file, "checkpoint")


def test_where_no_checkpoint_is_intact_nothing_is_overwritten(whole, tmp_path: Path) -> None:
    kind, straight = whole
    copied(straight, tmp_path)
    for name in (LAST, PREVIOUS):
        (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(sbot.InvalidFile, match="give another folder= to start anew"):
        train(kind, tmp_path)
    assert all((tmp_path / name).read_bytes() == b"damaged" for name in (LAST, PREVIOUS))


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self):
        return (open, (self.marker, "w"))


def evil(kind: str, marker: Path) -> bytes:
    trap = pickle.dumps(Trap(str(marker)))
    buffer = bytes_io.BytesIO()
    if kind == "pickle":
        return trap
    if kind == "torch":
        torch.save({"weights": Trap(str(marker))}, buffer)
    elif kind == "numpy":
        np.save(buffer, np.array([Trap(str(marker))], dtype=object), allow_pickle=True)
    elif kind == "bomb":
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("data.pkl", b"\0" * 10_000_000)
    elif kind == "huge header":
        return (4 * 2**40).to_bytes(8, "little") + b"{}"
    else:  # a header that claims tensors beyond the end
        header = (
            b'{"__metadata__":{"format":"sbot","version":"1"},"w":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'
        )
        return len(header).to_bytes(8, "little") + header
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["pickle", "torch", "numpy", "bomb", "huge header", "short"])
def test_a_malicious_checkpoint_runs_nothing(kind: str, tmp_path: Path) -> None:
    marker, folder = tmp_path / "marker", tmp_path / "run"
    folder.mkdir()
    data = evil(kind, marker)
    (folder / LAST).write_bytes(data)
    with pytest.raises(sbot.InvalidFile, match="no checkpoint can be read"):
        train("dsbm", folder)
    assert not marker.exists() and (folder / LAST).read_bytes() == data


def test_the_trap_is_one(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(str(tmp_path / "marker")))).close()
    assert (tmp_path / "marker").exists()


# ---- another run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lr": 1e-3}, "solver.fit.lr: 0.005 there, 0.001 here"),
        ({"seed": 1}, "solver.fit.seed: 0 there, 1 here"),
        ({"steps": 10}, "solver.fit.steps"),
        ({"module": net(17)}, "networks"),
        ({"options": {"steps": 6}}, "solver.steps"),
    ],
    ids=["rate", "seed", "length", "network", "grid"],
)
def test_a_folder_of_other_settings_is_refused_with_the_differences(whole, tmp_path: Path, change, said: str) -> None:
    kind, straight = whole
    before = copied(straight, tmp_path).read_bytes()
    with pytest.raises(sbot.InvalidProblem, match=f"(?s)other settings.*{said}.*resume='force'"):
        train(kind, tmp_path, **change)
    assert (tmp_path / LAST).read_bytes() == before


@pytest.mark.parametrize("change", ["marginal", "eps", "reference", "solver"])
def test_a_folder_of_another_problem_is_refused(whole, tmp_path: Path, change: str) -> None:
    kind, straight = whole
    copied(straight, tmp_path)
    mu, nu = ends()
    mu = sbot.Gaussian(mu.mean + 1, mu.cov) if change == "marginal" else mu
    reference = sbot.OrnsteinUhlenbeck(1.0) if change == "reference" else sbot.Brownian()
    kind = {"dsb": "dsbm", "dsbm": "dsb"}[kind] if change == "solver" else kind
    with pytest.raises(sbot.InvalidProblem, match="holds a run of another problem"):
        sbot.solve_bridge(mu, nu, 2.0 if change == "eps" else 1.0, reference=reference, solver=make(kind, tmp_path))


def test_a_checkpoint_of_another_version_is_refused(whole, tmp_path: Path) -> None:
    kind, straight = whole
    file = copied(straight, tmp_path)
    header, tensors = io.read(file, "checkpoint")
    header["identity"]["version"] += 1
    io.write(file, "checkpoint", header, tensors)
    with pytest.raises(sbot.InvalidProblem, match="version: 2 there, 1 here"):
        train(kind, tmp_path)


def test_force_goes_on_and_says_so(whole, tmp_path: Path) -> None:
    kind, straight = whole
    copied(straight, tmp_path)
    longer = 2 * make(kind).fit.steps
    with pytest.warns(UserWarning, match="(?s)going on from a run that differs.*solver.fit.steps"):
        bridge = train(
            kind, tmp_path, resume="force", **({"steps": longer} if kind == "dsbm" else {"lr": 1e-3, "steps": 45})
        )
    assert bridge.report.iterations >= STEPS[kind]
    with (
        pytest.raises(sbot.InvalidFile, match="does not fit these networks"),
        pytest.warns(UserWarning, match="differs"),
    ):
        train(kind, tmp_path, module=net(17), resume="force")


def test_never_starts_in_a_used_folder(whole, tmp_path: Path) -> None:
    kind, straight = whole
    copied(straight, tmp_path)
    with pytest.raises(sbot.InvalidProblem, match="holds a run already"):
        train(kind, tmp_path, resume="never")


# ---- two processes, one folder -----------------------------------------------------------------------------------------


def holding(say, folder: str) -> None:
    train("dsbm", folder, callbacks=(at(9, lambda: (say("READY"), time.sleep(60))),))


def test_a_folder_in_use_is_refused_and_a_dead_owner_frees_it(tmp_path: Path) -> None:
    child = Child(holding, str(tmp_path))
    assert child.hear() == "READY"
    with pytest.raises(sbot.InvalidProblem, match=f"in use by process {child.process.pid}"):
        train("dsbm", tmp_path)
    child.signal(signal.SIGKILL)
    child.end()
    assert train("dsbm", tmp_path).report.iterations == STEPS["dsbm"]


def _shifted(by: float) -> sbot.Sampler:
    return sbot.Sampler(lambda n, generator: torch.randn(n, 2, generator=generator) + by)


def test_a_folder_is_known_by_what_functions_answer(tmp_path: Path) -> None:
    """Samplers, drifts and bridges to start from have one name and other numbers."""
    short = sbot.FitConfig(steps=3, batch=8)
    mu = sbot.Gaussian(torch.zeros(2), torch.eye(2))

    def run(name: str, nu: sbot.Sampler, reference: Any = None, init: Any = None) -> None:
        fit = sbot.FitConfig(steps=3, batch=8, folder=tmp_path / name)
        solver = sbot.DSB(rounds=1, steps=4, fit=fit, tol=1e9)
        sbot.solve_bridge(mu, nu, 1.0, reference=reference, solver=solver, init=init)

    starts = [
        sbot.solve_bridge(mu, _shifted(0.0), 1.0, solver=sbot.DSBM(pairs=16, fit=fit, tol=1e9))
        for fit in (short, sbot.FitConfig(steps=3, batch=8, seed=1))
    ]
    same: dict[str, Any] = {"nu": _shifted(0.0)}
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("marginal", same, {"nu": _shifted(5.0)}),
        (
            "drift",
            same | {"reference": sbot.Diffusion(lambda t, x: -3 * x)},
            same | {"reference": sbot.Diffusion(lambda t, x: 0 * x)},
        ),
        ("start", same | {"init": starts[0]}, same | {"init": starts[1]}),
    ]
    for name, first, other in cases:
        run(name, **first)
        run(name, **first)  # goes on
        with pytest.raises(sbot.InvalidProblem, match=r"holds a run of another problem|other settings"):
            run(name, **other)


def test_a_start_from_another_drift_of_the_same_name_is_refused() -> None:
    one = sbot.Gaussian([0.0], [[1.0]])
    references = [sbot.Diffusion(lambda t, x, a=a: a * x) for a in (-3.0, 0.0)]
    solver = sbot.DSB(rounds=1, steps=4, fit=sbot.FitConfig(steps=2, batch=8), tol=1e9)
    start = sbot.solve_bridge(one, one, 1.0, reference=references[0], solver=solver)
    sbot.solve_bridge(one, one, 1.0, reference=references[0], solver=solver, init=start)
    with pytest.raises(sbot.InvalidProblem, match="start from a bridge of the same reference"):
        sbot.solve_bridge(one, one, 1.0, reference=references[1], solver=solver, init=start)
    linear = [sbot.LinearSDE(lambda t, a=a: torch.tensor(a)) for a in (-3.0, 0.0)]
    start = sbot.solve_bridge(one, one, 1.0, reference=linear[0])
    with pytest.raises(sbot.InvalidProblem, match="start from a bridge of the same reference"):
        sbot.solve_bridge(one, one, 1.0, reference=linear[1], solver=solver, init=start)
    teacher = sbot.DSBM(init=start, hold=1.0, fit=sbot.FitConfig(steps=2, batch=8), tol=1e9)
    with pytest.raises(sbot.InvalidProblem, match="start from a bridge of the same reference"):
        sbot.solve_bridge(one, one, 1.0, reference=linear[1], solver=teacher)
