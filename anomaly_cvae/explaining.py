"""What a fitted detector says of the columns: nats of each, which one is to blame, what drives the alarms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from sklearn.utils.validation import check_is_fitted

from anomaly_cvae import explain
from anomaly_cvae.errors import DataError, ParameterError
from anomaly_cvae.fitted import require_contrast
from anomaly_cvae.frames import FloatArray
from anomaly_cvae.judging import UNKNOWN_CLASS, Judge
from anomaly_cvae.schema import Name


class Explainer(Judge):
    """The part of the detector that explains scores; X and ``condition`` are as everywhere."""

    def explain(self, X: Any, *, condition: Any = None, method: str = "sum") -> pd.DataFrame:
        """Nats per column: what each adds to the negative ELBO, or what mending it alone would save.

        ``"sum"`` takes the negative ELBO apart, (N, D + 1): nats of each column and of the KL, which sum to it.
        ``"repair"``, (N, D), asks which cell is wrong: the nats by which the negative ELBO falls if the cell becomes
        what the rest of its row lets expect; an image becomes a drawn one. It has no unit, sums to nothing, and costs
        2 D passes; a missing cell has 0. It ranks a wrong cell first more often (docs/benchmarks/quality.md).

        Raises
        ------
        ParameterError
            If ``method`` is another one.
        """
        if method not in explain.METHODS:
            raise ParameterError(f"method must be one of {explain.METHODS}, not {method!r}")
        encoded = self._encode(X, condition)
        if method == "repair":
            gains = explain.repair_gains(self.model_, encoded)
            return pd.DataFrame(gains, columns=self.schema_.names, index=self._index(X))
        parts = explain.column_scores(self.model_, encoded)
        frame = pd.DataFrame(parts.columns, columns=self.schema_.names, index=self._index(X))
        frame[explain.KL] = parts.kl
        return frame

    def top_columns(self, X: Any, *, condition: Any = None, n: int = 3) -> pd.DataFrame:
        """The ``n`` columns of each row that are most to blame: value observed, value and 90 % range expected.

        Ranked by ``repair_nats``: by how much the negative ELBO would fall if this cell alone were what the rest of
        the row lets expect, ``expected`` (of an image: one drawn of what it lets expect). ``nats`` is the column's
        share of the negative ELBO. Of many columns, the eight that cost most above what they cost a normal row are
        asked (``n``, if that is more).
        """
        encoded, frame = self._encode(X, condition), self._frame(X, condition)
        n = min(n, len(self.schema_.columns))
        return explain.top_columns(self.model_, encoded, frame, n, seed=0)

    def class_negative_elbo(self, X: Any, *, condition: Any = None) -> pd.DataFrame:
        """Negative ELBO of each row under every class, (N, K), nats: the least is where it would be most normal.

        Raises
        ------
        ConditionError
            Without a categorical condition of at least two classes.
        """
        check_is_fitted(self)
        require_contrast(self.schema_)
        nats = self.model_.engine.class_negative_elbo(self._encode(X, condition))
        return pd.DataFrame(nats, columns=self.schema_.class_names, index=self._index(X))

    def alarm_columns(self, X: Any, *, condition: Any = None) -> pd.DataFrame:
        """Which columns drive the alarms among the rows of X: one line per class with alarms and column.

        ``alarms`` counts the class's flagged rows, ``top`` those in which the column is the one most to blame, as
        `top_columns` says, and ``repair_nats`` is the mean over these of what mending it would save. "(new class)"
        stands for rows flagged for their class alone, "(no cell alone)" for those that no column's mending helps.
        """
        encoded = self._encode(X, condition)
        scores, thresholds = self.model_.scores(encoded, self._kind()), self._thresholds(encoded)
        flagged = np.flatnonzero(self._decisions(encoded, scores, thresholds) < 0)
        names = np.array([*self.schema_.class_names, UNKNOWN_CLASS], dtype=object)
        alarms, above = encoded.take(flagged), (scores > thresholds)[flagged]
        return explain.alarm_columns(self.model_, alarms, names[self.model_.groups(alarms)], above)

    def explain_pixels(self, X: Any, *, condition: Any = None, column: Name | None = None) -> FloatArray:
        """Nats of every pixel of an image column, (N, …) like the images, colours added up: a heat map.

        Their sum is the column's nats in `explain`; of a row of unknown class, under its most probable one.
        ``column`` may be left out where there is one of images.

        Raises
        ------
        DataError
            If the column holds no images.
        """
        encoded = self._with_class(self._encode(X, condition))
        names = [c.name for c in self.schema_.images]
        if column is None and len(names) == 1:
            column = names[0]
        if column not in names:
            raise DataError(f"explain_pixels: {column!r} is no column of images; there are {names or 'none'}")
        return explain.pixels(self.model_, encoded, column)
