"""Why a row was flagged: nats per column, and what the rest of the row lets the model expect instead."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from anomaly_cvae.encoding import LIKELIHOODS_OF_KIND, Encoded
from anomaly_cvae.fitted import FittedModel
from anomaly_cvae.frames import BoolArray, FloatArray, IntArray
from anomaly_cvae.schema import Name
from anomaly_cvae.scoring import ColumnScores

KL = "kl"
METHODS = ("sum", "repair")
"""Of `CVAEDetector.explain`."""
COMBINATION = "unusual combination (KL)"
"""How the KL is called where people read it."""
INTERVAL_DRAWS = 100
ROWS_PER_BLOCK = 200
ROWS_PER_REPAIR = 10_000


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
    return ColumnScores(model.encoder.by_column(scores.columns), scores.kl)


def _marginal_column_scores(model: FittedModel, encoded: Encoded) -> ColumnScores:
    shares = model.class_probabilities(encoded)
    columns = np.zeros(encoded.values.shape)
    for k in range(model.n_classes):
        claimed = encoded.of_class(np.full(len(encoded), k, dtype=np.int64))
        columns += shares[:, k : k + 1] * model.engine.column_scores(claimed).columns
    return ColumnScores(columns, model.scores(encoded, "elbo") - columns.sum(axis=1))


def excess_nats(model: FittedModel, encoded: Encoded, scores: ColumnScores) -> FloatArray:
    """Nats of each column, and last of the KL, above what they cost a normal row of the class: (N, D + 1).

    A column's nats depend on its unit (a density in Pa is not one in MPa); the excess does not. The KL is
    what an unusual combination costs, of cells each of which may be ordinary. -inf for a missing cell.
    """
    assert model.calibration is not None
    groups = model.groups(encoded)
    observed = model.encoder.by_column(encoded.observed.astype(np.float64)) > 0
    # What is missing of an image costs nothing, and is not expected to.
    typical = model.encoder.by_column(np.where(encoded.observed, model.calibration.typical_nats[groups], 0.0))
    columns = scores.columns - typical
    kl = scores.kl - model.calibration.typical_kl[groups]
    return np.column_stack([np.where(observed, columns, -np.inf), kl])


def repair_gains(model: FittedModel, encoded: Encoded) -> FloatArray:
    """Nats by which the negative ELBO falls if one cell alone becomes what the rest of its row lets expect: (N, D).

    It bounds log p(expected | rest) - log p(cell | rest) and has no unit: both are densities of the same column. A
    wrong cell misleads the encoder, so that other columns pay for it; it alone gets them their nats back. Negative
    where the cell is likelier than what is expected, 0 for a missing cell.
    """
    gains = [_repair_gains(model, encoded.take(rows)) for rows in _blocks(len(encoded))]
    return np.concatenate(gains) if gains else np.zeros((0, len(model.encoder.columns)))


def _repair_gains(model: FittedModel, encoded: Encoded) -> FloatArray:
    scores, known = model.scores(encoded, "elbo"), _most_probable_class(model, encoded)
    gains = np.zeros((len(encoded), len(model.encoder.columns)))
    for d, own in enumerate(model.encoder.slices):
        cells = np.zeros(encoded.observed.shape, dtype=np.bool_)
        cells[:, own] = encoded.observed[:, own]
        expected = model.engine.expected(known.hide(cells))
        if model.encoder.columns[d].likelihood in LIKELIHOODS_OF_KIND["count"]:
            expected[:, own] = np.round(expected[:, own])
        repaired = replace(encoded, values=np.where(cells, expected, encoded.values))
        gains[:, d] = np.where(cells.any(axis=1), scores - model.scores(repaired, "elbo"), 0.0)
    return model.encoder.ungroup(gains)


def _blocks(n_rows: int) -> list[IntArray]:
    return np.split(np.arange(n_rows), range(ROWS_PER_REPAIR, n_rows, ROWS_PER_REPAIR)) if n_rows else []


def called(name: object) -> str:
    """A column, or the KL, as people read it."""
    return COMBINATION if name == KL else str(name)


def parts(model: FittedModel) -> list[Name]:
    """Names of what `excess_nats` takes apart: the columns in the order of the schema, and the KL."""
    return [*model.encoder.schema.names, KL]


def alarm_columns(model: FittedModel, encoded: Encoded, classes: npt.NDArray[np.object_]) -> pd.DataFrame:
    """Per class (N,) and column, or KL: rows, rows that it tops, mean excess nats; the strongest first."""
    names = [str(name) for name in parts(model)]
    excess = excess_nats(model, encoded, column_scores(model, encoded))
    tables = []
    for name in sorted(set(classes.tolist())):
        own = excess[classes == name]
        present = np.isfinite(own)
        mean = np.where(present, own, 0.0).sum(axis=0) / np.maximum(present.sum(axis=0), 1)
        top = np.bincount(own.argmax(axis=1), minlength=len(names))
        part = pd.DataFrame({"class": name, "column": names, "alarms": len(own), "top": top, "excess_nats": mean})
        tables.append(part.sort_values(["top", "excess_nats"], ascending=False))
    columns = ["class", "column", "alarms", "top", "excess_nats"]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


def top_columns(model: FittedModel, encoded: Encoded, cells: pd.DataFrame, n_top: int, seed: int) -> pd.DataFrame:
    """The ``n_top`` most surprising columns of every row, one line each, rows in the order of ``cells``.

    Columns are ranked by `excess_nats`, the KL among them under its own name. The ranked cells are hidden
    together and drawn again given the rest of the row: ``expected`` is the mean or most probable value,
    ``low`` and ``high`` bound the central 90 % of the draws (numbers only; none for the KL).
    """
    blocks = [
        _top_columns_of_block(model, encoded.take(rows), cells.iloc[rows], n_top, seed)
        for rows in np.split(np.arange(len(cells)), range(ROWS_PER_BLOCK, len(cells), ROWS_PER_BLOCK))
    ]
    return pd.concat(blocks, ignore_index=True)


def _top_columns_of_block(
    model: FittedModel, encoded: Encoded, cells: pd.DataFrame, n_top: int, seed: int
) -> pd.DataFrame:
    scores = column_scores(model, encoded)
    nats = np.column_stack([scores.columns, scores.kl])
    excess = excess_nats(model, encoded, scores)
    top = np.argsort(-excess, axis=1, kind="stable")[:, :n_top]
    known = _most_probable_class(model, encoded.hide(_grouped_mask(model, top, encoded.observed.shape)))
    expected = model.encoder.decode(model.engine.expected(known))
    low, high = _interval(model, known, seed)
    rows, chosen = np.repeat(np.arange(len(top)), top.shape[1]), top.ravel()
    names = parts(model)
    return pd.DataFrame(
        {
            "row": cells.index.to_numpy()[rows],
            "rank": np.tile(np.arange(1, top.shape[1] + 1), len(top)),
            "column": [names[d] for d in chosen],
            "nats": nats[rows, chosen],
            "excess_nats": excess[rows, chosen],
            "observed": _pick(cells[names[:-1]], rows, chosen),
            "expected": _pick(expected, rows, chosen),
            "low": _with_nan(low)[rows, chosen],
            "high": _with_nan(high)[rows, chosen],
        }
    )


def pixels(model: FittedModel, encoded: Encoded, column: Name) -> FloatArray:
    """Nats of every pixel of one column of images, colours added up: (N, H, W)."""
    place = next(d for d, fitted in enumerate(model.encoder.columns) if fitted.name == column and fitted.shape)
    own, shape = model.encoder.slices[place], model.encoder.columns[place].shape
    nats = model.engine.column_scores(encoded).columns[:, own]
    summed: FloatArray = nats.reshape(len(nats), *shape).sum(axis=1)
    return summed


def intervals(
    model: FittedModel, encoded: Encoded, index: pd.Index, coverage: float, n_draws: int, seed: int
) -> pd.DataFrame:
    """One line per missing cell: row, column, expected value, bounds of the central ``coverage`` of its draws."""
    lines = []
    generator, encoder = model.engine.generator(seed), model.encoder
    missing = np.stack([(~encoded.observed[:, own]).any(axis=1) for own in encoder.slices])
    rows = np.flatnonzero(missing.any(axis=0))
    for block in np.split(rows, range(ROWS_PER_BLOCK, len(rows), ROWS_PER_BLOCK)):
        own = encoded.take(block)
        draws = model.engine.draw(own, n_draws, generator)
        bounds = np.quantile(draws, [0.5 - coverage / 2, 0.5 + coverage / 2], axis=0)
        found = [model.engine.expected(own), *bounds]
        tables = [encoder.decode(np.where(own.observed, own.values, values)) for values in found]
        for d, (place, fitted) in enumerate(zip(encoder.order, encoder.columns, strict=True)):
            name = encoder.schema.columns[place].name
            for i in np.flatnonzero(missing[d, block]):
                expected, low, high = (table[name].iloc[i] for table in tables)
                if fitted.n_levels and not fitted.shape:
                    low = high = np.nan
                lines.append((index[block[i]], name, expected, low, high))
    table = pd.DataFrame(lines, columns=["row", "column", "expected", "low", "high"])
    return table


def _grouped_mask(model: FittedModel, top: IntArray, shape: tuple[int, ...]) -> BoolArray:
    mask = np.zeros((shape[0], shape[1] + 1), dtype=np.bool_)
    np.put_along_axis(mask, top, True, axis=1)
    return np.repeat(mask[:, list(model.encoder.order)], model.encoder.widths, axis=1)


def _most_probable_class(model: FittedModel, encoded: Encoded) -> Encoded:
    groups = model.groups(encoded)
    if not (groups == model.n_classes).any():
        return encoded
    best = model.class_probabilities(encoded).argmax(axis=1)
    return encoded.of_class(np.where(groups == model.n_classes, best, groups))


def _interval(model: FittedModel, encoded: Encoded, seed: int) -> tuple[FloatArray, FloatArray]:
    draws = model.engine.draw(encoded, INTERVAL_DRAWS, model.engine.generator(seed))
    low, high = np.quantile(draws, [0.05, 0.95], axis=0)
    return _numbers(model, low), _numbers(model, high)


def _numbers(model: FittedModel, values: FloatArray) -> FloatArray:
    """Encoded values (N, D) in the units of the table, a number per column; NaN where one has levels or pixels."""
    numbers = np.empty((len(values), len(model.encoder.columns)))
    for d, (own, fitted) in enumerate(zip(model.encoder.slices, model.encoder.columns, strict=True)):
        if fitted.n_levels or fitted.shape:
            numbers[:, d] = np.nan
            continue
        cells = values[:, own.start]
        numbers[:, d] = cells * fitted.scale + fitted.center if model.encoder.is_real[own.start] else cells
    return model.encoder.ungroup(numbers)


def _pick(frame: pd.DataFrame, rows: IntArray, chosen: IntArray) -> np.ndarray:
    """Cells by row and column; the column after the last, the KL, has none."""
    cells = np.empty((len(frame), frame.shape[1] + 1), dtype=object)
    cells[:, :-1] = frame.astype(object).to_numpy()
    cells[:, -1] = np.nan
    picked: np.ndarray = cells[rows, chosen]
    return picked


def _with_nan(values: FloatArray) -> FloatArray:
    return np.column_stack([values, np.full(len(values), np.nan)])
