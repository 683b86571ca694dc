"""The scoring engine: encoded rows in, nats out; deterministic, chunked, whatever the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from anomaly_cvae import reductions
from anomaly_cvae.crowds import NUMBERS_OF_A_CROWD, are_crowded, crowd_batch, crowd_prior
from anomaly_cvae.encoding import Encoded
from anomaly_cvae.errors import ParameterError
from anomaly_cvae.expectations import Expectations
from anomaly_cvae.frames import FloatArray, IntArray
from anomaly_cvae.lanes import Ring, lanes_of
from anomaly_cvae.objectives import accumulator
from anomaly_cvae.onnx_scoring import ClassInputs, OnnxBank
from anomaly_cvae.passes import Chunk, Piece, pad_places, to_numpy
from anomaly_cvae.priors import Mixture
from anomaly_cvae.replays import Replays
from anomaly_cvae.threads import in_threads

HALF_TOLERANCE = 5e-3
"""Relative and absolute, of scores whose inner products are in bfloat16; narrow posteriors need more."""
MOST_ROWS_OF_TOLERANCE = 1_000
CLAIMED_CELLS = 1 << 20
"""Cells of the rows, class after class, that are scored under several classes at a time."""


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
class ScoringEngine(Expectations):
    """Scores rows with a bank; in bfloat16 scores agree with those in float32 within `tolerance`.

    Parameters
    ----------
    part_weights : (M, 2) what each member's reconstruction and KL count in scores, the former of those that know a
        class in all 1; None: all alike, and the KL as much as the reconstruction
    graphs : what scores complete rows in the place of torch; None: torch does
    overlap : whether rows are copied to the device while it computes, and chunks of one shape are captured where it
        can; None: on CUDA. Scores are the same
    """

    part_weights: Tensor | None = None
    graphs: OnnxBank | None = field(default=None, compare=False)
    overlap: bool | None = None
    replays: Replays = field(default_factory=Replays, init=False, compare=False, repr=False)

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
        encoded = self.completed(encoded)
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
        condition = self.condition(k, np.zeros((1, 0)))
        return ClassInputs(center, scale, None if condition is None else condition.vectors, prior)

    def class_negative_elbo(self, encoded: Encoded) -> FloatArray:
        """Negative ELBO of every row under every class, (N, K)."""
        nats, n_rows = np.zeros((len(encoded), self.n_classes)), len(encoded)
        at_a_time = max(1, CLAIMED_CELLS // max(encoded.values.size, 1))
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
        encoded = self.completed(encoded)
        self._reduce(encoded, reductions.member_parts, (parts,))
        return parts

    def column_scores(self, encoded: Encoded) -> ColumnScores:
        """The exact decomposition of `negative_elbo`."""
        columns, kl = np.zeros(encoded.values.shape), np.zeros(len(encoded))
        encoded = self.completed(encoded)
        self._reduce(encoded, reductions.columns_and_kl, (columns, kl))
        empty = ~encoded.scored.any(axis=1)
        return ColumnScores(columns, np.where(empty, 0.0, kl))

    def negative_log_likelihood(self, encoded: Encoded, n_samples: int, seed: int = 0) -> FloatArray:
        """-log p(x | c) by importance sampling, (N,), nats: the members' weighted mean of minus the IWAE bound.

        In expectation at least -log p(x | c), at most the negative ELBO (of a bank without `part_weights`), and nearer
        with more samples (Burda, Grosse and Salakhutdinov 2016, theorem 1).
        """
        nats, encoded = np.zeros(len(encoded)), self.completed(encoded)
        noise = torch.randn(
            (n_samples, self.noise.shape[1]), generator=self.generator(seed), dtype=self.noise.dtype, device=self.device
        )

        def of_chunk(chunk: Chunk) -> None:
            own = self._weights_of(chunk.members)
            nats[chunk.places] = to_numpy(-reductions.over_members(self._log_mean_weight(chunk, noise), own))

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
            logits[chunk.places] = to_numpy(self.model.condition_logits(chunk.batch, chunk.members).mean(0))

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
            parts[chunk.places] = np.stack([to_numpy(column[0]) for column in columns], axis=1)

        self._each(of_chunk, encoded)
        return parts

    def _weights_of(self, members: slice) -> Tensor | None:
        return None if self.part_weights is None else self.part_weights[members]

    def _reduce(self, encoded: Encoded, reduction: reductions.Reduction, into: Sequence[FloatArray]) -> None:
        """Put what terms are reduced to in the rows' places of the arrays ``into``."""
        overlap = self.device.type == "cuda" if self.overlap is None else self.overlap
        if overlap:
            return self._overlapped(encoded, reduction, into)

        def of_chunk(chunk: Chunk) -> None:
            for array, found in zip(into, reduction(self._terms(chunk), self._weights_of(chunk.members)), strict=True):
                array[chunk.places] = to_numpy(found)

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
            rows = encoded.take(pad_places(places, size))
            with self.inference():
                terms = self.model.terms(
                    crowd_batch(rows, self.classes, self.scaling, self.device, self.noise.dtype),
                    self.noise,
                    prior=crowd_prior(rows.class_index, mixtures),
                )
                found = reduction(terms, self.part_weights)
            for array, part in zip(into, found, strict=True):
                array[places] = to_numpy(part)[: len(places)]

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

    def _of_class(self, k: int) -> dict[str, Tensor]:
        """The same and the class's mixture prior, if there is one."""
        if self.aggregate is None:
            return self._fixed(k)
        mixture = self.aggregate.select(self.members_of(k), self._group(k))
        return {**self._fixed(k), **{part.name: getattr(mixture, part.name) for part in fields(Mixture)}}


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
