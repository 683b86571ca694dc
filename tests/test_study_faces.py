"""The study of faces, run as a user runs it, on made-up pictures and for few steps."""

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from programs import PIPELINES, python, wide

from anomaly_cvae.datasets.faces import ATTRIBUTES

N, SIDE = 160, 16
PICTURES = ("inferred", "reconstructions", "edits_vae_1", "edits_vae_gan_3", "interpolations", "samples")


def made_up(rng: np.random.Generator, attributes: np.ndarray) -> bytes:
    """A picture of six blocks, each bright where its attribute is there."""
    blocks = np.repeat(np.repeat(attributes.reshape(2, 3), 8, axis=0), 6, axis=1)[:, :SIDE]
    pixels = 60 + 120 * blocks[..., None] + rng.integers(0, 40, (SIDE, SIDE, 3))
    held = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(held, "PNG")
    return held.getvalue()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    attributes = rng.random((N, len(ATTRIBUTES))) < 0.5
    file = tmp_path_factory.mktemp("source") / "made_up.parquet"
    pictures = pd.Series([made_up(rng, row) for row in attributes], name="image")
    pd.DataFrame(attributes, columns=list(ATTRIBUTES)).assign(image=pictures).to_parquet(file)
    return file


def test_faces(source, tmp_path):
    given = ("--source", source, "--side", SIDE, "--steps", 20, "--output", tmp_path, "--no-tracking")
    ran = python(PIPELINES / "faces.py", *given, folder=tmp_path, environment=wide())
    assert ran.returncode == 0, ran.stderr
    found = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert 0.0 <= found["inferred attributes, mean AUROC"]["value"] <= 1.0
    assert found["sharpness, VAE/GAN over VAE"]["value"] > 0.0
    for model in ("VAE", "VAE/GAN"):
        for how in ("z kept", "detail kept", "detail kept, exaggerated"):
            assert 0.0 <= found[f"edit, {model}, {how}: as asked"]["value"] <= 100.0
            assert "smiling" in found[f"edit, {model}, {how}: the rest as before"]["note"]
    for name in PICTURES:
        assert (tmp_path / f"{name}.png").is_file(), name
        assert f"{name}.png" in ran.stdout.replace("\n", "")
    assert (tmp_path / "vae_gan").is_dir()
