"""A trained bank with everything needed to score: encoder, engine, class frequencies, calibration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, cast

import numpy as np
from scipy.special import logsumexp

from anomaly_cvae.calibration import (
    MARGINAL,
    Calibration,
    PartsShape,
    Reference,
    fit_parts,
    hide_cells,
    missing_levels,
)
from anomaly_cvae.encoding import Encoded, Encoder
from anomaly_cvae.errors import ConditionError, DataError, ParameterError
from anomaly_cvae.frames import BoolArray, FloatArray, IntArray
from anomaly_cvae.schema import Schema
from anomaly_cvae.scoring import ScoringEngine

ScoreKind = Literal["elbo", "contrast", "both", "parts"]
MAX_CALIBRATION_ROWS_WITH_HIDDEN_CELLS = 1_000
"""Per class and level; the level of complete rows uses every calibration row."""
MAX_CALIBRATION_IMAGES_WITH_HIDDEN_PIXELS = 200
"""The same of images, which cost more and have more cells to vary by."""
MAX_CLAIMS = 100_000
"""Calibration rows times classes up to which all complete rows get the score of every class; of more, some do: a
hundred classes are not to cost a hundred times one. Every row has its own class's score."""
MAX_CLAIMS_WITH_HIDDEN_CELLS = 10_000
"""The same per level of rows with hidden cells."""
LEAST_CLAIMED = {False: 10, True: 2}
"""Rows per class, complete and with hidden cells, that get the score of every class if the class has them."""
LEAST_FAIR = {False: 200, True: 100}
"""Rows, complete and with hidden cells, that stand for those of unknown class."""


@dataclass(frozen=True)
class Scored:
    """Rows and one score of each."""

    rows: Encoded
    scores: FloatArray


@dataclass(frozen=True)
class FittedModel:
    """Scores encoded rows, of known and unknown class.

    ``class_frequency`` (K,) is the share of each class in training, p(c). A row's *group* is its class,
    or K where the class is unknown and the score is the marginal one.
    """

    encoder: Encoder
    engine: ScoringEngine
    class_frequency: FloatArray
    calibration: Calibration | None = None

    @property
    def n_classes(self) -> int:
        """K."""
        return self.engine.n_classes

    @property
    def has_unknown_group(self) -> bool:
        """Whether a row's class can be missing or unknown."""
        return bool(self.encoder.schema.categorical_conditions)

    @property
    def has_contrast(self) -> bool:
        """Whether another class could have been claimed: several classes and no continuous condition."""
        return can_contrast(self.encoder.schema)

    def groups(self, encoded: Encoded) -> IntArray:
        """Class of each row, K for rows whose class is missing or unknown."""
        known = (encoded.class_index >= 0) & (encoded.class_index < self.n_classes)
        return np.where(known, encoded.class_index, self.n_classes)

    def scores(self, encoded: Encoded, kind: ScoreKind) -> FloatArray:
        """Scores (N,), higher = more anomalous: nats for ``elbo`` and ``contrast``.

        Raises
        ------
        ConditionError
            If the contrast is asked for where no other class could have been claimed.
        """
        return self.scores_of_kinds(encoded, {kind})[kind]

    def scores_of_kinds(self, encoded: Encoded, kinds: set[ScoreKind]) -> dict[ScoreKind, FloatArray]:
        """Several kinds of scores in one pass over the classes."""
        scores: dict[ScoreKind, FloatArray] = {}
        if "parts" in kinds:
            scores["parts"] = self._parts_scores(encoded)
            kinds = kinds - {"parts"}
        if kinds <= {"elbo"}:
            return scores | ({"elbo": self._negative_elbo(encoded)} if kinds else {})
        require_contrast(self.encoder.schema)
        by_class = self.engine.class_negative_elbo(encoded)
        groups = self.groups(encoded)
        scores["elbo"], scores["contrast"] = self._own(by_class, groups), self._contrast(by_class, groups)
        if "both" in kinds:
            scores["both"] = self._larger(scores["elbo"], scores["contrast"], groups, encoded.observed)
        return scores

    def class_probabilities(self, encoded: Encoded, n_samples: int | None = None) -> FloatArray:
        """p(c | x), (N, K), from p(c) and the class-wise negative ELBO, or IWAE bounds of ``n_samples``."""
        nats = (
            self.engine.class_negative_elbo(encoded)
            if n_samples is None
            else self.engine.class_negative_log_likelihood(encoded, n_samples)
        )
        joint = np.log(self.class_frequency) - nats
        probabilities: FloatArray = np.exp(joint - logsumexp(joint, axis=1, keepdims=True))
        return probabilities

    def calibrate(
        self,
        encoded: Encoded,
        *,
        false_alarm_rate: float,
        contamination: float | None,
        rows: str,
        set_at: str,
        set_by: str,
        rng: np.random.Generator,
        with_parts: bool = False,
    ) -> FittedModel:
        """The same model with reference scores from ``encoded`` normals, those of the parts if asked for."""
        names = self.encoder.schema.class_names + ([MARGINAL] if self.has_unknown_group else [])
        typical = self._mean_nats(self.engine.column_scores(encoded).columns, encoded)
        references = self._references(encoded, typical, rng, with_levels=contamination is None)
        shape = None
        if with_parts:
            whole = encoded.take(np.flatnonzero(encoded.observed.all(axis=1)))
            if not len(whole):
                raise DataError("score_kind='parts' is set by complete rows, and no calibration row is complete")
            shape = fit_parts(self.engine.elbo_parts(whole), whole.class_index, self.n_classes)
            references["parts"] = self._parts_reference(whole, shape)
        calibration = Calibration(
            references=references,
            group_names=tuple(names),
            false_alarm_rate=false_alarm_rate,
            contamination=contamination,
            rows=rows,
            set_at=set_at,
            tolerance=self.engine.tolerance_on(encoded),
            typical_nats=typical,
            set_by=set_by,
            parts=shape,
        )
        return replace(self, calibration=calibration)

    def _parts_scores(self, encoded: Encoded) -> FloatArray:
        """How unusual the parts of the negative ELBO are together, (N,); of unknown class: under the best one."""
        if self.calibration is None or self.calibration.parts is None:
            raise ParameterError(
                "this model has no calibration of the parts of its negative ELBO: fit or recalibrate it with "
                "score_kind='parts'"
            )
        partly = np.flatnonzero(~encoded.observed.all(axis=1))
        if partly.size:
            raise DataError(
                f"row {partly[0]} misses cells or pixels ({partly.size} row(s) in all): score_kind='parts' compares "
                "whole rows; impute them first, or score by 'elbo'"
            )
        groups = self.groups(encoded)
        unknown = np.flatnonzero(groups == self.n_classes)
        shape = self.calibration.parts
        scores = shape.distance(self.engine.elbo_parts(encoded), np.minimum(groups, self.n_classes - 1))
        if unknown.size:
            scores[unknown] = self._least_parts_score(encoded.take(unknown), shape)
        return scores

    def _least_parts_score(self, rows: Encoded, shape: PartsShape) -> FloatArray:
        """Under the class that suits each row best, (N,)."""
        claims = [np.full(len(rows), k, dtype=np.int64) for k in range(self.n_classes)]
        by_class = [shape.distance(self.engine.elbo_parts(rows.of_class(own)), own) for own in claims]
        least: FloatArray = np.min(by_class, axis=0)
        return least

    def _parts_reference(self, encoded: Encoded, shape: PartsShape) -> Reference:
        own = Scored(encoded, shape.distance(self.engine.elbo_parts(encoded), encoded.class_index))
        least = Scored(encoded, self._least_parts_score(encoded, shape)) if self.has_unknown_group else own
        return self._reference(np.zeros(1, dtype=np.int64), [{False: own, True: least}], None)

    def _negative_elbo(self, encoded: Encoded) -> FloatArray:
        scores = self.engine.negative_elbo(encoded)
        unknown = np.flatnonzero(self.groups(encoded) == self.n_classes)
        if unknown.size:
            scores[unknown] = self._marginal(self.engine.class_negative_elbo(encoded.take(unknown)))
        return scores

    def _marginal(self, by_class: FloatArray) -> FloatArray:
        """-log sum_c p(c) exp(-negative ELBO(x, c)), (N,)."""
        marginal: FloatArray = -logsumexp(np.log(self.class_frequency) - by_class, axis=1)
        return marginal

    def _own(self, by_class: FloatArray, groups: IntArray) -> FloatArray:
        return np.column_stack([by_class, self._marginal(by_class)])[np.arange(len(groups)), groups]

    def _contrast(self, by_class: FloatArray, groups: IntArray) -> FloatArray:
        """Own less marginal; 0 for a row of unknown class, which has no claim to contrast."""
        return self._own(by_class, groups) - self._marginal(by_class)

    def _larger(
        self,
        elbo: FloatArray,
        contrast: FloatArray,
        groups: IntArray,
        observed: BoolArray,
        references: dict[str, Reference] | None = None,
    ) -> FloatArray:
        known = references or (self.calibration.references if self.calibration else {})
        return np.maximum(
            known["elbo"].tail_calibrated(elbo, groups, observed),
            known["contrast"].tail_calibrated(contrast, groups, observed),
        )

    def _references(
        self, encoded: Encoded, typical: FloatArray, rng: np.random.Generator, with_levels: bool
    ) -> dict[str, Reference]:
        offsets = typical if with_levels else None
        few = bool(self.encoder.schema.images)
        levels = missing_levels(encoded.values.shape[1], few=few) if with_levels else np.zeros(1, dtype=np.int64)
        hidden = [self._with_missing(encoded, int(level), rng) for level in levels]
        raw = [self._raw_scores(rows, level > 0, rng) for level, rows in zip(levels, hidden, strict=True)]
        kinds = ["elbo", "contrast"] if self.has_contrast else ["elbo"]
        references = {
            kind: self._reference(levels, [scores[kind] for scores in raw], offsets if kind == "elbo" else None)
            for kind in kinds
        }
        if self.has_contrast:
            both = [
                {marginal: self._both(scores, marginal, references) for marginal in (False, True)} for scores in raw
            ]
            references["both"] = self._reference(levels, both, None)
        return references

    def _both(self, scores: dict[str, dict[bool, Scored]], marginal: bool, references: dict[str, Reference]) -> Scored:
        """The larger of the two, of the rows that have the score of every class."""
        rows, contrast = scores["contrast"][marginal].rows, scores["contrast"][marginal].scores
        elbo = scores["claimed"][marginal].scores
        return Scored(rows, self._larger(elbo, contrast, self._group_of(rows, marginal), rows.observed, references))

    def _group_of(self, rows: Encoded, marginal: bool) -> IntArray:
        return np.full(len(rows), self.n_classes, dtype=np.int64) if marginal else rows.class_index

    def _with_missing(self, encoded: Encoded, n_missing: int, rng: np.random.Generator) -> Encoded:
        if n_missing == 0:
            return encoded
        shuffled = rng.permutation(len(encoded))
        images = bool(self.encoder.schema.images)
        at_most = MAX_CALIBRATION_IMAGES_WITH_HIDDEN_PIXELS if images else MAX_CALIBRATION_ROWS_WITH_HIDDEN_CELLS
        chosen = [shuffled[encoded.class_index[shuffled] == k][:at_most] for k in range(self.n_classes)]
        rows = encoded.take(np.concatenate(chosen))
        return rows.hide(hide_cells(rows.observed, n_missing, rng))

    def _raw_scores(self, rows: Encoded, hidden: bool, rng: np.random.Generator) -> dict[str, dict[bool, Scored]]:
        """Each kind's scores under the rows' own class (False) and as if the class were unknown (True).

        "claimed" is "elbo" of those rows alone that have the score of every class.
        """
        if self.n_classes == 1:
            own = Scored(rows, self.engine.negative_elbo(rows))
            return {"elbo": {False: own, True: own}}
        some, fair = self._claimed(rows, hidden, rng)
        by_class = self.engine.class_negative_elbo(some)
        marginal = self._marginal(by_class)
        own_nats = self._own(by_class, some.class_index)
        everyone = Scored(rows, own_nats if some is rows else self.engine.negative_elbo(rows))
        unknown = some if some is rows else some.take(fair)
        of_unknown = Scored(unknown, marginal[fair])
        return {
            "elbo": {False: everyone, True: of_unknown},
            "claimed": {False: Scored(some, own_nats), True: of_unknown},
            "contrast": {False: Scored(some, own_nats - marginal), True: Scored(unknown, np.zeros(len(fair)))},
        }

    def _claimed(self, rows: Encoded, hidden: bool, rng: np.random.Generator) -> tuple[Encoded, IntArray]:
        """The rows that get the score of every class, and which of them stand for rows of unknown class.

        Those are drawn alike from all rows, so that classes are as frequent as they are; the others see to it that
        every class has some.
        """
        at_most = (MAX_CLAIMS_WITH_HIDDEN_CELLS if hidden else MAX_CLAIMS) // self.n_classes
        if len(rows) <= at_most:
            return rows, np.arange(len(rows))
        per_class = max(LEAST_CLAIMED[hidden], at_most // (2 * self.n_classes))
        shuffled = rng.permutation(len(rows))
        # Place of each row among those of its class, in the shuffled order.
        order = np.argsort(rows.class_index[shuffled], kind="stable")
        counts = np.bincount(rows.class_index, minlength=self.n_classes)
        place = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        fair = shuffled[: max(at_most // 2, LEAST_FAIR[hidden])]
        some = np.union1d(fair, shuffled[order[place < per_class]])
        return rows.take(some), np.flatnonzero(np.isin(some, fair))

    def _reference(self, levels: IntArray, scores: list[dict[bool, Scored]], offsets: FloatArray | None) -> Reference:
        blank = Reference(levels, ((),) * len(levels), offsets, self.n_classes)
        return replace(blank, scores=tuple(tuple(self._sorted_by_group(blank, of_level)) for of_level in scores))

    def _sorted_by_group(self, blank: Reference, by_marginal: dict[bool, Scored]) -> list[FloatArray]:
        rows = by_marginal[False].rows
        own = by_marginal[False].scores - blank.offset(rows.class_index, rows.observed)
        groups = [np.sort(own[rows.class_index == k]) for k in range(self.n_classes)]
        if self.has_unknown_group:
            rows = by_marginal[True].rows
            unknown = np.full(len(rows), self.n_classes, dtype=np.int64)
            groups.append(np.sort(by_marginal[True].scores - blank.offset(unknown, rows.observed)))
        return groups

    def _mean_nats(self, columns: FloatArray, encoded: Encoded) -> FloatArray:
        """Mean nats of each column over the rows that have it, per group: (G, D)."""
        everyone = _mean_of_observed(columns, encoded.observed)
        per_class = []
        for k in range(self.n_classes):
            own = encoded.class_index == k
            mean = _mean_of_observed(columns[own], encoded.observed[own])
            per_class.append(np.where(np.isnan(mean), everyone, mean))
        groups = [*per_class, everyone] if self.has_unknown_group else per_class
        means: FloatArray = np.nan_to_num(np.stack(groups))
        return means


def can_contrast(schema: Schema) -> bool:
    """Whether another class could have been claimed: several classes and no continuous condition."""
    return len(schema.classes) > 1 and not schema.continuous_conditions


def require_contrast(schema: Schema) -> None:
    """Raise unless a contrast exists.

    Raises
    ------
    ConditionError
        Saying what it needs.
    """
    if not can_contrast(schema):
        raise ConditionError(
            "the contrast asks whether another class explains a row better: it needs a categorical "
            "condition with at least two classes, and no continuous condition"
        )


def _mean_of_observed(columns: FloatArray, observed: BoolArray) -> FloatArray:
    count = observed.sum(axis=0)
    total = np.where(observed, columns, 0.0).sum(axis=0)
    return cast(FloatArray, np.where(count > 0, total / np.maximum(count, 1), np.nan))
