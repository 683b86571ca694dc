"""Detection given a condition: ours and classical detectors, each told it in three ways, and the page with the figures.

    python pipelines/benchmarks/contextual.py FOLDER        # or: make bench-contextual DATA=FOLDER

FOLDER, or its folder `tabular`, holds ai4i2020.parquet, nsl_kdd_{train,test}.parquet, cmapss_FD002_train.parquet,
mnist.npz and fashion_mnist.npz; a set whose file is absent is named and left out. Parts: (a) images under a wrong
class, (b) NSL-KDD, (c) AI4I, (d) C-MAPSS, (e) made-up rows, (f) few rows per class. Finished lines are kept in
outputs/contextual/results.csv, so a killed run goes on where it stopped; a line is measured again when the parameters
of ours, or the limits on images, have changed.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import contextual_page
import numpy as np
import pandas as pd
import resumable
from contexts import DataSet, Limits, place_of, sets
from contextual_methods import DETERMINISTIC, methods_of, parameters_of, scores_of

from anomaly_cvae import metrics

RESULTS = Path("outputs/contextual/results.csv")
REPORT = Path("docs/benchmarks/quality.md")
SEEDS = (10, 11, 12)


@dataclass(frozen=True)
class Task:
    """One method, told the condition in one way, on one split of one set."""

    part: str
    data: str
    method: str
    way: str
    seed: int

    def __str__(self) -> str:
        return f"({self.part}) {self.data}, {self.method}, {self.way}, seed {self.seed}"


@dataclass(frozen=True)
class Result:
    """What came of it, by one of its scores."""

    part: str
    data: str
    method: str
    way: str
    seed: int
    score: str
    parameters: str
    training_rows: int
    test_rows: int
    anomalies: int
    roc_auc: float
    average_precision: float
    seconds: float


def run(folder: Path, limits: Limits, task: Task) -> list[dict[str, object]]:
    """Learn, score, judge: a line per score."""
    data = next(one for one in sets(limits) if (one.part, one.name) == (task.part, task.data))
    split = data.draw(folder, task.seed)
    started = time.process_time()  # one thread: what it costs does not depend on what else runs
    scores = scores_of(task.method, task.way, split, task.seed, limits)
    seconds = time.process_time() - started
    results = [
        Result(
            **vars(task), score=score, parameters=digest(task.part, task.method, task.way, limits),
            training_rows=len(split.train), test_rows=len(split.test), anomalies=int(split.is_anomaly.sum()),
            roc_auc=metrics.roc_auc(split.is_anomaly, values),
            average_precision=metrics.average_precision(split.is_anomaly, values), seconds=seconds,
        )
        for score, values in scores.items()
    ]  # fmt: skip
    return [asdict(result) for result in results]


def said(lines: Sequence[resumable.Line]) -> str:
    """The figures of a task's lines."""
    figures = "{score} {roc_auc:.4f} / {average_precision:.4f}, {seconds:.0f} s"
    return "; ".join(figures.format(**line) for line in lines)


def digest(part: str, method: str, way: str, limits: Limits) -> str:
    """Of what a line depends on beside set, method, way and seed: our parameters, the limits on images."""
    parameters = parameters_of(method, way, part == "a", limits)
    depends = [resumable.digest(parameters)] if parameters else []
    if part == "a":
        depends.append(f"{limits.training_images} {limits.test_images}")
    return hashlib.sha256(" ".join(depends).encode()).hexdigest()[:8] if depends else ""


def load(results: Path, limits: Limits) -> pd.DataFrame:
    """Finished lines of these parameters and limits."""
    table = resumable.load(results, [field.name for field in fields(Result)])
    current = [row.parameters == digest(row.part, row.method, row.way, limits) for row in table.itertuples(index=False)]
    return table[np.array(current, dtype=bool)]


def tasks_of(chosen: Sequence[DataSet], methods: Sequence[str], seeds: Sequence[int]) -> list[Task]:
    """Seed by seed, so that a run that ends early has every set; what draws no number runs once on fixed rows."""
    return [
        Task(data.part, data.name, method, way, seed)
        for number, seed in enumerate(seeds)
        for data in chosen
        for method, way in methods_of(data)
        if method in methods and not (number and data.is_fixed and method in DETERMINISTIC)
    ]


def available(folder: Path, chosen: Sequence[DataSet]) -> tuple[list[DataSet], list[DataSet]]:
    """Sets whose files are there, and the others."""
    here = [data for data in chosen if all(place_of(folder, file).is_file() for file in data.files)]
    return here, [data for data in chosen if data not in here]


def main() -> None:
    """Run what is missing, then write the section of the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    limits = Limits()
    every = list(dict.fromkeys(name for data in sets(limits) for name, _ in methods_of(data)))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", default="abcdef", help="of abcdef, such as ce")
    parser.add_argument("--only", nargs="+", metavar="SET", help="these sets")
    parser.add_argument("--methods", nargs="+", default=every, choices=every, metavar="METHOD",
                        help=f"of {', '.join(every)}; default: all")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--training-images", type=int, default=limits.training_images)
    parser.add_argument("--test-images", type=int, default=limits.test_images)
    parser.add_argument("--image-steps", type=int, default=limits.image_steps, help="of training, on images")
    parser.add_argument("--workers", type=int, default=1, help="lines at a time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=REPORT)
    parser.add_argument("--page-only", action="store_true", help="measure nothing, write the page of what is there")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set("abcdef"):
        parser.error(f"no part {sorted(unknown)[0]!r}; there are a, b, c, d, e, f")
    limits = Limits(arguments.training_images, arguments.test_images, arguments.image_steps)
    named = {data.name for data in sets(limits)}
    if wrong := [name for name in arguments.only or [] if name not in named]:
        parser.error(f"no set {wrong[0]!r}; there are {'; '.join(sorted(named))}")
    asked = [data for data in sets(limits) if data.part in arguments.parts]
    asked = [data for data in asked if not arguments.only or data.name in arguments.only]
    here, absent = available(arguments.folder, asked)
    for data in absent:
        print(f"left out: {data.name}, for {arguments.folder} holds no {' and '.join(data.files)}")
    tasks = tasks_of(here, arguments.methods, arguments.seeds)
    done = load(arguments.results, limits)
    missing = resumable.missing(tasks, done, [field.name for field in fields(Task)])
    print(f"{len(tasks)} lines, {len(tasks) - len(missing)} of them there already", flush=True)
    if missing and not arguments.page_only:
        compute = partial(run, arguments.folder, limits)
        resumable.run_all(compute, missing, arguments.workers, arguments.results, said)
    table = load(arguments.results, limits)
    if table.empty:
        raise SystemExit("nothing has been measured: there is nothing to write")
    measured = {Task(*row) for row in table[[field.name for field in fields(Task)]].itertuples(index=False)}
    planned = tasks_of(sets(limits), every, SEEDS)
    to_do = contextual_page.ToDo(
        absent=[data.name for data in absent],
        lines=len(planned),
        measured=len(measured & set(planned)),
        sets=[data.name for data in sets(limits) if data.name not in set(table["data"]) and data not in absent],
        methods=[name for name in every if name not in set(table["method"])],
    )
    contextual_page.write(arguments.output, table, limits, to_do)
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
