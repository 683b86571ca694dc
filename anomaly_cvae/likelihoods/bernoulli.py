"""Bernoulli likelihood of two-valued columns and black-and-white pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from anomaly_cvae.encoding import FittedColumn
from anomaly_cvae.likelihoods.base import Likelihood, buffer, register


@register
class Bernoulli(Likelihood):
    """Bernoulli(logit) of codes 0 and 1.

    A value that is neither of the two levels has probability e = 1 / (n + 3), n training cells (one
    imagined cell for each level and one for the unknown); the known ones share 1 - e.
    """

    name = "bernoulli"
    log_unknown: Tensor
    n_levels: Tensor

    def __init__(self, columns: Sequence[FittedColumn], scale_floor: float) -> None:
        super().__init__(columns, scale_floor)
        self.n_parameters = self.n_columns
        self.is_image = any(column.shape for column in columns)
        self.register_buffer("log_unknown", -torch.log(buffer(columns, lambda c: c.observed + 3)))
        self.register_buffer("n_levels", buffer(columns, lambda c: c.n_levels))

    def features(self, values: Tensor, observed: Tensor | None) -> Tensor:
        """-1 and +1; 0 for an unknown or a missing cell."""
        features = torch.where(values < self.n_levels, 2.0 * values - 1.0, 0.0)
        return features if observed is None else features * observed

    def log_prob(self, parameters: Tensor, values: Tensor) -> Tensor:
        """log sigmoid(+-logit) + log(1 - e), or log e for an unknown level."""
        share = torch.where(self.n_levels > 1, logsigmoid((2.0 * values - 1.0) * parameters), 0.0)
        known = share + torch.log1p(-torch.exp(self.log_unknown))
        return torch.where(values < self.n_levels, known, self.log_unknown)

    def mean(self, parameters: Tensor) -> Tensor:
        """Probability of the second value."""
        return torch.sigmoid(parameters)

    def expected(self, parameters: Tensor) -> Tensor:
        """The more probable code; of a pixel, its probability: grey says how sure the model is."""
        share = self.mean(parameters).mean(dim=(0, 1))
        return share if self.is_image else (share > 0.5).to(parameters.dtype)

    def sample(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """One code of each cell."""
        return torch.bernoulli(torch.sigmoid(parameters), generator=generator)
