"""Impute, then detect: what detectors that want complete rows are usually given for missing cells.

Numbers are standardised and words one-hot, as learned from complete training rows; a missing word hides its whole
group.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import one_class_methods
import pandas as pd
from conditional_peers import encode
from sklearn.exceptions import ConvergenceWarning
from sklearn.experimental import enable_iterative_imputer  # noqa: F401  # scikit-learn's own switch
from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer

Rows = npt.NDArray[np.float64]
Imputer = Callable[[Rows, int], object]

DONORS = 1_000
"""Training rows that neighbours and regressions are learned from."""
ROUNDS = 10
WIDE = 40
NEAREST = 20
"""Columns that a regression uses where there are more than `WIDE`."""

DETECTORS = {
    "kNN": one_class_methods.nearest_neighbours,
    "LOF": one_class_methods.local_outlier_factor,
    "Isolation Forest": one_class_methods.isolation_forest,
    "GMM": one_class_methods.gaussian_mixture,
}


def mean_imputer(train: Rows, seed: int) -> SimpleImputer:
    """Means of the training rows; of one-hot words, their shares."""
    return SimpleImputer().fit(train)


def neighbour_imputer(train: Rows, seed: int) -> KNNImputer:
    """Means of the five nearest training rows, by the cells that are there."""
    return KNNImputer(n_neighbors=5).fit(_some(train, seed))


def iterative_imputer(train: Rows, seed: int) -> IterativeImputer:
    """Ten rounds of Bayesian ridge regressions of each column on the others, learned from complete rows."""
    nearest = NEAREST if train.shape[1] > WIDE else None
    # tol=0: on complete rows nothing changes, and the first round would be the last for test rows, too.
    imputer = IterativeImputer(max_iter=ROUNDS, tol=0.0, n_nearest_features=nearest, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return imputer.fit(_some(train, seed))


IMPUTERS: dict[str, Imputer] = {"mean": mean_imputer, "kNN": neighbour_imputer, "iterative": iterative_imputer}


def _some(train: Rows, seed: int) -> Rows:
    if len(train) <= DONORS:
        return train
    return train[np.random.default_rng(seed).choice(len(train), DONORS, replace=False)]


def encoded(train: pd.DataFrame, test: pd.DataFrame) -> tuple[Rows, Rows, npt.NDArray[np.int64]]:
    """Both as numbers, and for each of their columns the place of the one that it was made of."""
    words = [name for name in train if not pd.api.types.is_numeric_dtype(train[name])]
    numbers = [name for name in train if name not in words]
    widths = [1] * len(numbers) + [train[name].astype(str).nunique() for name in words]
    places = np.repeat([train.columns.get_loc(name) for name in [*numbers, *words]], widths)
    both = encode(train, test)
    return both[0].astype(np.float64), both[1].astype(np.float64), places


def peer_scores(
    train: pd.DataFrame, test: pd.DataFrame, hidden: dict[float, npt.NDArray[np.bool_]], seed: int
) -> dict[tuple[str, float], Rows]:
    """Scores (R,) by "imputer, detector" and share; ``hidden`` (R, D) per share, none of them True at share 0.

    A detector sees all versions of the test rows at once, so that it is learned once.
    """
    x_train, x_test, places = encoded(train, test)
    versions: dict[tuple[str, float], Rows] = {}
    for name, make in IMPUTERS.items():
        imputer = make(x_train, seed)
        for share, cells in hidden.items():
            whole = not cells.any()
            versions[name, share] = x_test if whole else imputer.transform(np.where(cells[:, places], np.nan, x_test))
    stacked, bounds = np.concatenate(list(versions.values())), np.arange(1, len(versions)) * len(test)
    scores: dict[tuple[str, float], Rows] = {}
    for detector, score in DETECTORS.items():
        parts = np.split(score(x_train, stacked, seed), bounds)
        scores |= {(f"{name} imputation, {detector}", share): part
                   for (name, share), part in zip(versions, parts, strict=True)}  # fmt: skip
    return scores
