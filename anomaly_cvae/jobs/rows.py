"""Rows of files as a model takes them, and what was left out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from anomaly_cvae.batch.csv_text import CsvFormat
from anomaly_cvae.batch.needs import Needs
from anomaly_cvae.batch.pictures import OnFault
from anomaly_cvae.batch.source import TableFile, find_files
from anomaly_cvae.errors import DataError, ParameterError
from anomaly_cvae.frames import Level
from anomaly_cvae.images import ImageFormat
from anomaly_cvae.jobs.generation import named_values
from anomaly_cvae.jobs.models import OpenModel
from anomaly_cvae.schema import Name

MOST_IN_PICTURE = 10
"""Rows in a picture, unless more are asked for."""


@dataclass(frozen=True)
class Rows:
    """Rows of x with their conditions, and ``kept``, what tells them apart: ignored columns, files of pictures.

    ``faults`` maps a picture that could not be used to what is wrong with it.
    """

    frame: pd.DataFrame
    kept: pd.DataFrame
    faults: dict[str, str] = field(default_factory=dict)

    def table(self, result: pd.DataFrame, *, each: int = 1) -> pd.DataFrame:
        """What became of the rows, ``each`` lines of every one, beside what tells them apart."""
        kept = self.kept.loc[self.kept.index.repeat(each)].reset_index(drop=True)
        beside = [name for name in kept.columns if name not in result.columns]
        return pd.concat([kept[beside], result.reset_index(drop=True)], axis=1)


def image_of(model: OpenModel) -> tuple[Name, ImageFormat]:
    """Name and format of the images, of a model whose x is one column of them.

    Raises
    ------
    ParameterError
        For any other model.
    """
    columns = model.detector.schema_.columns
    if len(columns) != 1 or columns[0].image is None:
        shown = ", ".join(str(column.name) for column in columns[:5])
        raise ParameterError(
            f"a picture shows models whose x is one column of images; x of this one is {len(columns)} column(s) "
            f"({shown}{', …' if len(columns) > 5 else ''}): write a table (.parquet, .csv, .json)"
        )
    return columns[0].name, columns[0].image


def read_rows(
    model: OpenModel,
    inputs: Sequence[str],
    *,
    most: int | None = None,
    given: Mapping[str, Level] | None = None,
    csv_format: CsvFormat | None = None,
) -> Rows:
    """The first rows of tables and pictures, or all; ``given`` conditions hold for every row, whatever the files say.

    Raises
    ------
    DataError
        If a file lacks a column, cannot be read, or no file has a row.
    """
    given, faults = given or {}, dict[str, str]()
    needs = Needs.of(model.reader)
    asked = needs.without(given.keys())
    frames, kept, left = list[pd.DataFrame](), list[pd.DataFrame](), most
    for file in find_files(list(inputs), model.csv_format(csv_format or CsvFormat()), called=needs.called):
        for batch in asked.batches(file, _identifying(file, needs), collect(faults), most=left):
            rows = len(batch.frame) if left is None else min(left, len(batch.frame))
            frames.append(asked.table(batch.frame).iloc[:rows])
            kept.append(batch.kept.slice(0, rows).to_pandas())
            left = None if left is None else left - rows
            if left == 0:
                break
        if left == 0:
            break
    frame = pd.concat(frames, ignore_index=True)
    if not len(frame):
        raise DataError(f"{', '.join(inputs)}: there is no row")
    names = {str(name): name for name in needs.names}
    for name, level in given.items():
        frame[names[name]] = level
    return Rows(frame[list(needs.names)], pd.concat(kept, ignore_index=True), faults)


def rows_to_show(
    model: OpenModel,
    inputs: Sequence[str],
    most: int | None,
    condition: Sequence[str] | None,
    csv: Mapping[str, str],
    *,
    as_picture: bool,
    flag: str = "--condition",
) -> Rows:
    """`read_rows` as a command asks for them: ``condition`` holds NAME=VALUE, and a picture shows few.

    Raises
    ------
    ParameterError
        If a picture is asked for of a model whose x is not one column of images.
    DataError, ConditionError
        If the rows, or a condition, cannot be used.
    """
    if as_picture:
        image_of(model)
        most = most or MOST_IN_PICTURE
    given = named_values(model, condition or (), flag)
    return read_rows(model, inputs, most=most, given=given, csv_format=CsvFormat(**csv))


def complete_rows(
    model: OpenModel, rows: Rows, n: int | None, random_state: int, *, noise: bool = True
) -> pd.DataFrame:
    """The rows with their missing cells as expected, or ``n`` lines of each with them drawn, numbered in ``draw``."""
    if n is None:
        return rows.table(model.reader.impute(rows.frame))
    drawn = model.reader.impute_draws(rows.frame, n, random_state=random_state, noise=noise)
    table = rows.table(drawn, each=n)
    table.insert(0, "row", np.repeat(np.arange(len(rows.frame)), n), allow_duplicates=True)
    table.insert(1, "draw", np.tile(np.arange(n), len(rows.frame)), allow_duplicates=True)
    return table


def intervals_of(model: OpenModel, rows: Rows, random_state: int) -> pd.DataFrame:
    """`CVAEDetector.impute_intervals`: a line per missing cell; ``row`` counts from 0."""
    return model.reader.impute_intervals(rows.frame, random_state=random_state)


def check_completion(hide: Collection[str], *, as_picture: bool, intervals: bool) -> None:
    """Refuse what does not go together before any work is done.

    Raises
    ------
    ParameterError
        If nothing of images is hidden, or a part of a table, or a picture is to have intervals.
    """
    if as_picture and not hide:
        raise ParameterError("images have no missing pixels: say what to hide (--hide left)")
    if hide and not as_picture:
        raise ParameterError("--hide is for images in a .png; of a table those cells are completed that are missing")
    if as_picture and intervals:
        raise ParameterError("--intervals is for tables: choose .parquet, .csv or .json for --output")


def _identifying(file: TableFile, needs: Needs) -> list[str]:
    there = file.columns()
    if file.kind in ("pictures", "npz"):
        return [name for name in there if name not in needs.columns and name != needs.called.image]
    return [name for name in there if name in needs.ignored]


def collect(faults: dict[str, str]) -> OnFault:
    """Notes in ``faults`` what is wrong with a picture."""

    def note(path: Path, why: str) -> None:
        faults[str(path)] = why

    return note
