"""Faces of CelebA: attributes inferred and changed, a VAE beside a VAE/GAN, paths between faces, new ones.

``python pipelines/faces.py --source FILE`` reads a Parquet file of pictures with attribute columns, or CelebA's own
folder. CelebA is for non-commercial research: pictures are written to the output folder and to the run, which git
ignores both, and belong nowhere else.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import studies
from referee import Referee, referee
from scipy.ndimage import laplace
from studies import Study

from anomaly_cvae import CVAEDetector, metrics, plots, presets
from anomaly_cvae.datasets.faces import ATTRIBUTES, faces

Images = npt.NDArray[np.uint8]

STEPS = {"fast": 1_600, "best": 10_000}
REFEREE_EPOCHS = {"fast": 4, "best": 20}
CHANNELS = {"fast": (16, 32, 64), "best": (32, 64, 128, 256)}
LATENT_DIM = {"fast": 64, "best": 128}
RATE = {"vae": 2e-3, "vae_gan": 1e-3}
HELD_OUT = 1_000
HELD_OUT_SHARE = 0.125
"""Of all faces, where there are few."""
JUDGED = {"fast": 200, "best": 1_000}
"""Held-out faces whose edits the referee judges."""
SHOWN, PATHS, PATH_LENGTH = 10, 4, 9


@dataclass(frozen=True)
class Manner:
    """A way to edit: what is put back of the face, and how far the attribute goes."""

    name: str
    keep_detail: bool = False
    strength: float = 1.0


MANNERS = (Manner("z kept"), Manner("detail kept", True), Manner("detail kept, exaggerated", True, 2.0))
"""Strengths of 1 to 4 were compared on held-out faces 500 to 699; the fast preset judges the first 200."""


@dataclass(frozen=True)
class Faces:
    """Faces (N, side, side, 3) of bytes and their attributes, one boolean column each."""

    images: Images
    attributes: pd.DataFrame

    def take(self, rows: npt.NDArray[Any] | slice) -> Faces:
        """Some of them."""
        return Faces(self.images[rows], self.attributes.iloc[rows].reset_index(drop=True))


def main() -> None:
    """Run the study from the command line."""
    study, given = studies.study("faces", __doc__.splitlines()[0], add)
    run(study, *split(faces(given.source, side=given.side), study))


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of this study alone."""
    parser.add_argument("--source", type=Path, required=True, help="Parquet of pictures and attributes, or a folder")
    parser.add_argument("--side", type=int, default=64, help="height and width that faces are brought to")


def split(table: pd.DataFrame, study: Study) -> tuple[Faces, Faces]:
    """Faces to train on and held-out ones, by the study's seed."""
    every = Faces(np.stack(table["image"].tolist()), table[list(ATTRIBUTES)].astype(bool))
    order = np.random.default_rng(study.random_state).permutation(len(table))
    n = min(HELD_OUT, int(HELD_OUT_SHARE * len(table)))
    return every.take(order[n:][: study.rows]), every.take(order[:n])


def run(study: Study, train: Faces, unseen: Faces) -> CVAEDetector:
    """Train, draw, measure; returns the model with the inference head."""
    images, attributes = mirrored(train)
    vae = study.fitted("vae", parameters(study, "vae", inference_head=True), images, attributes)
    imitating = parameters(study, "vae_gan", objective="vae_gan", inference_head=True)
    gan = study.fitted("vae_gan", imitating, images, attributes)
    models = {"VAE": vae, "VAE/GAN": gan}
    first = unseen.take(slice(0, SHOWN))
    study.picture("inferred", inferred(vae, first))
    study.picture("reconstructions", reconstructions(models, first))
    for name, model in models.items():
        stem = name.lower().replace("/", "_")
        for place, manner in enumerate(MANNERS):
            study.picture(f"edits_{stem}_{place + 1}", edits(model, first, manner))
    study.picture("interpolations", interpolations(models, unseen))
    study.picture("samples", samples(models, unseen, study.random_state))
    measure_inference(study, vae, unseen)
    measure_sharpness(study, models, unseen)
    judge = measured_referee(study, train, unseen)
    for name, model in models.items():
        measure_edits(study, name, model, judge, unseen.take(slice(0, JUDGED[study.preset])))
    study.finish(vae)
    return vae


def mirrored(train: Faces) -> tuple[npt.NDArray[np.uint8], pd.DataFrame]:
    """The faces and their mirror images: few faces are soon known by heart."""
    images = np.concatenate([train.images, train.images[:, :, ::-1]])
    return images, pd.concat([train.attributes] * 2, ignore_index=True)


def parameters(study: Study, name: str, **more: Any) -> dict[str, Any]:
    """What both models have."""
    preset = study.preset
    own = {
        "channels": CHANNELS[preset],
        "latent_dim": LATENT_DIM[preset],
        "max_steps": study.steps or STEPS[preset],
        "batch_size": 64,
        "learning_rate": RATE[name],
        # Sure of every pixel, z would keep the whole face, attributes and all, and an edit would change nothing.
        "scale_floor": 1.0,
        "patience": 40,
        # Faces are few: early stopping and thresholds, which nothing here rests on, get a twentieth each.
        "validation_fraction": 0.05,
        "calibration_fraction": 0.05,
        "column_kinds": dict.fromkeys(ATTRIBUTES, "attribute"),
    }
    return {**presets.IMAGES, **own, **more}


def inferred(vae: CVAEDetector, chosen: Faces) -> Any:
    """Held-out faces and what the inference head reads in them; a ring where the data set says so."""
    probabilities = vae.condition_proba(chosen.images, method="head").to_numpy()
    drawn = plots.figure(0.75 * len(chosen.images) + 1.5, 3.2)
    above, below = drawn.subplots(2, 1, height_ratios=(1, 3))
    above.imshow(plots.tile(chosen.images[None]))
    above.set_axis_off()
    below.imshow(probabilities.T, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (face, attribute), value in np.ndenumerate(probabilities):
        colour = "white" if value > 0.5 else plots.INK
        below.text(face, attribute, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    true = np.argwhere(chosen.attributes.to_numpy())
    below.scatter(true[:, 0], true[:, 1], s=420, facecolors="none", edgecolors=plots.ANOMALY, linewidths=1.4)
    below.set_xticks([])
    below.set_yticks(range(len(ATTRIBUTES)), [words(name) for name in ATTRIBUTES], fontsize=8)
    below.set_xlabel("probability by q(c | x); ring: labelled so", fontsize=8)
    return drawn


def reconstructions(models: dict[str, CVAEDetector], chosen: Faces) -> Any:
    """Held-out faces, and what each model makes of them; the VAE with the attributes it inferred, too."""
    rows = [model.reconstruct(chosen.images, condition=chosen.attributes) for model in models.values()]
    vae = models["VAE"]
    own = vae.condition_proba(chosen.images, method="head") > 0.5
    rows.append(vae.reconstruct(chosen.images, condition=own[list(ATTRIBUTES)]))
    return plots.image_grid(np.stack([chosen.images, *rows]), ["unseen", *models, "VAE, attributes\ninferred"])


def edits(model: CVAEDetector, chosen: Faces, manner: Manner) -> Any:
    """One row per attribute: the faces with it added (+) or taken away (\u2212); above, the faces themselves."""
    rows = [turned(model, chosen, name, manner) for name in ATTRIBUTES]
    drawn = plots.image_grid(np.stack([chosen.images, *rows]), ["unseen", *(words(name) for name in ATTRIBUTES)])
    signs = np.where(chosen.attributes.to_numpy().T, "\u2212", "+").ravel()
    box = {"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
    for axis, sign in zip(drawn.axes[len(chosen.images) :], signs, strict=True):
        axis.text(0.12, 0.12, sign, transform=axis.transAxes, fontsize=7, ha="center", va="center", bbox=box)
    return drawn


def turned(model: CVAEDetector, chosen: Faces, attribute: str, manner: Manner) -> Images:
    """The faces with one attribute at its opposite, all else kept."""
    wanted = {attribute: ~chosen.attributes[attribute].to_numpy()}
    edited: Images = model.edit(
        chosen.images, chosen.attributes, wanted, keep_detail=manner.keep_detail, strength=manner.strength
    )
    return edited


def interpolations(models: dict[str, CVAEDetector], unseen: Faces) -> Any:
    """Paths through the latent space between held-out faces of the same attributes."""
    start, end = (unseen.take(rows) for rows in pairs(unseen))
    rows, labels = [], []
    for name, model in models.items():
        path = model.interpolate(start.images, end.images, PATH_LENGTH, condition=start.attributes)
        path = path.reshape(len(start.images), PATH_LENGTH, *path.shape[1:])
        rows.append(np.concatenate([start.images[:, None], path, end.images[:, None]], axis=1))
        labels += [name] * len(start.images)
    return plots.image_grid(np.concatenate(rows), labels, ["unseen", *[""] * PATH_LENGTH, "unseen"])


def pairs(unseen: Faces) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Rows of two faces each with equal attributes, of the most frequent combinations."""
    combinations = unseen.attributes.groupby(list(ATTRIBUTES)).indices.values()
    twins = [rows[:2] for rows in sorted(combinations, key=len, reverse=True) if len(rows) > 1][:PATHS]
    return np.array([rows[0] for rows in twins]), np.array([rows[1] for rows in twins])


def samples(models: dict[str, CVAEDetector], unseen: Faces, random_state: int) -> Any:
    """Two rows of new faces per model, under the attributes of held-out ones."""
    asked = unseen.attributes.iloc[: 2 * SHOWN]
    n = len(asked) // 2
    rows = []
    for model in models.values():
        drawn = model.sample(2 * n, condition=asked.iloc[: 2 * n], random_state=random_state, noise=False)
        rows.append(drawn.reshape(2, n, *drawn.shape[1:]))
    return plots.image_grid(np.concatenate(rows), [name for name in models for _ in range(2)])


def measure_inference(study: Study, vae: CVAEDetector, unseen: Faces) -> None:
    """How well q(c | x) tells each attribute of held-out faces."""
    probabilities = vae.condition_proba(unseen.images, method="head")
    areas = {name: metrics.roc_auc(unseen.attributes[name].to_numpy(), probabilities[name]) for name in ATTRIBUTES}
    study.figure("inferred attributes, mean AUROC", float(np.mean([*areas.values()])), "", ">= .93", _listed(areas))


def measure_sharpness(study: Study, models: dict[str, CVAEDetector], unseen: Faces) -> None:
    """How sharp reconstructions are, beside the real faces."""
    real = sharpness(unseen.images)
    relative = {}
    for name, model in models.items():
        relative[name] = sharpness(model.reconstruct(unseen.images, condition=unseen.attributes)) / real
        study.figure(
            f"sharpness of reconstructions, {name}", 100.0 * relative[name], "% of the real faces'", "none set"
        )
    study.figure("sharpness, VAE/GAN over VAE", relative["VAE/GAN"] / relative["VAE"], "times", ">= 2")


def sharpness(images: Images) -> float:
    """Mean variance of the Laplacian of grey images."""
    grey = images.astype(np.float64).mean(axis=-1)
    return float(np.mean([laplace(image).var() for image in grey]))


def measured_referee(study: Study, train: Faces, unseen: Faces) -> Referee:
    """An independent classifier of the attributes, and how good it is itself."""
    file = study.output / f"referee_{train.images.shape[1]}px_{len(train.images)}.safetensors"
    targets = train.attributes.to_numpy(copy=True)
    judge = referee(file, train.images, targets, epochs=REFEREE_EPOCHS[study.preset], flip=True)
    logits, true = judge.logits(unseen.images), unseen.attributes.to_numpy()
    areas = {name: metrics.roc_auc(true[:, i], logits[:, i]) for i, name in enumerate(ATTRIBUTES)}
    study.figure("referee's own mean AUROC", float(np.mean([*areas.values()])), "", "none set", _listed(areas))
    right = (logits > 0) == true
    study.figure("referee's own accuracy", 100.0 * float(right.mean()), "%", "none set")
    return judge


def measure_edits(study: Study, name: str, model: CVAEDetector, judge: Referee, chosen: Faces) -> None:
    """Whether the referee sees what was asked for after an edit, and everything else as before."""
    before = judge.logits(chosen.images) > 0
    for manner in MANNERS:
        agreed, kept = {}, {}
        for place, attribute in enumerate(ATTRIBUTES):
            after = judge.logits(turned(model, chosen, attribute, manner)) > 0
            asked = ~chosen.attributes[attribute].to_numpy()
            agreed[attribute] = 100.0 * float((after[:, place] == asked).mean())
            kept[attribute] = 100.0 * float(np.delete(after == before, place, axis=1).mean())
        how = f"edit, {name}, {manner.name}"
        study.figure(f"{how}: as asked", float(np.mean([*agreed.values()])), "%", ">= 80", _listed(agreed))
        study.figure(f"{how}: the rest as before", float(np.mean([*kept.values()])), "%", ">= 90", _listed(kept))


def words(attribute: str) -> str:
    """An attribute as people write it."""
    return attribute.replace("_", " ").lower()


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{words(name)} {value:.3g}" for name, value in values.items())


if __name__ == "__main__":
    main()
