"""Fitted tables to numbers and back."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from anomaly_cvae.encoding import LARGEST_VALUE, Encoded, Encoder
from anomaly_cvae.errors import ConditionError, DataError
from anomaly_cvae.frames import level_cells, to_frame
from anomaly_cvae.schema import Schema, infer_column, infer_condition, observed_classes


def schema_of(frame: pd.DataFrame, conditions: tuple[str, ...] = (), kinds: dict[object, str] | None = None) -> Schema:
    kinds = kinds or {}
    found = tuple(infer_condition(frame[name], name, kinds.get(name)) for name in conditions)
    columns = tuple(infer_column(frame[n], n, kinds.get(n)) for n in frame.columns if n not in conditions)
    cells = [level_cells(frame[c.name], c.name) for c in found if c.kind == "categorical"]
    return Schema(columns, found, observed_classes(cells))


def fitted(frame: pd.DataFrame, conditions: tuple[str, ...] = (), kinds: dict[object, str] | None = None) -> Encoder:
    return Encoder.fit(schema_of(frame, conditions, kinds), frame, {})


def mixed_frame(n: int = 60) -> pd.DataFrame:
    """Columns of all four kinds, interleaved so that grouping by likelihood changes their order."""
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "temperature": rng.normal(80.0, 5.0, n),
            "color": rng.choice(["red", "blue", "green"], n),
            "on": rng.random(n) < 0.5,
            "errors": rng.poisson(3, n) ** 2,
            "pressure": rng.normal(0.0, 1e-4, n),
            "size": pd.Categorical(rng.choice([10, 20], n)),
            "flag": rng.integers(0, 2, n),
        },
        index=pd.RangeIndex(100, 100 + n),
    )


def column_of(encoder: Encoder, encoded: Encoded, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Values and mask of one column, looked up by name."""
    place = [column.name for column in encoder.columns].index(name)
    return encoded.values[:, place], encoded.observed[:, place]


# ---------------------------------------------------------------------- round trips


def test_encode_then_decode_gives_the_table_back() -> None:
    frame = mixed_frame()
    encoder = fitted(frame)
    decoded = encoder.decode(encoder.encode(frame).values, frame.index)
    pd.testing.assert_frame_equal(decoded, frame, check_dtype=False, check_categorical=False, rtol=1e-9)


def test_decoded_levels_have_the_type_they_had() -> None:
    frame = mixed_frame()
    encoder = fitted(frame)
    decoded = encoder.decode(encoder.encode(frame).values)
    assert decoded["on"].dtype == bool
    assert pd.api.types.is_integer_dtype(decoded["size"])
    assert pd.api.types.is_integer_dtype(decoded["flag"])
    assert all(isinstance(cell, str) for cell in decoded["color"])


def test_columns_of_one_likelihood_stand_together_and_ungroup_restores_the_order() -> None:
    frame = mixed_frame()
    encoder = fitted(frame)
    heads = [column.likelihood for column in encoder.columns]
    assert heads == sorted(heads)
    grouped_names = np.array([column.name for column in encoder.columns])
    assert encoder.ungroup(grouped_names).tolist() == frame.columns.tolist()


def test_standardised_real_cells_have_mean_0_and_variance_1() -> None:
    frame = mixed_frame()
    encoder = fitted(frame)
    for name in ("temperature", "pressure"):
        values, _ = column_of(encoder, encoder.encode(frame), name)
        assert values.mean() == pytest.approx(0.0, abs=1e-9)
        assert values.std() == pytest.approx(1.0)


def test_counts_are_kept_as_counts() -> None:
    frame = mixed_frame()
    encoder = fitted(frame)
    values, _ = column_of(encoder, encoder.encode(frame), "errors")
    np.testing.assert_array_equal(values, frame["errors"])


def test_json_round_trip_encodes_alike_to_the_last_bit() -> None:
    frame = mixed_frame().assign(type="a", load=np.linspace(0, 1, 60))
    encoder = fitted(frame, ("type", "load"))
    read = Encoder.from_json(json.loads(json.dumps(encoder.to_json())))
    before, after = encoder.encode(frame), read.encode(frame)
    for name in ("values", "observed", "class_index", "continuous"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))


@pytest.mark.parametrize("how", ["nullable", "object", "arrow", "category"])
def test_the_dtype_of_a_table_does_not_change_its_numbers(how: str) -> None:
    frame = pd.DataFrame({"x": [0.5, np.nan, 2.0, 1.0], "n": [0, 40, 3, 9], "c": ["a", "b", None, "a"]})
    encoder = fitted(frame)
    other = {
        "nullable": lambda: frame.astype({"x": "Float64", "n": "Int64", "c": "string"}),
        "object": lambda: frame.astype(object),
        "arrow": lambda: to_frame(pa.Table.from_pandas(frame)),
        "category": lambda: frame.astype({"c": "category", "n": "category"}),
    }[how]()
    before, after = encoder.encode(frame), encoder.encode(other)
    np.testing.assert_array_equal(after.values, before.values)
    np.testing.assert_array_equal(after.observed, before.observed)


def test_columns_are_found_by_name() -> None:
    frame = mixed_frame()
    encoder = fitted(frame)
    shuffled = frame[frame.columns[::-1]].assign(ignored="whatever")
    np.testing.assert_array_equal(encoder.encode(shuffled).values, encoder.encode(frame).values)


# ---------------------------------------------------------------------- missing and unknown cells


def test_missing_cells_of_every_kind_are_masked_and_only_they() -> None:
    frame = mixed_frame().astype(object)
    rng = np.random.default_rng(1)
    hidden = rng.random(frame.shape) < 0.3
    encoder = fitted(mixed_frame())
    encoded = encoder.encode(frame.mask(hidden, None))
    np.testing.assert_array_equal(encoder.ungroup(encoded.observed), ~hidden)
    assert np.isfinite(encoded.values).all()
    np.testing.assert_array_equal(
        np.where(encoded.observed, encoded.values, 0.0),
        np.where(encoded.observed, encoder.encode(mixed_frame()).values, 0.0),
    )


def test_missing_training_cells_do_not_change_scaling() -> None:
    values = np.array([1.5, 5.5, 9.5])
    with_missing = fitted(pd.DataFrame({"x": [1.5, np.nan, 5.5, 9.5, np.nan]})).columns[0]
    assert with_missing.center == pytest.approx(values.mean())
    assert with_missing.scale == pytest.approx(values.std())
    assert with_missing.observed == 3


@pytest.mark.parametrize(
    ("training", "new", "codes"),
    [
        (["a", "b", "a"], ["b", "z", "a", "y"], [1, 2, 0, 2]),
        ([True, False], [True, False], [1, 0]),
        ([0, 1, 1], [1, 7, 0, 0.5], [1, 2, 0, 2]),
        ([True, True], [True, False], [0, 1]),
        (["same", "same"], ["same", "other"], [0, 1]),
    ],
    ids=["text", "bool", "0 and 1", "constant bool", "constant text"],
)
def test_an_unknown_level_has_the_code_after_the_last_and_is_observed(
    training: list[object], new: list[object], codes: list[int]
) -> None:
    encoded = fitted(pd.DataFrame({"x": training})).encode(pd.DataFrame({"x": new}))
    np.testing.assert_array_equal(encoded.values[:, 0], codes)
    assert encoded.observed.all()


@pytest.mark.parametrize(
    ("dtype", "later"),
    [
        ("float64", [1.0, 2.0]),
        ("object", [1.0, 2.0]),
        ("Int64", [1, 2]),
        ("string", ["a", "b"]),
        ("object", ["a", "b"]),
        ("category", ["a", "b"]),
        ("boolean", [True, False]),
    ],
)
def test_a_column_without_a_training_value_adds_nothing_whatever_comes_later(dtype: str, later: list[object]) -> None:
    frame = pd.DataFrame({"x": [1.5, 2.5, 4.0], "m": pd.Series([None] * 3, dtype=dtype)})
    encoder = fitted(frame)
    _, observed = column_of(encoder, encoder.encode(pd.DataFrame({"x": [1.5, 2.5], "m": later})), "m")
    assert not observed.any()


def test_decoding_a_column_without_a_training_value_gives_missing_cells() -> None:
    frame = pd.DataFrame({"x": [1.5, 2.5, 4.0], "m": [np.nan] * 3})
    encoder = fitted(frame)
    assert encoder.decode(encoder.encode(frame).values)["m"].isna().all()


def test_hide_hides_more_cells_and_brings_none_back() -> None:
    frame = pd.DataFrame({"x": [1.5, np.nan], "y": [2.5, 4.5]})
    encoded = fitted(frame).encode(frame)
    hidden = encoded.hide(np.array([[False, True], [False, False]]))
    np.testing.assert_array_equal(hidden.observed, [[True, False], [False, True]])
    np.testing.assert_array_equal(encoded.observed, [[True, True], [False, True]])


# ---------------------------------------------------------------------- magnitudes and constants


def test_huge_training_magnitudes_are_standardised_like_any_other() -> None:
    small = np.random.default_rng(0).normal(size=50)
    for factor in (1e30, 1e-30, 1e300):
        frame = pd.DataFrame({"x": small * factor})
        encoder = fitted(frame)
        encoded = encoder.encode(frame)
        np.testing.assert_allclose(encoded.values[:, 0], (small - small.mean()) / small.std(), rtol=1e-9)
        np.testing.assert_allclose(encoder.decode(encoded.values)["x"], frame["x"], rtol=1e-9)


@pytest.mark.parametrize("value", [1e30, 1e300, 1.7e308])
def test_huge_new_magnitudes_stay_finite_and_keep_their_sign(value: float) -> None:
    encoder = fitted(pd.DataFrame({"x": [-1.5, 0.5, 2.5]}))
    values = encoder.encode(pd.DataFrame({"x": [value, -value]})).values[:, 0]
    np.testing.assert_array_equal(values, [LARGEST_VALUE, -LARGEST_VALUE])


def test_a_huge_new_count_stays_finite() -> None:
    encoder = fitted(pd.DataFrame({"n": [0, 3, 9, 30]}))
    assert encoder.encode(pd.DataFrame({"n": [1e30]})).values[0, 0] == LARGEST_VALUE


@pytest.mark.parametrize(("constant", "scale"), [(7.0, 7e-3), (-2000.0, 2.0), (0.0, 1.0), (1e30, 1e27)])
def test_a_constant_column_has_a_thousandth_of_its_size_as_scale(constant: float, scale: float) -> None:
    column = fitted(pd.DataFrame({"x": [constant] * 5})).columns[0]
    assert column.center == pytest.approx(constant)
    assert column.scale == pytest.approx(scale)


# ---------------------------------------------------------------------- counts


@pytest.mark.parametrize(("wrong", "shown"), [(-2, "-2.0"), (1.5, "1.5")], ids=["negative", "fractional"])
def test_a_new_count_that_is_none_is_refused_with_column_row_value_and_remedy(wrong: float, shown: str) -> None:
    encoder = fitted(pd.DataFrame({"n": [0, 3, 9, 30]}))
    with pytest.raises(DataError, match=rf"'n' is a count but has {shown} in row 2; .*column_kinds={{'n': 'real'}}"):
        encoder.encode(pd.DataFrame({"n": [4, np.nan, wrong]}))


# ---------------------------------------------------------------------- conditions


def conditional_frame() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "x": [1.5, 2.5, 4.0, 0.5],
            "type": ["b", "a", "b", "a"],
            "zone": [2, 10, 2, 2],
            "load": [0.25, 0.5, 0.75, 2.5],
        }
    )


def test_class_index_counts_missing_as_minus_one_and_unseen_as_k() -> None:
    frame = conditional_frame()
    encoder = fitted(frame, ("type", "zone"))
    new = pd.DataFrame(
        {
            "x": 0.5,
            "type": ["a", "a", "b", "b", "c", None],
            "zone": [2, 10, 2, 10, 2, 2],
            "load": 0.5,
        }
    )
    encoded = encoder.encode(new)
    assert encoder.schema.classes == (("a", 2), ("a", 10), ("b", 2))
    np.testing.assert_array_equal(encoded.class_index, [0, 1, 2, 3, 3, -1])


@pytest.mark.parametrize("dtype", ["int64", "float64", "Int64", "object", "category"])
def test_a_numeric_condition_is_the_same_class_whatever_its_dtype(dtype: str) -> None:
    encoder = fitted(conditional_frame(), ("zone",))
    new = conditional_frame().assign(zone=pd.Series([10, 2, 10, 7], dtype=dtype))
    np.testing.assert_array_equal(encoder.encode(new).class_index, [1, 0, 1, 2])


def test_without_conditions_every_row_is_of_class_0() -> None:
    frame = conditional_frame()[["x", "load"]]
    encoded = fitted(frame).encode(frame)
    np.testing.assert_array_equal(encoded.class_index, [0, 0, 0, 0])
    assert encoded.continuous.shape == (4, 0)


def test_continuous_conditions_are_standardised_and_held_within_bounds() -> None:
    frame = conditional_frame()
    encoder = fitted(frame, ("type", "load"))
    encoded = encoder.encode(frame)
    assert encoded.continuous.mean() == pytest.approx(0.0, abs=1e-12)
    assert encoded.continuous.std() == pytest.approx(1.0)
    far = encoder.encode(frame.assign(load=[1e30, -1e30, 0.5, 0.5])).continuous
    assert np.isfinite(far).all()
    assert far[0, 0] > encoded.continuous.max()
    assert far[1, 0] < encoded.continuous.min()


def test_a_missing_continuous_condition_is_refused_with_name_and_row() -> None:
    encoder = fitted(conditional_frame(), ("load",))
    with pytest.raises(ConditionError, match=r"condition 'load' is missing \(NaN\) in row 2; .*never scores without"):
        encoder.encode(conditional_frame().assign(load=[0.5, 0.5, np.nan, np.nan]))


def test_without_condition_every_class_is_missing() -> None:
    encoder = fitted(conditional_frame(), ("type",))
    encoded = encoder.encode(conditional_frame().drop(columns="type"), with_condition=False)
    np.testing.assert_array_equal(encoded.class_index, [-1, -1, -1, -1])


# ---------------------------------------------------------------------- rows


def test_take_picks_rows_of_every_part() -> None:
    frame = conditional_frame()
    encoded = fitted(frame, ("type", "load")).encode(frame)
    taken = encoded.take(np.array([3, 0]))
    assert len(taken) == 2
    for name in ("values", "observed", "class_index", "continuous"):
        np.testing.assert_array_equal(getattr(taken, name), getattr(encoded, name)[[3, 0]])


def test_of_class_changes_the_claim_and_nothing_else() -> None:
    frame = conditional_frame()
    encoded = fitted(frame, ("type",)).encode(frame)
    claimed = encoded.of_class(np.array([0, 0, 1, 1]))
    np.testing.assert_array_equal(claimed.class_index, [0, 0, 1, 1])
    np.testing.assert_array_equal(claimed.values, encoded.values)


def test_no_rows_encode_to_no_rows() -> None:
    frame = conditional_frame()
    encoded = fitted(frame, ("type", "load")).encode(frame.iloc[:0])
    assert len(encoded) == 0
    assert encoded.values.shape == (0, 2)
    assert encoded.continuous.shape == (0, 1)


@pytest.mark.parametrize("kind", ["float32", "float64", "int64"])
@pytest.mark.parametrize("where", [0, 2_500, 4_999])
def test_one_cell_that_is_missing_or_far_out_changes_no_other(kind: str, where: int) -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.normal(50.0, 9.0, 5_000).astype(kind), "b": rng.normal(size=5_000)})
    schema = Schema(columns=(infer_column(frame["a"], "a"), infer_column(frame["b"], "b")))
    encoder = Encoder.fit(schema, frame, {"a": "normal", "b": "normal"})
    whole = encoder.encode(frame)
    for cell, there in ((np.nan, False), (1e30, True)):
        changed = frame.assign(a=frame["a"].astype("float64"))
        changed.loc[where, "a"] = cell
        found = encoder.encode(changed)
        others = np.arange(5_000) != where
        np.testing.assert_array_equal(found.values[others], whole.values[others])
        assert found.observed[others].all()
        assert found.observed[where].tolist() == [there, True]
        assert found.values[where, 0] == (LARGEST_VALUE if there else 0.0)
