"""The MLflow runs of whole jobs: what they hold, what they keep to themselves, and what becomes of a broken store."""

import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from anomaly_cvae import CVAEDetector, bundle, jobs, tracking
from anomaly_cvae.cli import app
from anomaly_cvae.errors import BundleError, TrackingError

mlflow = pytest.importorskip("mlflow")

CLASSES = ("a (1), left", "a (1), right", "b=2 | c%, left", "b=2 | c%, right")
COLUMNS = ["kind", "side", "count", "maybe", "grade", "ok", "word", "x"]
SMALL = {"max_steps": 60, "hidden_dims": [16], "n_estimators": 1}
RARE_NUMBER = 7351984.6275
RARE_WORD = "zanzibarquux"


def made_up(n: int = 440, seed: int = 0) -> pd.DataFrame:
    """Machines of four classes; the last 40 rows are anomalies."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(["a (1)", "b=2 | c%"], n)
    frame = pd.DataFrame(
        {
            "serial": [f"machine {i:05d}" for i in range(n)],
            "kind": kind,
            "side": rng.choice(["left", "right"], n),
            "count": rng.poisson(4, n),
            "maybe": pd.array(rng.poisson(5, n), dtype="Int64"),
            "grade": pd.Categorical(rng.choice(["low", "mid", "high"], n)),
            "ok": rng.random(n) < 0.7,
            "word": rng.choice(["red", "green", "blue"], n),
            "x": rng.normal(size=n) + 8.0 * (kind == "a (1)"),
            "broken": 0,
        }
    )
    frame.loc[3:9, "maybe"] = pd.NA
    frame.loc[5:7, "x"] = np.nan
    frame.loc[n - 40 :, "x"] += 30.0
    frame.loc[n - 40 :, "broken"] = 1
    return frame


def configuration(data: Path, output: Path, **more) -> jobs.TrainConfig:
    given = {
        "data": [str(data)], "condition": ["kind", "side"], "ignore": ["serial"], "label": "broken",
        "name": "machines", "output": str(output), "detector": SMALL,
    }  # fmt: skip
    return jobs.load_config(None, {**given, **more})


def train(config: jobs.TrainConfig) -> jobs.Trained:
    return jobs.train(jobs.prepare(config))


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory) -> Path:
    """A database without runs, to be copied: making one takes MLflow a second of migrations."""
    file = tmp_path_factory.mktemp("template") / "empty.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
        tracking.use_store()
        mlflow.MlflowClient().search_experiments()
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory, empty_database):
    """A folder to work in with the tables and a store of its own."""
    folder = tmp_path_factory.mktemp("place")
    made_up().to_parquet(folder / "machines.parquet")
    fresh = made_up(seed=1)
    fresh.to_parquet(folder / "fresh.parquet")
    fresh[fresh["broken"] == 0].to_parquet(folder / "normals.parquet")
    shutil.copy(empty_database, folder / "runs.db")
    return folder


@pytest.fixture(autouse=True)
def at_work(place, monkeypatch):
    """Every test starts at this place and with its store, and may go elsewhere."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place / 'runs.db'}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.chdir(place)
    tracking.use_store()


@pytest.fixture
def empty_store(tmp_path, empty_database, monkeypatch) -> Path:
    """Another store, without runs."""
    shutil.copy(empty_database, tmp_path / "empty.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'empty.db'}")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "empty.db"


@pytest.fixture(scope="module")
def trained(place) -> jobs.Trained:
    """A logged and registered training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place / 'runs.db'}")
        patch.chdir(place)
        config = configuration(
            place / "machines.parquet", place / "model", register="machines", tags={"team": "pumps"}, experiment="works"
        )
        done = train(config)
    assert done.tracking_error == ""
    return done


@pytest.fixture
def run(trained):
    return mlflow.MlflowClient().get_run(trained.run_id)


@pytest.fixture
def model_copy(trained, tmp_path) -> Path:
    """The saved model, to be changed."""
    return Path(shutil.copytree(trained.folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    """Rows as a user has them: some with missing cells, one odd."""
    return made_up(60, seed=2)[COLUMNS]


def artifact(run_id: str, path: str) -> Path:
    return Path(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=path))


def artifact_paths(run_id: str) -> set[str]:
    client = mlflow.MlflowClient()
    return {file.path for folder in ("tables", "plots") for file in client.list_artifacts(run_id, folder)}


def strict_table(file: Path) -> pd.DataFrame:
    """A logged table, read as JSON is defined: NaN and Infinity are not part of it."""

    def refuse(token: str):
        raise AssertionError(f"{file.name} holds {token}, which is no JSON")

    content = json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)
    return pd.DataFrame(content["data"], columns=content["columns"])


def command(*arguments: str):
    return CliRunner().invoke(app, list(map(str, arguments)))


# ---------------------------------------------------------------------- the run of a training


def test_training_is_a_finished_run_with_parameters_and_tags(run, trained):
    assert run.info.status == "FINISHED"
    expected = {
        "condition": "kind, side", "preset": "balanced", "max_steps": "60", "score_kind": "elbo",
        "training_rows": str(len(trained.plan.training)), "test_rows": str(len(trained.plan.test)),
        "model_sha256": trained.sha256,
    }  # fmt: skip
    assert expected.items() <= run.data.params.items()
    assert run.data.params["label_rule"] == "'broken' = 1 means an anomaly"
    assert {"job": "train", "team": "pumps", "device": "cpu"}.items() <= run.data.tags.items()
    assert run.data.tags["mlflow.runName"] == "machines"
    assert mlflow.get_experiment(run.info.experiment_id).name == "works"


@pytest.mark.parametrize("half", ["train", "validation"])
def test_losses_are_curves_over_epochs(run, trained, half):
    points = mlflow.MlflowClient().get_metric_history(run.info.run_id, f"{half}/negative_elbo")
    assert [point.step for point in points] == trained.detector.history_["step"].tolist()
    assert np.isfinite([point.value for point in points]).all()


def test_every_json_of_the_run_is_valid_json(run):
    tables = sorted(path for path in artifact_paths(run.info.run_id) if path.endswith(".json"))
    assert len(tables) >= 8
    for path in tables:
        strict_table(artifact(run.info.run_id, path))


def test_roc_and_precision_recall_are_tables(run, trained):
    roc = strict_table(artifact(run.info.run_id, "tables/roc.json"))
    assert list(roc.columns) == ["false_alarm_rate", "recall", "score"]
    assert roc.iloc[0, :2].tolist() == [0, 0]
    assert roc.iloc[-1, :2].tolist() == [1, 1]
    area = np.trapezoid(roc["recall"].astype(float), roc["false_alarm_rate"].astype(float))
    assert area == pytest.approx(trained.evaluated.evaluation.ranking.loc["overall", "roc_auc"], abs=1e-6)
    curve = strict_table(artifact(run.info.run_id, "tables/precision_recall.json"))
    assert list(curve.columns) == ["recall", "precision", "score"]
    assert curve["precision"].between(0, 1).all()
    assert curve["score"].notna().all()


def test_the_interactive_curves_need_no_network(run):
    page = artifact(run.info.run_id, "plots/roc_and_pr.html").read_text(encoding="utf-8")
    assert "Plotly.newPlot" in page
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)\s*=", page)


@pytest.mark.parametrize("name", ["roc_and_pr", "scores_and_thresholds", "training"])
def test_pictures_are_png(run, name):
    content = artifact(run.info.run_id, f"plots/{name}.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 5_000


def test_thresholds_say_who_set_them_when_and_how(run, trained):
    table = strict_table(artifact(run.info.run_id, "tables/thresholds.json")).set_index("class")
    assert set(CLASSES) <= set(table.index)
    for name in ("set_by", "set_at", "rule", "guarantee"):
        assert table[name].astype(str).str.len().gt(0).all(), name
    np.testing.assert_allclose(table["threshold"], trained.detector.thresholds_["threshold"])


@pytest.mark.parametrize("name", CLASSES)
def test_each_class_has_its_figures_as_metrics(run, trained, name):
    evaluation, found = trained.evaluated.evaluation, run.data.metrics
    rate = found[tracking.metric_name("false_alarm_rate", name)]
    assert rate == pytest.approx(evaluation.alarms.loc[name, "false_alarm_rate"])
    assert found[tracking.metric_name("roc_auc", name)] == pytest.approx(evaluation.ranking.loc[name, "roc_auc"])
    threshold = trained.detector.thresholds_.loc[name, "threshold"]
    assert found[tracking.metric_name("threshold", name)] == pytest.approx(threshold)


def test_overall_figures_are_metrics(run, trained):
    overall = trained.evaluated.evaluation.ranking.loc["overall"]
    assert run.data.metrics["roc_auc"] == pytest.approx(overall["roc_auc"])
    assert run.data.metrics["average_precision"] == pytest.approx(overall["average_precision"])


def test_seconds_of_each_stage_are_metrics(run):
    for stage in ("read", "fit", "evaluate", "save"):
        assert run.data.metrics[f"seconds/{stage}"] > 0, stage


def test_surprising_rows_and_their_columns_are_a_table(run, trained):
    table = strict_table(artifact(run.info.run_id, "tables/surprising_rows.json"))
    first = trained.explanation.rows.iloc[0]
    assert table["row"].iloc[0] == str(first["row"])
    assert {"condition", "score", "labelled", "most_normal_as", "why_1", "why_2"} <= set(table.columns)
    assert table["row"].is_unique
    assert table["why_1"].str.startswith("x ").any()
    assert table["why_1"].str.contains(r"\(expected .*\): -?\d", regex=True).all()


def test_alarm_columns_name_what_drives_the_alarms(run):
    table = strict_table(artifact(run.info.run_id, "tables/alarm_columns.json"))
    assert set(table["class"]) <= set(CLASSES)
    top = table.groupby("column")["top"].sum()
    assert top.idxmax() == "x"


def test_data_sets_are_inputs_with_a_digest(run, trained):
    inputs = {entry.tags[0].value: entry.dataset for entry in run.inputs.dataset_inputs}
    assert set(inputs) == {"training", "evaluation"}
    assert inputs["training"].digest != inputs["evaluation"].digest
    for dataset in inputs.values():
        assert dataset.name == "machines.parquet"
        assert "machines.parquet" in dataset.source
    assert json.loads(inputs["training"].profile)["num_rows"] == len(trained.plan.training)


def test_the_description_says_what_was_trained(run, trained):
    text = run.data.tags["mlflow.note.content"]
    assert "kind, side" in text
    assert f"AUROC {run.data.metrics['roc_auc']:.4f}" in text
    assert trained.detector.thresholds_["set_at"].iloc[0] in text
    assert "`x`" in text
    assert CLASSES[0] in text


def test_a_training_without_labels_is_logged_with_its_most_surprising_rows(place, tmp_path):
    config = configuration(place / "machines.parquet", tmp_path / "model", label=None, ignore=["serial", "broken"])
    done = train(config)
    assert done.tracking_error == ""
    paths = artifact_paths(done.run_id)
    assert {"tables/surprising_rows.json", "tables/thresholds.json"} <= paths
    assert "tables/roc.json" not in paths


def test_a_training_that_fails_leaves_a_failed_run(place, tmp_path, monkeypatch):
    def diverge(self, X, y=None, *, condition=None):
        raise FloatingPointError("the loss is not finite")

    monkeypatch.setattr(CVAEDetector, "fit", diverge)
    config = configuration(place / "machines.parquet", tmp_path / "model", name="diverged")
    with pytest.raises(FloatingPointError):
        train(config)
    found = mlflow.search_runs(experiment_names=["anomaly_cvae"], filter_string="run_name = 'diverged'")
    assert found["status"].tolist() == ["FAILED"]


def test_without_tracking_nothing_is_logged(place, tmp_path, empty_store):
    before = empty_store.read_bytes()
    done = train(configuration(place / "machines.parquet", tmp_path / "model", tracking=False))
    assert (done.run_id, done.tracking_error) == (None, "")
    assert empty_store.read_bytes() == before


# ---------------------------------------------------------------------- what must not get out


def test_without_log_rows_no_cell_leaves_the_table(tmp_path, empty_store):
    """The marked cells stand in rows of all kinds: learned from, evaluated on, and ignored by the model."""
    learned, tested = made_up().query("broken == 0"), made_up(seed=3)
    learned.loc[20, "x"] = RARE_NUMBER
    learned.loc[30, "serial"] = f"{RARE_WORD} learned"
    last = tested.index[-1]
    tested.loc[last, ["x", "word", "serial"]] = [RARE_NUMBER, RARE_WORD, f"{RARE_WORD} tested"]
    tested.loc[last - 1, "kind"] = RARE_WORD
    learned.to_parquet(tmp_path / "learned.parquet")
    tested.to_parquet(tmp_path / "tested.parquet")
    config = configuration(
        tmp_path / "learned.parquet", tmp_path / "model", test_data=str(tmp_path / "tested.parquet"), log_rows=False
    )
    done = train(config)
    assert done.tracking_error == ""
    assert done.evaluated.scored["is_anomaly"].iloc[-1]
    opened = jobs.open_model(str(done.folder))
    table = jobs.TableConfig(data=[str(tmp_path / "tested.parquet")], label="broken")
    evaluated = jobs.evaluate_model(opened, table, log_rows=False)
    assert evaluated.run_id

    location = mlflow.get_run(done.run_id).info.artifact_uri.removeprefix("file://")
    files = [path for path in Path(location).parents[1].rglob("*") if path.is_file()]
    assert {"roc.json", "MLmodel", "alarm_columns.json"} <= {path.name for path in files}
    for file in [*files, empty_store]:
        content = file.read_bytes().decode("utf-8", errors="replace")
        assert RARE_WORD not in content, file
        assert not re.search(r"73519[,_]?84\.6", content.replace("7,351,984", "7351984")), file
        for name, array in arrays_in(file):
            assert not np.isclose(array, RARE_NUMBER, rtol=1e-6).any(), f"{name} of {file}"


def test_with_log_rows_the_surprising_cells_are_there(run):
    """The counterpart of the test above: that markers are found where they may be."""
    table = strict_table(artifact(run.info.run_id, "tables/surprising_rows.json"))
    told = table[table["why_1"].str.startswith("x ")].iloc[0]
    observed = made_up().loc[int(told["row"]), "x"]
    assert told["why_1"].startswith(f"x {observed:,.5g} (expected")


def arrays_in(file: Path):
    if file.suffix == ".npz":
        with np.load(file) as arrays:
            yield from arrays.items()
    elif file.suffix == ".safetensors":
        from safetensors.numpy import load_file

        yield from load_file(file).items()


# ---------------------------------------------------------------------- the logged model


@pytest.fixture(scope="module")
def loaded(trained, place):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place / 'runs.db'}")
        tracking.use_store()
        return mlflow.pyfunc.load_model(trained.model_uri)


SPELLINGS = {
    "as trained": lambda f: f,
    "int64": lambda f: f.assign(maybe=f["maybe"].fillna(2).astype("int64")),
    "int32": lambda f: f.assign(count=f["count"].astype("int32")),
    "nullable integers": lambda f: f.assign(count=f["count"].astype("Int64").where(f.index % 3 > 0)),
    "floats": lambda f: f.assign(count=f["count"].astype(float)),
    "categories": lambda f: f.astype({"kind": "category", "word": "category", "grade": "category"}),
    "objects": lambda f: f.astype(object),
    "strings": lambda f: f.astype({"kind": "string", "word": "string", "grade": "string"}),
    "nullable booleans": lambda f: f.assign(ok=f["ok"].astype("boolean").where(f.index % 4 > 0)),
    "missing cells": lambda f: f.assign(x=np.nan, word=None, ok=None),
    "columns in another order, and one more": lambda f: f.assign(more=1)[["more", *reversed(COLUMNS)]],
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.filterwarnings("ignore::UserWarning:mlflow.*")
def test_the_logged_model_scores_as_the_detector(loaded, trained, rows, spelling):
    frame = SPELLINGS[spelling](rows)
    pd.testing.assert_frame_equal(loaded.predict(frame), trained.detector.score_table(frame[COLUMNS]))


def test_the_type_of_a_column_does_not_change_its_score(loaded, rows):
    plain = loaded.predict(rows)
    for spelling in ("int32", "floats", "categories", "objects", "strings"):
        pd.testing.assert_frame_equal(loaded.predict(SPELLINGS[spelling](rows)), plain, obj=spelling)


def test_a_column_that_is_not_there_is_named(loaded, rows):
    with pytest.raises(mlflow.exceptions.MlflowException, match="word"):
        loaded.predict(rows.drop(columns="word"))


@pytest.mark.filterwarnings("ignore:too few calibration rows")
def test_parameters_of_one_prediction_have_effect_and_stay_there(loaded, trained, rows):
    before, detector = loaded.predict(rows), trained.detector
    more = loaded.predict(rows, params={"contrast": True, "top_column": True})
    pd.testing.assert_frame_equal(more, detector.score_table(rows, contrast=True, top_column=True))

    both = loaded.predict(rows, params={"score_kind": "both"})
    assert not np.allclose(both["score"], before["score"])
    np.testing.assert_allclose(both["negative_elbo"], before["negative_elbo"])

    often = loaded.predict(rows, params={"false_alarm_rate": 0.3})
    assert (often["threshold"] < before["threshold"]).all()
    assert often["is_anomaly"].sum() > before["is_anomaly"].sum()
    np.testing.assert_allclose(often["score"], before["score"])

    pd.testing.assert_frame_equal(loaded.predict(rows), before)
    pd.testing.assert_frame_equal(detector.score_table(rows), before)


def test_a_class_not_seen_is_treated_as_asked(loaded, rows):
    frame = rows.assign(kind="unheard of")
    assert loaded.predict(frame)["is_anomaly"].all()  # the policy that jobs train with
    marginal = loaded.predict(frame, params={"unseen_class": "marginal"})
    assert not marginal["is_anomaly"].all()
    with pytest.raises(Exception, match="unheard of"):
        loaded.predict(frame, params={"unseen_class": "raise"})
    assert loaded.predict(frame)["is_anomaly"].all()


def test_a_missing_condition_is_refused_unless_asked_for(loaded, rows):
    frame = rows.assign(kind=None)
    with pytest.raises(Exception, match="condition is missing"):
        loaded.predict(frame)
    scored = loaded.predict(frame, params={"missing_condition": "marginal"})
    assert np.isfinite(scored["score"]).all()


@pytest.mark.parametrize("wrong", [{"false_alarm_rate": 2.0}, {"score_kind": "nonsense"}])
def test_a_wrong_parameter_is_refused_and_forgotten(loaded, rows, wrong):
    before = loaded.predict(rows)
    with pytest.raises(Exception, match=next(iter(wrong))):
        loaded.predict(rows, params=wrong)
    pd.testing.assert_frame_equal(loaded.predict(rows), before)


# ---------------------------------------------------------------------- models by name


@pytest.mark.parametrize("form", ["runs:/{run}", "runs:/{run}/", "runs:/{run}/model", "models:/machines/1", "{uri}"])
def test_a_model_opens_by_every_name_it_has(trained, rows, form):
    name = form.format(run=trained.run_id, uri=trained.model_uri)
    opened = jobs.open_model(name)
    assert opened.run_id == trained.run_id
    assert opened.sha256 == trained.sha256
    assert not opened.is_local
    pd.testing.assert_frame_equal(opened.detector.score_table(rows), trained.detector.score_table(rows))


def test_a_folder_knows_its_run(trained):
    opened = jobs.open_model(str(trained.folder))
    assert opened.run_id == trained.run_id
    assert opened.is_local


def test_registering_gives_a_version(trained):
    assert trained.version == "1"
    version = mlflow.MlflowClient().get_model_version("machines", "1")
    assert version.run_id == trained.run_id


def test_a_promoted_version_opens_by_its_alias(trained):
    assert tracking.promote("machines", "1") == "models:/machines@champion"
    assert jobs.open_model("models:/machines@champion").sha256 == trained.sha256
    result = command("promote", "machines", "1", "--alias", "trusted")
    assert result.exit_code == 0
    assert "models:/machines@trusted" in result.stdout
    assert jobs.open_model("models:/machines@trusted").sha256 == trained.sha256


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("arguments", [("machines", "99"), ("unheard-of", "1")])
def test_promoting_what_is_not_there_is_one_clear_line(arguments):
    result = command("promote", *arguments)
    assert result.exit_code == 3
    assert one_line(result).startswith("error:")
    assert arguments[0] in result.stderr


@pytest.mark.parametrize(
    "name",
    ["runs:/0123456789abcdef", "runs:/0123/model", "models:/nothing/1", "models:/nothing@alias", "models:/", "runs:/"],
)
@pytest.mark.usefixtures("trained")
def test_a_model_that_does_not_exist_is_one_clear_line(place, name):
    result = command("evaluate", name, place / "fresh.parquet", "--label", "broken")
    assert result.exit_code == 3
    assert name in one_line(result)
    with pytest.raises(TrackingError):
        jobs.open_model(name)


def one_line(result) -> str:
    """What was said on standard error, which must be one line."""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_a_model_of_another_library_is_refused():
    with mlflow.start_run(experiment_id="0") as run:
        mlflow.pyfunc.log_model(name="model", python_model=lambda model_input: model_input, pip_requirements=[])
    with pytest.raises(BundleError, match="another library"):
        jobs.open_model(f"runs:/{run.info.run_id}")


def test_a_bundle_of_a_newer_format_asks_for_an_upgrade(model_copy, place):
    manifest = model_copy / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "format_version": 99}))
    with pytest.raises(BundleError, match=r"format 99.*upgrade anomaly_cvae"):
        jobs.open_model(str(model_copy))
    result = command("evaluate", model_copy, place / "fresh.parquet", "--label", "broken")
    assert result.exit_code == 3
    assert "upgrade" in one_line(result)


# ---------------------------------------------------------------------- runs below it


def test_evaluating_logs_a_run_below_the_models(trained, place):
    opened = jobs.open_model(f"runs:/{trained.run_id}")
    table = jobs.TableConfig(data=[str(place / "fresh.parquet")], label="broken")
    evaluated = jobs.evaluate_model(opened, table)
    assert evaluated.tracking_error == ""
    run = mlflow.get_run(evaluated.run_id)
    assert run.data.tags["mlflow.parentRunId"] == trained.run_id
    assert run.data.tags["job"] == "evaluate"
    assert run.info.experiment_id == mlflow.get_run(trained.run_id).info.experiment_id
    assert run.data.params["model"] == f"runs:/{trained.run_id}"
    assert run.data.params["model_sha256"] == trained.sha256
    assert run.data.metrics["roc_auc"] == pytest.approx(evaluated.evaluation.ranking.loc["overall", "roc_auc"])
    assert run.data.metrics["seconds/evaluate"] > 0
    assert "AUROC" in run.data.tags["mlflow.note.content"]
    (entry,) = run.inputs.dataset_inputs
    assert entry.dataset.name == "fresh.parquet"
    tables = ("roc", "precision_recall", "alarms", "surprising_rows", "alarm_columns")
    assert {f"tables/{name}.json" for name in tables} <= artifact_paths(evaluated.run_id)


def test_scoring_logs_a_run_below_the_models(trained, place, tmp_path):
    opened = jobs.open_model(str(trained.folder))
    scored = jobs.score_tables(opened, [str(place / "fresh.parquet")], tmp_path / "scored")
    assert scored.tracking_error == ""
    run = mlflow.get_run(scored.run_id)
    assert run.data.tags["mlflow.parentRunId"] == trained.run_id
    assert run.data.tags["job"] == "score"
    assert run.data.metrics["rows"] == 440
    assert run.data.metrics["files/scored"] == 1
    share = scored.summary.classes.loc[CLASSES[0], "share"]
    assert run.data.metrics[tracking.metric_name("alarm_share", CLASSES[0])] == pytest.approx(share)
    files = strict_table(artifact(scored.run_id, "tables/files.json"))
    assert files["status"].tolist() == ["scored"]
    assert "440 rows" in run.data.tags["mlflow.note.content"]


def test_classes_not_seen_in_training_do_not_become_metrics(trained, tmp_path):
    """Their names are cells of the table scored, and there may be as many as rows."""
    made_up(seed=4).assign(kind=lambda f: f["serial"]).to_parquet(tmp_path / "strange.parquet")
    opened = jobs.open_model(str(trained.folder))
    scored = jobs.score_tables(opened, [str(tmp_path / "strange.parquet")], tmp_path / "scored")
    assert scored.tracking_error == ""
    metrics = mlflow.get_run(scored.run_id).data.metrics
    assert metrics["rows"] == 440
    assert not [name for name in metrics if "machine 0" in name]


def test_a_file_that_failed_is_named_in_the_run(trained, place, tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"no table")
    opened = jobs.open_model(str(trained.folder))
    inputs = [str(place / "fresh.parquet"), str(tmp_path / "broken.parquet")]
    scored = jobs.score_tables(opened, inputs, tmp_path / "scored")
    run = mlflow.get_run(scored.run_id)
    assert run.data.metrics["files/failed"] == 1
    assert "broken.parquet" in run.data.tags["mlflow.note.content"]


def test_recalibrating_logs_a_run_below_the_models_with_a_model_to_open(trained, place, tmp_path):
    opened = jobs.open_model("models:/machines/1")
    table = jobs.TableConfig(data=[str(place / "normals.parquet")])
    done = jobs.recalibrate_model(
        opened, table, false_alarm_rate=0.005, output=tmp_path / "new", register_as="recalibrated"
    )
    assert done.tracking_error == ""
    run = mlflow.get_run(done.run_id)
    assert run.data.tags["mlflow.parentRunId"] == trained.run_id
    assert run.data.tags["job"] == "recalibrate"
    assert run.data.params["model_sha256_before"] == trained.sha256
    assert "normals.parquet" in run.data.params["data"]
    thresholds = strict_table(artifact(done.run_id, "tables/thresholds.json"))
    np.testing.assert_allclose(thresholds["threshold"], done.after["threshold"])
    assert done.version == "1"
    again = jobs.open_model("models:/recalibrated/1")
    assert again.run_id == done.run_id
    assert again.sha256 == done.sha256 != trained.sha256
    pd.testing.assert_frame_equal(again.detector.thresholds_, done.after)
    assert jobs.open_model(str(tmp_path / "new")).run_id == done.run_id


@pytest.mark.filterwarnings("ignore:too few calibration rows")
def test_the_parameters_of_a_recalibrated_model_name_its_own_rate(model_copy):
    done = jobs.recalibrate_model(jobs.open_model(str(model_copy)), None, false_alarm_rate=0.2)
    assert done.tracking_error == ""
    assert mlflow.get_run(done.run_id).data.params["false_alarm_rate"] == "0.2"


def test_a_model_from_another_store_is_evaluated_without_a_parent(trained, place, empty_store):
    opened = jobs.open_model(str(trained.folder))
    table = jobs.TableConfig(data=[str(place / "fresh.parquet")], label="broken")
    evaluated = jobs.evaluate_model(opened, table)
    assert evaluated.tracking_error == ""
    assert "mlflow.parentRunId" not in mlflow.get_run(evaluated.run_id).data.tags


@pytest.mark.usefixtures("empty_store")
def test_an_empty_store_has_no_runs_and_says_so():
    result = command("runs")
    assert result.exit_code == 0
    assert "no runs yet" in result.stdout
    assert json.loads(command("runs", "--json").stdout)["runs"] == []


def test_runs_are_listed(trained):
    result = command("runs", "--json", "--experiment", "works", "-n", "50")
    assert result.exit_code == 0
    listed = {run["run"]: run for run in json.loads(result.stdout)["runs"]}
    own = listed[trained.run_id]
    assert own["job"] == "train"
    assert own["roc_auc"] == pytest.approx(trained.evaluated.evaluation.ranking.loc["overall", "roc_auc"])
    assert len(json.loads(command("runs", "--json", "-n", "1").stdout)["runs"]) == 1


def test_the_list_of_runs_has_names_to_copy(trained):
    """On a terminal of 80 columns, or through a pipe."""
    shown = command("runs", "--experiment", "works", "-n", "50")
    assert f"runs:/{trained.run_id}" in shown.stdout


# ---------------------------------------------------------------------- stores that fail


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def answering(status: int, after: float = 0.0):
    """A server that answers every request alike, and as late as asked."""
    closing = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            if closing.wait(after):
                return
            try:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(b'{"error_code": "INTERNAL_ERROR", "message": "not you"}')
            except OSError:
                pass  # nobody waits any more

        do_GET = do_POST = answer

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        closing.set()
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)


@contextmanager
def down():
    yield "http://127.0.0.1:1"


FAULTS = {
    "down": down,
    "in error": lambda: answering(500),
    "refusing": lambda: answering(403),
    "slow": lambda: answering(200, after=60.0),
}
BOUND = 20.0
"""Seconds within which a fault is to be known; a training of this size takes one."""


@pytest.mark.parametrize("fault", FAULTS)
def test_training_saves_its_model_whatever_the_server_does(place, tmp_path, monkeypatch, fault):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with FAULTS[fault]() as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        started = time.monotonic()
        result = command(
            "train", place / "machines.parquet", "-c", "kind", "-c", "side", "-i", "serial", "--label", "broken",
            "--output", tmp_path / "model", "--set", "max_steps=60", "--set", "hidden_dims=[16]",
            "--set", "n_estimators=1", "--json",
        )  # fmt: skip
        seconds = time.monotonic() - started
    assert result.exit_code == 5, result.output
    assert seconds < BOUND
    said = json.loads(result.stdout)
    assert uri in said["tracking_error"]
    assert "\n" not in said["tracking_error"]
    assert said["run_id"] is None
    assert "tracking failed" in result.stderr
    assert "Traceback" not in result.stderr
    assert jobs.open_model(str(tmp_path / "model")).sha256 == said["model_sha256"]


def test_evaluation_keeps_its_figures_when_tracking_fails(trained, place, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    result = command("evaluate", trained.folder, place / "fresh.parquet", "--label", "broken", "--json")
    assert result.exit_code == 5
    said = json.loads(result.stdout)
    assert said["ranking"][0]["roc_auc"] > 0.9
    assert "127.0.0.1:1" in said["tracking_error"]
    assert "the figures above stand" in result.stderr


def test_scored_files_stay_when_tracking_fails(trained, place, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    result = command("score", trained.folder, place / "fresh.parquet", "-o", tmp_path / "scored", "--json")
    assert result.exit_code == 5
    assert "127.0.0.1:1" in json.loads(result.stdout)["tracking_error"]
    (file,) = (tmp_path / "scored").rglob("*.parquet")
    assert len(pd.read_parquet(file)) == 440


def test_a_tracking_fault_is_told_beside_a_file_that_failed(trained, place, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    (tmp_path / "broken.parquet").write_bytes(b"no table")
    inputs = (place / "fresh.parquet", tmp_path / "broken.parquet")
    result = command("score", trained.folder, *inputs, "-o", tmp_path / "scored", "--json")
    assert result.exit_code == 4
    assert "127.0.0.1:1" in json.loads(result.stdout).get("tracking_error", "")


def test_a_recalibrated_model_is_saved_when_tracking_fails(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    arguments = ("--false-alarm-rate", "0.2", "-o", tmp_path / "new", "--json")
    result = command("recalibrate", trained.folder, *arguments)
    assert result.exit_code == 5
    assert jobs.open_model(str(tmp_path / "new")).sha256 == json.loads(result.stdout)["model_sha256"]


@pytest.mark.parametrize("name", ["runs:/0123", "models:/machines/1"])
def test_a_server_that_is_down_is_not_said_to_lack_the_model(place, monkeypatch, name):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    started = time.monotonic()
    result = command("evaluate", name, place / "fresh.parquet", "--label", "broken")
    assert time.monotonic() - started < BOUND
    assert result.exit_code == 3
    line = one_line(result)
    assert "http://127.0.0.1:1" in line
    assert "no such model" not in line


def test_listing_the_runs_of_a_server_that_is_down_is_one_clear_line(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    result = command("runs")
    assert result.exit_code == 3
    assert "http://127.0.0.1:1" in one_line(result)


def test_a_deleted_experiment_is_told_with_how_to_restore_it(place, tmp_path, empty_store):
    tracking.use_store()
    client = mlflow.MlflowClient()
    number = client.create_experiment("gone")
    client.delete_experiment(number)
    config = configuration(place / "machines.parquet", tmp_path / "model", experiment="gone")
    done = train(config)
    assert f"mlflow experiments restore --experiment-id {number}" in done.tracking_error
    assert jobs.open_model(str(done.folder)).sha256 == done.sha256
    client.restore_experiment(number)
    assert train(config).tracking_error == ""


def test_ctrl_c_while_logging_keeps_the_saved_model(place, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tracking, "log_detector", interrupt)
    result = command(
        "train", place / "machines.parquet", "-c", "kind", "-i", "serial", "-i", "side", "--label", "broken",
        "--name", "interrupted", "--output", tmp_path / "model", "--set", "max_steps=60", "--set", "hidden_dims=[16]",
        "--set", "n_estimators=1",
    )  # fmt: skip
    assert result.exit_code == 130
    assert "the model is saved" in result.stderr
    assert "Traceback" not in result.stderr
    assert CVAEDetector.load(tmp_path / "model").thresholds_.notna().all(axis=None)
    found = mlflow.search_runs(experiment_names=["anomaly_cvae"], filter_string="run_name = 'interrupted'")
    assert found["status"].tolist()[0] in {"FAILED", "KILLED"}
    assert mlflow.active_run() is None


def test_a_training_inside_a_run_of_the_users_is_logged(place, tmp_path):
    """A notebook often has a run open already."""
    with mlflow.start_run(experiment_id="0"):
        done = train(configuration(place / "machines.parquet", tmp_path / "model"))
        assert mlflow.active_run() is not None
    assert done.tracking_error == ""


def test_the_store_is_read_when_it_is_used(place, tmp_path, empty_database, monkeypatch):
    plan = jobs.prepare(configuration(place / "machines.parquet", tmp_path / "model"))
    shutil.copy(empty_database, tmp_path / "late.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'late.db'}")
    monkeypatch.chdir(tmp_path)
    done = jobs.train(plan)
    assert done.tracking_error == ""
    assert mlflow.get_tracking_uri().endswith("late.db")
    assert mlflow.get_run(done.run_id).info.status == "FINISHED"
    assert bundle.provenance(done.folder)["tracking_uri"].endswith("late.db")


# ---------------------------------------------------------------------- real servers


@contextmanager
def serving(arguments: list[str], health: str, log: Path, seconds: float = 60.0):
    """An `mlflow` server in a process group of its own, ended with the block."""
    port = free_port()
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "OMP_NUM_THREADS": "1",
    }
    whole = [sys.executable, "-m", "mlflow", *arguments, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as said:
        process = subprocess.Popen(
            whole, env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True, cwd=log.parent
        )
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + seconds
        while not reachable(url + health):
            if process.poll() is not None or time.monotonic() > until:
                pytest.fail(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.2)
        yield url, process
    finally:
        stop(process)


def stop(process: subprocess.Popen) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=10)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.fixture(scope="module")
def scoring_server(trained, place, tmp_path_factory):
    """`mlflow models serve`, as a user starts it."""
    log = tmp_path_factory.mktemp("serve") / "serve.log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place / 'runs.db'}")
        arguments = ["models", "serve", "--env-manager", "local", "-m", f"runs:/{trained.run_id}/model"]
        with serving(arguments, "/ping", log) as (url, _):
            yield url


def ask(url: str, content: dict) -> tuple[int, dict]:
    request = urllib.request.Request(
        f"{url}/invocations", json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def as_json(frame: pd.DataFrame, orient: str) -> dict:
    content = json.loads(frame.to_json(orient=orient))
    return {f"dataframe_{orient}": content}


def same(predictions: list[dict], expected: pd.DataFrame) -> None:
    answered = pd.DataFrame(predictions)
    assert list(answered.columns) == list(expected.columns)
    pd.testing.assert_frame_equal(answered, expected.reset_index(drop=True), check_dtype=False, rtol=1e-4)


@pytest.mark.parametrize("orient", ["split", "records"])
@pytest.mark.parametrize("params", [{}, {"contrast": True, "top_column": True}], ids=["plain", "with more columns"])
def test_the_scoring_server_answers_as_the_detector(scoring_server, trained, rows, orient, params):
    status, answer = ask(scoring_server, {**as_json(rows, orient), **({"params": params} if params else {})})
    assert status == 200, answer
    same(answer["predictions"], trained.detector.score_table(rows, **params))


def test_the_scoring_server_takes_whole_numbers_and_missing_cells(scoring_server, trained, rows):
    frame = rows.assign(x=3, maybe=None, word=None)
    status, answer = ask(scoring_server, as_json(frame, "records"))
    assert status == 200, answer
    same(answer["predictions"], trained.detector.score_table(frame))


def test_the_scoring_server_forgets_the_parameters_of_a_request(scoring_server, trained, rows):
    content = as_json(rows, "split")
    status, often = ask(scoring_server, {**content, "params": {"false_alarm_rate": 0.3}})
    assert status == 200, often
    _, plain = ask(scoring_server, content)
    same(plain["predictions"], trained.detector.score_table(rows))
    flagged = [sum(row["is_anomaly"] for row in answer["predictions"]) for answer in (often, plain)]
    assert flagged[0] > flagged[1]


@pytest.mark.parametrize("wrong", ["a column missing", "an unseen class", "a word for a number"])
def test_the_scoring_server_says_what_is_wrong_and_goes_on(scoring_server, rows, wrong):
    frame, params, named = {
        "a column missing": (rows.drop(columns="word"), {}, "word"),
        "an unseen class": (rows.assign(kind="unheard of"), {"unseen_class": "raise"}, "unheard of"),
        "a word for a number": (rows.assign(x="tall"), {}, "tall"),
    }[wrong]
    status, answer = ask(scoring_server, {**as_json(frame, "split"), "params": params})
    assert status == 400
    assert named in json.dumps(answer)
    assert reachable(f"{scoring_server}/ping")


def test_a_tracking_server_holds_the_run_until_it_dies(place, tmp_path, empty_database, monkeypatch):
    """Runs and models through HTTP, with nothing but JSON on standard output; then the server is lost."""
    shutil.copy(empty_database, tmp_path / "server.db")
    arguments = [
        "server", "--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}", "--serve-artifacts",
        "--artifacts-destination", str(tmp_path / "artifacts"), "--workers", "1",
    ]  # fmt: skip
    with serving(arguments, "/health", tmp_path / "server.log") as (url, process):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        result = command(
            "train", place / "machines.parquet", "-c", "kind", "-i", "serial", "-i", "side", "--label", "broken",
            "--output", tmp_path / "model", "--set", "max_steps=60", "--set", "hidden_dims=[16]",
            "--set", "n_estimators=1", "--json",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        run_id = re.search(r'"run_id": "(\w+)"', result.stdout).group(1)
        assert jobs.open_model(f"runs:/{run_id}").run_id == run_id
        assert {"tables/roc.json", "plots/roc_and_pr.html"} <= artifact_paths(run_id)

        plan = jobs.prepare(configuration(place / "machines.parquet", tmp_path / "second"))
        started = time.monotonic()
        lost = jobs.train(plan, on_stage=lambda stage: stop(process) if stage == "log" else None)
        assert time.monotonic() - started < 60
        assert url in lost.tracking_error
        assert jobs.open_model(str(lost.folder)).sha256 == lost.sha256
    assert json.loads(result.stdout)["model_sha256"] == bundle.model_hash(tmp_path / "model")
