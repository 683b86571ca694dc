"""Where networks of a table with classes begin: factor analyses that lean on each other, and paths that hold them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import multivariate_normal

from anomaly_cvae import CVAEDetector, linear_start
from anomaly_cvae.errors import BundleError
from anomaly_cvae.factor_analysis import Moments, _covariances, factors_of, fit_classes, turned_to
from anomaly_cvae.metrics import roc_auc
from anomaly_cvae.networks import Condition, StackedMLP

NAMES = list("abcde")
SMALL = {"max_steps": 60, "hidden_dims": (16,), "n_estimators": 1, "random_state": 0, "device": "cpu"}


def covariance(seed: int, n_factors: int = 2) -> np.ndarray:
    """Unit variances, and correlations by a few factors."""
    loadings = np.random.default_rng(seed).normal(size=(5, n_factors))
    loadings *= np.sqrt(0.8 / (loadings**2).sum(axis=1, keepdims=True))
    return loadings @ loadings.T + 0.2 * np.eye(5)


def drawn(n_rows: int, seeds: tuple[int, ...], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.multivariate_normal(np.zeros(5), covariance(own), n_rows) for own in seeds]


def table(n_rows: int, seeds: tuple[int, ...] = (1, 2, 3), seed: int = 0) -> pd.DataFrame:
    parts = [
        pd.DataFrame(rows, columns=NAMES).assign(type=f"kind {place}")
        for place, rows in enumerate(drawn(n_rows, seeds, seed))
    ]
    return pd.concat(parts, ignore_index=True)


def fitted(classes: list[np.ndarray], most_factors: int = 4) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    moments = [Moments.of(rows, rng) for rows in classes]
    return [factors.covariance for factors in fit_classes(moments, most_factors, 1e-4)]


def away(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.abs(found - truth).mean())


def test_factors_give_back_the_covariance_that_they_make() -> None:
    found = factors_of(covariance(1), 2, 1e-6, steps=400)
    np.testing.assert_allclose(found.covariance, covariance(1), atol=2e-3)
    np.testing.assert_allclose(found.noise, 0.2, atol=5e-3)
    within = found.loadings.T @ (found.loadings / found.noise[:, None])
    np.testing.assert_allclose(within, np.diag(found.precision - 1.0), atol=1e-8)


def test_factors_read_what_a_row_says_of_them() -> None:
    found = factors_of(covariance(1), 2, 1e-6)
    rows = np.random.default_rng(0).normal(size=(7, 5))
    exact = rows @ np.linalg.solve(found.covariance, found.loadings)
    np.testing.assert_allclose(rows @ found.readings, exact, atol=1e-9)


def test_classes_of_many_rows_keep_their_own_covariance() -> None:
    for found, seed in zip(fitted(drawn(3000, (1, 2, 3))), (1, 2, 3), strict=True):
        assert away(found, covariance(seed)) < 0.03


def test_classes_that_are_alike_share_what_they_know() -> None:
    """Ten rows say little of fifteen numbers; those of eight classes that are alike say much of the same."""
    classes = drawn(10, (1,) * 8)
    alone = np.mean([away(rows.T @ rows / 10, covariance(1)) for rows in classes])
    together = np.mean([away(found, covariance(1)) for found in fitted(classes)])
    assert together < 0.6 * alone


def test_columns_that_do_not_depend_on_each_other_get_no_factors() -> None:
    rng = np.random.default_rng(0)
    for found in fitted([rng.normal(size=(200, 5)) for _ in range(3)]):
        assert np.abs(found - np.diag(np.diag(found))).max() < 0.05


def test_missing_cells_do_not_shrink_variances() -> None:
    rows = drawn(4000, (1,))[0]
    rows[np.random.default_rng(0).random(rows.shape) < 0.5] = np.nan
    outer, n_rows = Moments.of(rows, np.random.default_rng(0)).without(None)
    np.testing.assert_allclose(np.diag(outer) / n_rows, 1.0, atol=0.08)


def test_a_constant_column_has_the_least_noise_and_nothing_breaks() -> None:
    rows = drawn(300, (1, 2))
    for own in rows:
        own[:, 2] = 0.0
    for found in fitted(rows):
        assert 0.0 < found[2, 2] < 1e-3
        assert np.isfinite(found).all()
        assert np.linalg.eigvalsh(found).min() > 0.0


def test_turned_factors_make_the_same_rows_and_resemble_the_others() -> None:
    own, other = (factors_of(covariance(seed), 2, 1e-6) for seed in (1, 2))
    turned = turned_to(own, other)
    np.testing.assert_allclose(turned.covariance, own.covariance, atol=1e-12)
    np.testing.assert_allclose(turned.readings, np.linalg.solve(own.covariance, turned.loadings), atol=1e-9)
    exact = np.linalg.inv(np.eye(2) - turned.loadings.T @ turned.readings)
    np.testing.assert_allclose(turned.precision, np.diag(exact), rtol=1e-9)
    apart = [np.linalg.norm(one.loadings - other.loadings) for one in (own, turned)]
    assert apart[1] < apart[0]
    flipped = own.loadings[:, ::-1] * [-1.0, 1.0]
    mixed = turned_to(own, replace(other, loadings=flipped, noise=own.noise))
    np.testing.assert_allclose(mixed.loadings, flipped, atol=1e-9)


def test_a_row_keeps_its_style_under_another_class() -> None:
    """Two factors that both classes have, of which one varies more in the one class and one in the other."""
    rng = np.random.default_rng(0)
    of_b = np.arange(1000) % 2 == 1
    style = rng.normal(size=(1000, 2))
    loadings = np.repeat(np.eye(2), 3, axis=1)
    cells = style * np.where(of_b[:, None], [0.8, 1.0], [1.0, 0.8]) @ loadings + 0.4 * rng.normal(size=(1000, 6))
    rows = pd.DataFrame(cells + 3.0 * of_b[:, None], columns=list("abcdef")).assign(type=np.where(of_b, "B", "A"))
    detector = CVAEDetector("type", **{**SMALL, "max_steps": 200, "hidden_dims": (32,), "random_state": 1}).fit(rows)
    edited = detector.edit(rows[~of_b], condition_to="B")[list("abcdef")].to_numpy()
    for place, columns in enumerate((slice(0, 3), slice(3, 6))):
        assert np.corrcoef(edited[:, columns].mean(axis=1), style[~of_b, place])[0, 1] > 0.85


def test_the_pooled_covariance_leans_on_independent_columns() -> None:
    moments = [Moments.of(rows, np.random.default_rng(0)) for rows in drawn(200, (1, 1))]
    free, leaning = (_covariances(moments, None, 1e6, diagonal, 1e-4)[0] for diagonal in (0.0, 1e6))
    off = ~np.eye(5, dtype=bool)
    assert np.abs(free[off]).mean() > 0.1
    assert np.abs(leaning[off]).max() < 1e-3
    np.testing.assert_allclose(np.diag(leaning), np.diag(free), rtol=1e-6)


def test_the_start_knows_training_noise_and_missing_cells(monkeypatch) -> None:
    """Noise is a part of every variance; what is missing is none of the moments."""
    asked = []
    monkeypatch.setattr(linear_start, "fit_classes", lambda *args: asked.append(args) or fit_classes(*args))
    rows = table(400)
    rows.loc[np.random.default_rng(0).random(len(rows)) < 0.5, "a"] = np.nan
    still(input_noise=0.5).fit(rows)
    moments, _, least_noise = asked[0]
    assert least_noise == pytest.approx(0.25)
    for own in moments:
        outer, n_rows = own.without(None)
        np.testing.assert_allclose(np.diag(outer) / n_rows, 1.0, atol=0.25)


def still(**parameters: object) -> CVAEDetector:
    """A detector whose training changes nothing."""
    return CVAEDetector("type", **{**SMALL, "max_steps": 1, "learning_rate": 1e-12, **parameters})


@pytest.mark.parametrize("conditioning", ["shared", "per_class"])
def test_networks_begin_at_the_density_of_the_factor_analysis(conditioning: str, monkeypatch) -> None:
    """Without hidden layers and training, the negative ELBO is minus the log-density of a normal distribution.

    Of factors that are not turned: given a row, turned ones depend on each other, which q(z | x, c) leaves out.
    """
    monkeypatch.setattr(linear_start, "HIDDEN_START", 0.0)
    monkeypatch.setattr(linear_start, "turned_to", lambda factors, _: factors)
    found = []
    monkeypatch.setattr(linear_start, "fit_classes", lambda *args: found.append(fit_classes(*args)) or found[-1])
    rows = table(400)
    # Columns of other kinds stand before and behind those that factors are of, and add nothing: they are missing.
    rows = rows.assign(colour=np.where(rows.index % 2, "red", "blue"), kind=rows.index % 7 % 3, torque=rows["a"])
    detector = still(
        conditioning=conditioning, prior="standard", n_samples=512, dtype="float64", mask_rate=0.0,
        likelihoods={**dict.fromkeys(NAMES, "normal"), "torque": "student_t", "kind": "poisson"},
        column_kinds={"kind": "count"},
    ).fit(rows)  # fmt: skip
    engine, encoder = detector.model_.engine, detector.model_.encoder
    normal = np.array([column.likelihood == "normal" for column in encoder.columns])
    assert not normal[0]
    assert not normal[-1]
    encoded = encoder.encode(rows)
    parts = engine.column_scores(encoded)
    values = engine.scaling.to_class_units(encoded.values, encoded.class_index)[:, normal]
    for k, factors in enumerate(found[0]):
        own = np.flatnonzero((encoded.class_index == k) & (np.abs(values) < 2.9).all(axis=1))
        log_units = (np.log(engine.scaling.scale[k]) + engine.model.log_units.numpy())[normal]
        exact = log_units.sum() - multivariate_normal(np.zeros(5), factors.covariance).logpdf(values[own])
        # The other columns say nothing of z yet.
        np.testing.assert_allclose(parts.columns[own][:, normal].sum(axis=1) + parts.kl[own], exact, atol=0.15)
        assert exact.std() > 0.5


@pytest.mark.parametrize("conditioning", ["shared", "per_class"])
def test_few_rows_of_a_class_are_enough_to_tell_a_wrong_claim(conditioning: str) -> None:
    rows, fresh = table(30), table(200, seed=1)
    wrong = np.arange(len(fresh)) % 2 == 0
    claims = fresh.assign(type=np.where(wrong, "kind " + ((fresh.index // 200 + 1) % 3).astype(str), fresh["type"]))
    found = {}
    for start in (True, False):
        detector = CVAEDetector("type", conditioning=conditioning, linear_start=start, **SMALL).fit(rows)
        found[start] = roc_auc(wrong, detector.contrast(claims))
    assert found[True] > 0.8
    assert found[True] > found[False] + 0.1


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, 3),
        ({"linear_start": False}, 0),
        ({"prior": "standard"}, 3),
        ({"prior": "vamp"}, 0),
        ({"prior": "learned"}, 0),
        ({"condition_on_observed": True}, 0),
        ({"hidden_dims": ()}, 0),
        ({"conditioning": "per_class"}, 0),
        ({"ignore_columns": ["b"]}, 3),
        ({"ignore_columns": ["b", "c"]}, 0),
        ({"likelihoods": dict.fromkeys(NAMES, "student_t")}, 0),
    ],
)
def test_shared_networks_have_a_path_for_each_class_where_they_can(parameters: dict, expected: int) -> None:
    assert still(**parameters).fit(table(60)).model_.engine.model.architecture.n_paths == expected


def test_several_conditions_many_classes_and_many_columns_have_no_paths() -> None:
    rows = table(60)
    cells = np.random.default_rng(0).normal(size=(180, 33))
    wide = pd.DataFrame(cells, columns=[f"x{place}" for place in range(33)]).assign(type=rows["type"])
    assert still().fit(wide).model_.engine.model.architecture.n_paths == 0
    two = CVAEDetector(["type", "place"], **{**SMALL, "max_steps": 1})
    assert (
        two.fit(rows.assign(place=np.where(rows.index % 2, "in", "out"))).model_.engine.model.architecture.n_paths == 0
    )
    many = rows.assign(type=[f"kind {place % 33}" for place in rows.index])
    assert still().fit(many).model_.engine.model.architecture.n_paths == 0


@pytest.mark.parametrize("conditioning", ["shared", "per_class"])
def test_columns_without_a_normal_head_begin_plainly(conditioning: str) -> None:
    rows = table(60)
    heavy = still(conditioning=conditioning, likelihoods=dict.fromkeys(NAMES, "student_t")).fit(rows)
    assert not heavy.model_.engine.model.architecture.linear_start
    assert np.isfinite(heavy.negative_elbo(rows)).all()


def test_rows_without_their_class_begin_plainly() -> None:
    rows = table(60)
    rows.loc[::2, "type"] = None
    detector = still(objective="semi_supervised").fit(rows)
    assert not detector.model_.engine.model.architecture.linear_start


def test_means_of_classes_count_where_columns_are_not_scaled_by_class() -> None:
    """With an inference head columns are not: a class's mean is then the start's to know."""
    rows = table(200)
    rows[NAMES] += 4.0 * rows["type"].str[-1].astype(float).to_numpy()[:, None]
    detector = still(inference_head=True).fit(rows)
    assert detector.model_.engine.scaling is None
    expected = detector.reconstruct(rows)[NAMES].to_numpy()
    assert np.abs(expected - rows[NAMES].to_numpy()).mean() < 1.0


@pytest.mark.parametrize("conditioning", ["shared", "per_class"])
def test_a_checkpoint_of_another_start_is_refused(conditioning: str, tmp_path) -> None:
    rows, place = table(60), tmp_path / "progress"
    still(conditioning=conditioning, checkpoint=place, linear_start=False).fit(rows)
    with pytest.raises(BundleError):
        still(conditioning=conditioning, checkpoint=place).fit(rows)


def test_every_class_begins_along_the_path_of_its_own_level(monkeypatch) -> None:
    """Levels may be told in another order than the classes of the table have."""
    monkeypatch.setattr(linear_start, "HIDDEN_START", 0.0)
    rows = table(300)
    renamed = rows.assign(type=rows["type"].map({"kind 0": "z", "kind 1": "m", "kind 2": "a"}))
    scores = [still(prior="standard").fit(own).negative_elbo(own) for own in (rows, renamed)]
    # The rows are split in another order, so that a few more or less of them were seen.
    assert np.corrcoef(scores)[0, 1] > 0.95


def test_a_class_of_a_row_or_two_begins_where_all_rows_do() -> None:
    rows = pd.concat([table(200), table(1).assign(type="rare")], ignore_index=True)
    detector = still().fit(rows)
    assert np.isfinite(detector.negative_elbo(rows)).all()
    assert detector.model_.engine.model.architecture.n_paths == 4


def test_missing_cells_constant_columns_and_other_kinds_do_not_stop_it() -> None:
    rows = table(120)
    rows.loc[::3, "a"] = np.nan
    rows["b"] = 1.0
    rows = rows.assign(errors=np.arange(360) % 4, colour=np.where(np.arange(360) % 5 < 2, "red", "blue"))
    rows.loc[rows["type"] == "kind 1", "c"] = np.nan
    detector = CVAEDetector("type", **{**SMALL, "max_steps": 20}).fit(rows)
    assert np.isfinite(detector.negative_elbo(rows)).all()


def test_it_is_the_same_every_time_and_saved(tmp_path) -> None:
    rows = table(60)
    scores = [CVAEDetector("type", **SMALL).fit(rows).negative_elbo(rows) for _ in range(2)]
    np.testing.assert_array_equal(*scores)
    detector = CVAEDetector("type", **SMALL).fit(rows)
    loaded = CVAEDetector.load(detector.save(tmp_path / "model"), device="cpu")
    np.testing.assert_array_equal(loaded.negative_elbo(rows), scores[0])


@pytest.fixture(scope="module")
def mlp() -> StackedMLP:
    network = StackedMLP(2, 4, (8,), 3, 3, torch.Generator().manual_seed(0), n_paths=2).double()
    with torch.no_grad():
        network.paths.normal_(generator=torch.Generator().manual_seed(1))
    return network


def test_a_path_counts_by_its_number_of_the_condition(mlp: StackedMLP) -> None:
    """The last number of the condition has none."""
    x, without = torch.randn(1, 6, 4, dtype=torch.float64), StackedMLP(2, 4, (8,), 3, 3, torch.Generator()).double()
    without.load_state_dict({name: value for name, value in mlp.state_dict().items() if name != "paths"})
    told = torch.tensor([0.25, 0.75, 5.0], dtype=torch.float64)
    own = told[0] * mlp.paths[:, 0] + told[1] * mlp.paths[:, 1]
    shared, of_rows = Condition(told.reshape(1, 1, 3)), Condition(told.expand(1, 6, 3))
    expected = without(x, shared) + x @ own
    torch.testing.assert_close(mlp(x, shared), expected)
    torch.testing.assert_close(mlp(x, of_rows), expected)
    with torch.inference_mode():
        torch.testing.assert_close(mlp(x, shared), expected)


def test_rows_of_several_samples_take_the_condition_of_their_row(mlp: StackedMLP) -> None:
    told = Condition(torch.eye(3, dtype=torch.float64)[[0, 1, 0]].unsqueeze(0))
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    expected = torch.cat([mlp(x[:, :3], told), mlp(x[:, 3:], told)], dim=1)
    torch.testing.assert_close(mlp(x, told), expected)


def test_one_member_alone_takes_its_own_path(mlp: StackedMLP) -> None:
    x = torch.randn(1, 5, 4, dtype=torch.float64)
    told = Condition(torch.eye(3, dtype=torch.float64)[[0, 1, 1, 0, 2]].unsqueeze(0))
    first = Condition(told.vectors[:, :1])
    torch.testing.assert_close(mlp(x, told, slice(1, 2)), mlp(x, told)[1:])
    torch.testing.assert_close(mlp(x, first, slice(1, 2)), mlp(x, first)[1:])
