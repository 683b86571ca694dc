"""The scoring engine: encoded rows in, nats out; deterministic, chunked, whatever the device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from anomaly_cvae.encoding import ClassScaling, Encoded
from anomaly_cvae.errors import ParameterError
from anomaly_cvae.frames import FloatArray, IntArray
from anomaly_cvae.model import CVAE, Seen, Terms
from anomaly_cvae.objectives import accumulator, elbo
from anomaly_cvae.priors import AggregatePosterior, DiagonalNormal, Prior
from anomaly_cvae.rows import Batch, tensor

# Activations of one layer, in numbers, that stay in a core's cache or in a GPU's good range.
CHUNK_NUMBERS = {"cpu": 1 << 19, "cuda": 1 << 26, "mps": 1 << 24}
IMAGE_FACTOR = 8


@dataclass(frozen=True)
class Chunk:
    """Rows of one class k, ready for the model: their places in the input, and the members that know them."""

    places: IntArray
    k: int
    members: slice
    group: int
    batch: Batch


@dataclass(frozen=True)
class ColumnScores:
    """The negative ELBO taken apart: nats per column (N, D), grouped order, and of the KL (N,)."""

    columns: FloatArray
    kl: FloatArray

    @property
    def total(self) -> FloatArray:
        """The negative ELBO, (N,)."""
        total: FloatArray = self.columns.sum(axis=1) + self.kl
        return total


@dataclass(frozen=True)
class ScoringEngine:
    """Scores rows with a bank.

    Rows are taken class by class, so that a chunk has one condition, one mixture prior and, in a bank of
    one network per class, only the members of its class.

    Parameters
    ----------
    members_per_class : members that know one class; None when every member knows all of them
    class_table : (K, C) condition vectors, None in a bank of one network per class
    noise : (S, Z) fixed low-discrepancy points, stored with the model
    aggregate : the prior at scoring time; None for the training prior
    scaling : location and scale of the real columns per class; None without classes
    drift : (C, Z) how the posterior mean moves along with the condition, on average over the training rows; None
        without a condition that the networks are told
    """

    model: CVAE
    noise: Tensor
    n_classes: int
    class_table: Tensor | None = None
    members_per_class: int | None = None
    aggregate: AggregatePosterior | None = None
    scaling: ClassScaling | None = None
    drift: FloatArray | None = None
    chunk_rows: int | None = None

    @property
    def device(self) -> torch.device:
        """Where the bank lives."""
        return self.noise.device

    @property
    def tolerance(self) -> float:
        """How far, relative and absolute, two scores of one row may lie apart: rounding depends on the batch."""
        return 1e-10 if self.noise.dtype == torch.float64 else 1e-5

    def negative_elbo(self, encoded: Encoded) -> FloatArray:
        """Mean over members of the negative ELBO under each row's own class, (N,), nats.

        A row without any cell to score, observed and not given, says nothing: its negative ELBO is 0.
        """
        scores = np.zeros(len(encoded))
        with torch.inference_mode():
            for chunk in self._chunks(encoded, padded=True):
                scores[chunk.places] = _numpy((-elbo(self._terms(chunk))).mean(0))
        return np.where(encoded.scored.any(axis=1), scores, 0.0)

    def class_negative_elbo(self, encoded: Encoded) -> FloatArray:
        """Negative ELBO of every row under every class, (N, K)."""
        columns = [
            self.negative_elbo(encoded.of_class(np.full(len(encoded), k, dtype=np.int64)))
            for k in range(self.n_classes)
        ]
        return np.stack(columns, axis=1) if columns else np.zeros((len(encoded), 0))

    def column_scores(self, encoded: Encoded) -> ColumnScores:
        """The exact decomposition of `negative_elbo`."""
        columns, kl = np.zeros(encoded.values.shape), np.zeros(len(encoded))
        with torch.inference_mode():
            for chunk in self._chunks(encoded, padded=True):
                terms = self._terms(chunk)
                wide = accumulator(terms.log_prob)
                columns[chunk.places] = _numpy(-terms.log_prob.mean(dim=(0, 1), dtype=wide))
                kl[chunk.places] = _numpy(terms.kl.sum(-1, dtype=wide).mean(0))
        empty = ~encoded.scored.any(axis=1)
        return ColumnScores(columns, np.where(empty, 0.0, kl))

    def negative_log_likelihood(self, encoded: Encoded, n_samples: int, seed: int = 0) -> FloatArray:
        """-log p(x | c) by importance sampling, (N,), nats: the mean over members of minus the IWAE bound.

        In expectation at least -log p(x | c), at most the negative ELBO, and nearer with more samples
        (Burda, Grosse and Salakhutdinov 2016, theorem 1).
        """
        nats = np.zeros(len(encoded))
        noise = torch.randn(
            (n_samples, self.noise.shape[1]), generator=self.generator(seed), dtype=self.noise.dtype, device=self.device
        )
        with torch.inference_mode():
            for chunk in self._chunks(encoded, n_samples=n_samples):
                nats[chunk.places] = _numpy(-self._log_mean_weight(chunk, noise).mean(0))
        return np.where(encoded.scored.any(axis=1), nats, 0.0)

    def _log_mean_weight(self, chunk: Chunk, noise: Tensor) -> Tensor:
        """The IWAE bound of a chunk, (M, N), from noise (S, Z) that all rows share, in pieces that fit."""
        members, n_rows = chunk.members.stop - chunk.members.start, len(chunk.places)
        at_a_time = max(1, self._numbers_at_a_time() // (members * n_rows * self.model.widest))
        seen = self.model.look(chunk.batch, chunk.members)
        posterior = self.model.encode(chunk.batch, chunk.members)
        prior = self._prior(chunk, seen)
        parts = []
        for some in torch.split(noise, at_a_time):
            z = posterior.sample(some)
            log_prob = self.model.log_prob(
                self.model.decode(z, chunk.batch.condition, chunk.members, seen), chunk.batch
            )
            log_weight = log_prob.sum(-1, dtype=accumulator(log_prob)) + prior.log_prob(z) - posterior.log_prob(z)
            parts.append(torch.logsumexp(log_weight, dim=1))
        return torch.logsumexp(torch.stack(parts), dim=0) - math.log(len(noise))

    def class_negative_log_likelihood(self, encoded: Encoded, n_samples: int, seed: int = 0) -> FloatArray:
        """The same of every row under every class, (N, K)."""
        columns = [
            self.negative_log_likelihood(encoded.of_class(np.full(len(encoded), k, dtype=np.int64)), n_samples, seed)
            for k in range(self.n_classes)
        ]
        return np.stack(columns, axis=1)

    def condition_logits(self, encoded: Encoded) -> FloatArray:
        """Mean over members of the logits of q(c | x), (N, K + A); whatever condition the rows claim."""
        n_told = self.model.architecture.n_classes + self.model.architecture.n_attributes
        logits = np.zeros((len(encoded), n_told))
        with torch.inference_mode():
            for chunk in self._chunks(encoded.of_class(np.zeros(len(encoded), dtype=np.int64))):
                logits[chunk.places] = _numpy(self.model.condition_logits(chunk.batch, chunk.members).mean(0))
        return logits

    def elbo_parts(self, encoded: Encoded) -> FloatArray:
        """What the negative ELBO is made of, kept apart, under the first member of each class: (N, 4).

        Reconstruction (nats), KL (nats), squared norm of the posterior mean, and the spread (standard
        deviation) of the reconstruction's nats over the cells: few cells of many nats are not the same as
        many of few.
        """
        parts = np.zeros((len(encoded), 4))
        with torch.inference_mode():
            for chunk in self._chunks(encoded):
                first = replace(chunk, members=slice(chunk.members.start, chunk.members.start + 1))
                terms = self._terms(first)
                wide = accumulator(terms.log_prob)
                columns = (
                    -terms.log_prob.sum(-1, dtype=wide).mean(1),
                    terms.kl.sum(-1, dtype=wide),
                    terms.posterior.mean.square().sum(-1),
                    _spread(terms.log_prob.mean(1, dtype=wide), chunk.batch),
                )
                parts[chunk.places] = np.stack([_numpy(column[0]) for column in columns], axis=1)
        return parts

    def posterior_mean(self, encoded: Encoded) -> FloatArray:
        """Latent coordinates of each row under the first member of its class, (N, Z)."""
        means = np.zeros((len(encoded), self.noise.shape[1]))
        with torch.inference_mode():
            for chunk in self._chunks(encoded):
                first = slice(chunk.members.start, chunk.members.start + 1)
                means[chunk.places] = _numpy(self.model.encode(chunk.batch, first).mean[0])
        return means

    def expected(self, encoded: Encoded) -> FloatArray:
        """What the model expects of every cell given the observed ones, (N, D), encoded values.

        With an observed part as condition, z comes from what that part says of it; else from q(z | x, c).
        """
        values = np.zeros(encoded.values.shape, dtype=encoded.values.dtype)
        for rows, part in self._alike(encoded):
            values[rows] = self._expected(part)
        return values

    def _expected(self, encoded: Encoded) -> FloatArray:
        values = np.zeros(encoded.values.shape, dtype=encoded.values.dtype)
        with torch.inference_mode():
            for chunk in self._chunks(encoded):
                seen = self.model.look(chunk.batch, chunk.members)
                z = self._latent(chunk, seen).sample(self.noise)
                parameters = self.model.decode(z, chunk.batch.condition, chunk.members, seen)
                values[chunk.places] = self.from_class_units(_numpy(self.model.expected(parameters)), chunk.k)
        return values

    def draw(self, encoded: Encoded, n_draws: int, generator: torch.Generator, *, noise: bool = True) -> FloatArray:
        """Draws of every cell given the observed ones, (n_draws, N, D), encoded values.

        Each draw takes z as `expected` does and the cells from p(x | z, c) of a random member; without
        ``noise`` the cells are what p(x | z, c) expects.
        """
        values = np.zeros((n_draws, *encoded.values.shape), dtype=encoded.values.dtype)
        for rows, part in self._alike(encoded):
            values[:, rows] = self._draw(part, n_draws, generator, noise)
        return values

    def _draw(self, encoded: Encoded, n_draws: int, generator: torch.Generator, noise: bool) -> FloatArray:
        values = np.zeros((n_draws, *encoded.values.shape), dtype=encoded.values.dtype)
        with torch.inference_mode():
            for chunk in self._chunks(encoded, n_samples=n_draws):
                seen = self.model.look(chunk.batch, chunk.members)
                posterior = self._latent(chunk, seen)
                members, n_rows, latent = posterior.mean.shape
                own = torch.empty((members, n_draws, n_rows, latent), dtype=self.noise.dtype, device=self.device)
                z = posterior.sample(own.normal_(generator=generator))
                parameters = self.model.decode(z, chunk.batch.condition, chunk.members, seen)
                member = torch.randint(members, (n_draws,), generator=generator, device=self.device)
                chosen = parameters[member, torch.arange(n_draws, device=self.device)].unsqueeze(0)
                drawn = self.model.draw(chosen, generator)[0] if noise else self.model.expected_each(chosen)[0]
                values[:, chunk.places] = self.from_class_units(_numpy(drawn), chunk.k)
        return values

    def decode(self, z: FloatArray, k: int, continuous: FloatArray) -> FloatArray:
        """What the first member of class ``k`` expects of cells at latent points (N, Z): encoded values (N, D)."""
        start = self.members_of(k).start
        members, blocks = slice(start, start + 1), []
        size = max(1, self._numbers_at_a_time() // self.model.widest)
        with torch.inference_mode():
            for first in range(0, len(z), size):
                own, also = z[first : first + size], continuous[first : first + size]
                points = tensor(own, self.device, self.noise.dtype).reshape(1, 1, len(own), -1)
                seen = self.blind(len(own), k, also, members)
                parameters = self.model.decode(points, self.condition(k, also), members, seen)
                blocks.append(_numpy(self.model.expected_each(parameters)[0, 0]))
        return self.from_class_units(np.concatenate(blocks), k)

    def blind(self, n_rows: int, k: int, continuous: FloatArray, members: slice | None = None) -> Seen | None:
        """What rows of class ``k`` say that give nothing of themselves; None in a model that does not look."""
        empty = torch.zeros(1, n_rows, self.model.n_cells, dtype=self.noise.dtype, device=self.device)
        batch = Batch(empty, None, self.condition(k, continuous))
        return self.model.look(batch, self.members_of(k) if members is None else members)

    def _alike(self, encoded: Encoded) -> list[tuple[IntArray, Encoded]]:
        """Complete rows, and rows that miss cells: where the model takes one, those have the others as condition."""
        if not self.model.architecture.observed_condition or encoded.given is not None:
            return [(np.arange(len(encoded)), encoded)]
        complete = encoded.observed.all(axis=1)
        whole, partly = np.flatnonzero(complete), np.flatnonzero(~complete)
        rest = encoded.take(partly)
        parts = [(whole, encoded.take(whole)), (partly, replace(rest, given=rest.observed))]
        return [(rows, part) for rows, part in parts if len(rows)]

    def _latent(self, chunk: Chunk, seen: Seen | None) -> DiagonalNormal:
        """q(z | x, c), or p(z | x_observed, c) of rows that give a part of themselves."""
        if seen is not None and chunk.batch.given is not None:
            return seen.prior
        return self.model.encode(chunk.batch, chunk.members)

    def posteriors(self, encoded: Encoded) -> Iterator[tuple[Chunk, DiagonalNormal]]:
        """q(z | x, c) chunk by chunk, for fitting the aggregate posterior."""
        with torch.inference_mode():
            for chunk in self._chunks(encoded):
                yield chunk, self.model.encode(chunk.batch, chunk.members)

    def generator(self, seed: int) -> torch.Generator:
        """A source of randomness on the engine's device."""
        return torch.Generator(self.device).manual_seed(seed)

    def from_class_units(self, values: FloatArray, k: int) -> FloatArray:
        """Values (…, D) of the model as encoded values."""
        return values if self.scaling is None else self.scaling.from_class_units(values, k)

    def members_of(self, k: int) -> slice:
        """The members that know class ``k``."""
        if self.members_per_class is None:
            return slice(0, self.model.architecture.n_members)
        return slice(k * self.members_per_class, (k + 1) * self.members_per_class)

    def condition(self, k: int, continuous: FloatArray) -> Tensor | None:
        """Condition vectors of rows of class ``k``, (1, N or 1, C)."""
        if self.class_table is None:
            return None
        shared = self.class_table[k].reshape(1, 1, -1)
        if not continuous.shape[1]:
            return shared
        own = tensor(continuous, self.device, self.noise.dtype).unsqueeze(0)
        return torch.cat([shared.expand(1, len(continuous), -1), own], dim=-1)

    def conditions(self, encoded: Encoded) -> FloatArray:
        """The condition vector of every row, (N, C)."""
        assert self.class_table is not None
        return np.concatenate([_numpy(self.class_table)[encoded.class_index], encoded.continuous], axis=1)

    def _chunks(self, encoded: Encoded, *, padded: bool = False, n_samples: int | None = None) -> Iterator[Chunk]:
        """Rows class by class; ``padded`` repeats the last row of a short chunk, so that few shapes occur.

        On a CPU every new shape costs each layer a kernel of its own, about 0.4 MB that is kept.
        """
        order = np.argsort(encoded.class_index, kind="stable")
        classes = encoded.class_index[order]
        complete = bool(encoded.observed.all())
        for k in range(self.n_classes):
            start, stop = np.searchsorted(classes, [k, k + 1])
            members = self.members_of(k)
            size = self.chunk_rows or self._chunk_size(members, n_samples or len(self.noise))
            for first in range(start, stop, size):
                places = order[first : min(first + size, stop)]
                if padded and len(places) < size and self.device.type == "cpu":
                    extra = _padded_length(len(places), size) - len(places)
                    places = np.concatenate([places, np.full(extra, places[-1])])
                yield self._chunk(encoded, places, k, members, complete)

    def _chunk(self, encoded: Encoded, places: IntArray, k: int, members: slice, complete: bool) -> Chunk:
        dtype, values, log_scale = self.noise.dtype, encoded.values[places], None
        if self.scaling is not None:
            values = self.scaling.to_class_units(values, k)
            log_scale = tensor(np.log(self.scaling.scale[k]), self.device, dtype).reshape(1, 1, -1)
        batch = Batch(
            values=tensor(values, self.device, dtype).unsqueeze(0),
            observed=None if complete else tensor(encoded.observed[places], self.device, dtype).unsqueeze(0),
            condition=self.condition(k, encoded.continuous[places]),
            log_scale=log_scale,
            given=None if encoded.given is None else tensor(encoded.given[places], self.device, dtype).unsqueeze(0),
        )
        return Chunk(places, k, members, 0 if self.members_per_class is not None else k, batch)

    def _chunk_size(self, members: slice, n_samples: int) -> int:
        """Rows that keep one layer's activations within the good range of the device."""
        per_row = (members.stop - members.start) * n_samples * self.model.widest
        least = 1 if self.model.shapes else 32
        return max(least, self._numbers_at_a_time() // int(per_row))

    def _numbers_at_a_time(self) -> int:
        # Convolutions run well on blocks that no cache holds; small ones waste their overhead.
        return CHUNK_NUMBERS[self.device.type] * (IMAGE_FACTOR if self.model.shapes else 1)

    def _terms(self, chunk: Chunk) -> Terms:
        return self.model.terms(chunk.batch, self.noise, members=chunk.members, prior=self._aggregate(chunk))

    def _aggregate(self, chunk: Chunk) -> Prior | None:
        return None if self.aggregate is None else self.aggregate.select(chunk.members, chunk.group)

    def _prior(self, chunk: Chunk, seen: Seen | None) -> Prior:
        """p(z | c) of a chunk at scoring time."""
        if seen is not None:
            return seen.prior
        return self._aggregate(chunk) or self.model.prior(chunk.batch.condition, chunk.members, chunk.batch.class_index)


def _padded_length(n_rows: int, size: int) -> int:
    """The next power of two up to an eighth of ``size``, then the next multiple of that."""
    step = max(size // 8, 1)
    length = 1 << (n_rows - 1).bit_length()
    return min(length if length <= step else -(-n_rows // step) * step, size)


def low_discrepancy_normal(n_samples: int, latent_dim: int, seed: int) -> FloatArray:
    """Scrambled Sobol points mapped to N(0, I), (S, Z); from two samples on, mean 0 and variance 1 per unit."""
    sobol = torch.quasirandom.SobolEngine(latent_dim, scramble=True, seed=seed)  # type: ignore[no-untyped-call]  # torch has no types here
    points: FloatArray = norm.ppf(np.clip(sobol.draw(n_samples, dtype=torch.float64).numpy(), 1e-6, 1 - 1e-6))
    if n_samples == 1:
        return points
    points = points - points.mean(axis=0)
    standard: FloatArray = points / np.maximum(points.std(axis=0), 1e-6)
    return standard


def resolve_device(device: str, dtype: torch.dtype) -> torch.device:
    """Turn ``"auto"`` into the best device there is: CUDA, then Apple's GPU (float32 only), then the CPU.

    Raises
    ------
    ParameterError
        If the device asked for is not there, or cannot compute in ``dtype``.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        mps = torch.backends.mps.is_available() and dtype == torch.float32
        return torch.device("mps" if mps else "cpu")
    try:
        resolved = torch.device(device)
        torch.zeros(1, dtype=dtype, device=resolved)
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ParameterError(f"device={device!r} with dtype={dtype} cannot be used here: {reason}") from error
    return resolved


def _spread(cells: Tensor, batch: Batch) -> Tensor:
    """Standard deviation over the scored cells of each row: (M, N, D) -> (M, N)."""
    scored = torch.ones_like(batch.values) if batch.observed is None else batch.observed
    if batch.given is not None:
        scored = scored * (1.0 - batch.given)
    count = scored.sum(-1).clamp_min(1.0)
    mean = (cells * scored).sum(-1) / count
    return (((cells - mean.unsqueeze(-1)).square() * scored).sum(-1) / count).sqrt()


def _numpy(values: Tensor) -> FloatArray:
    return values.detach().cpu().double().numpy()
