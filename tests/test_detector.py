"""The scikit-learn face, as a user sees it."""

import os
import warnings

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import logsumexp
from sklearn import config_context
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from anomaly_cvae import CVAEDetector
from anomaly_cvae.errors import ConditionError, ParameterError

TINY = {"max_steps": 40, "hidden_dims": (16,), "n_estimators": 1, "random_state": 0}


def machines(n: int = 1000, seed: int = 0) -> pd.DataFrame:
    """A table in which temperature is normal only given the type: furnaces are hot, fridges are cold."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(["fridge", "furnace"], n)
    load = rng.normal(size=n)
    temperature = np.where(kind == "fridge", 4.0, 900.0) + np.where(kind == "fridge", 1.0, 30.0) * (
        load + 0.3 * rng.normal(size=n)
    )
    return pd.DataFrame(
        {
            "type": kind,
            "temperature": temperature,
            "load": load,
            "alarms": rng.poisson(2.0, n),
            "door_open": rng.random(n) < 0.2,
            "maker": rng.choice(["acme", "blix", "corp"], n),
            "serial": np.arange(n),
        }
    )


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return machines()


@pytest.fixture(scope="module")
def detector(table: pd.DataFrame) -> CVAEDetector:
    return CVAEDetector(
        ["type"], ignore_columns=["serial"], max_steps=400, hidden_dims=(32,), n_estimators=2, random_state=0
    ).fit(table)


@pytest.mark.parametrize("parameters", [{}, {"condition_columns": [0]}], ids=["unconditional", "shared"])
def test_every_check_of_scikit_learn_passes(parameters, monkeypatch):
    monkeypatch.setitem(os.environ, "SCIPY_ARRAY_API", "1")
    detector = CVAEDetector(dtype="float64", max_steps=60, hidden_dims=(32,), **parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(detector, on_skip=None, on_fail=None)
    assert len(results) > 45
    failed = {r["check_name"]: r["exception"] for r in results if r["status"] not in ("passed", "skipped")}
    assert failed == {}
    # scipy reads SCIPY_ARRAY_API at its import; only that check may be skipped when it came too late.
    assert {r["check_name"] for r in results if r["status"] == "skipped"} <= {"check_array_api_input"}


def test_a_hot_fridge_is_an_anomaly_and_a_hot_furnace_is_not(detector):
    fresh = machines(200, seed=1)
    hot_fridges = fresh[fresh["type"] == "fridge"].assign(temperature=900.0)
    assert (detector.predict(hot_fridges) == -1).all()
    assert (detector.predict(fresh) == 1).mean() > 0.9


def test_without_the_condition_a_hot_fridge_is_not_seen(table):
    blind = CVAEDetector(ignore_columns=["type", "serial"], max_steps=400, hidden_dims=(32,), random_state=0).fit(table)
    furnaces = machines(200, seed=1).query("type == 'furnace'")
    assert (blind.predict(furnaces.assign(type="fridge")) == 1).mean() > 0.9


def test_polarity_and_relations_of_the_scores(detector, table):
    scores = detector.score_samples(table)
    assert scores.dtype == np.float64
    np.testing.assert_array_equal(scores, -detector.negative_elbo(table))
    np.testing.assert_array_equal(detector.predict(table), np.where(detector.decision_function(table) >= 0, 1, -1))
    thresholds = detector.thresholds_["threshold"]
    np.testing.assert_allclose(
        detector.decision_function(table), scores + thresholds[table["type"]].to_numpy(), rtol=1e-9
    )


def test_contrast_is_own_less_marginal(detector, table):
    by_class = np.column_stack(
        [detector.negative_elbo(table.assign(type=name)) for name in detector.schema_.class_names]
    )
    frequency = table["type"].value_counts(normalize=True)[detector.schema_.class_names].to_numpy()
    marginal = -logsumexp(np.log(frequency) - by_class, axis=1)
    np.testing.assert_allclose(detector.contrast(table), detector.negative_elbo(table) - marginal, rtol=1e-4, atol=1e-4)
    probabilities = np.exp(np.log(frequency) - by_class + marginal[:, None])
    np.testing.assert_allclose(detector.condition_proba(table), probabilities, atol=1e-4)


def test_condition_is_inferred_from_x_alone(detector):
    fresh = machines(200, seed=2)
    without = fresh.drop(columns="type")
    guessed = detector.condition_proba(without).idxmax(axis=1)
    assert (guessed.to_numpy() == fresh["type"].to_numpy()).mean() > 0.98


@pytest.mark.parametrize("kind", ["contrast", "both"])
def test_other_scores_need_no_new_training(detector, table, kind):
    other = clone(detector).set_params(score_kind=kind)
    other.__dict__.update({name: value for name, value in vars(detector).items() if name not in other.get_params()})
    assert (other.thresholds_["threshold"] != detector.thresholds_["threshold"]).all()
    wrong = table.assign(type=np.where(table["type"] == "fridge", "furnace", "fridge"))
    assert (other.predict(wrong) == -1).mean() > 0.95
    assert (other.predict(table) == 1).mean() > 0.9
    flagged = other.p_values(table) <= other.false_alarm_rate
    np.testing.assert_array_equal(flagged, other.predict(table) == -1)


def test_explanation_adds_up_and_names_the_culprit(detector, table):
    broken = table.head(20).copy()
    broken["temperature"] = 450.0
    explained = detector.explain(broken)
    assert list(explained.columns) == ["temperature", "load", "alarms", "door_open", "maker", "kl"]
    np.testing.assert_allclose(explained.sum(axis=1), detector.negative_elbo(broken), rtol=1e-6)
    assert (explained.drop(columns="kl").idxmax(axis=1) == "temperature").all()
    pd.testing.assert_index_equal(explained.index, broken.index)


def test_repair_is_what_mending_one_cell_saves(detector, table):
    broken = table.head(30).assign(temperature=300.0)
    gains = detector.explain(broken, method="repair")
    assert list(gains.columns) == ["temperature", "load", "alarms", "door_open", "maker"]
    pd.testing.assert_index_equal(gains.index, broken.index)
    assert (gains.idxmax(axis=1) == "temperature").all()
    before = detector.negative_elbo(broken)
    for name in gains:
        # Levels and counts, too: what is put in is what impute puts in.
        mended = detector.impute(broken.astype({"door_open": object, "alarms": float}).assign(**{name: np.nan}))
        mended["alarms"] = mended["alarms"].round()
        np.testing.assert_allclose(gains[name], before - detector.negative_elbo(mended), rtol=1e-3, atol=1e-3)


def test_repair_of_missing_cells_and_unknown_classes(detector, table):
    partly = table.head(5).assign(temperature=[np.nan, 300.0, 300.0, 300.0, 300.0])
    gains = detector.explain(partly, method="repair")
    assert gains["temperature"].iloc[0] == 0.0
    assert (gains["temperature"].iloc[1:] > 10.0).all()
    marginal = clone_of(detector).set_params(unseen_class="marginal")
    unknown = marginal.explain(table.head(5).assign(type="oven", temperature=3000.0), method="repair")
    assert (unknown.idxmax(axis=1) == "temperature").all()
    assert detector.explain(table.head(0), method="repair").shape == (0, 5)
    with pytest.raises(ParameterError, match="method must be one of"):
        detector.explain(partly, method="mend")


def test_top_columns_say_what_was_expected_instead(detector):
    row = pd.DataFrame(
        {"type": ["fridge"], "temperature": [60.0], "load": [0.0], "alarms": [2], "door_open": [False],
         "maker": ["acme"], "serial": [1]}, index=["r1"],
    )  # fmt: skip
    top = detector.top_columns(row, n=2)
    first = top.iloc[0]
    assert (first["row"], first["column"], first["observed"]) == ("r1", "temperature", 60.0)
    assert first["low"] < first["expected"] < first["high"] < 60.0
    assert len(top) == 2


@pytest.mark.parametrize("method", ["fit", "fit_predict"])
def test_a_row_number_among_the_columns_is_warned_of(table, method):
    asked = getattr(CVAEDetector("type", **TINY), method)
    with pytest.warns(UserWarning, match=r"'serial': whole numbers .* leave them out") as told:
        asked(table)
    # At the line that called, however many frames lie between.
    assert {one.filename for one in told if "row numbers" in str(one.message)} == {__file__}


def test_a_row_number_that_is_explained_is_not_warned_of(table):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CVAEDetector("type", ignore_columns="serial", **TINY).fit(table)
        CVAEDetector("type", column_kinds={"serial": "real"}, **TINY).fit(table)
    assert not [w for w in caught if "row numbers" in str(w.message)]


def test_samples_look_like_the_class(detector, table):
    drawn = detector.sample(500, condition="fridge", random_state=0)
    assert list(drawn.columns) == [name for name in table.columns if name != "serial"]
    own = table.query("type == 'fridge'")
    # The temperature of the fridges lies within a few degrees of 4, that of the furnaces around 900.
    assert abs(drawn["temperature"].median() - own["temperature"].median()) < 60.0
    assert abs(drawn["alarms"].mean() - own["alarms"].mean()) < 0.8
    assert drawn["alarms"].dtype == np.int64
    assert set(drawn["maker"]) <= set(own["maker"])
    mixed = detector.sample(300, random_state=1)
    assert 0.3 < (mixed["type"] == "fridge").mean() < 0.7
    pd.testing.assert_frame_equal(detector.sample(5, random_state=3), detector.sample(5, random_state=3))
    assert not detector.sample(5, random_state=3).equals(detector.sample(5, random_state=4))


def test_reconstruct_and_impute(detector, table):
    holes = table.head(50).copy()
    holes["maker"] = holes["maker"].where(np.arange(50) % 2 == 0)
    holes["load"] = holes["load"].where(np.arange(50) % 3 != 0)
    filled = detector.impute(holes)
    assert filled.notna().all().all()
    pd.testing.assert_series_equal(filled["temperature"], holes["temperature"], check_dtype=False)
    there = holes["load"].notna()
    np.testing.assert_array_equal(filled["load"][there].astype(float), holes["load"][there])
    rebuilt = detector.reconstruct(table)
    assert np.corrcoef(rebuilt["temperature"], table["temperature"])[0, 1] > 0.95


def test_transform_and_set_output(detector, table):
    assert detector.transform(table).shape == (len(table), 5)
    named = clone(detector).set_output(transform="pandas").fit(table).transform(table)
    assert list(named.columns) == [f"cvaedetector{i}" for i in range(5)]


def test_select_controls_the_false_discovery_rate(detector):
    fresh = machines(300, seed=5)
    mixed = pd.concat([fresh, fresh.head(100).assign(temperature=450.0)], ignore_index=True)
    chosen = detector.select(mixed, false_discovery_rate=0.2)
    assert chosen[300:].mean() > 0.9
    assert chosen[:300].sum() <= 0.3 * chosen.sum()


def test_score_table_agrees_with_the_methods(detector, table):
    scored = detector.score_table(table, contrast=True, top_column=True)
    assert list(scored.columns) == [
        "condition", "negative_elbo", "score", "threshold", "p_value", "is_anomaly", "contrast",
        "top_column", "top_nats",
    ]  # fmt: skip
    np.testing.assert_allclose(scored["negative_elbo"], detector.negative_elbo(table), rtol=1e-5)
    np.testing.assert_allclose(scored["p_value"], detector.p_values(table))
    np.testing.assert_array_equal(scored["is_anomaly"], detector.predict(table) == -1)
    assert (scored["condition"] == table["type"]).all()


def test_only_flagged_rows_carry_the_column_to_blame(detector, table):
    mixed = table.head(30).assign(load=lambda t: np.where(t.index % 2, t["load"], 40.0))
    scored = detector.score_table(mixed, top_column=True)
    flagged = scored["is_anomaly"].to_numpy()
    assert 0 < flagged.sum() < 30
    assert scored.loc[~flagged, ["top_column", "top_nats"]].isna().all(axis=None)
    top = detector.top_columns(mixed[flagged], n=1)
    assert top["column"].tolist() == scored.loc[flagged, "top_column"].tolist()
    np.testing.assert_allclose(top["repair_nats"], scored.loc[flagged, "top_nats"], rtol=1e-4, atol=1e-5)
    assert (scored.loc[mixed["load"] == 40.0, "top_column"] == "load").all()
    assert detector.score_table(table.head(0), top_column=True).columns[-1] == "top_nats"


def test_a_row_flagged_for_its_class_alone_blames_no_column(detector, table):
    policy = clone_of(detector).set_params(unseen_class="anomaly")
    ordinary = table.head(6).assign(type="oven")
    strange = table.iloc[6:9].assign(type="oven", load=60.0)
    both = pd.concat([ordinary, strange])
    scored = policy.score_table(both, top_column=True)
    assert scored["is_anomaly"].all()
    assert (scored["score"] <= scored["threshold"]).tolist() == [True] * 6 + [False] * 3
    assert scored["top_column"].isna().tolist() == [True] * 6 + [False] * 3
    assert scored["top_nats"].notna().equals(scored["top_column"].notna())
    alarms = policy.alarm_columns(both).set_index("column")["top"].to_dict()
    assert alarms == {"(new class)": 6, "load": 3}


def test_the_column_to_blame_may_have_a_tuple_for_a_name():
    names = pd.Index([("a", 1), ("a", 2), ("b", 1)], tupleize_cols=False)
    frame = pd.DataFrame(np.random.default_rng(0).normal(size=(300, 3)), columns=names)
    fitted = CVAEDetector(**TINY).fit(frame)
    strange = frame.head(2).copy()
    strange.iloc[:, 1] = 50.0
    assert fitted.score_table(strange, top_column=True)["top_column"].tolist() == [("a", 2)] * 2


def test_cells_that_do_not_go_together_are_blamed_each_by_what_the_other_lets_expect():
    rng = np.random.default_rng(0)
    x = rng.normal(size=3000)
    frame = pd.DataFrame({"x": x, "y": x + 0.1 * rng.normal(size=3000), "z": rng.normal(size=3000)})
    fitted = CVAEDetector(max_steps=600, hidden_dims=(32,), n_estimators=1, random_state=0).fit(frame)
    apart = pd.DataFrame({"x": [1.6, -1.5], "y": [-1.6, 1.5], "z": [0.0, 0.1]})  # each cell ordinary, together not
    assert (fitted.predict(apart) == -1).all()
    top = fitted.top_columns(apart, n=4)
    assert top["column"].groupby(top["row"]).agg(set).tolist() == [{"x", "y", "z"}] * 2
    assert (top.loc[top["rank"] == 3, "column"] == "z").all()
    assert (top.loc[top["rank"] < 3, "repair_nats"] > 10.0).all()
    # x is expected where y is, and y where x is: each is hidden by itself.
    others = {("x", 0): -1.6, ("y", 0): 1.6, ("x", 1): 1.5, ("y", 1): -1.5}
    for column, row, expected in zip(top["column"], top["row"], top["expected"], strict=True):
        if column != "z":
            assert abs(expected - others[column, row]) < 1.0
    of_nats, of_repairs = fitted.explain(apart), fitted.explain(apart, method="repair")
    for line in top.itertuples():
        assert line.nats == pytest.approx(of_nats[line.column].iloc[line.row], abs=1e-3)
        assert line.repair_nats == pytest.approx(of_repairs[line.column].iloc[line.row], abs=1e-3)


def test_top_columns_of_a_wide_table_ask_those_that_cost_most_or_as_many_as_are_wanted():
    rng = np.random.default_rng(3)
    frame = pd.DataFrame(rng.normal(size=(600, 12)), columns=[f"c{i}" for i in range(12)])
    fitted = CVAEDetector(max_steps=60, hidden_dims=(16,), n_estimators=1, random_state=0).fit(frame)
    strange = frame.head(5).assign(c10=9.0, c3=np.nan)
    first, all_of_them = fitted.top_columns(strange, n=2), fitted.top_columns(strange, n=12)
    assert (first.loc[first["rank"] == 1, "column"] == "c10").all()
    assert (first.loc[first["rank"] == 1, "observed"] == 9.0).all()
    assert (first.loc[first["rank"] == 1, "expected"].abs() < 1.0).all()
    assert len(all_of_them) == 60
    gains = fitted.explain(strange, method="repair").to_numpy()
    for row, own in all_of_them.groupby("row"):
        assert own["column"].iloc[-1] == "c3"  # missing, so not to blame
        np.testing.assert_allclose(own["repair_nats"].iloc[:-1], -np.sort(-np.delete(gains[row], 3)), atol=1e-3)
    same = all_of_them[all_of_them["rank"] == 1].reset_index(drop=True)
    pd.testing.assert_frame_equal(first[first["rank"] == 1].reset_index(drop=True), same)


def test_same_model_from_frame_arrow_and_nullable_dtypes(table):
    pyarrow = pytest.importorskip("pyarrow")
    fitted = CVAEDetector("type", ignore_columns="serial", **TINY)
    reference = clone(fitted).fit(table).score_samples(table)
    arrow = pyarrow.Table.from_pandas(table)
    np.testing.assert_allclose(clone(fitted).fit(arrow).score_samples(arrow), reference, rtol=1e-5)
    nullable = table.convert_dtypes()
    np.testing.assert_allclose(clone(fitted).fit(nullable).score_samples(nullable), reference, rtol=1e-5)
    categorical = table.astype({"type": "category", "maker": "category"})
    np.testing.assert_allclose(clone(fitted).fit(categorical).score_samples(categorical), reference, rtol=1e-5)


def test_condition_passed_beside_x_equals_condition_in_x(table):
    x = table[["temperature", "load"]]
    beside = CVAEDetector(**TINY).fit(x, condition=table["type"])
    inside = CVAEDetector("type", **TINY).fit(table[["temperature", "load", "type"]])
    np.testing.assert_allclose(
        beside.score_samples(x, condition=table["type"]),
        inside.score_samples(table[["temperature", "load", "type"]]),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        beside.score_samples(x.to_numpy(), condition=table["type"].to_numpy())
        if not beside.layout_.is_frame
        else beside.score_samples(x, condition=list(table["type"])),
        beside.score_samples(x, condition=table["type"]),
    )
    with pytest.raises(ConditionError, match="never scores without"):
        beside.predict(x)


def test_several_and_continuous_conditions(table):
    both = CVAEDetector(["type", "maker"], ignore_columns="serial", **TINY).fit(table)
    assert len(both.schema_.classes) == 6
    assert both.thresholds_.index[0] == "fridge, acme"
    mixed = CVAEDetector(["type", "load"], ignore_columns="serial", **TINY).fit(table)
    assert [c.kind for c in mixed.schema_.conditions] == ["categorical", "continuous"]
    assert np.isfinite(mixed.score_samples(table)).all()
    with pytest.raises(ConditionError, match="continuous"):
        mixed.contrast(table)


@pytest.mark.parametrize("conditioning", ["shared", "per_class"])
@pytest.mark.parametrize("prior", ["aggregate", "standard", "learned"])
def test_conditioning_and_priors(table, conditioning, prior):
    fitted = CVAEDetector(
        "type", conditioning=conditioning, prior=prior, ignore_columns="serial", **{**TINY, "n_estimators": 2}
    ).fit(table)
    assert np.isfinite(fitted.score_samples(table)).all()
    assert len(fitted.sample(7, condition="furnace")) == 7
    assert fitted.transform(table).shape == (len(table), 5)


def test_iwae_objective_trains(table):
    fitted = CVAEDetector("type", objective="iwae", train_samples=4, ignore_columns="serial", **TINY).fit(table)
    history = fitted.history_["validation_negative_elbo"]
    assert history.iloc[-1] < history.iloc[0]


def test_student_t_and_poisson_on_request(table):
    fitted = CVAEDetector(
        "type", likelihoods={"temperature": "student_t", "alarms": "poisson"}, ignore_columns="serial", **TINY
    ).fit(table)
    heads = {column.name: column.likelihood for column in fitted.model_.encoder.columns}
    assert heads["temperature"] == "student_t"
    assert heads["alarms"] == "poisson"
    assert np.isfinite(fitted.score_samples(table)).all()


def test_random_state_reproduces_and_global_generators_are_left_alone(table):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = CVAEDetector("type", ignore_columns="serial", **TINY).fit(table).score_samples(table)
    second = CVAEDetector("type", ignore_columns="serial", **TINY).fit(table).score_samples(table)
    other = CVAEDetector("type", ignore_columns="serial", **{**TINY, "random_state": 1}).fit(table).score_samples(table)
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)
    assert torch.equal(torch_state, torch.get_rng_state())
    np.testing.assert_array_equal(numpy_state, np.random.get_state()[1])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_scores_do_not_depend_on_batch_or_order(table, dtype, tolerance):
    fitted = CVAEDetector("type", ignore_columns="serial", dtype=dtype, **TINY).fit(table)
    scores = fitted.negative_elbo(table)
    order = np.random.default_rng(0).permutation(len(table))
    np.testing.assert_allclose(fitted.negative_elbo(table.iloc[order]), scores[order], rtol=tolerance, atol=tolerance)
    single = np.concatenate([fitted.negative_elbo(table.iloc[[i]]) for i in range(20)])
    np.testing.assert_allclose(single, scores[:20], rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(fitted.negative_elbo(table), scores)


def test_pipeline_grid_search_and_joblib(table, tmp_path):
    numbers = table[["temperature", "load"]].to_numpy()
    pipeline = make_pipeline(StandardScaler(), CVAEDetector(**TINY)).fit(numbers)
    assert pipeline.predict(numbers).shape == (len(table),)
    y = np.zeros(len(table), dtype=int)
    spoilt = table.drop(columns="serial").copy()
    spoilt.loc[spoilt.index[::10], "temperature"] = 450.0
    y[::10] = 1
    search = GridSearchCV(
        CVAEDetector("type", **TINY),
        {"latent_dim": [1, 2]},
        cv=2,
        scoring=lambda est, X, t: -est.negative_elbo(X).mean(),
    ).fit(spoilt, y)
    assert search.best_params_["latent_dim"] in (1, 2)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    joblib.dump(search.best_estimator_, tmp_path / "detector.joblib")
    again = joblib.load(tmp_path / "detector.joblib")
    np.testing.assert_array_equal(again.predict(spoilt), search.best_estimator_.predict(spoilt))


def test_scikit_learn_callbacks_see_the_epochs(table):
    callback = pytest.importorskip("sklearn.callback")
    assert callback.__all__
    seen = []

    class Watcher:
        def setup(self, estimator, context): ...

        def teardown(self, estimator, context): ...

        def on_fit_task_begin(self, estimator, context, *, X=None, y=None, metadata=None, fitted_estimator=None): ...

        def on_fit_task_end(self, estimator, context, *, X=None, y=None, metadata=None, fitted_estimator=None):
            seen.append(context.task_name)
            return seen.count("epoch") >= 3

    watched = CVAEDetector("type", ignore_columns="serial", **TINY).set_callbacks(Watcher()).fit(table)
    assert seen.count("epoch") == 3
    assert seen[-1] == "fit"
    assert watched.history_.attrs["stopped_by"] == "callback"
    assert len(watched.history_) == 3


def test_interrupt_keeps_the_best_weights_and_calibrates(table, monkeypatch):
    from anomaly_cvae.progress import EpochReporter

    def interrupt(self, epoch):
        if epoch.epoch == 3:
            raise KeyboardInterrupt
        return False

    monkeypatch.setattr(EpochReporter, "__call__", interrupt)
    with pytest.warns(UserWarning, match="interrupted at step"):
        fitted = CVAEDetector("type", ignore_columns="serial", **TINY).fit(table)
    assert len(fitted.history_) == 3
    assert np.isfinite(fitted.thresholds_["threshold"]).all()


def test_progress_is_shown_when_asked_for(table, capsys):
    CVAEDetector("type", ignore_columns="serial", **{**TINY, "verbose": 1}).fit(table)
    assert "nats" in capsys.readouterr().err
    CVAEDetector("type", ignore_columns="serial", **{**TINY, "verbose": 2}).fit(table)
    assert "held-out negative ELBO" in capsys.readouterr().err
    CVAEDetector("type", ignore_columns="serial", **TINY).fit(table)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_report_says_what_each_column_was_taken_for(detector):
    report = detector.schema_.report()
    assert report.loc["type", "role"] == "condition"
    assert report.loc["alarms", "kind"] == "count"
    assert report.loc["door_open", "kind"] == "binary"
    assert report.loc["serial", "role"] == "ignored"


def test_html_repr_and_metadata_routing_do_not_break(detector, table):
    assert "CVAEDetector" in detector._repr_html_()
    with config_context(enable_metadata_routing=True):
        assert detector.predict(table).shape == (len(table),)


def test_what_stands_out_does_not_depend_on_the_unit():
    rng = np.random.default_rng(1)
    frame = pd.DataFrame(
        {
            "pressure": rng.normal(1e5, 1e3, 1500),
            "strain": rng.normal(0.0, 1e-5, 1500),
            "gap": np.where(rng.random(1500) < 0.3, np.nan, rng.normal(size=1500)),
        }
    )
    fitted = CVAEDetector(max_steps=300, hidden_dims=(16,), n_estimators=1, random_state=0).fit(frame)
    strained = frame.head(100).assign(strain=8e-5, gap=np.nan)
    scored = fitted.score_table(strained, top_column=True)
    assert scored["is_anomaly"].all()
    assert (scored["top_column"] == "strain").all()
    assert (fitted.top_columns(strained, n=4).groupby("row")["column"].last() == "gap").all()
    assert (fitted.explain(strained, method="repair").idxmax(axis=1) == "strain").all()


def test_top_columns_keep_the_order_of_rows_and_repeated_labels(detector, table):
    chosen = table.iloc[[7, 3, 3]].set_axis(["z", "b", "b"])
    top = detector.top_columns(chosen, n=2)
    assert top["row"].tolist() == ["z", "z", "b", "b", "b", "b"]
    assert top["rank"].tolist() == [1, 2] * 3


def test_ignored_columns_need_not_be_there_when_scoring(detector, table):
    np.testing.assert_array_equal(detector.predict(table.drop(columns="serial")), detector.predict(table))
    assert detector.predict(detector.sample(5, random_state=0)).shape == (5,)
    assert detector.predict(detector.impute(table.head())).shape == (5,)


@pytest.mark.parametrize("dtype", ["Int64", "int64[pyarrow]"])
def test_impute_fills_whole_numbers_with_what_is_expected(dtype):
    if "pyarrow" in dtype:
        pytest.importorskip("pyarrow")
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.normal(size=200), "n": pd.Series(rng.poisson(4, 200), dtype=dtype)})
    frame.loc[:9, "n"] = pd.NA
    filled = CVAEDetector(**TINY).fit(frame).impute(frame)
    assert filled["n"].notna().all()
    assert filled["n"].iloc[10:].tolist() == frame["n"].iloc[10:].tolist()


def test_recalibrating_needs_rows_of_every_class(detector, table):
    with pytest.raises(ConditionError, match="no rows of furnace"):
        clone_of(detector).recalibrate(machines(100, seed=3).query("type == 'fridge'"))


def test_a_rate_that_cannot_be_held_is_said_so(detector):
    with pytest.warns(UserWarning, match="too few calibration rows to hold a false-alarm rate of 0.0001"):
        clone_of(detector).recalibrate(false_alarm_rate=0.0001)


def clone_of(detector: CVAEDetector) -> CVAEDetector:
    other = clone(detector)
    other.__dict__.update({name: value for name, value in vars(detector).items() if name not in other.get_params()})
    return other


def test_noise_is_dealt_to_the_networks_of_every_class_alike(table):
    few = {**TINY, "condition_columns": ["type"], "ignore_columns": ["serial"], "conditioning": "per_class"}
    alike = CVAEDetector(**few, input_noise=0.3).fit(table).negative_elbo(table)
    first_of_two = CVAEDetector(**few, input_noise=(0.3, 0.0)).fit(table).negative_elbo(table)
    np.testing.assert_array_equal(first_of_two, alike)
    other = CVAEDetector(**few, input_noise=(0.0, 0.3)).fit(table).negative_elbo(table)
    assert (other != alike).all()


def test_members_that_differ_are_saved_and_scored_by_the_mean_of_their_nats(table, tmp_path):
    differ = {**TINY, "n_estimators": 2, "ignore_columns": ["serial", "type"], "input_noise": (0.1, 0.0)}
    fitted = CVAEDetector(**differ).fit(table)
    scores = fitted.negative_elbo(table)
    np.testing.assert_allclose(fitted.explain(table).sum(axis=1), scores, rtol=1e-6)
    loaded = CVAEDetector.load(fitted.save(tmp_path / "model"))
    np.testing.assert_array_equal(loaded.negative_elbo(table), scores)
    assert loaded.get_params()["input_noise"] == (0.1, 0.0)
    np.testing.assert_array_equal(clone(loaded).fit(table).negative_elbo(table), scores)
