"""Why a row was flagged: nats per column, and what the rest of the row lets the model expect instead."""

from __future__ import annotations

import numpy as np
import pandas as pd

from anomaly_cvae.encoding import Encoded
from anomaly_cvae.fitted import FittedModel
from anomaly_cvae.frames import BoolArray, FloatArray, IntArray
from anomaly_cvae.scoring import ColumnScores

KL = "kl"


def column_scores(model: FittedModel, encoded: Encoded) -> ColumnScores:
    """The negative ELBO of each row taken apart, columns in the order of the schema.

    A row of unknown class is scored marginally, -log sum_c p(c) exp(-L_c). It is split by the share of
    each class, r_c = p(c | x): the columns' sum_c r_c nats, and a rest that goes with the KL.
    """
    groups = model.groups(encoded)
    scores = model.engine.column_scores(encoded)
    unknown = np.flatnonzero(groups == model.n_classes)
    if unknown.size:
        marginal = _marginal_column_scores(model, encoded.take(unknown))
        scores.columns[unknown], scores.kl[unknown] = marginal.columns, marginal.kl
    return ColumnScores(model.encoder.ungroup(scores.columns), scores.kl)


def _marginal_column_scores(model: FittedModel, encoded: Encoded) -> ColumnScores:
    shares = model.class_probabilities(encoded)
    columns = np.zeros(encoded.values.shape)
    for k in range(model.n_classes):
        claimed = encoded.of_class(np.full(len(encoded), k, dtype=np.int64))
        columns += shares[:, k : k + 1] * model.engine.column_scores(claimed).columns
    return ColumnScores(columns, model.scores(encoded, "elbo") - columns.sum(axis=1))


def top_columns(
    model: FittedModel,
    encoded: Encoded,
    observed_cells: pd.DataFrame,
    n_top: int,
    rng_seed: int,
    n_draws: int,
) -> pd.DataFrame:
    """The ``n_top`` most surprising columns of every row, one line each.

    Those cells are hidden together and drawn again given the rest of the row: ``expected`` is the mean or
    most probable value, ``low`` and ``high`` bound the central 90 % of the draws (numbers only).
    """
    nats = column_scores(model, encoded).columns
    top = np.argsort(-nats, axis=1, kind="stable")[:, :n_top]
    hidden = encoded.hide(_grouped_mask(model, top, encoded.observed.shape))
    known = _most_probable_class(model, hidden)
    expected = model.encoder.decode(model.engine.expected(known))
    low, high = _interval(model, known, rng_seed, n_draws)
    names, rows = model.encoder.schema.names, np.arange(len(top))
    lines = [
        pd.DataFrame(
            {
                "row": observed_cells.index.to_numpy(),
                "rank": rank + 1,
                "column": [names[d] for d in chosen],
                "nats": nats[rows, chosen],
                "observed": _pick(observed_cells[names], chosen),
                "expected": _pick(expected, chosen),
                "low": low[rows, chosen],
                "high": high[rows, chosen],
            }
        )
        for rank, chosen in enumerate(top.T)
    ]
    return pd.concat(lines).sort_values(["row", "rank"], kind="stable").reset_index(drop=True)


def _grouped_mask(model: FittedModel, top: IntArray, shape: tuple[int, ...]) -> BoolArray:
    mask = np.zeros(shape, dtype=np.bool_)
    np.put_along_axis(mask, top, True, axis=1)
    return mask[:, list(model.encoder.order)]


def _most_probable_class(model: FittedModel, encoded: Encoded) -> Encoded:
    groups = model.groups(encoded)
    if not (groups == model.n_classes).any():
        return encoded
    best = model.class_probabilities(encoded).argmax(axis=1)
    return encoded.of_class(np.where(groups == model.n_classes, best, groups))


def _interval(model: FittedModel, encoded: Encoded, seed: int, n_draws: int) -> tuple[FloatArray, FloatArray]:
    draws = model.engine.draw(encoded, n_draws, model.engine.generator(seed))
    low, high = np.quantile(draws, [0.05, 0.95], axis=0)
    return _numbers(model, low), _numbers(model, high)


def _numbers(model: FittedModel, values: FloatArray) -> FloatArray:
    """Encoded values (N, D) in the units of the table, NaN where a column has levels."""
    numbers = np.empty_like(values)
    for d, fitted in enumerate(model.encoder.columns):
        real = model.encoder.is_real[d]
        numbers[:, d] = values[:, d] * fitted.scale + fitted.center if real else values[:, d]
        if fitted.n_levels:
            numbers[:, d] = np.nan
    return model.encoder.ungroup(numbers)


def _pick(frame: pd.DataFrame, chosen: IntArray) -> np.ndarray:
    return frame.astype(object).to_numpy()[np.arange(len(chosen)), chosen]
