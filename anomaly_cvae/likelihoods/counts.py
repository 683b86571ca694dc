"""Poisson and negative binomial likelihoods of counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anomaly_cvae.encoding import FittedColumn
from anomaly_cvae.likelihoods.base import Likelihood, buffer, register, squash, wide

LARGEST_LOG_RATIO = 20.0
"""Bound on |log rate - log training mean|: keeps the rate finite whatever the decoder says."""


class Counts(Likelihood):
    """Shared by the count likelihoods: log-standardised features and a rate relative to the training mean."""

    center: Tensor
    scale: Tensor
    log_mean: Tensor

    def __init__(self, columns: Sequence[FittedColumn], scale_floor: float) -> None:
        super().__init__(columns, scale_floor)
        self.register_buffer("center", buffer(columns, lambda c: c.center))
        self.register_buffer("scale", buffer(columns, lambda c: c.scale))
        self.register_buffer("log_mean", torch.log(buffer(columns, lambda c: max(c.mean, 1e-3))))

    def features(self, values: Tensor, observed: Tensor | None) -> Tensor:
        """Standardised log(1 + count); 0 for a missing cell."""
        features = squash((torch.log1p(values) - self.center) / self.scale)
        return features if observed is None else features * observed

    def log_rate(self, raw: Tensor) -> Tensor:
        """The decoder speaks of the logarithm of the rate over the training mean."""
        return raw.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO) + self.log_mean


@register
class Poisson(Counts):
    """Poisson(rate)."""

    name = "poisson"

    def __init__(self, columns: Sequence[FittedColumn], scale_floor: float) -> None:
        super().__init__(columns, scale_floor)
        self.n_parameters = self.n_columns

    def log_prob(self, parameters: Tensor, values: Tensor) -> Tensor:
        """x log rate - rate - log x!."""
        log_rate, count = wide(self.log_rate(parameters)), wide(values)
        return (count * log_rate - torch.exp(log_rate) - torch.lgamma(count + 1)).to(parameters.dtype)

    def expected(self, parameters: Tensor) -> Tensor:
        """Mean of the rates."""
        return torch.exp(self.log_rate(parameters)).mean(dim=(0, 1))

    def sample(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """One count of each cell."""
        return torch.poisson(torch.exp(self.log_rate(parameters)), generator=generator)


@register
class NegativeBinomial(Counts):
    """Negative binomial with mean m and concentration r: variance m + m^2 / r."""

    name = "negative_binomial"

    def __init__(self, columns: Sequence[FittedColumn], scale_floor: float) -> None:
        super().__init__(columns, scale_floor)
        self.n_parameters = 2 * self.n_columns

    def _parts(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        raw, log_concentration = parameters.chunk(2, dim=-1)
        return self.log_rate(raw), log_concentration.clamp(-LARGEST_LOG_RATIO / 2, LARGEST_LOG_RATIO / 2)

    def log_prob(self, parameters: Tensor, values: Tensor) -> Tensor:
        """log Gamma(x + r) - log Gamma(r) - log x! + r log(r / (r + m)) + x log(m / (r + m))."""
        log_rate, log_concentration = self._parts(parameters)
        logit = wide(log_rate - log_concentration)
        concentration, count = torch.exp(wide(log_concentration)), wide(values)
        choose = torch.lgamma(count + concentration) - torch.lgamma(concentration) - torch.lgamma(count + 1)
        log_p = torch.nn.functional.logsigmoid
        return (choose + concentration * log_p(-logit) + count * log_p(logit)).to(parameters.dtype)

    def expected(self, parameters: Tensor) -> Tensor:
        """Mean of the rates."""
        return torch.exp(self._parts(parameters)[0]).mean(dim=(0, 1))

    def sample(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """A Poisson count of a gamma-distributed rate."""
        log_rate, log_concentration = self._parts(parameters)
        concentration = torch.exp(log_concentration)
        gamma = torch._standard_gamma(concentration, generator=generator)
        return torch.poisson(gamma / concentration * torch.exp(log_rate), generator=generator)
