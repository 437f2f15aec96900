"""sbot: entropic optimal transport and Schrödinger bridges, one call from two measures to a bridge."""

from .api import AUTO, SOLVERS, choose_solver, load, solve_bridge
from .bridge import Bridge, DualPotential, Potentials, Report
from .costs import Cosine, Cost, Lp, MatrixCost, Quadratic
from .errors import InvalidFile, InvalidProblem, NotConverged, NumericalError, PrecisionWarning, SbotError, Unsupported
from .measures import Discrete, Gaussian, Measure, Mixture, Sampler, as_measure
from .potential_bridge import PotentialBridge
from .problem import Problem
from .reference import Affine, Brownian, LinearReference, LinearSDE, OrnsteinUhlenbeck, Reference, Static
from .solvers import ClosedForm, Progress, Schedule, Sinkhorn, Solver

__version__ = "0.1.0"

__all__ = [
    "AUTO",
    "SOLVERS",
    "Affine",
    "Bridge",
    "Brownian",
    "ClosedForm",
    "Cosine",
    "Cost",
    "Discrete",
    "DualPotential",
    "Gaussian",
    "InvalidFile",
    "InvalidProblem",
    "LinearReference",
    "LinearSDE",
    "Lp",
    "MatrixCost",
    "Measure",
    "Mixture",
    "NotConverged",
    "NumericalError",
    "OrnsteinUhlenbeck",
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
    "Static",
    "Unsupported",
    "as_measure",
    "choose_solver",
    "load",
    "solve_bridge",
]
