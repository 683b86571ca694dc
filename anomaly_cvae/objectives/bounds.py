"""Bounds on log p(x | c): what training maximises and scores report, reductions of the same terms."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from anomaly_cvae.model import Terms

Weight = float | Tensor
"""A number; where steps are captured, a tensor () that it is filled into before each; (M, 1) where members differ."""


class Bound(Protocol):
    """A bound on log p(x | c) per member and row, (M, N), nats."""

    def __call__(self, terms: Terms, kl_weight: Weight = 1.0) -> Tensor:
        """Reduce ``terms``."""


def elbo(terms: Terms, kl_weight: Weight = 1.0) -> Tensor:
    """E_q log p(x | z, c) - kl_weight * KL(q || p), (M, N); Kingma and Welling (2014), equation 3."""
    wide = accumulator(terms.log_prob)
    reconstruction = terms.log_prob.sum(-1, dtype=wide).mean(1)
    return reconstruction - kl_weight * terms.kl.sum(-1, dtype=wide)


def importance_weighted(terms: Terms, kl_weight: Weight = 1.0) -> Tensor:
    """log mean_s p(x, z_s | c) / q(z_s | x, c), (M, N); Burda, Grosse and Salakhutdinov (2016), equation 8.

    ``kl_weight`` tempers log p(z | c) - log q(z | x, c) for the warm-up; at 1 this is the IWAE bound.
    """
    if isinstance(kl_weight, Tensor) and kl_weight.dim():
        kl_weight = kl_weight.unsqueeze(1)
    wide = accumulator(terms.log_prob)
    log_ratio = (terms.log_prior - terms.log_q).to(wide)
    log_weight = terms.log_prob.sum(-1, dtype=wide) + kl_weight * log_ratio
    return torch.logsumexp(log_weight, dim=1) - math.log(log_weight.shape[1])


def accumulator(values: Tensor) -> torch.dtype:
    """The type in which nats are summed: float64 where the device has it."""
    return torch.float32 if values.device.type == "mps" else torch.float64


def with_free_bits(terms: Terms, free_bits: float) -> Terms:
    """The terms, with the KL of every latent unit held at ``free_bits`` nats where its mean over rows is less.

    Such a unit costs nothing more, so it is not switched off; Kingma et al. (2016), equation 15.
    """
    if free_bits == 0.0:
        return terms
    mean = terms.kl.mean(dim=1, keepdim=True)
    floor = free_bits * terms.z.shape[-1] / terms.kl.shape[-1]
    return replace(terms, kl=torch.where(mean > floor, terms.kl, floor))


BOUNDS: dict[str, Bound] = {"elbo": elbo, "iwae": importance_weighted}
