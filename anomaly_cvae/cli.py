"""The command line: parse, call, print. Everything heavy is imported inside the commands."""

from __future__ import annotations

import io
import os
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anomaly_cvae.cli_options import (
    Anomaly,
    Backend,
    Columns,
    Conditioning,
    Data,
    DataOrUrls,
    Decimal,
    Delimiter,
    Device,
    Draw,
    Encoding,
    FirstRows,
    Given,
    GridOrTable,
    Json,
    Label,
    LogRows,
    Missing,
    MissingCondition,
    Model,
    Normal,
    OnError,
    Part,
    Preset,
    Quiet,
    ScoreKind,
    Seed,
    Thousands,
    Track,
    UnseenClass,
)
from anomaly_cvae.errors import ParameterError

if TYPE_CHECKING:
    from anomaly_cvae.report import Report

EXIT_CODES = """Exit codes: 0 done; 1 a fault in the program; 2 the command or its configuration is wrong; 3 the data,
the model or the output folder cannot be used, nothing was lost; 4 done, but some input files could not be used; 5 done,
but tracking failed; 130 interrupted."""

MODEL_IS = "MODEL is a folder, runs:/ID, models:/NAME/VERSION or models:/NAME@ALIAS."

app = typer.Typer(
    name="anomaly-cvae",
    help="Find rows that are unlikely given their context.\n\n" + MODEL_IS,
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


@app.command()
def train(
    data: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files (Parquet, CSV, Arrow, npz of images), folders, also of pictures, or patterns.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[str | None, typer.Option(help="YAML file with any of these settings; flags win.")] = None,
    condition: Annotated[
        list[str] | None, typer.Option("--condition", "-c", help="Column that normal depends on; repeatable.")
    ] = None,
    label: Label = None,
    anomaly: Anomaly = None,
    normal: Normal = None,
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", "-i", help="Column that is neither x nor condition; repeatable.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the model, its folder and its run.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder of the model; default: ./NAME.")] = None,
    test_data: Annotated[list[str] | None, typer.Option(help="Labelled rows to evaluate on; repeatable.")] = None,
    test_fraction: Annotated[
        float | None, typer.Option(help="Share of labelled normals kept for evaluation (0.3).")
    ] = None,
    train_on_anomalies: Annotated[
        bool | None,
        typer.Option("--train-on-anomalies/--drop-anomalies", help="Labelled anomalies are dropped unless asked for."),
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="COLUMN=real|binary|categorical|count|continuous; repeatable.")
    ] = None,
    likelihood: Annotated[list[str] | None, typer.Option(help="COLUMN=LIKELIHOOD; repeatable.")] = None,
    preset: Annotated[Preset | None, typer.Option(help="Size and number of networks (balanced, or images).")] = None,
    conditioning: Annotated[Conditioning | None, typer.Option(help="One network, or one per class (shared).")] = None,
    score_kind: Annotated[ScoreKind | None, typer.Option(help="Unlikely row, wrong condition, or both (elbo).")] = None,
    false_alarm_rate: Annotated[float | None, typer.Option(help="Share of normals that may be flagged (0.01).")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="PARAMETER=VALUE of CVAEDetector; repeatable.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps (auto).")] = None,
    random_state: Annotated[int | None, typer.Option(help="Seed of the split and of the training (0).")] = None,
    tracking: Annotated[bool | None, typer.Option("--tracking/--no-tracking", help="Log an MLflow run.")] = None,
    experiment: Annotated[str | None, typer.Option(help="MLflow experiment (anomaly_cvae).")] = None,
    register: Annotated[str | None, typer.Option(help="Registered model to add a version to.")] = None,
    log_rows: Annotated[
        bool | None, typer.Option("--log-rows/--no-log-rows", help="Cells of rows may go into MLflow.")
    ] = None,
    delimiter: Delimiter = None,
    encoding: Encoding = None,
    decimal: Decimal = None,
    thousands: Thousands = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Train a model on a table or on images.

    Fits on the normals, calibrates, evaluates, saves the model and logs a run."""
    with reporting(quiet, json) as report:
        from anomaly_cvae import jobs

        detector = {
            "conditioning": _value(conditioning),
            "score_kind": _value(score_kind),
            "false_alarm_rate": false_alarm_rate,
            "device": device,
            **_pairs(set_, "--set", parse=True),
        }
        given = {
            "data": data, "condition": condition, "label": label, "anomaly": anomaly, "normal": normal,
            "ignore": ignore, "name": name, "output": output, "test_data": test_data, "test_fraction": test_fraction,
            "train_on_anomalies": train_on_anomalies, "column_kinds": _pairs(kind, "--kind"),
            "likelihoods": _pairs(likelihood, "--likelihood"), "preset": _value(preset),
            "detector": {key: value for key, value in detector.items() if value is not None},
            "random_state": random_state, "tracking": tracking, "experiment": experiment, "register": register,
            "log_rows": log_rows, "csv": _csv(delimiter, encoding, decimal, thousands),
        }  # fmt: skip
        plan = jobs.prepare(jobs.load_config(config, given))
        report.plan(plan)
        folder = str(plan.config.folder)
        trained = jobs.train(plan, verbose=report.verbose, on_stage=lambda stage: report.stage(stage, folder))
        report.trained(trained)


@app.command()
def evaluate(
    model: Model,
    data: Data,
    label: Annotated[
        str | None, typer.Option(help="Column that says which are anomalies; default: as in training.")
    ] = None,
    anomaly: Anomaly = None,
    normal: Normal = None,
    missing_condition: Missing = MissingCondition.refuse,
    log_rows: LogRows = True,
    tracking: Track = True,
    delimiter: Delimiter = None,
    encoding: Encoding = None,
    decimal: Decimal = None,
    thousands: Thousands = None,
    device: Device = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Evaluate a model on labelled rows.

    Says how well it ranks and flags them, per class; logs a run below the model's."""
    with reporting(quiet, json) as report:
        from anomaly_cvae import jobs

        csv = _csv(delimiter, encoding, decimal, thousands)
        table = jobs.TableConfig.model_validate(
            {"data": data, "label": label, "anomaly": anomaly, "normal": normal, "csv": csv}
        )
        opened = jobs.open_model(model, device=device, missing_condition=missing_condition.value)
        report.evaluated(jobs.evaluate_model(opened, table, log=tracking, log_rows=log_rows), opened)


@app.command()
def score(
    model: Model,
    data: DataOrUrls,
    output: Annotated[str, typer.Option("--output", "-o", help="Folder or URL for the scored Parquet files.")],
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Input column to copy; repeatable. Default: those that training ignored."),
    ] = None,
    keep_all: Annotated[bool, typer.Option("--keep-all", help="Copy every input column.")] = False,
    contrast: Annotated[bool, typer.Option("--contrast", help="Add the contrast: is the condition wrong?")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Add the column most to blame in flagged rows, and its nats.")
    ] = False,
    where: Annotated[
        str | None, typer.Option(help="Rows to score, such as \"machine == 'M' and rpm > 1200\" (all).")
    ] = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Score this many rows at most (all).")] = None,
    mixed_precision: Annotated[
        bool, typer.Option("--mixed-precision", help="Products in bfloat16: quicker, scores agree within some percent.")
    ] = False,
    backend: Annotated[
        Backend, typer.Option(help="What computes scores on a CPU; auto: ONNX Runtime for 20 million rows and more.")
    ] = Backend.auto,
    on_error: Annotated[OnError, typer.Option(help="What a file that cannot be used means.")] = OnError.skip,
    unseen_class: Annotated[
        UnseenClass, typer.Option(help="Rows of a class not seen in training.")
    ] = UnseenClass.anomaly,
    missing_condition: Missing = MissingCondition.refuse,
    log_rows: LogRows = True,
    tracking: Track = True,
    delimiter: Delimiter = None,
    encoding: Encoding = None,
    decimal: Decimal = None,
    thousands: Thousands = None,
    device: Device = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Score tables of any size into Parquet.

    One file per input. Run it again after a kill: it goes on where it stopped."""
    with reporting(quiet, json) as report:
        from anomaly_cvae import batch, jobs

        policies = {"unseen_class": unseen_class.value, "missing_condition": missing_condition.value}
        opened = jobs.open_model(model, device=device, mixed_precision=mixed_precision, **policies)
        options = batch.ScoreOptions(
            keep=tuple(keep) if keep else None,
            keep_all=keep_all,
            contrast=contrast,
            top_column=explain,
            on_error=on_error.value,
            csv_format=batch.CsvFormat(delimiter, encoding, decimal, thousands),
            where=where,
            max_rows=max_rows,
            backend=backend.value,
        )
        with report.progress() as on_progress:
            scored = jobs.score_tables(
                opened, data, output, options, log=tracking, log_rows=log_rows, on_progress=on_progress
            )
        report.scored(scored, batch.shown(output), stopped=on_error is OnError.fail)


@app.command()
def explain(
    model: Model,
    data: Data,
    row: Annotated[list[int] | None, typer.Option(help="Number of a row, from 0; repeatable.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many of the most surprising rows to explain.")] = 5,
    columns: Annotated[int, typer.Option(min=1, help="How many columns of each row.")] = 3,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="Write a .parquet, .csv or .json table, or a .png heat map of images."),
    ] = None,
    missing_condition: Missing = MissingCondition.refuse,
    delimiter: Delimiter = None,
    encoding: Encoding = None,
    decimal: Decimal = None,
    thousands: Thousands = None,
    device: Device = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Say why rows are surprising.

    The columns to blame, observed against expected, and the class that they fit best."""
    with reporting(quiet, json) as report:
        from anomaly_cvae import batch, jobs

        as_picture = report.check_output(output, picture=True)
        opened = jobs.open_model(
            model, device=device, unseen_class="anomaly", missing_condition=missing_condition.value
        )
        if as_picture:
            jobs.image_of(opened)
        explanation = jobs.explain_tables(
            opened,
            data,
            rows=row or (),
            n_rows=top,
            n_columns=columns,
            csv_format=batch.CsvFormat(delimiter, encoding, decimal, thousands),
        )
        if output is not None and as_picture:
            report.figure(output, jobs.heat_map(opened, explanation))
        elif output is not None:
            report.written(output, explanation.table)
        report.explained(explanation, opened)


@app.command()
def generate(
    model: Model,
    n: Annotated[int, typer.Option("-n", min=1, help="Rows to draw.")] = 10,
    condition: Annotated[
        list[str] | None,
        typer.Option(
            "--condition", "-c", help="Value of each condition, in the model's order; default: as in training."
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="Write a .parquet, .csv or .json table, or, of images, a .png grid."),
    ] = None,
    draw: Draw = None,
    same_z: Annotated[bool, typer.Option("--same-z", help="The i-th row of every class in the same style.")] = False,
    columns: Columns = None,
    random_state: Seed = 0,
    device: Device = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Draw new rows of a class from the model.

    Images go into a .png grid; without --condition it has a row of -n images for every class."""
    with reporting(quiet, json) as report:
        from anomaly_cvae import jobs

        as_picture = report.check_output(output, picture=True)
        opened = jobs.open_model(model, device=device)
        if as_picture and output is not None:
            how = {"noise": bool(draw), "same_z": same_z}
            report.grid(output, jobs.generate_images(opened, n, condition, random_state, columns=columns, **how))
            return
        drawn = jobs.generate_rows(opened, n, condition, random_state, noise=draw is not False, same_z=same_z)
        if output is not None:
            report.written(output, drawn)
        report.generated(drawn, shown=output is None)


@app.command()
def reconstruct(
    model: Model,
    data: Data,
    output: GridOrTable,
    condition: Given = None,
    rows: FirstRows = None,
    columns: Columns = None,
    missing_condition: Missing = MissingCondition.refuse,
    delimiter: Delimiter = None,
    encoding: Encoding = None,
    decimal: Decimal = None,
    thousands: Thousands = None,
    device: Device = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Say what the model makes of rows.

    A .png has every image above its reconstruction; a table has the expected cells."""
    with reporting(quiet, json) as report:
        from anomaly_cvae import jobs

        as_picture = report.check_output(output, picture=True)
        opened = jobs.open_model(model, device=device, missing_condition=missing_condition.value)
        csv = _csv(delimiter, encoding, decimal, thousands)
        read = jobs.rows_to_show(opened, data, rows, condition, csv, as_picture=as_picture)
        if as_picture:
            report.grid(output, jobs.reconstruct_images(opened, read, columns))
        else:
            report.written(output, read.table(opened.reader.reconstruct(read.frame)))
        report.left_out(read.faults)


@app.command()
def edit(
    model: Model,
    data: Data,
    output: GridOrTable,
    to: Annotated[list[str], typer.Option("--to", help="NAME=VALUE that a condition is to become; repeatable.")],
    condition: Annotated[
        list[str] | None,
        typer.Option("--from", help="NAME=VALUE that the rows are now, whatever the files say; repeatable."),
    ] = None,
    keep_detail: Annotated[
        bool, typer.Option("--keep-detail", help="Put back what the reconstruction lacks of each row.")
    ] = False,
    strength: Annotated[
        float, typer.Option(help="How far the condition goes: 1 as asked, 2 exaggerated, 0.5 half-way.")
    ] = 1.0,
    rows: FirstRows = None,
    columns: Columns = None,
    missing_condition: Missing = MissingCondition.refuse,
    delimiter: Delimiter = None,
    encoding: Encoding = None,
    decimal: Decimal = None,
    thousands: Thousands = None,
    device: Device = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Show rows as they would be under another condition.

    Their style is kept. A .png has every image above the edited one."""
    with reporting(quiet, json) as report:
        from anomaly_cvae import jobs

        as_picture = report.check_output(output, picture=True)
        opened = jobs.open_model(model, device=device, missing_condition=missing_condition.value)
        change = jobs.Change(jobs.named_values(opened, to, "--to"), keep_detail, strength)
        csv = _csv(delimiter, encoding, decimal, thousands)
        read = jobs.rows_to_show(opened, data, rows, condition, csv, as_picture=as_picture, flag="--from")
        if as_picture:
            report.grid(output, jobs.edit_images(opened, read, change, columns))
        else:
            report.written(output, read.table(jobs.edit_rows(opened, read, change)))
        report.left_out(read.faults)


@app.command()
def complete(
    model: Model,
    data: Data,
    output: GridOrTable,
    hide: Annotated[list[Part] | None, typer.Option(help="Part of the images to hide; repeatable.")] = None,
    n: Annotated[
        int | None,
        typer.Option("-n", min=1, help="Completions of each row; images: 5, tables: the expectation unless said."),
    ] = None,
    intervals: Annotated[
        str | None,
        typer.Option(help="Write a second table: where each missing cell lies with a probability of 90 %."),
    ] = None,
    condition: Given = None,
    rows: FirstRows = None,
    draw: Draw = None,
    random_state: Seed = 0,
    missing_condition: Missing = MissingCondition.refuse,
    delimiter: Delimiter = None,
    encoding: Encoding = None,
    decimal: Decimal = None,
    thousands: Thousands = None,
    device: Device = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Complete rows: missing cells of a table, hidden parts of images.

    A .png has a row per image: itself, what is left of it, and -n completions."""
    with reporting(quiet, json) as report:
        from anomaly_cvae import jobs

        as_picture = report.check_output(output, picture=True)
        report.check_output(intervals)
        parts = [part.value for part in hide or []]
        jobs.check_completion(parts, as_picture=as_picture, intervals=intervals is not None)
        opened = jobs.open_model(model, device=device, missing_condition=missing_condition.value)
        csv = _csv(delimiter, encoding, decimal, thousands)
        read = jobs.rows_to_show(opened, data, rows, condition, csv, as_picture=as_picture)
        if as_picture:
            grid = jobs.complete_images(opened, read, parts, n or 5, random_state, noise=bool(draw))
            report.grid(output, grid)
        else:
            report.written(output, jobs.complete_rows(opened, read, n, random_state, noise=draw is not False))
        if intervals is not None:
            report.written(intervals, jobs.intervals_of(opened, read, random_state), name="intervals")
        report.left_out(read.faults)


@app.command()
def recalibrate(
    model: Model,
    data: Annotated[list[str] | None, typer.Argument(help="Fresh normals; none: change the rate only.")] = None,
    false_alarm_rate: Annotated[float | None, typer.Option(help="Share of normals that may be flagged.")] = None,
    label: Label = None,
    anomaly: Anomaly = None,
    normal: Normal = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder of the new model; default: replace it.")
    ] = None,
    register: Annotated[str | None, typer.Option(help="Registered model to add a version to.")] = None,
    tracking: Track = True,
    delimiter: Delimiter = None,
    encoding: Encoding = None,
    decimal: Decimal = None,
    thousands: Thousands = None,
    device: Device = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Set thresholds anew, without training.

    From another false-alarm rate, from fresh normals, or both."""
    with reporting(quiet, json) as report:
        from anomaly_cvae import jobs

        csv = _csv(delimiter, encoding, decimal, thousands)
        table = {"data": data, "label": label, "anomaly": anomaly, "normal": normal, "csv": csv}
        opened = jobs.open_model(model, device=device)
        report.recalibrated(
            jobs.recalibrate_model(
                opened,
                jobs.TableConfig.model_validate(table) if data else None,
                false_alarm_rate=false_alarm_rate,
                output=output,
                log=tracking,
                register_as=register,
            )
        )


@app.command()
def runs(
    experiment: Annotated[str | None, typer.Option(help="Of this experiment only.")] = None,
    most: Annotated[int, typer.Option("-n", min=1, help="How many, the latest first.")] = 20,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """List what was trained, evaluated and scored."""
    with reporting(quiet, json) as report:
        from anomaly_cvae import tracking

        with tracking.faults_named():
            uri = tracking.use_store()
            found = tracking.recent_runs(experiment, most)
        report.runs(found, uri)


@app.command()
def promote(
    name: Annotated[str, typer.Argument(help="Registered model.", show_default=False)],
    version: Annotated[str, typer.Argument(help="Its version.", show_default=False)],
    alias: Annotated[str, typer.Option(help="What it is to be known as.")] = "champion",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Give a registered version an alias.

    From then on models:/NAME@ALIAS means this version."""
    with reporting(quiet, json) as report:
        from anomaly_cvae import tracking

        report.promoted(tracking.promote(name, version, alias))


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Say the version and leave.")] = False) -> None:
    if version:
        from anomaly_cvae import __version__

        print(f"anomaly-cvae {__version__}")
        raise typer.Exit


def reporting(quiet: bool, json: bool) -> Report:
    """What prints, and turns exceptions into messages and exit codes."""
    from anomaly_cvae.report import Report

    return Report(quiet=quiet, json=json)


def _value(choice: StrEnum | None) -> str | None:
    return None if choice is None else str(choice.value)


def _csv(delimiter: str | None, encoding: str | None, decimal: str | None, thousands: str | None) -> dict[str, str]:
    given = {"delimiter": delimiter, "encoding": encoding, "decimal": decimal, "thousands": thousands}
    return {name: value for name, value in given.items() if value is not None}


def _pairs(given: list[str] | None, flag: str, *, parse: bool = False) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for pair in given or []:
        # A column's name may hold a "=", a kind cannot; a parameter's name cannot, its value may.
        name, equals, value = pair.partition("=") if parse else pair.rpartition("=")
        if not equals or not name:
            raise ParameterError(f"{flag} takes NAME=VALUE, not {pair!r}")
        pairs[name] = _parsed(name, value) if parse else value
    return pairs


def _parsed(name: str, text: str) -> Any:
    """A value as YAML reads it: 3, 0.5, true, [128, 128], text."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ParameterError(f"--set {name}: {text!r} is no value (3, 0.5, true, [128, 128], text)") from error


def main() -> None:
    """Entry point of ``anomaly-cvae``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "…" is no reason to stop
    try:
        app(prog_name="anomaly-cvae")
    except BrokenPipeError:  # the reader of a pipe (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


if __name__ == "__main__":
    main()
