"""What p(x | c) can make: new rows, reconstructions, missing cells."""

from __future__ import annotations

import numpy as np
import torch

from anomaly_cvae.encoding import Encoded
from anomaly_cvae.fitted import FittedModel
from anomaly_cvae.frames import FloatArray, IntArray
from anomaly_cvae.model import CVAE
from anomaly_cvae.priors import DiagonalNormal
from anomaly_cvae.scoring import ScoringEngine


def sample(model: FittedModel, class_index: IntArray, continuous: FloatArray, generator: torch.Generator) -> FloatArray:
    """Draw one row per entry of ``class_index`` (N,): encoded values (N, D).

    z comes from the prior that scoring uses (the aggregate posterior of the class where there is one), a
    random member decodes it, and every cell is drawn from its likelihood.
    """
    engine = model.engine
    values = np.zeros((len(class_index), len(model.encoder.columns)))
    with torch.inference_mode():
        for k in np.unique(class_index):
            places = np.flatnonzero(class_index == k)
            values[places] = _sample_class(engine, int(k), continuous[places], generator)
    return values


def _sample_class(engine: ScoringEngine, k: int, continuous: FloatArray, generator: torch.Generator) -> FloatArray:
    n, members = len(continuous), engine.members_of(k)
    condition = engine.condition(k, continuous)
    z = _sample_prior(engine, k, n, condition, generator)
    parameters = engine.model.decode(z.unsqueeze(1), condition, members)
    drawn = engine.model.draw(parameters, generator)[:, 0]
    member = torch.randint(len(drawn), (n,), generator=generator, device=engine.device)
    chosen: FloatArray = drawn[member, torch.arange(n, device=engine.device)].cpu().double().numpy()
    return engine.from_class_units(chosen, k)


def _sample_prior(
    engine: ScoringEngine, k: int, n: int, condition: torch.Tensor | None, generator: torch.Generator
) -> torch.Tensor:
    """z of every member, (M, n, Z)."""
    members = engine.members_of(k)
    if engine.aggregate is not None:
        group = 0 if engine.members_per_class is not None else k
        return engine.aggregate.select(members, group).sample(n, generator)
    shape = (members.stop - members.start, n, engine.noise.shape[1])
    noise = torch.empty(shape, dtype=engine.noise.dtype, device=engine.device).normal_(generator=generator)
    prior = _training_prior(engine.model, condition, members)
    return noise if prior is None else prior.sample(noise.unsqueeze(1)).squeeze(1)


def _training_prior(model: CVAE, condition: torch.Tensor | None, members: slice) -> DiagonalNormal | None:
    prior = model.prior(condition, members)
    return prior if isinstance(prior, DiagonalNormal) else None


def impute(model: FittedModel, encoded: Encoded) -> FloatArray:
    """Encoded values (N, D) with every missing cell replaced by what the observed ones let expect."""
    expected = model.engine.expected(encoded)
    return np.where(encoded.observed, encoded.values, expected)
