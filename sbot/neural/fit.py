"""Fitting one network: the settings, the optimiser step, the moving average."""

from __future__ import annotations

import copy
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any, final

import torch
from torch import Tensor, nn

from ..arrays import as_count, as_number
from ..distributed import Group
from ..errors import InvalidProblem, NumericalError

#: From a network and a part of a batch to a loss for each of its rows.
RowLoss = Callable[..., Tensor]


@final
@dataclass(frozen=True)
class FitConfig:
    """How networks are trained.

    Parameters
    ----------
    steps : gradient steps; of each half-step for `DSB`, in all for `DSBM`.  None is the solver's own default.
    batch : rows of a step, over all processes.
    lr : peak learning rate of AdamW; it rises over ``warmup`` steps and falls to a hundredth by a cosine.
    weight_decay : of AdamW.
    clip : largest norm of the gradient; None never clips.
    ema : decay of the moving average of the weights, which is what simulates; shorter at the start.
    accumulate : parts a batch is cut into, one after the other, to save memory.
    autocast : evaluate the network in bfloat16 while training.
    compile : run it through `torch.compile` while training.
    seed : of every random number drawn.
    folder : where checkpoints go; None writes nothing.  A run that finds its own checkpoint there goes on from it.
    save_every : steps between checkpoints.
    resume : "auto" goes on where the folder holds a run of the same problem and settings, and refuses another; "never"
        refuses any; "force" goes on from a run of other settings.
    callbacks : functions of `Progress`, called after each step; one that returns True ends the training there.

    Raises
    ------
    InvalidProblem : a setting out of range.

    Examples
    --------
    >>> import sbot
    >>> sbot.FitConfig(steps=2000, batch=256).lr
    0.002
    """

    steps: int | None = None
    batch: int = 512
    lr: float = 2e-3
    weight_decay: float = 0.0
    warmup: int = 100
    clip: float | None = 1.0
    ema: float = 0.999
    accumulate: int = 1
    autocast: bool = False
    compile: bool = False
    seed: int = 0
    folder: str | PathLike[str] | None = None
    save_every: int = 1000
    resume: str = "auto"
    callbacks: tuple[Callable[[Any], Any], ...] = ()

    def __post_init__(self) -> None:
        for name in ("batch", "accumulate", "save_every"):
            as_count(getattr(self, name), name)
        if self.steps is not None:
            as_count(self.steps, "steps")
        as_count(self.warmup, "warmup", least=0)
        as_count(self.seed, "seed", least=0)
        for name in ("lr", "clip"):
            value = getattr(self, name)
            if not (name == "clip" and value is None) and not 0 < as_number(value, name) < math.inf:
                raise InvalidProblem(f"{name} is {value}; give a finite number > 0")
        if not 0 <= as_number(self.weight_decay, "weight_decay") < math.inf:
            raise InvalidProblem(f"weight_decay is {self.weight_decay}; give a finite number >= 0")
        if not 0 <= as_number(self.ema, "ema") < 1:
            raise InvalidProblem(f"ema is {self.ema}; give a decay in [0, 1), such as 0.999")
        if self.accumulate > self.batch:
            raise InvalidProblem(f"accumulate is {self.accumulate} for a batch of {self.batch}; give at most the batch")
        if self.resume not in ("auto", "never", "force"):
            raise InvalidProblem(f"resume is {self.resume!r}; give 'auto', 'never' or 'force'")
        _check_folder(self.folder)
        if not isinstance(self.callbacks, tuple) or not all(callable(call) for call in self.callbacks):
            raise InvalidProblem("callbacks must be a tuple of functions of Progress; give callbacks=(function,)")

    def rate(self, step: int, total: int) -> float:
        """The learning rate of ``step`` (from 0) of ``total``."""
        rise = min(1.0, (step + 1) / (min(self.warmup, total // 4) + 1))
        return self.lr * rise * (0.01 + 0.99 * (1 + math.cos(math.pi * step / total)) / 2)


def _check_folder(folder: Any) -> None:
    if folder is not None and not (isinstance(folder, (str, PathLike)) and fspath(folder)):
        raise InvalidProblem(f"folder is {folder!r}; give the name of a folder, or None to keep nothing")


@final
class Trainer:
    """One network, its optimiser and the moving average of its weights."""

    def __init__(self, name: str, module: nn.Module, config: FitConfig, group: Group) -> None:
        if torch.is_inference_mode_enabled():
            raise InvalidProblem("networks cannot be trained in inference mode; leave torch.inference_mode() first")
        self.name, self.module, self.config, self.group = name, module, config, group
        group.share([*module.parameters(), *module.buffers()])
        self.averaged = copy.deepcopy(module).eval().requires_grad_(False)
        self.parameters: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
        if not self.parameters:
            raise InvalidProblem(f"the network of {name} has no parameters to train; give one that has")
        pairs = zip(self.averaged.parameters(), module.parameters(), strict=True)
        self._averages: list[Tensor] = [average for average, p in pairs if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self.parameters, lr=config.lr, weight_decay=config.weight_decay, fused=_has_fused(self.parameters)
        )
        self._run: Any = torch.compile(module) if config.compile else module

    def step(
        self, batch: tuple[Tensor, ...], loss: RowLoss, step: int, total: int, noted: int = 0, seed: int = 0
    ) -> tuple[float, int]:
        """One optimiser step on the mean of ``loss`` over ``batch``: the loss, and the signal that any process noted, or 0.

        ``seed`` is of the random numbers that the network itself draws, such as dropout; those of each process differ.
        Raises `NumericalError` where the loss or its gradient is not finite; the weights are then as they were before.
        """
        device = batch[0].device
        self._optimizer.zero_grad(set_to_none=True)
        with own_randomness(device, seed * self.group.size + self.group.rank):
            sum_loss = self._gradient(batch, loss)
        if self.group.size > 1:
            for p in self.parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            told = [float(sum_loss), float(noted == signal.SIGINT), float(noted == signal.SIGTERM)]
            heard = torch.tensor(told, dtype=self.parameters[0].dtype, device=device)
            self.group.sum([*(p.grad for p in self.parameters if p.grad is not None), heard])
            sum_loss = heard[0]
            noted = signal.SIGTERM if heard[2] > 0 else signal.SIGINT if heard[1] > 0 else 0
        clip = math.inf if self.config.clip is None else self.config.clip
        norm = nn.utils.clip_grad_norm_(self.parameters, clip)
        said = float(sum_loss)
        if not (math.isfinite(said) and math.isfinite(float(norm))):
            raise NumericalError(
                f"the loss of network {self.name!r} at step {step} is {said:.3g} with a gradient of norm "
                f"{float(norm):.3g}; the weights are those before the step: give a smaller lr or clip, or look for extreme "
                "values in the data"
            )
        for settings in self._optimizer.param_groups:
            settings["lr"] = self.config.rate(step, total)
        self._optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self._averages, self.parameters, max(1 - self.config.ema, 1 / (step / 10 + 1)))
        return said, int(noted)

    def _gradient(self, batch: tuple[Tensor, ...], loss: RowLoss) -> Tensor:
        """Leave this process's share of the gradient in the parameters; its share of the mean loss."""
        n, device = len(batch[0]), batch[0].device
        mine = self.group.rows(n)
        parts = [tensor[mine].tensor_split(self.config.accumulate) for tensor in batch]
        sum_loss = torch.zeros((), dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
        with torch.enable_grad():
            for part in zip(*parts, strict=True):
                if len(part[0]) == 0:
                    continue
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.config.autocast):
                    rows = loss(self._run, *part)
                share = rows.sum() / n
                torch.autograd.backward(share)
                sum_loss += share.detach()
        return sum_loss

    @property
    def steps(self) -> int:
        """Steps taken so far."""
        taken = [float(entry["step"]) for entry in self._optimizer.state_dict()["state"].values()]
        return int(max(taken, default=0))

    @property
    def average(self) -> nn.Module:
        """The network with the averaged weights, ready to simulate."""
        for mine, theirs in zip(self.averaged.buffers(), self.module.buffers(), strict=True):
            mine.copy_(theirs)  # running statistics of the user's network, if any
        return self.averaged

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as tensors."""
        out = {f"weights.{key}": value for key, value in self.module.state_dict().items()}
        out |= {f"average.{key}": value for key, value in self.averaged.state_dict().items()}
        for index, entry in self._optimizer.state_dict()["state"].items():
            out |= {f"optimiser.{index}.{key}": value for key, value in entry.items()}
        return out

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`; raises `RuntimeError` or `KeyError` where the tensors are of another network."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

        self.module.load_state_dict(part("weights."))
        self.averaged.load_state_dict(part("average."))
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in part("optimiser.").items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = value
        settings = self._optimizer.state_dict()
        self._optimizer.load_state_dict({"state": state, "param_groups": settings["param_groups"]})


@contextmanager
def own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Whatever draws from torch's global generators inside draws from ``seed``; they are left as they were."""
    generators = [torch.default_generator]  # torch.manual_seed would note a stack trace for every kind of device
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed % 2**63)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _has_fused(parameters: list[Tensor]) -> bool:
    return all(p.device.type in ("cpu", "cuda") and p.dtype.is_floating_point for p in parameters)
