"""Which columns of a file a detector needs, and how they are read so that they mean what they did in training."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from anomaly_cvae.batch.filters import Where
from anomaly_cvae.batch.pictures import FILE, OnFault, PictureColumns, refuse_picture
from anomaly_cvae.batch.table_file import Batch, TableFile, Wanted
from anomaly_cvae.detector import CVAEDetector
from anomaly_cvae.errors import DataError, ParameterError
from anomaly_cvae.schema import Name, Schema

CELLS_PER_BATCH = 1 << 21
LEAST_ROWS, MOST_ROWS = 1 << 10, 1 << 16
LEAST_IMAGES = 1 << 7


@dataclass(frozen=True)
class Needs:
    """Columns of x and conditions by name; ``text`` holds the levels of those that were text in training.

    ``images`` are those of the columns that hold images, with the number of pixels of each; ``called`` is what
    pictures outside of tables are to be called.
    """

    names: tuple[Name, ...]
    text: Mapping[str, frozenset[str]]
    ignored: frozenset[str]
    images: Mapping[str, int] = field(default_factory=dict)
    called: PictureColumns = field(default_factory=PictureColumns)

    @classmethod
    def of(cls, detector: CVAEDetector) -> Needs:
        """What this detector needs.

        Raises
        ------
        ParameterError
            If it was fitted with ``condition=``: files have columns only.
        """
        layout, schema = detector.layout_, detector.schema_
        if layout.passed_conditions:
            raise ParameterError(
                "this detector was fitted with condition=, which a table in a file does not have; fit it with the "
                "condition among the columns of X (condition_columns=)"
            )
        names = tuple(name for name in layout.columns if name not in layout.ignored)
        images = {str(c.name): c.image.n_pixels for c in schema.images if c.image is not None}
        ignored = frozenset(str(name) for name in layout.ignored)
        return cls(names, text_columns(schema), ignored, images, picture_columns(schema))

    @property
    def columns(self) -> list[str]:
        """Names as a file has them."""
        return [str(name) for name in self.names]

    @property
    def numbers(self) -> frozenset[str]:
        """Columns that are numbers or truth values."""
        return frozenset(self.columns) - self.text.keys() - self.images.keys()

    def without(self, names: Collection[str]) -> Needs:
        """What is needed of a file where these columns come from elsewhere."""
        return replace(self, names=tuple(name for name in self.names if str(name) not in names))

    def batches(
        self,
        file: TableFile,
        kept: Sequence[str] = (),
        on_fault: OnFault = refuse_picture,
        *,
        most: int | None = None,
        where: Where | None = None,
    ) -> Iterator[Batch]:
        """The needed and the kept columns of a file, some rows at a time, never more than ``most``.

        Of the rows that ``where`` wants; a batch may have none.

        ``on_fault`` as in `TableFile.batches`.

        Raises
        ------
        DataError
            If a column is missing, or the file cannot be read.
        """
        wanted = Wanted(self.columns, kept, self.text, where)
        if self.images and file.kind == "csv":
            raise DataError(
                f"{file.path}: CSV holds no images, which column {next(iter(self.images))!r} needs; give a folder of "
                "pictures, or Parquet with JPEG or PNG bytes"
            )
        cells = len(wanted.columns) + sum(self.images.values())
        least = LEAST_IMAGES if self.images else LEAST_ROWS
        rows = int(np.clip(CELLS_PER_BATCH // max(cells, 1), least, MOST_ROWS))
        return file.batches(wanted, rows if most is None else min(rows, most), on_fault)

    def table(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The needed columns under the names that the detector knows."""
        return frame[self.columns].set_axis(list(self.names), axis=1)


def for_files(detector: CVAEDetector) -> CVAEDetector:
    """The same detector for tables with named columns: conditions that were passed to `fit` are columns, too.

    The networks are shared, the detector is a copy where it has to differ.
    """
    layout = detector.layout_
    if not (layout.passed_conditions or (detector.schema_.images and not layout.is_frame)):
        return detector
    changed = copy.copy(detector)
    changed.layout_ = replace(
        layout,
        columns=layout.columns + layout.passed_conditions,
        condition_columns=layout.conditions,
        passed_conditions=(),
        is_frame=True,
    )
    changed.n_features_in_ = len(changed.layout_.columns)
    if all(isinstance(name, str) for name in changed.layout_.columns):
        changed.feature_names_in_ = np.array(changed.layout_.columns, dtype=object)
    return changed


def picture_columns(schema: Schema) -> PictureColumns:
    """What pictures outside of tables are for a model: its one column of images, and its one condition, if it has one.

    A sub-folder's name, or a label, says the class.
    """
    if len(schema.columns) != 1 or not schema.images:
        return PictureColumns()
    column, conditions = schema.columns[0], schema.categorical_conditions
    if len(conditions) != 1 or str(conditions[0].name) in (FILE, str(column.name)):
        return PictureColumns(str(column.name), expected=column.image)
    levels = {str(level): level for level in conditions[0].levels}
    return PictureColumns(str(column.name), str(conditions[0].name), levels, column.image)


def text_columns(schema: Schema) -> dict[str, frozenset[str]]:
    """Columns and conditions whose levels were text in training, with these: 007 is no 7 there."""
    levels = {str(c.name): c.levels for c in schema.columns}
    levels |= {str(c.name): c.levels for c in schema.categorical_conditions}
    return {
        name: frozenset(map(str, own))
        for name, own in levels.items()
        if own and all(isinstance(level, str) for level in own)
    }
