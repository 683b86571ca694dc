"""Thresholds and p-values against brute force, and false-alarm rates against their known distribution."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import betabinom
from sklearn.base import clone

from anomaly_cvae import CVAEDetector, fitted
from anomaly_cvae.calibration import (
    Calibration,
    Reference,
    conformal_p_values,
    conformal_threshold,
    hide_cells,
    location_and_scale,
    missing_levels,
    rows_needed,
    select_discoveries,
)
from anomaly_cvae.errors import ConditionError, DataError

N_COLUMNS = 8
RATE = 0.05
TRAINING_ROWS = {"big": 4000, "middle": 1500, "small": 70}
LARGE = ("big", "middle")


# ---------------------------------------------------------------------- conformal p-values and thresholds


def brute_force_p_values(scores: np.ndarray, calibration: np.ndarray) -> np.ndarray:
    """(1 + #{s_i >= s}) / (n + 1), one score at a time."""
    return np.array([(1 + sum(c >= s for c in calibration)) / (len(calibration) + 1) for s in scores])


CALIBRATIONS = {
    "distinct": np.sort(np.random.default_rng(0).normal(size=137)),
    "ties": np.sort(np.random.default_rng(1).integers(0, 6, 120).astype(float)),
    "all equal": np.full(50, 3.0),
    "one row": np.array([2.0]),
}


@pytest.mark.parametrize("calibration", CALIBRATIONS.values(), ids=CALIBRATIONS.keys())
def test_p_values_are_one_plus_the_number_at_least_as_high_over_n_plus_one(calibration: np.ndarray) -> None:
    scores = np.concatenate([calibration, np.linspace(-5.0, 10.0, 61)])
    np.testing.assert_allclose(
        conformal_p_values(scores, calibration), brute_force_p_values(scores, calibration), rtol=1e-14
    )


def test_without_calibration_rows_every_p_value_is_one() -> None:
    np.testing.assert_array_equal(conformal_p_values(np.array([-1e9, 1e9]), np.zeros(0)), 1.0)


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.1, 0.25, 0.5, 1 / 3])
@pytest.mark.parametrize("name", ["distinct", "ties", "all equal"])
def test_a_score_is_above_the_threshold_if_and_only_if_its_p_value_is_at_most_the_rate(name: str, rate: float) -> None:
    calibration = CALIBRATIONS[name]
    if len(calibration) < rows_needed(rate):
        calibration = np.sort(np.tile(calibration, 3))
    around = np.concatenate([calibration, np.nextafter(calibration, np.inf), np.nextafter(calibration, -np.inf)])
    flagged = around > conformal_threshold(calibration, rate)
    np.testing.assert_array_equal(flagged, brute_force_p_values(around, calibration) <= rate + 1e-12)


def test_with_too_few_rows_only_scores_above_all_of_them_are_flagged() -> None:
    calibration = np.array([1.0, 2.0, 5.0])
    assert conformal_threshold(calibration, 0.01) == 5.0


@pytest.mark.parametrize(("rate", "needed"), [(0.01, 99), (0.05, 19), (0.1, 9), (0.5, 1), (0.001, 999), (0.3, 3)])
def test_rows_needed_is_the_least_n_whose_smallest_p_value_is_at_most_the_rate(rate: float, needed: int) -> None:
    assert rows_needed(rate) == needed
    assert 1.0 / (needed + 1.0) <= rate + 1e-12
    assert needed == 1 or 1.0 / needed > rate


# ---------------------------------------------------------------------- references: class, pooled, none


def reference(sizes: list[int], *, n_columns: int = 4, with_offsets: bool = True, seed: int = 0) -> Reference:
    """Made-up scores of classes of these sizes and, where there are several, of the marginal group."""
    rng = np.random.default_rng(seed)
    groups = [*sizes, sum(sizes)] if len(sizes) > 1 else sizes
    levels = np.array([0, 2, 4])
    scores = tuple(
        tuple(np.sort(rng.normal(level + 3.0 * g, 1.0 + g, n)) for g, n in enumerate(groups)) for level in range(3)
    )
    offsets = rng.normal(size=(len(groups), n_columns)) if with_offsets else None
    return Reference(levels, scores, offsets, len(sizes))


def calibration_of(ref: Reference, **changes: Any) -> Calibration:
    plain: dict[str, Any] = {
        "references": {"elbo": ref},
        "group_names": tuple(f"g{g}" for g in range(len(ref.scores[0]))),
        "false_alarm_rate": RATE,
        "contamination": None,
        "rows": "held out",
        "set_at": "2024-01-01T00:00:00+00:00",
        "typical_nats": np.zeros((1, 1)),
        "tolerance": 0.0,
    }
    return Calibration(**{**plain, **changes})


@pytest.mark.parametrize("with_offsets", [True, False])
@pytest.mark.parametrize("sizes", [[200, 40, 12], [15, 10, 8], [300]], ids=["class and pooled", "pooled", "one class"])
def test_flagged_rows_are_those_whose_p_value_is_at_most_the_rate(sizes: list[int], with_offsets: bool) -> None:
    ref = reference(sizes, with_offsets=with_offsets)
    calibration, rng = calibration_of(ref), np.random.default_rng(3)
    n_groups, n = len(ref.scores[0]), 4000
    groups, observed = rng.integers(0, n_groups, n), rng.random((n, 4)) > rng.random((n, 1))
    scores = rng.normal(4.0, 6.0, n)
    flagged = scores > calibration.thresholds("elbo", groups, observed)
    p_values = calibration.p_values("elbo", scores, groups, observed)
    np.testing.assert_array_equal(flagged, p_values <= RATE)
    assert 0.05 < flagged.mean() < 0.95


def test_p_values_of_a_filled_class_compare_with_its_own_rows_at_the_number_of_missing_cells() -> None:
    ref = reference([60, 40], with_offsets=True)
    rng = np.random.default_rng(4)
    observed = rng.random((200, 4)) > 0.5
    groups, scores = rng.integers(0, 2, 200), rng.normal(4.0, 4.0, 200)
    p_values = calibration_of(ref).p_values("elbo", scores, groups, observed)
    for i in range(200):
        n_missing = int((~observed[i]).sum())
        level = int(np.argmin([abs(n_missing - kept) for kept in (0, 2, 4)]))
        own = scores[i] - ref.offsets[groups[i]][observed[i]].sum()
        expected = brute_force_p_values(np.array([own]), ref.scores[level][groups[i]])
        assert p_values[i] == pytest.approx(expected[0])


@pytest.mark.parametrize(
    ("sizes", "rate", "guarantees"),
    [
        ([99, 98, 5, 0], 0.01, ["class", "pooled", "pooled", "none", "class"]),
        ([50, 48], 0.01, ["none", "none", "none"]),
        ([50, 49], 0.01, ["pooled", "pooled", "class"]),
        ([99], 0.01, ["class"]),
        ([98], 0.01, ["none"]),
        ([19, 18], 0.05, ["class", "pooled", "class"]),
    ],
)
def test_guarantee_says_whose_rows_hold_the_rate(sizes: list[int], rate: float, guarantees: list[str]) -> None:
    table = calibration_of(reference(sizes), false_alarm_rate=rate).table("elbo")
    assert table["guarantee"].tolist() == guarantees
    assert table["calibration_rows"].tolist() == ([*sizes, sum(sizes)] if len(sizes) > 1 else sizes)


def test_guarantee_is_none_where_no_row_was_held_out() -> None:
    ref = reference([300, 200])
    assert set(calibration_of(ref, rows="of fit (too few to hold any out)").table("elbo")["guarantee"]) == {"none"}
    assert set(calibration_of(ref, rows="of fit", contamination=0.1).table("elbo")["guarantee"]) == {"none"}


def test_a_class_without_calibration_rows_has_the_typical_scale_and_a_finite_threshold() -> None:
    ref = reference([200, 150, 0])
    table = calibration_of(ref).table("elbo")
    assert np.isfinite(table["threshold"]).all()
    assert ref.scale[0][2][1] == pytest.approx(np.median([ref.scale[0][0][1], ref.scale[0][1][1]]))


def test_a_class_with_enough_rows_has_median_0_and_upper_decile_1() -> None:
    own = np.random.default_rng(0).normal(7.0, 3.0, 500)
    location, scale = location_and_scale(own, (0.0, 100.0))
    np.testing.assert_allclose(np.quantile((own - location) / scale, [0.5, 0.9]), [0.0, 1.0], atol=1e-12)


def test_the_tolerance_is_granted_to_verdict_and_p_value_alike() -> None:
    ref, group, complete = (
        reference([400], with_offsets=False),
        np.zeros(1, dtype=np.int64),
        np.ones((1, 4), dtype=bool),
    )
    exact = calibration_of(ref)
    granting = calibration_of(ref, tolerance=1e-5)
    threshold = exact.thresholds("elbo", group, complete)[0]
    for distance, flagged in ((0.5e-5, False), (2e-5, True)):
        score = np.array([threshold + distance * (1.0 + abs(threshold))])
        assert bool(score[0] > granting.thresholds("elbo", group, complete)[0]) == flagged
        assert bool(granting.p_values("elbo", score, group, complete)[0] <= RATE) == flagged
        assert exact.p_values("elbo", score, group, complete)[0] <= RATE


@pytest.mark.parametrize("sizes", [[20, 0, 5], [7]], ids=["several classes, one empty", "one class"])
@pytest.mark.parametrize("with_offsets", [True, False])
def test_arrays_round_trip(sizes: list[int], with_offsets: bool, tmp_path: Path) -> None:
    ref = reference(sizes, with_offsets=with_offsets)
    np.savez(tmp_path / "scores.npz", **ref.to_arrays("elbo"), **reference([3, 4]).to_arrays("contrast"))
    with np.load(tmp_path / "scores.npz", allow_pickle=False) as arrays:
        read = Reference.from_arrays("elbo", arrays)
    np.testing.assert_array_equal(read.levels, ref.levels)
    assert read.n_classes == ref.n_classes
    for before, after in zip(ref.scores, read.scores, strict=True):
        assert len(before) == len(after)
        for own, again in zip(before, after, strict=True):
            np.testing.assert_array_equal(again, own)
    if with_offsets:
        np.testing.assert_array_equal(read.offsets, ref.offsets)
    else:
        assert read.offsets is None


# ---------------------------------------------------------------------- hidden cells


@pytest.mark.parametrize("n_missing", [0, 1, 3, 5, 6])
def test_hide_cells_hides_exactly_enough_and_only_observed_cells(n_missing: int) -> None:
    rng = np.random.default_rng(0)
    observed = rng.random((500, 6)) > 0.3
    hidden = hide_cells(observed, n_missing, rng)
    assert not (hidden & ~observed).any()
    missing_before, missing_after = (~observed).sum(axis=1), (~observed | hidden).sum(axis=1)
    np.testing.assert_array_equal(missing_after, np.maximum(missing_before, n_missing))


def test_hide_cells_hides_every_column_equally_often() -> None:
    hidden = hide_cells(np.ones((20_000, 5), dtype=bool), 2, np.random.default_rng(0))
    np.testing.assert_allclose(hidden.mean(axis=0), 0.4, atol=0.02)


@pytest.mark.parametrize(
    ("n_columns", "levels"), [(1, [0, 1]), (3, [0, 1, 2, 3]), (10, range(11)), (100, range(0, 101, 10))]
)
def test_reference_scores_are_kept_for_every_tenth_of_the_columns(n_columns: int, levels: Any) -> None:
    assert missing_levels(n_columns).tolist() == list(levels)


def test_a_row_belongs_to_the_nearest_number_of_missing_cells_and_one_without_any_to_its_like() -> None:
    ref = Reference(np.array([0, 2, 6]), ((), (), ()), None, 1)
    observed = np.arange(6) >= np.array([0, 1, 2, 3, 5, 6])[:, None]
    assert ref.level_of(observed).tolist() == [0, 0, 1, 1, 1, 2]


# ---------------------------------------------------------------------- false discoveries


def brute_force_discoveries(p_values: np.ndarray, rate: float) -> np.ndarray:
    """All p-values up to the largest p_(i) that is at most rate * i / n."""
    n, largest = len(p_values), 0.0
    for i, p in enumerate(np.sort(p_values), start=1):
        if p <= rate * i / n:
            largest = p
    return p_values <= largest if largest > 0.0 else np.zeros(n, dtype=bool)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("kind", ["normals only", "some anomalies", "ties"])
def test_discoveries_are_those_of_benjamini_and_hochberg(kind: str, rate: float) -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        p_values = rng.random(80)
        if kind != "normals only":
            p_values[:20] = rng.random(20) * 0.01
        if kind == "ties":
            p_values = np.ceil(p_values * 40) / 40
        np.testing.assert_array_equal(select_discoveries(p_values, rate), brute_force_discoveries(p_values, rate))


def test_no_p_values_give_no_discoveries() -> None:
    assert select_discoveries(np.zeros(0), 0.1).shape == (0,)


# ---------------------------------------------------------------------- a detector on known distributions


def draw(kind: str, n: int, rng: np.random.Generator) -> pd.DataFrame:
    """Rows of one class: correlated normals with a mean and covariance of its own."""
    own = np.random.default_rng(sorted(TRAINING_ROWS).index(kind))
    mixing = own.normal(size=(N_COLUMNS, N_COLUMNS)) * own.uniform(0.5, 3.0)
    cells = own.normal(0.0, 4.0, N_COLUMNS) + rng.normal(size=(n, N_COLUMNS)) @ mixing
    return pd.DataFrame(cells, columns=[f"v{d}" for d in range(N_COLUMNS)]).assign(kind=kind)


def draw_all(sizes: dict[str, int], seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.concat([draw(kind, n, rng) for kind, n in sizes.items()], ignore_index=True)


def with_missing(table: pd.DataFrame, share: float, seed: int) -> pd.DataFrame:
    """The same rows with this share of their cells missing completely at random."""
    hidden = np.random.default_rng(seed).random((len(table), N_COLUMNS)) < share
    return table.assign(**table.filter(like="v").mask(hidden))


def believable_normals(n_test: int, n_calibration: int, rate: float) -> tuple[float, float]:
    """99.9 % interval of the number of rows, of ``n_test`` fresh normals, that are not flagged.

    The share beyond the k-th highest of n exchangeable scores is Beta(k, n + 1 - k), whatever the scores.
    """
    k = math.floor(rate * (n_calibration + 1) + 1e-9)
    low, high = betabinom.interval(0.999, n_test, n_calibration + 1 - k, k)
    return float(low), float(high)


@pytest.fixture(scope="module")
def training() -> pd.DataFrame:
    return draw_all(TRAINING_ROWS, seed=10)


@pytest.fixture(scope="module")
def fresh() -> pd.DataFrame:
    return draw_all(dict.fromkeys(TRAINING_ROWS, 4000), seed=11)


@pytest.fixture(scope="module")
def det(training: pd.DataFrame) -> CVAEDetector:
    return CVAEDetector(
        condition_columns="kind",
        missing_condition="marginal",
        false_alarm_rate=RATE,
        n_estimators=1,
        latent_dim=4,
        hidden_dims=(32,),
        max_steps=300,
        batch_size=128,
        device="cpu",
        random_state=0,
    ).fit(training)


@pytest.mark.parametrize("share_missing", [0.0, 0.3], ids=["complete", "30 % missing"])
@pytest.mark.parametrize("kind", LARGE)
def test_the_false_alarm_rate_on_fresh_normals_is_the_one_asked_for(
    kind: str, share_missing: float, det: CVAEDetector, fresh: pd.DataFrame
) -> None:
    table = with_missing(fresh[fresh["kind"] == kind], share_missing, seed=12)
    n = int(det.thresholds_.loc[kind, "calibration_rows"])
    assert det.thresholds_.loc[kind, "guarantee"] == "class"
    low, high = believable_normals(len(table), n, RATE)
    assert low <= (det.predict(table) == 1).sum() <= high


@pytest.fixture(scope="module")
def few(det: CVAEDetector, training: pd.DataFrame) -> CVAEDetector:
    """The same detector, had it so many classes that few rows get the score of every class."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitted, "MAX_CLAIMS", 1_000)
        patch.setattr(fitted, "MAX_CLAIMS_WITH_HIDDEN_CELLS", 200)
        patch.setattr(fitted, "LEAST_FAIR", {False: 50, True: 50})
        return clone(det).fit(training)


def test_of_many_classes_few_rows_get_the_score_of_every_class_and_all_that_of_their_own(
    few: CVAEDetector, det: CVAEDetector
) -> None:
    counts = det.thresholds_["calibration_rows"]
    assert (few.thresholds_["calibration_rows"] == counts)[list(TRAINING_ROWS)].all()
    for name in TRAINING_ROWS:
        # Within what float32 scores agree in, however rows come together.
        assert few.thresholds_.loc[name, "threshold"] == pytest.approx(det.thresholds_.loc[name, "threshold"], rel=1e-5)
    by_contrast = copy.copy(few).set_params(score_kind="contrast").thresholds_["calibration_rows"]
    # 333 rows may have it: half of them drawn from all rows, and at least 55 of each class.
    assert by_contrast[list(TRAINING_ROWS)].between(0, 200).all()
    assert (by_contrast[list(LARGE)] >= 55).all()
    assert by_contrast["small"] == counts["small"]
    assert few.thresholds_["calibration_rows"].iloc[-1] == 166


def test_rows_with_hidden_cells_are_judged_by_as_many_rows_as_their_own_level_has() -> None:
    """Of 40 classes, 200 complete rows each, but 8 with a hidden cell: these alone cannot hold a rate of 1 %."""
    rng, n_classes = np.random.default_rng(0), 40
    scores = tuple(tuple(np.sort(rng.normal(size=n)) for _ in range(n_classes)) for n in (200, 8, 8))
    reference = Reference(np.array([0, 1, 2]), scores, None, n_classes)
    assert [reference.guarantee(0, 0.01, level) for level in (0, 1)] == ["class", "pooled"]
    groups = np.repeat(np.arange(n_classes), 500)
    fresh = rng.normal(size=len(groups))
    observed = np.ones((len(groups), 2), dtype=bool)
    observed[:, 0] = False
    flagged = fresh > reference.thresholds(groups, observed, 0.01)
    assert flagged.mean() < 0.02
    assert (flagged == (reference.p_values(fresh, groups, observed, 0.01) <= 0.01)).mean() > 0.999


@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.parametrize("score", ["contrast", "both"])
@pytest.mark.parametrize("n_hidden", [0, 1])
def test_the_false_alarm_rate_holds_where_few_rows_have_the_score_of_every_class(
    kind: str, score: str, n_hidden: int, few: CVAEDetector, fresh: pd.DataFrame
) -> None:
    own = fresh[fresh["kind"] == kind]
    own = own.assign(**{f"v{d}": np.nan for d in range(n_hidden)})
    flagged = float((copy.copy(few).set_params(score_kind=score).predict(own) == -1).mean())
    # From 55 rows a rate of 5 % is known within about a factor of two.
    assert flagged < 0.1


def test_rows_of_unknown_class_are_compared_with_classes_as_frequent_as_they_are(
    few: CVAEDetector, fresh: pd.DataFrame
) -> None:
    n = sum(TRAINING_ROWS.values())
    drawn = pd.concat([fresh[fresh["kind"] == k].head(round(3000 * m / n)) for k, m in TRAINING_ROWS.items()])
    assert (few.predict(drawn.assign(kind=None)) == -1).mean() < 0.1


@pytest.mark.parametrize("rate", [0.01, 0.2, 0.5])
@pytest.mark.parametrize("kind", LARGE)
def test_p_values_of_fresh_normals_are_uniform(kind: str, rate: float, det: CVAEDetector, fresh: pd.DataFrame) -> None:
    p_values = det.p_values(fresh[fresh["kind"] == kind])
    low, high = believable_normals(len(p_values), int(det.thresholds_.loc[kind, "calibration_rows"]), rate)
    assert low <= (p_values > rate).sum() <= high


@pytest.mark.parametrize("share_missing", [0.0, 0.3], ids=["complete", "30 % missing"])
def test_the_false_alarm_rate_of_a_small_class_that_borrows_is_no_worse_than_its_own_rows_allow(
    share_missing: float, det: CVAEDetector, fresh: pd.DataFrame
) -> None:
    # 14 rows place the class on the pooled scale, so its rate has no known distribution. It must not be worse
    # than what those rows alone could give: a threshold at the highest of them, beyond which lies Beta(1, 14).
    assert det.thresholds_.loc["small", ["guarantee", "calibration_rows"]].tolist() == ["pooled", 14]
    table = with_missing(fresh[fresh["kind"] == "small"], share_missing, seed=12)
    low, _ = betabinom.interval(0.999, len(table), 14, 1)
    assert low <= (det.predict(table) == 1).sum() < len(table)


def test_the_false_alarm_rate_of_small_classes_that_borrow_is_right_within_a_factor_two_on_average() -> None:
    rng, realised = np.random.default_rng(6), []
    for _ in range(100):
        groups = [np.sort(scale * rng.gamma(4.0, 1.0, n)) for scale, n in ((1.0, 800), (2.0, 300), (1.5, 14))]
        ref = Reference(np.zeros(1, dtype=np.int64), ((*groups, np.sort(np.concatenate(groups))),), None, 3)
        threshold = calibration_of(ref).table("elbo").loc["g2", "threshold"]
        realised.append((1.5 * rng.gamma(4.0, 1.0, 2000) > threshold).mean())
    assert RATE / 2 <= np.mean(realised) <= 2 * RATE


@pytest.mark.parametrize("share_missing", [0.0, 0.3], ids=["complete", "30 % missing"])
def test_the_false_alarm_rate_without_the_condition_is_the_one_asked_for(
    share_missing: float, det: CVAEDetector, training: pd.DataFrame
) -> None:
    table = draw_all(TRAINING_ROWS, seed=13).assign(kind=None)
    n = int(det.thresholds_.loc["(marginal)", "calibration_rows"])
    low, high = believable_normals(len(table), n, RATE)
    assert low <= (det.predict(with_missing(table, share_missing, seed=14)) == 1).sum() <= high


def test_anomalies_are_flagged_in_every_class(det: CVAEDetector, fresh: pd.DataFrame) -> None:
    shifted = fresh.assign(**(fresh.filter(like="v") + 60.0))
    flagged = pd.Series(det.predict(shifted) == -1).groupby(shifted["kind"].to_numpy()).mean()
    assert flagged.min() > 0.99


@pytest.mark.parametrize("share_missing", [0.0, 0.3], ids=["complete", "30 % missing"])
def test_verdict_p_value_and_decision_agree_row_by_row(
    share_missing: float, det: CVAEDetector, fresh: pd.DataFrame
) -> None:
    table = with_missing(fresh, share_missing, seed=15)
    verdict = det.predict(table)
    np.testing.assert_array_equal(verdict == -1, det.p_values(table) <= RATE)
    np.testing.assert_array_equal(verdict == -1, det.decision_function(table) < 0)


def test_p_values_are_the_brute_force_formula_on_the_rows_held_out(
    det: CVAEDetector, training: pd.DataFrame, fresh: pd.DataFrame
) -> None:
    held_out = training.iloc[det.split_.calibration]
    for kind in LARGE:
        calibration = det.negative_elbo(held_out[held_out["kind"] == kind])
        table = fresh[fresh["kind"] == kind].iloc[:200]
        expected = brute_force_p_values(det.negative_elbo(table), calibration)
        np.testing.assert_allclose(
            det.p_values(table), expected, atol=3.0 / len(calibration)
        )  # float32: a few near ties
        assert (np.abs(det.p_values(table) - expected) < 1e-9).mean() > 0.9


def test_select_reports_the_rows_of_benjamini_and_hochberg(det: CVAEDetector, fresh: pd.DataFrame) -> None:
    table = fresh.groupby("kind").head(300)
    table = table.assign(v0=table["v0"] + np.where(np.arange(len(table)) % 5 == 0, 40.0, 0.0))
    chosen = det.select(table, false_discovery_rate=0.2)
    np.testing.assert_array_equal(chosen, brute_force_discoveries(det.p_values(table), 0.2))
    assert 0 < chosen.sum() < len(table)


def test_calibrated_score_has_median_0_and_upper_decile_1_on_the_rows_held_out(
    det: CVAEDetector, training: pd.DataFrame
) -> None:
    held_out = training.iloc[det.split_.calibration]
    scores = det.calibrated_score(held_out)
    for kind in LARGE:
        own = scores[(held_out["kind"] == kind).to_numpy()]
        np.testing.assert_allclose(np.quantile(own, [0.5, 0.9]), [0.0, 1.0], atol=1e-3)


def test_calibrated_score_ranks_rows_of_a_class_like_the_negative_elbo(det: CVAEDetector, fresh: pd.DataFrame) -> None:
    for kind in TRAINING_ROWS:
        table = fresh[fresh["kind"] == kind]
        order = np.argsort(det.negative_elbo(table), kind="stable")
        assert (np.diff(det.calibrated_score(table)[order]) >= -1e-4).all()


def test_rows_held_out_for_thresholds_serve_nothing_else() -> None:
    table = draw_all({"big": 200, "middle": 100}, seed=40)
    plain = CVAEDetector("kind", n_estimators=1, hidden_dims=(16,), max_steps=30, device="cpu", random_state=0)
    before = plain.fit(table)
    held_out, scores = before.split_.calibration, before.negative_elbo(table)
    spoilt = table.copy()
    spoilt.loc[held_out, "v0"] += 50.0
    after = copy.deepcopy(plain).fit(spoilt)
    np.testing.assert_array_equal(after.split_.calibration, held_out)
    assert after.thresholds_["threshold"].min() > before.thresholds_["threshold"].min()
    np.testing.assert_allclose(after.negative_elbo(table), scores, rtol=1e-5)


# ---------------------------------------------------------------------- recalibration


@pytest.mark.parametrize(
    ("rate", "guarantees"),
    [
        (0.01, ["class", "class", "pooled", "class"]),
        (0.002, ["class", "pooled", "pooled", "class"]),
        (0.001, ["pooled", "pooled", "pooled", "class"]),
        (0.0001, ["none", "none", "none", "none"]),
    ],
)
def test_recalibrate_with_a_rate_alone_sets_thresholds_by_that_rate(
    rate: float, guarantees: list[str], det: CVAEDetector, fresh: pd.DataFrame
) -> None:
    changed = copy.copy(det)
    assert changed.recalibrate(false_alarm_rate=rate) is changed
    assert changed.thresholds_["guarantee"].tolist() == guarantees
    assert (changed.thresholds_["threshold"] > det.thresholds_["threshold"]).all()
    assert changed.thresholds_["calibration_rows"].tolist() == det.thresholds_["calibration_rows"].tolist()
    assert f"{rate:g}" in changed.thresholds_["rule"].iloc[0]
    np.testing.assert_array_equal(changed.score_samples(fresh[:99]), det.score_samples(fresh[:99]))
    if rate == 0.01:
        low, high = believable_normals(4000, int(changed.thresholds_.loc["big", "calibration_rows"]), rate)
        assert low <= (changed.predict(fresh[fresh["kind"] == "big"]) == 1).sum() <= high


def test_recalibrating_there_and_back_changes_no_verdict(det: CVAEDetector, fresh: pd.DataFrame) -> None:
    changed = copy.copy(det).recalibrate(false_alarm_rate=0.2).recalibrate(false_alarm_rate=RATE)
    np.testing.assert_array_equal(changed.predict(fresh), det.predict(fresh))
    np.testing.assert_array_equal(changed.p_values(fresh), det.p_values(fresh))


def test_recalibrate_with_new_rows_takes_thresholds_from_them(det: CVAEDetector) -> None:
    rows = draw_all({"big": 300, "middle": 200, "small": 150}, seed=20)
    changed = copy.copy(det).recalibrate(rows, false_alarm_rate=0.1)
    assert changed.thresholds_["calibration_rows"].tolist() == [300, 200, 150, 650]
    assert changed.thresholds_["guarantee"].tolist() == ["class"] * 4
    for kind, n in (("big", 300), ("middle", 200), ("small", 150)):
        own = np.sort(det.negative_elbo(rows[rows["kind"] == kind]))
        expected = own[n - math.floor(0.1 * (n + 1))]
        assert changed.thresholds_.loc[kind, "threshold"] == pytest.approx(expected, rel=1e-4)
    assert det.thresholds_["calibration_rows"].tolist() == [800, 300, 14, 1114]


def test_recalibrate_on_drifted_normals_brings_the_rate_back(det: CVAEDetector) -> None:
    drift = dict.fromkeys([f"v{d}" for d in range(N_COLUMNS)], 3.0)

    def drifted(n: int, seed: int) -> pd.DataFrame:
        table = draw("big", n, np.random.default_rng(seed))
        return table.assign(**{name: table[name] + by for name, by in drift.items()})

    table = drifted(4000, 21)
    low, high = believable_normals(4000, 400, RATE)
    assert (det.predict(table) == 1).sum() < low, "the drift should have raised the rate"
    others = draw_all({"middle": 100, "small": 100}, seed=24)
    changed = copy.copy(det).recalibrate(pd.concat([drifted(400, 22), others], ignore_index=True))
    assert low <= (changed.predict(table) == 1).sum() <= high
    missing = with_missing(table, 0.3, seed=23)
    assert low <= (changed.predict(missing) == 1).sum() <= high


def test_recalibrate_keeps_the_rate_when_none_is_given(det: CVAEDetector) -> None:
    changed = copy.copy(det).recalibrate(draw_all({"big": 100, "middle": 100, "small": 100}, seed=24))
    assert f"rate {RATE:g} " in changed.thresholds_["rule"].iloc[0]


def test_recalibrate_on_rows_without_a_class_is_refused_with_the_row(det: CVAEDetector, fresh: pd.DataFrame) -> None:
    rows = fresh.iloc[:50].assign(kind=[*["big"] * 7, None, *["big"] * 42])
    with pytest.raises(ConditionError, match=r"row 7 has no class .* recalibrate on rows of known classes"):
        copy.copy(det).recalibrate(rows)


def test_recalibrate_on_no_rows_is_refused(det: CVAEDetector, fresh: pd.DataFrame) -> None:
    with pytest.raises(DataError, match="row"):
        copy.copy(det).recalibrate(fresh.iloc[:0])


# ---------------------------------------------------------------------- contamination


def contaminated(**parameters: Any) -> CVAEDetector:
    small = {"hidden_dims": (16,), "max_steps": 30, "n_estimators": 1, "device": "cpu", "random_state": 0}
    return CVAEDetector(**{**small, "dtype": "float64", "contamination": 0.1, **parameters})


@pytest.fixture(scope="module")
def rows_of_fit() -> pd.DataFrame:
    return draw_all({"big": 300, "middle": 100}, seed=30)


def assert_within_tolerance(threshold: float, expected: float) -> None:
    """A threshold is granted 1e-10, relative and absolute, in float64."""
    assert 0.0 <= threshold - expected <= 1.01e-10 * (1.0 + abs(expected)) + 1e-12


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_contamination_is_the_percentile_of_the_rows_of_fit(share: float, rows_of_fit: pd.DataFrame) -> None:
    table = rows_of_fit.drop(columns="kind")
    det = contaminated(contamination=share).fit(table)
    scores = det.score_samples(table)
    expected = np.percentile(scores, 100.0 * share)
    assert_within_tolerance(-det.offset_, -expected)
    np.testing.assert_array_equal(det.predict(table) == -1, scores < expected - 1e-8)
    assert (det.predict(table) == -1).mean() == pytest.approx(share, abs=1.0 / len(table))


def test_decision_is_score_minus_offset_without_a_condition(rows_of_fit: pd.DataFrame) -> None:
    table = rows_of_fit.drop(columns="kind")
    for contamination in (0.1, "auto"):
        det = contaminated(contamination=contamination).fit(table)
        np.testing.assert_allclose(
            det.decision_function(table), det.score_samples(table) - det.offset_, rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("conditioning", ["shared", "per_class"])
def test_contamination_holds_in_every_class(conditioning: str, rows_of_fit: pd.DataFrame) -> None:
    det = contaminated(condition_columns="kind", conditioning=conditioning).fit(rows_of_fit)
    scores = det.score_samples(rows_of_fit)
    for kind in LARGE:
        own = scores[(rows_of_fit["kind"] == kind).to_numpy()]
        assert_within_tolerance(det.thresholds_.loc[kind, "threshold"], -np.percentile(own, 10.0))
    assert_within_tolerance(-det.offset_, -np.percentile(scores, 10.0))
    assert det.thresholds_.loc[list(LARGE), "calibration_rows"].tolist() == [300, 100]


def test_contamination_overrides_the_false_alarm_rate_and_promises_nothing(rows_of_fit: pd.DataFrame) -> None:
    tables = [
        contaminated(condition_columns="kind", false_alarm_rate=rate).fit(rows_of_fit).thresholds_
        for rate in (0.01, 0.3)
    ]
    np.testing.assert_array_equal(tables[0]["threshold"], tables[1]["threshold"])
    for table in tables:
        assert set(table["guarantee"]) == {"none"}
        assert table["rule"].str.contains("contamination 0.1").all()


def test_contamination_uses_every_row_for_training(rows_of_fit: pd.DataFrame) -> None:
    det = contaminated(condition_columns="kind").fit(rows_of_fit)
    assert len(det.split_.calibration) == 0
    assert len(det.split_.training) + len(det.split_.validation) == len(rows_of_fit)


def test_recalibrate_replaces_contamination_by_a_rate(rows_of_fit: pd.DataFrame) -> None:
    det = contaminated(condition_columns="kind").fit(rows_of_fit)
    det.recalibrate(draw_all({"big": 200, "middle": 200}, seed=31), false_alarm_rate=0.05)
    assert set(det.thresholds_["guarantee"]) == {"class"}
    assert det.thresholds_["rule"].str.contains("false-alarm rate 0.05").all()
