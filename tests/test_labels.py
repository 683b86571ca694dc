"""Which rows a label column calls anomalies, by every rule in which it may be read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from anomaly_cvae.errors import DataError
from anomaly_cvae.labels import ANOMALY, LEFT_OUT, NORMAL, UNKNOWN, read_labels

A, N, U, L = ANOMALY, NORMAL, UNKNOWN, LEFT_OUT


def status(cells: list[Any] | pd.Series, **rule: Any) -> list[int]:
    return read_labels(pd.Series(cells), "state", **rule).status.tolist()


# ---------------------------------------------------------------------- without a rule


@pytest.mark.parametrize(
    "cells",
    [
        [1, 0, 0, 1],
        [1.0, 0.0, 0.0, 1.0],
        [True, False, False, True],
        ["1", "0", "0", "1"],
        ["True", "False", "false", "TRUE"],
        ["yes", "no", "No", "YES"],
        ["anomaly", "normal", "Normal", "Anomalous"],
        [" anomaly", "normal ", "normal", "anomaly"],
        pd.Series([1, 0, 0, 1], dtype="Int64"),
        pd.Series([True, False, False, True], dtype="boolean"),
        pd.Series(["anomaly", "normal", "normal", "anomaly"], dtype="category"),
    ],
    ids=str,
)
def test_plain_labels_need_no_rule(cells: Any) -> None:
    assert status(cells) == [A, N, N, A]


@pytest.mark.parametrize(
    "cells",
    [
        [1, None, 0, np.nan],
        [True, None, False, None],
        ["anomaly", None, "normal", np.nan],
        pd.Series([1, pd.NA, 0, pd.NA], dtype="Int64"),
        pd.Series([True, pd.NA, False, pd.NA], dtype="boolean"),
        pd.Series(["yes", None, "no", None], dtype="category"),
    ],
    ids=str,
)
def test_a_missing_label_is_unknown_not_normal(cells: Any) -> None:
    labels = read_labels(pd.Series(cells), "state")
    assert labels.status.tolist() == [A, U, N, U]
    assert labels.is_known.tolist() == [True, False, True, False]
    assert labels.is_anomaly.tolist() == [True, False, False, False]


@pytest.mark.parametrize("cells", [[None, None], [np.nan, np.nan], pd.Series([pd.NA, pd.NA], dtype="Int64")], ids=str)
def test_a_column_without_any_value_labels_no_row_and_says_so(cells: Any) -> None:
    labels = read_labels(pd.Series(cells), "state")
    assert labels.status.tolist() == [U, U]
    assert "'state' has no value at all" in labels.rule


@pytest.mark.parametrize(("cells", "expected"), [([0, 0], [N, N]), ([1, 1], [A, A]), (["normal"] * 2, [N, N])])
def test_one_value_only_still_has_its_meaning(cells: list[Any], expected: list[int]) -> None:
    assert status(cells) == expected


def test_the_rule_says_that_no_row_is_an_anomaly() -> None:
    assert "does not occur" in read_labels(pd.Series([0, 0]), "state").rule


@pytest.mark.parametrize("cells", [["ok", "R2L", "DoS"], [0, 1, 2], [-1, 1, 1], [0.25, 1.0, 0.0], ["", "1", "0"]])
def test_values_of_unknown_meaning_are_asked_about(cells: list[Any]) -> None:
    with pytest.raises(DataError, match=r"label 'state' has the values .*--anomaly VALUE.*--normal VALUE") as caught:
        status(cells)
    assert all(str(cell) in str(caught.value) for cell in cells if isinstance(cell, (str, int)))


def test_of_many_values_only_some_are_listed() -> None:
    with pytest.raises(DataError, match="…") as caught:
        status([f"kind {i}" for i in range(1_000)])
    assert len(str(caught.value)) < 400


# ---------------------------------------------------------------------- named values


def test_named_anomalies_make_every_other_row_normal() -> None:
    labels = read_labels(pd.Series(["ok", "R2L", "DoS", "idle", None]), "state", anomaly=["R2L", "DoS"])
    assert labels.status.tolist() == [N, A, A, N, U]
    assert labels.rule == "'state' = 'R2L' or 'DoS' means an anomaly"


def test_named_normals_make_every_other_row_an_anomaly() -> None:
    labels = read_labels(pd.Series(["ok", "R2L", "DoS", "idle", None]), "state", normal=["ok", "idle"])
    assert labels.status.tolist() == [N, A, A, N, U]
    assert "'ok' or 'idle' means normal, anything else an anomaly" in labels.rule


def test_rows_that_are_neither_are_left_out() -> None:
    labels = read_labels(pd.Series(["ok", "R2L", "DoS", None]), "state", anomaly=["DoS"], normal=["ok"])
    assert labels.status.tolist() == [N, L, A, U]
    assert labels.is_known.tolist() == [True, False, True, False]
    assert "left out" in labels.rule
    assert [labels.count(s) for s in (A, N, U, L)] == [1, 1, 1, 1]


@pytest.mark.parametrize("named", [2, "2", 2.0, np.int64(2)])
@pytest.mark.parametrize("cells", [[0, 1, 2], [0.0, 1.0, 2.0], ["0", "1", "2"], pd.Series([0, 1, 2], dtype="Int64")])
def test_a_number_may_be_named_as_text_and_the_other_way_round(cells: Any, named: Any) -> None:
    assert status(cells, anomaly=[named]) == [N, N, A]


@pytest.mark.parametrize("named", [True, "True"])
def test_a_truth_value_may_be_named(named: Any) -> None:
    assert status([True, False], anomaly=[named]) == [A, N]
    assert status([True, False], normal=[named]) == [N, A]


def test_a_rule_overrides_what_the_words_say() -> None:
    assert status([1, 0], anomaly=[0]) == [N, A]


def test_a_named_value_of_a_column_with_gaps_is_found() -> None:
    assert status([3, None, 7], anomaly=["7"]) == [N, U, A]


def test_a_value_that_does_not_occur_is_named_with_those_that_do() -> None:
    with pytest.raises(DataError, match=r"label 'state' has no value 'Dos'.*DoS, R2L, ok"):
        status(["ok", "R2L", "DoS"], anomaly=["Dos"])
    with pytest.raises(DataError, match="label 'state' has no value 'OK'"):
        status(["ok", "R2L"], normal=["OK"])


def test_a_misspelt_value_among_several_does_not_pass_unnoticed() -> None:
    """Its rows would be called normal, learned from, and counted as false alarms."""
    try:
        said = read_labels(pd.Series(["ok", "R2L", "DoS"]), "state", anomaly=["R2L", "Dos"]).rule
    except DataError as error:
        said = str(error)
    assert any(words in said for words in ("no value 'Dos'", "'Dos' (does not occur", "'Dos' does not occur")), said


def test_a_value_that_is_normal_and_anomaly_is_refused_with_its_row() -> None:
    with pytest.raises(DataError, match=r"'DoS' in row 2: both normal and anomaly"):
        status(["ok", "R2L", "DoS"], anomaly=["R2L", "DoS"], normal=["ok", "DoS"])


def test_names_with_quotes_and_blanks_are_values_like_others() -> None:
    assert status(["it's", "a and b", "< x"], anomaly=["a and b"]) == [N, A, N]
    assert status(["it's", "a and b", "< x"], anomaly=["< x", "it's"]) == [A, N, A]


# ---------------------------------------------------------------------- comparisons

LIVES = [10, 25, 26, 50, 51, 75, 76, None]


@pytest.mark.parametrize(
    ("comparison", "expected"),
    [
        ("<= 25", [A, A, N, N, N, N, N, U]),
        ("< 25", [A, N, N, N, N, N, N, U]),
        (">= 75", [N, N, N, N, N, A, A, U]),
        ("> 75", [N, N, N, N, N, N, A, U]),
        ("> 50 and <= 75", [N, N, N, N, A, A, N, U]),
        ("<=25", [A, A, N, N, N, N, N, U]),
        ("  <=   2.5e1 ", [A, A, N, N, N, N, N, U]),
        ("> -1", [A, A, A, A, A, A, A, U]),
        ("< .5", [N, N, N, N, N, N, N, U]),
    ],
)
@pytest.mark.parametrize("dtype", ["float64", "Int64"])
def test_a_comparison_reads_numbers(comparison: str, expected: list[int], dtype: str) -> None:
    assert status(pd.Series(LIVES, dtype=dtype), anomaly=[comparison]) == expected


def test_a_comparison_may_say_what_is_normal() -> None:
    assert status(LIVES, normal=["> 50"]) == [A, A, A, A, N, N, N, U]


def test_two_comparisons_leave_the_rows_between_out() -> None:
    labels = read_labels(pd.Series(LIVES), "life", anomaly=["<= 25"], normal=["> 75"])
    assert labels.status.tolist() == [A, A, L, L, L, L, N, U]
    assert "<= 25" in labels.rule
    assert "> 75" in labels.rule


def test_a_comparison_may_stand_beside_named_values() -> None:
    assert status([0, 1, 2, 9], anomaly=["> 5"], normal=["0", "1"]) == [N, N, L, A]


def test_comparisons_that_overlap_are_refused_with_row_and_value() -> None:
    with pytest.raises(DataError, match=r"30(\.0)? in row 1: both normal and anomaly"):
        status([10, 30, 90], anomaly=["<= 40"], normal=["> 20"])


def test_a_comparison_of_text_is_refused_with_an_example() -> None:
    with pytest.raises(DataError, match=r"'state' must be numeric but holds text.*'ok'"):
        status(["ok", "bad"], anomaly=["<= 25"])


@pytest.mark.parametrize("wrong", ["=> 25", "<= 25 and", "<= twenty", "< 1 or > 2"])
def test_what_is_no_comparison_is_refused(wrong: str) -> None:
    with pytest.raises(DataError, match="label 'state'"):
        status([1, 2, 3], anomaly=[wrong])


def test_two_comparisons_in_a_list_are_told_how_comparisons_are_written() -> None:
    """They are no values: that the column has no value '< 10' sends the user the wrong way."""
    with pytest.raises(DataError, match="comparison"):
        status([1, 50, 99], anomaly=["< 10", "> 90"])


def test_a_column_without_any_value_has_unknown_rows_under_a_comparison_too() -> None:
    assert status([np.nan, np.nan], anomaly=["<= 25"]) == [U, U]


def test_labels_do_not_depend_on_the_index() -> None:
    cells = pd.Series([0, 2, 1, 2], index=[7, 7, 3, 3])
    assert status(cells, anomaly=["2"]) == [N, A, N, A]
    assert status(cells, anomaly=["> 1"]) == [N, A, N, A]
