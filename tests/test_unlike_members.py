"""Networks of a bank that are trained unlike: each has its own settings, and parts count by their spread."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from anomaly_cvae import CVAEDetector, bundle
from anomaly_cvae.encoding import Encoded, FittedColumn
from anomaly_cvae.model import CVAE, Architecture
from anomaly_cvae.networks import has_bfloat16
from anomaly_cvae.objectives import BoundObjective, importance_weighted
from anomaly_cvae.part_weights import LEAST_ROWS_OF_SPREAD, MOST_UNEQUAL, by_spread, parts_without_units
from anomaly_cvae.rows import DeviceRows
from anomaly_cvae.settings import fit_settings
from anomaly_cvae.training import PerMember, TrainingSettings, train

COLUMNS = tuple(FittedColumn(f"x{d}", "normal", observed=100) for d in range(4))
SETTINGS = TrainingSettings(max_steps=40, batch_size=32, learning_rate=0.02, patience=100)
SMALL = {"max_steps": 120, "hidden_dims": (16,), "n_estimators": 2, "random_state": 0, "device": "cpu"}


def numbers(n_rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    z, noise = torch.randn((n_rows, 2), generator=generator), torch.randn((n_rows, 4), generator=generator)
    return z @ torch.tensor([[1.0, 0.9, 0.0, 0.1], [0.0, 0.2, 1.0, -0.9]]) + 0.2 * noise


def trained(kl_weight: PerMember, settings: TrainingSettings = SETTINGS) -> tuple[CVAE, list[tuple[float, ...]]]:
    """Two networks with the same draws of rows and noise whatever their weights are; and their losses."""
    model = CVAE(Architecture(2, 2, (8,)), COLUMNS, seed=1).double()
    data = DeviceRows(numbers(240).double(), None, None)
    training = train(
        model, data, [torch.arange(160)] * 2, [torch.arange(160, 240)] * 2, replace(settings, kl_weight=kl_weight),
        generator=torch.Generator().manual_seed(0), validation_noise=torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).double(),
    )  # fmt: skip
    return model, [epoch.validation_per_member for epoch in training.epochs]


@pytest.mark.parametrize("bound", ["elbo", "iwae"])
def test_a_member_learns_with_its_own_kl_weight_as_if_all_had_it(bound: str) -> None:
    settings = SETTINGS if bound == "elbo" else replace(SETTINGS, objective=BoundObjective(importance_weighted, 3))
    model, losses = trained((1.0, 0.1), settings)
    for place, weight in enumerate((1.0, 0.1)):
        alike, expected = trained(weight, settings)
        np.testing.assert_allclose([own[place] for own in losses], [own[place] for own in expected], rtol=1e-9)
        for one, other in zip(model.parameters(), alike.parameters(), strict=True):
            torch.testing.assert_close(one[place], other[place], rtol=1e-7, atol=1e-9)
    assert abs(losses[-1][0] - losses[-1][1]) > 0.1


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    frame = pd.DataFrame(numbers(600).numpy(), columns=list("abcd"))
    return frame.assign(type=np.where(np.arange(600) % 3 == 0, "pump", "valve"))


@pytest.fixture(scope="module")
def unlike(table: pd.DataFrame) -> CVAEDetector:
    return CVAEDetector("type", kl_weight=(1.0, 0.01), **SMALL).fit(table)


def test_each_part_counts_by_one_over_its_spread(unlike: CVAEDetector, table: pd.DataFrame) -> None:
    weights = unlike.model_.engine.part_weights.double().numpy()
    assert weights[:, 0].sum() == pytest.approx(1.0, abs=1e-6)
    rows = table.iloc[unlike.split_.validation]
    parts = unlike.model_.engine.member_parts(unlike.model_.encoder.encode(rows))
    pump = (rows["type"] == "pump").to_numpy()
    for own in (pump, ~pump):
        parts[own] -= np.median(parts[own], axis=0)
    spread = parts.clip(*np.quantile(parts, [0.05, 0.95], axis=0)).std(axis=0)
    assert spread.max() / spread.min() > 1.5
    np.testing.assert_allclose(weights * spread, weights[0, 0] * spread[0, 0], rtol=0.02)


def test_scores_columns_and_likelihoods_are_weighted_sums_of_the_members_parts(
    unlike: CVAEDetector, table: pd.DataFrame
) -> None:
    engine, rows = unlike.model_.engine, unlike.model_.encoder.encode(table)
    weights, parts = engine.part_weights.double().numpy(), engine.member_parts(rows)
    scores = unlike.negative_elbo(table)
    np.testing.assert_allclose(scores, (parts * weights).sum(axis=(1, 2)), rtol=1e-5, atol=1e-5)
    blamed = unlike.explain(table)
    np.testing.assert_allclose(blamed.sum(axis=1), scores, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(blamed["kl"], parts[:, :, 1] @ weights[:, 1], rtol=1e-5)
    alone = []
    for m in range(2):
        only = torch.zeros(2, 2)
        only[m] = 1.0
        # The weights of the KL are in relation to those of the reconstruction: not 0 / 0 for the other one.
        only[1 - m] = 1e-12
        alone.append(replace(engine, part_weights=only).negative_log_likelihood(rows, 16))
    np.testing.assert_allclose(engine.negative_log_likelihood(rows, 16), weights[:, 0] @ np.array(alone), rtol=1e-5)
    assert not np.allclose(scores, parts.sum(axis=2).mean(axis=1), rtol=1e-3)


def test_a_bank_saved_when_networks_counted_as_wholes_scores_as_it_did(
    unlike: CVAEDetector, table: pd.DataFrame, tmp_path, monkeypatch
) -> None:
    counts = torch.tensor([0.8, 0.2])
    saved = bundle._weights
    old = {**saved(unlike.model_.engine), "member_weights": counts}
    del old["part_weights"]
    monkeypatch.setattr(bundle, "_weights", lambda engine: old)
    loaded = CVAEDetector.load(unlike.save(tmp_path / "model"))
    expected = unlike.model_.engine.member_parts(unlike.model_.encoder.encode(table)).sum(axis=2) @ counts.numpy()
    np.testing.assert_allclose(loaded.negative_elbo(table), expected, rtol=1e-5, atol=1e-5)


def test_weights_are_saved_with_the_model(unlike: CVAEDetector, table: pd.DataFrame, tmp_path) -> None:
    loaded = CVAEDetector.load(unlike.save(tmp_path / "model"))
    np.testing.assert_array_equal(loaded.negative_elbo(table), unlike.negative_elbo(table))
    assert loaded.get_params()["kl_weight"] == (1.0, 0.01)


def test_onnx_runtime_weighs_members_alike(unlike: CVAEDetector, table: pd.DataFrame) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install 'anomaly_cvae[onnx]'")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install 'anomaly_cvae[onnx]'")
    rows = unlike.model_.encoder.encode(table)
    by_graphs = unlike.model_.engine.with_graphs().negative_elbo(rows)
    np.testing.assert_allclose(by_graphs, unlike.negative_elbo(table), rtol=1e-5, atol=1e-5)


def test_networks_of_each_class_share_a_weight_of_one(table: pd.DataFrame) -> None:
    fitted = CVAEDetector("type", kl_weight=(1.0, 0.01), conditioning="per_class", **SMALL).fit(table)
    weights = fitted.model_.engine.part_weights.double().numpy()[:, 0].reshape(2, 2)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=1e-6)
    assert (np.abs(weights[:, 0] - weights[:, 1]) > 0.01).all()
    assert weights[0, 0] != weights[1, 0]


def test_members_that_are_trained_alike_count_alike(table: pd.DataFrame) -> None:
    fitted = CVAEDetector("type", kl_weight=(0.5, 0.5), **SMALL).fit(table)
    assert fitted.model_.engine.part_weights is None
    one = CVAEDetector("type", kl_weight=(0.5, 0.1), **{**SMALL, "n_estimators": 1}).fit(table)
    assert one.model_.engine.part_weights is None


def test_weights_follow_the_spread_whatever_a_few_rows_do() -> None:
    scales = np.array([[1.0, 0.5], [2.0, 3.0], [10.0, 10.0]])
    parts = np.random.default_rng(0).normal(size=(400, 3, 2)) * scales + [[0.0, 9.0], [50.0, 1.0], [-7.0, 0.0]]
    weights = by_spread(parts)
    assert weights[:, 0].sum() == pytest.approx(1.0)
    np.testing.assert_allclose(weights / weights[0, 0], 1.0 / scales, rtol=0.2)
    parts[:3, 0] = 1e9
    np.testing.assert_allclose(by_spread(parts), weights, rtol=0.05)


@pytest.mark.parametrize(("spread", "expected"), [(1e-6, MOST_UNEQUAL), (0.0, 1.0), (1e6, 1.0 / MOST_UNEQUAL)])
def test_a_kl_that_hardly_moves_does_not_decide_alone(spread: float, expected: float) -> None:
    parts = np.random.default_rng(0).normal(size=(400, 1, 2)) * [1.0, spread]
    np.testing.assert_allclose(by_spread(parts), [[1.0, expected]])


def test_weights_do_not_depend_on_the_units_of_columns(table: pd.DataFrame) -> None:
    gaps = table.copy()
    gaps.loc[np.random.default_rng(0).random(600) < 0.4, "a"] = np.nan
    other = gaps.assign(a=gaps["a"] * 1e6, c=gaps["c"] / 1e3)
    # Few steps: what rounding differs by grows with each.
    few = {**SMALL, "max_steps": 30}
    fits = [CVAEDetector("type", kl_weight=(1.0, 0.01), **few).fit(own) for own in (gaps, other)]
    nats = [
        parts_without_units(fitted.model_.engine, fitted.model_.encoder.encode(own))
        for fitted, own in zip(fits, (gaps, other), strict=True)
    ]
    np.testing.assert_allclose(nats[0], nats[1], rtol=0.02, atol=0.1)
    torch.testing.assert_close(*(fitted.model_.engine.part_weights for fitted in fits), rtol=0.1, atol=0.0)


def test_units_of_a_class_are_taken_out_where_cells_are_there(table: pd.DataFrame) -> None:
    wide = table.copy()
    wide.loc[wide["type"] == "pump", "a"] *= 50.0
    wide.loc[::6, "a"] = np.nan
    wide.loc[1::5, "a"] = np.nan
    model = CVAEDetector("type", kl_weight=(1.0, 0.01), **{**SMALL, "max_steps": 5}).fit(wide).model_
    rows, engine = model.encoder.encode(wide), model.engine
    assert np.ptp(np.log(engine.scaling.scale), axis=0).max() > 0.1
    log_units = engine.model.log_units.numpy() + np.log(engine.scaling.scale)[rows.class_index]
    taken = (engine.member_parts(rows) - parts_without_units(engine, rows))[:, 0]
    np.testing.assert_allclose(taken[:, 0], (rows.observed * log_units).sum(axis=1), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(taken[:, 1], 0.0)


@pytest.mark.parametrize("validation_fraction", [0.0, 0.02])
def test_training_rows_say_how_far_parts_spread_where_few_are_held_out(
    table: pd.DataFrame, validation_fraction: float
) -> None:
    plain = CVAEDetector(
        ignore_columns=["type"], kl_weight=(1.0, 0.01), validation_fraction=validation_fraction, **SMALL
    ).fit(table)
    assert len(plain.split_.validation) < LEAST_ROWS_OF_SPREAD
    engine, rows = plain.model_.engine, plain.model_.encoder.encode(table.iloc[plain.split_.training])
    expected = by_spread(parts_without_units(engine, rows))
    np.testing.assert_allclose(engine.part_weights.numpy(), expected, rtol=1e-4)


def test_weights_of_scores_that_are_mostly_alike_follow_the_standard_deviation() -> None:
    parts = np.zeros((100, 2, 2))
    parts[:5] = np.random.default_rng(0).normal(size=(5, 2, 2)) * [[1.0, 2.0], [4.0, 8.0]]
    weights = by_spread(parts)
    np.testing.assert_allclose(weights * parts.std(axis=0), weights[0, 0] * parts[:, 0, 0].std(), rtol=1e-12)


def test_weights_that_are_alike_are_one_number(table: pd.DataFrame) -> None:
    detector = CVAEDetector("type", kl_weight=(0.5, 0.5), input_noise=(0.1, 0.1, 0.2), **SMALL).fit(table)
    training = fit_settings(detector, detector.schema_).training
    assert (training.kl_weight, training.input_noise) == (0.5, 0.1)


def test_networks_differ_by_default_where_there_is_no_condition(table: pd.DataFrame) -> None:
    few = {**SMALL, "max_steps": 5}
    plain = CVAEDetector(ignore_columns=["type"], **few).fit(table)
    assert fit_settings(plain, plain.schema_).training.kl_weight == (1.0, 0.1)
    assert plain.model_.engine.part_weights is not None
    told = CVAEDetector("type", **few).fit(table)
    assert fit_settings(told, told.schema_).training.kl_weight == 1.0
    assert told.model_.engine.part_weights is None
    seen = CVAEDetector(ignore_columns=["type"], condition_on_observed=True, **few).fit(table)
    assert seen.model_.engine.part_weights is None


@pytest.mark.parametrize("kl_weight", [(1.0, 0.01), 0.01])
def test_thresholds_allow_for_what_bfloat16_does_to_narrow_posteriors(
    table: pd.DataFrame, kl_weight: PerMember
) -> None:
    wide = {**SMALL, "hidden_dims": (32, 32, 32), "mixed_precision": True}
    fitted = CVAEDetector("type", kl_weight=kl_weight, **wide).fit(table)
    halved, rows = fitted.model_.engine, fitted.model_.encoder.encode(table)
    exact = replace(halved, precision="float32").negative_elbo(rows)
    differences = np.abs(halved.negative_elbo(rows) - exact) / (1.0 + np.abs(exact))
    assert np.quantile(differences, 0.99) <= fitted.model_.calibration.tolerance
    assert fitted.model_.calibration.tolerance >= halved.tolerance
    if has_bfloat16(torch.device("cpu")) and kl_weight == 0.01:
        assert fitted.model_.calibration.tolerance > 2.0 * halved.tolerance


@pytest.mark.parametrize("parts", [np.zeros((0, 2, 2)), np.zeros((5, 2, 2)), np.arange(3.0)[:, None, None] * np.eye(2)])
def test_parts_without_spread_say_nothing_about_weights(parts: np.ndarray) -> None:
    expected = np.full((2, 2), 0.5)
    np.testing.assert_array_equal(by_spread(parts), expected)


@pytest.mark.parametrize(
    ("kl_weight", "part_weights", "first_alone"),
    [((1.0, 0.01), "alike", True), ((1.0, 0.01), "spread", True), (1.0, "spread", False), (1.0, "alike", False)],
)
def test_who_fills_in_does_not_hang_on_how_parts_are_weighed(
    table: pd.DataFrame, kl_weight: PerMember, part_weights: str, first_alone: bool, tmp_path
) -> None:
    parameters = {**SMALL, "max_steps": 20, "kl_weight": kl_weight, "part_weights": part_weights}
    fitted = CVAEDetector("type", **parameters).fit(table)
    for engine in (fitted.model_.engine, CVAEDetector.load(fitted.save(tmp_path / "model")).model_.engine):
        rows = fitted.model_.encoder.encode(table)
        others = replace(engine, model=copy.deepcopy(engine.model))
        with torch.no_grad():
            for parameter in others.model.parameters():
                parameter[1] += 1.0
        assert np.array_equal(engine.expected(rows), others.expected(rows)) == first_alone


def test_the_first_network_fills_in_missing_cells(unlike: CVAEDetector, table: pd.DataFrame) -> None:
    gaps = table.copy()
    gaps.loc[::2, "b"] = np.nan
    engine, rows = unlike.model_.engine, unlike.model_.encoder.encode(gaps)
    others = replace(engine, model=copy.deepcopy(engine.model))
    with torch.no_grad():
        for parameter in others.model.parameters():
            parameter[1] += 1.0
    np.testing.assert_array_equal(engine.expected(rows), others.expected(rows))
    draws = [own.draw(rows, 3, own.generator(0)) for own in (engine, others)]
    np.testing.assert_array_equal(*draws)
    assert not np.array_equal(engine.negative_elbo(rows), others.negative_elbo(rows))


def test_parts_count_alike_or_by_their_spread_as_asked(table: pd.DataFrame) -> None:
    alike = CVAEDetector("type", kl_weight=(1.0, 0.01), part_weights="alike", **SMALL).fit(table)
    assert alike.model_.engine.part_weights is None
    one = CVAEDetector("type", part_weights="spread", **{**SMALL, "n_estimators": 1}).fit(table)
    parts = one.model_.engine.member_parts(one.model_.encoder.encode(table))[:, 0]
    kl = float(one.model_.engine.part_weights[0, 1])
    assert abs(kl - 1.0) > 0.05
    np.testing.assert_allclose(one.negative_elbo(table), parts[:, 0] + kl * parts[:, 1], rtol=1e-5, atol=1e-5)


def test_rows_with_gaps_are_judged_as_the_first_network_completes_them(
    unlike: CVAEDetector, table: pd.DataFrame
) -> None:
    engine, rows = unlike.model_.engine, unlike.model_.encoder.encode(table)
    gaps = np.random.default_rng(0).random(rows.values.shape) < 0.3
    hidden = rows.hide(gaps)
    filled = Encoded(
        np.where(gaps, engine.expected(hidden), rows.values), rows.observed, rows.class_index, rows.continuous, gaps
    )
    some = ~gaps.all(axis=1)
    np.testing.assert_allclose(engine.negative_elbo(hidden)[some], engine.negative_elbo(filled)[some], rtol=1e-6)
    scores = engine.column_scores(hidden)
    np.testing.assert_allclose(scores.total, engine.negative_elbo(hidden), rtol=1e-4, atol=1e-4)
    assert not scores.columns[gaps].any(), "a missing cell costs nothing"
    assert not engine.negative_elbo(hidden)[~some].any()


def test_a_gap_does_not_put_a_row_far_from_all_others() -> None:
    """Of columns that follow from one another a gap says next to nothing: anomalies elsewhere stand out as before."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(2, 6))
    normal, odd = (rng.normal(size=(n, 2)) @ mixing + 0.1 * rng.normal(size=(n, 6)) for n in (1_000, 300))
    odd[:, 0] += 2.0
    detector = CVAEDetector(hidden_dims=(32,), max_steps=400, random_state=0).fit(normal[:700])
    test, is_odd = np.concatenate([normal[700:], odd]), np.arange(600) >= 300
    with_gaps = test.copy()
    with_gaps[np.arange(600), rng.integers(1, 6, 600)] = np.nan
    whole, partly = (roc_auc_score(is_odd, detector.calibrated_score(rows)) for rows in (test, with_gaps))
    assert partly > whole - 0.02
