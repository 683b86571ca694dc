"""What a user may do wrong, through `CVAEDetector`: the exception says where and what to do, or a rule holds."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse
from scipy.special import logsumexp

from anomaly_cvae import CVAEDetector
from anomaly_cvae.errors import ConditionError, DataError, ParameterError
from anomaly_cvae.parameters import CHOICES, RANGES, WHOLE_FROM_ONE, check_parameters

CENTERS = {"fridge": 4.0, "furnace": 80.0, "room": 20.0}
SAME = {"rtol": 1e-5, "atol": 1e-5}  # what a float32 engine promises
SCORES = ("score_samples", "negative_elbo", "decision_function", "predict", "p_values", "calibrated_score")


def detector(**parameters: Any) -> CVAEDetector:
    tiny = {"max_steps": 30, "hidden_dims": (16,), "n_estimators": 1, "random_state": 0, "device": "cpu"}
    return CVAEDetector(**{**tiny, **parameters})


def rows(n: int = 150, seed: int = 0) -> pd.DataFrame:
    """Rows of three types whose temperature depends on the type."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(list(CENTERS), n, p=[0.5, 0.3, 0.2])
    return pd.DataFrame(
        {
            "type": kind,
            "temperature": np.array([CENTERS[k] for k in kind]) + rng.normal(size=n),
            "load": rng.normal(size=n),
            "color": rng.choice(["red", "blue"], n),
            "errors": rng.poisson(4, n),
        }
    )


def numbers(n: int = 150, seed: int = 0) -> pd.DataFrame:
    return rows(n, seed)[["temperature", "load", "errors"]]


@pytest.fixture(scope="module")
def data() -> pd.DataFrame:
    return rows()


@pytest.fixture(scope="module")
def conditional(data: pd.DataFrame) -> CVAEDetector:
    return detector(condition_columns="type").fit(data)


@pytest.fixture(scope="module")
def flagging(data: pd.DataFrame) -> CVAEDetector:
    return detector(condition_columns="type", unseen_class="anomaly", missing_condition="marginal").fit(data)


@pytest.fixture(scope="module")
def averaging(data: pd.DataFrame) -> CVAEDetector:
    return detector(condition_columns="type", unseen_class="marginal", missing_condition="marginal").fit(data)


@pytest.fixture(scope="module")
def per_class(data: pd.DataFrame) -> CVAEDetector:
    return detector(
        condition_columns="type", conditioning="per_class", unseen_class="marginal", missing_condition="marginal"
    ).fit(data)


@pytest.fixture(scope="module")
def passed(data: pd.DataFrame) -> CVAEDetector:
    return detector().fit(numbers(), condition=data["type"])


@pytest.fixture(scope="module")
def unconditional() -> CVAEDetector:
    return detector().fit(numbers())


@pytest.fixture(scope="module")
def on_array() -> CVAEDetector:
    return detector().fit(numbers().to_numpy())


def marginal_formula(det: CVAEDetector, table: pd.DataFrame, training: pd.DataFrame) -> np.ndarray:
    """-log sum_c p(c) exp(-negative ELBO(x, c)), from the public scores of every claim."""
    frequency = training["type"].value_counts(normalize=True)
    joint = [np.log(p) - det.negative_elbo(table.assign(type=name)) for name, p in frequency.items()]
    return -logsumexp(np.stack(joint), axis=0)


# ---------------------------------------------------------------------- too few rows


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("as_what", ["frame", "array", "arrow", "list"])
def test_fewer_than_two_rows_are_refused_and_counted(n: int, as_what: str) -> None:
    frame = numbers().iloc[:n]
    X = {
        "frame": lambda: frame,
        "array": lambda: frame.to_numpy(),
        "arrow": lambda: pa.Table.from_pandas(frame),
        "list": lambda: frame.to_numpy().reshape(n, 3).tolist() if n else np.empty((0, 3)),
    }[as_what]()
    with pytest.raises(ValueError, match=rf"n_samples = {n}|{n} sample\(s\)"):
        detector().fit(X)


def test_two_rows_are_enough_and_the_thresholds_promise_nothing() -> None:
    det = detector().fit(numbers(2))
    assert det.thresholds_["guarantee"].tolist() == ["none"]
    assert np.isfinite(det.score_samples(numbers(20))).all()


def test_a_class_too_small_for_its_own_network_is_refused_by_name_with_count_and_remedy(data: pd.DataFrame) -> None:
    few = pd.concat([data, data.iloc[:3].assign(type="oven")])
    with pytest.raises(DataError, match=r"class 'oven' has 3 row\(s\); .* at least 10: use conditioning='shared'"):
        detector(condition_columns="type", conditioning="per_class").fit(few)


def test_a_class_of_one_row_can_share_a_network(data: pd.DataFrame) -> None:
    few = pd.concat([data, data.iloc[:1].assign(type="oven")])
    det = detector(condition_columns="type").fit(few)
    assert det.thresholds_.loc["oven", "guarantee"] == "none"
    assert np.isfinite(det.decision_function(few)).all()


@pytest.mark.parametrize("conditioning", ["shared", "per_class"])
def test_all_rows_of_one_class_train_and_have_no_contrast(conditioning: str, data: pd.DataFrame) -> None:
    single = data.assign(type="room")
    det = detector(condition_columns="type", conditioning=conditioning).fit(single)
    assert det.thresholds_.index.tolist() == ["room", "(marginal)"]
    assert np.isfinite(det.decision_function(single)).all()
    with pytest.raises(ConditionError, match="at least two classes"):
        det.contrast(single)


# ---------------------------------------------------------------------- a class not seen in training


@pytest.mark.parametrize("method", [*SCORES, "contrast", "select", "explain", "transform", "impute"])
def test_an_unseen_class_raises_with_class_row_and_remedy(
    method: str, conditional: CVAEDetector, data: pd.DataFrame
) -> None:
    new = data.iloc[:4].assign(type=["room", "fridge", "oven", "freezer"])
    with pytest.raises(ConditionError, match=r"type is 'oven' in row 2, a class not seen in training") as caught:
        getattr(conditional, method)(new)
    for part in ("2 row(s) in all", "fridge, furnace, room", "unseen_class='anomaly'", "'marginal'"):
        assert part in str(caught.value)


def test_an_unseen_combination_of_seen_levels_is_an_unseen_class(data: pd.DataFrame) -> None:
    training = data[~((data["type"] == "room") & (data["color"] == "red"))].reset_index(drop=True)
    det = detector(condition_columns=["type", "color"]).fit(training)
    with pytest.raises(ConditionError, match=r"type, color is 'room, red' in row 1"):
        det.predict(data.iloc[:2].assign(type="room", color=["blue", "red"]))


@pytest.mark.parametrize("score_kind", ["elbo", "contrast", "both"])
def test_an_unseen_class_is_flagged_whatever_the_score(
    score_kind: str, flagging: CVAEDetector, averaging: CVAEDetector, data: pd.DataFrame
) -> None:
    typical = data.assign(type="oven")
    det = flagging.set_params(score_kind=score_kind)
    try:
        decision, verdict, p_values = det.decision_function(typical), det.predict(typical), det.p_values(typical)
        others = det.p_values(data.assign(temperature=1e6))
    finally:
        det.set_params(score_kind="elbo")
    assert (averaging.predict(typical) == 1).any(), "these rows are ordinary but for their class"
    assert (decision < 0).all()
    assert (verdict == -1).all()
    n = det.thresholds_.loc["(marginal)", "calibration_rows"]
    np.testing.assert_allclose(p_values, 1.0 / (n + 1.0))
    assert p_values.max() <= others.min()


@pytest.mark.parametrize("score_kind", ["elbo", "contrast", "both"])
def test_p_values_of_an_unseen_class_come_without_a_warning(
    score_kind: str, flagging: CVAEDetector, data: pd.DataFrame
) -> None:
    det = flagging.set_params(score_kind=score_kind)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            det.p_values(data.assign(type="oven"))
    finally:
        det.set_params(score_kind="elbo")


@pytest.mark.parametrize("name", ["flagging", "averaging", "per_class"])
def test_an_unseen_class_is_scored_by_the_marginal_formula(
    name: str, data: pd.DataFrame, request: pytest.FixtureRequest
) -> None:
    det = request.getfixturevalue(name)
    new = rows(25, seed=1)
    expected = marginal_formula(det, new, data)
    np.testing.assert_allclose(det.negative_elbo(new.assign(type="oven")), expected, **SAME)
    np.testing.assert_allclose(det.score_samples(new.assign(type="oven")), -expected, **SAME)


def test_known_rows_are_scored_alike_beside_an_unseen_class(averaging: CVAEDetector, data: pd.DataFrame) -> None:
    alone = averaging.negative_elbo(data.iloc[[0, 2]])
    beside = averaging.negative_elbo(data.iloc[:3].assign(type=[data["type"][0], "oven", data["type"][2]]))
    np.testing.assert_allclose(beside[[0, 2]], alone, **SAME)


def test_a_marginal_row_that_no_class_explains_is_flagged(averaging: CVAEDetector, data: pd.DataFrame) -> None:
    strange = data.assign(type="oven", temperature=1e4)
    assert (averaging.predict(strange) == -1).all()
    assert (averaging.predict(data.assign(type="oven")) == 1).mean() > 0.8


@pytest.mark.parametrize("policy", ["anomaly", "marginal"])
def test_an_unseen_class_beside_a_single_training_class(policy: str, data: pd.DataFrame) -> None:
    det = detector(condition_columns="type", unseen_class=policy).fit(data.assign(type="room"))
    new = data.iloc[:6].assign(type=["room", "oven"] * 3)
    np.testing.assert_allclose(det.negative_elbo(new), det.negative_elbo(new.assign(type="room")), **SAME)
    verdict, p_values = det.predict(new), det.p_values(new)
    assert np.isfinite(det.calibrated_score(new)).all()
    if policy == "anomaly":
        assert (verdict[1::2] == -1).all()
        assert p_values[1::2].max() <= p_values.min()


# ---------------------------------------------------------------------- a missing condition


@pytest.mark.parametrize("missing", [np.nan, None, pd.NA], ids=["NaN", "None", "NA"])
@pytest.mark.parametrize("method", SCORES)
def test_a_missing_condition_raises_with_row_and_remedy(
    method: str, missing: object, conditional: CVAEDetector, data: pd.DataFrame
) -> None:
    new = data.iloc[:3].assign(type=pd.Series(["room", missing, missing], dtype=object))
    with pytest.raises(ConditionError, match=r"condition is missing in row 1 \(2 row\(s\) in all\)") as caught:
        getattr(conditional, method)(new)
    assert "missing_condition='marginal'" in str(caught.value)


def test_a_missing_condition_in_training_raises_with_column_row_and_remedy(data: pd.DataFrame) -> None:
    holes = data.assign(type=data["type"].where(data.index != 5, None))
    with pytest.raises(ConditionError, match=r"condition 'type' is missing \(NaN\) in row 5; fill it or drop the row"):
        detector(condition_columns="type", missing_condition="marginal").fit(holes)


def test_a_condition_that_is_not_passed_raises_with_its_name_and_remedy(passed: CVAEDetector) -> None:
    with pytest.raises(ConditionError, match=r"fitted with condition= \(type\) .* pass condition=") as caught:
        passed.predict(numbers())
    assert "missing_condition='marginal'" in str(caught.value)


def test_a_condition_column_that_is_not_there_raises_with_its_name(
    conditional: CVAEDetector, data: pd.DataFrame
) -> None:
    with pytest.raises(ValueError, match=r"(?s)missing.*type"):
        conditional.predict(data.drop(columns="type"))


@pytest.mark.parametrize("name", ["averaging", "per_class"])
@pytest.mark.parametrize("missing", [np.nan, None], ids=["NaN", "None"])
def test_a_missing_condition_is_averaged_over_when_asked(
    name: str, missing: object, data: pd.DataFrame, request: pytest.FixtureRequest
) -> None:
    det = request.getfixturevalue(name)
    new = rows(25, seed=1)
    np.testing.assert_allclose(det.negative_elbo(new.assign(type=missing)), marginal_formula(det, new, data), rtol=1e-5)
    assert np.isfinite(det.decision_function(new.assign(type=missing))).all()


def test_a_missing_condition_is_no_unseen_class(flagging: CVAEDetector, data: pd.DataFrame) -> None:
    assert (flagging.predict(data.assign(type=None)) == 1).mean() > 0.8


def test_a_condition_that_is_not_passed_is_averaged_over_when_asked(data: pd.DataFrame) -> None:
    det = detector(missing_condition="marginal").fit(numbers(), condition=data["type"])
    frequency = data["type"].value_counts(normalize=True)
    joint = [np.log(p) - det.negative_elbo(numbers(), condition=[k] * 150) for k, p in frequency.items()]
    np.testing.assert_allclose(det.negative_elbo(numbers()), -logsumexp(np.stack(joint), axis=0), **SAME)


def test_a_condition_of_integer_name_that_is_not_passed_is_averaged_over_too(data: pd.DataFrame) -> None:
    det = detector(missing_condition="marginal").fit(numbers(), condition=data["type"].rename(0))
    assert np.isfinite(det.negative_elbo(numbers())).all()


def test_a_single_training_class_with_a_missing_condition_is_judged_by_it(data: pd.DataFrame) -> None:
    single = data.assign(type="room")
    det = detector(condition_columns="type", missing_condition="marginal").fit(single)
    np.testing.assert_array_equal(det.predict(single.assign(type=None)), det.predict(single))


def test_a_missing_continuous_condition_raises_with_name_and_row(data: pd.DataFrame) -> None:
    det = detector(condition_columns="load", missing_condition="marginal").fit(data)
    with pytest.raises(ConditionError, match=r"condition 'load' is missing \(NaN\) in row 1"):
        det.predict(data.assign(load=[0.5, np.nan] * 75))


# ---------------------------------------------------------------------- other columns than in training


def test_a_missing_column_is_refused_by_name(conditional: CVAEDetector, data: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match=r"(?s)yet now missing:\s+- load"):
        conditional.predict(data.drop(columns="load"))


def test_an_extra_column_is_refused_by_name(conditional: CVAEDetector, data: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match=r"(?s)unseen at fit time:\s+- humidity"):
        conditional.predict(data.assign(humidity=1.0))


def test_reordered_columns_are_refused_with_the_remedy(conditional: CVAEDetector, data: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="must be in the same order as they were in fit"):
        conditional.predict(data[data.columns[::-1]])


def test_reordered_columns_of_integer_name_are_never_taken_for_each_other() -> None:
    frame = numbers().set_axis([0, 1, 2], axis=1)
    det = detector().fit(frame)
    try:
        scores = det.score_samples(frame[[1, 0, 2]])
    except ValueError:
        return  # refused, as columns with names of text are
    np.testing.assert_allclose(scores, det.score_samples(frame), **SAME)


def test_the_condition_can_be_inferred_where_its_column_has_an_integer_name(data: pd.DataFrame) -> None:
    frame = data.set_axis(range(5), axis=1)
    det = detector(condition_columns=[0]).fit(frame)
    np.testing.assert_allclose(det.condition_proba(frame.drop(columns=0)), det.condition_proba(frame), atol=1e-5)


@pytest.mark.parametrize("width", [2, 4])
def test_an_array_of_another_width_is_refused_with_both_widths(width: int, on_array: CVAEDetector) -> None:
    with pytest.raises(ValueError, match=f"X has {width} features, but CVAEDetector is expecting 3 features"):
        on_array.predict(np.ones((5, width)))


@pytest.mark.parametrize("shape", [(5,), (5, 3, 2, 1, 1)])
def test_an_array_that_is_no_table_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"2D array|dim 5"):
        detector().fit(np.ones(shape))


def test_an_array_that_could_be_images_and_is_none_is_refused() -> None:
    with pytest.raises(DataError, match=r"row 0 has shape \(6, 4, 5\); an image is \(height, width\)"):
        detector().fit(np.ones((5, 6, 4, 5)))
    with pytest.raises(DataError, match=r"row 0 has pixels of type int64; use uint8"):
        detector().fit(np.ones((5, 3, 2), dtype=np.int64))


def test_a_frame_without_columns_is_refused() -> None:
    with pytest.raises(DataError, match=r"0 feature\(s\) .* minimum of 1 is required"):
        detector().fit(pd.DataFrame(index=range(5)))


def test_duplicated_column_names_are_refused_by_name(conditional: CVAEDetector, data: pd.DataFrame) -> None:
    twice = pd.concat([data, data[["load"]]], axis=1)
    with pytest.raises(DataError, match=r"more than once: \['load'\]; rename or drop the copies"):
        detector(condition_columns="type").fit(twice)
    with pytest.raises(DataError, match=r"more than once: \['load'\]"):
        conditional.predict(twice)


def test_a_column_called_kl_is_refused() -> None:
    with pytest.raises(DataError, match=r"'kl'.*rename"):
        detector().fit(numbers().rename(columns={"load": "kl"}))


# ---------------------------------------------------------------------- wrong types


@pytest.mark.parametrize("dtype", ["object", "string", "category"])
def test_text_where_numbers_were_is_refused_with_column_value_and_remedy(
    dtype: str, conditional: CVAEDetector, data: pd.DataFrame
) -> None:
    new = data.assign(temperature=pd.Series(["warm"] * 150, dtype=dtype))
    with pytest.raises(
        DataError, match=r"'temperature' must be numeric but holds text, for instance 'warm'; convert it"
    ):
        conditional.predict(new)


def test_text_in_an_array_of_numbers_is_refused_with_position_and_value(on_array: CVAEDetector) -> None:
    with pytest.raises(DataError, match=r"'x1' must be numeric but holds text, for instance 'warm'"):
        on_array.predict(np.array([[1.0, "warm", 2.0]], dtype=object))


def test_one_text_cell_among_numbers_is_refused_with_column_types_and_remedy(
    conditional: CVAEDetector, data: pd.DataFrame
) -> None:
    new = data.assign(temperature=pd.Series([*data["temperature"][:-1], "?"], dtype=object))
    with pytest.raises(DataError, match="'temperature' holds cells of type float and str; convert it to one type"):
        conditional.predict(new)
    with pytest.raises(DataError, match="'temperature' holds cells of type float and str; convert it to one type"):
        detector(condition_columns="type").fit(new)


def test_a_condition_of_mixed_type_is_refused_with_name_and_types(data: pd.DataFrame) -> None:
    with pytest.raises(DataError, match="'type' holds cells of type int and str"):
        detector(condition_columns="type").fit(data.assign(type=pd.Series([1, "a"] * 75, dtype=object)))


def test_text_asked_to_be_a_continuous_condition_is_refused_by_name(data: pd.DataFrame) -> None:
    with pytest.raises(DataError, match=r"'type' .*text.*convert it to numbers"):
        detector(condition_columns="type", column_kinds={"type": "continuous"}).fit(data)


def test_datetimes_are_refused_with_column_and_remedy_in_training_and_later(
    conditional: CVAEDetector, data: pd.DataFrame
) -> None:
    new = data.assign(load=pd.Timestamp("2024-01-01"))
    for call in (detector().fit, conditional.predict):
        with pytest.raises(DataError, match=r"'load' holds datetimes; derive numbers from it .*ignore_columns"):
            call(new)


def test_complex_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="Complex data not supported"):
        detector().fit(numbers().to_numpy() + 1j)
    with pytest.raises(DataError, match=r"'temperature' holds complex numbers; .* as two columns"):
        detector().fit(numbers() + 1j)


@pytest.mark.parametrize("form", [scipy.sparse.csr_matrix, scipy.sparse.csc_array, scipy.sparse.coo_matrix])
def test_a_sparse_matrix_is_refused_with_the_remedy(form: Any, on_array: CVAEDetector) -> None:
    sparse = form(numbers().to_numpy())
    for call in (detector().fit, on_array.predict):
        with pytest.raises(TypeError, match=r"Sparse data was passed.*dense data is required.*toarray"):
            call(sparse)


@pytest.mark.parametrize("how", ["nullable", "object", "arrow", "category", "small"])
def test_the_dtype_of_a_cell_does_not_change_its_score(how: str) -> None:
    frame = rows().assign(on=lambda t: t["load"] > 0, level=lambda t: t["errors"].clip(upper=3))
    kinds = {"level": "categorical"}
    det = detector(condition_columns="type", column_kinds=kinds).fit(frame)
    nullable = {"temperature": "Float64", "errors": "Int64", "on": "boolean", "color": "string", "type": "string"}
    other = {
        "nullable": lambda: frame.astype(nullable),
        "object": lambda: frame.astype(object),
        "arrow": lambda: pa.Table.from_pandas(frame),
        "category": lambda: frame.astype({"color": "category", "type": "category", "level": "category"}),
        "small": lambda: frame.astype({"errors": "uint8", "level": "int8"}),
    }[how]()
    np.testing.assert_array_equal(det.negative_elbo(other), det.negative_elbo(frame))
    refitted = detector(condition_columns="type", column_kinds=kinds).fit(other)
    np.testing.assert_array_equal(refitted.negative_elbo(frame), det.negative_elbo(frame))


def test_missing_cells_of_nullable_and_categorical_columns_score_like_nan(
    conditional: CVAEDetector, data: pd.DataFrame
) -> None:
    hole = data.index % 3 == 0
    plain = data.assign(
        temperature=data["temperature"].mask(hole),
        errors=data["errors"].astype(float).mask(hole),
        color=data["color"].astype(object).mask(hole, None),
    )
    nullable = plain.astype({"temperature": "Float64", "errors": "Int64", "color": "category"})
    np.testing.assert_array_equal(conditional.negative_elbo(nullable), conditional.negative_elbo(plain))
    numeric_category = plain.astype({"errors": "Int64"}).astype({"errors": "category"})
    np.testing.assert_array_equal(conditional.negative_elbo(numeric_category), conditional.negative_elbo(plain))


@pytest.mark.parametrize("wrong", [-1, 2.5], ids=["negative", "fractional"])
def test_a_count_that_is_none_is_refused_with_column_row_and_remedy(
    wrong: float, conditional: CVAEDetector, data: pd.DataFrame
) -> None:
    new = data.astype({"errors": float})
    new.loc[7, "errors"] = wrong
    with pytest.raises(DataError, match=rf"'errors' is a count but has {float(wrong)} in row 7; .*'errors': 'real'"):
        conditional.predict(new)


def test_a_level_not_seen_in_training_scores_higher(conditional: CVAEDetector, data: pd.DataFrame) -> None:
    usual, unknown = conditional.explain(data)["color"], conditional.explain(data.assign(color="pink"))["color"]
    assert (unknown > usual).all()


# ---------------------------------------------------------------------- infinite, missing, constant, huge


@pytest.mark.parametrize(("value", "shown"), [(np.inf, "has inf "), (-np.inf, "has -inf ")])
@pytest.mark.parametrize("column", ["temperature", "errors"])
def test_infinity_is_refused_with_column_row_and_remedy(
    column: str, value: float, shown: str, conditional: CVAEDetector, data: pd.DataFrame
) -> None:
    new = data.astype({column: float})
    new.loc[[7, 9], column] = value
    for call in (detector(condition_columns="type").fit, conditional.predict):
        with pytest.raises(DataError, match=rf"'{column}' {shown}.*in row 7; 2 such cell\(s\).*set them to NaN"):
            call(new)


def test_infinity_in_an_array_is_refused_with_position_and_row(on_array: CVAEDetector) -> None:
    cells = numbers().to_numpy()
    cells[5, 1] = -np.inf
    for call in (detector().fit, on_array.predict):
        with pytest.raises(DataError, match=r"'x1' has -inf .*in row 5"):
            call(cells)


def test_infinity_in_a_continuous_condition_is_refused_with_name_and_row(data: pd.DataFrame) -> None:
    holes = data.assign(load=data["load"].where(data.index != 4, np.inf))
    det = detector(condition_columns="load").fit(data)
    for call in (detector(condition_columns="load").fit, det.predict):
        with pytest.raises(DataError, match=r"'load' has inf .*in row 4"):
            call(holes)


def test_nan_marks_a_missing_cell_which_adds_nothing(conditional: CVAEDetector, data: pd.DataFrame) -> None:
    explained = conditional.explain(data.assign(temperature=np.nan))
    assert (explained["temperature"] == 0.0).all()
    np.testing.assert_allclose(
        explained.sum(axis=1), conditional.negative_elbo(data.assign(temperature=np.nan)), rtol=1e-5
    )


def test_training_copes_with_missing_cells(data: pd.DataFrame) -> None:
    holes = data.copy()
    holes.loc[holes.index % 4 == 0, ["temperature", "color"]] = None
    det = detector(condition_columns="type").fit(holes)
    assert np.isfinite(det.decision_function(holes)).all()


@pytest.mark.parametrize(
    ("dtype", "later"),
    [("float64", 3.0), ("object", 3.0), ("Int64", 3), ("string", "a"), ("object", "a"), ("boolean", True)],
)
def test_a_column_that_is_all_missing_in_training_adds_nothing(dtype: str, later: object, data: pd.DataFrame) -> None:
    empty = data.assign(extra=pd.Series([None] * len(data), dtype=dtype))
    det = detector(condition_columns="type").fit(empty)
    np.testing.assert_array_equal(det.negative_elbo(empty.assign(extra=later)), det.negative_elbo(empty))
    assert (det.predict(empty) == 1).mean() > 0.8


@pytest.mark.parametrize("missing", [np.nan, None, pd.NA], ids=["NaN", "None", "NA"])
@pytest.mark.parametrize("column", ["temperature", "color", "errors"])
def test_a_column_that_is_all_missing_at_scoring_time_adds_nothing(
    column: str, missing: object, conditional: CVAEDetector, data: pd.DataFrame
) -> None:
    new = data.assign(**{column: pd.Series([missing] * len(data), dtype=object)})
    assert (conditional.explain(new)[column] == 0.0).all()
    assert np.isfinite(conditional.decision_function(new)).all()


@pytest.mark.parametrize("dtype", ["float64", "Int64", "string", "str", "category"])
def test_a_numeric_column_may_be_all_missing_in_any_dtype(
    dtype: str, conditional: CVAEDetector, data: pd.DataFrame
) -> None:
    new = data.assign(temperature=pd.Series([None] * len(data), dtype=dtype))
    np.testing.assert_array_equal(
        conditional.negative_elbo(new), conditional.negative_elbo(data.assign(temperature=np.nan))
    )


@pytest.mark.parametrize("name", ["conditional", "per_class"])
def test_a_row_without_any_cell_says_nothing(name: str, data: pd.DataFrame, request: pytest.FixtureRequest) -> None:
    det = request.getfixturevalue(name)
    blank = data.assign(temperature=np.nan, load=np.nan, color=None, errors=np.nan)
    np.testing.assert_array_equal(det.negative_elbo(blank), 0.0)
    np.testing.assert_array_equal(det.p_values(blank), 1.0)
    np.testing.assert_array_equal(det.predict(blank), 1)


def test_a_row_without_any_cell_does_not_change_its_neighbours(conditional: CVAEDetector, data: pd.DataFrame) -> None:
    new = data.astype({"errors": float, "color": object})
    new.loc[0, ["temperature", "load", "color", "errors"]] = None
    np.testing.assert_allclose(conditional.negative_elbo(new)[1:], conditional.negative_elbo(data)[1:], **SAME)


@pytest.mark.parametrize(
    ("constant", "later"),
    [(7.0, 8.0), (0, 5), (1e30, 2e30), ("same", "other"), (True, False)],
    ids=["number", "zero", "huge", "text", "bool"],
)
def test_a_constant_column_that_varies_later_scores_clearly_higher(
    constant: object, later: object, data: pd.DataFrame
) -> None:
    training = data.assign(setting=constant)
    det = detector(condition_columns="type").fit(training)
    usual, changed = det.negative_elbo(training), det.negative_elbo(training.assign(setting=later))
    assert np.isfinite(changed).all()
    assert (changed - usual).min() > 3.0


@pytest.mark.parametrize("magnitude", [1e30, 1e-30])
def test_training_on_huge_magnitudes_gives_finite_scores_and_verdicts(magnitude: float, data: pd.DataFrame) -> None:
    huge = data.assign(temperature=data["temperature"] * magnitude, load=data["load"] * magnitude)
    det = detector(condition_columns="type").fit(huge)
    assert np.isfinite(det.negative_elbo(huge)).all()
    assert (det.predict(huge) == 1).mean() > 0.8
    nats_in_other_units = detector(condition_columns="type").fit(data).negative_elbo(data) + 2 * np.log(magnitude)
    np.testing.assert_allclose(det.negative_elbo(huge), nats_in_other_units, atol=0.1)


@pytest.mark.parametrize("value", [1e30, -1e30, 1e300])
def test_huge_magnitudes_at_scoring_time_are_finite_and_flagged(
    value: float, conditional: CVAEDetector, data: pd.DataFrame
) -> None:
    new = data.assign(temperature=value)
    for scores in (conditional.negative_elbo(new), conditional.contrast(new), conditional.explain(new).to_numpy()):
        assert np.isfinite(scores).all()
    assert (conditional.predict(new) == -1).all()


def test_a_huge_count_at_scoring_time_is_finite_and_flagged(conditional: CVAEDetector, data: pd.DataFrame) -> None:
    new = data.assign(errors=1e30)
    assert np.isfinite(conditional.negative_elbo(new)).all()
    assert (conditional.predict(new) == -1).all()


def test_one_huge_training_cell_leaves_every_score_finite(data: pd.DataFrame) -> None:
    spoilt = data.assign(load=data["load"].where(data.index != 3, 1e30))
    det = detector(condition_columns="type").fit(spoilt)
    assert np.isfinite(det.decision_function(spoilt)).all()


# ---------------------------------------------------------------------- parameters

NAN = float("nan")
NO_POSITIVE_NUMBER = [0.0, -1.0, np.inf, NAN, "1", None, True]
OUT_OF_RANGE: dict[str, list[Any]] = {
    **{name: [0, -1, 1.5, "3", None, True, NAN] for name in WHOLE_FROM_ONE},
    "false_alarm_rate": [0.0, 1.0, -0.1, 1.5, NAN, "0.1", None, True],
    "kl_weight": [-0.1, np.inf, NAN, "1", None],
    "input_noise": [-0.1, np.inf, NAN, "1", None, (), (0.1, -0.1), [0.1, "1"]],
    "mask_rate": [-0.1, 1.1, NAN, "0.1", None],
    "scale_floor": NO_POSITIVE_NUMBER,
    "learning_rate": NO_POSITIVE_NUMBER,
    "validation_fraction": [-0.1, 1.0, NAN, "0.1", None],
    "calibration_fraction": [-0.1, 1.0, NAN, "0.1", None],
    "contamination": [0.0, -0.1, 0.51, NAN, "0.1", "none", None, True],
    "latent_dim": [0, -2, 2.5, "wide", None, True],
    "hidden_dims": [64, "auto", (0,), (64, -1), (64, 2.5), (64, "32"), None],
    "channels": [16, "auto", (), (0,), (16, -1), (16, 2.5), (16, "32"), None],
    "free_bits": [-0.1, np.inf, NAN, "1", None],
    "checkpoint": [3, True, b"file", ("a", "b")],
}


def test_every_checked_parameter_has_wrong_values_here() -> None:
    assert set(OUT_OF_RANGE) == set(RANGES)


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in RANGES for value in OUT_OF_RANGE.get(name, [object()])]
)
def test_a_parameter_out_of_range_is_refused_with_name_range_and_value(name: str, value: Any) -> None:
    with pytest.raises(ParameterError) as caught:
        detector(**{name: value}).fit(numbers())
    assert str(caught.value) == f"{name} must be {RANGES[name][1]}, not {value!r}"


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for value in ("nonsense", "", None, 1, True) for name in CHOICES if value not in CHOICES[name]],
)
def test_a_word_that_is_no_choice_is_refused_with_the_choices(name: str, value: Any) -> None:
    with pytest.raises(ParameterError) as caught:
        detector(**{name: value}).fit(numbers())
    message = str(caught.value)
    assert message.startswith(f"{name} must be one of ")
    assert message.endswith(f"not {value!r}")
    assert all(repr(choice) in message for choice in CHOICES[name])


@pytest.mark.parametrize(
    "allowed",
    [
        {"false_alarm_rate": 1e-6},
        {"contamination": 0.5},
        {"contamination": np.float64(0.1)},
        {"mask_rate": 0},
        {"mask_rate": 1},
        {"kl_weight": 0},
        {"input_noise": (0,)},
        {"validation_fraction": 0, "calibration_fraction": 0},
        {"latent_dim": np.int64(1)},
        {"hidden_dims": []},
        {"n_samples": np.int32(1)},
        {"objective": "iwae", "train_samples": 2},
        {"channels": [np.int64(4)]},
        {"free_bits": 0},
        {"inference_head": np.True_},
    ],
    ids=str,
)
def test_the_edges_of_the_ranges_are_allowed(allowed: dict[str, Any]) -> None:
    check_parameters(detector(**allowed))


def test_fractions_that_leave_no_training_rows_are_refused_by_name() -> None:
    with pytest.raises(ParameterError, match="validation_fraction and calibration_fraction leave no rows"):
        detector(validation_fraction=0.5, calibration_fraction=0.5).fit(numbers())


def test_importance_weighting_of_one_sample_is_refused_with_the_remedy() -> None:
    with pytest.raises(ParameterError, match="objective='iwae' needs train_samples of at least 2"):
        detector(objective="iwae", train_samples=1).fit(numbers())


@pytest.mark.parametrize(
    ("parameters", "remedy"),
    [
        ({"objective": "semi_supervised", "conditioning": "per_class"}, "use conditioning='shared'"),
        ({"objective": "hybrid"}, "set condition_on_observed=True"),
        ({"inference_head": True, "conditioning": "per_class"}, "use conditioning='shared'"),
    ],
    ids=lambda value: str(value),
)
def test_parameters_that_do_not_go_together_are_refused_with_the_remedy(
    parameters: dict[str, Any], remedy: str, data: pd.DataFrame
) -> None:
    with pytest.raises(ParameterError) as caught:
        detector(condition_columns="type", **parameters).fit(data)
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    ("parameters", "need"),
    [
        ({"objective": "semi_supervised"}, "one categorical condition"),
        ({"inference_head": True}, "needs a categorical one or attributes"),
        ({"objective": "vae_gan"}, "for images alone"),
    ],
    ids=lambda value: str(value),
)
def test_objectives_that_the_columns_do_not_suit_are_refused_with_what_they_need(
    parameters: dict[str, Any], need: str
) -> None:
    with pytest.raises(ParameterError) as caught:
        detector(**parameters).fit(numbers())
    assert need in str(caught.value)


def test_a_device_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(ParameterError, match=r"device='gpu' .*cannot be used here"):
        detector(device="gpu").fit(numbers())


def test_a_random_state_that_is_none_is_refused_by_value() -> None:
    with pytest.raises(ValueError, match="'yesterday' cannot be used to seed"):
        detector(random_state="yesterday").fit(numbers())


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.5, NAN])
def test_rates_out_of_range_are_refused_by_name_after_training(rate: float, unconditional: CVAEDetector) -> None:
    with pytest.raises(ParameterError, match="false_discovery_rate must lie in"):
        unconditional.select(numbers(), false_discovery_rate=rate)
    with pytest.raises(ParameterError, match="false_alarm_rate must lie in"):
        unconditional.recalibrate(false_alarm_rate=rate)


# ---------------------------------------------------------------------- names of columns


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"condition_columns": "tpye"}, "condition_columns: X has no column 'tpye'; did you mean 'type'?"),
        ({"condition_columns": ["type", "colour"]}, "condition_columns: X has no column 'colour'; did you mean 'color"),
        ({"ignore_columns": "temprature"}, "ignore_columns: X has no column 'temprature'; did you mean 'temperature'?"),
        ({"column_kinds": {"error": "real"}}, "column_kinds: X has no column 'error'; did you mean 'errors'?"),
        ({"likelihoods": {"laod": "normal"}}, "likelihoods: X has no column 'laod'; did you mean 'load'?"),
    ],
    ids=["condition", "one of two conditions", "ignored", "kind", "likelihood"],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(
    parameters: dict[str, Any], message: str, data: pd.DataFrame
) -> None:
    with pytest.raises(ParameterError) as caught:
        detector(**parameters).fit(data)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("unknown", ["zzz", 17, -6])
def test_an_unknown_name_with_nothing_near_is_refused_with_the_names_there_are(
    unknown: object, data: pd.DataFrame
) -> None:
    with pytest.raises(ParameterError) as caught:
        detector(condition_columns=[unknown]).fit(data)
    assert f"X has no column {unknown!r}; there are type, temperature, load, color, errors" in str(caught.value)


@pytest.mark.parametrize("parameter", ["condition_columns", "ignore_columns"])
def test_something_that_is_no_name_is_refused_with_the_parameter(parameter: str, data: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match=parameter):
        detector(**{parameter: 3.5}).fit(data)


@pytest.mark.parametrize("parameter", ["column_kinds", "likelihoods"])
def test_a_word_for_all_columns_is_refused_with_what_is_expected(parameter: str, data: pd.DataFrame) -> None:
    with pytest.raises(ParameterError, match=f"{parameter} must be 'auto' or a dict .*, not 'normal'"):
        detector(**{parameter: "normal"}).fit(data)


def test_a_column_cannot_be_condition_and_ignored(data: pd.DataFrame) -> None:
    with pytest.raises(ParameterError, match=r"\['type'\] stand in condition_columns and in ignore_columns; keep one"):
        detector(condition_columns="type", ignore_columns=["type", "load"]).fit(data)


def test_a_table_of_conditions_only_is_refused(data: pd.DataFrame) -> None:
    with pytest.raises(ParameterError, match="no column is left for x: X has n_features = 5"):
        detector(condition_columns=["type", "color"], ignore_columns=["temperature", "load", "errors"]).fit(data)


@pytest.mark.parametrize(
    ("column", "likelihood", "fitting"),
    [
        ("temperature", "poisson", "a real column goes with robust_normal or normal or student_t"),
        ("temperature", "gaussian", "a real column goes with robust_normal or normal or student_t"),
        ("color", "bernoulli", "a categorical column goes with categorical"),
        ("errors", "normal", "a count column goes with negative_binomial or poisson"),
    ],
)
def test_a_likelihood_that_does_not_fit_the_kind_is_refused_with_those_that_do(
    column: str, likelihood: str, fitting: str, data: pd.DataFrame
) -> None:
    with pytest.raises(ParameterError) as caught:
        detector(condition_columns="type", likelihoods={column: likelihood}).fit(data)
    message = str(caught.value)
    assert message.startswith(f"likelihoods[{column!r}] is {likelihood!r}, but {fitting}")
    assert "column_kinds" in message


def test_an_unknown_kind_is_refused_with_the_kinds_there_are(data: pd.DataFrame) -> None:
    with pytest.raises(ParameterError, match=r"column_kinds\['load'\] is 'ordinal'; use one of real, binary"):
        detector(column_kinds={"load": "ordinal"}).fit(data)


# ---------------------------------------------------------------------- condition=


@pytest.mark.parametrize("length", [0, 149, 151])
def test_a_condition_of_wrong_length_is_refused_with_both_lengths(length: int, passed: CVAEDetector) -> None:
    with pytest.raises(ConditionError, match=f"condition has {length} rows but X has 150"):
        detector().fit(numbers(), condition=["a"] * length)
    with pytest.raises(ConditionError, match=f"condition has {length} rows but X has 150"):
        passed.predict(numbers(), condition=["room"] * length)


def test_a_condition_of_wrong_width_is_refused_with_both_widths(passed: CVAEDetector) -> None:
    with pytest.raises(ConditionError, match=r"condition has 2 column\(s\), fit had 1: \['type'\]"):
        passed.predict(numbers(), condition=[["room", "red"]] * 150)


@pytest.mark.parametrize("shape", [(), (150, 1, 1)])
def test_a_condition_of_wrong_dimension_is_refused(shape: tuple[int, ...], passed: CVAEDetector) -> None:
    with pytest.raises(ConditionError, match=f"condition must have one or two dimensions, not {len(shape)}"):
        passed.predict(numbers(), condition=np.zeros(shape))


def test_a_condition_that_fit_did_not_have_is_refused(unconditional: CVAEDetector, data: pd.DataFrame) -> None:
    with pytest.raises(ConditionError, match=r"condition= was passed, but fit had none; .* none at all"):
        unconditional.predict(numbers(), condition=data["type"])


def test_a_condition_beside_condition_columns_is_refused_with_their_names(
    conditional: CVAEDetector, data: pd.DataFrame
) -> None:
    with pytest.raises(ConditionError, match=r"condition= was passed, but fit had none; its conditions are \['type'\]"):
        conditional.predict(data, condition=data["type"])


def test_a_condition_that_is_also_a_column_is_refused_with_the_remedy(data: pd.DataFrame) -> None:
    with pytest.raises(ConditionError, match=r"both have \['type'\]; name it in condition_columns"):
        detector().fit(data, condition=data[["type"]])


def test_condition_columns_of_other_names_are_never_taken_for_each_other(data: pd.DataFrame) -> None:
    det = detector(unseen_class="marginal").fit(numbers(), condition=data[["type", "color"]])
    misnamed = data[["color", "type"]].rename(columns={"color": "colour"})
    with pytest.raises(ConditionError, match="colour"):
        det.predict(numbers(), condition=misnamed)


def test_condition_columns_in_another_order_are_found_by_name(data: pd.DataFrame) -> None:
    det = detector().fit(numbers(), condition=data[["type", "color"]])
    np.testing.assert_array_equal(
        det.negative_elbo(numbers(), condition=data[["color", "type"]]),
        det.negative_elbo(numbers(), condition=data[["type", "color"]]),
    )


def test_a_continuous_condition_cannot_have_a_network_per_class(data: pd.DataFrame) -> None:
    with pytest.raises(ParameterError, match="'load' is continuous and has no classes: use conditioning='shared'"):
        detector(condition_columns="load", conditioning="per_class").fit(data)


@pytest.mark.parametrize("method", ["contrast", "condition_proba"])
def test_without_a_condition_there_is_no_contrast(method: str, unconditional: CVAEDetector) -> None:
    with pytest.raises(ConditionError, match="needs a categorical condition with at least two classes"):
        getattr(unconditional, method)(numbers())


@pytest.mark.parametrize("score_kind", ["contrast", "both"])
def test_a_score_that_needs_a_contrast_is_refused_without_a_condition(score_kind: str) -> None:
    with pytest.raises(ConditionError, match="needs a categorical condition"):
        detector(score_kind=score_kind).fit(numbers()).predict(numbers())


def test_with_a_continuous_condition_there_is_no_contrast(data: pd.DataFrame) -> None:
    det = detector(condition_columns=["type", "load"]).fit(data)
    with pytest.raises(ConditionError, match="no continuous condition"):
        det.contrast(data)


# ---------------------------------------------------------------------- no rows to score


@pytest.mark.parametrize("method", [*SCORES, "contrast", "select"])
@pytest.mark.parametrize("name", ["conditional", "per_class"])
def test_no_rows_give_no_scores(name: str, method: str, data: pd.DataFrame, request: pytest.FixtureRequest) -> None:
    result = getattr(request.getfixturevalue(name), method)(data.iloc[:0])
    assert result.shape == (0,)
    assert result.dtype == getattr(request.getfixturevalue(name), method)(data.iloc[:2]).dtype


@pytest.mark.parametrize("method", ["explain", "top_columns", "condition_proba", "reconstruct", "impute"])
def test_no_rows_give_an_empty_table_with_the_usual_columns(
    method: str, conditional: CVAEDetector, data: pd.DataFrame
) -> None:
    result = getattr(conditional, method)(data.iloc[:0])
    assert len(result) == 0
    assert result.columns.tolist() == getattr(conditional, method)(data.iloc[:2]).columns.tolist()


def test_no_rows_have_no_latent_coordinates(conditional: CVAEDetector, data: pd.DataFrame) -> None:
    assert conditional.transform(data.iloc[:0]).shape == (0, conditional.transform(data.iloc[:2]).shape[1])


def test_an_empty_array_and_an_empty_condition_give_no_scores(on_array: CVAEDetector, passed: CVAEDetector) -> None:
    assert on_array.predict(np.empty((0, 3))).shape == (0,)
    assert passed.predict(numbers().iloc[:0], condition=[]).shape == (0,)
