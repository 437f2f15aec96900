"""A training that is killed or stopped anywhere goes on to the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sbot
from sbot.neural import run

from . import KINDS, LAST, STEPS, Child, Dropping, assert_same, at, leftovers, state, train
from . import few_samples as few_samples


@pytest.fixture(scope="module", params=KINDS)
def whole(request, tmp_path_factory) -> tuple[str, Path]:
    """A training of each kind that nothing disturbed."""
    from . import quick

    folder = tmp_path_factory.mktemp("whole") / request.param
    with quick():
        train(request.param, folder)
    assert state(folder)[0]["done"] == STEPS[request.param]
    return request.param, folder


def killed(say, kind: str, folder: str, step: int, number: int = signal.SIGKILL) -> None:
    train(kind, folder, callbacks=(at(step, lambda: os.kill(os.getpid(), number)),))


def finished(say, kind: str, folder: str) -> list[tuple[int, float, float]]:
    return list(train(kind, folder).report.history)


@pytest.mark.parametrize("steps", [(3, 33, 40, 41, 77, 113), (7, 28, 60, 79)], ids=["between saves", "at saves"])
def test_a_killed_training_goes_on_to_the_same_bits(whole, tmp_path: Path, steps) -> None:
    """Before the first checkpoint, in the middle of a cache, at the last step of a half-step, just after it."""
    kind, straight = whole
    for step in steps:
        if step < STEPS[kind]:
            code, said = Child(killed, kind, str(tmp_path), step).end()
            assert code == -signal.SIGKILL, said
    code, said = Child(finished, kind, str(tmp_path)).end()
    assert code == 0, said
    assert_same(straight, tmp_path)
    assert leftovers(tmp_path) == []


def saving(say, kind: str, folder: str) -> None:
    first = []
    train(kind, folder, save_every=1, callbacks=(lambda state: None if first else first.append(say("READY")),))


@pytest.mark.parametrize("kind", KINDS)
def test_kills_at_any_moment(whole, tmp_path: Path, kind: str) -> None:
    """From outside, wherever it happens to be; it saves at every step, so most kills fall into a save."""
    if kind != whole[0]:
        pytest.skip("the undisturbed training is of the other kind")
    kills = 0
    for attempt in range(6):
        child = Child(saving, kind, str(tmp_path))
        if child.hear() != "READY":
            break
        time.sleep(0.02 + 0.03 * attempt)
        child.signal(signal.SIGKILL)
        kills += child.end()[0] == -signal.SIGKILL
    assert kills >= 2
    code, said = Child(saving, kind, str(tmp_path)).end()
    assert code == 0, said
    assert_same(whole[1], tmp_path)
    assert leftovers(tmp_path) == []


def killed_in_a_save(say, kind: str, folder: str, call: str, count: int) -> None:
    """Die before one call of a function of the system, the ``count``-th from step 50 on."""
    inner, calls = getattr(os, call), []

    def die(*args):
        calls.append(args)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*args)

    train(kind, folder, callbacks=(at(50, lambda: setattr(os, call, die)),))


@pytest.mark.parametrize(("call", "count"), [("fsync", 1), ("replace", 1), ("replace", 2), ("chmod", 1)])
def test_a_kill_inside_a_save_leaves_a_checkpoint(whole, tmp_path: Path, call: str, count: int) -> None:
    """While the file is written, before the old one is put aside, before the new one takes its place."""
    kind, straight = whole
    code, said = Child(killed_in_a_save, kind, str(tmp_path), call, count).end()
    assert code == -signal.SIGKILL, said
    assert (call == "replace" and count == 1) or [name for name in leftovers(tmp_path) if name.endswith(".tmp")]
    name = LAST if (tmp_path / LAST).exists() else "previous.safetensors"
    assert state(tmp_path, name)[0]["done"] == 49
    assert Child(finished, kind, str(tmp_path)).end()[0] == 0
    assert_same(straight, tmp_path)
    assert leftovers(tmp_path) == []


def test_what_is_no_orphan_of_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".notes.tmp").write_text("mine")
    train("dsbm", tmp_path, steps=2)
    assert leftovers(tmp_path) == [".notes.tmp"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [31, 40])
def test_a_signal_stops_at_the_next_step_with_a_checkpoint(whole, tmp_path: Path, number: int, step: int) -> None:
    kind, straight = whole
    code, said = Child(killed, kind, str(tmp_path), step, number).end()
    assert code == {signal.SIGINT: 130, signal.SIGTERM: 143}[number], said
    assert state(tmp_path)[0]["done"] == step + 1
    assert Child(finished, kind, str(tmp_path)).end()[0] == 0
    assert_same(straight, tmp_path)


SCRIPT = """
import torch, sbot
torch.set_num_threads(1)
x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
print("READY", flush=True)
fit = sbot.FitConfig(steps=10**6, batch=8, folder={folder!r}, callbacks=({call},))
sbot.solve_bridge(x, x + 1, 1.0, solver=sbot.DSBM(net=sbot.TimeMLP(2, 8, 1), steps=2, pairs=8, fit=fit))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_program_ends_as_programs_do(tmp_path: Path, number: int) -> None:
    script = SCRIPT.format(folder=str(tmp_path / "run"), call='lambda s: s.iteration == 3 and print("GO", flush=True)')
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.stdout is not None
    assert [child.stdout.readline().strip() for _ in range(2)] == [b"READY", b"GO"]
    os.kill(child.pid, number)
    # an interrupted Python dies of the signal, which a shell shows as 130
    assert child.wait(30) == {signal.SIGINT: -signal.SIGINT, signal.SIGTERM: 143}[number]
    child.stdout.close()
    assert state(tmp_path / "run")[0]["done"] >= 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_last_step_is_not_lost(tmp_path: Path, number: int) -> None:
    want = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}[number]
    with pytest.raises(want):
        train("dsbm", tmp_path, callbacks=(at(STEPS["dsbm"], lambda: os.kill(os.getpid(), number)),))
    assert state(tmp_path)[0]["done"] == STEPS["dsbm"]
    assert train("dsbm", tmp_path).report.iterations == STEPS["dsbm"]


def stuck(say, folder: str) -> None:
    run.IMPATIENT = 0.2

    def draw(n: int, generator: torch.Generator | None) -> torch.Tensor:
        if os.path.exists(os.path.join(folder, LAST)):
            say("READY")
            time.sleep(60)
        return torch.randn(n, 2, generator=generator)

    solver = sbot.DSBM(steps=2, pairs=8, refresh=2, fit=sbot.FitConfig(steps=10, batch=8, folder=folder, save_every=1))
    sbot.solve_bridge(sbot.Sampler(draw), torch.zeros(3, 2), 1.0, solver=solver)


def test_a_second_signal_does_not_wait_for_a_step_that_never_ends(tmp_path: Path) -> None:
    child = Child(stuck, str(tmp_path))
    assert child.hear() == "READY"
    child.signal(signal.SIGINT)
    time.sleep(0.1)
    child.signal(signal.SIGINT)  # launchers send two at once: still patient
    time.sleep(0.4)
    assert child.process.is_alive()
    began = time.monotonic()
    child.signal(signal.SIGINT)
    assert child.end()[0] == 130
    assert time.monotonic() - began < 20


def test_checkpoints_change_nothing(whole) -> None:
    kind, folder = whole
    tensors = state(folder)[1]
    names = {1: "both" if kind == "dsbm" else "forward", -1: "both" if kind == "dsbm" else "backward"}
    bridge = train(kind)
    for steering in (bridge.forward, bridge.backward):
        assert steering.net is not None
        for name, tensor in steering.net.state_dict().items():
            assert torch.equal(tensor, tensors[f"{names[steering.direction]}.average.{name}"])


def test_a_finished_training_is_not_trained_again(whole) -> None:
    kind, folder = whole
    before = (folder / LAST).read_bytes()
    calls: list[sbot.Progress] = []
    again = train(kind, folder, callbacks=(calls.append,))
    assert calls == [] and again.report.iterations == STEPS[kind]
    assert [list(row) for row in again.report.history] == state(folder)[0]["history"]
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.drift(0.5, x), train(kind).drift(0.5, x))
    if kind == "dsb":
        assert (folder / LAST).read_bytes() == before


def test_a_stalled_training_stays_stalled(tmp_path: Path) -> None:
    exact = sbot.solve_bridge(*ends_of(), 1.0)
    from . import make

    solver = make("dsb", tmp_path, options={"half_steps": 40, "patience": 1, "tol": 1e-9}, steps=3)
    reports = []
    for _ in range(2):
        with pytest.warns(sbot.NotConverged, match="stalled"):
            reports.append(sbot.solve_bridge(*ends_of(), 1.0, solver=solver, init=exact).report)
    assert reports[0].iterations == reports[1].iterations < 120
    assert reports[0].history == reports[1].history


def ends_of():
    from . import ends

    return ends()


def dropped(say, folder: str, step: int) -> None:
    train("dsb", folder, Dropping(), callbacks=(at(step, lambda: os.kill(os.getpid(), signal.SIGKILL)),))


def test_networks_that_draw_random_numbers_go_on_to_the_same_bits(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    before = torch.random.get_rng_state()
    train("dsb", one, Dropping())
    assert torch.equal(before, torch.random.get_rng_state())
    assert Child(dropped, str(two), 50).end()[0] == -signal.SIGKILL
    assert Child(dropped, str(two), -1).end()[0] == 0
    assert_same(one, two)


def test_a_callback_that_stops_leaves_a_checkpoint_of_then(tmp_path: Path) -> None:
    for kind in KINDS:
        folder = tmp_path / kind
        stopped = train(kind, folder, callbacks=(lambda state: state.iteration == 45,))
        assert stopped.report.iterations == 45 and state(folder)[0]["done"] == 45
        assert train(kind, folder).report.iterations == STEPS[kind]
