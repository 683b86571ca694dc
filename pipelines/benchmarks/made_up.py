"""A table of any length with a condition, for benchmarks that need rows and not meaning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

ROWS_PER_GROUP = 1 << 19


def rows(n: int, n_columns: int, rng: np.random.Generator) -> pd.DataFrame:
    """``n`` rows: ``n_columns`` - 1 correlated numbers whose mean depends on ``kind``, one of three words."""
    kind = rng.integers(0, 3, n)
    factors = rng.normal(size=(n, 3))
    loadings = np.random.default_rng(0).normal(size=(3, n_columns - 1))
    values = factors @ loadings + rng.normal(size=(n, n_columns - 1)) + kind[:, None]
    frame = pd.DataFrame(values, columns=[f"x{i}" for i in range(n_columns - 1)])
    return frame.assign(kind=np.array(["a", "b", "c"], dtype=object)[kind])


def write(path: Path, n: int, n_columns: int, seed: int) -> None:
    """A Parquet file of ``n`` rows, made and written one row group at a time."""
    rng, writer = np.random.default_rng(seed), None
    for first in range(0, n, ROWS_PER_GROUP):
        table = pa.Table.from_pandas(rows(min(ROWS_PER_GROUP, n - first), n_columns, rng), preserve_index=False)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()
