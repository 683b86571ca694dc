"""Tables as they come: frames, cell types, numbers and levels."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from anomaly_cvae.errors import DataError
from anomaly_cvae.frames import canonical_level, cell_type, is_table, level_cells, numeric_cells, to_frame


def series(values: object, dtype: object = None) -> pd.Series:
    return pd.Series(values, dtype=dtype)


# ---------------------------------------------------------------------- tables


def test_frames_and_arrow_tables_are_tables_arrays_and_lists_are_not() -> None:
    frame = pd.DataFrame({"a": [1.0]})
    assert is_table(frame)
    assert is_table(pa.Table.from_pandas(frame))
    assert not is_table(frame.to_numpy())
    assert not is_table([[1.0]])
    assert not is_table(frame["a"])


def test_a_pandas_frame_passes_through_untouched() -> None:
    frame = pd.DataFrame({"a": [1.0, None], 3: ["x", "y"]})
    assert to_frame(frame) is frame


def test_an_arrow_table_becomes_a_frame_with_its_cells_and_nulls() -> None:
    table = pa.table(
        {
            "x": pa.array([0.5, None, 2.5]),
            "color": pa.array(["red", None, "blue"]).dictionary_encode(),
            "on": pa.array([True, False, None]),
        }
    )
    frame = to_frame(table)
    assert frame.columns.tolist() == ["x", "color", "on"]
    np.testing.assert_array_equal(numeric_cells(frame["x"], "x"), [0.5, np.nan, 2.5])
    assert level_cells(frame["color"], "color").levels == ("red", "blue")
    np.testing.assert_array_equal(level_cells(frame["color"], "color").codes, [0, -1, 1])
    np.testing.assert_array_equal(level_cells(frame["on"], "on").codes, [0, 1, -1])


def test_duplicated_names_are_refused_by_name_with_remedy() -> None:
    frame = pd.DataFrame([[1, 2, 3, 4, 5]], columns=["a", "b", "a", "c", "b"])
    with pytest.raises(DataError, match=r"more than once: \['a', 'b'\]; rename or drop the copies"):
        to_frame(frame)


def test_duplicated_names_of_an_arrow_table_are_refused_by_name() -> None:
    table = pa.Table.from_arrays([pa.array([1.0]), pa.array([2.0])], names=["a", "a"])
    with pytest.raises(DataError, match=r"more than once: \['a'\]"):
        to_frame(table)


# ---------------------------------------------------------------------- cell types

CELL_TYPES = {
    "int8": (series([1, 2], "int8"), "integer"),
    "uint64": (series([1, 2], "uint64"), "integer"),
    "Int64": (series([1, None], "Int64"), "integer"),
    "float16": (series([0.5], "float16"), "float"),
    "Float32": (series([0.5, None], "Float32"), "float"),
    "bool": (series([True]), "boolean"),
    "boolean": (series([True, None], "boolean"), "boolean"),
    "str": (series(["a", None]), "string"),
    "string": (series(["a", None], "string"), "string"),
    "objects: int": (series([1, None], object), "integer"),
    "objects: int and float": (series([1, 0.5, None], object), "float"),
    "objects: float": (series([0.5, None], object), "float"),
    "objects: bool": (series([True, np.nan], object), "boolean"),
    "objects: text": (series(["a", None], object), "string"),
    "objects: decimal": (series([Decimal(1), None], object), "float"),
    "objects: None": (series([None, None], object), "empty"),
    "objects: no rows": (series([], object), "empty"),
    "category of text": (series(["a", None], "category"), "string"),
    "category of integers": (series([1, 2], "category"), "integer"),
    "category of booleans": (series([True, False], "category"), "boolean"),
}


@pytest.mark.parametrize(("cells", "expected"), CELL_TYPES.values(), ids=CELL_TYPES.keys())
def test_cell_type(cells: pd.Series, expected: str) -> None:
    assert cell_type(cells, "x") == expected


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (pa.array([1, None]), "integer"),
        (pa.array([0.5, None]), "float"),
        (pa.array([True, None]), "boolean"),
        (pa.array(["a", None]), "string"),
        (pa.array(["a", None]).dictionary_encode(), "string"),
    ],
    ids=["int64", "double", "bool", "string", "dictionary"],
)
def test_cell_type_of_a_frame_backed_by_arrow(cells: pa.Array, expected: str) -> None:
    frame = pa.table({"x": cells}).to_pandas(types_mapper=pd.ArrowDtype)
    assert cell_type(frame["x"], "x") == expected


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "cells",
    [
        series([1, None, 3], "Int64"),
        series([1.0, np.nan, 3.0]),
        series([1, None, 3], "Float32"),
        series([1, None, 3], object),
        series([1, None, 3], "category"),
        series([Decimal(1), None, Decimal(3)], object),
        to_frame(pa.table({"x": pa.array([1, None, 3])}))["x"],
    ],
    ids=["Int64", "float64", "Float32", "object", "category", "decimal", "arrow"],
)
def test_numbers_come_as_float64_with_nan_for_missing(cells: pd.Series) -> None:
    values = numeric_cells(cells, "x")
    assert values.dtype == np.float64
    np.testing.assert_array_equal(values, [1.0, np.nan, 3.0])


@pytest.mark.parametrize("dtype", ["bool", "boolean", "object"])
def test_booleans_can_be_read_as_numbers(dtype: str) -> None:
    np.testing.assert_array_equal(numeric_cells(series([True, False], dtype), "x"), [1.0, 0.0])


@pytest.mark.parametrize("missing", [np.nan, None, pd.NA], ids=["NaN", "None", "NA"])
def test_a_column_of_missing_objects_is_nan_throughout(missing: object) -> None:
    assert np.isnan(numeric_cells(series([missing] * 3, object), "x")).all()


@pytest.mark.parametrize("dtype", ["float64", "Int64", "boolean", "string", "str", "category"])
def test_an_all_missing_column_is_nan_throughout_whatever_its_dtype(dtype: str) -> None:
    assert np.isnan(numeric_cells(series([None] * 3, dtype), "x")).all()


def test_no_rows_give_no_numbers() -> None:
    assert numeric_cells(series([], object), "x").shape == (0,)


def test_huge_numbers_are_kept() -> None:
    np.testing.assert_array_equal(numeric_cells(series([1e30, -1e300]), "x"), [1e30, -1e300])


@pytest.mark.parametrize(
    ("values", "shown"), [([1.0, np.nan, np.inf, -np.inf], "has inf "), ([1.0, 2.0, -np.inf, np.inf], "has -inf ")]
)
def test_infinity_is_refused_with_column_row_count_and_remedy(values: list[float], shown: str) -> None:
    with pytest.raises(DataError, match=r"column 'x' .*\(infinity\) in row 2; 2 such cell\(s\)") as caught:
        numeric_cells(series(values), "x")
    assert shown in str(caught.value)
    assert "set them to NaN" in str(caught.value)


def test_rows_are_counted_from_0_whatever_the_index() -> None:
    cells = pd.Series([1.0, np.inf], index=[70, 71])
    with pytest.raises(DataError, match="in row 1;"):
        numeric_cells(cells, "x")


@pytest.mark.parametrize("dtype", ["object", "string", "category"])
def test_text_where_numbers_were_is_refused_with_column_value_and_remedy(dtype: str) -> None:
    with pytest.raises(DataError, match="'x' must be numeric but holds text, for instance 'abc'; convert it"):
        numeric_cells(series([None, "abc"], dtype), "x")


# ---------------------------------------------------------------------- levels


@pytest.mark.parametrize("value", [1, 1.0, np.int64(1), np.float32(1.0), np.uint8(1), True], ids=lambda v: repr(v))
def test_one_is_one_level_however_it_is_stored(value: object) -> None:
    level = canonical_level(value)
    assert level == 1
    assert hash(level) == hash(1)


@pytest.mark.parametrize(
    ("value", "plain"),
    [(np.str_("a"), "a"), (np.float64(0.5), 0.5), (np.bool_(True), True), ("1", "1")],
    ids=["text", "fraction", "bool", "text that looks like a number"],
)
def test_levels_are_plain_python_values(value: object, plain: object) -> None:
    assert canonical_level(value) == plain
    assert type(canonical_level(value)) is type(plain)


@pytest.mark.parametrize("dtype", ["int64", "int8", "float64", "Int64", "Float64", "object", "category"])
def test_codes_into_trained_levels_do_not_depend_on_the_dtype(dtype: str) -> None:
    np.testing.assert_array_equal(level_cells(series([2, 1, 2], dtype), "c").recode((1, 2)), [1, 0, 1])


def test_a_decimal_is_the_level_that_its_value_is() -> None:
    cells = level_cells(series([Decimal(2), Decimal(1), Decimal("0.5")], object), "c")
    np.testing.assert_array_equal(cells.recode((0.5, 1, 2)), [2, 1, 0])


def test_text_and_the_number_it_looks_like_are_two_levels() -> None:
    np.testing.assert_array_equal(level_cells(series(["1", "2"]), "c").recode((1, 2)), [2, 2])


@pytest.mark.parametrize("dtype", ["object", "string", "category"])
def test_missing_cells_have_code_minus_one(dtype: str) -> None:
    cells = level_cells(series(["b", None, "a", "b"], dtype), "c")
    assert (cells.codes[1], cells.codes[0] == cells.codes[3]) == (-1, True)
    np.testing.assert_array_equal(cells.recode(("a", "b")), [1, -1, 0, 1])


def test_an_unknown_level_has_a_code_of_its_own() -> None:
    np.testing.assert_array_equal(level_cells(series(["z", "a", None, "y"]), "c").recode(("a", "b")), [2, 0, -1, 2])


def test_no_rows_give_no_codes() -> None:
    assert level_cells(series([], object), "c").recode(("a",)).shape == (0,)


def test_levels_of_mixed_objects_are_refused_by_name() -> None:
    with pytest.raises(DataError, match="'c' holds cells of type int and str"):
        level_cells(series([1, "a"], object), "c")
