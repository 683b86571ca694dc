"""VAE/GAN: reconstructions judged by what a discriminator sees in them; Larsen et al. (2016)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from anomaly_cvae.errors import ParameterError
from anomaly_cvae.model import CVAE
from anomaly_cvae.networks import Blocks, CellEncoder, Cells
from anomaly_cvae.objectives.step import Draws, Loss, Objective, inference_loss
from anomaly_cvae.rows import Batch

FEATURE_WEIGHT = 1.0
"""Of the likelihood of the discriminator's features, for the decoder; against fooling the discriminator."""
DISCRIMINATOR_RATE = 0.5
"""Learning rate of the discriminator, relative to the model's."""
BETAS = (0.5, 0.9)


class Adversarial(Objective):
    """Similarity is measured in the discriminator's features, and the decoder has to fool the discriminator.

    The encoder lowers the KL and the distance, in the features of the discriminator, between an image and
    its reconstruction; the decoder lowers that distance and the discriminator's advantage, on
    reconstructions and on images from the prior; the discriminator has an optimiser of its own (algorithm
    1). The width of the pixel likelihood is learned, too, from the error that is left, so that the negative
    ELBO of the result means something; its mean has no part in that.
    """

    keeps_best = False

    def __init__(self, n_samples: int = 1, free_bits: float = 0.0) -> None:
        self.discriminator: CellEncoder | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self._pending: Tensor | None = None

    def own_parameters(self) -> list[Tensor]:
        """Those of the discriminator."""
        return [] if self.discriminator is None else list(self.discriminator.parameters())

    def start(self, model: CVAE, draws: Draws, learning_rate: float) -> None:
        """Make the discriminator and its optimiser.

        Raises
        ------
        ParameterError
            Unless the rows are images and nothing else.
        """
        if not model.shapes or model.has_table:
            raise ParameterError("objective='vae_gan' is for images alone: x must be one or more image columns")
        a = model.architecture
        seed = int(torch.randint(2**31 - 1, (1,), generator=draws.generator, device=draws.device))
        self.discriminator = CellEncoder(
            a.n_members, Blocks(0, tuple(model.shapes)), a.channels, (), 1, a.n_conditions,
            torch.Generator().manual_seed(seed),
        ).to(device=draws.device, dtype=draws.dtype)  # fmt: skip
        self.optimizer = torch.optim.Adam(
            self.discriminator.parameters(), lr=DISCRIMINATOR_RATE * learning_rate, betas=BETAS
        )

    def loss(self, model: CVAE, batch: Batch, draws: Draws, kl_weight: float) -> Loss:
        """What encoder and decoder lower; the discriminator's own loss waits for `after`."""
        terms = model.terms(batch, draws.latent(model, batch, 1))
        means = model.means(model.decode(terms.z, batch.condition))[:, 0]
        from_prior = draws.latent(model, batch, 1)
        imagined = model.means(model.decode(from_prior, batch.condition))[:, 0]
        # The encoder is to be judged by similarity alone, not by how well it fools.
        fooling = model.means(model.decode(terms.z.detach(), batch.condition))[:, 0]
        real_features, real_logit = self._judge(model, batch.values, batch.condition)
        features, _ = self._judge(model, means, batch.condition)
        _, fooling_logit = self._judge(model, fooling, batch.condition)
        _, imagined_logit = self._judge(model, imagined, batch.condition)
        distance = sum(
            0.5 * (own - real.detach()).square().flatten(2).sum(-1)
            for own, real in zip(features, real_features, strict=True)
        )
        fooled = softplus(-fooling_logit) + softplus(-imagined_logit)
        scale_only = -self._log_prob_of_scale(model, batch, terms.z.detach())
        rows = kl_weight * terms.kl.sum(-1) + FEATURE_WEIGHT * distance + fooled + scale_only
        if model.inference_head is not None:
            rows = rows + inference_loss(model, batch)
        self._pending = self._discriminator_loss(model, batch, means.detach(), imagined.detach())
        return Loss(rows.double(), terms.log_prob)

    def after(self, learning_rate: float) -> None:
        """One step of the discriminator, on the images of the step before."""
        assert self.optimizer is not None and self._pending is not None
        for group in self.optimizer.param_groups:
            group["lr"] = DISCRIMINATOR_RATE * learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        self._pending.backward()  # type: ignore[no-untyped-call]  # torch has no types here
        self.optimizer.step()
        self._pending = None

    def _discriminator_loss(self, model: CVAE, batch: Batch, reconstructed: Tensor, imagined: Tensor) -> Tensor:
        real = self._judge(model, batch.values, batch.condition)[1]
        fakes = [self._judge(model, images, batch.condition)[1] for images in (reconstructed, imagined)]
        return (softplus(-real) + sum(0.5 * softplus(fake) for fake in fakes)).mean(-1).sum()

    def _judge(self, model: CVAE, values: Tensor, condition: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Features of the middle scale of every image, and the logit of being real (M, N)."""
        assert self.discriminator is not None
        cells = model.images(values)
        encoding = self.discriminator(Cells(values.new_zeros(*values.shape[:2], 0), cells), condition)
        return [maps[len(maps) // 2] for maps in encoding.maps], encoding.outputs[..., 0]

    def _log_prob_of_scale(self, model: CVAE, batch: Batch, z: Tensor) -> Tensor:
        """log p(x | z, c) whose gradient reaches the scales of the pixels alone, (M, N)."""
        parameters = model.decode(z, batch.condition)
        held = model.with_means_held(parameters)
        return model.log_prob(held, batch).sum(-1).mean(1)


