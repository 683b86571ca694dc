"""New thresholds for a saved model, from another rate or from fresh normals; nothing is trained."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from anomaly_cvae import bundle
from anomaly_cvae.errors import DataError, ParameterError, TrackingError
from anomaly_cvae.jobs.config import TableConfig
from anomaly_cvae.jobs.models import OpenModel
from anomaly_cvae.jobs.runs import child_run
from anomaly_cvae.jobs.tables import digest, model_columns, read_config_labels, read_for, with_known_label
from anomaly_cvae.labels import ANOMALY, LEFT_OUT, UNKNOWN

OF_TRAINING = "of the table that the model was trained on"
"""What thresholds from them are noted with: they promise nothing."""


@dataclass(frozen=True)
class Recalibrated:
    """Thresholds before and after, and where the model with the new ones is."""

    before: pd.DataFrame
    after: pd.DataFrame
    folder: Path
    sha256: str
    run_id: str | None = None
    model_uri: str | None = None
    version: str | None = None
    tracking_error: str = ""


def recalibrate_model(
    model: OpenModel,
    config: TableConfig | None,
    *,
    false_alarm_rate: float | None = None,
    output: str | Path | None = None,
    log: bool = True,
    register_as: str | None = None,
) -> Recalibrated:
    """Set thresholds anew and save the model, in its own folder unless ``output`` names another.

    ``config`` names a table of normals that training has not seen; rows labelled as anomalies are left
    out. Without one, the stored reference scores serve and only the rate changes.

    Raises
    ------
    ParameterError
        If there is nothing to change, or nowhere to save a model that came from MLflow.
    DataError, ConditionError
        If the rows cannot be used.
    """
    if config is None and false_alarm_rate is None:
        raise ParameterError("recalibrate needs fresh normals (DATA), a rate (--false-alarm-rate), or both")
    if output is None and not model.is_local:
        raise ParameterError(f"{model.name} is not a folder: say where to save the recalibrated model (--output)")
    bundle.check_target(output if output is not None else model.folder)
    detector, before = model.detector, model.detector.thresholds_
    normals: pd.DataFrame | None = None
    if config is None:
        detector.recalibrate(false_alarm_rate=false_alarm_rate)
    else:
        is_of_training = bundle.provenance(model.folder).get("data_sha256") == digest(config.data)
        if is_of_training:
            warnings.warn(
                "these are the rows that the model was trained on: thresholds from them promise nothing", stacklevel=2
            )
        normals = _normals(model, config)
        reader = model.reader  # another layout, perhaps, which is not to be saved
        changed = reader.recalibrate(normals, false_alarm_rate=false_alarm_rate).model_
        if changed.calibration is not None and is_of_training:
            changed = replace(changed, calibration=replace(changed.calibration, rows=OF_TRAINING))
        detector.model_ = changed
    folder = Path(output) if output is not None else model.folder
    notes = bundle.provenance(model.folder)
    detector.save(folder)
    bundle.annotate(folder, notes)
    done = Recalibrated(before, detector.thresholds_, folder, bundle.model_hash(folder))
    if not log:
        return done
    try:
        return _log(model, config, done, normals, register_as)
    except TrackingError as error:
        return replace(done, tracking_error=str(error))


def _normals(model: OpenModel, config: TableConfig) -> pd.DataFrame:
    """The rows of a table that are not labelled as anomalies; by the label of the training, unless another is named."""
    frame = read_for(model, config)
    rows = model_columns(model.reader, frame)
    known = with_known_label(config, model.folder)
    if known.label is None or (config.label is None and known.label not in frame.columns):
        return rows
    labels = read_config_labels(frame, known, strict=False)
    # Who names the label means the rows labelled normal; a label known from training only takes anomalies away.
    unwanted = [ANOMALY, LEFT_OUT] if config.label is None else [ANOMALY, LEFT_OUT, UNKNOWN]
    kept = np.flatnonzero(~np.isin(labels.status, unwanted))
    normals = rows.iloc[kept]
    if not len(normals):
        raise DataError(f"no row is labelled normal ({labels.rule})")
    warnings.warn(f"{labels.count(ANOMALY):,} rows are left out as anomalies: {labels.rule}", stacklevel=2)
    return normals


def _log(
    model: OpenModel,
    config: TableConfig | None,
    done: Recalibrated,
    normals: pd.DataFrame | None,
    register_as: str | None,
) -> Recalibrated:
    from anomaly_cvae import tracking

    source = ", ".join(config.data) if config else "the stored reference scores"
    parameters = {"model": model.name, "model_sha256_before": model.sha256, "data": source}
    with child_run(model, f"recalibrate {model.label}", "recalibrate", parameters) as run_id:
        datasets = [] if normals is None else [tracking.DataSet(normals, source, "calibration")]
        extras = tracking.Extras(datasets=datasets)
        logged = tracking.log_detector(model.detector, None, extras, saved=done.folder, register_as=register_as)
        # Runs that use the model go below the one that trained it, whoever set its thresholds.
        first = {} if bundle.provenance(done.folder).get("run_id") else {"run_id": run_id}
        bundle.annotate(done.folder, {"recalibration_run_id": run_id, **first})
    return replace(done, run_id=run_id, model_uri=logged.uri, version=logged.version)
