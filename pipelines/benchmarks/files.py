"""Section "Memory and files": Parquet to Parquet in a process of its own: rows/s, first result and peak memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from growth import Curve
from jobs import run
from page import Goal, goal_table
from reference import reference_detector, table

ROWS_PER_GROUP = 1 << 17
TRAINING_ROWS = 4_000
MOST_MEMORY_GIB = 1.0
ROWS_OF_GOAL = 20_000_000

CHILD = """
import json, resource, sys, time
from pathlib import Path
from anomaly_cvae import CVAEDetector, batch
started, first = time.perf_counter(), []
detector = CVAEDetector.load("model", device="cpu")
loaded = time.perf_counter()
note = lambda progress: first or first.append(time.perf_counter())
summary = batch.score_files(detector, [sys.argv[1]], sys.argv[2], model_hash="benchmark", on_progress=note)
ended = time.perf_counter()
# The system's own account of a process begins with the memory of the one that started it; this does not.
status = Path("/proc/self/status")
if status.is_file():
    gib = int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**20
else:
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
assert not summary.failed, summary.failed[0].error
print(json.dumps({
    "load": loaded - started, "first": first[0] - loaded, "rows_per_second": summary.rows / (ended - loaded),
    "gib": gib,
}))
"""


def write(path: Path, n_rows: int) -> None:
    """A Parquet file of ``n_rows``, made and written a row group at a time."""
    writer = None
    for number, first in enumerate(range(0, n_rows, ROWS_PER_GROUP)):
        part = table(min(ROWS_PER_GROUP, n_rows - first), seed=number)
        rows = pa.Table.from_pandas(part, preserve_index=False)
        writer = writer or pq.ParquetWriter(path, rows.schema)
        writer.write_table(rows)
    if writer is not None:
        writer.close()


def points_up_to(most: int) -> list[int]:
    """1e4, 1e5, … and ``most`` itself."""
    return sorted({10**power for power in range(4, 9) if 10**power < most} | {most})


def section(max_rows: int, rounds: int, folder: Path) -> tuple[list[str], Curve]:
    """The section's text, and its curve for the picture."""
    import sys

    reference_detector(table(TRAINING_ROWS)).save(folder / "model")
    points = points_up_to(max_rows)
    for n_rows in points:
        write(folder / f"{n_rows}.parquet", n_rows)
    taken: dict[int, list[dict[str, float]]] = {n_rows: [] for n_rows in points}
    for _ in range(rounds):
        for n_rows in points:
            said, _, _ = run([sys.executable, "-c", CHILD, f"{n_rows}.parquet", "scored"], folder)
            taken[n_rows].append(json.loads(said.splitlines()[-1]))
            shutil.rmtree(folder / "scored")
    names = {"Parquet to Parquet": "rows_per_second", "first result": "first", "peak memory": "gib"}
    curve = Curve(
        "rows",
        points,
        {name: [np.array([one[key] for one in taken[n]]) for n in points] for name, key in names.items()},
        {"Parquet to Parquet": "rows/s", "first result": "s", "peak memory": "GiB"},
    )
    goal = Goal(
        f"peak memory at {points[-1]:,} rows (asked: {ROWS_OF_GOAL:,} rows)",
        curve.rates["peak memory"][-1], MOST_MEMORY_GIB, " GiB", at_most=True,
    )  # fmt: skip
    text = [
        f"`anomaly_cvae.batch.score_files` with the reference CVAE in a fresh process, {rounds} "
        f"round{'s' if rounds > 1 else ''}, `--max-rows {max_rows}`. *First result* is the time from the call to the "
        "first scored batch. Memory is the most that the process ever held, Python, torch and pyarrow included. From "
        "20,000,000 rows on a job takes ONNX Runtime where it is installed, whose graph is made before the first "
        "result.",
        "",
        *goal_table([goal]),
        *curve.lines(),
    ]
    return text, curve
