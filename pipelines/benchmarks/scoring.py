"""Section "Limits and scoring": the reference CVAE by every way, beside the limits of the machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from limits import copying, fastest_products, reading_parquet
from page import Goal, goal_table, spread
from reference import (
    CLASSES,
    EAGER_CHUNKS,
    LATENT,
    EagerCVAE,
    Job,
    Rates,
    in_turn,
    operations_per_row,
    reference_detector,
    table,
)
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from anomaly_cvae import CVAEDetector, batch
from anomaly_cvae.errors import ParameterError
from anomaly_cvae.scoring import ScoringEngine

BATCH = 1024
TABLE_ROWS = (1 << 13, 1 << 16)
"""Rows at a time of the detector alone; the faster one counts."""
SHARE_OF_LOADER = 8
"""A loop over single rows is slow: it gets this part of the rows."""
TRAINING_ROWS = 4_000


def with_precision(engine: ScoringEngine, precision: str) -> ScoringEngine | None:
    """The engine computing in "float32" or "bfloat16"; None where it has no such choice and float32 is not asked."""
    if "precision" in {field.name for field in dataclasses.fields(engine)}:
        return dataclasses.replace(engine, precision=precision)
    return engine if precision == "float32" else None


def with_graphs(engine: ScoringEngine) -> ScoringEngine | None:
    """The engine computing by ONNX Runtime; None where that is not installed."""
    try:
        return engine.with_graphs()
    except ParameterError:
        return None


def plain_ways(encoded_values: Tensor, class_index: Tensor) -> dict[str, Job]:
    """The network as most people write and run it: eager in chunks, and fed by a DataLoader."""
    eager, noise, n_rows = EagerCVAE(), torch.randn(LATENT), len(encoded_values)
    condition = torch.nn.functional.one_hot(class_index, CLASSES).float()

    @torch.inference_mode()
    def chunked(chunk: int) -> Tensor:
        starts = range(0, n_rows, chunk)
        pairs = ((encoded_values[i : i + chunk], condition[i : i + chunk]) for i in starts)
        return torch.cat([eager.negative_elbo(x, c, noise) for x, c in pairs])

    some = max(BATCH, n_rows // SHARE_OF_LOADER)
    loader = DataLoader(TensorDataset(encoded_values[:some], condition[:some]), batch_size=BATCH)

    @torch.inference_mode()
    def loaded() -> Tensor:
        return torch.cat([eager.negative_elbo(x, c, noise) for x, c in loader])

    jobs = {
        f"eager torch, {chunk}-row chunks": Job(lambda chunk=chunk: chunked(chunk), n_rows) for chunk in EAGER_CHUNKS
    }
    return {**jobs, f"DataLoader(TensorDataset), batches of {BATCH}": Job(loaded, min(some, n_rows))}


def our_ways(detector: CVAEDetector, frame: pd.DataFrame) -> dict[str, Job]:
    """The engine in each precision it has, and the detector."""
    encoded, n_rows = detector.model_.encoder.encode(frame), len(frame)
    jobs = {}
    for precision in ("float32", "bfloat16"):
        engine = with_precision(detector.model_.engine, precision)
        if engine is not None:
            jobs[f"engine, {precision}"] = Job(lambda e=engine: e.negative_elbo(encoded), n_rows)
    graphs = with_graphs(detector.model_.engine)
    if graphs is not None:
        jobs["engine, float32 by ONNX Runtime"] = Job(lambda: graphs.negative_elbo(encoded), n_rows)
    return {**jobs, "detector, score_samples on a DataFrame": Job(lambda: detector.score_samples(frame), n_rows)}


def file_ways(detector: CVAEDetector, frame: pd.DataFrame, folder: Path) -> dict[str, Job]:
    """Parquet to Parquet, and its three stages alone: pyarrow reads and writes, the detector scores what is there."""
    source, n_rows, run = folder / "rows.parquet", len(frame), iter(range(1 << 30))
    frame.to_parquet(source, index=False)
    scored = pa.Table.from_pandas(detector.score_table(frame), preserve_index=False)

    def job(backend: str) -> None:
        options = batch.ScoreOptions(backend=backend)
        batch.score_files(detector, [source], folder / f"scored{next(run)}", model_hash="benchmark", options=options)

    def score(size: int) -> None:
        for first in range(0, n_rows, size):
            detector.score_table(frame.iloc[first : first + size])

    return {
        "Parquet to Parquet": Job(lambda: job("torch"), n_rows),
        "alone: read": Job(lambda: pq.read_table(source).to_pandas(), n_rows),
        **{f"alone: score, {size:,} rows at a time": Job(lambda s=size: score(s), n_rows) for size in TABLE_ROWS},
        "alone: write": Job(lambda: pq.write_table(scored, folder / "alone.parquet"), n_rows),
    }


def measure(n_rows: int, rounds: int, folder: Path) -> Rates:
    """All lines of the section, in turn."""
    frame = table(n_rows)
    detector = reference_detector(table(TRAINING_ROWS))
    values = torch.as_tensor(frame.drop(columns="c").to_numpy(np.float32, copy=True))
    jobs = {
        **fastest_products(),
        "copy": copying(),
        "Parquet read": reading_parquet(folder, n_rows),
        **plain_ways(values, torch.as_tensor(frame["c"].to_numpy(copy=True))),
        **our_ways(detector, frame),
        **file_ways(detector, frame, folder),
    }
    return in_turn(jobs, rounds)


def goals(rates: Rates) -> list[Goal]:
    """Figures to reach, from one run."""
    engine, fastest, eager = rates.of["engine, float32"], rates.best("engine, float32"), rates.best("eager")
    achieved = fastest * operations_per_row() / rates.best("float32")
    short = rates.of["engine, bfloat16"] / eager if rates.has("engine, bfloat16") else None
    alone = 1 / sum(1 / rates.best(f"alone: {stage}") for stage in ("read", "score", "write"))
    detector = rates.of["detector, score_samples on a DataFrame"]
    return [
        Goal("engine float32, against the best eager chunks", fastest / eager, 2.2),
        Goal("engine float32, of the best float32 product rate", 100 * achieved, 80, " %"),
        Goal(
            "engine bfloat16, against the best eager chunks", short, 4, why_not="this version has no bfloat16 scoring"
        ),
        Goal("`score_samples` on a DataFrame, of the engine's rate", 100 * detector / engine, 80, " %"),
        Goal(
            "Parquet to Parquet, of 1 / (read + score + write)", 100 * rates.of["Parquet to Parquet"] / alone, 90, " %"
        ),
    ]


def section(n_rows: int, rounds: int, folder: Path) -> list[str]:
    """The section's text."""
    rates = measure(n_rows, rounds, folder)
    products = [name for name in rates.of if name.startswith(("float32", "bfloat16"))]
    limits = [f"| {name} | {spread(rates.of[name] / 1e9)} GFLOP/s |" for name in products]
    copied, read = rates.of["copy"] / 1e9, rates.of["Parquet read"]
    eager = rates.best("eager")
    ways = [name for name in rates.of if name.split(",")[0].split(":")[0] in WAYS]
    return [
        f"The reference CVAE: 64 columns, 10 classes, hidden 256-256, latent 16, Gaussian head, one sample; "
        f"{operations_per_row():,} floating-point operations a row. {n_rows:,} rows, {rounds} rounds. "
        "It is trained without hidden cells: the defaults hide some, for which the encoder has as many inputs more.",
        "",
        *goal_table(goals(rates)),
        *_most(rates, eager),
        "What the machine can do; of the products, the best over the shapes of the reference network:",
        "",
        "| limit | rate |",
        "|---|---|",
        *limits,
        f"| copying memory, bytes read and written | {spread(copied)} GB/s |",
        f"| reading 64 float32 columns of Parquet with pyarrow | {spread(read)} rows/s |",
        "",
        "Ratios are to the best eager chunks of the same round. The engine starts from encoded float64 rows. *Alone* "
        "are the stages of Parquet to Parquet, each by itself: pyarrow reads and writes, `score_table` scores rows "
        "that are in memory already. By ONNX Runtime: the graph, which takes seconds to make, is there beforehand. "
        "GFLOP/s: of the network's products, as if the line did nothing else.",
        "",
        "| way | rows/s | ratio | GFLOP/s |",
        "|---|---|---|---|",
        *(
            f"| {name} | {spread(rates.of[name])} | {spread(rates.of[name] / eager)} | {_operations(name, rates)} |"
            for name in ways
        ),
        *([] if rates.has("engine, bfloat16") else ["| engine, bfloat16 | not in this version | | |"]),
    ]


def _most(rates: Rates, eager: np.ndarray) -> list[str]:
    """What the products alone would allow: no goal beyond that can be reached on this machine."""
    kinds = [kind for kind in ("float32", "bfloat16") if rates.has(kind)]
    most = [f"{spread(rates.best(kind) / operations_per_row() / eager, ' x')} in {kind}" for kind in kinds]
    return [
        "The network's products alone, all at the best rate of the same round and nothing beside them, would make "
        f"{' and '.join(most)} of the best eager chunks: goals beyond that cannot be reached here.",
        "",
    ]


WAYS = ("eager torch", "DataLoader(TensorDataset)", "engine", "detector", "Parquet to Parquet", "alone")


def _operations(name: str, rates: Rates) -> str:
    if name.startswith("alone") and "score" not in name:
        return ""
    return f"{float(np.median(rates.of[name])) * operations_per_row() / 1e9:.0f}"
