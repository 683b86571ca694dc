"""What columns and conditions are taken for: inference, overrides, refusals, report, JSON."""

from __future__ import annotations

import json
from datetime import date, time, timedelta
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from anomaly_cvae.errors import ConditionError, DataError, ParameterError
from anomaly_cvae.frames import level_cells, to_frame
from anomaly_cvae.schema import (
    LARGEST_COUNT,
    MAX_LEVELS,
    MAX_NUMERIC_CLASSES,
    Column,
    Condition,
    Schema,
    infer_column,
    infer_condition,
    is_row_number,
    observed_classes,
)

COUNTS = [0, 3, 1, 9, 2, 0, 30, 4]


def series(values: object, dtype: object = None) -> pd.Series:
    return pd.Series(values, dtype=dtype)


# ---------------------------------------------------------------------- kinds from dtypes

KINDS = {
    "float64": (series([0.5, -1.5, 2.25]), "real"),
    "float32": (series([0.5, -1.5, 2.25], "float32"), "real"),
    "Float64 with a missing cell": (series([0.5, None, 2.25], "Float64"), "real"),
    "whole floats": (series([float(k) for k in COUNTS]), "real"),
    "objects that are floats": (series([0.5, None, 2], object), "real"),
    "decimals": (series([Decimal("0.5"), Decimal("2.25")], object), "real"),
    "int64 spread like counts": (series(COUNTS), "count"),
    "uint8": (series(COUNTS, "uint8"), "count"),
    "Int64 with a missing cell": (series([*COUNTS, None], "Int64"), "count"),
    "objects that are whole numbers": (series([*COUNTS, None], object), "count"),
    "whole numbers, some negative": (series([*COUNTS, -1]), "real"),
    "whole numbers too large for counts": (series([0, int(LARGEST_COUNT) + 1]), "real"),
    "years": (series([2001, 2010, 2023, 2015]), "real"),
    "bool": (series([True, False, True]), "binary"),
    "boolean with a missing cell": (series([True, None, False], "boolean"), "binary"),
    "objects that are booleans": (series([True, None, False], object), "binary"),
    "int 0 and 1": (series([0, 1, 1, 0]), "binary"),
    "float 0 and 1 with a missing cell": (series([0.0, 1.0, np.nan]), "binary"),
    "str": (series(["red", "blue", "red"]), "categorical"),
    "string with a missing cell": (series(["red", None, "blue"], "string"), "categorical"),
    "object text with None": (series(["red", None, "blue"], object), "categorical"),
    "category of text": (series(["red", "blue", None], "category"), "categorical"),
    "category of numbers": (series([3, 1, 3], "category"), "categorical"),
}


@pytest.mark.parametrize(("cells", "kind"), KINDS.values(), ids=KINDS.keys())
def test_kind_is_inferred_from_the_cells(cells: pd.Series, kind: str) -> None:
    assert infer_column(cells, "x").kind == kind


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (pa.array([0.5, 1.5, None]), "real"),
        (pa.array(COUNTS), "count"),
        (pa.array([True, None, False]), "binary"),
        (pa.array(["red", None, "blue"]), "categorical"),
        (pa.array(["red", None, "blue"]).dictionary_encode(), "categorical"),
        (pa.array([Decimal("0.5"), Decimal("1.5")]), "real"),
    ],
    ids=["double", "int64", "bool", "string", "dictionary", "decimal128"],
)
def test_kind_is_inferred_from_an_arrow_column(cells: pa.Array, kind: str) -> None:
    frame = to_frame(pa.table({"x": cells}))
    assert infer_column(frame["x"], "x").kind == kind


def test_nulls_do_not_change_what_an_arrow_integer_column_is() -> None:
    frame = to_frame(pa.table({"x": pa.array([*COUNTS, None])}))
    assert infer_column(frame["x"], "x").kind == "count"


def test_row_numbers_are_told_from_other_whole_numbers() -> None:
    numbers = np.random.default_rng(0).permutation(np.arange(1000, 1100))
    assert is_row_number(series(numbers), "n")
    assert not is_row_number(series(numbers).replace(1003, 1004), "n")
    assert is_row_number(series(numbers[:60]), "n")
    assert not is_row_number(series(numbers).replace(1003, 2000), "n")
    assert not is_row_number(series(numbers.astype(float)), "n")
    assert not is_row_number(series(numbers[:20]), "n")
    assert not is_row_number(series(np.arange(40)), "n")


def test_missing_fraction_counts_missing_cells_of_every_kind() -> None:
    for cells in (series([1.5, np.nan, 2.5, None]), series(["a", None, "b", None]), series([True, None, False, None])):
        assert infer_column(cells, "x").missing_fraction == 0.5


def test_levels_are_sorted_and_leave_missing_out() -> None:
    assert infer_column(series(["pear", None, "apple", "pear"]), "x").levels == ("apple", "pear")
    assert infer_column(series([10, 9, 2], "category"), "x").levels == (2, 9, 10)
    assert infer_column(series([True, False]), "x").levels == (False, True)


def test_a_declared_category_without_rows_is_no_level() -> None:
    cells = pd.Series(pd.Categorical(["a", "b"], categories=["a", "b", "never"]))
    assert infer_column(cells, "x").levels == ("a", "b")


@pytest.mark.parametrize("value", [7, 7.5, 0, 1, 0.0], ids=str)
def test_a_constant_number_is_real_and_said_to_be_constant(value: float) -> None:
    column = infer_column(series([value] * 5), "x")
    assert (column.kind, column.reason) == ("real", "constant")


def test_a_constant_text_is_categorical_with_one_level() -> None:
    column = infer_column(series(["same"] * 5), "x")
    assert (column.kind, column.levels) == ("categorical", ("same",))


def test_a_constant_boolean_is_binary_with_one_level() -> None:
    column = infer_column(series([True] * 5), "x")
    assert (column.kind, column.levels) == ("binary", (True,))


@pytest.mark.parametrize("dtype", ["float64", "object", "Int64", "Float64", "string", "category", "boolean"])
def test_an_all_missing_column_is_said_to_add_nothing(dtype: str) -> None:
    column = infer_column(series([None] * 4, dtype), "x")
    assert column.missing_fraction == 1.0
    assert column.levels == ()
    assert column.reason == "no value in training: adds nothing to the score"


@pytest.mark.parametrize("values", [[1e30, -1e30, 2e30], [1e-30, 2e-30, 0.0], [1e300, -1e300]])
def test_huge_and_tiny_magnitudes_are_real(values: list[float]) -> None:
    assert infer_column(series(values), "x").kind == "real"


def test_huge_whole_numbers_are_real() -> None:
    assert infer_column(series([0, 10**15, 10**18]), "x").kind == "real"


# ---------------------------------------------------------------------- refusals

DATETIMES = {
    "datetime64": series(pd.to_datetime(["2020-01-01", "2021-01-01"])),
    "with time zone": series(pd.to_datetime(["2020-01-01"], utc=True)),
    "dates": series([date(2020, 1, 1)] * 2, object),
    "times of day": series([time(3, 30)] * 2, object),
    "periods": series(pd.period_range("2020", periods=2)),
    "category of datetimes": series(pd.to_datetime(["2020-01-01", "2021-01-01"])).astype("category"),
    "arrow timestamps": to_frame(pa.table({"x": pa.array([0, 1], pa.timestamp("s"))}))["x"],
}


@pytest.mark.parametrize("cells", DATETIMES.values(), ids=DATETIMES.keys())
def test_datetimes_are_refused_with_column_and_remedy(cells: pd.Series) -> None:
    with pytest.raises(DataError, match=r"'when' holds datetimes; derive numbers from it .*ignore_columns"):
        infer_column(cells, "when")


@pytest.mark.parametrize("dtype", ["timedelta64[ns]", object])
def test_durations_are_refused_with_column_and_remedy(dtype: object) -> None:
    with pytest.raises(
        DataError, match=r"'age' holds durations; turn it into a number .*total_seconds.*ignore_columns"
    ):
        infer_column(series([timedelta(hours=1), timedelta(hours=2)], dtype), "age")


@pytest.mark.parametrize(
    ("values", "types"),
    [
        ([1, "a", 2.5], "float and int and str"),
        ([True, "a"], "bool and str"),
        ([True, 2], "bool and int"),
        ([[1], [2]], "list"),
        ([b"x", b"y"], "bytes"),
    ],
    ids=["numbers and text", "booleans and text", "booleans and numbers", "lists", "bytes"],
)
def test_mixed_objects_are_refused_with_their_types_and_remedy(values: list[object], types: str) -> None:
    with pytest.raises(DataError, match=rf"'odd' holds cells of type {types}; convert it to one type .*ignore_columns"):
        infer_column(series(values, object), "odd")


def test_complex_numbers_are_refused_with_column_and_remedy() -> None:
    with pytest.raises(DataError, match=r"'z' holds complex numbers; .*real and imaginary part as two columns"):
        infer_column(series([1j, 2j]), "z")


@pytest.mark.parametrize(
    ("n_distinct", "n_rows"),
    [(200, 200), (60, 100), (MAX_LEVELS + 1, 10 * MAX_LEVELS)],
    ids=["one per row", "one per two rows", "too many levels"],
)
def test_free_text_and_identifiers_are_refused_with_column_and_remedy(n_distinct: int, n_rows: int) -> None:
    cells = series([f"id-{i % n_distinct}" for i in range(n_rows)])
    with pytest.raises(DataError, match=r"'who' looks like free text or an identifier .*distinct") as caught:
        infer_column(cells, "who")
    assert f"{n_distinct:,} distinct values in {n_rows:,} rows" in str(caught.value)
    assert "ignore_columns" in str(caught.value)
    assert "column_kinds={'who': 'categorical'}" in str(caught.value)


def test_an_identifier_can_be_forced_to_be_categorical() -> None:
    column = infer_column(series([f"id-{i}" for i in range(200)]), "who", "categorical")
    assert (column.kind, len(column.levels), column.reason) == ("categorical", 200, "asked for")


@pytest.mark.parametrize("n_distinct", [1, 50], ids=str)
def test_few_levels_are_no_free_text_however_few_the_rows(n_distinct: int) -> None:
    assert infer_column(series([f"id-{i}" for i in range(n_distinct)]), "x").kind == "categorical"


# ---------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (COUNTS, "real"),
        (COUNTS, "categorical"),
        ([float(k) for k in COUNTS], "count"),
        ([0, 1, 1], "real"),
        ([0, 1, 1], "categorical"),
        ([5.5, 7.5, 5.5], "binary"),
        (["no", "yes"], "binary"),
        ([True, False], "count"),
        ([2001, 2010], "count"),
    ],
)
def test_the_kind_asked_for_wins(values: list[object], kind: str) -> None:
    column = infer_column(series(values), "x", kind)
    assert (column.kind, column.reason) == (kind, "asked for")
    assert bool(column.levels) == (kind in ("binary", "categorical"))


def test_an_unknown_kind_is_refused_with_the_choices() -> None:
    with pytest.raises(ParameterError, match=r"column_kinds\['x'\] is 'ordinal'; use one of real, binary, categorical"):
        infer_column(series([1.5, 2.5]), "x", "ordinal")


def test_three_levels_cannot_be_binary() -> None:
    with pytest.raises(DataError, match="'x' cannot be binary: it has 3 levels"):
        infer_column(series(["a", "b", "c"]), "x", "binary")


@pytest.mark.parametrize("kind", ["real", "count"])
def test_text_cannot_be_a_number(kind: str) -> None:
    with pytest.raises(DataError, match=f"'x' holds text and cannot be {kind}; convert it to numbers"):
        infer_column(series(["a", "b"]), "x", kind)


@pytest.mark.parametrize(("wrong", "shown"), [(-2.0, "-2.0"), (1.5, "1.5")], ids=["negative", "fractional"])
def test_a_count_that_is_none_is_refused_with_row_value_and_remedy(wrong: float, shown: str) -> None:
    with pytest.raises(DataError, match=f"'n' is a count but has {shown} in row 2") as caught:
        infer_column(series([1.0, np.nan, wrong, -7.0]), "n", "count")
    assert "column_kinds={'n': 'real'}" in str(caught.value)


# ---------------------------------------------------------------------- conditions


@pytest.mark.parametrize(
    ("cells", "levels"),
    [
        (series(["b", "a", "b"]), ("a", "b")),
        (series(["b", "a"], "category"), ("a", "b")),
        (series([True, False]), (False, True)),
        (series([3, 1, 2]), (1, 2, 3)),
        (series([3.0, 1.0, 2.0]), (1, 2, 3)),
        (series([3, 1], "Int64"), (1, 3)),
        (series(range(MAX_NUMERIC_CLASSES)), tuple(range(MAX_NUMERIC_CLASSES))),
    ],
    ids=["text", "category", "bool", "int", "whole floats", "Int64", "as many numbers as may be classes"],
)
def test_text_booleans_and_few_whole_numbers_span_classes(cells: pd.Series, levels: tuple[object, ...]) -> None:
    condition = infer_condition(cells, "c")
    assert (condition.kind, condition.levels) == ("categorical", levels)


@pytest.mark.parametrize(
    "cells",
    [series([0.5, 1.0]), series(range(MAX_NUMERIC_CLASSES + 1)), series([0.25, 0.5], "Float64")],
    ids=["fractions", "many whole numbers", "Float64"],
)
def test_other_numeric_conditions_are_continuous(cells: pd.Series) -> None:
    condition = infer_condition(cells, "c")
    assert (condition.kind, condition.levels) == ("continuous", ())


def test_the_kind_of_a_condition_can_be_asked_for() -> None:
    assert infer_condition(series([1, 2, 3]), "c", "continuous").kind == "continuous"
    asked = infer_condition(series([0.5, 1.5]), "c", "categorical")
    assert (asked.kind, asked.levels, asked.reason) == ("categorical", (0.5, 1.5), "asked for")


def test_an_unknown_kind_of_condition_is_refused_with_the_choices() -> None:
    with pytest.raises(ParameterError, match=r"column_kinds\['c'\] is 'real'; .*categorical, continuous, attribute"):
        infer_condition(series([1, 2]), "c", "real")


@pytest.mark.parametrize("missing", [np.nan, None, pd.NA], ids=["NaN", "None", "NA"])
def test_a_missing_condition_is_refused_with_row_and_remedy(missing: object) -> None:
    with pytest.raises(ConditionError, match=r"condition 'c' is missing \(NaN\) in row 1; fill it or drop the row"):
        infer_condition(series(["a", missing, "b"], object), "c")


def test_an_infinite_continuous_condition_is_refused_with_row() -> None:
    with pytest.raises(DataError, match=r"'c' has inf .* in row 1"):
        infer_condition(series([0.5, np.inf, 1.5]), "c")


def test_text_asked_to_be_a_continuous_condition_is_refused_for_what_it_is() -> None:
    with pytest.raises(DataError, match=r"'c' .*text.*convert it to numbers") as caught:
        infer_condition(series(["a", "b"]), "c", "continuous")
    assert "was numeric in training" not in str(caught.value), "nothing was numeric: this is training"


# ---------------------------------------------------------------------- classes


def two_condition_frame() -> pd.DataFrame:
    return pd.DataFrame({"type": ["b", "a", "b", "a"], "zone": [2, 10, 2, 2]})


def two_condition_schema() -> Schema:
    frame = two_condition_frame()
    conditions = tuple(infer_condition(frame[name], name) for name in frame)
    classes = observed_classes([level_cells(frame[name], name) for name in frame])
    return Schema((Column("x", "real"),), conditions, classes, ("id",))


def test_classes_are_the_combinations_that_occur_sorted() -> None:
    assert two_condition_schema().classes == (("a", 2), ("a", 10), ("b", 2))
    assert two_condition_schema().class_names == ["a, 2", "a, 10", "b, 2"]


def test_without_conditions_there_is_one_class_called_all() -> None:
    schema = Schema((Column("x", "real"),))
    assert observed_classes([]) == schema.classes == ((),)
    assert schema.class_names == ["all"]


def test_class_index_of_several_conditions_marks_missing_and_unseen() -> None:
    schema = two_condition_schema()
    frame = pd.DataFrame(
        {"type": ["a", "b", "b", "c", None, "a", None], "zone": [10, 2, 10, 2, 2, np.nan, 99]},
    )
    index = schema.class_index([level_cells(frame[name], name) for name in frame])
    # ("b", 10) is a new combination of known levels, "c" a new level; a missing part wins over an unseen one.
    np.testing.assert_array_equal(index, [1, 2, 3, 3, -1, -1, -1])


def test_class_index_of_no_rows_is_empty() -> None:
    frame = two_condition_frame().iloc[:0]
    index = two_condition_schema().class_index([level_cells(frame[name], name) for name in frame])
    assert index.shape == (0,)


@pytest.mark.parametrize("dtype", ["int64", "float64", "Int64", "Float64", "object", "category", "int8"])
def test_a_numeric_class_is_the_same_whatever_its_dtype(dtype: str) -> None:
    schema = Schema((Column("x", "real"),), (Condition("c", "categorical", (1, 2)),), ((1,), (2,)))
    index = schema.class_index([level_cells(series([2, 1, 3], dtype), "c")])
    np.testing.assert_array_equal(index, [1, 0, 2])


# ---------------------------------------------------------------------- report and JSON


def test_report_says_what_every_column_and_condition_was_taken_for() -> None:
    columns = (
        infer_column(series([0.5, 1.5]), "t"),
        infer_column(series(["a", "b"]), "color"),
        infer_column(series(COUNTS), "n", "real"),
    )
    schema = Schema(columns, (infer_condition(series(["x", "y", "z"]), "type"),), (("x",),), ("id",))
    report = schema.report()
    assert report.index.tolist() == ["t", "color", "n", "type", "id"]
    assert report["role"].tolist() == ["column", "column", "column", "condition", "ignored"]
    assert report["kind"].tolist() == ["real", "categorical", "real", "categorical", ""]
    assert report["levels"].tolist() == ["", 2, "", 3, ""]
    assert report.loc["n", "reason"] == "asked for"
    assert all(report["reason"].iloc[:4])


def test_json_round_trip_keeps_everything() -> None:
    columns = (
        infer_column(series([0.5, None, 1e30]), "t"),
        infer_column(series(["b", None, "ä"]), "color"),
        infer_column(series([True, False]), 3),
        infer_column(series([0.5, 2.0], "category"), "size"),
        infer_column(series(COUNTS), "n"),
    )
    conditions = (Condition("type", "categorical", ("x", "y")), Condition("load", "continuous", (), "2 numbers"))
    schema = Schema(columns, conditions, (("x",), ("y",)), ("id", 7))
    read = Schema.from_json(json.loads(json.dumps(schema.to_json())))
    assert read == schema
    assert [type(level) for column in read.columns for level in column.levels] == [
        type(level) for column in schema.columns for level in column.levels
    ]


def test_a_schema_read_from_json_finds_classes_as_before() -> None:
    schema = two_condition_schema()
    read = Schema.from_json(json.loads(json.dumps(schema.to_json())))
    frame = pd.DataFrame({"type": ["a", "b", "z"], "zone": [10, 2, 2]})
    cells = [level_cells(frame[name], name) for name in frame]
    np.testing.assert_array_equal(read.class_index(cells), schema.class_index(cells))


def test_class_names_stay_apart_when_levels_hold_the_separator() -> None:
    schema = Schema((), (), (("a, b", "c"), ("a", "b, c")))
    assert schema.class_names == ["'a, b', 'c'", "'a', 'b, c'"]
    assert Schema((), (), (("a", "b"), ("a", "c"))).class_names == ["a, b", "a, c"]
