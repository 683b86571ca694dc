"""The ablation: figures of tuning sets and of others stand apart, and only like is compared with like."""

import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from programs import BENCHMARKS, of_benchmarks, python

LINE = """
import sys, ablation, pandas as pd
print("\\n".join(ablation.section(pd.read_csv(sys.argv[1]))))
"""


def cells_of(table: pd.DataFrame, place: Path) -> dict[str, list[str]]:
    """The page's table of these measurements, by the first cell of each line."""
    table.to_csv(place / "table.csv", index=False)
    said = of_benchmarks(LINE, place / "table.csv")
    lines = [line.strip("| ").split(" | ") for line in said if line.startswith("| ")]
    return {line[0]: line[1:] for line in lines}


def measurements(change: str) -> pd.DataFrame:
    """Two tuning sets and two others; the change gains .1 and .2, and loses .1 twice."""
    values = {"glass": (0.5, 0.6), "WBC": (0.6, 0.8), "skin": (0.9, 0.8), "http": (0.7, 0.6)}
    rows = [
        (data, method, 0, "", figure, figure / 2, 1.0)
        for data, figures in values.items()
        for method, figure in zip(("CVAE balanced", f"CVAE balanced, {change}"), figures, strict=True)
    ]
    return pd.DataFrame(
        rows, columns=["data", "method", "seed", "parameters", "roc_auc", "average_precision", "seconds"]
    )


def test_tuning_sets_and_others_stand_apart_with_the_difference_and_its_interval(tmp_path: Path) -> None:
    cells = cells_of(measurements("no noise"), tmp_path)
    assert cells["the balanced one"] == ["0.550", "0.275", "0.800", "0.400"]
    tuning, _, other, _ = cells["no noise"]
    assert tuning == "0.700, +0.150 (+0.100 to +0.200)"
    assert other == "0.700, -0.100 (-0.100 to -0.100)"


def test_a_change_that_was_not_measured_on_every_set_of_a_part_is_not_compared_there(tmp_path: Path) -> None:
    table = measurements("no noise")
    half = table[(table["method"] == "CVAE balanced") | (table["data"] != "skin")]
    cells = cells_of(half, tmp_path)
    assert cells["no noise"][0].startswith("0.700, +0.150")
    assert cells["no noise"][2:] == ["not measured", "not measured"]
    assert cells["the balanced one"][2] == "0.800"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small set, rows on a line and some off it."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("sets")
    x = rng.normal(size=80)
    line = np.column_stack([x, x + 0.05 * rng.normal(size=80)])
    np.savez(folder / "1_line.npz", X=np.r_[line, rng.normal(size=(10, 2))], y=np.r_[np.zeros(80), np.ones(10)])
    return folder


def run(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return python(BENCHMARKS / "ablation.py", *arguments, folder=folder)


def test_a_run_measures_what_is_missing_and_keeps_the_other_sections(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "quality.md"
    page.write_text("# Quality\n\n## One class, tables\n\nkept\n", encoding="utf-8")
    given = (folder, "--changes", "no noise", "--workers", 1, "--results", "a.csv", "--output", page)
    first = run(*given, folder=tmp_path)
    assert first.returncode == 0, first.stderr
    table = pd.read_csv(tmp_path / "a.csv")
    assert list(table["method"]) == ["CVAE balanced", "CVAE balanced, no noise"]
    assert table["roc_auc"].between(0.5, 1.0).all()
    assert "2 lines, 2 of them there already" in run(*given, folder=tmp_path).stdout
    assert "kept" in page.read_text(encoding="utf-8")
    assert "| no noise | " in page.read_text(encoding="utf-8")


def test_an_unknown_change_is_refused_with_those_there_are(folder: Path, tmp_path: Path) -> None:
    ran = run(folder, "--changes", "more of everything", folder=tmp_path)
    assert ran.returncode == 2
    assert "no change 'more of everything'; there are one network, KL weight 1, " in ran.stderr
