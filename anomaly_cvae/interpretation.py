"""What a detector's parameters make of the table that it is to learn: its layout, its columns, its conditions."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from anomaly_cvae.encoding import LIKELIHOODS_OF_KIND, LIKELIHOODS_OF_PIXELS
from anomaly_cvae.errors import DataError, ParameterError
from anomaly_cvae.explain import KL
from anomaly_cvae.fitted import require_contrast
from anomaly_cvae.frames import is_table, level_cells
from anomaly_cvae.inputs import Layout, condition_frame, resolve_keys, resolve_names
from anomaly_cvae.schema import (
    Column,
    Condition,
    Name,
    Schema,
    as_attributes,
    infer_column,
    infer_condition,
    is_row_number,
    observed_classes,
)

MOST_FAULTS = 20
BETWEEN = ("anomaly_cvae", "sklearn")
"""Packages whose frames lie between a user's line and a warning."""


def read_layout(asked: Any, X: Any, features: pd.DataFrame, condition: Any) -> tuple[Layout, pd.DataFrame]:
    """How X, ``features`` as a frame, and ``condition`` are laid out, and both in one frame.

    Raises
    ------
    ParameterError, ConditionError
        If the parameters ``asked`` name columns that are not there, or twice; if ``condition`` does not fit X.
    """
    in_x = resolve_names(asked.condition_columns, features, "condition_columns")
    ignored = resolve_names(asked.ignore_columns, features, "ignore_columns")
    both = sorted(map(str, set(in_x) & set(ignored)))
    if both:
        raise ParameterError(f"{both} stand in condition_columns and in ignore_columns; keep one")
    frame, passed = features, tuple[Name, ...]()
    if condition is not None:
        extra = condition_frame(condition, len(features), features.columns)
        passed = tuple(extra.columns)
        frame = pd.concat([features, extra.set_axis(features.index)], axis=1)
    layout = Layout(tuple(features.columns), in_x, passed, ignored, is_table(X))
    return layout, frame


def read_schema(
    asked: Any, layout: Layout, features: pd.DataFrame, frame: pd.DataFrame
) -> tuple[Schema, dict[Name, str]]:
    """What every column and condition is, and the likelihoods that the parameters ``asked`` give by name.

    Raises
    ------
    DataError, ConditionError, ParameterError
        If columns cannot be used, or parameters do not go with them.
    """
    kinds = resolve_keys(asked.column_kinds, frame, "column_kinds")
    likelihoods = resolve_keys(asked.likelihoods, frame, "likelihoods")
    outside = {*layout.condition_columns, *layout.ignored}
    names = [name for name in features.columns if name not in outside]
    if KL in names:
        raise DataError(f"a column of x is called {KL!r}, as the KL in explain is; rename the column")
    if not names:
        raise ParameterError(
            f"no column is left for x: X has n_features = {features.shape[1]}, all of them conditions or ignored"
        )
    may_miss = asked.objective == "semi_supervised"
    conditions = as_attributes(
        [infer_condition(frame[name], name, kinds.get(name), may_miss) for name in layout.conditions], kinds
    )
    _check_conditions(asked, conditions)
    columns = _infer_columns(frame, names, kinds)
    _check_likelihoods(columns, likelihoods)
    cells = [level_cells(frame[c.name], c.name) for c in conditions if c.kind == "categorical"]
    schema = Schema(columns, conditions, observed_classes(cells, layout.conditions), layout.ignored)
    if asked.score_kind in ("contrast", "both"):
        require_contrast(schema)
    return schema, likelihoods


def _check_likelihoods(columns: Sequence[Column], likelihoods: Mapping[Name, str]) -> None:
    """Raise unless each likelihood that was asked for is one of its column's kind."""
    for column in columns:
        head = likelihoods.get(column.name)
        fitting = LIKELIHOODS_OF_KIND[column.kind]
        what = f"a {column.kind} column"
        if column.image is not None:
            fitting, what = LIKELIHOODS_OF_PIXELS[column.image.pixels], f"an image of {column.image.pixels} pixels"
        if head is not None and head not in fitting:
            raise ParameterError(
                f"likelihoods[{column.name!r}] is {head!r}, but {what} goes with "
                f"{' or '.join(fitting)}; set column_kinds to change its kind"
            )


def _check_conditions(asked: Any, conditions: Sequence[Condition]) -> None:
    """Raise unless the conditions are what objective, inference head, prior and networks of one class need."""
    if asked.objective == "semi_supervised" and [c.kind for c in conditions] != ["categorical"]:
        raise ParameterError(
            "objective='semi_supervised' infers one categorical condition where it is missing; there "
            f"{'are' if len(conditions) != 1 else 'is'} {[f'{c.name} ({c.kind})' for c in conditions] or 'none'}"
        )
    if asked.inference_head and not any(c.kind != "continuous" for c in conditions):
        raise ParameterError("inference_head=True infers the condition: it needs a categorical one or attributes")
    if asked.prior == "vamp" and asked.condition_on_observed:
        raise ParameterError("condition_on_observed=True learns p(z | observed): prior='vamp' has no place there")
    if asked.prior == "vamp" and any(c.kind != "categorical" for c in conditions):
        raise ParameterError("prior='vamp' has pseudo-inputs per class: conditions must be categorical")
    if asked.conditioning == "per_class" and any(c.kind != "categorical" for c in conditions):
        name, kind = next((c.name, c.kind) for c in conditions if c.kind != "categorical")
        what = "an attribute" if kind == "attribute" else kind
        raise ParameterError(
            f"condition {name!r} is {what} and has no classes: use conditioning='shared', or "
            f"column_kinds={{{name!r}: 'categorical'}}"
        )


def _infer_columns(frame: pd.DataFrame, names: Sequence[Name], kinds: Mapping[Name, str]) -> tuple[Column, ...]:
    """Every column, or what is wrong with each of those that cannot be used, all at once."""
    columns, faults = list[Column](), list[DataError]()
    for name in names:
        try:
            columns.append(infer_column(frame[name], name, kinds.get(name)))
        except DataError as fault:
            faults.append(fault)
    if len(faults) == 1:
        raise faults[0]
    if faults:
        shown = "\n".join(f"- {fault}" for fault in faults[:MOST_FAULTS])
        more = f"\n- and {len(faults) - MOST_FAULTS} more" if len(faults) > MOST_FAULTS else ""
        raise DataError(f"{len(faults)} columns cannot be used as they are:\n{shown}{more}")
    return tuple(columns)


def warn_of_row_numbers(asked: Any, schema: Schema, frame: pd.DataFrame) -> None:
    """Warn of columns that count the rows, unless the parameters ``asked`` say what they are."""
    said = asked.column_kinds or {}
    columns = [c.name for c in schema.columns if c.kind in ("real", "count") and c.name not in said]
    numbers = [name for name in columns if is_row_number(frame[name], name)]
    if numbers:
        warnings.warn(
            f"{', '.join(map(repr, numbers))}: whole numbers without a repeat, as row numbers are. New rows have "
            "new ones, which makes them unusual: leave them out (ignore_columns, --ignore); a time can be a "
            "continuous condition; or say what they are (column_kinds, --kind)",
            stacklevel=_callers_level(),
        )


def _callers_level() -> int:
    """The ``stacklevel`` of a warning at the line that called this package, past the frames of scikit-learn."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in BETWEEN:
        frame, level = frame.f_back, level + 1
    return level
