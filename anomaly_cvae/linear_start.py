"""Where networks of a table with classes begin: at a factor analysis of each class, which leans on all classes.

A network that is told c beside x must learn that columns depend on each other differently in every class, and with few
rows of each it does not. A linear path of its own for every class can begin where the best linear model is, in closed
form; what training adds is what is not linear. A network of one class begins there along its only linear path.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anomaly_cvae.encoding import Encoded, Encoder
from anomaly_cvae.factor_analysis import Factors, Moments, fit_classes, turned_to
from anomaly_cvae.frames import FloatArray, IntArray
from anomaly_cvae.likelihoods.base import squash
from anomaly_cvae.likelihoods.normal import Normal
from anomaly_cvae.model import CVAE
from anomaly_cvae.networks import StackedLinear, StackedMLP
from anomaly_cvae.schema import Schema
from anomaly_cvae.scoring import ScoringEngine

HEADS = ("robust_normal", "normal")
"""Likelihoods that a factor analysis says something about."""
MOST_CLASSES = 32
LEAST_COLUMNS, MOST_COLUMNS = 4, 32
"""Columns with such a head. Of two or three, a factor is one by another name, and an odd cell of it would be blamed on
z instead of the column. With the 64 pixels of the demo, 90 rows of each digit, networks that began plainly came to
explain held-out rows better, and told wrong labels better; with 10 to 19 columns those that began here did."""
MOST_ROWS_OF_CLASS = 5_000
LEAST_ROWS_OF_MEAN = 5
HIDDEN_START = 0.1
"""What is left at the start of what hidden layers add."""
LEAST_RAW_VARIANCE = 1e-3


def suits(encoder: Encoder, prior: str) -> bool:
    """Whether networks can begin so: z has a prior near N(0, I), and there are neither too many classes nor columns."""
    n_classes, n_columns = len(encoder.schema.classes), sum(column.likelihood in HEADS for column in encoder.columns)
    is_plain = not encoder.schema.images and prior in ("aggregate", "standard")
    return is_plain and 1 < n_classes <= MOST_CLASSES and LEAST_COLUMNS <= n_columns <= MOST_COLUMNS


def n_paths(schema: Schema) -> int:
    """How many linear paths a shared network has: one for each level of a single categorical condition, or none."""
    conditions = schema.categorical_conditions
    return len(conditions[0].levels) if len(conditions) == 1 else 0


def start(engine: ScoringEngine, encoded: Encoded, rows: IntArray, noise: FloatArray, seed: int) -> None:
    """Let the networks of an untrained bank begin at the factor analyses of the training ``rows``.

    ``noise`` (M,) is the standard deviation of training noise of each member, which its covariances are to include.
    """
    model, rng = engine.model, np.random.default_rng(seed)
    places = _places(model)
    levels: list[int | None] = [None] * engine.n_classes
    if engine.class_table is not None:
        # The condition vector begins with the one-hot level.
        levels = engine.class_table[:, : model.architecture.n_paths].argmax(dim=1).tolist()
    centers, moments = [], []
    for k in range(engine.n_classes):
        own = rng.permutation(rows[encoded.class_index[rows] == k])[:MOST_ROWS_OF_CLASS]
        cells = _seen(engine, encoded.take(own), k, places.cells)
        count = (~np.isnan(cells)).sum(axis=0)
        center = np.where(count >= LEAST_ROWS_OF_MEAN, np.nansum(cells, axis=0) / np.maximum(count, 1), 0.0)
        centers.append(center)
        moments.append(Moments.of(cells - center, rng))
    with torch.no_grad():
        for own_noise in np.unique(noise):
            least = max(float(own_noise) ** 2, places.variance_floor + LEAST_RAW_VARIANCE)
            classes = fit_classes(moments, model.architecture.latent_dim, least)
            if engine.members_per_class is None:
                largest = max(range(len(classes)), key=lambda k: moments[k].n_rows.sum())
                classes = [turned_to(factors, classes[largest]) for factors in classes]
            same = np.flatnonzero(noise == own_noise).tolist()
            for member in same:
                _quieten(model.encoder.mlp, member)
                _quieten(model.decoder.mlp, member)
            for k, factors in enumerate(classes):
                known = engine.members_of(k)
                for member in set(same) & set(range(known.start, known.stop)):
                    _write(model, member, levels[k], factors, centers[k], places)


@dataclass(frozen=True)
class Places:
    """Where columns with a normal head stand: among cells, the encoder's inputs, the decoder's means and variances."""

    cells: list[int]
    inputs: list[int]
    means: list[int]
    variances: list[int]
    variance_floor: float


def _places(model: CVAE) -> Places:
    places = Places([], [], [], [], model.architecture.scale_floor**2)
    cell = feature = output = 0
    for head in model.table_heads():
        n = head.n_columns
        if isinstance(head, Normal):
            places.cells.extend(range(cell, cell + n))
            places.inputs.extend(range(feature, feature + n))
            places.means.extend(range(output, output + n))
            places.variances.extend(range(output + n, output + 2 * n))
        cell, feature, output = cell + n, feature + head.n_features, output + head.n_parameters
    return places


def _seen(engine: ScoringEngine, rows: Encoded, k: int, cells: list[int]) -> FloatArray:
    """What the encoder sees of some cells of rows of class ``k``, (N, D); NaN where they are missing."""
    values = rows.values if engine.scaling is None else engine.scaling.to_class_units(rows.values, k)
    squashed = squash(torch.as_tensor(values[:, cells])).numpy()
    seen: FloatArray = np.where(rows.observed[:, cells], squashed, np.nan)
    return seen


def _quieten(mlp: StackedMLP, member: int) -> None:
    """No linear path yet, and a little of what the hidden layers say."""
    last = mlp.layers[-1]
    assert isinstance(last, StackedLinear)
    last.weight[member] *= HIDDEN_START
    for parameter in (mlp.skip, last.condition_weight):
        if parameter is not None:
            parameter[member] = 0.0


def _write(model: CVAE, member: int, level: int | None, factors: Factors, center: FloatArray, places: Places) -> None:
    """Encoder: the means and the precision of a row's factors; decoder: the mean of a row and its noise."""
    latent, numbers = model.architecture.latent_dim, torch.arange(len(factors.precision))
    path, shift = _own(model.encoder.mlp, member, level)
    path[torch.tensor(places.inputs)[:, None], numbers] = torch.as_tensor(factors.readings).to(path)
    shift[numbers] = -torch.as_tensor(center @ factors.readings).to(shift)
    shift[latent + numbers] = -torch.as_tensor(np.log(factors.precision)).to(shift)
    path, shift = _own(model.decoder.mlp, member, level)
    path[numbers[:, None], torch.tensor(places.means)] = torch.as_tensor(factors.loadings.T).to(path)
    shift[places.means] = torch.as_tensor(center).to(shift)
    raw = np.log(np.maximum(factors.noise - places.variance_floor, LEAST_RAW_VARIANCE))
    shift[places.variances] = torch.as_tensor(raw).to(shift)


def _own(mlp: StackedMLP, member: int, level: int | None) -> tuple[Tensor, Tensor]:
    """The path (in, out) and the shift (out,) of a level of the condition; of a network of one class, its only ones."""
    last = mlp.layers[-1]
    assert isinstance(last, StackedLinear)
    if level is None:
        assert mlp.skip is not None
        return mlp.skip[member], last.bias[member, 0]
    assert mlp.paths is not None
    assert last.condition_weight is not None
    return mlp.paths[member, level], last.condition_weight[member, level]
