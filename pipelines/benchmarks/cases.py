"""Data for the benchmarks of promises: normal rows and anomalies of npz sets, and of tables with a condition."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from adbench import name_of
from tables import CONFIGS

from anomaly_cvae import jobs
from anomaly_cvae.jobs.config import TrainConfig
from anomaly_cvae.labels import read_labels

CONFIG_OF = {
    "AI4I": ("ai4i.yaml", "ai4i2020.parquet", None, "Type"),
    "NSL-KDD": ("nsl_kdd.yaml", "nsl_kdd_train.parquet", "nsl_kdd_test.parquet", "protocol_type"),
    "C-MAPSS": ("cmapss.yaml", "cmapss_FD002_train.parquet", "cmapss_FD002_test.parquet", "op_condition"),
}
"""Tables: configuration with label and ignored columns, file, the test file that comes with it, condition."""


@dataclass(frozen=True)
class Task:
    """A set and a seed."""

    data: str
    seed: int
    place: Path
    parameters: str

    def __str__(self) -> str:
        return f"{self.data}, seed {self.seed}"


@dataclass(frozen=True)
class Case:
    """Normal rows and anomalies of one draw; ``elsewhere`` are normal rows of a test file drawn in another way."""

    normal: pd.DataFrame
    anomalies: pd.DataFrame
    condition: str | None = None
    elsewhere: pd.DataFrame | None = None


def sets(folder: Path) -> dict[str, Path]:
    """The npz files of a folder by name, large ones first: the last to finish should be a small one."""
    files = sorted(folder.glob("*.npz"), key=lambda file: -file.stat().st_size)
    return {name_of(file): file for file in files}


def load(name: str, place: Path) -> Case:
    """A table of `CONFIG_OF` in the folder ``place``, or the npz file ``place`` with X (N, D) and y (N,)."""
    if name in CONFIG_OF:
        return _of_table(name, place)
    with np.load(place) as loaded:
        X, y = pd.DataFrame(loaded["X"].astype(np.float64)), loaded["y"].ravel() != 0
    X.columns = [f"x{d}" for d in range(X.shape[1])]
    return Case(X[~y], X[y])


def _of_table(name: str, folder: Path) -> Case:
    config_file, train, test, condition = CONFIG_OF[name]
    config = jobs.load_config(CONFIGS / config_file, {})
    normal, anomalies = _read(folder / train, config)
    elsewhere = None if test is None else _read(folder / test, config)[0]
    return Case(normal, anomalies, condition, elsewhere)


def _read(file: Path, config: TrainConfig) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Normal rows and anomalies, without the columns that the configuration ignores and the label."""
    frame = pd.read_parquet(file)
    assert config.label is not None
    labels = read_labels(frame[config.label], config.label, config.anomaly, config.normal)
    kept = frame.drop(columns=[*config.ignore, config.label])
    for name in kept.select_dtypes("category"):
        kept[name] = kept[name].astype(str)
    return kept[labels.is_known & ~labels.is_anomaly], kept[labels.is_anomaly]


def halves(rows: pd.DataFrame, seed: int, at_most: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows to learn from, and at most so many of the others, drawn by the seed."""
    order = np.random.default_rng(seed).permutation(len(rows))
    half = len(rows) // 2
    return rows.iloc[order[:half]], rows.iloc[order[half : half + at_most]]


def asked(parser: argparse.ArgumentParser, places: dict[str, Path], only: list[str] | None) -> list[str]:
    """The names to run; one that is not there ends the program."""
    if not places:
        parser.error("the folder holds no npz file")
    absent = [name for name in only or [] if name not in places]
    if absent:
        parser.error(f"there is no set {absent[0]!r}; there are {', '.join(places)}")
    return only or list(places)
