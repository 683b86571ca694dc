"""The study of faces, run as a user runs it, on made-up pictures and for few steps."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from anomaly_cvae.datasets.faces import ATTRIBUTES

ROOT = Path(__file__).parents[1]
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
    ran = subprocess.run(
        [sys.executable, str(ROOT / "pipelines" / "faces.py"), "--source", str(source), "--side", str(SIDE),
         "--steps", "20", "--output", str(tmp_path), "--no-tracking"],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
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
