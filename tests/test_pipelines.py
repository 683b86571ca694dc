"""The main job itself, run as `make demo` runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo")
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    ran = subprocess.run(
        [sys.executable, str(ROOT / "pipelines" / "digits.py")],
        cwd=folder, env={**environment, "COLUMNS": "80"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return folder, ran.stdout


def test_demo_writes_what_it_names(demo):
    folder, said = demo
    for name in ("scored.parquet", "surprising.png", "samples.png", "models_compared.png", "model"):
        assert f"outputs/digits/{name}" in said
        assert (folder / "outputs" / "digits" / name).exists()
    assert (folder / "mlruns" / "mlflow.db").is_file()
    assert "make ui" in said


def test_demo_scored_rows(demo):
    scored = pd.read_parquet(demo[0] / "outputs" / "digits" / "scored.parquet")
    assert len(scored) == 539
    assert {"condition", "negative_elbo", "score", "threshold", "p_value", "is_anomaly", "top_column"} <= set(scored)
    flagged = scored.groupby("what")["is_anomaly"].mean()
    assert flagged["wrong label"] > 0.8
    assert flagged["normal"] < 0.05


def test_demo_table_fits_a_terminal(demo):
    assert max(len(line) for line in demo[1].splitlines()) <= 80
    assert "…" not in demo[1]
