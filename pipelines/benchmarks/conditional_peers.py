"""Classical detectors that are told the condition in three ways: not at all, as columns, by one detector per class.

They learn from normal rows and see standardised numbers and one-hot words. None is tuned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import LocalOutlierFactor, NearestNeighbors
from sklearn.preprocessing import OneHotEncoder, StandardScaler

LEAST_ROWS_OF_OWN_PEER = 50
"""A class with fewer training rows is judged by the detector of all rows, on the scale of all rows."""
WAYS = ("no condition", "condition as column", "one per class")
MOST_COLUMNS = 200
"""Of more columns, as of images, a covariance is taken of the first `COMPONENTS` principal components only."""
COMPONENTS = 50


@dataclass(frozen=True)
class Scores:
    """Scores of test rows, and when asked of training rows, none its own neighbour; higher = more anomalous."""

    train: Callable[[], np.ndarray]
    test: np.ndarray


def isolation_forest(train: np.ndarray, test: np.ndarray, seed: int) -> Scores:
    """scikit-learn's defaults."""
    forest = IsolationForest(random_state=seed).fit(train)
    return Scores(lambda: -forest.score_samples(train), -forest.score_samples(test))


def nearest_neighbours(train: np.ndarray, test: np.ndarray, seed: int) -> Scores:
    """Distance to the fifth nearest training row."""
    near = NearestNeighbors(n_neighbors=min(5, len(train) - 1), algorithm="brute").fit(train)
    return Scores(lambda: near.kneighbors()[0][:, -1], near.kneighbors(test)[0][:, -1])


def local_outlier_factor(train: np.ndarray, test: np.ndarray, seed: int) -> Scores:
    """scikit-learn's defaults (20 neighbours), fewer where there are fewer rows."""
    factor = LocalOutlierFactor(n_neighbors=min(20, len(train) - 1), novelty=True, algorithm="brute").fit(train)
    return Scores(lambda: -factor.negative_outlier_factor_, -factor.score_samples(test))


def gaussian_mixture(train: np.ndarray, test: np.ndarray, seed: int) -> Scores:
    """Ten full components, fewer where there are few rows."""
    train, test = reduced(train, test, seed)
    mixture = mixture_of(train, seed)
    return Scores(lambda: -mixture.score_samples(train), -mixture.score_samples(test))


def mixture_of(train: np.ndarray, seed: int) -> GaussianMixture:
    """A component for every 50 rows, at most ten."""
    components = int(np.clip(len(train) // 50, 1, 10))
    return GaussianMixture(components, reg_covar=1e-3, random_state=seed).fit(train)


def reduced(train: np.ndarray, test: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Principal components of many columns; a few columns as they are."""
    if train.shape[1] <= MOST_COLUMNS:
        return train, test
    components = PCA(min(COMPONENTS, len(train)), random_state=seed).fit(train)
    return components.transform(train), components.transform(test)


PEERS: dict[str, Callable[[np.ndarray, np.ndarray, int], Scores]] = {
    "Isolation Forest": isolation_forest,
    "kNN(5)": nearest_neighbours,
    "LOF(20)": local_outlier_factor,
    "GMM(10)": gaussian_mixture,
}


def encode(train: pd.DataFrame, test: pd.DataFrame, *, standardise: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Numbers, standardised unless said otherwise, and one-hot words, learned from the training rows."""
    words = [name for name in train if not pd.api.types.is_numeric_dtype(train[name])]
    numbers = [name for name in train if name not in words]
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    if numbers:
        scaler = StandardScaler(with_mean=standardise, with_std=standardise).fit(train[numbers])
        parts.append((scaler.transform(train[numbers]), scaler.transform(test[numbers])))
    if words:
        one_hot = OneHotEncoder(handle_unknown="ignore", sparse_output=False).fit(train[words].astype(str))
        parts.append((one_hot.transform(train[words].astype(str)), one_hot.transform(test[words].astype(str))))
    both = [np.hstack(side).astype(np.float32) for side in zip(*parts, strict=True)]
    return both[0], both[1]


def class_names(rows: pd.DataFrame, conditions: Sequence[str]) -> np.ndarray:
    """The class of every row in words, (N,)."""
    return rows[list(conditions)].astype(str).agg(", ".join, axis=1).to_numpy()


def peer_scores(
    peer: str,
    way: str,
    train: pd.DataFrame,
    test: pd.DataFrame,
    conditions: list[str],
    seed: int,
    *,
    standardise: bool = True,
    least_rows: int = LEAST_ROWS_OF_OWN_PEER,
) -> np.ndarray:
    """Scores of the test rows, (N,); one per class: a row of a class without training rows ranks first."""
    features = train.columns if way == "condition as column" else train.columns.difference(conditions, sort=False)
    kind = train.assign(**{name: train[name].astype(str) for name in conditions})
    other = test.assign(**{name: test[name].astype(str) for name in conditions})
    x_train, x_test = encode(kind[features], other[features], standardise=standardise)
    if way != "one per class":
        return PEERS[peer](x_train, x_test, seed).test
    own, asked = class_names(train, conditions), class_names(test, conditions)
    everyone = np.full(len(test), np.inf)
    names, counts = np.unique(own, return_counts=True)
    if (counts < least_rows).any():
        everyone = on_scale(PEERS[peer](x_train, x_test, seed))
    scores = np.full(len(test), np.inf)
    for name, count in zip(names, counts, strict=True):
        rows, wanted = own == name, asked == name
        if not wanted.any():
            continue
        few = count < least_rows
        scores[wanted] = everyone[wanted] if few else on_scale(PEERS[peer](x_train[rows], x_test[wanted], seed))
    return np.where(np.isinf(scores), scores[np.isfinite(scores)].max() + 1.0, scores)


def on_scale(scores: Scores) -> np.ndarray:
    """Test scores on the scale of the training ones: median 0, 0.9 quantile 1."""
    middle, high = np.quantile(scores.train(), [0.5, 0.9])
    return (scores.test - middle) / max(high - middle, 1e-9)
