"""Fitting on Parquet files: exactly `fit` where all rows fit, and a fair look at all of them where they do not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_array_equal

from anomaly_cvae import CVAEDetector, checkpoints, row_sample, row_stream, training
from anomaly_cvae.encoding import Encoded
from anomaly_cvae.errors import ConditionError, DataError, ParameterError
from anomaly_cvae.parquet_rows import ParquetTable
from anomaly_cvae.row_sample import draw_sample, uniform_of

pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")

SETTINGS: dict[str, Any] = {
    "condition_columns": "type", "n_estimators": 1, "hidden_dims": (8,), "latent_dim": 2, "max_steps": 60,
    "batch_size": 64, "n_samples": 1, "mask_rate": 0.0, "prior": "standard", "device": "cpu", "random_state": 3,
}  # fmt: skip
SMALL = 1
"""Bytes that no table fits in: the least sample is taken."""
N = 6_000


@pytest.fixture(autouse=True)
def small_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anomaly_cvae.detector.LEAST_SAMPLE", 600)


def table(n: int = N, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    load = rng.normal(size=n)
    frame = pd.DataFrame({
        "id": np.arange(n), "load": load, "heat": load + 0.1 * rng.normal(size=n),
        "part": rng.choice(["x", "y"], n), "type": rng.choice(["a", "b"], n),
    })  # fmt: skip
    frame.loc[frame["type"] == "b", "heat"] += 3.0
    return frame


def write(frame: pd.DataFrame, folder: Path, n_files: int = 3, group: int = 500) -> Path:
    folder.mkdir(exist_ok=True)
    for i, rows in enumerate(np.array_split(np.arange(len(frame)), n_files)):
        frame.iloc[rows].to_parquet(folder / f"part{i}.parquet", row_group_size=group, index=False)
    return folder


def detector(**changes: Any) -> CVAEDetector:
    return CVAEDetector(**{**SETTINGS, "ignore_columns": "id", **changes})


# ---------------------------------------------------------------------- all rows fit


@pytest.mark.parametrize("conditioning", ["shared", "per_class"])
def test_rows_that_fit_give_the_detector_of_fit(conditioning: str, tmp_path: Path) -> None:
    frame, changes = table(400), {"conditioning": conditioning, "prior": "aggregate"}
    found = detector(**changes).fit_files(write(frame, tmp_path / "rows"))
    expected = detector(**changes).fit(frame)
    assert_array_equal(found.score_samples(frame), expected.score_samples(frame))
    assert_array_equal(found.split_.calibration, expected.split_.calibration)
    left, right = (d.thresholds_.drop(columns="set_at") for d in (found, expected))
    pd.testing.assert_frame_equal(left, right)


def test_a_file_a_list_and_some_columns(tmp_path: Path) -> None:
    frame = table(400)
    paths = sorted(write(frame, tmp_path / "rows", 2).iterdir())
    own = detector(ignore_columns=None)
    names = ["heat", "load", "type"]
    assert_array_equal(
        own.fit_files(paths, columns=names).score_samples(frame[names]),
        detector(ignore_columns=None).fit(frame[names]).score_samples(frame[names]),
    )
    assert detector().fit_files(str(paths[0])).split_.training.max() < 200


# ---------------------------------------------------------------------- more rows than memory


@pytest.mark.parametrize("conditioning", ["shared", "per_class"])
def test_a_sample_and_a_stream_learn_what_the_whole_table_says(conditioning: str, tmp_path: Path) -> None:
    frame = table()
    changes = {"conditioning": conditioning, "prior": "aggregate", "max_steps": 300, "learning_rate": 0.01}
    streamed = detector(**changes).fit_files(write(frame, tmp_path / "rows"), memory_bytes=SMALL)
    whole = detector(**changes).fit(frame)
    fresh = table(1_000, seed=1)
    assert streamed.negative_elbo(fresh).mean() == pytest.approx(whole.negative_elbo(fresh).mean(), abs=0.4)
    wrong = fresh.assign(type=np.where(fresh["type"] == "a", "b", "a"))
    assert (streamed.predict(fresh) == 1).mean() > 0.95
    assert streamed.negative_elbo(wrong).mean() > streamed.negative_elbo(fresh).mean() + 2.0
    np.testing.assert_allclose(streamed.model_.class_frequency, whole.model_.class_frequency)


def test_the_same_seed_gives_the_same_detector_and_another_seed_another(tmp_path: Path) -> None:
    folder, fresh = write(table(), tmp_path / "rows"), table(50, seed=1)
    first, again, other = (
        detector(random_state=seed).fit_files(folder, memory_bytes=SMALL).score_samples(fresh) for seed in (3, 3, 4)
    )
    assert_array_equal(first, again)
    assert (first != other).any()


def test_rows_held_out_are_never_trained_on_and_all_others_about_equally(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = table().assign(load=np.arange(N, dtype=float))
    seen: list[np.ndarray] = []
    really_put = row_stream._Buffer.put

    def put(buffer: Any, encoded: Encoded, rows: Any) -> None:
        really_put(buffer, encoded, rows)
        column = [c.name for c in fitted.columns].index("load")
        seen.append(np.round(encoded.values[:, column] * fitted.columns[column].scale + fitted.columns[column].center))

    monkeypatch.setattr(row_stream._Buffer, "put", put)
    real_chunks = row_stream.RowStream._chunks

    def chunks(stream: Any, encoder: Any, is_training: Any) -> Any:
        nonlocal fitted
        fitted = encoder
        return real_chunks(stream, encoder, is_training)

    fitted: Any = None
    monkeypatch.setattr(row_stream.RowStream, "_chunks", chunks)
    own = detector(max_steps=200, patience=1000).fit_files(write(frame, tmp_path / "rows"), memory_bytes=SMALL)
    times = np.bincount(np.concatenate(seen).astype(int), minlength=N)
    held_out = np.concatenate([own.split_.validation, own.split_.calibration])
    assert len(held_out) > 100
    assert (times[held_out] == 0).all()
    passes = 200 * 64 / (0.7 * N)
    trained = times[times > 0]
    assert len(trained) == pytest.approx(0.7 * N, rel=0.05)
    assert trained.min() >= np.floor(passes) - 1
    assert trained.max() <= np.ceil(passes) + 1
    assert (times[own.split_.training] > 0).all()


def test_the_buffer_holds_rows_of_the_stream_in_slots_of_their_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[tuple[torch.Tensor, torch.Tensor]] = []
    real = training._Loop.__init__

    def init(loop: Any, model: Any, rows: Any, *rest: Any) -> None:
        held.append((rows, rows.values.clone()))
        real(loop, model, rows, *rest)

    monkeypatch.setattr(training._Loop, "__init__", init)
    frame = table()
    own = detector(conditioning="per_class").fit_files(write(frame, tmp_path / "rows"), memory_bytes=SMALL)
    rows, before = held[0]
    changed = (rows.values != before).any(1).numpy()
    assert 0.9 * len(own.split_.training) < changed.sum() <= len(own.split_.training)
    # Type b is 3 warmer: a slot of its member never holds a row of type a.
    by_class = [rows.values[rows.class_index == k] for k in range(2)]
    assert all(abs(float(v.double().mean())) < 0.5 for v in by_class)


def test_a_rare_class_and_a_rare_level_are_learned(tmp_path: Path) -> None:
    frame = table()
    frame.loc[[17, 2100, 2101, 5000, *range(5500, 5530)], "type"] = "rare"
    frame.loc[4000, "part"] = "z"
    own = detector().fit_files(write(frame, tmp_path / "rows"), memory_bytes=SMALL)
    assert own.schema_.class_names == ["a", "b", "rare"]
    assert {c.name: c.levels for c in own.schema_.columns}["part"] == ("x", "y", "z")
    assert own.model_.class_frequency[2] == pytest.approx(34 / N)
    own.score_samples(frame.iloc[[17, 4000]])


def test_a_column_is_taken_for_what_all_its_rows_say(tmp_path: Path) -> None:
    frame = table().assign(flag=0, count=np.random.default_rng(0).poisson(3.0, N), share=0.0)
    frame.loc[::7, "flag"] = 1
    frame.loc[3000, "share"] = 0.5
    frame["flag2"] = frame["flag"].astype(float)
    frame.loc[123, "flag2"] = 0.5
    whole = detector().infer_schema(frame)
    own = detector().fit_files(write(frame, tmp_path / "rows"), memory_bytes=SMALL)
    assert [(c.name, c.kind) for c in own.schema_.columns] == [(c.name, c.kind) for c in whole.columns]


def test_missing_cells_that_only_the_rest_of_the_rows_has(tmp_path: Path) -> None:
    frame = table()
    frame.loc[frame.index % 500 == 3, "heat"] = np.nan
    own = detector().fit_files(write(frame, tmp_path / "rows"), memory_bytes=SMALL)
    assert np.isfinite(own.score_samples(frame)).all()


def test_an_interrupted_fit_ends_where_the_uninterrupted_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, fresh = write(table(), tmp_path / "rows"), table(50, seed=1)
    expected = detector().fit_files(folder, memory_bytes=SMALL).score_samples(fresh)
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    really_write = checkpoints.write

    def cut(path: Path, tensors: Any, notes: Any) -> None:
        really_write(path, tensors, notes)
        raise ZeroDivisionError

    monkeypatch.setattr(checkpoints, "write", cut)
    with pytest.raises(ZeroDivisionError):
        detector(checkpoint=tmp_path / "progress").fit_files(folder, memory_bytes=SMALL)
    monkeypatch.setattr(checkpoints, "write", really_write)
    found = detector(checkpoint=tmp_path / "progress").fit_files(folder, memory_bytes=SMALL)
    assert_array_equal(found.score_samples(fresh), expected)


# ---------------------------------------------------------------------- the sample


def test_a_sample_is_fair_and_holds_every_class(tmp_path: Path) -> None:
    frame = table().assign(type=np.where(np.arange(N) < 30, "rare", "common"))
    found = draw_sample(ParquetTable.of(write(frame, tmp_path / "rows")), 600, ["type"], {}, 0, may_miss=False)
    assert (found.frame["type"] == "rare").sum() == 30
    common = found.positions[(found.frame["type"] == "common").to_numpy()]
    assert len(common) == pytest.approx(600, abs=80)
    assert np.histogram(common, 6, (0, N))[0].min() > 60
    assert_array_equal(found.frame["id"], found.positions)
    assert_array_equal(found.seen["id"], found.seen_positions)


def test_a_sample_is_the_same_however_the_rows_are_grouped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = table()
    first = draw_sample(ParquetTable.of(write(frame, tmp_path / "a", 1, 6000)), 600, ["type"], {}, 0, may_miss=False)
    monkeypatch.setattr(row_sample, "READ_ROWS", 70)
    other = draw_sample(ParquetTable.of(write(frame, tmp_path / "b", 4, 90)), 600, ["type"], {}, 0, may_miss=False)
    assert_array_equal(first.positions, other.positions)


def test_numbers_of_positions_are_uniform_and_do_not_follow_them() -> None:
    numbers = uniform_of(np.arange(100_000), 5)
    assert np.histogram(numbers, 10, (0, 1))[0] == pytest.approx(10_000, rel=0.05)
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.02
    assert abs(np.corrcoef(numbers, uniform_of(np.arange(100_000), 6))[0, 1]) < 0.02


def test_a_condition_of_many_numbers_is_no_class(tmp_path: Path) -> None:
    frame = table().rename(columns={"load": "heat", "heat": "load"})
    own = detector(condition_columns=["load", "type"])
    own.fit_files(write(frame, tmp_path / "rows"), memory_bytes=SMALL)
    assert [c.kind for c in own.schema_.conditions] == ["continuous", "categorical"]
    assert own.model_.class_frequency == pytest.approx(frame["type"].value_counts(normalize=True).sort_index())
    assert len(own.split_.training) < 1_000


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("memory_bytes", [SMALL, 1 << 30])
@pytest.mark.parametrize(
    ("column", "cell", "says"),
    [
        ("heat", np.inf, r"column 'heat' .*row 1003 of .*part1\.parquet"),
        ("type", None, r"condition 'type' is missing \(NaN\) in row 1003 of .*part1\.parquet"),
    ],
)
def test_a_bad_cell_is_named_with_its_row_and_file(
    memory_bytes: int, column: str, cell: Any, says: str, tmp_path: Path
) -> None:
    frame = table()
    frame.loc[3003, column] = cell
    with pytest.raises(DataError, match=says):
        detector().fit_files(write(frame, tmp_path / "rows"), memory_bytes=memory_bytes)


def test_a_count_that_is_none_is_named_with_its_row_and_file(tmp_path: Path) -> None:
    frame = table().assign(n=np.random.default_rng(0).poisson(5.0, N))
    frame.loc[3003, "n"] = -1
    with pytest.raises(DataError, match=r"column 'n' is a count but has -1\.0 in row 1003 of .*part1\.parquet"):
        detector(column_kinds={"n": "count"}).fit_files(write(frame, tmp_path / "rows"), memory_bytes=SMALL)


def test_files_that_disagree_are_refused_by_name(tmp_path: Path) -> None:
    folder = write(table(400), tmp_path / "rows")
    table(10).drop(columns="heat").assign(warmth=1.0).to_parquet(folder / "part7.parquet", index=False)
    with pytest.raises(DataError, match=r"part7\.parquet: its columns are not those of .*lacks \['heat'\].*'warmth'"):
        detector().fit_files(folder)
    table(10).assign(heat="hot").to_parquet(folder / "part7.parquet", index=False)
    with pytest.raises(DataError, match=r"part7\.parquet: column 'heat' is .*string, but double in .*part0"):
        detector().fit_files(folder)


def test_whole_numbers_in_one_file_and_fractions_in_another_are_numbers(tmp_path: Path) -> None:
    frame, folder = table(400), tmp_path / "rows"
    frame["load"] = np.round(frame["load"])
    write(frame.iloc[:200].astype({"load": "int64"}), folder, 1)
    (folder / "part0.parquet").rename(folder / "a.parquet")
    write(frame.iloc[200:], folder, 1)
    assert_array_equal(detector().fit_files(folder).score_samples(frame), detector().fit(frame).score_samples(frame))


def test_damaged_absent_and_other_files_are_refused_by_name(tmp_path: Path) -> None:
    folder = write(table(400), tmp_path / "rows")
    content = (folder / "part1.parquet").read_bytes()
    (folder / "part1.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"part1\.parquet: cannot be read as Parquet"):
        detector().fit_files(folder)
    (tmp_path / "none").mkdir()
    (tmp_path / "rows.csv").write_text("a\n1\n")
    for path, says in ((tmp_path / "none", "no Parquet file"), (tmp_path / "x.parquet", "no such file"),
                       (tmp_path / "rows.csv", "only Parquet")):  # fmt: skip
        with pytest.raises(DataError, match=says):
            detector().fit_files(path)
    with pytest.raises(DataError, match="has no column 'heta'"):
        detector().fit_files(folder / "part0.parquet", columns=["heta"])
    with pytest.raises(ParameterError, match="memory_bytes"):
        detector().fit_files(folder / "part0.parquet", memory_bytes=0)


def test_a_file_that_breaks_while_training_reads_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(table(), tmp_path / "rows")
    real = row_stream.RowStream._chunks

    def chunks(stream: Any, *rest: Any) -> Any:
        (folder / "part1.parquet").unlink()
        return real(stream, *rest)

    monkeypatch.setattr(row_stream.RowStream, "_chunks", chunks)
    with pytest.raises(DataError, match=r"part1\.parquet: cannot be read"):
        detector().fit_files(folder, memory_bytes=SMALL)


def test_a_missing_condition_in_the_stream_is_a_condition_error(tmp_path: Path) -> None:
    frame = table()
    frame.loc[5, "type"] = None
    with pytest.raises(ConditionError):
        detector().fit_files(write(frame, tmp_path / "rows"), memory_bytes=SMALL)


# ---------------------------------------------------------------------- memory

PEAK = """
import resource, sys
from anomaly_cvae import CVAEDetector
for folder in sys.argv[1:]:
    CVAEDetector(n_estimators=1, hidden_dims=(8,), latent_dim=2, max_steps=20, batch_size=512, n_samples=1,
                 mask_rate=0.0, prior="standard", contamination=0.1, device="cpu", random_state=0,
                 ).fit_files(folder, memory_bytes=1 << 23)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    for times in (1, 8):
        rng = np.random.default_rng(0)
        (tmp_path / str(times)).mkdir()
        for i in range(times):
            rows = pd.DataFrame(rng.normal(size=(50_000, 10)).astype(np.float32)).add_prefix("x")
            rows.to_parquet(tmp_path / str(times) / f"{i}.parquet", row_group_size=10_000, index=False)
    code = [sys.executable, "-c", PEAK, str(tmp_path / "1"), str(tmp_path / "8")]
    ran = subprocess.run(code, capture_output=True, text=True, check=True)
    peak, later = map(int, ran.stdout.split())
    # The further 350,000 rows would take 28 MiB as float64 alone, and several times that in all their forms.
    assert later - peak < 20
