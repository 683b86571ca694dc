"""From scores to verdicts: thresholds per class, conformal p-values, false-discovery control.

A *group* is a class, or (the last one of a model with classes) the marginal score of rows whose class is
unknown. A row with missing cells is compared with calibration rows that had as many cells hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control

from anomaly_cvae.frames import BoolArray, FloatArray, IntArray

Guarantee = Literal["class", "pooled", "none"]

HELD_OUT = "held out"
"""Calibration rows that served for nothing else; others promise nothing."""
MARGINAL = "(marginal)"
"""Name of the group of rows whose class is unknown."""
MAX_LEVELS = 11
FEW_LEVELS = (0.0, 0.4, 0.75, 0.95, 1.0)
"""Shares of missing cells of rows with images, which are dear to score."""
ROWS_FOR_OWN_SCALE = 30
TAIL = 0.99
LEAST_ROWS_TO_BORROW = 5
"""With fewer calibration rows a class does not know where its own scores lie, and nothing is promised."""
LEAST_SCALE = 0.1
"""Nats; a spread of normal scores below this is no scale to measure anything by."""
LEAST_ROWS_OF_PARTS = 20
"""A class with fewer calibration rows is given the spread of all of them."""
MAX_POOLED_ROWS = 2_000
"""Rows of one class in the pool that small classes borrow."""


def missing_levels(n_columns: int, few: bool = False) -> IntArray:
    """Numbers of missing cells for which reference scores are kept: every tenth of the columns, or ``few``."""
    shares = FEW_LEVELS if few else np.linspace(0, 1, MAX_LEVELS)
    return np.unique(np.round(n_columns * np.asarray(shares))).astype(np.int64)


def hide_cells(observed: BoolArray, n_missing: int, rng: np.random.Generator) -> BoolArray:
    """Choose cells (N, D) to hide at random so that every row misses at least ``n_missing``."""
    short = np.maximum(n_missing - (~observed).sum(axis=1), 0)
    order = np.where(observed, rng.random(observed.shape), 2.0).argsort(axis=1).argsort(axis=1)
    hidden: BoolArray = order < short[:, None]
    return hidden


def rows_needed(false_alarm_rate: float) -> int:
    """Calibration rows below which no threshold can hold the rate: 99 for 1 %."""
    return math.ceil(1.0 / false_alarm_rate - 1.0 - 1e-9)


def conformal_p_values(scores: FloatArray, calibration: FloatArray) -> FloatArray:
    """(1 + #{s_i >= s}) / (n + 1) against sorted ``calibration`` scores (n,); Vovk et al. (2005)."""
    at_least = len(calibration) - np.searchsorted(calibration, scores, side="left")
    return (1.0 + at_least.astype(np.float64)) / (len(calibration) + 1.0)


def conformal_threshold(calibration: FloatArray, false_alarm_rate: float) -> float:
    """The score above which the conformal p-value is at most ``false_alarm_rate``.

    With too few rows for the rate it is the largest calibration score: the rate is then about 1 / (n + 1).
    """
    above = max(1, math.floor(false_alarm_rate * (len(calibration) + 1) + 1e-9))
    return float(calibration[len(calibration) - above])


def select_discoveries(p_values: FloatArray, false_discovery_rate: float) -> BoolArray:
    """Rows to report so that the expected share of normals among them is at most the rate.

    Benjamini and Hochberg (1995); valid for conformal p-values of one calibration set (Bates et al. 2023).
    """
    if not len(p_values):
        return np.zeros(0, dtype=np.bool_)
    adjusted: FloatArray = false_discovery_control(p_values, method="bh")
    return adjusted <= false_discovery_rate


@dataclass(frozen=True)
class Reference:
    """Sorted scores of held-out normals, per number of missing cells (level) and group.

    Parameters
    ----------
    levels : (L,) numbers of missing cells
    scores : L x G arrays of scores, less `offsets` of their observed cells
    offsets : (G, D) mean nats per column, so that it matters little *which* cells are missing; or None
    n_classes : groups that are classes; the one after them, if any, is the marginal score
    """

    levels: IntArray
    scores: tuple[tuple[FloatArray, ...], ...]
    offsets: FloatArray | None
    n_classes: int

    @cached_property
    def scale(self) -> tuple[tuple[tuple[float, float], ...], ...]:
        """Location and scale per level and group: median 0 and 0.9 quantile 1."""
        return tuple(
            tuple(location_and_scale(own, typical) for own in groups)
            for groups, typical in zip(self.scores, self._typical, strict=True)
        )

    @cached_property
    def _typical(self) -> tuple[tuple[float, float], ...]:
        return tuple(_typical_scale(groups[: self.n_classes]) for groups in self.scores)

    @cached_property
    def _tails(self) -> FloatArray:
        """Per level, the 0.99 quantile of all classes' calibrated scores; at least 1."""
        return np.array(
            [
                max(1.0, float(np.quantile(np.concatenate([(own - a) / b for own, (a, b) in known]), TAIL)))
                for known in (
                    list(zip(groups[: self.n_classes], scales, strict=False))
                    for groups, scales in zip(self.scores, self.scale, strict=True)
                )
            ]
        )

    def tail_calibrated(self, scores: FloatArray, groups: IntArray, observed: BoolArray) -> FloatArray:
        """Scores (N,) on a scale where about one normal in a hundred exceeds 1, whatever the shape of the tail.

        This makes the negative ELBO and the contrast comparable: most normals have the same contrast to a
        hundredth of a nat, and a few have many nats.
        """
        return self.calibrated(scores, groups, observed) / self._tails[self.level_of(observed)]

    @cached_property
    def _pools(self) -> dict[tuple[int, int], FloatArray]:
        return {}

    def pooled(self, level: int, group: int) -> FloatArray:
        """Class-standardised scores of all classes, sorted, as a class with the rows of ``group`` sees them.

        A new row of a class with n calibration rows is standardised by those n. So every row of the pool
        is standardised by n other rows of its own class: a scale from few rows is a rough one, and the
        pool must show that.
        """
        n_rows = _round_down(len(self.scores[level][group]))
        if (level, n_rows) not in self._pools:
            rng = np.random.default_rng(n_rows)
            typical = self._typical[level]
            parts = [_standardise_by_others(own, n_rows, typical, rng) for own in self.scores[level][: self.n_classes]]
            self._pools[level, n_rows] = np.sort(np.concatenate(parts))
        return self._pools[level, n_rows]

    @cached_property
    def _n_pooled(self) -> list[int]:
        """Rows of the pool at every level."""
        classes = range(self.n_classes)
        return [sum(min(len(groups[k]), MAX_POOLED_ROWS) for k in classes) for groups in self.scores]

    def guarantee(self, group: int, false_alarm_rate: float, level: int = 0) -> Guarantee:
        """Whose calibration rows hold the rate in this group, for rows with the missing cells of ``level``."""
        needed = rows_needed(false_alarm_rate)
        own = len(self.scores[level][group])
        if own >= needed:
            return "class"
        return "pooled" if self._n_pooled[level] >= needed and own >= LEAST_ROWS_TO_BORROW else "none"

    def level_of(self, observed: BoolArray) -> IntArray:
        """The nearest level for each row of a mask (N, D)."""
        if observed.all():
            return np.full(len(observed), int(np.abs(self.levels).argmin()), dtype=np.int64)
        missing = (~observed).sum(axis=1)
        distance = np.abs(missing[:, None] - self.levels).astype(np.float64)
        if len(self.levels) > 1:
            # Rows without any cell all score 0: the scores of such rows say nothing of one that has a few.
            distance[:, -1] = np.where(observed.any(axis=1), np.inf, distance[:, -1])
        nearest: IntArray = distance.argmin(axis=1)
        return nearest

    def offset(self, groups: IntArray, observed: BoolArray) -> FloatArray:
        """What a normal row's observed cells cost on average, (N,), nats."""
        if self.offsets is None:
            return np.zeros(len(groups))
        # Complete rows of a group share one number, to the last bit.
        offset: FloatArray = self.offsets.sum(axis=1)[groups]
        partly = np.flatnonzero(~observed.all(axis=1)) if not observed.all() else np.zeros(0, dtype=np.int64)
        offset[partly] = (self.offsets[groups[partly]] * observed[partly]).sum(axis=1)
        return offset

    def calibrated(self, scores: FloatArray, groups: IntArray, observed: BoolArray) -> FloatArray:
        """Scores (N,) on their group's scale."""
        own = scores - self.offset(groups, observed)
        scales = np.array(self.scale)[self.level_of(observed), groups]
        standard: FloatArray = (own - scales[:, 0]) / scales[:, 1]
        return standard

    def p_values(
        self, scores: FloatArray, groups: IntArray, observed: BoolArray, false_alarm_rate: float
    ) -> FloatArray:
        """Conformal p-values (N,) against the rows that also set the threshold of the group."""
        own, standard = scores - self.offset(groups, observed), self.calibrated(scores, groups, observed)
        p_values = np.ones(len(scores))
        for level, group, rows in _cells(self.level_of(observed), groups):
            if self.guarantee(group, false_alarm_rate, level) == "class":
                p_values[rows] = conformal_p_values(own[rows], self.scores[level][group])
            else:
                p_values[rows] = conformal_p_values(standard[rows], self.pooled(level, group))
        return p_values

    def thresholds(self, groups: IntArray, observed: BoolArray, false_alarm_rate: float) -> FloatArray:
        """Threshold of the score of each row (N,): a score above it is an anomaly."""
        thresholds = self.offset(groups, observed)
        for level, group, rows in _cells(self.level_of(observed), groups):
            thresholds[rows] += self._threshold(level, group, false_alarm_rate)
        return thresholds

    def _threshold(self, level: int, group: int, false_alarm_rate: float) -> float:
        if self.guarantee(group, false_alarm_rate, level) == "class":
            return conformal_threshold(self.scores[level][group], false_alarm_rate)
        location, scale = self.scale[level][group]
        return location + scale * conformal_threshold(self.pooled(level, group), false_alarm_rate)

    def quantile_thresholds(self, share: float) -> FloatArray:
        """Per group, the score above which ``share`` of its rows lie: scikit-learn's contamination.

        A class of fewer rows than one anomaly needs borrows the class-standardised pooled quantile.
        """
        thresholds = []
        for group, (own, (location, scale)) in enumerate(zip(self.scores[0], self.scale[0], strict=True)):
            if len(own) * share >= 1.0 or len(self.scores[0]) == 1:
                thresholds.append(-float(np.percentile(-own, 100.0 * share)))
            else:
                borrowed = -float(np.percentile(-self.pooled(0, group), 100.0 * share))
                thresholds.append(location + scale * borrowed)
        return np.array(thresholds)

    def to_arrays(self, prefix: str) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
        """Plain arrays for ``numpy.savez``."""
        flat = [own for groups in self.scores for own in groups]
        arrays: dict[str, np.ndarray[Any, np.dtype[Any]]] = {
            f"{prefix}.levels": self.levels,
            f"{prefix}.scores": np.concatenate(flat),
            f"{prefix}.counts": np.array([[len(own) for own in groups] for groups in self.scores]),
            f"{prefix}.n_classes": np.array(self.n_classes),
        }
        if self.offsets is not None:
            arrays[f"{prefix}.offsets"] = self.offsets
        return arrays

    @classmethod
    def from_arrays(cls, prefix: str, arrays: Mapping[str, Any]) -> Reference:
        """Inverse of `to_arrays`."""
        counts = np.asarray(arrays[f"{prefix}.counts"])
        parts = np.split(np.asarray(arrays[f"{prefix}.scores"]), np.cumsum(counts.ravel())[:-1])
        width = counts.shape[1]
        return cls(
            levels=np.asarray(arrays[f"{prefix}.levels"]),
            scores=tuple(tuple(parts[i * width : (i + 1) * width]) for i in range(len(counts))),
            offsets=np.asarray(arrays[f"{prefix}.offsets"]) if f"{prefix}.offsets" in arrays else None,
            n_classes=int(arrays[f"{prefix}.n_classes"]),
        )


@dataclass(frozen=True)
class PartsShape:
    """A normal distribution of the parts of the negative ELBO, per class: center (K, P), precision (K, P, P).

    Reconstruction, its spread over the cells, KL and the size of the posterior mean each say something of
    their own; their sum hides an image that is too simple, and one that is surprising in a few cells and
    plain in the others. After Zhang, Lehmann and Zhao (2024), who fit a density to such parts.
    """

    center: FloatArray
    precision: FloatArray

    def distance(self, parts: FloatArray, classes: IntArray) -> FloatArray:
        """Half the squared Mahalanobis distance of the parts (N, P) from those of normals, (N,), nats."""
        away = parts - self.center[classes]
        squared: FloatArray = np.einsum("np,npq,nq->n", away, self.precision[classes], away)
        return 0.5 * squared


def fit_parts(parts: FloatArray, classes: IntArray, n_classes: int) -> PartsShape:
    """Fit a normal distribution to the parts (N, P) of every class; small classes share one spread."""
    n_parts = parts.shape[1]
    everyone = _mean_and_covariance(parts)
    centers, precisions = [], []
    for k in range(n_classes):
        own = parts[classes == k]
        center, covariance = _mean_and_covariance(own) if len(own) > LEAST_ROWS_OF_PARTS else everyone
        centers.append(center)
        precisions.append(np.linalg.inv(covariance + 1e-6 * np.diag(np.diag(covariance)) + 1e-9 * np.eye(n_parts)))
    return PartsShape(np.stack(centers), np.stack(precisions))


def _mean_and_covariance(parts: FloatArray) -> tuple[FloatArray, FloatArray]:
    return parts.mean(axis=0), np.atleast_2d(np.cov(parts, rowvar=False))


@dataclass(frozen=True)
class Calibration:
    """Reference scores of each kind of score, and the rule that makes thresholds of them.

    ``typical_nats`` (G, D) is what each column costs a normal row of each group on average.

    ``tolerance`` (relative and absolute) is the rounding of the engine: a row must exceed a threshold by
    more than that, so that a verdict never depends on the batch in which a row came.
    """

    references: Mapping[str, Reference]
    group_names: tuple[str, ...]
    false_alarm_rate: float
    contamination: float | None
    rows: str
    set_at: str
    tolerance: float
    typical_nats: FloatArray
    set_by: str = ""
    parts: PartsShape | None = None

    def thresholds(self, kind: str, groups: IntArray, observed: BoolArray) -> FloatArray:
        """Threshold of each row's score of this kind, (N,)."""
        if self.contamination is not None:
            thresholds = self.references[kind].quantile_thresholds(self.contamination)[groups]
        else:
            thresholds = self.references[kind].thresholds(groups, observed, self.false_alarm_rate)
        return thresholds + self.tolerance * (1.0 + np.abs(thresholds))

    def p_values(self, kind: str, scores: FloatArray, groups: IntArray, observed: BoolArray) -> FloatArray:
        """Conformal p-value of each row's score of this kind, (N,)."""
        finite = np.nan_to_num(scores, posinf=1e300)
        lowered = finite - self.tolerance * (1.0 + np.abs(finite))
        return self.references[kind].p_values(lowered, groups, observed, self.false_alarm_rate)

    def pooled_threshold(self, kind: str) -> float:
        """One threshold for all classes: the class's own where there is one, else that of the pooled raw scores."""
        reference = self.references[kind]
        if reference.n_classes == 1:
            complete = np.ones((1, _width(reference)), dtype=np.bool_)
            return float(self.thresholds(kind, np.zeros(1, dtype=np.int64), complete)[0])
        raw = np.sort(np.concatenate([self._raw(reference, g) for g in range(reference.n_classes)]))
        if self.contamination is not None:
            threshold = -float(np.percentile(-raw, 100.0 * self.contamination))
        else:
            threshold = conformal_threshold(raw, self.false_alarm_rate)
        return threshold + self.tolerance * (1.0 + abs(threshold))

    @staticmethod
    def _raw(reference: Reference, group: int) -> FloatArray:
        offset = 0.0 if reference.offsets is None else reference.offsets[group].sum()
        return reference.scores[0][group] + offset

    def table(self, kind: str) -> pd.DataFrame:
        """One row per group: threshold of a complete row, calibration rows, guarantee, rule and time."""
        reference = self.references[kind]
        groups = np.arange(len(self.group_names))
        complete = np.ones((len(groups), _width(reference)), dtype=np.bool_)
        return pd.DataFrame(
            {
                "threshold": self.thresholds(kind, groups, complete),
                "guarantee": [self._guarantee(reference, int(group)) for group in groups],
                "calibration_rows": [len(own) for own in reference.scores[0]],
                "rule": self._rule(kind),
                "set_at": self.set_at,
                "set_by": self.set_by,
            },
            index=pd.Index(self.group_names, name="class"),
        )

    def _guarantee(self, reference: Reference, group: int) -> Guarantee:
        if self.contamination is not None or self.rows != HELD_OUT:
            return "none"
        return reference.guarantee(group, self.false_alarm_rate)

    def _rule(self, kind: str) -> str:
        if self.contamination is not None:
            return f"{kind}: contamination {self.contamination:g} of the rows of fit"
        return f"{kind}: false-alarm rate {self.false_alarm_rate:g} on rows {self.rows}"


def _width(reference: Reference) -> int:
    return 1 if reference.offsets is None else reference.offsets.shape[1]


def location_and_scale(own: FloatArray, typical: tuple[float, float]) -> tuple[float, float]:
    """Median, and 0.9 quantile less median; a class of few rows borrows part of its scale.

    With n < 30 rows the scale is the geometric mean of the class's own and the ``typical`` one, weighted
    n : 10; a class without rows has the typical location too.
    """
    if not len(own):
        return typical
    middle, high = np.quantile(own, [0.5, 0.9])
    scale = max(float(high - middle), LEAST_SCALE)
    if len(own) < ROWS_FOR_OWN_SCALE:
        weight = len(own) / (len(own) + 10.0)
        scale = math.exp(weight * math.log(scale) + (1.0 - weight) * math.log(typical[1]))
    return float(middle), scale


def _typical_scale(groups: Sequence[FloatArray]) -> tuple[float, float]:
    quantiles = [np.quantile(own, [0.5, 0.9]) for own in groups if len(own)]
    locations = [float(middle) for middle, _ in quantiles]
    spreads = [
        float(high - middle)
        for (middle, high), own in zip(quantiles, filter(len, groups), strict=True)
        if len(own) >= 5
    ]
    if not spreads:
        spreads = [float(np.subtract(*np.quantile(np.concatenate(list(groups)), [0.9, 0.5])))]
    return float(np.median(locations)), max(float(np.median(spreads)), LEAST_SCALE)


def _round_down(n_rows: int) -> int:
    """The next lower of 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, …: pools are made for few sizes only."""
    if n_rows < 4:
        return n_rows
    power = 1 << (n_rows.bit_length() - 1)
    return power + power // 2 if n_rows >= power + power // 2 else power


def _standardise_by_others(
    own: FloatArray, n_rows: int, typical: tuple[float, float], rng: np.random.Generator
) -> FloatArray:
    """Each score, on the scale of ``n_rows`` others of its class (all others, if there are no more)."""
    if len(own) > MAX_POOLED_ROWS:
        own = np.sort(rng.choice(own, MAX_POOLED_ROWS, replace=False))
    n_others = min(n_rows, len(own) - 1)
    if n_others <= 0:
        return (own - typical[0]) / typical[1]
    standard = np.empty(len(own))
    for i in range(len(own)):
        others = rng.choice(len(own) - 1, n_others, replace=False)
        location, scale = location_and_scale(own[others + (others >= i)], typical)
        standard[i] = (own[i] - location) / scale
    return standard


def _cells(levels: IntArray, groups: IntArray) -> list[tuple[int, int, IntArray]]:
    """The rows of every (level, group) that occurs."""
    if not len(levels):
        return []
    n_groups = int(groups.max()) + 1
    both = levels * n_groups + groups
    counts = np.bincount(both)
    order = np.argsort(both.astype(np.min_scalar_type(len(counts))), kind="stable")
    parts = np.split(order, np.cumsum(counts)[:-1])
    return [(pair // n_groups, pair % n_groups, rows) for pair, rows in enumerate(parts) if len(rows)]
