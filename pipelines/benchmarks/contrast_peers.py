"""Classical detectors of wrong claims: how much better does another class explain the row than the one it claims?

Each takes training rows (N, D), their classes (N,), test rows (R, D), the classes they claim (R,) and a seed, and
returns scores (R,), higher = more likely wrong. A claim that training does not know ranks first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from conditional_peers import mixture_of, reduced
from scipy.special import log_softmax, logsumexp
from sklearn.covariance import LedoitWolf
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

Judge = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]


def neighbours(
    k: int, train: np.ndarray, own: np.ndarray, test: np.ndarray, claimed: np.ndarray, seed: int
) -> np.ndarray:
    """Distance to the k-th nearest row of the claimed class less that of the nearest other class."""
    classes = np.unique(own)
    distances = np.column_stack([_distance(train[own == name], test, k) for name in classes])
    return of_claims(distances, classes, claimed, lambda others: others.min(axis=1))


def _distance(train: np.ndarray, test: np.ndarray, k: int) -> np.ndarray:
    near = NearestNeighbors(n_neighbors=min(k, len(train)), algorithm="brute").fit(train)
    return near.kneighbors(test)[0][:, -1]


def gaussian(train: np.ndarray, own: np.ndarray, test: np.ndarray, claimed: np.ndarray, seed: int) -> np.ndarray:
    """-log p(claimed class given x) of a normal distribution per class, covariances after Ledoit and Wolf."""
    train, test = reduced(train, test, seed)
    return _of_densities(partial(_gaussian_log_density, test=test), train, own, claimed)


def _gaussian_log_density(rows: np.ndarray, test: np.ndarray) -> np.ndarray:
    fitted = LedoitWolf().fit(rows)
    _, log_volume = np.linalg.slogdet(fitted.covariance_)
    return -0.5 * (fitted.mahalanobis(test) + log_volume)


def mixture(train: np.ndarray, own: np.ndarray, test: np.ndarray, claimed: np.ndarray, seed: int) -> np.ndarray:
    """-log p(claimed class given x) of a Gaussian mixture per class."""
    train, test = reduced(train, test, seed)
    return _of_densities(lambda rows: mixture_of(rows, seed).score_samples(test), train, own, claimed)


def logistic(train: np.ndarray, own: np.ndarray, test: np.ndarray, claimed: np.ndarray, seed: int) -> np.ndarray:
    """-log p(claimed class given x) of multinomial logistic regression on standardised columns."""
    scaler = StandardScaler().fit(train)
    model = LogisticRegression(max_iter=300).fit(scaler.transform(train), own)
    # Not predict_log_proba: the logarithm of a probability that rounds to 0 is infinite.
    odds = model.decision_function(scaler.transform(test))
    log_proba = log_softmax(odds if odds.ndim == 2 else np.column_stack([np.zeros(len(odds)), odds]), axis=1)
    return of_claims(-log_proba, model.classes_, claimed, None)


def _of_densities(
    log_density: Callable[[np.ndarray], np.ndarray], train: np.ndarray, own: np.ndarray, claimed: np.ndarray
) -> np.ndarray:
    classes, counts = np.unique(own, return_counts=True)
    joint = np.column_stack([log_density(train[own == name]) for name in classes]) + np.log(counts / len(own))
    return of_claims(logsumexp(joint, axis=1, keepdims=True) - joint, classes, claimed, None)


def of_claims(
    costs: np.ndarray, classes: np.ndarray, claimed: np.ndarray, less: Callable[[np.ndarray], Any] | None
) -> np.ndarray:
    """The cost (R, K) of each row's claimed class, (R,), less what the other classes' costs come to."""
    place = np.searchsorted(classes, claimed).clip(max=len(classes) - 1)
    is_known = classes[place] == claimed
    rows = np.arange(len(costs))
    scores = costs[rows, place]
    if less is not None:
        others = costs.copy()
        others[rows, place] = np.inf
        scores = scores - less(others)
    return np.where(is_known, scores, scores.max() + 1.0)


CONTRASTS: dict[str, Judge] = {
    "kNN(1) contrast": partial(neighbours, 1),
    "kNN(5) contrast": partial(neighbours, 5),
    "Gaussian contrast": gaussian,
    "GMM(10) contrast": mixture,
    "logistic regression": logistic,
}
