"""Networks from the cells of a row to a vector and back: a multilayer perceptron, with convolutions for images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anomaly_cvae.networks.conditions import Condition
from anomaly_cvae.networks.convolutions import ConvDecoder, ConvEncoder
from anomaly_cvae.networks.stacked import ALL, StackedMLP

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Blocks:
    """The parts of a row as networks see it: ``n_table`` numbers, and images of (channels, height, width)."""

    n_table: int
    images: tuple[Shape, ...] = ()


@dataclass(frozen=True)
class Cells:
    """Rows in those parts: table (M or 1, R, F), images (M or 1, R, C, H, W) each."""

    table: Tensor
    images: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Encoding:
    """What an encoder says of rows: outputs (M, R, n_out), and feature maps per image and scale."""

    outputs: Tensor
    maps: tuple[list[Tensor], ...] = ()


class CellEncoder(nn.Module):
    """Cells to a vector, the condition at every layer and scale."""

    def __init__(
        self,
        n_members: int,
        blocks: Blocks,
        channels: Sequence[int],
        hidden_dims: Sequence[int],
        n_out: int,
        n_conditions: int,
        generator: torch.Generator,
        n_paths: int = 0,
    ) -> None:
        super().__init__()
        encoders = [ConvEncoder(n_members, shape, channels, n_conditions, generator) for shape in blocks.images]
        self.images = nn.ModuleList(encoders)
        n_features = sum(encoder.n_features for encoder in encoders)
        n_in = blocks.n_table + n_features
        self.mlp = StackedMLP(n_members, n_in, hidden_dims, n_out, n_conditions, generator, n_paths)

    def forward(self, cells: Cells, condition: Condition | None, members: slice = ALL) -> Encoding:
        """Outputs (M, R, n_out) and the maps they came from."""
        if not self.images:
            return Encoding(self.mlp(cells.table, condition, members))
        maps = tuple(
            encoder(image, condition, members) for encoder, image in zip(self.images, cells.images, strict=True)
        )
        features = [scales[-1].flatten(2) for scales in maps]
        if cells.table.shape[-1]:
            features.append(cells.table.expand(len(features[0]), -1, -1))
        return Encoding(self.mlp(torch.cat(features, dim=-1), condition, members), maps)


class CellDecoder(nn.Module):
    """A vector to the outputs of every cell: those of the table (M, R, P), then those of every image, flattened.

    ``n_seen`` is the width of a vector that describes an observed part of the row; its maps come along.
    """

    def __init__(
        self,
        n_members: int,
        n_in: int,
        blocks: Blocks,
        channels: Sequence[int],
        hidden_dims: Sequence[int],
        n_conditions: int,
        generator: torch.Generator,
        n_seen: int = 0,
        n_paths: int = 0,
    ) -> None:
        super().__init__()
        decoders = [
            ConvDecoder(n_members, shape, channels, n_conditions, generator, seen=n_seen > 0) for shape in blocks.images
        ]
        self.images = nn.ModuleList(decoders)
        self.parts = [blocks.n_table, *(decoder.n_seed for decoder in decoders)]
        n_out = sum(self.parts)
        self.mlp = StackedMLP(n_members, n_in + n_seen, hidden_dims, n_out, n_conditions, generator, n_paths)

    @property
    def n_outputs(self) -> int:
        """Width of the widest layer at its end."""
        return self.mlp.layers[-1].get_parameter("bias").shape[-1]

    def forward(
        self, z: Tensor, condition: Condition | None, members: slice = ALL, seen: Encoding | None = None
    ) -> Tensor:
        """Outputs (M, R, P) of rows z (M, R, Z)."""
        if seen is not None:
            z = torch.cat([z, seen.outputs.repeat(1, z.shape[1] // seen.outputs.shape[1], 1)], dim=-1)
        outputs: Tensor = self.mlp(z, condition, members)
        if not self.images:
            return outputs
        table, *seeds = torch.split(outputs, self.parts, dim=-1)
        maps = [()] * len(seeds) if seen is None else seen.maps
        drawn = [
            decoder(seed, condition, members, own).flatten(2)
            for decoder, seed, own in zip(self.images, seeds, maps, strict=True)
        ]
        return torch.cat([table, *drawn], dim=-1)


class PseudoInputs(nn.Module):
    """J learned rows per member, as the encoder sees rows."""

    def __init__(self, n_members: int, n: int, blocks: Blocks, generator: torch.Generator) -> None:
        super().__init__()

        def start(*shape: int) -> nn.Parameter:
            return nn.Parameter(0.5 * torch.empty(n_members, n, *shape).normal_(generator=generator))

        self.table = start(blocks.n_table)
        self.images = nn.ParameterList(start(*shape) for shape in blocks.images)

    def cells(self, members: slice, n_copies: int) -> Cells:
        """The rows of some members, once for every class."""
        return Cells(
            self.table[members].repeat(1, n_copies, 1),
            tuple(image[members].repeat(1, n_copies, 1, 1, 1) for image in self.images),
        )
