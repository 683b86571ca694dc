"""What commands take: choices, arguments and options that several of them share."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Preset(StrEnum):
    """Ready sets of parameters."""

    fast = "fast"
    balanced = "balanced"
    best = "best"
    images = "images"


class ScoreKind(StrEnum):
    """What verdicts are made of."""

    elbo = "elbo"
    contrast = "contrast"
    both = "both"


class Conditioning(StrEnum):
    """One network that is told the condition, or one per class."""

    shared = "shared"
    per_class = "per_class"


class UnseenClass(StrEnum):
    """What becomes of a row whose class training has not seen."""

    anomaly = "anomaly"
    marginal = "marginal"
    refuse = "raise"


class MissingCondition(StrEnum):
    """What becomes of a row without a condition."""

    refuse = "raise"
    marginal = "marginal"


class Part(StrEnum):
    """A part of an image."""

    LEFT = "left"
    RIGHT = "right"
    UPPER = "upper"
    LOWER = "lower"
    UPPER_LEFT = "upper-left"
    UPPER_RIGHT = "upper-right"
    LOWER_LEFT = "lower-left"
    LOWER_RIGHT = "lower-right"


class OnError(StrEnum):
    """What a file that cannot be used means."""

    skip = "skip"
    fail = "fail"


class Backend(StrEnum):
    """What computes scores."""

    auto = "auto"
    torch = "torch"
    onnx = "onnx"


Data = Annotated[list[str], typer.Argument(help="Tables or pictures: files, folders or patterns.", show_default=False)]
DataOrUrls = Annotated[
    list[str],
    typer.Argument(help="Tables or pictures: files, folders, patterns, or URLs such as s3://….", show_default=False),
]
Model = Annotated[str, typer.Argument(help="Folder, runs:/ID or models:/NAME@ALIAS.", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")]
Label = Annotated[str | None, typer.Option(help="Column that says which rows are anomalies.")]
Anomaly = Annotated[
    list[str] | None, typer.Option(help="Label value that means an anomaly (repeatable), or a comparison like '<= 25'.")
]
Normal = Annotated[list[str] | None, typer.Option(help="Label value that means normal (repeatable), or a comparison.")]
Delimiter = Annotated[str | None, typer.Option(help="Of CSV files; found out unless given.")]
Encoding = Annotated[str | None, typer.Option(help="Of CSV files; found out unless given.")]
Decimal = Annotated[str | None, typer.Option(help="Decimal mark of CSV files; found out unless given.")]
Thousands = Annotated[str | None, typer.Option(help="Thousands mark of CSV files; found out unless given.")]
Missing = Annotated[MissingCondition, typer.Option(help="Rows without a condition.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
LogRows = Annotated[bool, typer.Option("--log-rows/--no-log-rows", help="Cells of rows may go into MLflow.")]
GridOrTable = Annotated[
    str,
    typer.Option(
        "--output", "-o", help="A .png grid of images, or a .parquet, .csv or .json table.", show_default=False
    ),
]
FirstRows = Annotated[
    int | None, typer.Option(min=1, help="Take the first rows only; for a .png: 10 unless said.", show_default=False)
]
Columns = Annotated[int | None, typer.Option(min=1, help="Images in a row of the grid.", show_default=False)]
Given = Annotated[
    list[str] | None,
    typer.Option("--condition", "-c", help="NAME=VALUE that holds for every row, whatever the files say; repeatable."),
]
Seed = Annotated[int, typer.Option(help="Seed.")]
Draw = Annotated[
    bool | None,
    typer.Option(
        "--draw/--mean",
        help="Cells as drawn, or as expected given z; default: --mean for a grid, --draw for a table.",
        show_default=False,
    ),
]
Track = Annotated[bool, typer.Option("--tracking/--no-tracking", help="Log an MLflow run.")]
