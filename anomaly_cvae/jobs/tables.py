"""Tables and labels as a configuration names them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pandas as pd

from anomaly_cvae import bundle
from anomaly_cvae.batch.csv_text import CsvFormat
from anomaly_cvae.batch.needs import Needs
from anomaly_cvae.batch.pictures import OnFault, pictures_below, refuse_picture
from anomaly_cvae.batch.source import find_files, read_table
from anomaly_cvae.detector import CVAEDetector
from anomaly_cvae.errors import DataError
from anomaly_cvae.inputs import nearest
from anomaly_cvae.jobs.config import TableConfig
from anomaly_cvae.jobs.models import OpenModel
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


def read_for(model: OpenModel, config: TableConfig, on_fault: OnFault = refuse_picture) -> pd.DataFrame:
    """A table for a model that is there: its columns mean what they did in training, whatever they look like here.

    ``on_fault`` is told of pictures that cannot be used.

    Raises
    ------
    DataError
        If a file cannot be read.
    """
    needs, form = Needs.of(model.reader), model.csv_format(csv_format(config))
    return read_table(config.data, form, text=needs.text, numbers=needs.numbers, called=needs.called, on_fault=on_fault)


def with_known_label(config: TableConfig, folder: Path) -> TableConfig:
    """The label and its rule as training was told them, where the configuration does not say.

    A rule is taken over only for the same label.
    """
    told = json.loads(bundle.provenance(folder).get("label", "{}"))
    if not told.get("label") or (config.label is not None and config.label != told["label"]):
        return config
    if config.anomaly is not None or config.normal is not None:
        return config
    return config.model_copy(update=told)


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


def digest(inputs: list[str]) -> str:
    """SHA-256 over the files, in their order."""
    total = hashlib.sha256()
    for file in find_files(inputs):
        for path in pictures_below(file.path) if file.path.is_dir() else [file.path]:
            with path.open("rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()
