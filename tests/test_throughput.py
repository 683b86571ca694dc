"""The benchmark of speed, run with tiny sizes: it measures, and says what it could not measure."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "pipelines" / "benchmarks"


def run(script: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page after one section, made anew beside one that stood there."""
    folder = tmp_path_factory.mktemp("speed")
    (folder / "speed.md").write_text("# Speed\n\n## GPU\n\nmeasured elsewhere\n", encoding="utf-8")
    ran = run("throughput.py", "--quick", "--rows", "2000", "--only", "scoring", "profiles",
              "--output", "speed.md", folder=folder)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return (folder / "speed.md").read_text(encoding="utf-8")


def cells(page: str, begins: str) -> list[str]:
    lines = [line for line in page.splitlines() if line.startswith(f"| {begins}")]
    assert len(lines) >= 1, f"no line {begins!r}"
    return [cell.strip() for cell in lines[0].strip("|").split("|")]


@pytest.mark.parametrize(
    "line",
    ["float32 MKL", "bfloat16", "copying memory", "reading 64 float32 columns", "eager torch, 1024-row chunks",
     "DataLoader(TensorDataset)", "engine, float32", "engine, float32 by ONNX Runtime",
     "engine, bfloat16", "detector, score_samples",
     "Parquet to Parquet |", "alone: read", "alone: score", "alone: write"],
)  # fmt: skip
def test_page_has_limits_and_every_way(page, line):
    assert cells(page, line)[1]


def test_a_goal_is_reached_or_missed_as_its_figures_say(page):
    for begins in (
        "engine float32, against",
        "engine float32, of the best",
        "`score_samples` on",
        "Parquet to Parquet, of",
    ):
        _, goal, measured, verdict = cells(page, begins)
        reached = float(measured.split()[0]) >= float(goal.removeprefix(">=").split()[0])
        assert verdict == ("reached" if reached else "**missed**")


@pytest.mark.parametrize("way", ["scoring before", "scoring: engine, float32", "training before", "training: fit, one"])
def test_shares_of_the_time_are_shares_of_all_of_it(page, way):
    time, products, *others = cells(page, way)[1:]
    assert float(time.split()[0].replace(",", "")) > 0
    parts = [int(part.removesuffix(" %")) for part in (products, *others)]
    assert abs(sum(parts) - 100) <= 2  # each is rounded
    assert 0 < parts[0] < 100


def test_other_sections_stay(page):
    assert page.endswith("## GPU\n\nmeasured elsewhere\n")
    assert page.index("## Limits and scoring") < page.index("## GPU")
    assert page.count("# Speed\n") == 1


def test_page_says_where_and_when(page):
    assert "Measured 20" in page
    assert f"torch {torch.__version__.split('+')[0]}" in page
    assert "1 thread" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_without_a_cuda_device_it_says_so_and_writes_nothing(tmp_path):
    ran = run("gpu.py", folder=tmp_path)
    assert ran.returncode == 2
    assert "no CUDA device" in ran.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
def test_on_a_cuda_device_it_adds_its_section(tmp_path):
    ran = run("gpu.py", "--rows", "4096", "--rounds", "1", "--output", "speed.md", folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "rows on the card" in (tmp_path / "speed.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def said():
    """What the program's own parts say of made-up figures."""
    code = """
import numpy as np
from torch import nn
from page import Goal
from reference import EagerCVAE, operations_per_row
print(operations_per_row(), sum(2 * m.weight.numel() for m in EagerCVAE().modules() if isinstance(m, nn.Linear)))
print(Goal("a", np.array([2.0, 6.0]) / np.array([1.0, 3.0]), 2).line())
print(Goal("b", np.array([1.2]), 1.1, " s", at_most=True).line())
print(Goal("c", None, 4, why_not="no").line())
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    return ran.stdout.splitlines()


def test_operations_are_those_of_the_reference_network(said):
    assert said[0] == "395264 395264"


def test_verdicts(said):
    assert said[1] == "| a | >= 2 x | 2 x (2 to 2) | reached |"
    assert said[2] == "| b | <= 1.1 s | 1.2 s | **missed** |"
    assert said[3] == "| c | >= 4 x | no | |"


def test_what_products_alone_allow_is_said(page):
    found = re.search(r"would make ([\d.,]+) x.* in float32 and ([\d.,]+) x.* in bfloat16 of the best eager", page)
    assert found, "what the machine's arithmetic allows at most"
    assert all(float(number) > 0 for number in found.groups())
