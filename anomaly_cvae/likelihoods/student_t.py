"""Student-t likelihood: real columns whose normal values already contain far outliers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from anomaly_cvae.encoding import FittedColumn
from anomaly_cvae.likelihoods.base import register
from anomaly_cvae.likelihoods.normal import Standardised

LEAST_FREEDOM = 2.0


@register
class StudentT(Standardised):
    """t(mean, scale, degrees of freedom) of standardised values; the freedom is above 2, so the variance exists."""

    name = "student_t"

    def __init__(self, columns: Sequence[FittedColumn], scale_floor: float) -> None:
        super().__init__(columns, scale_floor)
        self.n_parameters = 3 * self.n_columns

    def log_prob(self, parameters: Tensor, values: Tensor) -> Tensor:
        """log Gamma((v + 1) / 2) - log Gamma(v / 2) - log(v pi s^2) / 2 - (v + 1) / 2 log(1 + u^2 / v) - log scale."""
        mean, raw, freedom = self._parts(parameters)
        variance = self.variance(raw)
        squared = (values - mean).square() / variance
        normaliser = (
            torch.lgamma((freedom + 1) / 2) - torch.lgamma(freedom / 2) - 0.5 * torch.log(freedom * math.pi * variance)
        )
        return normaliser - (freedom + 1) / 2 * torch.log1p(squared / freedom) - self.log_scale

    def _parts(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, raw, freedom = parameters.chunk(3, dim=-1)
        return mean, raw, LEAST_FREEDOM + softplus(freedom + 2.0)

    def expected(self, parameters: Tensor) -> Tensor:
        """Mean of the means."""
        return parameters.chunk(3, dim=-1)[0].mean(dim=(0, 1))

    def sample(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """Normal noise over the root of a gamma variable (chi-square / degrees of freedom)."""
        mean, raw, freedom = self._parts(parameters)
        noise = torch.empty_like(mean).normal_(generator=generator)
        gamma = torch._standard_gamma(freedom / 2, generator=generator)
        return mean + self.variance(raw).sqrt() * noise / torch.sqrt(gamma / (freedom / 2))
