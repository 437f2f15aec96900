"""Errors and warnings; every message names the argument, says what is wrong, and ends with what to do."""

from __future__ import annotations


class SbotError(Exception):
    """Base class of every error raised by sbot."""


class InvalidProblem(SbotError, ValueError):
    """An argument is wrong; raised at the door, before any computation."""


class Unsupported(SbotError, NotImplementedError):
    """What was asked for does not exist for this object; the message names the alternative."""


class NumericalError(SbotError, ArithmeticError):
    """An iteration left the finite numbers."""


class InvalidFile(SbotError, ValueError):
    """A file is not an intact sbot file of a version that this release reads."""


class NotConverged(UserWarning):
    """A solver stopped before it reached its tolerance; the result carries the error it did reach."""


class PrecisionWarning(UserWarning):
    """What was asked for is beyond what the dtype can resolve; the message says what was used instead."""
