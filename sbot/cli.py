"""The command line: solve, sample, transport, info, plot, demo, migrate.

Exit codes: 0; 1 for bad input, with one line on stderr; 2 where the solver did not converge (the result is written all
the same, and marked); 130 after Ctrl-C.  Pictures and the demo import their libraries in their own commands.
"""

from __future__ import annotations

import json
import platform
import secrets
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from . import __version__
from .api import SOLVERS, choose_solver, load
from .bridge import Bridge, Report
from .costs import Cosine, Cost, Lp, MatrixCost, Quadratic
from .errors import InvalidProblem, PrecisionWarning, SbotError, Unsupported
from .files import ARRAYS, check_output, read_points, write_points
from .measures import Discrete, Gaussian, Measure
from .neural import FitConfig
from .problem import Problem
from .reference import Brownian, LinearSDE, OrnsteinUhlenbeck, Reference
from .solvers import Solver

BRIDGES = (".safetensors", "")
COSTS: dict[str, Callable[[], Cost]] = {
    "quadratic": Quadratic,
    "l1": lambda: Lp(1),
    "l2": lambda: Lp(2),
    "cosine": Cosine,
}
#: name: how to make it, and the numbers that may follow the colon, least and most
REFERENCES: dict[str, tuple[Callable[..., Reference], int, int]] = {
    "brownian": (Brownian, 0, 0),
    "ou": (OrnsteinUhlenbeck, 1, 2),
    "vp": (LinearSDE.vp, 0, 2),
    "ve": (LinearSDE.ve, 0, 2),
}


# ---- exit codes ----------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """Ctrl-C, before click makes an empty line of it."""


class Commands(click.Group):
    """A group whose every foreseen failure is one line on stderr and an exit code; a traceback is a bug of sbot."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted from None

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        try:
            sys.exit(super().main(*args, **kwargs) or 0)
        except (Interrupted, click.Abort):
            self._fail("interrupted", 130)
        except click.ClickException as error:
            context = getattr(error, "ctx", None)
            hint = f"; see '{context.command_path} --help'" if context else ""
            self._fail(error.format_message().rstrip(".") + hint)
        except MemoryError as error:
            self._fail(f"out of memory: {error or 'the problem does not fit'}")
        except OSError as error:
            self._fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
        except SbotError as error:
            self._fail(str(error))
        except RuntimeError as error:
            if "allocate" not in str(error) and "out of memory" not in str(error):
                raise
            self._fail("out of memory: the tensors do not fit; give fewer points or samples")

    @staticmethod
    def _fail(message: str, code: int = 1) -> None:
        say(message)
        sys.exit(code)


def say(message: str) -> None:
    """One line on stderr, however many the message has."""
    first, *rest = [" ".join(line.split()) for line in message.splitlines() if line.strip()] or ["failed"]
    joined = first + (" " if first.endswith(":") else "; ") + "; ".join(rest) if rest else first
    click.echo(f"sbot: {joined}", err=True)


# ---- options -------------------------------------------------------------------------------------------------------


def _reference(ctx: click.Context, param: click.Parameter, text: str | None) -> Reference | None:
    """``name`` or ``name:number,number``."""
    if text is None:
        return None
    name, _, rest = text.lower().partition(":")
    try:
        make, least, most = REFERENCES[name]
        numbers = [float(part) for part in rest.split(",") if part]
        if not least <= len(numbers) <= most:
            raise ValueError
    except (KeyError, ValueError):
        raise click.BadParameter(
            f"{text!r} is not one of brownian, ou:RATE, ou:RATE,MEAN, vp, vp:MIN,MAX, ve, ve:MIN,MAX"
        ) from None
    return make(*numbers)


class _Eps(click.ParamType[float | str]):
    """A number, or ``auto``."""

    name = "number or auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        if value == "auto":
            return "auto"
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number, nor 'auto'", param, ctx)


def _measure(path: Path, dtype: torch.dtype | None, histogram: bool, gaussian: bool) -> Measure:
    points, weights = read_points(path)
    points = points.to(dtype or points.dtype)
    weights = None if weights is None else weights.to(dtype or weights.dtype)
    if gaussian:
        return _fit(points, weights, path.name)
    if histogram and weights is None and (points.ndim < 2 or (points.ndim == 2 and 1 in points.shape)):
        return Discrete(None, points.flatten(), name=path.name)  # a .csv has two dimensions whatever it holds
    if points.ndim == 1:
        raise InvalidProblem(
            f"{path.name} holds one array of shape ({len(points)},); points are (n, d), (n, 1) on a line; "
            "for the weights of a histogram give --cost-matrix"
        )
    return Discrete(points, weights, name=path.name)


def _fit(points: Tensor, weights: Tensor | None, name: str) -> Gaussian:
    """Mean and covariance of weighted points, unbiased as `Gaussian.from_samples` is for equal weights."""
    cloud = Discrete(points, weights, name=name)
    assert cloud.points is not None
    share = (cloud.weights / cloud.mass[..., None])[..., None]
    left = 1 - share.square().sum((-2, -1))
    if bool((left <= 0).any()):
        raise InvalidProblem(f"{name} has one point, which has no covariance; give at least two")
    mean = (share * cloud.points).sum(-2)
    centred = cloud.points - mean[..., None, :]
    return Gaussian(mean, (share * centred).mT @ centred / left[..., None, None], name=name)


def _with_options(solver: Solver, **options: Any) -> Solver:
    """The solver with the options that were given."""
    given = {name: value for name, value in options.items() if value is not None}
    known = {field.name for field in fields(solver)}
    for name in given:
        if name not in known:
            raise InvalidProblem(f"{type(solver).__name__} has no --{name.replace('_', '-')}; drop it")
    return replace(solver, **given)


def _trained(solver: Solver, **options: Any) -> Solver:
    """The solver with the options of its training that were given."""
    given = {name: value for name, value in options.items() if value is not None}
    if not given:
        return solver
    fit = getattr(solver, "fit", None)
    if not isinstance(fit, FitConfig):
        raise InvalidProblem(
            f"{type(solver).__name__} trains nothing; drop --fit-steps, --fit-seed, --folder and --force"
        )
    return _with_options(solver, fit=replace(fit, **given))


def _generator(bridge: Bridge, seed: int | None) -> torch.Generator:
    generator = torch.Generator(bridge.problem.device)
    # torch would start every process from one seed; without --seed, draw a new one
    return generator.manual_seed(secrets.randbelow(2**32) if seed is None else seed)


_INPUT = click.Path(exists=True, dir_okay=False, path_type=Path)
_OUTPUT = click.Path(path_type=Path)
_SEED = click.IntRange(0, 2**63 - 1)
_COUNT = click.IntRange(1, 2**40)
_HELP = {"help_option_names": ["-h", "--help"], "show_default": True}


# ---- commands ------------------------------------------------------------------------------------------------------


@click.group(cls=Commands, context_settings=_HELP, no_args_is_help=False)
@click.version_option(__version__, message="sbot %(version)s")
def commands() -> None:
    """Entropic optimal transport and Schrödinger bridges.

    Points are read from and written to .npy, .npz ("points", "weights"), .csv and .safetensors; bridges are .safetensors.
    """


@commands.command()
@click.argument("source", type=_INPUT)
@click.argument("target", type=_INPUT)
@click.option(
    "--eps", type=_Eps(), required=True, help="Variance of the reference path, in the units of the cost; or auto."
)
@click.option("--out", type=_OUTPUT, required=True, help="The bridge, a .safetensors file.")
@click.option("--reference", callback=_reference, help="brownian (the default), ou:RATE, vp or ve.")
@click.option("--cost", type=click.Choice(list(COSTS)), help="A cost instead of a reference: no paths then.")
@click.option("--cost-matrix", type=_INPUT, help="Cost between the bins; SOURCE and TARGET are then histograms.")
@click.option("--relax", type=float, nargs=2, metavar="RHO_MU RHO_NU", help="Relax the marginals; inf holds one.")
@click.option("--mass", type=float, help="What the plan carries within the two marginals, which are then bounds.")
@click.option("--solver", default="auto", type=click.Choice(["auto", *(type(s).__name__.lower() for s in SOLVERS)]))
@click.option("--tol", type=float, help="Marginal error to stop at; default what the dtype can reach.")
@click.option("--max-iter", type=int, help="Iterations in total.")
@click.option("--fit-steps", type=int, help="Gradient steps of a trained solver; of each half-step for dsb.")
@click.option("--fit-seed", type=_SEED, help="Seed of a training.")
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Checkpoints of a training; run again to go on from them."
)
@click.option("--force", is_flag=True, help="Go on from a training of other settings.")
@click.option("--dtype", type=click.Choice(["float32", "float64"]), help="Default: as in the files.")
@click.option("--init", type=_INPUT, help="A bridge to start from.")
@click.option("--gaussian", is_flag=True, help="Fit a Gaussian to each side and solve in closed form.")
@click.option("--quiet", is_flag=True, help="No progress and no report.")
def solve(source: Path, target: Path, out: Path, quiet: bool, **asked: Any) -> int:
    """Solve from SOURCE to TARGET and write the bridge."""
    check_output(out, BRIDGES)
    problem = _problem(source, target, **{name: asked.pop(name) for name in _PROBLEM})
    start = None if asked["init"] is None else load(asked["init"])
    solver = choose_solver(problem, asked["solver"])
    fit = {"steps": asked["fit_steps"], "seed": asked["fit_seed"], "folder": asked["folder"]}
    solver = _trained(solver, **fit, resume="force" if asked["force"] else None)
    solver = _with_options(solver, tol=asked["tol"], max_iter=asked["max_iter"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", PrecisionWarning)
        bridge = solver.solve(problem, init=start, progress=(not quiet and sys.stderr.isatty()) or None)
    bridge.save(out)
    for warning in caught:
        say(f"warning: {warning.message}")
    if not quiet:
        click.echo(f"{bridge.report}\nwrote {out}")
    return _verdict(bridge.report, f"{out} is written and marked")


_PROBLEM = ("eps", "reference", "cost", "cost_matrix", "relax", "mass", "dtype", "gaussian")


def _problem(
    source: Path,
    target: Path,
    eps: float | str,
    reference: Reference | None,
    cost: str | None,
    cost_matrix: Path | None,
    relax: tuple[float, float] | None,
    mass: float | None,
    dtype: str | None,
    gaussian: bool,
) -> Problem:
    if cost_matrix is not None and (cost is not None or gaussian):
        raise InvalidProblem(f"--cost-matrix excludes {'--cost' if cost else '--gaussian'}; drop one of them")
    wanted = None if dtype is None else getattr(torch, dtype)
    charge: Cost | None = None if cost is None else COSTS[cost]()
    if cost_matrix is not None:
        values = read_points(cost_matrix)[0]
        charge = MatrixCost(values.to(wanted or values.dtype))
    mu, nu = (_measure(path, wanted, cost_matrix is not None, gaussian) for path in (source, target))
    return Problem.of(mu, nu, eps, reference, charge, relax, mass)


def _verdict(report: Report, where: str) -> int:
    if report.converged:
        return 0
    say(
        f"warning: NOT converged ({report.reason}) after {report.iterations} iterations: error {report.error:.1e}, "
        f"tolerance {report.tolerance:.1e}; {where}; raise --max-iter or --eps, loosen --tol, use --dtype float64, "
        "or go on with --init"
    )
    return 2


@commands.command()
@click.argument("bridge", type=_INPUT)
@click.option("--t", "time", type=float, required=True, help="Time in [0, 1].")
@click.option("--n", type=_COUNT, required=True, help="Number of samples.")
@click.option("--out", type=_OUTPUT, required=True)
@click.option("--seed", type=_SEED, help="Default: a new one each time.")
def sample(bridge: Path, time: float, n: int, out: Path, seed: int | None) -> None:
    """Draw samples of the process at time t."""
    check_output(out, ARRAYS)
    found = load(bridge)
    generator = _generator(found, seed)
    # the ends exist for a cost without a process too
    drawn = found.marginal(time).sample(n, generator=generator) if time in (0, 1) else None
    write_points(out, drawn if drawn is not None else found.interpolate(time, n, generator=generator))
    click.echo(f"wrote {n} samples at t = {time:g} to {out} (seed {generator.initial_seed()})")


@commands.command()
@click.argument("bridge", type=_INPUT)
@click.option("--in", "source", type=_INPUT, required=True, help="Points at t = 0.")
@click.option("--out", type=_OUTPUT, required=True)
def transport(bridge: Path, source: Path, out: Path) -> None:
    """Move points by the entropic map E[X_1 | X_0 = x]; weights go along where the format holds them."""
    check_output(out, ARRAYS)
    points, weights = read_points(source)
    moved = load(bridge).transport(points)
    write_points(out, moved, weights)
    click.echo(f"wrote {moved.shape[-2]} points to {out}")


def _marginals(problem: Problem) -> str:
    """What holds of the marginals of the plan."""
    if problem.mass is not None:
        said = " to ".join(dict.fromkeys(f"{float(end):.6g}" for end in torch.aminmax(problem.mass)))
        return f"bounds, mass {said}"
    return ", ".join("hard" if rho == float("inf") else f"relaxed by {rho:g}" for rho in problem.relax)


@commands.command()
@click.argument("bridge", type=_INPUT)
def info(bridge: Path) -> None:
    """Print the problem, the report, the values and the versions."""
    found = load(bridge)
    problem, report = found.problem, found.report
    stages = list(dict.fromkeys(eps for _, eps, _ in report.history))
    lines: dict[str, Any] = {
        "mu": problem.mu,
        "nu": problem.nu,
        "eps": problem.said_eps,
        "reference": problem.reference,
        "marginals": _marginals(problem),
        "solver": report.solver,
        "converged": f"{'yes' if report.converged else 'NO'} ({report.reason})",
        "error": f"{report.error:.3e}",
        "tolerance": f"{report.tolerance:.3e}",
        "iterations": f"{report.iterations} in {report.seconds:.2f} s",
    }
    if stages:
        first, last = report.history[0][2], report.history[-1][2]
        lines["history"] = f"{len(report.history)} checks, eps {stages[0]:.3g} -> {stages[-1]:.3g} in {len(stages)} "
        lines["history"] += f"stage{'s' * (len(stages) > 1)}, error {first:.1e} -> {last:.1e}"
    lines |= {f"note {k + 1}": note for k, note in enumerate(report.notes)}
    for name, value in (("cost", found.cost), ("linear cost", found.linear_cost), ("gap", found.gap)):
        lines[name] = _numbers(value)
    lines["versions"] = f"sbot {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    for name, value in lines.items():
        click.echo(f"{name:<12} {value}")


def _numbers(ask: Callable[[], Tensor]) -> str:
    try:
        return ", ".join(f"{value:.9g}" for value in ask().detach().double().flatten().tolist())
    except Unsupported as missing:
        return f"none ({missing})"


@commands.command()
@click.argument("bridge", type=_INPUT)
@click.option("--out", type=_OUTPUT, required=True, help=".png, .pdf, .svg or .jpg; .gif for an animation.")
@click.option("--kind", type=click.Choice(["auto", "plan", "paths", "marginals", "convergence"]), default="auto")
@click.option("--n", type=_COUNT, help="Number of samples drawn.")
@click.option("--seed", type=_SEED, default=0)
def plot(bridge: Path, out: Path, kind: str, n: int | None, seed: int) -> None:
    """Draw a bridge."""
    from . import plot as pictures

    check_output(out, (*pictures.FORMATS, ".gif"))
    found = load(bridge)
    options: dict[str, Any] = {} if n is None else {"n": n}
    if kind != "convergence":
        options["generator"] = _generator(found, seed)
    if out.suffix.lower() == ".gif":
        pictures.animation(found, out, **options)
    else:
        pictures.save(pictures.draw(found, kind, **options), out)
    click.echo(f"wrote {out}")


@commands.command()
@click.option("--out", type=_OUTPUT, default=Path("demo"), help="Folder for the bridge and the pictures.")
@click.option("--seed", type=_SEED, default=0)
def demo(out: Path, seed: int) -> int:
    """Bridge handwritten digits in pixel space and draw what happens."""
    from .demo import run

    bridge = run(out, seed=seed, progress=sys.stderr.isatty())
    return _verdict(bridge.report, f"{out} is written")


@commands.command(context_settings={"allow_interspersed_args": False})
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("--return", "returned", type=click.Choice(["original", "sbot"]), default="original")
@click.option("--json", "path", type=_OUTPUT, help="Write the report to this file, too.")
@click.option("--fail-above", type=float, help="Exit with 3 where a relative deviation is larger, or sbot is at fault.")
def migrate(command: tuple[str, ...], returned: str, path: Path | None, fail_above: float | None) -> int:
    """Run COMMAND with its calls of POT and GeomLoss made by both sides, and report on stderr.

    \b
        python -m sbot migrate -- python my_pipeline.py ARGS

    The program has the results of the originals, or with --return sbot those of sbot.  The exit code is the program's own;
    1 where it is 0 and nothing was compared.
    """
    from .migrate.run import run

    if path is not None:
        check_output(path, (".json",))
    report = run(command, returned)
    click.echo(report.text(), err=True)
    if path is not None:
        path.write_text(json.dumps(report.data(), indent=1), encoding="utf-8")
    if report.status:
        return report.status
    if report.nothing():
        return 1
    above = [] if fail_above is None else report.above(fail_above)
    if above:
        say(f"{'; '.join(above)}; the limit is {fail_above:g}")
    return 3 if above else 0
