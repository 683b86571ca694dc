"""What the jobs cost beside their arithmetic: streaming against memory, and tracking against none.

`make bench-jobs` writes docs/benchmarks/jobs.md. Every command runs in a process of its own, as a user's would; the two
ways of a ratio are run one after the other, round by round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import made_up
import numpy as np
import torch
from page import cpu_name

from anomaly_cvae import CVAEDetector, presets

REPORT = Path("docs/benchmarks/jobs.md")
COLUMNS = 20
TRAINING_ROWS = 20_000
ROUNDS = 2
ROWS_IN_MEMORY = 1 << 20
COMMAND = [sys.executable, "-m", "anomaly_cvae.cli"]

IN_MEMORY = """
import sys, time
import pandas as pd
from anomaly_cvae import CVAEDetector
from anomaly_cvae.batch.needs import CELLS_PER_BATCH
detector = CVAEDetector.load(sys.argv[1])
frame = pd.read_parquet(sys.argv[2])
size = CELLS_PER_BATCH // frame.shape[1]
parts = [frame.iloc[i : i + size] for i in range(0, len(frame), size)]
detector.score_table(parts[0])
started = time.perf_counter()
for part in parts:
    detector.score_table(part)
print(len(frame) / (time.perf_counter() - started))
"""


def run(arguments: list[str], folder: Path) -> tuple[str, float, float]:
    """What a process said, its seconds, and its peak memory in GiB."""
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    environment |= {"MLFLOW_DISABLE_TELEMETRY": "true"}
    started = time.perf_counter()
    process = subprocess.Popen(arguments, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(arguments[:4])} ended with status {status}")
    return said, time.perf_counter() - started, usage.ru_maxrss / 2**20


def streaming(folder: Path, n_rows: int) -> list[str]:
    """Score one Parquet file from the command line, and part of it from memory."""
    rng = np.random.default_rng(1)
    detector = CVAEDetector(["kind"], random_state=0, **{**presets.BALANCED, "n_estimators": 1}).fit(
        made_up.rows(TRAINING_ROWS, COLUMNS, rng)
    )
    detector.save(folder / "model")
    print(f"writing {n_rows:,} rows", flush=True)
    made_up.write(folder / "rows.parquet", n_rows, COLUMNS, 2)
    made_up.write(folder / "some.parquet", ROWS_IN_MEMORY, COLUMNS, 3)
    lines, ratios, rates, memories = [], [], [], []
    for round_ in range(ROUNDS):
        memory_rate = float(run([sys.executable, "-c", IN_MEMORY, "model", "some.parquet"], folder)[0])
        score = [*COMMAND, "score", "model", "rows.parquet", "--output", f"scored{round_}", "--json"]
        said, _, memory = run(score, folder)
        result = json.loads(said)
        assert result["rows"] == n_rows
        rates.append(result["rows_per_second"])
        ratios.append(result["rows_per_second"] / memory_rate)
        memories.append(memory)
        stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result["stages"].items())
        lines.append(
            f"| {round_ + 1} | {memory_rate:,.0f} | {rates[-1]:,.0f} | {ratios[-1]:.2f} | {memory:.2f} GiB | {stages} |"
        )
        print(lines[-1], flush=True)
    return [
        f"## Scoring {n_rows:,} rows of {COLUMNS} columns from one Parquet file",
        "",
        "`anomaly-cvae score`, tracking included, against `score_table` on rows that are in memory already, in batches "
        "of the same size. BALANCED preset, but one network (of 128-128, 4 points of z), 3 classes. Peak memory is "
        "that of the whole process; the stages overlap.",
        "",
        "| round | from memory, rows/s | from Parquet to Parquet, rows/s | ratio | peak memory | at work |",
        "|---|---|---|---|---|---|",
        *lines,
        "",
        f"Median ratio {np.median(ratios):.2f}, most memory {max(memories):.2f} GiB.",
    ]


def tracking(folder: Path) -> list[str]:
    """Train from the command line, with and without a run."""
    table = made_up.rows(10_000, 7, np.random.default_rng(4))
    table.to_parquet(folder / "train.parquet", index=False)
    train = [*COMMAND, "train", "train.parquet", "--condition", "kind", "--quiet"]
    lines = []
    for name, steps in (("2,000 steps", "2000"), ("8,000 steps", "8000")):
        for round_ in range(ROUNDS):
            asked = [*train, "--set", f"max_steps={steps}", "--set", "patience=1000"]
            off = run([*asked, "--name", f"off{steps}{round_}", "--no-tracking"], folder)[1]
            on = run([*asked, "--name", f"on{steps}{round_}"], folder)[1]
            lines.append(f"| {name} | {round_ + 1} | {off:.1f} s | {on:.1f} s | {on - off:.1f} s | {on / off:.3f} |")
            print(lines[-1], flush=True)
    return [
        "## Training with tracking on and off",
        "",
        "`anomaly-cvae train` on 10,000 rows of 7 columns, whole commands; the very first also makes the MLflow "
        "database. What tracking costs does not grow with the training: it is the import of MLflow, its database, the "
        "pictures and the copy of the model.",
        "",
        "| training | round | without | with a run | difference | ratio |",
        "|---|---|---|---|---|---|",
        *lines,
    ]


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        parts = [*tracking(Path(place)), "", *streaming(Path(place), arguments.rows)]
    text = [
        "# What jobs cost beside their arithmetic",
        "",
        f"Measured {date.today()} by `make bench-jobs` on {platform.machine()}, {torch.get_num_threads()} threads, "
        f"{cpu_name()}; torch {version('torch')}, mlflow {version('mlflow')}, pyarrow {version('pyarrow')}, Python "
        f"{platform.python_version()}.",
        "",
        *parts,
    ]
    REPORT.write_text("\n".join(text) + "\n", encoding="utf-8")
    print(f"written {REPORT}")


if __name__ == "__main__":
    main()
