"""Images of one class, turned and shifted: the condition is how, and what is not of the class is not told how it was.

A CVAE learns p(x | t) and, by its inference head, q(t | x) of images of one class under every way t to turn and shift
them. An image of another class, turned, is less surely told: the sum of -log q(t | x turned by t) over all t is large
(Golan and El-Yaniv 2018, there with a classifier alone). No label of another class is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
from studies import Study

from anomaly_cvae import CVAEDetector, presets
from anomaly_cvae.frames import FloatArray

Images = npt.NDArray[np.uint8]

STEPS = {"fast": 400, "best": 800}
CHANNELS = {"fast": (16, 32), "best": (32, 64)}
SHIFT_SHARE = 0.2
"""Of the side, by which images are shifted up, down, left or right."""
LEAST_PROBABILITY = 1e-12


@dataclass(frozen=True)
class Turn:
    """So many quarter turns, then a shift in fifths of the side, down and right."""

    quarters: int
    down: int
    right: int

    @property
    def name(self) -> str:
        """As a class of the condition."""
        return f"{90 * self.quarters}°, {self.down:+d} down, {self.right:+d} right"

    def __call__(self, images: Images) -> Images:
        """The images (N, S, S), turned; what a shift lays bare is filled by reflection."""
        side = images.shape[-1]
        by = max(1, round(SHIFT_SHARE * side))
        turned = np.pad(np.rot90(images, self.quarters, axes=(1, 2)), ((0, 0), (by, by), (by, by)), mode="reflect")
        top, left = by * (1 - self.down), by * (1 - self.right)
        return np.ascontiguousarray(turned[:, top : top + side, left : left + side])


TURNS = tuple(
    Turn(quarters, *shift) for quarters, shift in product(range(4), ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)))
)


def told_how(study: Study, name: str, images: Images) -> CVAEDetector:
    """The model of images (N, S, S) under every turn."""
    own = {
        "channels": CHANNELS[study.preset],
        "max_steps": study.steps or STEPS[study.preset],
        "inference_head": True,
        "conditioning": "shared",
        "patience": 40,
        "scale_floor": 0.7,
        # Thresholds and early stopping, on which nothing here rests, get a fiftieth of the images each.
        "validation_fraction": 0.02,
        "calibration_fraction": 0.02,
    }
    every: dict[str, Any] = {**presets.IMAGES, **own}
    turned = np.concatenate([turn(images) for turn in TURNS])
    return study.fitted(name, every, turned, np.repeat([turn.name for turn in TURNS], len(images)))


def surprise_at_turns(detector: CVAEDetector, images: Images) -> FloatArray:
    """Sum over all turns t of -log q(t | x turned by t), (N,), nats: higher = less of the class."""
    nats = np.zeros(len(images))
    for turn in TURNS:
        told = detector.condition_proba(turn(images), method="head")[turn.name].to_numpy()
        nats -= np.log(np.maximum(told, LEAST_PROBABILITY))
    return nats
