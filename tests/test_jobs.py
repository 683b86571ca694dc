"""Jobs on tables in files: the configuration, the split, training, and what is done with a saved model."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from anomaly_cvae import CVAEDetector, bundle
from anomaly_cvae.errors import ConditionError, DataError, ParameterError
from anomaly_cvae.jobs import (
    Plan,
    TableConfig,
    TrainConfig,
    Trained,
    evaluate_model,
    explain_rows,
    explain_tables,
    generate_rows,
    load_config,
    open_model,
    prepare,
    recalibrate_model,
    train,
)
from anomaly_cvae.jobs.thresholds import Recalibrated
from anomaly_cvae.report import Report

TINY: dict[str, Any] = {"max_steps": 60, "hidden_dims": [16], "n_estimators": 1, "device": "cpu"}
N, ANOMALIES = 400, 20


def made_up(n: int = N, seed: int = 0) -> pd.DataFrame:
    """Two kinds of machine, far apart; the last rows of it are ``ANOMALIES`` that claim to be the other kind."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(["a", "b"], n)
    failed = np.arange(n) >= n - ANOMALIES
    behaves = np.where(failed, np.where(kind == "a", "b", "a"), kind)
    return pd.DataFrame(
        {
            "kind": kind,
            "Torque [Nm]": np.where(behaves == "a", 0.0, 40.0) + rng.normal(size=n),
            "speed": np.where(behaves == "a", 100.0, 160.0) + rng.normal(size=n),
            "alarms": rng.poisson(3, n),
            "failed": failed.astype(int),
        }
    )


@pytest.fixture
def written(tmp_path: Path):
    """Writes a table into a file of its own, and says where it is."""

    def write(table: pd.DataFrame, name: str = "table.csv", **options: Any) -> str:
        table.to_csv(tmp_path / name, index=False, **options)
        return str(tmp_path / name)

    return write


def config(data: str | list[str], **given: Any) -> TrainConfig:
    detector = {**TINY, **given.pop("detector", {})}
    return load_config(None, {"data": data, "detector": detector, "tracking": False, **given})


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return made_up()


@pytest.fixture(scope="module")
def trained(table: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    table.to_csv(folder / "table.csv", index=False)
    given = {"condition": ["kind"], "label": "failed", "name": "pumps", "output": str(folder / "model")}
    return train(prepare(config(str(folder / "table.csv"), **given)))


@pytest.fixture
def saved(trained: Trained, tmp_path: Path) -> str:
    """A saved model of one's own to change."""
    return str(shutil.copytree(trained.folder, tmp_path / "model"))


# ---------------------------------------------------------------------- configuration


def yaml_file(folder: Path, text: str) -> Path:
    (folder / "train.yaml").write_text(text, encoding="utf-8")
    return folder / "train.yaml"


FULL = """
data: rows.csv
condition: kind
label: failed
anomaly: [1, 2]
name: pumps
test_fraction: 0.5
preset: fast
column_kinds: {"Torque [Nm]": real}
csv: {delimiter: ";", decimal: ","}
detector: {max_steps: 60, hidden_dims: [16]}
tracking: false
register: pumps
tags: {site: north}
"""


def test_a_yaml_file_says_everything(tmp_path: Path) -> None:
    read = load_config(yaml_file(tmp_path, FULL), {})
    assert (read.data, read.condition, read.label, read.anomaly) == (["rows.csv"], ["kind"], "failed", [1, 2])
    assert (read.name, read.test_fraction, read.preset, read.tracking) == ("pumps", 0.5, "fast", False)
    assert (read.csv.delimiter, read.csv.decimal, read.csv.encoding) == (";", ",", None)
    assert (read.register_as, read.tags) == ("pumps", {"site": "north"})
    parameters = read.detector_parameters()
    assert parameters["max_steps"] == 60
    assert parameters["hidden_dims"] == [16]
    assert parameters["column_kinds"] == {"Torque [Nm]": "real"}


def test_flags_win_over_the_file_and_what_is_not_given_does_not(tmp_path: Path) -> None:
    given = {"name": "fans", "test_fraction": 0.0, "tracking": True, "label": None, "condition": [], "preset": None}
    read = load_config(yaml_file(tmp_path, FULL), given)
    assert (read.name, read.test_fraction, read.tracking) == ("fans", 0.0, True)
    assert (read.label, read.condition, read.preset) == ("failed", ["kind"], "fast")


def test_nested_keys_of_file_and_flags_are_joined(tmp_path: Path) -> None:
    given = {"csv": {"decimal": "."}, "detector": {"max_steps": 7}, "column_kinds": {"speed": "count"}}
    read = load_config(yaml_file(tmp_path, FULL), given)
    assert (read.csv.delimiter, read.csv.decimal) == (";", ".")
    assert read.detector == {"max_steps": 7, "hidden_dims": [16]}
    assert read.column_kinds == {"Torque [Nm]": "real", "speed": "count"}


def test_the_folder_is_the_name_unless_another_is_named() -> None:
    assert load_config(None, {"name": "pumps"}).folder == Path("pumps")
    assert load_config(None, {"name": "pumps", "output": "models/p1"}).folder == Path("models/p1")


def test_the_detectors_own_parameters_win_over_the_preset() -> None:
    parameters = load_config(None, {"preset": "fast", "detector": {"max_steps": 7}}).detector_parameters()
    assert parameters["max_steps"] == 7
    assert parameters["hidden_dims"] == (64, 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("conditon: kind", "conditon: there is no such key; did you mean 'condition'?"),
        ("registr: pumps", "registr: there is no such key; did you mean 'register'?"),
        ("csv: {delimeter: ';'}", "csv.delimeter: there is no such key; did you mean 'delimiter'?"),
        ("zzz: 1", "zzz: there is no such key; there are "),
    ],
)
def test_an_unknown_key_is_refused_with_file_and_nearest_name(tmp_path: Path, text: str, message: str) -> None:
    file = yaml_file(tmp_path, text)
    with pytest.raises(ParameterError) as caught:
        load_config(file, {})
    assert str(file) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("detector", "message"),
    [
        ({"max_step": 3}, r"detector.max_step: there is no such parameter; did you mean 'max_steps'\?"),
        ({"random_state": 3}, "detector.random_state: write it as 'random_state'"),
        ({"condition_columns": ["kind"]}, "detector.condition_columns: write it as 'condition'"),
    ],
)
def test_a_wrong_key_of_the_detector_is_refused_before_anything_is_read(detector: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        prepare(load_config(None, {"data": ["no such file.csv"], "detector": detector}))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("test_fraction: 1.5", ("test_fraction", "1.5", "less than 1")),
        ("test_fraction: half", ("test_fraction", "half", "number")),
        ("random_state: -1", ("random_state", "-1")),
        ("random_state: 1.5", ("random_state", "1.5")),
        ("preset: fastest", ("preset", "fastest", "balanced")),
        ("condition: {kind: 1}", ("condition", "list")),
        ("condition: [[kind]]", ("condition.0", "string")),
        ("detector: [1]", ("detector", "dictionary")),
        ("csv: ';'", ("csv",)),
        ("tags: {site: [1]}", ("tags.site", "string")),
        ("tracking: maybe", ("tracking", "maybe", "bool")),
    ],
)
def test_a_value_of_the_wrong_type_is_named(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ParameterError) as caught:
        load_config(yaml_file(tmp_path, text), {})
    assert all(word in str(caught.value) for word in words), caught.value


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"(?s)test_fraction.*conditon|conditon.*test_fraction"):
        load_config(yaml_file(tmp_path, "test_fraction: 2\nconditon: kind"), {})


@pytest.mark.parametrize(
    ("text", "message"), [("- a\n- b", "keys and values, not list"), ("just text", "keys and values, not str")]
)
def test_yaml_that_is_no_mapping_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        load_config(yaml_file(tmp_path, text), {})


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    assert load_config(yaml_file(tmp_path, "# nothing\n"), {"name": "x"}) == TrainConfig(name="x")


def test_unreadable_yaml_is_refused_with_file_and_line(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "name: pumps\nlabel: failed\ncondition: [kind\n")
    with pytest.raises(ParameterError, match="not readable as YAML") as caught:
        load_config(file, {})
    assert str(file) in str(caught.value)
    assert "line 3" in str(caught.value) or "line 4" in str(caught.value), caught.value


def test_yaml_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ParameterError, match=r"train\.yaml is not readable as YAML"):
        load_config(tmp_path / "train.yaml", {})


def test_a_configuration_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"none\.yaml: no such file"):
        load_config(tmp_path / "none.yaml", {})


def test_a_folder_in_place_of_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"folder|directory"):
        load_config(tmp_path, {})


# ---------------------------------------------------------------------- the split


def test_training_and_test_rows_are_disjoint_and_are_all_labelled_rows(written, table: pd.DataFrame) -> None:
    plan = prepare(config(written(table), condition=["kind"], label="failed"))
    training, test = set(plan.training.tolist()), set(plan.test.tolist())
    assert not training & test
    assert training | test == set(range(N))
    assert np.all(np.diff(plan.training) > 0)
    assert plan.class_sizes().sum() == len(training)
    assert set(plan.schema.names) == {"Torque [Nm]", "speed", "alarms"}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.75])
def test_the_test_fraction_is_of_the_normals(written, table: pd.DataFrame, share: float) -> None:
    plan = prepare(config(written(table), label="failed", test_fraction=share))
    failed = table["failed"].to_numpy()
    assert (failed[plan.test] == 0).sum() == round(share * (N - ANOMALIES))
    assert (failed[plan.test] == 1).sum() == ANOMALIES


def test_labelled_anomalies_are_not_learned_from(written, table: pd.DataFrame) -> None:
    plan = prepare(config(written(table), label="failed"))
    assert plan.training_rows["failed"].sum() == 0
    assert any("left out of training" in note for note in plan.notes)


def test_labelled_anomalies_are_learned_from_when_asked_for(written, table: pd.DataFrame) -> None:
    plan = prepare(config(written(table), label="failed", train_on_anomalies=True))
    inside, outside = plan.training_rows["failed"].sum(), plan.test_frame.iloc[plan.test]["failed"].sum()
    assert inside > 0
    assert outside > 0
    assert inside + outside == ANOMALIES
    assert not set(plan.training) & set(plan.test)
    assert len(plan.test) == round(0.3 * N)
    assert any("stay among the training rows" in note for note in plan.notes)


def test_rows_without_a_label_are_learned_from_and_not_evaluated(written, table: pd.DataFrame) -> None:
    gaps = table.astype({"failed": "Int64"})
    gaps.loc[:49, "failed"] = pd.NA
    plan = prepare(config(written(gaps), label="failed"))
    assert set(range(50)) <= set(plan.training.tolist())
    assert not set(range(50)) & set(plan.test.tolist())
    assert any(note.startswith("50 rows without a label are learned from") for note in plan.notes)


def test_a_label_without_any_value_leaves_every_row_to_learn_from(written, table: pd.DataFrame) -> None:
    plan = prepare(config(written(table.assign(failed=None)), label="failed"))
    assert len(plan.training) == N
    assert len(plan.test) == 0


def test_rows_that_are_neither_are_neither_learned_from_nor_evaluated(written, table: pd.DataFrame) -> None:
    states = table.assign(state=np.select([np.arange(N) < 30, table["failed"] == 1], ["repair", "bad"], "ok"))
    path = written(states.drop(columns="failed"))
    plan = prepare(config(path, label="state", anomaly=["bad"], normal=["ok"]))
    assert not set(range(30)) & {*plan.training.tolist(), *plan.test.tolist()}
    assert len(plan.training) + len(plan.test) == N - 30
    assert any(note.startswith("30 rows are neither") for note in plan.notes)


def test_a_comparison_splits_numbers(written, table: pd.DataFrame) -> None:
    lives = table.assign(life=np.arange(N))
    plan = prepare(config(written(lives), label="life", anomaly="<= 25", normal="> 50", ignore=["failed"]))
    assert plan.training.min() > 50
    assert {*range(26)} <= set(plan.test.tolist())
    assert not {*range(26, 51)} & set(plan.test.tolist())
    assert "life" not in plan.schema.names


def test_without_a_label_every_row_is_learned_from(written, table: pd.DataFrame) -> None:
    plan = prepare(config(written(table), condition=["kind"]))
    assert len(plan.training) == N
    assert len(plan.test) == 0
    assert plan.test_labels is None
    assert "failed" in plan.schema.names


def test_test_data_are_evaluated_on_and_all_normals_learned_from(written, table: pd.DataFrame) -> None:
    test = written(made_up(60, seed=1).astype({"failed": "Int64"}).replace({"failed": {0: pd.NA}}), "test.csv")
    plan = prepare(config(written(table), label="failed", test_data=[test]))
    assert len(plan.training) == N - ANOMALIES
    assert len(plan.test_frame) == 60
    assert plan.test.tolist() == list(range(60 - ANOMALIES, 60))


def test_test_data_need_a_label(written, table: pd.DataFrame) -> None:
    with pytest.raises(DataError, match="which column is the label"):
        prepare(config(written(table), test_data=[written(table, "test.csv")]))


@pytest.mark.parametrize("column", ["speed", "kind", "failed"])
def test_test_data_without_a_column_are_refused_before_training(written, table: pd.DataFrame, column: str) -> None:
    test = written(table.drop(columns=column), "test.csv")
    with pytest.raises(DataError, match=repr(column)):
        prepare(config(written(table), condition=["kind"], label="failed", test_data=[test]))


def test_the_label_cannot_be_the_condition(written, table: pd.DataFrame) -> None:
    with pytest.raises(DataError, match="'failed' is the label and cannot be the condition"):
        prepare(config(written(table), label="failed", condition=["kind", "failed"]))


@pytest.mark.parametrize(
    ("given", "role"),
    [
        ({"condition": ["Kind"]}, "condition"),
        ({"label": "faild"}, "label"),
        ({"ignore": ["speeed"]}, "ignore"),
        ({"column_kinds": {"Torque": "real"}}, "column_kinds"),
        ({"likelihoods": {"alarm": "poisson"}}, "likelihoods"),
    ],
)
def test_a_column_that_does_not_exist_is_named_with_the_nearest(
    written, table: pd.DataFrame, given: dict[str, Any], role: str
) -> None:
    near = {"condition": "kind", "label": "failed", "ignore": "speed", "column_kinds": "Torque [Nm]"}
    with pytest.raises(DataError, match=f"{role}: the table has no column") as caught:
        prepare(config(written(table), **given))
    assert f"did you mean {near.get(role, 'alarms')!r}?" in str(caught.value)


def test_the_label_may_be_named_among_the_ignored(written, table: pd.DataFrame) -> None:
    plan = prepare(config(written(table), label="failed", ignore=["failed", "speed"]))
    assert set(plan.schema.names) == {"kind", "Torque [Nm]", "alarms"}


def test_a_table_without_rows_is_refused(written, table: pd.DataFrame) -> None:
    with pytest.raises(DataError, match="has no rows"):
        prepare(config(written(table.head(0)), label="failed"))


def test_no_data_are_refused() -> None:
    with pytest.raises(DataError, match="no data to train on"):
        prepare(load_config(None, {"label": "failed"}))


def test_a_table_of_anomalies_only_is_refused(written, table: pd.DataFrame) -> None:
    with pytest.raises(DataError, match=f"no row is left to learn from.*all {N} rows are anomalies"):
        prepare(config(written(table.assign(failed=1)), label="failed"))


def test_a_table_of_left_out_rows_is_not_called_one_of_anomalies(written, table: pd.DataFrame) -> None:
    lives = written(table.assign(failed=np.arange(N)))
    with pytest.raises(DataError, match="no row is left to learn from") as caught:
        prepare(config(lives, label="failed", anomaly="< 10", normal="> 1000"))
    assert f"all {N} rows are anomalies" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["device ", "9"])
def test_a_condition_of_ten_thousand_values_is_refused_with_a_remedy(written, prefix: str) -> None:
    names = [f"{prefix}{i}x" for i in range(10_000)]
    path = written(pd.DataFrame({"device": names, "x": np.arange(10_000) / 7}))
    with pytest.raises((ConditionError, DataError), match=r"'device'.*10[,_]?000"):
        prepare(config(path, condition=["device"]))


@pytest.mark.parametrize("preset", ["fast", "balanced", "best"])
def test_presets_are_those_of_the_package(preset: str) -> None:
    from anomaly_cvae import presets

    parameters = TrainConfig(preset=preset).detector_parameters()
    assert getattr(presets, preset.upper()).items() <= parameters.items()


def test_the_split_depends_on_random_state_only(written, table: pd.DataFrame) -> None:
    path = written(table)
    first, again, other = (prepare(config(path, label="failed", random_state=s)) for s in (3, 3, 4))
    assert first.training.tolist() == again.training.tolist()
    assert first.test.tolist() == again.test.tolist()
    assert first.training.tolist() != other.training.tolist()


def test_several_files_are_one_table_whatever_the_order_of_their_columns(written, table: pd.DataFrame) -> None:
    written(table.head(100), "a.csv")
    folder = str(Path(written(table.iloc[100:][table.columns[::-1]], "b.csv")).parent)
    plan = prepare(config(folder, label="failed"))
    pd.testing.assert_frame_equal(plan.frame, table)


def test_files_of_different_columns_are_refused_naming_both(written, table: pd.DataFrame) -> None:
    paths = [written(table, "a.csv"), written(table.drop(columns="speed"), "b.csv")]
    with pytest.raises(DataError, match=r"b\.csv.*a\.csv.*speed"):
        prepare(config(paths))


def test_how_a_csv_file_was_read_is_said(written, table: pd.DataFrame) -> None:
    plan = prepare(config(written(table, sep=";", decimal=","), label="failed"))
    assert any("table.csv was read with delimiter ';', decimal ','" in note for note in plan.notes)
    np.testing.assert_allclose(plan.frame["speed"], table["speed"])


# ---------------------------------------------------------------------- training


def test_the_saved_model_scores_as_the_trained_one(trained: Trained, table: pd.DataFrame) -> None:
    loaded = CVAEDetector.load(trained.folder, device="cpu")
    pd.testing.assert_frame_equal(loaded.score_table(table), trained.detector.score_table(table))
    assert bundle.model_hash(trained.folder) == trained.sha256
    assert trained.run_id is None


def test_the_saved_model_says_where_it_comes_from(trained: Trained) -> None:
    notes = bundle.provenance(trained.folder)
    assert notes["name"] == "pumps"
    assert notes["training_rows"] == str(len(trained.plan.training))
    assert Path(notes["data"]).name == "table.csv"
    assert len(notes["data_sha256"]) == 64
    assert {"trained_at", "trained_by", "experiment"} <= notes.keys()
    assert "run_id" not in notes


def test_no_tracking_leaves_nothing_but_the_model(written, table: pd.DataFrame, tmp_path, monkeypatch) -> None:
    path = written(table)
    monkeypatch.chdir(tmp_path)
    train(prepare(config(path, label="failed", name="pumps")))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["pumps", "table.csv"]


def test_machines_that_behave_as_the_other_kind_are_found(trained: Trained) -> None:
    assert trained.evaluated is not None
    ranking = trained.evaluated.evaluation.ranking
    assert ranking.loc["overall", "roc_auc"] > 0.99
    assert ranking.loc["overall", "anomalies"] == ANOMALIES
    assert ranking.loc["overall", "rows"] == len(trained.plan.test)
    assert set(trained.seconds) == {"read", "fit", "evaluate", "save"}


def test_rows_explained_after_training_bear_the_numbers_of_the_table(trained: Trained, table: pd.DataFrame) -> None:
    rows = trained.explanation.rows
    assert set(rows["row"]) <= set(trained.plan.test.tolist())
    assert rows["condition"].tolist() == table.loc[rows["row"], "kind"].tolist()
    assert (table.loc[rows["row"], "failed"] == 1).mean() > 0.9


def test_without_a_label_the_training_rows_are_explained(written, table: pd.DataFrame, tmp_path: Path) -> None:
    path = written(table.drop(columns="failed"))
    done = train(prepare(config(path, condition="kind", output=str(tmp_path / "m"))))
    assert done.evaluated is None
    assert done.explanation.n_rows == N
    assert len(done.explanation.rows) > 0


def test_one_configuration_trains_one_model(written, table: pd.DataFrame, tmp_path: Path) -> None:
    path = written(table)

    def hashed(name: str, seed: int) -> str:
        given = {"condition": "kind", "label": "failed", "random_state": seed, "output": str(tmp_path / name)}
        done = train(prepare(config(path, **given)))
        return str(done.detector.score_samples(table).tolist())

    assert hashed("first", 5) == hashed("second", 5)
    assert hashed("third", 6) != hashed("first", 5)


@pytest.mark.parametrize("labelled", [0, 1], ids=["a normal", "an anomaly"])
def test_a_row_without_a_condition_does_not_cost_the_training(
    written, table: pd.DataFrame, tmp_path: Path, labelled: int
) -> None:
    """Either it is refused before training, or the model is saved all the same."""
    gap = table.assign(kind=table["kind"].mask(table.index == table.index[table["failed"] == labelled][3]))
    stages: list[str] = []
    given = {"condition": "kind", "label": "failed", "output": str(tmp_path / "m")}
    with contextlib.suppress(ConditionError):
        train(prepare(config(written(gap), **given)), on_stage=stages.append)
    assert (tmp_path / "m").is_dir() or not stages


def test_the_stages_are_told_in_order(written, table: pd.DataFrame, tmp_path: Path) -> None:
    stages: list[str] = []
    train(prepare(config(written(table), output=str(tmp_path / "m"))), on_stage=stages.append)
    assert stages == ["fit", "save", "evaluate"]


# ---------------------------------------------------------------------- explanation


def test_explained_rows_come_most_surprising_first(trained: Trained, table: pd.DataFrame) -> None:
    scored = trained.detector.score_table(table)
    rows = explain_rows(trained.detector, table, scored, n_rows=30).rows
    assert len(rows) == 30
    assert rows["p_value"].is_monotonic_increasing
    above = (rows["score"] - rows["threshold"]).groupby(rows["p_value"], sort=False)
    assert above.apply(lambda own: own.is_monotonic_decreasing).all()
    rest = scored.drop(index=rows["row"])
    assert rows["p_value"].max() <= rest["p_value"].min()


def test_a_row_that_belongs_to_another_class_is_said_to(trained: Trained) -> None:
    liar = pd.DataFrame({"kind": ["a", "b", "a"], "Torque [Nm]": [40.0, 0.0, 0.0], "speed": [160.0, 100.0, 100.0]})
    liar = liar.assign(alarms=3, failed=0)
    detector = trained.detector
    rows = explain_rows(detector, liar, detector.score_table(liar)).rows.set_index("row")
    assert rows["most_normal_as"].to_dict() == {0: "b", 1: "a", 2: "a"}
    assert (rows["nats_there"] <= rows["negative_elbo"] + 1e-4).all()
    assert rows.loc[0, "nats_there"] < rows.loc[0, "negative_elbo"] - 10
    assert bool(rows.loc[0, "is_anomaly"])
    assert not bool(rows.loc[2, "is_anomaly"])


def test_the_table_of_an_explanation_has_a_line_per_row_and_column(trained: Trained, table: pd.DataFrame) -> None:
    found = explain_rows(trained.detector, table, trained.detector.score_table(table), n_rows=4, n_columns=2)
    assert len(found.table) == 8
    assert found.table["row"].nunique() == 4
    assert {"row", "condition", "is_anomaly", "column", "nats", "observed", "expected"} <= set(found.table)


def test_rows_are_explained_under_an_index_that_holds_a_label_twice(trained: Trained, table: pd.DataFrame) -> None:
    twice = pd.concat([table, table])
    found = explain_rows(trained.detector, twice, trained.detector.score_table(twice), n_rows=6)
    assert len(found.rows) == 6
    assert set(found.rows["row"]) <= set(table.index)
    assert found.rows["condition"].tolist() == table.loc[found.rows["row"], "kind"].tolist()


def test_row_numbers_count_through_all_files(saved: str, written, table: pd.DataFrame) -> None:
    whole = written(table, "whole.csv")
    parts = [written(table.iloc[:150], "p1.csv"), written(table.iloc[150:], "p2.csv")]
    model = open_model(saved, device="cpu")
    one, many = (explain_tables(model, inputs, n_rows=10) for inputs in ([whole], parts))
    pd.testing.assert_frame_equal(one.rows, many.rows.drop(columns=["file", "row_in_file"]))
    places = many.rows["row"] - 150 * (many.rows["row"] >= 150)
    assert (many.rows["row_in_file"] == places).all()
    assert (
        many.rows["file"].map(lambda name: Path(name).name) == np.where(many.rows["row"] < 150, "p1.csv", "p2.csv")
    ).all()
    pd.testing.assert_frame_equal(one.columns, many.columns)
    assert (one.n_rows, one.n_alarms) == (many.n_rows, many.n_alarms) == (N, one.n_alarms)
    assert set(map(tuple, one.alarm_columns[["class", "column", "alarms", "top"]].to_numpy())) == set(
        map(tuple, many.alarm_columns[["class", "column", "alarms", "top"]].to_numpy())
    )
    assert (table.loc[many.rows["row"], "failed"] == 1).all()


def test_what_drives_the_alarms_is_asked_of_so_many_rows_in_all(
    saved: str, written, table: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("anomaly_cvae.jobs.explanation.MOST_FOR_ALARM_COLUMNS", 7)
    last = table.tail(ANOMALIES)
    parts = [written(last.iloc[:5], "p1.csv"), written(last.iloc[5:10], "p2.csv"), written(last.iloc[10:], "p3.csv")]
    model = open_model(saved, device="cpu")
    found = explain_tables(model, parts)
    assert found.n_alarms > 10
    assert found.alarm_columns["top"].sum() == 7
    assert explain_rows(model.detector, last, model.detector.score_table(last)).alarm_columns["top"].sum() == 7
    with Report() as report:
        report.explained(found, model)
    assert "most to blame in each, of the first 7" in " ".join(capsys.readouterr().out.split())


def test_rows_asked_for_by_number_are_explained_and_no_others(saved: str, written, table: pd.DataFrame) -> None:
    parts = [written(table.iloc[:150], "p1.csv"), written(table.iloc[150:], "p2.csv")]
    found = explain_tables(open_model(saved, device="cpu"), parts, rows=[399, 0, 150], n_columns=2)
    assert sorted(found.rows["row"]) == [0, 150, 399]
    assert found.columns.groupby("row").size().to_dict() == {0: 2, 150: 2, 399: 2}
    observed = found.columns.query("column == 'speed'").set_index("row")["observed"]
    for row, value in observed.items():
        assert float(value) == pytest.approx(table.loc[row, "speed"])


@pytest.mark.parametrize("row", [400, -1])
def test_a_row_that_is_not_there_is_named_with_how_many_there_are(
    saved: str, written, table: pd.DataFrame, row: int
) -> None:
    with pytest.raises(DataError, match=f"no row {row}: the tables have 400 rows, counted from 0"):
        explain_tables(open_model(saved, device="cpu"), [written(table)], rows=[0, row])


def test_of_a_table_without_rows_nothing_is_explained(saved: str, written, table: pd.DataFrame) -> None:
    parts = [written(table.head(0), "empty.csv"), written(table, "full.csv")]
    model = open_model(saved, device="cpu")
    assert explain_tables(model, parts).n_rows == N
    found = explain_tables(model, parts[:1])
    assert (found.n_rows, found.n_alarms, len(found.rows)) == (0, 0, 0)


def test_a_class_that_training_did_not_see_is_explained_too(saved: str, written, table: pd.DataFrame) -> None:
    new = written(table.assign(kind="c").head(3))
    found = explain_tables(open_model(saved, device="cpu", unseen_class="anomaly"), [new])
    assert found.rows["is_anomaly"].all()
    assert set(found.rows["condition"]) == {"c"}
    assert set(found.rows["most_normal_as"]) <= {"a", "b"}


# ---------------------------------------------------------------------- evaluation


def test_an_evaluation_counts_labelled_rows_only(saved: str, written, table: pd.DataFrame) -> None:
    gaps = table.astype({"failed": "Int64"})
    gaps.loc[:99, "failed"] = pd.NA
    given = TableConfig(data=[written(gaps)], label="failed")
    done = evaluate_model(open_model(saved, device="cpu"), given, log=False)
    assert done.evaluation.ranking.loc["overall", "rows"] == N - 100
    assert done.evaluation.ranking.loc["overall", "roc_auc"] > 0.99
    assert len(done.scored) == N - 100


def test_an_evaluation_needs_a_label(saved: str, written, table: pd.DataFrame) -> None:
    model = open_model(saved, device="cpu")
    remembered = evaluate_model(model, TableConfig(data=[written(table)]), log=False)  # the label of the training
    assert remembered.evaluation.is_anomaly.sum() == (table["failed"] == 1).sum()
    with pytest.raises(DataError, match="label"):
        evaluate_model(model, TableConfig(data=[written(table.drop(columns="failed"))]), log=False)
    with pytest.raises(DataError, match="no row has a label"):
        evaluate_model(model, TableConfig(data=[written(table.assign(failed=None))], label="failed"), log=False)


def test_a_condition_that_looks_like_a_number_means_what_it_meant_in_training(
    written, table: pd.DataFrame, tmp_path: Path
) -> None:
    """Trained on the text values "1" and "x", a table of nothing but 1s is one of the class "1"."""
    named = table.assign(kind=table["kind"].map({"a": "1", "b": "x"}))
    given = {"condition": "kind", "label": "failed", "output": str(tmp_path / "m")}
    train(prepare(config(written(named, "both.csv"), **given)))
    ones = written(named[named["kind"] == "1"], "ones.csv")
    model = open_model(str(tmp_path / "m"), device="cpu")
    done = evaluate_model(model, TableConfig(data=[ones], label="failed"), log=False)
    assert set(done.scored["condition"]) == {"1"}
    assert done.evaluation.alarms.loc["overall", "false_alarm_rate"] < 0.1
    assert explain_tables(model, [ones]).n_alarms == int(done.scored["is_anomaly"].sum())


# ---------------------------------------------------------------------- generation


def test_rows_are_drawn_of_the_class_that_is_named(saved: str) -> None:
    model = open_model(saved, device="cpu")
    for kind, torque in (("a", 0.0), ("b", 40.0)):
        drawn = generate_rows(model, 50, [kind], 0)
        assert len(drawn) == 50
        assert set(drawn["kind"]) == {kind}
        assert list(drawn.columns) == ["kind", "Torque [Nm]", "speed", "alarms"]
        assert abs(drawn["Torque [Nm]"].median() - torque) < 10


def test_rows_of_all_classes_are_drawn_when_none_is_named(saved: str) -> None:
    drawn = generate_rows(open_model(saved, device="cpu"), 100, None, 0)
    assert set(drawn["kind"]) == {"a", "b"}


def test_the_seed_decides_what_is_drawn(saved: str) -> None:
    model = open_model(saved, device="cpu")
    first, again, other = (generate_rows(model, 5, ["a"], seed) for seed in (1, 1, 2))
    pd.testing.assert_frame_equal(first, again)
    assert not first.equals(other)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (["c"], r"'kind' has no value 'c'; it has a, b"),
        (["a", "b"], r"1 condition.*\['kind'\]; 2 value"),
        ([], "0 val"),
    ],
)
def test_a_class_that_does_not_exist_is_refused(saved: str, condition: list[str], message: str) -> None:
    with pytest.raises(ConditionError, match=message):
        generate_rows(open_model(saved, device="cpu"), 5, condition, 0)


def test_numbers_and_truth_values_of_a_condition_are_named_by_their_text(
    written, table: pd.DataFrame, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    several = table.assign(line=rng.integers(1, 3, N), indoors=rng.random(N) < 0.5, load=rng.normal(size=N))
    given = {"condition": ["line", "indoors", "load"], "label": "failed", "output": str(tmp_path / "m")}
    train(prepare(config(written(several), **given)))
    model = open_model(str(tmp_path / "m"), device="cpu")
    drawn = generate_rows(model, 3, ["2", "True", "0.5"], 0)
    assert drawn[["line", "indoors", "load"]].drop_duplicates().to_numpy().tolist() == [[2, True, 0.5]]
    with pytest.raises(ConditionError, match="'load' is a number, not 'much'"):
        generate_rows(model, 3, ["2", "True", "much"], 0)


# ---------------------------------------------------------------------- recalibration


def test_a_higher_rate_lowers_the_thresholds_and_is_saved(saved: str) -> None:
    before = bundle.provenance(saved)
    model = open_model(saved, device="cpu")
    done = recalibrate_model(model, None, false_alarm_rate=0.2, log=False)
    assert (done.after["threshold"] < done.before["threshold"]).all()
    loaded = CVAEDetector.load(saved, device="cpu")
    pd.testing.assert_frame_equal(loaded.thresholds_, done.after)
    assert done.sha256 == bundle.model_hash(saved) != model.sha256
    assert bundle.provenance(saved) == before


def test_another_folder_leaves_the_model_as_it_was(saved: str, tmp_path: Path) -> None:
    before = bundle.model_hash(saved)
    done = recalibrate_model(
        open_model(saved, device="cpu"), None, false_alarm_rate=0.2, output=tmp_path / "new", log=False
    )
    assert done.folder == tmp_path / "new"
    assert bundle.model_hash(saved) == before
    assert bundle.provenance(done.folder)["name"] == "pumps"


def test_fresh_normals_set_the_thresholds_without_the_anomalies(saved: str, written) -> None:
    fresh = made_up(600, seed=2)
    normals = written(fresh[fresh["failed"] == 0].drop(columns="failed"), "normals.csv")
    mixed = written(fresh, "mixed.csv")
    rows = [
        recalibrate_model(open_model(saved, device="cpu"), TableConfig(**given), output=f"{saved}-{i}", log=False).after
        for i, given in enumerate(({"data": [normals]}, {"data": [mixed], "label": "failed"}))
    ]
    np.testing.assert_allclose(rows[0]["threshold"], rows[1]["threshold"])
    assert rows[0].loc[["a", "b"], "calibration_rows"].sum() == 600 - ANOMALIES
    detector = CVAEDetector.load(f"{saved}-1", device="cpu")
    assert (detector.predict(made_up(2_000, seed=3).iloc[:-ANOMALIES]) == -1).mean() < 0.04


def test_thresholds_from_the_training_table_promise_nothing_and_say_so(trained: Trained, saved: str, written) -> None:
    def recalibrated(path: str) -> Recalibrated:
        given = TableConfig(data=[path], label="failed")
        return recalibrate_model(open_model(saved, device="cpu"), given, false_alarm_rate=0.2, log=False)

    fresh = recalibrated(written(made_up(600, seed=2), "fresh.csv"))
    assert (fresh.after.loc[["a", "b"], "guarantee"] == "class").all()
    with pytest.warns(UserWarning, match="the model was trained on"):
        done = recalibrated(str(Path(trained.folder).parent / "table.csv"))
    assert (done.after["guarantee"] == "none").all()
    assert done.after["rule"].str.endswith("rows of the table that the model was trained on").all()
    pd.testing.assert_frame_equal(CVAEDetector.load(saved, device="cpu").thresholds_, done.after)


def test_there_must_be_something_to_change(saved: str) -> None:
    with pytest.raises(ParameterError, match=r"DATA.*--false-alarm-rate"):
        recalibrate_model(open_model(saved, device="cpu"), None, log=False)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 5.0])
def test_a_rate_that_is_no_share_is_refused_and_the_model_kept(saved: str, rate: float) -> None:
    before = bundle.model_hash(saved)
    with pytest.raises(ParameterError, match="false_alarm_rate must lie in"):
        recalibrate_model(open_model(saved, device="cpu"), None, false_alarm_rate=rate, log=False)
    assert bundle.model_hash(saved) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"failed": 1}, "no row is labelled normal"),
        ({"failed": None}, "no row is labelled normal"),
        ({"kind": "a"}, "no rows of b"),
        ({"kind": "c"}, "no class that training knew"),
    ],
)
def test_rows_that_cannot_set_thresholds_are_refused_and_the_model_kept(
    saved: str, written, table: pd.DataFrame, change: dict[str, Any], message: str
) -> None:
    before = bundle.model_hash(saved)
    given = TableConfig(data=[written(table.assign(**change))], label="failed")
    with pytest.raises(DataError, match=message):
        recalibrate_model(open_model(saved, device="cpu"), given, log=False)
    assert bundle.model_hash(saved) == before


def test_a_plan_trains_nothing(written, table: pd.DataFrame, tmp_path: Path, monkeypatch) -> None:
    path = written(table)
    monkeypatch.chdir(tmp_path)
    plan = prepare(config(path, label="failed"))
    assert isinstance(plan, Plan)
    assert not hasattr(plan.detector, "model_")
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.csv"]
