"""Detection as cells of the test rows go missing at random: ours against imputation followed by a detector.

    python pipelines/benchmarks/missing.py FOLDER --tables FOLDER     # or: make bench-missing DATA=… TABLES=…

FOLDER holds npz files with ``X`` (N, D) and ``y`` (N,), 1 = anomaly; that of ``--tables`` the Parquet files of AI4I and
NSL-KDD. Half of the normal rows, drawn by the seed, train, complete; the test is a sample of the other half and the
anomalies. Finished lines are kept in outputs/missing/results.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import cases
import imputers
import missing_page
import numpy as np
import pandas as pd
import resumable

from anomaly_cvae import CVAEDetector, metrics, presets

RESULTS = Path("outputs/missing/results.csv")
REPORT = Path("docs/benchmarks/quality.md")
SHARES = (0.0, 0.1, 0.3, 0.5)
MOST_TRAINING_ROWS = 10_000
MOST_TEST_ROWS = 3_000
TABLES = ("AI4I", "NSL-KDD")
KEY = ("data", "seed")


@dataclass(frozen=True)
class Line:
    """A method's figures with a share of the test cells missing."""

    method: str
    share: float
    roc_auc: float
    average_precision: float


def rows_of(task: cases.Task) -> tuple[pd.DataFrame, pd.DataFrame, np.ndarray]:
    """Training rows, test rows, and which of these are anomalies."""
    case = cases.load(task.data, task.place)
    train, fresh = cases.halves(case.normal, task.seed, len(case.normal))
    test = pd.concat([fresh, case.anomalies], ignore_index=True)
    is_anomaly = np.arange(len(test)) >= len(fresh)
    if len(test) > MOST_TEST_ROWS:
        kept = np.random.default_rng(task.seed).choice(len(test), MOST_TEST_ROWS, replace=False)
        test, is_anomaly = test.iloc[kept].reset_index(drop=True), is_anomaly[kept]
    return train.iloc[:MOST_TRAINING_ROWS], test, is_anomaly


def hide(shape: tuple[int, int], share: float, rng: np.random.Generator) -> np.ndarray:
    """Cells to hide, each with the same probability; one cell of every row stays."""
    draws = rng.random(shape)
    hidden: np.ndarray = (draws < share) & (draws < draws.max(axis=1, keepdims=True))
    return hidden


def run(task: cases.Task) -> list[dict[str, object]]:
    """Learn from complete rows, score the same rows with more and more cells hidden."""
    train, test, is_anomaly = rows_of(task)
    rng = np.random.default_rng(task.seed)
    hidden = {share: hide(test.shape, share, rng) for share in SHARES}
    scores = dict(our_scores(train, test, hidden, task.seed)) | imputers.peer_scores(train, test, hidden, task.seed)
    if task.data in TABLES:
        scores |= dict(one_hot_scores(train, test, hidden, task.seed))
    lines = [
        Line(method, share, metrics.roc_auc(is_anomaly, own), metrics.average_precision(is_anomaly, own))
        for (method, share), own in scores.items()
    ]
    return [{**asdict(task), "place": task.place.name, **asdict(line)} for line in lines]


Scores = Iterator[tuple[tuple[str, float], np.ndarray]]


def our_scores(train: pd.DataFrame, test: pd.DataFrame, hidden: dict[float, np.ndarray], seed: int) -> Scores:
    """Ours on three scales: that of rows with as many cells missing, nats, and conformal p-values."""
    detector = CVAEDetector(**presets.BALANCED, random_state=seed).fit(train)
    for share, cells in hidden.items():
        rows = test.mask(cells)
        yield (missing_page.OURS, share), detector.calibrated_score(rows)
        yield ("CVAE, negative ELBO", share), detector.negative_elbo(rows)
        yield ("CVAE, p-values", share), -detector.p_values(rows)


def one_hot_scores(train: pd.DataFrame, test: pd.DataFrame, hidden: dict[float, np.ndarray], seed: int) -> Scores:
    """The same network on standardised numbers and one-hot words, all of them normal."""
    x_train, x_test, places = imputers.encoded(train, test)
    names = [f"x{d}" for d in range(x_train.shape[1])]
    detector = CVAEDetector(
        **presets.BALANCED, column_kinds=dict.fromkeys(names, "real"), likelihoods=dict.fromkeys(names, "normal"),
        random_state=seed,
    ).fit(pd.DataFrame(x_train, columns=names))  # fmt: skip
    for share, cells in hidden.items():
        rows = pd.DataFrame(np.where(cells[:, places], np.nan, x_test), columns=names)
        yield (missing_page.ONE_HOT, share), detector.calibrated_score(rows)


def said(lines: list[dict[str, object]]) -> str:
    """Our AUROC at every share."""
    own = [line for line in lines if line["method"] == missing_page.OURS]
    return ", ".join(f"{line['share']:.0%} {line['roc_auc']:.3f}" for line in own)


def main() -> None:
    """Run what is missing, then write the section of the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tables", type=Path, help="folder of the Parquet files of AI4I and NSL-KDD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="these sets and tables")
    parser.add_argument("--workers", type=int, default=1, help="sets at a time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=REPORT)
    parser.add_argument("--page-only", action="store_true", help="measure nothing, write the page of what is there")
    arguments = parser.parse_args()
    places = dict.fromkeys(TABLES, arguments.tables) if arguments.tables is not None else {}
    places |= cases.sets(arguments.folder)
    names = cases.asked(parser, places, arguments.only)
    parameters = resumable.digest(presets.BALANCED)
    tasks = [cases.Task(data, seed, places[data], parameters) for seed in arguments.seeds for data in names]
    table = resumable.up_to_date(tasks, [*KEY, "parameters"], run, said, arguments)
    missing_page.write(arguments.output, table[table["parameters"] == parameters])
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
