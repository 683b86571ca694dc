"""How much each network of a bank counts, where they were trained unlike."""

from __future__ import annotations

import numpy as np
import torch

from anomaly_cvae.encoding import Encoded
from anomaly_cvae.frames import FloatArray, IntArray
from anomaly_cvae.scoring import ScoringEngine

LEAST_ROWS_OF_SPREAD = 20
"""Held-out rows that say how far a network's scores spread; where there are fewer, training rows do."""
MOST_ROWS_OF_SPREAD = 2_000


def fix_weights(engine: ScoringEngine, encoded: Encoded, validation: IntArray, training: IntArray) -> None:
    """Where members were trained unlike, let each count by one over the spread of its scores of normal rows.

    With a small KL weight posteriors are narrow, and nats against the prior many: in a plain mean such a network
    would decide alone. The spread is the interquartile range, which a few odd rows do not move. Any weights that
    add to 1 leave the mean a bound on minus a log-density, that of the networks' normalised weighted product.
    """
    if engine.member_weights is None:
        return
    per_class = engine.members_per_class is not None
    for k in range(engine.n_classes) if per_class else [0]:
        known = encoded.class_index == k if per_class else encoded.class_index >= 0
        held_out, own = (part[known[part]][:MOST_ROWS_OF_SPREAD] for part in (validation, training))
        rows = encoded.take(held_out if len(held_out) >= LEAST_ROWS_OF_SPREAD else own)
        nats = _within_classes(without_units(engine, rows), rows.class_index)
        engine.member_weights[engine.members_of(k)] = torch.as_tensor(by_spread(nats)).to(engine.member_weights)


def without_units(engine: ScoringEngine, encoded: Encoded) -> FloatArray:
    """Every member's negative ELBO (N, M) of cells in units of their class: metres or feet, weights are the same."""
    log_units = engine.model.log_units.numpy()
    if engine.scaling is not None:
        log_units = log_units + np.log(engine.scaling.scale[encoded.class_index])
    nats: FloatArray = engine.member_negative_elbo(encoded) - (encoded.scored * log_units).sum(axis=1)[:, None]
    return nats


def _within_classes(nats: FloatArray, classes: IntArray) -> FloatArray:
    """Less the median of each class: thresholds are per class, so that how far classes lie apart does not count."""
    centred = nats.copy()
    for k in np.unique(classes):
        centred[classes == k] -= np.median(nats[classes == k], axis=0)
    return centred


def by_spread(nats: FloatArray) -> FloatArray:
    """Weights (M,) that add to 1, each one over the interquartile range of a column of ``nats`` (N, M).

    Where half of the rows are alike it is 0, and the standard deviation stands in for it.
    """
    spread = np.subtract(*np.quantile(nats, [0.75, 0.25], axis=0)) if len(nats) else np.zeros(nats.shape[1])
    if len(nats) and not spread.min() > 0.0:
        spread = nats.std(axis=0)
    if not spread.min() > 0.0:
        return np.full(len(spread), 1.0 / len(spread))
    weights: FloatArray = 1.0 / spread / (1.0 / spread).sum()
    return weights
