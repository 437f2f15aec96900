"""In the program's process: each call made by the original and by sbot, compared, and written down.

The original runs first.  The side whose result is not returned leaves no trace in the program: generators of random numbers
are put back, its warnings and what it prints are kept away, its exceptions are written down.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import random
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..compat import pot
from ..compat.swap import Bindings, Target, public_functions, targets
from ..solvers import Sinkhorn
from .compare import ASKED, Parts, deviations, parts
from .judge import Finding, Question, examine, floor, higher, potentials_judge, question
from .meter import Meter

#: Functions of which only the value is returned, those that return the plan, and what these do not take.
PLANS = {
    "sinkhorn2": ("sinkhorn", ()),
    "empirical_sinkhorn2": ("empirical_sinkhorn", ()),
    "sinkhorn_unbalanced2": ("sinkhorn_unbalanced", ("returnCost",)),
}
#: What is covered and solves nothing.
NO_SOLVE = ("ot.batch.dist_batch",)
MAPS = ("transform", "inverse_transform", "transform_labels", "inverse_transform_labels")
#: Public names of POT that are not transport.
TOOLS = ("tic", "toc", "toq", "dist", "unif", "dist_batch", "geometricBar", "geometricMean", "projR", "projC")
OTHERS = ("ot", "ot.lp", "ot.bregman", "ot.unbalanced", "ot.partial", "ot.gromov")
#: Packages whose frames are not the program's own.
LIBRARIES = ("sbot", "ot", "geomloss", "torch")
LOSS = "loss p blur reach diameter scaling truncate cost kernel cluster_scale debias potentials verbose backend"

Seen = Callable[[Any, tuple[str, ...]], Parts]
Judge = Callable[["Call"], "tuple[Finding, Finding] | None"]


@dataclass
class Side:
    """What one side did with a call."""

    meter: Meter = field(default_factory=Meter)
    out: Any = None
    parts: Parts = field(default_factory=dict)
    fault: Exception | None = None
    said: list[str] = field(default_factory=list)

    def told(self) -> dict[str, Any]:
        fault = None if self.fault is None else f"{type(self.fault).__name__}: {self.fault}"
        return {"seconds": self.meter.seconds, "bytes": self.meter.bytes, "raised": fault, "said": self.said[:3]}


@dataclass
class Call:
    """A call to be made on both sides; ``judge`` gives findings on both where the answers alone do not tell."""

    name: str
    theirs: Callable[[], Any]
    mine: Callable[[], Any]
    given: dict[str, Any]
    explicit: dict[str, Any]
    seen: Seen
    judge: Judge | None = None
    solves: bool = True
    found: tuple[Finding, Finding] = (Finding(), Finding())


class Both:
    """Swaps what sbot covers for functions that call both sides; ``note(event, **facts)`` takes what is found."""

    def __init__(self, note: Callable[..., None], returned: str) -> None:
        self.note, self.returned = note, returned
        self.bindings = Bindings()
        self._here = threading.local()
        solved = Sinkhorn.solved

        @functools.wraps(solved)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._here.solves = getattr(self._here, "solves", 0) + 1
            return solved(*args, **kwargs)

        self.bindings.set(Sinkhorn, "solved", counted)

    def swap(self, library: str) -> None:
        """Put the swapped functions wherever the library has bound them."""
        version = str(getattr(sys.modules[library.partition(".")[0]], "__version__", "unknown"))
        places = 0
        if library == "ot":
            self._count_others()
        for target in targets(library):
            if inspect.isclass(target.theirs):
                places += self._class(target)
            else:
                places += self.bindings.replace(target.theirs, self._function(target), target.root)
        self.note("swapped", library=library, version=version, places=places)

    # ---- what is put in place --------------------------------------------------------------------------------------

    def _function(self, target: Target) -> Callable[..., Any]:
        theirs, mine = target.theirs, target.mine

        def forwarded(*args: Any, **kwargs: Any) -> Any:  # what sbot's functions find as POT's own
            self._here.forwarded = True
            return theirs(*args, **kwargs)

        @functools.wraps(theirs)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._inside():
                return theirs(*args, **kwargs)
            given, explicit = _arguments(theirs, args, kwargs)
            theirs_take, mine_take = self._shared(args, kwargs)
            pairs = _pairs(given)
            return self._make(
                Call(
                    target.name,
                    lambda: theirs(*theirs_take[0], **theirs_take[1]),
                    lambda: mine(*mine_take[0], **mine_take[1]),
                    given,
                    explicit,
                    lambda out, names: parts(out, pairs, names),
                    functools.partial(self._function_again, target, args, kwargs),
                    target.name not in NO_SOLVE,
                )
            )

        call.__original__ = forwarded  # type: ignore[attr-defined]
        return call

    def _class(self, target: Target) -> int:
        if target.name == "geomloss.SamplesLoss":
            self.bindings.set(target.theirs, "forward", self._loss(target))
            return 1
        twins: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self.bindings.set(target.theirs, "fit", self._fit(target, twins))
        for name in MAPS:
            self.bindings.set(target.theirs, name, self._map(target, name, twins))
        return 1 + len(MAPS)

    def _fit(self, target: Target, twins: Any) -> Callable[..., Any]:
        """``fit`` of an estimator, beside that of an estimator of sbot with the same parameters."""
        theirs, known = target.theirs.fit, inspect.signature(target.mine).parameters

        @functools.wraps(theirs)
        def fit(estimator: Any, *args: Any, **kwargs: Any) -> Any:
            if self._inside():
                return theirs(estimator, *args, **kwargs)
            options = {name: getattr(estimator, name) for name in known}  # a fit may change them
            made: list[Any] = []
            twins.pop(estimator, None)

            def mine() -> Any:
                made.append(target.mine(**options).fit(*args, **kwargs))
                return made[-1]

            given = {**options, "reg": options["reg_e"]}

            def solved() -> None:  # what the judge needs to know of the problem
                found = {"a": "mu_s", "b": "mu_t", **({} if "reg_cl" in options else {"M": "cost_"})}
                given.update({key: getattr(estimator, name, None) for key, name in found.items()})

            told = {name: value for name, value in options.items() if value != known[name].default}
            call = Call(f"{target.name}.fit", lambda: theirs(estimator, *args, **kwargs), mine, given, told, _parts)
            out = self._make(call, solved)
            if made:
                twins[estimator] = made[0], _inherited(call.found[0]), _inherited(call.found[1])
            if self.returned == "sbot":
                vars(estimator).update(vars(out))
                return estimator
            return out

        return fit

    def _map(self, target: Target, name: str, twins: Any) -> Callable[..., Any]:
        theirs = getattr(target.theirs, name)

        @functools.wraps(theirs)
        def mapped(estimator: Any, *args: Any, **kwargs: Any) -> Any:
            if self._inside() or estimator not in twins:  # a copy, or one that sbot could not fit
                return theirs(estimator, *args, **kwargs)
            twin, *found = twins[estimator]
            mine = functools.partial(getattr(twin, name), *args, **kwargs)
            given = {"x": getattr(estimator, "xs_", None)}
            call = Call(f"{target.name}.{name}", lambda: theirs(estimator, *args, **kwargs), mine, given, {}, _array)
            call.solves, call.judge = False, lambda _: (found[0], found[1])
            return self._make(call)

        return mapped

    def _loss(self, target: Target) -> Callable[..., Any]:
        theirs = target.theirs.forward

        @functools.wraps(theirs)
        def forward(loss: Any, *args: Any) -> Any:
            if self._inside():
                return theirs(loss, *args)
            options = {name: getattr(loss, name) for name in LOSS.split() if hasattr(loss, name)}
            mine = functools.partial(_apply, target.mine, options, args)
            judge = functools.partial(self._potentials, target, theirs, options, args)
            told = {name: value for name, value in options.items() if name in ("loss", "p", "blur", "reach", "debias")}
            given = {**options, "y": args[-1] if args else None}
            return self._make(Call(target.name, lambda: theirs(loss, *args), mine, given, told, _parts, judge))

        return forward

    def _count_others(self) -> None:
        """Functions of POT that sbot does not cover are counted where the program itself calls them."""
        covered = [target.theirs for target in targets("ot")]
        for name, function in public_functions(*OTHERS).items():
            if name.rpartition(".")[2] not in TOOLS and not any(function is one for one in covered):
                self.bindings.replace(function, self._counted(name, function), "ot")

    def _counted(self, name: str, function: Any) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            here = self._here
            if getattr(here, "inside", False) or getattr(here, "other", False):
                return function(*args, **kwargs)
            here.other = True
            self.note("other", name=name)
            try:
                return function(*args, **kwargs)
            finally:
                here.other = False

        call.__original__ = function  # type: ignore[attr-defined]
        return call

    # ---- both sides ------------------------------------------------------------------------------------------------

    def _inside(self) -> bool:
        """Whether this is a call within a call, which is not counted again."""
        return bool(getattr(self._here, "inside", False))

    def _shared(self, args: Any, kwargs: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """The arguments of both sides: the same, but for generators of random numbers, of which the other side has a copy."""
        other = tuple(_own(value) for value in args), {key: _own(value) for key, value in kwargs.items()}
        return ((args, kwargs), other) if self.returned == "original" else (other, (args, kwargs))

    def _make(self, call: Call, between: Callable[[], None] | None = None) -> Any:
        here = self._here
        here.inside = True
        try:
            original = self._side(call.theirs, lambda out: call.seen(out, ASKED), self.returned != "original")
            if between is not None:
                between()
            here.solves, here.forwarded = 0, False
            names = tuple(original.parts) or ASKED
            ours = self._side(call.mine, lambda out: call.seen(out, names), self.returned == "original")
            passed = here.forwarded or (call.solves and ours.fault is None and not here.solves)
            try:
                self._record(call, original, ours, passed)
            except Exception as fault:
                self.note("trouble", what=f"a call of {call.name} was not judged: {type(fault).__name__}: {fault}")
        finally:
            here.inside = False
        chosen = original if self.returned == "original" else ours
        if chosen.fault is not None:
            raise chosen.fault
        return chosen.out

    def _side(self, make: Callable[[], Any], see: Callable[[Any], Parts], silent: bool) -> Side:
        side = Side()
        with contextlib.ExitStack() as stack:
            caught = stack.enter_context(_unnoticed()) if silent else []
            try:
                with side.meter:  # with the parts of a lazy result that are compared
                    side.out = make()
                    side.parts = see(side.out)
            except Exception as fault:
                side.fault = fault
        side.said = [str(warning.message) for warning in caught]
        return side

    def _record(self, call: Call, original: Side, ours: Side, passed: bool) -> None:
        with _unnoticed():
            apart = deviations(ours.parts, original.parts)
            asked = question(call.name, call.given) if call.solves else None
            verdict = self._verdict(call, asked, original, ours, apart, passed)
        self.note(
            "call",
            name=call.name,
            where=_where(),
            options={key: _short(value) for key, value in call.explicit.items() if _is_plain(value)},
            shape=_shape(original.parts or ours.parts),
            deviations=apart,
            original=original.told(),
            sbot=ours.told(),
            **verdict,
        )

    def _verdict(
        self, call: Call, asked: Question | None, original: Side, ours: Side, apart: Any, passed: bool
    ) -> dict[str, Any]:
        if passed:
            return {"verdict": "forwarded", "why": _why(call.given)}
        limit = floor(call.given) if asked is None else asked.limit
        worst = _worst(apart)
        call.found = theirs, mine = _finding(asked, original), _finding(asked, ours)
        if worst is not None and worst <= limit:
            return _judged("agree", theirs, mine)
        if not theirs.fault and not mine.fault:
            if worst is None:
                return _judged("not compared", theirs, mine)
            call.found = theirs, mine = self._second_look(call, asked)
        if theirs.fault and mine.fault:
            return _judged("both at fault", theirs, mine)
        if theirs.fault:
            return _judged("defect avoided", theirs, mine)
        return _judged("sbot at fault" if mine.fault else "differ", theirs, mine)

    def _second_look(self, call: Call, asked: Question | None) -> tuple[Finding, Finding]:
        """Findings on answers that look sound and differ."""
        found = (None if call.judge is None else call.judge(call)) or call.found
        for k in (0, 1):
            if higher(found[k], found[1 - k], asked):
                one, other = (f"{found[side].objective:.9g}" for side in (k, 1 - k))
                worse = Finding(f"objective {one} where {other} is reached", "not optimal", found[k].error)
                return (worse, found[1]) if k == 0 else (found[0], worse)
        return found

    def _function_again(self, target: Target, args: Any, kwargs: Any, call: Call) -> tuple[Finding, Finding] | None:
        """Whether strict=True agrees with POT; else, of a function that returns a value, the plans it comes from."""
        if target.root == "ot":
            with pot.strict(), contextlib.suppress(Exception):
                again = _worst(deviations(call.seen(call.mine(), ASKED), call.seen(call.theirs(), ASKED)))
                if again is not None and again <= floor(call.given):
                    return Finding("a defect of POT, which strict=True reproduces", "known defect"), Finding()
        return self._plans(target, args, kwargs, call.given)

    def _plans(self, target: Target, args: Any, kwargs: Any, given: dict[str, Any]) -> tuple[Finding, Finding] | None:
        """Of a function that returns a value: the plans it comes from."""
        short = target.name.rpartition(".")[2]
        if short not in PLANS:
            return None
        name, without = PLANS[short]
        module = target.name.split(".")[1]
        theirs = getattr(getattr(sys.modules[f"ot.{module}"], name), "__wrapped__", None)
        mine = getattr(getattr(pot, module), name)
        if theirs is None or given.get("isLazy"):
            return None
        bound = {key: value for key, value in _arguments(target.theirs, args, kwargs)[1].items() if key not in without}
        asked = question(target.name, given)
        sides = [parts(function(**{**bound, "log": False})) for function in (theirs, mine)]
        first, second = (examine(asked, side) for side in sides)
        return first, second

    def _potentials(
        self, target: Target, theirs: Any, options: dict[str, Any], args: Any, _: Call
    ) -> tuple[Finding, Finding] | None:
        """Of a loss: the marginals of the plans its potentials make."""
        if options.get("reach") is not None or options.get("cost") is not None or len(args) not in (2, 4):
            return None
        a, x, b, y = args if len(args) == 4 else (None, args[0], None, args[1])
        a, b = (torch.full((len(z),), 1 / len(z)) if w is None else w for w, z in ((a, x), (b, y)))
        error = potentials_judge((x, y), (a, b), options["p"], float(options["blur"]) ** options["p"])
        own = {**options, "potentials": True, "debias": False}
        found = []
        for value in (error(theirs(target.theirs(**own), *args)), error(_apply(target.mine, own, args))):
            if value is None:
                return None
            missed = value > floor({"x": x})
            found.append(Finding(*((f"marginal error {value:.1e}", "marginals missed") if missed else ("", "")), value))
        return found[0], found[1]


# ---- small parts ---------------------------------------------------------------------------------------------------


def _parts(out: Any, names: tuple[str, ...]) -> Parts:
    return parts(out, 0, names)


def _array(out: Any, names: tuple[str, ...]) -> Parts:
    return {} if out is None else {"array": out}


def _apply(module: Any, options: dict[str, Any], args: Any) -> Any:
    return module(**options).forward(*args)


def _finding(asked: Question | None, side: Side) -> Finding:
    if side.fault is not None:
        return Finding(f"raised {type(side.fault).__name__}: {side.fault}", "raised")
    return examine(asked, side.parts)


def _inherited(fit: Finding) -> Finding:
    return Finding(f"of its fit, {fit.fault}", fit.kind) if fit.fault else Finding()


def _worst(apart: dict[str, tuple[float, float]]) -> float | None:
    """The largest relative deviation; of potentials only where there is nothing else."""
    found = [gap[1] for kind, gap in apart.items() if kind != "potentials"] or [gap[1] for gap in apart.values()]
    return max(found, default=None)


def _judged(verdict: str, theirs: Finding, mine: Finding) -> dict[str, Any]:
    told = {"verdict": verdict, "errors": [theirs.error, mine.error], "faults": [theirs.fault, mine.fault]}
    return told | {"kind": theirs.kind or mine.kind}


def _arguments(function: Any, args: Any, kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """By name: with the defaults, and without."""
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return {}, {}
    explicit = _flat(bound.arguments)
    bound.apply_defaults()
    return _flat(bound.arguments), explicit


def _flat(arguments: dict[str, Any]) -> dict[str, Any]:
    rest = arguments.get("kwargs", {})
    return {**{key: value for key, value in arguments.items() if key != "kwargs"}, **rest}


def _pairs(given: dict[str, Any]) -> int:
    """The entries of the plan between two samples; 0 where there is a matrix already."""
    sides = [given.get(name) for name in ("X_a", "X_b")]
    return 0 if any(side is None for side in sides) else len(sides[0]) * len(sides[1])  # type: ignore[arg-type]


def _own(value: Any) -> Any:
    """A copy of a generator of random numbers, which a call would advance; anything else as it is."""
    if isinstance(value, (np.random.Generator, np.random.RandomState)):
        return copy.deepcopy(value)
    if isinstance(value, torch.Generator):
        twin = torch.Generator(value.device)
        twin.set_state(value.get_state())
        return twin
    return value


@contextlib.contextmanager
def _unnoticed() -> Iterator[list[Any]]:
    """Within it, nothing is seen by the program: no random number is drawn, no warning shown, nothing printed."""
    state, numbers, tensor = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 (the program's own)
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("always")
            yield caught
    finally:
        random.setstate(state)
        np.random.set_state(numbers)  # noqa: NPY002
        torch.set_rng_state(tensor)
        if devices:
            torch.cuda.set_rng_state_all(devices)


def _where() -> str:
    """File and line of the program that called."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in LIBRARIES:
        frame = frame.f_back
    return "unknown" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _why(given: dict[str, Any]) -> str:
    """Why a call went to the original."""
    for value in given.values():
        root = type(value).__module__.partition(".")[0]
        if root in ("jax", "jaxlib", "tensorflow", "cupy"):
            return f"arrays of {root}"
    if given.get("loss", "sinkhorn") != "sinkhorn":
        return f"loss={given['loss']!r} is not transport"
    if "reg" in given and (given["reg"] is None or (np.ndim(given["reg"]) == 0 and given["reg"] == 0)):
        return f"reg={given['reg']}: not regularised"
    usual = {
        "reg_type": ("kl", "entropy"),
        "unbalanced_type": ("kl",),
        "method": ("none", "auto", "sinkhorn", "sinkhorn_log"),
    }
    for name, known in usual.items():
        if name in given and str(given[name]).lower() not in known:
            return f"{name}={given[name]!r}"
    return "options that sbot does not cover"


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str, np.number)) or (isinstance(value, tuple) and len(value) < 3)


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, (float, np.floating)) else repr(value)[:40]


def _shape(found: Parts) -> list[int]:
    one = found.get("plan", found.get("array"))
    return [] if one is None else list(one.shape)
