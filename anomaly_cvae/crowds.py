"""Rows of many classes, few of each: the networks take them together, and only priors go class by class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anomaly_cvae.encoding import ClassScaling, Encoded
from anomaly_cvae.frames import IntArray
from anomaly_cvae.networks import Condition
from anomaly_cvae.priors import DiagonalNormal, Mixture, Prior
from anomaly_cvae.rows import Batch, DeviceRows, tensor

NUMBERS_OF_A_CLASS = 1 << 16
"""Of a layer's activations, that rows of a class make on average in a crowd, at most. A pass costs a millisecond and
more whatever its rows; where it has many, one condition for all of them is cheaper."""
NUMBERS_OF_A_CROWD = 1 << 18
"""Of rows that go together."""


def are_crowded(encoded: Encoded, n_classes: int, numbers_per_row: int) -> bool:
    """Whether the rows are of more classes than one, and on average few of each."""
    if n_classes == 1 or len(encoded) * numbers_per_row > NUMBERS_OF_A_CLASS * n_classes:
        return False
    known = encoded.class_index[(encoded.class_index >= 0) & (encoded.class_index < n_classes)]
    n_present = np.count_nonzero(np.bincount(known, minlength=n_classes))
    return bool(n_present > 1 and len(known) * numbers_per_row <= NUMBERS_OF_A_CLASS * n_present)


def crowd_batch(
    rows: Encoded, classes: Condition | None, scaling: ClassScaling | None, device: torch.device, dtype: torch.dtype
) -> Batch:
    """Rows (N, …), each with its own condition and in units of its own class."""
    on_device = DeviceRows.of(rows, classes, scaling, device, dtype)
    batch = on_device.batch(torch.arange(len(rows), device=device).unsqueeze(0))
    given = None if rows.given is None else tensor(rows.given, device, dtype).unsqueeze(0)
    return Batch(batch.values, batch.observed, batch.condition, batch.log_scale, given, batch.class_index)


def crowd_prior(class_index: IntArray, mixture_of: Callable[[int], Mixture | None]) -> Prior | None:
    """The mixture of each row's class; ``class_index`` (N,) ascends. None where priors are no mixtures."""
    classes, counts = np.unique(class_index, return_counts=True)
    mixtures = [mixture for mixture in map(mixture_of, classes.tolist()) if mixture is not None]
    return ClassByClass(mixtures, counts.tolist()) if mixtures else None


@dataclass(frozen=True)
class ClassByClass:
    """Mixtures of classes, and how many rows, one class after the other, are of each."""

    mixtures: list[Mixture]
    counts: list[int]

    def kl(self, posterior: DiagonalNormal) -> Tensor:
        """KL(q || p) of rows under the mixtures of their classes, (M, N, 1)."""
        mean, log_variance = (
            torch.split(part, self.counts, dim=1) for part in (posterior.mean, posterior.log_variance)
        )
        own = map(DiagonalNormal, mean, log_variance)
        return torch.cat([mixture.kl(some) for mixture, some in zip(self.mixtures, own, strict=True)], dim=1)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of samples (M, S, N, Z): (M, S, N)."""
        of_classes = torch.split(z, self.counts, dim=2)
        return torch.cat([mixture.log_prob(own) for mixture, own in zip(self.mixtures, of_classes, strict=True)], dim=2)
