"""What a user passes as X and condition, brought into one frame; sklearn's rules for names and shapes hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
import pandas as pd
from sklearn.utils.validation import validate_data

from anomaly_cvae.errors import ConditionError, DataError, ParameterError
from anomaly_cvae.frames import BoolArray, is_table, to_frame
from anomaly_cvae.images import as_cells, is_image, is_image_batch
from anomaly_cvae.schema import Column, Name, Schema

IMAGE = "image"
"""Name of the column that an array of images becomes."""


@dataclass(frozen=True)
class Layout:
    """How the table of `fit` was laid out, so that later tables are read, and generated ones written, alike.

    ``columns`` are X's in order; ``passed_conditions`` came as ``condition=``; ``is_frame`` says whether
    generated rows are a frame or an array.
    """

    columns: tuple[Name, ...]
    condition_columns: tuple[Name, ...]
    passed_conditions: tuple[Name, ...]
    ignored: tuple[Name, ...]
    is_frame: bool

    @property
    def conditions(self) -> tuple[Name, ...]:
        """Names of all conditions."""
        return self.condition_columns + self.passed_conditions


def feature_frame(estimator: Any, X: Any, *, reset: bool, expected: Layout | None = None) -> pd.DataFrame:
    """X as a frame, checked against what `fit` saw; columns of an array are called x0, x1, …

    An array of images, (N, H, W), (N, H, W, C) or (N, C, H, W), is one column.

    scikit-learn compares names that are text; ``expected`` compares the others too.

    Raises
    ------
    DataError, ValueError, TypeError
        For duplicated, missing, extra or reordered columns, sparse data, wrong dimensions, no rows in fit.
    """
    X = _as_array(X)
    if is_image_batch(X):
        frame = pd.DataFrame({IMAGE: as_cells(X)})
        if reset:
            estimator.n_features_in_ = 1
        elif expected is not None and expected.columns != (IMAGE,):
            raise DataError(f"X is an array of images, but fit had the columns {list(expected.columns)}")
    elif is_table(X):
        frame = to_frame(X)
        if reset or list(frame.columns) != list(getattr(estimator, "feature_names_in_", ())):
            validate_data(estimator, frame, reset=reset, skip_check_array=True)
        if frame.shape[1] == 0:
            raise DataError(f"0 feature(s) (shape={frame.shape}) while a minimum of 1 is required: X has no columns")
        if expected is not None and expected.is_frame and tuple(frame.columns) != expected.columns:
            raise DataError(
                "the columns of X must be those of fit, in the same order: "
                f"{list(expected.columns)}, not {list(frame.columns)}"
            )
    elif _holds_text(X):
        cells = np.asarray(X, dtype=object)
        if cells.ndim != 2:
            raise DataError(f"expected a 2D array, got {cells.ndim}D; reshape X to (rows, columns)")
        validate_data(estimator, cells, reset=reset, skip_check_array=True)
        frame = _named(cells).infer_objects()
    else:
        # Infinite cells are refused later, by name and row.
        cells = validate_data(
            estimator, X, reset=reset, dtype="numeric", ensure_all_finite=False, ensure_min_samples=int(reset)
        )
        frame = _named(cells)
    if reset and len(frame) < 2:
        raise DataError(f"n_samples = {len(frame)} (shape={frame.shape}); fit needs at least 2 rows")
    return frame


def _as_array(X: Any) -> Any:
    """Tensors and lists of pictures as images, masked cells of a table as missing ones; all else as it is."""
    if isinstance(X, (list, tuple)) and len(X) and is_image(X[0]):
        return as_cells(X)
    if type(X).__module__.startswith("torch"):
        return X.detach().cpu().numpy()
    if isinstance(X, np.ma.MaskedArray) and X.ndim == 2:
        text = X.dtype.kind in "OU"
        plain = np.asarray(X).astype(object if text else np.float64)
        plain[np.ma.getmaskarray(X)] = None if text else np.nan
        return plain
    return X


def _named(cells: np.ndarray[Any, np.dtype[Any]]) -> pd.DataFrame:
    return pd.DataFrame(cells, columns=[f"x{i}" for i in range(cells.shape[1])])


def _holds_text(X: Any) -> bool:
    if not isinstance(X, (np.ndarray, list)) or (isinstance(X, np.ndarray) and X.dtype.kind not in "OU"):
        return False
    return any(isinstance(cell, str) for cell in np.asarray(X, dtype=object).ravel()[:10_000])


def resolve_names(asked: Iterable[Name] | Name | None, frame: pd.DataFrame, parameter: str) -> tuple[Name, ...]:
    """Turn names or positions into names of ``frame``'s columns.

    Raises
    ------
    ParameterError
        If there is no such column; the nearest name is suggested.
    """
    if asked is None:
        return ()
    names = [asked] if isinstance(asked, (str, int, np.integer)) else asked
    if not isinstance(names, Iterable):
        raise ParameterError(f"{parameter} must be a name, a position or a list of them, not {asked!r}")
    resolved = tuple(_resolve(name, frame, parameter) for name in names)
    if len(set(resolved)) < len(resolved):
        raise ParameterError(f"{parameter} names a column twice: {list(map(str, resolved))}")
    return resolved


def _resolve(name: Name, frame: pd.DataFrame, parameter: str) -> Name:
    if name in frame.columns:
        return _plain(name)
    if isinstance(name, (int, np.integer)) and -frame.shape[1] <= name < frame.shape[1]:
        return _plain(frame.columns[int(name)])
    raise ParameterError(f"{parameter}: X has no column {name!r}{nearest(name, frame.columns)}")


def nearest(name: Name, known: Iterable[Name]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them."""
    names = [str(other) for other in known]
    near = get_close_matches(str(name), names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {shortened(names, 20)}"


def _plain(name: Any) -> Name:
    label: Name = name.item() if isinstance(name, np.generic) else name
    return label


def resolve_keys(asked: Any, frame: pd.DataFrame, parameter: str) -> dict[Name, str]:
    """The same for a mapping from columns to words.

    Raises
    ------
    ParameterError
        If it is no mapping, or names no column.
    """
    if asked is None or (isinstance(asked, str) and asked == "auto"):
        return {}
    if not isinstance(asked, Mapping):
        raise ParameterError(f"{parameter} must be 'auto' or a dict from column to word, not {asked!r}")
    return {_resolve(name, frame, parameter): word for name, word in asked.items()}


def condition_frame(condition: Any, n_rows: int, taken: Iterable[Name], names: tuple[Name, ...] = ()) -> pd.DataFrame:
    """``condition=`` as a frame; names come from it, or are ``condition``, ``condition_1``, …

    Raises
    ------
    ConditionError
        If its length, width or names are not what is needed.
    """
    frame = _as_condition_frame(condition)
    if len(frame) != n_rows:
        raise ConditionError(f"condition has {len(frame)} rows but X has {n_rows}")
    if names:
        if frame.shape[1] != len(names):
            raise ConditionError(f"condition has {frame.shape[1]} column(s), fit had {len(names)}: {list(names)}")
        if is_table(condition):
            if set(frame.columns) != set(names):
                raise ConditionError(f"condition has the columns {list(frame.columns)}, fit had {list(names)}")
            return frame[list(names)]
        return frame.set_axis(list(names), axis=1)
    clash = set(frame.columns) & set(taken)
    if clash:
        raise ConditionError(
            f"condition and X both have {sorted(map(str, clash))}; name it in condition_columns instead"
        )
    return frame


def _as_condition_frame(condition: Any) -> pd.DataFrame:
    if is_table(condition):
        return to_frame(condition).reset_index(drop=True)
    if isinstance(condition, pd.Series):
        name = condition.name if isinstance(condition.name, (str, int)) else "condition"
        return condition.reset_index(drop=True).to_frame(name)
    if hasattr(condition, "to_pandas"):
        series: pd.Series = condition.to_pandas()
        return series.reset_index(drop=True).to_frame("condition")
    cells = np.asarray(condition, dtype=None if isinstance(condition, np.ndarray) else object)
    if cells.ndim == 1:
        cells = cells[:, None]
    if cells.ndim != 2:
        raise ConditionError(f"condition must have one or two dimensions, not {cells.ndim}")
    names = ["condition", *(f"condition_{q}" for q in range(1, cells.shape[1]))]
    return pd.DataFrame(cells, columns=names[: cells.shape[1]]).infer_objects()


def given_cells(given: Any, schema: Schema, n_rows: int) -> list[BoolArray]:
    """Which cells belong to the condition: (N, cells) of every column, in the order of the schema.

    ``given`` is a mapping or a frame from columns to booleans (one, one per row, or, of an image, one per
    pixel in the axes of the image, with or without a first axis of rows); or, where the rows are images and
    nothing else, or columns and no image, the array of that.

    Raises
    ------
    DataError
        If it names no column, or has another shape.
    """
    columns = {column.name: column for column in schema.columns}
    if not isinstance(given, Mapping) and not is_table(given):
        masks = np.asarray(given)
        if len(columns) == 1:
            given = {next(iter(columns)): masks}
        elif not schema.images and masks.ndim == 2 and masks.shape[1] == len(columns):
            given = dict(zip(columns, masks.T, strict=True))
        else:
            raise DataError(f"given has shape {masks.shape}; with several columns, pass a dict from column to booleans")
    unknown = [name for name in given if name not in columns]
    if unknown:
        raise DataError(f"given: x has no column {unknown[0]!r}{nearest(unknown[0], columns)}")
    return [_given_of(column, given.get(name, False), n_rows) for name, column in columns.items()]


def _given_of(column: Column, given: Any, n_rows: int) -> BoolArray:
    """(N, cells) of one column."""
    mask = np.asarray(given)
    if mask.dtype == object:
        mask = np.stack([np.asarray(cell) for cell in mask])
    if mask.dtype != np.bool_ and not np.isin(mask, (0, 1)).all():
        raise DataError(f"given[{column.name!r}] must be booleans, not {mask.dtype}")
    mask = mask.astype(np.bool_)
    if column.image is None:
        if mask.shape not in ((), (n_rows,)):
            raise DataError(
                f"given[{column.name!r}] has shape {mask.shape}; give one boolean, or one per row ({n_rows})"
            )
        return np.broadcast_to(mask, (n_rows,))[:, None]
    channels, height, width = column.image.shape
    shape: dict[str, tuple[int, ...]] = {
        "HW": (height, width), "HWC": (height, width, channels), "CHW": (channels, height, width),
    }  # fmt: skip
    own = shape[column.image.layout]
    if mask.shape in ((height, width), (n_rows, height, width)) and column.image.layout != "HW":
        mask = mask[..., None] if column.image.layout == "HWC" else mask[..., None, :, :]
    elif mask.shape == (n_rows,):
        mask = mask.reshape(n_rows, *[1] * len(own))
    try:
        full = np.broadcast_to(mask, (n_rows, *own))
    except ValueError as error:
        raise DataError(
            f"given[{column.name!r}] has shape {mask.shape}; give {own} for all rows, or ({n_rows}, …) for each"
        ) from error
    if column.image.layout == "HWC":
        full = full.transpose(0, 3, 1, 2)
    return full.reshape(n_rows, -1)


def with_missing(frame: pd.DataFrame, names: Sequence[Name]) -> pd.DataFrame:
    """``frame`` with further columns in which every cell is missing."""
    return pd.concat([frame, pd.DataFrame(np.nan, index=frame.index, columns=list(names))], axis=1)


def check_count(value: Any, name: str, least: int = 1) -> None:
    """Raise unless ``value`` is a whole number from ``least`` up.

    Raises
    ------
    ParameterError
        Saying what it is.
    """
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise ParameterError(f"{name} must be a whole number from {least} up, not {value!r}")


def fill(cells: pd.Series, expected: pd.Series) -> pd.Series:
    """Missing cells filled; whole numbers become floats, because an expectation is one."""
    if not cells.isna().any():
        return cells
    numeric = pd.api.types.is_numeric_dtype(cells.dtype) and not pd.api.types.is_bool_dtype(cells.dtype)
    if numeric:
        cells = pd.Series(cells.to_numpy(dtype=np.float64, na_value=np.nan), index=cells.index)
    return cells.where(cells.notna(), expected)


def with_ignored(frame: pd.DataFrame, layout: Layout) -> pd.DataFrame:
    """``frame`` with the ignored columns of fit, empty where they are absent: nobody looks at them."""
    absent = set(layout.ignored) - set(frame.columns)
    expected = [name for name in layout.columns if name not in absent]
    return frame.reindex(columns=list(layout.columns)) if absent and list(frame.columns) == expected else frame


def shortened(names: list[str], most: int = 10) -> str:
    """The first names, and how many there are in all."""
    return ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "")
