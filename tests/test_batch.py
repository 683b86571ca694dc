"""Scoring of files: what comes out is what the detector says, and no kill, bad file or full disk loses a row."""

from __future__ import annotations

import copy
import datetime
import gzip
import json
import multiprocessing
import os
import re
import resource
import signal
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import torch

from anomaly_cvae import CVAEDetector, __version__
from anomaly_cvae.batch import CsvFormat, FileResult, ScoreOptions, Summary, score_files
from anomaly_cvae.batch.manifest import Manifest
from anomaly_cvae.batch.sink import metadata_of
from anomaly_cvae.errors import DataError, OutputError, ParameterError

HASH = "0" * 64
SCORED = ["condition", "negative_elbo", "score", "threshold", "p_value", "is_anomaly"]
TINY = {"max_steps": 60, "hidden_dims": (16,), "n_estimators": 1, "random_state": 0, "device": "cpu"}
FILLERS = [f"filler {i}" for i in range(520)]
"""With so many columns the job reads 1,024 rows at a time."""


def rows(n: int, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "id": [f"{i:05d}" for i in range(n)],
            "color": rng.choice(["red", "blue"], n),
            "kind": rng.choice(["007", "042"], n),
            "x": rng.normal(size=n),
            "n": rng.poisson(3, n),
        }
    )


def wide(frame: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([frame, pd.DataFrame(0.0, index=frame.index, columns=FILLERS)], axis=1)


@pytest.fixture(scope="module")
def detector() -> CVAEDetector:
    return CVAEDetector(["kind"], ignore_columns=["id"], **TINY).fit(rows(300))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the inputs are put."""
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def with_policy(detector: CVAEDetector, **policy: str) -> CVAEDetector:
    return copy.deepcopy(detector).set_params(**policy)


def write(frame: pd.DataFrame, path: Path) -> Path:
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pandas(frame, preserve_index=False)
        with pa.ipc.new_stream(path, table.schema) as sink:
            sink.write_table(table, max_chunksize=70)
    else:
        frame.to_csv(path, index=False)
    return path


def score(detector: CVAEDetector, inputs: Any, out: Path, model_hash: str = HASH, **options: Any) -> Summary:
    paths = inputs if isinstance(inputs, list) else [inputs]
    return score_files(detector, paths, out, model_hash=model_hash, options=ScoreOptions(**options))


def only(summary: Summary) -> FileResult:
    (file,) = summary.files
    return file


def scored(file: FileResult) -> pd.DataFrame:
    assert file.status == "scored", file.error
    return pq.read_table(file.output).to_pandas()


def statuses(summary: Summary) -> dict[str, str]:
    return {file.path.name: file.status for file in summary.files}


def assert_scores(got: pd.DataFrame, expected: pd.DataFrame) -> None:
    """Equal but for the rounding of float32 between batches."""
    got, expected = got.reset_index(drop=True), expected.reset_index(drop=True)
    pd.testing.assert_frame_equal(got, expected, check_dtype=False, rtol=1e-4, atol=1e-4)


def left_over(out: Path) -> list[str]:
    """Files in the output folder that are neither finished nor the job's own books."""
    known = {"_manifest.jsonl", ".lock"}
    return [path.name for path in out.rglob("*") if path.is_file() and path.suffix != ".parquet"
            and path.name not in known]  # fmt: skip


# ---------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.arrow"])
def test_scores_in_the_file_are_those_of_the_detector(detector, folder, out, name):
    table = rows(200, seed=1)
    table.loc[3, "x"] = 50.0
    table.loc[7, "x"] = np.nan
    file = only(score(detector, write(table, folder / name), out, contrast=True, top_column=True))
    expected = detector.score_table(table, contrast=True, top_column=True)
    assert_scores(scored(file)[expected.columns], expected)
    assert scored(file)["is_anomaly"][3]
    assert scored(file)["id"].tolist() == table["id"].tolist()


def test_batches_do_not_show_in_the_scores(detector, folder, out):
    table = rows(3000, seed=1)
    file = only(score(detector, write(wide(table), folder / "a.parquet"), out, keep_all=True))
    assert_scores(scored(file)[SCORED], detector.score_table(table))


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.arrow"])
def test_scored_columns_have_one_order_and_type_whatever_the_rows(detector, folder, out, name):
    types = [pa.string(), *[pa.float64()] * 4, pa.bool_(), pa.float64(), pa.string(), pa.float64()]
    for n in (50, 0):
        write(rows(n), folder / name)
        file = only(score(detector, folder, out, contrast=True, top_column=True))
        assert file.status == "scored", file.error
        schema = pq.read_schema(file.output)
        assert schema.names == ["id", *SCORED, "contrast", "top_column", "top_nats"]
        assert schema.types[1:] == types


def test_columns_in_another_order_are_found_by_name(detector, folder, out):
    table = rows(100, seed=1)
    shuffled = table.assign(extra="?")[["n", "extra", "kind", "x", "id", "color"]]
    file = only(score(detector, write(shuffled, folder / "a.csv"), out))
    assert_scores(scored(file)[SCORED], detector.score_table(table))


def test_columns_named_by_numbers_are_found_and_named(folder, out):
    table = rows(200)[["x", "n", "kind"]].set_axis([0, 1, 2], axis=1)
    detector = CVAEDetector([2], **TINY).fit(table)
    write(table.set_axis(["0", "1", "2"], axis=1), folder / "a.parquet")
    file = only(score(detector, folder, out, top_column=True))
    found = scored(file)
    assert set(found["top_column"].dropna()) <= {"0", "1"}
    assert found["top_column"].notna().equals(found["is_anomaly"])
    assert found["is_anomaly"].any()


def test_files_keep_their_places_below_the_input_folder(detector, folder, out):
    (folder / "sub" / "deep").mkdir(parents=True)
    write(rows(5), folder / "sub" / "a.parquet")
    write(rows(5), folder / "sub" / "deep" / "b.csv")
    score(detector, folder, out)
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*.parquet")) == [
        "sub/a.parquet", "sub/deep/b.csv.parquet",
    ]  # fmt: skip


def test_scored_file_says_which_model_scored_it(detector, folder, out):
    file = only(score(detector, write(rows(20), folder / "a.csv"), out))
    metadata = metadata_of(file.output)
    assert metadata["anomaly_cvae.model_sha256"] == HASH
    assert metadata["anomaly_cvae.version"] == __version__
    assert metadata["anomaly_cvae.score_kind"] == "elbo"
    assert metadata["anomaly_cvae.input"] == "a.csv"


def test_summary_counts_rows_and_anomalies_per_class(detector, folder, out):
    tables = {name: rows(150, seed) for seed, name in enumerate(["a.parquet", "b.csv"])}
    for name, table in tables.items():
        table.loc[:4, "x"] = 50.0
        write(table, folder / name)
    summary = score(detector, folder, out)
    expected = detector.score_table(pd.concat(tables.values(), ignore_index=True)).groupby("condition")["is_anomaly"]
    assert summary.rows == 300
    assert summary.classes["rows"].to_dict() == expected.size().to_dict()
    assert summary.classes["anomalies"].to_dict() == expected.sum().to_dict()
    np.testing.assert_allclose(summary.classes["share"], expected.mean())
    assert sum(file.anomalies for file in summary.files) == expected.sum().sum()
    assert set(summary.stages) == {"read", "score", "write"}
    again = score(detector, folder, out)  # counts of unchanged files are still told
    assert again.rows == 0
    pd.testing.assert_frame_equal(again.classes, summary.classes)


# ---------------------------------------------------------------------- kept columns


def test_columns_that_training_ignored_are_kept_where_they_are_there(detector, folder, out):
    write(rows(10), folder / "a.parquet")
    write(rows(10).drop(columns="id"), folder / "b.parquet")
    first, second = score(detector, folder, out).files
    assert list(scored(first).columns) == ["id", *SCORED]
    assert list(scored(second).columns) == SCORED


def test_kept_columns_stand_first_in_the_order_asked_for(detector, folder, out):
    write(rows(10).assign(note="n"), folder / "a.parquet")
    file = only(score(detector, folder, out, keep=("x", "note", "kind", "x")))
    assert list(scored(file).columns) == ["x", "note", "kind", *SCORED]
    assert scored(file)["x"].tolist() == rows(10)["x"].tolist()


def test_no_column_is_kept_when_none_is_asked_for(detector, folder, out):
    write(rows(10), folder / "a.parquet")
    assert list(scored(only(score(detector, folder, out, keep=()))).columns) == SCORED


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.arrow"])
def test_all_columns_are_kept_in_the_order_of_the_file(detector, folder, out, name):
    table = rows(10).assign(note="n")
    file = only(score(detector, write(table, folder / name), out, keep_all=True))
    assert list(scored(file).columns) == [*table.columns, *SCORED]
    kept = scored(file)[["id", "note", "kind", "x", "n"]]
    if name.endswith(".csv"):  # kept cells of CSV files are text, as they stand
        kept = kept.astype({"id": table["id"].dtype, "x": float, "n": int})
    assert_scores(kept, table[["id", "note", "kind", "x", "n"]])


def test_all_columns_are_kept_of_a_csv_with_the_nameless_index_that_pandas_writes(detector, folder, out):
    rows(10).to_csv(folder / "a.csv")
    assert scored(only(score(detector, folder, out, keep_all=True)))["id"].tolist() == rows(10)["id"].tolist()


@pytest.mark.parametrize("index", ["kind", "id", None])
def test_parquet_that_pandas_wrote_with_an_index_is_scored(detector, folder, out, index):
    table = rows(40)
    (table.set_index(index) if index else table[table["n"] >= 0].sample(frac=1, random_state=0).sort_index()[::2]
     ).to_parquet(folder / "a.parquet")  # fmt: skip
    file = only(score(detector, folder, out, keep_all=True))
    table = table if index else table[::2]
    assert_scores(scored(file)[SCORED], detector.score_table(table))
    assert scored(file)["id"].tolist() == table["id"].tolist()


@pytest.mark.parametrize("name", ["score", "condition", "is_anomaly"])
def test_kept_column_named_as_a_scored_one_is_refused_with_the_file(detector, folder, out, name):
    write(rows(10).assign(**{name: 1.0}), folder / "a.parquet")
    file = only(score(detector, folder, out, keep=("id", name)))
    assert file.status == "failed"
    assert "a.parquet" in file.error
    assert repr(name) in file.error
    # Not kept, it is in nobody's way; nor is a name that this job does not write.
    assert only(score(detector, folder, out)).status == "scored"
    write(rows(10).assign(contrast=1.0), folder / "a.parquet")
    assert only(score(detector, folder, out, keep=("contrast",))).status == "scored"


def test_kept_column_that_is_not_there_is_refused_with_the_nearest_name(detector, folder, out):
    write(rows(10), folder / "a.parquet")
    before = scored(only(score(detector, folder, out)))
    with pytest.raises(ParameterError, match="'color'"):
        score(detector, folder, out, keep=("colour",))
    pd.testing.assert_frame_equal(pd.read_parquet(out / "a.parquet"), before)  # what stood there stands


def test_output_of_another_input_is_not_taken_for_unchanged(detector, tmp_path, out):
    for day, n in (("day1", 30), ("day2", 20)):
        (tmp_path / day).mkdir()
        write(rows(n), tmp_path / day / "a.parquet")
    counts = []
    for day in ("day1", "day2", "day1"):
        file = only(score(detector, tmp_path / day, out))
        counts.append((file.status, len(pd.read_parquet(out / "a.parquet"))))
    assert counts == [("scored", 30), ("scored", 20), ("scored", 30)]


def test_somebody_elses_file_is_not_replaced(detector, folder, out):
    write(rows(10), folder / "a.parquet")
    out.mkdir(exist_ok=True)
    rows(3).to_parquet(out / "a.parquet")
    with pytest.raises(OutputError, match="no scored file"):
        score(detector, folder, out)
    assert len(pd.read_parquet(out / "a.parquet")) == 3


def test_unfinished_files_of_others_below_the_output_folder_are_left_alone(detector, folder, out):
    write(rows(10), folder / "a.parquet")
    (out / "sub").mkdir(parents=True)
    (out / "sub" / ".theirs.parquet.partial").write_bytes(b"PAR1")
    score(detector, folder, out)
    assert (out / "sub" / ".theirs.parquet.partial").exists()


@pytest.mark.parametrize("column", ["n", "x"])
def test_one_cell_that_is_no_number_is_named_with_its_row_of_the_file(detector, folder, out, column):
    table = rows(3000).astype({column: object})
    table.loc[2500, column] = "?"
    write(table, folder / "a.csv")
    file = only(score(detector, folder, out))
    assert file.status == "failed"
    for part in (f"'{column}'", "'?'", "row 2,500", str(folder / "a.csv")):
        assert part in file.error


def test_numbers_where_training_had_numbers_are_not_accepted_as_text(folder, out):
    table = rows(300).assign(kind=np.arange(300) % 3)
    detector = CVAEDetector(["kind"], ignore_columns=["id"], unseen_class="anomaly", **TINY).fit(table)
    write(table.assign(kind=table["kind"].astype(str)), folder / "a.parquet")
    file = only(score(detector, folder, out))
    assert file.status == "failed"
    assert "held numbers in training" in file.error


def test_kept_cells_of_csv_are_text_as_it_stands(detector, folder, out):
    codes = ["007", "1e5", "1.50", "1,234", "True", "2024-01-02", "é", "two\nlines"]
    table = rows(len(codes)).assign(id=codes)
    assert scored(only(score(detector, write(table, folder / "a.csv"), out)))["id"].tolist() == codes


@pytest.mark.parametrize("code", ["NA", "None", "null", "nan"])
def test_kept_code_that_reads_like_a_missing_one_is_kept(detector, folder, out, code):
    table = rows(3).assign(id=["a", code, "b"])
    assert scored(only(score(detector, write(table, folder / "a.csv"), out)))["id"].tolist() == ["a", code, "b"]


def test_kept_cells_of_csv_have_one_type_in_every_batch(detector, folder, out):
    table = rows(3000).assign(id=[*["1"] * 1500, *["one"] * 1500])
    file = only(score(detector, write(wide(table), folder / "a.csv"), out, keep_all=True))
    assert scored(file)["id"].tolist() == table["id"].tolist()
    assert scored(file)["n"].tolist() == table["n"].astype(str).tolist()


def test_kept_true_and_false_of_csv_may_be_missing_deep_in_the_file(folder, out):
    table = rows(3000).assign(ok=np.arange(3000) % 2 == 0)
    detector = CVAEDetector(["kind"], ignore_columns=["id", *FILLERS], **TINY).fit(wide(table[:300]))
    table["ok"] = table["ok"].astype(object)
    table.loc[2000, "ok"] = None
    file = only(score(detector, write(wide(table), folder / "a.csv"), out, keep_all=True))
    assert (scored(file)["ok"] == "").sum() == 1


MIDNIGHT = datetime.datetime(2024, 1, 1)
KEPT: dict[str, tuple[pa.DataType, Any, Any]] = {
    "text": (pa.string(), None, "a"),
    "large text": (pa.large_string(), None, "a"),
    "date": (pa.date32(), None, MIDNIGHT.date()),
    "moment": (pa.timestamp("us", tz="UTC"), None, MIDNIGHT.replace(tzinfo=datetime.UTC)),
    "duration": (pa.duration("us"), None, datetime.timedelta(1)),
    "true or false": (pa.bool_(), None, True),
    "small whole": (pa.int8(), None, 3),
    "large whole": (pa.uint64(), 1, 2**63 + 5),
    "whole": (pa.int64(), None, 2**62 + 1),
    "float": (pa.float32(), None, 1.5),
    "decimal": (pa.decimal128(12, 2), Decimal("1.50"), Decimal("12345.25")),
    "bytes": (pa.binary(), None, b"\xff"),
    "list": (pa.list_(pa.int32()), [], [1, 2]),
    "struct": (pa.struct([("a", pa.int32())]), None, {"a": 1}),
    "map": (pa.map_(pa.string(), pa.int32()), [("a", 1)], [("b", 2)]),
    "categories": (pa.dictionary(pa.int8(), pa.string()), "a", "b"),
}


@pytest.mark.parametrize("what", KEPT)
def test_kept_cells_of_parquet_come_out_as_they_went_in(detector, folder, out, what):
    """Also where the first batch says little of the type: all missing, or shorter than later ones."""
    kind, first, later = KEPT[what]
    cells = pa.array([*[first] * 1500, *[later] * 600], kind)
    table = pa.Table.from_pandas(wide(rows(2100)), preserve_index=False).append_column("extra", cells)
    pq.write_table(table, folder / "a.parquet")
    file = only(score(detector, folder, out, keep=("extra", *FILLERS)))
    assert file.status == "scored", file.error
    got = pq.read_table(file.output)["extra"]
    assert got.to_pylist() == cells.to_pylist()


# ---------------------------------------------------------------------- classes


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.arrow"])
def test_class_names_made_of_digits_stay_text(detector, folder, out, name):
    file = only(score(detector, write(rows(50), folder / name), out))
    assert scored(file)["condition"].tolist() == rows(50)["kind"].tolist()
    assert set(file.classes) == {"007", "042"}


def test_unseen_class_ends_the_file_or_is_flagged_as_the_detector_says(detector, folder, out):
    table = rows(50)
    table.loc[9, "kind"] = "099"
    write(table, folder / "a.csv")
    file = only(score(detector, folder, out))
    assert file.status == "failed"
    assert "a.csv" in file.error
    assert "'099'" in file.error
    assert "unseen_class" in file.error
    flagged = scored(only(score(with_policy(detector, unseen_class="anomaly"), folder, out)))
    assert flagged["is_anomaly"][9]
    assert flagged["condition"][9] == "099"


def test_missing_condition_names_file_row_and_remedy_or_is_averaged_over(detector, folder, out):
    table = rows(50)
    table.loc[9, "kind"] = None
    for name in ("a.csv", "b.parquet"):
        write(table, folder / name)
        file = only(score(detector, folder / name, out))
        assert file.status == "failed"
        assert name in file.error
        assert "row 9" in file.error
        assert "missing_condition" in file.error
        marginal = with_policy(detector, missing_condition="marginal")
        again = only(score(marginal, folder / name, out))
        assert pd.isna(scored(again)["condition"][9])
        assert_scores(scored(again)[SCORED], marginal.score_table(table))
        assert again.classes["(missing)"][0] == 1


def test_whole_numbers_where_classes_are_text_are_explained(detector, folder, out):
    """'42 is a class not seen in training; seen: 007, 042' helps nobody."""
    write(rows(20).assign(kind=42), folder / "a.parquet")
    file = only(score(detector, folder, out))
    assert file.status == "failed"
    assert re.search("text|number", file.error.replace(str(folder), "")), file.error


def test_detector_without_condition_scores_files(folder, out):
    table = rows(200)[["x", "n"]]
    detector = CVAEDetector(**TINY).fit(table)
    file = only(score(detector, write(table, folder / "a.csv"), out))
    assert_scores(scored(file)[SCORED], detector.score_table(table))
    assert file.classes["all"][0] == 200


def test_detector_fitted_with_condition_beside_the_table_is_refused(folder, out):
    table = rows(100)
    detector = CVAEDetector(**TINY).fit(table[["x", "n"]], condition=table["kind"])
    write(table, folder / "a.csv")
    with pytest.raises(ParameterError, match="condition_columns"):
        score(detector, folder, out)


# ---------------------------------------------------------------------- run again


def three_files(folder: Path, n: int = 20) -> None:
    for seed, name in enumerate(["a.parquet", "b.csv", "c.arrow"]):
        write(rows(n, seed), folder / name)


def test_unchanged_files_are_not_scored_again(detector, folder, out):
    three_files(folder)
    first = score(detector, folder, out)
    written = {file.output: file.output.stat().st_mtime_ns for file in first.files}
    again = score(detector, folder, out, on_error="fail")
    assert {file.status for file in again.files} == {"unchanged"}
    assert written == {file.output: file.output.stat().st_mtime_ns for file in again.files}
    assert [(file.rows, file.anomalies) for file in again.files] == [
        (file.rows, file.anomalies) for file in first.files
    ]


def test_changed_file_is_scored_again_and_the_others_are_not(detector, folder, out):
    three_files(folder)
    score(detector, folder, out)
    write(rows(30, seed=9), folder / "b.csv")
    again = score(detector, folder, out)
    assert statuses(again) == {"a.parquet": "unchanged", "b.csv": "scored", "c.arrow": "unchanged"}
    assert len(scored(again.files[1])) == 30


def test_file_of_the_same_length_written_later_is_scored_again(detector, folder, out):
    path = write(rows(20), folder / "a.parquet")
    score(detector, folder, out)
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert only(score(detector, folder, out)).status == "scored"


def test_new_file_is_scored_beside_unchanged_ones(detector, folder, out):
    three_files(folder)
    score(detector, folder, out)
    write(rows(5), folder / "d.parquet")
    assert list(statuses(score(detector, folder, out)).values()) == ["unchanged"] * 3 + ["scored"]


def test_deleted_output_is_made_again(detector, folder, out):
    three_files(folder)
    first = score(detector, folder, out)
    first.files[1].output.unlink()
    assert list(statuses(score(detector, folder, out)).values()) == ["unchanged", "scored", "unchanged"]
    assert first.files[1].output.is_file()


@pytest.mark.parametrize(
    "changed",
    [
        {"model_hash": "1" * 64},
        {"contrast": True},
        {"top_column": True},
        {"keep": ("id", "x")},
        {"keep": ()},
        {"keep_all": True},
        {"csv_format": CsvFormat(delimiter=",")},
    ],
    ids=str,
)
def test_other_model_or_options_score_every_file_again(detector, folder, out, changed):
    three_files(folder)
    score(detector, folder, out)
    again = score(detector, folder, out, **changed)
    assert {file.status for file in again.files} == {"scored"}
    assert {metadata_of(file.output)["anomaly_cvae.model_sha256"] for file in again.files} == {
        changed.get("model_hash", HASH)
    }
    assert {file.status for file in score(detector, folder, out, **changed).files} == {"unchanged"}


@pytest.mark.parametrize(
    "policy", [{"unseen_class": "anomaly"}, {"missing_condition": "marginal"}, {"score_kind": "both"}], ids=str
)
def test_other_policy_scores_every_file_again(detector, folder, out, policy):
    write(rows(20), folder / "a.parquet")
    score(detector, folder, out)
    assert only(score(with_policy(detector, **policy), folder, out)).status == "scored"


def test_what_to_do_on_errors_changes_no_file(detector, folder, out):
    write(rows(20), folder / "a.parquet")
    score(detector, folder, out, on_error="skip")
    assert only(score(detector, folder, out, on_error="fail")).status == "unchanged"


def test_file_that_failed_is_tried_again(detector, folder, out):
    write(rows(20).drop(columns="x"), folder / "a.csv")
    assert only(score(detector, folder, out)).status == "failed"
    write(rows(20), folder / "a.csv")
    assert only(score(detector, folder, out)).status == "scored"


def test_kill_under_another_model_leaves_no_file_that_passes_for_the_first_ones(detector, folder, out, monkeypatch):
    """Killed after the second model's file took its place, and before that was noted."""
    write(rows(20), folder / "a.parquet")
    score(detector, folder, out)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            score(detector, folder, out, model_hash="1" * 64)
    file = only(score(detector, folder, out))
    assert metadata_of(file.output)["anomaly_cvae.model_sha256"] == HASH


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b'{"version": 1}', b'{"version": 1, "identity": 1}']
)
def test_corrupt_manifest_is_refused_by_name_with_the_remedy(detector, folder, out, content):
    write(rows(20), folder / "a.parquet")
    score(detector, folder, out)
    (out / "_manifest.jsonl").write_bytes(content)
    with pytest.raises(DataError, match="delete it") as caught:
        score(detector, folder, out)
    assert str(out / "_manifest.jsonl") in str(caught.value)
    (out / "_manifest.jsonl").unlink()
    assert only(score(detector, folder, out)).status == "scored"


def test_unfinished_file_of_a_killed_job_is_cleared_away(detector, folder, out):
    (folder / "sub").mkdir()
    write(rows(20), folder / "sub" / "a.parquet")
    (out / "sub").mkdir(parents=True)
    (out / "sub" / ".a.parquet.partial").write_bytes(b"PAR1")
    (out / "._manifest.jsonl.partial").write_bytes(b"{")
    assert only(score(detector, folder, out)).status == "scored"
    assert left_over(out) == []


def test_second_job_on_the_same_output_is_refused_while_the_first_holds_it(detector, folder, out):
    three_files(folder)
    refused = []

    def second_job(_: object) -> None:
        with pytest.raises(OutputError, match="another job") as caught:
            score(detector, folder, out)
        refused.append(str(caught.value))

    summary = score_files(detector, [folder], out, model_hash=HASH, on_progress=second_job)
    assert {file.status for file in summary.files} == {"scored"}
    assert refused
    assert all(str(out) in message for message in refused)
    assert {file.status for file in score(detector, folder, out).files} == {"unchanged"}  # freed again


# ---------------------------------------------------------------------- bad files among good ones


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def spoiled_pages(folder: Path) -> Path:
    """Parquet whose footer is well and whose cells are not."""
    path = write(rows(500), folder / "b.parquet")
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(1996)
    path.write_bytes(content)
    return path


def cut_gzip(folder: Path) -> Path:
    path = folder / "b.csv.gz"
    path.write_bytes(gzip.compress(rows(500).to_csv(index=False).encode()))
    cut(path, 0.5)
    return path


def cut_parquet(folder: Path) -> Path:
    path = write(rows(500), folder / "b.parquet")
    cut(path, 0.5)
    return path


def cut_arrow(folder: Path) -> Path:
    path = write(rows(500), folder / "b.arrow")
    cut(path, 0.5)
    return path


def empty(folder: Path, name: str) -> Path:
    (folder / name).touch()
    return folder / name


def copied_name(folder: Path) -> Path:
    frame = rows(5)
    table = pa.table([*(pa.array(frame[name]) for name in frame), pa.array(frame["x"])], names=[*frame.columns, "x"])
    pq.write_table(table, folder / "b.parquet")
    return folder / "b.parquet"


def open_quote(folder: Path) -> Path:
    (folder / "b.csv").write_text(rows(10_000).to_csv(index=False).replace("00003", '"00003', 1))
    return folder / "b.csv"


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "empty parquet": (lambda folder: empty(folder, "b.parquet"), "empty"),
    "empty csv": (lambda folder: empty(folder, "b.csv"), "empty"),
    "empty arrow": (lambda folder: empty(folder, "b.arrow"), "empty"),
    "cut parquet": (cut_parquet, "parquet"),
    "spoiled parquet": (spoiled_pages, "parquet"),
    "cut arrow": (cut_arrow, "arrow"),
    "cut gzip": (cut_gzip, ""),
    "open quote": (open_quote, ""),
    "missing column": (lambda folder: write(rows(50).drop(columns="x"), folder / "b.csv"), "'x'"),
    "missing condition": (lambda folder: write(rows(50).drop(columns="kind"), folder / "b.parquet"), "'kind'"),
    "text for numbers": (lambda folder: write(rows(50).assign(x="abc"), folder / "b.csv"), "'abc'"),
    "dates for numbers": (lambda folder: write(rows(50).assign(x=MIDNIGHT), folder / "b.parquet"), "'x'"),
    "fractions for counts": (lambda folder: write(rows(50).assign(n=0.5), folder / "b.parquet"), "'n'"),
    "numbers for text": (lambda folder: write(rows(50).assign(color=1), folder / "b.parquet"), "'color'"),
    "copied name": (copied_name, "'x'"),
    "infinity": (lambda folder: write(rows(50).assign(x=np.inf), folder / "b.csv"), "inf"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_file_is_named_and_the_good_ones_are_scored(detector, folder, out, what):
    make, reason = BAD[what]
    write(rows(20), folder / "a.parquet")
    path = make(folder)
    write(rows(20), folder / "c.parquet")
    summary = score(detector, folder, out)
    assert statuses(summary) == {"a.parquet": "scored", path.name: "failed", "c.parquet": "scored"}
    (failed,) = summary.failed
    assert str(path) in failed.error
    assert reason in failed.error.replace(str(path), "")
    assert not failed.output.exists()
    assert left_over(out) == []
    assert summary.rows == 40


def test_first_bad_file_ends_the_job_when_asked_to(detector, folder, out):
    write(rows(20), folder / "a.parquet")
    cut_parquet(folder)
    write(rows(20), folder / "c.parquet")
    summary = score(detector, folder, out, on_error="fail")
    assert statuses(summary) == {"a.parquet": "scored", "b.parquet": "failed"}
    assert not (out / "c.parquet").exists()
    write(rows(20), folder / "b.parquet")
    assert list(statuses(score(detector, folder, out)).values()) == ["unchanged", "scored", "scored"]


def test_header_only_csv_and_parquet_without_rows_give_tables_without_rows(detector, folder, out):
    for name in ("a.parquet", "b.csv", "c.arrow"):
        write(rows(0), folder / name)
    summary = score(detector, folder, out)
    assert [file.status for file in summary.files] == ["scored"] * 3
    assert [len(scored(file)) for file in summary.files] == [0, 0, 0]
    assert summary.rows == 0
    assert summary.classes.empty


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.arrow"])
def test_row_of_a_bad_cell_deep_in_a_file_can_be_found(detector, folder, out, name):
    table = rows(3000)
    table.loc[2500, "x"] = np.inf
    file = only(score(detector, write(wide(table), folder / name), out, keep_all=True))
    assert file.status == "failed"
    assert "'x'" in file.error
    row = int(re.search(r"in row ([\d,]+)", file.error).group(1).replace(",", ""))
    first = re.search(r"counted from row ([\d,]+)", file.error)
    assert row + (int(first.group(1).replace(",", "")) if first else 0) == 2500
    assert not file.output.exists()
    assert left_over(out) == []


def test_shifted_row_of_a_csv_is_not_scored_under_wrong_names(detector, folder, out):
    lines = rows(20).to_csv(index=False).splitlines()
    lines[7] = lines[7].replace("red", "red,ish").replace("blue", "blue,ish")
    (folder / "a.csv").write_text("\n".join(lines) + "\n")
    file = only(score(detector, folder, out))
    assert file.status == "failed"
    assert "line 8" in file.error


def test_file_that_vanishes_during_the_job_is_a_bad_file_not_the_end(detector, folder, out):
    three_files(folder)

    def remove_the_next(_: object) -> None:
        (folder / "b.csv").unlink(missing_ok=True)

    summary = score_files(detector, [folder], out, model_hash=HASH, on_progress=remove_the_next)
    assert statuses(summary) == {"a.parquet": "scored", "b.csv": "failed", "c.arrow": "scored"}
    assert str(folder / "b.csv") in summary.files[1].error


def test_vanished_input_is_not_taken_for_a_full_disk(detector, folder, out):
    path = write(wide(rows(3000)), folder / "a.parquet")
    options = ScoreOptions(keep_all=True)

    def remove(_: object) -> None:
        path.unlink(missing_ok=True)

    # The open file can be read to its end; if it cannot, it is the file that failed.
    summary = score_files(detector, [folder], out, model_hash=HASH, options=options, on_progress=remove)
    assert only(summary).status in ("scored", "failed")


# ---------------------------------------------------------------------- inputs and outputs in each other's way


def test_output_folder_in_an_input_folder_is_refused(detector, folder):
    three_files(folder)
    for out in (folder, folder / "out", folder / "sub" / ".." / "out"):
        with pytest.raises(DataError, match="output folder") as caught:
            score(detector, folder, out)
        assert str(out) in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == ["a.parquet", "b.csv", "c.arrow"]


def test_inputs_in_the_output_folder_are_refused(detector, folder):
    three_files(folder)
    for inputs in (folder, folder / "b.csv", str(folder / "*")):
        with pytest.raises(DataError, match="output folder"):
            score(detector, inputs, folder.parent)
    assert not (folder.parent / "_manifest.jsonl").exists()


@pytest.mark.parametrize(
    "names", [("a.csv", "a.csv.parquet"), ("a.parquet", "a.pq"), ("one/a.csv", "two/a.csv")], ids=str
)
def test_inputs_that_would_become_one_file_are_refused_by_name(detector, folder, out, names):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        frame = rows(5)
        frame.to_csv(folder / name, index=False) if name.endswith("csv") else frame.to_parquet(folder / name)
    with pytest.raises(DataError, match="would both become") as caught:
        score(detector, [folder / name for name in names], out)
    assert all(str(folder / name) in str(caught.value) for name in names)
    assert not out.exists()


def test_no_input_is_refused(detector, out):
    with pytest.raises(DataError):
        score_files(detector, [], out, model_hash=HASH)


def test_output_folder_that_cannot_be_made_is_refused_by_name(detector, folder, tmp_path):
    write(rows(5), folder / "a.parquet")
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises((DataError, OutputError), match="cannot be written") as caught:
            score(detector, folder, out)
        assert str(out) in str(caught.value)


def test_place_that_cannot_be_written_ends_the_job_and_keeps_what_is_finished(detector, folder, out):
    three_files(folder)
    (out / "b.csv.parquet").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"b\.csv\.parquet"):
        score(detector, folder, out)
    assert (out / "a.parquet").is_file()
    assert left_over(out) == []
    (out / "b.csv.parquet").rmdir()
    assert list(statuses(score(detector, folder, out)).values()) == ["unchanged", "scored", "scored"]


# ---------------------------------------------------------------------- progress


def test_progress_never_goes_back_and_ends_at_the_whole(detector, folder, out, monkeypatch):
    monkeypatch.setattr("anomaly_cvae.batch.needs.CELLS_PER_BATCH", 1 << 19)  # several batches of a file
    write(wide(rows(2500)), folder / "a.parquet")
    write(wide(rows(2500)), folder / "b.csv")
    write(rows(20), folder / "c.arrow")
    seen = []
    score_files(detector, [folder], out, model_hash=HASH, options=ScoreOptions(keep_all=True), on_progress=seen.append)
    assert len(seen) >= 7
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert [p.rows for p in seen] == sorted(p.rows for p in seen)
    assert [p.seconds for p in seen] == sorted(p.seconds for p in seen)
    assert seen[-1].rows == 5020
    assert seen[-1].done == pytest.approx(1.0)
    assert {p.path.name for p in seen} == {"a.parquet", "b.csv", "c.arrow"}
    assert all(p.rows_per_second > 0 for p in seen)


def test_progress_counts_bad_and_unchanged_files_as_done(detector, folder, out):
    bad = rows(2500)
    bad.loc[2400, "x"] = np.inf
    write(wide(bad), folder / "a.parquet")
    write(rows(20), folder / "b.parquet")
    score(detector, folder / "b.parquet", out)
    write(rows(20), folder / "c.parquet")
    seen = []
    options = ScoreOptions(keep_all=True)
    score_files(detector, [folder], out, model_hash=HASH, options=options, on_progress=seen.append)
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert seen[-1].done == pytest.approx(1.0)


# ---------------------------------------------------------------------- killed, interrupted, out of space


def job(detector: CVAEDetector, folder: Path, out: Path, report: Path, limit: int | None = None) -> None:
    """Score in a process of its own; ``report`` says that it began, and how it ended."""
    torch.set_num_threads(1)
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        report.write_text("started")
        summary = score(detector, folder, out)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
        report.write_text(f"done {len(summary.failed)} failed, peak {peak}")
    except KeyboardInterrupt:
        report.write_text("interrupted")
    except OutputError as error:
        report.write_text(f"OutputError {error}")


@pytest.fixture(scope="module")
def start() -> Callable[..., Any]:
    """Starts `job` in a fresh process, from a server that has imported everything once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["anomaly_cvae.batch", "pyarrow.parquet", "pytest"])

    def start(*arguments: Any) -> Any:
        process = context.Process(target=job, args=arguments)
        process.start()
        return process

    return start


def wait_for(what: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.002)


def contents(out: Path) -> dict[str, pa.Table]:
    return {path.name: pq.read_table(path) for path in sorted(out.rglob("*.parquet"))}


def test_killed_and_resumed_job_ends_as_an_uninterrupted_one(detector, folder, out, tmp_path, start):
    for seed in range(12):
        write(rows(6000, seed), folder / f"{seed:02d}.{'parquet' if seed % 3 else 'csv'}")
    uninterrupted = score(detector, folder, tmp_path / "whole")
    rng, report, kills = np.random.default_rng(int(time.time())), tmp_path / "report", 0
    for finished in (-1, 0, 3, 5, 8):
        report.unlink(missing_ok=True)
        process = start(detector, folder, out, report)
        wait_for(report.exists)
        wait_for(lambda n=finished: n < 0 or any(out.glob(f"{n:02d}.*parquet")))
        time.sleep(rng.uniform(0.0, 0.05))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        for table in contents(out).values():  # what stands there is whole at any moment
            assert len(table) == 6000
    assert kills, "every job ended before its kill: the test tests nothing"
    resumed = score(detector, folder, out)
    assert set(statuses(resumed).values()) <= {"scored", "unchanged"}
    expected, got = contents(tmp_path / "whole"), contents(out)
    assert list(got) == list(expected)
    for name, table in expected.items():
        assert got[name].equals(table, check_metadata=True), name
    assert left_over(out) == []
    pd.testing.assert_frame_equal(resumed.classes, uninterrupted.classes)
    head, *lines = map(json.loads, (out / "_manifest.jsonl").read_text().splitlines())
    assert head["identity"]["model_sha256"] == HASH
    assert len({line["file"] for line in lines}) == len(lines) == 12


def test_line_that_a_kill_cut_off_costs_that_file_only(detector, folder, out):
    for name in "abc":
        write(rows(20), folder / f"{name}.parquet")
    score(detector, folder, out)
    journal = out / "_manifest.jsonl"
    journal.write_bytes(journal.read_bytes()[:-30])
    again = statuses(score(detector, folder, out))
    assert sorted(again.values()) == ["scored", "unchanged", "unchanged"]
    assert set(statuses(score(detector, folder, out)).values()) == {"unchanged"}


def test_ctrl_c_leaves_finished_files_and_no_partial_one(detector, folder, out, tmp_path, start):
    for seed in range(20):
        write(rows(6000, seed), folder / f"{seed:02d}.parquet")
    report = tmp_path / "report"
    process = start(detector, folder, out, report)
    wait_for(lambda: (out / "02.parquet").exists())
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert report.read_text() == "interrupted"
    finished = contents(out)
    assert 3 <= len(finished) < 20
    assert {len(table) for table in finished.values()} == {6000}
    assert left_over(out) == []
    again = statuses(score(detector, folder, out))
    # The file that took its place at the moment of Ctrl-C may not have been noted.
    assert list(again.values()).count("unchanged") >= len(finished) - 1
    assert set(again.values()) == {"scored", "unchanged"}


def test_full_disk_is_an_output_error_that_keeps_finished_files(detector, folder, out, tmp_path, start):
    for name, n in (("a", 50), ("b", 20_000), ("c", 50)):
        write(rows(n), folder / f"{name}.parquet")
    report = tmp_path / "report"
    process = start(detector, folder, out, report, 100_000)
    process.join(60)
    assert report.read_text().startswith("OutputError")
    assert str(out / "b.parquet") in report.read_text()
    assert "run the same command again" in report.read_text()
    assert list(contents(out)) == ["a.parquet"]
    assert left_over(out) == []
    assert statuses(score(detector, folder, out)) == {
        "a.parquet": "unchanged", "b.parquet": "scored", "c.parquet": "scored",
    }  # fmt: skip
    assert [len(table) for table in contents(out).values()] == [50, 20_000, 50]


def peak_memory(start: Callable[..., Any], report: Path, detector: CVAEDetector, inputs: Path, out: Path) -> float:
    """MiB at most that a job had."""
    process = start(detector, inputs, out, report)
    process.join()
    assert report.read_text().startswith("done 0 failed")
    return int(report.read_text().split()[-1]) / 1024


def peaks_of(detector, folder: Path, suffix: str, tables: list[pd.DataFrame], start: Callable[..., Any]) -> list[float]:
    peaks = []
    for i, table in enumerate(tables):
        write(table, folder / f"{i}.{suffix}")
        inputs, out = folder / f"{i}.{suffix}", folder.parent / f"out {i}"
        peaks.append(peak_memory(start, folder.parent / "report", detector, inputs, out))
    return peaks


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_memory_does_not_grow_with_rows(detector, folder, start, suffix):
    part = rows(50_000).assign(id="x" * 200)
    tables = [pd.concat([part] * times, ignore_index=True) for times in (6, 18)]
    peaks = peaks_of(detector, folder, suffix, tables, start)
    # 600,000 more rows are 150 MiB as bytes, and more as a frame.
    assert peaks[1] - peaks[0] < 100


@pytest.mark.slow
def test_memory_does_not_grow_with_rows_of_many_kept_columns(folder, start):
    names = [f"kept {i}" for i in range(400)]
    part = pd.concat([rows(300), pd.DataFrame(0.0, index=range(300), columns=names)], axis=1)
    detector = CVAEDetector(["kind"], ignore_columns=["id", *names], **TINY).fit(part)
    tables = [pd.concat([part] * times, ignore_index=True) for times in (60, 160)]
    peaks = peaks_of(detector, folder, "parquet", tables, start)
    # 30,000 more rows are 92 MiB; both files have several batches.
    assert peaks[1] - peaks[0] < 60
