"""Detection on real digits: what the method promises."""

import numpy as np
import pytest

from anomaly_cvae import CVAEDetector, metrics, presets
from anomaly_cvae.datasets import ClaimedDigits, claimed_digits


@pytest.fixture(scope="module")
def data() -> ClaimedDigits:
    return claimed_digits(n_damaged=0)


def fit(data: ClaimedDigits, **parameters) -> CVAEDetector:
    return CVAEDetector(**{**presets.BALANCED, "n_estimators": 1, "random_state": 0, **parameters}).fit(data.train)


@pytest.fixture(scope="module")
def detectors(data) -> dict[str, CVAEDetector]:
    return {mode: fit(data, condition_columns=["claimed"], conditioning=mode) for mode in ("shared", "per_class")}


def test_wrong_labels_are_found_by_the_negative_elbo(data, detectors):
    aurocs = [metrics.roc_auc(data.is_anomaly, d.negative_elbo(data.test)) for d in detectors.values()]
    assert max(aurocs) >= 0.985


@pytest.mark.parametrize("mode", ["shared", "per_class"])
def test_wrong_labels_are_found_by_the_contrast(data, detectors, mode):
    assert metrics.roc_auc(data.is_anomaly, detectors[mode].contrast(data.test)) >= 0.998


def test_without_the_condition_nothing_can_be_known(data):
    blind = fit(data, ignore_columns=["claimed"])
    assert 0.4 < metrics.roc_auc(data.is_anomaly, blind.negative_elbo(data.test)) < 0.6


def test_realised_false_alarm_rate(data, detectors):
    normals = data.test[~data.is_anomaly]
    for detector in detectors.values():
        rows = int(detector.thresholds_["calibration_rows"].iloc[:10].sum())
        low, high = metrics.false_alarm_interval(rows, len(normals), 0.01, confidence=0.999)
        assert low <= (detector.predict(normals) == -1).mean() <= high
        assert set(detector.thresholds_["guarantee"].iloc[:10]) == {"pooled"}


def test_the_digit_is_read_from_the_pixels(data, detectors):
    guessed = detectors["shared"].condition_proba(data.test).idxmax(axis=1).astype(int)
    assert (guessed.to_numpy() == data.true_digit).mean() > 0.97


def test_drawn_digits_are_recognised_as_the_digit_asked_for(data, detectors):
    asked = np.repeat(np.arange(10), 20)
    drawn = detectors["shared"].sample(len(asked), condition=asked, random_state=0)
    guessed = detectors["per_class"].condition_proba(drawn).idxmax(axis=1).astype(int)
    assert (guessed.to_numpy() == asked).mean() > 0.9
