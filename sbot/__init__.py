"""sbot: entropic optimal transport and Schrödinger bridges, one call from two measures to a bridge."""

from .api import AUTO, SOLVERS, choose_solver, load, solve_bridge
from .bridge import Bridge, DualPotential, Potentials, Report
from .costs import Cosine, Cost, Lp, MatrixCost, Quadratic
from .diffusion import Diffusion
from .distributed import together
from .divergence import sinkhorn_divergence
from .drift_bridge import DriftBridge
from .errors import InvalidFile, InvalidProblem, NotConverged, NumericalError, PrecisionWarning, SbotError, Unsupported
from .measures import Discrete, Gaussian, Measure, Mixture, Sampler, as_measure
from .neural import Cache, FitConfig, TimeMLP, UNet
from .path import BridgePath, solve_path
from .potential_bridge import PotentialBridge
from .problem import Problem
from .reference import Affine, Brownian, LinearReference, LinearSDE, OrnsteinUhlenbeck, Reference, Static
from .rounding import FeasiblePlan, SparsePlan
from .sde import TimeGrid
from .solvers import DSB, DSBM, ClosedForm, LightSB, PlugIn, Progress, Schedule, Sinkhorn, Solver

__version__ = "0.1.0"

__all__ = [
    "AUTO",
    "DSB",
    "DSBM",
    "SOLVERS",
    "Affine",
    "Bridge",
    "BridgePath",
    "Brownian",
    "Cache",
    "ClosedForm",
    "Cosine",
    "Cost",
    "Diffusion",
    "Discrete",
    "DriftBridge",
    "DualPotential",
    "FeasiblePlan",
    "FitConfig",
    "Gaussian",
    "InvalidFile",
    "InvalidProblem",
    "LightSB",
    "LinearReference",
    "LinearSDE",
    "Lp",
    "MatrixCost",
    "Measure",
    "Mixture",
    "NotConverged",
    "NumericalError",
    "OrnsteinUhlenbeck",
    "PlugIn",
    "PotentialBridge",
    "Potentials",
    "PrecisionWarning",
    "Problem",
    "Progress",
    "Quadratic",
    "Reference",
    "Report",
    "Sampler",
    "SbotError",
    "Schedule",
    "Sinkhorn",
    "Solver",
    "SparsePlan",
    "Static",
    "TimeGrid",
    "TimeMLP",
    "UNet",
    "Unsupported",
    "as_measure",
    "choose_solver",
    "load",
    "sinkhorn_divergence",
    "solve_bridge",
    "solve_path",
    "together",
]
