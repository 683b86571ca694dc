"""Which column is wrong: one, two or three cells of normal rows get the values of other rows; who finds them?

    python pipelines/benchmarks/explained.py FOLDER          # or: make bench-explanations DATA=FOLDER

FOLDER holds npz files with ``X`` (N, D) and ``y`` (N,), 1 = anomaly. Sets of 5 to 60 columns serve of which most, and
at least five, are real: 20 values or more. Half of the normal rows, drawn by the seed, train; rows of the other half
are spoiled. Finished lines are kept in outputs/explained/results.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import attributions
import cases
import explained_page
import numpy as np
import pandas as pd
import resumable

from anomaly_cvae import CVAEDetector, explain, presets

RESULTS = Path("outputs/explained/results.csv")
REPORT = Path("docs/benchmarks/quality.md")
ROWS = 200
MANY = (1, 2, 3)
"""Spoiled cells a row."""
COLUMNS = (5, 60)
LEAST_VALUES = 20
LEAST_MOVE = 0.25
"""Of the column's ranks: a smaller change is none."""
TRIES = 50
ALARM_RATE = 0.05
KEY = ("data", "seed")


@dataclass(frozen=True)
class Line:
    """``found``: share of the ``spoiled`` cells of a row among as many columns ranked first, mean over rows."""

    method: str
    spoiled: int
    rows: int
    found: float
    flagged_rows: int
    flagged_found: float


def real_columns(X: np.ndarray) -> np.ndarray:
    """Columns of many values."""
    return np.flatnonzero([len(np.unique(column)) >= LEAST_VALUES for column in X.T])


def serves(place: Path) -> bool:
    """Whether a set has as many columns as are wanted, and most of them real."""
    with np.load(place) as loaded:
        X, y = loaded["X"], loaded["y"].ravel()
    n_real = len(real_columns(X[y == 0]))
    return COLUMNS[0] <= X.shape[1] <= COLUMNS[1] and n_real >= max(COLUMNS[0], X.shape[1] / 2)


def spoil(
    rows: np.ndarray, pool: np.ndarray, columns: np.ndarray, many: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Rows with ``many`` cells of each taken from random rows of the pool, far enough in rank; and which cells."""
    spoiled, where = rows.copy(), np.zeros(rows.shape, dtype=bool)
    order = rng.random((len(rows), len(columns))).argsort(axis=1)[:, :many]
    np.put_along_axis(where, columns[order], True, axis=1)
    for d in columns:
        own = np.flatnonzero(where[:, d])
        drawn = rng.choice(pool[:, d], (len(own), TRIES))
        moves = np.abs(rank(pool[:, d], drawn) - rank(pool[:, d], rows[own, d])[:, None])
        # The first that moves far enough, else the one that moves furthest.
        chosen = np.where((moves >= LEAST_MOVE).any(axis=1), (moves >= LEAST_MOVE).argmax(axis=1), moves.argmax(axis=1))
        spoiled[own, d] = drawn[np.arange(len(own)), chosen]
    return spoiled, where


def rank(pool: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Share of the pool below each value; half of those equal to it count."""
    ordered = np.sort(pool)
    both = np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")
    return both / (2.0 * len(ordered))


def share_found(blame: np.ndarray, where: np.ndarray, many: int) -> np.ndarray:
    """Of the spoiled cells of every row, the share among the ``many`` most blamed, (N,)."""
    top = np.argsort(-blame, axis=1, kind="stable")[:, :many]
    found: np.ndarray = np.take_along_axis(where, top, axis=1).mean(axis=1)
    return found


def run(task: cases.Task) -> list[dict[str, object]]:
    """Fit once; spoil rows, and ask everyone which cells were spoiled."""
    case = cases.load(task.data, task.place)
    learned, fresh = cases.halves(case.normal, task.seed, ROWS)
    detector = CVAEDetector(**presets.BALANCED, random_state=task.seed).fit(learned)
    detector.recalibrate(false_alarm_rate=ALARM_RATE)
    lines = figures(detector, learned.to_numpy(), fresh, task.seed)
    return [{**asdict(task), "place": task.place.name, **asdict(line)} for line in lines]


def figures(detector: CVAEDetector, learned: np.ndarray, fresh: pd.DataFrame, seed: int) -> Iterator[Line]:
    """One line per method and number of spoiled cells."""
    rng, columns = np.random.default_rng(seed), real_columns(learned)
    for many in MANY:
        spoiled, where = spoil(fresh.to_numpy(), learned, columns, many, rng)
        rows = pd.DataFrame(spoiled, columns=fresh.columns)
        flagged = detector.predict(rows) == -1
        blamed = ours(detector, rows, many)
        blamed |= {peer: attributions.blame(peer, learned, spoiled, seed) for peer in attributions.PEERS}
        for method, blame in blamed.items():
            found = share_found(blame, where, many)
            of_flagged = float(found[flagged].mean()) if flagged.any() else float("nan")
            yield Line(method, many, len(rows), float(found.mean()), int(flagged.sum()), of_flagged)


def ours(detector: CVAEDetector, rows: pd.DataFrame, many: int) -> dict[str, np.ndarray]:
    """What the detector blames, in each of its ways; the KL is no column."""
    model, encoded = detector.model_, detector._encode(rows, None)
    gains = detector.explain(rows, method="repair").to_numpy()
    columns, saved = explain.to_blame(model, encoded, explain.CANDIDATES)
    candidates = np.full(gains.shape, -np.inf)
    np.put_along_axis(candidates, columns, saved, axis=1)
    return {
        explained_page.OURS: gains,
        explained_page.IN_TURN: in_turn(detector, rows, gains, many),
        "CVAE, top_columns": candidates,
        "CVAE, excess nats": explain.excess_nats(model, encoded),
        'CVAE, explain(method="sum")': detector.explain(rows).drop(columns=explain.KL).to_numpy(),
    }


def in_turn(detector: CVAEDetector, rows: pd.DataFrame, gains: np.ndarray, many: int) -> np.ndarray:
    """Repairs in turn: the cell that gains most is hidden before the next is asked for. Later cells rank lower."""
    blame, left, places = np.zeros(rows.shape), rows.to_numpy(copy=True), np.arange(len(rows))
    for turn in range(many):
        if turn:
            hidden = pd.DataFrame(left, columns=rows.columns)
            gains = detector.explain(hidden, method="repair").to_numpy()
        top = np.where(np.isnan(left), -np.inf, gains).argmax(axis=1)
        blame[places, top] = many - turn
        left[places, top] = np.nan
    return blame


def said(lines: list[dict[str, object]]) -> str:
    """Top-1 of every method."""
    return ", ".join(f"{line['method']} {line['found']:.2f}" for line in lines if line["spoiled"] == 1)


def main() -> None:
    """Run what is missing, then write the section of the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="these sets")
    parser.add_argument("--workers", type=int, default=1, help="sets at a time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=REPORT)
    parser.add_argument("--page-only", action="store_true", help="measure nothing, write the page of what is there")
    arguments = parser.parse_args()
    places = {name: place for name, place in cases.sets(arguments.folder).items() if serves(place)}
    names = cases.asked(parser, places, arguments.only)
    parameters = resumable.digest(presets.BALANCED)
    tasks = [cases.Task(data, seed, places[data], parameters) for seed in arguments.seeds for data in names]
    table = resumable.up_to_date(tasks, [*KEY, "parameters"], run, said, arguments)
    explained_page.write(arguments.output, table[table["parameters"] == parameters])
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
