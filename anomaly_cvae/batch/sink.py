"""Scored rows out: one Parquet file per input, written beside its place and renamed when it is complete."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import pandas as pd

from anomaly_cvae.batch.places import Place
from anomaly_cvae.errors import MissingDependencyError, OutputError
from anomaly_cvae.judging import UNKNOWN_CLASS

PARTIAL = ".partial"
MISSING = "(missing)"
"""Where rows without a condition are counted."""
BYTES_PER_GROUP = 1 << 22
"""Of one row group, at least, before compression: some 100,000 rows. What waits for more is written when nothing else
is left to do."""
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
    """Writes one scored file; nothing stands at ``path`` until `finish`.

    A context manager: what is not finished is removed at its end.
    """

    def __init__(self, path: Place, metadata: Mapping[str, str]) -> None:
        self.path, self.metadata = path, dict(metadata)
        self.partial = partial_of(path)
        self.writer: Any = None
        self.stream: IO[bytes] | None = None
        self.waiting: list[Any] = []
        self.n_waiting = 0

    def __enter__(self) -> Self:
        if isinstance(self.path, Path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        else:
            self.path.parent.mkdir()
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
            with self._faults_named():
                self._flush()

    @contextmanager
    def _faults_named(self) -> Iterator[None]:
        """What a file system at a URL raises, in our words."""
        with nullcontext() if isinstance(self.path, Path) else self.path.writing():
            yield

    def _flush(self) -> None:
        arrow, parquet = _pyarrow()
        if not self.waiting:
            return
        table = arrow.concat_tables(self.waiting)
        if self.writer is None:
            schema = table.schema.with_metadata({k.encode(): v.encode() for k, v in self.metadata.items()})
            if not isinstance(self.partial, Path):
                self.stream = self.partial.create()
            self.writer = parquet.ParquetWriter(self.stream or self.partial, schema)
        self.writer.write_table(table.replace_schema_metadata(self.writer.schema.metadata))
        self.waiting, self.n_waiting = [], 0

    def finish(self) -> None:
        """Write what is left, and put the file in its place."""
        with self._faults_named():
            self._flush()
            self.writer.close()
            self.writer = None
            self._publish()

    def _publish(self) -> None:
        self._close_stream()
        if isinstance(self.partial, Path):
            sync(self.partial)
        self.partial.replace(self.path)  # type: ignore[arg-type]  # of one file system
        if isinstance(self.path, Path):
            sync(self.path.parent)

    def _close_stream(self) -> None:
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(*([Exception] if self.stream else [OSError])):  # what made this file fail refuses its footer, too
            if self.writer is not None:
                self.writer.close()
        with suppress(Exception):
            self._close_stream()
        self.partial.unlink(missing_ok=True)


def partial_of(path: Place) -> Place:
    """Where a scored file is written before it takes its place."""
    return path.with_name(f".{path.name}{PARTIAL}")


def require_own(path: Place) -> None:
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


def metadata_of(path: Place) -> dict[str, str]:
    """What a scored file says of the model that scored it."""
    _, parquet = _pyarrow()
    with path.open("rb") as content:
        pairs = parquet.read_schema(content).metadata or {}
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
    codes, found = pd.factorize(scored["condition"])  # of a missing one: -1
    names = [MISSING, *(str(name) if name in known else UNKNOWN_CLASS for name in found)]
    flagged = scored["is_anomaly"].to_numpy(dtype=np.bool_)
    sizes, anomalies = (np.bincount(own + 1, minlength=len(names)) for own in (codes, codes[flagged]))
    totals = dict[str, tuple[int, int]]()
    for name, n, n_flagged in zip(names, sizes, anomalies, strict=True):
        if n:
            add_counts(totals, {name: (int(n), int(n_flagged))})
    return totals


def add_counts(totals: dict[str, tuple[int, int]], more: Mapping[str, tuple[int, int]]) -> None:
    """Add rows and anomalies per class to ``totals``."""
    for name, (rows, anomalies) in more.items():
        before = totals.get(name, (0, 0))
        totals[name] = (before[0] + rows, before[1] + anomalies)
