"""Which columns of a file a detector needs, and how they are read so that they mean what they did in training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from anomaly_cvae.batch.source import Batch, TableFile, Wanted
from anomaly_cvae.detector import CVAEDetector
from anomaly_cvae.errors import ParameterError
from anomaly_cvae.schema import Name, Schema

CELLS_PER_BATCH = 1 << 19
LEAST_ROWS, MOST_ROWS = 1 << 10, 1 << 16


@dataclass(frozen=True)
class Needs:
    """Columns of x and conditions by name; ``text`` holds the levels of those that were text in training."""

    names: tuple[Name, ...]
    text: Mapping[str, frozenset[str]]
    ignored: frozenset[str]

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
        return cls(names, text_columns(schema), frozenset(str(name) for name in layout.ignored))

    @property
    def columns(self) -> list[str]:
        """Names as a file has them."""
        return [str(name) for name in self.names]

    @property
    def numbers(self) -> frozenset[str]:
        """Columns that are numbers or truth values."""
        return frozenset(self.columns) - self.text.keys()

    def batches(self, file: TableFile, kept: Sequence[str] = ()) -> Iterator[Batch]:
        """The needed and the kept columns of a file, some rows at a time.

        Raises
        ------
        DataError
            If a column is missing, or the file cannot be read.
        """
        wanted = Wanted(self.columns, kept, self.text)
        rows = int(np.clip(CELLS_PER_BATCH // max(len(wanted.columns), 1), LEAST_ROWS, MOST_ROWS))
        return file.batches(wanted, rows)

    def table(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The needed columns under the names that the detector knows."""
        return frame[self.columns].set_axis(list(self.names), axis=1)


def text_columns(schema: Schema) -> dict[str, frozenset[str]]:
    """Columns and conditions whose levels were text in training, with these: 007 is no 7 there."""
    levels = {str(c.name): c.levels for c in schema.columns}
    levels |= {str(c.name): c.levels for c in schema.categorical_conditions}
    return {
        name: frozenset(map(str, own))
        for name, own in levels.items()
        if own and all(isinstance(level, str) for level in own)
    }
