"""Section "Growth": how scoring and fitting grow with columns, classes and members; and the picture of all curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from page import Goal, goal_table, spread
from reference import Job, Rates, encoded_rows, in_turn, operations_per_row, reference_detector, reference_engine, table

from anomaly_cvae import plots

COLUMNS, FEW_COLUMNS = (8, 16, 32, 64, 128, 256, 512, 1024), (8, 64)
CLASSES, FEW_CLASSES = (1, 3, 10, 30, 100), (1, 10)
MEMBERS, FEW_MEMBERS = (1, 2, 4, 8, 16, 32), (1, 2)
BATCH = 256
EPOCHS = 20
MEMBER_STEPS = 20
"""Training steps of the fits with many members: the time of one step is what is asked for."""
TICKS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
"""Where an axis of values has ticks between two powers of ten."""


@dataclass(frozen=True)
class Curve:
    """What was measured at the points of one axis: {name: [(R,) per point]}, and the unit of each."""

    axis: str
    points: Sequence[int]
    rates: Mapping[str, list[np.ndarray]]
    units: Mapping[str, str]

    def lines(self) -> list[str]:
        """A table of the curve."""
        heads = [f"{name}, {self.units[name]}" for name in self.rates]
        rows = [
            f"| {point:,} | {' | '.join(spread(values[i]) for values in self.rates.values())} |"
            for i, point in enumerate(self.points)
        ]
        return [f"| {self.axis} | {' | '.join(heads)} |", "|---|" + "---|" * len(heads), *rows, ""]


def over(points: Sequence[int], job_of: Callable[[int], Job], rounds: int) -> list[np.ndarray]:
    """Rates at every point, (R,) each; the points take turns."""
    rates: Rates = in_turn({str(point): job_of(point) for point in points}, rounds)
    return [rates.of[str(point)] for point in points]


def columns(points: Sequence[int], n_rows: int, rounds: int) -> Curve:
    """Scoring by the engine, of as many cells at every point as ``n_rows`` of 64 columns have, at most."""

    def score(n_columns: int) -> Job:
        n = min(n_rows, max(2_000, n_rows * 64 // n_columns))
        encoded = encoded_rows(n, n_columns)
        engine = reference_engine("standard", "normal", encoded)
        return Job(lambda: engine.negative_elbo(encoded), n)

    rates = over(points, score, rounds)
    work = [rate * operations_per_row(n) / 1e9 for n, rate in zip(points, rates, strict=True)]
    return Curve("columns", points, {"scoring": rates, "products": work}, {"scoring": "rows/s", "products": "GFLOP/s"})


def classes(points: Sequence[int], n_rows: int, n_training: int, rounds: int, epochs: int) -> Curve:
    """Scoring, and fits of the same rows with as many passes over them: shared, and one network per class."""

    def score(n_classes: int) -> Job:
        encoded = encoded_rows(n_rows, n_classes=n_classes)
        engine = reference_engine("standard", "normal", encoded, n_classes=n_classes)
        return Job(lambda: engine.negative_elbo(encoded), n_rows)

    def fit(n_classes: int, conditioning: str) -> Job:
        frame = table(n_training, n_classes=n_classes)
        networks = n_classes if conditioning == "per_class" else 1
        steps = max(1, epochs * n_training // (BATCH * networks))
        how = {"conditioning": conditioning, "max_steps": steps, "batch_size": BATCH}
        return Job(lambda: reference_detector(frame, **how), 1.0)

    fits = {
        f"fit, {kind}": [1 / rate for rate in over(points, lambda k, kind=kind: fit(k, kind), max(1, rounds // 2))]
        for kind in ("shared", "per_class")
    }
    return Curve(
        "classes", points, {"scoring": over(points, score, rounds), **fits},
        {"scoring": "rows/s", **dict.fromkeys(fits, "s")},
    )  # fmt: skip


def members(points: Sequence[int], n_rows: int, n_training: int, rounds: int) -> Curve:
    """Scoring, and the seconds of a fit of few steps, which is mostly its steps."""
    frame = table(n_training)

    def score(n_members: int) -> Job:
        n = max(2_000, n_rows // n_members)
        encoded = encoded_rows(n)
        engine = reference_engine("standard", "normal", encoded, n_members=n_members)
        # Rows of one member, so that a flat curve means that members cost what they must.
        return Job(lambda: engine.negative_elbo(encoded), n * n_members)

    def fit(n_members: int) -> Job:
        how = {"n_estimators": n_members, "max_steps": MEMBER_STEPS, "batch_size": BATCH}
        return Job(lambda: reference_detector(frame, **how), 1.0)

    fits = [1 / rate for rate in over(points, fit, max(1, rounds // 2))]
    return Curve(
        "members", points, {"scoring": over(points, score, rounds), f"fit of {MEMBER_STEPS} steps": fits},
        {"scoring": "rows x members/s", f"fit of {MEMBER_STEPS} steps": "s"},
    )  # fmt: skip


def section(n_rows: int, n_training: int, rounds: int, *, short: bool = False) -> tuple[list[str], list[Curve]]:
    """The section's text, and its curves for the picture; ``short`` has two points of each and one epoch."""
    axes = (FEW_COLUMNS, FEW_CLASSES, FEW_MEMBERS) if short else (COLUMNS, CLASSES, MEMBERS)
    epochs = 1 if short else EPOCHS
    by_class = classes(axes[1], n_rows, n_training, rounds, epochs)
    curves = [columns(axes[0], n_rows, rounds), by_class, members(axes[2], n_rows, n_training, rounds)]
    goals = [
        Goal(
            f"{name.removeprefix('fit, ')}: fit of {by_class.points[-1]} classes against 1",
            fits[-1] / fits[0],
            1.5,
            at_most=True,
        )
        for name, fits in by_class.rates.items()
        if name.startswith("fit")
    ]
    text = [
        f"The reference CVAE with one thing changed at a time; {n_rows:,} rows scored (fewer of more than 64 columns, "
        f"and with more members), {n_training:,} fitted, {rounds} rounds (fits: {max(1, rounds // 2)}). The fits over "
        f"classes make {epochs} passes over the same number of rows, whatever the number of classes; scaling, early "
        "stopping's looks and thresholds are in them.",
        "",
        *goal_table(goals),
    ]
    for curve in curves:
        text += curve.lines()
    return text, curves


def picture(curves: Sequence[Curve], path: Path) -> None:
    """Every curve on logarithmic axes, rows above, what it costs below."""
    from matplotlib.ticker import LogLocator, NullLocator

    drawn = plots.figure(max(3.4 * len(curves), 5.0), 5.6)
    axes = np.atleast_2d(drawn.subplots(2, len(curves), squeeze=False))
    for place, curve in enumerate(curves):
        for row, of_rows in enumerate((True, False)):
            axis = axes[row, place]
            names = [name for name in curve.rates if curve.units[name].startswith("rows") is of_rows]
            for colour, name in zip((plots.NORMAL, plots.ANOMALY, plots.INK), names, strict=False):
                _draw(axis, curve, name, colour)
            if not names:
                axis.set_axis_off()
                continue
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_xlabel(curve.axis)
            axis.set_ylabel(" and ".join(dict.fromkeys(curve.units[name] for name in names)), fontsize=8)
            axis.set_xticks(curve.points, [short(point) for point in curve.points], fontsize=7)
            axis.set_xticks([], minor=True)
            axis.yaxis.set_major_locator(LogLocator(subs=TICKS))
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:.2g}")
            axis.yaxis.set_minor_locator(NullLocator())
            axis.tick_params(axis="y", labelsize=7)
            axis.grid(color=plots.GRID)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=110)


def short(number: int) -> str:
    """A number that has room below a tick: 20,000,000 as 20 M."""
    return f"{number // 10**6} M" if number >= 10**6 and number % 10**6 == 0 else f"{number:,}"


def _draw(axis: object, curve: Curve, name: str, colour: str) -> None:
    """Median as a line, least to most as a band."""
    middle, least, most = (np.array([f(v) for v in curve.rates[name]]) for f in (np.median, np.min, np.max))
    axis.plot(curve.points, middle, color=colour, marker="o", ms=3, lw=1.5, label=name)
    axis.fill_between(curve.points, least, most, color=colour, alpha=0.2, linewidth=0)
