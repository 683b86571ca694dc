"""Section "Where the time goes": operations of plain torch and of ours, by what they are for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from page import spread
from reference import (
    CLASSES,
    COLUMNS,
    LATENT,
    EagerCVAE,
    Job,
    encoded_rows,
    in_turn,
    reference_detector,
    reference_engine,
    table,
)
from scoring import with_precision
from torch.profiler import ProfilerActivity, profile

CHUNK, BATCH, LEARNING_RATE = 2048, 256, 2e-3
STEPS, FEW_STEPS = 500, 10
GROUPS = {
    "matrix products": ("addmm", "mm", "bmm", "baddbmm", "_linear_pointwise", "mkldnn_linear", "linear"),
    "copies and casts": ("copy_", "cat", "clone", "index", "index_select", "gather", "fill_", "zero_", "take"),
    "optimiser": ("_fused_adamw_", "_fused_adam_"),
}
OTHER, OUTSIDE = "element by element, sums", "outside torch"
PARTS = (*GROUPS, OTHER, OUTSIDE)


@dataclass(frozen=True)
class Way:
    """Something to look into, and the rows or steps that a call of it does."""

    name: str
    job: Job
    unit: str


@contextmanager
def one_thread() -> Iterator[None]:
    """Of several threads the profile would count what each of them waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def group_of(operation: str) -> str:
    """What an operation of torch is for."""
    name = operation.rsplit("::", 1)[-1]
    return next((group for group, names in GROUPS.items() if name in names), OTHER)


def shares(call: Callable[[], object]) -> dict[str, float]:
    """The share of the wall time that each group of operations takes by itself, without those it calls."""
    with profile(activities=[ProfilerActivity.CPU]) as found, torch.profiler.record_function("all"):
        call()
    spent: Counter[str] = Counter()
    whole = 0.0
    for event in found.key_averages():
        if event.key == "all":
            whole = event.cpu_time_total
        elif "::" in event.key:
            spent[group_of(event.key)] += event.self_cpu_time_total
    return {**{part: spent[part] / whole for part in PARTS}, OUTSIDE: 1.0 - sum(spent.values()) / whole}


def plain_training(rows: torch.Tensor, condition: torch.Tensor, steps: int) -> None:
    """A training loop as most would write it: a batch, a loss, a step."""
    network = EagerCVAE()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    for _ in range(steps):
        some = torch.randint(len(rows), (BATCH,))
        loss = network.negative_elbo(rows[some], condition[some], torch.randn(BATCH, LATENT)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def ways(n_rows: int, n_training: int, steps: int) -> list[Way]:
    """Scoring and training, plain and ours."""
    rows = encoded_rows(n_rows)
    values = torch.from_numpy(rows.values).float()
    condition = torch.nn.functional.one_hot(torch.from_numpy(rows.class_index), CLASSES).float()
    eager, noise = EagerCVAE(), torch.randn(LATENT)

    def plain() -> None:
        with torch.inference_mode():
            for first in range(0, n_rows, CHUNK):
                some = slice(first, first + CHUNK)
                eager.negative_elbo(values[some], condition[some], noise).numpy()

    engine = reference_engine("standard", "normal", rows)
    frame, training = table(n_rows), table(n_training)
    detector = reference_detector(training)
    engines = {name: with_precision(engine, name) for name in ("float32", "bfloat16")}

    def ours(conditioning: str) -> Job:
        return Job(lambda: reference_detector(training, max_steps=steps, conditioning=conditioning), steps)

    return [
        Way(f"scoring before: eager torch, {CHUNK:,}-row chunks", Job(plain, n_rows), "row"),
        *(
            Way(f"scoring: engine, {name}", Job(lambda e=own: e.negative_elbo(rows), n_rows), "row")
            for name, own in engines.items()
            if own is not None
        ),
        Way("scoring: `score_samples` on a DataFrame", Job(lambda: detector.score_samples(frame), n_rows), "row"),
        Way("training before: a plain loop, one network",
            Job(lambda: plain_training(values[:n_training], condition[:n_training], steps), steps), "step"),
        Way("training: fit, one shared network", ours("shared"), "step"),
        Way(f"training: fit, {CLASSES} networks, one per class", ours("per_class"), "step"),
    ]  # fmt: skip


def section(n_rows: int, n_training: int, rounds: int, *, short: bool = False) -> list[str]:
    """The section's text."""
    steps = FEW_STEPS if short else STEPS
    with one_thread():
        every = ways(n_rows, n_training, steps)
        rates = in_turn({way.name: way.job for way in every}, rounds)
        found = {way.name: shares(way.job.call) for way in every}
    return [
        f"One thread. Time per row or step: median of {rounds} rounds without the profiler. Shares: one call under "
        "torch's profiler, which adds a microsecond or so to every operation; *outside torch* is Python, numpy and "
        f"pandas. Fits: {n_training:,} rows of {COLUMNS} columns, {steps} steps of {BATCH} rows a network, with "
        "encoding, held-out looks and thresholds.",
        "",
        f"| way | time | {' | '.join(PARTS)} |",
        f"|---|---|{'---|' * len(PARTS)}",
        *(_line(way, 1e6 / rates.of[way.name], found[way.name]) for way in every),
        "",
    ]


def _line(way: Way, microseconds: np.ndarray, parts: dict[str, float]) -> str:
    cells = " | ".join(f"{100 * parts[part]:.0f} %" for part in PARTS)
    return f"| {way.name} | {spread(microseconds)} µs a {way.unit} | {cells} |"
