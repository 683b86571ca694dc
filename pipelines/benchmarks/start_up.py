"""Section "Start-up": imports, the command line's help, and the first row, each in a fresh process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from jobs import run
from page import Goal, goal_table, spread
from reference import reference_detector, table

TRAINING_ROWS = 2_000
TIMED = "import time; started = time.perf_counter(); {}; print(time.perf_counter() - started)"
IMPORTS = {
    "`import anomaly_cvae`": "import anomaly_cvae",
    "`import torch, pandas, sklearn`": "import torch, pandas, sklearn",
    "`from anomaly_cvae import CVAEDetector`": "from anomaly_cvae import CVAEDetector",
}
ONE_ROW = """
import json, time
import pandas as pd
from anomaly_cvae import CVAEDetector
row = pd.read_json("row.json", orient="table")
started = time.perf_counter()
detector = CVAEDetector.load("model", device="cpu")
loaded = time.perf_counter()
detector.score_samples(row)
first = time.perf_counter()
again = []
for _ in range(100):
    begun = time.perf_counter()
    detector.score_samples(row)
    again.append(time.perf_counter() - begun)
print(json.dumps({"load": loaded - started, "first": first - loaded, "again": sorted(again)[50]}))
"""


def section(rounds: int, folder: Path) -> list[str]:
    """The section's text."""
    frame = table(TRAINING_ROWS)
    reference_detector(frame).save(folder / "model")
    frame.iloc[:1].reset_index(drop=True).to_json(folder / "row.json", orient="table", index=False)
    command = [sys.executable, "-m", "anomaly_cvae.cli", "--help"]
    taken: dict[str, list[float]] = {name: [] for name in [*IMPORTS, "`anomaly-cvae --help`, the whole command"]}
    rows: list[dict[str, float]] = []
    run(command, folder)
    for _ in range(rounds):
        for name, code in IMPORTS.items():
            taken[name].append(float(run([sys.executable, "-c", TIMED.format(code)], folder)[0]))
        taken["`anomaly-cvae --help`, the whole command"].append(run(command, folder)[1])
        rows.append(json.loads(run([sys.executable, "-c", ONE_ROW], folder)[0]))
    return _text({name: np.array(values) for name, values in taken.items()}, rows)


def _text(taken: dict[str, np.ndarray], rows: list[dict[str, float]]) -> list[str]:
    package, three, detector, command = taken.values()
    load, first, again = (1e3 * np.array([row[name] for row in rows]) for name in ("load", "first", "again"))
    goals = [
        Goal("`import anomaly_cvae`", package, 0.1, " s", at_most=True),
        Goal("`from anomaly_cvae import CVAEDetector`, against torch, pandas and scikit-learn", detector / three, 1.1,
             at_most=True),
        Goal("`anomaly-cvae --help`", command, 0.4, " s", at_most=True),
        Goal("loading a bundle and scoring a first row", load + first, 50, " ms", at_most=True),
    ]  # fmt: skip
    return [
        f"Every line in a fresh process, {len(rows)} rounds. The bundle is loaded once the detector is imported.",
        "",
        *goal_table(goals),
        "| what | time |",
        "|---|---|",
        *(f"| {name} | {spread(values)} s |" for name, values in taken.items()),
        f"| loading the bundle of the reference CVAE | {spread(load)} ms |",
        f"| its first row: `score_samples` on a DataFrame of one row | {spread(first)} ms |",
        f"| the same row again | {spread(again)} ms |",
    ]
