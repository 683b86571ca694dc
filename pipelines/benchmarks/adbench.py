"""One-class detection on tables: every method on the same splits of the same sets, and the page with the figures.

    python pipelines/benchmarks/adbench.py FOLDER        # or: make bench-adbench DATA=FOLDER

FOLDER holds npz files with ``X`` (N, D) and ``y`` (N,), 1 = anomaly, as of ADBench. Half of the normal rows, drawn by
the seed, train; the other half and all anomalies are the test; no label is used but for the figures. Finished lines
are kept in outputs/adbench/results.csv, so a killed run goes on where it stopped; a line of ours is measured again when
its parameters have changed.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import one_class_methods
import pandas as pd
import ranking
import resumable

from anomaly_cvae import metrics, tracking

RESULTS = Path("outputs/adbench/results.csv")
REPORT = Path("docs/benchmarks/quality.md")
MOST_TEST_ROWS = 50_000
LEFT_OUT = ("CVAE best", "LUNAR (PyOD)", "AE (PyOD)", "VAE (PyOD)", "DeepSVDD (PyOD)")
"""Unless asked for: they take hours."""
ABLATED = tuple(f"CVAE balanced, {change}" for change in one_class_methods.ABLATION)
"""For `ablation`."""
DEFAULT_METHODS = tuple(
    name
    for name in one_class_methods.METHODS
    if name == one_class_methods.IN_THE_TABLE or name not in (*LEFT_OUT, *ABLATED)
)


@dataclass(frozen=True)
class Task:
    """One method on one split of one set."""

    data: str
    method: str
    seed: int

    def __str__(self) -> str:
        return f"{self.data}, {self.method}, seed {self.seed}"


@dataclass(frozen=True)
class Result:
    """What came of it."""

    data: str
    method: str
    seed: int
    parameters: str
    training_rows: int
    test_rows: int
    roc_auc: float
    average_precision: float
    seconds: float


def split(X: np.ndarray, y: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training rows, test rows, and which of these are anomalies."""
    rng = np.random.default_rng(seed)
    normal = rng.permutation(np.flatnonzero(y == 0))
    half = len(normal) // 2
    test = np.concatenate([normal[half:], np.flatnonzero(y != 0)])
    if len(test) > MOST_TEST_ROWS:
        test = rng.choice(test, MOST_TEST_ROWS, replace=False)
    return X[normal[:half]], X[test], y[test] != 0


def run(files: dict[str, Path], task: Task) -> list[dict[str, object]]:
    """Learn, score, judge: one line."""
    with np.load(files[task.data]) as loaded:
        X, y = loaded["X"].astype(np.float64), loaded["y"].ravel()
    train, test, is_anomaly = split(X, y, task.seed)
    started = time.process_time()  # what it costs does not depend on what else runs
    scores = one_class_methods.METHODS[task.method](train, test, task.seed)
    result = Result(
        **asdict(task), parameters=digest(task.method), training_rows=len(train), test_rows=len(test),
        roc_auc=metrics.roc_auc(is_anomaly, scores),
        average_precision=metrics.average_precision(is_anomaly, scores),
        seconds=time.process_time() - started,
    )  # fmt: skip
    return [asdict(result)]


def digest(method: str) -> str:
    """Of the parameters of one of ours; empty for a peer."""
    own = one_class_methods.OURS.get(method)
    return "" if own is None else resumable.digest(own)


def name_of(file: Path) -> str:
    """ADBench numbers its files: 14_glass.npz is glass."""
    return re.sub(r"^\d+_", "", file.stem)


def said(lines: Sequence[resumable.Line]) -> str:
    """The figures of one line."""
    line = lines[0]
    return f"AUROC {line['roc_auc']:.3f}, average precision {line['average_precision']:.3f}, {line['seconds']:.0f} s"


def load(results: Path) -> pd.DataFrame:
    """Finished lines."""
    table = resumable.load(results, [field.name for field in fields(Result)])
    return table[table["parameters"] == table["method"].map(digest)]


def log(table: pd.DataFrame) -> None:
    """A parent run in MLflow with the means, and a child for every set."""
    import mlflow

    tracking.use_store("adbench")
    per_set = ranking.per_set(table)
    with tracking.start_run("one-class benchmark", {"job": "benchmark"}):
        for method, row in ranking.means(table).iterrows():
            tracking.log_numbers(
                {tracking.metric_name(str(key), str(method)): float(row[key]) for key in ranking.FIGURES}
            )
        tracking.log_tables({"results": table})
        for data, rows in per_set.groupby("data"):
            with mlflow.start_run(run_name=str(data), nested=True):
                numbers = {
                    tracking.metric_name(key, str(row["method"])): float(row[key])
                    for _, row in rows.iterrows()
                    for key in ranking.FIGURES
                }
                tracking.log_numbers(numbers)


def main() -> None:
    """Run what is missing, then write the section of the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", nargs="+", default=list(DEFAULT_METHODS), metavar="METHOD",
                        help=f"of {', '.join(one_class_methods.METHODS)}; default: all but "
                        f"{', '.join(LEFT_OUT)}")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="these sets")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="sets at a time")
    parser.add_argument("--published", type=Path, help="CSV of published figures: dataset, method, auroc, auprc")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=REPORT)
    parser.add_argument("--page-only", action="store_true", help="measure nothing, write the page of what is there")
    parser.add_argument("--tracking", action="store_true", help="log the table to MLflow")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.methods if name not in one_class_methods.METHODS]
    if unknown:
        parser.error(f"no method {unknown[0]!r}; there are {', '.join(one_class_methods.METHODS)}")
    files = {name_of(file): file for file in sorted(arguments.folder.glob("*.npz"))}
    if len(files) < len(list(arguments.folder.glob("*.npz"))):
        parser.error(f"{arguments.folder} has two files of one set: names without their number must differ")
    if not files:
        parser.error(f"{arguments.folder} holds no npz file")
    absent = [name for name in arguments.only or [] if name not in files]
    if absent:
        parser.error(f"{arguments.folder} holds no set {absent[0]!r}; there are {', '.join(files)}")
    chosen = arguments.only or list(files)
    # Large sets first: the last to finish should be a small one.
    chosen.sort(key=lambda name: -files[name].stat().st_size)
    done = load(arguments.results)
    tasks = [Task(d, m, s) for s in arguments.seeds for m in arguments.methods for d in chosen]
    missing = resumable.missing(tasks, done, ("data", "method", "seed"))
    print(f"{len(tasks)} lines, {len(tasks) - len(missing)} of them there already")
    if missing and not arguments.page_only:
        resumable.run_all(partial(run, files), missing, arguments.workers, arguments.results, said)
    table = load(arguments.results)
    asked = [table[column].isin(wanted) for column, wanted in (("data", chosen), ("method", arguments.methods))]
    table = table[asked[0] & asked[1] & table["seed"].isin(arguments.seeds)]
    if ranking.complete(table).empty:
        raise SystemExit("no method has been measured on every set with as many seeds: there is nothing to compare")
    published = None if arguments.published is None else pd.read_csv(arguments.published)
    ranking.write(arguments.output, table, published)
    print(f"written: {arguments.output}")
    if arguments.tracking:
        log(table)


if __name__ == "__main__":
    main()
