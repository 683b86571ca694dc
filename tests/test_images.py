"""Images as cells: what is read as one, what becomes of its pixels, and what is refused in which words."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from anomaly_cvae import CVAEDetector
from anomaly_cvae.errors import DataError
from anomaly_cvae.images import (
    ImageFormat,
    as_cells,
    decode_picture,
    holds_images,
    image_format,
    read_images,
    to_images,
)

GREY = ImageFormat((1, 6, 4), "uint8", "HW")
TINY: dict[str, Any] = {
    "n_estimators": 1, "hidden_dims": (16,), "channels": (4, 8), "latent_dim": 2, "n_samples": 1, "max_steps": 10,
    "batch_size": 16, "mask_rate": 0.0, "random_state": 0,
}  # fmt: skip


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Random grey levels."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def column(*cells: Any) -> pd.Series:
    return pd.Series(as_cells(list(cells)) if cells else [], dtype=object)


def picture(image: np.ndarray, kind: str = "PNG", mode: str | None = None, **how: Any) -> bytes:
    """The bytes of a picture file."""
    stream = io.BytesIO()
    made = Image.fromarray(image)
    (made if mode is None else made.convert(mode)).save(stream, kind, **how)
    return stream.getvalue()


def says(message: str, *parts: str) -> None:
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"


# ---------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((6, 4), ((1, 6, 4), "HW")),
        ((6, 4, 1), ((1, 6, 4), "HWC")),
        ((6, 4, 3), ((3, 6, 4), "HWC")),
        ((1, 6, 4), ((1, 6, 4), "CHW")),
        ((3, 6, 4), ((3, 6, 4), "CHW")),
    ],
)
@pytest.mark.parametrize("pixels", ["uint8", "float", "bool"])
def test_every_layout_and_type_comes_back_as_it_went_in(
    shape: tuple[int, ...], expected: tuple[tuple[int, int, int], str], pixels: str
) -> None:
    ways = {"uint8": lambda x: x, "float": lambda x: (x / 255).astype(np.float32), "bool": lambda x: x > 127}
    images = ways[pixels](noise(5, *shape))
    found = image_format(column(*images), "picture")
    assert (found.shape, found.layout, found.pixels) == (*expected, pixels)
    cells = read_images(column(*images), found, "picture")
    assert cells.values.shape == cells.observed.shape == (5, int(np.prod(shape)))
    assert cells.observed.all()
    back = to_images(cells.values, found)
    assert back.shape == images.shape
    np.testing.assert_array_equal(back > 0.5 if pixels == "bool" else back, images)


def test_colours_last_and_first_are_the_same_pixels() -> None:
    last = noise(3, 6, 4, 3)
    first = last.transpose(0, 3, 1, 2)
    read = [read_images(column(*own), image_format(column(*own), "picture"), "picture").values for own in (last, first)]
    np.testing.assert_array_equal(*read)
    np.testing.assert_array_equal(read[0].reshape(3, 3, 6, 4), first)


@pytest.mark.parametrize("as_one_block", [True, False])
def test_one_step_for_all_and_image_by_image_read_alike(as_one_block: bool) -> None:
    images = noise(3, 6, 4)
    cells = column(*images) if as_one_block else column(*images, None)
    found = read_images(cells, GREY, "picture")
    np.testing.assert_array_equal(found.values[:3], images.reshape(3, -1))
    assert found.observed[:3].all()


def test_png_bytes_are_read_exactly_in_grey_in_colour_and_in_black_and_white() -> None:
    grey, colour = noise(6, 4), noise(6, 4, 3)
    np.testing.assert_array_equal(decode_picture(picture(grey)), grey)
    np.testing.assert_array_equal(decode_picture(picture(colour)), colour)
    black_and_white = decode_picture(picture(grey, mode="1"))
    assert black_and_white.dtype == np.bool_
    assert black_and_white.shape == (6, 4)
    mixed = read_images(column(picture(grey), grey), GREY, "picture").values
    np.testing.assert_array_equal(mixed[0], mixed[1])


def test_jpeg_bytes_are_read_nearly() -> None:
    ramp = np.add.outer(np.arange(16) * 8, np.arange(16) * 6).astype(np.uint8)
    read = decode_picture(picture(ramp, "JPEG", quality=95))
    assert read.shape == ramp.shape
    assert np.abs(read.astype(int) - ramp).max() < 12
    assert np.abs(read.astype(int) - ramp).mean() < 3


@pytest.mark.parametrize("mode", ["P", "RGBA", "CMYK"])
def test_palettes_and_transparency_become_colour(mode: str) -> None:
    flat = np.tile(np.array([204, 51, 0], dtype=np.uint8), (6, 4, 1))
    read = decode_picture(picture(flat, "TIFF" if mode == "CMYK" else "PNG", mode=mode))
    assert read.shape == (6, 4, 3)
    assert np.abs(read.astype(int) - flat).max() < 30


def test_grey_with_transparency_stays_grey() -> None:
    assert decode_picture(picture(noise(6, 4), mode="LA")).shape == (6, 4)


def test_sixteen_bits_of_grey_become_eight_and_not_white() -> None:
    ramp = np.linspace(0, 65535, 24).reshape(6, 4).astype(np.uint16)
    read = decode_picture(picture(ramp))
    assert read.dtype == np.uint8
    assert np.abs(read.astype(int) - ramp / 257).max() <= 1


def test_pictures_of_pillow_and_cells_of_stored_data_sets_are_read() -> None:
    grey = noise(6, 4)
    cells = column(Image.fromarray(grey), {"bytes": picture(grey), "path": "a.png"}, bytearray(picture(grey)), grey)
    assert holds_images(cells)
    values = read_images(cells, image_format(cells, "picture"), "picture").values
    np.testing.assert_array_equal(values, np.tile(grey.reshape(-1), (4, 1)))


@pytest.mark.parametrize("first", [[0.0, 1.0], "text", b"text", 3, np.zeros(4), {"path": "a.png"}])
def test_what_is_no_image_is_not_taken_for_one(first: Any) -> None:
    cells = pd.Series([None, None], dtype=object)
    cells.iloc[1] = first
    assert not holds_images(cells)
    cells.iloc[0] = noise(6, 4)
    assert holds_images(cells)


# ---------------------------------------------------------------------- missing images and hidden pixels


def test_a_missing_image_has_no_observed_pixel() -> None:
    cells = column(None, noise(6, 4), np.nan)
    assert holds_images(cells)
    found = read_images(cells, image_format(cells, "picture"), "picture")
    np.testing.assert_array_equal(found.observed.all(axis=1), [False, True, False])
    np.testing.assert_array_equal(found.observed.any(axis=1), [False, True, False])


@pytest.mark.parametrize("pixels", [np.uint8, np.float32, np.bool_])
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3), (3, 6, 4)])
def test_masked_pixels_are_not_observed(pixels: type, shape: tuple[int, ...]) -> None:
    hidden = np.random.default_rng(1).uniform(size=shape) < 0.4
    image = np.ma.array(noise(*shape) > 127, mask=hidden).astype(pixels)
    known = image_format(column(image), "picture")
    found = read_images(column(image), known, "picture")
    back = to_images(found.observed.astype(np.float32), ImageFormat(known.shape, "float", known.layout))
    np.testing.assert_array_equal(back[0] == 0, hidden)


def test_nan_pixels_are_not_observed_and_add_to_masked_ones() -> None:
    image = np.full((6, 4), 0.5, dtype=np.float32)
    image[0] = np.nan
    both = np.ma.array(image, mask=np.zeros((6, 4), dtype=bool))
    both[1] = np.ma.masked
    for cell, first_seen in ((image, 1), (both, 2)):
        found = read_images(column(cell), ImageFormat((1, 6, 4), "float", "HW"), "picture")
        np.testing.assert_array_equal(found.observed.reshape(6, 4).all(axis=1), np.arange(6) >= first_seen)
        assert np.isfinite(found.values).all()


def test_what_stands_under_a_mask_is_never_looked_at() -> None:
    quiet, loud = np.full((6, 4), 0.5), np.full((6, 4), 0.5)
    loud[2] = 1e9
    hidden = np.zeros((6, 4), dtype=bool)
    hidden[2] = True
    cells = column(np.ma.array(quiet, mask=hidden), np.ma.array(loud, mask=hidden))
    found = read_images(cells, image_format(cells, "picture"), "picture")
    np.testing.assert_array_equal(found.values[0], found.values[1])


# ---------------------------------------------------------------------- refusals: row, what it is, what it should be


@pytest.mark.parametrize(
    ("wrong", "parts"),
    [
        (noise(8, 4), ("8 x 4 grey", "6 x 4 grey", "resize or crop")),
        (noise(4, 6), ("4 x 6 grey", "6 x 4 grey", "resize or crop")),
        (noise(6, 4, 3), ("RGB", "grey", "convert between grey and RGB")),
        (noise(6, 4, 1), ("laid out HWC", "laid out HW", "transpose")),
        (noise(6, 4) / 255, ("float, 0 to 1", "uint8, 0 to 255", "(image * 255).round().astype('uint8')")),
        (noise(6, 4) > 127, ("bool", "uint8, 0 to 255", "(image * 255).round().astype('uint8')")),
        (noise(6, 4) * 1.0, ("float pixels from", "[0, 1]", "uint8")),
        (noise(6, 4) - 1.5, ("float pixels from", "[0, 1]", "uint8")),
        (noise(6, 4).astype(np.int64), ("pixels of type int64", "use uint8 (0 to 255), float (0 to 1) or bool")),
        (noise(6, 4).astype(complex), ("pixels of type complex", "use uint8")),
        (noise(6, 4, 5), ("shape (6, 4, 5)", "(height, width)", "channels first or last")),
        (noise(6), ("shape (6,)", "(height, width)")),
        (noise(0, 4), ("is empty", "(0, 4)")),
        ("a.png", ("holds str", "give it an image")),
        (3.5, ("holds float", "give it an image")),
        ({"path": "a.png"}, ("give it an image",)),
    ],
    ids=[
        "taller", "turned", "colour", "other axes", "float", "bool", "float levels", "negative", "int64", "complex",
        "five channels", "one axis", "empty", "text", "number", "no bytes",
    ],
)  # fmt: skip
def test_an_image_unlike_the_others_is_refused_by_row_with_a_remedy(wrong: Any, parts: tuple[str, ...]) -> None:
    cells = column(noise(6, 4), noise(6, 4), None)
    cells.iloc[2] = wrong
    with pytest.raises(DataError) as caught:
        read_images(cells, GREY, "picture")
    says(str(caught.value), "'picture'", "row 2", *parts)


def test_levels_where_training_had_floats_are_told_to_be_divided() -> None:
    with pytest.raises(DataError) as caught:
        read_images(column(noise(6, 4)), ImageFormat((1, 6, 4), "float", "HW"), "picture")
    says(str(caught.value), "row 0", "uint8, 0 to 255", "float, 0 to 1", "image / 255")


def test_greys_where_training_had_black_and_white_are_told_to_be_cut() -> None:
    with pytest.raises(DataError) as caught:
        read_images(column(noise(6, 4)), ImageFormat((1, 6, 4), "bool", "HW"), "picture")
    says(str(caught.value), "row 0", "black and white", "image > 127")


def test_all_images_alike_but_unlike_those_of_training_are_refused_at_the_first() -> None:
    with pytest.raises(DataError, match=r"row 0 is 5 x 5 grey.*6 x 4 grey"):
        read_images(column(*noise(3, 5, 5)), GREY, "picture")


@pytest.mark.parametrize("what", ["cut short", "overwritten", "only its first bytes"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_corrupt_bytes_are_named_with_their_row(what: str, kind: str) -> None:
    whole = picture(noise(40, 40), kind)
    broken = {
        "cut short": whole[: len(whole) // 2],
        "overwritten": whole[:20] + bytes(len(whole) - 20),
        "only its first bytes": whole[:8],
    }[what]
    expected = ImageFormat((1, 40, 40), "uint8", "HW")
    with pytest.raises(DataError) as caught:
        read_images(column(whole, broken), expected, "picture")
    says(str(caught.value), "'picture'", "row 1")
    assert "neither a JPEG nor a PNG" in str(caught.value) or "a damaged picture" in str(caught.value)


def test_a_mode_without_a_meaning_in_levels_is_named() -> None:
    with pytest.raises(DataError, match=r"'picture', row 1: a picture of mode 'F'; convert it to L \(grey\) or RGB"):
        read_images(column(noise(6, 4), Image.fromarray(np.zeros((6, 4), dtype=np.float32))), GREY, "picture")


def test_a_column_said_to_hold_images_that_holds_none_is_refused() -> None:
    with pytest.raises(DataError, match="'picture' is to hold images, but has none"):
        image_format(pd.Series([None, None], dtype=object), "picture")


@pytest.mark.parametrize("change", [{"shape": (6, 4)}, {"pixels": "int8"}, {"layout": "WH"}])
def test_a_stored_format_that_no_image_has_is_refused(change: dict[str, Any]) -> None:
    whole = {"shape": [1, 6, 4], "pixels": "uint8", "layout": "HW"}
    assert ImageFormat.from_json(whole) == GREY
    with pytest.raises(ValueError, match="describes no image"):
        ImageFormat.from_json({**whole, **change})


# ---------------------------------------------------------------------- in the detector


@pytest.fixture(scope="module")
def fitted() -> CVAEDetector:
    return CVAEDetector(**TINY).fit(noise(40, 8, 8))


@pytest.mark.parametrize("likelihood", ["normal", "robust_normal", "discretised_logistic"])
def test_all_black_and_all_white_images_score_finitely(likelihood: str) -> None:
    images = noise(40, 8, 8)
    detector = CVAEDetector(likelihoods={"image": likelihood}, **TINY).fit(images)
    plain = np.stack([np.zeros((8, 8), np.uint8), np.full((8, 8), 255, np.uint8)])
    assert np.isfinite(detector.negative_elbo(plain)).all()
    assert np.isfinite(detector.explain_pixels(plain)).all()
    assert np.isfinite(detector.p_values(plain)).all()


@pytest.mark.parametrize("level", [0, 255, 0.0, 1.0, False, True])
def test_training_on_nothing_but_one_plain_image_scores_every_image_finitely(level: Any) -> None:
    images = np.full((40, 8, 8), level, dtype=np.uint8 if type(level) is int else type(level))
    detector = CVAEDetector(**TINY).fit(images)
    others = noise(2, 8, 8) if images.dtype == np.uint8 else (noise(2, 8, 8) > 127).astype(images.dtype)
    assert np.isfinite(detector.negative_elbo(images[:2])).all()
    assert np.isfinite(detector.negative_elbo(others)).all()
    assert (detector.negative_elbo(others) > detector.negative_elbo(images[:2])).all()


def test_a_bool_detector_scores_black_and_white_finitely() -> None:
    detector = CVAEDetector(**TINY).fit(noise(40, 8, 8) > 127)
    plain = np.stack([np.zeros((8, 8), bool), np.ones((8, 8), bool)])
    assert np.isfinite(detector.negative_elbo(plain)).all()


@pytest.mark.parametrize(
    ("wrong", "parts"),
    [
        (noise(2, 9, 8), ("9 x 8 grey", "8 x 8 grey", "resize")),
        (noise(2, 8, 8, 3), ("RGB", "grey", "convert")),
        (noise(2, 8, 8) / 255, ("float", "uint8", "astype('uint8')")),
        (noise(2, 8, 8) > 127, ("bool", "uint8")),
        (noise(2, 8, 8).astype(np.int32), ("int32", "use uint8")),
    ],
    ids=["size", "mode", "float", "bool", "int32"],
)
def test_scoring_other_images_than_trained_names_both(
    fitted: CVAEDetector, wrong: np.ndarray, parts: tuple[str, ...]
) -> None:
    with pytest.raises(DataError) as caught:
        fitted.negative_elbo(wrong)
    says(str(caught.value), "'image'", "row 0", *parts)


def test_training_on_float_levels_says_how_to_scale_them() -> None:
    with pytest.raises(DataError, match=r"row 0 has float pixels from .* float pixels lie in \[0, 1\]: divide"):
        CVAEDetector(**TINY).fit(noise(40, 8, 8).astype(float))


def test_training_on_infinite_pixels_is_refused() -> None:
    images = noise(40, 8, 8) / 255
    images[0, 3, 3] = np.inf
    with pytest.raises(DataError, match="row 0 has float pixels from"):
        CVAEDetector(**TINY).fit(images)


def test_a_table_is_refused_where_images_were_trained_and_the_reverse(fitted: CVAEDetector) -> None:
    with pytest.raises((DataError, ValueError)):
        fitted.negative_elbo(np.zeros((4, 64)))
    table = CVAEDetector(**{**TINY, "latent_dim": "auto"}).fit(np.random.default_rng(0).normal(size=(40, 3)))
    with pytest.raises(DataError, match=re.escape("X is an array of images, but fit had the columns")):
        table.negative_elbo(noise(2, 8, 8))


def test_no_images_give_no_scores(fitted: CVAEDetector) -> None:
    assert fitted.negative_elbo(noise(0, 8, 8)).shape == (0,)
