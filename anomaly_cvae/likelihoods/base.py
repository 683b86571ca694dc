"""What every decoder head can do; one small file per likelihood, found by its name in the registry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from anomaly_cvae.encoding import FittedColumn
from anomaly_cvae.errors import ParameterError

SQUASH_BEYOND = 3.0
"""Standardised inputs beyond this are squashed for the encoder; the likelihood sees the raw value."""


class Likelihood(nn.Module):
    """The distribution of a block of columns given the decoder's outputs.

    Shapes: values are (…, D), decoder outputs (…, P) with P = `n_parameters`, log-probabilities (…, D)
    in nats, in the units of the raw column (log-Jacobians included). D counts this block's own cells: an
    image has one per pixel and channel. Outputs are P / D blocks of D.
    """

    name: ClassVar[str]
    n_columns: int
    n_parameters: int
    n_features: int

    def __init__(self, columns: Sequence[FittedColumn], scale_floor: float) -> None:
        super().__init__()
        self.n_columns = self.n_features = sum(column.width for column in columns)

    def features(self, values: Tensor, observed: Tensor | None) -> Tensor:
        """What the encoder sees of ``values``: (…, F), zero where a cell is missing."""
        raise NotImplementedError

    def log_prob(self, parameters: Tensor, values: Tensor) -> Tensor:
        """log p(value | parameters), shape (…, D), nats."""
        raise NotImplementedError

    def expected(self, parameters: Tensor) -> Tensor:
        """Mean (numbers) or most probable code (levels) of the mixture over axes 0 and 1: (M, S, N, P) -> (N, D)."""
        raise NotImplementedError

    def mean(self, parameters: Tensor) -> Tensor:
        """Mean of every cell, (…, D), with a gradient; of the likelihoods that pixels may have."""
        raise NotImplementedError

    def sample(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """One draw of each cell, shape (…, D)."""
        raise NotImplementedError

    def jitter(self, values: Tensor, scale: float | Tensor, generator: torch.Generator) -> Tensor:
        """Training noise of ``scale`` standard deviations, or each member's (M, 1, 1); not on levels and counts."""
        return values


LIKELIHOODS: dict[str, type[Likelihood]] = {}


def register(likelihood: type[Likelihood]) -> type[Likelihood]:
    """Class decorator: make a likelihood known under its name."""
    LIKELIHOODS[likelihood.name] = likelihood
    return likelihood


def likelihood_class(name: str) -> type[Likelihood]:
    """Return the likelihood called ``name``.

    Raises
    ------
    ParameterError
        If there is none.
    """
    if name not in LIKELIHOODS:
        raise ParameterError(f"unknown likelihood {name!r}; there are {', '.join(sorted(LIKELIHOODS))}")
    return LIKELIHOODS[name]


def squash(values: Tensor) -> Tensor:
    """Identity within `SQUASH_BEYOND`, logarithmic beyond: a far outlier must not saturate the encoder."""
    inside = values.clamp(-SQUASH_BEYOND, SQUASH_BEYOND)
    beyond = values - inside
    return inside + torch.sign(beyond) * torch.log1p(beyond.abs())


def buffer(columns: Sequence[FittedColumn], read: Callable[[FittedColumn], float]) -> Tensor:
    """One number per cell, shape (D,), in float64; the model casts it to its own type."""
    numbers = [read(column) for column in columns for _ in range(column.width)]
    return torch.tensor(numbers, dtype=torch.float64)


def wide(values: Tensor) -> Tensor:
    """float64 where the device has it: log-gamma differences of large counts cancel in float32."""
    return values if values.device.type == "mps" else values.double()
