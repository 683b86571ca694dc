"""The rest of a digit from one, two or three of its quadrants: drawn several times, and measured in nats.

One model learns p(hidden | seen) of black-and-white digits for every choice of quadrants at once (Sohn, Lee and Yan
2015, who train a network per choice): ``python pipelines/completion.py --source mnist.npz``. The digit's class is
never told. Test masks are those of the literature.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import studies
from rich.progress import track
from studies import Study

from anomaly_cvae import CVAEDetector, plots, presets
from anomaly_cvae.datasets import LabelledImages, binarise, labelled_images

Mask = npt.NDArray[np.bool_]

STEPS = {"fast": 1_500, "best": 16_000}
JUDGED = {"fast": (500, 50), "best": (10_000, 100)}
"""Test images, and importance samples for each."""
HELD_OUT = 0.02
"""Share of the training images for early stopping, and as many for thresholds, which completion has no use for."""
BLOCK = 100
SHOWN, DRAWS = 8, 5
UNSEEN = (0.80, 0.86, 0.93)
"""The tone of a pixel that the model does not see."""
QUADRANTS = {1: "lower left", 2: "left half", 3: "all but the upper right"}
GOALS = {1: "<= 61", 2: "<= 43", 3: "<= 20.5"}
PUBLISHED = {
    "plain network (Sohn et al. 2015)": (99.8, 62.2, 26.0),
    "CVAE (Sohn et al. 2015)": (63.9, 44.7, 20.95),
}
"""Published -log p(hidden | seen) of MNIST, nats, with 1, 2 and 3 quadrants seen."""


@dataclass(frozen=True)
class Nats:
    """Means over test images of -log p(hidden | seen), its standard error, and the negative ELBO."""

    likelihood: float
    standard_error: float
    elbo: float


def main() -> None:
    """Run the study from the command line."""
    study, given = studies.study("completion", __doc__.splitlines()[0], add)
    study.name = f"completion_{given.data}"
    if given.output is None:
        study.output = Path("outputs") / study.name / study.preset
    run(study, labelled_images(given.source), given.objective)


def add(parser: argparse.ArgumentParser) -> None:
    """What this study asks beside what all do."""
    parser.add_argument("--source", type=Path, required=True, help="npz file or idx folder of MNIST")
    parser.add_argument("--data", default="mnist", help="what the images are called in names of folders and runs")
    parser.add_argument("--objective", choices=("elbo", "hybrid"), default="elbo", help="hybrid: Sohn et al., eq. 8")


def parameters(study: Study, objective: str) -> dict[str, Any]:
    """What the model of this study has."""
    own: dict[str, Any] = {
        "objective": objective,
        "condition_on_observed": True,
        "mask_shapes": "quadrants",
        "latent_dim": 32,
        "max_steps": study.steps or STEPS[study.preset],
        "patience": 40,
        "validation_fraction": HELD_OUT,
        "calibration_fraction": HELD_OUT,
    }
    return {**presets.IMAGES, **own, **({"channels": (16, 32)} if study.is_fast else {})}


def run(study: Study, data: LabelledImages, objective: str = "elbo") -> CVAEDetector:
    """Train, draw, measure; returns the model."""
    images, unseen = binarise(data.x_train[: study.rows], 0), binarise(data.x_test, 1)
    model = study.fitted(f"cvae_{objective}", parameters(study, objective), images)
    chosen = np.concatenate([np.flatnonzero(data.y_test == k)[:1] for k in np.unique(data.y_test)[:SHOWN]])
    study.picture("completions", completions(model, unseen[chosen], study.random_state))
    n_images, n_samples = JUDGED[study.preset]
    found = {n: measured(model, unseen[:n_images], seen(n, unseen.shape[1:]), n_samples, n) for n in QUADRANTS}
    for n, nats in found.items():
        told = f"{min(n_images, len(unseen)):,} images, {n_samples} samples, +- {nats.standard_error:.2f}"
        study.figure(f"-log p(hidden|seen), {_quadrants(n)} seen", nats.likelihood, "nats", GOALS[n], told)
        study.figure(f"negative ELBO of the hidden, {_quadrants(n)} seen", nats.elbo, "nats", "none set")
    table = comparison(found, objective)
    (study.output / "comparison.md").write_text(table)
    study.console.print(table)
    study.finish(model)
    return model


def seen(n: int, shape: tuple[int, ...]) -> Mask:
    """The pixels (H, W) that are seen when ``n`` quadrants are."""
    height, width = shape
    # As in training, the upper and the left half are the larger ones where a side is odd.
    upper, left = np.arange(height) < height - height // 2, np.arange(width) < width - width // 2
    choices = {
        1: np.outer(~upper, left),
        2: np.outer(np.ones(height, dtype=np.bool_), left),
        3: ~np.outer(upper, ~left),
    }
    return choices[n]


def measured(model: CVAEDetector, images: Mask, given: Mask, n_samples: int, n: int) -> Nats:
    """What the hidden pixels of ``images`` (N, H, W) cost, given those of ``given`` (H, W)."""
    likelihood, elbo = [], []
    blocks = np.split(images, range(BLOCK, len(images), BLOCK))
    for block in track(blocks, f"  {_quadrants(n)} seen"):
        likelihood.append(model.negative_log_likelihood(block, given=given, n_samples=n_samples))
        elbo.append(model.negative_elbo(block, given=given))
    nats = np.concatenate(likelihood)
    return Nats(float(nats.mean()), float(nats.std() / np.sqrt(len(nats))), float(np.concatenate(elbo).mean()))


def completions(model: CVAEDetector, images: Mask, random_state: int) -> Any:
    """Per image a row: the image, and for 1, 2 and 3 quadrants what is seen and what the rest may be."""
    columns, labels = [inked(images)], ["unseen"]
    for n in QUADRANTS:
        shown = np.broadcast_to(seen(n, images.shape[1:]), images.shape)
        hidden = np.ma.array(images, mask=~shown)
        drawn = model.impute_draws(hidden, DRAWS, random_state=random_state, noise=False)
        drawn = drawn.reshape(len(images), DRAWS, *images.shape[1:])
        columns += [np.where(shown[..., None], inked(images), UNSEEN), *(inked(drawn[:, i]) for i in range(DRAWS))]
        labels += [_quadrants(n), *[""] * (DRAWS - 1), ""]
    return plots.image_grid(np.stack(columns, axis=1), column_labels=labels)


def inked(images: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Fractions of ink (N, H, W) as colours (N, H, W, 3), dark on light."""
    return np.repeat(1.0 - images.astype(np.float64)[..., None], 3, axis=-1)


def comparison(found: dict[int, Nats], objective: str) -> str:
    """A Markdown table of ours beside the published."""
    ours = tuple(found[n].likelihood for n in QUADRANTS)
    bound = tuple(found[n].elbo for n in QUADRANTS)
    lines = {**PUBLISHED, f"this model, {objective}": ours, f"this model, {objective}: negative ELBO": bound}
    header = ["-log p(hidden given seen), nats", *(f"{_quadrants(n)} seen ({where})" for n, where in QUADRANTS.items())]
    rows = [header, ["---", *["---:"] * len(QUADRANTS)]]
    rows += [[name, *(f"{value:.2f}" for value in values)] for name, values in lines.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _quadrants(n: int) -> str:
    return f"{n} quadrant{'s' if n > 1 else ''}"


if __name__ == "__main__":
    main()
