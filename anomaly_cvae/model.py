"""The conditional variational autoencoder: tensors in, terms out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor, nn

from anomaly_cvae.encoding import FittedColumn
from anomaly_cvae.likelihoods import Likelihood, likelihood_class
from anomaly_cvae.networks import ALL, StackedMLP
from anomaly_cvae.priors import DiagonalNormal, Prior, StandardNormal
from anomaly_cvae.rows import Batch

LOG_VARIANCE_RANGE = (-14.0, 10.0)


@dataclass(frozen=True)
class Architecture:
    """Everything that fixes the shapes of a bank.

    ``n_conditions`` is C, the width of the condition vector (0: the members know one class only);
    ``missing_indicators`` shows the encoder which cells are missing.
    """

    n_members: int
    latent_dim: int
    hidden_dims: tuple[int, ...]
    n_conditions: int = 0
    missing_indicators: bool = False
    learned_prior: bool = False
    scale_floor: float = 0.08


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

    q(z | x, c) and p(x | z, c) are multilayer perceptrons with the condition at every layer; the prior
    p(z | c) is N(0, I) or a normal that depends on c. Columns are independent given z and c.
    """

    def __init__(self, architecture: Architecture, columns: Sequence[FittedColumn], seed: int = 0) -> None:
        super().__init__()
        self.architecture = architecture
        generator = torch.Generator().manual_seed(seed)
        self.heads = nn.ModuleList(
            likelihood_class(name)(tuple(block), architecture.scale_floor)
            for name, block in groupby(columns, key=lambda column: column.likelihood)
        )
        members, latent, hidden = architecture.n_members, architecture.latent_dim, architecture.hidden_dims
        conditions = architecture.n_conditions
        n_inputs = sum(head.n_features for head in self._heads())
        n_inputs += len(columns) if architecture.missing_indicators else 0
        n_outputs = sum(head.n_parameters for head in self._heads())
        self.encoder = StackedMLP(members, n_inputs, hidden, 2 * latent, conditions, generator)
        self.decoder = StackedMLP(members, latent, hidden[::-1], n_outputs, conditions, generator)
        self.prior_network: StackedMLP | None = None
        if architecture.learned_prior and conditions:
            self.prior_network = StackedMLP(members, conditions, (), 2 * latent, 0, generator)

    def _heads(self) -> list[Likelihood]:
        return [head for head in self.heads if isinstance(head, Likelihood)]

    def _columns_by_head(self, values: Tensor) -> tuple[Tensor, ...]:
        return torch.split(values, [head.n_columns for head in self._heads()], dim=-1)

    def _parameters_by_head(self, outputs: Tensor) -> tuple[Tensor, ...]:
        return torch.split(outputs, [head.n_parameters for head in self._heads()], dim=-1)

    def encode(self, batch: Batch, members: slice = ALL) -> DiagonalNormal:
        """q(z | x, c) of each row under each member, (M, N, Z)."""
        blocks = self._columns_by_head(batch.values)
        masks = [None] * len(blocks) if batch.observed is None else self._columns_by_head(batch.observed)
        features = [
            head.features(values, observed) for head, values, observed in zip(self._heads(), blocks, masks, strict=True)
        ]
        if self.architecture.missing_indicators:
            features.append(torch.ones_like(batch.values) if batch.observed is None else batch.observed)
        x = torch.cat(features, dim=-1) if len(features) > 1 else features[0]
        return self._normal(self.encoder(x, batch.condition, members))

    def prior(self, condition: Tensor | None, members: slice = ALL) -> Prior:
        """p(z | c) that training uses."""
        if self.prior_network is None or condition is None:
            return StandardNormal()
        return self._normal(self.prior_network(condition, None, members))

    def _normal(self, outputs: Tensor) -> DiagonalNormal:
        mean, log_variance = outputs.chunk(2, dim=-1)
        return DiagonalNormal(mean, log_variance.clamp(*LOG_VARIANCE_RANGE))

    def decode(self, z: Tensor, condition: Tensor | None, members: slice = ALL) -> Tensor:
        """Parameters of p(x | z, c) for samples (M, S, N, Z): (M, S, N, P)."""
        outputs: Tensor = self.decoder(z.flatten(1, 2), condition, members)
        return outputs.reshape(*outputs.shape[:1], *z.shape[1:3], outputs.shape[-1])

    def log_prob(self, parameters: Tensor, batch: Batch) -> Tensor:
        """log p(x | z, c) per column, (M, S, N, D); 0 where the cell is missing."""
        values = self._columns_by_head(batch.values.unsqueeze(1))
        parts = [
            head.log_prob(block, cells)
            for head, block, cells in zip(self._heads(), self._parameters_by_head(parameters), values, strict=True)
        ]
        log_prob = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        if batch.log_scale is not None:
            log_prob = log_prob - batch.log_scale.unsqueeze(1)
        if batch.observed is None:
            return log_prob
        return torch.where(batch.observed.unsqueeze(1) > 0, log_prob, 0.0)

    def terms(self, batch: Batch, noise: Tensor, *, members: slice = ALL, prior: Prior | None = None) -> Terms:
        """All terms of a batch.

        Parameters
        ----------
        noise : (S, Z) standard normal points shared by all rows, or (M, S, N, Z)
        prior : compare the posterior with this instead of the training prior
        """
        posterior = self.encode(batch, members)
        prior = prior or self.prior(batch.condition, members)
        z = posterior.sample(noise)
        parameters = self.decode(z, batch.condition, members)
        return Terms(self.log_prob(parameters, batch), prior.kl(posterior), z, posterior, prior)

    def expected(self, parameters: Tensor) -> Tensor:
        """Mean or most probable value of each cell over members and samples, (N, D)."""
        blocks = zip(self._heads(), self._parameters_by_head(parameters), strict=True)
        return torch.cat([head.expected(block) for head, block in blocks], dim=-1)

    def draw(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """One draw of every cell from p(x | z, c), (M, S, N, D)."""
        blocks = zip(self._heads(), self._parameters_by_head(parameters), strict=True)
        return torch.cat([head.sample(block, generator) for head, block in blocks], dim=-1)

    def jitter(self, batch: Batch, scale: float, generator: torch.Generator) -> Batch:
        """The batch with training noise on its real columns, in input and target alike."""
        blocks = zip(self._heads(), self._columns_by_head(batch.values), strict=True)
        values = torch.cat([head.jitter(block, scale, generator) for head, block in blocks], dim=-1)
        return replace(batch, values=values)
