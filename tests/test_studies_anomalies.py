"""The studies on anomalous images, run as a user runs them, on small digits and for few steps."""

import json
from pathlib import Path

import numpy as np
import pytest
from programs import PIPELINES, python, wide
from sklearn.datasets import load_digits

N_TEST = 200


def save(file: Path, images: np.ndarray, classes: np.ndarray) -> Path:
    np.savez(file, x_train=images[N_TEST:], y_train=classes[N_TEST:], x_test=images[:N_TEST], y_test=classes[:N_TEST])
    return file


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> tuple[Path, Path]:
    """scikit-learn's digits 0, 1 and 2 of 8 x 8 pixels as bytes, and images of another kind: stripes."""
    images, digits = load_digits(n_class=3, return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    folder = tmp_path_factory.mktemp("source")
    stripes = np.where(np.arange(8) % 2, 255, 0) * np.ones((len(images), 8, 1))
    phase = np.random.default_rng(0).integers(0, 2, len(images))
    stripes = np.stack([np.roll(image, by, axis=1) for image, by in zip(stripes, phase, strict=True)])
    return save(folder / "digits.npz", images, digits), save(folder / "stripes.npz", stripes.astype(np.uint8), digits)


def study(program: str, folder: Path, *arguments: object) -> str:
    ran = python(
        PIPELINES / program, "--output", folder, "--no-tracking", *arguments, folder=folder, environment=wide()
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def figures(folder: Path) -> dict[str, float]:
    return {
        name: found["value"] for name, found in json.loads((folder / "figures.json").read_text())["figures"].items()
    }


@pytest.mark.parametrize("data", ["mnist", pytest.param("fashion_mnist", marks=pytest.mark.slow)])
def test_one_class_images(sources, tmp_path, data):
    said = study("one_class_images.py", tmp_path, "--source", sources[0], "--steps", 100, "--data", data)
    found = figures(tmp_path)
    assert found["mean AUROC, one class against the rest"] > 85.0
    assert found["mean AUROC, 5 nearest neighbours"] > 95.0
    per_class = [found[f"AUROC, class {k} against the rest"] for k in range(3)]
    assert found["mean AUROC, one class against the rest"] == pytest.approx(np.mean(per_class))
    assert found["AUROC, damaged: noise"] > 60.0
    for picture in ("class_0", "class_2", "damages"):
        assert (tmp_path / f"{picture}.png").is_file()
        assert f"{picture}.png" in said.replace("\n", "")


def test_ood_images(sources, tmp_path):
    study("ood_images.py", tmp_path, "--source", sources[0], "--other", sources[1], "--steps", 60)
    found = figures(tmp_path)
    assert found["AUROC, parts together"] > 0.95
    assert found["AUROC, spread of nats over pixels alone"] >= 0.5
    assert found["foreign images flagged"] > found["normals flagged"]
    for picture in ("parts", "roc", "least_foreign"):
        assert (tmp_path / f"{picture}.png").is_file()
