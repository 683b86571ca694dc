"""Learning from rows of which only some have a class: model M2 of Kingma et al. (2014)."""

from __future__ import annotations

import torch
from torch import Tensor

from anomaly_cvae.model import CVAE
from anomaly_cvae.objectives.bounds import Weight, elbo, with_free_bits
from anomaly_cvae.objectives.step import Draws, Loss, Objective, inference_loss, of_rows, with_class
from anomaly_cvae.rows import Batch


class SemiSupervised(Objective):
    """Labelled rows: the negative ELBO under their class, and a weighted -log q(c | x).

    Rows without a class: the negative ELBO under every class, weighted by q(c | x), less the entropy of
    q(c | x) (equations 6 to 9). The class's own share, -log p(c), is constant where classes are equally
    frequent, as they are taken to be.

    The last weights are kept: how well held-out rows without a class are explained says little of q(c | x), and
    chose the first weights of all where the rows are nearly normal as they come.
    """

    keeps_best = False
    takes_unlabelled = True

    def __init__(self, n_samples: int = 1, free_bits: float = 0.0, classification_weight: float = 10.0) -> None:
        self.n_samples, self.free_bits, self.classification_weight = n_samples, free_bits, classification_weight

    def loss(self, model: CVAE, batch: Batch, draws: Draws, kl_weight: Weight) -> Loss:
        """The three parts together; kl_weight tempers the KL for the warm-up."""
        noise = draws.latent(model, batch, self.n_samples)
        rows, log_prob = self._rows(model, batch, noise, kl_weight)
        return Loss(rows + self.classification_weight * inference_loss(model, batch), log_prob)

    def held_out(self, model: CVAE, batch: Batch, noise: Tensor, kl_weight: Weight = 1.0) -> Tensor:
        """The same without the classification of labelled rows."""
        return self._rows(model, batch, noise, kl_weight)[0]

    def _rows(self, model: CVAE, batch: Batch, noise: Tensor, kl_weight: Weight) -> tuple[Tensor, Tensor]:
        assert batch.class_index is not None
        index = batch.class_index.expand(batch.values.shape[:2])
        own, log_prob = self._nats(model, with_class(model, batch, index.clamp(min=0)), noise, kl_weight)
        # Each member's rows without a class, the first of its order; only they need all classes.
        order = torch.argsort((index >= 0).to(torch.uint8), dim=1, stable=True)
        chosen = order[:, : int((index < 0).sum(1).max())]
        if not chosen.shape[1]:
            return own, log_prob
        some, some_noise = of_rows(batch, chosen), _of_rows(noise, chosen)
        by_class = [
            self._nats(model, with_class(model, some, torch.full_like(chosen, k)), some_noise, kl_weight)[0]
            for k in range(model.architecture.n_classes)
        ]
        nats = torch.stack(by_class, dim=-1)
        log_q = torch.log_softmax(model.condition_logits(some)[..., : nats.shape[-1]], dim=-1)
        unlabelled = (torch.exp(log_q) * (nats + log_q)).sum(-1).to(own.dtype)
        without = index.gather(1, chosen) < 0
        return own.scatter(1, chosen, torch.where(without, unlabelled, own.gather(1, chosen))), log_prob

    def _nats(self, model: CVAE, batch: Batch, noise: Tensor, kl_weight: Weight) -> tuple[Tensor, Tensor]:
        terms = model.terms(batch, noise)
        return -elbo(with_free_bits(terms, self.free_bits), kl_weight), terms.log_prob


def _of_rows(noise: Tensor, chosen: Tensor) -> Tensor:
    """Noise (S, Z), the same for all rows, or (M, S, N, Z), of the chosen rows (M, U)."""
    if noise.dim() == 2:
        return noise
    places = chosen[:, None, :, None].expand(-1, noise.shape[1], -1, noise.shape[3])
    return noise.gather(2, places)
