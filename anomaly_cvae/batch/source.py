"""Tables in files, found among files, folders, patterns and URLs, and read as one."""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import pandas as pd

from anomaly_cvae.batch.csv_text import CsvFormat, as_levels, as_numbers, typed
from anomaly_cvae.batch.pictures import OnFault, Part, PictureColumns, is_picture, pictures_below, refuse_picture
from anomaly_cvae.batch.places import Place, RemotePath, place_of, shown
from anomaly_cvae.batch.table_file import KINDS, Batch, TableFile, Wanted, kind_of
from anomaly_cvae.errors import DataError

__all__ = ["Batch", "TableFile", "Wanted", "find_files", "read_table"]


def find_files(
    inputs: Sequence[str | Path] | str | Path,
    csv_format: CsvFormat | None = None,
    *,
    called: PictureColumns | None = None,
    part: Part = "test",
) -> list[TableFile]:
    """The tables among files, folders (with all below them) and glob patterns, here or at URLs; each once.

    They come in the order of the inputs and of their names.

    Hidden files, those that begin with ``_`` and those of other kinds are passed over in folders and
    patterns, not when named. A folder that holds no table but pictures is one table. ``called`` and ``part``
    as in `TableFile`.

    Raises
    ------
    DataError
        If an input leads to no table, or there is no input.
    """
    found: dict[Place, TableFile] = {}
    for given in _listed(inputs):
        root, paths = _expand(given)
        files = [TableFile.of(path, csv_format, root) for path in paths]
        if not files:
            raise DataError(f"{shown(given)}: no table found there; tables are files in {', '.join(KINDS)}")
        for file in files:
            found.setdefault(file.path.resolve(), replace(file, called=called or PictureColumns(), part=part))
    if not found:
        raise DataError("there is no data: name a file, a folder or a pattern")
    return list(found.values())


def _listed(inputs: Sequence[str | Path] | str | Path) -> Sequence[str | Path]:
    return [inputs] if isinstance(inputs, (str, Path)) else inputs


def _expand(given: str | Path) -> tuple[Place | None, Sequence[Place]]:
    """The folder that the files are below, None for a single file, and the files."""
    path = place_of(given)
    if isinstance(path, RemotePath):
        return _expand_remote(path)
    if path.is_dir():
        return path, _tables_of(path)
    given = str(path)
    if path.exists() or not glob.has_magic(given):
        return None, [path]
    root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
    matches = [Path(name) for name in glob.glob(given, recursive=True)]
    files: list[Path] = [file for match in matches for file in (_tables_of(match) if match.is_dir() else [match])]
    return root, sorted(file for file in set(files) if _is_visible(file.relative_to(root)) and _is_table(file))


def _expand_remote(path: RemotePath) -> tuple[RemotePath | None, list[RemotePath]]:
    if path.is_file():
        return None, [path]
    if not path.is_pattern():
        return (path, _tables_among(path.files(), path)) if path.is_dir() else (None, [path])
    root, found = path.fixed(), dict[str, RemotePath]()
    for match in path.matches():
        for file in match.files() if match.is_dir() else [match]:
            found.setdefault(file.url, file)
    return root, _tables_among(list(found.values()), root)


def _tables_among(files: list[RemotePath], root: RemotePath) -> list[RemotePath]:
    return [file for file in files if _is_visible(file.relative_to(root)) and kind_of(file)]


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
