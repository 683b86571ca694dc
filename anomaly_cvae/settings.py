"""What a detector's parameters make of its training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from anomaly_cvae.devices import resolve_device
from anomaly_cvae.fitting import FitSettings
from anomaly_cvae.objectives import objective
from anomaly_cvae.schema import Schema
from anomaly_cvae.training import PerMember, TrainingSettings

UNLIKE_KL_WEIGHTS = (1.0, 0.1)
"""Of the networks of a table without a condition, in turn. Told a condition, a network with a small weight ranked rows
of most tables worse, and its nats say less of which column is to blame."""


def fit_settings(asked: Any, schema: Schema) -> FitSettings:
    """The parameters ``asked`` as `fit_model` takes them, "auto" decided by the schema."""
    dtype = getattr(torch, asked.dtype)
    training = TrainingSettings(
        max_steps=asked.max_steps,
        batch_size=asked.batch_size,
        learning_rate=asked.learning_rate,
        objective=objective(asked.objective, asked.train_samples, asked.free_bits),
        kl_weight=_per_member(_kl_weight(asked, schema), asked.n_estimators),
        input_noise=_per_member(asked.input_noise, asked.n_estimators),
        mask_rate=asked.mask_rate,
        mask_shapes=asked.mask_shapes,
        patience=asked.patience,
        mixed_precision=bool(asked.mixed_precision),
        checkpoint=None if asked.checkpoint is None else Path(asked.checkpoint),
    )
    return FitSettings(
        conditioning=asked.conditioning,
        n_estimators=asked.n_estimators,
        part_weights=asked.part_weights,
        linear_start=asked.linear_start,
        latent_dim=None if isinstance(asked.latent_dim, str) else asked.latent_dim,
        hidden_dims=tuple(asked.hidden_dims),
        prior=asked.prior,
        n_samples=asked.n_samples,
        scale_floor=asked.scale_floor,
        false_alarm_rate=asked.false_alarm_rate,
        contamination=None if isinstance(asked.contamination, str) else float(asked.contamination),
        validation_fraction=asked.validation_fraction,
        calibration_fraction=asked.calibration_fraction,
        device=resolve_device(asked.device, dtype),
        dtype=dtype,
        training=training,
        channels=tuple(asked.channels),
        inference_head=asked.inference_head or asked.objective == "semi_supervised",
        condition_on_observed=asked.condition_on_observed,
        with_parts=asked.score_kind == "parts",
        precision="bfloat16" if asked.mixed_precision is True else "float32",
    )


def _kl_weight(asked: Any, schema: Schema) -> float | Sequence[float]:
    if not isinstance(asked.kl_weight, str):
        weight: float | Sequence[float] = asked.kl_weight
        return weight
    is_plain = not (schema.conditions or schema.images or asked.condition_on_observed)
    return UNLIKE_KL_WEIGHTS if is_plain else 1.0


def _per_member(value: float | Sequence[float], n_estimators: int) -> PerMember:
    """Several numbers are dealt anew to the networks of every class; alike ones are one number."""
    if not isinstance(value, Sequence):
        return float(value)
    dealt = tuple(islice(cycle(map(float, value)), n_estimators))
    return dealt if len(set(dealt)) > 1 else dealt[0]
