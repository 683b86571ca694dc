"""How well a model knows the digits: the IWAE bound on -log p(x), and on -log p(x | digit), of binarised MNIST.

Each training and test image is binarised once, every pixel white with its brightness as probability. Published
figures are of another such draw.
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
JUDGED = {"fast": 500, "best": 1_000}
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
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(data.x_test))[: JUDGED[run.preset]]
    unseen, classes = binarise(data.x_test, random_state=1)[chosen], data.y_test[chosen]
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
    n, nats = SAMPLES[run.preset], []
    for start in range(0, len(images), BLOCK):
        own = slice(start, start + BLOCK)
        condition = None if classes is None else classes[own]
        nats.append(model.negative_log_likelihood(images[own], condition=condition, n_samples=n))
        run.console.print(f"  {name}: {min(start + BLOCK, len(images))} of {len(images)} images", end="\r")
    found = np.concatenate(nats)
    error = found.std() / np.sqrt(len(found))
    note = f"{n:,} samples, {len(found):,} test images, standard error {error:.2f}"
    run.figure(f"IWAE bound, {name}", float(found.mean()), "nats", goal, note)
    elbo = model.negative_elbo(images, condition=classes)
    run.figure(f"negative ELBO, {name}", float(elbo.mean()), "nats", "none set")


if __name__ == "__main__":
    main()
