"""From a table in files to a trained, calibrated, evaluated, saved and logged model."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from anomaly_cvae import bundle
from anomaly_cvae.batch.csv_text import CsvFormat
from anomaly_cvae.batch.needs import text_columns
from anomaly_cvae.batch.pictures import FILE, FOLDER, LABEL, OnFault
from anomaly_cvae.batch.source import find_files, read_table
from anomaly_cvae.detector import CVAEDetector
from anomaly_cvae.devices import resolve_device
from anomaly_cvae.errors import ConditionError, DataError, TrackingError
from anomaly_cvae.fitting import now, who
from anomaly_cvae.frames import IntArray
from anomaly_cvae.images import holds_images
from anomaly_cvae.jobs.config import TrainConfig
from anomaly_cvae.jobs.evaluation import Evaluated, evaluate_rows, score_in_chunks
from anomaly_cvae.jobs.explanation import Explanation, explain_rows
from anomaly_cvae.jobs.rows import collect
from anomaly_cvae.jobs.tables import csv_format, digest, read_config_labels, require
from anomaly_cvae.labels import ANOMALY, LEFT_OUT, NORMAL, UNKNOWN, Labels
from anomaly_cvae.schema import Schema

MOST_ROWS_WITHOUT_LABELS = 50_000
"""Training rows that are scored to find the most surprising ones, where no label says what to evaluate."""


@dataclass(frozen=True)
class Plan:
    """A table read and split: what will be trained on what, before anything is trained.

    ``training`` and ``test`` are row numbers of ``frame`` and ``test_frame``; ``faults`` maps pictures that
    could not be used to what is wrong with them.
    """

    config: TrainConfig
    detector: CVAEDetector
    frame: pd.DataFrame
    schema: Schema
    training: IntArray
    test_frame: pd.DataFrame
    test: IntArray
    test_labels: Labels | None
    notes: list[str]
    data_sha256: str
    seconds: float
    faults: dict[str, str] = field(default_factory=dict)

    @property
    def training_rows(self) -> pd.DataFrame:
        """The rows to learn from."""
        return self.frame.iloc[self.training]

    def class_sizes(self) -> pd.Series:
        """Training rows per class."""
        index = self.schema.class_index_of(self.training_rows)
        counts = np.bincount(index, minlength=len(self.schema.classes))
        return pd.Series(counts, index=self.schema.class_names, name="rows")


@dataclass(frozen=True)
class Trained:
    """A finished training job.

    ``evaluated`` is None without labels; ``explanation`` then speaks of training rows. ``tracking_error``
    is empty unless the run could not be logged: the model is saved all the same.
    """

    plan: Plan
    detector: CVAEDetector
    folder: Path
    sha256: str
    evaluated: Evaluated | None
    explanation: Explanation
    seconds: dict[str, float] = field(default_factory=dict)
    run_id: str | None = None
    model_uri: str | None = None
    version: str | None = None
    tracking_error: str = ""


def prepare(config: TrainConfig) -> Plan:
    """Read the table, find out what its columns are, and split it.

    With a label, normals and rows without one are learned from; of the normals ``test_fraction`` is kept for
    evaluation, where all anomalies go, too. With ``test_data`` those rows are evaluated on instead. Without
    a label every row is learned from.

    Raises
    ------
    DataError, ConditionError, ParameterError
        Saying which file, column or key is wrong and what to do.
    """
    started = time.perf_counter()
    if not config.data:
        raise DataError("there is no data to train on: name a file, a folder or a pattern")
    parameters, faults = config.detector_parameters(), dict[str, str]()
    bundle.check_target(config.folder)
    resolve_device(parameters.get("device", "auto"), torch.float32)
    frame = read_table(config.data, csv_format(config), part="train", on_fault=collect(faults))
    _require_named(frame, config)
    if not len(frame):
        raise DataError(f"{', '.join(config.data)}: the table has no rows")
    labels = read_config_labels(frame, config) if config.label in frame.columns else None
    training, test, notes = _split(config, len(frame), labels)
    beside = _beside_images(config, frame)
    if "preset" not in config.model_fields_set and any(holds_images(frame[name]) for name in frame):
        config = config.model_copy(update={"preset": "images"})
        parameters = config.detector_parameters()
        notes.append("the preset is that for images (preset: images)")
    detector = CVAEDetector(
        condition_columns=config.condition or None,
        ignore_columns=[*_left_out(config, frame), *beside] or None,
        **parameters,
    )
    schema = detector.infer_schema(frame.iloc[training])
    test_frame, test_labels = frame, labels
    if config.test_data:
        test_frame, test_labels = _read_test(config, schema, collect(faults))
        test = np.flatnonzero(test_labels.is_known)
        notes.append(f"evaluated on {', '.join(config.test_data)}, where {test_labels.rule}")
    _check_test_rows(schema, test_frame, test)
    notes += _format_notes(config)
    if config.folder.exists():
        notes.append(f"the model in {config.folder} will be replaced")
    data_sha256 = digest(config.data)
    if config.test_data and digest(config.test_data) == data_sha256:
        notes.append("the rows to evaluate on are those that are learned from: the figures will flatter")
    return Plan(
        config=config,
        detector=detector,
        frame=frame,
        schema=schema,
        training=training,
        test_frame=test_frame,
        test=test,
        test_labels=test_labels,
        notes=notes,
        data_sha256=data_sha256,
        seconds=time.perf_counter() - started,
        faults=faults,
    )


def _require_named(frame: pd.DataFrame, config: TrainConfig) -> None:
    require(frame, config.condition, "condition")
    require(frame, config.ignore, "ignore")
    require(frame, list(config.column_kinds), "column_kinds")
    require(frame, list(config.likelihoods), "likelihoods")
    if config.label is not None:
        if not config.test_data:
            require(frame, [config.label], "label")
        if config.label in config.condition:
            raise DataError(f"{config.label!r} is the label and cannot be the condition as well")


def _left_out(config: TrainConfig, frame: pd.DataFrame) -> list[str]:
    """Columns that are neither x nor condition: the label among them."""
    names = dict.fromkeys([*config.ignore, *([config.label] if config.label else [])])
    return [name for name in names if name in frame.columns]


def _beside_images(config: TrainConfig, frame: pd.DataFrame) -> list[str]:
    """Columns that came with pictures or arrays of images and were not asked for: they are no part of x."""
    if any(file.kind not in ("pictures", "npz") for file in find_files(config.data, csv_format(config))):
        return []
    named = {*config.condition, *config.ignore, *([config.label] if config.label else [])}
    return [name for name in (FILE, FOLDER, LABEL) if name in frame.columns and name not in named]


def _read_test(config: TrainConfig, schema: Schema, on_fault: OnFault) -> tuple[pd.DataFrame, Labels]:
    if config.label is None:
        raise DataError("test_data is for evaluation: say which column is the label")
    text = text_columns(schema)
    known = {*map(str, schema.names), *(str(condition.name) for condition in schema.conditions)}
    numbers = known - text.keys() - {str(column.name) for column in schema.images}
    frame = read_table(config.test_data, csv_format(config), text=text, numbers=numbers, on_fault=on_fault)
    return frame, read_config_labels(frame, config)


def _check_test_rows(schema: Schema, frame: pd.DataFrame, rows: IntArray) -> None:
    """What would end the evaluation is found before the training.

    Raises
    ------
    DataError
        If the rows lack a column, or a condition.
    """
    names = [*schema.names, *(condition.name for condition in schema.conditions)]
    require(frame, list(map(str, names)), "test_data")
    for condition in schema.conditions:
        missing = rows[frame[condition.name].isna().to_numpy()[rows]]
        if missing.size:
            raise ConditionError(
                f"condition {condition.name!r} is missing in row {missing[0]} of the rows to evaluate on "
                f"({missing.size:,} in all); fill it, or take these rows away"
            )


def _split(config: TrainConfig, n_rows: int, labels: Labels | None) -> tuple[IntArray, IntArray, list[str]]:
    """Rows of the table to learn from and to evaluate on, and what to say of them."""
    if labels is None:
        return np.arange(n_rows), np.zeros(0, dtype=np.int64), ["no label here: every row is learned from"]
    rng = np.random.default_rng(config.random_state)
    known = [NORMAL, ANOMALY] if config.train_on_anomalies else [NORMAL]
    candidates = rng.permutation(np.flatnonzero(np.isin(labels.status, known)))
    n_test = 0 if config.test_data else round(config.test_fraction * len(candidates))
    unknown = np.flatnonzero(labels.status == UNKNOWN)
    training = np.sort(np.concatenate([candidates[n_test:], unknown]))
    if not len(training):
        left_out = labels.count(LEFT_OUT)
        why = f"{labels.count(ANOMALY):,} are anomalies and {left_out:,} are left out"
        why = why if left_out else f"all {n_rows:,} rows are anomalies"
        raise DataError(f"no row is left to learn from: {labels.rule}, and {why}")
    rest = [] if config.train_on_anomalies else [np.flatnonzero(labels.is_anomaly)]
    test = np.sort(np.concatenate([candidates[:n_test], *rest]))
    return training, test, _split_notes(config, labels)


def _split_notes(config: TrainConfig, labels: Labels) -> list[str]:
    anomalies = labels.count(ANOMALY)
    notes = [f"label: {labels.rule} ({anomalies:,} of {len(labels.status):,} rows); it is used for evaluation only"]
    if anomalies and config.train_on_anomalies:
        notes.append("labelled anomalies stay among the training rows, as asked")
    elif anomalies:
        notes.append("labelled anomalies are left out of training (train_on_anomalies keeps them)")
    else:
        notes.append("no row is labelled an anomaly: only false alarms can be counted")
    if unknown := labels.count(UNKNOWN):
        notes.append(f"{unknown:,} rows without a label are learned from, not evaluated")
    if left_out := labels.count(LEFT_OUT):
        notes.append(f"{left_out:,} rows are neither normal nor anomalies by this rule and are left out")
    return notes


def _format_notes(config: TrainConfig) -> list[str]:
    notes = []
    for file in find_files(config.data, csv_format(config)):
        described = file.resolved_format().describe() if file.kind == "csv" else ""
        if described:
            notes.append(f"{file.path.name} was read with {described}")
    return notes[:5]


def train(plan: Plan, *, verbose: int = 0, on_stage: Callable[[str], None] = lambda stage: None) -> Trained:
    """Fit, save, evaluate and log.

    The model is saved as soon as it is there; a tracking fault is noted in the result, not raised.

    Raises
    ------
    TrainingDivergedError
        If the loss becomes infinite; names column and step.
    BundleError, OutputError
        If the model cannot be saved.
    """
    config, seconds = plan.config, {"read": plan.seconds}
    tracked = _Tracking(config) if config.tracking else None
    try:
        on_stage("fit")
        started = time.perf_counter()
        detector = plan.detector.set_params(verbose=verbose).fit(plan.training_rows)
        detector.set_params(verbose=0)
        seconds["fit"] = time.perf_counter() - started
        on_stage("save")
        started = time.perf_counter()
        detector.save(config.folder)
        bundle.annotate(config.folder, _provenance(plan))
        seconds["save"] = time.perf_counter() - started
        on_stage("evaluate")
        started = time.perf_counter()
        evaluated, explanation = _evaluate(plan, detector)
        seconds["evaluate"] = time.perf_counter() - started
    except BaseException:
        if tracked is not None:
            tracked.abandon()
        raise
    sha256 = bundle.model_hash(config.folder)
    trained = Trained(plan, detector, config.folder, sha256, evaluated, explanation, seconds)
    if tracked is None:
        return trained
    on_stage("log")
    try:
        return tracked.log(trained)
    except TrackingError as error:
        return replace(trained, tracking_error=str(error))


def _evaluate(plan: Plan, detector: CVAEDetector) -> tuple[Evaluated | None, Explanation]:
    if len(plan.test):
        assert plan.test_labels is not None
        labels = Labels(plan.test_labels.status[plan.test], plan.test_labels.rule)
        evaluated = evaluate_rows(detector, plan.test_frame.iloc[plan.test], labels)
        return evaluated, evaluated.explanation
    rows = plan.training_rows
    if len(rows) > MOST_ROWS_WITHOUT_LABELS:
        rows = rows.sample(MOST_ROWS_WITHOUT_LABELS, random_state=plan.config.random_state)
    return None, explain_rows(detector, rows, score_in_chunks(detector, rows))


def _provenance(plan: Plan) -> dict[str, str]:
    return {
        "name": plan.config.name,
        "trained_at": now(),
        "trained_by": who(),
        "data": ", ".join(plan.config.data),
        "data_sha256": plan.data_sha256,
        "csv": json.dumps(_unusual_marks(plan.config)),
        "training_rows": str(len(plan.training)),
        "experiment": plan.config.experiment_name,
        "log_rows": "yes" if plan.config.log_rows else "no",
        "label": json.dumps(plan.config.model_dump(include={"label", "anomaly", "normal"})),
    }


def _unusual_marks(config: TrainConfig) -> dict[str, str]:
    """Number marks of the CSV files, where they are not the usual ones: 2.547 may be two thousand there."""
    for file in find_files(config.data, csv_format(config)):
        form = file.resolved_format() if file.kind == "csv" else CsvFormat()
        if form.decimal == "," or form.thousands:
            return {"decimal": form.decimal or ".", "thousands": form.thousands or ""}
    return {}


class _Tracking:
    """The run of one training, opened in a thread of its own so that training never waits for a server."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.run_id: str | None = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._open, name="tracking", daemon=True)
        self.thread.start()

    def _open(self) -> None:
        from anomaly_cvae import tracking

        try:
            with tracking.faults_named():
                tracking.use_store(self.config.experiment_name)
                self.run_id = tracking.open_run(self.config.name, {"job": "train", **self.config.tags})
        except BaseException as error:
            self.error = error

    def abandon(self) -> None:
        """Mark the run as failed, if it is open and the server answers."""
        from anomaly_cvae import tracking

        self.thread.join(timeout=5.0)
        if self.run_id is not None:
            try:
                with tracking.faults_named():
                    tracking.close_run(self.run_id, "FAILED")
            except TrackingError:
                pass  # the error that ended the training is the one to be seen

    def log(self, trained: Trained) -> Trained:
        """Everything about a training into its run."""
        from anomaly_cvae import tracking

        started = time.perf_counter()
        self.thread.join()
        if self.error is not None:
            raise TrackingError(str(self.error)) from self.error
        assert self.run_id is not None
        with tracking.faults_named(), tracking.resume_run(self.run_id):
            logged = tracking.log_detector(
                trained.detector,
                None if trained.evaluated is None else trained.evaluated.evaluation,
                self._extras(trained),
                saved=trained.folder,
                register_as=self.config.register_as,
            )
            bundle.annotate(trained.folder, {"run_id": self.run_id, "tracking_uri": tracking.use_store()})
        seconds = {**trained.seconds, "log": time.perf_counter() - started}
        return replace(trained, run_id=self.run_id, model_uri=logged.uri, version=logged.version, seconds=seconds)

    def _extras(self, trained: Trained) -> Any:
        from anomaly_cvae import tracking

        plan, config = trained.plan, self.config
        source = ", ".join(config.data)
        datasets = [tracking.DataSet(plan.training_rows, source, "training", config.label)]
        if len(plan.test):
            tested = ", ".join(config.test_data) or source
            datasets.append(tracking.DataSet(plan.test_frame.iloc[plan.test], tested, "evaluation", config.label))
        given = {
            "data": source,
            "condition": ", ".join(config.condition) or "none",
            "label_rule": plan.test_labels.rule if plan.test_labels else "none",
            "preset": config.preset,
            "training_rows": len(plan.training),
            "test_rows": len(plan.test),
            "model_sha256": trained.sha256,
        }
        return tracking.Extras(
            parameters=given,
            seconds=trained.seconds,
            datasets=datasets,
            surprising=trained.explanation.lines if config.log_rows else None,
            alarm_columns=trained.explanation.alarm_columns,
        )
