"""Which cells of a row training hides: single cells of a table; quadrants, boxes or scattered pixels of an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

MaskShapes = Literal["mixed", "quadrants", "cells"]


class Uniform(Protocol):
    """A source of random numbers."""

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1)."""


def hidden_cells(
    draws: Uniform, lead: tuple[int, int], n_cells: int, shapes: Sequence[tuple[int, int, int]], form: MaskShapes
) -> Tensor:
    """1 for the cells to hide, 0 for the others: (M, N, D).

    Every row has a share of its own, uniform in [0, 1], of which its table's cells are hidden. An image
    loses quadrants, a box, or scattered pixels, each a third of the time for ``"mixed"``.
    """
    n_pixels = sum(math.prod(shape) for shape in shapes)
    share = draws.uniform(*lead, 1)
    table = (draws.uniform(*lead, n_cells - n_pixels) < share).to(share.dtype)
    images = [_hidden_pixels(draws, lead, shape, form, share) for shape in shapes]
    return torch.cat([table, *images], dim=-1)


def _hidden_pixels(
    draws: Uniform, lead: tuple[int, int], shape: tuple[int, int, int], form: MaskShapes, share: Tensor
) -> Tensor:
    channels, height, width = shape
    if form == "quadrants":
        hidden = _quadrants(draws, lead, height, width)
    elif form == "cells":
        hidden = (draws.uniform(*lead, height, width) < share.unsqueeze(-1)).to(share.dtype)
    else:
        scattered = (draws.uniform(*lead, height, width) < share.unsqueeze(-1)).to(share.dtype)
        which = draws.uniform(*lead, 1, 1)
        boxed = torch.where(which < 2 / 3, _box(draws, lead, height, width), scattered)
        hidden = torch.where(which < 1 / 3, _quadrants(draws, lead, height, width), boxed)
    return hidden.unsqueeze(2).expand(*lead, channels, height, width).flatten(2)


def _quadrants(draws: Uniform, lead: tuple[int, int], height: int, width: int) -> Tensor:
    """One to three of the four quadrants, (M, N, H, W)."""
    order = draws.uniform(*lead, 4).argsort(dim=-1).argsort(dim=-1)
    many = draws.uniform(*lead, 1)
    chosen = (order < 1 + (3 * many).long()).to(many.dtype).reshape(*lead, 2, 2)
    return _doubled(_doubled(chosen, 2, height), 3, width)


def _doubled(halves: Tensor, axis: int, size: int) -> Tensor:
    """Two halves along an axis, the first the longer one where ``size`` is odd, as that many cells."""
    # `repeat_interleave` with lengths would look at them, which captured work must not.
    place = torch.arange(size, device=halves.device)
    return halves.index_select(axis, (place >= size - size // 2).long())


def _box(draws: Uniform, lead: tuple[int, int], height: int, width: int) -> Tensor:
    """A box of random place and size, (M, N, H, W)."""
    inside = []
    for axis, size in ((2, height), (3, width)):
        ends = (draws.uniform(*lead, 2) * (size + 1)).sort(dim=-1).values
        place = torch.arange(size, device=ends.device, dtype=ends.dtype) + 0.5
        along = (place >= ends[..., :1]) & (place < ends[..., 1:])
        inside.append(along.unsqueeze(5 - axis))
    return (inside[0] & inside[1]).to(ends.dtype)
