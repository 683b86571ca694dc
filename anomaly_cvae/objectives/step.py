"""What the training loop asks of an objective at every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from anomaly_cvae.model import CVAE
from anomaly_cvae.networks import Condition
from anomaly_cvae.objectives.bounds import Bound, Weight, elbo, with_free_bits
from anomaly_cvae.rows import Batch


@dataclass(frozen=True)
class Draws:
    """The one source of randomness of training, in the type and on the device of the rows."""

    generator: torch.Generator
    device: torch.device
    dtype: torch.dtype

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.empty(shape, device=self.device, dtype=self.dtype).normal_(generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1)."""
        return torch.rand(shape, device=self.device, dtype=self.dtype, generator=self.generator)

    def latent(self, model: CVAE, batch: Batch, n_samples: int) -> Tensor:
        """Noise of the posterior's samples, (M, S, N, Z)."""
        members, n_rows, _ = batch.values.shape
        return self.normal(members, n_samples, n_rows, model.architecture.latent_dim)


@dataclass(frozen=True)
class Loss:
    """What a step lowers: nats per member and row (M, N), and the terms that say which cell is to blame."""

    rows: Tensor
    log_prob: Tensor | None = None


class Objective:
    """One way to learn from a batch. The loop knows these methods and nothing else of it.

    ``keeps_best`` says that weights are chosen by the held-out loss; else the last ones are kept.
    ``takes_noise`` says that training noise on the cells does no harm: a discriminator would see who has it.
    ``takes_unlabelled`` says that rows may lack their class: it tells them every one.
    ``capturable`` says that `loss` looks at no value and does the same at every step, and that there is nothing to do
    after one: such a step can be a CUDA graph (`anomaly_cvae.graphs`). The KL weight is then a tensor.
    """

    keeps_best: bool = True
    takes_noise: bool = True
    takes_unlabelled: bool = False
    capturable: bool = False

    def loss(self, model: CVAE, batch: Batch, draws: Draws, kl_weight: Weight) -> Loss:
        """The loss whose gradient the loop follows."""
        raise NotImplementedError

    def held_out(self, model: CVAE, batch: Batch, noise: Tensor, kl_weight: Weight = 1.0) -> Tensor:
        """Loss of rows that training does not see, (M, N), nats; from fixed noise (S, Z).

        ``kl_weight`` is what training ends with: the best weights by another one are early ones.
        """
        return -elbo(model.terms(batch, noise), kl_weight)

    def describe(self) -> dict[str, Any]:
        """What it is and how it is set, for telling one training from another."""
        plain = {name: value for name, value in vars(self).items() if isinstance(value, (int, float, str))}
        return {"kind": type(self).__name__, **plain}

    def state(self) -> dict[str, Tensor]:
        """What networks and optimisers of its own a checkpoint has to hold."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up a `state` again."""

    def start(self, model: CVAE, draws: Draws, learning_rate: float) -> None:
        """Called once before the first step: the place to make networks of its own."""

    def after(self, learning_rate: float) -> None:
        """Called after every step of the optimiser, with its rate: the place for steps of an optimiser of its own."""


class BoundObjective(Objective):
    """Maximise a bound on log p(x | c): the ELBO or, with several samples, the IWAE bound."""

    capturable = True

    def __init__(self, bound: Bound = elbo, n_samples: int = 1, free_bits: float = 0.0) -> None:
        self.bound, self.n_samples, self.free_bits = bound, n_samples, free_bits

    def loss(self, model: CVAE, batch: Batch, draws: Draws, kl_weight: Weight) -> Loss:
        """Minus the bound, and what the inference head, if there is one, has yet to learn."""
        terms = model.terms(batch, draws.latent(model, batch, self.n_samples))
        rows = -self.bound(with_free_bits(terms, self.free_bits), kl_weight)
        if model.inference_head is not None:
            rows = rows + inference_loss(model, batch)
        return Loss(rows, terms.log_prob)

    def held_out(self, model: CVAE, batch: Batch, noise: Tensor, kl_weight: Weight = 1.0) -> Tensor:
        """The weighted negative ELBO, and the inference head's loss if there is one."""
        rows = super().held_out(model, batch, noise, kl_weight)
        return rows if model.inference_head is None else rows + inference_loss(model, batch)

    def describe(self) -> dict[str, Any]:
        """With the name of the bound."""
        return {**super().describe(), "bound": getattr(self.bound, "__name__", str(self.bound))}


def inference_loss(model: CVAE, batch: Batch) -> Tensor:
    """-log q(c | x) of every row's class and attributes, (M, N), nats; 0 where the class is not known."""
    architecture = model.architecture
    classes, attributes = torch.split(
        model.condition_logits(batch), [architecture.n_classes, architecture.n_attributes], dim=-1
    )
    loss = classes.new_zeros(classes.shape[:2])
    if architecture.n_classes:
        assert batch.class_index is not None
        target = batch.class_index.expand(classes.shape[:2])
        nats = cross_entropy(classes.flatten(0, 1), target.clamp(min=0).flatten(), reduction="none")
        loss = loss + torch.where(target >= 0, nats.reshape(loss.shape), 0.0)
    if architecture.n_attributes:
        assert batch.condition is not None
        present = (
            (batch.condition.vectors[..., -architecture.n_attributes :] > 0).to(attributes.dtype).expand_as(attributes)
        )
        loss = loss + binary_cross_entropy_with_logits(attributes, present, reduction="none").sum(-1)
    return loss


def with_class(model: CVAE, batch: Batch, index: Tensor) -> Batch:
    """The batch as if its rows were of the classes ``index`` (M, N)."""
    assert batch.condition is not None
    own = model.class_table[index]
    rest = batch.condition.vectors[..., own.shape[-1] :].expand(*index.shape, -1)
    return replace(batch, condition=Condition(torch.cat([own, rest], dim=-1)), class_index=index)


def of_rows(batch: Batch, chosen: Tensor) -> Batch:
    """The rows (M, U) of each member's batch."""

    def of(part: Tensor) -> Tensor:
        part = part.expand(len(chosen), batch.values.shape[1], *part.shape[2:])
        return part.gather(1, chosen.reshape(*chosen.shape, *[1] * (part.dim() - 2)).expand(-1, -1, *part.shape[2:]))

    def of_any(part: Tensor | Condition | None) -> Tensor | Condition | None:
        if isinstance(part, Condition):
            return Condition(of(part.vectors))
        return None if part is None else of(part)

    parts = {f.name: of_any(getattr(batch, f.name)) for f in fields(batch)}
    return Batch(**parts)  # type: ignore[arg-type]  # values are never None
