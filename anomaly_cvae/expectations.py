"""What a bank makes of rows: latent coordinates, what it expects of their cells, and draws."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from anomaly_cvae.encoding import Encoded
from anomaly_cvae.frames import FloatArray, IntArray
from anomaly_cvae.model import Seen
from anomaly_cvae.networks import Condition
from anomaly_cvae.passes import Chunk, Passes, to_numpy
from anomaly_cvae.priors import DiagonalNormal
from anomaly_cvae.rows import Batch, tensor


@dataclass(frozen=True)
class Expectations(Passes):
    """Passes that go on to the cells.

    Parameters
    ----------
    unlike : whether members were trained with other settings, so that the first alone fills in missing cells, for
        scores, too
    """

    unlike: bool = False

    def posterior_mean(self, encoded: Encoded) -> FloatArray:
        """Latent coordinates of each row under the first member of its class, (N, Z)."""
        means = np.zeros((len(encoded), self.noise.shape[1]))

        def of_chunk(chunk: Chunk) -> None:
            first = slice(chunk.members.start, chunk.members.start + 1)
            means[chunk.places] = to_numpy(self.model.encode(chunk.batch, first).mean[0])

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
            values[chunk.places] = self.from_class_units(to_numpy(self.model.expected(parameters)), chunk.k)

        self._each(of_chunk, encoded)
        return values

    def completed(self, encoded: Encoded) -> Encoded:
        """The rows as unlike members judge them: what is missing is expected by the first, and counts as given.

        A network with a small KL weight that is shown a gap is as sure of its z as ever, and far from all training
        rows. A bound on log p(x_observed | c) holds for any q(z), so for that of the completed row, too.
        """
        if not self.unlike or self.model.architecture.observed_condition or bool(encoded.observed.all()):
            return encoded
        known = (encoded.class_index >= 0) & (encoded.class_index < self.n_classes)
        partly = np.flatnonzero(known & ~encoded.observed.all(axis=1))
        values, missing = encoded.values.copy(), ~encoded.observed
        values[partly] = np.where(missing[partly], self.expected(encoded.take(partly)), values[partly])
        given = missing if encoded.given is None else missing | encoded.given
        return replace(encoded, values=values, observed=np.ones_like(encoded.observed), given=given)

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
            values[:, chunk.places] = self.from_class_units(to_numpy(drawn), chunk.k)

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
                    vectors = tensor(told[first : first + size], self.device, self.noise.dtype)
                    condition = Condition(vectors.unsqueeze(0))
                parameters = self.model.decode(points, condition, members, seen)
                blocks.append(to_numpy(self.model.expected_each(parameters)[0, 0]))
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

    def _that_fill_in(self, chunk: Chunk) -> Chunk:
        """With the members that say what cells are expected: of unlike ones the first.

        A network with a small KL weight is sure of its z even where cells are missing, and puts in worse values.
        """
        if not self.unlike:
            return chunk
        return replace(chunk, members=slice(chunk.members.start, chunk.members.start + 1))
