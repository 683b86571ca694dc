"""One table in a file: Parquet, CSV, Arrow, npz or pictures, checked, and read whole or in batches."""

from __future__ import annotations

import csv
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from anomaly_cvae.batch.csv_text import CsvFormat, as_levels, as_numbers, first_bad_byte, header, read_text, sniff
from anomaly_cvae.batch.filters import Where, row_groups
from anomaly_cvae.batch.pictures import (
    OnFault,
    Part,
    PictureColumns,
    array_names,
    is_picture,
    picture_names,
    read_arrays,
    read_pictures,
    refuse_picture,
)
from anomaly_cvae.batch.places import Place, place_of
from anomaly_cvae.errors import DataError, MissingDependencyError, ParameterError
from anomaly_cvae.frames import to_frame
from anomaly_cvae.inputs import nearest

Kind = Literal["parquet", "csv", "arrow", "npz", "pictures"]

KINDS: dict[str, Kind] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "csv",
    ".csv.gz": "csv",
    ".tsv.gz": "csv",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".npz": "npz",
}
READ_BUFFER = 1 << 20
REMOTE_BUFFERS, MOST_REMOTE_BUFFER = 1 << 27, 1 << 23
"""Bytes that the columns of a file at a URL take together while they are read, and one of them at most."""
WHOLE = 1 << 62
"""More rows than any file has."""
PANDAS_INDEX = "__index_level_"


@dataclass(frozen=True)
class Batch:
    """Some rows of a file.

    ``frame`` holds the columns that the model needs; ``kept`` is an Arrow table of those to copy, as they
    stand in the file. ``start`` is the number of the first row, ``done`` the share of the file read so far.
    ``rows`` holds the numbers (n,) of the rows in the file where others were left out; None: one after the other.
    """

    frame: pd.DataFrame
    kept: Any
    start: int
    done: float
    rows: np.ndarray | None = None

    def row(self, position: int) -> int:
        """The number in the file of the row at a position of the batch."""
        return self.start + position if self.rows is None else int(self.rows[position])

    def head(self, rows: int) -> Batch:
        """The first ``rows`` rows."""
        chosen = None if self.rows is None else self.rows[:rows]
        return replace(self, frame=self.frame.iloc[:rows], kept=self.kept.slice(0, rows), rows=chosen)


@dataclass(frozen=True)
class Wanted:
    """Columns to read: those for the ``model``, and those to be ``kept``; of which rows (``where``, None: all).

    ``text`` maps the model's columns that are no numbers to the levels that it knows.
    """

    model: Sequence[str]
    kept: Sequence[str] = ()
    text: Mapping[str, Collection[str]] = field(default_factory=dict)
    where: Where | None = None

    @property
    def columns(self) -> list[str]:
        """All of them, each once."""
        return list(dict.fromkeys([*self.model, *self.kept, *(self.where.columns if self.where else ())]))

    @property
    def numbers(self) -> frozenset[str]:
        """Columns of the model that are no text."""
        return frozenset(self.model) - self.text.keys()


@dataclass(frozen=True)
class TableFile:
    """One file that holds a table; ``relative`` is its place below the folder it was found in.

    A folder of pictures is one, too. ``called`` names the columns of pictures and of npz files, of which
    ``part`` is read.
    """

    path: Place
    kind: Kind
    relative: Path
    csv_format: CsvFormat = field(default_factory=CsvFormat)
    called: PictureColumns = field(default_factory=PictureColumns)
    part: Part = "test"

    @classmethod
    def of(cls, path: str | Place, csv_format: CsvFormat | None = None, root: Place | None = None) -> TableFile:
        """The file at ``path``, its kind known by its suffix; a folder is one of pictures.

        Raises
        ------
        DataError
            If it is not there, or its suffix says nothing.
        """
        path = place_of(path)
        if isinstance(path, Path) and path.is_dir():
            return cls(path, "pictures", Path(path.resolve().name) if root in (None, path) else _below(path, root))
        kind: Kind | None = "pictures" if is_picture(path) else kind_of(path)
        if not path.is_file():
            raise DataError(f"{path}: no such file{'' if kind else ' or folder'}")
        if kind is None:
            raise DataError(f"{path}: a table is a file in {', '.join(KINDS)}; convert it, or rename it")
        if kind == "pictures" and not isinstance(path, Path):
            raise DataError(f"{path}: pictures are read from folders of this machine only; copy them into one")
        return cls(path, kind, _below(path, root), csv_format or CsvFormat())

    def columns(self) -> list[str]:
        """Names of the columns, in order.

        Raises
        ------
        DataError
            If the file is empty or cannot be read as what its suffix says.
        """
        with self._faults_named():
            if self.kind == "csv":
                return header(self.path, self.resolved_format())
            if self.kind == "pictures":
                return picture_names(self.called)
            if self.kind == "npz":
                return array_names(self.path, self.called, self.part)
            names: list[str] = list(self._schema().names)
        copies = sorted({name for name in names if names.count(name) > 1})
        if copies:
            raise DataError(f"{self.path}: column names appear more than once: {copies}; rename or drop the copies")
        return names

    @property
    def n_rows(self) -> int | None:
        """Rows of a Parquet file; None of others, which would have to be read.

        Raises
        ------
        DataError
            If the file cannot be read.
        """
        if self.kind != "parquet":
            return None
        with self._faults_named(), self._parquet() as file:
            rows: int = file.metadata.num_rows
        return rows

    def _schema(self) -> Any:
        """Of the Arrow table that Parquet and Arrow files hold."""
        if self.kind == "parquet":
            with self._parquet() as file:
                return file.schema_arrow
        with _arrow_reader(self.path) as reader:
            return reader.schema

    def require_filter(self, where: Where) -> None:
        """Refuse a filter that this file's columns do not go with; what a CSV cell is shows when it is read.

        Raises
        ------
        ParameterError
            Naming the column.
        DataError
            If the file cannot be read.
        """
        where.require(self.columns())
        if self.kind in ("parquet", "arrow"):
            where.expression(self._schema())

    def resolved_format(self) -> CsvFormat:
        """The CSV format with everything found out.

        Raises
        ------
        DataError
            If the bytes are no text in the encoding.
        """
        return sniff(self.path, self.csv_format)

    def read_raw(self, on_fault: OnFault = refuse_picture) -> pd.DataFrame:
        """The whole table; every cell of a CSV file is text (see `typed_table`).

        ``on_fault`` is told of pictures that cannot be used, which are left out.

        Raises
        ------
        DataError
            Naming the file and what is wrong with it.
        """
        self.columns()
        with self._faults_named():
            if self.kind == "csv":
                with self.path.open("rb") as raw:
                    return next(read_text(self.path, self.resolved_format(), None, raw))
            if self.kind in ("pictures", "npz"):
                whole: pd.DataFrame = next(self._image_tables(WHOLE, on_fault))[0]
                return whole
            if self.kind == "parquet":
                with self._parquet() as file:
                    table = file.read()
            else:
                with _arrow_reader(self.path) as reader:
                    table = reader.read_all()
            frame = to_frame(table.replace_schema_metadata(None))
        return frame[[name for name in frame.columns if not str(name).startswith(PANDAS_INDEX)]]

    def batches(self, wanted: Wanted, rows: int, on_fault: OnFault = refuse_picture) -> Iterator[Batch]:
        """The wanted columns, at most ``rows`` rows at a time; memory does not grow with the file.

        ``on_fault`` is told of pictures that cannot be used, which are left out.

        Raises
        ------
        DataError
            Naming the file and what is wrong with it.
        """
        require_columns(self, wanted.columns)
        with self._faults_named():
            if self.kind == "csv":
                yield from self._csv_batches(wanted, rows)
            elif self.kind in ("pictures", "npz"):
                yield from self._image_batches(wanted, rows, on_fault)
            else:
                tables = self._parquet_tables if self.kind == "parquet" else self._arrow_tables
                for table, start, done in tables(wanted, rows):
                    chosen = None if wanted.where is None else wanted.where.rows_of(table)
                    if chosen is not None and len(chosen) < len(table):
                        table = table.take(chosen)
                    frame = to_frame(table.select(list(wanted.model)).replace_schema_metadata(None))
                    kept = table.select(list(wanted.kept)).replace_schema_metadata(None)
                    yield Batch(frame, kept, start, done, None if chosen is None else start + chosen)

    def _image_batches(self, wanted: Wanted, rows: int, on_fault: OnFault) -> Iterator[Batch]:
        start, where = 0, wanted.where
        if where is not None and self.called.image in where.columns:
            raise ParameterError(f"where: column {self.called.image!r} holds images, which have no order")
        for frame, done in self._image_tables(rows, on_fault):
            numbers, n = None, len(frame)
            if where is not None:
                chosen = where.rows_of(_pyarrow().table({name: _arrow_cells(frame[name]) for name in where.columns}))
                frame, numbers = frame.iloc[chosen].reset_index(drop=True), start + chosen
            kept = _pyarrow().table({name: _arrow_cells(frame[name]) for name in wanted.kept})
            yield Batch(frame[list(wanted.model)], kept, start, done, numbers)
            start += n

    def _image_tables(self, rows: int, on_fault: OnFault) -> Iterator[tuple[Any, float]]:
        if self.kind == "npz":
            return read_arrays(self.path, self.called, self.part, rows)
        return read_pictures(self.path, self.called, rows, on_fault)

    @contextmanager
    def _parquet(self, columns: int = 0) -> Iterator[Any]:
        """The opened file, for a given number of columns to be read (0: whole)."""
        # With pre_buffer, the default, memory grows to the size of the file; so it does with dataset.to_batches.
        options = {"pre_buffer": False, "buffer_size": READ_BUFFER} if columns else {}
        if isinstance(self.path, Path):
            yield _pyarrow("parquet").ParquetFile(self.path, **options)
            return
        if columns:  # a request takes long, whatever its size
            options["buffer_size"] = min(max(REMOTE_BUFFERS // columns, READ_BUFFER), MOST_REMOTE_BUFFER)
        with self.path.open(ranges=True) as content:
            yield _pyarrow("parquet").ParquetFile(content, **options)

    def _parquet_tables(self, wanted: Wanted, rows: int) -> Iterator[tuple[Any, int, float]]:
        columns = wanted.columns
        with self._parquet(len(columns)) as file:
            total, nothing = file.metadata.num_rows, True
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
            for groups in self._runs_of_groups(wanted, file, len(sizes)):
                start = sum(sizes[: groups[0]])
                for batch in file.iter_batches(rows, row_groups=groups, columns=columns, use_threads=False):
                    nothing = False
                    yield _pyarrow().Table.from_batches([batch]), start, (start + len(batch)) / max(total, 1)
                    start += len(batch)
            if nothing:
                yield file.read_row_groups([], columns=columns), 0, 1.0

    def _runs_of_groups(self, wanted: Wanted, file: Any, n_groups: int) -> list[list[int]]:
        """Row groups that may hold wanted rows, those side by side together."""
        if wanted.where is None:
            return [list(range(n_groups))] if n_groups else []
        expression = wanted.where.expression(file.schema_arrow)
        with self.path.open("rb") as content:
            groups = row_groups(content, expression)
        cuts = [i for i in range(1, len(groups)) if groups[i] != groups[i - 1] + 1]
        edges = [0, *cuts, len(groups)]
        return [groups[a:b] for a, b in pairwise(edges) if a < b]

    def _arrow_tables(self, wanted: Wanted, rows: int) -> Iterator[tuple[Any, int, float]]:
        columns, start = wanted.columns, 0
        with _arrow_reader(self.path) as reader:
            count: int | None = getattr(reader, "num_record_batches", None)
            batches = reader if count is None else (reader.get_batch(i) for i in range(count))
            for number, batch in enumerate(batches):
                table = _pyarrow().Table.from_batches([batch]).select(columns)
                for first in range(0, len(table), rows):
                    part = table.slice(first, rows)
                    yield part, start, (number + 1) / count if count else 1.0
                    start += len(part)
            if not start:
                yield reader.schema.empty_table().select(columns), 0, 1.0

    def _csv_batches(self, wanted: Wanted, rows: int) -> Iterator[Batch]:
        form, start, size, where = self.resolved_format(), 0, max(self.path.stat().st_size, 1), wanted.where
        with self.path.open("rb") as raw:
            for cells in read_text(self.path, form, rows, raw):
                numbers, n = None, len(cells)
                if where is not None:
                    chosen = where.rows_of(where.text_table(cells, form, wanted.text, wanted.numbers, start))
                    cells, numbers = cells.iloc[chosen], start + chosen  # with their index, for messages
                frame = pd.DataFrame(
                    {
                        name: as_levels(cells[name], wanted.text[name])
                        if name in wanted.text
                        else as_numbers(cells[name], form, start)
                        for name in wanted.model
                    },
                    index=cells.index,
                )
                text = _pyarrow().string()
                kept = {name: _pyarrow().array(cells[name], type=text, from_pandas=True) for name in wanted.kept}
                frame = frame.reset_index(drop=True)
                yield Batch(frame, _pyarrow().table(kept), start, min(raw.tell() / size, 1.0), numbers)
                start += n

    @contextmanager
    def _faults_named(self) -> Iterator[None]:
        """Turns what the readers raise into a `DataError` that names the file."""
        path = self.path
        try:
            if isinstance(path, Path) and path.is_file() and path.stat().st_size == 0:
                raise DataError(f"{path}: the file is empty (0 bytes); write it again, or take it away")
            yield
        except MissingDependencyError:
            raise
        except ParameterError as error:
            raise DataError(f"{path}: {error}") from error
        except DataError as error:
            if str(path) in str(error):
                raise
            raise DataError(f"{path}: {error}") from error
        except FileNotFoundError as error:
            raise DataError(f"{path}: no such file") from error
        except PermissionError as error:
            raise DataError(f"{path}: may not be read; change its permissions") from error
        except UnicodeDecodeError as error:
            encoding = self.resolved_format().encoding or error.encoding
            raise DataError(
                f"{path}: byte {first_bad_byte(path, encoding) or error.start:,} is no text in {encoding}; give its "
                "encoding, for instance cp1252"
            ) from error
        except (ValueError, OSError, KeyError, EOFError, zlib.error, csv.Error) as error:
            # pyarrow's and pandas' own errors are ValueErrors.
            raise self._unreadable(error) from error
        except Exception as error:
            if isinstance(path, Path):
                raise
            raise self._unreadable(error) from error  # every file system has exceptions of its own

    def _unreadable(self, error: Exception) -> DataError:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return DataError(f"{self.path}: cannot be read as {self.kind}: {reason}; write it again, or take it away")


def kind_of(path: Place) -> Kind | None:
    """What a file's name says it holds."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return KINDS.get("".join(suffixes[-2:])) or KINDS.get(suffixes[-1] if suffixes else "")


def require_columns(file: TableFile, needed: Iterable[str]) -> list[str]:
    """The file's columns, if the needed ones are among them.

    Raises
    ------
    DataError
        Naming what is missing, and the nearest name that is there.
    """
    there = file.columns()
    missing = [name for name in needed if name not in there]
    if missing:
        others = f" (nor {', '.join(map(repr, missing[1:5]))})" if missing[1:] else ""
        raise DataError(f"{file.path}: has no column {missing[0]!r}{others}{nearest(missing[0], there)}")
    return there


def _arrow_cells(cells: pd.Series) -> Any:
    """A kept column beside images: names are text in every batch, even where all of them are missing."""
    text = cells.dtype == object
    return _pyarrow().array(
        cells.map(str, na_action="ignore") if text else cells,
        type=_pyarrow().string() if text else None,
        from_pandas=True,
    )


def _pyarrow(module: str | None = None) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError("tables in files need pyarrow: pip install pyarrow") from error
    return getattr(pyarrow, module) if module else pyarrow


@contextmanager
def _arrow_reader(path: Place) -> Iterator[Any]:
    """A reader of the file format (Feather 2), or of the stream format, which must be all that there is.

    Raises
    ------
    DataError
        If a stream is read to its end and the file goes on: a second table, which may have other columns.
    """
    arrow = _pyarrow()
    with arrow.memory_map(str(path)) if isinstance(path, Path) else arrow.PythonFile(path.open(), "r") as source:
        try:
            reader = arrow.ipc.open_file(source)
        except arrow.ArrowInvalid:
            source.seek(0)
            reader = _Stream(arrow.ipc.open_stream(source), source)
        yield reader


class _Stream:
    """A stream of record batches that notices when more stands behind its end."""

    def __init__(self, reader: Any, source: Any) -> None:
        self.reader, self.source, self.schema = reader, source, reader.schema

    def __iter__(self) -> Iterator[Any]:
        yield from self.reader
        self._require_end()

    def read_all(self) -> Any:
        """Every batch."""
        table = self.reader.read_all()
        self._require_end()
        return table

    def _require_end(self) -> None:
        read, size = self.source.tell(), self.source.size()
        if read < size:
            raise DataError(
                f"its table ends after {read:,} of {size:,} bytes and something else follows, such as a second table; "
                "put every table into a file of its own"
            )


def _below(path: Place, root: Place | None) -> Path:
    """Its place below the folder it was found in."""
    if root is None:
        return Path(path.name)
    return path.relative_to(root)  # type: ignore[arg-type]  # both are of one file system
