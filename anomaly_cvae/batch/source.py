"""Tables in files: Parquet, CSV, Arrow and images, found, checked, and read whole or in batches."""

from __future__ import annotations

import csv
import glob
import os
import warnings
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from anomaly_cvae.batch.csv_text import (
    CsvFormat,
    as_levels,
    as_numbers,
    first_bad_byte,
    header,
    read_text,
    sniff,
    typed,
)
from anomaly_cvae.batch.pictures import (
    OnFault,
    Part,
    PictureColumns,
    array_names,
    is_picture,
    picture_names,
    pictures_below,
    read_arrays,
    read_pictures,
    refuse_picture,
)
from anomaly_cvae.errors import DataError, MissingDependencyError
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
WHOLE = 1 << 62
"""More rows than any file has."""
PANDAS_INDEX = "__index_level_"


@dataclass(frozen=True)
class Batch:
    """Some rows of a file.

    ``frame`` holds the columns that the model needs; ``kept`` is an Arrow table of those to copy, as they
    stand in the file. ``start`` is the number of the first row, ``done`` the share of the file read so far.
    """

    frame: pd.DataFrame
    kept: Any
    start: int
    done: float


@dataclass(frozen=True)
class Wanted:
    """Columns to read: those for the ``model``, and those to be ``kept``.

    ``text`` maps the model's columns that are no numbers to the levels that it knows.
    """

    model: Sequence[str]
    kept: Sequence[str] = ()
    text: Mapping[str, Collection[str]] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """All of them, each once."""
        return list(dict.fromkeys([*self.model, *self.kept]))


@dataclass(frozen=True)
class TableFile:
    """One file that holds a table; ``relative`` is its place below the folder it was found in.

    A folder of pictures is one, too. ``called`` names the columns of pictures and of npz files, of which
    ``part`` is read.
    """

    path: Path
    kind: Kind
    relative: Path
    csv_format: CsvFormat = field(default_factory=CsvFormat)
    called: PictureColumns = field(default_factory=PictureColumns)
    part: Part = "test"

    @classmethod
    def of(cls, path: str | Path, csv_format: CsvFormat | None = None, root: Path | None = None) -> TableFile:
        """The file at ``path``, its kind known by its suffix; a folder is one of pictures.

        Raises
        ------
        DataError
            If it is not there, or its suffix says nothing.
        """
        path = Path(path)
        if path.is_dir():
            return cls(path, "pictures", Path(path.resolve().name) if root in (None, path) else path.relative_to(root))
        kind: Kind | None = "pictures" if is_picture(path) else kind_of(path)
        if not path.is_file():
            raise DataError(f"{path}: no such file{'' if kind else ' or folder'}")
        if kind is None:
            raise DataError(f"{path}: a table is a file in {', '.join(KINDS)}; convert it, or rename it")
        relative = Path(path.name) if root is None else path.relative_to(root)
        return cls(path, kind, relative, csv_format or CsvFormat())

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
            if self.kind == "parquet":
                names: list[str] = list(_pyarrow("parquet").read_schema(self.path).names)
            else:
                with _arrow_reader(self.path) as reader:
                    names = list(reader.schema.names)
        copies = sorted({name for name in names if names.count(name) > 1})
        if copies:
            raise DataError(f"{self.path}: column names appear more than once: {copies}; rename or drop the copies")
        return names

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
                return next(read_text(self.path, self.resolved_format(), None))
            if self.kind in ("pictures", "npz"):
                whole: pd.DataFrame = next(self._image_tables(WHOLE, on_fault))[0]
                return whole
            if self.kind == "parquet":
                table = _pyarrow("parquet").ParquetFile(self.path).read()
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
                start = 0
                for frame, done in self._image_tables(rows, on_fault):
                    kept = _pyarrow().table({name: _arrow_cells(frame[name]) for name in wanted.kept})
                    yield Batch(frame[list(wanted.model)], kept, start, done)
                    start += len(frame)
            else:
                tables = self._parquet_tables if self.kind == "parquet" else self._arrow_tables
                start = 0
                for table, done in tables(wanted.columns, rows):
                    frame = to_frame(table.select(list(wanted.model)).replace_schema_metadata(None))
                    yield Batch(frame, table.select(list(wanted.kept)).replace_schema_metadata(None), start, done)
                    start += len(frame)

    def _image_tables(self, rows: int, on_fault: OnFault) -> Iterator[tuple[Any, float]]:
        if self.kind == "npz":
            return read_arrays(self.path, self.called, self.part, rows)
        return read_pictures(self.path, self.called, rows, on_fault)

    def _parquet_tables(self, columns: list[str], rows: int) -> Iterator[tuple[Any, float]]:
        # With pre_buffer, the default, memory grows to the size of the file; so it does with dataset.to_batches.
        file = _pyarrow("parquet").ParquetFile(self.path, pre_buffer=False, buffer_size=READ_BUFFER)
        total, read = file.metadata.num_rows, 0
        for batch in file.iter_batches(rows, columns=columns, use_threads=False):
            read += len(batch)
            yield _pyarrow().Table.from_batches([batch]), read / max(total, 1)
        if not read:
            yield file.read(columns=columns), 1.0

    def _arrow_tables(self, columns: list[str], rows: int) -> Iterator[tuple[Any, float]]:
        with _arrow_reader(self.path) as reader:
            count: int | None = getattr(reader, "num_record_batches", None)
            batches = reader if count is None else (reader.get_batch(i) for i in range(count))
            nothing = True
            for number, batch in enumerate(batches):
                table = _pyarrow().Table.from_batches([batch]).select(columns)
                for first in range(0, len(table), rows):
                    nothing = False
                    yield table.slice(first, rows), (number + 1) / count if count else 1.0
            if nothing:
                yield reader.schema.empty_table().select(columns), 1.0

    def _csv_batches(self, wanted: Wanted, rows: int) -> Iterator[Batch]:
        form, start, size = self.resolved_format(), 0, max(self.path.stat().st_size, 1)
        with self.path.open("rb") as raw:
            for cells in read_text(self.path, form, rows, raw):
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
                yield Batch(frame, _pyarrow().table(kept), start, raw.tell() / size)
                start += len(frame)

    @contextmanager
    def _faults_named(self) -> Iterator[None]:
        """Turns what the readers raise into a `DataError` that names the file."""
        path = self.path
        try:
            if path.is_file() and path.stat().st_size == 0:
                raise DataError(f"{path}: the file is empty (0 bytes); write it again, or take it away")
            yield
        except MissingDependencyError:
            raise
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
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DataError(
                f"{path}: cannot be read as {self.kind}: {reason}; write it again, or take it away"
            ) from error


def kind_of(path: Path) -> Kind | None:
    """What a file's name says it holds."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return KINDS.get("".join(suffixes[-2:])) or KINDS.get(suffixes[-1] if suffixes else "")


def find_files(
    inputs: Sequence[str | Path] | str | Path,
    csv_format: CsvFormat | None = None,
    *,
    called: PictureColumns | None = None,
    part: Part = "test",
) -> list[TableFile]:
    """The tables among files, folders (with all below them) and glob patterns; each once, in the order of names.

    Hidden files, those that begin with ``_`` and those of other kinds are passed over in folders and
    patterns, not when named. A folder that holds no table but pictures is one table. ``called`` and ``part``
    as in `TableFile`.

    Raises
    ------
    DataError
        If an input leads to no table, or there is no input.
    """
    found: dict[Path, TableFile] = {}
    for given in _listed(inputs):
        root, paths = _expand(given)
        files = [TableFile.of(path, csv_format, root) for path in paths]
        if not files:
            raise DataError(f"{given}: no table found there; tables are files in {', '.join(KINDS)}")
        for file in files:
            found.setdefault(file.path.resolve(), replace(file, called=called or PictureColumns(), part=part))
    if not found:
        raise DataError("there is no data: name a file, a folder or a pattern")
    return list(found.values())


def _listed(inputs: Sequence[str | Path] | str | Path) -> Sequence[str | Path]:
    return [inputs] if isinstance(inputs, (str, Path)) else inputs


def _expand(given: str | Path) -> tuple[Path | None, list[Path]]:
    """The folder that the files are below, None for a single file, and the files."""
    path = Path(given)
    if path.is_dir():
        return path, _tables_of(path)
    if path.exists() or not glob.has_magic(str(given)):
        return None, [path]
    root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
    matches = [Path(name) for name in glob.glob(str(given), recursive=True)]
    files = [file for match in matches for file in (_tables_of(match) if match.is_dir() else [match])]
    return root, sorted(file for file in set(files) if _is_visible(file.relative_to(root)) and _is_table(file))


def _is_table(path: Path) -> bool:
    return path.is_dir() or kind_of(path) is not None or is_picture(path)


def _tables_of(folder: Path) -> list[Path]:
    """Tables below a folder, or the folder itself if it holds pictures instead; a note beside those is no table."""
    with warnings.catch_warnings(record=True) as passed_over:
        warnings.simplefilter("always")
        tables = _below(folder)
    if all(table.suffix == ".txt" for table in tables) and pictures_below(folder):
        return [folder]
    for warning in passed_over:
        warnings.warn(warning.message, stacklevel=3)
    return tables


def _below(folder: Path) -> list[Path]:
    """Tables below a folder, linked folders too, each once."""
    found: list[Path] = []
    passed_over: list[Path] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        files = [Path(place, name) for name in names]
        visible = [file for file in files if _is_visible(file.relative_to(folder))]
        found += [file for file in visible if kind_of(file)]
        passed_over += [file for file in visible if not kind_of(file)]
    if passed_over:
        warnings.warn(
            f"{folder}: {len(passed_over):,} file(s) passed over, no tables by their names (such as "
            f"{min(passed_over).name})",
            stacklevel=2,
        )
    return sorted(found)


def _is_visible(path: Path) -> bool:
    return not any(part.startswith((".", "_")) for part in path.parts)


def read_table(
    inputs: Sequence[str | Path] | str | Path,
    csv_format: CsvFormat | None = None,
    *,
    text: Mapping[str, Collection[str]] | None = None,
    numbers: Collection[str] = (),
    called: PictureColumns | None = None,
    part: Part = "test",
    on_fault: OnFault = refuse_picture,
) -> pd.DataFrame:
    """Every table found at ``inputs``, one below the other.

    Cells of CSV files become what their column holds in all files together. ``text`` (with the levels that
    are known) and ``numbers`` name columns for which that is clear. ``called`` and ``part`` as in `TableFile`,
    ``on_fault`` as in `TableFile.read_raw`.

    Raises
    ------
    DataError
        If a file cannot be read, or its columns are not those of the first one.
    """
    files = find_files(inputs, csv_format, called=called, part=part)
    frames = [file.read_raw(on_fault) for file in files]
    for file, frame in zip(files[1:], frames[1:], strict=True):
        if set(frame.columns) != set(frames[0].columns):
            differing = sorted(map(str, set(frame.columns) ^ set(frames[0].columns)))
            raise DataError(
                f"{file.path}: its columns are not those of {files[0].path}; they differ in {differing[:10]}"
            )
    forms = [file.resolved_format() if file.kind == "csv" else None for file in files]
    marks = {(form.decimal, form.thousands) if form else None for form in forms}
    if len(marks) > 1:  # numbers are written differently, or are no text at all
        typed_apart = [_typed(frame, form, text or {}, numbers) for frame, form in zip(frames, forms, strict=True)]
        return _one_below_the_other(typed_apart)
    return _typed(_one_below_the_other(frames), forms[0], text or {}, numbers)


def _one_below_the_other(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """All rows; an empty table has no say in what a column holds."""
    filled = [frame for frame in frames if len(frame)] or frames[:1]
    return filled[0] if len(filled) == 1 else pd.concat(filled, ignore_index=True)


def _typed(
    frame: pd.DataFrame, form: CsvFormat | None, text: Mapping[str, Collection[str]], numbers: Collection[str]
) -> pd.DataFrame:
    if form is None:
        return frame

    def known(name: str) -> Callable[[pd.Series], pd.Series]:
        if name in text:
            return lambda cells: as_levels(cells, text[name])
        return (lambda cells: as_numbers(cells, form)) if name in numbers else (lambda cells: typed(cells, form))

    return pd.DataFrame({name: known(str(name))(frame[name]) for name in frame.columns}, index=frame.index)


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


def _arrow_reader(path: Path) -> Any:
    """A reader of the file format (Feather 2), or of the stream format."""
    arrow = _pyarrow()
    source = arrow.memory_map(str(path))
    try:
        return arrow.ipc.open_file(source)
    except arrow.ArrowInvalid:
        source.seek(0)
        return arrow.ipc.open_stream(source)
