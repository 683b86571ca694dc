"""Which rows are known to be anomalies: one column of the table read by a stated rule."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from anomaly_cvae.errors import DataError
from anomaly_cvae.frames import BoolArray, Level, canonical_level, cell_type, level_cells, numeric_cells

ANOMALY, NORMAL, UNKNOWN, LEFT_OUT = 1, 0, -1, -2

_COMPARISONS: dict[str, Callable[[npt.NDArray[np.float64], float], BoolArray]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_COMPARISON = re.compile(r"\s*(<=|>=|<|>)\s*([-+]?\d*\.?\d+(?:[eE][-+]?\d+)?)\s*")
_TRUE = {"1", "true", "yes", "anomaly", "anomalous"}
_FALSE = {"0", "false", "no", "normal"}


@dataclass(frozen=True)
class Labels:
    """What a label column says of each row, and by which rule it was read.

    ``status`` (N,) is `ANOMALY`, `NORMAL`, `UNKNOWN` (no label) or `LEFT_OUT` (neither, by the rule).
    """

    status: npt.NDArray[np.int8]
    rule: str

    @property
    def is_anomaly(self) -> BoolArray:
        """Rows labelled as anomalies, (N,)."""
        return self._is(ANOMALY)

    @property
    def is_known(self) -> BoolArray:
        """Rows labelled either way, (N,)."""
        return self._is(ANOMALY) | self._is(NORMAL)

    def count(self, status: int) -> int:
        """Rows of this status."""
        return int(self._is(status).sum())

    def _is(self, status: int) -> BoolArray:
        equal: BoolArray = self.status == status
        return equal


def read_labels(
    cells: pd.Series,
    name: object,
    anomaly: Sequence[Level] | None = None,
    normal: Sequence[Level] | None = None,
    *,
    strict: bool = True,
) -> Labels:
    """Read a label column.

    ``anomaly`` and ``normal`` are values (``["R2L", "DoS"]``) or one comparison (``["> 50 and <= 75"]``).
    With one of the two, every other row is of the other kind; with both, rows that are neither are left out.
    With none, 1 and True, and words such as "anomaly", mean an anomaly. A missing label is unknown.
    ``strict``: at least one of the values named must occur.

    Raises
    ------
    DataError
        If the column's values do not say which of them means an anomaly, or a named one does not occur.
    """
    missing = cells.isna().to_numpy()
    if anomaly is None and normal is None:
        is_anomaly, rule = _obvious(cells, name)
        is_normal = ~is_anomaly
    elif normal is None:
        assert anomaly is not None
        is_anomaly, rule = _matches(cells, name, anomaly, strict), f"{name!r} {_words(anomaly)} means an anomaly"
        is_normal = ~is_anomaly
    elif anomaly is None:
        is_normal = _matches(cells, name, normal, strict)
        is_anomaly, rule = ~is_normal, f"{name!r} {_words(normal)} means normal, anything else an anomaly"
    else:
        is_anomaly = _matches(cells, name, anomaly, strict)
        is_normal = _matches(cells, name, normal, strict)
        rule = f"{name!r} {_words(anomaly)} means an anomaly, {_words(normal)} normal, other rows are left out"
        both = np.flatnonzero(is_anomaly & is_normal)
        if both.size:
            raise DataError(
                f"label {name!r} is {canonical_level(cells.iloc[both[0]])!r} in row {both[0]}: both normal and anomaly"
            )
    rule += _absent(cells, name, anomaly) + _absent(cells, name, normal)
    status = np.select([missing, is_anomaly, is_normal], [UNKNOWN, ANOMALY, NORMAL], LEFT_OUT).astype(np.int8)
    return Labels(status, rule)


def _obvious(cells: pd.Series, name: object) -> tuple[BoolArray, str]:
    if cells.isna().all():
        return np.zeros(len(cells), dtype=np.bool_), f"{name!r} has no value at all"
    found = level_cells(cells, name)
    words = {level: str(level).strip().lower() for level in found.levels}
    unclear = [level for level, word in words.items() if word not in _TRUE | _FALSE]
    if unclear:
        shown = ", ".join(map(repr, sorted(map(str, found.levels))[:8])) + (" …" if len(found.levels) > 8 else "")
        raise DataError(
            f"label {name!r} has the values {shown}: say which of them mean an anomaly (--anomaly VALUE), or which "
            "mean normal (--normal VALUE)"
        )
    yes = [level for level, word in words.items() if word in _TRUE]
    meaning = _words(yes) if yes else "1 or True (it does not occur)"
    return _is_one_of(cells, name, yes), f"{name!r} {meaning} means an anomaly"


def _matches(cells: pd.Series, name: object, values: Sequence[Level], strict: bool) -> BoolArray:
    comparisons = _comparisons(values)
    if comparisons:
        numbers = numeric_cells(cells, name)
        result = np.ones(len(cells), dtype=np.bool_)
        for compare, bound in comparisons:
            result &= compare(np.where(np.isnan(numbers), np.nan, numbers), bound)
        return result
    return _is_one_of(cells, name, _as_in(cells, name, values, strict))


def _comparisons(values: Sequence[Level]) -> list[tuple[Callable[..., BoolArray], float]]:
    if len(values) != 1 or not isinstance(values[0], str):
        return []
    parts = [_COMPARISON.fullmatch(part) for part in values[0].split(" and ")]
    if any(part is None for part in parts):
        return []
    return [(_COMPARISONS[part.group(1)], float(part.group(2))) for part in parts if part is not None]


def _as_in(cells: pd.Series, name: object, values: Sequence[Level], strict: bool) -> list[Level]:
    """The named values as the column spells them: "1" on a command line is the number 1, or True."""
    levels = level_cells(cells, name).levels
    spelled = {str(level).lower() if isinstance(level, bool) else str(level): level for level in levels}
    truth = {"1": "true", "0": "false"} if any(isinstance(level, bool) for level in levels) else {}
    asked = [str(canonical_level(value)) for value in values]
    asked = [truth.get(word, word.lower() if truth else word) for word in asked]
    found = [spelled[word] for word in asked if word in spelled]
    if strict and not found and levels:
        hint = "; a comparison is written as one value: '> 10 and <= 90'" if any(w[:1] in "<>" for w in asked) else ""
        shown = ", ".join(map(str, sorted(map(str, levels))[:10]))
        raise DataError(f"label {name!r} has no value {', '.join(map(repr, values))}; it has {shown}{hint}")
    return found


def _is_one_of(cells: pd.Series, name: object, levels: Sequence[Level]) -> BoolArray:
    cell_type(cells, name)
    found = level_cells(cells, name)
    chosen = np.array([*(level in levels for level in found.levels), False], dtype=np.bool_)
    return chosen[found.codes]


def _words(values: Sequence[Level]) -> str:
    if _comparisons(values):
        return str(values[0])
    return "= " + " or ".join(map(repr, values))


def _absent(cells: pd.Series, name: object, values: Sequence[Level] | None) -> str:
    """What to add to the rule when a value that was named does not occur: it may be misspelt."""
    if values is None or _comparisons(values):
        return ""
    absent = [value for value in values if not _as_in(cells, name, [value], strict=False)]
    return f" ({', '.join(map(repr, absent))} does not occur)" if absent else ""
