"""Tables as they come: pandas, Arrow or numpy in, a pandas frame with checked cells out."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pandas as pd

from anomaly_cvae.errors import DataError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
Level = str | int | float | bool
CellType = Literal["boolean", "integer", "float", "string", "empty"]

_CELL_TYPES: dict[str, CellType] = {
    "boolean": "boolean",
    "integer": "integer",
    "floating": "float",
    "mixed-integer-float": "float",
    "decimal": "float",
    "string": "string",
    "empty": "empty",
}
_REMEDIES = {
    "datetime": "derive numbers from it (hour, weekday, age in days) or ignore it (ignore_columns, --ignore)",
    "timedelta": "turn it into a number (`.dt.total_seconds()`) or ignore it (ignore_columns, --ignore)",
    "complex": "Complex data not supported: give its real and imaginary part as two columns",
    "other": "convert it to one type (all numbers or all text) or ignore it (ignore_columns, --ignore)",
}


def is_table(data: object) -> bool:
    """Whether ``data`` has named columns: a pandas frame, an Arrow table or anything with ``to_pandas``."""
    return isinstance(data, pd.DataFrame) or (hasattr(data, "to_pandas") and hasattr(data, "columns"))


def to_frame(table: Any) -> pd.DataFrame:
    """Return ``table`` as a pandas frame; pandas frames pass through untouched.

    Raises
    ------
    DataError
        If two columns have the same name.
    """
    frame = table if isinstance(table, pd.DataFrame) else _from_arrow(table)
    if isinstance(frame.columns, pd.MultiIndex):
        raise DataError("column names have several levels; flatten them (`df.columns.map('_'.join)`)")
    if not frame.columns.is_unique:
        names = frame.columns[frame.columns.duplicated()].unique().tolist()
        raise DataError(f"column names appear more than once: {names}; rename or drop the copies")
    return frame


def _from_arrow(table: Any) -> pd.DataFrame:
    """Arrow or polars to pandas; whole numbers stay whole where cells are missing."""
    if type(table).__module__.startswith("pyarrow"):
        return cast(pd.DataFrame, table.to_pandas(types_mapper=_whole_numbers))
    return cast(pd.DataFrame, table.to_pandas())


def _whole_numbers(arrow_type: object) -> pd.Int64Dtype | None:
    return pd.Int64Dtype() if str(arrow_type).startswith(("int", "uint")) else None


def cell_type(cells: pd.Series, name: object) -> CellType:
    """Say what the cells of one column are, or refuse them with the remedy.

    Raises
    ------
    DataError
        For datetimes, durations, complex numbers, bytes and cells of mixed type.
    """
    dtype = cells.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        return cell_type(pd.Series(dtype.categories), name)
    if str(dtype).startswith("dictionary"):  # an Arrow dictionary that pandas carries along
        return cell_type(cells.astype(object), name)
    if pd.api.types.is_bool_dtype(dtype):
        return "boolean"
    if pd.api.types.is_integer_dtype(dtype):
        return "integer"
    if pd.api.types.is_float_dtype(dtype):
        return "float"
    inferred = pd.api.types.infer_dtype(cells, skipna=True)
    if inferred in _CELL_TYPES:
        return _CELL_TYPES[inferred]
    raise DataError(f"column {name!r} {_what_is_wrong(cells, inferred)}")


def _what_is_wrong(cells: pd.Series, inferred: str) -> str:
    if inferred.startswith("date") or inferred in ("period", "time"):
        return f"holds datetimes; {_REMEDIES['datetime']}"
    if inferred.startswith("timedelta"):
        return f"holds durations; {_REMEDIES['timedelta']}"
    if inferred == "complex":
        return f"holds complex numbers; {_REMEDIES['complex']}"
    types = sorted({type(cell).__name__ for cell in cells.dropna().head(10_000)})
    return f"holds cells of type {' and '.join(types)}; {_REMEDIES['other']}"


def numeric_cells(cells: pd.Series, name: object) -> FloatArray:
    """Return one column as float64 with NaN where a cell is missing, shape (N,).

    Raises
    ------
    DataError
        If a cell is not a number or is infinite; the first such row is named (counted from 0).
    """
    if isinstance(cells.dtype, np.dtype) and cells.dtype.kind in "fiu":
        return _without_infinity(cells.to_numpy(dtype=np.float64), name)
    if cells.isna().all():
        return np.full(len(cells), np.nan)
    if isinstance(cells.dtype, pd.CategoricalDtype):
        cells = cells.astype(object)
    if cell_type(cells, name) == "string":
        first = cells.dropna().iloc[0]
        raise DataError(
            f"column {name!r} must be numeric but holds text, for instance {first!r}; convert it to numbers"
        )
    try:
        values = cells.to_numpy(dtype=np.float64, na_value=np.nan)
    except (TypeError, ValueError):  # decimals and other number-like objects
        values = pd.to_numeric(cells).to_numpy(dtype=np.float64, na_value=np.nan)
    return _without_infinity(values, name)


def _without_infinity(values: FloatArray, name: object) -> FloatArray:
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(values.sum()):  # one quick pass: a sum is finite only if every cell is
            return values
    infinite = np.flatnonzero(np.isinf(values))
    if infinite.size:
        raise DataError(
            f"column {name!r} has {'inf' if values[infinite[0]] > 0 else '-inf'} (infinity) in row "
            f"{infinite[0]}; {infinite.size} such cell(s): correct them, or set them to NaN to have them "
            "treated as missing"
        )
    return values


@dataclass(frozen=True, slots=True)
class LevelCells:
    """One column as codes into its distinct levels; code -1 is a missing cell."""

    codes: IntArray
    levels: tuple[Level, ...]

    def recode(self, levels: tuple[Level, ...]) -> IntArray:
        """Codes into another list of levels: ``len(levels)`` for one that is not in it, -1 for missing."""
        position = {level: code for code, level in enumerate(levels)}
        table = np.array([*(position.get(level, len(levels)) for level in self.levels), -1], dtype=np.int64)
        return table[self.codes]


def level_cells(cells: pd.Series, name: object) -> LevelCells:
    """Return one column as codes and levels, whatever its dtype; 1, 1.0 and ``np.int64(1)`` are one level."""
    cell_type(cells, name)
    codes, uniques = pd.factorize(cells)
    return LevelCells(codes.astype(np.int64), tuple(canonical_level(level) for level in uniques))


def canonical_level(value: Any) -> Level:
    """Return a level as the plain Python value under which it is stored and compared."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Decimal):
        value = float(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, (str, bool, int, float)):
        return value
    return str(value)
