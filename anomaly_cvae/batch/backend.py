"""By what a job's rows are scored: torch, or ONNX Runtime where the job is long enough to make its graphs first."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from anomaly_cvae.batch.table_file import TableFile
from anomaly_cvae.detector import CVAEDetector
from anomaly_cvae.errors import DataError, ParameterError

Backend = Literal["auto", "torch", "onnx"]
BACKENDS: tuple[Backend, ...] = ("auto", "torch", "onnx")
LEAST_ROWS = 20_000_000
"""Per graph, from which ONNX Runtime pays. Making a graph takes 5 to 8 s; by the figures of docs/benchmarks/speed.md it
then saves about half a microsecond a row."""

_LOG = logging.getLogger(__name__)


def with_backend(
    detector: CVAEDetector, backend: Backend, files: Sequence[TableFile], max_rows: int | None
) -> CVAEDetector:
    """The detector as the job is to use it.

    "auto" decides by the number of rows alone, so that a job that goes on after a kill decides alike.

    Raises
    ------
    ParameterError
        If ONNX Runtime is asked for and is not installed, or not for this model.
    """
    if backend not in BACKENDS:
        raise ParameterError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, not {backend!r}")
    engine = detector.model_.engine
    wanted = LEAST_ROWS * engine.n_graphs
    if backend == "torch" or (backend == "auto" and not _has_rows(files, max_rows, wanted)):
        return detector
    try:
        changed = engine.with_graphs()
    except ParameterError as why_not:
        if backend == "onnx":
            raise
        _LOG.info("scored by torch: %s", why_not)
        return detector
    other = copy.copy(detector)
    other.model_ = replace(detector.model_, engine=changed)
    return other


def _has_rows(files: Sequence[TableFile], max_rows: int | None, wanted: int) -> bool:
    """Whether the Parquet files have so many rows; those of other files are not known before they are read."""
    if max_rows is not None and max_rows < wanted:
        return False
    found = 0
    for file in files:
        try:
            found += file.n_rows or 0
        except DataError:
            continue  # it is named when its turn comes
        if found >= wanted:
            return True
    return False
