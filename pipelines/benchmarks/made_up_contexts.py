"""Rows whose distribution depends on their class alone: every column by itself looks the same in every class.

So nothing but the class tells a wrong claim, and p(x given c) is known: no detector can do better, on average, than the
true densities. Two families: *correlations* (a normal distribution per class, unit variances, its own few common
factors) and *surfaces* (a curved two-dimensional surface per class, every column a sine of a place on it, and noise).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

COLUMNS = 10
CLASSES = 6
FACTORS = 4
OWN_SHARE = 0.25
"""Of a column's variance, what it shares with no other column."""
NOISE = 0.6
GRID = 48
"""Places along each side of a surface at which its density is summed."""

Draw = Callable[[int, np.random.Generator], np.ndarray]
LogDensity = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Family:
    """Per class: how to draw n rows (n, D), and log p(x given c) of rows, (N,), up to what all classes share."""

    draws: list[Draw]
    log_densities: list[LogDensity]

    def rows(self, classes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One row of each class asked for, (N, D)."""
        rows = np.empty((len(classes), COLUMNS))
        for k, draw in enumerate(self.draws):
            rows[classes == k] = draw(int((classes == k).sum()), rng)
        return rows

    def log_density(self, rows: np.ndarray) -> np.ndarray:
        """log p(x given c) under every class, (N, K)."""
        return np.column_stack([of_class(rows) for of_class in self.log_densities])


def correlations(rng: np.random.Generator) -> Family:
    """Normal distributions with unit variances and unlike correlations."""
    covariances = []
    for _ in range(CLASSES):
        loadings = rng.normal(size=(COLUMNS, FACTORS))
        loadings *= np.sqrt((1 - OWN_SHARE) / (loadings**2).sum(axis=1, keepdims=True))
        covariances.append(loadings @ loadings.T + OWN_SHARE * np.eye(COLUMNS))
    zero = np.zeros(COLUMNS)
    return Family(
        [lambda n, rng, c=c: rng.multivariate_normal(zero, c, n) for c in covariances],
        [multivariate_normal(zero, c).logpdf for c in covariances],
    )


def surfaces(rng: np.random.Generator) -> Family:
    """Closed curved surfaces; every column is a sine of whole frequencies, so that all have one distribution."""
    waves = [(rng.integers(-1, 2, size=(2, COLUMNS)), rng.uniform(0, 2 * np.pi, COLUMNS)) for _ in range(CLASSES)]
    for frequencies, _ in waves:
        frequencies[0, (frequencies == 0).all(axis=0)] = 1
    return Family(
        [lambda n, rng, w=w: _on_surface(rng.uniform(0, 2 * np.pi, (n, 2)), *w) + _noise(n, rng) for w in waves],
        [lambda rows, w=w: _surface_log_density(rows, *w) for w in waves],
    )


def _on_surface(places: np.ndarray, frequencies: np.ndarray, phases: np.ndarray) -> np.ndarray:
    return np.sqrt(2) * np.sin(places @ frequencies + phases)


def _noise(n: int, rng: np.random.Generator) -> np.ndarray:
    return NOISE * rng.normal(size=(n, COLUMNS))


def _surface_log_density(rows: np.ndarray, frequencies: np.ndarray, phases: np.ndarray) -> np.ndarray:
    """The mean of the noise's density over places on the surface."""
    side = 2 * np.pi * np.arange(GRID) / GRID
    places = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    points = _on_surface(places, frequencies, phases)
    half_squares = (points**2).sum(axis=1) / 2
    # |x - p|^2 / 2 less |x|^2 / 2, in parts: a row by every point is a large matrix.
    parts = [
        logsumexp((part @ points.T - half_squares) / NOISE**2, axis=1)
        for part in np.array_split(rows, len(rows) // 200 + 1)
    ]
    return np.concatenate(parts) - (rows**2).sum(axis=1) / (2 * NOISE**2)


FAMILIES: dict[str, Callable[[np.random.Generator], Family]] = {"correlations": correlations, "surfaces": surfaces}
