"""What scores keep of the terms of a chunk: sums over cells, means over samples and members."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from anomaly_cvae.model import Terms
from anomaly_cvae.objectives import accumulator, elbo
from anomaly_cvae.rows import Batch

Reduction = Callable[[Terms, Tensor | None], tuple[Tensor, ...]]
"""From terms, and the weights (M, 2) of their members' parts, to tensors whose first axis is that of the rows."""


def negative_elbo(terms: Terms, weights: Tensor | None) -> tuple[Tensor, ...]:
    """Mean over members, (N,)."""
    if weights is None:
        return ((-elbo(terms)).mean(0),)
    own = weights.unsqueeze(-1).to(terms.log_prob)
    return (over_members(-elbo(terms, own[:, 1] / own[:, 0]), weights),)


def member_parts(terms: Terms, weights: Tensor | None) -> tuple[Tensor, ...]:
    """Reconstruction and KL of every member, (N, M, 2)."""
    wide = accumulator(terms.log_prob)
    reconstruction = -terms.log_prob.sum(-1, dtype=wide).mean(1)
    return (torch.stack([reconstruction.mT, terms.kl.sum(-1, dtype=wide).mT], dim=-1),)


def columns_and_kl(terms: Terms, weights: Tensor | None) -> tuple[Tensor, ...]:
    """Nats per column (N, D) and of the KL (N,), means over members."""
    wide = accumulator(terms.log_prob)
    columns = over_members(-terms.log_prob.mean(dim=1, dtype=wide), weights)
    return columns, over_members(terms.kl.sum(-1, dtype=wide), weights, part=1)


def over_members(values: Tensor, weights: Tensor | None, part: int = 0) -> Tensor:
    """Mean over the first axis, (M, …), by the weights (M, 2) of reconstructions (part 0) or of the KL (part 1)."""
    return values.mean(0) if weights is None else torch.tensordot(weights[:, part].to(values), values, dims=1)


def spread(cells: Tensor, batch: Batch) -> Tensor:
    """Standard deviation over the scored cells of each row: (M, N, D) -> (M, N)."""
    scored = torch.ones_like(batch.values) if batch.observed is None else batch.observed
    if batch.given is not None:
        scored = scored * (1.0 - batch.given)
    count = scored.sum(-1).clamp_min(1.0)
    mean = (cells * scored).sum(-1) / count
    return (((cells - mean.unsqueeze(-1)).square() * scored).sum(-1) / count).sqrt()
