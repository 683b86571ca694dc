"""Tables and labels as a configuration names them."""

from __future__ import annotations

import pandas as pd

from anomaly_cvae.batch.csv_text import CsvFormat
from anomaly_cvae.batch.needs import Needs
from anomaly_cvae.batch.source import read_table
from anomaly_cvae.detector import CVAEDetector
from anomaly_cvae.errors import DataError
from anomaly_cvae.inputs import nearest
from anomaly_cvae.jobs.config import TableConfig
from anomaly_cvae.labels import Labels, read_labels


def csv_format(config: TableConfig) -> CsvFormat:
    """What the configuration says of CSV files."""
    return CsvFormat(**config.csv.model_dump())


def read_config_labels(frame: pd.DataFrame, config: TableConfig, *, strict: bool = True) -> Labels:
    """The labels of a table.

    Raises
    ------
    DataError
        If there is no such column, or its values are not what the configuration says.
    """
    assert config.label is not None
    require(frame, [config.label], "label")
    return read_labels(frame[config.label], config.label, config.anomaly, config.normal, strict=strict)


def read_for(detector: CVAEDetector, config: TableConfig) -> pd.DataFrame:
    """A table for a model that is there: its columns mean what they did in training, whatever they look like here.

    Raises
    ------
    DataError
        If a file cannot be read.
    """
    needs = Needs.of(detector)
    return read_table(config.data, csv_format(config), text=needs.text, numbers=needs.numbers)


def require(frame: pd.DataFrame, names: list[str], role: str) -> None:
    """Raise unless the table has these columns.

    Raises
    ------
    DataError
        Naming the first that is not there, and the nearest that is.
    """
    for name in names:
        if name not in frame.columns:
            raise DataError(f"{role}: the table has no column {name!r}{nearest(name, frame.columns)}")


def model_columns(detector: CVAEDetector, frame: pd.DataFrame) -> pd.DataFrame:
    """The columns a model needs, in its order; further ones are left out.

    Raises
    ------
    DataError
        Naming a column that is not there.
    """
    needs = Needs.of(detector)
    require(frame, needs.columns, "model")
    return needs.table(frame)
