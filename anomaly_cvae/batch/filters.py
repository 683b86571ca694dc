"""Which rows of a file are wanted: a small language of comparisons, checked against the columns, given to Arrow.

What a cell that is missing makes unknown is left out, as in SQL: neither ``x > 1`` nor ``not x > 1`` takes such a
row. The expression is built in negation normal form, so that NaN in a column of numbers is missing, too.
"""

from __future__ import annotations

import ast
import io
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import IO, Any, Literal

import numpy as np
import pandas as pd

from anomaly_cvae.batch.csv_text import CsvFormat, as_levels, as_numbers
from anomaly_cvae.errors import MissingDependencyError, ParameterError
from anomaly_cvae.inputs import nearest

CellKind = Literal["number", "text", "truth", "time", "other"]
SAID: dict[CellKind, str] = {
    "number": "numbers", "text": "text", "truth": "truth values", "time": "times", "other": "cells that have no order",
}  # fmt: skip
EXAMPLE = "machine == 'M' and (rpm > 1200 or torque is null)"
ROW = "\0row"
"""Carries the number of a row through a filter; no column of a file has this name."""

_QUOTED = re.compile(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"|`([^`]*)`")
_TRUTH = {"true": True, "false": False}
_NULL = ("null", "none")
_NEGATED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
_COMPARED: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: lambda a, b: a == b, ast.NotEq: lambda a, b: a != b, ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b, ast.Gt: lambda a, b: a > b, ast.GtE: lambda a, b: a >= b,
}  # fmt: skip


@dataclass(frozen=True)
class Where:
    """A parsed filter, such as ``machine == 'M' and rpm > 1200``; made by `Where.parse`.

    ``columns`` are those that it names, ``said`` what the text takes each one for, where it says so: "number", "text"
    or "truth".
    """

    text: str
    tree: ast.expr = field(repr=False, compare=False)
    names: Mapping[int, str] = field(repr=False, compare=False)
    columns: tuple[str, ...]
    said: Mapping[str, CellKind] = field(compare=False)

    @classmethod
    def parse(cls, text: str) -> Where:
        """The filter that ``text`` says.

        Raises
        ------
        ParameterError
            Where it says what is no filter, with the place.
        """
        text = text.strip()
        source, names = _without_backticks(text)
        try:
            tree = ast.parse(source, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            at = getattr(error, "offset", None)
            place = f" at character {at}, near {_near(text, at)!r}" if at else ""
            raise ParameterError(f"where: {text!r} cannot be read{place}; write it like {EXAMPLE!r}") from error
        reader = _Reader(text, source, names)
        reader.condition(tree)
        return cls(text, tree, names, tuple(dict.fromkeys(reader.columns)), reader.said)

    def require(self, there: Collection[str]) -> None:
        """Refuse to filter by a column that a table does not have.

        Raises
        ------
        ParameterError
            Naming the column and the nearest one that is there.
        """
        absent = [name for name in self.columns if name not in there]
        if absent:
            raise ParameterError(f"where: the table has no column {absent[0]!r}{nearest(absent[0], there)}")

    def expression(self, schema: Any) -> Any:
        """A `pyarrow.compute.Expression` for tables of an Arrow ``schema``.

        Raises
        ------
        ParameterError
            If a column is not there, or is compared with what it does not hold.
        """
        self.require(schema.names)
        return _Builder(self, schema).condition(self.tree, negated=False)

    def rows_of(self, table: Any) -> np.ndarray:
        """Numbers (n,) of the rows of an Arrow table that are wanted, ascending.

        Raises
        ------
        ParameterError
            As `expression` does.
        """
        arrow = _pyarrow()
        expression, narrow = self.expression(table.schema), table.select(list(self.columns))
        numbered = narrow.append_column(ROW, arrow.array(np.arange(len(table))))
        rows: np.ndarray = numbered.filter(expression)[ROW].to_numpy()
        return rows

    def text_table(
        self,
        cells: pd.DataFrame,
        form: CsvFormat,
        levels: Mapping[str, Collection[str]],
        numbers: Collection[str],
        start: int = 0,
    ) -> Any:
        """An Arrow table of the columns named, from cells of text.

        A column is text where its ``levels`` are known, a number where it is among ``numbers``, else what it is
        compared with. ``start`` is the number of the first row, for messages.

        Raises
        ------
        DataError
            If a cell is not of that kind; names column, cell and row.
        """
        arrow, columns = _pyarrow(), {}
        for name in self.columns:
            said = self.said.get(name, "text")
            if name in levels or (name not in numbers and said == "text"):
                text = as_levels(cells[name], levels.get(name, ()))
                columns[name] = arrow.array(text, type=arrow.string(), from_pandas=True)
                continue
            found = arrow.array(as_numbers(cells[name], form, start), from_pandas=True)
            nothing = found.null_count == len(found) and said == "truth"
            columns[name] = arrow.nulls(len(found), arrow.bool_()) if nothing else found
        return arrow.table(columns)


def row_groups(content: IO[bytes], expression: Any) -> list[int]:
    """Numbers of the row groups of an open Parquet file whose statistics do not rule out the expression."""
    from pyarrow import dataset

    fragment = dataset.ParquetFileFormat().make_fragment(content)
    return [group.id for group in fragment.subset(filter=expression).row_groups]


@dataclass
class _Reader:
    """Walks a parsed text, refuses what is no filter, and notes which columns it names."""

    text: str
    source: str
    names: Mapping[int, str]
    columns: list[str] = field(default_factory=list)
    said: dict[str, CellKind] = field(default_factory=dict)

    def condition(self, node: ast.expr) -> None:
        if isinstance(node, ast.BoolOp):
            for part in node.values:
                self.condition(part)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            self.condition(node.operand)
        elif isinstance(node, ast.Compare):
            self.comparison(node)
        elif isinstance(node, ast.Name) and not _is_word(node):
            self.columns.append(_name(node, self.names))
            self.said.setdefault(self.columns[-1], "truth")
        else:
            raise self.refused(node, "is no condition")

    def comparison(self, node: ast.Compare) -> None:
        for left, operator, right in _pairs(node):
            if isinstance(operator, (ast.Is, ast.IsNot)):
                if not _is_null(right):
                    raise self.refused(right, "stands where 'is null' or 'is not null' would")
                self.column(left)
                continue
            if isinstance(operator, (ast.In, ast.NotIn)):
                if not isinstance(right, (ast.List, ast.Tuple, ast.Set)) or not right.elts:
                    raise self.refused(right, "is no list; write it like ['a', 'b']")
                self.note(self.column(left), {self.literal(value) for value in right.elts}, right)
                continue
            sides = [side for side in (left, right) if _is_column(side)]
            if len(sides) != 1:
                raise self.refused(node, "compares no column with a value")
            value = right if sides[0] is left else left
            self.note(self.column(sides[0]), {self.literal(value)}, value)

    def column(self, node: ast.expr) -> str:
        if not _is_column(node):
            raise self.refused(node, "is no column; write a name with blanks or dots in `backticks`")
        assert isinstance(node, ast.Name)
        self.columns.append(_name(node, self.names))
        return self.columns[-1]

    def literal(self, node: ast.expr) -> CellKind:
        """The kind of a value."""
        if _is_null(node):
            raise self.refused(node, "is equal to nothing; write 'is null' or 'is not null'")
        try:
            return _kind_of_value(_value(node))
        except (TypeError, ValueError) as error:
            raise self.refused(node, "is no number, text in quotes, true or false") from error

    def note(self, column: str, kinds: set[CellKind], node: ast.expr) -> None:
        kinds |= {self.said[column]} if column in self.said else set()
        if len(kinds) > 1:
            found = " and ".join(sorted(SAID[kind] for kind in kinds))
            raise self.refused(node, f"makes column {column!r} hold {found}; compare it with one kind of value")
        self.said[column] = kinds.pop()

    def refused(self, node: ast.expr, why: str) -> ParameterError:
        start, stop = (_character(self.source, at) for at in (node.col_offset, node.end_col_offset or node.col_offset))
        part = self.text[start:stop]
        return ParameterError(
            f"where: {part!r} at character {start + 1} of {self.text!r} {why}. A filter is made of column == value (or "
            f"!=, <, <=, >, >=), in [...], is null, and, or, not; for instance {EXAMPLE!r}"
        )


@dataclass(frozen=True)
class _Builder:
    """Makes the Arrow expression of a filter for one schema; `condition` pushes negation down to the comparisons."""

    where: Where
    schema: Any

    def condition(self, node: ast.expr, *, negated: bool) -> Any:
        if isinstance(node, ast.BoolOp):
            parts = [self.condition(part, negated=negated) for part in node.values]
            both = isinstance(node.op, ast.And) is not negated
            return reduce(lambda a, b: a & b if both else a | b, parts)
        if isinstance(node, ast.UnaryOp):
            return self.condition(node.operand, negated=not negated)
        if isinstance(node, ast.Compare):
            parts = [self.comparison(*pair, negated=negated) for pair in _pairs(node)]
            return reduce(lambda a, b: a | b if negated else a & b, parts)
        assert isinstance(node, ast.Name)
        name = _name(node, self.where.names)
        self.require(name, "truth")
        column = _compute().field(name)
        return ~column if negated else column

    def comparison(self, left: ast.expr, operator: ast.cmpop, right: ast.expr, *, negated: bool) -> Any:
        kind = _NEGATED[type(operator)] if negated else type(operator)
        column, other = (left, right) if _is_column(left) else (right, left)
        assert isinstance(column, ast.Name)
        name = _name(column, self.where.names)
        cells = _compute().field(name)
        if kind in (ast.Is, ast.IsNot):
            return self.missing(name) if kind is ast.Is else ~self.missing(name)
        if kind in (ast.In, ast.NotIn):
            assert isinstance(other, (ast.List, ast.Tuple, ast.Set))
            listed = cells.isin(_pyarrow().array([self.scalar(name, value) for value in other.elts]))
            return listed if kind is ast.In else ~listed & ~self.missing(name)
        compare = _COMPARED[kind]
        value = self.scalar(name, other)
        found = compare(cells, value) if column is left else compare(value, cells)
        return found & ~self.missing(name) if kind is ast.NotEq else found

    def missing(self, name: str) -> Any:
        compute, arrow = _compute(), _pyarrow()
        column = compute.field(name)
        if arrow.types.is_floating(self.type_of(name)):
            # Not is_null(nan_is_null=True): by it, pyarrow 25 rules out row groups that hold NaN but no null.
            return column.is_null() | compute.is_nan(column)
        return column.is_null()

    def type_of(self, name: str) -> Any:
        """The Arrow type of a column's cells."""
        kind = self.schema.field(name).type
        return kind.value_type if _pyarrow().types.is_dictionary(kind) else kind

    def scalar(self, name: str, node: ast.expr) -> Any:
        """A value as the column has it: text is the time that it says where the column holds times."""
        arrow, value = _pyarrow(), _value(node)
        if self.require(name, _kind_of_value(value)) != "time":
            return self.number(name, value)
        try:
            moment = pd.Timestamp(value)
            kind = self.type_of(name)
            zone = getattr(kind, "tz", None)
            if zone and moment.tzinfo is None:
                moment = moment.tz_localize(zone)
            return arrow.scalar(moment.date() if arrow.types.is_date(kind) else moment, type=kind)
        except (ValueError, TypeError) as error:
            raise ParameterError(
                f"where: column {name!r} holds times ({self.type_of(name)}), which {value!r} is none of; write it like "
                "'2026-01-31' or '2026-01-31 12:00'"
            ) from error

    def number(self, name: str, value: Any) -> Any:
        try:
            return _pyarrow().scalar(value)
        except (OverflowError, ValueError) as error:
            raise ParameterError(f"where: {value} is no number that column {name!r} could hold") from error

    def require(self, name: str, said: CellKind) -> CellKind:
        """The kind of a column, if it can be compared with a value of the kind ``said``."""
        kind = _kind_of_type(self.type_of(name))
        if _pyarrow().types.is_null(self.type_of(name)):
            return said  # nothing is there, which goes with everything
        if said == "truth" != kind:
            raise ParameterError(
                f"where: column {name!r} holds {SAID[kind]} ({self.type_of(name)}), neither true nor false; compare it "
                "with what it holds"
            )
        if kind != said and (kind, said) != ("time", "text"):
            remedy = {
                "text": "put the value in quotes", "number": "take the quotes away", "truth": "compare it with true",
                "time": "put the time in quotes", "other": "only 'is null' can be asked of it",
            }[kind]  # fmt: skip
            raise ParameterError(
                f"where: column {name!r} holds {SAID[kind]} ({self.type_of(name)}) but is compared with {SAID[said]}; "
                f"{remedy}"
            )
        return kind


def _without_backticks(text: str) -> tuple[str, dict[int, str]]:
    """The text with every name in backticks replaced by a plain one of the same length, and the names by place.

    Places are those of `ast`: bytes of UTF-8.
    """
    parts, names, end = io.StringIO(), dict[int, str](), 0
    for found in _QUOTED.finditer(text):
        if found[1] is None:
            continue
        parts.write(text[end : found.start()])
        names[len(parts.getvalue().encode())] = found[1]
        parts.write("_" * len(found[0]))
        end = found.end()
    # A line break would begin another statement.
    return (parts.getvalue() + text[end:]).replace("\n", " ").replace("\r", " "), names


def _character(source: str, place: int) -> int:
    """The character at a place that counts bytes of UTF-8."""
    return len(source.encode()[:place].decode(errors="ignore"))


def _near(text: str, at: int) -> str:
    return text[max(at - 1, 0) : at + 14] or text[-15:]


def _pairs(node: ast.Compare) -> Iterator[tuple[ast.expr, ast.cmpop, ast.expr]]:
    """``1 < x < 5`` as two comparisons."""
    sides = [node.left, *node.comparators]
    return zip(sides, node.ops, sides[1:], strict=False)


def _is_word(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id.lower() in (*_TRUTH, *_NULL)


def _is_column(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and not _is_word(node)


def _is_null(node: ast.expr) -> bool:
    constant = isinstance(node, ast.Constant) and node.value is None
    return constant or (isinstance(node, ast.Name) and node.id.lower() in _NULL)


def _name(node: ast.Name, names: Mapping[int, str]) -> str:
    return names.get(node.col_offset, node.id)


def _value(node: ast.expr) -> Any:
    """Of a number with its sign, text, true or false.

    Raises
    ------
    ValueError
        If it is none of them.
    """
    if isinstance(node, ast.Name) and node.id.lower() in _TRUTH:
        return _TRUTH[node.id.lower()]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _value(node.operand)
        if _kind_of_value(value) == "number":
            return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.Constant):
        _kind_of_value(node.value)
        return node.value
    raise ValueError("no value")


def _kind_of_value(value: Any) -> CellKind:
    if isinstance(value, bool):
        return "truth"
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, str):
        return "text"
    raise ValueError("no value")


def _kind_of_type(kind: Any) -> CellKind:
    types = _pyarrow().types
    if types.is_boolean(kind):
        return "truth"
    if types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind):
        return "number"
    if str(kind) in ("string", "large_string", "string_view"):
        return "text"
    return "time" if types.is_timestamp(kind) or types.is_date(kind) else "other"


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise MissingDependencyError("tables in files need pyarrow: pip install pyarrow") from error
    return pyarrow


def _compute() -> Any:
    import pyarrow.compute

    return pyarrow.compute
