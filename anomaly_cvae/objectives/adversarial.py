"""VAE/GAN: reconstructions judged by what a discriminator sees in them; Larsen et al. (2016)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import softplus

from anomaly_cvae.errors import ParameterError
from anomaly_cvae.model import CVAE, Terms
from anomaly_cvae.networks import Blocks, CellEncoder, Cells, Condition
from anomaly_cvae.objectives.bounds import Weight, with_free_bits
from anomaly_cvae.objectives.step import Draws, Loss, Objective, inference_loss, with_class
from anomaly_cvae.optimizers import Adam
from anomaly_cvae.priors import DiagonalNormal
from anomaly_cvae.rows import Batch

FOOLING_WEIGHT = 0.005
"""Of fooling the discriminator, for the decoder, per feature in which images are compared: 1 / gamma of equation 9.

The distance grows with the number of features, so this does, too. At ten times it, with a discriminator of rate 0.5,
the KL dwindled: reconstructions were no longer of their images."""
OBEDIENCE_WEIGHT = 0.05
"""Of being recognised as of the condition that was asked for, per feature in which images are compared."""
SCALE_WEIGHT = 1e-3
"""Of the likelihood that teaches the widths of pixels. Adam takes the output layer, which alone should learn from it,
equally far at any weight; the layers below, which it shares with the means, hardly notice it at this one."""
DISCRIMINATOR_RATE = 0.2
"""Learning rate of the discriminator, relative to the model's."""
LEAST_VARIANCE = 1e-6
"""Of a feature; one that is the same in every image says nothing."""
BETAS = (0.5, 0.9)
OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Drawn:
    """Images as rows of pixels (M, R, D), and the conditions that they were made under."""

    values: Tensor
    condition: Condition | None

    def and_also(self, values: Tensor, condition: Condition | None) -> Drawn:
        """These and more."""
        if self.condition is not None and condition is not None:
            own, others = self.condition.vectors, condition.vectors
            condition = Condition(torch.cat([own, others.expand(len(own), -1, -1)], dim=1))
        return Drawn(torch.cat([self.values, values], dim=1), condition)

    def detached(self) -> Drawn:
        """The same without a gradient."""
        return Drawn(self.values.detach(), self.condition)


@dataclass(frozen=True)
class Judgement:
    """What the discriminator says of R images: feature maps (M, R, C, h, w) per column, logits of being real (M, R)."""

    features: list[Tensor]
    logits: Tensor


class Adversarial(Objective):
    """Similarity is measured in the discriminator's features, and the decoder has to fool the discriminator.

    The encoder lowers the KL and the distance, in the features of the discriminator, between an image and
    its reconstruction; the decoder lowers that distance and the discriminator's advantage, on
    reconstructions and on images from the prior; the discriminator has an optimiser of its own (algorithm
    1). The width of the pixel likelihood is learned, too, from the error that is left, so that the negative
    ELBO of the result means something; its mean has no part in that.

    A model with an inference head also draws every z under another condition than its own, and the decoder
    lowers -log q(c | x) of that condition there: else z, which knows the face, would outvote an attribute
    that is changed (after He et al. 2019). The head learns from real images alone.
    """

    keeps_best = False
    takes_noise = False

    def __init__(self, n_samples: int = 1, free_bits: float = 0.0) -> None:
        self.free_bits = free_bits
        self.discriminator: CellEncoder | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self._pending: Tensor | None = None

    def state(self) -> dict[str, Tensor]:
        """The discriminator, and where its optimiser stands with each parameter."""
        assert self.discriminator is not None
        assert self.optimizer is not None
        tensors = dict(self.discriminator.state_dict())
        for name, parameter in self.discriminator.named_parameters():
            tensors |= {f"{name}@{key}": value for key, value in self.optimizer.state[parameter].items()}
        return tensors

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The same again."""
        assert self.discriminator is not None
        assert self.optimizer is not None
        for name, parameter in self.discriminator.named_parameters():
            parameter.data.copy_(state[name])
            for key, value in self.optimizer.state[parameter].items():
                value.copy_(state[f"{name}@{key}"])

    def start(self, model: CVAE, draws: Draws, learning_rate: float) -> None:
        """Make the discriminator and its optimiser.

        Raises
        ------
        ParameterError
            Unless the rows are images and nothing else, and no part of them is condition.
        """
        if not model.shapes or model.has_table:
            raise ParameterError("objective='vae_gan' is for images alone: x must be one or more image columns")
        if model.pseudo_inputs is not None:
            raise ParameterError(
                "objective='vae_gan' imagines from N(0, I) or p(z | c): prior='vamp' does not go with it"
            )
        if model.seen_encoder is not None:
            raise ParameterError("objective='vae_gan' judges whole images: fit with condition_on_observed=False")
        a = model.architecture
        seed = int(torch.randint(2**31 - 1, (1,), generator=draws.generator, device=draws.device))
        self.discriminator = CellEncoder(
            a.n_members, Blocks(0, tuple(model.shapes)), a.channels, (), 1, a.n_conditions,
            torch.Generator().manual_seed(seed),
        ).to(device=draws.device, dtype=draws.dtype)  # fmt: skip
        self.optimizer = Adam(self.discriminator.parameters(), lr=DISCRIMINATOR_RATE * learning_rate, betas=BETAS)
        for parameter in self.discriminator.parameters():
            # As Adam makes it at its first step, which is too late for a checkpoint to be read into it.
            fresh = (torch.zeros(()), torch.zeros_like(parameter), torch.zeros_like(parameter))
            self.optimizer.state[parameter] = dict(zip(OPTIMIZER_STATE, fresh, strict=True))

    def loss(self, model: CVAE, batch: Batch, draws: Draws, kl_weight: Weight) -> Loss:
        """What encoder and decoder lower; the discriminator's own loss waits for `after`."""
        prior, posterior = model.prior(batch.condition, group=batch.class_index), model.encode(batch)
        z = posterior.sample(draws.latent(model, batch, 1))
        means = model.means(model.decode(z, batch.condition))[:, 0]
        noise = draws.latent(model, batch, 1)
        imagined = prior.sample(noise) if isinstance(prior, DiagonalNormal) else noise
        # The encoder is to be judged by similarity alone, not by how well it fools: its z is held here.
        held = z.detach()
        parameters = model.decode(torch.cat([held, imagined], dim=1), batch.condition)
        made = Drawn(model.means(parameters).flatten(1, 2), _repeated(batch.condition, 2))
        disobedience = torch.zeros(())
        if model.inference_head is not None:
            inference = inference_loss(model, batch)
            wanted = otherwise(model, batch, draws)
            edited = model.means(model.decode(held, wanted.condition))[:, 0]
            disobedience = _as_told(model, replace(wanted, values=edited))
            made = made.and_also(edited, wanted.condition)
        seen = Drawn(batch.values, batch.condition)
        real = self._judge(model, seen, batch)
        distance, fooled = self._for_the_model(model, Drawn(means, batch.condition), made, real, batch)
        log_prob = model.log_prob(model.with_means_held(parameters[:, :1]), batch)
        terms = with_free_bits(Terms(log_prob, prior.kl(posterior), z, posterior, prior), self.free_bits)
        n_features = sum(maps[0, 0].numel() for maps in real.features)
        nats = kl_weight * terms.kl.sum(-1) + distance + _lightly(-log_prob.sum(-1).mean(1))
        nats = nats + n_features * (FOOLING_WEIGHT * fooled + OBEDIENCE_WEIGHT * disobedience)
        if model.inference_head is not None:
            nats = nats + inference
        fake = self._judge(model, made.detached(), batch)
        self._pending = (softplus(-real.logits).mean(-1) + softplus(fake.logits).mean(-1)).sum()
        return Loss(nats.double(), log_prob)

    def after(self, learning_rate: float) -> None:
        """One step of the discriminator, on the images of the step before."""
        assert self.optimizer is not None
        assert self._pending is not None
        for group in self.optimizer.param_groups:
            group["lr"] = DISCRIMINATOR_RATE * learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        self._pending.backward()  # type: ignore[no-untyped-call]  # torch has no types here
        self.optimizer.step()
        self._pending = None

    def _for_the_model(
        self, model: CVAE, means: Drawn, made: Drawn, real: Judgement, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Distance of the reconstructions ``means`` in features, and cost of not fooling with ``made``: (M, N) each."""
        assert self.discriminator is not None
        # No gradient of these is the discriminator's: a third of the work of going back.
        self.discriminator.requires_grad_(False)
        features = self._judge(model, means, batch).features
        logits = self._judge(model, made, batch).logits
        self.discriminator.requires_grad_(True)
        distances = [feature_distance(own, seen.detach()) for own, seen in zip(features, real.features, strict=True)]
        members, n_rows = means.values.shape[:2]
        return torch.stack(distances).sum(0), softplus(-logits).reshape(members, -1, n_rows).sum(1)

    def _judge(self, model: CVAE, drawn: Drawn, batch: Batch) -> Judgement:
        """Features of the middle scale, and logits, of images, as many blocks of the batch's rows as there are."""
        assert self.discriminator is not None
        values = drawn.values
        if batch.observed is not None:
            # A hidden pixel is hidden in both: else it would give the real image away.
            values = values * batch.observed.repeat(1, values.shape[1] // batch.observed.shape[1], 1)
        cells = Cells(values.new_zeros(*values.shape[:2], 0), model.images(values))
        encoding = self.discriminator(cells, drawn.condition)
        return Judgement([maps[len(maps) // 2].to(values.dtype) for maps in encoding.maps], encoding.outputs[..., 0])


def otherwise(model: CVAE, batch: Batch, draws: Draws) -> Batch:
    """The batch under another condition: any class, and one attribute of every row turned to its opposite."""
    members, n_rows, _ = batch.values.shape
    architecture = model.architecture
    if architecture.n_classes:
        index = (draws.uniform(members, n_rows) * architecture.n_classes).long()
        batch = with_class(model, batch, index.clamp(max=architecture.n_classes - 1))
    assert batch.condition is not None
    if architecture.n_attributes:
        vectors = batch.condition.vectors.expand(members, n_rows, -1)
        first = vectors.shape[-1] - architecture.n_attributes
        turned = first + (draws.uniform(members, n_rows, 1) * architecture.n_attributes).long()
        turned = turned.clamp(max=vectors.shape[-1] - 1)
        batch = replace(batch, condition=Condition(vectors.scatter(-1, turned, -vectors.gather(-1, turned))))
    return batch


def _as_told(model: CVAE, batch: Batch) -> Tensor:
    """-log q(c | x) of images, (M, N), of which the inference head, which is to know real ones, learns nothing."""
    assert model.inference_head is not None
    model.inference_head.requires_grad_(False)
    nats = inference_loss(model, batch)
    model.inference_head.requires_grad_(True)
    return nats


def _repeated(condition: Condition | None, n: int) -> Condition | None:
    return None if condition is None else Condition(condition.vectors.repeat(1, n, 1))


def feature_distance(own: Tensor, real: Tensor) -> Tensor:
    """-log N(real | own, 1) of feature maps (M, N, C, h, w), but for its constant: (M, N), nats; equation 7.

    Channels are in units of their standard deviation over the real images, so that the discriminator cannot make the
    distance matter more or less by the size of its features.
    """
    variance = real.var(dim=(1, 3, 4), keepdim=True, correction=0) + LEAST_VARIANCE
    return 0.5 * ((own - real).square() / variance).flatten(2).sum(-1)


def _lightly(nats: Tensor) -> Tensor:
    """The same value with a gradient of `SCALE_WEIGHT`."""
    return SCALE_WEIGHT * nats + (1.0 - SCALE_WEIGHT) * nats.detach()
