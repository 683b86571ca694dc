"""What the speed benchmarks share: the reference CVAE, plain and ours, its rows, and measuring ways in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from anomaly_cvae import CVAEDetector
from anomaly_cvae.encoding import Encoded, Encoder
from anomaly_cvae.fitting import FitSettings, build_engine, fit_aggregate
from anomaly_cvae.schema import Column, Condition, Schema
from anomaly_cvae.scoring import ScoringEngine
from anomaly_cvae.training import TrainingSettings

COLUMNS, CLASSES, HIDDEN, LATENT = 64, 10, 256, 16
EAGER_CHUNKS = (1024, 2048, 4096, 8192)
FULL_TRAINING = 10**6
"""Epochs of patience: training takes all its steps, so that two fits do the same work."""


class EagerCVAE(nn.Module):
    """The reference network written as most people would: one-hot concatenated, two hidden layers, Gaussian head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(COLUMNS + CLASSES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
            nn.Linear(HIDDEN, 2 * LATENT),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(LATENT + CLASSES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
            nn.Linear(HIDDEN, 2 * COLUMNS),
        )  # fmt: skip

    def negative_elbo(self, x: Tensor, condition: Tensor, noise: Tensor) -> Tensor:
        """One sample, standard-normal prior, (N,)."""
        mean, log_variance = self.encoder(torch.cat([x, condition], dim=1)).chunk(2, dim=1)
        z = mean + torch.exp(0.5 * log_variance) * noise
        location, log_scale2 = self.decoder(torch.cat([z, condition], dim=1)).chunk(2, dim=1)
        log_prob = -0.5 * ((x - location) ** 2 * torch.exp(-log_scale2) + log_scale2 + np.log(2 * np.pi))
        kl = 0.5 * (mean**2 + torch.exp(log_variance) - 1 - log_variance)
        return kl.sum(1) - log_prob.sum(1)


def operations_per_row(n_columns: int = COLUMNS, n_classes: int = CLASSES) -> int:
    """Floating-point operations of the reference network's products, two per multiply-add."""
    encoder = (n_columns + n_classes) * HIDDEN + HIDDEN * HIDDEN + HIDDEN * 2 * LATENT
    decoder = (LATENT + n_classes) * HIDDEN + HIDDEN * HIDDEN + HIDDEN * 2 * n_columns
    return 2 * (encoder + decoder)


def encoded_rows(n_rows: int, n_columns: int = COLUMNS, n_classes: int = CLASSES) -> Encoded:
    """Rows of noise as the engine takes them."""
    rng = np.random.default_rng(0)
    return Encoded(
        rng.normal(size=(n_rows, n_columns)),
        np.ones((n_rows, n_columns), dtype=bool),
        rng.integers(0, n_classes, n_rows),
        np.zeros((n_rows, 0)),
    )


def table(n_rows: int, n_columns: int = COLUMNS, n_classes: int = CLASSES, seed: int = 0) -> pd.DataFrame:
    """float32 columns whose mean depends on the class in column ``c``; every class occurs."""
    rng = np.random.default_rng(seed)
    classes = np.concatenate([np.arange(n_classes), rng.integers(0, n_classes, max(n_rows - n_classes, 0))])[:n_rows]
    values = rng.normal(size=(n_rows, n_columns)).astype(np.float32) + (classes % 7)[:, None].astype(np.float32)
    return pd.DataFrame(values, columns=[f"x{i}" for i in range(n_columns)]).assign(c=classes)


def reference_engine(
    prior: str,
    head: str,
    encoded: Encoded,
    *,
    n_classes: int = CLASSES,
    n_members: int = 1,
    device: str = "cpu",
) -> ScoringEngine:
    """Our engine with the reference network's widths, untrained weights."""
    schema = Schema(
        columns=tuple(Column(f"x{i}", "real") for i in range(encoded.values.shape[1])),
        conditions=(Condition("c", "categorical", tuple(range(n_classes))),),
        classes=tuple((k,) for k in range(n_classes)),
    )
    frame = pd.DataFrame(encoded.values, columns=schema.names)
    settings = FitSettings(
        conditioning="shared", n_estimators=n_members, latent_dim=LATENT, hidden_dims=(HIDDEN, HIDDEN), prior=prior,
        n_samples=1, scale_floor=0.08, false_alarm_rate=0.01, contamination=None, validation_fraction=0.1,
        calibration_fraction=0.2, device=torch.device(device), dtype=torch.float32,
        training=TrainingSettings(max_steps=1, batch_size=256, learning_rate=1e-3),
    )  # fmt: skip
    engine = build_engine(Encoder.fit(schema, frame, dict.fromkeys(schema.names, head)), encoded, settings, seed=0)
    if prior == "aggregate":
        fit_aggregate(engine, encoded.take(np.arange(min(len(encoded), 20_000))), seed=0)
    return engine


def reference_detector(frame: pd.DataFrame, **changes: object) -> CVAEDetector:
    """The reference CVAE behind the detector's face, fitted for a few steps: what it costs, not what it finds."""
    heads = {name: "normal" for name in frame if name != "c"}
    plain = {"n_estimators": 1, "n_samples": 1, "prior": "standard", "likelihoods": heads}
    # Cells hidden in training are shown to the encoder by 64 inputs more, which the reference does not have.
    training = {"max_steps": 20, "batch_size": 256, "mask_rate": 0.0}
    shape = {"hidden_dims": (HIDDEN, HIDDEN), "latent_dim": LATENT, "column_kinds": {"c": "categorical"}}
    fixed = {"patience": FULL_TRAINING, "random_state": 0, "device": "cpu"}
    return CVAEDetector(["c"], **{**plain, **training, **shape, **fixed, **changes}).fit(frame)


def seconds(job: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Job:
    """A piece of work and how much of it one call does: rows, operations or bytes."""

    call: Callable[[], object]
    amount: float


@dataclass(frozen=True)
class Rates:
    """Amount per second of every job in every round: {name: (R,)}."""

    of: dict[str, np.ndarray]

    def best(self, prefix: str) -> np.ndarray:
        """The fastest of the jobs whose names start so, round by round, (R,)."""
        return np.max([rates for name, rates in self.of.items() if name.startswith(prefix)], axis=0)

    def has(self, prefix: str) -> bool:
        """Whether any job's name starts so."""
        return any(name.startswith(prefix) for name in self.of)


def in_turn(jobs: Mapping[str, Job], rounds: int) -> Rates:
    """Measure every job once a round, one after the other, so that a busy machine slows all of them alike.

    A first round, which is not counted, makes the kernels and caches.
    """
    for job in jobs.values():
        job.call()
    taken = [{name: job.amount / seconds(job.call) for name, job in jobs.items()} for _ in range(rounds)]
    return Rates({name: np.array([one[name] for one in taken]) for name in jobs})
