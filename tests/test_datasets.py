"""The demo's data: unseen digits, wrong claims, damage."""

import numpy as np

from anomaly_cvae.datasets import claimed_digits


def test_split_is_disjoint_and_complete():
    data = claimed_digits(n_damaged=0, wrong_share=0.0)
    rows = np.vstack([data.train.to_numpy(), data.test.to_numpy()])
    assert len(rows) == 1797
    assert len(np.unique(rows, axis=0)) > 1790  # the data themselves hold no more than a few twins
    assert not data.is_anomaly.any()


def test_wrong_claims_are_wrong_and_the_others_right():
    data = claimed_digits()
    claimed = data.test["claimed"].to_numpy()
    wrong = data.what == "wrong label"
    assert (claimed[wrong] != data.true_digit[wrong]).all()
    assert (claimed[~wrong] == data.true_digit[~wrong]).all()
    assert wrong.sum() == 270


def test_damage_changes_some_pixels_and_stays_in_range():
    data, clean = claimed_digits(), claimed_digits(n_damaged=0)
    pixels = [name for name in data.test.columns if name != "claimed"]
    changed = (data.test[pixels].to_numpy() != clean.test[pixels].to_numpy()).any(axis=1)
    np.testing.assert_array_equal(changed, data.what == "damaged")
    assert data.test[pixels].to_numpy().min() >= 0
    assert data.test[pixels].to_numpy().max() <= 16


def test_same_random_state_same_data():
    first, second, other = (
        claimed_digits(random_state=1),
        claimed_digits(random_state=1),
        claimed_digits(random_state=2),
    )
    assert first.test.equals(second.test)
    assert not first.test.equals(other.test)
