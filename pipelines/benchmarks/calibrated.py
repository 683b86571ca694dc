"""Promises about rates: false alarms, p-values and discoveries on fresh normal rows, beside what was asked for.

    python pipelines/benchmarks/calibrated.py FOLDER --tables FOLDER     # or: make bench-calibration DATA=… TABLES=…

FOLDER holds npz files with ``X`` (N, D) and ``y`` (N,), 1 = anomaly; that of ``--tables`` the Parquet files of AI4I,
NSL-KDD and C-MAPSS FD002. Half of the normal rows, drawn by the seed, go to `fit`, which sets some aside for
calibration; the other half is fresh. Finished lines are kept in outputs/calibrated/results.csv.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import calibrated_page
import cases
import numpy as np
import pandas as pd
import resumable

from anomaly_cvae import CVAEDetector, metrics, presets
from anomaly_cvae.calibration import select_discoveries

RESULTS = Path("outputs/calibrated/results.csv")
REPORT = Path("docs/benchmarks/quality.md")
RATES = (0.01, 0.05)
LEVELS = (0.01, 0.05, 0.1, 0.2, 0.5)
"""Of p-values."""
DISCOVERY_RATES = (0.05, 0.1, 0.2)
SHARE_OF_ANOMALIES = 0.1
MIXES = 10
MOST_FRESH_ROWS = 50_000
KEY = ("data", "seed", "fraction")


@dataclass(frozen=True)
class Task:
    """One fit: a set, a seed, and the share of rows that calibration takes."""

    data: str
    seed: int
    fraction: float
    place: Path
    parameters: str

    def __str__(self) -> str:
        return f"{self.data}, seed {self.seed}, calibration {self.fraction:g}"


@dataclass(frozen=True)
class Line:
    """``counted`` of ``rows`` rows at the rate ``asked``, of a class; or a figure of the whole set, ``value``."""

    figure: str
    asked: float = 0.0
    group: str = ""
    guarantee: str = ""
    calibration_rows: int = 0
    rows: int = 0
    counted: int = 0
    value: float = 0.0


def run(task: Task) -> list[dict[str, object]]:
    """Fit once; count what happens to fresh rows."""
    case = cases.load(task.data, task.place)
    learned, fresh = cases.halves(case.normal, task.seed, MOST_FRESH_ROWS)
    parameters = {**presets.BALANCED, "calibration_fraction": task.fraction, "random_state": task.seed}
    with warnings.catch_warnings():
        # A class without rows enough to promise anything is a line of the page.
        warnings.filterwarnings("ignore", "too few calibration rows")
        detector = CVAEDetector(case.condition, **parameters).fit(learned)
        lines = list(figures(detector, case, fresh, task.seed))
    return [{**asdict(task), "place": task.place.name, **asdict(line)} for line in lines]


def figures(detector: CVAEDetector, case: cases.Case, fresh: pd.DataFrame, seed: int) -> Iterator[Line]:
    """Everything that is measured of one fitted detector."""
    scored, found = detector.score_table(fresh), detector.score_table(case.anomalies)
    yield from counts(detector, "p-values", scored["condition"], scored["p_value"].to_numpy(), LEVELS)
    promise = weakest(detector)
    yield from discoveries(scored["p_value"].to_numpy(), found["p_value"].to_numpy(), promise, seed)
    is_anomaly = np.r_[np.zeros(len(scored), bool), np.ones(len(found), bool)]
    scores = np.r_[scored["score"], found["score"]]
    yield Line("AUROC", guarantee=promise, rows=len(scores), value=metrics.roc_auc(is_anomaly, scores))
    for rate in RATES:
        detector.recalibrate(false_alarm_rate=rate)
        yield from alarms(detector, "alarms", fresh, rate)
        if case.elsewhere is not None:
            yield from alarms(detector, "alarms elsewhere", case.elsewhere, rate)


def alarms(detector: CVAEDetector, figure: str, rows: pd.DataFrame, rate: float) -> Iterator[Line]:
    """Rows flagged, by class."""
    scored = detector.score_table(rows)
    # 0 for a flagged row: at most any rate.
    yield from counts(detector, figure, scored["condition"], 1.0 - scored["is_anomaly"].to_numpy(), (rate,))


def counts(
    detector: CVAEDetector, figure: str, classes: pd.Series, values: np.ndarray, levels: tuple[float, ...]
) -> Iterator[Line]:
    """Rows of every class whose value is at most each level."""
    thresholds = detector.thresholds_
    for name, promised in thresholds.iterrows():
        own = values[(classes == name).to_numpy()] if len(thresholds) > 1 else values
        for level in levels if len(own) else ():
            yield Line(
                figure, level, str(name), str(promised["guarantee"]), int(promised["calibration_rows"]),
                len(own), int((own <= level).sum()),
            )  # fmt: skip


def weakest(detector: CVAEDetector) -> str:
    """The promise that holds for every class."""
    order = ("none", "pooled", "class")
    classes = detector.thresholds_.iloc[: detector.model_.n_classes]
    return min(classes["guarantee"], key=order.index)


def discoveries(normal: np.ndarray, anomalous: np.ndarray, promise: str, seed: int) -> Iterator[Line]:
    """Benjamini-Hochberg on several mixes: ``rows`` reported, ``counted`` of them normal, ``value`` = share found."""
    rng = np.random.default_rng(seed)
    few = int(min(len(anomalous), len(normal) * SHARE_OF_ANOMALIES / (1 - SHARE_OF_ANOMALIES)))
    many = round(few * (1 - SHARE_OF_ANOMALIES) / SHARE_OF_ANOMALIES)
    for mix in range(MIXES):
        mixed = np.r_[rng.choice(normal, many, replace=False), rng.choice(anomalous, few, replace=False)]
        for rate in DISCOVERY_RATES:
            reported = select_discoveries(mixed, rate)
            false, true = int(reported[:many].sum()), int(reported[many:].sum())
            yield Line("discoveries", rate, str(mix), promise, 0, false + true, false, true / max(few, 1))


def said(lines: list[dict[str, object]]) -> str:
    """What was flagged at the first rate."""
    own = [line for line in lines if line["figure"] == "alarms" and line["asked"] == RATES[0]]
    return ", ".join(f"{line['counted']} of {line['rows']} flagged ({line['guarantee']})" for line in own)


def main() -> None:
    """Run what is missing, then write the section of the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tables", type=Path, help="folder of the Parquet files of tables with a condition")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.2, 0.1, 0.3], help="calibration_fraction")
    parser.add_argument("--only", nargs="+", help="these sets and tables")
    parser.add_argument("--workers", type=int, default=1, help="fits at a time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=REPORT)
    parser.add_argument("--page-only", action="store_true", help="measure nothing, write the page of what is there")
    arguments = parser.parse_args()
    places = cases.sets(arguments.folder) | (
        dict.fromkeys(cases.CONFIG_OF, arguments.tables) if arguments.tables else {}
    )
    names = cases.asked(parser, places, arguments.only)
    parameters = resumable.digest(presets.BALANCED)
    tasks = [Task(d, s, f, places[d], parameters) for f in arguments.fractions for s in arguments.seeds for d in names]
    table = resumable.up_to_date(tasks, [*KEY, "parameters"], run, said, arguments)
    calibrated_page.write(arguments.output, table[table["parameters"] == parameters])
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
