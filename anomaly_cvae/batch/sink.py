"""Scored rows out: one Parquet file per input, written beside its place and renamed when it is complete."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pandas as pd

from anomaly_cvae.detector import UNKNOWN_CLASS
from anomaly_cvae.errors import MissingDependencyError, OutputError

PARTIAL = ".partial"
MISSING = "(missing)"
"""Where rows without a condition are counted."""
BYTES_PER_GROUP = 1 << 24
"""Of one row group, before compression."""
SCORED_TYPES = {
    "condition": "string",
    "negative_elbo": "double",
    "score": "double",
    "threshold": "double",
    "p_value": "double",
    "is_anomaly": "bool",
    "contrast": "double",
    "top_column": "string",
    "top_nats": "double",
}
"""Columns of a scored table and their Arrow types; the same in every file, whatever its rows."""


class ScoredFile:
    """Writes one scored file; nothing stands at ``path`` until all of it does.

    A context manager: on an error the unfinished file is removed.
    """

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self.path, self.metadata = path, dict(metadata)
        self.partial = partial_of(path)
        self.writer: Any = None
        self.waiting: list[Any] = []
        self.n_waiting = 0

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self

    def write(self, kept: Any, scored: pd.DataFrame) -> None:
        """Append rows: an Arrow table of kept input columns, then the scored ones."""
        arrow, _ = _pyarrow()
        table = arrow.table(
            [*kept.columns, *(_scored(scored[name]) for name in scored.columns)],
            names=[*kept.column_names, *map(str, scored.columns)],
        )
        self.waiting.append(table)
        self.n_waiting += table.nbytes
        if self.n_waiting >= BYTES_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        arrow, parquet = _pyarrow()
        if not self.waiting:
            return
        table = arrow.concat_tables(self.waiting)
        if self.writer is None:
            schema = table.schema.with_metadata({k.encode(): v.encode() for k, v in self.metadata.items()})
            self.writer = parquet.ParquetWriter(self.partial, schema)
        self.writer.write_table(table.replace_schema_metadata(self.writer.schema.metadata))
        self.waiting, self.n_waiting = [], 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
                self.writer.close()
                self.writer = None
                sync(self.partial)
                os.replace(self.partial, self.path)
                sync(self.path.parent)
        finally:
            self._abandon()

    def _abandon(self) -> None:
        if self.writer is not None:
            with suppress(OSError):  # the disk that made this file fail also refuses its footer
                self.writer.close()
        self.partial.unlink(missing_ok=True)


def partial_of(path: Path) -> Path:
    """Where a scored file is written before it takes its place."""
    return path.with_name(f".{path.name}{PARTIAL}")


def require_own(path: Path) -> None:
    """Raise unless nothing stands at ``path``, or a scored file does.

    Raises
    ------
    OutputError
        If it would be somebody else's file that is replaced.
    """
    if not path.exists():
        return
    try:
        own = any(name.startswith("anomaly_cvae.") for name in metadata_of(path))
    except (OSError, ValueError):
        own = False
    if not own:
        raise OutputError(f"{path}: stands there and is no scored file; take it away, or choose another output folder")


def _scored(cells: pd.Series) -> Any:
    arrow, _ = _pyarrow()
    kind = SCORED_TYPES[str(cells.name)]
    values = cells.astype(str).where(cells.notna(), None) if kind == "string" else cells
    return arrow.array(values.to_numpy(), type=kind, from_pandas=kind == "string")


def sync(path: Path) -> None:
    """Have the operating system write ``path``, a file or a folder, to the disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def metadata_of(path: Path) -> dict[str, str]:
    """What a scored file says of the model that scored it."""
    _, parquet = _pyarrow()
    pairs = parquet.read_schema(path).metadata or {}
    return {key.decode(): value.decode() for key, value in pairs.items() if key != b"ARROW:schema"}


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError("tables in files need pyarrow: pip install pyarrow") from error
    return pyarrow, pyarrow.parquet


def counts_by_class(scored: pd.DataFrame, known: Collection[str]) -> dict[str, tuple[int, int]]:
    """Rows and anomalies of each known class in a scored table; the others count as one."""
    names = scored["condition"].astype(object)
    names = names.where(names.isin(known), UNKNOWN_CLASS).where(names.notna(), MISSING)
    grouped = scored["is_anomaly"].groupby(names).agg(["size", "sum"])
    return {str(name): (int(n), int(flagged)) for name, n, flagged in grouped.itertuples()}
