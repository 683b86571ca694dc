"""Scoring tables in files with a saved model, and the run that says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from anomaly_cvae import bundle
from anomaly_cvae.batch import ScoreOptions, Summary, score_files
from anomaly_cvae.batch.places import shown
from anomaly_cvae.batch.results import Progress
from anomaly_cvae.errors import TrackingError
from anomaly_cvae.jobs.models import OpenModel
from anomaly_cvae.jobs.runs import child_run


@dataclass(frozen=True)
class Scored:
    """A finished scoring job and its run."""

    summary: Summary
    run_id: str | None = None
    tracking_error: str = ""


def score_tables(
    model: OpenModel,
    inputs: Sequence[str],
    output: str | Path,
    options: ScoreOptions | None = None,
    *,
    log: bool = True,
    log_rows: bool = True,
    on_progress: Callable[[Progress], None] | None = None,
) -> Scored:
    """`score_files` with a saved model, logged below the model's run; a tracking fault is noted, not raised.

    Raises
    ------
    DataError, OutputError
        As `score_files` does.
    """
    options = options or ScoreOptions()
    options = replace(options, csv_format=model.csv_format(options.csv_format))
    summary = score_files(
        model.reader, inputs, output, model_hash=model.sha256, options=options, on_progress=on_progress
    )
    if not log:
        return Scored(summary)
    try:
        return Scored(summary, _log(model, inputs, output, options, summary, log_rows))
    except TrackingError as error:
        return Scored(summary, tracking_error=str(error))


def _log(
    model: OpenModel,
    inputs: Sequence[str],
    output: str | Path,
    options: ScoreOptions,
    summary: Summary,
    log_rows: bool,
) -> str:
    from anomaly_cvae import tracking

    parameters = {
        "model": model.name,
        "model_sha256": model.sha256,
        "inputs": ", ".join(map(shown, inputs)),
        "output": shown(output),
        **({} if options.where is None else {"where": options.where}),
        **({} if options.max_rows is None else {"max_rows": str(options.max_rows)}),
    }
    classes = summary.classes
    # What is wrong with a file may quote a cell of it.
    log_rows = log_rows and bundle.provenance(model.folder).get("log_rows") != "no"
    errors = [f.error if log_rows or not f.error else "(not logged)" for f in summary.files]
    files = pd.DataFrame(
        [
            (str(f.path), f.status, f.rows, f.anomalies, f.seconds, e)
            for f, e in zip(summary.files, errors, strict=True)
        ],
        columns=["file", "status", "rows", "anomalies", "seconds", "error"],
    )
    status = {name: int((files["status"] == name).sum()) for name in ("scored", "unchanged", "failed")}
    with child_run(model, f"score {Path(shown(inputs[0])).name} with {model.label}", "score", parameters) as run_id:
        tracking.log_numbers(
            {
                "rows": summary.rows,
                "rows_per_second": summary.rows_per_second,
                "seconds/total": summary.seconds,
                **{f"seconds/{stage}": seconds for stage, seconds in summary.stages.items()},
                **{f"files/{name}": count for name, count in status.items()},
                **{tracking.metric_name("alarm_share", str(name)): row.share for name, row in classes.iterrows()},
            }
        )
        tracking.log_tables({"files": files, "classes": classes.reset_index()})
        lines = [f"{count} files {name}" for name, count in status.items() if count]
        said = [f"{', '.join(lines)}; {summary.rows:,} rows in {summary.seconds:.1f} s.", "", f"Model: `{model.name}`"]
        failed = files[files["status"] == "failed"]
        said += [f"- **failed**: `{f.file}`: {f.error}" for f in failed.itertuples()]
        tracking.describe("\n".join(said))
    return run_id
