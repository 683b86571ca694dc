"""Learning from rows of which only some have a class: model M2 of Kingma et al. (2014)."""

from __future__ import annotations

import torch
from torch import Tensor

from anomaly_cvae.model import CVAE
from anomaly_cvae.objectives.bounds import elbo, with_free_bits
from anomaly_cvae.objectives.step import Draws, Loss, Objective, claim, inference_loss
from anomaly_cvae.rows import Batch


class SemiSupervised(Objective):
    """Labelled rows: the negative ELBO under their class, and a weighted -log q(c | x).

    Rows without a class: the negative ELBO under every class, weighted by q(c | x), less the entropy of
    q(c | x) (equations 6 to 9). The class's own share, -log p(c), is constant where classes are equally
    frequent, as they are taken to be.
    """

    def __init__(self, n_samples: int = 1, free_bits: float = 0.0, classification_weight: float = 10.0) -> None:
        self.n_samples, self.free_bits, self.classification_weight = n_samples, free_bits, classification_weight

    def loss(self, model: CVAE, batch: Batch, draws: Draws, kl_weight: float) -> Loss:
        """The three parts together; kl_weight tempers the KL for the warm-up."""
        noise = draws.latent(model, batch, self.n_samples)
        rows, log_prob = self._rows(model, batch, noise, kl_weight)
        return Loss(rows + self.classification_weight * inference_loss(model, batch), log_prob)

    def held_out(self, model: CVAE, batch: Batch, noise: Tensor) -> Tensor:
        """The same without the classification of labelled rows."""
        return self._rows(model, batch, noise, 1.0)[0]

    def _rows(self, model: CVAE, batch: Batch, noise: Tensor, kl_weight: float) -> tuple[Tensor, Tensor]:
        assert batch.class_index is not None
        by_class, log_prob = [], None
        for k in range(model.architecture.n_classes):
            terms = model.terms(claim(model, batch, k), noise)
            log_prob = terms.log_prob
            by_class.append(-elbo(with_free_bits(terms, self.free_bits), kl_weight))
        nats = torch.stack(by_class, dim=-1)
        log_q = torch.log_softmax(model.condition_logits(batch)[..., : nats.shape[-1]], dim=-1)
        unlabelled = (torch.exp(log_q) * (nats + log_q)).sum(-1)
        index = batch.class_index.expand(nats.shape[:2])
        own = nats.gather(-1, index.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        assert log_prob is not None
        return torch.where(index >= 0, own, unlabelled), log_prob
