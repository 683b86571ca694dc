"""Ready sets of parameters for `CVAEDetector`: ``CVAEDetector(**presets.FAST)``."""

from __future__ import annotations

from typing import Any

FAST: dict[str, Any] = {"hidden_dims": (64, 64), "max_steps": 500}
"""Smaller networks, shorter training."""

BALANCED: dict[str, Any] = {}
"""The defaults of `CVAEDetector`."""

BEST: dict[str, Any] = {"n_estimators": 8, "n_samples": 8, "input_noise": 0.05}
"""More networks and points of z, less noise."""

IMAGES: dict[str, Any] = {
    "n_estimators": 1,
    "kl_weight": 1.0,
    "hidden_dims": (256,),
    "channels": (32, 64),
    "latent_dim": 32,
    "n_samples": 1,
    "mask_rate": 0.0,
    "max_steps": 2000,
    "batch_size": 128,
    "mixed_precision": "training",
}
"""For columns of images: one convolutional network, one sample of z per score, bfloat16 in training if possible."""
