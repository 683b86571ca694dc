"""What a fitted detector says of rows: scores, thresholds, verdicts, p-values."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.utils.validation import check_is_fitted

from anomaly_cvae import explain
from anomaly_cvae.calibration import Calibration, select_discoveries
from anomaly_cvae.encoding import Encoded
from anomaly_cvae.errors import ParameterError
from anomaly_cvae.fitted import ScoreKind, require_contrast
from anomaly_cvae.frames import BoolArray, FloatArray, IntArray
from anomaly_cvae.inputs import check_count
from anomaly_cvae.parameters import CHOICES
from anomaly_cvae.reading import TableReader

FLAGGED = -np.finfo(np.float64).tiny
"""Largest decision of a row that policy, not its score, makes an anomaly."""
UNKNOWN_CLASS = "(unknown class)"
"""Where rows of a class not seen in training, or with a missing condition, are grouped."""


class Judge(TableReader):
    """The part of the detector that judges rows; X and ``condition`` are as everywhere."""

    score_kind: str
    unseen_class: str

    def score_samples(self, X: Any, *, condition: Any = None) -> FloatArray:
        """Minus the detector's score, (N,): higher = more normal."""
        encoded = self._encode(X, condition)
        return -self.model_.scores(encoded, self._kind())

    def negative_elbo(self, X: Any, *, condition: Any = None, given: Any = None) -> FloatArray:
        """Negative ELBO of each row, its parts weighed as ``part_weights`` says, (N,), nats: higher = more anomalous.

        ``given`` says which cells belong to the condition: the score is then that of the others given
        these, 0 if all are given. Booleans like X, or {column: booleans}; needs ``condition_on_observed``.
        """
        encoded = self._encode(X, condition, given)
        return self.model_.scores(encoded, "elbo")

    def negative_log_likelihood(
        self, X: Any, *, condition: Any = None, given: Any = None, n_samples: int = 100
    ) -> FloatArray:
        """-log p(x | c) of each row by importance sampling from q(z | x, c), (N,), nats.

        In expectation it lies between -log p(x | c) and the negative ELBO with parts that count alike, nearer to the
        first with more samples (Burda, Grosse and Salakhutdinov 2016). ``given`` as in `negative_elbo`.
        """
        check_count(n_samples, "n_samples")
        encoded = self._with_class(self._encode(X, condition, given))
        return self.model_.engine.negative_log_likelihood(encoded, n_samples)

    def contrast(self, X: Any, *, condition: Any = None) -> FloatArray:
        """Negative ELBO under the claimed class less the marginal one, (N,), nats.

        It equals log p(c) - log p(c | x): high when another class explains the row better. 0 for a row
        of unknown class.

        Raises
        ------
        ConditionError
            Without a categorical condition of at least two classes.
        """
        encoded = self._encode(X, condition)
        return self.model_.scores(encoded, "contrast")

    def decision_function(self, X: Any, *, condition: Any = None) -> FloatArray:
        """`score_samples` plus the threshold of the row's class, (N,): negative for anomalies.

        A row with missing cells has a threshold of its own: that of normals missing as many cells.
        """
        encoded = self._encode(X, condition)
        return self._decisions(encoded, self.model_.scores(encoded, self._kind()))

    def predict(self, X: Any, *, condition: Any = None) -> IntArray:
        """+1 for normal rows, -1 for anomalies, (N,)."""
        normal = self.decision_function(X, condition=condition) >= 0
        return np.where(normal, np.int64(1), np.int64(-1))

    def p_values(self, X: Any, *, condition: Any = None) -> FloatArray:
        """Conformal p-value of each row among its class's held-out normals, (N,).

        A row of a class not seen in training, under ``unseen_class="anomaly"``, has the least one.
        """
        encoded = self._encode(X, condition)
        return self._p_values(encoded, self.model_.scores(encoded, self._kind()))

    def score_table(
        self, X: Any, *, condition: Any = None, contrast: bool = False, top_column: bool = False
    ) -> pd.DataFrame:
        """Everything that a scored row carries, in one pass: one line per row of X.

        Columns: ``condition`` (class name), ``negative_elbo`` (nats), ``score``, ``threshold``, ``p_value``,
        ``is_anomaly``; on request ``contrast`` (nats), and of rows above their threshold ``top_column``, the one most
        to blame, and ``top_nats``, by how much the negative ELBO would fall if that cell were what the rest lets
        expect. Both are missing where no cell alone is to blame.
        """
        encoded = self._encode(X, condition)
        kind: ScoreKind = self._kind()
        scores = self.model_.scores_of_kinds(encoded, {"elbo", kind, *(("contrast",) if contrast else ())})
        thresholds = self._thresholds(encoded)
        decisions = self._decisions(encoded, scores[kind], thresholds)
        names = np.array([*self.schema_.class_names, None], dtype=object)
        table = pd.DataFrame(
            {
                "condition": self._class_labels(X, condition, encoded, names),
                "negative_elbo": scores["elbo"],
                "score": scores[kind],
                "threshold": thresholds,
                "p_value": self._p_values(encoded, scores[kind]),
                "is_anomaly": decisions < 0,
            },
            index=self._index(X),
        )
        if contrast:
            table["contrast"] = scores["contrast"]
        if top_column:
            # A class that training did not see is flagged as such, whatever its cells.
            above = np.flatnonzero((decisions < 0) & (scores[kind] > thresholds))
            top, gains = explain.to_blame(self.model_, encoded.take(above), 1)
            columns, nats = np.full(len(table), None, dtype=object), np.full(len(table), np.nan)
            for row, column, saved in zip(above, top[:, 0], gains[:, 0], strict=True):
                if saved > 0:
                    columns[row], nats[row] = self.schema_.names[column], saved
            table["top_column"], table["top_nats"] = columns, nats
        return table

    def select(self, X: Any, *, condition: Any = None, false_discovery_rate: float = 0.1) -> BoolArray:
        """Rows to report, (N,), so that at most this share of them is expected to be normal (Benjamini-Hochberg)."""
        if not 0.0 < false_discovery_rate < 1.0:
            raise ParameterError(f"false_discovery_rate must lie in (0, 1), not {false_discovery_rate}")
        return select_discoveries(self.p_values(X, condition=condition), false_discovery_rate)

    def calibrated_score(self, X: Any, *, condition: Any = None) -> FloatArray:
        """Negative ELBO on its class's scale of held-out normals (median 0, 0.9 quantile 1), (N,).

        Ranks rows across classes of unequal spread; higher = more anomalous.
        """
        encoded = self._encode(X, condition)
        groups = self.model_.groups(encoded)
        reference = self._calibration().references["elbo"]
        return reference.calibrated(self.model_.scores(encoded, "elbo"), groups, encoded.observed)

    @property
    def thresholds_(self) -> pd.DataFrame:
        """By class: threshold of a complete row's score, calibration rows, guarantee, rule, time."""
        return self._calibration().table(self._kind())

    @property
    def offset_(self) -> float:
        """Minus the pooled threshold; unconditional: decision_function = score_samples - offset_."""
        return -self._calibration().pooled_threshold(self._kind())

    def _kind(self) -> ScoreKind:
        if self.score_kind not in CHOICES["score_kind"]:
            raise ParameterError(f"score_kind must be one of {CHOICES['score_kind']}, not {self.score_kind!r}")
        if self.score_kind in ("contrast", "both"):
            require_contrast(self.schema_)
        if self.score_kind == "parts" and self._calibration().parts is None:
            raise ParameterError(
                "this model has no calibration of the parts of its negative ELBO: fit or recalibrate it with "
                "score_kind='parts'"
            )
        return self.score_kind  # type: ignore[return-value]  # checked above

    def _calibration(self) -> Calibration:
        check_is_fitted(self)
        assert self.model_.calibration is not None
        return self.model_.calibration

    def _thresholds(self, encoded: Encoded) -> FloatArray:
        return self._calibration().thresholds(self._kind(), self.model_.groups(encoded), encoded.observed)

    def _decisions(self, encoded: Encoded, scores: FloatArray, thresholds: FloatArray | None = None) -> FloatArray:
        decisions = (self._thresholds(encoded) if thresholds is None else thresholds) - scores
        if self.unseen_class == "anomaly":
            return np.where(self._is_unseen(encoded), np.minimum(decisions, FLAGGED), decisions)
        return decisions

    def _p_values(self, encoded: Encoded, scores: FloatArray) -> FloatArray:
        if self.unseen_class == "anomaly":
            scores = np.where(self._is_unseen(encoded), np.inf, scores)
        return self._calibration().p_values(self._kind(), scores, self.model_.groups(encoded), encoded.observed)

    def _class_labels(self, X: Any, condition: Any, encoded: Encoded, names: npt.NDArray[np.object_]) -> Any:
        """Class names of the rows; a class not seen in training is named by its own levels."""
        labels = names[self.model_.groups(encoded)]
        unseen = np.flatnonzero(self._is_unseen(encoded))
        if unseen.size:
            conditions = [c.name for c in self.schema_.categorical_conditions]
            cells = self._frame(X, condition)[conditions].iloc[unseen]
            labels[unseen] = [", ".join(map(str, levels)) for levels in cells.itertuples(index=False)]
        return labels
