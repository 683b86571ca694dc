"""The main job itself, run as `make demo` runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from programs import PIPELINES, python

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


def run(script: str, *arguments: str, folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    ran = python(PIPELINES / script, *arguments, folder=folder, environment={**environment, "COLUMNS": "80"})
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_configured_pipelines_train_evaluate_and_score(tmp_path):
    config = str(ROOT / "pipelines" / "configs" / "digits.yaml")
    run("digits.py", "--tables", "digits", folder=tmp_path)
    train, test = "digits/train.parquet", "digits/test.parquet"
    said = run("train.py", config, train, "--test-data", test, "--no-tracking", folder=tmp_path)
    assert "10 classes" in said
    assert (tmp_path / "digits" / "train.parquet").is_file()
    said = run("evaluate.py", config, "digits_model", test, "--no-tracking", folder=tmp_path)
    assert "overall" in said
    run("score.py", "digits_model", test, "--output", "scored", "--explain", "--no-tracking", folder=tmp_path)
    scored = pd.read_parquet(tmp_path / "scored" / "test.parquet")
    assert len(scored) == 539
    assert {"score", "top_column", "top_nats"} <= set(scored)


@pytest.mark.parametrize("config", sorted((ROOT / "pipelines" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_are_valid(config):
    from anomaly_cvae import jobs

    loaded = jobs.load_config(config, {"data": ["some.parquet"]})
    assert loaded.condition
    assert loaded.label
    assert loaded.detector_parameters()["unseen_class"] == "anomaly"


def test_a_configuration_from_end_to_end_is_a_line_of_the_page(tmp_path):
    said = run("benchmarks/tables.py", str(tmp_path), "--only", "digits", "--seeds", "0", "1", "--output", "page.md",
               folder=tmp_path)  # fmt: skip
    assert "digits, seed 1: AUROC" in said
    assert not (tmp_path / "models").exists()
    (line,) = [line for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith("| digits")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:4] == ["claimed", "1,258, 10", "539 (330)"]
    assert float(cells[4]) > 0.97
    assert 0.0 <= float(cells[7].rstrip("%")) < 5.0
