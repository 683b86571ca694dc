"""Training rows of a table larger than memory: a buffer on the device that a thread keeps refreshing from the files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, Full, Queue
from threading import Event, Thread

import numpy as np
import pandas as pd

from anomaly_cvae.encoding import Encoded, Encoder
from anomaly_cvae.frames import BoolArray, IntArray, to_frame
from anomaly_cvae.parquet_rows import ParquetTable
from anomaly_cvae.row_sample import READ_ROWS, ROWS, RowSample, uniform_of
from anomaly_cvae.rows import DeviceRows
from anomaly_cvae.schema import Schema

AHEAD = 2
"""Chunks that are read before they are needed."""
LEAST_SPLIT_CLASS = 100
"""A class with fewer rows in the whole table gives all of them to training, as the smallest ones do in `fit`."""
WAIT = 0.2
FIT_MEMORY_BYTES = 1 << 30
BYTES_PER_CELL = 80
"""What a cell of the sample takes: in the frame, encoded, and on the device."""
LEAST_SAMPLE = 2_000
"""Rows without which thresholds would be guesses."""


@dataclass(frozen=True)
class RowStream:
    """More rows than memory holds; `fit_model` gets a sample of them and has its buffer refreshed from here.

    Whether a row is held out is a matter of its position alone, so that no reader ever trains on one that is.
    """

    table: ParquetTable
    sample: RowSample
    seed: int

    def frame(self, columns: Sequence[str]) -> pd.DataFrame:
        """The sample with all ``columns`` of the files: those that were not read have no cell."""
        return self.sample.frame.reindex(columns=list(columns))

    def class_counts(self, schema: Schema) -> IntArray:
        """Rows of the whole table by class, (K,)."""
        n_classes, names = len(schema.classes), [c.name for c in schema.categorical_conditions]
        if not names:
            return np.array([self.table.n_rows])
        counts = self.sample.counts
        if counts is None or not set(names) <= set(counts.columns):
            classes, weight = schema.class_index_of(self.sample.frame), None
        else:
            classes, weight = schema.class_index_of(counts), counts[ROWS].to_numpy()
        known = (classes >= 0) & (classes < n_classes)
        weights = None if weight is None else weight[known]
        return np.bincount(classes[known], weights=weights, minlength=n_classes).astype(np.int64)

    def held_out(
        self, positions: IntArray, classes: IntArray, schema: Schema, validation: float, calibration: float
    ) -> tuple[BoolArray, BoolArray]:
        """Which rows are for early stopping and which for thresholds, (N,) each."""
        number = uniform_of(positions, self.seed + 1)
        small = np.append(self.class_counts(schema) < LEAST_SPLIT_CLASS, [False, False])
        splits = ~small[np.where(classes < 0, len(schema.classes), classes)]
        return (number >= calibration) & (number < calibration + validation) & splits, (number < calibration) & splits

    @contextmanager
    def feed(
        self,
        encoder: Encoder,
        rows: DeviceRows,
        slots: IntArray,
        own: IntArray,
        rows_per_step: int,
        to_device: ToDevice,
        is_training: IsTraining,
    ) -> Iterator[Callable[[int], None]]:
        """A function that brings the buffer up to a step, while a thread reads ahead.

        Parameters
        ----------
        slots : places of the buffer in ``rows``
        own : (slots,) the class of each, which the rows that come into it have, too
        rows_per_step : as many new rows come in as a member draws, so that each is drawn about once
        """
        buffer = _Buffer(rows, slots, own, len(encoder.schema.classes))
        with _read_ahead(self._chunks(encoder, is_training)) as take:

            def advance(step: int) -> None:
                while buffer.arrived < step * rows_per_step:
                    chunk = take()
                    buffer.put(chunk, to_device(chunk))

            yield advance

    def _chunks(self, encoder: Encoder, is_training: IsTraining) -> Iterator[Encoded]:
        """Training rows, the row groups in another order at every pass, for ever."""
        rng = np.random.default_rng(self.seed)
        while True:
            for place in rng.permutation(len(self.table.pieces)):
                for start, table in self.table.read(self.table.pieces[place], self.chunk_rows):
                    positions = start + np.arange(len(table))
                    with self.table.rows_named(positions):
                        encoded = encoder.encode(to_frame(table))
                    chosen = np.flatnonzero(is_training(positions, encoded.class_index))
                    if len(chosen):
                        yield encoded.take(rng.permutation(chosen))

    @property
    def chunk_rows(self) -> int:
        """Rows that are read at a time: a small part of the buffer, so that what comes in together leaves it mixed."""
        return int(np.clip(len(self.sample.frame) // 16, 256, READ_ROWS))


ToDevice = Callable[[Encoded], DeviceRows]
IsTraining = Callable[[IntArray, IntArray], BoolArray]


class _Buffer:
    """Slots of every class, the oldest of which a new row of that class takes."""

    def __init__(self, rows: DeviceRows, slots: IntArray, own: IntArray, n_classes: int) -> None:
        self.rows, self.n_classes, self.arrived = rows, n_classes, 0
        own = np.where(own < 0, n_classes, own)
        self.rings = [slots[own == k] for k in range(n_classes + 1)]
        self.oldest = [0] * (n_classes + 1)

    def put(self, encoded: Encoded, rows: DeviceRows) -> None:
        """Replace the oldest rows of each class."""
        self.arrived += len(encoded)
        classes = np.where(encoded.class_index < 0, self.n_classes, encoded.class_index)
        taken, chosen = list[IntArray](), list[IntArray]()
        for k in np.unique(classes[classes <= self.n_classes]):
            ring = self.rings[k]
            new = np.flatnonzero(classes == k)[: len(ring)]
            if len(new):
                taken.append(ring[(self.oldest[k] + np.arange(len(new))) % len(ring)])
                chosen.append(new)
                self.oldest[k] = (self.oldest[k] + len(new)) % len(ring)
        if taken:
            self.rows.replace(np.concatenate(taken), rows, np.concatenate(chosen))


@contextmanager
def _read_ahead(chunks: Iterator[Encoded]) -> Iterator[Callable[[], Encoded]]:
    """A function that gives the next chunk, read by a thread; what goes wrong there is raised here."""
    ready: Queue[Encoded | BaseException] = Queue(AHEAD)
    ended = Event()

    def put(item: Encoded | BaseException) -> None:
        while not ended.is_set():
            try:
                return ready.put(item, timeout=WAIT)
            except Full:
                continue

    def read() -> None:
        try:
            for chunk in chunks:
                put(chunk)
                if ended.is_set():
                    return
        except BaseException as error:  # whatever it is belongs to whoever waits for the chunk
            put(error)

    def take() -> Encoded:
        while True:
            try:
                item = ready.get(timeout=WAIT)
            except Empty:
                if not thread.is_alive() and ready.empty():
                    raise RuntimeError("no row of the files is for training") from None
                continue
            if isinstance(item, BaseException):
                raise item
            return item

    thread = Thread(target=read, name="rows ahead", daemon=True)
    thread.start()
    try:
        yield take
    finally:
        ended.set()
        thread.join()
