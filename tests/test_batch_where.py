"""Filters of rows: what they mean, what they refuse, and that a file is read no further than they need."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from anomaly_cvae import CVAEDetector
from anomaly_cvae.batch import FileResult, ScoreOptions, Summary, score_files
from anomaly_cvae.batch.filters import Where
from anomaly_cvae.batch.sink import metadata_of
from anomaly_cvae.errors import ParameterError

HASH = "0" * 64
TINY = {"max_steps": 60, "hidden_dims": (16,), "n_estimators": 1, "random_state": 0, "device": "cpu"}
N = 400
TABLE = pa.table(
    {
        "kind": ["a", "b", None, "a b"],
        "n": pa.array([1, 2, None, 4], pa.int32()),
        "x": [0.5, float("nan"), None, 2.5],
        "on": [True, False, None, True],
        "day": pa.array([datetime.date(2026, 1, i) for i in (1, 2, 3, 4)]),
        "at": pa.array([datetime.datetime(2026, 1, i, 12) for i in (1, 2, 3, 4)], pa.timestamp("us", "UTC")),
        "code": pa.array(["u", "v", None, "w"]).dictionary_encode(),
        "Torque [Nm]": [1.0, 2.0, 3.0, 4.0],
        "größe": [1, 2, 3, 4],
        "nothing": pa.nulls(4),
    }
)


def rows(n: int = N, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    kind = rng.choice(["007", "042"], n)
    return pd.DataFrame({"id": np.arange(n), "kind": kind, "x": rng.normal(size=n), "n": rng.poisson(3, n)})


@pytest.fixture(scope="module")
def detector() -> CVAEDetector:
    return CVAEDetector(["kind"], ignore_columns=["id"], **TINY).fit(rows())


def write(frame: pd.DataFrame, path: Path, rows_per_group: int = 50) -> Path:
    if path.suffix == ".parquet":
        frame.to_parquet(path, row_group_size=rows_per_group)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pandas(frame, preserve_index=False)
        with pa.ipc.new_stream(path, table.schema) as sink:
            sink.write_table(table, max_chunksize=70)
    else:
        frame.to_csv(path, index=False)
    return path


def score(detector: CVAEDetector, inputs: Any, out: Path, **options: Any) -> Summary:
    paths = inputs if isinstance(inputs, list) else [inputs]
    return score_files(detector, paths, out, model_hash=HASH, options=ScoreOptions(**options))


def only(summary: Summary) -> FileResult:
    (file,) = summary.files
    assert file.status != "failed", file.error
    return file


def read(file: FileResult) -> pd.DataFrame:
    return pq.read_table(file.output).to_pandas()


# ---------------------------------------------------------------------- what a filter means


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kind == 'a'", [0]),
        ("kind != 'a'", [1, 3]),
        ("not kind == 'a'", [1, 3]),
        ("'a' == kind", [0]),
        ("n > 1", [1, 3]),
        ("1 < n", [1, 3]),
        ("not n > 1", [0]),
        ("1 < n < 4", [1]),
        ("not (1 < n < 4)", [0, 3]),
        ("n >= 1.5", [1, 3]),
        ("n > -1", [0, 1, 3]),
        ("n in [1, 4]", [0, 3]),
        ("n not in [1, 4]", [1]),
        ("not n in [1, 4]", [1]),
        ("not n not in (1, 4)", [0, 3]),
        ("kind in ['a b']", [3]),
        ("x > 1", [3]),
        ("not x > 1", [0]),
        ("x != 0.5", [3]),
        ("x not in [0.5]", [3]),
        ("x is null", [1, 2]),
        ("x is not null", [0, 3]),
        ("not x is null", [0, 3]),
        ("n is None", [2]),
        ("on", [0, 3]),
        ("not on", [1]),
        ("on == false", [1]),
        ("on != True", [1]),
        ("kind == 'a' or n == 4", [0, 3]),
        ("not (kind == 'a' or n == 4)", [1]),
        ("(n == 1 or n == 2) and kind == 'b'", [1]),
        ("kind is null or n > 2", [2, 3]),
        ("day >= '2026-01-03'", [2, 3]),
        ("at < '2026-01-02 12:00'", [0]),
        ("at < '2026-01-02 13:00+01:00'", [0]),
        ("at in ['2026-01-02 12:00', '2026-01-04 12:00']", [1, 3]),
        ("code == 'v'", [1]),
        ("code not in ['v']", [0, 3]),
        ("`Torque [Nm]` > 2 and `Torque [Nm]` < 4", [2]),
        ("größe > 2 and `größe` < 4", [2]),
        ("kind == '`a`'", []),
        ("  n == 1\n or n == 2 ", [0, 1]),
        ("nothing == 'a'", []),
        ("nothing is null and nothing is null", [0, 1, 2, 3]),
    ],
)
def test_filter_takes_the_rows_that_it_says(text, expected):
    assert Where.parse(text).rows_of(TABLE).tolist() == expected


def test_filter_names_its_columns_once():
    assert Where.parse("n > 1 and (kind == 'a' or n is null)").columns == ("n", "kind")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("n = 1", "character 3"),
        ("n > ", "cannot be read"),
        ("", "cannot be read"),
        ("(n > 1", "cannot be read"),
        ("n + 1 > 2", "'n + 1 > 2'"),
        ("größe > 1 and abs(n) > 2", "'abs(n) > 2' at character 15"),
        ("__import__('os').system('true')", "is no condition"),
        ("a.b > 1", "'a.b > 1'"),
        ("n > x", "'n > x'"),
        ("1 < 2", "'1 < 2'"),
        ("n == null", "is null"),
        ("n in 3", "no list"),
        ("n in []", "no list"),
        ("n is 3", "is not null"),
        ("n in [x]", "'x'"),
        ("n > 1j", "'1j'"),
        ("n == 1 and n == 'a'", "numbers and text"),
        ("n in [1, 'a']", "numbers and text"),
        ("lambda: n", "is no condition"),
        ("n > 1; n < 3", "character 6"),
        ("(" * 500 + "n" + ")" * 500, "cannot be read"),
    ],
)
def test_what_is_no_filter_is_refused_with_the_place(text, part):
    with pytest.raises(ParameterError, match="where") as refused:
        Where.parse(text)
    assert part in str(refused.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("kinds == 'a'", ["'kinds'", "did you mean 'kind'"]),
        ("n == 'a'", ["'n' holds numbers", "quotes away"]),
        ("kind > 3", ["'kind' holds text", "in quotes"]),
        ("kind", ["'kind' holds text", "neither true nor false"]),
        ("on == 1", ["'on' holds truth values"]),
        ("at > 3", ["'at' holds times"]),
        ("at > 'noon'", ["'noon'", "2026-01-31"]),
        ("n > 99999999999999999999999", ["99999999999999999999999"]),
    ],
)
def test_filter_that_does_not_go_with_the_columns_is_refused_by_name(text, parts):
    with pytest.raises(ParameterError) as refused:
        Where.parse(text).rows_of(TABLE)
    assert all(part in str(refused.value) for part in parts), str(refused.value)


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.arrow"])
@pytest.mark.parametrize("where", ["kind == '007' and x > 0", "id >= 120 and id < 260", "id < 0"])
def test_scored_rows_are_those_of_the_filter(detector, tmp_path, name, where):
    table = rows(seed=1)
    path = write(table, tmp_path / name)
    file = only(score(detector, path, tmp_path / "out", where=where))
    kept = table.query(where)
    assert read(file)["id"].astype(int).tolist() == kept["id"].tolist()
    expected = detector.score_table(kept)["negative_elbo"]
    np.testing.assert_allclose(read(file)["negative_elbo"], expected, rtol=1e-4, atol=1e-4)
    assert file.rows == len(kept)
    assert metadata_of(file.output)["anomaly_cvae.where"] == where


def test_columns_of_the_filter_are_not_kept_unless_asked_for(detector, tmp_path):
    table = rows().assign(machine=["M", "L"] * (N // 2))
    file = only(score(detector, write(table, tmp_path / "a.parquet"), tmp_path / "out", where="machine == 'L'"))
    assert "machine" not in read(file)
    assert read(file)["id"].tolist() == table["id"][1::2].tolist()


def test_row_groups_that_the_statistics_rule_out_are_not_read(detector, tmp_path):
    path = write(rows(), tmp_path / "a.parquet")
    groups = pq.ParquetFile(path).metadata
    content = bytearray(path.read_bytes())
    for group in (0, 1, 2, 5, 6, 7):  # cells of these groups can no longer be read
        for column in range(groups.num_columns):
            chunk = groups.row_group(group).column(column)
            start = chunk.dictionary_page_offset or chunk.data_page_offset
            content[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    path.write_bytes(content)
    file = only(score(detector, path, tmp_path / "out", where="id in [170, 171] or id == 249"))
    assert read(file)["id"].tolist() == [170, 171, 249]
    assert score(detector, path, tmp_path / "out2").failed


def test_nan_is_missing_in_row_groups_without_null(detector, tmp_path):
    table = pa.Table.from_pandas(rows(100), preserve_index=False)
    cells = table["x"].to_numpy().copy()
    cells[77] = np.nan
    place = table.schema.get_field_index("x")
    pq.write_table(table.set_column(place, "x", pa.array(cells)), tmp_path / "a.parquet", row_group_size=10)
    file = only(score(detector, tmp_path / "a.parquet", tmp_path / "out", where="x is null"))
    assert read(file)["id"].tolist() == [77]


def test_text_of_csv_is_compared_as_training_had_it(detector, tmp_path):
    path = write(rows(), tmp_path / "a.csv")
    with pytest.raises(ParameterError, match="where"):
        score(detector, path, tmp_path / "out", where="kindd == 7")
    failed = score(detector, path, tmp_path / "out", where="kind == 7").failed
    assert "'kind' holds text" in failed[0].error
    assert str(path) in failed[0].error
    file = only(score(detector, path, tmp_path / "out", where="kind == '007'"))
    assert file.rows == (rows()["kind"] == "007").sum()


def test_other_columns_of_csv_are_what_they_are_compared_with(detector, tmp_path):
    table = rows().assign(code=["01", "2"] * (N // 2), ok=["true", "false"] * (N // 2))
    table.loc[4, "code"] = "NA"
    path = write(table, tmp_path / "a.csv")
    for where, n in (
        ("code == 1", N // 2 - 1), ("code == '1'", 0), ("code == '01'", N // 2 - 1), ("code is null", 1),
        ("ok", N // 2), ("not ok", N // 2),
    ):  # fmt: skip
        assert only(score(detector, path, tmp_path / "out", where=where)).rows == n, where


def test_bad_cell_is_named_with_its_row_of_the_file(detector, tmp_path):
    table = rows()
    table.loc[321, "x"] = np.inf
    for name in ("a.parquet", "a.csv", "a.arrow"):
        path = write(table, tmp_path / name)
        (failed,) = score(detector, path, tmp_path / "out", where="id > 300").failed
        assert "row 321" in failed.error or "inf" in failed.error, failed.error
        assert only(score(detector, path, tmp_path / "out", where="id != 321")).rows == N - 1
    text = table.astype({"x": object})
    text.loc[321, "x"] = "broken"
    (failed,) = score(detector, write(text, tmp_path / "b.csv"), tmp_path / "out", where="id > 300").failed
    assert "'broken' in row 321" in failed.error


def test_unseen_class_is_named_with_its_row_of_the_file(detector, tmp_path):
    table = rows()
    table.loc[321, "kind"] = "999"
    (failed,) = score(detector, write(table, tmp_path / "a.parquet"), tmp_path / "out", where="id > 300").failed
    assert "row 321 of the file" in failed.error


def test_filter_is_checked_before_anything_is_written(detector, tmp_path):
    write(rows(), tmp_path / "a.parquet")
    for where in ("id == 'x'", "machine == 'M'", "id =="):
        with pytest.raises(ParameterError, match="where"):
            score(detector, tmp_path / "a.parquet", tmp_path / "out", where=where)
    assert not (tmp_path / "out").exists()


def test_file_without_the_columns_of_the_filter_is_a_bad_file_among_good_ones(detector, tmp_path):
    (tmp_path / "in").mkdir()
    write(rows().assign(machine="M"), tmp_path / "in" / "a.parquet")
    write(rows(), tmp_path / "in" / "b.parquet")
    write(rows().assign(machine=1), tmp_path / "in" / "c.parquet")
    summary = score(detector, tmp_path / "in", tmp_path / "out", where="machine == 'M'")
    assert [file.status for file in summary.files] == ["scored", "failed", "failed"]
    assert "'machine'" in summary.files[1].error
    assert "'machine' holds numbers" in summary.files[2].error


def test_another_filter_scores_anew_and_the_same_does_not(detector, tmp_path):
    path, out = write(rows(), tmp_path / "a.parquet"), tmp_path / "out"
    assert only(score(detector, path, out, where="id < 10")).status == "scored"
    assert only(score(detector, path, out, where="id < 10")).status == "unchanged"
    assert only(score(detector, path, out, where="id < 20")).rows == 20
    assert only(score(detector, path, out)).rows == N


# ---------------------------------------------------------------------- at most so many rows


def three(folder: Path) -> Path:
    folder.mkdir()
    for i, name in enumerate(("a.csv", "b.parquet", "c.arrow")):
        write(rows(100, seed=i), folder / name)
    return folder


def counts(summary: Summary) -> list[tuple[str, str, int, bool]]:
    return [(file.path.name, file.status, file.rows, file.cut) for file in summary.files]


def test_no_more_rows_are_scored_than_asked_for_and_later_files_not_opened(detector, tmp_path):
    folder = three(tmp_path / "in")
    (folder / "c.arrow").write_bytes(b"not arrow")
    summary = score(detector, folder, tmp_path / "out", max_rows=130)
    assert counts(summary) == [("a.csv", "scored", 100, False), ("b.parquet", "scored", 30, True)]
    assert summary.rows == 130
    assert summary.limited
    assert summary.not_opened == 1
    assert read(summary.files[1])["id"].tolist() == list(range(30))
    assert sorted(path.name for path in (tmp_path / "out").glob("*.parquet")) == ["a.csv.parquet", "b.parquet"]


def test_limit_counts_rows_after_the_filter(detector, tmp_path):
    summary = score(detector, three(tmp_path / "in"), tmp_path / "out", max_rows=30, where="id >= 80")
    assert counts(summary) == [("a.csv", "scored", 20, False), ("b.parquet", "scored", 10, True)]
    assert read(summary.files[1])["id"].tolist() == list(range(80, 90))


def test_limit_that_is_not_reached_limits_nothing(detector, tmp_path):
    summary = score(detector, three(tmp_path / "in"), tmp_path / "out", max_rows=300)
    assert not summary.limited
    assert summary.rows == 300
    again = score(detector, tmp_path / "in", tmp_path / "out")
    assert [file.status for file in again.files] == ["unchanged"] * 3


def test_cut_file_is_finished_by_a_job_without_the_limit(detector, tmp_path):
    folder, out = three(tmp_path / "in"), tmp_path / "out"
    score(detector, folder, out, max_rows=130)
    again = score(detector, folder, out, max_rows=130)
    assert counts(again) == [("a.csv", "unchanged", 100, False), ("b.parquet", "unchanged", 30, True)]
    whole = score(detector, folder, out)
    assert counts(whole) == [
        ("a.csv", "unchanged", 100, False), ("b.parquet", "scored", 100, False), ("c.arrow", "scored", 100, False),
    ]  # fmt: skip
    assert "anomaly_cvae.max_rows" not in metadata_of(whole.files[1].output)


def test_limit_holds_where_more_was_scored_before(detector, tmp_path):
    folder, out = three(tmp_path / "in"), tmp_path / "out"
    score(detector, folder, out)
    summary = score(detector, folder, out, max_rows=130)
    assert counts(summary) == [("a.csv", "unchanged", 100, False), ("b.parquet", "scored", 30, True)]
    assert metadata_of(summary.files[1].output)["anomaly_cvae.max_rows"] == "30"


def test_limit_below_one_is_refused(detector, tmp_path):
    with pytest.raises(ParameterError, match="max_rows"):
        score(detector, three(tmp_path / "in"), tmp_path / "out", max_rows=0)


def test_progress_of_a_limited_job_ends_at_the_whole(detector, tmp_path):
    seen = []
    options = ScoreOptions(max_rows=130)
    folder = three(tmp_path / "in")
    score_files(detector, [folder], tmp_path / "out", model_hash=HASH, options=options, on_progress=seen.append)
    assert seen[-1].done == 1.0
    assert seen[-1].seconds_left == 0.0
