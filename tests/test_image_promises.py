"""What holds of images whatever else is asked: thresholds with hidden pixels, rows that do not mind each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_digits

from anomaly_cvae import CVAEDetector, presets
from anomaly_cvae.batch.source import find_files
from anomaly_cvae.errors import ConditionError, DataError, ParameterError
from anomaly_cvae.images import encode_picture

pytestmark = pytest.mark.filterwarnings("ignore:too few calibration rows")
DIGITS = load_digits()
IMAGES = np.round(DIGITS.images * 255 / 16).astype(np.uint8)
TINY: dict[str, Any] = {
    **presets.IMAGES, "channels": (4, 8), "latent_dim": 4, "hidden_dims": (16,), "max_steps": 40, "random_state": 0,
    "device": "cpu",
}  # fmt: skip


def fit(**more: Any) -> CVAEDetector:
    return CVAEDetector(**{**TINY, **more})


@pytest.fixture(scope="module")
def completer() -> CVAEDetector:
    return fit(condition_on_observed=True).fit(IMAGES[:300] > 100)


def test_an_image_that_shows_little_is_flagged_no_more_often_than_asked() -> None:
    rng = np.random.default_rng(0)
    order = rng.permutation(1200)
    detector = fit(mask_rate=0.5, false_alarm_rate=0.05, max_steps=60).fit(IMAGES[order[:900]])
    for share in (0.3, 0.8, 0.9, 0.97):
        hidden = rng.random((300, 8, 8)) < share
        flagged = detector.predict(np.ma.array(IMAGES[order[900:]], mask=hidden)) == -1
        assert flagged.mean() < 0.12, share


def test_the_parts_are_those_of_whole_images() -> None:
    detector = fit(score_kind="parts").fit(IMAGES[:300])
    hidden = np.zeros((5, 8, 8), dtype=bool)
    hidden[3, 0, 0] = True
    with pytest.raises(DataError, match="row 3 misses cells or pixels"):
        detector.predict(np.ma.array(IMAGES[:5], mask=hidden))
    plain = fit().fit(IMAGES[:100]).set_params(score_kind="parts")
    with pytest.raises(ParameterError, match="no calibration of the parts"):
        plain.thresholds_  # noqa: B018  # a property that raises


def test_parts_of_an_unknown_class_are_calibrated_as_they_are_scored() -> None:
    detector = fit(score_kind="parts", missing_condition="marginal", max_steps=100)
    detector.fit(IMAGES[:1200], condition=DIGITS.target[:1200])
    p_values = detector.p_values(IMAGES[1200:1500], condition=[None] * 300)
    assert 0.3 < np.median(p_values) < 0.7


def test_a_reconstruction_does_not_depend_on_the_other_rows(completer: CVAEDetector) -> None:
    rows = IMAGES[300:302] > 100
    hidden = np.zeros(rows.shape, dtype=bool)
    hidden[1, 0] = True
    beside = completer.reconstruct(np.ma.array(rows, mask=hidden))
    np.testing.assert_allclose(beside[0], completer.reconstruct(rows[:1])[0], atol=1e-5)


def test_the_likelihood_does_not_depend_on_the_other_rows(completer: CVAEDetector) -> None:
    rows = IMAGES[300:340] > 100
    together = completer.negative_log_likelihood(rows, n_samples=20)
    np.testing.assert_allclose(together[7:8], completer.negative_log_likelihood(rows[7:8], n_samples=20), rtol=1e-4)


@pytest.mark.parametrize("counts", [(10, 21), (3, 10), (5, 6)])
def test_a_style_is_the_same_in_every_class_however_many_are_asked_for(counts: tuple[int, int]) -> None:
    detector = fit().fit(IMAGES[:200], condition=DIGITS.target[:200])
    drawn = detector.sample(sum(counts), condition=np.repeat([4, 9], counts), noise=False, same_z=True, random_state=1)
    alone = detector.sample(counts[0], condition=4, noise=False, same_z=True, random_state=1)
    more = detector.sample(max(counts), condition=4, noise=False, same_z=True, random_state=1)
    np.testing.assert_array_equal(drawn[: counts[0]], more[: counts[0]])
    assert len(alone) == counts[0]


def test_a_condition_to_change_to_is_taken_by_position() -> None:
    frame = pd.DataFrame({"image": list(IMAGES[:60]), "k": list("ab") * 30})
    detector = fit(condition_columns="k").fit(frame)
    wanted = ["b", "a", "a"]
    by_list = detector.edit(frame[:3], condition_to={"k": wanted})
    by_series = detector.edit(frame[:3], condition_to={"k": pd.Series(wanted, index=[2, 1, 0])})
    assert by_list["k"].tolist() == by_series["k"].tolist() == wanted
    np.testing.assert_array_equal(np.stack(by_list["image"]), np.stack(by_series["image"]))
    with pytest.raises(ConditionError, match=r"condition_to\['k'\] has shape \(2,\)"):
        detector.edit(frame[:3], condition_to={"k": ["a", "b"]})


def test_masked_cells_of_a_table_are_missing() -> None:
    table = np.random.default_rng(0).normal(size=(200, 3))
    detector = CVAEDetector(max_steps=20, random_state=0).fit(table)
    hidden = np.zeros(table.shape, dtype=bool)
    hidden[0, 1] = True
    spoilt = np.where(hidden, 1e6, table)
    expected = detector.negative_elbo(np.where(hidden, np.nan, table))
    np.testing.assert_array_equal(detector.negative_elbo(np.ma.array(spoilt, mask=hidden)), expected)


def test_a_checkpoint_of_another_likelihood_is_refused_and_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    fit(checkpoint=tmp_path / "progress").fit(IMAGES[:100])
    with pytest.raises(ValueError, match="checkpoint of another training"):
        fit(checkpoint=tmp_path / "progress", likelihoods={"image": "discretised_logistic"}).fit(IMAGES[:100])
    with pytest.raises(ParameterError, match="is a folder; name a file in it"):
        fit(checkpoint=tmp_path).fit(IMAGES[:100])


def test_pictures_as_bytes_suit_a_model_of_channels_first() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (60, 3, 8, 8), dtype=np.uint8)
    detector = fit(max_steps=5).fit(pd.DataFrame({"p": list(rgb)}))
    as_bytes = pd.DataFrame({"p": [encode_picture(image) for image in rgb[:3]]})
    np.testing.assert_array_equal(
        detector.negative_elbo(as_bytes), detector.negative_elbo(pd.DataFrame({"p": list(rgb[:3])}))
    )


def test_lists_and_cells_of_images_are_taken_and_none_made_have_their_shape() -> None:
    detector = fit(max_steps=5).fit(list(IMAGES[:60]))
    cells = np.empty(3, dtype=object)
    cells[:] = list(IMAGES[:3])
    np.testing.assert_array_equal(detector.negative_elbo(cells), detector.negative_elbo(IMAGES[:3]))
    assert detector.sample(0).shape == (0, 8, 8)
    with pytest.raises(ParameterError, match="n must be a whole number from 0 up, not -1"):
        detector.sample(-1)


def test_a_note_beside_pictures_is_no_table(tmp_path: Path) -> None:
    for i, image in enumerate(IMAGES[:3]):
        (tmp_path / f"{i}.png").write_bytes(encode_picture(image))
    (tmp_path / "note.txt").write_text("taken on a Tuesday")
    assert [file.path for file in find_files(tmp_path)] == [tmp_path]
