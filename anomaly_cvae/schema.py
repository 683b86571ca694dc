"""What the columns and conditions of a table are; inferred from the first rows seen, reported, overridable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, cast, get_args

import numpy as np
import pandas as pd

from anomaly_cvae.errors import ConditionError, DataError, ParameterError
from anomaly_cvae.frames import CellType, IntArray, Level, LevelCells, cell_type, level_cells, numeric_cells
from anomaly_cvae.images import ImageFormat, holds_images, image_format

Name = str | int
Kind = Literal["real", "binary", "categorical", "count", "pixel"]
ConditionKind = Literal["categorical", "continuous", "attribute"]

MAX_LEVELS = 1_000
"""A text column with more distinct values than this is taken for free text or an identifier."""
CONSTANT = "constant"
LEAST_ROW_NUMBERS = 50
"""Fewer whole numbers may differ by chance."""
MOST_SPREAD_OF_ROW_NUMBERS = 2
"""Times their number: part of a table's rows may have gone elsewhere."""
MAX_NUMERIC_CLASSES = 50
"""A numeric condition with more distinct values than this is taken for a continuous one."""
MAX_CLASSES = 1_000
"""A condition of more classes than this is no context but an identifier."""
MAX_TWO_VALUED = 4
"""More two-valued conditions than this are attributes: each is told to the networks, none spans classes."""
LARGEST_COUNT = 1e6
"""Whole numbers beyond this are modelled as real: a count's distribution says nothing useful there."""


@dataclass(frozen=True, slots=True)
class Column:
    """One variable of x: what its cells are, and why they were taken for that; ``image`` for kind "pixel"."""

    name: Name
    kind: Kind
    levels: tuple[Level, ...] = ()
    missing_fraction: float = 0.0
    reason: str = ""
    image: ImageFormat | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Column:
        """Inverse of `dataclasses.asdict`."""
        image = data.get("image")
        image = None if image is None else ImageFormat.from_json(image)
        return cls(**{**data, "levels": tuple(data["levels"]), "image": image})


@dataclass(frozen=True, slots=True)
class Condition:
    """One variable of the condition c.

    A categorical one spans classes; an attribute is one of many two-valued ones, which do not: forty of them
    would make 2^40 classes.
    """

    name: Name
    kind: ConditionKind
    levels: tuple[Level, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Schema:
    """Columns of x, conditions, and the classes (combinations of condition levels) seen in training."""

    columns: tuple[Column, ...]
    conditions: tuple[Condition, ...] = ()
    classes: tuple[tuple[Level, ...], ...] = ((),)
    ignored: tuple[Name, ...] = ()
    _position: dict[tuple[Level, ...], int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_position", {levels: code for code, levels in enumerate(self.classes)})

    @property
    def names(self) -> list[Name]:
        """Names of the columns of x."""
        return [column.name for column in self.columns]

    @property
    def categorical_conditions(self) -> tuple[Condition, ...]:
        """The conditions that span the classes."""
        return tuple(c for c in self.conditions if c.kind == "categorical")

    @property
    def continuous_conditions(self) -> tuple[Condition, ...]:
        """The conditions that are numbers."""
        return tuple(c for c in self.conditions if c.kind == "continuous")

    @property
    def attributes(self) -> tuple[Condition, ...]:
        """The two-valued conditions that span no classes."""
        return tuple(c for c in self.conditions if c.kind == "attribute")

    @property
    def images(self) -> tuple[Column, ...]:
        """The columns of images."""
        return tuple(c for c in self.columns if c.image is not None)

    @property
    def class_names(self) -> list[str]:
        """One label per class, for instance ``"L"`` or ``"tcp, http"``; ``"all"`` without classes."""
        names = [", ".join(str(level) for level in levels) or "all" for levels in self.classes]
        if len(set(names)) == len(names):
            return names
        # Levels that hold a comma themselves, or 1 beside "1": quotes tell them apart.
        return [", ".join(repr(level) for level in levels) for levels in self.classes]

    def class_index(self, cells: Sequence[LevelCells]) -> IntArray:
        """Return the class of each row, shape (N,): -1 for a missing condition, K for one not seen."""
        if not cells:
            raise ValueError("class_index needs at least one categorical condition")
        if len(cells) == 1:
            codes = cells[0].codes
            lookup = np.array([self._class_of((code,), cells) for code in range(len(cells[0].levels))], dtype=np.int64)
            return np.where(codes < 0, -1, lookup[codes]) if len(lookup) else np.full(len(codes), -1, dtype=np.int64)
        codes, combinations = pd.factorize(pd.MultiIndex.from_arrays([c.codes for c in cells]))
        lookup = np.array([self._class_of(combination, cells) for combination in combinations], dtype=np.int64)
        return lookup[codes]

    def class_index_of(self, frame: pd.DataFrame) -> IntArray:
        """The same, from the conditions' columns in ``frame``; all 0 without a categorical condition."""
        conditions = self.categorical_conditions
        if not conditions:
            return np.zeros(len(frame), dtype=np.int64)
        cells = [level_cells(frame[c.name], c.name) for c in conditions]
        for condition, found in zip(conditions, cells, strict=True):
            check_same_type(condition.name, condition.levels, found.levels)
        return self.class_index(cells)

    def _class_of(self, combination: tuple[int, ...], cells: Sequence[LevelCells]) -> int:
        if min(combination) < 0:
            return -1
        levels = tuple(c.levels[code] for c, code in zip(cells, combination, strict=True))
        return self._position.get(levels, len(self.classes))

    def report(self) -> pd.DataFrame:
        """One row per column and condition: what it was taken for and why."""
        rows = [
            {"name": c.name, "role": role, "kind": c.kind, "levels": len(c.levels) or "", "reason": c.reason}
            for role, members in (("column", self.columns), ("condition", self.conditions))
            for c in members
        ]
        rows += [{"name": n, "role": "ignored", "kind": "", "levels": "", "reason": ""} for n in self.ignored]
        return pd.DataFrame(rows).set_index("name")

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dump``."""
        return {
            "columns": [asdict(c) for c in self.columns],
            "conditions": [asdict(c) for c in self.conditions],
            "classes": [list(levels) for levels in self.classes],
            "ignored": list(self.ignored),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Schema:
        """Inverse of `to_json`."""
        return cls(
            columns=tuple(Column.from_json(c) for c in data["columns"]),
            conditions=tuple(Condition(**{**c, "levels": tuple(c["levels"])}) for c in data["conditions"]),
            classes=tuple(tuple(levels) for levels in data["classes"]),
            ignored=tuple(data["ignored"]),
        )


def image_of(column: Column) -> ImageFormat:
    """The format of a column of images."""
    assert column.image is not None
    return column.image


def infer_column(cells: pd.Series, name: Name, asked: str | None = None) -> Column:
    """Say what one column of x is, from its cells, unless ``asked`` says so already.

    Raises
    ------
    DataError
        For datetimes, free text, identifiers and mixed cells; the message names the column and the remedy.
    """
    if asked is not None and asked not in get_args(Kind):
        raise ParameterError(f"column_kinds[{name!r}] is {asked!r}; use one of {', '.join(get_args(Kind))}")
    missing = float(cells.isna().mean()) if len(cells) else 0.0
    if asked == "pixel" or (asked is None and holds_images(cells)):
        image = image_format(cells, name)
        return Column(name, "pixel", (), missing, "asked for" if asked else f"images, {image}", image)
    content = cell_type(cells, name)
    kind, reason = (cast(Kind, asked), "asked for") if asked else _infer_kind(cells, name, content)
    if kind in ("real", "count") and content == "string" and cells.notna().any():
        raise DataError(f"column {name!r} holds text and cannot be {kind}; convert it to numbers")
    levels: tuple[Level, ...] = ()
    if kind in ("binary", "categorical"):
        levels = _sorted_levels(level_cells(cells, name).levels)
        if kind == "binary" and len(levels) > 2:
            raise DataError(f"column {name!r} cannot be binary: it has {len(levels)} levels")
    if kind == "count":
        check_counts(numeric_cells(cells, name), name)
    return Column(name, kind, levels, missing, reason)


def check_counts(values: np.ndarray[Any, np.dtype[np.float64]], name: Name) -> None:
    """Refuse negative and fractional counts.

    Raises
    ------
    DataError
        Naming the first row that is not a count.
    """
    wrong = np.flatnonzero((values < 0) | (values != np.round(values)) & ~np.isnan(values))
    if wrong.size:
        raise DataError(
            f"column {name!r} is a count but has {values[wrong[0]]} in row {wrong[0]}; correct it, or train "
            f"with column_kinds={{{name!r}: 'real'}}"
        )


def _infer_kind(cells: pd.Series, name: Name, content: CellType) -> tuple[Kind, str]:
    if cells.isna().all():
        return "real", "no value in training: adds nothing to the score"
    if content == "boolean":
        return "binary", "true or false"
    if isinstance(cells.dtype, pd.CategoricalDtype) or content == "string":
        return _infer_text(cells, name)
    values = numeric_cells(cells, name)
    present = values[~np.isnan(values)]
    if set(np.unique(present[:10_000])) <= {0.0, 1.0} and np.isin(present, (0.0, 1.0)).all():
        if present.min() == present.max():
            return "real", CONSTANT
        return "binary", "only 0 and 1"
    if content == "integer":
        return _infer_whole(present)
    return "real", CONSTANT if present.min() == present.max() else "floating-point numbers"


def _infer_text(cells: pd.Series, name: Name) -> tuple[Kind, str]:
    distinct, present = cells.nunique(), int(cells.notna().sum())
    if distinct > MAX_LEVELS or (distinct > 50 and distinct > 0.5 * present):
        raise DataError(
            f"column {name!r} looks like free text or an identifier ({distinct:,} distinct values in "
            f"{present:,} rows); ignore it (ignore_columns, --ignore), or force "
            f"column_kinds={{{name!r}: 'categorical'}} (--kind {name!r}=categorical)"
        )
    return "categorical", f"text or categories, {distinct} levels"


def _infer_whole(present: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[Kind, str]:
    if present.min() == present.max():
        return "real", CONSTANT
    if present.min() < 0:
        return "real", "whole numbers, some negative"
    if present.max() > LARGEST_COUNT:
        return "real", f"whole numbers beyond {LARGEST_COUNT:,.0f}"
    # A Poisson variable has variance = mean and a negative binomial one more; less is no count.
    if present.var() < 0.5 * present.mean():
        return "real", "whole numbers spread less than counts are"
    return "count", "whole numbers from 0 up"


def is_row_number(cells: pd.Series, name: Name) -> bool:
    """Whether cells are whole numbers without a repeat, most of those between the least and the largest, as of rows."""
    if len(cells) < LEAST_ROW_NUMBERS or cell_type(cells, name) != "integer" or cells.isna().any():
        return False
    values = numeric_cells(cells, name)
    is_dense = values.max() - values.min() < MOST_SPREAD_OF_ROW_NUMBERS * len(values)
    return bool(is_dense and len(np.unique(values)) == len(values))


def infer_condition(cells: pd.Series, name: Name, asked: str | None = None, may_miss: bool = False) -> Condition:
    """Say what one condition is: text, categories, booleans and few whole numbers span classes.

    ``may_miss``: training has a use for rows without a condition.

    Raises
    ------
    ConditionError
        If a cell is missing.
    """
    if asked is not None and asked not in get_args(ConditionKind):
        raise ParameterError(
            f"column_kinds[{name!r}] is {asked!r}; a condition is {', '.join(get_args(ConditionKind))}"
        )
    content = cell_type(cells, name)
    if cells.isna().any() and not may_miss:
        row = int(np.flatnonzero(cells.isna().to_numpy())[0])
        raise ConditionError(
            f"condition {name!r} is missing (NaN) in row {row}; fill it or drop the row for training (or learn from "
            "rows without it: objective='semi_supervised')"
        )
    if cells.isna().all():
        raise ConditionError(f"condition {name!r} is missing in every row; give some rows one, or train without it")
    cells = cells.dropna()
    kind, reason = ("", "asked for") if asked else _infer_condition_kind(cells, name, content)
    kind = asked or kind
    if kind == "continuous":
        numeric_cells(cells, name)
        return Condition(name, "continuous", (), reason)
    levels = _sorted_levels(level_cells(cells, name).levels)
    if kind == "attribute" and len(levels) != 2:
        raise ConditionError(
            f"condition {name!r} cannot be an attribute: it has {len(levels)} value(s), {list(levels[:5])}, not two"
        )
    return Condition(name, cast(ConditionKind, kind), levels, reason)


def as_attributes(conditions: Sequence[Condition], kinds: Mapping[Name, str]) -> tuple[Condition, ...]:
    """The conditions, with two-valued ones as attributes where there are more than `MAX_TWO_VALUED` of them.

    ``kinds`` says what was asked for: those stay what they are.
    """
    free = [c for c in conditions if c.kind == "categorical" and len(c.levels) == 2 and c.name not in kinds]
    if len(free) <= MAX_TWO_VALUED:
        return tuple(conditions)
    reason = f"one of {len(free)} two-valued conditions"
    return tuple(replace(c, kind="attribute", reason=reason) if c in free else c for c in conditions)


def _infer_condition_kind(cells: pd.Series, name: Name, content: CellType) -> tuple[str, str]:
    if content in ("string", "boolean", "empty") or isinstance(cells.dtype, pd.CategoricalDtype):
        return "categorical", "text, categories or booleans"
    values = np.unique(numeric_cells(cells, name))
    if np.array_equal(values, np.round(values)) and len(values) <= MAX_NUMERIC_CLASSES:
        return "categorical", f"{len(values)} distinct whole numbers"
    return "continuous", f"{len(values):,} distinct numbers"


def check_same_type(name: Name, known: Sequence[Level], found: Sequence[Level]) -> None:
    """A text column that suddenly holds numbers, or the reverse, is a mix-up, not a table full of unknown levels.

    Raises
    ------
    DataError
        Naming the column, and a level of each kind.
    """
    if not known or not found:
        return
    was_text, is_text = ({isinstance(level, str) for level in levels} for levels in (known, found))
    if was_text == {True} and is_text == {False}:
        raise DataError(
            f"column {name!r} held text in training (such as {known[0]!r}) but holds numbers, such as "
            f"{found[0]!r}; check the columns, or convert it to text"
        )
    if was_text == {False} and is_text == {True}:
        raise DataError(
            f"column {name!r} held numbers in training (such as {known[0]!r}) but holds text, such as "
            f"{found[0]!r}; check the columns, or convert it to numbers"
        )


def observed_classes(cells: Sequence[LevelCells], names: Sequence[Name] = ()) -> tuple[tuple[Level, ...], ...]:
    """Return the combinations of condition levels that occur, sorted; ``((),)`` without conditions.

    Raises
    ------
    ConditionError
        If there are more than `MAX_CLASSES`.
    """
    if not cells:
        return ((),)
    complete = np.all([c.codes >= 0 for c in cells], axis=0)
    combinations = pd.MultiIndex.from_arrays([c.codes[complete] for c in cells]).unique()
    if len(combinations) > MAX_CLASSES:
        raise ConditionError(
            f"the condition {', '.join(map(repr, names))} has {len(combinations):,} classes, more than "
            f"{MAX_CLASSES:,}: it looks like an identifier; "
            "group its rare values, name a coarser column, or ignore it"
        )
    found = (tuple(c.levels[code] for c, code in zip(cells, codes, strict=True)) for codes in combinations)
    return tuple(sorted(found, key=lambda levels: [_sort_key(level) for level in levels]))


def _sorted_levels(levels: tuple[Level, ...]) -> tuple[Level, ...]:
    return tuple(sorted(levels, key=_sort_key))


def _sort_key(level: Level) -> tuple[bool, float, str]:
    return (True, 0.0, level) if isinstance(level, str) else (False, float(level), "")
