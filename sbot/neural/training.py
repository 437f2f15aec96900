"""A training that can be stopped anywhere and goes on from there to the same bits."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import time
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from ..distributed import Group
from ..errors import InvalidFile
from ..measures import Discrete, Gaussian, Measure, Mixture
from ..problem import Problem
from ..progress import Progress
from .fit import FitConfig, RowLoss, Trainer
from .run import Run

#: Of what a checkpoint holds; runs of another one are refused.
VERSION = 1


@final
class Training:
    """Trainers, the random generator, what lies between steps, and where in the program the training is.

    ``cursor`` holds whole numbers and ``kept`` tensors; both go into every checkpoint, and a solver reads them back to
    know where it was.  Used as a context manager: it locks and releases the folder of the run.
    """

    def __init__(
        self,
        problem: Problem,
        config: FitConfig,
        trainers: tuple[Trainer, ...],
        generator: torch.Generator,
        identity: dict[str, Any],
        report: Callable[[Progress], None],
        group: Group,
        total: int,
    ) -> None:
        self.problem, self.config, self.trainers, self.generator = problem, config, trainers, generator
        self.identity, self.group, self.total = identity, group, total
        self.cursor: dict[str, int] = {}
        self.kept: dict[str, Tensor] = {}
        self.history: list[tuple[int, float, float]] = []
        self.done = 0
        self.residual, self.tolerance = math.nan, math.nan
        self.stopped = False
        self.seconds = 0.0
        self._report = report
        self._run = Run(config.folder, group)
        self._shown = self._started = time.perf_counter()

    def __enter__(self) -> Training:
        self._run.__enter__()
        try:
            found = self._run.load(self.identity, self.config.resume)
            if found is not None:
                self._restore(*found)
        except BaseException:
            self._run.__exit__()
            raise
        return self

    def __exit__(self, *fault: object) -> None:
        self._run.__exit__(*fault)

    # ---- one step --------------------------------------------------------------------------------------------------

    def step(self, trainer: Trainer, batch: tuple[Tensor, ...], loss: RowLoss, step: int, total: int) -> None:
        """One gradient step, then whatever is due: callbacks, progress, a checkpoint, a stop.

        ``cursor`` must already say where to go on after this step.
        """
        said, stop = trainer.step(batch, loss, step, total, self._run.signal is not None)
        self.done += 1
        now = time.perf_counter()
        if self.config.callbacks or now - self._shown > 0.2:
            self._shown = now
            state = Progress(self.done, self.problem.eps, self.residual, self.tolerance, said, self.total)
            if self.group.first:
                self._report(state)
            answers = [call(state) for call in self.config.callbacks]  # each of them is called
            asked = any(answer is True for answer in answers)
            # callbacks may differ between processes, and all must stop at the same step
            self.stopped |= self.group.any(asked, trainer.parameters[0].device) if self.config.callbacks else asked
        if self._run.folder is None:
            return
        if stop:
            self.save()
            if self._run.signal == signal.SIGTERM:
                raise SystemExit(128 + signal.SIGTERM)
            raise KeyboardInterrupt
        if self.done % self.config.save_every == 0:
            self.save()

    def save(self, *, best: bool = False) -> None:
        """Write a checkpoint, where there is a folder."""
        if self._run.folder is None:
            return
        tensors = {f"kept.{name}": tensor for name, tensor in self.kept.items()}
        tensors["generator"] = self.generator.get_state()
        for trainer in self.trainers:
            tensors |= {f"{trainer.name}.{name}": tensor for name, tensor in trainer.state().items()}
        header = {
            "identity": self.identity,
            "cursor": self.cursor,
            "done": self.done,
            "history": [list(row) for row in self.history],
            "seconds": self.elapsed,
        }
        self._run.save(header, tensors, best=best)

    @property
    def elapsed(self) -> float:
        """Seconds spent, those before a resume included."""
        return self.seconds + time.perf_counter() - self._started

    def _restore(self, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        try:
            device = self.problem.device
            for trainer in self.trainers:
                prefix = f"{trainer.name}."
                trainer.restore({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
            self.generator.set_state(tensors["generator"])
            self.kept = {k.removeprefix("kept."): v.to(device) for k, v in tensors.items() if k.startswith("kept.")}
            self.cursor = {str(key): int(value) for key, value in header["cursor"].items()}
            self.history = [(int(row[0]), float(row[1]), float(row[2])) for row in header["history"]]
            self.done, self.seconds = int(header["done"]), float(header["seconds"])
        except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as fault:
            raise InvalidFile(
                f"the checkpoint in {self._run.folder} does not fit these networks ({fault}); give another folder="
            ) from None


# ---- what a checkpoint is of ---------------------------------------------------------------------------------------


def identity(problem: Problem, solver: Any, nets: tuple[nn.Module, ...]) -> dict[str, Any]:
    """Plain data that two runs share exactly when one may go on from the other."""
    return {
        "version": VERSION,
        "problem": {
            "mu": _measure(problem.mu),
            "nu": _measure(problem.nu),
            "eps": problem.eps,
            "reference": repr(problem.reference),
            "dtype": str(problem.dtype),
        },
        "solver": _plain(solver),
        "networks": [_network(net) for net in nets],
    }


#: Settings that do not change what is computed.
_FREE = ("folder", "save_every", "resume", "callbacks")


def _plain(obj: Any) -> Any:
    if is_dataclass(obj) and not isinstance(obj, type):
        named = {f.name: _plain(getattr(obj, f.name)) for f in fields(obj) if f.name not in _FREE}
        return {"kind": type(obj).__name__} | named
    if isinstance(obj, (tuple, list)):
        return [_plain(item) for item in obj]
    if isinstance(obj, Tensor):
        return digest(obj)
    if obj is None or isinstance(obj, (bool, int, float, str)):
        return obj if not isinstance(obj, float) or math.isfinite(obj) else repr(obj)
    return type(obj).__name__


def _network(net: nn.Module) -> str:
    """The shapes of a network; its numbers change in training."""
    shapes = {name: list(value.shape) for name, value in net.state_dict().items()}
    return type(net).__name__ + " " + hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]


def _measure(measure: Measure) -> str:
    kind = f"{type(measure).__name__}{list(measure.event_shape)}"
    if isinstance(measure, Discrete):
        parts = [part for part in (measure.points, measure.weights) if part is not None]
    elif isinstance(measure, Gaussian):
        parts = [measure.mean, measure.cov]
    elif isinstance(measure, Mixture):
        parts = [measure.logits, measure.components.mean, measure.components.cov]
    else:
        return kind
    return kind + " " + "".join(digest(part)[:16] for part in parts)


def digest(tensor: Tensor) -> str:
    """A digest of the bytes of a tensor."""
    plain = tensor.detach().cpu().contiguous()
    return hashlib.sha256(
        plain.view(torch.uint8).numpy().tobytes() if plain.ndim else repr(plain.item()).encode()
    ).hexdigest()
