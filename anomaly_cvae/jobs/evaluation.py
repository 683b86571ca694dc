"""How well a model ranks and flags labelled rows."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from anomaly_cvae import bundle
from anomaly_cvae.detector import CVAEDetector
from anomaly_cvae.errors import DataError, TrackingError
from anomaly_cvae.jobs.config import TableConfig
from anomaly_cvae.jobs.explanation import Explanation, explain_rows
from anomaly_cvae.jobs.models import OpenModel
from anomaly_cvae.jobs.rows import collect
from anomaly_cvae.jobs.tables import model_columns, read_config_labels, read_for, with_known_label
from anomaly_cvae.labels import Labels
from anomaly_cvae.metrics import Evaluation

ROWS_PER_CHUNK = 1 << 15


@dataclass(frozen=True)
class Evaluated:
    """Scored labelled rows, what they say of the model, and the most surprising of them.

    ``scored`` is `CVAEDetector.score_table` of the labelled rows; ``faults`` maps pictures that could not be
    used to what is wrong with them.
    """

    evaluation: Evaluation
    scored: pd.DataFrame
    explanation: Explanation
    label_rule: str
    seconds: float
    run_id: str | None = None
    tracking_error: str = ""
    faults: dict[str, str] = field(default_factory=dict)


def score_in_chunks(detector: CVAEDetector, frame: pd.DataFrame) -> pd.DataFrame:
    """`CVAEDetector.score_table` of a long table, without its intermediate arrays all at once."""
    parts = [detector.score_table(frame.iloc[i : i + ROWS_PER_CHUNK]) for i in range(0, len(frame), ROWS_PER_CHUNK)]
    return pd.concat(parts) if parts else detector.score_table(frame)


def evaluate_rows(detector: CVAEDetector, frame: pd.DataFrame, labels: Labels) -> Evaluated:
    """Score the rows whose label is known, and compare.

    Raises
    ------
    DataError
        If no row has a label.
    """
    started = time.perf_counter()
    known = np.flatnonzero(labels.is_known)
    if not known.size:
        raise DataError(f"no row has a label to evaluate on ({labels.rule})")
    rows = model_columns(detector, frame).iloc[known]
    scored = score_in_chunks(detector, rows)
    names = set(detector.schema_.class_names)
    classes = scored["condition"].astype(object).where(scored["condition"].notna(), "(missing)").to_numpy()
    seen = np.array([name in names for name in classes], dtype=np.bool_)
    evaluation = Evaluation(
        is_anomaly=labels.is_anomaly[known],
        scores=scored["score"].to_numpy(),
        flagged=scored["is_anomaly"].to_numpy(),
        classes=np.where(seen, classes, "(unknown class)"),
        seen=seen,
    )
    explanation = explain_rows(detector, rows, scored, is_anomaly=labels.is_anomaly[known])
    return Evaluated(evaluation, scored, explanation, labels.rule, time.perf_counter() - started)


def evaluate_model(model: OpenModel, config: TableConfig, *, log: bool = True, log_rows: bool = True) -> Evaluated:
    """Evaluate on a labelled table, and log a run below the model's own.

    A tracking fault is noted in the result, not raised.

    Raises
    ------
    DataError
        If the table or its labels cannot be used.
    """
    config = with_known_label(config, model.folder)
    if config.label is None:
        raise DataError("evaluate needs to know which rows are anomalies: give the label's column (--label)")
    faults: dict[str, str] = {}
    frame = read_for(model, config, collect(faults))
    evaluated = evaluate_rows(model.reader, frame, read_config_labels(frame, config))
    evaluated = replace(evaluated, faults=faults)
    if not log:
        return evaluated
    try:
        run_id = _log(model, config, frame, evaluated, log_rows)
    except TrackingError as error:
        return replace(evaluated, tracking_error=str(error))
    return replace(evaluated, run_id=run_id)


def _log(model: OpenModel, config: TableConfig, frame: pd.DataFrame, evaluated: Evaluated, log_rows: bool) -> str:
    from anomaly_cvae import tracking
    from anomaly_cvae.jobs.runs import child_run

    source = ", ".join(config.data)
    log_rows = log_rows and bundle.provenance(model.folder).get("log_rows") != "no"
    extras = tracking.Extras(
        seconds={"evaluate": evaluated.seconds},
        datasets=[tracking.DataSet(frame, source, "evaluation", config.label)],
        surprising=evaluated.explanation.lines if log_rows else None,
        alarm_columns=evaluated.explanation.alarm_columns,
    )
    parameters = {"model": model.name, "model_sha256": model.sha256, "data": source, "label": evaluated.label_rule}
    with child_run(model, f"evaluate {model.label} on {Path(config.data[0]).name}", "evaluate", parameters) as run_id:
        tracking.log_evaluation(model.detector, evaluated.evaluation)
        tracking.log_extras(extras)
        tracking.describe("\n".join([tracking.said_of(evaluated.evaluation), "", f"Model: `{model.name}`"]))
    return run_id
