"""Images on the command line: folders of pictures, Parquet with pictures, npz; grids out, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from anomaly_cvae import CVAEDetector, bundle
from anomaly_cvae.cli import app
from anomaly_cvae.images import decode_picture

SIDE, GAP, N = 12, 2, 60
SMALL: dict[str, Any] = {"max_steps": 20, "channels": [4, 8], "hidden_dims": [16], "latent_dim": 4, "n_estimators": 1}
TINY = ["--no-tracking", *(part for key, value in SMALL.items() for part in ("--set", f"{key}={value}"))]
PLAIN = {"COLUMNS": "120", "NO_COLOR": "1", "FORCE_COLOR": None, "TTY_COMPATIBLE": None, "OMP_NUM_THREADS": "1"}
pytestmark = pytest.mark.filterwarnings("ignore:too few calibration rows")


def run(*arguments: Any) -> Any:
    """One command in this process."""
    return CliRunner(env=PLAIN).invoke(app, [str(argument) for argument in arguments])


def done(*arguments: Any) -> str:
    """Standard output of a command that ended well."""
    result = run(*arguments)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return str(result.stdout)


def refused(code: int, *arguments: Any) -> str:
    """What a command that ended with ``code`` says of it."""
    result = run(*arguments)
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
    return str(result.stderr)


def bars(n: int = N) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.str_]]:
    """Bars that stand, and bars that lie, on a grainy ground."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 40, (n, SIDE, SIDE)).astype(np.uint8)
    classes = np.where(np.arange(n) % 2 == 0, "lies", "stands")
    for image, name, place in zip(images, classes, rng.integers(3, 8, n), strict=True):
        view = image if name == "lies" else image.T
        view[place : place + 2] = 220
    return images, classes


def png(image: npt.NDArray[Any]) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    return content.getvalue()


def write_pictures(folder: Path, n: int = N) -> Path:
    for i, (image, name) in enumerate(zip(*bars(n), strict=True)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"{i:02}.png").write_bytes(png(image))
    return folder


def cells(path: Path, rows: int, columns: int) -> npt.NDArray[np.uint8]:
    """Images (rows, columns, side, side, 3) of a grid that is as large as it should be."""
    picture = np.asarray(Image.open(path))
    assert picture.shape == (rows * (SIDE + GAP) + GAP, columns * (SIDE + GAP) + GAP, 3)
    inner = picture[GAP:, GAP:].reshape(rows, SIDE + GAP, columns, SIDE + GAP, 3)
    return inner[:, :SIDE, :, :SIDE].transpose(0, 2, 1, 3, 4)


def grey(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.repeat(images[..., None], 3, axis=-1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``pictures``, ``table.parquet``, ``arrays.npz`` and ``plain.csv``, and models of three of them."""
    place = tmp_path_factory.mktemp("images")
    images, classes = bars()
    pictures = write_pictures(place / "pictures")
    table = pd.DataFrame({"id": np.arange(N), "picture": [png(image) for image in images], "kind": classes})
    table["broken"] = (np.arange(N) >= N - 6).astype(int)
    table.to_parquet(place / "table.parquet")
    labels = (classes == "stands").astype(np.uint8)
    np.savez(place / "arrays.npz", x_train=images, y_train=labels, x_test=images[::-1], y_test=labels[::-1])
    rng = np.random.default_rng(0)
    plain = pd.DataFrame({"id": np.arange(N), "a": rng.normal(size=N), "b": rng.normal(size=N), "kind": classes})
    plain.loc[[0, 3], "a"] = np.nan
    plain.to_csv(place / "plain.csv", index=False)
    done("train", pictures, "--condition", "folder", "--output", place / "by_folder", "-q", *TINY)
    CVAEDetector(**SMALL, random_state=0).fit(images, condition=labels).save(place / "by_array")
    tabular = [*TINY, "--set", "channels=[4]"]
    done("train", place / "plain.csv", "-c", "kind", "-i", "id", "--output", place / "plain", "-q", *tabular)
    return place


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    """Pictures, one of which is no picture, and one larger than the others."""
    folder = write_pictures(tmp_path / "spoilt", 6)
    (folder / "lies" / "torn.png").write_bytes(png(bars(1)[0][0])[:60])
    (folder / "stands" / "large.png").write_bytes(png(np.zeros((SIDE, 20), np.uint8)))
    return folder


# ---------------------------------------------------------------------- grids


def test_generate_has_a_row_per_class_or_wraps_one(place, tmp_path):
    model, grid = place / "by_folder", tmp_path / "grids" / "grid.png"
    said = done("generate", model, "-n", 3, "--same-z", "--output", grid)
    assert cells(grid, 2, 3).any()
    assert "lies, stands" in said
    done("generate", model, "-n", 5, "--condition", "lies", "--output", grid)
    smooth = cells(grid, 2, 3)
    assert (smooth[1, 2] == 255).all()  # the sixth place is empty
    done("generate", model, "-n", 5, "-c", "lies", "--draw", "--columns", 5, "--output", grid)
    drawn = cells(grid, 1, 5)
    assert np.abs(np.diff(drawn.astype(int), axis=2)).mean() > 5 * np.abs(np.diff(smooth[0].astype(int), axis=1)).mean()


def test_generated_images_as_a_table_are_pictures(place, tmp_path):
    done("generate", place / "by_folder", "-n", 4, "--output", tmp_path / "new.parquet")
    table = pd.read_parquet(tmp_path / "new.parquet")
    assert all(decode_picture(content).shape == (SIDE, SIDE) for content in table["image"])
    assert set(table["folder"]) <= {"lies", "stands"}
    assert "12 x 12 image" in done("generate", place / "by_folder", "-n", 2)
    assert "12 x 12 image" in json.loads(done("generate", place / "by_folder", "-n", 2, "--json"))["rows"][0]["image"]
    error = refused(3, "generate", place / "by_folder", "--output", tmp_path / "new.csv")
    assert "image" in error
    assert ".parquet" in error


def test_reconstruct_shows_each_image_above_its_reconstruction(place, tmp_path):
    grid, images = tmp_path / "grid.png", bars()[0]
    done("reconstruct", place / "by_folder", place / "pictures", "--rows", 5, "--columns", 3, "--output", grid)
    shown = cells(grid, 4, 3)
    lying = images[bars()[1] == "lies"]  # sub-folders come in the order of their names
    np.testing.assert_array_equal(np.concatenate([shown[0], shown[2, :2]]), grey(lying[:5]))
    assert (shown[3, 2] == 255).all()
    done("reconstruct", place / "by_folder", place / "pictures", "--output", tmp_path / "all.parquet")
    table = pd.read_parquet(tmp_path / "all.parquet")
    assert list(table) == ["file", "image", "folder"]
    assert len(table) == N


@pytest.mark.parametrize("name", ["arrays.npz", "pictures"])
def test_a_model_fitted_on_arrays_reads_files(place, tmp_path, name):
    """Its condition was passed to fit; a label, or the name of a sub-folder, stands for it."""
    source = place / name
    if name == "pictures":
        source = write_pictures(tmp_path / "named")
        (source / "lies").rename(source / "0")
        (source / "stands").rename(source / "1")
    done("reconstruct", place / "by_array", source, "--rows", 4, "--output", tmp_path / "grid.png")
    images, classes = bars()
    first = images[::-1][:4] if name == "arrays.npz" else images[classes == "lies"][:4]
    np.testing.assert_array_equal(cells(tmp_path / "grid.png", 2, 4)[0], grey(first))
    done("score", place / "by_array", source, "--output", tmp_path / "scored", "--no-tracking", "-q")
    detector = CVAEDetector.load(place / "by_array")
    scored = pd.read_parquet(next((tmp_path / "scored").glob("*.parquet")))
    order = np.arange(N)[::-1] if name == "arrays.npz" else np.argsort(classes, kind="stable")
    expected = detector.negative_elbo(images[order], condition=(classes[order] == "stands").astype(int))
    np.testing.assert_allclose(scored["negative_elbo"], expected, rtol=1e-5)


def test_a_single_picture_needs_its_class(place, tmp_path):
    picture, grid = place / "pictures" / "lies" / "00.png", tmp_path / "grid.png"
    assert "condition" in refused(3, "reconstruct", place / "by_folder", picture, "--output", grid)
    done("reconstruct", place / "by_folder", picture, "-c", "lies", "--output", grid)
    np.testing.assert_array_equal(cells(grid, 2, 1)[0], grey(bars()[0][:1]))
    done("reconstruct", place / "by_folder", picture, "--missing-condition", "marginal", "--output", grid)


def test_edit_changes_the_class_and_may_keep_detail(place, tmp_path):
    grid, model, pictures = tmp_path / "grid.png", place / "by_folder", place / "pictures"
    given = ["edit", model, pictures, "--rows", 3, "--output", grid]
    done(*given, "--to", "stands")
    plain = cells(grid, 2, 3)[1].astype(int)
    done(*given, "--to", "folder=stands", "--keep-detail")
    detailed = cells(grid, 2, 3).astype(int)
    lost = np.abs(plain - detailed[0]).mean()
    assert np.abs(detailed[1] - detailed[0]).mean() < lost / 2
    done("edit", model, pictures / "lies" / "00.png", "--from", "lies", "--to", "stands", "--output", grid)
    assert "sits" in refused(3, *given, "--to", "sits")
    assert "twice" in refused(3, *given, "--to", "stands", "--to", "lies")


def test_complete_shows_image_rest_and_completions(place, tmp_path):
    grid = tmp_path / "grid.png"
    given = ["complete", place / "by_folder", place / "pictures", "--rows", 3, "--output", grid]
    done(*given, "--hide", "left", "-n", 4)
    shown = cells(grid, 3, 6)
    half = SIDE // 2
    assert (shown[:, 1, :, :half] == 127).all()
    np.testing.assert_array_equal(shown[:, 1, :, half:], shown[:, 0, :, half:])
    for draw in range(2, 6):
        np.testing.assert_array_equal(shown[:, draw, :, half:], shown[:, 0, :, half:])
    done(*given, "--hide", "upper-left", "--hide", "lower-right")
    hidden = cells(grid, 3, 7)[0, 1, :, :, 0] == 127
    assert hidden[:half, :half].all()
    assert hidden[half:, half:].all()
    assert hidden.sum() == 2 * half**2
    assert "all" in refused(2, *given, "--hide", "left", "--hide", "right")
    assert "--hide" in refused(2, *given)
    assert "upper-left" in refused(2, *given, "--hide", "corner")


# ---------------------------------------------------------------------- the same of tables


def test_tables_are_reconstructed_edited_and_completed(place, tmp_path):
    model, data, out = place / "plain", place / "plain.csv", tmp_path / "out.csv"
    done("reconstruct", model, data, "--output", out)
    assert pd.read_csv(out)["a"].notna().all()
    done("edit", model, data, "--to", "kind=stands", "--rows", 5, "--output", out)
    assert pd.read_csv(out)["kind"].tolist() == ["stands"] * 5
    done("complete", model, data, "--output", out, "--intervals", tmp_path / "lies_in.csv")
    completed, before = pd.read_csv(out), pd.read_csv(data)
    assert completed["id"].tolist() == list(range(N))
    assert completed["a"].notna().all()
    np.testing.assert_allclose(completed["b"], before["b"])
    intervals = pd.read_csv(tmp_path / "lies_in.csv")
    assert intervals["row"].tolist() == [0, 3]
    assert (intervals["low"] < intervals["high"]).all()
    done("complete", model, data, "-n", 3, "--rows", 4, "--output", out)
    draws = pd.read_csv(out)
    assert draws["id"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert draws.loc[draws["id"] == 0, "a"].nunique() == 3


@pytest.mark.parametrize("command", ["generate", "reconstruct", "complete --hide left"])
def test_a_table_is_no_picture(place, tmp_path, command):
    name, *options = command.split()
    data = [] if name == "generate" else [place / "plain.csv"]
    error = refused(2, name, place / "plain", *data, *options, "--output", tmp_path / "grid.png")
    assert "one column of images" in error
    assert ".csv" in error


# ---------------------------------------------------------------------- what cannot be used


def test_pictures_that_cannot_be_used_are_named_and_the_others_scored(place, spoilt, tmp_path):
    given = ["score", place / "by_folder", spoilt, "--output", tmp_path / "scored", "--no-tracking"]
    for _ in range(2):  # the second time nothing is scored again, and the fault still stands
        error = refused(4, *given)
        assert "torn.png" in error
        assert "large.png" in error
        assert "12 x 20" in error
        assert "12 x 12" in error
    scored = pd.read_parquet(tmp_path / "scored" / "spoilt.parquet")
    assert len(scored) == 6
    assert scored["file"].tolist() == sorted(scored["file"])
    assert scored["condition"].tolist() == ["lies"] * 3 + ["stands"] * 3
    (spoilt / "lies" / "torn.png").unlink()
    (spoilt / "stands" / "large.png").unlink()
    assert "1 scored" in done(*given)
    assert "1 unchanged" in done(*given)
    refused(4, "score", place / "by_folder", _with_torn(spoilt), "--output", tmp_path / "b", "--no-tracking")


def _with_torn(folder: Path) -> Path:
    (folder / "lies" / "torn.png").write_bytes(b"\x89PNG")
    return folder


def test_the_first_bad_picture_may_end_the_job(place, spoilt, tmp_path):
    given = ["score", place / "by_folder", spoilt, "--output", tmp_path / "scored", "--no-tracking"]
    assert "torn.png" in refused(3, *given, "--on-error", "fail")
    assert not list((tmp_path / "scored").glob("*.parquet"))


def test_other_commands_go_on_without_such_pictures(place, spoilt, tmp_path):
    model, grid = place / "by_folder", tmp_path / "grid.png"
    assert "torn.png" in refused(4, "reconstruct", model, spoilt, "--output", grid)
    cells(grid, 2, 6)
    assert "large.png" in refused(4, "explain", model, spoilt)
    given = ["train", spoilt, "--condition", "folder", "--output", tmp_path / "model", *TINY]
    said = json.loads(run(*given, "--json").stdout)
    assert said["exit_code"] == 4
    assert [Path(name).name for name in said["left_out"]] == ["torn.png", "large.png"]
    assert said["training_rows"] == 6


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (np.zeros((SIDE, 20), np.uint8), "12 x 20 grey"),
        (np.zeros((SIDE, SIDE, 3), np.uint8), "RGB"),
        (np.zeros((SIDE, SIDE), np.bool_), "bool"),
    ],
)
def test_an_image_of_another_kind_is_refused_naming_both(place, tmp_path, image, found):
    (tmp_path / "other.png").write_bytes(png(image))
    given = [tmp_path / "other.png", "-c", "lies", "--output", tmp_path / "grid.png"]
    error = refused(3, "reconstruct", place / "by_folder", *given)
    assert found in error
    assert "12 x 12 grey (uint8, 0 to 255)" in error
    assert "other.png" in error
    frame = pd.DataFrame({"image": [png(image)], "folder": ["lies"]})
    frame.to_parquet(tmp_path / "other.parquet")
    error = refused(4, "score", place / "by_folder", tmp_path / "other.parquet", "-o", tmp_path / "s", "--no-tracking")
    assert found in error
    assert "12 x 12 grey (uint8, 0 to 255)" in error


def test_csv_and_torn_arrays_are_refused(place, tmp_path):
    pd.DataFrame({"image": ["00.png"], "folder": ["lies"]}).to_csv(tmp_path / "names.csv", index=False)
    error = refused(3, "reconstruct", place / "by_folder", tmp_path / "names.csv", "--output", tmp_path / "grid.png")
    assert "CSV holds no images" in error
    (tmp_path / "torn.npz").write_bytes((place / "arrays.npz").read_bytes()[:200])
    error = refused(3, "reconstruct", place / "by_array", tmp_path / "torn.npz", "--output", tmp_path / "grid.png")
    assert "torn.npz" in error
    np.savez(tmp_path / "other.npz", images=bars()[0])
    error = refused(3, "reconstruct", place / "by_array", tmp_path / "other.npz", "--output", tmp_path / "grid.png")
    assert "x_test" in error
    assert "images" in error


# ---------------------------------------------------------------------- images through the other commands


def test_train_evaluate_score_and_explain_a_table_with_pictures(place, tmp_path):
    data, model = place / "table.parquet", tmp_path / "model"
    said = done("train", data, "-c", "kind", "-i", "id", "--label", "broken", "--output", model, *TINY)
    assert "preset: images" in said
    assert "12 x 12 grey" in said
    assert "AUROC" in done("evaluate", model, data, "--no-tracking")
    done("score", model, data, "--output", tmp_path / "scored", "--explain", "--no-tracking")
    scored = pd.read_parquet(tmp_path / "scored" / "table.parquet")
    assert scored["id"].tolist() == list(range(N))
    assert set(scored["top_column"].dropna()) <= {"picture"}
    assert scored["top_column"].notna().equals(scored["is_anomaly"])
    assert "(image)" in done("explain", model, data, "--top", 2, "--output", tmp_path / "why.csv")
    assert set(pd.read_csv(tmp_path / "why.csv")["column"]) <= {"picture"}
    done("explain", model, data, "--top", 2, "--output", tmp_path / "heat.png")
    assert Image.open(tmp_path / "heat.png").width > 100
    assert "one column of images" in refused(
        2, "explain", place / "plain", place / "plain.csv", "-o", tmp_path / "h.png"
    )


def test_pictures_can_be_labelled_by_their_folder(place, tmp_path):
    """What lies is normal, what stands is not: the names of the sub-folders are the label."""
    given = ["--label", "folder", "--anomaly", "stands", "--output", tmp_path / "model"]
    said = done("train", place / "pictures", *given, *TINY)
    assert "(30 of 60 rows)" in said
    scored = tmp_path / "scored"
    done("score", tmp_path / "model", place / "pictures", "--output", scored, "--no-tracking")
    assert list(pd.read_parquet(scored / "pictures.parquet").columns[:2]) == ["file", "folder"]


def test_arrays_are_trained_on_their_training_part(place, tmp_path):
    said = done("train", place / "arrays.npz", "-c", "label", "--output", tmp_path / "model", *TINY)
    assert "60 rows" in said
    assert set(CVAEDetector.load(tmp_path / "model").schema_.class_names) == {"0", "1"}
    done("score", tmp_path / "model", place / "arrays.npz", "-o", tmp_path / "scored", "--no-tracking")
    scored = pd.read_parquet(tmp_path / "scored" / "arrays.npz.parquet")
    assert scored["label"].tolist() == (bars()[1][::-1] == "stands").astype(int).tolist()


def test_recalibrating_does_not_change_how_a_model_takes_arrays(place, tmp_path):
    done("recalibrate", place / "by_array", place / "arrays.npz", "--output", tmp_path / "fresh", "--no-tracking", "-q")
    images, classes = bars()
    detector = CVAEDetector.load(tmp_path / "fresh")
    assert len(detector.predict(images, condition=(classes == "stands").astype(int))) == N


def test_an_image_model_is_logged_and_read_back(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    tracked = [part for part in TINY if part != "--no-tracking"]
    done("train", place / "pictures", "-c", "folder", "--output", tmp_path / "model", "-q", *tracked)
    run_id = bundle.provenance(tmp_path / "model")["run_id"]
    done("generate", f"runs:/{run_id}", "-n", 2, "--output", tmp_path / "grid.png")
    cells(tmp_path / "grid.png", 2, 2)
