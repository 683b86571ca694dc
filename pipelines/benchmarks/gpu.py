"""All that needs a CUDA device, in one go: the checks marked `gpu`, and the speed beside the limits of the card.

`make bench-gpu` writes the section "GPU" of docs/benchmarks/speed.md; without a CUDA device it says so and exits with
2.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from page import Goal, goal_table, measured_on, spread, write_section
from reference import (
    CLASSES,
    COLUMNS,
    FULL_TRAINING,
    HIDDEN,
    LATENT,
    EagerCVAE,
    Job,
    Rates,
    encoded_rows,
    in_turn,
    operations_per_row,
    reference_engine,
    table,
)
from scoring import with_precision
from torch import Tensor

from anomaly_cvae import CVAEDetector
from anomaly_cvae.encoding import Encoded
from anomaly_cvae.networks import Condition
from anomaly_cvae.objectives import elbo
from anomaly_cvae.replays import Replays
from anomaly_cvae.rows import Batch
from anomaly_cvae.scoring import ScoringEngine

REPORT = Path("docs/benchmarks/speed.md")
CHUNK = 1 << 20
MATRIX = 8192
HOST_BYTES = 1 << 30
FIT_MEMBERS, FIT_STEPS, FIT_HIDDEN, FIT_BATCH, FIT_ROWS = 5, 2_000, 128, 256, 20_000
MEMBERS = (1, 2, 4, 8, 16, 32)
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""How far scores of the card may lie from the processor's, relative: sums of a card are in another order."""
ON_THE_CARD = "the bank's terms, rows on the card"
NO_DEVICE = "there is no CUDA device here: `make bench-gpu` measures nothing; the page is left as it is"


def waited(call: Callable[[], object]) -> Callable[[], None]:
    """The call and the wait for the card to finish it."""

    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run


def limits() -> dict[str, Job]:
    """Matrix products of the card, and the link from pinned memory."""
    jobs = {}
    for name, dtype, tf32 in (("bfloat16", torch.bfloat16, False), ("tf32", torch.float32, True),
                              ("float32", torch.float32, False)):  # fmt: skip
        square = torch.randn(MATRIX, MATRIX, device="cuda").to(dtype)

        def product(square: Tensor = square, tf32: bool = tf32) -> Tensor:
            torch.backends.cuda.matmul.allow_tf32 = tf32
            return square @ square

        jobs[f"products, {name}"] = Job(waited(product), 2.0 * MATRIX**3)
    host = torch.ones(HOST_BYTES // 4).pin_memory()
    card = torch.empty_like(host, device="cuda")
    jobs["link, from pinned memory"] = Job(waited(lambda: card.copy_(host, non_blocking=True)), HOST_BYTES)
    return jobs


def plain(x: Tensor, class_index: Tensor) -> dict[str, Job]:
    """The plain network on rows that are on the card: eager and compiled, bfloat16."""
    network = EagerCVAE().cuda().bfloat16()
    noise = torch.randn(LATENT, device="cuda", dtype=torch.bfloat16)
    own, condition = x.bfloat16(), torch.nn.functional.one_hot(class_index, CLASSES).bfloat16()
    compiled = torch.compile(network.negative_elbo)

    def chunked(score: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        with torch.inference_mode():
            for first in range(0, len(own), CHUNK):
                score(own[first : first + CHUNK], condition[first : first + CHUNK], noise)

    return {
        "plain torch, eager bfloat16, rows on the card": Job(waited(lambda: chunked(network.negative_elbo)), len(own)),
        "plain torch, compiled bfloat16, rows on the card": Job(waited(lambda: chunked(compiled)), len(own)),
    }


def on_the_card(engine: ScoringEngine, x: Tensor) -> Callable[[], None]:
    """The bank's own terms of scaled rows on the card, class by class, captured; nothing is copied from the host."""
    parts, replays = torch.chunk(x, engine.n_classes), Replays()

    def work(members: slice, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        own = Batch(inputs["values"].unsqueeze(0), None, Condition(inputs["condition"]))
        return [elbo(engine.model.terms(own, engine.noise, members=members, prior=None)).mean(0)]

    def score() -> None:
        with engine.inference():
            for k, part in enumerate(parts):
                members, condition = engine.members_of(k), engine.condition(k, np.zeros((1, 0)))
                shared = {} if condition is None else {"condition": condition.vectors}
                for rows in torch.split(part, CHUNK):
                    key = (len(rows), members.start, members.stop)
                    replays.run(key, partial(work, members), {"values": rows}, shared, k)

    return waited(score)


def ours(n_rows: int, x: Tensor) -> dict[str, Job]:
    """Our engine, with rows on the card, and with rows in pinned memory of the host."""
    rows, pinned = encoded_rows(1_000), torch.randn(n_rows, COLUMNS).pin_memory().numpy()
    classes = np.sort(np.random.default_rng(0).integers(0, CLASSES, n_rows))
    host = Encoded(pinned, np.ones((n_rows, COLUMNS), dtype=bool), classes, np.zeros((n_rows, 0)))
    jobs = {}
    for precision in ("float32", "bfloat16"):
        engine = with_precision(reference_engine("standard", "normal", rows, device="cuda"), precision)
        if engine is not None:
            jobs[f"engine, {precision}, rows in pinned memory"] = Job(lambda e=engine: e.negative_elbo(host), n_rows)
            jobs[f"{ON_THE_CARD}, {precision}"] = Job(on_the_card(engine, x), n_rows)
    return jobs


def fits(rounds: int) -> tuple[Rates, Rates]:
    """Fits a second, of the size that the goal names; and steps a second by the number of members."""
    frame = table(FIT_ROWS)

    def fit(n_members: int, steps: int) -> None:
        CVAEDetector(
            ["c"], column_kinds={"c": "categorical"}, n_estimators=n_members, hidden_dims=(FIT_HIDDEN, FIT_HIDDEN),
            batch_size=FIT_BATCH, max_steps=steps, patience=FULL_TRAINING, device="cuda", random_state=0,
        ).fit(frame)  # fmt: skip

    whole = in_turn({"fit": Job(waited(lambda: fit(FIT_MEMBERS, FIT_STEPS)), 1.0)}, rounds)
    few, more = FIT_STEPS // 10, FIT_STEPS // 2
    # The difference of two fits is what the steps cost, without encoding, capture and thresholds.
    jobs = {f"{n} {steps}": Job(waited(lambda n=n, s=steps: fit(n, s)), 1.0) for n in MEMBERS for steps in (few, more)}
    pairs = in_turn(jobs, rounds)
    per_step = {str(n): (1 / pairs.of[f"{n} {more}"] - 1 / pairs.of[f"{n} {few}"]) / (more - few) for n in MEMBERS}
    return whole, Rates({n: 1 / step for n, step in per_step.items()})


def checks() -> list[str]:
    """Scores of the card against the processor's, and the tests that need a card; what came out, line by line."""
    rows = encoded_rows(20_000)
    reference = reference_engine("standard", "normal", rows)
    there = dataclasses.replace(
        reference_engine("standard", "normal", rows, device="cuda"), noise=reference.noise.cuda()
    )
    there.model.load_state_dict(reference.model.state_dict())
    expected, lines = reference.negative_elbo(rows), []
    for precision, tolerance in TOLERANCE.items():
        engine = with_precision(there, precision)
        if engine is None:
            continue
        apart = float(np.max(np.abs(engine.negative_elbo(rows) - expected) / np.maximum(np.abs(expected), 1.0)))
        verdict = "within" if apart <= tolerance else "**outside**"
        lines.append(
            f"- Scores of the card, {precision}: at most {apart:.1e} from the processor's, {verdict} {tolerance:g}"
        )
    ran = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "tests"], capture_output=True, text=True)
    said = ran.stdout.strip().splitlines() or [ran.stderr.strip()[-200:]]
    verdict = "fine" if ran.returncode in (0, 5) else "**failed**"  # 5: no test is marked
    return [*lines, f"- `pytest -m gpu`: {verdict}, {said[-1].strip('= ')}"]


def section(n_rows: int, rounds: int) -> list[str]:
    """The section's text."""
    x = torch.randn(n_rows, COLUMNS, device="cuda")
    class_index = torch.randint(CLASSES, (n_rows,), device="cuda")
    rates = in_turn({**limits(), **plain(x, class_index), **ours(n_rows, x)}, rounds)
    whole, steps = fits(max(1, rounds // 2))
    from_host = rates.best("engine") * COLUMNS * 4 / rates.of["link, from pinned memory"]
    flat = steps.of["1"] / steps.of["16"]
    goals = [
        Goal("rows on the card", rates.best(ON_THE_CARD), 5e8, " rows/s"),
        Goal("from pinned host memory, of the link", 100 * from_host, 90, " %"),
        Goal(f"fit of {FIT_MEMBERS} members x {FIT_STEPS:,} steps", 1 / whole.of["fit"], 1.3, " s", at_most=True),
        Goal("time per step, 16 members against 1", flat, 1.2, at_most=True),
    ]
    limit = rates.of["products, bfloat16"] / operations_per_row()
    return [
        f"On {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}. The reference CVAE (hidden {HIDDEN}-{HIDDEN}), "
        f"{n_rows:,} rows, {rounds} rounds; bfloat16 products alone would allow {spread(limit)} rows/s.",
        "",
        *goal_table(goals),
        "| line | rate |",
        "|---|---|",
        *(f"| {name} | {spread(rate / 1e9)} {_unit(name)} |" for name, rate in rates.of.items()),
        "",
        f"Fits of {FIT_ROWS:,} rows, hidden {FIT_HIDDEN}-{FIT_HIDDEN}, batch {FIT_BATCH}, validation and thresholds "
        "included; a step's time is the difference of a long and a short fit.",
        "",
        "| members | a step |",
        "|---|---|",
        *(f"| {n} | {spread(1e3 / rate)} ms |" for n, rate in steps.of.items()),
        "",
        *checks(),
    ]


def _unit(name: str) -> str:
    if name.startswith("products"):
        return "GFLOP/s (1e9)"
    return "GB/s" if name.startswith("link") else "1e9 rows/s"


def main() -> None:
    """Measure on the first CUDA device, or say that there is none."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1 << 23)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=REPORT)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(NO_DEVICE, file=sys.stderr)
        sys.exit(2)
    text = section(arguments.rows, arguments.rounds)
    write_section(arguments.output, "GPU", [measured_on("make bench-gpu"), "", *text])
    print(*text, sep="\n")


if __name__ == "__main__":
    main()
