"""The configurations of tables with a condition, run from end to end as a user would.

    python pipelines/benchmarks/tables.py FOLDER        # or: make bench-tables DATA=FOLDER

FOLDER holds ai4i2020.parquet, nsl_kdd_{train,test}.parquet and cmapss_FD002_{train,test}.parquet; the digits come with
scikit-learn. The page is docs/benchmarks/tables.md. Beside other detectors: `contextual.py`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import page

from anomaly_cvae import jobs, metrics
from anomaly_cvae.datasets import claimed_digits
from anomaly_cvae.jobs.training import Plan

CONFIGS = Path(__file__).parents[1] / "configs"
REPORT = Path("docs/benchmarks/tables.md")
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Problem:
    """A configuration and its files."""

    name: str
    config: str
    data: str
    test_data: str | None = None


PROBLEMS = (
    Problem("AI4I", "ai4i.yaml", "ai4i2020.parquet"),
    Problem("NSL-KDD", "nsl_kdd.yaml", "nsl_kdd_train.parquet", "nsl_kdd_test.parquet"),
    Problem("C-MAPSS FD002", "cmapss.yaml", "cmapss_FD002_train.parquet", "cmapss_FD002_test.parquet"),
    Problem("digits", "digits.yaml", "train.parquet", "test.parquet"),
)


@dataclass(frozen=True)
class Line:
    """What one run came to; ``ranking`` is AUROC and average precision, of all rows and of classes known."""

    training_rows: int
    classes: int
    test_rows: int
    anomalies: int
    ranking: tuple[float, float]
    ranking_seen: tuple[float, float]
    found: float
    false_alarms: float
    seconds: float


def plan_of(problem: Problem, folder: Path, seed: int, **changes: Any) -> Plan:
    """The configuration's split of the problem."""
    given = {"data": [str(folder / problem.data)], "tracking": False, "random_state": seed, **changes}
    if problem.test_data:
        given["test_data"] = [str(folder / problem.test_data)]
    return jobs.prepare(jobs.load_config(CONFIGS / problem.config, given))


def labels_of(plan: Plan) -> np.ndarray:
    """Whether each test row is an anomaly."""
    assert plan.test_labels is not None
    return plan.test_labels.is_anomaly[plan.test]


def run(problem: Problem, folder: Path, seed: int) -> Line:
    """Train, evaluate and save as `pipelines/train.py` does, without MLflow."""
    with tempfile.TemporaryDirectory() as place:
        plan = plan_of(problem, folder, seed, output=f"{place}/model")
        started = time.perf_counter()
        trained = jobs.train(plan)
        seconds = time.perf_counter() - started
    assert trained.evaluated is not None
    ranking, alarms = trained.evaluated.evaluation.ranking, trained.evaluated.evaluation.alarms.loc[metrics.OVERALL]
    every = ranking.loc[metrics.OVERALL]
    seen = ranking.loc[metrics.SEEN] if metrics.SEEN in ranking.index else every
    return Line(
        training_rows=len(plan.training),
        classes=len(plan.schema.classes),
        test_rows=int(every["rows"]),
        anomalies=int(every["anomalies"]),
        ranking=(float(every["roc_auc"]), float(every["average_precision"])),
        ranking_seen=(float(seen["roc_auc"]), float(seen["average_precision"])),
        found=float(alarms["recall"]),
        false_alarms=float(alarms["false_alarm_rate"]),
        seconds=seconds,
    )


def report(lines: dict[Problem, list[Line]], seeds: Sequence[int]) -> str:
    """The page of docs."""
    text = [
        "# Tables with a condition, from end to end",
        "",
        page.measured_on("make bench-tables"),
        "",
        "Each configuration of `pipelines/configs` as it is: split, fit, thresholds at a false-alarm rate of 1 %, "
        f"evaluation, saved model. Seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}: means, rows of "
        "the first seed. In brackets: only test rows of a class that training knew, where that is not all of them. "
        "Seconds are those of the quickest run. How this compares with other detectors, in which ways of telling them "
        "the condition: [quality](quality.md#tables-and-images-with-a-condition).",
        "",
        "| table | condition | training rows, classes | test rows (anomalies) | AUROC | average precision | found "
        "| false alarms | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*text, *(line_of(problem, own) for problem, own in lines.items())]) + "\n"


def line_of(problem: Problem, own: Sequence[Line]) -> str:
    """One configuration's line of the page."""
    first = own[0]
    every, seen = (np.mean([getattr(line, of) for line in own], axis=0) for of in ("ranking", "ranking_seen"))
    found, alarms = (np.mean([getattr(line, of) for line in own]) for of in ("found", "false_alarms"))
    cells = [problem.name, ", ".join(jobs.load_config(CONFIGS / problem.config, {}).condition)]
    cells += [f"{first.training_rows:,}, {first.classes}", f"{first.test_rows:,} ({first.anomalies:,})"]
    cells += [
        f"{of_all:.4f}" + (f" ({of_seen:.4f})" if abs(of_seen - of_all) > 1e-9 else "")
        for of_all, of_seen in zip(every, seen, strict=True)
    ]
    return f"| {' | '.join([*cells, f'{found:.0%}', f'{alarms:.1%}', f'{min(line.seconds for line in own):.0f}'])} |"


def digits_tables(folder: Path) -> Path:
    """The digits' two tables, written to ``folder``."""
    data = claimed_digits(random_state=0)
    data.train.to_parquet(folder / "train.parquet", index=False)
    data.test.assign(is_anomaly=data.is_anomaly).to_parquet(folder / "test.parquet", index=False)
    return folder


def main() -> None:
    """Run everything, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    names = [problem.name for problem in PROBLEMS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="TABLE", help="; ".join(names))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--output", type=Path, default=REPORT)
    arguments = parser.parse_args()
    lines: dict[Problem, list[Line]] = {problem: [] for problem in PROBLEMS if problem.name in arguments.only}
    with tempfile.TemporaryDirectory() as place:
        digits = digits_tables(Path(place))
        for problem, own in lines.items():
            for seed in arguments.seeds:
                line = run(problem, digits if problem.name == "digits" else arguments.folder, seed)
                own.append(line)
                print(f"{problem.name}, seed {seed}: AUROC {line.ranking[0]:.4f}, {line.seconds:.0f} s", flush=True)
    arguments.output.write_text(report(lines, arguments.seeds), encoding="utf-8")
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
