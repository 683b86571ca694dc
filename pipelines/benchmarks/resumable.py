"""Work in many pieces over several processes: each finished piece is a line of a CSV file, so a killed run goes on."""

from __future__ import annotations

import csv
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pandas as pd


def one_thread() -> None:
    """Workers share the cores by pieces of work, not within one."""
    import torch

    torch.set_num_threads(1)


def run_all(tasks: Sequence[Any], compute: Callable[[Any], Sequence[Any]], workers: int, results: Path) -> None:
    """All tasks, several at a time, their lines written down when each is done; one that fails is named and left out.

    ``compute`` takes a task and returns dataclasses, one per line of the file; tasks and lines say by ``str`` what
    they are.
    """
    # Libraries that count threads read this when a worker starts.
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=one_thread) as pool:
        waiting = {pool.submit(compute, task): task for task in tasks}
        for done, future in enumerate(as_completed(waiting), start=1):
            task = waiting[future]
            try:
                lines = future.result()
            except Exception as fault:  # one method that fails on one set must not end a night's run
                print(f"{task}: {type(fault).__name__}: {fault}", flush=True)
                continue
            keep(lines, results)
            print(f"[{done}/{len(tasks)}] {task}: {'; '.join(map(str, lines))}", flush=True)


def keep(lines: Sequence[Any], results: Path) -> None:
    """Append lines, all of one task at once."""
    results.parent.mkdir(parents=True, exist_ok=True)
    is_new = not results.is_file()
    with results.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(lines[0])])
        if is_new:
            writer.writeheader()
        writer.writerows(asdict(line) for line in lines)


def load(results: Path, kind: type[Any]) -> pd.DataFrame:
    """The lines of a file, or none, with the columns of a dataclass."""
    if not results.is_file():
        return pd.DataFrame(columns=[field.name for field in fields(kind)])
    # A hash of digits alone is not a number.
    words = {field.name: "str" for field in fields(kind) if field.type in (str, "str")}
    return pd.read_csv(results, keep_default_na=False, dtype=words)
