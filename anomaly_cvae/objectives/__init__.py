"""Objectives: what training lowers, step by step. The loop in `anomaly_cvae.training` knows none by name."""

from __future__ import annotations

from collections.abc import Callable

from anomaly_cvae.errors import ParameterError
from anomaly_cvae.objectives.adversarial import Adversarial
from anomaly_cvae.objectives.bounds import BOUNDS, Bound, Weight, accumulator, elbo, importance_weighted
from anomaly_cvae.objectives.semi_supervised import SemiSupervised
from anomaly_cvae.objectives.step import BoundObjective, Draws, Loss, Objective
from anomaly_cvae.objectives.structured import Hybrid

__all__ = [
    "BOUNDS",
    "OBJECTIVES",
    "Adversarial",
    "Bound",
    "BoundObjective",
    "Draws",
    "Hybrid",
    "Loss",
    "Objective",
    "SemiSupervised",
    "Weight",
    "accumulator",
    "elbo",
    "importance_weighted",
    "objective",
]

OBJECTIVES: dict[str, Callable[[int, float], Objective]] = {
    "elbo": lambda samples, free_bits: BoundObjective(elbo, samples, free_bits),
    "iwae": lambda samples, free_bits: BoundObjective(importance_weighted, samples),
    "semi_supervised": SemiSupervised,
    "hybrid": Hybrid,
    "vae_gan": Adversarial,
}
"""By name: an objective for so many samples of z per row, and free bits (nats per latent unit)."""


def objective(name: str, n_samples: int = 1, free_bits: float = 0.0) -> Objective:
    """Return a new objective of the kind called ``name``.

    Raises
    ------
    ParameterError
        If there is none.
    """
    if name not in OBJECTIVES:
        raise ParameterError(f"unknown objective {name!r}; there are {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name](n_samples, free_bits)
