"""What a run holds: parameters, curves over epochs, thresholds, ROC and PR, surprising rows, data and the model."""

from __future__ import annotations

import io
import platform
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from anomaly_cvae import metrics, plots
from anomaly_cvae.detector import CVAEDetector
from anomaly_cvae.images import encode_picture
from anomaly_cvae.schema import image_of
from anomaly_cvae.tracking.store import metric_name, mlflow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODEL_CODE = Path(__file__).with_name("model_code.py")
MAX_CLASSES_IN_SUMMARY = 30
MAX_CURVE_POINTS = 2_000
REQUIREMENTS = ("torch", "numpy", "scipy", "pandas", "scikit-learn", "safetensors", "pillow")


@dataclass(frozen=True)
class DataSet:
    """Rows that a run used: ``context`` is "training" or "evaluation", ``source`` says where they come from."""

    frame: pd.DataFrame
    source: str
    context: str
    label: str | None = None


@dataclass(frozen=True)
class Extras:
    """What a run may hold beside the detector and its evaluation.

    ``surprising`` (a table of rows and their top columns) holds cells of rows; the others do not.
    """

    parameters: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    datasets: Sequence[DataSet] = ()
    surprising: pd.DataFrame | None = None
    alarm_columns: pd.DataFrame | None = None
    figures: Mapping[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True)
class LoggedModel:
    """Where the model of a run is: its URI, and its version if it was registered."""

    uri: str
    version: str | None = None


def log_detector(
    detector: CVAEDetector,
    evaluation: metrics.Evaluation | None = None,
    extras: Extras | None = None,
    *,
    saved: Path | None = None,
    register_as: str | None = None,
) -> LoggedModel:
    """Log a fitted detector into the active run, and register the model if it is given a name.

    ``saved`` is the detector's bundle where there is one already.
    """
    client, extras = mlflow(), extras or Extras()
    client.set_tags({"library": f"anomaly_cvae {version('anomaly_cvae')}", "python": platform.python_version()})
    client.set_tags({"device": str(detector.model_.engine.device), **extras.tags})
    calibration = detector.model_.calibration
    assert calibration is not None
    # The rate may have been changed since fit: what holds is what the thresholds were set by.
    in_use = {"false_alarm_rate": calibration.false_alarm_rate, "contamination": calibration.contamination or "auto"}
    parameters = {**detector.get_params(deep=False), **in_use, **extras.parameters}
    log_parameters(parameters)
    _log_history(detector)
    _log_thresholds(detector)
    if evaluation is not None:
        log_evaluation(detector, evaluation)
    log_extras(extras)
    describe(summary(detector, evaluation, extras))
    return _log_model(detector, saved, register_as)


def log_extras(extras: Extras) -> None:
    """Data sets, timings, tables and pictures into the active run."""
    client = mlflow()
    client.log_metrics({f"seconds/{name}": float(value) for name, value in extras.seconds.items()})
    for dataset in extras.datasets:
        _log_dataset(dataset)
    if extras.surprising is not None:
        client.log_table(extras.surprising.astype(str), "tables/surprising_rows.json")
    if extras.alarm_columns is not None:
        client.log_table(extras.alarm_columns, "tables/alarm_columns.json")
    for name, figure in extras.figures.items():
        client.log_figure(figure, f"plots/{name}.png")


def log_parameters(parameters: Mapping[str, Any]) -> None:
    """Parameters into the active run, shortened to what MLflow takes."""
    mlflow().log_params({name: _short(value) for name, value in parameters.items()})


def log_numbers(numbers: Mapping[str, float]) -> None:
    """Metrics into the active run; what is not finite is left out."""
    mlflow().log_metrics({name: float(value) for name, value in numbers.items() if np.isfinite(value)})


def log_tables(tables: Mapping[str, pd.DataFrame]) -> None:
    """Tables into the active run, as JSON."""
    for name, table in tables.items():
        mlflow().log_table(table, f"tables/{name}.json")


def describe(markdown: str) -> None:
    """The description of the active run."""
    mlflow().set_tag("mlflow.note.content", markdown)


def run_exists(run_id: str) -> bool:
    """Whether the store knows this run: a bundle may come from another one."""
    client = mlflow()
    try:
        run = client.MlflowClient().get_run(run_id)
    except client.exceptions.MlflowException:
        return False
    return bool(run.info.lifecycle_stage == "active")


def _log_dataset(dataset: DataSet) -> None:
    """Name, digest, schema and size; no row of it."""
    client = mlflow()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        described = client.data.from_pandas(
            dataset.frame, source=dataset.source, name=Path(dataset.source).name, targets=dataset.label
        )
        client.log_input(described, context=dataset.context)


def summary(detector: CVAEDetector, evaluation: metrics.Evaluation | None, extras: Extras | None = None) -> str:
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
        lines += [said_of(evaluation), ""]
    realised = None if evaluation is None else evaluation.alarms
    lines += [
        "| class | threshold | calibration rows | guarantee | false alarms on test rows |",
        "|---|---|---|---|---|",
    ]
    for name, row in list(thresholds.iterrows())[:MAX_CLASSES_IN_SUMMARY]:
        cells = (_in_cell(name), f"{row.threshold:.2f}", row.calibration_rows, row.guarantee, _realised(realised, name))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if len(thresholds) > MAX_CLASSES_IN_SUMMARY:
        lines.append(f"| … {len(thresholds) - MAX_CLASSES_IN_SUMMARY} more in tables/thresholds.json | | | | |")
    first = thresholds.iloc[0]
    lines += ["", f"Thresholds set {first['set_at']} by {first['set_by'] or 'unknown'}; rule: {first['rule']}."]
    if extras is not None and extras.alarm_columns is not None and len(extras.alarm_columns):
        lines += ["", "What drives the alarms (share of the class's alarms in which the column is most to blame):", ""]
        lines += alarm_lines(extras.alarm_columns)
    return "\n".join(lines)


def _in_cell(name: Any) -> str:
    return str(name).replace("|", "\\|")


def said_of(evaluation: metrics.Evaluation) -> str:
    """An evaluation in one sentence of Markdown."""
    ranking, alarms = evaluation.ranking, evaluation.alarms.loc[metrics.OVERALL]
    overall = ranking.loc[metrics.OVERALL]
    said = f"On {overall['rows']:,.0f} labelled rows, {overall['anomalies']:,.0f} of them anomalies: "
    if evaluation.has_both:
        said += f"**AUROC {overall['roc_auc']:.4f}**, **average precision {overall['average_precision']:.4f}**; "
    if metrics.SEEN in ranking.index:
        seen = ranking.loc[metrics.SEEN]
        said += (
            f"on the {seen['rows']:,.0f} of a class seen in training **{seen['roc_auc']:.4f}** and "
            f"**{seen['average_precision']:.4f}**; "
        )
    found = "" if np.isnan(alarms["recall"]) else f"{alarms['recall']:.1%} of the anomalies"
    wrong = "" if np.isnan(alarms["false_alarm_rate"]) else f"{alarms['false_alarm_rate']:.1%} of the normals"
    return f"{said}flagged {' and '.join(filter(None, (found, wrong)))}."


def alarm_lines(
    alarm_columns: pd.DataFrame, columns_per_class: int = 3, most: int = MAX_CLASSES_IN_SUMMARY
) -> list[str]:
    """One line of Markdown per class: its alarms and the columns that most often top them."""
    lines = []
    for name, own in list(alarm_columns.groupby("class", sort=False))[:MAX_CLASSES_IN_SUMMARY]:
        alarms = int(own["alarms"].iloc[0])
        first = own.head(columns_per_class).to_dict(orient="records")
        top = ", ".join(f"`{row['column']}` {row['top'] / alarms:.0%}" for row in first)
        lines.append(f"- **{name}**, {alarms:,} alarms: {top}")
    return lines


def _realised(alarms: pd.DataFrame | None, name: Any) -> str:
    """The realised false-alarm rate of a class; an unconditional model's one class is the whole."""
    if alarms is None:
        return ""
    name = metrics.OVERALL if name == "all" and name not in alarms.index else name
    if name not in alarms.index or not alarms.loc[name, "normals"]:
        return ""
    return f"{alarms.loc[name, 'false_alarm_rate']:.1%} of {alarms.loc[name, 'normals']:,.0f}"


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
    client.set_tag("stopped_by", history.attrs.get("stopped_by", "unknown"))
    client.log_figure(plots.training_curves(history), "plots/training.png")


def _log_thresholds(detector: CVAEDetector) -> None:
    client = mlflow()
    thresholds = detector.thresholds_
    client.log_metrics({metric_name("threshold", str(name)): float(t) for name, t in thresholds["threshold"].items()})
    client.log_table(thresholds.reset_index(), "tables/thresholds.json")
    client.log_table(detector.schema_.report().reset_index().astype(str), "tables/columns.json")


def log_evaluation(detector: CVAEDetector, evaluation: metrics.Evaluation) -> None:
    """Ranking, verdicts per class, curves and histograms into the active run."""
    client = mlflow()
    ranking, alarms = evaluation.ranking, evaluation.alarms
    logged: dict[str, float] = {}
    for table, columns in (
        (ranking, ("roc_auc", "average_precision")),
        (alarms, ("false_alarm_rate", "recall", "precision")),
    ):
        for column in columns:
            for line, value in table[column].items():
                logged[_metric_of(column, str(line))] = float(np.float64(value))
    client.log_metrics({name: value for name, value in logged.items() if np.isfinite(value)})
    client.log_table(ranking.reset_index(), "tables/ranking.json")
    client.log_table(alarms.reset_index(), "tables/alarms.json")
    if evaluation.has_both:
        _log_curves(evaluation)
    thresholds = detector.thresholds_["threshold"]
    classes = evaluation.classes if len(thresholds) > 1 else np.full(len(evaluation.scores), thresholds.index[0])
    if np.isin(classes.astype(str), thresholds.index.astype(str)).any():
        histograms = plots.score_histograms(evaluation.scores, evaluation.is_anomaly, classes, thresholds)
        client.log_figure(histograms, "plots/scores_and_thresholds.png")


def _metric_of(column: str, line: str) -> str:
    """``roc_auc`` for all rows, ``roc_auc_macro``, ``roc_auc_seen``, and ``roc_auc/<class>``."""
    about_all = {metrics.OVERALL: column, metrics.MACRO: f"{column}_macro", metrics.SEEN: f"{column}_seen"}
    return about_all[line] if line in about_all else metric_name(column, metrics.class_of(line))


def _log_curves(evaluation: metrics.Evaluation) -> None:
    client = mlflow()
    overall = evaluation.ranking.loc[metrics.OVERALL].to_dict()
    alarms = evaluation.alarms.loc[metrics.OVERALL].to_dict()
    curve = metrics.curves(evaluation.is_anomaly, evaluation.scores).thinned(MAX_CURVE_POINTS)
    roc = (curve.false_positive_rate, curve.true_positive_rate, curve.roc_threshold)
    pr = (curve.recall[:-1], curve.precision[:-1], curve.pr_threshold)
    tables = {
        "roc": dict(zip(("false_alarm_rate", "recall", "score"), roc, strict=True)),
        "precision_recall": dict(zip(("recall", "precision", "score"), pr, strict=True)),
    }
    for name, columns in tables.items():
        # JSON has no infinity, which the first point of a ROC curve has as its threshold.
        table = pd.DataFrame(columns).replace([np.inf, -np.inf], np.nan).astype(object)
        client.log_table(table.where(table.notna(), None), f"tables/{name}.json")
    area = (float(overall["roc_auc"]), float(overall["average_precision"]))
    point = (float(alarms["false_alarm_rate"]), float(alarms["recall"]), float(alarms["precision"]))
    client.log_figure(plots.roc_and_pr({"overall": curve}, {"overall": area}), "plots/roc_and_pr.png")
    client.log_text(plots.interactive_roc_and_pr(curve, area, point), "plots/roc_and_pr.html")


def signature(detector: CVAEDetector) -> Any:
    """What the logged model takes and gives.

    Columns are of any type: MLflow refuses whole numbers, nullable and categorical cells where it was promised
    doubles, and the detector checks cells better, by name and row.
    """
    client = mlflow()
    from mlflow.types.schema import AnyType, ColSpec, ParamSchema, ParamSpec, Schema

    layout, calibration = detector.layout_, detector.model_.calibration
    assert calibration is not None
    if not (layout.is_frame and all(isinstance(name, str) for name in layout.columns)):
        return None  # MLflow goes by names that are text; the detector checks what comes
    names = [str(name) for name in layout.columns if name not in layout.ignored]
    # A request carries a picture as the bytes of a PNG or JPEG, which other pixels do not fit.
    images = {str(c.name) for c in detector.schema_.images if image_of(c).pixels == "uint8"}
    types = {"condition": "string", "is_anomaly": "boolean"}
    outputs = ("condition", "negative_elbo", "score", "threshold", "p_value", "is_anomaly")
    return client.models.ModelSignature(
        inputs=Schema([ColSpec("binary" if name in images else AnyType(), name) for name in names]),
        outputs=Schema([ColSpec(types.get(name, "double"), name) for name in outputs]),
        params=ParamSchema(
            [
                ParamSpec("contrast", "boolean", False),
                ParamSpec("top_column", "boolean", False),
                ParamSpec("score_kind", "string", detector.score_kind),
                ParamSpec("unseen_class", "string", detector.unseen_class),
                ParamSpec("missing_condition", "string", detector.missing_condition),
                ParamSpec("false_alarm_rate", "double", calibration.false_alarm_rate),
            ]
        ),
    )


def example_rows(detector: CVAEDetector, n: int = 3) -> pd.DataFrame:
    """Rows like those the model takes, drawn from the model itself: no row of the data becomes an example."""
    schema = detector.schema_
    if schema.continuous_conditions or schema.attributes:
        return pd.DataFrame()
    rows = detector.sample(n, random_state=0)
    if not isinstance(rows, pd.DataFrame) or any(image_of(c).pixels != "uint8" for c in schema.images):
        return pd.DataFrame()
    return rows.assign(**{str(c.name): [encode_picture(cell) for cell in rows[c.name]] for c in schema.images})


def _log_model(detector: CVAEDetector, saved: Path | None, register_as: str | None) -> LoggedModel:
    client, example = mlflow(), example_rows(detector)
    with tempfile.TemporaryDirectory() as folder:
        saved = saved or detector.save(Path(folder) / "bundle")
        with redirect_stderr(io.StringIO()):  # MLflow announces a registered model there
            described = signature(detector)
            info = client.pyfunc.log_model(
                name="model",
                python_model=str(MODEL_CODE),
                artifacts={"bundle": str(saved)},
                signature=described,
                input_example=example if described is not None and len(example) else None,
                code_paths=[str(Path(__file__).parents[1])],
                pip_requirements=[f"{package}=={version(package).split('+')[0]}" for package in REQUIREMENTS],
                registered_model_name=register_as,
            )
    registered = None if register_as is None else str(info.registered_model_version)
    return LoggedModel(str(info.model_uri), registered)


def recent_runs(experiment: str | None, most: int = 20) -> pd.DataFrame:
    """The latest runs, of one experiment or of all: when, what and how well."""
    client = mlflow()
    found = client.search_runs(
        experiment_names=None if experiment is None else [experiment],
        search_all_experiments=experiment is None,
        max_results=most,
        order_by=["attributes.start_time DESC"],
    )

    def column(name: str) -> pd.Series:
        return found[name] if name in found else pd.Series([None] * len(found), index=found.index, dtype=object)

    return pd.DataFrame(
        {
            "run": column("run_id"),
            "started": column("start_time"),
            "name": column("tags.mlflow.runName"),
            "job": column("tags.job"),
            "status": column("status"),
            "roc_auc": column("metrics.roc_auc"),
            "average_precision": column("metrics.average_precision"),
            "false_alarm_rate": column("metrics.false_alarm_rate"),
            "user": column("tags.mlflow.user"),
        }
    )
