"""Convolutions with a leading member axis, the condition at every scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate

from anomaly_cvae.networks.conditions import Condition
from anomaly_cvae.networks.stacked import ALL, CONDITION_START, _of, members_of

KERNEL = 3
LEAST_CHANNELS = 8


class StackedConv(nn.Module):
    """One 3 x 3 convolution per member, shifted by the condition.

    Shapes: x (M or 1, R, in, H, W), c (M or 1, N or 1, C), result (M, R, out, H / stride, W / stride); R is
    N or S * N.
    """

    def __init__(
        self,
        n_members: int,
        n_in: int,
        n_out: int,
        n_conditions: int,
        generator: torch.Generator,
        stride: int = 1,
        start: float = 1.0,
    ) -> None:
        super().__init__()
        self.stride = stride
        bound = math.sqrt(6.0 / (n_in * KERNEL**2))
        shape = (n_members, n_out, n_in, KERNEL, KERNEL)
        self.weight = nn.Parameter(start * torch.empty(shape).uniform_(-bound, bound, generator=generator))
        self.bias = nn.Parameter(torch.zeros(n_members, 1, n_out))
        self.condition_weight: nn.Parameter | None = None
        if n_conditions:
            first = torch.empty(n_members, n_conditions, n_out).uniform_(-1.0, 1.0, generator=generator)
            self.condition_weight = nn.Parameter(CONDITION_START * first)

    def forward(self, x: Tensor, condition: Condition | None, members: slice = ALL) -> Tensor:
        """Convolve images of every member with its own weights."""
        weight, shift = _of(self.weight, members), _of(self.bias, members)
        if self.condition_weight is not None and condition is not None:
            shift = condition.times(_of(self.condition_weight, members), shift)
        images = members_of(x) * (len(weight) if len(x) == 1 else 1)
        shifts = members_of(shift)
        parts = [self._of_member(*own) for own in zip(images, members_of(weight), shifts, strict=True)]
        return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)

    def _of_member(self, x: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
        # Channels last runs at twice the speed of torch's default order on a CPU.
        x = x.contiguous(memory_format=torch.channels_last)
        weight = weight.contiguous(memory_format=torch.channels_last)
        if len(shift) == 1:
            return conv2d(x, weight, shift.squeeze(0), self.stride, KERNEL // 2)
        if len(shift) != len(x):
            shift = shift.repeat(len(x) // len(shift), 1)
        return conv2d(x, weight, None, self.stride, KERNEL // 2).add_(shift[:, :, None, None])


class ConvEncoder(nn.Module):
    """Halves an image once per scale: a strided convolution and a residual one each."""

    def __init__(
        self,
        n_members: int,
        shape: tuple[int, int, int],
        channels: Sequence[int],
        n_conditions: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        widths = [shape[0], *channels]
        self.down = nn.ModuleList(
            StackedConv(n_members, a, b, n_conditions, generator, stride=2) for a, b in pairwise(widths)
        )
        self.mix = nn.ModuleList(StackedConv(n_members, b, b, n_conditions, generator, start=0.3) for b in channels)
        height, width = sizes(shape, len(channels))[-1]
        self.n_features = channels[-1] * height * width

    def forward(self, image: Tensor, condition: Condition | None, members: slice = ALL) -> list[Tensor]:
        """Feature maps of (M or 1, R, C, H, W), one per scale, the finest first: (M, R, channels, h, w)."""
        maps, hidden = [], image
        for down, mix in zip(self.down, self.mix, strict=True):
            hidden = torch.relu_(down(hidden, condition, members))
            hidden = torch.relu_(hidden + mix(hidden, condition, members))
            maps.append(hidden)
        return maps


class ConvDecoder(nn.Module):
    """The mirror: from a seed, doubles the image once per scale.

    ``seen`` says that feature maps of an observed part come along, one per scale, coarsest last.
    """

    def __init__(
        self,
        n_members: int,
        shape: tuple[int, int, int],
        channels: Sequence[int],
        n_conditions: int,
        generator: torch.Generator,
        seen: bool = False,
    ) -> None:
        super().__init__()
        self.sizes = sizes(shape, len(channels))
        self.seed_shape = (channels[-1], *self.sizes[-1])
        self.n_seed = math.prod(self.seed_shape)
        widths = list(reversed(channels))
        # Half as many at full size, where a channel costs most and has least to say.
        finest = max(LEAST_CHANNELS, widths[-1] // 2)
        self.mix = nn.ModuleList(StackedConv(n_members, w, w, n_conditions, generator, start=0.3) for w in widths)
        self.up = nn.ModuleList(
            StackedConv(n_members, a, b, n_conditions, generator) for a, b in pairwise([*widths, finest])
        )
        self.out = StackedConv(n_members, finest, shape[0], 0, generator, start=0.1)
        self.lateral = nn.ModuleList(StackedConv(n_members, w, w, 0, generator) for w in widths if seen)

    def forward(
        self, seed: Tensor, condition: Condition | None, members: slice = ALL, seen: Sequence[Tensor] = ()
    ) -> Tensor:
        """Outputs (M, R, P, H, W) from seeds (M, R, n_seed)."""
        hidden = torch.relu(seed).reshape(*seed.shape[:2], *self.seed_shape)
        for scale, (mix, up) in enumerate(zip(self.mix, self.up, strict=True)):
            mixed = hidden + mix(hidden, condition, members)
            if seen:
                own = self.lateral[scale](seen[-1 - scale], None, members)
                mixed = mixed + own.repeat(1, mixed.shape[1] // own.shape[1], 1, 1, 1)
            finer = _resize(torch.relu_(mixed), self.sizes[-2 - scale])
            hidden = torch.relu_(up(finer, condition, members))
        out: Tensor = self.out(hidden, None, members)
        return out.to(self.out.weight.dtype)


def sizes(shape: tuple[int, int, int], n_scales: int) -> list[tuple[int, int]]:
    """Height and width at every scale, the full one first."""
    found = [(shape[1], shape[2])]
    for _ in range(n_scales):
        height, width = found[-1]
        found.append((-(-height // 2), -(-width // 2)))
    return found


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest neighbour; (M, R, C, h, w) -> (M, R, C, *size)."""
    flat = images.flatten(0, 1) if len(images) > 1 else images[0]
    resized = interpolate(flat, size=size, mode="nearest")
    return resized.reshape(*images.shape[:2], *resized.shape[1:]) if len(images) > 1 else resized.unsqueeze(0)
