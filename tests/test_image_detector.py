"""The detector on images, and on images beside table columns: it scores, explains, completes, edits and draws."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from anomaly_cvae import CVAEDetector, generation, presets
from anomaly_cvae.errors import ConditionError, DataError, ParameterError
from anomaly_cvae.images import as_cells

TINY: dict[str, Any] = {
    "n_estimators": 1, "hidden_dims": (16,), "channels": (4, 8), "latent_dim": 2, "n_samples": 2, "max_steps": 60,
    "batch_size": 32, "learning_rate": 1e-2, "device": "cpu", "random_state": 0,
}  # fmt: skip
QUICK = {**TINY, "max_steps": 10, "mask_rate": 0.0}
SAME = {"rtol": 1e-5, "atol": 1e-4}


def bars(classes: np.ndarray, seed: int = 0, level: int = 180) -> np.ndarray:
    """Images (N, 8, 8): a bar that lies in class 0 and stands in class 1, somewhere in the middle, and noise."""
    rng = np.random.default_rng(seed)
    images = np.zeros((len(classes), 8, 8))
    for image, k, at in zip(images, classes, rng.integers(2, 5, len(classes)), strict=True):
        (image if k == 0 else image.T)[at : at + 2] = level
    return np.clip(images + rng.normal(30, 8, images.shape), 0, 255).astype(np.uint8)


def stands(images: np.ndarray) -> np.ndarray:
    """Whether the bar of each image stands: columns differ more than rows."""
    return images.mean(axis=1).std(axis=1) > images.mean(axis=2).std(axis=1)


CLASSES = np.arange(160) % 2
IMAGES = bars(CLASSES)
NEW_CLASSES = np.arange(40) % 2
NEW = bars(NEW_CLASSES, seed=1)
LOWER_HALF = np.zeros((8, 8), dtype=bool)
LOWER_HALF[4:] = True


def hide(images: np.ndarray, hidden: np.ndarray = LOWER_HALF) -> np.ma.MaskedArray:
    return np.ma.array(images, mask=np.broadcast_to(hidden, images.shape))


@pytest.fixture(scope="module")
def fitted() -> CVAEDetector:
    return CVAEDetector(**{**TINY, "max_steps": 150}, inference_head=True).fit(IMAGES, condition=CLASSES)


@pytest.fixture(scope="module")
def plain() -> CVAEDetector:
    """Without a condition."""
    return CVAEDetector(**TINY).fit(IMAGES)


@pytest.fixture(scope="module")
def seeing() -> CVAEDetector:
    """With an observed part of the image as condition."""
    settings = {**TINY, "mask_rate": 0.0, "max_steps": 300, "mask_shapes": "quadrants"}
    return CVAEDetector(**settings, condition_on_observed=True).fit(IMAGES, condition=CLASSES)


def png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def table(classes: np.ndarray = CLASSES, seed: int = 0) -> pd.DataFrame:
    """Images as PNG bytes beside a weight, a colour and the class; the colour says where the bar lies."""
    rng = np.random.default_rng(seed)
    images = bars(classes, seed)
    frame = pd.DataFrame({"weight": 5.0 * classes + rng.normal(size=len(classes))})
    frame["picture"] = [png(image) for image in images]
    frame["color"] = rng.choice(["red", "blue"], len(classes))
    frame["type"] = np.where(classes == 1, "post", "beam")
    return frame


@pytest.fixture(scope="module")
def mixed() -> CVAEDetector:
    return CVAEDetector("type", **{**TINY, "max_steps": 120}).fit(table())


@pytest.fixture(scope="module")
def seeing_mixed() -> CVAEDetector:
    return CVAEDetector("type", **QUICK, condition_on_observed=True).fit(table())


def attribute_table(n: int = 160, seed: int = 0) -> pd.DataFrame:
    """Images whose bar stands or lies, on dark or bright ground: two attributes."""
    rng = np.random.default_rng(seed)
    standing, bright = rng.integers(0, 2, (2, n))
    images = bars(standing, seed, level=110).astype(int) + 90 * bright[:, None, None]
    frame = pd.DataFrame({"picture": as_cells(np.clip(images, 0, 255).astype(np.uint8))})
    return frame.assign(Standing=standing.astype(bool), Bright=bright.astype(bool))


@pytest.fixture(scope="module")
def attributes() -> CVAEDetector:
    kinds = {"Standing": "attribute", "Bright": "attribute"}
    settings = {**TINY, "max_steps": 200}
    return CVAEDetector(list(kinds), column_kinds=kinds, inference_head=True, **settings).fit(attribute_table())


# ---------------------------------------------------------------------- scores, saving and loading


def test_images_of_the_other_class_and_of_none_score_higher(fitted: CVAEDetector) -> None:
    usual = fitted.negative_elbo(NEW, condition=NEW_CLASSES)
    wrong_class = fitted.negative_elbo(NEW, condition=1 - NEW_CLASSES)
    noise = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    assert np.median(wrong_class) > usual.max()
    assert fitted.negative_elbo(noise, condition=NEW_CLASSES).min() > usual.max()
    assert (fitted.predict(noise, condition=NEW_CLASSES) == -1).all()
    assert (fitted.predict(NEW, condition=NEW_CLASSES) == 1).mean() > 0.8
    contrast = fitted.contrast(NEW, condition=NEW_CLASSES)
    assert np.median(fitted.contrast(NEW, condition=1 - NEW_CLASSES)) > contrast.max()


def outcomes(detector: CVAEDetector, X: Any, condition: Any = None) -> list[Any]:
    """What a user gets of a detector."""
    return [
        detector.negative_elbo(X, condition=condition),
        detector.decision_function(X, condition=condition),
        detector.transform(X, condition=condition),
        detector.explain(X, condition=condition).to_numpy(),
        detector.explain_pixels(X, condition=condition),
        detector.negative_log_likelihood(X, condition=condition, n_samples=5),
    ]


def assert_same_outcomes(found: list[Any], expected: list[Any]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, **SAME)


def test_a_saved_detector_of_images_is_the_same_after_loading(fitted: CVAEDetector, tmp_path: Path) -> None:
    loaded = CVAEDetector.load(fitted.save(tmp_path / "model"), device="cpu")
    assert_same_outcomes(outcomes(loaded, NEW, NEW_CLASSES), outcomes(fitted, NEW, NEW_CLASSES))
    np.testing.assert_array_equal(
        loaded.sample(5, condition=1, random_state=0), fitted.sample(5, condition=1, random_state=0)
    )
    pd.testing.assert_frame_equal(
        loaded.condition_proba(NEW, method="head"), fitted.condition_proba(NEW, method="head")
    )
    with pytest.raises(DataError, match=r"9 x 8 grey .* 8 x 8 grey"):
        loaded.negative_elbo(np.zeros((2, 9, 8), np.uint8), condition=[0, 1])


def test_a_saved_detector_of_pictures_beside_a_table_is_the_same_after_loading(
    mixed: CVAEDetector, tmp_path: Path
) -> None:
    loaded = CVAEDetector.load(mixed.save(tmp_path / "model"), device="cpu")
    assert_same_outcomes(outcomes(loaded, table(seed=1)), outcomes(mixed, table(seed=1)))
    drawn, again = (d.sample(5, condition="post", random_state=0) for d in (mixed, loaded))
    assert list(drawn.columns) == ["weight", "picture", "color", "type"]
    pd.testing.assert_frame_equal(drawn.drop(columns="picture"), again.drop(columns="picture"))
    np.testing.assert_array_equal(np.stack(drawn["picture"]), np.stack(again["picture"]))
    assert drawn["picture"].iloc[0].shape == (8, 8)
    assert drawn["picture"].iloc[0].dtype == np.uint8
    assert (drawn["type"] == "post").all()


def test_a_saved_detector_with_an_observed_condition_is_the_same_after_loading(
    seeing: CVAEDetector, tmp_path: Path
) -> None:
    loaded = CVAEDetector.load(seeing.save(tmp_path / "model"), device="cpu")
    np.testing.assert_allclose(
        loaded.negative_elbo(NEW, condition=NEW_CLASSES, given=~LOWER_HALF),
        seeing.negative_elbo(NEW, condition=NEW_CLASSES, given=~LOWER_HALF),
        **SAME,
    )
    found, expected = (d.impute(hide(NEW), condition=NEW_CLASSES) for d in (loaded, seeing))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shape", [(40, 8, 8, 3), (40, 3, 8, 8), (40, 7, 9), (40, 8, 8, 1)])
@pytest.mark.parametrize("pixels", ["uint8", "float", "bool"])
def test_every_shape_and_type_of_images_comes_back_in_kind(shape: tuple[int, ...], pixels: str) -> None:
    levels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    images = {"uint8": levels, "float": (levels / 255).astype(np.float32), "bool": levels > 127}[pixels]
    detector = CVAEDetector(**{**QUICK, "max_steps": 2}).fit(images)
    drawn = detector.sample(3, random_state=0)
    assert drawn.shape == (3, *shape[1:])
    assert drawn.dtype == images.dtype
    for expected in (detector.reconstruct(images[:3]), detector.sample(3, noise=False, random_state=0)):
        assert expected.shape == (3, *shape[1:])
        assert expected.dtype == (np.float32 if pixels != "uint8" else np.uint8)
        assert expected.min() >= 0
        assert expected.max() <= (255 if pixels == "uint8" else 1)


def test_images_in_their_own_networks_per_class_know_their_class() -> None:
    detector = CVAEDetector(**TINY, conditioning="per_class").fit(IMAGES, condition=CLASSES)
    wrong = detector.negative_elbo(NEW, condition=1 - NEW_CLASSES)
    assert np.median(wrong) > detector.negative_elbo(NEW, condition=NEW_CLASSES).max()


def test_the_preset_of_images_trains_and_scores() -> None:
    detector = CVAEDetector(**{**presets.IMAGES, "max_steps": 2}, random_state=0).fit(IMAGES)
    assert np.isfinite(detector.negative_elbo(NEW)).all()


# ---------------------------------------------------------------------- explanation


@pytest.mark.parametrize("hidden", [False, True])
def test_parts_sum_to_the_score_and_pixels_to_the_image(fitted: CVAEDetector, hidden: bool) -> None:
    images = hide(NEW) if hidden else NEW
    parts = fitted.explain(images, condition=NEW_CLASSES)
    assert list(parts.columns) == ["image", "kl"]
    np.testing.assert_allclose(parts.sum(axis=1), fitted.negative_elbo(images, condition=NEW_CLASSES), **SAME)
    pixels = fitted.explain_pixels(images, condition=NEW_CLASSES)
    assert pixels.shape == (40, 8, 8)
    np.testing.assert_allclose(pixels.sum(axis=(1, 2)), parts["image"], **SAME)
    if hidden:
        assert not pixels[:, LOWER_HALF].any()


def test_parts_of_a_picture_beside_a_table_sum_to_the_score(mixed: CVAEDetector) -> None:
    new = table(seed=1)
    new.loc[3, "weight"] = np.nan
    new.loc[4, "picture"] = None
    parts = mixed.explain(new)
    assert list(parts.columns) == ["weight", "picture", "color", "kl"]
    np.testing.assert_allclose(parts.sum(axis=1), mixed.negative_elbo(new), **SAME)
    np.testing.assert_allclose(mixed.explain_pixels(new).sum(axis=(1, 2)), parts["picture"], **SAME)
    assert parts.loc[3, "weight"] == 0
    assert parts.loc[4, "picture"] == 0
    assert not mixed.explain_pixels(new)[4].any()


def test_colours_are_added_up_in_the_heat_map() -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 6, 3), dtype=np.uint8)
    detector = CVAEDetector(**QUICK).fit(images)
    pixels = detector.explain_pixels(images)
    assert pixels.shape == (40, 8, 6)
    np.testing.assert_allclose(pixels.sum(axis=(1, 2)), detector.explain(images)["image"], **SAME)


def test_a_damaged_spot_is_where_the_heat_map_is_hot(plain: CVAEDetector) -> None:
    damaged = NEW.copy()
    damaged[:, 0, 7] = 250
    pixels = plain.explain_pixels(damaged)
    assert (pixels.reshape(40, -1).argmax(axis=1) == 7).mean() > 0.9


def test_the_column_to_blame_is_named(mixed: CVAEDetector) -> None:
    new = table(seed=1).iloc[:4].reset_index(drop=True)
    new.loc[1, "weight"] = 80.0
    new.at[2, "picture"] = png(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8))
    scored = mixed.score_table(new, top_column=True)
    assert scored.loc[2, "top_column"] == "picture"
    assert scored["top_column"].notna().equals(scored["is_anomaly"])
    ranked = mixed.top_columns(new, n=1)
    assert list(ranked["column"][[1, 2]]) == ["weight", "picture"]


def test_what_mending_an_image_saves_does_not_depend_on_the_rows_beside_it(mixed: CVAEDetector) -> None:
    new = table(seed=1).iloc[:6].reset_index(drop=True)
    together = mixed.explain(new, method="repair")
    alone = pd.concat([mixed.explain(new.iloc[[i]], method="repair") for i in range(6)])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-3)
    assert (together["picture"].abs() > 0).all()


def test_which_column_of_images_has_to_be_said_where_there_are_two() -> None:
    frame = pd.DataFrame({"left": as_cells(IMAGES[:40]), "right": as_cells(IMAGES[40:80, :6])})
    detector = CVAEDetector(**{**QUICK, "max_steps": 2}).fit(frame)
    assert detector.explain_pixels(frame, column="left").shape == (40, 8, 8)
    assert detector.explain_pixels(frame, column="right").shape == (40, 6, 8)
    for wrong in (None, "middle"):
        with pytest.raises(DataError, match=r"there are \['left', 'right'\]"):
            detector.explain_pixels(frame, column=wrong)


# ---------------------------------------------------------------------- edit


def test_a_bar_turns_when_its_condition_does(fitted: CVAEDetector) -> None:
    turned = fitted.edit(NEW, NEW_CLASSES, 1 - NEW_CLASSES)
    assert turned.shape == NEW.shape
    assert (stands(turned) == (NEW_CLASSES == 0)).mean() > 0.9
    kept = fitted.edit(NEW, NEW_CLASSES, NEW_CLASSES)
    assert (stands(kept) == (NEW_CLASSES == 1)).mean() > 0.9
    np.testing.assert_array_equal(stands(fitted.edit(NEW, NEW_CLASSES, 1)), True)


def test_detail_is_kept_where_the_condition_changes_nothing(fitted: CVAEDetector) -> None:
    np.testing.assert_array_equal(fitted.edit(NEW, NEW_CLASSES, NEW_CLASSES, keep_detail=True), NEW)
    assert (fitted.edit(NEW, NEW_CLASSES, NEW_CLASSES) != NEW).any()


def test_strength_is_how_far_the_condition_goes(fitted: CVAEDetector, tmp_path: Path) -> None:
    def edited(strength: float, detector: CVAEDetector = fitted) -> np.ndarray:
        return detector.edit(NEW, NEW_CLASSES, 1 - NEW_CLASSES, strength=strength).astype(float)

    np.testing.assert_array_equal(edited(1.0), fitted.edit(NEW, NEW_CLASSES, 1 - NEW_CLASSES))
    np.testing.assert_allclose(edited(0.0), fitted.edit(NEW, NEW_CLASSES, NEW_CLASSES), atol=1)
    far = [np.abs(edited(strength) - edited(0.0)).mean() for strength in (0.5, 1.0, 1.5)]
    assert far[0] < far[1] < far[2]
    same = fitted.edit(NEW, NEW_CLASSES, NEW_CLASSES, strength=2.0)
    np.testing.assert_allclose(same.astype(float), fitted.edit(NEW, NEW_CLASSES, NEW_CLASSES), atol=1)
    loaded = CVAEDetector.load(fitted.save(tmp_path / "model"), device="cpu")
    np.testing.assert_array_equal(edited(2.0, loaded), edited(2.0))
    for bad in (np.nan, np.inf, 1e30, "2", None, True, [1.0], 1 + 1j):
        with pytest.raises(ParameterError, match="strength must be a number from -10 to 10, not "):
            fitted.edit(NEW, NEW_CLASSES, 1, strength=bad)


def test_an_edited_table_carries_its_new_condition(mixed: CVAEDetector) -> None:
    new = table(seed=1).iloc[:10].set_index(np.arange(10) + 100)
    edited = mixed.edit(new, condition_to={"type": "post"})
    assert list(edited.columns) == list(new.columns)
    assert list(edited.index) == list(new.index)
    assert (edited["type"] == "post").all()
    assert stands(np.stack(edited["picture"])).mean() > 0.8
    assert (edited["weight"] > 2.5).all()
    assert (new["type"] != "post").any()  # the rows passed are left as they are


def test_strength_moves_the_units_of_a_class_along() -> None:
    rng = np.random.default_rng(0)
    kind = np.repeat(["cold", "hot"], 200)
    table = pd.DataFrame({"t": np.where(kind == "hot", rng.normal(80, 8, 400), rng.normal(4, 1, 400)), "kind": kind})
    settings = {"n_estimators": 1, "hidden_dims": (16,), "max_steps": 100, "random_state": 0, "device": "cpu"}
    detector = CVAEDetector("kind", **settings).fit(table)
    cold = table[table["kind"] == "cold"].head(20)

    def edited(strength: float, to: str = "hot", **more: bool) -> np.ndarray:
        return detector.edit(cold, condition_to=to, strength=strength, **more)["t"].to_numpy()

    np.testing.assert_allclose(edited(0.0), edited(1.0, "cold"), rtol=1e-5)
    np.testing.assert_allclose(edited(0.0, keep_detail=True), cold["t"], rtol=1e-5)
    assert edited(0.0).mean() < 6 < edited(0.5).mean() < 60 < edited(1.0).mean() < 100 < edited(2.0).mean()


def test_one_attribute_changes_and_the_other_stays(attributes: CVAEDetector) -> None:
    new = attribute_table(60, seed=1)
    edited = attributes.edit(new, condition_to={"Bright": True})
    images = np.stack(edited["picture"])
    assert edited["Bright"].all()
    assert (edited["Standing"] == new["Standing"]).all()
    ground = np.sort(images.reshape(60, -1), axis=1)[:, :16].mean(axis=1)
    assert (ground > 80).mean() > 0.9
    assert (stands(images) == new["Standing"]).mean() > 0.9


@pytest.mark.parametrize("wanted", [{"Brigth": True}, {"bright": True}])
def test_an_unknown_attribute_suggests_the_nearest(attributes: CVAEDetector, wanted: dict[str, bool]) -> None:
    with pytest.raises(ConditionError, match=f"there is no condition '{next(iter(wanted))}'; did you mean 'Bright'"):
        attributes.edit(attribute_table(4), condition_to=wanted)


def test_a_value_that_an_attribute_has_not_is_refused_with_those_it_has(attributes: CVAEDetector) -> None:
    with pytest.raises(ConditionError, match="condition 'Bright' is 'dim' in row 0; it is False or True"):
        attributes.edit(attribute_table(4), condition_to={"Bright": "dim"})


def test_editing_networks_of_one_class_each_is_refused_with_the_remedy() -> None:
    settings = {**QUICK, "max_steps": 2}
    detector = CVAEDetector(**settings, conditioning="per_class").fit(IMAGES[:40], condition=CLASSES[:40])
    with pytest.raises(ConditionError, match="share no z; fit with conditioning='shared'"):
        detector.edit(NEW, NEW_CLASSES, 1)


def test_editing_needs_a_condition_and_one_to_change_to(fitted: CVAEDetector, plain: CVAEDetector) -> None:
    with pytest.raises(ConditionError, match="this detector has none"):
        plain.edit(NEW, None, 1)
    with pytest.raises(ConditionError, match=r"edit needs condition_to: values of \['condition'\]"):
        fitted.edit(NEW, NEW_CLASSES)
    with pytest.raises(ConditionError, match=r"no class \[7\]; there are 0, 1"):
        fitted.edit(NEW, NEW_CLASSES, 7)


# ---------------------------------------------------------------------- paths and maps


def test_a_path_leads_from_one_image_to_the_other(fitted: CVAEDetector) -> None:
    path = fitted.interpolate(NEW[:4], NEW[4:8], 5, condition=NEW_CLASSES[:4])
    assert path.shape == (20, 8, 8)
    path = path.reshape(4, 5, 8, 8)
    for end, images in ((path[:, 0], NEW[:4]), (path[:, -1], NEW[4:8])):
        np.testing.assert_array_equal(end, fitted.edit(images, NEW_CLASSES[:4], NEW_CLASSES[:4]))
    there_and_back = fitted.interpolate(NEW[4:8], NEW[:4], 5, condition=NEW_CLASSES[:4]).reshape(4, 5, 8, 8)
    assert np.abs(there_and_back[:, ::-1].astype(int) - path).max() <= 1


def test_a_path_through_a_table_is_a_table(mixed: CVAEDetector) -> None:
    new = table(seed=1)
    path = mixed.interpolate(new.iloc[:2], new.iloc[2:4], 3)
    assert list(path["type"]) == [new["type"][0]] * 3 + [new["type"][1]] * 3
    assert len(path) == 6
    assert path["weight"].iloc[:3].is_monotonic_increasing or path["weight"].iloc[:3].is_monotonic_decreasing


def test_ends_that_do_not_go_together_are_refused(fitted: CVAEDetector, mixed: CVAEDetector) -> None:
    with pytest.raises(ConditionError, match="condition has 2 rows but X has 3"):
        fitted.interpolate(NEW[:2], NEW[:3], condition=NEW_CLASSES[:2])
    new = table(seed=1)
    with pytest.raises(DataError, match="X_from has 2 rows and X_to has 3"):
        mixed.interpolate(new.iloc[:2], new.iloc[:3])
    with pytest.raises(ConditionError, match="row 0 has one condition in X_from and another in X_to; use edit"):
        mixed.interpolate(new.iloc[:1], new.iloc[1:2])


def test_the_latent_map_shows_its_class_around_the_origin(fitted: CVAEDetector) -> None:
    maps = [fitted.latent_map(5, condition=k) for k in (0, 1)]
    for k, images in enumerate(maps):
        assert images.shape == (25, 8, 8)
        assert stands(images[12:13])[0] == (k == 1)
    half = fitted.latent_map(3, condition=1, span=1.5)
    np.testing.assert_array_equal(half, maps[1].reshape(5, 5, 8, 8)[1:4, 1:4].reshape(9, 8, 8))
    assert len(np.unique(maps[1], axis=0)) > 5


def test_a_latent_map_needs_a_plane_and_a_class(fitted: CVAEDetector, plain: CVAEDetector) -> None:
    assert plain.latent_map(3).shape == (9, 8, 8)
    with pytest.raises(ConditionError, match="latent_map needs condition=, one of 0, 1"):
        fitted.latent_map(3)
    other = CVAEDetector(**{**QUICK, "latent_dim": 3, "max_steps": 2}).fit(IMAGES[:40])
    with pytest.raises(ParameterError, match="fit with latent_dim=2, not 3"):
        other.latent_map()


# ---------------------------------------------------------------------- hidden pixels and missing cells


@pytest.mark.parametrize("pixels", ["uint8", "float32", "float64", "bool"])
def test_observed_pixels_are_kept_exactly_and_hidden_ones_filled(pixels: str) -> None:
    images = {
        "uint8": IMAGES,
        "float32": (IMAGES / 255).astype(np.float32),
        "float64": (IMAGES / 255).astype(np.float32).astype(np.float64),
        "bool": IMAGES > 100,
    }[pixels]
    detector = CVAEDetector(**QUICK).fit(images)
    seen = ~LOWER_HALF
    for completed in (
        detector.impute(hide(images)),
        detector.impute_draws(hide(images), 1, random_state=0),
        detector.impute_draws(hide(images), 1, random_state=0, noise=False),
    ):
        assert not np.ma.isMaskedArray(completed)
        assert completed.shape == images.shape
        assert np.isfinite(completed).all()
        np.testing.assert_array_equal(completed[:, seen], images[:, seen])


def test_an_image_that_hides_nothing_is_returned_as_it_is(fitted: CVAEDetector) -> None:
    np.testing.assert_array_equal(fitted.impute(NEW, condition=NEW_CLASSES), NEW)


def test_the_hidden_half_of_a_standing_bar_is_drawn(seeing: CVAEDetector) -> None:
    standing = NEW[NEW_CLASSES == 1]
    completed = seeing.impute(hide(standing), condition=np.ones(20, dtype=int))
    error = np.abs(completed[:, LOWER_HALF].astype(float) - standing[:, LOWER_HALF]).mean()
    blank = np.abs(standing[:, LOWER_HALF] - IMAGES[CLASSES == 1].mean(axis=0)[LOWER_HALF]).mean()
    assert error < 0.75 * blank


def test_draws_come_row_by_row_and_differ_where_hidden(fitted: CVAEDetector) -> None:
    drawn = fitted.impute_draws(hide(NEW[:3]), 4, condition=NEW_CLASSES[:3], random_state=0)
    assert drawn.shape == (12, 8, 8)
    np.testing.assert_array_equal(drawn[:, ~LOWER_HALF], NEW[:3].repeat(4, axis=0)[:, ~LOWER_HALF])
    by_row = drawn.reshape(3, 4, 8, 8)[:, :, LOWER_HALF]
    assert (by_row[:, 0] != by_row[:, 1]).any(axis=1).all()
    again = fitted.impute_draws(hide(NEW[:3]), 4, condition=NEW_CLASSES[:3], random_state=0)
    np.testing.assert_array_equal(drawn, again)
    other = fitted.impute_draws(hide(NEW[:3]), 4, condition=NEW_CLASSES[:3], random_state=1)
    assert (drawn != other).any()


def test_draws_without_noise_have_no_grain(fitted: CVAEDetector) -> None:
    spread = [
        fitted.impute_draws(hide(NEW[:1]), 60, condition=[0], random_state=0, noise=noise)[:, LOWER_HALF].std(axis=0)
        for noise in (True, False)
    ]
    assert spread[1].mean() < 0.7 * spread[0].mean()


def test_missing_cells_of_a_table_are_filled_and_the_others_kept(mixed: CVAEDetector) -> None:
    new = table(seed=1).iloc[:6].reset_index(drop=True)
    holes = new.copy()
    holes.loc[0, "weight"] = np.nan
    holes.loc[1, "color"] = None
    holes.loc[2, "picture"] = None
    filled = mixed.impute(holes)
    assert not filled.isna().any().any()
    np.testing.assert_array_equal(filled["weight"][1:], new["weight"][1:])
    assert list(filled["color"].drop(1)) == list(new["color"].drop(1))
    assert filled["picture"][2].shape == (8, 8)
    shown = bars(CLASSES, seed=1)[:6]
    np.testing.assert_array_equal(np.stack(filled["picture"].drop(2)), np.delete(shown, 2, axis=0))
    drawn = mixed.impute_draws(holes, 3, random_state=0)
    assert list(drawn.index) == [i for i in range(6) for _ in range(3)]
    assert drawn.loc[0, "weight"].nunique() == 3
    np.testing.assert_array_equal(drawn["weight"].iloc[3:], new["weight"].repeat(3).iloc[3:])


def test_a_level_not_seen_in_training_is_kept_in_every_draw(mixed: CVAEDetector) -> None:
    new = table(seed=1).iloc[:2].reset_index(drop=True).assign(color="green")
    new.loc[0, "weight"] = np.nan
    assert set(mixed.impute(new)["color"]) == {"green"}
    assert set(mixed.impute_draws(new, 2, random_state=0)["color"]) == {"green"}


def test_intervals_of_a_table_have_a_line_per_missing_cell(mixed: CVAEDetector) -> None:
    new = table(seed=1).set_index(np.arange(160) + 1000)
    new.loc[1000:1019, "weight"] = np.nan
    new.loc[1003, "color"] = None
    lines = mixed.impute_intervals(new, coverage=0.9, random_state=0)
    assert len(lines) == 21
    numbers = lines[lines["column"] == "weight"].set_index("row")
    assert list(numbers.index) == list(range(1000, 1020))
    assert (numbers["low"] < numbers["high"]).all()
    truth = table(seed=1)["weight"].iloc[:20].to_numpy()
    assert ((truth > numbers["low"]) & (truth < numbers["high"])).mean() > 0.6
    level = lines[lines["column"] == "color"].iloc[0]
    assert level["row"] == 1003
    assert level["expected"] in ("red", "blue")
    assert pd.isna(level["low"])
    assert pd.isna(level["high"])
    narrow = mixed.impute_intervals(new, coverage=0.5, random_state=0).query("column == 'weight'").set_index("row")
    assert (narrow["high"].astype(float) - narrow["low"] < numbers["high"] - numbers["low"]).all()
    assert mixed.impute_intervals(table(seed=1), random_state=0).empty


def test_intervals_of_images_are_images(fitted: CVAEDetector) -> None:
    some = hide(NEW[:3].copy(), np.stack([LOWER_HALF, np.zeros_like(LOWER_HALF), LOWER_HALF]))
    lines = fitted.impute_intervals(some, condition=NEW_CLASSES[:3], n_draws=50, random_state=0)
    assert list(lines["row"]) == [0, 2]
    for _, line in lines.iterrows():
        own = NEW[line["row"]]
        assert line["low"].shape == line["high"].shape == (8, 8)
        assert (line["low"] <= line["high"]).all()
        assert (line["low"] < line["high"])[LOWER_HALF].all()
        for bound in (line["low"], line["high"], line["expected"]):
            np.testing.assert_array_equal(bound[~LOWER_HALF], own[~LOWER_HALF])
    with pytest.raises(ParameterError, match=r"coverage must lie in \(0, 1\), not 1"):
        fitted.impute_intervals(some, condition=NEW_CLASSES[:3], coverage=1)


# ---------------------------------------------------------------------- samples


def test_samples_are_of_the_class_asked_for(fitted: CVAEDetector) -> None:
    for noise in (True, False):
        drawn = fitted.sample(60, condition=[0, 1] * 30, random_state=0, noise=noise)
        assert (stands(drawn) == (np.arange(60) % 2 == 1)).mean() > 0.9


def test_samples_without_noise_have_no_grain(fitted: CVAEDetector) -> None:
    grain = [
        np.abs(np.diff(fitted.sample(40, condition=1, random_state=0, noise=noise).astype(float), axis=1)).mean()
        for noise in (True, False)
    ]
    assert grain[1] < 0.7 * grain[0]


def test_styles_are_those_of_training_rows_and_normal_where_nothing_is_known_of_them(fitted: CVAEDetector) -> None:
    model, n = fitted.model_, 4_000
    generator = torch.Generator().manual_seed(0)
    far = copy.deepcopy(model.engine.aggregate)
    far.mean += 5.0  # as if the rows of training lay there
    drawn = generation._styles(replace(model, engine=replace(model.engine, aggregate=far)), n, generator)[0].numpy()
    z = fitted.transform(IMAGES, condition=CLASSES)
    np.testing.assert_allclose(drawn.mean(axis=0), z.mean(axis=0) + 5.0, atol=0.3)
    plain = replace(model, engine=replace(model.engine, aggregate=None))
    normal = generation._styles(plain, n, generator)[0].numpy()
    np.testing.assert_allclose(normal.mean(axis=0), 0.0, atol=0.1)
    np.testing.assert_allclose(normal.std(axis=0), 1.0, atol=0.1)


def test_the_same_z_is_the_same_style_in_every_class(fitted: CVAEDetector) -> None:
    drawn = fitted.sample(6, condition=[0, 0, 0, 1, 1, 1], random_state=0, noise=False, same_z=True)
    shuffled = fitted.sample(6, condition=[1, 0, 1, 0, 1, 0], random_state=0, noise=False, same_z=True)
    np.testing.assert_array_equal(shuffled[[1, 3, 5]], drawn[:3])
    np.testing.assert_array_equal(shuffled[[0, 2, 4]], drawn[3:])
    alone = fitted.sample(3, condition=1, random_state=0, noise=False, same_z=True)
    np.testing.assert_array_equal(alone, drawn[3:])
    # The three of a class differ as their z do.
    assert len(np.unique(drawn[:3], axis=0)) == 3


def test_samples_depend_on_the_random_state_alone(fitted: CVAEDetector) -> None:
    first, again, other = (fitted.sample(5, random_state=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


# ---------------------------------------------------------------------- the condition inferred


@pytest.mark.parametrize("method", ["elbo", "iwae", "head"])
def test_the_class_of_a_new_image_is_inferred(fitted: CVAEDetector, method: str) -> None:
    probabilities = fitted.condition_proba(NEW, method=method, n_samples=10)
    assert list(probabilities.columns) == ["0", "1"]
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-9)
    assert (probabilities.to_numpy().argmax(axis=1) == NEW_CLASSES).mean() > 0.95


def test_probabilities_weigh_the_class_wise_bounds(fitted: CVAEDetector) -> None:
    nats = fitted.class_negative_elbo(NEW, condition=NEW_CLASSES).to_numpy()
    weight = np.exp(nats.min(axis=1, keepdims=True) - nats)  # classes are equally frequent
    expected = weight / weight.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(fitted.condition_proba(NEW), expected, rtol=1e-3, atol=1e-6)


def test_attributes_are_inferred_by_the_head(attributes: CVAEDetector) -> None:
    new = attribute_table(80, seed=1)
    for passed in (new, new[["picture"]]):
        probabilities = attributes.condition_proba(passed, method="head")
        assert list(probabilities.columns) == ["Standing", "Bright"]
        assert ((probabilities > 0.5) == new[["Standing", "Bright"]]).mean().min() > 0.9


def test_methods_that_are_not_there_are_refused(plain: CVAEDetector, attributes: CVAEDetector) -> None:
    with pytest.raises(ParameterError, match=r"no inference head .* inference_head=True"):
        plain.condition_proba(NEW, method="head")
    with pytest.raises(ParameterError, match="method must be one of 'elbo', 'iwae', 'head', not 'svm'"):
        plain.condition_proba(NEW, method="svm")
    for detector, X in ((plain, NEW), (attributes, attribute_table(4))):
        with pytest.raises(ConditionError, match="at least two classes"):
            detector.condition_proba(X)


# ---------------------------------------------------------------------- an observed part as condition


def test_what_is_all_given_costs_nothing(seeing: CVAEDetector, fitted: CVAEDetector) -> None:
    everything = np.ones((8, 8), dtype=bool)
    for detector in (seeing, fitted):
        for score in (detector.negative_elbo, detector.negative_log_likelihood):
            np.testing.assert_array_equal(score(NEW, condition=NEW_CLASSES, given=everything), 0.0)


def test_where_nothing_is_given_the_score_is_the_negative_elbo(seeing: CVAEDetector, fitted: CVAEDetector) -> None:
    nothing = np.zeros((8, 8), dtype=bool)
    for detector in (seeing, fitted):
        for score in (detector.negative_elbo, detector.negative_log_likelihood):
            without = score(NEW, condition=NEW_CLASSES)
            np.testing.assert_array_equal(score(NEW, condition=NEW_CLASSES, given=nothing), without)


def test_more_given_leaves_less_to_pay_for(seeing: CVAEDetector) -> None:
    nats = []
    for rows in (0, 4, 6, 7):
        given = np.zeros((8, 8), dtype=bool)
        given[:rows] = True
        nats.append(seeing.negative_elbo(NEW, condition=NEW_CLASSES, given=given).mean())
    assert nats == sorted(nats, reverse=True)


def test_what_is_given_may_differ_by_row_and_axes(seeing: CVAEDetector) -> None:
    each = np.random.default_rng(0).uniform(size=NEW.shape) < 0.5
    together = seeing.negative_elbo(NEW, condition=NEW_CLASSES, given=each)
    named = seeing.negative_elbo(NEW, condition=NEW_CLASSES, given={"image": each.astype(int)})
    np.testing.assert_array_equal(together, named)
    for row in (0, 7):
        own = slice(row, row + 1)
        alone = seeing.negative_elbo(NEW[own], condition=NEW_CLASSES[own], given=each[row])
        np.testing.assert_allclose(alone, together[own], **SAME)


def test_what_is_given_tells_of_the_rest(seeing: CVAEDetector) -> None:
    """The rows above say where the bar stands: the half below costs less given them than alone."""
    standing, ones = NEW[NEW_CLASSES == 1], np.ones(20, dtype=int)
    given = seeing.negative_elbo(standing, condition=ones, given=~LOWER_HALF)
    alone = seeing.negative_elbo(hide(standing, ~LOWER_HALF), condition=ones)
    assert given.mean() < alone.mean()


def test_an_image_that_hides_everything_is_drawn_like_a_sample(seeing: CVAEDetector) -> None:
    n = 400
    hidden = hide(NEW[1:2], np.ones((8, 8), dtype=bool))
    completed = seeing.impute_draws(hidden, n, condition=[1], random_state=0, noise=False).astype(float)
    sampled = seeing.sample(n, condition=1, random_state=1, noise=False).astype(float)
    error = np.sqrt((completed.var(axis=0) + sampled.var(axis=0)) / n) + 0.3  # rounded to whole levels
    assert (np.abs(completed.mean(axis=0) - sampled.mean(axis=0)) < 5 * error).all()
    np.testing.assert_allclose(completed.std(axis=0).mean(), sampled.std(axis=0).mean(), rtol=0.2)


def test_cells_of_a_table_are_given_by_name(seeing_mixed: CVAEDetector) -> None:
    new = table(seed=1)
    full = seeing_mixed.negative_elbo(new)
    np.testing.assert_array_equal(seeing_mixed.negative_elbo(new, given={}), full)
    np.testing.assert_array_equal(
        seeing_mixed.negative_elbo(new, given={"picture": True, "weight": True, "color": True}), 0.0
    )
    some = np.arange(160) % 2 == 0
    mixed_rows = seeing_mixed.negative_elbo(new, given={"picture": True, "weight": some})
    np.testing.assert_allclose(
        mixed_rows[some], seeing_mixed.negative_elbo(new, given={"picture": True, "weight": True})[some], **SAME
    )
    np.testing.assert_allclose(
        mixed_rows[~some], seeing_mixed.negative_elbo(new, given={"picture": True})[~some], **SAME
    )


def test_given_that_fits_no_cell_is_refused(
    seeing: CVAEDetector, seeing_mixed: CVAEDetector, fitted: CVAEDetector
) -> None:
    with pytest.raises(ParameterError, match="fit with condition_on_observed=True"):
        fitted.negative_elbo(NEW, condition=NEW_CLASSES, given=~LOWER_HALF)
    with pytest.raises(DataError, match=r"given\['image'\] has shape \(7, 8\); give \(8, 8\) for all rows"):
        seeing.negative_elbo(NEW, condition=NEW_CLASSES, given=np.ones((7, 8), dtype=bool))
    with pytest.raises(DataError, match=r"given\['image'\] must be booleans, not float64"):
        seeing.negative_elbo(NEW, condition=NEW_CLASSES, given=np.full((8, 8), 0.5))
    with pytest.raises(DataError, match="given: x has no column 'wieght'; did you mean 'weight'"):
        seeing_mixed.negative_elbo(table(), given={"wieght": True})
    with pytest.raises(DataError, match=r"given\['weight'\] has shape \(3,\); give one boolean, or one per row"):
        seeing_mixed.negative_elbo(table(), given={"weight": np.ones(3, dtype=bool)})
    with pytest.raises(DataError, match="with several columns, pass a dict"):
        seeing_mixed.negative_elbo(table(), given=np.ones((160, 3), dtype=bool))


# ---------------------------------------------------------------------- priors, parts, code lengths


def test_parts_kept_apart_tell_another_kind_of_images(tmp_path: Path) -> None:
    detector = CVAEDetector(**TINY, score_kind="parts").fit(IMAGES)
    blank = np.full((20, 8, 8), 30, dtype=np.uint8)  # smoother than any image of training: its nats are low
    assert (detector.predict(blank) == -1).all()
    assert (detector.predict(NEW) == 1).mean() > 0.8
    usual = -detector.score_samples(NEW)
    assert (-detector.score_samples(blank)).min() > np.quantile(usual, 0.9)
    loaded = CVAEDetector.load(detector.save(tmp_path / "model"), device="cpu")
    np.testing.assert_allclose(loaded.decision_function(NEW), detector.decision_function(NEW), rtol=1e-4, atol=1e-3)
    held = detector.score_samples(NEW)
    detector.recalibrate(NEW)
    assert not np.allclose(held, detector.score_samples(NEW))


def test_parts_need_their_calibration(fitted: CVAEDetector) -> None:
    other = CVAEDetector(**QUICK).fit(IMAGES)
    other.set_params(score_kind="parts")
    with pytest.raises(ParameterError, match="fit or recalibrate it with score_kind='parts'"):
        other.predict(NEW)
    with pytest.warns(UserWarning, match="too few calibration rows"):
        other.recalibrate(NEW)
    assert set(other.predict(NEW)) <= {-1, 1}


def test_a_mixture_of_pseudo_inputs_scores_draws_and_is_saved(tmp_path: Path) -> None:
    detector = CVAEDetector(**TINY, prior="vamp").fit(IMAGES, condition=CLASSES)
    wrong = detector.negative_elbo(NEW, condition=1 - NEW_CLASSES)
    assert np.median(wrong) > np.median(detector.negative_elbo(NEW, condition=NEW_CLASSES))
    assert detector.sample(4, condition=1, random_state=0).shape == (4, 8, 8)
    loaded = CVAEDetector.load(detector.save(tmp_path / "model"), device="cpu")
    assert_same_outcomes(outcomes(loaded, NEW, NEW_CLASSES), outcomes(detector, NEW, NEW_CLASSES))


def test_pseudo_inputs_of_classes_need_classes() -> None:
    with pytest.raises(ParameterError, match="conditions must be categorical"):
        CVAEDetector("Bright", column_kinds={"Bright": "attribute"}, prior="vamp", **QUICK).fit(attribute_table(40))


def test_levels_cost_a_code_length() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 8, 8), dtype=np.uint8)
    settings = {**TINY, "max_steps": 100}
    detector = CVAEDetector(**settings, likelihoods={"image": "discretised_logistic"}).fit(noise[:160])
    per_pixel = detector.explain_pixels(noise[160:])
    assert (per_pixel >= 0).all()  # a probability is at most 1
    nats = detector.negative_elbo(noise[160:]).mean() / 64
    assert np.log(256) - 0.03 < nats < np.log(256) + 0.5  # no code is shorter than the noise's entropy


def test_rounded_densities_and_code_lengths_of_wide_pixels_agree() -> None:
    nats = []
    for likelihood in ("normal", "discretised_logistic"):
        detector = CVAEDetector(**TINY, likelihoods={"image": likelihood}).fit(IMAGES, condition=CLASSES)
        nats.append(detector.negative_elbo(NEW, condition=NEW_CLASSES).mean() / 64)
    assert abs(nats[0] - nats[1]) < 0.4


@pytest.mark.parametrize(("image", "likelihood", "fitting"), [
    ((IMAGES > 100), "normal", "bernoulli"),
    (IMAGES, "bernoulli", "normal or robust_normal or discretised_logistic"),
    ((IMAGES / 255), "discretised_logistic", "normal or robust_normal"),
])  # fmt: skip
def test_a_likelihood_that_does_not_suit_the_pixels_is_refused(
    image: np.ndarray, likelihood: str, fitting: str
) -> None:
    with pytest.raises(ParameterError, match=f"is '{likelihood}', but an image of .* pixels goes with {fitting};"):
        CVAEDetector(**QUICK, likelihoods={"image": likelihood}).fit(image)


# ---------------------------------------------------------------------- likelihoods by importance sampling


def test_importance_sampling_tightens_the_bound(fitted: CVAEDetector, mixed: CVAEDetector) -> None:
    for detector, X, condition in ((fitted, NEW, NEW_CLASSES), (mixed, table(seed=1), None)):
        bound = detector.negative_elbo(X, condition=condition).mean()
        nats = [detector.negative_log_likelihood(X, condition=condition, n_samples=n).mean() for n in (1, 10, 200)]
        # All rows share their points, so a few of them may be lucky ones for all rows.
        assert nats[2] < nats[1] + 0.2 < nats[0] + 2.0
        assert nats[2] < bound + 0.2
    with pytest.raises(ParameterError, match="n_samples must be a whole number from 1 up, not 0"):
        fitted.negative_log_likelihood(NEW, condition=NEW_CLASSES, n_samples=0)


def test_a_linear_model_of_linear_gaussian_rows_comes_near_the_exact_likelihood() -> None:
    rng = np.random.default_rng(0)
    loading, spread = np.array([[1.5, -1.0, 0.8, 0.5]]), 0.5
    rows = rng.normal(size=(2000, 1)) @ loading + spread * rng.normal(size=(2000, 4))
    covariance = loading.T @ loading + spread**2 * np.eye(4)
    new = rows[1500:]
    exact = 0.5 * ((new @ np.linalg.inv(covariance) * new).sum(1) + np.linalg.slogdet(2 * np.pi * covariance)[1])
    detector = CVAEDetector(
        n_estimators=1, latent_dim=1, hidden_dims=(), likelihoods=dict.fromkeys(range(4), "normal"), prior="standard",
        input_noise=0.0, mask_rate=0.0, max_steps=600, learning_rate=1e-2, random_state=0, dtype="float64",
    ).fit(rows[:1500])  # fmt: skip
    found = detector.negative_log_likelihood(new, n_samples=200)
    assert abs(found.mean() - exact.mean()) < 0.05
    assert np.corrcoef(found, exact)[0, 1] > 0.98
    assert found.mean() < detector.negative_elbo(new).mean() + 0.01
