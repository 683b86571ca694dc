"""How well scores rank anomalies above normals, and how often verdicts are wrong; overall and per class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import betabinom
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from anomaly_cvae.frames import BoolArray, FloatArray, IntArray

OVERALL = "overall"
MACRO = "macro"
SEEN = "classes seen in training"
CLASS = " (class)"


@dataclass(frozen=True)
class Curves:
    """ROC and precision-recall points of one ranking; thresholds are scores."""

    false_positive_rate: FloatArray
    true_positive_rate: FloatArray
    roc_threshold: FloatArray
    recall: FloatArray
    precision: FloatArray
    pr_threshold: FloatArray

    def thinned(self, most: int) -> Curves:
        """About ``most`` points of each curve, evenly spaced, both ends among them."""

        def some(length: int) -> IntArray:
            return np.unique(np.linspace(0, length - 1, min(most, length)).round().astype(np.int64))

        roc, pr = some(len(self.roc_threshold)), some(len(self.recall))
        return Curves(
            self.false_positive_rate[roc],
            self.true_positive_rate[roc],
            self.roc_threshold[roc],
            self.recall[pr],
            self.precision[pr],
            self.pr_threshold[pr[:-1]],
        )


@dataclass(frozen=True)
class Evaluation:
    """Labelled rows with their scores and verdicts: what ROC, PR and false-alarm rates are computed from.

    ``scores`` (N,) are higher for anomalies; ``classes`` (N,) names the class of each row; ``seen`` (N,)
    says which of these classes training knew, None: all of them.
    """

    is_anomaly: BoolArray
    scores: FloatArray
    flagged: BoolArray
    classes: npt.NDArray[Any]
    seen: BoolArray | None = None

    @property
    def has_both(self) -> bool:
        """Whether there are normals and anomalies: without both, nothing can be ranked."""
        return bool(self.is_anomaly.any() and not self.is_anomaly.all())

    @property
    def ranking(self) -> pd.DataFrame:
        """AUROC and average precision, overall, macro and per class; of seen classes, too, where not all are."""
        table = ranking_table(self.is_anomaly, self.scores, self.classes)
        if self.seen is None or self.seen.all() or not self.seen.any():
            return table
        own = pd.DataFrame([_ranking(self.is_anomaly[self.seen], self.scores[self.seen])], index=[SEEN])
        return pd.concat([table.iloc[:1], own, table.iloc[1:]]).rename_axis("class")

    @property
    def alarms(self) -> pd.DataFrame:
        """False-alarm rate, recall and precision of the verdicts, overall and per class."""
        return alarm_table(self.is_anomaly, self.flagged, self.classes)


def roc_auc(is_anomaly: BoolArray, scores: FloatArray) -> float:
    """Area under the ROC curve; NaN unless both kinds of row are there."""
    if is_anomaly.all() or not is_anomaly.any():
        return float("nan")
    return float(roc_auc_score(is_anomaly, scores))


def average_precision(is_anomaly: BoolArray, scores: FloatArray) -> float:
    """Area under the precision-recall curve (step-wise); NaN unless both kinds of row are there."""
    if is_anomaly.all() or not is_anomaly.any():
        return float("nan")
    return float(average_precision_score(is_anomaly, scores))


def curves(is_anomaly: BoolArray, scores: FloatArray) -> Curves:
    """ROC and precision-recall curves of scores (N,), higher = more anomalous."""
    false_positive, true_positive, roc_threshold = roc_curve(is_anomaly, scores)
    precision, recall, pr_threshold = precision_recall_curve(is_anomaly, scores)
    return Curves(false_positive, true_positive, roc_threshold, recall, precision, pr_threshold)


def ranking_table(is_anomaly: BoolArray, scores: FloatArray, classes: npt.NDArray[Any]) -> pd.DataFrame:
    """AUROC and average precision overall, as the mean over classes (macro), and per class.

    Parameters
    ----------
    is_anomaly : (N,) labels
    scores : (N,) higher = more anomalous
    classes : (N,) class of each row
    """
    lines = {OVERALL: _ranking(is_anomaly, scores)}
    per_class = {line_of(n): _ranking(is_anomaly[classes == n], scores[classes == n]) for n in _sorted(classes)}
    lines[MACRO] = {
        "rows": len(scores),
        "anomalies": int(is_anomaly.sum()),
        "roc_auc": _mean([line["roc_auc"] for line in per_class.values()]),
        "average_precision": _mean([line["average_precision"] for line in per_class.values()]),
    }
    return pd.DataFrame.from_dict({**lines, **per_class}, orient="index").rename_axis("class")


def line_of(class_name: Any) -> str:
    """The line of a class in these tables: its name, unless a line about all rows has it."""
    name = str(class_name)
    return f"{name}{CLASS}" if name in (OVERALL, MACRO, SEEN) else name


def class_of(line: str) -> str:
    """Inverse of `line_of`."""
    name = line.removesuffix(CLASS)
    return name if name in (OVERALL, MACRO, SEEN) else line


def _ranking(is_anomaly: BoolArray, scores: FloatArray) -> dict[str, float]:
    return {
        "rows": len(scores),
        "anomalies": int(is_anomaly.sum()),
        "roc_auc": roc_auc(is_anomaly, scores),
        "average_precision": average_precision(is_anomaly, scores),
    }


def alarm_table(is_anomaly: BoolArray, flagged: BoolArray, classes: npt.NDArray[Any]) -> pd.DataFrame:
    """What the verdicts got right and wrong, overall and per class.

    ``false_alarm_rate`` is the share of normals flagged, ``recall`` the share of anomalies flagged,
    ``precision`` the share of anomalies among the flagged.
    """
    lines = {OVERALL: _alarms(is_anomaly, flagged)}
    for name in _sorted(classes):
        lines[line_of(name)] = _alarms(is_anomaly[classes == name], flagged[classes == name])
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis("class")


def _alarms(is_anomaly: BoolArray, flagged: BoolArray) -> dict[str, float]:
    normal, hits = ~is_anomaly, flagged & is_anomaly
    return {
        "normals": int(normal.sum()),
        "false_alarms": int((flagged & normal).sum()),
        "false_alarm_rate": float(flagged[normal].mean()) if normal.any() else float("nan"),
        "anomalies": int(is_anomaly.sum()),
        "found": int(hits.sum()),
        "recall": float(hits.sum() / is_anomaly.sum()) if is_anomaly.any() else float("nan"),
        "precision": float(hits.sum() / flagged.sum()) if flagged.any() else float("nan"),
    }


def false_alarm_interval(
    n_calibration: int, n_normals: int, false_alarm_rate: float, confidence: float = 0.95
) -> tuple[float, float]:
    """Interval in which the realised false-alarm rate of ``n_normals`` fresh rows lies with ``confidence``.

    With the threshold at the k-th largest of n calibration scores, the number of false alarms is
    beta-binomial(n_normals, k, n + 1 - k): the calibration rows are a sample, and so are the fresh ones.
    """
    k = max(1, int(np.floor(false_alarm_rate * (n_calibration + 1) + 1e-9)))
    tail = (1.0 - confidence) / 2.0
    low, high = betabinom.ppf([tail, 1.0 - tail], n_normals, k, n_calibration + 1 - k)
    return float(low / n_normals), float(high / n_normals)


def _mean(values: list[float]) -> float:
    """Mean of the numbers among ``values``; NaN if there are none."""
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")


def _sorted(classes: npt.NDArray[Any]) -> list[Any]:
    return sorted(set(classes.tolist()), key=str)
