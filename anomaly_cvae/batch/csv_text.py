"""CSV as people write it: delimiter, encoding, number marks; cells are text until it is known what they are."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd

from anomaly_cvae.batch.places import Place
from anomaly_cvae.errors import DataError

MOST_EXACT_DIGITS = 15
"""Whole numbers of more digits are not all exact as floats."""
DELIMITERS = (",", ";", "\t", "|")
SAMPLE_BYTES = 1 << 18
MISSING = frozenset({"", "NA", "N/A", "n/a", "NaN", "nan", "NULL", "null", "None", "<NA>", "#N/A", "-nan", "-NaN"})
"""Cells that mean "missing" in a column of x, a condition or a label; kept columns keep them as text."""

_NUMBER = re.compile(r"[-+]?(\d[\d.,]*|[.,]\d+)([eE][-+]?\d+)?")
_WHOLE = r"[-+]?\d+"
_CODE = r"0\d+"
_TRUTH = {"true": True, "false": False}


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
        if self.thousands:
            parts.append(f"thousands {self.thousands!r}")
        return ", ".join(parts)


def sniff(path: Place, given: CsvFormat) -> CsvFormat:
    """The format with everything that was not given found out; ``thousands`` "" means that there is none.

    Raises
    ------
    DataError
        If the bytes are no text in the encoding.
    """
    with open_bytes(path) as stream:
        head = stream.read(SAMPLE_BYTES)
    whole = len(head) < SAMPLE_BYTES
    encoding = _encoding(head, whole) if given.encoding is None else given.encoding
    if head.startswith(codecs.BOM_UTF8) and encoding.lower().replace("-", "") == "utf8":
        encoding = "utf-8-sig"
    try:
        # The sample may end within a character; only the rest of it is missing then.
        text = codecs.getincrementaldecoder(encoding)().decode(head, final=whole)
    except (UnicodeDecodeError, LookupError) as error:
        raise DataError(
            f"{path}: is no text in {encoding} ({error}); give its encoding, for instance cp1252"
        ) from error
    if not whole:
        text = text[: text.rfind("\n") + 1] or text
    delimiter = given.delimiter or _delimiter(text, path)
    found = _number_marks(_cells(text, delimiter)[1:], delimiter)
    decimal = given.decimal or ("." if given.thousands == "," else "," if given.thousands == "." else found[0])
    thousands = given.thousands if given.thousands is not None else found[1] if found[0] == decimal else ""
    return replace(given, delimiter=delimiter, encoding=encoding, decimal=decimal, thousands=thousands)


def header(path: Place, form: CsvFormat) -> list[str]:
    """Names of the columns: those of the first line that is not empty.

    Raises
    ------
    DataError
        If there is none, or a name appears twice.
    """
    with io.TextIOWrapper(open_bytes(path), encoding=form.encoding, newline="") as stream:
        reader = csv.reader(stream, delimiter=form.delimiter or ",", skipinitialspace=True)
        names = next((line for line in reader if line), [])
    if not names:
        raise DataError(f"{path}: has no line with column names; write it again, or take it away")
    names = [name.strip() or f"Unnamed: {i}" for i, name in enumerate(names)]
    copies = sorted({name for name in names if names.count(name) > 1})
    if copies:
        raise DataError(f"{path}: column names appear more than once: {copies}; rename or drop the copies")
    return names


def read_text(path: Place, form: CsvFormat, rows: int | None, raw: IO[bytes] | None = None) -> Iterator[pd.DataFrame]:
    """Every cell as text, ``rows`` rows at a time, or all at once.

    Raises
    ------
    ValueError
        If a line has more cells than there are columns. Cells that a short one lacks are empty.
    """
    names = header(path, form)
    read: Any = pd.read_csv
    with _long_lines_refused():
        found = read(
            raw or path,
            sep=form.delimiter,
            encoding=form.encoding,
            names=names,
            header=0,
            index_col=False,
            dtype=str,
            keep_default_na=False,
            na_values=[],
            chunksize=rows,
            compression="gzip" if is_gzip(path) else None,
            low_memory=False,
        )
    if rows is None:
        yield found
        return
    with found:
        while True:
            with _long_lines_refused():
                try:
                    chunk = next(found)
                except StopIteration:
                    return
            yield chunk.reset_index(drop=True)


@contextmanager
def _long_lines_refused() -> Iterator[None]:
    """Where pandas would cut a line that is too long, and warn, the file is wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        try:
            yield
        except pd.errors.ParserWarning as warning:
            raise ValueError("a line has more cells than there are column names") from warning


def typed(cells: pd.Series, form: CsvFormat) -> pd.Series:
    """A column of text as what it holds: whole numbers, numbers, truth values, or text.

    Numbers with leading zeros are codes, and stay text.
    """
    text = _without_missing(cells)
    if text.isna().all():
        return pd.Series(np.nan, index=cells.index)
    if _any(text.str.fullmatch(_CODE)):
        return text
    found = _truth(text)
    found = _numbers(text, form) if found is None else found
    return text if found is None else found


def as_numbers(cells: pd.Series, form: CsvFormat, start: int = 0) -> pd.Series:
    """A column of text as numbers, codes too, or as truth values; row 0 of its index is row ``start``.

    Raises
    ------
    DataError
        Naming the first cell that is neither.
    """
    text = _without_missing(cells)
    found = _truth(text)
    found = _numbers(text, form) if found is None else found
    if found is not None:
        return found
    wrong = _first_wrong(text.dropna().drop_duplicates(), form)
    row = start + int(text.index[np.flatnonzero((text == wrong).to_numpy(dtype=np.bool_, na_value=False))[0]])
    raise DataError(f"column {cells.name!r} must be numeric but holds text, {wrong!r} in row {row:,}; correct it")


def _first_wrong(levels: pd.Series, form: CsvFormat) -> str:
    """Of levels that are no numbers together, the first that makes them so; halving, as there may be very many."""
    fine, wrong = 0, len(levels)
    while wrong - fine > 1:
        middle = (fine + wrong) // 2
        if _numbers(levels.iloc[:middle], form) is None:
            wrong = middle
        else:
            fine = middle
    return str(levels.iloc[wrong - 1])


def as_levels(cells: pd.Series, known: Collection[str] = ()) -> pd.Series:
    """A column of text: the ``known`` levels as they stand, others without blanks around, missing where it says so."""
    clean = _without_missing(cells)
    return clean.where(~cells.isin(list(known)), cells) if known else clean


def _truth(text: pd.Series) -> pd.Series | None:
    present = text.dropna()
    if present.empty or not present.str.lower().isin(_TRUTH).all():
        return None
    return text.map(lambda level: _TRUTH[level.lower()], na_action="ignore").astype("boolean")


def _any(matches: pd.Series) -> bool:
    return bool(matches.fillna(False).astype(bool).any())


def _without_missing(cells: pd.Series) -> pd.Series:
    stripped = cells.str.strip()
    return stripped.mask(stripped.isin(MISSING) | stripped.isna(), None)


def _numbers(text: pd.Series, form: CsvFormat) -> pd.Series | None:
    """Whole numbers stay whole, exactly, where cells are missing too; None if a cell is no number."""
    if form.thousands:
        grouped = text.str.contains(form.thousands, regex=False, na=False)
        if not text[grouped].str.fullmatch(_grouped(form)).all():
            return None  # a date, a version: the mark stands elsewhere than between groups of three digits
        text = text.str.replace(form.thousands, "", regex=False)
    if form.decimal not in (None, "."):
        text = text.str.replace(form.decimal, ".", regex=False)
    missing = text.isna()
    numbers = pd.to_numeric(text, errors="coerce")
    if int(numbers.isna().sum()) > int(missing.sum()):
        return None
    present = text.dropna()
    if present.empty or not present.str.fullmatch(_WHOLE).all():
        return pd.Series(numbers.to_numpy(dtype=np.float64, na_value=np.nan), index=text.index)
    if int(present.str.len().max()) > MOST_EXACT_DIGITS:
        if any(abs(int(cell)) >= 2**63 for cell in present):
            return None  # longer than any number here is exact: an identifier
        exact = [pd.NA if gone else int(cell) for cell, gone in zip(text, missing, strict=True)]
        return pd.Series(pd.array(exact, dtype="Int64"), index=text.index)
    return numbers.astype("Int64" if missing.any() else "int64")


def _grouped(form: CsvFormat) -> str:
    mark, decimal = re.escape(form.thousands or ","), re.escape(form.decimal or ".")
    return rf"[-+]?[1-9]\d{{0,2}}({mark}\d{{3}})+({decimal}\d*)?([eE][-+]?\d+)?"


def _encoding(head: bytes, whole: bool) -> str:
    if head.startswith(codecs.BOM_UTF8):
        return "utf-8-sig"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, final=whole)
    except UnicodeDecodeError:
        return "cp1252"
    return "utf-8"


def _delimiter(text: str, path: Place) -> str:
    """The candidate that splits the first lines into the most columns, the same number in each."""
    if any(suffix.lower() == ".tsv" for suffix in path.suffixes):
        return "\t"
    best, most = ",", 1
    for candidate in DELIMITERS:
        widths = {len(line) for line in _cells(text, candidate)[:50] if line}
        if len(widths) == 1 and (width := widths.pop()) > most:
            best, most = candidate, width
    return best


def _cells(text: str, delimiter: str) -> list[list[str]]:
    try:
        return list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True))
    except csv.Error:  # a quote that is never closed: the whole of it is read, and named, later
        return [line.split(delimiter) for line in text.splitlines()]


def _number_marks(lines: Sequence[Sequence[str]], delimiter: str) -> tuple[str, str]:
    """Decimal and thousands mark, from columns that hold nothing but numbers.

    1,234 alone is a grouped number where commas delimit (it had to be quoted), and a fraction elsewhere;
    1.234 alone is a fraction.
    """
    seen = {mark: set[str]() for mark in ",."}
    for cells in _columns(lines):
        present = [cell for cell in cells if cell not in MISSING]
        roles = [_roles(cell) for cell in present]
        if all(role is not None for role in roles):
            for mark, role in (pair for pairs in roles if pairs for pair in pairs):
                seen[mark].add(role)
    comma, dot = seen[","], seen["."]
    if "decimal" not in dot and ("decimal" in comma or ("group" in dot and "group" not in comma)):
        return ",", "." if "group" in dot else ""
    if "unsure" in comma and not comma & {"decimal", "group"} and delimiter != "," and "decimal" not in dot:
        return ",", "." if "group" in dot else ""
    grouped = "decimal" not in comma and bool(comma)
    return ".", "," if grouped else ""


def _roles(cell: str) -> list[tuple[str, str]] | None:
    """What each mark of a number is: "decimal", "group" or "unsure" (three digits follow it); None: no number."""
    if not _NUMBER.fullmatch(cell):
        return None
    number = re.split("[eE]", cell.lstrip("+-"))[0]
    for group, decimal in ((",", "."), (".", ",")):
        whole, _, _ = number.partition(decimal)
        if group in whole and re.fullmatch(rf"[1-9]\d{{0,2}}({re.escape(group)}\d{{3}})+", whole):
            if decimal in number:
                return [(group, "group"), (decimal, "decimal")]
            return [(group, "group" if number.count(group) > 1 else "unsure")]
    marks = [character for character in number if character in ",."]
    # A single dot is a decimal point unless something else in the file says otherwise.
    return None if len(marks) > 1 else [(mark, "decimal") for mark in marks]


def _columns(lines: Sequence[Sequence[str]]) -> Iterator[list[str]]:
    width = max((len(line) for line in lines), default=0)
    for i in range(width):
        yield [line[i].strip() for line in lines if len(line) > i]


def first_bad_byte(path: Place, encoding: str) -> int | None:
    """Place of the first byte that is no text in ``encoding``, counted from the start of the file."""
    decoder, read = codecs.getincrementaldecoder(encoding)(), 0
    with open_bytes(path) as stream:
        while block := stream.read(SAMPLE_BYTES):
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                return read - pending + error.start
            read += len(block)
    return None


def is_gzip(path: Place) -> bool:
    """Whether the file is compressed, by its name."""
    return path.suffix.lower() == ".gz"


def open_bytes(path: Place) -> IO[bytes]:
    """The file's content, uncompressed."""
    if not is_gzip(path):
        return path.open("rb")
    # A path, so that closing the one closes the other; what is at a URL is freed with it.
    unpack: Any = gzip.open
    content: IO[bytes] = unpack(path if isinstance(path, Path) else path.open("rb"), "rb")
    return content
