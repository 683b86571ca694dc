"""Ranges of the detector's parameters, checked at the start of fit."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from anomaly_cvae.errors import ParameterError

CHOICES: dict[str, tuple[Any, ...]] = {
    "conditioning": ("shared", "per_class"),
    "unseen_class": ("raise", "anomaly", "marginal"),
    "missing_condition": ("raise", "marginal"),
    "score_kind": ("elbo", "contrast", "both", "parts"),
    "part_weights": ("auto", "alike", "spread"),
    "linear_start": (True, False),
    "prior": ("aggregate", "standard", "learned", "vamp"),
    "objective": ("elbo", "iwae", "semi_supervised", "hybrid", "vae_gan"),
    "mask_shapes": ("mixed", "quadrants", "cells"),
    "inference_head": (True, False),
    "condition_on_observed": (True, False),
    "mixed_precision": (True, False, "training"),
    "dtype": ("float32", "float64"),
}
WHOLE_FROM_ONE = ("n_estimators", "train_samples", "n_samples", "max_steps", "batch_size", "patience")


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, (bool, np.bool_)) and int(value) >= 1


def _number(low: float, high: float, *, open_low: bool = False, open_high: bool = False) -> Callable[[Any], bool]:
    def accepts(value: Any) -> bool:
        if not isinstance(value, Real) or isinstance(value, (bool, np.bool_)):
            return False
        number = float(value)
        above = number > low if open_low else number >= low
        below = number < high if open_high else number <= high
        return above and below

    return accepts


def _one_or_several(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def accept(value: Any) -> bool:
        if isinstance(value, (tuple, list)):
            return len(value) > 0 and all(map(accepts, value))
        return accepts(value)

    return accept


FROM_0_UP = _one_or_several(_number(0, np.inf, open_high=True))
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(WHOLE_FROM_ONE, (_whole, "a whole number from 1 up")),
    "false_alarm_rate": (_number(0, 1, open_low=True, open_high=True), "a number in (0, 1)"),
    "free_bits": (_number(0, np.inf, open_high=True), "a number of nats from 0 up"),
    "kl_weight": (
        lambda value: value == "auto" if isinstance(value, str) else FROM_0_UP(value),
        "'auto', a number from 0 up, or a tuple of them",
    ),
    "input_noise": (FROM_0_UP, "a number from 0 up, or a tuple of them"),
    "mask_rate": (_number(0, 1), "a number in [0, 1]"),
    "scale_floor": (_number(0, np.inf, open_low=True, open_high=True), "a number above 0"),
    "learning_rate": (_number(0, np.inf, open_low=True, open_high=True), "a number above 0"),
    "validation_fraction": (_number(0, 1, open_high=True), "a number in [0, 1)"),
    "calibration_fraction": (_number(0, 1, open_high=True), "a number in [0, 1)"),
    "contamination": (
        lambda value: value == "auto" or _number(0, 0.5, open_low=True)(value),
        "'auto' or a number in (0, 0.5]",
    ),
    "latent_dim": (lambda value: value == "auto" or _whole(value), "'auto' or a whole number from 1 up"),
    "channels": (
        lambda value: isinstance(value, (tuple, list)) and len(value) > 0 and all(_whole(width) for width in value),
        "a tuple of whole numbers from 1 up, one per halving of an image, such as (32, 64)",
    ),
    "checkpoint": (
        lambda value: value is None or isinstance(value, (str, Path)),
        "None or the path of a file",
    ),
    "hidden_dims": (
        lambda value: isinstance(value, (tuple, list)) and all(_whole(width) for width in value),
        "a tuple of whole numbers from 1 up, such as (128, 128), or () for a linear model",
    ),
}


def check_parameters(estimator: Any) -> None:
    """Check every parameter of a detector.

    Raises
    ------
    ParameterError
        Naming the parameter, what it may be and what it is.
    """
    for name, choices in CHOICES.items():
        value = getattr(estimator, name)
        if value not in choices:
            raise ParameterError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")
    for name, (accepts, description) in RANGES.items():
        value = getattr(estimator, name)
        if not accepts(value):
            raise ParameterError(f"{name} must be {description}, not {value!r}")
    if estimator.validation_fraction + estimator.calibration_fraction >= 1.0:
        raise ParameterError("validation_fraction and calibration_fraction leave no rows for training")
    if estimator.objective == "iwae" and estimator.train_samples < 2:
        raise ParameterError("objective='iwae' needs train_samples of at least 2")
    if estimator.objective == "semi_supervised" and estimator.conditioning == "per_class":
        raise ParameterError(
            "objective='semi_supervised' weighs the classes of a row against each other in one network: use "
            "conditioning='shared'"
        )
    if estimator.objective == "hybrid" and not estimator.condition_on_observed:
        raise ParameterError("objective='hybrid' predicts from an observed part: set condition_on_observed=True")
    if estimator.inference_head and estimator.conditioning == "per_class":
        raise ParameterError("inference_head=True tells classes apart in one network: use conditioning='shared'")
