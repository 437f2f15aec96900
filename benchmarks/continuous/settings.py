"""Every setting of every contender, in one place."""

from __future__ import annotations

from typing import Any

import torch

import sbot

#: What describes a contender: its class, the arguments of the class, those of its fit, its cache and its network.
Plan = dict[str, Any]
#: A mixture learns at a higher rate than a network.
LIGHT: Plan = {"steps": 2_000, "batch": 512, "lr": 1e-2, "ema": 0.99, "clip": None}
#: Networks of two hidden layers: enough for the laws below, and twice as fast as the default.
ONE_WAY: Plan = {"width": 128, "depth": 2}
BOTH_WAYS: Plan = {**ONE_WAY, "directed": True}
#: Weights averaged over 2,000 steps.
LONG: Plan = {"batch": 512, "ema": 0.9995}


class Missing(Exception):
    """The installed version has no such solver."""


# ---- target 5: Gaussians -------------------------------------------------------------------------------------------------

#: Steps of the grid on which every contender simulates, which is also where the laws are compared.
#: Euler steps of this size cost the exact drift 1.3 to 2.6 times the statistical floor, Heun steps hardly anything.
GAUSSIAN_STEPS = 20
GAUSSIANS: dict[int, dict[str, Plan]] = {
    d: {
        "DSBM": {
            "class": "DSBM",
            "steps": GAUSSIAN_STEPS,
            "refresh": 100,
            "mlp": BOTH_WAYS,
            "fit": LONG | {"steps": 12_000},
        },
        "DSBM, started from Gaussian fits": {
            "class": "DSBM",
            "steps": GAUSSIAN_STEPS,
            "refresh": 100,
            "start": "gaussian fits",
            "mlp": BOTH_WAYS,
            "fit": LONG | {"steps": 4_000},
        },
        "DSB": {"class": "DSB", "steps": GAUSSIAN_STEPS, "rounds": 5, "mlp": ONE_WAY, "fit": LONG | {"steps": 4_000}},
        "DSB, simplified target": {
            "class": "DSB",
            "steps": GAUSSIAN_STEPS,
            "rounds": 5,
            "target": "simplified",
            "mlp": ONE_WAY,
            "fit": LONG | {"steps": 4_000},
        },
    }
    for d in (5, 20, 50)
}
#: The run that is looked at after each half-step.
GAUSSIAN_HALF_STEPS: Plan = {"class": "DSB", "steps": GAUSSIAN_STEPS, "mlp": ONE_WAY, "fit": LONG | {"steps": 2_500}}
GAUSSIAN_HALF_STEPS_D, GAUSSIAN_HALF_STEPS_COUNT = 5, 10

# ---- target 6: mixtures --------------------------------------------------------------------------------------------------

MIXTURE_STEPS = 200
MIXTURES: dict[tuple[int, float], dict[str, Plan]] = {
    (d, eps): {
        "LightSB": {"class": "LightSB", "components": 50, "covariance": "diagonal", "fit": LIGHT},
        **(
            {
                "DSBM": {
                    "class": "DSBM",
                    "refresh": 200,
                    "steps": 20,
                    "start": "gaussian fits",
                    "mlp": BOTH_WAYS,
                    "fit": LONG | {"steps": 3_000},
                },
                "DSB": {
                    "class": "DSB",
                    "steps": 20,
                    "rounds": 3,
                    "start": "gaussian fits",
                    "mlp": ONE_WAY,
                    "fit": LONG | {"steps": 1_000},
                },
            }
            if d <= 16 and eps == 1.0  # the networks take minutes a cell
            else {}
        ),
    }
    for d in (2, 16, 64, 128)
    for eps in (0.1, 1.0, 10.0)
}

# ---- target 7: toys ------------------------------------------------------------------------------------------------------

#: Small steps at both ends: the laws have features of size 0.1, and the last step adds its own noise.
TOY_GRID: Plan = {"n": 20, "kind": "symmetric", "ratio": 30.0}
TOY_DSB: Plan = {
    "class": "DSB",
    "grid": TOY_GRID,
    "rounds": 5,
    "cache": {"reuse": 2},
    "mlp": ONE_WAY,
    "fit": LONG | {"steps": 1_500},
}
TOYS: dict[str, dict[str, Plan]] = {
    toy: {
        "DSB": TOY_DSB,
        **({"DSB, started from Gaussian fits": TOY_DSB | {"start": "gaussian fits"}} if "moons-8" in toy else {}),
        "DSB, started from LightSB": TOY_DSB | {"rounds": 1, "start": {"class": "LightSB", "fit": LIGHT}},
        "DSBM": {"class": "DSBM", "grid": TOY_GRID, "refresh": 100, "mlp": BOTH_WAYS, "fit": LONG | {"steps": 6_000}},
        "LightSB": {"class": "LightSB", "fit": LIGHT},
        "PlugIn": {"class": "PlugIn", "samples": 4_096},
    }
    for toy in ("normal-8gaussians", "normal-moons", "normal-scurve", "moons-8gaussians")
}

# ---- target 8: single cells ----------------------------------------------------------------------------------------------

CELLS: dict[str, Plan] = {
    "plug-in Sinkhorn": {"class": "Sinkhorn", "tol": 1e-3, "max_iter": 20_000},
    "closed form between Gaussian fits": {"class": "ClosedForm", "ends": "gaussian fits"},
    "LightSB": {"class": "LightSB", "components": 100, "covariance": "diagonal", "fit": LIGHT | {"steps": 1_000}},
    "DSBM, started from Gaussian fits": {
        "class": "DSBM",
        "refresh": 200,
        "start": "gaussian fits",
        "mlp": BOTH_WAYS,
        "fit": LONG | {"steps": 2_000},
    },
}

# ---- the claims of the paper ---------------------------------------------------------------------------------------------

CLAIM_SCORE: Plan = {"class": "DSB", "steps": 50, "half_steps": 1, "mlp": ONE_WAY, "fit": LONG | {"steps": 4_000}}
CLAIM_SHORT: Plan = {"class": "DSB", "grid": TOY_GRID, "mlp": ONE_WAY, "fit": LONG | {"steps": 1_500}}
CLAIM_SHORT_COUNT = 10
CLAIM_STEPS = (10, 20, 30, 50)
CLAIM_FEW: dict[str, Plan] = {
    "DSB": {"class": "DSB", "grid": TOY_GRID, "rounds": 4, "mlp": ONE_WAY, "fit": LONG | {"steps": 1_000}},
    "DSB, first half-step only": {
        "class": "DSB",
        "grid": TOY_GRID,
        "half_steps": 1,
        "mlp": ONE_WAY,
        "fit": LONG | {"steps": 1_000},
    },
}
DIGITS: dict[str, Plan] = {
    "DSB": {
        "class": "DSB",
        "steps": 20,
        "rounds": 2,
        "unet": {"width": 16},
        "cache": {"paths": 512, "reuse": 4},
        "fit": {"steps": 500, "batch": 64},
    },
    "DSBM": {
        "class": "DSBM",
        "refresh": 200,
        "steps": 20,
        "pairs": 512,
        "unet": {"width": 16, "directed": True},
        "fit": {"steps": 1_500, "batch": 64},
    },
}
DIGITS_EPS = {"generation": 1.0, "interpolation": 0.5}


# ---- from a plan to a solver ---------------------------------------------------------------------------------------------

#: Parts of a plan that are built into objects.
BUILT = ("class", "fit", "cache", "unet", "mlp", "start", "grid", "ends")


def make(plan: Plan, mu: Any, nu: Any, eps: float, *, seed: int, quick: bool, **changes: Any) -> Any:
    """The solver that ``plan`` describes; ``changes`` replace arguments, those of ``fit`` one by one."""
    plan = {**plan, **changes, "fit": {**plan.get("fit", {}), **changes.get("fit", {})}}
    if not hasattr(sbot, plan["class"]):
        raise Missing(f"no sbot.{plan['class']} in this version")
    if quick:
        plan = smaller(plan)
    arguments = {key: value for key, value in plan.items() if key not in BUILT}
    if plan["fit"]:
        arguments["fit"] = sbot.FitConfig(**{"seed": seed, **plan["fit"]})
    if "grid" in plan:
        arguments["steps"] = sbot.TimeGrid(**{**plan["grid"], **({"n": plan["steps"]} if "steps" in plan else {})})
    if "cache" in plan:
        arguments["cache"] = sbot.Cache(**plan["cache"])
    if "unet" in plan or "mlp" in plan:
        arguments["net"] = network(plan, mu.event_shape, seed)
    if plan["class"] == "PlugIn":
        arguments["seed"] = seed
    return getattr(sbot, plan["class"])(**arguments)


def start(plan: Plan, mu: Any, nu: Any, eps: float, *, seed: int, quick: bool) -> sbot.Bridge | None:
    """The bridge whose drifts a contender starts from: between Gaussian fits, or that of another plan."""
    chosen = plan.get("start")
    if chosen is None:
        return None
    if chosen == "gaussian fits":
        return gaussian_fits(mu, nu, eps, seed)
    return sbot.solve_bridge(mu, nu, eps, solver=make(chosen, mu, nu, eps, seed=seed, quick=quick))


def smaller(plan: Plan) -> Plan:
    """The same in a few seconds."""
    out = dict(plan)
    if "steps" in plan["fit"]:
        out["fit"] = {**plan["fit"], "steps": max(20, plan["fit"]["steps"] // 50), "batch": 128}
    if plan["class"] == "DSB":
        out["cache"] = {"paths": 128, "reuse": 4}
        out["steps"] = min(plan.get("steps", 20), 20)
    if plan["class"] == "DSBM":
        out["pairs"], out["steps"] = 256, min(plan.get("steps", 20), 20)
    if "unet" in plan:
        out["unet"] = {**plan["unet"], "width": 8}
    if "samples" in plan:
        out["samples"] = 200
    return out


def network(plan: Plan, event: tuple[int, ...], seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    if "unet" in plan:
        return sbot.UNet(event, **plan["unet"], generator=generator)
    return sbot.TimeMLP(event[0], **plan["mlp"], generator=generator)


def fitted(mu: Any, nu: Any, seed: int, n: int = 10_000) -> tuple[sbot.Gaussian, sbot.Gaussian]:
    """Gaussian fits of ``n`` samples of each side, or of all its points."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (
        sbot.Gaussian.from_samples(law.points if isinstance(law, sbot.Discrete) else law.sample(n, generator=generator))
        for law in (mu, nu)
    )
    return first, second


def gaussian_fits(mu: Any, nu: Any, eps: float, seed: int) -> sbot.Bridge:
    """The closed form between Gaussian fits."""
    return sbot.solve_bridge(*fitted(mu, nu, seed), eps, solver=sbot.ClosedForm())


def words(plan: Plan) -> str:
    """A plan in words, for the page."""
    parts = []
    for key, value in plan.items():
        if isinstance(value, dict):
            value = "(" + ", ".join(f"{k} {v}" for k, v in value.items()) + ")"
        if key != "class":
            parts.append(f"{key} {value}")
    return f"{plan['class']}: {', '.join(parts)}"
