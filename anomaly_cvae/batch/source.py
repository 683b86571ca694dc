"""Tables in files: Parquet, CSV and Arrow, found, checked, and read whole or in batches."""

from __future__ import annotations

import codecs
import csv
import glob
import gzip
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import IO, Any, Literal

import pandas as pd

from anomaly_cvae.errors import DataError, MissingDependencyError
from anomaly_cvae.frames import to_frame
from anomaly_cvae.inputs import nearest

Kind = Literal["parquet", "csv", "arrow"]

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
}
DELIMITERS = (",", ";", "\t", "|")
SAMPLE_BYTES = 1 << 18
READ_BUFFER = 1 << 20
_THOUSANDS = {",": re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?"), ".": re.compile(r"[-+]?\d{1,3}(\.\d{3})+(,\d+)?")}
_DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+")
_NUMBER = re.compile(r"[-+]?[\d.,]*\d([eE][-+]?\d+)?")


@dataclass(frozen=True)
class CsvFormat:
    """How a CSV file is written; what is None is found out from its first 256 KiB."""

    delimiter: str | None = None
    encoding: str | None = None
    decimal: str | None = None
    thousands: str | None = None

    def describe(self) -> str:
        """In words, for a report; empty for the common format."""
        parts = []
        if self.delimiter not in (",", None):
            parts.append(f"delimiter {self.delimiter!r}")
        if self.encoding not in ("utf-8", "utf-8-sig", None):
            parts.append(f"encoding {self.encoding}")
        if self.decimal not in (".", None):
            parts.append(f"decimal {self.decimal!r}")
        if self.thousands is not None:
            parts.append(f"thousands {self.thousands!r}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Batch:
    """Some rows of a file.

    ``start`` is the number of the first row in the file, ``done`` the share of the file read so far.
    ``frame`` holds what was asked for, by name.
    """

    frame: pd.DataFrame
    start: int
    done: float


@dataclass(frozen=True)
class TableFile:
    """One file that holds a table."""

    path: Path
    kind: Kind
    relative: Path
    csv_format: CsvFormat = field(default_factory=CsvFormat)

    @classmethod
    def of(cls, path: str | Path, csv_format: CsvFormat | None = None, root: Path | None = None) -> TableFile:
        """The file at ``path``, its kind known by its suffix; ``relative`` is its place below ``root``.

        Raises
        ------
        DataError
            If it is not there, or its suffix says nothing.
        """
        path = Path(path)
        kind = kind_of(path)
        if kind is None:
            raise DataError(f"{path}: a table is a file in {', '.join(KINDS)}; convert it, or rename it")
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        relative = Path(path.name) if root is None else path.relative_to(root)
        return cls(path, kind, relative, csv_format or CsvFormat())

    @property
    def size(self) -> int:
        """Bytes."""
        return self.path.stat().st_size

    def columns(self) -> list[str]:
        """Names of the columns, in order.

        Raises
        ------
        DataError
            If the file is empty or cannot be read as what its suffix says.
        """
        with self._faults_named():
            self._refuse_empty()
            if self.kind == "parquet":
                return list(_pyarrow("parquet").read_schema(self.path).names)
            if self.kind == "arrow":
                with _arrow_reader(self.path) as reader:
                    return list(reader.schema.names)
            header = self._header(self.resolved_format())
        return header

    def n_rows(self) -> int | None:
        """Number of rows where the file says so without being read; None for CSV and Arrow."""
        if self.kind != "parquet":
            return None
        with self._faults_named():
            self._refuse_empty()
            rows: int = _pyarrow("parquet").read_metadata(self.path).num_rows
        return rows

    def resolved_format(self) -> CsvFormat:
        """The CSV format with everything found out.

        Raises
        ------
        DataError
            If the bytes are no text in the encoding.
        """
        return sniff(self.path, self.csv_format)

    def read(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """The whole table, or some of its columns.

        Raises
        ------
        DataError
            Naming the file and what is wrong with it.
        """
        with self._faults_named():
            self._refuse_empty()
            if self.kind == "csv":
                return self._read_csv(columns, {}, None)  # type: ignore[no-any-return]  # pandas: frame or reader
            if self.kind == "parquet":
                table = _pyarrow("parquet").ParquetFile(self.path).read(columns=columns)
            else:
                with _arrow_reader(self.path) as reader:
                    table = reader.read_all()
                    table = table.select(list(columns)) if columns is not None else table
            return to_frame(table)

    def batches(self, columns: Sequence[str], text: Iterable[str], rows: int) -> Iterator[Batch]:
        """The ``columns``, at most ``rows`` rows at a time; memory does not grow with the file.

        ``text`` names columns that a CSV file is to leave as they are written: 007 is no 7 there.

        Raises
        ------
        DataError
            Naming the file and what is wrong with it.
        """
        with self._faults_named():
            self._refuse_empty()
            read = {"parquet": self._parquet_batches, "arrow": self._arrow_batches, "csv": self._csv_batches}
            yield from read[self.kind](list(columns), set(text), rows)

    def _parquet_batches(self, columns: list[str], text: set[str], rows: int) -> Iterator[Batch]:
        # With pre_buffer, the default, memory grows to the size of the file; so it does with dataset.to_batches.
        file = _pyarrow("parquet").ParquetFile(self.path, pre_buffer=False, buffer_size=READ_BUFFER)
        total, start = max(file.metadata.num_rows, 1), 0
        for batch in file.iter_batches(rows, columns=columns, use_threads=False):
            frame = to_frame(_pyarrow().Table.from_batches([batch]))
            yield Batch(frame, start, (start + len(frame)) / total)
            start += len(frame)
        if start == 0:
            yield Batch(self.read(columns), 0, 1.0)

    def _arrow_batches(self, columns: list[str], text: set[str], rows: int) -> Iterator[Batch]:
        with _arrow_reader(self.path) as reader:
            start, count = 0, _batch_count(reader)
            for number, batch in enumerate(_record_batches(reader)):
                table = _pyarrow().Table.from_batches([batch]).select(columns)
                for first in range(0, max(len(table), 1), rows):
                    frame = to_frame(table.slice(first, rows))
                    yield Batch(frame, start, (number + 1) / count if count else 1.0)
                    start += len(frame)
            if start == 0 and not count:
                yield Batch(to_frame(reader.schema.empty_table().select(columns)), 0, 1.0)

    def _csv_batches(self, columns: list[str], text: set[str], rows: int) -> Iterator[Batch]:
        size, start = max(self.size, 1), 0
        with self.path.open("rb") as raw, self._read_csv(columns, dict.fromkeys(text, str), rows, raw) as chunks:
            for frame in chunks:
                yield Batch(frame.reset_index(drop=True)[columns], start, raw.tell() / size)
                start += len(frame)

    def _read_csv(
        self, columns: Sequence[str] | None, dtypes: dict[str, Any], rows: int | None, raw: IO[bytes] | None = None
    ) -> Any:
        form = self.resolved_format()
        read: Any = pd.read_csv  # a frame, or a reader when rows is given
        return read(
            raw or self.path,
            sep=form.delimiter,
            encoding=form.encoding,
            decimal=form.decimal,
            thousands=form.thousands,
            usecols=None if columns is None else list(columns),
            dtype=dtypes or None,
            chunksize=rows,
            low_memory=False,
            compression="gzip" if self.path.suffix == ".gz" else None,
            skipinitialspace=True,
            index_col=False,
        )

    def _header(self, form: CsvFormat) -> list[str]:
        with _open_text(self.path, form.encoding or "utf-8") as stream:
            header = next(csv.reader(stream, delimiter=form.delimiter or ",", skipinitialspace=True), [])
        copies = sorted({name for name in header if header.count(name) > 1})
        if copies:
            raise DataError(f"{self.path}: column names appear more than once: {copies}; rename or drop the copies")
        return header

    def _refuse_empty(self) -> None:
        if self.size == 0:
            raise DataError(f"{self.path}: the file is empty (0 bytes); write it again, or take it away")

    def _faults_named(self) -> _FaultsNamed:
        return _FaultsNamed(self)


class _FaultsNamed:
    """Turns what the readers raise into a `DataError` that names the file."""

    def __init__(self, file: TableFile) -> None:
        self.file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        path = self.file.path
        if error is None or isinstance(error, (DataError, MissingDependencyError, GeneratorExit)):
            return
        if isinstance(error, FileNotFoundError):
            raise DataError(f"{path}: no such file") from error
        if isinstance(error, PermissionError):
            raise DataError(f"{path}: may not be read; change its permissions") from error
        if isinstance(error, UnicodeDecodeError):
            raise DataError(
                f"{path}: byte {error.start:,} is no {error.encoding}; give its encoding (for instance cp1252)"
            ) from error
        if isinstance(error, (ValueError, OSError, KeyError)):  # pyarrow's and pandas' errors are ValueErrors
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DataError(f"{path}: cannot be read as {self.file.kind}: {reason}") from error


def kind_of(path: Path) -> Kind | None:
    """What a file's name says it holds."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return KINDS.get("".join(suffixes[-2:])) or KINDS.get(suffixes[-1] if suffixes else "")


def find_files(inputs: Sequence[str | Path], csv_format: CsvFormat | None = None) -> list[TableFile]:
    """The tables among files, folders (with all below them) and glob patterns; each once, in the order of names.

    Hidden files and those of other kinds are passed over in folders and patterns, not when named.

    Raises
    ------
    DataError
        If an input leads to no table.
    """
    found: dict[Path, TableFile] = {}
    for given in inputs:
        root, paths = _expand(given)
        files = [TableFile.of(path, csv_format, root) for path in paths]
        if not files:
            raise DataError(f"{given}: no table found there; tables are files in {', '.join(KINDS)}")
        found.update({file.path.resolve(): file for file in files})
    return list(found.values())


def _expand(given: str | Path) -> tuple[Path | None, list[Path]]:
    """The folder that the files are below, None for a single file, and the files."""
    path = Path(given)
    if path.is_dir():
        below = (file for file in path.rglob("*") if file.is_file())
        return path, sorted(file for file in below if _is_visible(file.relative_to(path)) and kind_of(file))
    if path.exists() or not glob.has_magic(str(given)):
        return None, [path]
    fixed = list(takewhile(lambda part: not glob.has_magic(part), path.parts))
    matches = (Path(name) for name in glob.glob(str(given), recursive=True))
    return Path(*fixed), sorted(file for file in matches if file.is_file() and kind_of(file))


def _is_visible(path: Path) -> bool:
    return not any(part.startswith((".", "_")) for part in path.parts)


def read_table(inputs: Sequence[str | Path], csv_format: CsvFormat | None = None) -> pd.DataFrame:
    """Every table found at ``inputs``, one below the other.

    Raises
    ------
    DataError
        If a file cannot be read, or its columns are not those of the first one.
    """
    files = find_files(inputs, csv_format)
    frames = [file.read() for file in files]
    for file, frame in zip(files[1:], frames[1:], strict=True):
        if set(frame.columns) != set(frames[0].columns):
            differing = sorted(map(str, set(frame.columns) ^ set(frames[0].columns)))
            raise DataError(
                f"{file.path}: its columns are not those of {files[0].path}; they differ in {differing[:10]}"
            )
    return frames[0] if len(frames) == 1 else pd.concat(frames, ignore_index=True)


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


def sniff(path: Path, given: CsvFormat) -> CsvFormat:
    """What of a CSV file's format was not given, from its first 256 KiB.

    Raises
    ------
    DataError
        If the bytes are no text in the encoding.
    """
    if None not in (given.delimiter, given.encoding, given.decimal, given.thousands):
        return given
    with _open_bytes(path) as stream:
        head = stream.read(SAMPLE_BYTES)
    encoding = given.encoding or _encoding(head)
    try:
        # The sample may end within a character; only the rest of it is missing then.
        text = codecs.getincrementaldecoder(encoding)().decode(head, final=len(head) < SAMPLE_BYTES)
    except (UnicodeDecodeError, LookupError) as error:
        raise DataError(f"{path}: is no text in {encoding} ({error}); give its encoding") from error
    if len(head) == SAMPLE_BYTES:
        text = text[: text.rfind("\n") + 1] or text
    delimiter = given.delimiter or _delimiter(text, path)
    decimal, thousands = _number_format(_cells(text, delimiter), delimiter)
    return CsvFormat(delimiter, encoding, given.decimal or decimal, given.thousands or thousands)


def _encoding(head: bytes) -> str:
    if head.startswith(codecs.BOM_UTF8):
        return "utf-8-sig"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return "cp1252"
    return "utf-8"


def _delimiter(text: str, path: Path) -> str:
    """The candidate that splits the first lines into the most columns, the same number in each."""
    if ".tsv" in path.suffixes:
        return "\t"
    best, most = ",", 1
    for candidate in DELIMITERS:
        widths = {len(line) for line in _cells(text, candidate)[:50] if line}
        if len(widths) == 1 and (width := widths.pop()) > most:
            best, most = candidate, width
    return best


def _cells(text: str, delimiter: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True))


def _number_format(lines: list[list[str]], delimiter: str) -> tuple[str, str | None]:
    """Decimal and thousands separator, from columns that hold nothing but numbers."""
    columns: list[list[str]] = [[cell.strip() for cell in column if cell.strip()] for column in _columns(lines[1:])]
    numeric = [cells for cells in columns if cells and all(_NUMBER.fullmatch(cell) for cell in cells)]
    grouped = {mark: [c for c in numeric if _all_grouped(c, mark)] for mark in _THOUSANDS}
    comma = [c for c in numeric if any(_DECIMAL_COMMA.fullmatch(cell) for cell in c) and c not in grouped[","]]
    if comma and delimiter != ",":
        return ",", "." if grouped["."] else None
    return ".", "," if grouped[","] else None


def _all_grouped(cells: list[str], mark: str) -> bool:
    """Whether every cell with this mark, and one at least, has it in front of three digits each time."""
    marked = [cell for cell in cells if mark in cell]
    plain = all(_THOUSANDS[mark].fullmatch(cell) for cell in marked)
    # 1.234 alone is more likely a decimal point: only a number with two marks, or with both, shows a dot as grouping.
    return bool(marked) and plain and (mark == "," or any(cell.count(".") > 1 or "," in cell for cell in marked))


def _columns(lines: list[list[str]]) -> Iterator[list[str]]:
    width = max((len(line) for line in lines), default=0)
    for i in range(width):
        yield [line[i] for line in lines if len(line) > i]


def _open_bytes(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _open_text(path: Path, encoding: str) -> IO[str]:
    return io.TextIOWrapper(_open_bytes(path), encoding=encoding, newline="")


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


def _batch_count(reader: Any) -> int | None:
    count: int | None = getattr(reader, "num_record_batches", None)
    return count


def _record_batches(reader: Any) -> Iterator[Any]:
    count = _batch_count(reader)
    if count is None:
        yield from reader
    else:
        yield from (reader.get_batch(i) for i in range(count))
