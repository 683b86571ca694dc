"""Structured prediction: the rest of a row from its observed part, with z drawn as it will be at test time."""

from __future__ import annotations

import math

import torch

from anomaly_cvae.errors import ParameterError
from anomaly_cvae.model import CVAE
from anomaly_cvae.objectives.bounds import Weight, elbo, with_free_bits
from anomaly_cvae.objectives.step import Draws, Loss, Objective
from anomaly_cvae.rows import Batch


class Hybrid(Objective):
    """a * ELBO + (1 - a) * E_{p(z | x_observed)} log p(x_hidden | z, x_observed); Sohn et al. (2015), equation 8.

    At test time z comes from the prior network, which the ELBO alone never decodes from.
    """

    capturable = True

    def __init__(self, n_samples: int = 1, free_bits: float = 0.0, elbo_share: float = 0.5) -> None:
        self.n_samples, self.free_bits, self.elbo_share = n_samples, free_bits, elbo_share

    def loss(self, model: CVAE, batch: Batch, draws: Draws, kl_weight: Weight) -> Loss:
        """Both parts from one look at the observed part."""
        seen = model.look(batch)
        if seen is None:
            raise ParameterError("objective='hybrid' predicts from an observed part: set condition_on_observed=True")
        terms = model.terms(batch, draws.latent(model, batch, self.n_samples))
        bound = elbo(with_free_bits(terms, self.free_bits), kl_weight)
        z = seen.prior.sample(draws.latent(model, batch, self.n_samples))
        drawn = model.log_prob(model.decode(z, batch.condition, seen=seen), batch)
        predicted = torch.logsumexp(drawn.sum(-1, dtype=bound.dtype), dim=1) - math.log(self.n_samples)
        return Loss(-(self.elbo_share * bound + (1.0 - self.elbo_share) * predicted), terms.log_prob)
