"""How well a model knows the digits: the IWAE bound on -log p(x), and on -log p(x | digit), of binarised MNIST.

Each training and test image is binarised once, every pixel white with its brightness as probability. Published
figures are of another such draw.

Thousands of samples are drawn for some test images. How far their bound lies below their negative ELBO varies little
from image to image; what it is on average is taken from the negative ELBO of all test images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from studies import Study, study

from anomaly_cvae import CVAEDetector, plots, presets
from anomaly_cvae.datasets import binarise, labelled_images

STEPS = {"fast": 2_000, "best": 16_000}
SAMPLES = {"fast": 100, "best": 5_000}
JUDGED = {"fast": 200, "best": 250}
BLOCK = 50


def main() -> None:
    """Run the study from the command line."""
    run, given = study(
        "likelihood",
        __doc__.splitlines()[0],
        lambda parser: parser.add_argument("--source", type=Path, required=True, help="npz, or folder of idx files"),
    )
    data = labelled_images(given.source)
    images, digits = binarise(data.x_train)[: run.rows], data.y_train[: run.rows]
    order = np.random.default_rng(0).permutation(len(data.x_test))
    unseen, classes = binarise(data.x_test, random_state=1)[order], data.y_test[order]
    vae = run.fitted("vae", parameters(run), images)
    measure(run, vae, "unconditional", unseen, None, "<= 84.0")
    cvae = run.fitted("cvae", parameters(run), images, digits)
    measure(run, cvae, "given the class", unseen, classes, "<= 82.0")
    drawn = vae.sample(60, random_state=run.random_state, noise=False)
    run.picture("samples", plots.image_grid(drawn.reshape(5, 12, *drawn.shape[1:])))
    run.finish(cvae)


def parameters(run: Study) -> dict[str, Any]:
    """Both models: learned mixture of pseudo-inputs as prior, no noise on the pixels."""
    own = {"max_steps": run.steps or STEPS[run.preset], "latent_dim": 40, "prior": "vamp", "patience": 40}
    return {**presets.IMAGES, **own, "input_noise": 0.0, **({"channels": (16, 32)} if run.is_fast else {})}


def measure(run: Study, model: CVAEDetector, name: str, images: Any, classes: Any, goal: str) -> None:
    """The bound in nats, its standard error, and the negative ELBO beside it."""
    elbo = model.negative_elbo(images, condition=classes)
    n, n_judged, below = SAMPLES[run.preset], min(JUDGED[run.preset], len(images)), []
    for start in range(0, n_judged, BLOCK):
        own = slice(start, min(start + BLOCK, n_judged))
        condition = None if classes is None else classes[own]
        bound = model.negative_log_likelihood(images[own], condition=condition, n_samples=n)
        below.append(elbo[own] - bound)
        run.console.print(f"  {name}: {own.stop} of {n_judged} images", end="\r")
    gap = np.concatenate(below)
    error = float(np.sqrt(elbo.var() / len(elbo) + gap.var() / len(gap)))
    note = f"{n:,} samples of {len(gap):,} images, negative ELBO of all {len(elbo):,}; standard error {error:.2f}"
    run.figure(f"IWAE bound, {name}", float(elbo.mean() - gap.mean()), "nats", goal, note)
    run.figure(f"negative ELBO, {name}", float(elbo.mean()), "nats", "none set")


if __name__ == "__main__":
    main()
