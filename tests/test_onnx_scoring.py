"""Scores by ONNX Runtime are those of torch; where it cannot be used, that is said, or torch is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from anomaly_cvae import CVAEDetector, batch
from anomaly_cvae.batch import backend
from anomaly_cvae.encoding import Encoded
from anomaly_cvae.errors import ParameterError
from anomaly_cvae.scoring import ScoringEngine

pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install 'anomaly_cvae[onnx]'")
pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install 'anomaly_cvae[onnx]'")

TINY = {"n_estimators": 2, "hidden_dims": (16, 16), "latent_dim": 3, "max_steps": 60, "n_samples": 2, "batch_size": 64}


def table(n_rows: int, seed: int) -> pd.DataFrame:
    """Three kinds of columns and three classes, no cell missing."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(["furnace", "fridge", "pump"], n_rows)
    return pd.DataFrame(
        {
            "type": kind,
            "temperature": np.where(kind == "furnace", 80.0, 5.0) + 3.0 * rng.standard_normal(n_rows),
            "delay": rng.standard_normal(n_rows),
            "on": rng.integers(0, 2, n_rows).astype(float),
            "colour": rng.choice(["red", "green", "blue"], n_rows),
        }
    )


@pytest.fixture(scope="module")
def detector() -> CVAEDetector:
    return CVAEDetector("type", random_state=0, device="cpu", **TINY).fit(table(600, 0))


@pytest.fixture(scope="module")
def by_graphs(detector: CVAEDetector) -> ScoringEngine:
    return detector.model_.engine.with_graphs()


@pytest.fixture(scope="module")
def rows(detector: CVAEDetector) -> Encoded:
    frame = table(2_000, 1)
    frame.loc[5, "temperature"] = 1e6
    frame.loc[6, "colour"] = "violet"
    return detector.model_.encoder.encode(frame)


def test_scores_are_those_of_torch(by_graphs: ScoringEngine, rows: Encoded) -> None:
    expected = replace(by_graphs, graphs=None).negative_elbo(rows)
    np.testing.assert_allclose(by_graphs.negative_elbo(rows), expected, rtol=1e-5, atol=1e-5)
    assert np.ptp(expected) > 10.0


def test_every_class_has_its_own_condition_and_prior(by_graphs: ScoringEngine, rows: Encoded) -> None:
    expected = replace(by_graphs, graphs=None).class_negative_elbo(rows)
    np.testing.assert_allclose(by_graphs.class_negative_elbo(rows), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(expected[:, 0] - expected[:, 1]).max() > 1.0


@pytest.mark.parametrize("n_threads", [1, 2])
def test_threads_and_chunks_change_nothing(by_graphs: ScoringEngine, rows: Encoded, n_threads: int) -> None:
    whole, before = by_graphs.negative_elbo(rows), torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        parts = [by_graphs.negative_elbo(rows.take(part)) for part in np.array_split(np.arange(len(rows)), 7)]
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-5, atol=1e-5)


def test_rows_that_miss_cells_or_their_class_are_as_before(by_graphs: ScoringEngine, rows: Encoded) -> None:
    plain = replace(by_graphs, graphs=None)
    hidden = np.zeros(rows.values.shape, dtype=bool)
    hidden[3, 1] = True
    np.testing.assert_array_equal(by_graphs.negative_elbo(rows.hide(hidden)), plain.negative_elbo(rows.hide(hidden)))
    classes = rows.class_index.copy()
    classes[:3] = [-1, 3, 0]
    some = rows.of_class(classes).take(np.arange(50))
    np.testing.assert_allclose(by_graphs.negative_elbo(some), plain.negative_elbo(some), rtol=1e-5, atol=1e-5)
    assert len(by_graphs.negative_elbo(rows.take(np.arange(0)))) == 0


def test_a_bank_of_one_network_per_class_has_a_graph_for_each() -> None:
    one = {**TINY, "n_estimators": 1, "prior": "standard"}
    detector = CVAEDetector("type", conditioning="per_class", random_state=0, device="cpu", **one).fit(table(300, 0))
    engine, encoded = detector.model_.engine, detector.model_.encoder.encode(table(200, 1))
    by_graphs = engine.with_graphs()
    assert by_graphs.n_graphs == 3
    np.testing.assert_allclose(by_graphs.negative_elbo(encoded), engine.negative_elbo(encoded), rtol=1e-5, atol=1e-5)


def test_what_has_no_graph_is_refused_with_the_reason() -> None:
    frame = table(300, 0).assign(load=np.linspace(0.0, 1.0, 300))
    fast = {**TINY, "n_estimators": 1, "max_steps": 5, "random_state": 0, "device": "cpu"}
    continuous = CVAEDetector(["type", "load"], **fast).fit(frame)
    with pytest.raises(ParameterError, match="continuous conditions"):
        continuous.model_.engine.with_graphs()
    halved = CVAEDetector("type", mixed_precision=True, **fast).fit(table(300, 0))
    with pytest.raises(ParameterError, match="float32"):
        halved.model_.engine.with_graphs()
    doubled = CVAEDetector("type", dtype="float64", **fast).fit(table(300, 0))
    with pytest.raises(ParameterError, match="float64"):
        doubled.model_.engine.with_graphs()
    counts = CVAEDetector("type", **fast, column_kinds={"on": "count"}).fit(table(300, 0))
    with pytest.raises(ParameterError, match="no ONNX graph"):
        counts.model_.engine.with_graphs()


def test_a_missing_package_is_named_with_the_remedy(detector: CVAEDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anomaly_cvae.onnx_scoring.PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(ParameterError, match=r"no_such_package.*pip install"):
        detector.model_.engine.with_graphs()


def test_a_job_by_onnx_writes_the_same_scores_and_says_so(detector: CVAEDetector, tmp_path: Path) -> None:
    source = tmp_path / "rows.parquet"
    table(500, 2).to_parquet(source, index=False)
    for name in ("torch", "onnx"):
        options = batch.ScoreOptions(backend=name)  # type: ignore[arg-type]
        batch.score_files(detector, [source], tmp_path / name, model_hash="x", options=options)
    own, other = (pq.read_table(tmp_path / name / "rows.parquet") for name in ("onnx", "torch"))
    np.testing.assert_allclose(own["score"].to_numpy(), other["score"].to_numpy(), rtol=1e-5, atol=1e-5)
    assert own["is_anomaly"].equals(other["is_anomaly"])
    assert own.schema.metadata[b"anomaly_cvae.backend"] == b"onnx"
    assert b"anomaly_cvae.backend" not in other.schema.metadata


def test_auto_takes_onnx_for_long_jobs_only(
    detector: CVAEDetector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = table(300, 2)
    frame.to_parquet(tmp_path / "a.parquet", index=False)
    frame.to_csv(tmp_path / "b.csv", index=False)
    files = batch.find_files([tmp_path])

    def takes_onnx(max_rows: int | None = None) -> bool:
        return backend.with_backend(detector, "auto", files, max_rows).model_.engine.graphs is not None

    assert not takes_onnx()
    monkeypatch.setattr(backend, "LEAST_ROWS", 300)
    assert takes_onnx()
    assert not takes_onnx(max_rows=299)
    monkeypatch.setattr(backend, "LEAST_ROWS", 301)
    assert not takes_onnx()


def test_auto_stays_with_torch_where_there_is_no_graph(
    detector: CVAEDetector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(30, 2).to_parquet(tmp_path / "a.parquet", index=False)
    monkeypatch.setattr(backend, "LEAST_ROWS", 1)
    monkeypatch.setattr("anomaly_cvae.onnx_scoring.PACKAGES", ("no_such_package",))
    files = batch.find_files([tmp_path])
    assert backend.with_backend(detector, "auto", files, None) is detector
    with pytest.raises(ParameterError, match="no_such_package"):
        backend.with_backend(detector, "onnx", files, None)


def test_an_unknown_backend_is_refused(detector: CVAEDetector) -> None:
    with pytest.raises(ParameterError, match="'tensorflow'"):
        backend.with_backend(detector, "tensorflow", [], None)  # type: ignore[arg-type]
