"""What a run holds: parameters, curves over epochs, thresholds, ROC and PR, pictures and the model."""

from __future__ import annotations

import json
import platform
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from anomaly_cvae import metrics, plots
from anomaly_cvae.detector import CVAEDetector
from anomaly_cvae.frames import BoolArray, FloatArray
from anomaly_cvae.tracking.store import metric_name, mlflow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODEL_CODE = Path(__file__).with_name("model_code.py")
MAX_CLASSES_IN_SUMMARY = 30
REQUIREMENTS = ("torch", "numpy", "scipy", "pandas", "scikit-learn", "safetensors")


@dataclass(frozen=True)
class Evaluation:
    """Labelled rows with their scores: what ROC, PR and false-alarm rates are computed from.

    ``scores`` (N,) are higher for anomalies; ``classes`` (N,) names the class of each row.
    """

    is_anomaly: BoolArray
    scores: FloatArray
    flagged: BoolArray
    classes: npt.NDArray[Any]
    figures: Mapping[str, Figure] = field(default_factory=dict)

    @property
    def ranking(self) -> pd.DataFrame:
        """AUROC and average precision, overall, macro and per class."""
        return metrics.ranking_table(self.is_anomaly, self.scores, self.classes)

    @property
    def alarms(self) -> pd.DataFrame:
        """False-alarm rate, recall and precision of the verdicts, overall and per class."""
        return metrics.alarm_table(self.is_anomaly, self.flagged, self.classes)


def log_detector(
    detector: CVAEDetector,
    evaluation: Evaluation | None = None,
    *,
    input_example: pd.DataFrame,
    tags: Mapping[str, str] | None = None,
) -> str:
    """Log a fitted detector into the active run; returns the model's URI, ``runs:/…`` or ``models:/…``."""
    client = mlflow()
    client.set_tags({"library": f"anomaly_cvae {version('anomaly_cvae')}", "python": platform.python_version()})
    client.set_tags({"device": str(detector.model_.engine.device), **(tags or {})})
    client.log_params({name: _short(value) for name, value in detector.get_params(deep=False).items()})
    _log_history(detector)
    _log_thresholds(detector)
    if evaluation is not None:
        _log_evaluation(detector, evaluation)
    client.set_tag("mlflow.note.content", summary(detector, evaluation))
    return _log_model(detector, input_example)


def summary(detector: CVAEDetector, evaluation: Evaluation | None) -> str:
    """The run's description in Markdown: what was trained, how it ranks, who is flagged and by which thresholds."""
    schema, history, thresholds = detector.schema_, detector.history_, detector.thresholds_
    conditions = ", ".join(str(c.name) for c in schema.conditions) or "none"
    lines = [
        f"**{len(schema.columns)} columns**, condition: **{conditions}** ({len(schema.classes)} classes, "
        f"{detector.conditioning}); score: **{detector.score_kind}**. Trained {int(history['step'].iloc[-1]):,} steps "
        f"in {history['seconds'].iloc[-1]:.1f} s (ended by {history.attrs.get('stopped_by', 'unknown')}); held-out "
        f"negative ELBO {history['validation_negative_elbo'].min():.2f} nats.",
        "",
    ]
    if evaluation is not None:
        ranking, alarms = evaluation.ranking.loc[metrics.OVERALL], evaluation.alarms.loc[metrics.OVERALL]
        lines += [
            f"On {ranking['rows']:,.0f} labelled rows, {ranking['anomalies']:,.0f} of them anomalies: "
            f"**AUROC {ranking['roc_auc']:.4f}**, **average precision {ranking['average_precision']:.4f}**; flagged "
            f"{alarms['recall']:.1%} of the anomalies and {alarms['false_alarm_rate']:.1%} of the normals.",
            "",
        ]
    lines += ["| class | threshold | calibration rows | guarantee |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {row.threshold:.2f} | {row.calibration_rows} | {row.guarantee} |"
        for name, row in list(thresholds.iterrows())[:MAX_CLASSES_IN_SUMMARY]
    ]
    if len(thresholds) > MAX_CLASSES_IN_SUMMARY:
        lines.append(f"| … {len(thresholds) - MAX_CLASSES_IN_SUMMARY} more in tables/thresholds.json | | | |")
    lines += ["", f"Thresholds set {thresholds['set_at'].iloc[0]} by: {thresholds['rule'].iloc[0]}."]
    return "\n".join(lines)


def _short(value: Any) -> str:
    return str(value)[:500]


def _log_history(detector: CVAEDetector) -> None:
    """One point per epoch, all in one request: logging step by step makes training slow."""
    client = mlflow()
    from mlflow.entities import Metric

    history = detector.history_
    stamp = int(pd.Timestamp.now("UTC").timestamp() * 1000)
    names = {"train_negative_elbo": "train/negative_elbo", "validation_negative_elbo": "validation/negative_elbo"}
    points = [
        Metric(name, float(value), stamp, int(step))
        for column, name in names.items()
        for step, value in zip(history["step"], history[column], strict=True)
        if np.isfinite(value)
    ]
    client.MlflowClient().log_batch(client.active_run().info.run_id, metrics=points)
    client.log_metric("fit_seconds", float(history["seconds"].iloc[-1]))
    client.set_tag("stopped_by", history.attrs.get("stopped_by", "unknown"))
    client.log_figure(plots.training_curves(history), "plots/training.png")


def _log_thresholds(detector: CVAEDetector) -> None:
    client = mlflow()
    thresholds = detector.thresholds_
    client.log_metrics({metric_name("threshold", str(name)): float(t) for name, t in thresholds["threshold"].items()})
    client.log_table(thresholds.reset_index(), "tables/thresholds.json")
    client.log_table(detector.schema_.report().reset_index().astype(str), "tables/columns.json")


def _log_evaluation(detector: CVAEDetector, evaluation: Evaluation) -> None:
    client = mlflow()
    ranking, alarms = evaluation.ranking, evaluation.alarms
    logged: dict[str, float] = {}
    for table, columns in ((ranking, ("roc_auc", "average_precision")), (alarms, ("false_alarm_rate", "recall"))):
        for column in columns:
            for name, value in table[column].items():
                label = None if name == metrics.OVERALL else str(name)
                logged[metric_name(column, label)] = float(value)
    client.log_metrics({name: value for name, value in logged.items() if np.isfinite(value)})
    client.log_table(ranking.reset_index(), "tables/ranking.json")
    client.log_table(alarms.reset_index(), "tables/alarms.json")
    curve = metrics.curves(evaluation.is_anomaly, evaluation.scores)
    client.log_text(json.dumps({name: _finite(v) for name, v in asdict(curve).items()}), "tables/curves.json")
    area = (float(ranking["roc_auc"].iloc[0]), float(ranking["average_precision"].iloc[0]))
    client.log_figure(plots.roc_and_pr({"overall": curve}, {"overall": area}), "plots/roc_and_pr.png")
    thresholds = detector.thresholds_["threshold"]
    classes = evaluation.classes if len(thresholds) > 1 else np.full(len(evaluation.scores), thresholds.index[0])
    histograms = plots.score_histograms(evaluation.scores, evaluation.is_anomaly, classes, thresholds)
    client.log_figure(histograms, "plots/scores_and_thresholds.png")
    for name, figure in evaluation.figures.items():
        client.log_figure(figure, f"plots/{name}.png")


def _finite(values: FloatArray) -> list[float | None]:
    """Lists for JSON, which has no infinity (the first point of a ROC curve has an infinite threshold)."""
    return [float(v) if np.isfinite(v) else None for v in values]


def _log_model(detector: CVAEDetector, input_example: pd.DataFrame) -> str:
    client = mlflow()
    with tempfile.TemporaryDirectory() as folder:
        saved = detector.save(Path(folder) / "bundle")
        with warnings.catch_warnings():
            # Whole-number columns are whole numbers here; MLflow would rather have them declared as floats.
            warnings.filterwarnings("ignore", message="Hint: Inferred schema contains integer", category=UserWarning)
            signature = client.models.infer_signature(input_example, detector.score_table(input_example))
        info = client.pyfunc.log_model(
            name="model",
            python_model=str(MODEL_CODE),
            artifacts={"bundle": str(saved)},
            signature=signature,
            input_example=input_example.head(3),
            code_paths=[str(Path(__file__).parents[1])],
            pip_requirements=[f"{package}=={version(package).split('+')[0]}" for package in REQUIREMENTS],
        )
    return str(info.model_uri)
