"""Fitted table <-> numbers: standardised cells, level codes, masks and conditions, and back again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from anomaly_cvae.errors import ConditionError
from anomaly_cvae.frames import BoolArray, FloatArray, IntArray, Level, level_cells, numeric_cells
from anomaly_cvae.images import as_cells, read_images, to_images
from anomaly_cvae.schema import Column, Condition, Name, Schema, check_counts, check_same_type
from anomaly_cvae.threads import in_threads

CELLS_AT_A_TIME, LEAST_ROWS_AT_A_TIME = 1 << 17, 256
LARGEST_VALUE = 1e15
"""Standardised cells are held within this, so that their square is finite in float32."""
LEAST_CLASS_SCALE = 1e-3
"""Scale, in units of the whole column, of a real column that is constant within every class."""
MAX_IMAGES_FOR_SCALE = 5_000
"""Images that the location and scale of an image column are learned from."""
LEAST_ROWS_OF_SCALED_CLASS = 5
"""A class with fewer training rows keeps the location and scale of the whole column."""
LIKELIHOODS_OF_KIND = {
    "real": ("robust_normal", "normal", "student_t"),
    "binary": ("bernoulli",),
    "categorical": ("categorical",),
    "count": ("negative_binomial", "poisson"),
    "pixel": ("normal", "robust_normal", "discretised_logistic", "bernoulli"),
}
"""Likelihoods that go with a kind of column; the first is the default."""
LIKELIHOODS_OF_PIXELS = {
    "uint8": ("normal", "robust_normal", "discretised_logistic"),
    "float": ("normal", "robust_normal"),
    "bool": ("bernoulli",),
}
"""The same for the pixels of an image, by their type."""


@dataclass(frozen=True, slots=True)
class FittedColumn:
    """What training learned of one column.

    ``center`` and ``scale`` standardise a real column; for a count they do so for log(1 + count).
    ``mean`` is the mean of the raw cells, ``observed`` the number of cells that were there. ``shape`` is
    (channels, height, width) of an image, whose pixels are standardised alike and follow each other in
    `Encoded`; () of any other column, which is one cell.
    """

    name: Name
    likelihood: str
    n_levels: int = 0
    center: float = 0.0
    scale: float = 1.0
    mean: float = 0.0
    observed: int = 0
    shape: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """Cells of this column in one row: the pixels of an image, else 1."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Rows as numbers, columns grouped by likelihood; an image is many cells, any other column one.

    Attributes
    ----------
    values : (N, D) standardised reals, level codes (the number of levels stands for an unknown one), counts,
        standardised pixels; float32 where there are images, which it holds exactly
    observed : (N, D) whether the cell is there
    class_index : (N,) class of each row; -1 where the condition is missing, K where the class is unknown
    continuous : (N, Q) standardised continuous conditions, and attributes as -1 and 1
    given : (N, D) cells that are part of the condition; None where none is
    """

    values: FloatArray
    observed: BoolArray
    class_index: IntArray
    continuous: FloatArray
    given: BoolArray | None = None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def scored(self) -> BoolArray:
        """Cells that a score is of: observed, and not part of the condition."""
        return self.observed if self.given is None else self.observed & ~self.given

    def take(self, rows: IntArray | BoolArray) -> Encoded:
        """The rows asked for, in that order."""
        given = None if self.given is None else self.given[rows]
        return Encoded(self.values[rows], self.observed[rows], self.class_index[rows], self.continuous[rows], given)

    def hide(self, cells: BoolArray) -> Encoded:
        """The same rows with ``cells`` (N, D) missing as well."""
        return replace(self, observed=self.observed & ~cells)

    def of_class(self, class_index: IntArray) -> Encoded:
        """The same rows under other claimed classes (N,)."""
        return replace(self, class_index=class_index)

    def with_continuous(self, continuous: FloatArray) -> Encoded:
        """The same rows under other continuous conditions and attributes (N, Q)."""
        return replace(self, continuous=continuous)


@dataclass(frozen=True)
class ClassScaling:
    """Location and scale of every real column in every class, in units of the whole column: (K, D) each.

    A fridge's 60 degrees are far from a fridge's normal, but not far on a scale that includes furnaces. A
    class's scale is its own standard deviation, but never less than the pooled within-class one: a column
    that happens to be constant in one class must not make a scale of nothing.
    """

    center: FloatArray
    scale: FloatArray

    @classmethod
    def fit(cls, encoded: Encoded, n_classes: int, is_real: BoolArray) -> ClassScaling:
        """Learn from rows of known class; columns that are not real are left as they are."""
        shape = (n_classes, encoded.values.shape[1])
        center, variance, count = np.zeros(shape), np.ones(shape), np.zeros(shape)
        for k in range(n_classes):
            own = encoded.class_index == k
            observed, values = encoded.observed[own], np.where(encoded.observed[own], encoded.values[own], 0.0)
            count[k] = observed.sum(axis=0)
            center[k] = values.sum(axis=0) / np.maximum(count[k], 1)
            variance[k] = (observed * (values - center[k]) ** 2).sum(axis=0) / np.maximum(count[k], 1)
        pooled = (count * variance).sum(axis=0) / np.maximum(count.sum(axis=0), 1)
        scale = np.sqrt(np.maximum(np.maximum(variance, pooled), LEAST_CLASS_SCALE**2))
        # The mean of a row or two would be those rows, stored with the model.
        known = is_real & (count >= LEAST_ROWS_OF_SCALED_CLASS)
        return cls(np.where(known, center, 0.0), np.where(known, scale, 1.0))

    def to_class_units(self, values: FloatArray, classes: IntArray | int) -> FloatArray:
        """Encoded values (N, D) of rows of ``classes`` (one, or (N,)), relative to their class."""
        relative = (values - self.center[classes]) / self.scale[classes]
        return np.clip(relative, -LARGEST_VALUE, LARGEST_VALUE)

    def from_class_units(self, values: FloatArray, classes: IntArray | int) -> FloatArray:
        """Inverse of `to_class_units`."""
        encoded: FloatArray = values * self.scale[classes] + self.center[classes]
        return encoded

    def on_the_way(self, values: FloatArray, start: IntArray, end: IntArray, share: float) -> FloatArray:
        """Encoded values (N, D) of rows of classes ``end``, in units ``share`` of the way there from ``start``."""
        log_scale = np.log(self.scale)
        center = self.center[start] + share * (self.center[end] - self.center[start])
        scale = np.exp(log_scale[start] + share * (log_scale[end] - log_scale[start]))
        moved: FloatArray = self.to_class_units(values, end) * scale + center
        return moved


@dataclass(frozen=True)
class Encoder:
    """Turns checked tables into `Encoded` rows and generated numbers back into tables.

    ``columns`` are grouped by likelihood, images last; ``order[i]`` is the place of grouped column i in the
    schema.
    """

    schema: Schema
    columns: tuple[FittedColumn, ...]
    order: tuple[int, ...]
    continuous_center: tuple[float, ...] = ()
    continuous_scale: tuple[float, ...] = ()

    @classmethod
    def fit(cls, schema: Schema, frame: pd.DataFrame, likelihoods: Mapping[Name, str]) -> Encoder:
        """Learn scaling from ``frame``; ``likelihoods`` overrides the default head of a column."""
        fitted = [_fit_column(c, frame[c.name], likelihoods.get(c.name)) for c in schema.columns]
        order = tuple(sorted(range(len(fitted)), key=lambda i: (bool(fitted[i].shape), fitted[i].likelihood)))
        scales = [_center_and_scale(numeric_cells(frame[c.name], c.name)) for c in schema.continuous_conditions]
        return cls(
            schema=schema,
            columns=tuple(fitted[i] for i in order),
            order=order,
            continuous_center=tuple(center for center, _ in scales),
            continuous_scale=tuple(scale for _, scale in scales),
        )

    @property
    def is_real(self) -> BoolArray:
        """Which cells are standardised reals of a table, (D,): not those of images."""
        real = [c.likelihood in LIKELIHOODS_OF_KIND["real"] and not c.shape for c in self.columns]
        return np.repeat(np.array(real, dtype=np.bool_), self.widths)

    @property
    def is_number(self) -> BoolArray:
        """Which cells are standardised numbers, (D,): reals of tables, and pixels."""
        numbers = [not c.n_levels and c.likelihood not in LIKELIHOODS_OF_KIND["count"] for c in self.columns]
        return np.repeat(np.array(numbers, dtype=np.bool_), self.widths)

    @property
    def widths(self) -> IntArray:
        """Cells of every grouped column."""
        return np.array([column.width for column in self.columns], dtype=np.int64)

    @property
    def n_cells(self) -> int:
        """D, the cells of one row."""
        return int(self.widths.sum())

    @property
    def slices(self) -> list[slice]:
        """Where the cells of every grouped column stand."""
        ends = np.cumsum(self.widths)
        return [slice(int(end - width), int(end)) for end, width in zip(ends, self.widths, strict=True)]

    def encode(self, frame: pd.DataFrame, *, with_condition: bool = True) -> Encoded:
        """Encode the columns and conditions of ``frame``, found by name.

        Raises
        ------
        DataError
            If a cell is infinite, of the wrong type or no count; the message names column and row.
        ConditionError
            If a continuous condition is missing.
        """
        values, observed = self._encode_images(frame) if self.schema.images else self._encode_table(frame)
        if not with_condition:
            absent = np.full(len(frame), -1, dtype=np.int64)
            return Encoded(values, observed, absent, np.zeros((len(frame), 0)))
        return Encoded(values, observed, *self.encode_conditions(frame))

    def _encode_images(self, frame: pd.DataFrame) -> tuple[FloatArray, BoolArray]:
        values = np.empty((len(frame), self.n_cells), dtype=np.float32)
        observed = np.ones(values.shape, dtype=np.bool_)
        for cells, place, fitted in zip(self.slices, self.order, self.columns, strict=True):
            column = self.schema.columns[place]
            found, there = _encode_column(column, fitted, frame[column.name])
            shape = (len(frame), fitted.width)
            values[:, cells], observed[:, cells] = found.reshape(shape), there.reshape(shape)
        return values, observed  # type: ignore[return-value]  # float32, which holds pixels exactly

    def _encode_table(self, frame: pd.DataFrame) -> tuple[FloatArray, BoolArray]:
        values, observed = np.empty((len(frame), self.n_cells)), np.ones((len(frame), self.n_cells), dtype=np.bool_)
        cells = {place: self._plain_cells(place, frame) for place in range(len(self.columns))}
        plain = {place: raw for place, raw in cells.items() if raw is not None}
        others = {place: self._encode(place, frame) for place in cells if place not in plain}
        numbers = list(plain.values())
        center, scale = (
            np.array([[getattr(self.columns[place], part)] for place in plain]) for part in ("center", "scale")
        )
        places, infinite = np.array(list(plain), dtype=np.int64), set[int]()

        def encode(rows: slice) -> None:
            # All columns at once, but few rows: a column of a large row-major array touches all of its memory.
            by_column = np.empty((self.n_cells, rows.stop - rows.start))
            if plain:
                raw = np.stack([column[rows] for column in plain.values()], dtype=np.float64)
                for i, there in _standardise(raw, center, scale):
                    observed[rows, places[i]] = there
                    if np.isinf(numbers[i][rows]).any():
                        infinite.add(int(places[i]))
                by_column[places] = raw
            for place, (found, there) in others.items():
                by_column[place], observed[rows, place] = found[rows], there[rows]
            values[rows] = by_column.T

        at_a_time = max(LEAST_ROWS_AT_A_TIME, CELLS_AT_A_TIME // max(self.n_cells, 1))
        bounds = range(0, len(frame), at_a_time)
        in_threads(encode, [slice(first, min(first + at_a_time, len(frame))) for first in bounds])
        for place in sorted(infinite):
            self._encode(place, frame)  # which says in which row
        return values, observed

    def _encode(self, place: int, frame: pd.DataFrame) -> tuple[FloatArray, BoolArray]:
        column = self.schema.columns[self.order[place]]
        return _encode_column(column, self.columns[place], frame[column.name])

    def _plain_cells(self, place: int, frame: pd.DataFrame) -> np.ndarray | None:
        """The cells of a real column as they lie in the frame, if they are plain numbers; None: they need care."""
        column, fitted = self.schema.columns[self.order[place]], self.columns[place]
        cells = frame[column.name]
        is_plain = isinstance(cells.dtype, np.dtype) and cells.dtype.kind in "fiu"
        if column.kind != "real" or not fitted.observed or not is_plain:
            return None
        return cells.to_numpy()

    def encode_conditions(self, frame: pd.DataFrame) -> tuple[IntArray, FloatArray]:
        """Class of each row (N,), -1 missing and K unknown, and standardised continuous conditions (N, Q)."""
        return self.schema.class_index_of(frame), self._continuous(frame)

    def _continuous(self, frame: pd.DataFrame) -> FloatArray:
        conditions = self.schema.continuous_conditions
        encoded = np.zeros((len(frame), len(conditions)))
        attributes = [self._attribute(condition, frame) for condition in self.schema.attributes]
        for q, condition in enumerate(conditions):
            cells = numeric_cells(frame[condition.name], condition.name)
            if np.isnan(cells).any():
                raise ConditionError(
                    f"condition {condition.name!r} is missing (NaN) in row {int(np.flatnonzero(np.isnan(cells))[0])}; "
                    "a conditional model never scores without its condition"
                )
            encoded[:, q] = (cells - self.continuous_center[q]) / self.continuous_scale[q]
        return np.column_stack([np.clip(encoded, -10.0, 10.0), *attributes])

    def _attribute(self, condition: Condition, frame: pd.DataFrame) -> FloatArray:
        """-1 and 1 for the two values of an attribute, (N,)."""
        found = level_cells(frame[condition.name], condition.name)
        codes = found.recode(condition.levels)
        wrong = np.flatnonzero((codes < 0) | (codes > 1))
        if wrong.size:
            cell = frame[condition.name].iloc[wrong[0]]
            raise ConditionError(
                f"condition {condition.name!r} is {cell!r} in row {wrong[0]}; it is {condition.levels[0]!r} or "
                f"{condition.levels[1]!r}"
            )
        return np.where(codes > 0, 1.0, -1.0)

    def decode(self, values: FloatArray, index: pd.Index | None = None, *, drawn: bool = False) -> pd.DataFrame:
        """Turn generated ``values`` (N, D), grouped columns, into a frame like the training table.

        What is expected of a black-and-white pixel is a probability, a float in [0, 1]; ``drawn`` says that
        the values are draws, and so black or white.
        """
        cells: dict[Name, Any] = {}
        for own, place, fitted in zip(self.slices, self.order, self.columns, strict=True):
            column = self.schema.columns[place]
            cells[column.name] = _decode_column(column, fitted, values[:, own], drawn)
        return pd.DataFrame({name: cells[name] for name in self.schema.names}, index=index)

    def ungroup(self, grouped: FloatArray) -> FloatArray:
        """Bring the last axis of ``grouped`` (…, D) back into the order of the schema."""
        ungrouped = np.empty_like(grouped)
        ungrouped[..., list(self.order)] = grouped
        return ungrouped

    def by_column(self, cells: FloatArray) -> FloatArray:
        """Sums over the cells (…, D) of every column, in the order of the schema."""
        starts = np.cumsum(self.widths) - self.widths
        sums = cells if self.n_cells == len(self.columns) else np.add.reduceat(cells, starts, axis=-1)
        return self.ungroup(sums)

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dump``."""
        return {
            "schema": self.schema.to_json(),
            "columns": [asdict(column) for column in self.columns],
            "order": list(self.order),
            "continuous_center": list(self.continuous_center),
            "continuous_scale": list(self.continuous_scale),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Encoder:
        """Inverse of `to_json`."""
        return cls(
            schema=Schema.from_json(data["schema"]),
            columns=tuple(FittedColumn(**{**c, "shape": tuple(c.get("shape", ()))}) for c in data["columns"]),
            order=tuple(data["order"]),
            continuous_center=tuple(data["continuous_center"]),
            continuous_scale=tuple(data["continuous_scale"]),
        )


def _fit_column(column: Column, cells: pd.Series, likelihood: str | None) -> FittedColumn:
    if column.image is not None:
        return _fit_image(column, cells, likelihood)
    head = likelihood or LIKELIHOODS_OF_KIND[column.kind][0]
    if column.kind in ("binary", "categorical"):
        observed = int(cells.notna().sum())
        return FittedColumn(column.name, head, max(len(column.levels), 1), observed=observed)
    values = numeric_cells(cells, column.name)
    present = values[~np.isnan(values)]
    mean = float(present.mean()) if present.size else 0.0
    center, scale = _center_and_scale(np.log1p(present) if column.kind == "count" else present)
    return FittedColumn(column.name, head, 0, center, scale, mean, int(present.size))


def _fit_image(column: Column, cells: pd.Series, likelihood: str | None) -> FittedColumn:
    """One location and scale for all pixels: their relation carries the picture."""
    assert column.image is not None
    head, shape = likelihood or LIKELIHOODS_OF_PIXELS[column.image.pixels][0], column.image.shape
    chosen = cells.iloc[:: max(1, len(cells) // MAX_IMAGES_FOR_SCALE)]
    found = read_images(chosen, column.image, column.name)
    present = found.values[found.observed].astype(np.float64)
    n_levels = 2 if head == "bernoulli" else 0
    if n_levels:
        return FittedColumn(column.name, head, n_levels, observed=int(present.size), shape=shape)
    center, scale = _center_and_scale(present)
    return FittedColumn(column.name, head, 0, center, scale, center, int(present.size), shape)


def _center_and_scale(values: FloatArray) -> tuple[float, float]:
    """Mean and standard deviation; a constant is given a thousandth of its size as scale."""
    values = values[~np.isnan(values)]
    if not values.size:
        return 0.0, 1.0
    largest = float(np.abs(values).max()) or 1.0
    center, scale = float((values / largest).mean()), float((values / largest).std())
    if scale <= 1e-9:
        constant = float(values[0])
        return constant, abs(constant) * 1e-3 or 1.0
    return center * largest, scale * largest


def _encode_column(column: Column, fitted: FittedColumn, cells: pd.Series) -> tuple[FloatArray, BoolArray]:
    if column.image is not None:
        return _encode_images(column, fitted, cells)
    if not fitted.observed:  # nothing is known of this column: it adds nothing
        return np.zeros(len(cells)), np.zeros(len(cells), dtype=np.bool_)
    if column.kind in ("binary", "categorical"):
        found = level_cells(cells, column.name)
        check_same_type(column.name, column.levels, found.levels)
        codes = found.recode(column.levels)
        unknown = np.where(codes == len(column.levels), fitted.n_levels, codes)
        return np.where(codes < 0, fitted.n_levels, unknown).astype(np.float64), codes >= 0
    values = numeric_cells(cells, column.name)
    observed = ~np.isnan(values)
    if column.kind == "count":
        check_counts(values, column.name)
        return np.where(observed, np.minimum(values, LARGEST_VALUE), 0.0), observed
    with np.errstate(over="ignore"):
        standard = (values - fitted.center) / fitted.scale
    return np.where(observed, np.clip(standard, -LARGEST_VALUE, LARGEST_VALUE), 0.0), observed


def _standardise(cells: FloatArray, center: FloatArray, scale: FloatArray) -> Iterator[tuple[int, BoolArray]]:
    """Make cells (D, N) in place what `_encode_column` makes of them; says which are there in columns that are not all.

    Columns with cells far out are among these.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        np.subtract(cells, center, out=cells)
        np.divide(cells, scale, out=cells)
        # Not so with NaN, either.
        plain = (cells.min(axis=1) >= -LARGEST_VALUE) & (cells.max(axis=1) <= LARGEST_VALUE)
    for i in np.flatnonzero(~plain).tolist():
        there = ~np.isnan(cells[i])
        cells[i] = np.where(there, np.clip(cells[i], -LARGEST_VALUE, LARGEST_VALUE), 0.0)
        yield i, there


def _encode_images(column: Column, fitted: FittedColumn, cells: pd.Series) -> tuple[Any, BoolArray]:
    assert column.image is not None
    found = read_images(cells, column.image, column.name)
    standard = (found.values - np.float32(fitted.center)) / np.float32(fitted.scale)
    return np.where(found.observed, standard, np.float32(0.0)), found.observed


def _decode_column(column: Column, fitted: FittedColumn, values: FloatArray, drawn: bool) -> Any:
    if column.image is not None:
        images = to_images(values * fitted.scale + fitted.center, column.image)
        return as_cells(images > 0.5 if drawn and column.image.pixels == "bool" else images)
    values = values[:, 0]
    if column.kind in ("binary", "categorical"):
        codes = np.clip(values, 0, max(len(column.levels) - 1, 0)).astype(np.int64)
        return _level_array(column.levels)[codes] if column.levels else np.full(len(values), np.nan)
    if column.kind == "count":
        return values.astype(np.int64) if drawn else values
    return values * fitted.scale + fitted.center if fitted.observed else np.full(len(values), np.nan)


def _level_array(levels: Sequence[Level]) -> np.ndarray[Any, np.dtype[Any]]:
    if len({type(level) for level in levels}) == 1 and not isinstance(levels[0], str):
        return np.array(levels)
    return np.array(levels, dtype=object)
