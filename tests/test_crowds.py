"""Rows of many classes, few of each: scored together, they have the scores that they have class by class."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from anomaly_cvae import CVAEDetector, crowds
from anomaly_cvae.encoding import Encoded
from anomaly_cvae.frames import FloatArray
from anomaly_cvae.scoring import ScoringEngine

N_CLASSES = 7
SMALL = {"hidden_dims": (16,), "max_steps": 30, "batch_size": 32, "dtype": "float64", "random_state": 0}
CASES = {
    "plain": {},
    "no mixture": {"prior": "standard"},
    "learned prior": {"prior": "learned"},
    "VampPrior": {"prior": "vamp"},
    "no linear path": {"linear_start": False},
    "unlike networks": {"kl_weight": (1.0, 0.1)},
    "observed part as condition": {"condition_on_observed": True},
    "number as second condition": {"condition_columns": ["site", "load"]},
}


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    site = rng.integers(0, N_CLASSES, 600)
    columns = {f"x{d}": rng.normal(site * (d + 1), 1.0 + site / 4) for d in range(4)}
    return pd.DataFrame({**columns, "load": rng.normal(size=600), "site": np.array(list("abcdefg"))[site]})


@pytest.fixture(scope="module", params=CASES, ids=str)
def fitted(request: pytest.FixtureRequest, table: pd.DataFrame) -> CVAEDetector:
    return CVAEDetector(**{"condition_columns": "site", **SMALL, **CASES[request.param]}).fit(table)


def encoded(detector: CVAEDetector, table: pd.DataFrame, missing: float = 0.0) -> Encoded:
    rows = detector.model_.encoder.encode(table)
    hidden = np.random.default_rng(1).random(rows.values.shape) < missing
    return rows.hide(hidden)


def class_by_class(engine: ScoringEngine, rows: Encoded) -> FloatArray:
    scores = np.zeros(len(rows))
    for k in range(N_CLASSES):
        own = np.flatnonzero(rows.class_index == k)
        scores[own] = engine.negative_elbo(rows.take(own))
    return scores


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_a_crowd_has_the_scores_of_its_classes(fitted: CVAEDetector, table: pd.DataFrame, missing: float) -> None:
    engine, rows = fitted.model_.engine, encoded(fitted, table.iloc[:61], missing)
    assert crowds.are_crowded(rows, N_CLASSES, engine._numbers_per_row(engine.members_of(0), len(engine.noise)))
    expected = class_by_class(engine, rows)
    np.testing.assert_allclose(engine.negative_elbo(rows), expected, rtol=1e-9)
    np.testing.assert_allclose(engine.column_scores(rows).total, expected, rtol=1e-9)


def test_scores_under_every_class_are_those_of_each_claim(fitted: CVAEDetector, table: pd.DataFrame) -> None:
    engine, rows = fitted.model_.engine, encoded(fitted, table.iloc[:9])
    found = engine.class_negative_elbo(rows)
    for k in range(N_CLASSES):
        claimed = rows.of_class(np.full(len(rows), k))
        np.testing.assert_allclose(found[:, k], engine.negative_elbo(claimed), rtol=1e-9)


def test_given_cells_are_no_part_of_the_score_in_a_crowd(table: pd.DataFrame) -> None:
    fitted = CVAEDetector("site", condition_on_observed=True, **SMALL).fit(table)
    rows = encoded(fitted, table.iloc[:40])
    given = np.random.default_rng(2).random(rows.values.shape) < 0.5
    some = Encoded(rows.values, rows.observed, rows.class_index, rows.continuous, given)
    engine = fitted.model_.engine
    np.testing.assert_allclose(engine.negative_elbo(some), class_by_class(engine, some), rtol=1e-9)


def test_rows_of_no_known_class_are_left_out(table: pd.DataFrame) -> None:
    fitted = CVAEDetector("site", **SMALL).fit(table)
    rows = encoded(fitted, table.iloc[:30])
    classes = rows.class_index.copy()
    classes[[3, 17]] = (-1, N_CLASSES)
    scores = fitted.model_.engine.negative_elbo(rows.of_class(classes))
    assert scores[[3, 17]].tolist() == [0.0, 0.0]
    others = np.delete(np.arange(30), [3, 17])
    np.testing.assert_allclose(scores[others], fitted.model_.engine.negative_elbo(rows)[others], rtol=1e-9)


def test_few_rows_of_many_classes_take_one_pass(table: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = CVAEDetector("site", **SMALL).fit(table)
    passes = []
    terms = type(fitted.model_.engine.model).terms
    monkeypatch.setattr(
        type(fitted.model_.engine.model), "terms", lambda self, *a, **b: passes.append(1) or terms(self, *a, **b)
    )
    fitted.class_negative_elbo(table.iloc[:1])
    assert len(passes) == 1


@pytest.mark.parametrize(
    ("n_rows", "n_classes", "present", "crowded"),
    [(100, 1, 1, False), (100, 50, 1, False), (100, 50, 50, True), (60_000, 50, 50, False), (2_000, 50, 2, False)],
)
def test_what_a_crowd_is(n_rows: int, n_classes: int, present: int, crowded: bool) -> None:
    """Few rows a class on average of those that are there: 65,536 activations of a layer, here of 128 a row."""
    rows = Encoded(
        np.zeros((n_rows, 1)), np.ones((n_rows, 1), bool), np.arange(n_rows) % present, np.zeros((n_rows, 0))
    )
    assert crowds.are_crowded(rows, n_classes, 128) is crowded


def test_large_crowds_go_in_pieces(table: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = CVAEDetector("site", **SMALL).fit(table)
    engine, rows = fitted.model_.engine, encoded(fitted, table.iloc[:100])
    whole = engine.negative_elbo(rows)
    monkeypatch.setattr("anomaly_cvae.scoring.NUMBERS_OF_A_CROWD", 128 * 9)
    np.testing.assert_allclose(engine.negative_elbo(rows), whole, rtol=1e-9)
    with torch.inference_mode():
        assert np.isfinite(whole).all()
