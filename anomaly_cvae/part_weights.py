"""How much the reconstruction and the KL of each network of a bank count in scores."""

from __future__ import annotations

import numpy as np
import torch

from anomaly_cvae.encoding import Encoded
from anomaly_cvae.frames import FloatArray, IntArray
from anomaly_cvae.scoring import ScoringEngine

LEAST_ROWS_OF_SPREAD = 20
"""Held-out rows that say how far the parts of a score spread; where there are fewer, training rows do."""
MOST_ROWS_OF_SPREAD = 2_000
TAIL = 0.05
"""Share of rows on each side that count as if they lay at its edge: a few odd rows do not move a spread."""
MOST_UNEQUAL = 10.0
"""A nat of KL counts at most this many nats of reconstruction, and at least one over it."""


def fix_part_weights(engine: ScoringEngine, encoded: Encoded, validation: IntArray, training: IntArray) -> None:
    """Where the engine has weights, let each part of each member count by one over its spread over normal rows.

    With a small KL weight posteriors are narrow, and nats against the prior many: in a plain sum such a network's KL
    would decide alone. Sums of parts on one scale are the combined index of process monitoring (Yue and Qin 2001:
    a residual and a distance within the model, each by its limit). The weights of the reconstructions add to 1; with
    any other than these for the KL the sum is no bound on minus a log-density.
    """
    if engine.part_weights is None:
        return
    per_class = engine.members_per_class is not None
    for k in range(engine.n_classes) if per_class else [0]:
        known = encoded.class_index == k if per_class else encoded.class_index >= 0
        held_out, own = (part[known[part]][:MOST_ROWS_OF_SPREAD] for part in (validation, training))
        rows = encoded.take(held_out if len(held_out) >= LEAST_ROWS_OF_SPREAD else own)
        parts = _within_classes(parts_without_units(engine, rows), rows.class_index)
        engine.part_weights[engine.members_of(k)] = torch.as_tensor(by_spread(parts)).to(engine.part_weights)


def parts_without_units(engine: ScoringEngine, encoded: Encoded) -> FloatArray:
    """Reconstruction and KL of every member (N, M, 2) of cells in units of their class: metres or feet are the same."""
    log_units = engine.model.log_units.numpy()
    if engine.scaling is not None:
        log_units = log_units + np.log(engine.scaling.scale[encoded.class_index])
    parts = engine.member_parts(encoded)
    parts[:, :, 0] -= (encoded.scored * log_units).sum(axis=1)[:, None]
    return parts


def _within_classes(parts: FloatArray, classes: IntArray) -> FloatArray:
    """Less the median of each class: thresholds are per class, so that how far classes lie apart does not count."""
    centred = parts.copy()
    for k in np.unique(classes):
        centred[classes == k] -= np.median(parts[classes == k], axis=0)
    return centred


def by_spread(parts: FloatArray) -> FloatArray:
    """Weights (M, 2) for parts (N, M, 2): one over each spread, scaled so that those of the reconstructions add to 1.

    Spreads are winsorised standard deviations; where nearly all rows are alike these are 0, and plain ones stand in.
    """
    members = parts.shape[1]
    alike = np.full((members, 2), 1.0 / members)
    if not len(parts):
        return alike
    spread = np.clip(parts, *np.quantile(parts, [TAIL, 1.0 - TAIL], axis=0)).std(axis=0)
    if not spread.min() > 0.0:
        spread = parts.std(axis=0)
    if not spread[:, 0].min() > 0.0:
        return alike
    kl = np.divide(spread[:, 0], spread[:, 1], out=np.ones(members), where=spread[:, 1] > 0.0)
    own = 1.0 / spread[:, 0] / (1.0 / spread[:, 0]).sum()
    weights: FloatArray = np.column_stack([own, own * np.clip(kl, 1.0 / MOST_UNEQUAL, MOST_UNEQUAL)])
    return weights
