"""Ready sets of parameters for `CVAEDetector`: ``CVAEDetector(**presets.FAST)``."""

from __future__ import annotations

from typing import Any

FAST: dict[str, Any] = {"hidden_dims": (128, 128), "max_steps": 1000, "batch_size": 128}
"""Seconds on a laptop; as good as the others on many tables of one class."""

BALANCED: dict[str, Any] = {}
"""The defaults of `CVAEDetector`."""

BEST: dict[str, Any] = {"n_estimators": 8, "max_steps": 4000, "n_samples": 8}
"""More networks, longer training."""

IMAGES: dict[str, Any] = {
    "n_estimators": 1,
    "kl_weight": 1.0,
    "hidden_dims": (256,),
    "channels": (32, 64),
    "latent_dim": 32,
    "n_samples": 1,
    "mask_rate": 0.0,
    "batch_size": 128,
    "mixed_precision": "training",
}
"""For columns of images: one convolutional network, one sample of z per score, bfloat16 in training if possible."""
