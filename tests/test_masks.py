"""What training hides of a row: cells of a table, quadrants, boxes and scattered pixels of an image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from anomaly_cvae.masks import MaskShapes, hidden_cells
from anomaly_cvae.objectives import Draws

FORMS: tuple[MaskShapes, ...] = ("mixed", "quadrants", "cells")


def draws(seed: int = 0, dtype: torch.dtype = torch.float32) -> Draws:
    return Draws(torch.Generator().manual_seed(seed), torch.device("cpu"), dtype)


def masks(form: MaskShapes, height: int = 8, width: int = 8, n: int = 600, channels: int = 1) -> np.ndarray:
    """(N, C, H, W) what is hidden of N images."""
    shape = (channels, height, width)
    hidden = hidden_cells(draws(), (1, n), channels * height * width, [shape], form)
    return hidden[0].reshape(n, *shape).bool().numpy()


def is_of_quadrants(mask: np.ndarray) -> bool:
    """Whether an image (H, W) is hidden in whole quadrants, some but not all of them."""
    height, width = mask.shape
    top, left = height - height // 2, width - width // 2
    parts = [mask[:top, :left], mask[:top, left:], mask[top:, :left], mask[top:, left:]]
    whole = [part.all() for part in parts if part.size]
    return all(part.all() or not part.any() for part in parts) and 0 < sum(whole) < len(whole)


def is_box(mask: np.ndarray) -> bool:
    rows, columns = mask.any(axis=1), mask.any(axis=0)
    return bool((mask == np.outer(rows, columns)).all()) and all(
        np.abs(np.diff(np.pad(line.astype(int), 1))).sum() <= 2 for line in (rows, columns)
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_number_per_cell_zero_or_one(form: MaskShapes, dtype: torch.dtype) -> None:
    shapes = [(1, 8, 8), (3, 5, 7)]
    hidden = hidden_cells(draws(dtype=dtype), (2, 50), 4 + 64 + 105, shapes, form)
    assert hidden.shape == (2, 50, 4 + 64 + 105)
    assert hidden.dtype == dtype
    assert set(hidden.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_hidden_depends_on_the_generator_and_differs_by_row_and_member(form: MaskShapes) -> None:
    first, again, other = (hidden_cells(draws(seed), (2, 50), 68, [(1, 8, 8)], form) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    assert len(first[0].unique(dim=0)) > 10


@pytest.mark.parametrize("form", FORMS)
def test_a_pixel_is_hidden_in_all_its_channels(form: MaskShapes) -> None:
    colours = masks(form, channels=3)
    assert (colours == colours[:, :1]).all()


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 5), (2, 3)])
def test_quadrants_are_whole_and_never_all_or_none(height: int, width: int) -> None:
    hidden = masks("quadrants", height, width)[:, 0]
    assert all(is_of_quadrants(mask) for mask in hidden)


def test_one_two_and_three_quadrants_are_equally_frequent_and_none_is_preferred() -> None:
    hidden = masks("quadrants", n=3000)[:, 0]
    corners = hidden[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    counts = np.bincount(corners.sum(axis=1), minlength=5)
    assert counts[0] == counts[4] == 0
    np.testing.assert_allclose(counts[1:4] / 3000, 1 / 3, atol=0.05)
    np.testing.assert_allclose(corners.mean(axis=0), 0.5, atol=0.05)


def test_scattered_cells_are_hidden_in_a_share_uniform_from_row_to_row() -> None:
    share = masks("cells", 12, 12, n=2000).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(np.quantile(share, [0.1, 0.25, 0.5, 0.75, 0.9]), [0.1, 0.25, 0.5, 0.75, 0.9], atol=0.05)


def test_scattered_cells_have_no_place_of_their_own() -> None:
    np.testing.assert_allclose(masks("cells", n=4000).mean(axis=(0, 1)), 0.5, atol=0.05)


def test_mixed_masks_are_quadrants_boxes_and_scattered_pixels_a_third_each() -> None:
    hidden = masks("mixed", 12, 12, n=1500)[:, 0]
    quadrants = np.array([is_of_quadrants(mask) for mask in hidden])
    boxes = np.array([is_box(mask) for mask in hidden]) & ~quadrants
    scattered = ~quadrants & ~boxes
    for kind in (quadrants, boxes, scattered):
        assert 0.2 < kind.mean() < 0.45
    assert 0.1 < hidden[boxes].mean() < 0.25  # a box covers a ninth on average


@pytest.mark.parametrize("form", FORMS)
def test_cells_of_a_table_are_hidden_in_a_share_uniform_from_row_to_row(form: MaskShapes) -> None:
    hidden = hidden_cells(draws(), (1, 1000), 100 + 64, [(1, 8, 8)], form)[0, :, :100]
    share = hidden.mean(dim=1).numpy()
    np.testing.assert_allclose(np.quantile(share, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.05)


def test_a_table_without_images_has_its_cells_alone() -> None:
    assert hidden_cells(draws(), (3, 20), 5, [], "mixed").shape == (3, 20, 5)
