"""Bad numbers, samplers and networks: a clear error, before any training where that can be known, and nothing left behind."""

from __future__ import annotations

import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sbot

from . import KINDS, make, net, state, train
from . import few_samples as few_samples

SOLVERS = {"dsb": sbot.DSB, "dsbm": sbot.DSBM}


# ---- numbers -----------------------------------------------------------------------------------------------------------


class Breaks(torch.nn.Module):
    """A network that answers wrongly from the n-th training step on."""

    def __init__(self, step: int, how: str) -> None:
        super().__init__()
        self.inner, self.left, self.how = net(), step, how

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.inner(x, t)
        if not torch.is_grad_enabled():  # simulation
            return out
        self.left -= 1
        if self.left > 0:
            return out
        if self.how == "gradient":  # a finite loss whose gradient is not
            return out + (out - out.detach()).abs().sqrt()
        return out * {"nan": torch.nan, "inf": torch.inf, "overflow": 1e30}[self.how] + 1e30


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["nan", "inf", "overflow", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_with_the_last_good_weights(
    kind: str, how: str, tmp_path: Path
) -> None:
    with pytest.raises(sbot.NumericalError, match=r"network '(backward|both)' at step .* smaller lr or clip"):
        train(kind, tmp_path, Breaks(24, how), save_every=7)
    header, tensors = state(tmp_path)
    assert header["done"] == 21
    assert all(bool(torch.isfinite(value).all()) for value in tensors.values() if value.is_floating_point())


# ---- samplers ----------------------------------------------------------------------------------------------------------


def later(bad: Any) -> sbot.Sampler:
    """A sampler whose first draw is right."""
    draws = []

    def draw(n: int, generator: torch.Generator | None) -> Any:
        draws.append(n)
        good = torch.randn(n, 2, generator=generator)
        return good if len(draws) == 1 else bad(good)

    return sbot.Sampler(draw)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (lambda x: x[:, 0], "the sampler returned shape"),
        (lambda x: x[:-1], "the sampler returned shape .* for n = "),
        (lambda x: torch.cat([x, x], 1), "the sampler returned shape"),
        (lambda x: x.long(), "returned dtype torch.int64"),
        (lambda x: x.numpy(), "returned ndarray"),
        (lambda x: torch.where(x > 3, torch.nan, x) * torch.nan, "a draw of nu"),
        (lambda x: x / 0, "a draw of nu"),
    ],
    ids=["one dimension", "too few", "too wide", "whole numbers", "numpy", "NaN", "inf"],
)
def test_a_sampler_that_turns_bad_is_named(kind: str, bad: Any, said: str) -> None:
    calls: list[sbot.Progress] = []
    mu = sbot.Gaussian(torch.zeros(2), torch.eye(2))
    with pytest.raises(sbot.InvalidProblem, match=said):
        sbot.solve_bridge(mu, later(bad), 1.0, solver=make(kind, callbacks=(calls.append,)))
    assert calls == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_sampler_that_raises_keeps_the_checkpoint(kind: str, tmp_path: Path) -> None:
    class Gone(Exception):
        pass

    draws = []

    def draw(n: int, generator: torch.Generator | None) -> Tensor:
        draws.append(n)
        if len(draws) == 7:
            raise Gone("the store is gone")
        return torch.randn(n, 2, generator=generator)

    mu, nu = sbot.Gaussian(torch.zeros(2), torch.eye(2)), sbot.Sampler(draw)
    with pytest.raises(Gone, match="the store is gone"):
        sbot.solve_bridge(mu, nu, 1.0, solver=make(kind, tmp_path, save_every=1))
    done = state(tmp_path)[0]["done"]
    assert done > 0
    bridge = sbot.solve_bridge(mu, nu, 1.0, solver=make(kind, tmp_path, save_every=1))
    assert bridge.report.iterations > done


@pytest.mark.parametrize("kind", KINDS)
def test_an_exhausted_loader_is_said_and_a_good_one_streams(kind: str) -> None:
    data = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    once = sbot.Sampler.from_loader(iter(data.split(16)))
    with pytest.raises(sbot.InvalidProblem, match="the loader is exhausted"):
        sbot.solve_bridge(once, data, 1.0, solver=make(kind))
    again = sbot.Sampler.from_loader(torch.utils.data.DataLoader(data, batch_size=16))
    whole = sbot.Sampler.from_dataset(torch.utils.data.TensorDataset(data))
    assert sbot.solve_bridge(again, whole, 1.0, solver=make(kind)).report.iterations > 0


# ---- networks and options ----------------------------------------------------------------------------------------------


class Wrong(torch.nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = torch.nn.Linear(2, 1 if how == "narrow" else 2), how

    def forward(self, x: Tensor, t: Tensor) -> Any:
        out = self.layer(x)
        return (
            {"pair": (out, out), "NaN": out * torch.nan, "double": out.double(), "fails": None}.get(self.how, out)
            if self.how != "fails"
            else self.layer(t)
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["narrow", "pair", "NaN", "double", "fails"])
def test_a_network_with_the_wrong_answer_is_found_before_any_training(kind: str, how: str, tmp_path: Path) -> None:
    with pytest.raises(sbot.InvalidProblem, match="the network Wrong"):
        train(kind, tmp_path / "run", Wrong(how))
    assert not (tmp_path / "run").exists()


def test_a_network_without_weights_or_no_network_is_refused() -> None:
    class Frozen(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return 0 * x

    for kind in KINDS:
        with pytest.raises(sbot.InvalidProblem, match="no parameters to train"):
            train(kind, module=Frozen())
        with pytest.raises(sbot.InvalidProblem, match=r"give a torch\.nn.Module"):
            train(kind, module=lambda x, t: x)
        with pytest.raises(sbot.InvalidProblem, match="net has 3 networks"):
            train(kind, module=(net(), net(), net()))


@pytest.mark.parametrize(
    "make_one",
    [
        lambda: sbot.DSB(steps=0),
        lambda: sbot.DSB(steps=[0.0, 0.7, 0.3, 1.0]),
        lambda: sbot.DSB(rounds=0),
        lambda: sbot.DSB(half_steps=0),
        lambda: sbot.DSB(target="mean-matching"),
        lambda: sbot.DSB(patience=0),
        lambda: sbot.DSB(tol=0.0),
        lambda: sbot.DSB(tol=float("nan")),
        lambda: sbot.DSB(fit={"steps": 3}),  # type: ignore[arg-type]
        lambda: sbot.DSB(cache=4096),  # type: ignore[arg-type]
        lambda: sbot.DSB(score=lambda x, t: x),  # type: ignore[arg-type]
        lambda: sbot.Cache(paths=0),
        lambda: sbot.Cache(reuse=0),
        lambda: sbot.DSBM(steps=-1),
        lambda: sbot.DSBM(order=3),
        lambda: sbot.DSBM(pairs=0),
        lambda: sbot.DSBM(refresh=0),
        lambda: sbot.DSBM(hold=1.5),
        lambda: sbot.DSBM(init="sinkhorn"),
        lambda: sbot.FitConfig(steps=0),
        lambda: sbot.FitConfig(batch=0),
        lambda: sbot.FitConfig(lr=float("inf")),
        lambda: sbot.FitConfig(ema=1.0),
        lambda: sbot.FitConfig(accumulate=1000),
        lambda: sbot.FitConfig(clip=-1.0),
        lambda: sbot.FitConfig(resume="maybe"),
        lambda: sbot.FitConfig(callbacks=[print]),  # type: ignore[arg-type]
        lambda: sbot.FitConfig(folder=3),  # type: ignore[arg-type]
    ],
)
def test_options_out_of_range_are_refused(make_one: Any) -> None:
    with pytest.raises(sbot.InvalidProblem, match=r"; (give|pass) "):
        make_one()


@pytest.mark.parametrize("solver", SOLVERS.values())
def test_problems_that_cannot_be_learned_are_refused(solver: Any) -> None:
    x = torch.randn(6, 2)
    with pytest.raises(sbot.Unsupported, match="batch dimensions"):
        sbot.solve_bridge(x.expand(3, 6, 2), x.expand(3, 6, 2), 1.0, solver=solver())
    with pytest.raises(sbot.Unsupported, match="relaxed marginals"):
        sbot.solve_bridge(x, x, 1.0, relax=(1.0, 1.0), solver=solver())
    with pytest.raises(sbot.Unsupported, match="no paths"):
        sbot.solve_bridge(x, x, 1.0, cost=sbot.Lp(1), solver=solver())


def test_an_eps_too_small_for_the_smallest_step_is_refused() -> None:
    x = torch.randn(50, 2)
    grid = sbot.TimeGrid(20, "symmetric", least=0.01)
    with pytest.raises(sbot.InvalidProblem, match="eps is too small for 20 steps"):
        sbot.solve_bridge(x, x + 1, 0.1, solver=sbot.DSB(steps=grid))


def test_bad_starts_are_refused() -> None:
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    start = sbot.solve_bridge(x, x + 1, 1.0)
    for kind in KINDS:
        with pytest.raises(sbot.InvalidProblem, match="init has eps = 1"):
            sbot.solve_bridge(x, x + 1, 0.5, solver=make(kind), init=start)
        with pytest.raises(sbot.InvalidProblem, match="init has points"):
            sbot.solve_bridge(x[:, :1], x[:, :1], 1.0, solver=SOLVERS[kind](), init=start)
        with pytest.raises(sbot.InvalidProblem, match=r"init is torch\.float32"):
            sbot.solve_bridge(x.double(), x.double(), 1.0, solver=make(kind), init=start)
    with pytest.raises(sbot.InvalidProblem, match="drop one of them"):
        sbot.solve_bridge(x, x + 1, 1.0, solver=make("dsb", options={"score": net()}), init=start)


# ---- what is left behind -----------------------------------------------------------------------------------------------


def everything() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_rng_state().sum().item(),
        torch.backends.cuda.matmul.fp32_precision,
        signal.getsignal(signal.SIGINT),
        signal.getsignal(signal.SIGTERM),
        len(warnings.filters),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError, None])
@pytest.mark.parametrize("grad", [True, False])
def test_nothing_of_the_process_is_changed(kind: str, fault: Any, grad: bool, tmp_path: Path) -> None:
    def call(state: sbot.Progress) -> None:
        if fault is not None and state.iteration == 11:
            raise fault("stop")

    train(kind, steps=1)  # what a library sets once, at its first import
    with torch.set_grad_enabled(grad):
        before = everything()
        if fault is None:
            train(kind, tmp_path, callbacks=(call,))
        else:
            with pytest.raises(fault):
                train(kind, tmp_path, callbacks=(call,))
        assert everything() == before


def test_the_networks_given_stay_as_they_were() -> None:
    mine = net()
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    for kind in KINDS:
        train(kind, module=mine, steps=3)
    assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())


@pytest.mark.parametrize(
    "said", [lambda x: x[:, :1], lambda x: x.T, lambda x: None, lambda x: x.double(), lambda x: x / 0]
)
def test_a_score_with_the_wrong_answer_is_found_before_any_training(said: Any) -> None:
    class Score(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> Any:
            return said(x)

    one = sbot.Gaussian(torch.zeros(2), torch.eye(2))
    with pytest.raises(sbot.InvalidProblem, match="the network Score"):
        sbot.solve_bridge(one, one, 1.0, solver=make("dsb", options={"score": Score()}))


@pytest.mark.parametrize("solver", SOLVERS.values())
def test_masses_other_than_one_are_refused(solver: Any) -> None:
    heavy = sbot.Discrete(torch.randn(6, 2), torch.full((6,), 1 / 3))
    one = sbot.Gaussian(torch.zeros(2), torch.eye(2))
    for ends in ((heavy, one), (one, heavy), (heavy, heavy)):
        with pytest.raises(sbot.Unsupported, match=r"mass 2.*normalise"):
            sbot.solve_bridge(*ends, 1.0, solver=solver())


def test_options_that_would_do_nothing_are_refused() -> None:
    with pytest.raises(sbot.InvalidProblem, match="drop least="):
        sbot.TimeGrid(20, "uniform", least=1e-4)
    with pytest.raises(sbot.InvalidProblem, match="drop least="):
        sbot.TimeGrid(2, "symmetric", least=1e-4)
    with pytest.raises(sbot.InvalidProblem, match="compile="):
        sbot.LightSB(fit=sbot.FitConfig(compile=True))
