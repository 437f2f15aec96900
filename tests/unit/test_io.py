"""Files: bridges come back as they were, damaged ones are refused, nothing is executed."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import safetensors.torch
import torch

import sbot
from sbot import io

from ..conftest import clouds, spd, weights


def problems(gen):
    x, y = clouds(8, 9, 2, gen)
    a, b = weights(8, generator=gen), weights(9, generator=gen)
    m = torch.rand(8, 9, generator=gen, dtype=torch.float64)
    m[0, 1] = torch.inf
    mu, nu = (sbot.Gaussian(torch.randn(2, generator=gen).double(), spd(2, gen)) for _ in range(2))
    eye = torch.eye(2)
    return {
        "points": ((x, a), (y, b), {}),
        "float32": (x.float(), y.float(), {}),
        "half": (x.half(), y.half(), {}),
        "relaxed": ((x, a), (y, b), {"relax": (1.0, float("inf"))}),
        "batch": (x.expand(2, 8, 2), y.expand(2, 9, 2), {}),
        "ou": (x, y, {"reference": sbot.OrnsteinUhlenbeck(1.5, [0.1, 0.2])}),
        "vp": (x, y, {"reference": sbot.LinearSDE.vp(0.1, 4.0)}),
        "constant": (x, y, {"reference": sbot.LinearSDE(eye, 0.1, eye)}),
        "lp": (x, y, {"cost": sbot.Lp(float("inf"), 2)}),
        "cosine": (x, y, {"cost": sbot.Cosine()}),
        "static quadratic": (x, y, {"cost": sbot.Quadratic()}),
        "histograms": (a, b, {"cost": m}),
        "points and matrix": ((x, a), (y, b), {"cost": m}),
        "gaussians": (mu, nu, {}),
        "gaussians vp": (mu, nu, {"reference": sbot.LinearSDE.vp(0.1, 4.0)}),
    }


@pytest.fixture(params=problems(torch.Generator().manual_seed(0)).values(), ids=problems(torch.Generator()).keys())
def bridge(request):
    mu, nu, options = request.param
    return sbot.solve_bridge(mu, nu, 0.3, **options)


def test_round_trip_is_exact(bridge, tmp_path):
    path = tmp_path / "bridge.safetensors"
    bridge.save(path)
    back = sbot.load(path)
    assert back.report == bridge.report
    assert repr(back) == repr(bridge)
    plan, again = bridge.plan(), back.plan()
    if isinstance(plan, sbot.Gaussian):
        plan, again = plan.cov, again.cov
    assert torch.equal(plan, again)
    assert again.dtype == plan.dtype
    assert torch.equal(bridge.cost(), back.cost())
    if bridge.problem.mu.event_shape and not isinstance(bridge.problem.reference, sbot.Static):
        z = bridge.problem.mu.sample(3, generator=torch.Generator().manual_seed(0))
        assert torch.equal(bridge.drift(0.3, z), back.drift(0.3, z))
        paths = [b.sample_paths(3, [0.0, 0.5, 1.0], generator=torch.Generator().manual_seed(0)) for b in (bridge, back)]
        assert torch.equal(*paths)
    again_path = tmp_path / "again.safetensors"
    back.save(again_path)
    assert torch.equal(sbot.load(again_path).cost(), bridge.cost())


def test_to_another_dtype(bridge):
    single = bridge.to(dtype=torch.float32)
    assert single.cost().dtype == torch.float32
    torch.testing.assert_close(single.cost().double(), bridge.cost().double(), rtol=2e-3, atol=2e-3)


def simple(tmp_path):
    x, y = clouds(3, 4, 2, torch.Generator().manual_seed(0))
    path = tmp_path / "b.safetensors"
    sbot.solve_bridge(x, y, 0.5).save(path)
    return path


def test_every_flipped_bit_and_every_truncation_is_found(tmp_path):
    path = simple(tmp_path)
    data = path.read_bytes()
    broken = tmp_path / "broken.safetensors"
    for k in range(len(data)):
        flipped = bytearray(data)
        flipped[k] ^= 1 << (k % 8)
        broken.write_bytes(flipped)
        with pytest.raises(sbot.InvalidFile, match=r"broken\.safetensors"):
            sbot.load(broken)
    for size in range(0, len(data), 7):
        broken.write_bytes(data[:size])
        with pytest.raises(sbot.InvalidFile):
            sbot.load(broken)
    broken.write_bytes(data + b"\0")
    with pytest.raises(sbot.InvalidFile):
        sbot.load(broken)


def test_foreign_and_malicious_files_run_nothing(tmp_path):
    marker = tmp_path / "marker"

    class Bomb:
        def __reduce__(self):
            return (os.system, (f"touch {marker}",))

    path = tmp_path / "evil"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(sbot.InvalidFile):
        sbot.load(path)
    torch.save({"a": Bomb()}, path)
    with pytest.raises(sbot.InvalidFile):
        sbot.load(path)
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(sbot.InvalidFile):
        sbot.load(path)
    path.write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000)
    with pytest.raises(sbot.InvalidFile):
        sbot.load(path)
    safetensors.torch.save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(sbot.InvalidFile, match="not an sbot file"):
        sbot.load(path)
    path.write_bytes(b"")
    with pytest.raises(sbot.InvalidFile):
        sbot.load(path)
    with pytest.raises(FileNotFoundError):
        sbot.load(tmp_path / "absent")
    assert not marker.exists()


def test_a_newer_version_and_another_kind_say_so(tmp_path, monkeypatch):
    path = tmp_path / "new.safetensors"
    monkeypatch.setattr(io, "VERSION", 99)
    io.write(path, "bridge", {}, {"x": torch.zeros(1)})
    monkeypatch.undo()
    with pytest.raises(sbot.InvalidFile, match="format version '99' and this release reads up to 1; upgrade sbot"):
        sbot.load(path)
    io.write(path, "network", {}, {"x": torch.zeros(1)})
    with pytest.raises(sbot.InvalidFile, match="holds a network, not a bridge"):
        sbot.load(path)
    io.write(path, "bridge", {"eps": 1.0}, {"x": torch.zeros(1)})
    with pytest.raises(sbot.InvalidFile, match="does not hold a bridge"):
        sbot.load(path)


def test_forged_content_is_refused(tmp_path):
    """A file with a right digest and a wrong content is input like any other."""
    header, tensors = io.read(simple(tmp_path), "bridge")
    path = tmp_path / "forged.safetensors"
    short = tensors["phi.log_weights"][:2].clone()
    wide = torch.zeros(3, 5, dtype=torch.float64)
    for said, held in [
        ({"eps": -1.0}, {}),
        ({"result_dtype": "load"}, {}),
        ({"result_dtype": "int32"}, {}),
        ({"relax": [1.0]}, {}),
        ({"relax": "no"}, {}),
        ({"mu": {"kind": "Sampler", "parts": []}}, {}),
        ({"reference": {"kind": "Levy"}}, {}),
        ({"phi": {"kind": "Wavelets", "parts": []}}, {}),
        ({"report": {}}, {}),
        ({}, {"phi.log_weights": short}),
        ({}, {"mu.points": wide}),
        ({}, {"mu.weights": -tensors["mu.weights"]}),
        ({}, {"nu.points": tensors["nu.points"] * float("nan")}),
    ]:
        io.write(path, "bridge", header | said, tensors | held)
        with pytest.raises(sbot.InvalidFile) as caught:
            sbot.load(path)
        assert str(caught.value).count("InvalidFile") == 0


def test_a_cost_of_one_s_own_is_asked_for_again(tmp_path):
    x, y = clouds(5, 6, 2, torch.Generator().manual_seed(0))
    mine = lambda x, y: torch.cdist(x, y)  # noqa: E731
    bridge = sbot.solve_bridge(x, y, 0.5, cost=mine)
    path = tmp_path / "b.safetensors"
    bridge.save(path)
    with pytest.raises(sbot.InvalidProblem, match=r"give it again: sbot.load\(path, reference=...\)"):
        sbot.load(path)
    assert torch.equal(sbot.load(path, cost=mine).plan(), bridge.plan())
    simple_path = simple(tmp_path)
    with pytest.raises(sbot.InvalidProblem, match="holds its own reference"):
        sbot.load(simple_path, cost=mine)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = simple(tmp_path)
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(io.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        sbot.load(path).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(FileNotFoundError):
        sbot.load(path).save(tmp_path / "missing" / "b.safetensors")


def test_the_file_is_plain_safetensors(tmp_path):
    path = simple(tmp_path)
    tensors = safetensors.torch.load_file(path)
    assert set(tensors) == {"mu.points", "mu.weights", "nu.points", "nu.weights", "phi.log_weights", "psi.log_weights"}
    with safetensors.safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["header"])["eps"] == 0.5
