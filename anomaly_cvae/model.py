"""The conditional variational autoencoder: tensors in, terms out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from anomaly_cvae.encoding import FittedColumn
from anomaly_cvae.likelihoods import Likelihood, likelihood_class
from anomaly_cvae.networks import (
    ALL,
    Blocks,
    CellDecoder,
    CellEncoder,
    Cells,
    Condition,
    Encoding,
    PseudoInputs,
    StackedMLP,
)
from anomaly_cvae.priors import DiagonalNormal, GroupedMixture, Prior, StandardNormal
from anomaly_cvae.rows import Batch

LOG_VARIANCE_RANGE = (-14.0, 10.0)
SEEN_WIDTH = 64
"""Numbers by which the decoder is told of an observed part of the row, beside its feature maps."""


@dataclass(frozen=True)
class Architecture:
    """Everything that fixes the shapes of a bank.

    ``n_conditions`` is C, the width of the condition vector (0: the members know one class only);
    ``missing_indicators`` shows the encoder which cells are missing; ``channels`` are those of the
    convolutions, one per halving of an image; ``observed_condition`` makes an observed part of the row part
    of the condition; ``n_classes`` and ``n_attributes`` are what q(c | x) tells, if there is one;
    ``pseudo_inputs`` are those of a VampPrior, ``n_groups`` the classes that a member knows; ``n_paths`` linear paths
    go with the first numbers of the condition vector; ``linear_start`` says that linear paths began at factor analyses.
    """

    n_members: int
    latent_dim: int
    hidden_dims: tuple[int, ...]
    n_conditions: int = 0
    missing_indicators: bool = False
    learned_prior: bool = False
    scale_floor: float = 0.08
    channels: tuple[int, ...] = (32, 64)
    observed_condition: bool = False
    n_classes: int = 0
    n_attributes: int = 0
    pseudo_inputs: int = 0
    n_groups: int = 1
    linear_start: bool = False
    n_paths: int = 0


@dataclass(frozen=True)
class Seen:
    """What an observed part of the row says: p(z | x_observed, c), and what the decoder is told."""

    prior: DiagonalNormal
    told: Encoding


@dataclass(frozen=True)
class Terms:
    """Everything that a loss, a score or an explanation is a sum of; nats.

    Attributes
    ----------
    log_prob : (M, S, N, D) log p(x | z, c) per column, 0 where the cell is missing
    kl : (M, N, Z) KL(q(z | x, c) || p(z | c)) per latent unit; (M, N, 1) for a mixture prior
    z : (M, S, N, Z) samples of q(z | x, c)
    """

    log_prob: Tensor
    kl: Tensor
    z: Tensor
    posterior: DiagonalNormal
    prior: Prior

    @cached_property
    def log_q(self) -> Tensor:
        """log q(z | x, c) of the samples, (M, S, N)."""
        return self.posterior.log_prob(self.z)

    @cached_property
    def log_prior(self) -> Tensor:
        """log p(z | c) of the samples, (M, S, N)."""
        return self.prior.log_prob(self.z)


class CVAE(nn.Module):
    """A bank of M conditional variational autoencoders over the same columns.

    q(z | x, c) and p(x | z, c) are multilayer perceptrons with the condition at every layer, and
    convolutions with the condition at every scale before and after them for columns of images; the prior
    p(z | c) is N(0, I), a normal that depends on c or on an observed part of x, or a VampPrior. Cells are
    independent given z and c.
    """

    class_table: Tensor

    def __init__(self, architecture: Architecture, columns: Sequence[FittedColumn], seed: int = 0) -> None:
        super().__init__()
        self.architecture = architecture
        generator = torch.Generator().manual_seed(seed)
        # An image is a block of its own: its outputs come from convolutions.
        blocks = groupby(columns, key=lambda column: (column.likelihood, column.name if column.shape else None))
        self.heads = nn.ModuleList(
            likelihood_class(name)(tuple(block), architecture.scale_floor) for (name, _), block in blocks
        )
        self.shapes = [shape_of(column) for column in columns if column.shape]
        # (G, C) condition vectors of the classes; set by whoever knows the schema.
        self.register_buffer("class_table", torch.zeros(architecture.n_groups, 0), persistent=False)
        members, latent, hidden = architecture.n_members, architecture.latent_dim, architecture.hidden_dims
        conditions, channels = architecture.n_conditions, architecture.channels
        n_masks = int(architecture.missing_indicators) + int(architecture.observed_condition)
        inputs, outputs = self._inputs(n_masks), self._outputs()
        n_paths = architecture.n_paths
        self.encoder = CellEncoder(members, inputs, channels, hidden, 2 * latent, conditions, generator, n_paths)
        self.seen_encoder: CellEncoder | None = None
        n_seen = SEEN_WIDTH if architecture.observed_condition else 0
        self.decoder = CellDecoder(
            members, latent, outputs, channels, hidden[::-1], conditions, generator, n_seen, n_paths
        )
        if architecture.observed_condition:
            self.seen_encoder = CellEncoder(
                members, self._inputs(1), channels, hidden, 2 * latent + n_seen, conditions, generator
            )
        self.prior_network: StackedMLP | None = None
        if architecture.learned_prior and conditions:
            self.prior_network = StackedMLP(members, conditions, (), 2 * latent, 0, generator)
        self.inference_head: CellEncoder | None = None
        n_told = architecture.n_classes + architecture.n_attributes
        if n_told:
            seen = self._inputs(int(architecture.missing_indicators))
            self.inference_head = CellEncoder(members, seen, channels, hidden, n_told, 0, generator)
        self.pseudo_inputs: PseudoInputs | None = None
        if architecture.pseudo_inputs:
            self.pseudo_inputs = PseudoInputs(members, architecture.pseudo_inputs, inputs, generator)

    def describe(self) -> dict[str, Any]:
        """Architecture and likelihoods, for telling one model from another."""
        heads = [(head.name, head.n_columns, head.n_parameters) for head in self._heads()]
        return {**asdict(self.architecture), "heads": heads, "shapes": self.shapes}

    def _heads(self) -> list[Likelihood]:
        return [head for head in self.heads if isinstance(head, Likelihood)]

    def table_heads(self) -> list[Likelihood]:
        """Of the columns that are no images, in their order."""
        return self._heads()[: len(self.heads) - len(self.shapes)]

    def _inputs(self, n_masks: int) -> Blocks:
        """Sizes of what a network sees of a row with ``n_masks`` masks beside the values."""
        table = self.table_heads()
        n_table = sum(head.n_features for head in table) + n_masks * sum(head.n_columns for head in table)
        return Blocks(n_table, tuple(((1 + n_masks) * c, h, w) for c, h, w in self.shapes))

    def _outputs(self) -> Blocks:
        per_cell = [head.n_parameters // head.n_columns for head in self._heads()[len(self.table_heads()) :]]
        images = tuple((n * c, h, w) for n, (c, h, w) in zip(per_cell, self.shapes, strict=True))
        return Blocks(sum(head.n_parameters for head in self.table_heads()), images)

    def _columns_by_head(self, values: Tensor) -> tuple[Tensor, ...]:
        return torch.split(values, [head.n_columns for head in self._heads()], dim=-1)

    def _parameters_by_head(self, outputs: Tensor) -> tuple[Tensor, ...]:
        return torch.split(outputs, [head.n_parameters for head in self._heads()], dim=-1)

    def _cells(self, values: Tensor, observed: Tensor | None, masks: Sequence[Tensor]) -> Cells:
        """What a network sees: the heads' features of observed cells, and masks beside them."""
        blocks = self._columns_by_head(values)
        there = [None] * len(blocks) if observed is None else self._columns_by_head(observed)
        features = [
            head.features(cells, known) for head, cells, known in zip(self._heads(), blocks, there, strict=True)
        ]
        n_table = len(self.table_heads())
        split = [self._columns_by_head(mask) for mask in masks]
        table = [*features[:n_table], *(part for mask in split for part in mask[:n_table])]
        lead = values.shape[:2]
        images = tuple(
            torch.cat([part.reshape(*lead, *shape) for part in (features[place], *(m[place] for m in split))], dim=2)
            for place, shape in enumerate(self.shapes, start=n_table)
        )
        if len(table) == 1:
            return Cells(table[0], images)
        return Cells(torch.cat(table, dim=-1) if table else values.new_zeros(*lead, 0), images)

    def encode(self, batch: Batch, members: slice = ALL) -> DiagonalNormal:
        """q(z | x, c) of each row under each member, (M, N, Z)."""
        masks = []
        if self.architecture.missing_indicators:
            masks.append(torch.ones_like(batch.values) if batch.observed is None else batch.observed)
        if self.architecture.observed_condition:
            given = torch.zeros_like(batch.values) if batch.given is None else batch.given
            masks.append(given if batch.observed is None else given * batch.observed)
        cells = self._cells(batch.values, batch.observed, masks)
        return normal(self.encoder(cells, batch.condition, members).outputs)

    def look(self, batch: Batch, members: slice = ALL) -> Seen | None:
        """What the given cells say, where they are part of the condition; None in any other model."""
        if self.seen_encoder is None:
            return None
        given = torch.zeros_like(batch.values) if batch.given is None else batch.given
        given = given if batch.observed is None else given * batch.observed
        encoding = self.seen_encoder(self._cells(batch.values, given, [given]), batch.condition, members)
        prior, told = torch.split(encoding.outputs, [2 * self.architecture.latent_dim, SEEN_WIDTH], dim=-1)
        return Seen(normal(prior), Encoding(torch.relu(told), encoding.maps))

    def condition_logits(self, batch: Batch, members: slice = ALL) -> Tensor:
        """Logits of q(c | x), (M, N, K + A): of the classes, then of each attribute's second value."""
        assert self.inference_head is not None
        masks = []
        if self.architecture.missing_indicators:
            masks.append(torch.ones_like(batch.values) if batch.observed is None else batch.observed)
        logits: Tensor = self.inference_head(self._cells(batch.values, batch.observed, masks), None, members).outputs
        return logits

    def prior(self, condition: Condition | None, members: slice = ALL, group: Tensor | None = None) -> Prior:
        """p(z | c) that training uses; ``group`` (M or 1, N) is the class of each row, for a VampPrior."""
        if self.pseudo_inputs is not None:
            return self.vamp(members).of_rows(group)
        if self.prior_network is None or condition is None:
            return StandardNormal()
        return normal(self.prior_network(condition.vectors, None, members))

    def vamp(self, members: slice = ALL) -> GroupedMixture:
        """Posteriors of the pseudo-inputs under every class, (M, G, J, Z); Tomczak and Welling (2018), equation 9."""
        assert self.pseudo_inputs is not None
        groups, n = self.architecture.n_groups, self.architecture.pseudo_inputs
        condition = None
        if self.architecture.n_conditions:
            condition = Condition(self.class_table.repeat_interleave(n, dim=0).unsqueeze(0))
        cells = self.pseudo_inputs.cells(members, groups if condition is not None else 1)
        posterior = normal(self.encoder(cells, condition, members).outputs)
        shape = (len(posterior.mean), groups, n, self.architecture.latent_dim)
        return GroupedMixture(posterior.mean.reshape(shape), posterior.log_variance.reshape(shape))

    def decode(self, z: Tensor, condition: Condition | None, members: slice = ALL, seen: Seen | None = None) -> Tensor:
        """Parameters of p(x | z, c) for samples (M, S, N, Z): (M, S, N, P)."""
        outputs: Tensor = self.decoder(z.flatten(1, 2), condition, members, None if seen is None else seen.told)
        return outputs.reshape(*outputs.shape[:1], *z.shape[1:3], outputs.shape[-1])

    def log_prob(self, parameters: Tensor, batch: Batch) -> Tensor:
        """log p(x | z, c) per cell, (M, S, N, D); 0 where the cell is missing or part of the condition."""
        values = self._columns_by_head(batch.values.unsqueeze(1))
        parts = [
            head.log_prob(block, cells)
            for head, block, cells in zip(self._heads(), self._parameters_by_head(parameters), values, strict=True)
        ]
        log_prob = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        if batch.log_scale is not None:
            log_prob = log_prob - batch.log_scale.unsqueeze(1)
        if batch.observed is not None:
            log_prob = torch.where(batch.observed.unsqueeze(1) > 0, log_prob, 0.0)
        if batch.given is not None:
            log_prob = torch.where(batch.given.unsqueeze(1) > 0, 0.0, log_prob)
        return log_prob

    def terms(self, batch: Batch, noise: Tensor, *, members: slice = ALL, prior: Prior | None = None) -> Terms:
        """All terms of a batch.

        Parameters
        ----------
        noise : (S, Z) standard normal points shared by all rows, or (M, S, N, Z)
        prior : compare the posterior with this instead of the training prior
        """
        seen = self.look(batch, members)
        posterior = self.encode(batch, members)
        if seen is not None:
            prior = seen.prior
        prior = prior or self.prior(batch.condition, members, batch.class_index)
        z = posterior.sample(noise)
        parameters = self.decode(z, batch.condition, members, seen)
        return Terms(self.log_prob(parameters, batch), prior.kl(posterior), z, posterior, prior)

    @property
    def log_units(self) -> Tensor:
        """Logarithm of the unit of every cell that has one, (D,); 0 for levels and counts."""
        units = [getattr(head, "log_scale", torch.zeros(head.n_columns)) for head in self._heads()]
        return torch.cat([unit.detach().cpu().double() for unit in units])

    @property
    def has_table(self) -> bool:
        """Whether there are columns beside those of images."""
        return bool(self.table_heads())

    def images(self, values: Tensor) -> tuple[Tensor, ...]:
        """The images among the cells (M, N, D): (M, N, C, H, W) each."""
        blocks = self._columns_by_head(values)[len(self.table_heads()) :]
        return tuple(b.reshape(*values.shape[:2], *shape) for b, shape in zip(blocks, self.shapes, strict=True))

    def means(self, parameters: Tensor) -> Tensor:
        """Mean of every pixel under p(x | z, c), with a gradient: (M, S, N, D)."""
        blocks = zip(self._heads(), self._parameters_by_head(parameters), strict=True)
        return torch.cat([head.mean(block) for head, block in blocks], dim=-1)

    def with_means_held(self, parameters: Tensor) -> Tensor:
        """The same parameters with no gradient but that of the scales."""
        blocks = zip(self._heads(), self._parameters_by_head(parameters), strict=True)
        held = [
            torch.cat([block[..., : head.n_columns].detach(), block[..., head.n_columns :]], dim=-1)
            for head, block in blocks
        ]
        return torch.cat(held, dim=-1)

    @cached_property
    def widest(self) -> int:
        """Numbers that the widest layer makes of one row and sample."""
        channels = self.architecture.channels
        images = [max(c, channels[0]) * h * w for c, h, w in self.shapes]
        hidden = max(*self.architecture.hidden_dims, 1, self.architecture.latent_dim)
        return max(hidden, self.decoder.n_outputs, *images, 1)

    def expected(self, parameters: Tensor) -> Tensor:
        """Mean or most probable value of each cell over members and samples, (N, D)."""
        blocks = zip(self._heads(), self._parameters_by_head(parameters), strict=True)
        return torch.cat([head.expected(block) for head, block in blocks], dim=-1)

    def expected_each(self, parameters: Tensor) -> Tensor:
        """The same of every member and sample on its own: (M, S, N, P) -> (M, S, N, D)."""
        return torch.stack([torch.stack([self.expected(p[None, None]) for p in own]) for own in parameters])

    @property
    def n_cells(self) -> int:
        """D, the cells of one row."""
        return sum(head.n_columns for head in self._heads())

    def draw(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """One draw of every cell from p(x | z, c), (M, S, N, D)."""
        blocks = zip(self._heads(), self._parameters_by_head(parameters), strict=True)
        return torch.cat([head.sample(block, generator) for head, block in blocks], dim=-1)

    def jitter(self, batch: Batch, scale: float | Tensor, generator: torch.Generator) -> Batch:
        """The batch with training noise of ``scale`` (or (M, 1, 1)) on its real columns, in input and target alike."""
        blocks = zip(self._heads(), self._columns_by_head(batch.values), strict=True)
        values = torch.cat([head.jitter(block, scale, generator) for head, block in blocks], dim=-1)
        return replace(batch, values=values)


def normal(outputs: Tensor) -> DiagonalNormal:
    """Means and log-variances side by side, (…, 2 Z), as normals."""
    mean, log_variance = outputs.chunk(2, dim=-1)
    return DiagonalNormal(mean, log_variance.clamp(*LOG_VARIANCE_RANGE))


def shape_of(column: FittedColumn) -> tuple[int, int, int]:
    """(channels, height, width) of a column of images."""
    channels, height, width = column.shape
    return channels, height, width
