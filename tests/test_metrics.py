"""Rankings, verdicts and their intervals against hand-made cases."""

import numpy as np
import pytest
from scipy.stats import binom

from anomaly_cvae import metrics

IS_ANOMALY = np.array([False, False, True, True, False, True])
SCORES = np.array([0.1, 0.4, 0.35, 0.8, 0.2, 0.9])
CLASSES = np.array(["a", "a", "a", "b", "b", "b"])


def test_ranking_overall_and_per_class():
    table = metrics.ranking_table(IS_ANOMALY, SCORES, CLASSES)
    assert list(table.index) == ["overall", "macro", "a", "b"]
    # 9 pairs of anomaly and normal, one of them the wrong way round.
    assert table.loc["overall", "roc_auc"] == pytest.approx(8 / 9)
    assert table.loc["a", "roc_auc"] == pytest.approx(0.5)
    assert table.loc["b", "roc_auc"] == 1.0
    assert table.loc["macro", "roc_auc"] == pytest.approx(0.75)
    assert table.loc["overall", "average_precision"] == pytest.approx((1 + 1 + 3 / 4) / 3)


def test_large_scores_are_not_squeezed():
    # A library that applies a sigmoid to scores above 1 would see ties here.
    assert metrics.roc_auc(IS_ANOMALY, 1e6 + 1e3 * SCORES) == pytest.approx(8 / 9)


def test_one_kind_of_row_gives_nan_not_an_error():
    assert np.isnan(metrics.roc_auc(np.zeros(3, dtype=bool), np.arange(3.0)))
    assert np.isnan(metrics.average_precision(np.zeros(3, dtype=bool), np.arange(3.0)))
    table = metrics.ranking_table(np.array([True, False, False]), np.arange(3.0), np.array(["a", "a", "b"]))
    assert np.isnan(table.loc["b", "roc_auc"])
    assert table.loc["macro", "roc_auc"] == table.loc["a", "roc_auc"]


def test_alarms():
    flagged = np.array([False, True, False, True, False, True])
    table = metrics.alarm_table(IS_ANOMALY, flagged, CLASSES)
    assert table.loc["overall", "false_alarm_rate"] == pytest.approx(1 / 3)
    assert table.loc["overall", "recall"] == pytest.approx(2 / 3)
    assert table.loc["overall", "precision"] == pytest.approx(2 / 3)
    assert table.loc["b", "false_alarm_rate"] == 0.0


def test_curves_end_where_they_must():
    curves = metrics.curves(IS_ANOMALY, SCORES)
    assert (curves.false_positive_rate[0], curves.true_positive_rate[-1]) == (0.0, 1.0)
    assert curves.precision[-1] == 1.0
    assert curves.recall[0] == 1.0


def test_false_alarm_interval_covers_and_is_wider_than_a_binomial():
    rng = np.random.default_rng(0)
    n_calibration, n_fresh, rate = 199, 300, 0.05
    low, high = metrics.false_alarm_interval(n_calibration, n_fresh, rate)
    threshold = np.sort(rng.normal(size=(2000, n_calibration)), axis=1)[:, -10]
    realised = (rng.normal(size=(2000, n_fresh)) > threshold[:, None]).mean(axis=1)
    assert 0.93 < ((realised >= low) & (realised <= high)).mean() < 0.99
    assert high > binom.ppf(0.975, n_fresh, rate) / n_fresh
