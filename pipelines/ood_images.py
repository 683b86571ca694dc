"""Images of another kind: a model of clothes (Fashion-MNIST) meets digits (MNIST), one pass per image.

The negative ELBO alone is known to call some foreign images likely, since it adds up what should be kept apart
(Nalisnick et al. 2019): simple images cost few nats. ``score_kind="parts"`` compares the parts of the negative ELBO
with those of held-out normals: ``python pipelines/ood_images.py --source fashion_mnist.npz --other mnist.npz``.
No foreign image trains or calibrates anything. Which numbers are the parts was decided looking at these two data sets,
however: the spread of the nats over the pixels took the place of the posterior's width, which the KL knows already.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import studies
from matplotlib.figure import Figure
from studies import Study

from anomaly_cvae import CVAEDetector, metrics, plots, presets
from anomaly_cvae.datasets import LabelledImages, labelled_images
from anomaly_cvae.frames import BoolArray, FloatArray
from anomaly_cvae.inputs import feature_frame

STEPS = {"fast": 600, "best": 8_000}
ROWS = {"fast": 12_000, "best": None}
PARTS = (
    "reconstruction (nats)",
    "KL (nats)",
    "squared norm of posterior mean",
    "spread of nats over pixels",
)
GOAL = ">= .995"
BINS = 60


def main() -> None:
    """Run the study from the command line."""
    study, given = studies.study("ood_images", __doc__.splitlines()[0], add)
    run(study, labelled_images(given.source), labelled_images(given.other))


def add(parser: argparse.ArgumentParser) -> None:
    """What this study asks beside the common."""
    layout = "npz or folder of idx files in the layout of MNIST"
    parser.add_argument("--source", type=Path, required=True, help=f"images to learn from: {layout}")
    parser.add_argument("--other", type=Path, required=True, help=f"images of another kind, of the same size: {layout}")


def parameters(study: Study) -> dict[str, Any]:
    """Of the model; no condition, so that a foreign image needs to claim nothing."""
    small = {"channels": (16, 32)} if study.is_fast else {}
    steps = study.steps or STEPS[study.preset]
    return {**presets.IMAGES, "latent_dim": 16, "patience": 40, "max_steps": steps, "score_kind": "parts", **small}


def run(study: Study, own: LabelledImages, other: LabelledImages) -> CVAEDetector:
    """Train on one kind, tell the two kinds of test images apart; returns the model."""
    study.rows = study.rows or ROWS[study.preset]
    detector = study.fitted("model", parameters(study), own.x_train[: study.rows])
    images = np.concatenate([own.x_test, other.x_test])
    is_foreign = np.arange(len(images)) >= len(own.x_test)
    started = time.perf_counter()
    score = -detector.score_samples(images)
    study.seconds["score by parts"] = time.perf_counter() - started
    negative_elbo = detector.negative_elbo(images)
    parts = parts_of(detector, images)
    measure(study, is_foreign, score, negative_elbo, parts)
    flagged = detector.predict(images) < 0
    study.figure("normals flagged", 100.0 * float(flagged[~is_foreign].mean()), "%", "1 asked for")
    study.figure("foreign images flagged", 100.0 * float(flagged[is_foreign].mean()), "%", "none set")
    study.picture("parts", histograms(parts, is_foreign))
    study.picture("roc", curves(is_foreign, {"parts": score, "negative ELBO": negative_elbo, "KL": parts[:, 1]}))
    study.picture("least_foreign", least_foreign(images, score, is_foreign))
    classes = np.full(len(images), detector.schema_.class_names[0])
    study.finish(detector, metrics.Evaluation(is_anomaly=is_foreign, scores=score, flagged=flagged, classes=classes))
    return detector


def parts_of(detector: CVAEDetector, images: npt.NDArray[Any]) -> FloatArray:
    """The parts of the negative ELBO, (N, 4): inner numbers of the model, looked at here to explain its score."""
    frame = feature_frame(detector, images, reset=False)
    return detector.model_.engine.elbo_parts(detector.model_.encoder.encode(frame))


def measure(
    study: Study, is_foreign: BoolArray, score: FloatArray, negative_elbo: FloatArray, parts: FloatArray
) -> None:
    """AUROC of the parts together, of their sum, and of each part alone, counted to its better side."""
    rate = len(score) / study.seconds["score by parts"]
    study.figure("AUROC, parts together", metrics.roc_auc(is_foreign, score), "", GOAL, f"{rate:,.0f} images/s")
    study.figure("AUROC, negative ELBO", metrics.roc_auc(is_foreign, negative_elbo), "", "none set")
    for name, values in zip(PARTS, parts.T, strict=True):
        area = metrics.roc_auc(is_foreign, values)
        side = "foreign images have more" if area >= 0.5 else "foreign images have less"
        study.figure(f"AUROC, {name} alone", max(area, 1.0 - area), "", "none set", side)


def histograms(parts: FloatArray, is_foreign: BoolArray) -> Figure:
    """Every part of both kinds of images; the outermost 0.5 % on either side is left out."""
    drawn = plots.figure(3.0 * len(PARTS), 3.0)
    for axis, name, values in zip(drawn.subplots(1, len(PARTS)), PARTS, parts.T, strict=True):
        low, high = np.quantile(values, [0.005, 0.995])
        bins = np.linspace(low, high, BINS).tolist()
        for rows, colour, label in ((~is_foreign, plots.NORMAL, "own kind"), (is_foreign, plots.ANOMALY, "foreign")):
            axis.hist(values[rows], bins, color=colour, alpha=0.65, density=True, label=label)
        axis.set_title(name, fontsize=9)
        axis.set_yticks([])
    drawn.axes[0].legend(fontsize=8)
    return drawn


def curves(is_foreign: BoolArray, scores: Mapping[str, FloatArray]) -> Figure:
    """ROC and precision-recall of several scores."""
    areas = {
        name: (metrics.roc_auc(is_foreign, own), metrics.average_precision(is_foreign, own))
        for name, own in scores.items()
    }
    return plots.roc_and_pr({name: metrics.curves(is_foreign, own) for name, own in scores.items()}, areas)


def least_foreign(images: npt.NDArray[Any], score: FloatArray, is_foreign: BoolArray, n: int = 10) -> Figure:
    """Where the score errs: own images of the highest scores, foreign images of the lowest."""
    order = np.argsort(score)
    own, foreign = order[~is_foreign[order]][::-1][:n], order[is_foreign[order]][:n]
    return plots.image_grid(np.stack([images[own], images[foreign]]), ["own, highest", "foreign, lowest"])


if __name__ == "__main__":
    main()
