"""What the command line says: tables for people, JSON for scripts, and an exit code for each way to end."""

from __future__ import annotations

import json as json_module
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from anomaly_cvae import table_output
from anomaly_cvae.console import (
    ProgressLines,
    cell,
    how_far,
    is_missing,
    lines,
    nats,
    new_table,
    percent,
    plain,
    plain_text,
    records,
    share,
)
from anomaly_cvae.errors import AnomalyCVAEError, OutputError, ParameterError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from rich.table import Table

    from anomaly_cvae.batch.results import Progress, Summary
    from anomaly_cvae.jobs import Evaluated, Explanation, Grid, OpenModel, Plan, Trained
    from anomaly_cvae.jobs.scoring import Scored
    from anomaly_cvae.jobs.thresholds import Recalibrated
    from anomaly_cvae.metrics import Evaluation

WRONG_USE, WRONG_DATA, PARTLY_DONE, NOT_TRACKED, INTERRUPTED = 2, 3, 4, 5, 130
MOST_COLUMNS, MOST_CLASSES, MOST_DRAWN = 60, 20, 50
PICTURE_SUFFIX = ".png"
FIGURE_DPI = 110
MOST_FAULTS = 20
WORK = {"read": "reading", "score": "scoring", "write": "writing"}
GUARANTEES = {
    "pooled": "held by the scores of all classes, put on one scale",
    "none": "too few calibration rows, or none held out: the rate can be anything",
}
STAGES = {"fit": "training", "evaluate": "evaluating", "save": "saving the model", "log": "logging the run"}


class Report:
    """Prints results to standard output, everything else to standard error.

    A context manager around one command: what the user can mend becomes one line and an exit code.
    """

    def __init__(self, *, quiet: bool = False, json: bool = False) -> None:
        from rich.console import Console

        self.quiet, self.json = quiet, json
        self.shown = Console(quiet=quiet or json, highlight=False)
        self.aside = Console(stderr=True, quiet=quiet, highlight=False)
        self.errors = Console(stderr=True, highlight=False, soft_wrap=True)
        self.result: dict[str, Any] = {}
        self.exit_code = 0
        self.done = ""

    @property
    def verbose(self) -> int:
        """Of the training: a progress bar, unless nobody is to see it."""
        return 0 if self.quiet or not sys.stderr.isatty() else 1

    def __enter__(self) -> Self:
        self._show_warning = warnings.showwarning
        warnings.showwarning = self._warn
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        warnings.showwarning = self._show_warning
        if error is not None:
            self._fail(error)
        if self.json:
            print(json_module.dumps({**self.result, "exit_code": self.exit_code}, indent=1, default=plain))
        if self.exit_code:
            raise SystemExit(self.exit_code) from error

    def _show(self, title: str, table: Table) -> None:
        """A table under its title, which may be wider than it."""
        self.shown.print(f"[bold]{title}[/bold]", soft_wrap=True)
        self.shown.print(table)
        self.shown.print()

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, KeyboardInterrupt):
            self._error(INTERRUPTED, "interrupted")
        elif isinstance(error, ParameterError) or type(error).__name__ == "ValidationError":
            self._error(WRONG_USE, str(error))
        elif isinstance(error, (AnomalyCVAEError, FileNotFoundError, PermissionError)):
            self._error(WRONG_DATA, str(error))
        else:
            raise error

    def _error(self, code: int, message: str) -> None:
        self.exit_code, message = code, message + self.done
        self.result["error"] = message
        self.errors.print(f"[bold red]error:[/bold red] {plain_text(message)}")

    def _warn(self, message: Warning | str, *_: Any, **__: Any) -> None:
        self.aside.print(f"[yellow]warning:[/yellow] {plain_text(str(message))}")

    # ------------------------------------------------------------------ training

    def plan(self, plan: Plan) -> None:
        """What the table was taken for, before training starts."""
        config, schema = plan.config, plan.schema
        sizes = plan.class_sizes()
        self.result |= {
            "training_rows": len(plan.training),
            "test_rows": len(plan.test),
            "columns": schema.report().reset_index().to_dict(orient="records"),
            "classes": {str(name): int(rows) for name, rows in sizes.items()},
            "notes": plan.notes,
        }
        title = plain_text(f"{config.name}: {len(plan.frame):,} rows of {', '.join(config.data)}")
        table = new_table("column", "taken for", "why")
        described = schema.report()
        for row in lines(described)[:MOST_COLUMNS]:
            if row["role"] == "condition":
                continue
            kind = row["kind"] if row["role"] == "column" else "[dim]ignored[/dim]"
            why = "the label" if row["name"] == config.label else str(row["reason"])
            table.add_row(plain_text(str(row["name"])), kind, plain_text(why))
        self._show(title, table)
        if len(described) > MOST_COLUMNS:
            self.shown.print(f"… and {len(described) - MOST_COLUMNS} more columns\n")
        for condition in schema.conditions:
            self.shown.print(
                f"treated [bold]{plain_text(str(condition.name))}[/bold] as the condition: {condition.kind} "
                f"({plain_text(condition.reason)})"
            )
        if schema.categorical_conditions:
            shown = " / ".join(f"{plain_text(str(name))} {rows:,}" for name, rows in list(sizes.items())[:MOST_CLASSES])
            more = f" / … {len(sizes) - MOST_CLASSES} more" if len(sizes) > MOST_CLASSES else ""
            self.shown.print(f"{len(sizes)} classes, training rows: {shown}{more}")
        for note in plan.notes:
            self.shown.print(plain_text(note))
        detector = plan.detector
        self.shown.print(
            f"{len(plan.training):,} rows to learn from ({detector.validation_fraction:.0%} of them to stop by, "
            f"{detector.calibration_fraction:.0%} for thresholds), {len(plan.test):,} to evaluate on\n"
        )

    def stage(self, name: str, folder: str) -> None:
        """What is being done now; from "evaluate" on the model is safe in ``folder``."""
        if name in ("evaluate", "log"):
            self.done = f"; the model is saved in {folder}"
        self.aside.print(f"[dim]{STAGES[name]} …[/dim]")

    def trained(self, trained: Trained) -> None:
        """The finished model: how good, where, and what to do next."""
        detector, config = trained.detector, trained.plan.config
        history = detector.history_
        self.result |= {
            "model": str(trained.folder),
            "model_sha256": trained.sha256,
            "run_id": trained.run_id,
            "model_uri": trained.model_uri,
            "version": trained.version,
            "seconds": trained.seconds,
            "thresholds": records(detector.thresholds_.reset_index()),
        }
        self.shown.print(
            f"trained {int(history['step'].iloc[-1]):,} steps in {trained.seconds['fit']:.1f} s, held-out negative "
            f"ELBO {history['validation_negative_elbo'].min():.2f} nats\n"
        )
        if trained.evaluated is not None:
            self._evaluation("on rows that it has not seen", trained.evaluated.evaluation, detector.thresholds_)
        else:
            self._thresholds(detector.thresholds_)
        self._alarm_columns(trained.explanation)
        self._warn_of_empty_promises(detector.thresholds_)
        self.left_out(trained.plan.faults)
        model = plain_text(str(config.folder))
        self.shown.print(f"model   [bold]{model}[/bold]  (sha256 {trained.sha256[:12]})")
        if trained.run_id:
            where = (
                f" registered as {plain_text(config.register_as or '')} version {trained.version}"
                if trained.version
                else ""
            )
            self.shown.print(f"run     [bold]runs:/{trained.run_id}[/bold]{where}")
        self._tracking_error(trained.tracking_error, f"the model is saved in {model}")
        self.shown.print(
            f"next    anomaly-cvae score {model} FILES --output scored\n        anomaly-cvae explain {model} FILES"
        )

    def _warn_of_empty_promises(self, thresholds: pd.DataFrame) -> None:
        empty = [str(name) for name in thresholds.index[thresholds["guarantee"] == "none"]]
        if empty:
            named = ", ".join(empty[:5]) + (f", … ({len(empty)} in all)" if len(empty) > 5 else "")
            self._warn(f"too few calibration rows to hold the false-alarm rate for {named}")

    # ------------------------------------------------------------------ use

    def evaluated(self, evaluated: Evaluated, model: OpenModel) -> None:
        """Ranking and verdicts."""
        self.result |= {"model": model.name, "run_id": evaluated.run_id, "label": evaluated.label_rule}
        title = f"{plain_text(model.name)}, where {plain_text(evaluated.label_rule)}"
        self._evaluation(title, evaluated.evaluation, model.detector.thresholds_)
        self._alarm_columns(evaluated.explanation)
        if evaluated.run_id:
            self.shown.print(f"run     [bold]runs:/{evaluated.run_id}[/bold]")
        self._tracking_error(evaluated.tracking_error, "the figures above stand")
        self.left_out(evaluated.faults)

    def _evaluation(self, title: str, evaluation: Evaluation, thresholds: pd.DataFrame) -> None:
        ranking, alarms = evaluation.ranking, evaluation.alarms
        self.result["ranking"] = records(ranking.reset_index())
        self.result["alarms"] = records(alarms.reset_index())
        headers = ("rows", "anom-\nalies", "AUROC", "AP", "found", "false\nalarms", "threshold", "guarantee")
        table = new_table("class", numbers=headers)
        single = len(ranking) == 3 and len(thresholds) <= 2
        shown = ranking.drop(index=ranking.index[1:]) if single else ranking
        verdicts = {line["class"]: line for line in lines(alarms)}
        limits = {line["class"]: line for line in lines(thresholds)}
        for row in lines(shown)[: MOST_CLASSES + 3]:
            name = row["class"]
            verdict, own = verdicts.get(name, {}), lines(thresholds)[0] if single else limits.get(name, {})
            table.add_row(
                plain_text(str(name)), f"{row['rows']:,.0f}", f"{row['anomalies']:,.0f}", share(row["roc_auc"]),
                share(row["average_precision"]), percent(verdict.get("recall")),
                percent(verdict.get("false_alarm_rate"), 1), nats(own.get("threshold")), own.get("guarantee", ""),
            )  # fmt: skip
        self._show(title, table)
        self._more_classes(len(shown) - 3)
        self._guarantees(thresholds)

    def _thresholds(self, thresholds: pd.DataFrame) -> None:
        table = new_table("class", numbers=("threshold", "calibration rows", "guarantee"))
        for row in lines(thresholds)[:MOST_CLASSES]:
            rows = f"{row['calibration_rows']:,}"
            table.add_row(plain_text(row["class"]), nats(row["threshold"]), rows, row["guarantee"])
        self._show("thresholds", table)
        self._more_classes(len(thresholds))
        self._guarantees(thresholds)
        first = thresholds.iloc[0]
        self.shown.print(
            f"set {first['set_at']} by {first['set_by'] or 'unknown'}; rule: {plain_text(first['rule'])}\n"
        )

    def _more_classes(self, n_classes: int) -> None:
        if n_classes > MOST_CLASSES:
            self.shown.print(f"… and {n_classes - MOST_CLASSES} more classes; --json has all of them\n")

    def _guarantees(self, thresholds: pd.DataFrame) -> None:
        """What the words of the column mean, where they need saying."""
        said = [f"{word}: {GUARANTEES[word]}" for word in GUARANTEES if (thresholds["guarantee"] == word).any()]
        if said:
            self.shown.print(f"guarantee {plain_text('; '.join(said))}\n")

    def _alarm_columns(self, explanation: Explanation) -> None:
        alarm_columns = explanation.alarm_columns
        self.result["alarm_columns"] = records(alarm_columns)
        if not len(alarm_columns):
            return
        table = new_table("class", numbers=("alarms",))
        table.add_column("columns")
        for name, own in list(alarm_columns.groupby("class", sort=False))[:MOST_CLASSES]:
            alarms = int(own["alarms"].iloc[0])
            top = ", ".join(f"{row['column']} {row['top'] / alarms:.0%}" for row in records(own.head(4)))
            table.add_row(plain_text(str(name)), f"{alarms:,}", plain_text(top))
        asked = int(alarm_columns["top"].sum())
        first = f", of the first {asked:,}" if asked < explanation.n_alarms else ""
        self._show(f"what drives the alarms: the column most to blame in each{first}", table)
        self._more_classes(alarm_columns["class"].nunique())

    def _tracking_error(self, error: str, kept: str) -> None:
        if error:
            self.exit_code = self.exit_code or NOT_TRACKED
            self.result["tracking_error"] = error
            self.errors.print(f"[yellow]tracking failed:[/yellow] {plain_text(error)}; {plain_text(kept)}")

    @contextmanager
    def progress(self) -> Iterator[Callable[[Progress], None]]:
        """A bar with rows per second and time left; in a log file, a line now and then."""
        if self.quiet:
            yield lambda progress: None
            return
        if not sys.stderr.isatty():
            yield ProgressLines(self.aside.print)
            return
        from rich import progress as bars

        columns = (
            bars.TextColumn("{task.description}"), bars.BarColumn(), bars.TaskProgressColumn(),
            bars.TextColumn("{task.fields[said]}"),
        )  # fmt: skip
        with bars.Progress(*columns, console=self.aside, transient=True) as bar:
            task = bar.add_task("scoring", total=1.0, said="")

            def show(progress: Progress) -> None:
                said = f"{how_far(progress)}, {plain_text(progress.path.name)}"
                bar.update(task, completed=progress.done, said=said)

            yield show

    def scored(self, scored: Scored, output: str, *, stopped: bool = False) -> None:
        """Files, rows, anomalies per class, seconds per stage; ``stopped``: the first bad file ended the job."""
        summary = scored.summary
        count = {s: sum(f.status == s for f in summary.files) for s in ("scored", "unchanged", "failed")}
        classes = summary.classes
        self.result |= {
            "output": output,
            "rows": summary.rows,
            "seconds": summary.seconds,
            "rows_per_second": summary.rows_per_second,
            "stages": summary.stages,
            "slowest_stage": summary.slowest[0],
            "limited": summary.limited,
            "files_not_opened": summary.not_opened,
            "files": [
                {
                    "path": str(f.path),
                    "output": str(f.output),
                    "status": f.status,
                    "rows": f.rows,
                    "anomalies": f.anomalies,
                    "error": f.error,
                    **({"cut": True} if f.cut else {}),
                    **({"left_out": f.faults} if f.faults else {}),
                }
                for f in summary.files
            ],
            "classes": records(classes.reset_index()),
            "run_id": scored.run_id,
        }
        table = new_table("class", numbers=("rows", "anomalies", "share"))
        for row in lines(classes.sort_values("rows", ascending=False))[:MOST_CLASSES]:
            name = plain_text(row["class"])
            table.add_row(name, f"{row['rows']:,}", f"{row['anomalies']:,}", f"{row['share']:.2%}")
        self._show(f"{plain_text(output)}: rows and anomalies per class", table)
        self._more_classes(len(classes))
        said = ", ".join(f"{n} {name}" for name, n in count.items() if n)
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in summary.stages.items())
        plural = "" if len(summary.files) == 1 else "s"
        self.shown.print(
            f"{len(summary.files)} file{plural}: {said}; {summary.rows:,} rows in {summary.seconds:.1f} s "
            f"({summary.rows_per_second:,.0f} rows/s; at work: {stages})"
        )
        self._where_it_ended(summary)
        if scored.run_id:
            self.shown.print(f"run     [bold]runs:/{scored.run_id}[/bold]")
        for file in summary.failed:
            self.exit_code = WRONG_DATA if stopped else PARTLY_DONE
            self.errors.print(f"[bold red]not scored:[/bold red] {plain_text(file.error)}")
        self.left_out({path: why for file in summary.files for path, why in file.faults.items()})
        self._tracking_error(scored.tracking_error, f"the scored files stand in {output}")

    def _where_it_ended(self, summary: Summary) -> None:
        stage, share = summary.slowest
        if summary.rows:
            self.shown.print(f"{WORK[stage]} was the bottleneck: {share:.0%} of the time")
        if summary.limited:
            cut = [plain_text(str(file.path)) for file in summary.files if file.cut]
            parts = [f"the rest of {name} is not scored" for name in cut]
            parts += [f"{summary.not_opened:,} file(s) were not opened"] if summary.not_opened else []
            self.shown.print(f"stopped at --max-rows: {'; '.join(parts)}")

    def explained(self, explanation: Explanation, model: OpenModel) -> None:
        """Each row with its columns, and what drives the alarms."""
        self.result |= {
            "model": model.name,
            "rows": explanation.n_rows,
            "alarms": explanation.n_alarms,
            "explained": records(explanation.rows),
            "top_columns": records(explanation.columns),
        }
        self.shown.print(f"{explanation.n_rows:,} rows, {explanation.n_alarms:,} of them flagged\n")
        for row in records(explanation.rows):
            verdict = "[bold red]flagged[/bold red]" if row["is_anomaly"] else "normal"
            where = f"row {row['row_in_file']} of {row['file']}" if row.get("file") else f"row {row['row']}"
            title = (
                f"{plain_text(where)}  {plain_text(str(row['condition']))}  {verdict}  score {nats(row['score'])}, "
                f"threshold {nats(row['threshold'])}, p-value {row['p_value']:.2g}"
            )
            table = new_table("column", numbers=("observed", "expected", "90 % between", "would save", "nats"))
            for c in records(explanation.columns[explanation.columns["row"] == row["row"]]):
                if c["repair_nats"] <= 0 and c["rank"] > 1:
                    continue  # what is expected is no likelier: no reason
                between = "" if is_missing(c["low"]) else f"{cell(c['low'])} … {cell(c['high'])}"
                cells = (cell(c["observed"]), cell(c["expected"]), between, nats(c["repair_nats"]), nats(c["nats"]))
                table.add_row(plain_text(str(c["column"])), *cells)
            self._show(title, table)
            other, is_known = row.get("most_normal_as"), row["condition"] in model.detector.schema_.class_names
            if row["is_anomaly"] and row["score"] <= row["threshold"]:
                self.shown.print("flagged for its class, which training did not see\n")
            if is_known and other is not None and str(other) != str(row["condition"]):
                self.shown.print(
                    f"as [bold]{plain_text(str(other))}[/bold] it would be less surprising: "
                    f"{row['negative_elbo'] - row['nats_there']:.2f} nats fewer\n"
                )
        self._alarm_columns(explanation)
        self.left_out(explanation.faults)

    def generated(self, rows: pd.DataFrame, *, shown: bool) -> None:
        """New rows."""
        self.result["rows"] = records(rows)
        if not shown:
            return
        names = [str(name) for name in rows.columns]
        cells = [[cell(value) for value in row] for row in rows.head(MOST_DRAWN).itertuples(index=False)]
        widths = [max(map(len, column)) + 1 for column in zip(names, *cells, strict=True)]
        if sum(widths) <= self.shown.width:
            table = new_table(numbers=[plain_text(name) for name in names])
            for row in cells:
                table.add_row(*row)
        else:  # a column a line: names are what is long
            widest = max((len(cell) for row in cells for cell in row), default=1) + 1
            cells = cells[: max((self.shown.width - max(map(len, names))) // widest, 1)]
            table = new_table("column", numbers=[str(i + 1) for i in range(len(cells))])
            for i, name in enumerate(names):
                table.add_row(plain_text(name), *(row[i] for row in cells))
        self._show(f"{len(rows)} rows from the model", table)
        if len(cells) < len(rows):
            self.shown.print(f"… and {len(rows) - len(cells)} more; --output writes all of them\n")

    def recalibrated(self, done: Recalibrated) -> None:
        """Old and new thresholds."""
        self.result |= {
            "model": str(done.folder), "model_sha256": done.sha256, "run_id": done.run_id, "version": done.version,
            "thresholds": records(done.after.reset_index()),
        }  # fmt: skip
        table = new_table("class", numbers=("before", "now", "calibration rows", "guarantee"))
        for row in lines(done.after)[:MOST_CLASSES]:
            before = done.before["threshold"].get(row["class"])
            rows = f"{row['calibration_rows']:,}"
            name = plain_text(row["class"])
            table.add_row(name, nats(before), nats(row["threshold"]), rows, row["guarantee"])
        self._show("thresholds", table)
        self._more_classes(len(done.after))
        self._guarantees(done.after)
        first = done.after.iloc[0]
        self.shown.print(f"set {first['set_at']} by {first['set_by']}; rule: {plain_text(first['rule'])}")
        self.shown.print(f"model   [bold]{plain_text(str(done.folder))}[/bold]  (sha256 {done.sha256[:12]})")
        self._tracking_error(done.tracking_error, f"the recalibrated model is saved in {done.folder}")

    def runs(self, runs: pd.DataFrame, uri: str) -> None:
        """One line per run."""
        self.result |= {"tracking_uri": uri, "runs": records(runs)}
        if not len(runs):
            self.shown.print(f"no runs yet at {uri}: `anomaly-cvae train` makes the first")
            return
        table = new_table(numbers=())
        table.add_column("run", min_width=len("runs:/") + 32, overflow="fold")
        table.add_column("job")
        for header in ("AUROC", "AP", "false\nalarms"):
            table.add_column(header, justify="right")
        for run in runs.to_dict(orient="records"):
            state = "" if run["status"] == "FINISHED" else f" ({str(run['status']).lower()})"
            table.add_row(
                f"{run['started']:%Y-%m-%d %H:%M} {plain_text(str(run['name']))}{state}\nruns:/{run['run']}",
                str(run["job"] or ""), share(run["roc_auc"]), share(run["average_precision"]),
                percent(run["false_alarm_rate"], 1),
            )  # fmt: skip
        self._show(f"runs at {plain_text(uri)}", table)

    def promoted(self, uri: str) -> None:
        """The URI that has a new meaning."""
        self.result["model_uri"] = uri
        self.shown.print(f"[bold]{plain_text(uri)}[/bold]")

    def check_output(self, path: str | None, *, picture: bool = False) -> bool:
        """Refuse a file name before any work is done for it; whether it is that of a ``picture``.

        Raises
        ------
        ParameterError
            For an unknown suffix.
        """
        suffix = None if path is None else Path(path).suffix
        if picture and suffix == PICTURE_SUFFIX:
            return True
        if suffix is not None and suffix not in table_output.SUFFIXES:
            images = f", a picture of images as {PICTURE_SUFFIX}" if picture else ""
            raise ParameterError(
                f"{path}: a table is written as {', '.join(table_output.SUFFIXES)}{images}; choose one of these"
            )
        return False

    def grid(self, path: str, grid: Grid) -> None:
        """A grid of images into a PNG file.

        Raises
        ------
        OutputError
            If the file cannot be written.
        """
        from PIL import Image

        rows, columns = grid.images.shape[:2]
        self._picture(path, Image.fromarray(grid.picture).save)
        self.result |= {"rows": rows, "columns": columns, "lines": list(grid.lines)}
        self.shown.print(f"written [bold]{plain_text(path)}[/bold] ({rows} x {columns} images)")
        if grid.lines:
            shown = ", ".join(grid.lines[:MOST_CLASSES]) + (", …" if len(grid.lines) > MOST_CLASSES else "")
            self.shown.print(f"its rows: {plain_text(shown)}")

    def figure(self, path: str, figure: Figure) -> None:
        """A figure into a PNG file.

        Raises
        ------
        OutputError
            If the file cannot be written.
        """
        self._picture(path, lambda target: figure.savefig(target, dpi=FIGURE_DPI))
        self.shown.print(f"written [bold]{plain_text(path)}[/bold]")

    def _picture(self, path: str, save: Callable[[Path], object]) -> None:
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            save(Path(path))
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error
        self.result["output"] = path

    def left_out(self, faults: Mapping[str, str]) -> None:
        """Pictures that could not be used: each is named, and the command ends with a code of its own."""
        if not faults:
            return
        self.exit_code = self.exit_code or PARTLY_DONE
        self.result["left_out"] = {**self.result.get("left_out", {}), **faults}
        for path, why in list(faults.items())[:MOST_FAULTS]:
            self.errors.print(f"[bold red]left out:[/bold red] {plain_text(f'{path}: {why}')}")
        if len(faults) > MOST_FAULTS:
            self.errors.print(f"[bold red]left out:[/bold red] {len(faults) - MOST_FAULTS:,} more")

    def written(self, path: str, table: pd.DataFrame, name: str = "output") -> None:
        """A table into a file; its suffix says the format. ``name`` is what the result calls it.

        Raises
        ------
        OutputError
            If the file cannot be written.
        DataError
            If it holds images and the format cannot.
        """
        table_output.write(path, table)
        self.result[name] = path
        self.shown.print(f"written [bold]{plain_text(path)}[/bold] ({len(table):,} lines)")
