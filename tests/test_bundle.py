"""The saved model: exact on reading, refused when changed, free of pickles and of training rows."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from anomaly_cvae import CVAEDetector, bundle
from anomaly_cvae.errors import BundleError

FILES = (
    "weights.safetensors",
    "model.json",
    "detector.json",
    "history.json",
    "calibration.json",
    "calibration.npz",
)
ALL_FILES = (*FILES, "manifest.json")
SCORES = ("score_samples", "negative_elbo", "decision_function", "predict", "p_values", "calibrated_score")

DETECTORS: dict[str, dict[str, Any]] = {
    "shared": {"condition_columns": "type", "n_estimators": 2, "missing_condition": "marginal"},
    "per_class": {"condition_columns": ["type"], "conditioning": "per_class", "unseen_class": "anomaly"},
    "unconditional": {"ignore_columns": ["type"], "dtype": "float64", "contamination": 0.1},
    "continuous": {"condition_columns": ["type", "load"], "prior": "learned"},
    "contrast": {
        "condition_columns": "type",
        "score_kind": "both",
        "prior": "standard",
        "likelihoods": {"pressure": "student_t", "errors": "poisson"},
        "column_kinds": {"level": "categorical"},
        "hidden_dims": [16, 8],
        "linear_start": False,
    },
}


def detector(**parameters: Any) -> CVAEDetector:
    tiny = {"max_steps": 30, "hidden_dims": (16,), "n_estimators": 1, "random_state": 0, "device": "cpu"}
    return CVAEDetector(**{**tiny, **parameters})


@pytest.fixture(scope="module")
def data() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    n = 160
    kind = rng.choice(["fridge", "furnace"], n)
    return pd.DataFrame(
        {
            "type": kind,
            "temperature": np.where(kind == "fridge", 4.0, 80.0) + rng.normal(size=n),
            "pressure": rng.normal(1000.0, 10.0, n),
            "load": rng.normal(size=n),
            "color": rng.choice(["red", "blue"], n),
            "errors": rng.poisson(4, n),
            "level": rng.integers(0, 3, n),
        }
    )


@pytest.fixture(scope="module")
def saved(data: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[CVAEDetector, Path]]:
    folder = tmp_path_factory.mktemp("bundles")
    fitted = {name: detector(**parameters).fit(data) for name, parameters in DETECTORS.items()}
    return {name: (det, det.save(folder / name)) for name, det in fitted.items()}


@pytest.fixture
def copied(saved: dict[str, tuple[CVAEDetector, Path]], tmp_path: Path) -> Path:
    """A bundle of one's own to spoil."""
    return Path(shutil.copytree(saved["shared"][1], tmp_path / "model"))


def load(folder: Path) -> CVAEDetector:
    return CVAEDetector.load(folder, device="cpu")


def with_gaps(table: pd.DataFrame) -> pd.DataFrame:
    """The table with cells of x missing, a level never seen and a far value."""
    gaps = table.astype({"errors": float, "color": object})
    gaps.loc[::3, "temperature"] = np.nan
    gaps.loc[1::5, ["errors", "color"]] = None
    gaps.loc[2, "color"] = "pink"
    gaps.loc[4, "pressure"] = 1e30
    return gaps


# ---------------------------------------------------------------------- save and load


@pytest.mark.parametrize("method", SCORES)
@pytest.mark.parametrize("name", DETECTORS)
def test_a_loaded_detector_scores_exactly_as_the_saved_one(
    name: str, method: str, saved: dict[str, tuple[CVAEDetector, Path]], data: pd.DataFrame
) -> None:
    det, folder = saved[name]
    loaded = load(folder)
    for table in (data, with_gaps(data), data.iloc[:1]):
        np.testing.assert_array_equal(getattr(loaded, method)(table), getattr(det, method)(table))


@pytest.mark.parametrize("name", DETECTORS)
def test_a_loaded_detector_has_the_same_thresholds_schema_and_history(
    name: str, saved: dict[str, tuple[CVAEDetector, Path]]
) -> None:
    det, folder = saved[name]
    loaded = load(folder)
    pd.testing.assert_frame_equal(loaded.thresholds_, det.thresholds_, check_exact=True)
    assert loaded.offset_ == det.offset_
    assert loaded.schema_ == det.schema_
    pd.testing.assert_frame_equal(loaded.history_, det.history_, check_exact=True)
    assert loaded.n_features_in_ == det.n_features_in_
    np.testing.assert_array_equal(loaded.feature_names_in_, det.feature_names_in_)
    np.testing.assert_array_equal(loaded.get_feature_names_out(), det.get_feature_names_out())


def test_a_loaded_detector_says_why_its_training_ended(saved: dict[str, tuple[CVAEDetector, Path]]) -> None:
    det, folder = saved["shared"]
    assert det.history_.attrs["stopped_by"] == "max_steps"
    assert load(folder).history_.attrs.get("stopped_by") == "max_steps"


@pytest.mark.parametrize("name", DETECTORS)
def test_a_loaded_detector_explains_and_generates_as_the_saved_one(
    name: str, saved: dict[str, tuple[CVAEDetector, Path]], data: pd.DataFrame
) -> None:
    det, folder = saved[name]
    loaded, gaps = load(folder), with_gaps(data)
    pd.testing.assert_frame_equal(loaded.explain(gaps), det.explain(gaps), check_exact=True)
    pd.testing.assert_frame_equal(loaded.impute(gaps), det.impute(gaps), check_exact=True)
    np.testing.assert_array_equal(loaded.transform(data), det.transform(data))
    condition = {"unconditional": None, "continuous": [["fridge", 0.5]] * 7}.get(name, "fridge")
    drawn = loaded.sample(7, condition=condition, random_state=1)
    pd.testing.assert_frame_equal(drawn, det.sample(7, condition=condition, random_state=1), check_exact=True)
    assert len(drawn) == 7
    if name not in ("unconditional", "continuous"):
        pd.testing.assert_frame_equal(loaded.condition_proba(data), det.condition_proba(data), check_exact=True)


@pytest.mark.parametrize("name", DETECTORS)
def test_a_loaded_detector_has_the_parameters_and_its_clone_trains_to_the_same_model(
    name: str, saved: dict[str, tuple[CVAEDetector, Path]], data: pd.DataFrame
) -> None:
    det, folder = saved[name]
    copy = clone(load(folder))
    with pytest.raises(NotFittedError):
        copy.predict(data)
    as_lists = json.dumps([det.get_params(), copy.get_params()], default=list)
    assert json.loads(as_lists)[0] == json.loads(as_lists)[1]
    np.testing.assert_array_equal(copy.fit(data).score_samples(data), det.score_samples(data))


def test_a_loaded_detector_can_be_recalibrated_and_saved_again(
    saved: dict[str, tuple[CVAEDetector, Path]], data: pd.DataFrame, tmp_path: Path
) -> None:
    loaded = load(saved["shared"][1]).recalibrate(data, false_alarm_rate=0.2)
    again = load(loaded.save(tmp_path / "again"))
    np.testing.assert_array_equal(again.predict(data), loaded.predict(data))
    pd.testing.assert_frame_equal(again.thresholds_, loaded.thresholds_, check_exact=True)


def test_detectors_trained_on_arrays_and_passed_conditions_come_back(data: pd.DataFrame, tmp_path: Path) -> None:
    X = data[["temperature", "pressure", "errors"]].to_numpy()
    det = detector().fit(X, condition=data["type"].to_numpy())
    loaded = load(det.save(tmp_path / "model"))
    np.testing.assert_array_equal(
        loaded.score_samples(X, condition=data["type"]), det.score_samples(X, condition=data["type"])
    )
    assert isinstance(loaded.sample(3, condition="fridge"), np.ndarray)


def test_the_hash_names_the_model(saved: dict[str, tuple[CVAEDetector, Path]], tmp_path: Path) -> None:
    folder = saved["shared"][1]
    assert bundle.model_hash(folder) == bundle.model_hash(shutil.copytree(folder, tmp_path / "elsewhere"))
    assert bundle.model_hash(folder) != bundle.model_hash(saved["contrast"][1])
    assert bundle.model_hash(load(folder).save(tmp_path / "again")) == bundle.model_hash(folder)


@pytest.mark.parametrize("form", [np.array, pd.Index, tuple, list], ids=["array", "Index", "tuple", "list"])
def test_condition_columns_survive_in_whatever_sequence_they_came(
    form: Any, data: pd.DataFrame, tmp_path: Path
) -> None:
    det = detector(condition_columns=form(["type"])).fit(data)
    loaded = load(det.save(tmp_path / "model"))
    assert list(loaded.condition_columns) == ["type"]


def test_columns_named_by_numpy_integers_can_be_saved(data: pd.DataFrame, tmp_path: Path) -> None:
    table = data.set_axis(pd.Index([10, 11, 12, 13, 14, 15, 16]), axis=1)
    det = detector(condition_columns=table.columns[0], ignore_columns=[-1]).fit(table)
    loaded = load(det.save(tmp_path / "model"))
    np.testing.assert_array_equal(loaded.score_samples(table), det.score_samples(table))


# ---------------------------------------------------------------------- changed, missing, newer


@pytest.mark.parametrize("where", [0.0, 0.5, 1.0], ids=["first", "middle", "last"])
@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_is_refused_by_the_name_of_the_file(name: str, where: float, copied: Path) -> None:
    content = bytearray((copied / name).read_bytes())
    content[int(where * (len(content) - 1))] ^= 1
    (copied / name).write_bytes(content)
    with pytest.raises(BundleError, match=rf"{re.escape(name)} is not the file that was saved .*restore the bundle"):
        load(copied)


@pytest.mark.parametrize("name", FILES)
def test_a_changed_hash_in_the_manifest_is_refused_by_the_name_of_the_file(name: str, copied: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["files"][name] = "0" * 64
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=re.escape(name)):
        load(copied)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_refused_by_name(name: str, copied: Path) -> None:
    (copied / name).write_bytes((copied / name).read_bytes()[:-1])
    with pytest.raises(BundleError, match=re.escape(name)):
        load(copied)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused_by_name_with_the_remedy(name: str, copied: Path) -> None:
    (copied / name).unlink()
    with pytest.raises(BundleError, match=rf"{re.escape(name)} is missing; restore the bundle"):
        load(copied)


def test_a_bundle_without_its_manifest_is_no_bundle(copied: Path) -> None:
    (copied / "manifest.json").unlink()
    with pytest.raises(BundleError, match=r"is not a model bundle: it has no manifest\.json"):
        load(copied)


@pytest.mark.parametrize("what", ["empty folder", "nothing", "file"])
def test_something_that_is_no_bundle_is_refused_by_name(what: str, tmp_path: Path) -> None:
    target = tmp_path / "model"
    if what == "empty folder":
        target.mkdir()
    elif what == "file":
        target.write_text("no model")
    with pytest.raises(BundleError, match=rf"{re.escape(str(target))} is not a model bundle"):
        load(target)


def test_a_newer_format_is_refused_with_both_versions_and_the_remedy(copied: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    newer = {**manifest, "format_version": bundle.FORMAT_VERSION + 1, "library_version": "9.8.7"}
    (copied / "manifest.json").write_text(json.dumps(newer))
    with pytest.raises(BundleError) as caught:
        load(copied)
    for part in (f"format {bundle.FORMAT_VERSION + 1}", "9.8.7", f"up to {bundle.FORMAT_VERSION}", "upgrade"):
        assert part in str(caught.value)


SINCE_FORMAT_3 = {
    "architecture": (
        "channels",
        "observed_condition",
        "n_classes",
        "n_attributes",
        "pseudo_inputs",
        "n_groups",
        "n_paths",
    ),
    "parameters": (
        "channels",
        "condition_on_observed",
        "inference_head",
        "free_bits",
        "mask_shapes",
        "checkpoint",
        "part_weights",
        "linear_start",
    ),
}


def as_format_2(folder: Path) -> Path:
    """A bundle as the version before images wrote it: other names of weights, and nothing that came since."""
    weights = load_file(folder / "weights.safetensors")
    save_file({name.replace(".mlp.", "."): value for name, value in weights.items()}, folder / "weights.safetensors")
    model, parameters = (json.loads((folder / f"{name}.json").read_text()) for name in ("model", "detector"))
    for name in SINCE_FORMAT_3["architecture"]:
        del model["architecture"][name]
    for column in model["encoder"]["schema"]["columns"]:
        del column["image"]
    for column in model["encoder"]["columns"]:
        del column["shape"]
    for name in SINCE_FORMAT_3["parameters"]:
        del parameters["parameters"][name]
    (folder / "model.json").write_text(json.dumps(model))
    (folder / "detector.json").write_text(json.dumps(parameters))
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format_version": 2, "files": files}))
    return folder


@pytest.mark.parametrize("name", [name for name in DETECTORS if name != "shared"])  # its classes have linear paths
def test_a_bundle_of_the_format_before_images_is_read(
    name: str, saved: dict[str, tuple[CVAEDetector, Path]], data: pd.DataFrame, tmp_path: Path
) -> None:
    det, folder = saved[name]
    old = as_format_2(Path(shutil.copytree(folder, tmp_path / "old")))
    assert not [weight for weight in load_file(old / "weights.safetensors") if ".mlp." in weight]
    loaded = load(old)
    for method in SCORES:
        np.testing.assert_array_equal(getattr(loaded, method)(data), getattr(det, method)(data))
    pd.testing.assert_frame_equal(loaded.explain(data), det.explain(data))
    load(loaded.save(tmp_path / "new"))
    assert json.loads((tmp_path / "new" / "manifest.json").read_text())["format_version"] == bundle.FORMAT_VERSION


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '"a word"',
        '{"format_version": 1, "files": {}}',
        '{"format_version": "1", "files": {}, "library_version": "0.1.0"}',
        '{"format_version": null, "files": {}, "library_version": "0.1.0"}',
        '{"format_version": 1, "files": null, "library_version": "0.1.0"}',
    ],
)
def test_a_manifest_that_is_none_is_refused_by_name(text: str, copied: Path) -> None:
    (copied / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        load(copied)


# ---------------------------------------------------------------------- where it is written


def test_save_makes_the_folder_and_returns_it(saved: dict[str, tuple[CVAEDetector, Path]], tmp_path: Path) -> None:
    target = saved["shared"][0].save(str(tmp_path / "new" / "deep" / "model"))
    assert target == tmp_path / "new" / "deep" / "model"
    assert sorted(file.name for file in target.iterdir()) == sorted(ALL_FILES)
    assert [file.name for file in target.parent.iterdir()] == ["model"], "nothing else may be left beside it"


def test_save_overwrites_a_bundle(
    saved: dict[str, tuple[CVAEDetector, Path]], copied: Path, data: pd.DataFrame
) -> None:
    det = saved["per_class"][0]
    det.save(copied)
    np.testing.assert_array_equal(load(copied).score_samples(data), det.score_samples(data))
    assert [file.name for file in copied.parent.iterdir()] == [copied.name]


def test_save_fills_an_empty_folder(saved: dict[str, tuple[CVAEDetector, Path]], tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    saved["shared"][0].save(target)
    bundle.check(target)


@pytest.mark.parametrize(
    "content",
    [{"notes.txt": "mine"}, {"manifest.json": '{"name": "a web page"}', "notes.txt": "mine"}],
    ids=["a file", "another program's manifest.json"],
)
def test_save_refuses_a_folder_that_is_no_bundle_and_leaves_it_alone(
    content: dict[str, str], saved: dict[str, tuple[CVAEDetector, Path]], tmp_path: Path
) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    for name, text in content.items():
        (target / name).write_text(text)
    with pytest.raises(
        BundleError, match=rf"{re.escape(str(target))} exists and is not a model bundle; choose another"
    ):
        saved["shared"][0].save(target)
    assert {file.name: file.read_text() for file in target.iterdir()} == content
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_save_refuses_a_file_and_leaves_it_alone(saved: dict[str, tuple[CVAEDetector, Path]], tmp_path: Path) -> None:
    target = tmp_path / "mine.txt"
    target.write_text("mine")
    with pytest.raises(BundleError, match="exists and is not a model bundle"):
        saved["shared"][0].save(target)
    assert target.read_text() == "mine"


def test_save_through_a_link_writes_where_it_points_or_is_refused(
    saved: dict[str, tuple[CVAEDetector, Path]], copied: Path, data: pd.DataFrame
) -> None:
    link = copied.with_name("latest")
    link.symlink_to(copied, target_is_directory=True)
    expected = saved["per_class"][0]
    try:
        expected.save(link)
    except BundleError:
        expected = saved["shared"][0]
    np.testing.assert_array_equal(load(link).score_samples(data), expected.score_samples(data))


def test_a_detector_that_is_not_fitted_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(NotFittedError):
        detector().save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- what is in it


def contents(folder: Path) -> bytes:
    """Every byte of a bundle, compressed arrays unpacked."""
    parts = [file.read_bytes() for file in sorted(folder.iterdir())]
    with np.load(folder / "calibration.npz", allow_pickle=False) as arrays:
        parts += [np.ascontiguousarray(arrays[name]).tobytes() for name in arrays.files]
    return b"\n".join(parts)


@pytest.mark.parametrize("name", DETECTORS)
def test_a_bundle_holds_no_pickle(name: str, saved: dict[str, tuple[CVAEDetector, Path]]) -> None:
    folder = saved[name][1]
    assert sorted(file.name for file in folder.iterdir()) == sorted(ALL_FILES)
    for file in folder.iterdir():
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                assert all(arrays[key].dtype.kind in "fiu" for key in arrays.files)
        else:
            assert file.suffix == ".safetensors"
            assert all(values.dtype.kind in "fiu" for values in load_file(file).values())


def traces(cells: np.ndarray) -> list[bytes]:
    """Bytes that two neighbouring cells of a row or of a column leave, in float64 and float32, either endian."""
    pairs = np.concatenate(
        [np.stack([a, b], axis=-1).reshape(-1, 2) for a, b in ((cells[:, :-1], cells[:, 1:]), (cells[:-1], cells[1:]))]
    )
    return [row.tobytes() for kind in ("<f8", ">f8", "<f4", ">f4") for row in pairs.astype(kind)]


def found(needles: list[bytes], haystack: bytes) -> int:
    return sum(needle in haystack for needle in set(needles))


@pytest.mark.parametrize("name", DETECTORS)
def test_a_bundle_holds_no_training_row(
    name: str, saved: dict[str, tuple[CVAEDetector, Path]], data: pd.DataFrame
) -> None:
    det, folder = saved[name]
    haystack = contents(folder)
    raw = data[["temperature", "pressure", "load"]].to_numpy()
    standardised = (raw - raw.mean(axis=0)) / raw.std(axis=0)
    encoded = det.model_.encoder.encode(data).values
    for cells in (raw, standardised, encoded[:, encoded.std(axis=0) > 0]):
        real = np.array([column for column in cells.T if len(np.unique(column)) > 100]).T
        assert real.shape[1] >= 1
        assert found(traces(real), haystack) == 0
        assert found([cell.tobytes() for cell in real.ravel()], haystack) == 0
    text = haystack.decode("latin-1")
    assert not [cell for cell in raw.ravel() if repr(float(cell)) in text]


def test_the_search_finds_what_is_there(saved: dict[str, tuple[CVAEDetector, Path]]) -> None:
    folder = saved["shared"][1]
    weights = load_file(folder / "weights.safetensors")["model.encoder.mlp.layers.0.weight"][0]
    assert found(traces(weights), contents(folder)) > 0
    with np.load(folder / "calibration.npz") as arrays:
        assert found([cell.tobytes() for cell in arrays["elbo.scores"][:5]], contents(folder)) == 5


def test_a_bundle_holds_no_row_of_a_class_that_has_but_one(data: pd.DataFrame, tmp_path: Path) -> None:
    alone = data.iloc[:1].assign(type="oven", temperature=234.5678901, pressure=777.0123456)
    det = detector(condition_columns="type").fit(pd.concat([data, alone]))
    haystack = contents(det.save(tmp_path / "model"))
    raw = alone[["temperature", "pressure", "load"]].to_numpy()
    encoded = det.model_.encoder.encode(alone).values
    standardised = encoded[:, encoded[0] % 1 != 0]
    assert standardised.shape == (1, 3)
    for cells in (raw, standardised):
        assert found([cell.tobytes() for cell in cells.ravel()], haystack) == 0
        assert not [cell for cell in cells.ravel() if repr(float(cell)).encode() in haystack]
