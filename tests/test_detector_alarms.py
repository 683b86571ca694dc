"""Which columns drive the alarms, under which class a row would be normal, and what fit would take columns for."""

import numpy as np
import pandas as pd
import pytest

from anomaly_cvae import CVAEDetector
from anomaly_cvae.errors import ConditionError


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    kind = rng.choice(["cold", "hot"], 800)
    mean = np.where(kind == "hot", 50.0, 0.0)
    return pd.DataFrame({"kind": kind, "heat": mean + rng.normal(size=800), "load": rng.normal(size=800)})


@pytest.fixture(scope="module")
def detector(table) -> CVAEDetector:
    return CVAEDetector(["kind"], max_steps=300, hidden_dims=(32,), n_estimators=1, random_state=0).fit(table)


def test_class_negative_elbo_holds_the_own_one_and_tells_where_a_row_belongs(detector, table):
    nats = detector.class_negative_elbo(table)
    assert list(nats.columns) == ["cold", "hot"]
    own = nats.to_numpy()[np.arange(len(table)), (table["kind"] == "hot").astype(int)]
    np.testing.assert_allclose(own, detector.negative_elbo(table), rtol=1e-5, atol=1e-4)
    swapped = table.assign(kind=np.where(table["kind"] == "hot", "cold", "hot"))
    assert (detector.class_negative_elbo(swapped).idxmin(axis=1) == table["kind"]).all()


def test_class_negative_elbo_needs_classes(table):
    plain = CVAEDetector(max_steps=10, hidden_dims=(8,), random_state=0).fit(table[["heat", "load"]])
    with pytest.raises(ConditionError, match="at least two classes"):
        plain.class_negative_elbo(table[["heat", "load"]])


def test_alarm_columns_count_the_column_that_is_wrong(detector, table):
    strange = table.head(60).assign(load=lambda t: t["load"] + 30.0)
    flagged = detector.predict(strange) == -1
    assert flagged.all()
    alarms = detector.alarm_columns(strange)
    assert alarms.groupby("class")["alarms"].first().sum() == 60
    top = alarms.sort_values("top", ascending=False).groupby("class").first()
    assert (top["column"] == "load").all()
    assert (top["top"] == top["alarms"]).all()
    saved = detector.top_columns(strange, n=1).merge(strange["kind"], left_on="row", right_index=True)
    np.testing.assert_allclose(top["repair_nats"], saved.groupby("kind")["repair_nats"].mean(), rtol=1e-4)
    assert (top["repair_nats"] > 5).all()


def test_without_alarms_there_is_an_empty_table(detector, table):
    normal = table[detector.predict(table) == 1]
    assert list(detector.alarm_columns(normal).columns) == ["class", "column", "alarms", "top", "repair_nats"]
    assert not len(detector.alarm_columns(normal))


def test_alarms_of_unknown_classes_are_grouped(detector, table):
    policy = CVAEDetector(**{**detector.get_params(), "unseen_class": "anomaly"})
    policy.__dict__.update({k: v for k, v in vars(detector).items() if k not in policy.get_params()})
    alarms = policy.alarm_columns(table.head(10).assign(kind=[f"new {i}" for i in range(10)]))
    assert set(alarms["class"]) == {"(unknown class)"}
    assert (alarms["alarms"] == 10).all()
    assert set(alarms["column"]) <= {"(new class)", "heat", "load"}


def test_infer_schema_is_what_fit_takes_and_leaves_no_trace(detector, table):
    fresh = CVAEDetector(["kind"])
    schema = fresh.infer_schema(table)
    assert schema.report().equals(detector.schema_.report())
    assert not hasattr(fresh, "n_features_in_")
    assert not hasattr(fresh, "schema_")


def test_thresholds_say_who_set_them(detector):
    assert detector.thresholds_["set_by"].str.len().gt(0).all()


def test_few_shapes_reach_the_networks_whatever_the_number_of_rows(detector, table, monkeypatch):
    """Every new shape costs a CPU kernel per layer that is kept, so short chunks are padded to few lengths."""
    lengths = set()
    terms = type(detector.model_.engine.model).terms

    def watched(model, batch, *args, **kwargs):
        lengths.add(batch.values.shape[1])
        return terms(model, batch, *args, **kwargs)

    monkeypatch.setattr(type(detector.model_.engine.model), "terms", watched)
    expected = detector.negative_elbo(table)
    for n in range(1, 400, 7):
        np.testing.assert_allclose(detector.negative_elbo(table.head(n)), expected[:n], rtol=1e-5, atol=1e-5)
    assert len(lengths) <= 12
