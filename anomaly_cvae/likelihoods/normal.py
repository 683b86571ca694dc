"""Normal likelihood with a scale learned per row and column."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from anomaly_cvae.encoding import FittedColumn
from anomaly_cvae.likelihoods.base import Likelihood, buffer, register, squash

HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)
LARGEST_LOG_VARIANCE = 60.0


class Standardised(Likelihood):
    """Shared by the likelihoods of real columns, whose values are standardised by the encoder."""

    log_scale: Tensor

    def __init__(self, columns: Sequence[FittedColumn], scale_floor: float) -> None:
        super().__init__(columns, scale_floor)
        self.register_buffer("log_scale", torch.log(buffer(columns, lambda c: c.scale)))
        self.variance_floor = scale_floor**2

    def features(self, values: Tensor, observed: Tensor | None) -> Tensor:
        """Squashed standardised values; zero for a missing cell."""
        return squash(values) if observed is None else squash(values) * observed

    def variance(self, raw: Tensor) -> Tensor:
        """exp(raw) above the floor; in units of the column's variance."""
        return torch.exp(raw.clamp(max=LARGEST_LOG_VARIANCE)) + self.variance_floor

    def jitter(self, values: Tensor, scale: float | Tensor, generator: torch.Generator) -> Tensor:
        """Add normal noise of ``scale`` standard deviations of the column, or each member's (M, 1, 1)."""
        return values + scale * torch.empty_like(values).normal_(generator=generator)


@register
class Normal(Standardised):
    """N(mean, variance) of standardised values; outputs are mean and log-variance above the floor."""

    name = "normal"

    def __init__(self, columns: Sequence[FittedColumn], scale_floor: float) -> None:
        super().__init__(columns, scale_floor)
        self.n_parameters = 2 * self.n_columns

    def log_prob(self, parameters: Tensor, values: Tensor) -> Tensor:
        """-((x - mean)^2 / variance + log variance + log 2 pi) / 2 - log scale."""
        mean, raw = parameters.chunk(2, dim=-1)
        variance = self.variance(raw)
        constant = self.log_scale + HALF_LOG_TWO_PI
        return -0.5 * ((values - mean).square() / variance + torch.log(variance)) - constant

    def mean(self, parameters: Tensor) -> Tensor:
        """The first half of the outputs."""
        return parameters.chunk(2, dim=-1)[0]

    def expected(self, parameters: Tensor) -> Tensor:
        """Mean of the means."""
        return self.mean(parameters).mean(dim=(0, 1))

    def sample(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """Mean plus scale times normal noise."""
        mean, raw = parameters.chunk(2, dim=-1)
        return mean + self.variance(raw).sqrt() * torch.empty_like(mean).normal_(generator=generator)
