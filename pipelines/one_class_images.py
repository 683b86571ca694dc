"""One class against the rest: for every class, a network that saw images of this class alone judges all test images.

``python pipelines/one_class_images.py --data mnist --source mnist.npz`` trains the networks of all classes at once
(``conditioning="per_class"``), gives the AUROC of each class against the rest, with k nearest neighbours beside it,
and shows where the models err. Damaged images come last: the same networks, told the right class.

Every pixel is a column with a normal likelihood, of training images with noise added, and a variance that may not
fall far below the column's own: where each pixel learns its variance, the few that hardly ever move decide, and the
ranking is worse by far. Surprise at the pixels is the squared error, in units of a fixed variance, and the KL; of pen
strokes per length of the image as a vector, since an image with little ink costs few nats whatever it shows. Surprise
at turns is that of a second, convolutional model per class, whose condition is how an image was turned and shifted: see
`turned_images`. The score is the sum of both, each on the scale of images of the class that were held out of training;
of strokes the second counts a quarter.

How choices were made stands beside the figures in docs/benchmarks/images.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import studies
from matplotlib.figure import Figure
from sklearn.neighbors import NearestNeighbors
from studies import Study
from turned_images import surprise_at_turns, told_how

from anomaly_cvae import CVAEDetector, metrics, plots, presets
from anomaly_cvae.datasets import LabelledImages, labelled_images
from anomaly_cvae.frames import FloatArray, IntArray

Images = npt.NDArray[np.uint8]

STEPS = {"fast": 600, "best": 1_500}
MEMBERS = {"fast": 1, "best": 3}
GOALS = {"mnist": ">= 98.0", "fashion_mnist": ">= 94.5"}
STROKES = ("mnist",)
"""Data whose images are judged by nats per length: strokes, of which there may be few or many."""
NOISE = 0.15
"""Standard deviation of the noise on training images, whose pixels lie in 0 to 1."""
ERROR_SCALE = {True: 0.5, False: 1.0}
"""Standard deviation of a pixel that the score assumes, of strokes and of other images."""
TURNS_WEIGHT = {True: 0.25, False: 1.0}
"""Of the surprise at turns beside that at pixels: an 8 upside down is an 8, and so is much that looks like one."""
NEIGHBOURS = 5
HELD_OUT_SHARE = 0.05
"""Of the training images of each class, which give the scales on which both surprises are added."""
SHOWN = 6
"""Images of each kind in a picture of one class."""


@dataclass(frozen=True)
class Scale:
    """Median and 0.9 quantile of a surprise, of held-out images of one class."""

    middle: float
    high: float

    @classmethod
    def of(cls, surprise: FloatArray) -> Scale:
        """The scale of images of the class, whose surprise (N,) this is."""
        return cls(float(np.median(surprise)), float(np.quantile(surprise, 0.9)))

    def __call__(self, surprise: FloatArray) -> FloatArray:
        """0 at the median, about 1 at the 0.9 quantile, growing like a logarithm beyond: neither surprise shouts."""
        scaled: FloatArray = np.arcsinh((surprise - self.middle) / max(self.high - self.middle, 1e-9))
        return scaled


@dataclass
class Judge:
    """Scores images by the networks of one class; ``strokes``: pixels per length of the image as a vector.

    ``turners`` are the models of turned images, by class; ``scales`` those of both surprises.
    """

    detector: CVAEDetector
    strokes: bool
    turners: dict[Any, CVAEDetector]
    scales: dict[Any, tuple[Scale, Scale]] = field(default_factory=dict)

    def calibrate(self, images: Images, classes: npt.NDArray[Any]) -> None:
        """Take the scales from images that training did not see."""
        for level in self.turners:
            own = images[classes == level]
            self.scales[level] = (Scale.of(self.at_pixels(own, level)), Scale.of(self.at_turns(own, level)))

    def at_pixels(self, images: Images, level: Any) -> FloatArray:
        """Squared error in units of a fixed variance, and KL, (N,), nats; of strokes per length."""
        rows, condition = as_rows(images), np.full(len(images), level)
        error = np.square(self.detector.reconstruct(rows, condition=condition) - rows).sum(axis=1)
        kl = self.detector.explain(rows, condition=condition)["kl"].to_numpy()
        nats = error / (2.0 * ERROR_SCALE[self.strokes] ** 2) + kl
        return nats / np.maximum(np.linalg.norm(rows, axis=1), 1.0) if self.strokes else nats

    def at_turns(self, images: Images, level: Any) -> FloatArray:
        """How unsure the class's second model is of how the images were turned, (N,), nats."""
        return surprise_at_turns(self.turners[level], images)

    def together(self, at_pixels: FloatArray, at_turns: FloatArray, level: Any) -> FloatArray:
        """How little each image is of the class, (N,)."""
        pixels, turns = self.scales[level]
        return pixels(at_pixels) + TURNS_WEIGHT[self.strokes] * turns(at_turns)

    def score(self, images: Images, classes: npt.NDArray[Any]) -> FloatArray:
        """How little each image is of its own class, (N,)."""
        scores = np.empty(len(images))
        for level in self.turners:
            own = np.flatnonzero(classes == level)
            if len(own):
                chosen = images[own]
                scores[own] = self.together(self.at_pixels(chosen, level), self.at_turns(chosen, level), level)
        return scores

    def errors(self, images: Images, classes: npt.NDArray[Any]) -> tuple[FloatArray, FloatArray]:
        """Squared error of every pixel, and what was expected, (N, H, W) each."""
        rows = as_rows(images)
        expected = self.detector.reconstruct(rows, condition=classes)
        return np.square(expected - rows).reshape(images.shape), expected.reshape(images.shape)


def as_rows(images: Images) -> FloatArray:
    """Images (N, H, W) of bytes as rows of fractions (N, H * W)."""
    return images.reshape(len(images), -1) / 255.0


def main() -> None:
    """Run the study from the command line."""
    study, given = studies.study("one_class_images", __doc__.splitlines()[0], add)
    study.name = f"one_class_{given.data}"
    if given.output is None:
        study.output = Path("outputs") / study.name / study.preset
    run(study, labelled_images(given.source), given.data in STROKES, GOALS.get(given.data, "none set"))


def add(parser: argparse.ArgumentParser) -> None:
    """What this study asks beside the common."""
    parser.add_argument("--source", type=Path, required=True, help="npz or folder of idx files in the layout of MNIST")
    parser.add_argument("--data", default="mnist", help="name of the data: mnist, fashion_mnist, …")


def parameters(study: Study, n_pixels: int) -> dict[str, Any]:
    """Of all networks: one per class and member."""
    own = {
        "conditioning": "per_class",
        "n_estimators": MEMBERS[study.preset],
        "max_steps": study.steps or STEPS[study.preset],
        "patience": 40,
        "scale_floor": 0.7,
        "input_noise": 0.0,
        "calibration_fraction": 0.05,
        "column_kinds": dict.fromkeys(range(n_pixels), "real"),
        "likelihoods": dict.fromkeys(range(n_pixels), "normal"),
    }
    return {**presets.IMAGES, **own}


def run(study: Study, data: LabelledImages, strokes: bool, goal: str) -> CVAEDetector:
    """Train, rank, damage; returns the networks."""
    order = np.random.default_rng(study.random_state).permutation(len(data.x_train[: study.rows]))
    held_out, seen = np.split(order, [int(HELD_OUT_SHARE * len(order))])
    images, classes = data.x_train[seen], data.y_train[seen]
    absent = np.setdiff1d(data.y_train[: study.rows], data.y_train[held_out])
    if len(absent):
        raise SystemExit(f"--rows {study.rows}: none of class {absent[0]} is held out for its scale; take more rows")
    rows = as_rows(images)
    noisy = rows + NOISE * np.random.default_rng(study.random_state).standard_normal(rows.shape)
    detector = study.fitted("networks", parameters(study, images[0].size), noisy, classes)
    levels = np.array(detector.schema_.conditions[0].levels)
    turners = {level: told_how(study, f"turned_{level}", images[classes == level]) for level in levels}
    judge = Judge(detector, strokes, turners)
    judge.calibrate(data.x_train[held_out], data.y_train[held_out])
    started = time.perf_counter()
    at_pixels = np.stack([judge.at_pixels(data.x_test, level) for level in levels], axis=1)
    study.seconds["score pixels under every class"] = time.perf_counter() - started
    started = time.perf_counter()
    at_turns = np.stack([judge.at_turns(data.x_test, level) for level in levels], axis=1)
    study.seconds["score turns under every class"] = time.perf_counter() - started
    together = [judge.together(at_pixels[:, k], at_turns[:, k], level) for k, level in enumerate(levels)]
    scores = np.stack(together, axis=1)
    started = time.perf_counter()
    distances = neighbour_distances(images, classes, data.x_test, levels)
    study.seconds["nearest neighbours"] = time.perf_counter() - started
    compare(study, data.y_test, levels, scores, distances, goal)
    for part, of in (("surprise at the pixels", at_pixels), ("surprise at turns", at_turns)):
        area = one_against_rest(data.y_test, of, levels).mean()
        study.figure(f"mean AUROC, {part} alone", area, "%", "none set")
    if strokes:
        per_length = distances / np.maximum(np.linalg.norm(as_rows(data.x_test), axis=1, keepdims=True), 1.0)
        fair = one_against_rest(data.y_test, per_length, levels).mean()
        study.figure(f"mean AUROC, {NEIGHBOURS} nearest neighbours per length", fair, "%", "none set")
    nats = detector.class_negative_elbo(as_rows(data.x_test), condition=data.y_test).to_numpy()
    plain = one_against_rest(data.y_test, nats, levels).mean()
    study.figure("mean AUROC, negative ELBO as it is", plain, "%", "none set")
    for k, level in enumerate(levels):
        study.picture(f"class_{level}", mistaken(judge, data, level, scores[:, k]))
    damaged(study, judge, data)
    study.finish(detector)
    return detector


def compare(
    study: Study, classes: IntArray, levels: npt.NDArray[Any], scores: FloatArray, distances: FloatArray, goal: str
) -> None:
    """Each class against the rest, by the networks and by the neighbours, (N, K) each."""
    own, peer = (one_against_rest(classes, of, levels) for of in (scores, distances))
    study.figure("mean AUROC, one class against the rest", own.mean(), "%", goal)
    study.figure(f"mean AUROC, {NEIGHBOURS} nearest neighbours", peer.mean(), "%", "none set", "of pixels, same rows")
    for level, area, other in zip(levels, own, peer, strict=True):
        study.figure(f"AUROC, class {level} against the rest", area, "%", "none set", f"neighbours {other:.1f}")


def one_against_rest(classes: IntArray, scores: FloatArray, levels: npt.NDArray[Any]) -> FloatArray:
    """AUROC in percent of every class against the rest, (K,), from scores (N, K): higher = less of the class."""
    return np.array([100.0 * metrics.roc_auc(classes != k, own) for k, own in zip(levels, scores.T, strict=True)])


def neighbour_distances(images: Images, classes: IntArray, test: Images, levels: npt.NDArray[Any]) -> FloatArray:
    """Mean distance of test images to their nearest training images of every class, (N, K)."""
    flat, asked = (block.reshape(len(block), -1).astype(np.float32) / 255.0 for block in (images, test))
    columns = []
    for k in levels:
        own = flat[classes == k]
        index = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(own)), algorithm="brute").fit(own)
        columns.append(index.kneighbors(asked)[0].mean(axis=1))
    return np.stack(columns, axis=1)


def mistaken(judge: Judge, data: LabelledImages, level: Any, score: FloatArray) -> Figure:
    """The most surprising images of one class, and the least surprising of others, with what surprised."""
    order = np.argsort(score)
    is_own = data.y_test[order] == level
    chosen = np.concatenate([order[is_own][::-1][:SHOWN], order[~is_own][:SHOWN]])
    images = data.x_test[chosen]
    errors, expected = judge.errors(images, np.full(len(chosen), level))
    titles = [f"a {true}, score {own:.1f}" for true, own in zip(data.y_test[chosen], score[chosen], strict=True)]
    excess = np.maximum(errors - errors.mean(axis=(1, 2), keepdims=True), 0.0)
    labels = ("the image", "squared error", "reconstruction")
    return plots.surprising_images(images / 255.0, excess, expected, titles, SHOWN, labels)


def damaged(study: Study, judge: Judge, data: LabelledImages) -> None:
    """Undamaged test images against damaged ones, each judged by the network of its class."""
    sound, examples = judge.score(data.x_test, data.y_test), [data.x_test[:SHOWN]]
    for name, damage in DAMAGES.items():
        images = damage(data.x_test, np.random.default_rng(study.random_state))
        score = judge.score(images, data.y_test)
        is_damaged = np.repeat([False, True], len(score))
        area = 100.0 * metrics.roc_auc(is_damaged, np.concatenate([sound, score]))
        study.figure(f"AUROC, damaged: {name}", area, "%", "none set")
        examples.append(images[:SHOWN])
    study.picture("damages", plots.image_grid(np.stack(examples), ["sound", *DAMAGES]))


def with_block(images: Images, rng: np.random.Generator, brightness: int) -> Images:
    """A square of a quarter of the side, somewhere in the middle half of each image."""
    height, width = images.shape[1:]
    side = max(2, height // 4)
    top, left = (rng.integers(size // 4, size - size // 4 - side + 1, len(images)) for size in (height, width))
    rows, columns = np.arange(height), np.arange(width)
    down = (rows >= top[:, None]) & (rows < top[:, None] + side)
    across = (columns >= left[:, None]) & (columns < left[:, None] + side)
    return np.where(down[:, :, None] & across[:, None, :], np.uint8(brightness), images)


def with_noise(images: Images, rng: np.random.Generator, scale: float = 80.0) -> Images:
    """Normal noise on every pixel."""
    noisy = images + rng.normal(0.0, scale, images.shape).astype(np.float32)
    return np.clip(np.round(noisy), 0, 255).astype(np.uint8)


def shifted(images: Images, rng: np.random.Generator, by: int = 3) -> Images:
    """Every image moved by so many pixels along both axes; what leaves at one side enters at the other."""
    signs = rng.choice([-by, by], (len(images), 2))
    return np.stack([np.roll(image, sign, axis=(0, 1)) for image, sign in zip(images, signs, strict=True)])


DAMAGES: dict[str, Callable[[Images, np.random.Generator], Images]] = {
    "black block": lambda images, rng: with_block(images, rng, 0),
    "grey block": lambda images, rng: with_block(images, rng, 160),
    "noise": with_noise,
    "shift by 3 pixels": shifted,
}


if __name__ == "__main__":
    main()
