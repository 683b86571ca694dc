"""The handwritten digits that come with scikit-learn, some under a wrong claim, some damaged."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.datasets import load_digits

from anomaly_cvae.frames import BoolArray, FloatArray, IntArray

DIGIT_SIDE = 8
DIGIT_MAX = 16.0


@dataclass(frozen=True)
class ClaimedDigits:
    """Handwritten digits with the digit that each claims to be.

    ``train`` and ``test`` have a column per pixel and ``claimed``. ``true_digit`` and ``what`` ("normal",
    "wrong label", "damaged") describe the test rows.
    """

    train: pd.DataFrame
    test: pd.DataFrame
    true_digit: IntArray
    what: np.ndarray[tuple[int], np.dtype[np.str_]]

    @property
    def is_anomaly(self) -> BoolArray:
        """Whether a test row is not what it claims to be."""
        anomalous: BoolArray = self.what != "normal"
        return anomalous


def claimed_digits(
    *, train_share: float = 0.7, wrong_share: float = 0.5, n_damaged: int = 60, random_state: int = 0
) -> ClaimedDigits:
    """scikit-learn's 1,797 digits of 8 x 8 pixels, split; some test rows are given a wrong claim or damaged.

    Training rows claim what they are. Of the test rows ``wrong_share`` claim another digit, drawn
    uniformly, and ``n_damaged`` of the others have a 3 x 3 block of random ink or lose half of the image.
    """
    rng = np.random.default_rng(random_state)
    pixels, digits = load_digits(return_X_y=True)
    order = rng.permutation(len(digits))
    n_train = round(train_share * len(digits))
    train, test = order[:n_train], order[n_train:]
    n_wrong = round(wrong_share * len(test))
    what = np.full(len(test), "normal", dtype="<U11")
    what[:n_wrong], what[n_wrong : n_wrong + n_damaged] = "wrong label", "damaged"
    claimed = digits[test].copy()
    claimed[:n_wrong] = (claimed[:n_wrong] + rng.integers(1, 10, n_wrong)) % 10
    images = pixels[test].copy()
    for i in np.flatnonzero(what == "damaged"):
        images[i] = damage(images[i], rng)
    return ClaimedDigits(_frame(pixels[train], digits[train]), _frame(images, claimed), digits[test], what)


def damage(pixels: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Scribble over a 3 x 3 block of an image (64,), or wipe its upper or lower half."""
    image = pixels.reshape(DIGIT_SIDE, DIGIT_SIDE).copy()
    if rng.random() < 0.5:
        top, left = rng.integers(0, DIGIT_SIDE - 2, 2)
        image[top : top + 3, left : left + 3] = np.round(rng.random((3, 3)) * DIGIT_MAX)
    else:
        half = DIGIT_SIDE // 2
        image[slice(0, half) if rng.random() < 0.5 else slice(half, None)] = 0.0
    return image.ravel()


def _frame(pixels: FloatArray, claimed: IntArray) -> pd.DataFrame:
    names = [f"pixel_{row}_{column}" for row in range(DIGIT_SIDE) for column in range(DIGIT_SIDE)]
    return pd.DataFrame(pixels, columns=names).assign(claimed=claimed)
