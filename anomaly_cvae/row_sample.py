"""One pass over more rows than memory holds: a fair sample, and a row of everything that a schema asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from anomaly_cvae.errors import ConditionError
from anomaly_cvae.frames import BoolArray, FloatArray, IntArray, numeric_cells, to_frame
from anomaly_cvae.parquet_rows import ParquetTable
from anomaly_cvae.schema import MAX_LEVELS, MAX_NUMERIC_CLASSES, Name

READ_ROWS = 65_536
LEAST_OF_CLASS = 1_000
"""Rows of a class that are kept however rare it is, while all classes together do not fill half of the sample."""
FEWEST_OF_CLASS = 20
ROWS = "\0rows"
"""Name of a column of counts, which no column of a table has."""


@dataclass(frozen=True)
class RowSample:
    """Rows of a table, and where they stood.

    ``seen`` holds the sample and, besides, rows with every level, the least and the greatest number of every
    column: what a schema is inferred from. ``counts`` are rows of the whole table by the levels of their
    conditions.
    """

    frame: pd.DataFrame
    positions: IntArray
    seen: pd.DataFrame
    seen_positions: IntArray
    counts: pd.DataFrame | None


def uniform_of(positions: IntArray, seed: int) -> FloatArray:
    """A number in [0, 1) that belongs to a row's position, (N,): no list of rows is needed to find it again."""
    with np.errstate(over="ignore"):
        # SplitMix64 (Steele, Lea and Flood 2014).
        x = positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + _mixed(np.array([seed], dtype=np.uint64))
        return (_mixed(x) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(x: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def draw_sample(
    table: ParquetTable, n_rows: int, conditions: Sequence[str], kinds: Mapping[Name, str], seed: int, *, may_miss: bool
) -> RowSample:
    """About ``n_rows`` rows of the whole table, each as likely as any other, and more of rare classes.

    Raises
    ------
    DataError
        If a number is infinite, or a condition missing and not ``may_miss``; names the row and its file.
    """
    drawing = _Drawing(table, n_rows, [c for c in conditions if kinds.get(c) != "continuous"], seed)
    for piece in table.pieces:
        for start, rows in table.read(piece, READ_ROWS):
            positions = start + np.arange(len(rows))
            with table.rows_named(positions):
                frame = to_frame(rows)
                if not may_miss:
                    _refuse_missing(frame, conditions)
                drawing.add(rows, frame, positions)
    return drawing.finish()


def _refuse_missing(frame: pd.DataFrame, conditions: Sequence[str]) -> None:
    for name in conditions:
        missing = np.flatnonzero(frame[name].isna().to_numpy())
        if missing.size:
            raise ConditionError(
                f"condition {name!r} is missing (NaN) in row {missing[0]}; fill it or drop the row for training"
            )


@dataclass
class _Drawing:
    table: ParquetTable
    n_rows: int
    conditions: list[str]
    seed: int
    kept: list[Any] = field(default_factory=list)
    places: list[IntArray] = field(default_factory=list)
    witnesses: list[Any] = field(default_factory=list)
    witness_places: list[IntArray] = field(default_factory=list)
    levels: dict[str, set[Any]] = field(default_factory=dict)
    facts: dict[str, dict[str, float]] = field(default_factory=dict)
    counts: pd.DataFrame | None = None
    n_kept: int = 0

    def add(self, rows: Any, frame: pd.DataFrame, positions: IntArray) -> None:
        self._count(frame)
        chosen = self._fair(positions, frame)
        self._keep(rows, positions, chosen)
        new = np.unique([row for name in frame for row in self._new(frame[name], str(name))]).astype(np.int64)
        if new.size:
            self.witnesses.append(rows.take(new))
            self.witness_places.append(positions[new])
        if self.n_kept > 2 * self.n_rows:
            self._prune()

    def finish(self) -> RowSample:
        self._prune()
        positions = np.concatenate([np.zeros(0, dtype=np.int64), *self.places])
        others = np.concatenate([np.zeros(0, dtype=np.int64), *self.witness_places])
        frame = self.table.as_frame(self.kept)
        seen = self.table.as_frame([*self.kept, *self.witnesses])
        return RowSample(frame, positions, seen, np.concatenate([positions, others]), self.counts)

    def _keep(self, rows: Any, positions: IntArray, chosen: BoolArray) -> None:
        self.kept.append(rows.filter(chosen))
        self.places.append(positions[chosen])
        self.n_kept += int(chosen.sum())

    def _fair(self, positions: IntArray, frame: pd.DataFrame) -> BoolArray:
        """Rows whose number is below the share, and those with the least numbers of their class.

        The rows with the k least numbers are k fair draws, and those of a part of the table hold those of the whole.
        """
        number = uniform_of(positions, self.seed)
        chosen: BoolArray = number < self.n_rows / self.table.n_rows
        if not self.conditions:
            return chosen
        assert self.counts is not None
        n_classes = max(len(self.counts), 1)
        least = max(FEWEST_OF_CLASS, min(LEAST_OF_CLASS, self.n_rows // (2 * n_classes)))
        by_class = frame[self.conditions].assign(**{ROWS: number}).groupby(self.conditions, dropna=False, observed=True)
        return chosen | (by_class[ROWS].rank(method="first").to_numpy() <= least)

    def _prune(self) -> None:
        rows, positions = self.kept, np.concatenate([np.zeros(0, dtype=np.int64), *self.places])
        whole = self.table.joined(rows)
        chosen = self._fair(positions, to_frame(whole.select(self.conditions)) if self.conditions else pd.DataFrame())
        self.kept, self.places, self.n_kept = [], [], 0
        self._keep(whole, positions, chosen)
        self.kept = [self.kept[0].combine_chunks()]

    def _count(self, frame: pd.DataFrame) -> None:
        """Rows by the levels of their conditions; a condition that turns out to be continuous is no class."""
        for name in list(self.conditions):
            dtype = frame[name].dtype
            number = pd.api.types.is_numeric_dtype(dtype) and not pd.api.types.is_bool_dtype(dtype)
            found = self.levels.setdefault(f"condition {name}", set())
            found.update(frame[name].dropna().unique())
            if len(found) > (MAX_NUMERIC_CLASSES if number else MAX_LEVELS):
                self.conditions.remove(name)
        if not self.conditions:
            self.counts = None
            return
        own = frame[self.conditions].assign(**{ROWS: 1})
        both = own if self.counts is None else pd.concat([self.counts, own])
        self.counts = both.groupby(self.conditions, dropna=False, observed=True)[ROWS].sum().reset_index()

    def _new(self, cells: pd.Series, name: str) -> list[int]:
        """Rows that show something of a column that no row before did."""
        dtype = cells.dtype
        is_bool = pd.api.types.is_bool_dtype
        if pd.api.types.is_numeric_dtype(dtype) and not is_bool(dtype):
            return self._new_numbers(numeric_cells(cells, name), name)
        if not (isinstance(dtype, pd.CategoricalDtype) or pd.api.types.is_string_dtype(dtype) or is_bool(dtype)):
            return []
        known = self.levels.setdefault(name, set())
        if len(known) > MAX_LEVELS:
            return []
        first = cells.drop_duplicates().dropna()
        fresh = first[~first.isin(known)]
        known.update(fresh)
        return [int(row) for row in fresh.index[: MAX_LEVELS + 1]]

    def _new_numbers(self, values: FloatArray, name: str) -> list[int]:
        present = np.flatnonzero(~np.isnan(values))
        if not present.size:
            return []
        known, own = self.facts.setdefault(name, {}), values[present]
        shows = {"least": int(own.argmin()), "greatest": int(own.argmax())}
        beyond = {
            "least": own.min() < known.get("least", np.inf),
            "greatest": own.max() > known.get("greatest", -np.inf),
        }
        for fact, odd in (("fraction", own != np.round(own)), ("neither 0 nor 1", (own != 0) & (own != 1))):
            shows[fact], beyond[fact] = int(odd.argmax()), fact not in known and bool(odd.any())
        new = [fact for fact in shows if beyond[fact]]
        known |= {fact: float(own[shows[fact]]) for fact in new}
        return [int(present[shows[fact]]) for fact in new]
