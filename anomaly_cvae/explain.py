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
ALARM_COLUMNS = ["class", "column", "alarms", "top", "repair_nats"]
CANDIDATES = 8
"""Columns of a row that are asked what mending them would save, those of most excess nats: as good as asking all, and
its cost does not grow with the table (docs/benchmarks/quality.md)."""
NEW_CLASS, NO_CELL = "(new class)", "(no cell alone)"
"""Why a row is flagged for which no column is to blame."""
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


def excess_nats(model: FittedModel, encoded: Encoded) -> FloatArray:
    """Nats of each column above what they cost a normal row of the class, (N, D); -inf for a missing cell.

    A column's nats depend on its unit (a density in Pa is not one in MPa); the excess does not.
    """
    assert model.calibration is not None
    groups = model.groups(encoded)
    observed = model.encoder.by_column(encoded.observed.astype(np.float64)) > 0
    # What is missing of an image costs nothing, and is not expected to.
    typical = model.encoder.by_column(np.where(encoded.observed, model.calibration.typical_nats[groups], 0.0))
    return np.where(observed, column_scores(model, encoded).columns - typical, -np.inf)


def repair_gains(model: FittedModel, encoded: Encoded) -> FloatArray:
    """Nats by which the negative ELBO falls if one cell alone becomes what the rest of its row lets expect: (N, D).

    It bounds log p(expected | rest) - log p(cell | rest) and has no unit: both are densities of the same column. A
    wrong cell misleads the encoder, so that other columns pay for it; it alone gets them their nats back. Negative
    where the cell is likelier than what is expected, 0 for a missing cell. An image becomes a drawn one.
    """
    n_columns = len(model.encoder.columns)
    asked = np.broadcast_to(np.arange(n_columns), (len(encoded), n_columns))
    return _gains(model, encoded, asked)


def to_blame(model: FittedModel, encoded: Encoded, n: int) -> tuple[IntArray, FloatArray]:
    """The ``n`` columns of each row that are most to blame, (N, n), and what mending each alone would save, nats.

    Of the `CANDIDATES` columns (or ``n``, if that is more) of most excess nats, those of most `repair_gains`;
    missing cells come last.
    """
    excess = excess_nats(model, encoded)
    asked = np.argsort(-excess, axis=1, kind="stable")[:, : max(n, CANDIDATES)]
    gains = _gains(model, encoded, asked)
    is_there = np.isfinite(np.take_along_axis(excess, asked, axis=1))
    order = np.argsort(np.where(is_there, -gains, np.inf), axis=1, kind="stable")[:, :n]
    return np.take_along_axis(asked, order, axis=1), np.take_along_axis(gains, order, axis=1)


def _gains(model: FittedModel, encoded: Encoded, asked: IntArray) -> FloatArray:
    """Of the columns asked about in each row, (N, K), in the order of the schema: their `repair_gains`, (N, K)."""
    gains = np.zeros(asked.shape)
    for rows in _blocks(len(encoded), ROWS_PER_REPAIR):
        own = encoded.take(rows)
        scores, known = model.scores(own, "elbo"), _most_probable_class(model, own)
        for k, columns in enumerate(asked[rows].T):
            cells = _cells_of(model, columns) & own.observed
            mended = np.where(cells, _mended(model, known, cells), own.values)
            repaired = model.scores(replace(own, values=mended), "elbo")
            gains[rows, k] = np.where(cells.any(axis=1), scores - repaired, 0.0)
    return gains


def _mended(model: FittedModel, encoded: Encoded, hidden: BoolArray) -> FloatArray:
    """What is put into hidden cells, (N, D): what is expected there; pixels are drawn.

    An image of expected pixels has none of the grain of a real one, so that every image would gain by becoming it.
    """
    values = _expected(model, encoded, hidden)
    pixels = np.repeat([bool(fitted.shape) for fitted in model.encoder.columns], model.encoder.widths)
    if (hidden & pixels).any():
        unseen = encoded.hide(hidden)
        # Row by row: what is drawn must not depend on the rows beside it.
        for row in np.flatnonzero((hidden & pixels).any(axis=1)):
            drawn = model.engine.draw(unseen.take(np.array([row])), 1, model.engine.generator(0))[0, 0]
            values[row] = np.where(pixels, drawn, values[row])
    return values


def _expected(model: FittedModel, encoded: Encoded, hidden: BoolArray) -> FloatArray:
    """What each row's other cells let expect in the hidden ones, encoded (N, D); a count is a whole number."""
    expected = model.engine.expected(encoded.hide(hidden))
    counts = [fitted.likelihood in LIKELIHOODS_OF_KIND["count"] for fitted in model.encoder.columns]
    whole = np.repeat(counts, model.encoder.widths)
    return np.where(whole, np.round(expected), expected)


def _cells_of(model: FittedModel, columns: IntArray) -> BoolArray:
    """The encoded cells (N, D) of one column of each row, columns (N,) in the order of the schema."""
    own = columns[:, None] == np.arange(len(model.encoder.columns))
    return np.repeat(own[:, list(model.encoder.order)], model.encoder.widths, axis=1)


def _blocks(n_rows: int, size: int) -> list[IntArray]:
    return np.split(np.arange(n_rows), range(size, n_rows, size)) if n_rows else []


def alarm_columns(
    model: FittedModel, encoded: Encoded, classes: npt.NDArray[np.object_], above: BoolArray
) -> pd.DataFrame:
    """Per class (N,) and column that is most to blame for some of its rows: how many, and what mending it saves.

    Rows that are not ``above`` their threshold, (N,), are flagged for their class alone.
    """
    names = np.array([str(name) for name in model.encoder.schema.names], dtype=object)
    top, gains = to_blame(model, encoded, 1)
    columns = np.where(above, np.where(gains[:, 0] > 0, names[top[:, 0]], NO_CELL), NEW_CLASS)
    blamed = pd.DataFrame(
        {"class": classes, "column": columns, "repair_nats": np.where(above, np.maximum(gains[:, 0], 0.0), 0.0)}
    )
    return ordered_alarms(
        blamed.groupby(["class", "column"], as_index=False)
        .agg(top=("repair_nats", "size"), repair_nats=("repair_nats", "mean"))
        .assign(alarms=lambda table: table.groupby("class")["top"].transform("sum"))
    )


def ordered_alarms(table: pd.DataFrame) -> pd.DataFrame:
    """`alarm_columns` in their order: within each class what is most often to blame first."""
    ordered = table.sort_values(["class", "top", "repair_nats"], ascending=[True, False, False], ignore_index=True)
    return ordered[ALARM_COLUMNS]


def top_columns(model: FittedModel, encoded: Encoded, cells: pd.DataFrame, n_top: int, seed: int) -> pd.DataFrame:
    """The ``n_top`` columns of every row that are most to blame, one line each, rows in the order of ``cells``.

    Each cell is hidden by itself and drawn again given the rest of the row: ``expected`` is the mean or most
    probable value, ``low`` and ``high`` bound the central 90 % of the draws (numbers only).
    """
    blocks = [
        _top_columns_of_block(model, encoded.take(rows), cells.iloc[rows], n_top, seed)
        for rows in _blocks(len(cells), ROWS_PER_BLOCK) or [np.arange(0)]
    ]
    return pd.concat(blocks, ignore_index=True)


def _top_columns_of_block(
    model: FittedModel, encoded: Encoded, cells: pd.DataFrame, n_top: int, seed: int
) -> pd.DataFrame:
    top, gains = to_blame(model, encoded, n_top)
    nats = column_scores(model, encoded).columns
    known, names = _most_probable_class(model, encoded), model.encoder.schema.names
    places, lines = np.arange(len(top)), []
    for rank, (columns, saved) in enumerate(zip(top.T, gains.T, strict=True), start=1):
        hidden = _cells_of(model, columns)
        expected = model.encoder.decode(_expected(model, known, hidden))
        low, high = _interval(model, known.hide(hidden), seed)
        lines.append(
            pd.DataFrame(
                {
                    "row": cells.index.to_numpy(),
                    "rank": rank,
                    "column": [names[d] for d in columns],
                    "repair_nats": saved,
                    "nats": nats[places, columns],
                    "observed": _pick(cells[names], columns),
                    "expected": _pick(expected, columns),
                    "low": low[places, columns],
                    "high": high[places, columns],
                },
                index=places,
            )
        )
    return pd.concat(lines).sort_index(kind="stable")


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
    for block in (rows[places] for places in _blocks(len(rows), ROWS_PER_BLOCK)):
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


def _pick(frame: pd.DataFrame, columns: IntArray) -> npt.NDArray[np.object_]:
    """One cell of each row."""
    cells: npt.NDArray[np.object_] = frame.astype(object).to_numpy()[np.arange(len(frame)), columns]
    return cells
