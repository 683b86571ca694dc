"""What p(x | c) can make: new rows, reconstructions, edits, paths and maps of the latent space, missing cells."""

from __future__ import annotations

import numpy as np
import torch

from anomaly_cvae.encoding import Encoded
from anomaly_cvae.fitted import FittedModel
from anomaly_cvae.frames import FloatArray, IntArray
from anomaly_cvae.networks import Condition
from anomaly_cvae.priors import DiagonalNormal
from anomaly_cvae.scoring import ScoringEngine

ROWS_PER_BLOCK = 256


def sample(
    model: FittedModel,
    class_index: IntArray,
    continuous: FloatArray,
    generator: torch.Generator,
    *,
    noise: bool = True,
    same_z: bool = False,
) -> FloatArray:
    """Draw one row per entry of ``class_index`` (N,): encoded values (N, D).

    z comes from the prior that scoring uses (the aggregate posterior of the class where there is one), a
    random member decodes it, and every cell is drawn from its likelihood, or is what that expects without
    ``noise``. With ``same_z`` the i-th row of every class has the same z, see `_styles`: what is alike in a
    column of such rows is style, what differs is the class.
    """
    engine = model.engine
    values = np.zeros((len(class_index), model.encoder.n_cells))
    if not len(class_index):
        return values
    style = _styles(model, int(np.bincount(class_index).max()), generator) if same_z else None
    with torch.inference_mode():
        for k in np.unique(class_index):
            places = np.flatnonzero(class_index == k)
            for start in range(0, len(places), ROWS_PER_BLOCK):
                block = places[start : start + ROWS_PER_BLOCK]
                own = None if style is None else style[:, start : start + len(block)]
                values[block] = _sample_class(engine, int(k), continuous[block], generator, noise, own)
    return values


def _sample_class(
    engine: ScoringEngine,
    k: int,
    continuous: FloatArray,
    generator: torch.Generator,
    noise: bool,
    style: torch.Tensor | None,
) -> FloatArray:
    n, members = len(continuous), engine.members_of(k)
    condition = engine.condition(k, continuous)
    seen = engine.blind(n, k, continuous)
    if style is not None:
        members = slice(members.start, members.start + 1)
        seen = engine.blind(n, k, continuous, members)
        z = style
    elif seen is not None:
        z = seen.prior.sample(_normal(engine, members.stop - members.start, n, generator).unsqueeze(1)).squeeze(1)
    else:
        z = _sample_prior(engine, k, n, condition, generator)
    parameters = engine.model.decode(z.unsqueeze(1), condition, members, seen)
    member = torch.randint(len(parameters), (n,), generator=generator, device=engine.device)
    own = parameters[member, 0, torch.arange(n, device=engine.device)].reshape(1, 1, n, -1)
    drawn = engine.model.draw(own, generator) if noise else engine.model.expected_each(own)
    chosen: FloatArray = drawn[0, 0].cpu().double().numpy()
    return engine.from_class_units(chosen, k)


def _normal(engine: ScoringEngine, members: int, n: int, generator: torch.Generator) -> torch.Tensor:
    shape = (members, n, engine.noise.shape[1])
    return torch.empty(shape, dtype=engine.noise.dtype, device=engine.device).normal_(generator=generator)


def _styles(model: FittedModel, n: int, generator: torch.Generator) -> torch.Tensor:
    """z for every class alike, (1, n, Z): as training rows of all classes have it; N(0, I) where that is not known.

    Networks of one class each share no latent space: there z is N(0, I) as well.
    """
    engine = model.engine
    styles = _normal(engine, 1, n, generator)
    if engine.aggregate is None or engine.members_per_class is not None:
        return styles
    frequency = torch.as_tensor(model.class_frequency, device=engine.device)
    classes = torch.multinomial(frequency, n, replacement=True, generator=generator)
    for k in torch.unique(classes).tolist():
        places = torch.nonzero(classes == k).squeeze(1)
        styles[:, places] = engine.aggregate.select(slice(0, 1), k).sample(len(places), generator)
    return styles


def _sample_prior(
    engine: ScoringEngine, k: int, n: int, condition: Condition | None, generator: torch.Generator
) -> torch.Tensor:
    """z of every member, (M, n, Z)."""
    members = engine.members_of(k)
    if engine.aggregate is not None:
        group = 0 if engine.members_per_class is not None else k
        return engine.aggregate.select(members, group).sample(n, generator)
    noise = _normal(engine, members.stop - members.start, n, generator)
    prior = engine.model.prior(condition, members)
    return prior.sample(noise.unsqueeze(1)).squeeze(1) if isinstance(prior, DiagonalNormal) else noise


def impute(model: FittedModel, encoded: Encoded) -> FloatArray:
    """Encoded values (N, D) with every missing cell replaced by what the observed ones let expect."""
    expected = model.engine.expected(encoded)
    return np.where(encoded.observed, encoded.values, expected)


def impute_draws(
    model: FittedModel, encoded: Encoded, n: int, generator: torch.Generator, *, noise: bool = True
) -> FloatArray:
    """Encoded values (n, N, D): missing cells drawn ``n`` times given the observed ones."""
    drawn = model.engine.draw(encoded, n, generator, noise=noise)
    return np.where(encoded.observed, encoded.values, drawn)


def change_condition(
    model: FittedModel, encoded: Encoded, wanted: Encoded, *, keep_detail: bool, strength: float = 1.0
) -> FloatArray:
    """The rows as they would be under the conditions of ``wanted``, z kept: encoded values (N, D).

    z is the posterior mean under the rows' own conditions. With ``keep_detail`` what the reconstruction
    under the own condition lacks is put back, so that only what the condition changes does change. The
    decoder is told a condition ``strength`` times as far from the own one as the wanted one is.
    """
    engine = model.engine
    z, told = engine.posterior_mean(encoded), None
    if strength != 1.0:
        own, other = engine.conditions(encoded), engine.conditions(wanted)
        told = own + strength * (other - own)
    changed = decode(model, z, wanted, told)
    if told is not None and engine.scaling is not None:
        changed = engine.scaling.on_the_way(changed, encoded.class_index, wanted.class_index, strength)
    if not keep_detail:
        return changed
    # Only numbers have details to add; a level is another one or the same.
    numbers = encoded.observed & model.encoder.is_number
    return changed + np.where(numbers, encoded.values - decode(model, z, encoded), 0.0)


def decode(model: FittedModel, z: FloatArray, under: Encoded, told: FloatArray | None = None) -> FloatArray:
    """What the rows at latent points z (N, Z) are expected to be under the conditions of ``under``: (N, D).

    ``told`` (N, C) are condition vectors that the decoder is told instead.
    """
    values = np.zeros((len(z), model.encoder.n_cells))
    for k in np.unique(under.class_index):
        own = np.flatnonzero(under.class_index == k)
        told_own = None if told is None else told[own]
        values[own] = model.engine.decode(z[own], int(k), under.continuous[own], told_own)
    return values


def path(start: FloatArray, end: FloatArray, n: int) -> FloatArray:
    """``n`` points from each start (N, Z) to its end, both included: (N * n, Z), path after path."""
    share = np.linspace(0.0, 1.0, n)[None, :, None]
    points: FloatArray = (1.0 - share) * start[:, None] + share * end[:, None]
    return points.reshape(-1, start.shape[1])


def latent_grid(n: int, span: float) -> FloatArray:
    """``n`` x ``n`` points of a 2-D latent space, the first axis down and the second across: (n * n, 2)."""
    steps = np.linspace(-span, span, n)
    down, across = np.meshgrid(steps, steps, indexing="ij")
    return np.column_stack([down.ravel(), across.ravel()])
