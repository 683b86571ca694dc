"""Exceptions: a user's mistake is a ValueError that names the column, the value and the remedy."""

from __future__ import annotations


class AnomalyCVAEError(Exception):
    """Base of every exception that this package raises on purpose."""


class DataError(AnomalyCVAEError, ValueError):
    """The rows cannot be used as they are."""


class ConditionError(DataError):
    """The condition is missing, malformed or of a class not seen in training."""


class ParameterError(AnomalyCVAEError, ValueError):
    """A parameter is out of range or does not go with another one."""


class BundleError(AnomalyCVAEError, ValueError):
    """A saved model is incomplete, changed or of a format this version cannot read."""


class OutputError(AnomalyCVAEError, OSError):
    """A result cannot be written; what was finished before is kept."""


class TrackingError(AnomalyCVAEError, RuntimeError):
    """The tracking server cannot be reached, or refuses."""


class TrainingDivergedError(AnomalyCVAEError, FloatingPointError):
    """Training met a value that is not finite."""


class MissingDependencyError(AnomalyCVAEError, ImportError):
    """An optional package that this call needs is not installed."""
