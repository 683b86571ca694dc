"""A run in a real MLflow store, and the model loaded back from it."""

import sys

import numpy as np
import pandas as pd
import pytest

from anomaly_cvae import CVAEDetector, tracking
from anomaly_cvae.errors import MissingDependencyError

mlflow = pytest.importorskip("mlflow")


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {"kind": rng.choice(["a (1)", "b=2"], 300), "x": rng.normal(size=300), "n": rng.poisson(3, 300)}
    )


@pytest.fixture(scope="module")
def detector(table) -> CVAEDetector:
    return CVAEDetector(["kind"], max_steps=60, hidden_dims=(16,), n_estimators=1, random_state=0).fit(table)


@pytest.fixture(scope="module")
def logged(table, detector, tmp_path_factory):
    """A run logged into a store of its own."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(folder)
        uri = tracking.use_store("pumps")
        is_anomaly = np.arange(300) % 10 == 0
        scores = -detector.score_samples(table) + 5.0 * is_anomaly
        evaluation = tracking.Evaluation(is_anomaly, scores, detector.predict(table) == -1, table["kind"].to_numpy())
        with tracking.start_run("first", {"data": "made up"}) as run_id:
            model_uri = tracking.log_detector(detector, evaluation, input_example=table.head())
        assert uri == "sqlite:///mlruns/mlflow.db"
        yield mlflow.MlflowClient(), run_id, model_uri


def test_run_holds_parameters_metrics_and_tags(logged):
    client, run_id, _ = logged
    data = client.get_run(run_id).data
    assert data.params["max_steps"] == "60"
    assert data.tags["data"] == "made up"
    for name in ("roc_auc", "average_precision", "false_alarm_rate", "train/negative_elbo", "validation/negative_elbo"):
        assert np.isfinite(data.metrics[name]), name
    # Class names are escaped where MLflow refuses a character.
    assert "threshold/a _281_29" in data.metrics
    assert "roc_auc/b_3d2" in data.metrics


def test_curves_are_logged_per_epoch(logged, detector):
    client, run_id, _ = logged
    history = client.get_metric_history(run_id, "validation/negative_elbo")
    assert [point.step for point in history] == detector.history_["step"].tolist()


def test_tables_and_pictures_are_there(logged):
    client, run_id, _ = logged
    names = {file.path for folder in ("tables", "plots") for file in client.list_artifacts(run_id, folder)}
    assert {
        "tables/thresholds.json", "tables/ranking.json",
        "tables/alarms.json", "tables/curves.json", "tables/columns.json",
        "plots/roc_and_pr.png", "plots/scores_and_thresholds.png", "plots/training.png",
    } <= names  # fmt: skip


def test_model_loads_back_and_scores_alike(logged, detector, table):
    _, _, model_uri = logged
    loaded = mlflow.pyfunc.load_model(model_uri)
    pd.testing.assert_frame_equal(loaded.predict(table), detector.score_table(table))


def test_logged_model_holds_no_pickle(logged, tmp_path):
    _, _, model_uri = logged
    folder = mlflow.artifacts.download_artifacts(model_uri, dst_path=str(tmp_path))
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert folder
    assert not suffixes & {".pkl", ".pickle", ".pt", ".pth", ".joblib"}


def test_the_users_own_store_wins_at_the_moment_of_use(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'own.db'}")
    monkeypatch.chdir(tmp_path)
    assert tracking.use_store("mine").endswith("own.db")
    assert not (tmp_path / "mlruns").exists()


def test_metric_names():
    assert tracking.metric_name("roc_auc") == "roc_auc"
    assert tracking.metric_name("roc_auc", "tcp, http") == "roc_auc/tcp_2c http"


def test_missing_mlflow_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(MissingDependencyError, match="pip install mlflow"):
        tracking.use_store("any")
