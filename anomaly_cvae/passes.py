"""Passes of encoded rows through a bank, chunk by chunk, whatever the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from anomaly_cvae.encoding import LARGEST_VALUE, ClassScaling, Encoded
from anomaly_cvae.frames import FloatArray, IntArray
from anomaly_cvae.model import CVAE, Seen, Terms
from anomaly_cvae.networks import Condition, full_float32, has_bfloat16
from anomaly_cvae.priors import AggregatePosterior, DiagonalNormal, Prior
from anomaly_cvae.rows import Batch, tensor

# Activations of one layer, in numbers, that stay in a core's cache or in a GPU's good range.
CHUNK_NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 26, "mps": 1 << 24}
IMAGE_FACTOR = 8
PADDED = {"cpu": 16, "cuda": 8}
"""Devices on which every new shape costs, a kernel per layer that is kept or a captured graph, and in how many parts of
a chunk short pieces are counted there."""
Precision = Literal["float32", "bfloat16"]
ROWS = ("values", "observed", "given", "continuous")
"""Parts of a piece's rows."""
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
class Passes:
    """A bank and what its rows need on their way through it.

    Rows are taken class by class, so that a chunk has one condition, one mixture prior and, in a bank of
    one network per class, only the members of its class.

    Parameters
    ----------
    members_per_class : members that know one class; None when every member knows all of them
    class_table : (K, C) condition vectors, None in a bank of one network per class
    noise : (S, Z) fixed low-discrepancy points, stored with the model
    aggregate : the prior at scoring time; None for the training prior
    scaling : location and scale of the real columns per class; None without classes
    precision : "bfloat16" takes the products between hidden layers, and convolutions, in bfloat16, sums in float32,
        where the hardware does so
    """

    model: CVAE
    noise: Tensor
    n_classes: int
    class_table: Tensor | None = None
    members_per_class: int | None = None
    aggregate: AggregatePosterior | None = None
    scaling: ClassScaling | None = None
    precision: Precision = "float32"
    chunk_rows: int | None = None
    limit: Limit = field(default_factory=Limit, compare=False)

    @property
    def device(self) -> torch.device:
        """Where the bank lives."""
        return self.noise.device

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Without gradients, and with products of the engine's precision."""
        halves = self.precision == "bfloat16" and has_bfloat16(self.device)
        kind = self.device.type
        # A weight that autocast keeps in bfloat16 is gone with its context; a captured graph would still read it there.
        halved = torch.autocast(kind, torch.bfloat16, halves, cache_enabled=kind != "cuda")
        with torch.inference_mode(), halved, full_float32(self.device):
            yield

    @cached_property
    def classes(self) -> Condition | None:
        """The conditions of all classes, None in a bank of one network per class."""
        return None if self.class_table is None else Condition.of_classes(self.class_table)

    def members_of(self, k: int) -> slice:
        """The members that know class ``k``."""
        if self.members_per_class is None:
            return slice(0, self.model.architecture.n_members)
        return slice(k * self.members_per_class, (k + 1) * self.members_per_class)

    def condition(self, k: int, continuous: FloatArray) -> Condition | None:
        """The condition of rows of class ``k``, one for all unless ``continuous`` (N, Q) tells them apart."""
        if self.class_table is None:
            return None
        shared = self.class_table[k].reshape(1, 1, -1)
        if not continuous.shape[1]:
            return Condition(shared)
        own = tensor(continuous, self.device, self.noise.dtype).unsqueeze(0)
        return Condition(torch.cat([shared.expand(1, len(continuous), -1), own], dim=-1))

    def conditions(self, encoded: Encoded) -> FloatArray:
        """The condition vector of every row, (N, C)."""
        assert self.class_table is not None
        return np.concatenate([to_numpy(self.class_table)[encoded.class_index], encoded.continuous], axis=1)

    def generator(self, seed: int) -> torch.Generator:
        """A source of randomness on the engine's device."""
        return torch.Generator(self.device).manual_seed(seed)

    def from_class_units(self, values: FloatArray, k: int) -> FloatArray:
        """Values (…, D) of the model as encoded values."""
        return values if self.scaling is None else self.scaling.from_class_units(values, k)

    def posteriors(self, encoded: Encoded) -> Iterator[tuple[Chunk, DiagonalNormal]]:
        """q(z | x, c) chunk by chunk, for fitting the aggregate posterior."""
        with self.inference():
            for chunk in self._chunks(encoded):
                yield chunk, self.model.encode(chunk.batch, chunk.members)

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
                    places = pad_places(places, size, PADDED[self.device.type])
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

    def _batch(self, inputs: Mapping[str, Tensor]) -> Batch:
        """The batch of rows (N, …) and what they share."""
        dtype, vectors = self.noise.dtype, inputs.get("condition")
        rows = {name: inputs[name].to(dtype).unsqueeze(0) for name in ROWS if name in inputs}
        continuous = rows.pop("continuous", None)
        if vectors is not None and continuous is not None:
            vectors = torch.cat([vectors.expand(1, continuous.shape[1], -1), continuous], dim=-1)
        condition = None if vectors is None else Condition(vectors)
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


def pad_places(places: IntArray, size: int, parts: int = PADDED["cpu"]) -> IntArray:
    """The same, the last place again and again until there are as many as in other short pieces, at most ``size``."""
    extra = padded_length(len(places), size, parts) - len(places) if len(places) < size else 0
    return np.concatenate([places, np.full(extra, places[-1])]) if extra else places


def padded_length(n_rows: int, size: int, parts: int) -> int:
    """The next power of two up to one of so many ``parts`` of ``size``, then the next multiple of that part."""
    step = max(size // parts, 1)
    length = 1 << (n_rows - 1).bit_length()
    return min(length if length <= step else -(-n_rows // step) * step, size)


def to_numpy(values: Tensor) -> FloatArray:
    """A float64 copy on the host."""
    return values.detach().cpu().double().numpy()
