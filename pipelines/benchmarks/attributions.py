"""Which column is to blame: peers of `CVAEDetector.explain` on rows of real columns, none of them conditional.

Each learns from normal training rows (N, D) and gives the test rows (R, D) one number per column, (R, D): higher = more
to blame. All see columns standardised by the training rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from sklearn.covariance import LedoitWolf
from sklearn.ensemble import IsolationForest
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

Rows = npt.NDArray[np.float64]
Attribution = Callable[[Rows, Rows, int], Rows]

NEIGHBOURS = 10
PERMUTATIONS = 10
MOST_NEIGHBOURS_TO_CHOOSE_FROM = 20_000
MOST_RESIDUALS = 2_000
"""Training rows whose own residuals give the scale of each column's."""


def z_scores(train: Rows, test: Rows, seed: int) -> Rows:
    """Distance of each cell from its column's mean, in standard deviations."""
    scores: Rows = np.abs(test)
    return scores


def gaussian(train: Rows, test: Rows, seed: int) -> Rows:
    """Distance of each cell from its mean given all others under one normal distribution, in standard deviations.

    Exact leave-one-out residuals by the precision matrix, (P x)_j / sqrt(P_jj); Ledoit and Wolf's covariance.
    """
    precision = LedoitWolf().fit(train).precision_
    residuals: Rows = np.abs((test - train.mean(axis=0)) @ precision) / np.sqrt(np.diag(precision))
    return residuals


def neighbours(train: Rows, test: Rows, seed: int) -> Rows:
    """Distance of each cell from the mean of the row's 10 nearest training rows, in units of training residuals."""
    rng = np.random.default_rng(seed)
    kept = train[rng.permutation(len(train))[:MOST_NEIGHBOURS_TO_CHOOSE_FROM]]
    many = min(NEIGHBOURS, len(kept) - 1)
    near = NearestNeighbors(n_neighbors=many).fit(kept)
    own = kept[:MOST_RESIDUALS]
    # The nearest row of a training row is itself.
    others = near.kneighbors(own, n_neighbors=many + 1, return_distance=False)[:, 1:]
    scale = np.maximum((own - kept[others].mean(axis=1)).std(axis=0), 1e-9)
    found = near.kneighbors(test, return_distance=False)
    residuals: Rows = np.abs(test - kept[found].mean(axis=1)) / scale
    return residuals


def shapley_of_forest(train: Rows, test: Rows, seed: int) -> Rows:
    """Sampled Shapley values of an Isolation Forest's score (Štrumbelj and Kononenko 2014), 10 permutations a row.

    Each permutation draws a training row and turns its cells into those of the row to explain, one after the other; a
    column is given the mean change of the score at its turn. Defaults: 100 trees.
    """
    forest, rng = IsolationForest(random_state=seed).fit(train), np.random.default_rng(seed)
    n_rows, n_columns = test.shape
    values, places = np.zeros(test.shape), np.arange(n_rows)
    for _ in range(PERMUTATIONS):
        order = rng.random(test.shape).argsort(axis=1)
        # Step s of a path (N, D + 1, D) has the first s columns of the row's order from the row.
        own = order.argsort(axis=1)[:, None, :] < np.arange(n_columns + 1)[None, :, None]
        background = train[rng.integers(len(train), size=n_rows)]
        path = np.where(own, test[:, None, :], background[:, None, :]).reshape(-1, n_columns)
        changes = np.diff(-forest.score_samples(path).reshape(n_rows, -1), axis=1)
        for step in range(n_columns):
            values[places, order[:, step]] += changes[:, step] / PERMUTATIONS
    return values


def _standardised(method: Attribution, train: Rows, test: Rows, seed: int) -> Rows:
    scaler = StandardScaler().fit(train)
    return method(scaler.transform(train), scaler.transform(test), seed)


PEERS: dict[str, Attribution] = {
    "z-score": z_scores,
    "Isolation Forest, sampled Shapley values": shapley_of_forest,
    "kNN residual": neighbours,
    "Gaussian given the others": gaussian,
}


def blame(peer: str, train: Rows, test: Rows, seed: int) -> Rows:
    """What a peer blames, (R, D)."""
    return _standardised(PEERS[peer], train, test, seed)
