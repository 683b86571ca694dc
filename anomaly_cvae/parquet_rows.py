"""Parquet files as one table: read a few thousand rows at a time, every row known by its position."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from anomaly_cvae.errors import DataError, MissingDependencyError
from anomaly_cvae.frames import IntArray, to_frame

READ_BUFFER = 1 << 20
PANDAS_INDEX = "__index_level_"
SUFFIXES = (".parquet", ".pq")

Inputs = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Piece:
    """One row group of a file; ``start`` is the position of its first row in the whole table."""

    file: int
    group: int
    start: int
    n_rows: int


@dataclass(frozen=True)
class ParquetTable:
    """Files with the same columns, one after the other; ``schema`` is the Arrow schema that all of them can be read as.

    A row's position is its number in the whole table, files in the order of ``paths``.
    """

    paths: tuple[Path, ...]
    schema: Any
    pieces: tuple[Piece, ...]
    columns: tuple[str, ...]

    @classmethod
    def of(cls, inputs: Inputs) -> ParquetTable:
        """The Parquet files named, and those in and below the folders named, in the order of their names.

        Raises
        ------
        DataError
            If there is none, one is damaged, or two disagree about their columns; names the file.
        MissingDependencyError
            If pyarrow is not installed.
        """
        paths = tuple(path for one in _listed(inputs) for path in _files_of(Path(one)))
        if not paths:
            raise DataError(f"{inputs}: no Parquet file (*{', *'.join(SUFFIXES)}) is there")
        schema, pieces, start = None, list[Piece](), 0
        for file, path in enumerate(paths):
            with _faults_of(path), _opened(path) as parquet:
                own, counts = parquet.schema_arrow.remove_metadata(), _group_sizes(parquet)
            schema = own if schema is None else _common(schema, own, path, paths[0])
            for group, n_rows in enumerate(counts):
                pieces.append(Piece(file, group, start, n_rows))
                start += n_rows
        assert schema is not None
        names = tuple(name for name in schema.names if not name.startswith(PANDAS_INDEX))
        return cls(paths, schema, tuple(pieces), names)

    @property
    def n_rows(self) -> int:
        """Rows of all files."""
        return sum(piece.n_rows for piece in self.pieces)

    def select(self, columns: Sequence[str]) -> ParquetTable:
        """The same with some of the columns, in that order.

        Raises
        ------
        DataError
            If there is no such column.
        """
        for name in columns:
            if name not in self.columns:
                raise DataError(f"{self.paths[0]} has no column {name!r}; there are {', '.join(self.columns)}")
        return replace(self, columns=tuple(columns))

    def frame(self) -> pd.DataFrame:
        """All rows at once."""
        return self.as_frame([table for piece in self.pieces for _, table in self.read(piece, piece.n_rows)])

    def as_frame(self, tables: Sequence[Any]) -> pd.DataFrame:
        """Some rows, as `read` gives them, in one frame."""
        return to_frame(self.joined(tables))

    def joined(self, tables: Sequence[Any]) -> Any:
        """The same as one Arrow table."""
        import pyarrow

        empty = pyarrow.schema([self.schema.field(name) for name in self.columns]).empty_table()
        return pyarrow.concat_tables([empty, *tables], promote_options="permissive")

    def read(self, piece: Piece, rows: int) -> Iterator[tuple[int, Any]]:
        """Arrow tables of at most ``rows`` rows of a row group, and the position of the first row of each.

        Raises
        ------
        DataError
            If the file is damaged or has gone; names it.
        """
        import pyarrow

        path, start = self.paths[piece.file], piece.start
        schema = pyarrow.schema([self.schema.field(name) for name in self.columns])
        with _faults_of(path), _opened(path) as parquet:
            wanted = {"batch_size": max(rows, 1), "row_groups": [piece.group], "columns": list(self.columns)}
            for batch in parquet.iter_batches(**wanted):
                table = pyarrow.Table.from_batches([batch]).select(list(self.columns))
                yield start, table.replace_schema_metadata(None).cast(schema)
                start += len(table)

    def place(self, position: int) -> str:
        """The row at ``position`` in words: its number in its file, and the file."""
        starts = [piece.start for piece in self.pieces]
        file = self.pieces[int(np.searchsorted(starts, position, side="right")) - 1].file
        first = next(piece.start for piece in self.pieces if piece.file == file)
        return f"row {position - first} of {self.paths[file]}"

    @contextmanager
    def rows_named(self, positions: IntArray) -> Iterator[None]:
        """Have a `DataError` about ``row 3`` of a frame name the row of the file at ``positions[3]`` instead."""
        try:
            yield
        except DataError as error:

            def place(found: re.Match[str]) -> str:
                row = int(found[1])
                return self.place(int(positions[row])) if row < len(positions) else found[0]

            raise type(error)(re.sub(r"\brow (\d+)\b(?! of )", place, str(error))) from error


def _listed(inputs: Inputs) -> Sequence[str | Path]:
    return [inputs] if isinstance(inputs, (str, Path)) else inputs


def _files_of(path: Path) -> list[Path]:
    """The file itself, or the Parquet files in and below a folder; hidden ones are not meant."""
    if path.is_dir():
        below = [p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()]
        return sorted(p for p in below if not any(part.startswith((".", "_")) for part in p.relative_to(path).parts))
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: only Parquet files can be read in parts; convert it, or read it and pass it to fit")
    return [path]


def _opened(path: Path) -> Any:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise MissingDependencyError("Parquet files need pyarrow: pip install pyarrow") from error
    # Without a buffer, or with pre_buffer, a whole row group stays in memory.
    return ParquetFile(path, buffer_size=READ_BUFFER, pre_buffer=False)


def _group_sizes(parquet: Any) -> list[int]:
    return [parquet.metadata.row_group(group).num_rows for group in range(parquet.metadata.num_row_groups)]


@contextmanager
def _faults_of(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}); replace the file, or leave it out") from error


def _common(schema: Any, other: Any, path: Path, first: Path) -> Any:
    """The schema that both can be read as: numbers may widen, names and order must agree.

    Raises
    ------
    DataError
        Naming the file and the column.
    """
    import pyarrow

    if set(schema.names) != set(other.names):
        absent, more = (sorted(set(a) - set(b)) for a, b in ((schema.names, other.names), (other.names, schema.names)))
        raise DataError(
            f"{path}: its columns are not those of {first}: it lacks {absent} and has {more} besides; mend or move it"
        )
    fields = []
    for field in schema:
        try:
            fields.append(field.type if field.type == other.field(field.name).type else _wider(field, other))
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
            raise DataError(
                f"{path}: column {field.name!r} is {other.field(field.name).type}, but {field.type} in {first}; "
                "write both with one type"
            ) from error
    return pyarrow.schema([field.with_type(t).with_nullable(True) for field, t in zip(schema, fields, strict=True)])


def _wider(field: Any, other: Any) -> Any:
    import pyarrow

    both = [pyarrow.schema([field]), pyarrow.schema([other.field(field.name)])]
    return pyarrow.unify_schemas(both, promote_options="permissive").field(0).type
