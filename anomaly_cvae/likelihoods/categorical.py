"""Categorical likelihood of columns with several levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anomaly_cvae.encoding import FittedColumn
from anomaly_cvae.likelihoods.base import Likelihood, buffer, register


@register
class Categorical(Likelihood):
    """Softmax over the levels of each column.

    A level not seen in training has probability e = 1 / (n + L + 1) with n training cells and L levels
    (add-one smoothing); the known levels share 1 - e.
    """

    name = "categorical"
    log_unknown: Tensor
    n_levels: Tensor
    slot: Tensor
    first: Tensor

    def __init__(self, columns: Sequence[FittedColumn], scale_floor: float) -> None:
        super().__init__(columns, scale_floor)
        levels = [column.n_levels for column in columns]
        self.widest = max(levels)
        self.n_features = self.n_parameters = sum(levels)
        slots = [d * self.widest + code for d, n in enumerate(levels) for code in range(n)]
        self.register_buffer("slot", torch.tensor(slots), persistent=False)
        first = torch.tensor([sum(levels[:d]) for d in range(len(levels))])
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("n_levels", buffer(columns, lambda c: c.n_levels))
        self.register_buffer("log_unknown", -torch.log(buffer(columns, lambda c: c.observed + c.n_levels + 1)))

    def features(self, values: Tensor, observed: Tensor | None) -> Tensor:
        """One-hot codes side by side; all zero for an unknown or a missing cell."""
        known = values < self.n_levels
        if observed is not None:
            known = known & (observed > 0)
        index = self.first + torch.minimum(values, self.n_levels - 1).long()
        features = values.new_zeros(*values.shape[:-1], self.n_features)
        return features.scatter_(-1, index, known.to(values.dtype))

    def _log_probabilities(self, parameters: Tensor) -> Tensor:
        """(…, P) -> (…, D, widest), -inf beyond a column's own levels."""
        padded = parameters.new_full((*parameters.shape[:-1], self.n_columns * self.widest), -torch.inf)
        padded = padded.index_copy(-1, self.slot, parameters)
        return torch.log_softmax(padded.reshape(*padded.shape[:-1], self.n_columns, self.widest), dim=-1)

    def log_prob(self, parameters: Tensor, values: Tensor) -> Tensor:
        """log softmax at the code + log(1 - e), or log e for an unknown level."""
        logits = self._log_probabilities(parameters)
        code = torch.minimum(values, self.n_levels - 1).long().unsqueeze(-1)
        known = logits.gather(-1, code.expand(*logits.shape[:-1], 1)).squeeze(-1)
        known = known + torch.log1p(-torch.exp(self.log_unknown))
        return torch.where(values < self.n_levels, known, self.log_unknown)

    def expected(self, parameters: Tensor) -> Tensor:
        """The most probable code."""
        mixed = torch.exp(self._log_probabilities(parameters)).mean(dim=(0, 1))
        return mixed.argmax(dim=-1).to(parameters.dtype)

    def sample(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """One code of each cell."""
        probabilities = torch.exp(self._log_probabilities(parameters))
        flat = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator)
        return flat.reshape(probabilities.shape[:-1]).to(parameters.dtype)
