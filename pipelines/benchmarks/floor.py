"""Two speed floors, each a ratio measured alternately in one run: scoring against plain eager torch, and
fitting one network per class in one batched pass against a loop of fits.

Run with `make bench-floor`. Writes docs/benchmarks/floor.md.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from reference import (
    CLASSES,
    COLUMNS,
    EAGER_CHUNKS,
    HIDDEN,
    LATENT,
    EagerCVAE,
    encoded_rows,
    reference_engine,
    seconds,
)
from torch import Tensor

from anomaly_cvae import CVAEDetector, presets
from anomaly_cvae.datasets import claimed_digits


def scoring(n_rows: int, repeats: int) -> list[tuple[str, float, float]]:
    """(name, rows/s, ratio to the best eager chunk size of the same round), medians over rounds."""
    encoded = encoded_rows(n_rows)
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
    fixed = {**presets.BALANCED, "n_estimators": 1, "patience": 10**6, "random_state": 0}

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
        "Fitting the digits, one network per digit, else the BALANCED preset, without early stopping (same steps on "
        "both sides), calibration included:",
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
