"""A training that can be stopped anywhere and goes on from there to the same bits."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from ..bridge import Bridge
from ..distributed import Group
from ..errors import InvalidFile, InvalidProblem
from ..measures import Discrete, Gaussian, Measure, Mixture
from ..problem import Problem
from ..progress import Progress
from ..reference import LinearReference, Process
from .fit import FitConfig, RowLoss, Trainer
from .run import Run, leave

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
        self._asking = bool(config.callbacks)
        self._report = report
        self._run = Run(config.folder, group)
        self._shown = self._started = time.perf_counter()

    def __enter__(self) -> Training:
        try:
            self._together(self._open())
        except BaseException:
            self._run.__exit__()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._run.__exit__()
        if kind is None and self._run.signal:  # it came after the last step
            leave(self._run.signal)

    def _open(self) -> Exception | None:
        """Open the folder and go to where its run stands; what went wrong, where something did."""
        try:
            self._run.__enter__()
            found = self._run.load(self.identity, self.config.resume)
            if found is not None:
                self._restore(*found)
        except Exception as fault:
            return fault
        return None

    def _together(self, fault: Exception | None) -> None:
        """See to it that every process starts from the same place, or none does."""
        group, device = self.group, self.problem.device
        if group.any(fault is not None, device):
            raise fault or InvalidProblem("another process of the group could not start; see its error")
        if not group.same(json.dumps(self.identity), device):
            raise InvalidProblem(
                "the processes of the group were given different problems or settings; give each of them the same, the "
                "seed included: they share out the rows themselves"
            )
        stands = json.dumps([self.cursor, self.done]) + digest(self.generator.get_state())
        if not group.same(stands, device):
            raise InvalidProblem(
                "the processes of the group would go on from different checkpoints; give folder= a place that all see"
            )
        self._asking = group.any(bool(self.config.callbacks), device)

    # ---- one step --------------------------------------------------------------------------------------------------

    def step(self, trainer: Trainer, batch: tuple[Tensor, ...], loss: RowLoss, step: int, total: int) -> None:
        """One gradient step, then whatever is due: callbacks, progress, a checkpoint, a stop.

        ``cursor`` must already say where to go on after this step.
        """
        said, stop = trainer.step(batch, loss, step, total, self._run.signal, self._seed())
        self.done += 1
        now = time.perf_counter()
        if self.config.callbacks or now - self._shown > 0.2:
            self._shown = now
            state = Progress(self.done, self.problem.one_eps, self.residual, self.tolerance, said, self.total)
            if self.group.first:
                self._report(state)
            answers = [call(state) for call in self.config.callbacks]  # each of them is called
            self.stopped |= any(answer is True for answer in answers)
        if self._asking:  # callbacks may differ between processes, and all must stop at the same step
            self.stopped = self.group.any(self.stopped, self.problem.device)
        if stop:
            self.save()
            leave(stop)
        if self.done % self.config.save_every == 0:
            self.save()

    def _seed(self) -> int:
        """Of what a network draws in this step; the same after a resume."""
        return self.config.seed * 1_000_003 + self.done

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

    def _restore(self, header: dict[str, Any], tensors: dict[str, Tensor], same: bool) -> None:
        try:
            device = self.problem.device
            for trainer in self.trainers:
                prefix = f"{trainer.name}."
                trainer.restore({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
            cursor = {str(key): int(value) for key, value in header["cursor"].items()}
            if cursor.keys() != self.cursor.keys() or min(cursor.values()) < 0:
                raise ValueError(f"it stands at {sorted(cursor)}, not at {sorted(self.cursor)}")
            self.cursor = cursor
            self.history = [(int(row[0]), float(row[1]), float(row[2])) for row in header["history"]]
            self.residual = self.history[-1][2] if self.history else math.nan
            self.done, self.seconds = int(header["done"]), float(header["seconds"])
            if same:
                self.generator.set_state(tensors["generator"])
                self.kept = {k.removeprefix("kept."): v.to(device) for k, v in tensors.items() if k.startswith("kept.")}
            else:  # what was simulated is of other settings: simulate anew, with other numbers
                self.generator.manual_seed(self._seed())
                self.cursor["refill"] = self.cursor["step"]
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, IndexError) as fault:
            raise InvalidFile(
                f"the checkpoint in {self._run.folder} does not fit these networks ({fault}); give another folder="
            ) from None


# ---- what a checkpoint is of ---------------------------------------------------------------------------------------


def identity(problem: Problem, solver: Any, nets: tuple[nn.Module, ...], init: Bridge | None = None) -> dict[str, Any]:
    """Plain data that two runs share exactly when one may go on from the other."""
    return {
        "version": VERSION,
        "problem": _problem(problem, drawing=solver.fit.folder is not None),
        "device": problem.device.type,
        "solver": _plain(solver),
        "networks": [_network(net) for net in nets],
        "init": _plain(init),
    }


def _problem(problem: Problem, drawing: bool = False) -> dict[str, Any]:
    return {
        "mu": _measure(problem.mu, drawing),
        "nu": _measure(problem.nu, drawing),
        "eps": problem.one_eps,
        "reference": _reference(problem),
        "dtype": str(problem.dtype),
    }


#: Settings that do not change what is computed.
_FREE = ("folder", "save_every", "resume", "callbacks")


def _plain(obj: Any) -> Any:
    if is_dataclass(obj) and not isinstance(obj, type):
        named = {f.name: _plain(getattr(obj, f.name)) for f in fields(obj) if f.name not in (*_FREE, "net")}
        return {"kind": type(obj).__name__} | named
    if isinstance(obj, (tuple, list)):
        return [_plain(item) for item in obj]
    if isinstance(obj, Tensor):
        return digest(obj)
    if isinstance(obj, nn.Module):  # one that is only asked, such as a score
        return _network(obj) + " " + "".join(digest(value)[:8] for value in obj.state_dict().values())
    if isinstance(obj, Bridge):
        tensors = obj.state()[1]
        parts = "".join(key + digest(value) for key, value in sorted(tensors.items()))
        return {"kind": type(obj).__name__, "problem": _problem(obj.problem), "state": _short(parts)}
    if obj is None or isinstance(obj, (bool, int, float, str)):
        return obj if not isinstance(obj, float) or math.isfinite(obj) else repr(obj)
    return type(obj).__name__


def _network(net: nn.Module) -> str:
    """The shapes of a network; its numbers change in training."""
    shapes = {name: list(value.shape) for name, value in net.state_dict().items()}
    return type(net).__name__ + " " + hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]


def same_reference(one: Problem, other: Problem) -> bool:
    """Whether two problems on one space have the same reference: its name, and its numbers at some times and points."""
    return _reference(one) == _reference(other)


def _reference(problem: Problem) -> str:
    reference = problem.reference
    if isinstance(reference, LinearReference):
        numbers = [part for t in (0.0, 0.3, 1.0) for part in reference.coefficients(t)]
    elif isinstance(reference, Process):
        generator = torch.Generator("cpu").manual_seed(0)
        x = torch.randn((4, *problem.mu.event_shape), generator=generator, dtype=torch.float64)
        x = x.to(dtype=problem.dtype, device=problem.device)
        with torch.no_grad():
            numbers = [part for t in (0.1, 0.3, 0.9) for part in (reference.drift(t, x), reference.spread(t))]
    else:
        return repr(reference)
    return f"{reference!r} " + _short("".join(map(digest, numbers)))


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _measure(measure: Measure, drawing: bool) -> str:
    kind = f"{type(measure).__name__}{list(measure.event_shape)}"
    if isinstance(measure, Discrete):
        parts = [part for part in (measure.points, measure.weights) if part is not None]
    elif isinstance(measure, Gaussian):
        parts = [measure.mean, measure.cov]
    elif isinstance(measure, Mixture):
        parts = [measure.logits, measure.components.mean, measure.components.cov]
    elif not drawing:
        return kind
    else:  # known by what it draws, where that follows from the generator
        with torch.no_grad():
            parts, again = ([_draw(measure)] for _ in range(2))
        if digest(parts[0]) != digest(again[0]):
            return kind
    return kind + " " + "".join(digest(part)[:16] for part in parts)


def _draw(measure: Measure) -> Tensor:
    return measure.sample(8, generator=torch.Generator(measure.device).manual_seed(0))


def digest(tensor: Tensor) -> str:
    """A digest of the bytes of a tensor."""
    plain = tensor.detach().cpu().contiguous()
    return hashlib.sha256(
        plain.view(torch.uint8).numpy().tobytes() if plain.ndim else repr(plain.item()).encode()
    ).hexdigest()
