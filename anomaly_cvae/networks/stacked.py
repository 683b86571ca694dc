"""Layers with a leading member axis: all members of a bank go through one batched matrix product."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from anomaly_cvae.networks.conditions import Condition
from anomaly_cvae.networks.fused import can_fuse, network

ALL = slice(None)
CONDITION_START = 0.1
"""Size at which the condition's weights start, relative to the others."""
NARROW_CONDITION = 32


class StackedLinear(nn.Module):
    """One affine map per member, shifted by the condition: x W + c V + b.

    Shapes: x (M or 1, R, in), c (M or 1, N or 1, C), result (M, R, out). R is N or S * N: a condition of
    N rows is repeated for every sample. For one member, rows (R, in) become (R, out): matrices have quicker products.
    """

    def __init__(self, n_members: int, n_in: int, n_out: int, n_conditions: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(_uniform((n_members, n_in, n_out), n_in, generator))
        self.bias = nn.Parameter(torch.zeros(n_members, 1, n_out))
        self.condition_weight: nn.Parameter | None = None
        if n_conditions:
            # Small, so that classes begin alike: one with few rows stays near the others, not where chance put it.
            start = CONDITION_START * _uniform((n_members, n_conditions, n_out), n_in, generator)
            self.condition_weight = nn.Parameter(start)
        self._halved: tuple[tuple[int, int], Tensor] | None = None

    def forward(self, x: Tensor, condition: Condition | None, members: slice = ALL, relu: bool = False) -> Tensor:
        """Map rows with the chosen members' weights."""
        n_rows, weight = x.shape[-2], _of(self.weight, members)
        if condition is None or self.condition_weight is None or not _has_own_product(condition, n_rows):
            out = _affine(x, weight, _repeated(self.shift(condition, members), n_rows))
        else:
            out = _affine(x, weight, self.shift(None, members))
            out = _add_product(out, _repeated(condition.vectors, n_rows), _of(self.condition_weight, members))
        return torch.relu_(out) if relu else out

    def shift(self, condition: Condition | None, members: slice = ALL) -> Tensor:
        """c V + b, (M, N or 1, out)."""
        bias = _of(self.bias, members)
        if self.condition_weight is None or condition is None:
            return bias
        return condition.times(_of(self.condition_weight, members), bias)

    def halved(self) -> Tensor:
        """The weight in bfloat16, made again when it has changed."""
        version = (self.weight.data_ptr(), self.weight._version)
        if self._halved is None or self._halved[0] != version:
            self._halved = (version, self.weight.detach().to(torch.bfloat16))
        return self._halved[1]


class StackedMLP(nn.Module):
    """ReLU network with the condition at every layer and a linear path around the hidden layers.

    ``n_paths`` more linear paths count by the first numbers of the condition: with one-hot classes, each has its own.
    """

    def __init__(
        self,
        n_members: int,
        n_in: int,
        hidden_dims: Sequence[int],
        n_out: int,
        n_conditions: int,
        generator: torch.Generator,
        n_paths: int = 0,
    ) -> None:
        super().__init__()
        widths = [n_in, *hidden_dims, n_out]
        self.layers = nn.ModuleList(
            StackedLinear(n_members, a, b, n_conditions, generator) for a, b in pairwise(widths)
        )
        with torch.no_grad():
            self.layers[-1].get_parameter("weight").mul_(0.1)
        self.skip: nn.Parameter | None = None
        if hidden_dims:
            self.skip = nn.Parameter(0.1 * _uniform((n_members, n_in, n_out), n_in, generator))
        self.paths: nn.Parameter | None = None
        if hidden_dims and n_paths:
            self.paths = nn.Parameter(torch.zeros(n_members, n_paths, n_in, n_out))

    def forward(self, x: Tensor, condition: Condition | None, members: slice = ALL) -> Tensor:
        """Map rows (M or 1, R, in) to (M, R, out)."""
        if can_fuse(x, condition, len(self._of_first(members))):
            return self._fused(x, condition, members)
        one = len(self._of_first(members)) == 1
        rows = hidden = x.squeeze(0) if one else x
        for layer in self.layers[:-1]:
            hidden = layer(hidden, condition, members, relu=True)
        out: Tensor = self.layers[-1](hidden, condition, members)
        skip = self._skip(condition, members)
        out = out if skip is None else _add_product(out, rows, skip)
        # A view comes last: of what is changed in place, it would make gradients copies of the whole.
        out = out.unsqueeze(0) if one else out
        if self.paths is not None and condition is not None and condition.n_rows > 1:
            out = out + _by_row(x, condition.vectors, _of(self.paths, members))
        # Where products are in bfloat16, what is made of them is not: nats are sums of many outputs.
        return out.to(self.layers[-1].get_parameter("weight").dtype)

    def _skip(self, condition: Condition | None, members: slice) -> Tensor | None:
        """The linear path (M, in, out), with those of a condition that all rows share."""
        if self.skip is None:
            return None
        skip = _of(self.skip, members)
        if self.paths is None or condition is None or condition.n_rows > 1:
            return skip
        paths = _of(self.paths, members)
        own = condition.vectors[:, 0, : paths.shape[1]].expand(len(paths), -1)
        return skip + torch.einsum("mk,mkio->mio", own, paths)

    def _of_first(self, members: slice) -> Tensor:
        return _of(self.layers[0].get_parameter("weight"), members)

    def _fused(self, x: Tensor, condition: Condition | None, members: slice) -> Tensor:
        layers = [layer for layer in self.layers if isinstance(layer, StackedLinear)]
        with torch.autocast("cpu", enabled=False):
            weights = [_of(layer.weight, members) for layer in layers]
            shifts = [layer.shift(condition, members) for layer in layers]
            skip = self._skip(condition, members)
        in_halves = torch.is_autocast_enabled("cpu") and len(layers) > 2
        inner = [_of(layer.halved(), members) for layer in layers[1:-1]] if in_halves else weights[1:-1]
        return network(x, weights, shifts, skip, inner)


def _has_own_product(condition: Condition, n_rows: int) -> bool:
    """Whether c V is better added in place than made for N rows, repeated for every sample and read as a bias.

    That array is as large as the outputs; of a wide condition, a product for every sample costs more than it does.
    """
    n_given, width = condition.vectors.shape[1:]
    return condition.codes is None and n_given > 1 and (n_given == n_rows or width <= NARROW_CONDITION)


def _repeated(of_rows: Tensor, n_rows: int) -> Tensor:
    """What N rows have, (M or 1, N, …), for S samples of each: (M or 1, S * N, …); what all share, as it is."""
    return of_rows if of_rows.shape[1] in (1, n_rows) else of_rows.repeat(1, n_rows // of_rows.shape[1], 1)


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W + b, (M, R, out); (R, out) of rows (R, in) of one member."""
    if x.dim() == 2:
        return torch.addmm(bias.squeeze(0), x, weight.squeeze(0))
    return torch.baddbmm(bias, x.expand(len(weight), -1, -1), weight)


def _add_product(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The same with ``out`` for a bias, in place where all are of one type: in place, nothing is cast."""
    alike = out.dtype == x.dtype == weight.dtype
    if out.dim() == 2:
        x, weight = x.reshape(x.shape[-2:]), weight.squeeze(0)
        return out.addmm_(x, weight) if alike else torch.addmm(out, x, weight)
    x = x.expand(len(weight), -1, -1)
    return out.baddbmm_(x, weight) if alike else torch.baddbmm(out, x, weight)


def _by_row(x: Tensor, vectors: Tensor, paths: Tensor) -> Tensor:
    """x times the paths (M, K, in, out) of each row's own condition (M or 1, N, C): (M, R, out)."""
    members, n_paths = paths.shape[:2]
    own = _repeated(vectors[..., :n_paths], x.shape[1])
    spread = (own.unsqueeze(-1) * x.unsqueeze(-2)).flatten(2)
    return torch.bmm(spread.expand(members, -1, -1), paths.flatten(1, 2))


def _of(parameter: Tensor, members: slice) -> Tensor:
    """Some members' share; slicing even for all of them would cost a copy of every gradient."""
    return parameter if members == ALL else parameter[members]


def members_of(stacked: Tensor) -> list[Tensor]:
    """The members of a stack; selecting them one by one would fill a gradient of the whole for each."""
    return [stacked.squeeze(0)] if len(stacked) == 1 else list(stacked.unbind(0))


def _uniform(shape: tuple[int, ...], n_in: int, generator: torch.Generator) -> Tensor:
    bound = math.sqrt(3.0 / max(n_in, 1))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
