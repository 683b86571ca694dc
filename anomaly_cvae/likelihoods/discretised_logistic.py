"""Discretised logistic likelihood of pixels with 256 levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from anomaly_cvae.encoding import FittedColumn
from anomaly_cvae.likelihoods.base import Likelihood, buffer, register, squash

LARGEST_LEVEL = 255.0
LOG_WIDTH_RANGE = (-7.0, 7.0)
"""Of a pixel's width, in standard deviations of the column; the mass of a bin underflows below."""


@register
class DiscretisedLogistic(Likelihood):
    """Mass of a logistic distribution in the bin of a level; the first and last bin are open.

    Outputs are location and log-width of standardised pixels. A probability, not a density: the negative
    ELBO is a code length. After Kingma et al. (2016), appendix C.2; the difference of two logistic
    functions is written as a product, which does not cancel.
    """

    name = "discretised_logistic"
    half_bin: Tensor
    lowest: Tensor
    highest: Tensor

    def __init__(self, columns: Sequence[FittedColumn], scale_floor: float) -> None:
        super().__init__(columns, scale_floor)
        self.n_parameters = 2 * self.n_columns
        self.register_buffer("half_bin", 0.5 / buffer(columns, lambda c: c.scale))
        self.register_buffer("lowest", buffer(columns, lambda c: (0.0 - c.center) / c.scale))
        self.register_buffer("highest", buffer(columns, lambda c: (LARGEST_LEVEL - c.center) / c.scale))

    def features(self, values: Tensor, observed: Tensor | None) -> Tensor:
        """Squashed standardised levels; zero for a missing pixel."""
        return squash(values) if observed is None else squash(values) * observed

    def log_prob(self, parameters: Tensor, values: Tensor) -> Tensor:
        """log(F(x + 1/2) - F(x - 1/2)), F = 0 below the first level and 1 above the last."""
        location, inverse_width = self._location_and_inverse_width(parameters)
        distance = values - location
        above = (distance + self.half_bin) * inverse_width
        below = (distance - self.half_bin) * inverse_width
        first, last = values <= self.lowest + self.half_bin, values >= self.highest - self.half_bin
        # F(b) - F(a) = s(b) s(-a) (1 - exp(a - b)), s the logistic function.
        inside = torch.log(-torch.expm1(-2.0 * self.half_bin * inverse_width))
        mass = torch.where(last, 0.0, logsigmoid(above)) + torch.where(first, 0.0, logsigmoid(-below))
        return mass + torch.where(first | last, 0.0, inside)

    def _location_and_inverse_width(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        location, log_width = parameters.chunk(2, dim=-1)
        return location, torch.exp(-log_width.clamp(*LOG_WIDTH_RANGE))

    def mean(self, parameters: Tensor) -> Tensor:
        """Mean of the logistic distribution held within the levels: all beyond lies on the first and the last."""
        location, inverse_width = self._location_and_inverse_width(parameters)
        above = softplus((self.highest - location) * inverse_width)
        below = softplus((self.lowest - location) * inverse_width)
        return self.highest - (above - below) / inverse_width

    def expected(self, parameters: Tensor) -> Tensor:
        """Mean of the means."""
        return self.mean(parameters).mean(dim=(0, 1))

    def sample(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """One level of each pixel."""
        location, inverse_width = self._location_and_inverse_width(parameters)
        uniform = torch.rand(location.shape, generator=generator, device=location.device, dtype=location.dtype)
        drawn = location + torch.logit(uniform, eps=1e-6) / inverse_width
        step = 2.0 * self.half_bin
        level = torch.round((drawn - self.lowest) / step).clamp(0.0, LARGEST_LEVEL)
        return self.lowest + level * step
