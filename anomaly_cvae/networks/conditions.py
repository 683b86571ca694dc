"""What rows are compared with, as networks are told it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FEW_LEVELS = 16
"""A product with as many numbers costs no more than picking rows does."""


@dataclass(frozen=True)
class Condition:
    """Condition vectors c (M or 1, N or 1, C); N = 1: one that all rows share.

    ``codes`` (M or 1, N, Q) are the places of a vector's ones, where it has Q of them and nothing else, as one-hot
    levels have. Rows of a matrix are then picked, which costs the same however many levels there are; a product costs
    as much as there are levels.
    """

    vectors: Tensor
    codes: Tensor | None = None

    @property
    def n_rows(self) -> int:
        """N, or 1."""
        return self.vectors.shape[1]

    def times(self, weight: Tensor, plus: Tensor) -> Tensor:
        """c V + b with V (M, C, out) and b (M, 1, out): (M, N or 1, out)."""
        if self.codes is None:
            return plus + self.vectors @ weight
        n_ones = self.codes.shape[-1]
        members, n_levels, n_out = weight.shape
        # Every one brings its part of b: there are fewer levels than rows to add it to.
        table = weight + (plus if n_ones == 1 else plus / n_ones)
        places = self.codes
        assert len(places) in (1, members)
        if members > 1:
            first = torch.arange(members, device=places.device) * n_levels
            places = places + first.reshape(-1, 1, 1)
        picked = table.flatten(0, 1).index_select(0, places.flatten())
        if n_ones == 1:
            return picked.reshape(members, -1, n_out)
        return picked.reshape(members, -1, n_ones, n_out).sum(2)

    @classmethod
    def of_classes(cls, table: Tensor, *, coded: bool = True) -> Condition:
        """The conditions of K classes, vectors (K, C); with codes (K, Q) on a CPU, where they are quicker.

        On CUDA gradients of what was picked are summed in no fixed order, and products cost little.
        """
        return cls(table, codes_of(table) if coded and table.device.type == "cpu" else None)


def codes_of(table: Tensor) -> Tensor | None:
    """Places of the ones, (K, Q), in vectors (K, C) of zeros and Q ones each.

    None where they are anything else, or short.
    """
    if table.shape[1] <= FEW_LEVELS:
        return None
    ones = table == 1
    counts = ones.sum(1)
    alike = bool((ones | (table == 0)).all()) and bool((counts == counts[0]).all())
    return ones.nonzero()[:, 1].reshape(len(table), -1) if alike and int(counts[0]) else None
