"""What `tracking` writes into a real MLflow store, and the models loaded back from it."""

import json
import shutil
import sqlite3
import sys

import numpy as np
import pandas as pd
import pytest

from anomaly_cvae import CVAEDetector, metrics, tracking
from anomaly_cvae.errors import MissingDependencyError, TrackingError

mlflow = pytest.importorskip("mlflow")

SMALL = {"max_steps": 60, "hidden_dims": (16,), "n_estimators": 1, "random_state": 0}
AWKWARD = (
    "a/", "..", ".", "./b", "", " ", "/etc", "http://x/y", "a//b", "a\nb", "größe ✓", "50 %", "x\\y", "a|b", "A",
    "n" * 300,
)  # fmt: skip


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {"kind": rng.choice(["a (1)", "b=2"], 300), "x": rng.normal(size=300), "n": rng.poisson(3, 300)}
    )


@pytest.fixture(scope="module")
def detector(table) -> CVAEDetector:
    return CVAEDetector(["kind"], **SMALL).fit(table)


@pytest.fixture(scope="module")
def evaluation(detector, table) -> metrics.Evaluation:
    return evaluation_of(detector, table)


def evaluation_of(detector: CVAEDetector, table: pd.DataFrame) -> metrics.Evaluation:
    """Every tenth row an anomaly, with scores that say so."""
    is_anomaly = np.arange(len(table)) % 10 == 0
    scores = -detector.score_samples(table) + 5.0 * is_anomaly
    return metrics.Evaluation(is_anomaly, scores, detector.predict(table) == -1, table["kind"].to_numpy())


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The store that is used where nobody named one: below the folder worked in."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(folder)
        tracking.use_store("pumps")
        yield folder


@pytest.fixture
def in_store(store, monkeypatch):
    """The same store once more, for a test that logs: another one may have been used in between."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(store)
    tracking.use_store("pumps")


@pytest.fixture(scope="module")
def logged(store, table, detector, evaluation):
    """A detector with its evaluation in a run."""
    extras = tracking.Extras(
        parameters={"preset": "none"},
        tags={"team": "pumps"},
        seconds={"fit": 1.5},
        datasets=[tracking.DataSet(table, "made/up.csv", "training")],
        surprising=table.head(3),
        alarm_columns=detector.alarm_columns(table),
    )
    with tracking.start_run("first", {"data": "made up"}) as run_id:
        model = tracking.log_detector(detector, evaluation, extras)
    return mlflow.MlflowClient(), run_id, model


def test_the_default_store_is_a_database_below_the_folder_worked_in(store, logged):
    assert (store / "mlruns" / "mlflow.db").is_file()
    assert list((store / "mlruns" / "artifacts").rglob("roc.json"))


def test_run_holds_parameters_metrics_and_tags(logged):
    client, run_id, _ = logged
    data = client.get_run(run_id).data
    assert data.params["max_steps"] == "60"
    assert data.params["preset"] == "none"
    assert data.tags["data"] == "made up"
    assert data.tags["team"] == "pumps"
    assert data.tags["library"].startswith("anomaly_cvae ")
    assert data.metrics["seconds/fit"] == 1.5
    for name in ("roc_auc", "average_precision", "false_alarm_rate", "train/negative_elbo", "validation/negative_elbo"):
        assert np.isfinite(data.metrics[name]), name
    # Class names are escaped where MLflow refuses a character.
    assert "threshold/a _281_29" in data.metrics
    assert "roc_auc/b_3d2" in data.metrics


def test_metrics_are_those_of_the_evaluation(logged, evaluation):
    client, run_id, _ = logged
    found = client.get_run(run_id).data.metrics
    assert found["roc_auc"] == pytest.approx(evaluation.ranking.loc["overall", "roc_auc"])
    assert found["false_alarm_rate/b_3d2"] == pytest.approx(evaluation.alarms.loc["b=2", "false_alarm_rate"])


@pytest.mark.parametrize("half", ["train", "validation"])
def test_curves_are_logged_per_epoch(logged, detector, half):
    client, run_id, _ = logged
    history = client.get_metric_history(run_id, f"{half}/negative_elbo")
    assert [point.step for point in history] == detector.history_["step"].tolist()
    np.testing.assert_allclose([point.value for point in history], detector.history_[f"{half}_negative_elbo"])


def test_tables_and_pictures_are_there(logged):
    client, run_id, _ = logged
    names = {file.path for folder in ("tables", "plots") for file in client.list_artifacts(run_id, folder)}
    assert {
        "tables/thresholds.json", "tables/ranking.json", "tables/alarms.json", "tables/columns.json",
        "tables/roc.json", "tables/precision_recall.json", "tables/surprising_rows.json", "tables/alarm_columns.json",
        "plots/roc_and_pr.png", "plots/roc_and_pr.html", "plots/scores_and_thresholds.png", "plots/training.png",
    } <= names  # fmt: skip


def test_model_loads_back_and_scores_alike(logged, detector, table):
    _, _, model = logged
    loaded = mlflow.pyfunc.load_model(model.uri)
    pd.testing.assert_frame_equal(loaded.predict(table), detector.score_table(table))
    assert model.version is None


def test_logged_model_holds_no_pickle_and_no_row(logged, table, tmp_path):
    _, _, model = logged
    mlflow.artifacts.download_artifacts(model.uri, dst_path=str(tmp_path))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "manifest.json" for path in files)
    assert not {path.suffix for path in files} & {".pkl", ".pickle", ".pt", ".pth", ".joblib"}
    example = json.loads(next(path for path in files if path.name == "input_example.json").read_text())
    rows = pd.DataFrame(example["data"], columns=example["columns"])
    assert not np.isin(rows["x"], table["x"]).any()


@pytest.mark.usefixtures("in_store")
def test_without_labels_a_run_has_thresholds_and_no_ranking(detector):
    with tracking.start_run("unlabelled") as run_id:
        tracking.log_detector(detector)
    client = mlflow.MlflowClient()
    assert "roc_auc" not in client.get_run(run_id).data.metrics
    tables = {file.path for file in client.list_artifacts(run_id, "tables")}
    assert "tables/thresholds.json" in tables
    assert "tables/roc.json" not in tables


@pytest.mark.usefixtures("in_store")
def test_labels_of_one_kind_are_logged_without_curves(detector, table):
    nothing = np.zeros(len(table), dtype=bool)
    flagged = detector.predict(table) == -1
    only_normals = metrics.Evaluation(nothing, -detector.score_samples(table), flagged, table["kind"].to_numpy())
    with tracking.start_run("normals") as run_id:
        tracking.log_evaluation(detector, only_normals)
    found = mlflow.MlflowClient().get_run(run_id).data.metrics
    assert found["false_alarm_rate"] == pytest.approx(flagged.mean())
    assert "roc_auc" not in found
    assert "recall" not in found


# ---------------------------------------------------------------------- names of classes


@pytest.mark.parametrize("name", AWKWARD, ids=lambda name: ascii(name)[:14])
@pytest.mark.usefixtures("in_store")
def test_a_metric_of_any_class_is_taken_by_mlflow(name, logged):
    client, run_id, _ = logged
    client.log_metric(run_id, tracking.metric_name("check", name), 1.0)


@pytest.mark.parametrize(("one", "other"), [("a(", "a_28"), ("a b", "a_20b"), ("n" * 300 + "1", "n" * 300 + "2")])
def test_metrics_of_two_classes_never_share_a_name(one, other):
    assert tracking.metric_name("threshold", one) != tracking.metric_name("threshold", other)


def test_metric_names_stay_readable():
    assert tracking.metric_name("roc_auc") == "roc_auc"
    assert tracking.metric_name("roc_auc", "tcp, http") == "roc_auc/tcp_2c http"


@pytest.mark.parametrize("name", ["overall", "macro"])
@pytest.mark.usefixtures("in_store")
def test_a_class_may_be_called_like_a_line_of_the_ranking(name, table):
    table = table.assign(kind=np.where(table["kind"] == "b=2", "b", name))
    renamed = CVAEDetector(["kind"], **SMALL).fit(table)
    evaluation = evaluation_of(renamed, table)
    with tracking.start_run(name) as run_id:
        tracking.log_evaluation(renamed, evaluation)
    found = mlflow.MlflowClient().get_run(run_id).data.metrics
    assert found["roc_auc"] == pytest.approx(metrics.roc_auc(evaluation.is_anomaly, evaluation.scores))
    own = evaluation.classes == name
    expected = metrics.roc_auc(evaluation.is_anomaly[own], evaluation.scores[own])
    assert found[f"roc_auc/{name}"] == pytest.approx(expected)


def test_the_description_stays_a_table_where_a_class_name_holds_a_bar(table):
    renamed = CVAEDetector(["kind"], **SMALL).fit(table.assign(kind=table["kind"].replace("b=2", "b|2")))
    lines = tracking.runs.summary(renamed, None).splitlines()
    rows = [line.replace("\\|", "") for line in lines if line.startswith("|")]
    assert {line.count("|") for line in rows} == {6}


@pytest.mark.usefixtures("in_store")
def test_a_training_of_many_epochs_keeps_every_point(table):
    detector = CVAEDetector(["kind"], **SMALL).fit(table)
    n = 1_200  # MLflow takes 1,000 metrics per request
    longer = pd.DataFrame({name: np.resize(values.to_numpy(), n) for name, values in detector.history_.items()})
    longer["step"] = np.arange(1, n + 1)
    longer.attrs = detector.history_.attrs
    detector.history_ = longer
    with tracking.start_run("long") as run_id:
        tracking.runs._log_history(detector)
    assert len(mlflow.MlflowClient().get_metric_history(run_id, "train/negative_elbo")) == n


# ---------------------------------------------------------------------- other kinds of X


@pytest.mark.parametrize("kind", ["unconditional", "continuous condition", "ignored column"])
@pytest.mark.usefixtures("in_store")
def test_models_of_every_kind_load_back(kind, table):
    chosen = {
        "unconditional": {},
        "continuous condition": {"condition_columns": ["x"]},
        "ignored column": {"condition_columns": ["kind"], "ignore_columns": ["x"]},
    }[kind]
    detector = CVAEDetector(**chosen, **SMALL).fit(table)
    with tracking.start_run(kind):
        model = tracking.log_detector(detector)
    ignored = chosen.get("ignore_columns", [])
    scored = mlflow.pyfunc.load_model(model.uri).predict(table.drop(columns=ignored))
    pd.testing.assert_frame_equal(scored, detector.score_table(table))


@pytest.mark.usefixtures("in_store")
def test_a_model_of_an_array_takes_an_array(table):
    cells = table[["x", "n"]].to_numpy()
    detector = CVAEDetector(**SMALL).fit(cells)
    with tracking.start_run("array"):
        model = tracking.log_detector(detector)
    scored = mlflow.pyfunc.load_model(model.uri).predict(cells)
    pd.testing.assert_frame_equal(scored, detector.score_table(cells))


@pytest.mark.usefixtures("in_store")
def test_a_model_of_numbered_columns_is_logged(table):
    cells = table.set_axis([0, 1, 2], axis=1)
    detector = CVAEDetector([0], **SMALL).fit(cells)
    with tracking.start_run("numbered"):
        model = tracking.log_detector(detector)
    scored = mlflow.pyfunc.load_model(model.uri).predict(cells)
    pd.testing.assert_frame_equal(scored, detector.score_table(cells))


# ---------------------------------------------------------------------- the store


def test_the_users_own_store_wins_at_the_moment_of_use(store, tmp_path, monkeypatch):
    shutil.copy(store / "mlruns" / "mlflow.db", tmp_path / "own.db")  # saves the migrations of a new one
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'own.db'}")
    monkeypatch.chdir(tmp_path)
    assert tracking.use_store("mine").endswith("own.db")
    assert "mine" in experiments_in(tmp_path / "own.db")
    assert not (tmp_path / "mlruns").exists()


def test_the_default_store_moves_with_the_folder_worked_in(store, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlruns").mkdir()
    shutil.copy(store / "mlruns" / "mlflow.db", tmp_path / "mlruns" / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    tracking.use_store("elsewhere")
    assert "elsewhere" in experiments_in(tmp_path / "mlruns" / "mlflow.db")
    assert "elsewhere" not in experiments_in(store / "mlruns" / "mlflow.db")


def experiments_in(database) -> set[str]:
    connection = sqlite3.connect(database)
    names = {name for (name,) in connection.execute("select name from experiments")}
    connection.close()
    return names


def test_a_store_of_no_known_kind_is_one_clear_error(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://host")
    with pytest.raises(TrackingError, match=r"nonsense://host") as caught, tracking.faults_named():
        tracking.use_store("any")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("in_store")
def test_a_fault_inside_a_run_marks_it_as_failed():
    with pytest.raises(TrackingError, match="disk full"), tracking.faults_named():  # noqa: SIM117  # the run closes first
        with tracking.start_run("broken") as run_id:
            raise OSError("disk full")
    assert mlflow.MlflowClient().get_run(run_id).info.status == "FAILED"


def test_missing_mlflow_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(MissingDependencyError, match="pip install mlflow"):
        tracking.use_store("any")
