"""The studies on digits, run as a user runs them, on small digits and for few steps."""

import json
from pathlib import Path

import numpy as np
import pytest
from programs import PIPELINES, python, wide
from sklearn.datasets import load_digits

N_TEST = 120


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """scikit-learn's digits of 8 x 8 pixels as 12 x 12 bytes, in the layout of MNIST."""
    images, digits = load_digits(return_X_y=True)
    places = np.arange(12) * 8 // 12
    images = np.round(images.reshape(-1, 8, 8)[:, places][:, :, places] * (255 / 16)).astype(np.uint8)
    file = tmp_path_factory.mktemp("source") / "digits.npz"
    np.savez(file, x_train=images[N_TEST:], y_train=digits[N_TEST:], x_test=images[:N_TEST], y_test=digits[:N_TEST])
    return file


def study(program: str, source: Path, folder: Path, *arguments: str) -> str:
    given = ("--source", source, "--output", folder, "--no-tracking", *arguments)
    ran = python(PIPELINES / program, *given, folder=folder, environment=wide())
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def figures(folder: Path) -> dict[str, float]:
    return {
        name: found["value"] for name, found in json.loads((folder / "figures.json").read_text())["figures"].items()
    }


def test_completion(source, tmp_path):
    said = study("completion.py", source, tmp_path, "--rows", "200", "--steps", "12", "--objective", "hybrid")
    found = figures(tmp_path)
    nats = [found[f"-log p(hidden|seen), {n} seen"] for n in ("1 quadrant", "2 quadrants", "3 quadrants")]
    assert nats[0] > nats[1] > nats[2] > 0, "the fewer pixels are hidden, the less they cost"
    bound = found["negative ELBO of the hidden, 3 quadrants seen"]
    assert bound > nats[2]
    assert (tmp_path / "completions.png").is_file()
    table = (tmp_path / "comparison.md").read_text()
    assert "CVAE (Sohn et al. 2015)" in table
    assert f"{nats[0]:.2f}" in table
    assert "completions.png" in said


def test_semi_supervised(source, tmp_path):
    arguments = ("--rows", "300", "--steps", "8", "--labels", "50", "--splits", "1")
    study("semi_supervised.py", source, tmp_path, *arguments)
    found = figures(tmp_path)
    for model in ("M2", "M1+M2"):
        assert 0 <= found[f"test error, 50 labels, {model}"] <= 100
    for picture in ("generated", "error_by_labels"):
        assert (tmp_path / f"{picture}.png").is_file()
    assert len((tmp_path / "splits.csv").read_text().splitlines()) == 1 + 2, "a line for each model and split"


def test_a_missing_source_is_named(tmp_path):
    ran = python(PIPELINES / "completion.py", "--source", tmp_path / "no.npz", folder=tmp_path)
    assert ran.returncode != 0
    assert "no.npz does not exist" in ran.stderr
