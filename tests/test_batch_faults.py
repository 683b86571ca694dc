"""Files that change half-way, groups without rows: everything is scored, or the file is named as bad."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from anomaly_cvae import CVAEDetector
from anomaly_cvae.batch import FileResult, ScoreOptions, read_table, score_files
from anomaly_cvae.errors import DataError

TINY = {"max_steps": 60, "hidden_dims": (16,), "n_estimators": 1, "random_state": 0, "device": "cpu"}


def rows(n: int, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    kind = rng.choice(["a", "b"], n)
    return pd.DataFrame({"id": np.arange(n), "kind": kind, "x": rng.normal(size=n), "n": rng.poisson(3, n)})


@pytest.fixture(scope="module")
def detector() -> CVAEDetector:
    return CVAEDetector(["kind"], ignore_columns=["id"], **TINY).fit(rows(300))


def scored(detector: CVAEDetector, path: Path, **options: Any) -> FileResult:
    out = path.parent / "out"
    (file,) = score_files(detector, [path], out, model_hash="0", options=ScoreOptions(**options)).files
    assert file.output.exists() == (file.status == "scored")
    return file


def stream(frame: pd.DataFrame, path: Path) -> bytes:
    table = pa.Table.from_pandas(frame, preserve_index=False)
    with pa.ipc.new_stream(path, table.schema) as sink:
        sink.write_table(table, max_chunksize=30)
    return path.read_bytes()


@pytest.mark.parametrize("second", ["the same columns", "other columns", "no table"])
def test_arrow_stream_with_something_behind_its_end_is_a_bad_file(detector, tmp_path, second):
    path = tmp_path / "a.arrow"
    more = {
        "the same columns": rows(50),
        "other columns": rows(50).rename(columns={"x": "y"}),
        "no table": rows(0),
    }[second]
    behind = b"and so on" if second == "no table" else stream(more, path)
    path.write_bytes(stream(rows(100), path) + behind)
    file = scored(detector, path)
    assert str(path) in file.error
    assert "file of its own" in file.error
    with pytest.raises(DataError, match="file of its own"):
        read_table(path)


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (rows(20_000).assign(extra=1.0), "line 60002"),
        (rows(20_000)[["id", "x", "kind", "n"]], "'x'"),
        (rows(20_000).assign(x="high"), "'high' in row 60,000"),
    ],
)
def test_csv_that_changes_its_columns_half_way_is_a_bad_file(detector, tmp_path, second, reason):
    path = tmp_path / "a.csv"
    path.write_text(rows(60_000).to_csv(index=False) + second.to_csv(index=False, header=False))
    file = scored(detector, path)
    assert file.status == "failed"
    assert str(path) in file.error
    assert reason in file.error


def test_second_header_in_the_middle_of_a_csv_is_a_bad_file(detector, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(rows(70).to_csv(index=False) * 2)
    assert "row 70" in scored(detector, path).error


@pytest.mark.parametrize("where", [None, "x is not null", "id >= 10"])
def test_row_groups_and_batches_without_rows_are_passed_over(detector, tmp_path, where):
    table = pa.Table.from_pandas(rows(40), preserve_index=False)
    parts = [table[:0], table[:15], table[:0], table[:0], table[15:], table[:0]]
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema) as parquet:
        for part in parts:
            parquet.write_table(part)
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups >= 5
    with pa.ipc.new_file(tmp_path / "b.arrow", table.schema) as arrow:
        for part in parts:
            arrow.write_batch(pa.record_batch(part.to_pydict(), schema=table.schema))
    expected = list(range(10 if where == "id >= 10" else 0, 40))
    for name in ("a.parquet", "b.arrow"):
        file = scored(detector, tmp_path / name, where=where)
        assert pq.read_table(file.output)["id"].to_pylist() == expected
        assert file.rows == len(expected)


def test_file_of_nothing_but_empty_row_groups_is_a_table_without_rows(detector, tmp_path):
    table = pa.Table.from_pandas(rows(40), preserve_index=False)
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema) as parquet:
        for _ in range(3):
            parquet.write_table(table[:0])
    for where in (None, "id > 3"):
        file = scored(detector, tmp_path / "a.parquet", where=where)
        assert pq.read_table(file.output).schema.names[:2] == ["id", "condition"]
        assert file.rows == 0


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
@pytest.mark.parametrize("where", [None, "id > 3"])
def test_parquet_cut_anywhere_is_a_bad_file(detector, tmp_path, share, where):
    path = tmp_path / "a.parquet"
    rows(500).to_parquet(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    file = scored(detector, path, where=where)
    assert file.status == "failed"
    assert str(path) in file.error
