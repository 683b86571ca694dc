"""Two speed floors, each a ratio measured alternately in one run: scoring against plain eager torch, and
fitting one network per class in one batched pass against a loop of fits.

Run with `make bench-floor`. Writes docs/benchmarks/floor.md.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from anomaly_cvae import CVAEDetector, presets
from anomaly_cvae.datasets import claimed_digits
from anomaly_cvae.encoding import Encoded, Encoder
from anomaly_cvae.fitting import FitSettings, build_engine, fit_aggregate
from anomaly_cvae.schema import Column, Condition, Schema
from anomaly_cvae.scoring import ScoringEngine
from anomaly_cvae.training import TrainingSettings

COLUMNS, CLASSES, HIDDEN, LATENT = 64, 10, 256, 16
EAGER_CHUNKS = (1024, 2048, 4096, 8192)


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


def reference_engine(prior: str, head: str, encoded: Encoded) -> ScoringEngine:
    """Our engine with the reference network's widths, untrained weights."""
    schema = Schema(
        columns=tuple(Column(f"x{i}", "real") for i in range(COLUMNS)),
        conditions=(Condition("c", "categorical", tuple(range(CLASSES))),),
        classes=tuple((k,) for k in range(CLASSES)),
    )
    frame = pd.DataFrame(encoded.values, columns=schema.names)
    settings = FitSettings(
        conditioning="shared", n_estimators=1, latent_dim=LATENT, hidden_dims=(HIDDEN, HIDDEN), prior=prior,
        n_samples=1, scale_floor=0.08, false_alarm_rate=0.01, contamination=None, validation_fraction=0.1,
        calibration_fraction=0.2, device=torch.device("cpu"), dtype=torch.float32,
        training=TrainingSettings(max_steps=1, batch_size=256, learning_rate=1e-3),
    )  # fmt: skip
    engine = build_engine(Encoder.fit(schema, frame, dict.fromkeys(schema.names, head)), encoded, settings, seed=0)
    if prior == "aggregate":
        fit_aggregate(engine, encoded.take(np.arange(20_000)), seed=0)
    return engine


def seconds(job: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def scoring(n_rows: int, repeats: int) -> list[tuple[str, float, float]]:
    """(name, rows/s, ratio to the best eager chunk size of the same round), medians over rounds."""
    rng = np.random.default_rng(0)
    encoded = Encoded(
        rng.normal(size=(n_rows, COLUMNS)),
        np.ones((n_rows, COLUMNS), dtype=bool),
        rng.integers(0, CLASSES, n_rows),
        np.zeros((n_rows, 0)),
    )
    x = torch.as_tensor(encoded.values, dtype=torch.float32)
    condition = torch.nn.functional.one_hot(torch.as_tensor(encoded.class_index), CLASSES).float()
    eager, noise = EagerCVAE(), torch.randn(LATENT)

    @torch.inference_mode()
    def plain(chunk: int) -> Tensor:
        parts = range(0, n_rows, chunk)
        return torch.cat([eager.negative_elbo(x[i : i + chunk], condition[i : i + chunk], noise) for i in parts])

    engines = {
        f"engine, {prior} prior, {head} head": reference_engine(prior, head, encoded)
        for prior, head in (("standard", "normal"), ("aggregate", "normal"), ("aggregate", "robust_normal"))
    }
    jobs: dict[str, Callable[[], object]] = {
        **{f"eager torch, {chunk}-row chunks": (lambda chunk=chunk: plain(chunk)) for chunk in EAGER_CHUNKS},
        **{name: (lambda e=e: e.negative_elbo(encoded)) for name, e in engines.items()},
    }
    for job in jobs.values():
        job()
    rounds = [{name: seconds(job) for name, job in jobs.items()} for _ in range(repeats)]
    best_eager = [min(t for name, t in r.items() if name.startswith("eager")) for r in rounds]
    return [
        (
            name.replace("_", " "),
            n_rows / float(np.median([r[name] for r in rounds])),
            float(np.median([best / r[name] for best, r in zip(best_eager, rounds, strict=True)])),
        )
        for name in jobs
    ]


def fitting(repeats: int) -> tuple[float, float, float]:
    """Seconds of one per-class fit of the digits, of ten fits in a loop, and the median ratio."""
    train = claimed_digits().train
    fixed = {**presets.FAST, "patience": 10**6, "random_state": 0}

    def batched() -> None:
        CVAEDetector(condition_columns=["claimed"], conditioning="per_class", **fixed).fit(train)

    def loop() -> None:
        for digit in range(10):
            CVAEDetector(**fixed).fit(train[train["claimed"] == digit].drop(columns="claimed"))

    pairs = [(seconds(batched), seconds(loop)) for _ in range(repeats)]
    ratio = float(np.median([slow / fast for fast, slow in pairs]))
    fast, slow = (float(np.median(column)) for column in zip(*pairs, strict=True))
    return fast, slow, ratio


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/floor.md"))
    arguments = parser.parse_args()
    lines = [
        "# Speed floors",
        "",
        f"Measured {datetime.now(UTC):%Y-%m-%d} by `make bench-floor` on {platform.machine()} with "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}; medians of "
        f"{arguments.repeats} rounds, every line of a round measured one after the other.",
        "",
        f"Scoring {arguments.rows:,} rows with the reference CVAE ({COLUMNS} columns, {CLASSES} classes, hidden "
        f"{HIDDEN}-{HIDDEN}, latent {LATENT}, Gaussian head, one sample). The engine starts from float64 numpy rows, "
        "the eager loop from float32 tensors. Ratio: to the fastest eager line of the same round.",
        "",
        "| way | rows/s | ratio |",
        "|---|---|---|",
    ]
    for name, rate, ratio in scoring(arguments.rows, arguments.repeats):
        lines.append(f"| {name} | {rate:,.0f} | {ratio:.2f} |")
        print(lines[-1], flush=True)
    fast, slow, ratio = fitting(max(1, arguments.repeats - 2))
    lines += [
        "",
        "Fitting the digits, one network per digit, FAST preset without early stopping (same steps on both sides), "
        "calibration included:",
        "",
        "| way | seconds |",
        "|---|---|",
        f'| `conditioning="per_class"`, one batched pass | {fast:.1f} |',
        f"| ten detectors in a loop | {slow:.1f} |",
        f"| ratio | {ratio:.1f} |",
        "",
    ]
    print("\n".join(lines[-4:]))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
