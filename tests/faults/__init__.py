"""What goes wrong while networks are trained: kills, full disks, damaged files, bad numbers, lost processes.

Children are forked from a server that has imported everything already, so that a kill costs no import.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sbot
from sbot import io
from sbot.neural import residual

KINDS = ["dsb", "dsbm"]
LAST, PREVIOUS = "last.safetensors", "previous.safetensors"
#: Gradient steps of the trainings below, over all half-steps.
STEPS = {"dsb": 120, "dsbm": 80}

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.faults"])


# ---- small trainings -------------------------------------------------------------------------------------------------


def ends(dtype: torch.dtype = torch.float32) -> tuple[sbot.Gaussian, sbot.Gaussian]:
    mean = torch.tensor([0.5, 0.3], dtype=dtype)
    return sbot.Gaussian(-mean, 0.5 * torch.eye(2, dtype=dtype)), sbot.Gaussian(mean, torch.eye(2, dtype=dtype))


def net(width: int = 16) -> sbot.TimeMLP:
    return sbot.TimeMLP(2, width, 1, generator=torch.Generator().manual_seed(0))


class Dropping(torch.nn.Module):
    """A network that draws random numbers itself, from the global generator as all dropout does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop = net(), torch.nn.Dropout(0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.inner(self.drop(x), t)


def make(kind: str, folder: Any = None, module: Any = None, options: Any = None, **fit: Any) -> sbot.Solver:
    """A solver that trains in a second: 3 half-steps of 40 steps with two fillings of the cache each, or 80 steps."""
    module = net() if module is None else module
    settings = {"batch": 32, "lr": 5e-3, "ema": 0.9, "warmup": 5, "folder": folder, "save_every": 7} | fit
    if kind == "dsb":
        settings = {"steps": 40} | settings
        cache = sbot.Cache(paths=64, reuse=2)
        chosen = {"steps": 5, "half_steps": 3, "cache": cache, "tol": 100.0} | (options or {})
        return sbot.DSB(net=module, fit=sbot.FitConfig(**settings), **chosen)
    settings = {"steps": 80} | settings
    chosen = {"steps": 4, "pairs": 64, "refresh": 15, "tol": 100.0} | (options or {})
    return sbot.DSBM(net=module, fit=sbot.FitConfig(**settings), **chosen)


def train(kind: str, folder: Any = None, module: Any = None, options: Any = None, **fit: Any) -> sbot.DriftBridge:
    """Train one of them between two Gaussians."""
    bridge = sbot.solve_bridge(*ends(), 1.0, solver=make(kind, folder, module, options, **fit))
    assert isinstance(bridge, sbot.DriftBridge)
    return bridge


@contextmanager
def quick() -> Iterator[None]:
    """Residuals from few samples: they are not what is tested here."""
    before = residual.SAMPLES
    residual.SAMPLES = 64
    try:
        yield
    finally:
        residual.SAMPLES = before


@pytest.fixture(autouse=True)
def few_samples():
    with quick():
        yield


def at(iteration: int, do: Callable[[], Any]) -> Callable[[sbot.Progress], None]:
    """A callback that does something after one step."""

    def call(state: sbot.Progress) -> None:
        if state.iteration == iteration:
            do()

    return call


# ---- what a folder holds ---------------------------------------------------------------------------------------------


def state(folder: Path, name: str = LAST) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a checkpoint; the time spent is left out."""
    header, tensors = io.read(folder / name, "checkpoint")
    del header["seconds"]
    return header, tensors


def assert_same(one: Path, two: Path) -> None:
    """The last checkpoints are equal bit for bit: weights, averages, optimisers, generator, cache, place, history."""
    (header, tensors), (other, others) = state(one), state(two)
    assert header == other
    assert tensors.keys() == others.keys()
    prefixes = {name.rsplit(".", 1)[0].split(".")[0] for name in tensors}
    assert {"kept", "generator"} < prefixes
    assert any(".optimiser." in name for name in tensors) and any(".average." in name for name in tensors)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


def leftovers(folder: Path) -> list[str]:
    """What a training left beside its checkpoints and its lock."""
    known = {LAST, PREVIOUS, "best.safetensors", "run.lock"}
    return sorted(path.name for path in folder.iterdir() if path.name not in known)


# ---- children --------------------------------------------------------------------------------------------------------


class Child:
    """A process of its own that runs ``function(say, *args)``; what it says, returns or raises comes back."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._ear, mouth = _SERVER.Pipe(duplex=False)
        self.process = _SERVER.Process(target=_run, args=(mouth, function, args), daemon=True)
        self.process.start()
        mouth.close()

    def hear(self, seconds: float = 60.0) -> Any:
        """The next thing it says."""
        assert self._ear.poll(seconds), "the child said nothing in time"
        return self._ear.recv()

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self, seconds: float = 60.0) -> tuple[int | None, Any]:
        """Its exit status (minus the signal that killed it) and the last thing it said."""
        said = None
        try:
            while self._ear.poll(seconds):
                said = self._ear.recv()
        except EOFError:
            pass
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"the child did not end in {seconds} s; it said {said!r}")
        self.process.close()
        return code, said


def _run(mouth: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", sbot.NotConverged)
    try:
        with quick():
            mouth.send(("returned", function(mouth.send, *args)))
    except KeyboardInterrupt:
        mouth.send(("raised", "KeyboardInterrupt", ""))
        raise SystemExit(130) from None
    except Exception as fault:
        mouth.send(("raised", type(fault).__name__, f"{fault}\n{traceback.format_exc()}"))
        raise SystemExit(1) from None
