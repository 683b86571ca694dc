"""Factor analysis of several classes at once, from their second moments: few rows of a class lean on all rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anomaly_cvae.frames import FloatArray

N_FOLDS = 3
LEANS = (3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 1e4)
"""Rows' worth of the pooled covariance that is added to each class's own."""
DIAGONALS = (0.0, 30.0, 1e3, 1e5)
"""Rows' worth of independent columns that are added to the pooled covariance."""
FACTORS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
MOST_CLASSES_FOR_LEANS = 12
MOST_CLASSES_FOR_FACTORS = 4
STEPS, STEPS_OF_CHOICE = 25, 8
LEAST_OWN_SHARE = 1e-3
"""Of a column's variance, what is not shared."""


@dataclass(frozen=True)
class Moments:
    """Of centred rows in folds: sums of outer products (N_FOLDS, D, D) and numbers of rows (N_FOLDS,)."""

    outer: FloatArray
    n_rows: FloatArray

    @classmethod
    def of(cls, rows: FloatArray, rng: np.random.Generator) -> Moments:
        """Of rows (N, D) in random folds of like size; NaN is a missing cell.

        A missing cell counts as the mean, and variances are those of the cells that are there: columns with many
        gaps look less dependent than they are.
        """
        there = ~np.isnan(rows)
        filled = np.where(there, rows, 0.0)
        share = np.sqrt(np.maximum(there.mean(axis=0), 1e-3)) if len(rows) else np.ones(rows.shape[1])
        folds = rng.permutation(len(rows)) % N_FOLDS
        parts = [filled[folds == fold] for fold in range(N_FOLDS)]
        outer = np.stack([part.T @ part for part in parts])
        diagonal = np.einsum("fdd->fd", outer)
        diagonal /= share**2
        return cls(outer, np.array([float(len(part)) for part in parts]))

    def without(self, fold: int | None) -> tuple[FloatArray, float]:
        """Sum of outer products and number of rows of all folds but one; of all folds for None."""
        kept = [place for place in range(N_FOLDS) if place != fold]
        return self.outer[kept].sum(axis=0), float(self.n_rows[kept].sum())


@dataclass(frozen=True)
class Factors:
    """x = W f + e: loadings W (D, Q), f ~ N(0, I), e ~ N(0, diag(noise)).

    Attributes
    ----------
    readings : (D, Q) what turns rows (N, D) into the means of their factors given the row
    precision : (Q,) of each factor given the row and the others; the factors of `factors_of` do not depend on each
        other given the row, those of `turned_to` do
    """

    loadings: FloatArray
    noise: FloatArray
    readings: FloatArray
    precision: FloatArray

    @property
    def covariance(self) -> FloatArray:
        """Of x, (D, D)."""
        covariance: FloatArray = self.loadings @ self.loadings.T + np.diag(self.noise)
        return covariance


def turned_to(factors: Factors, other: Factors) -> Factors:
    """The same distribution of rows, its factors turned until the loadings are most like the other's.

    A factor that classes have in common is then the same number of z in all of them: a row's style, which it keeps
    under another class. Orthogonal Procrustes: Schönemann (1966); each column in units of its noise.
    """
    if not len(factors.precision):
        return factors
    own, wanted = (one.loadings / np.sqrt(one.noise)[:, None] for one in (factors, other))
    left, _, right = np.linalg.svd(own.T @ wanted)
    turn = left @ right
    precision = turn.T @ np.diag(factors.precision) @ turn
    loadings = factors.loadings @ turn
    readings = np.linalg.solve(precision, (loadings / factors.noise[:, None]).T).T
    return Factors(loadings, factors.noise, readings, np.diag(precision).copy())


def fit_classes(classes: Sequence[Moments], most_factors: int, least_noise: float) -> list[Factors]:
    """Factors of every class; how far classes lean on each other, and how many factors, by held-out likelihood.

    A class's covariance is its own and the pooled one's, weighted by its rows and a number of rows; the pooled one
    leans likewise on independent columns. ``least_noise`` is added to every variance.
    """
    dimension = classes[0].outer.shape[1]
    order = sorted(range(len(classes)), key=lambda k: -classes[k].n_rows.sum())
    spread = [order[i] for i in np.unique(np.linspace(0, len(order) - 1, MOST_CLASSES_FOR_LEANS).astype(int))]
    lean, diagonal = _choose_leans(classes, spread, least_noise)
    counts = [q for q in FACTORS if q <= min(most_factors, dimension - 1)]
    n_factors = _choose_count(classes, order[:MOST_CLASSES_FOR_FACTORS], counts, lean, diagonal, least_noise)
    return [
        factors_of(covariance, n_factors, least_noise, STEPS)
        for covariance in _covariances(classes, None, lean, diagonal, least_noise)
    ]


def factors_of(covariance: FloatArray, n_factors: int, least_noise: float, steps: int = STEPS) -> Factors:
    """Maximum likelihood in turns: loadings given the noise, noise given the loadings.

    Lawley and Maxwell (1971), chapter 4; Barber (2012), section 21.2, has the same in matrix form.
    """
    variances = np.diag(covariance)
    floor = np.maximum(least_noise, LEAST_OWN_SHARE * variances)
    noise = np.maximum(0.5 * variances, floor)
    for _ in range(steps):
        loadings, _ = _loadings(covariance, noise, n_factors)
        noise = np.maximum(variances - (loadings**2).sum(axis=1), floor)
    loadings, precision = _loadings(covariance, noise, n_factors)
    return Factors(loadings, noise, loadings / noise[:, None] / precision, precision)


def _loadings(covariance: FloatArray, noise: FloatArray, n_factors: int) -> tuple[FloatArray, FloatArray]:
    scale = np.sqrt(noise)
    found, vectors = np.linalg.eigh(covariance / np.outer(scale, scale))
    largest = np.maximum(found[::-1][:n_factors], 1.0)
    loadings = scale[:, None] * vectors[:, ::-1][:, :n_factors] * np.sqrt(largest - 1.0)
    return loadings, largest


def _covariances(
    classes: Sequence[Moments], fold: int | None, lean: float, diagonal: float, least_noise: float
) -> FloatArray:
    """(K, D, D), from all folds but one."""
    own = [moments.without(fold) for moments in classes]
    outer, n_rows = np.stack([part for part, _ in own]), np.array([n for _, n in own])
    total = max(float(n_rows.sum()), 1.0)
    pooled: FloatArray = outer.sum(axis=0) / total
    pooled = (total * pooled + diagonal * np.diag(np.diag(pooled))) / (total + diagonal)
    noise = least_noise * np.eye(len(pooled))
    leaning: FloatArray = (outer + lean * pooled) / (n_rows + lean)[:, None, None] + noise
    return leaning


def _choose_leans(classes: Sequence[Moments], chosen: Sequence[int], least_noise: float) -> tuple[float, float]:
    best, found = -np.inf, (LEANS[0], DIAGONALS[0])
    for lean in LEANS:
        for diagonal in DIAGONALS:
            nats = 0.0
            for fold in range(N_FOLDS):
                covariances = _covariances(classes, fold, lean, diagonal, least_noise)[list(chosen)]
                nats += sum(_log_likelihood(c, classes[k], fold) for c, k in zip(covariances, chosen, strict=True))
            if nats > best:
                best, found = nats, (lean, diagonal)
    return found


def _choose_count(
    classes: Sequence[Moments], chosen: Sequence[int], counts: Sequence[int], lean: float, diagonal: float,
    least_noise: float,
) -> int:  # fmt: skip
    nats = np.zeros(len(counts))
    for fold in range(N_FOLDS):
        covariances = _covariances(classes, fold, lean, diagonal, least_noise)
        for k in chosen:
            for place, n_factors in enumerate(counts):
                fitted = factors_of(covariances[k], n_factors, least_noise, STEPS_OF_CHOICE)
                nats[place] += _log_likelihood(fitted.covariance, classes[k], fold)
    return counts[int(nats.argmax())]


def _log_likelihood(covariance: FloatArray, moments: Moments, fold: int) -> float:
    """Of one fold's rows under N(0, covariance), up to a constant."""
    n_rows = moments.n_rows[fold]
    if not n_rows:
        return 0.0
    log_determinant = np.linalg.slogdet(covariance)[1]
    return float(-0.5 * (np.linalg.solve(covariance, moments.outer[fold]).trace() + n_rows * log_determinant))
