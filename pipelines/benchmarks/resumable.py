"""Long benchmarks in pieces: tasks run in a few processes, finished lines are kept as CSV, a killed run goes on."""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from threadpoolctl import threadpool_limits

from anomaly_cvae import CVAEDetector

Task = TypeVar("Task")
Line = Mapping[str, Any]
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def digest(parameters: Mapping[str, Any]) -> str:
    """Of a detector's parameters, defaults included: lines that were measured with other ones are measured again."""
    every = CVAEDetector(**parameters).get_params()
    return hashlib.sha256(repr(sorted(every.items())).encode()).hexdigest()[:8]


def one_thread() -> None:
    """Workers share the cores by tasks, not within one."""
    import torch

    torch.set_num_threads(1)


def run_all(
    work: Callable[[Task], Sequence[Line]],
    tasks: Sequence[Task],
    workers: int,
    results: Path,
    say: Callable[[Sequence[Line]], str],
) -> None:
    """All tasks, several at a time, each written down when it is done; one that fails is named and left out."""
    with contextlib.closing(_measured(work, tasks, workers)) as measured:
        for done, (task, lines) in enumerate(measured, start=1):
            try:
                found = lines()
            except Exception as fault:  # one method that fails on one set must not end a night's run
                print(f"{task}: {type(fault).__name__}: {fault}", flush=True)
                continue
            keep(found, results)
            print(f"[{done}/{len(tasks)}] {task}: {say(found)}", flush=True)


def _measured(
    work: Callable[[Task], Sequence[Line]], tasks: Sequence[Task], workers: int
) -> Iterator[tuple[Task, Callable[[], Sequence[Line]]]]:
    """Each task when it is done, and what gives its lines or raises its fault; one at a time in this process."""
    if workers == 1:
        with threadpool_limits(1):
            one_thread()
            yield from ((task, partial(work, task)) for task in tasks)
        return
    # Libraries that count threads read this when a worker starts.
    os.environ.update(dict.fromkeys(THREADS, "1"))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=one_thread) as pool:
        waiting = {pool.submit(work, task): task for task in tasks}
        yield from ((waiting[future], future.result) for future in as_completed(waiting))


def keep(lines: Sequence[Line], results: Path) -> None:
    """Append the lines of one task."""
    results.parent.mkdir(parents=True, exist_ok=True)
    is_new = not results.is_file()
    with results.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        if is_new:
            writer.writeheader()
        writer.writerows(lines)


def load(results: Path, columns: Iterable[str]) -> pd.DataFrame:
    """Finished lines; ``columns`` name those of a file that is not there yet."""
    if not results.is_file():
        return pd.DataFrame(columns=list(columns))
    # The parameters of a peer are an empty cell, those of ours may be digits alone.
    return pd.read_csv(results, keep_default_na=False, na_values=["nan"], dtype={"parameters": str})


def missing(tasks: Sequence[Task], done: pd.DataFrame, key: Sequence[str]) -> list[Task]:
    """The tasks without a line; ``key`` names what tells them apart, as attributes and as columns."""
    finished = set(zip(*(done[name] for name in key), strict=True))
    return [task for task in tasks if tuple(getattr(task, name) for name in key) not in finished]


def up_to_date(
    tasks: Sequence[Task],
    key: Sequence[str],
    work: Callable[[Task], Sequence[Line]],
    say: Callable[[Sequence[Line]], str],
    arguments: argparse.Namespace,
) -> pd.DataFrame:
    """All finished lines; those of the tasks that are missing are measured first, unless only the page is asked for."""
    left = missing(tasks, load(arguments.results, key), key)
    print(f"{len(tasks)} fits, {len(tasks) - len(left)} of them there already")
    if left and not arguments.page_only:
        run_all(work, left, arguments.workers, arguments.results, say)
    return load(arguments.results, key)
