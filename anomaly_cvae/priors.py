"""Distributions of the latent z: the posterior, and the priors it is compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor, nn

from anomaly_cvae.frames import FloatArray
from anomaly_cvae.likelihoods.base import wide

MAX_COMPONENTS = 512
ROWS_PER_COMPONENT = 4
"""A component summarises at least this many rows on average: it is fitted, not a row kept."""
MAX_FITTED_ROWS = 20_000
"""Posteriors per class and member that the mixture is fitted to."""
LOG_TWO_PI = math.log(2.0 * math.pi)


class Prior(Protocol):
    """p(z | c) as seen by the objectives."""

    def kl(self, posterior: DiagonalNormal) -> Tensor:
        """KL(q || p), (M, N, Z), or (M, N, 1) where it does not split over latent units; nats."""

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z | c) of samples (M, S, N, Z): (M, S, N)."""


@dataclass(frozen=True)
class DiagonalNormal:
    """Independent normals, mean and log-variance of shape (M, N, Z); a posterior or a learned prior."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Mean + scale * noise; noise (S, Z) is shared by all rows, (M, S, N, Z) is their own: (M, S, N, Z)."""
        noise = noise if noise.dim() == 4 else noise[:, None, :]
        return self.mean.unsqueeze(1) + torch.exp(0.5 * self.log_variance).unsqueeze(1) * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of samples (M, S, N, Z): (M, S, N)."""
        mean, log_variance = self.mean.unsqueeze(1), self.log_variance.unsqueeze(1)
        return -0.5 * ((z - mean).square() * torch.exp(-log_variance) + log_variance + LOG_TWO_PI).sum(-1)

    def kl(self, posterior: DiagonalNormal) -> Tensor:
        """KL of two normals, per latent unit."""
        difference = posterior.log_variance - self.log_variance
        distance = (posterior.mean - self.mean).square() * torch.exp(-self.log_variance)
        return 0.5 * (torch.exp(difference) + distance - 1.0 - difference)


@dataclass(frozen=True)
class StandardNormal:
    """N(0, I)."""

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of samples (M, S, N, Z): (M, S, N)."""
        return -0.5 * (z.square() + LOG_TWO_PI).sum(-1)

    def kl(self, posterior: DiagonalNormal) -> Tensor:
        """KL(q || N(0, I)), per latent unit (Kingma and Welling 2014, appendix B)."""
        log_variance = posterior.log_variance
        return 0.5 * (posterior.mean.square() + torch.exp(log_variance) - 1.0 - log_variance)


@dataclass(frozen=True)
class Mixture:
    """Mixture of diagonal normals: log-weights (M, J) or (M, N, J), means and log-variances (M, J, Z)."""

    log_weight: Tensor
    mean: Tensor
    log_variance: Tensor

    def kl(self, posterior: DiagonalNormal) -> Tensor:
        """The bound -log sum_j w_j exp(-KL(q || p_j)) >= KL(q || p), (M, N, 1).

        Hershey and Olsen (2007), equation 18, for a single component on the left. The pairwise KL
        are expanded into a matrix product in float64, because its parts cancel in float32.
        """
        mean, log_variance = wide(posterior.mean), wide(posterior.log_variance)
        own_mean, own_log_variance = wide(self.mean), wide(self.log_variance)
        precision = torch.exp(-own_log_variance)
        # KL(q || p_j) as one product: (second moment, mean, 1, own entropy) times the components.
        own = 0.5 * (log_variance.sum(-1, keepdim=True) + mean.shape[-1])
        rows = torch.cat([torch.exp(log_variance) + mean.square(), mean, torch.ones_like(own), own], dim=-1)
        constant = -0.5 * (own_log_variance + own_mean.square() * precision).sum(-1, keepdim=True)
        components = torch.cat([-0.5 * precision, own_mean * precision, constant, torch.ones_like(constant)], dim=-1)
        exponent = self._weight() + torch.matmul(rows, components.mT)
        return -_logsumexp(exponent, posterior.mean.dtype).unsqueeze(-1)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of samples (M, S, N, Z): (M, S, N); the squares are expanded into one product, as above."""
        own_mean, own_log_variance, wide_z = wide(self.mean), wide(self.log_variance), wide(z)
        precision = torch.exp(-own_log_variance)
        rows = torch.cat([wide_z.square(), wide_z, torch.ones_like(wide_z[..., :1])], dim=-1)
        constant = -0.5 * (own_log_variance + own_mean.square() * precision + LOG_TWO_PI).sum(-1, keepdim=True)
        components = torch.cat([-0.5 * precision, own_mean * precision, constant], dim=-1)
        per_component = torch.matmul(rows, components.mT.unsqueeze(1))
        return _logsumexp(self._weight().unsqueeze(1) + per_component, z.dtype)

    def _weight(self) -> Tensor:
        """Log-weights (M, N or 1, J)."""
        weight = wide(self.log_weight)
        return weight if weight.dim() == 3 else weight.unsqueeze(1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` draws per member, (M, n, Z)."""
        chosen = torch.multinomial(torch.exp(self.log_weight), n, replacement=True, generator=generator)
        index = chosen.unsqueeze(-1).expand(-1, -1, self.mean.shape[-1])
        mean, log_variance = self.mean.gather(1, index), self.log_variance.gather(1, index)
        return mean + torch.exp(0.5 * log_variance) * torch.empty_like(mean).normal_(generator=generator)


def _logsumexp(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """log sum exp over the last axis, in ``dtype`` from the largest exponent on: its digits below that do not count."""
    largest = exponent.amax(dim=-1, keepdim=True)
    rest = (exponent - largest).to(dtype)
    return (largest.squeeze(-1) + torch.log(torch.exp(rest).sum(-1))).to(dtype)


@dataclass(frozen=True)
class GroupedMixture:
    """One mixture of equal weights per class: means and log-variances (M, G, J, Z)."""

    mean: Tensor
    log_variance: Tensor

    def of_rows(self, group: Tensor | None) -> Mixture:
        """The mixture of every row's class (M or 1, N); None: all rows are of the only one."""
        members, groups, n, _ = self.mean.shape
        mean, log_variance = self.mean.flatten(1, 2), self.log_variance.flatten(1, 2)
        log_weight = self.mean.new_full((members, groups * n), -math.log(n))
        if groups == 1:
            return Mixture(log_weight, mean, log_variance)
        assert group is not None
        own = torch.arange(groups, device=group.device).repeat_interleave(n)
        outside = group.unsqueeze(-1) != own
        return Mixture(torch.where(outside, -torch.inf, log_weight.unsqueeze(1)), mean, log_variance)


class AggregatePosterior(nn.Module):
    """The mixture that the training rows' posteriors form, one per member and class.

    Buffers are (M, G, J) and (M, G, J, Z); G = 1 where a member knows one class only. Unused components
    have log-weight -inf.
    """

    log_weight: Tensor
    mean: Tensor
    log_variance: Tensor

    def __init__(self, n_members: int, n_groups: int, n_components: int, latent_dim: int) -> None:
        super().__init__()
        self.register_buffer("log_weight", torch.full((n_members, n_groups, n_components), -torch.inf))
        self.register_buffer("mean", torch.zeros(n_members, n_groups, n_components, latent_dim))
        self.register_buffer("log_variance", torch.zeros(n_members, n_groups, n_components, latent_dim))

    def select(self, members: slice, group: int) -> Mixture:
        """The mixtures of some members for one class, without the unused components."""
        used = int((self.log_weight[members, group] > -torch.inf).any(0).sum())
        return Mixture(
            self.log_weight[members, group, :used],
            self.mean[members, group, :used],
            self.log_variance[members, group, :used],
        )

    @torch.no_grad()
    def fit_group(
        self, member: int, group: int, posterior: DiagonalNormal, seed: int, n_components: int | None = None
    ) -> None:
        """Fit one mixture to posteriors of N rows (mean and log-variance of shape (N, Z)).

        Posteriors are clustered by mean (k-means); each cluster becomes the normal with its first two
        moments, weighted by its share of the rows.
        """
        mean = posterior.mean.double().cpu().numpy()
        variance = torch.exp(posterior.log_variance.double()).cpu().numpy()
        labels = _cluster(mean, n_components or number_of_components(len(mean)), seed)
        count = np.bincount(labels).astype(np.float64)
        center = _mean_by_label(mean, labels, count)
        spread = _mean_by_label(variance + mean**2, labels, count) - center**2
        used = len(count)
        self.log_weight[member, group] = -torch.inf
        self.log_weight[member, group, :used] = torch.as_tensor(np.log(count / count.sum()))
        self.mean[member, group, :used] = torch.as_tensor(center)
        self.log_variance[member, group, :used] = torch.as_tensor(np.log(np.maximum(spread, 1e-6)))


def number_of_components(n_rows: int) -> int:
    """How many components ``n_rows`` posteriors are summarised by."""
    return max(1, min(MAX_COMPONENTS, n_rows // ROWS_PER_COMPONENT))


def _cluster(mean: np.ndarray, n_clusters: int, seed: int) -> np.ndarray:
    if n_clusters == 1:
        return np.zeros(len(mean), dtype=np.int64)
    distinct = len(np.unique(mean, axis=0))
    # Half of scikit-learn comes with it: not before it is needed.
    from sklearn.cluster import KMeans

    kmeans = KMeans(min(n_clusters, distinct), n_init=1, max_iter=20, random_state=seed)
    labels = kmeans.fit(mean).labels_
    used: np.ndarray = np.unique(labels, return_inverse=True)[1]  # k-means may leave a cluster empty
    return used


def _mean_by_label(values: np.ndarray, labels: np.ndarray, count: np.ndarray) -> np.ndarray:
    total = np.zeros((len(count), values.shape[1]))
    np.add.at(total, labels, values)
    mean: np.ndarray = total / count[:, None]
    return mean


def low_discrepancy_normal(n_samples: int, latent_dim: int, seed: int) -> FloatArray:
    """Scrambled Sobol points mapped to N(0, I), (S, Z); from two samples on, mean 0 and variance 1 per unit."""
    sobol = torch.quasirandom.SobolEngine(latent_dim, scramble=True, seed=seed)  # type: ignore[no-untyped-call]  # torch has no types here
    points: FloatArray = norm.ppf(np.clip(sobol.draw(n_samples, dtype=torch.float64).numpy(), 1e-6, 1 - 1e-6))
    if n_samples == 1:
        return points
    points = points - points.mean(axis=0)
    standard: FloatArray = points / np.maximum(points.std(axis=0), 1e-6)
    return standard
