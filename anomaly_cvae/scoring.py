"""The scoring engine: encoded rows in, nats out; deterministic, chunked, whatever the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from anomaly_cvae import reductions
from anomaly_cvae.crowds import NUMBERS_OF_A_CROWD, are_crowded, crowd_batch, crowd_prior
from anomaly_cvae.encoding import LARGEST_VALUE, ClassScaling, Encoded
from anomaly_cvae.errors import ParameterError
from anomaly_cvae.frames import FloatArray, IntArray
from anomaly_cvae.lanes import Ring, lanes_of
from anomaly_cvae.model import CVAE, Seen, Terms
from anomaly_cvae.networks import full_float32, has_bfloat16
from anomaly_cvae.objectives import accumulator
from anomaly_cvae.onnx_scoring import ClassInputs, OnnxBank
from anomaly_cvae.priors import AggregatePosterior, DiagonalNormal, Mixture, Prior
from anomaly_cvae.replays import Replays
from anomaly_cvae.rows import Batch, tensor
from anomaly_cvae.threads import in_threads

# Activations of one layer, in numbers, that stay in a core's cache or in a GPU's good range.
CHUNK_NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 26, "mps": 1 << 24}
IMAGE_FACTOR = 8
PADDED = ("cpu", "cuda")
"""Devices on which every new shape costs: a kernel per layer that is kept, or a captured graph."""
Precision = Literal["float32", "bfloat16"]
HALF_TOLERANCE = 5e-3
"""Relative and absolute, of scores whose inner products are in bfloat16; narrow posteriors need more."""
MOST_ROWS_OF_TOLERANCE = 1_000
ROWS = ("values", "observed", "given", "continuous")
"""Parts of a piece's rows."""
CLAIMS_AT_A_TIME = 8_192
"""Rows times classes, of rows that are scored under every class."""
MOST_NARROW = np.iinfo(np.int16).max


@dataclass(frozen=True)
class Piece:
    """Rows of one class k by their places in the input, and whether no cell of the table is missing."""

    places: IntArray
    k: int
    members: slice
    complete: bool


@dataclass
class Limit:
    """Numbers of one layer's activations that the device's memory was found to hold; None: all that were tried."""

    numbers: int | None = None


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
    part_weights : (M, 2) what each member's reconstruction and KL count in scores, the former of those that know a
        class in all 1; None: all alike, and the KL as much as the reconstruction
    unlike : whether members were trained with other settings, so that the first alone fills in missing cells
    precision : "bfloat16" takes the products between hidden layers, and convolutions, in bfloat16, sums in float32,
        where the hardware does so; scores then agree with those in float32 within `tolerance`
    graphs : what scores complete rows in the place of torch; None: torch does
    overlap : whether rows are copied to the device while it computes, and chunks of one shape are captured where it
        can; None: on CUDA. Scores are the same
    """

    model: CVAE
    noise: Tensor
    n_classes: int
    class_table: Tensor | None = None
    members_per_class: int | None = None
    aggregate: AggregatePosterior | None = None
    scaling: ClassScaling | None = None
    part_weights: Tensor | None = None
    unlike: bool = False
    precision: Precision = "float32"
    chunk_rows: int | None = None
    limit: Limit = field(default_factory=Limit, compare=False)
    graphs: OnnxBank | None = field(default=None, compare=False)
    overlap: bool | None = None
    replays: Replays = field(default_factory=Replays, init=False, compare=False, repr=False)

    @property
    def device(self) -> torch.device:
        """Where the bank lives."""
        return self.noise.device

    @property
    def tolerance(self) -> float:
        """How far, relative and absolute, two scores of one row may lie apart: rounding depends on the batch."""
        if self.noise.dtype == torch.float64:
            return 1e-10
        return HALF_TOLERANCE if self.precision == "bfloat16" else 1e-5

    def tolerance_on(self, encoded: Encoded) -> float:
        """`tolerance`, but with products in bfloat16 at least twice what these rows' scores differ from float32's.

        A network with a small KL weight has narrow posteriors, which magnify what is rounded.
        """
        if self.precision != "bfloat16":
            return self.tolerance
        rows = encoded.take(np.arange(min(len(encoded), MOST_ROWS_OF_TOLERANCE)))
        exact = replace(self, precision="float32").negative_elbo(rows)
        found = np.abs(self.negative_elbo(rows) - exact) / (1.0 + np.abs(exact))
        return max(self.tolerance, 2.0 * float(found.max(initial=0.0)))

    def negative_elbo(self, encoded: Encoded) -> FloatArray:
        """Mean over members, by their parts' weights, of the negative ELBO under each row's own class, (N,), nats.

        A row without any cell to score, observed and not given, says nothing: its negative ELBO is 0.
        """
        if self.graphs is not None and encoded.given is None and bool(encoded.observed.all()):
            return self._by_graphs(self.graphs, encoded)
        scores = np.zeros(len(encoded))
        self._reduce(encoded, reductions.negative_elbo, (scores,))
        return np.where(encoded.scored.any(axis=1), scores, 0.0)

    @property
    def n_graphs(self) -> int:
        """Groups of members that score rows together: as many graphs as `with_graphs` makes, seconds each."""
        return 1 if self.members_per_class is None else self.n_classes

    def with_graphs(self) -> ScoringEngine:
        """The same engine with the negative ELBO of complete rows by ONNX Runtime.

        Raises
        ------
        ParameterError
            If that is not installed, or not for this model.
        """
        if self.precision != "float32":
            raise ParameterError("backend='onnx' computes in float32: leave out mixed_precision, or the backend")
        if self.class_table is not None and self.class_table.shape[1] < self.model.architecture.n_conditions:
            raise ParameterError("backend='onnx' cannot be used: rows with continuous conditions are scored by torch")
        graphs = OnnxBank.of(self.model, self.noise, self.part_weights)
        for k in range(self.n_graphs):
            graphs.scorer(self.members_of(k), self._class_inputs(k))
        return replace(self, graphs=graphs)

    def _by_graphs(self, graphs: OnnxBank, encoded: Encoded) -> FloatArray:
        """`negative_elbo` of complete rows; 0 for those of no known class, as there."""
        scores, chunked = np.zeros(len(encoded)), replace(self, chunk_rows=graphs.chunk_rows)
        known = np.flatnonzero((encoded.class_index >= 0) & (encoded.class_index < self.n_classes))
        scorers = {
            k: graphs.scorer(self.members_of(k), self._class_inputs(k))
            for k in np.unique(encoded.class_index[known]).tolist()
        }

        def of_piece(piece: Piece) -> None:
            scores[piece.places] = scorers[piece.k](encoded.values.take(piece.places, axis=0))

        in_threads(of_piece, chunked._pieces(encoded))
        return scores

    def _class_inputs(self, k: int) -> ClassInputs:
        """What the graphs are told of class ``k``."""
        n_cells = self.model.n_cells
        center, scale = np.zeros(n_cells), np.ones(n_cells)
        if self.scaling is not None:
            center, scale = self.scaling.center[k], self.scaling.scale[k]
        prior = None
        if self.aggregate is not None:
            prior = self.aggregate.select(self.members_of(k), self._group(k))
        return ClassInputs(center, scale, self.condition(k, np.zeros((1, 0))), prior)

    def class_negative_elbo(self, encoded: Encoded) -> FloatArray:
        """Negative ELBO of every row under every class, (N, K)."""
        nats, n_rows = np.zeros((len(encoded), self.n_classes)), len(encoded)
        at_a_time = max(1, CLAIMS_AT_A_TIME // max(n_rows, 1))
        for first in range(0, self.n_classes, at_a_time):
            classes = np.arange(first, min(first + at_a_time, self.n_classes))
            rows = encoded if len(classes) == 1 else encoded.take(np.tile(np.arange(n_rows), len(classes)))
            claims = rows.of_class(np.repeat(classes, n_rows))
            nats[:, classes] = self.negative_elbo(claims).reshape(len(classes), n_rows).T
        return nats

    def member_parts(self, encoded: Encoded) -> FloatArray:
        """Reconstruction and KL of every member that knows each row's class, (N, M or the members of a class, 2)."""
        members = self.members_of(0)
        parts = np.zeros((len(encoded), members.stop - members.start, 2))
        self._reduce(encoded, reductions.member_parts, (parts,))
        return parts

    def column_scores(self, encoded: Encoded) -> ColumnScores:
        """The exact decomposition of `negative_elbo`."""
        columns, kl = np.zeros(encoded.values.shape), np.zeros(len(encoded))
        self._reduce(encoded, reductions.columns_and_kl, (columns, kl))
        empty = ~encoded.scored.any(axis=1)
        return ColumnScores(columns, np.where(empty, 0.0, kl))

    def negative_log_likelihood(self, encoded: Encoded, n_samples: int, seed: int = 0) -> FloatArray:
        """-log p(x | c) by importance sampling, (N,), nats: the members' weighted mean of minus the IWAE bound.

        In expectation at least -log p(x | c), at most the negative ELBO (of a bank without `part_weights`), and nearer
        with more samples (Burda, Grosse and Salakhutdinov 2016, theorem 1).
        """
        nats = np.zeros(len(encoded))
        noise = torch.randn(
            (n_samples, self.noise.shape[1]), generator=self.generator(seed), dtype=self.noise.dtype, device=self.device
        )

        def of_chunk(chunk: Chunk) -> None:
            own = self._weights_of(chunk.members)
            nats[chunk.places] = _numpy(-reductions.over_members(self._log_mean_weight(chunk, noise), own))

        self._each(of_chunk, encoded, n_samples=n_samples)
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

        def of_chunk(chunk: Chunk) -> None:
            logits[chunk.places] = _numpy(self.model.condition_logits(chunk.batch, chunk.members).mean(0))

        self._each(of_chunk, encoded.of_class(np.zeros(len(encoded), dtype=np.int64)))
        return logits

    def elbo_parts(self, encoded: Encoded) -> FloatArray:
        """What the negative ELBO is made of, kept apart, under the first member of each class: (N, 4).

        Reconstruction (nats), KL (nats), squared norm of the posterior mean, and the spread (standard
        deviation) of the reconstruction's nats over the cells: few cells of many nats are not the same as
        many of few.
        """
        parts = np.zeros((len(encoded), 4))

        def of_chunk(chunk: Chunk) -> None:
            first = replace(chunk, members=slice(chunk.members.start, chunk.members.start + 1))
            terms = self._terms(first)
            wide = accumulator(terms.log_prob)
            columns = (
                -terms.log_prob.sum(-1, dtype=wide).mean(1),
                terms.kl.sum(-1, dtype=wide),
                terms.posterior.mean.square().sum(-1),
                reductions.spread(terms.log_prob.mean(1, dtype=wide), chunk.batch),
            )
            parts[chunk.places] = np.stack([_numpy(column[0]) for column in columns], axis=1)

        self._each(of_chunk, encoded)
        return parts

    def posterior_mean(self, encoded: Encoded) -> FloatArray:
        """Latent coordinates of each row under the first member of its class, (N, Z)."""
        means = np.zeros((len(encoded), self.noise.shape[1]))

        def of_chunk(chunk: Chunk) -> None:
            first = slice(chunk.members.start, chunk.members.start + 1)
            means[chunk.places] = _numpy(self.model.encode(chunk.batch, first).mean[0])

        self._each(of_chunk, encoded)
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

        def of_chunk(every: Chunk) -> None:
            chunk = self._that_fill_in(every)
            seen = self.model.look(chunk.batch, chunk.members)
            z = self._latent(chunk, seen).sample(self.noise)
            parameters = self.model.decode(z, chunk.batch.condition, chunk.members, seen)
            values[chunk.places] = self.from_class_units(_numpy(self.model.expected(parameters)), chunk.k)

        self._each(of_chunk, encoded)
        return values

    def draw(self, encoded: Encoded, n_draws: int, generator: torch.Generator, *, noise: bool = True) -> FloatArray:
        """Draws of every cell given the observed ones, (n_draws, N, D), encoded values.

        Each draw takes z as `expected` does and the cells from p(x | z, c) of a random member, of the first if they
        were trained unlike; without
        ``noise`` the cells are what p(x | z, c) expects.
        """
        values = np.zeros((n_draws, *encoded.values.shape), dtype=encoded.values.dtype)
        for rows, part in self._alike(encoded):
            values[:, rows] = self._draw(part, n_draws, generator, noise)
        return values

    def _draw(self, encoded: Encoded, n_draws: int, generator: torch.Generator, noise: bool) -> FloatArray:
        values = np.zeros((n_draws, *encoded.values.shape), dtype=encoded.values.dtype)

        def of_chunk(every: Chunk) -> None:
            chunk = self._that_fill_in(every)
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

        self._each(of_chunk, encoded, n_samples=n_draws)
        return values

    def decode(self, z: FloatArray, k: int, continuous: FloatArray, told: FloatArray | None = None) -> FloatArray:
        """What the first member of class ``k`` expects of cells at latent points (N, Z): encoded values (N, D).

        ``told`` (N, C) are condition vectors to tell the decoder instead of the class's own.
        """
        start = self.members_of(k).start
        members, blocks = slice(start, start + 1), []
        size = max(1, self._numbers_at_a_time() // self.model.widest)
        with self.inference():
            for first in range(0, len(z), size):
                own, also = z[first : first + size], continuous[first : first + size]
                points = tensor(own, self.device, self.noise.dtype).reshape(1, 1, len(own), -1)
                seen = self.blind(len(own), k, also, members)
                condition = self.condition(k, also)
                if told is not None:
                    condition = tensor(told[first : first + size], self.device, self.noise.dtype).unsqueeze(0)
                parameters = self.model.decode(points, condition, members, seen)
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
        with self.inference():
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

    def _that_fill_in(self, chunk: Chunk) -> Chunk:
        """With the members that say what cells are expected: of unlike ones the first.

        A network with a small KL weight is sure of its z even where cells are missing, and puts in worse values.
        """
        if not self.unlike:
            return chunk
        return replace(chunk, members=slice(chunk.members.start, chunk.members.start + 1))

    def _weights_of(self, members: slice) -> Tensor | None:
        return None if self.part_weights is None else self.part_weights[members]

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

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Without gradients, and with products of the engine's precision."""
        halves = self.precision == "bfloat16" and has_bfloat16(self.device)
        kind = self.device.type
        # A weight that autocast keeps in bfloat16 is gone with its context; a captured graph would still read it there.
        halved = torch.autocast(kind, torch.bfloat16, halves, cache_enabled=kind != "cuda")
        with torch.inference_mode(), halved, full_float32(self.device):
            yield

    def _reduce(self, encoded: Encoded, reduction: reductions.Reduction, into: Sequence[FloatArray]) -> None:
        """Put what terms are reduced to in the rows' places of the arrays ``into``."""
        overlap = self.device.type == "cuda" if self.overlap is None else self.overlap
        if overlap:
            return self._overlapped(encoded, reduction, into)

        def of_chunk(chunk: Chunk) -> None:
            for array, found in zip(into, reduction(self._terms(chunk), self._weights_of(chunk.members)), strict=True):
                array[chunk.places] = _numpy(found)

        def of_piece(piece: Piece) -> None:
            # What inference is, is a matter of each thread, too.
            with self.inference():
                self._attempt(lambda some: of_chunk(self._chunk(encoded, some)), piece)

        if self.device.type == "cpu":
            numbers = self._numbers_per_row(self.members_of(0), len(self.noise))
            if self.members_per_class is None and are_crowded(encoded, self.n_classes, numbers):
                return self._reduce_crowd(encoded, reduction, into, max(1, NUMBERS_OF_A_CROWD // numbers))
            return in_threads(of_piece, self._pieces(encoded, padded=True))
        self._each(of_chunk, encoded, padded=True)

    def _reduce_crowd(
        self, encoded: Encoded, reduction: reductions.Reduction, into: Sequence[FloatArray], size: int
    ) -> None:
        """The same of ``size`` rows at a time, of many classes, which the networks take together."""
        known = np.flatnonzero((encoded.class_index >= 0) & (encoded.class_index < self.n_classes))
        order = known[np.argsort(encoded.class_index[known], kind="stable")]
        mixtures = cache(lambda k: None if self.aggregate is None else self.aggregate.select(self.members_of(0), k))

        def of_places(places: IntArray) -> None:
            rows = encoded.take(_padded(places, size))
            with self.inference():
                terms = self.model.terms(
                    crowd_batch(rows, self.class_table, self.scaling, self.device, self.noise.dtype),
                    self.noise,
                    prior=crowd_prior(rows.class_index, mixtures),
                )
                found = reduction(terms, self.part_weights)
            for array, part in zip(into, found, strict=True):
                array[places] = _numpy(part)[: len(places)]

        in_threads(of_places, np.split(order, range(size, len(order), size)))

    def _overlapped(self, encoded: Encoded, reduction: reductions.Reduction, into: Sequence[FloatArray]) -> None:
        """The same, with rows on their way to the device and results on their way back while it computes."""
        shared = _Latest(self._of_class)
        with self.replays.lock, self.inference(), Ring(lanes_of(self.device), self.noise.dtype) as ring:

            def of_piece(piece: Piece) -> None:
                places, parts = piece.places, shared.get(piece.k)
                key = (reduction, len(places), piece.members.start, piece.members.stop, _shapes(parts))

                def work(inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
                    batch, prior = self._batch(inputs), _mixture(inputs)
                    terms = self.model.terms(batch, self.noise, members=piece.members, prior=prior)
                    return reduction(terms, self._weights_of(piece.members))

                def on_device(rows: Mapping[str, Tensor]) -> Sequence[Tensor]:
                    return self.replays.run((*key, *rows), work, rows, parts, shared.version)

                def take(found: Sequence[Tensor]) -> None:
                    for array, part in zip(into, found, strict=True):
                        array[places] = part.numpy()

                shapes = [(len(places), *array.shape[1:]) for array in into]
                ring.put(self._rows(encoded, piece), on_device, shapes, take)

            def recover() -> None:
                ring.drain()
                self.replays.drop()

            for piece in self._pieces(encoded, padded=True):
                self._attempt(of_piece, piece, recover)

    def _each(
        self, work: Callable[[Chunk], None], encoded: Encoded, *, padded: bool = False, n_samples: int | None = None
    ) -> None:
        """Do the work on every chunk; of one that memory does not hold, on its halves, and later ones are smaller."""
        with self.inference():
            for piece in self._pieces(encoded, padded, n_samples):
                self._attempt(lambda some: work(self._chunk(encoded, some)), piece)

    def _attempt(self, work: Callable[[Piece], None], piece: Piece, recover: Callable[[], None] = lambda: None) -> None:
        """Do the work on the piece or, once ``recover`` has given back memory, on its halves."""
        try:
            return work(piece)
        except torch.OutOfMemoryError:
            if len(piece.places) == 1:
                raise
        # Outside of the handler: the error would hold on to what did not fit.
        recover()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.limit.numbers = max(1, self._numbers_at_a_time() // 2)
        for half in np.array_split(piece.places, 2):
            self._attempt(work, replace(piece, places=half), recover)

    def _chunks(self, encoded: Encoded) -> Iterator[Chunk]:
        for piece in self._pieces(encoded):
            yield self._chunk(encoded, piece)

    def _pieces(self, encoded: Encoded, padded: bool = False, n_samples: int | None = None) -> Iterator[Piece]:
        """Rows class by class; ``padded`` repeats the last row of a short piece, so that few shapes occur.

        On a CPU every new shape costs each layer a kernel of its own, about 0.4 MB that is kept; on CUDA, a graph.
        """
        # Radix sort, which numpy has for 16 bits, takes a tenth of the time.
        narrow = encoded.class_index.astype(np.int16) if self.n_classes <= MOST_NARROW else encoded.class_index
        order = np.argsort(narrow, kind="stable")
        classes = encoded.class_index[order]
        complete = bool(encoded.observed.all())
        bounds = np.searchsorted(classes, np.arange(self.n_classes + 1))
        for k in np.flatnonzero(np.diff(bounds)).tolist():
            first, stop = bounds[k], bounds[k + 1]
            members = self.members_of(k)
            while first < stop:
                size = self.chunk_rows or self._chunk_size(members, n_samples or len(self.noise))
                places = order[first : min(first + size, stop)]
                first += size
                if padded and self.device.type in PADDED:
                    places = _padded(places, size)
                yield Piece(places, k, members, complete)

    def _chunk(self, encoded: Encoded, piece: Piece) -> Chunk:
        rows = {name: part.to(self.device, self.noise.dtype) for name, part in self._rows(encoded, piece).items()}
        batch = self._batch({**rows, **self._fixed(piece.k)})
        return Chunk(piece.places, piece.k, piece.members, self._group(piece.k), batch)

    def _rows(self, encoded: Encoded, piece: Piece) -> dict[str, Tensor]:
        """What the rows of a piece are, on the host, (N, …) each; values in units of their class."""
        places, values = piece.places, torch.from_numpy(encoded.values.take(piece.places, axis=0))
        if self.scaling is not None:
            center, scale = (torch.from_numpy(part[piece.k]) for part in (self.scaling.center, self.scaling.scale))
            values.sub_(center).div_(scale).clamp_(-LARGEST_VALUE, LARGEST_VALUE)
        rows = {"values": values}
        if not piece.complete:
            rows["observed"] = torch.from_numpy(encoded.observed[places])
        if encoded.given is not None:
            rows["given"] = torch.from_numpy(encoded.given[places])
        if self.class_table is not None and encoded.continuous.shape[1]:
            rows["continuous"] = torch.from_numpy(encoded.continuous[places])
        return rows

    def _fixed(self, k: int) -> dict[str, Tensor]:
        """What batches of class ``k`` share, on the device: its condition vector and the logarithm of its scale."""
        fixed = {}
        if self.class_table is not None:
            fixed["condition"] = self.class_table[k].reshape(1, 1, -1)
        if self.scaling is not None:
            log_scale = torch.log(torch.from_numpy(self.scaling.scale[k]))
            fixed["log_scale"] = log_scale.to(self.device, self.noise.dtype).reshape(1, 1, -1)
        return fixed

    def _of_class(self, k: int) -> dict[str, Tensor]:
        """The same and the class's mixture prior, if there is one."""
        if self.aggregate is None:
            return self._fixed(k)
        mixture = self.aggregate.select(self.members_of(k), self._group(k))
        return {**self._fixed(k), **{part.name: getattr(mixture, part.name) for part in fields(Mixture)}}

    def _batch(self, inputs: Mapping[str, Tensor]) -> Batch:
        """The batch of rows (N, …) and what they share."""
        dtype, condition = self.noise.dtype, inputs.get("condition")
        rows = {name: inputs[name].to(dtype).unsqueeze(0) for name in ROWS if name in inputs}
        continuous = rows.pop("continuous", None)
        if condition is not None and continuous is not None:
            condition = torch.cat([condition.expand(1, continuous.shape[1], -1), continuous], dim=-1)
        values, observed, given = rows["values"], rows.get("observed"), rows.get("given")
        return Batch(values, observed, condition, inputs.get("log_scale"), given)

    def _group(self, k: int) -> int:
        """Which mixture of its members is class ``k``'s."""
        return 0 if self.members_per_class is not None else k

    def _chunk_size(self, members: slice, n_samples: int) -> int:
        """Rows that keep one layer's activations within the good range of the device."""
        least = 1 if self.model.shapes else 32
        return max(least, self._numbers_at_a_time() // self._numbers_per_row(members, n_samples))

    def _numbers_per_row(self, members: slice, n_samples: int) -> int:
        """Numbers that the widest layer makes of one row."""
        numbers: int = (members.stop - members.start) * n_samples * self.model.widest
        return numbers

    def _numbers_at_a_time(self) -> int:
        # Convolutions run well on blocks that no cache holds; small ones waste their overhead.
        return self.limit.numbers or CHUNK_NUMBERS[self.device.type] * (IMAGE_FACTOR if self.model.shapes else 1)

    def _terms(self, chunk: Chunk) -> Terms:
        return self.model.terms(chunk.batch, self.noise, members=chunk.members, prior=self._aggregate(chunk))

    def _aggregate(self, chunk: Chunk) -> Prior | None:
        return None if self.aggregate is None else self.aggregate.select(chunk.members, chunk.group)

    def _prior(self, chunk: Chunk, seen: Seen | None) -> Prior:
        """p(z | c) of a chunk at scoring time."""
        if seen is not None:
            return seen.prior
        return self._aggregate(chunk) or self.model.prior(chunk.batch.condition, chunk.members, chunk.batch.class_index)


class _Latest:
    """What was made for the last class that was asked for, and a version that changes with it."""

    def __init__(self, make: Callable[[int], dict[str, Tensor]]) -> None:
        self._make, self._k = make, -1
        self._parts: dict[str, Tensor] = {}
        self.version = object()

    def get(self, k: int) -> dict[str, Tensor]:
        """The parts of class ``k``."""
        if k != self._k:
            self._parts, self._k, self.version = self._make(k), k, object()
        return self._parts


def _mixture(inputs: Mapping[str, Tensor]) -> Mixture | None:
    """The mixture among the inputs of a batch."""
    parts = [inputs[part.name] for part in fields(Mixture) if part.name in inputs]
    return Mixture(*parts) if parts else None


def _shapes(parts: Mapping[str, Tensor]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, tuple(part.shape)) for name, part in parts.items())


def _padded(places: IntArray, size: int) -> IntArray:
    """The same, the last place again and again until there are as many as in other short pieces, at most ``size``."""
    extra = _padded_length(len(places), size) - len(places) if len(places) < size else 0
    return np.concatenate([places, np.full(extra, places[-1])]) if extra else places


def _padded_length(n_rows: int, size: int) -> int:
    """The next power of two up to an eighth of ``size``, then the next multiple of that."""
    step = max(size // 8, 1)
    length = 1 << (n_rows - 1).bit_length()
    return min(length if length <= step else -(-n_rows // step) * step, size)


def _numpy(values: Tensor) -> FloatArray:
    return values.detach().cpu().double().numpy()
