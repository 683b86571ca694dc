"""The sets of the conditional benchmark: what trains, what is judged, and what the condition is.

Tables whose anomalies are faults, attacks or wear; images and made-up rows whose anomalies are rows under a wrong
claim; the same with few training rows per class. Training rows are normal in all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import made_up_contexts
import numpy as np
import pandas as pd
from conditional_peers import LEAST_ROWS_OF_OWN_PEER
from tables import PROBLEMS, labels_of, plan_of

from anomaly_cvae.datasets import labelled_images

CLAIM = "claimed"
TRAINING_IMAGES = 10_000
ROWS_PER_CLASS = 500
FEW_ROWS = (10, 30, 100, 300)
SENSORS = [f"sensor_{number:02}" for number in range(1, 22)]
REGIME = "op_condition"
HEALTHY, WORN = 125, (50, 75)
"""Cycles that an engine has left: more than this; more than the first and at most the second."""


@dataclass(frozen=True)
class Split:
    """Training rows (N, D) and test rows (R, D), the conditions among the columns; and what is an anomaly, (R,)."""

    train: pd.DataFrame
    test: pd.DataFrame
    conditions: list[str]
    is_anomaly: np.ndarray
    wrong_claims: bool = False
    """Whether an anomaly is a row under another class's name, so that a contrast is what is asked for."""
    image_shape: tuple[int, int] | None = None
    log_densities: Callable[[], np.ndarray] | None = None
    """The true log p(x given c) of the test rows under every class, (R, K), where it is known."""
    least_rows: int = LEAST_ROWS_OF_OWN_PEER
    """Of a class, for a classical detector of its own."""


@dataclass(frozen=True)
class DataSet:
    """A set: to which part it belongs, which files it needs, and how a split of it is drawn."""

    part: str
    name: str
    draw: Callable[[Path, int], Split]
    files: tuple[str, ...] = ()
    is_fixed: bool = False
    """Whether every seed gives the same rows."""
    has_tiny_classes: bool = False
    """Whether some classes have fewer rows than a network of their own takes."""


@dataclass(frozen=True)
class Limits:
    """What images may cost."""

    training_images: int = TRAINING_IMAGES
    test_images: int = 2_000
    image_steps: int = 3_000


def sets(limits: Limits) -> list[DataSet]:
    """Every set, the cheap ones first."""
    ai4i, nsl_kdd = PROBLEMS[:2]
    traffic = (nsl_kdd.data, nsl_kdd.test_data or "")
    both = ["protocol_type", "service"]
    return [
        DataSet("c", "AI4I", partial(table, ai4i, ["Type"]), (ai4i.data,)),
        *[
            DataSet("e", f"{family}, {anomalies}", partial(made_up, family, anomalies))
            for family in made_up_contexts.FAMILIES
            for anomalies in ("wrong class", "broken rows")
        ],
        DataSet("d", "C-MAPSS FD002", engines, ("cmapss_FD002_train.parquet",)),
        *few_rows(),
        DataSet("b", "NSL-KDD, protocol", partial(table, nsl_kdd, both[:1]), traffic, is_fixed=True),
        DataSet(
            "b",
            "NSL-KDD, protocol and service",
            partial(table, nsl_kdd, both),
            traffic,
            is_fixed=True,
            has_tiny_classes=True,
        ),
        DataSet("a", "MNIST", partial(images, "mnist.npz", limits), ("mnist.npz",)),
        DataSet("a", "Fashion-MNIST", partial(images, "fashion_mnist.npz", limits), ("fashion_mnist.npz",)),
    ]


def few_rows() -> list[DataSet]:
    """Sets of which few training rows of each class are left."""
    full = {f"{family}, wrong class": partial(made_up, family, "wrong class") for family in made_up_contexts.FAMILIES}
    found = [DataSet("f", name, draw) for name, draw in full.items()]
    found.append(DataSet("f", "C-MAPSS FD002", engines, ("cmapss_FD002_train.parquet",)))
    return [
        replace(one, name=f"{one.name}, {rows} rows a class", draw=partial(thinned, one.draw, rows))
        for one in found
        for rows in FEW_ROWS
    ]


def place_of(folder: Path, file: str) -> Path:
    """Where a file lies: in the folder, or in its folder of tables."""
    return next((place for place in (folder / file, folder / "tabular" / file) if place.is_file()), folder / file)


def table(problem: object, conditions: list[str], folder: Path, seed: int) -> Split:
    """A table of the configurations of `pipelines/configs`, under the given conditions."""
    plan = plan_of(problem, place_of(folder, problem.data).parent, seed, condition=conditions)
    names = [column.name for column in plan.schema.columns] + conditions
    return Split(plan.training_rows[names], plan.test_frame.iloc[plan.test][names], conditions, labels_of(plan))


def engines(folder: Path, seed: int) -> Split:
    """Half of the engines train, by their healthy cycles; of the other half, healthy cycles against early wear."""
    cycles = pd.read_parquet(place_of(folder, "cmapss_FD002_train.parquet"))
    units = np.random.default_rng(seed).permutation(cycles["unit"].unique())
    trains = cycles["unit"].isin(units[: len(units) // 2])
    healthy, worn = cycles["rul"] > HEALTHY, cycles["rul"].between(*WORN, inclusive="right")
    columns = [*SENSORS, REGIME]
    test = ~trains & (healthy | worn)
    return Split(cycles.loc[trains & healthy, columns], cycles.loc[test, columns], [REGIME], worn[test].to_numpy())


def made_up(family: str, anomalies: str, folder: Path, seed: int) -> Split:
    """Rows of a family: half of the test rows claim another class, or have columns that do not belong together."""
    rng = np.random.default_rng(seed)
    drawn = made_up_contexts.FAMILIES[family](rng)
    classes = np.repeat(np.arange(made_up_contexts.CLASSES), ROWS_PER_CLASS)
    train, test = drawn.rows(classes, rng), drawn.rows(classes, rng)
    claimed, is_anomaly = wrong_claims(classes, made_up_contexts.CLASSES, rng)
    if anomalies == "broken rows":
        claimed = classes
        # Each column from another row: every value is ordinary, in every class, and the row is not.
        test[is_anomaly] = rng.permuted(test[is_anomaly], axis=0)
    names = [f"x{number}" for number in range(made_up_contexts.COLUMNS)]
    return Split(
        pd.DataFrame(train, columns=names).assign(**{CLAIM: classes}),
        pd.DataFrame(test, columns=names).assign(**{CLAIM: claimed}),
        [CLAIM],
        is_anomaly,
        wrong_claims=anomalies == "wrong class",
        log_densities=lambda: drawn.log_density(test),
    )


def images(file: str, limits: Limits, folder: Path, seed: int) -> Split:
    """Training images drawn by the seed; half of the test images, drawn too, claim another class."""
    rng = np.random.default_rng(seed)
    data = labelled_images(place_of(folder, file))
    chosen = rng.permutation(len(data.x_train))[: limits.training_images]
    judged = rng.permutation(len(data.x_test))[: limits.test_images]
    claimed, is_wrong = wrong_claims(data.y_test[judged], int(data.y_train.max()) + 1, rng)
    height, width = data.x_train.shape[1:]
    return Split(
        pixels(data.x_train[chosen]).assign(**{CLAIM: data.y_train[chosen]}),
        pixels(data.x_test[judged]).assign(**{CLAIM: claimed}),
        [CLAIM],
        is_wrong,
        wrong_claims=True,
        image_shape=(height, width),
    )


def pixels(stack: np.ndarray) -> pd.DataFrame:
    """A column per pixel of images (N, H, W)."""
    return pd.DataFrame(stack.reshape(len(stack), -1)).rename(columns=lambda number: f"pixel_{number}")


def thinned(draw: Callable[[Path, int], Split], rows: int, folder: Path, seed: int) -> Split:
    """So many training rows of each class, drawn by the seed; more are among fewer, the test rows stay."""
    split = draw(folder, seed)
    shuffled = split.train.sample(frac=1.0, random_state=seed)
    return replace(split, train=shuffled.groupby(split.conditions, sort=False).head(rows), least_rows=2)


def wrong_claims(classes: np.ndarray, n_classes: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Claimed classes (N,), half of them wrong, each other class as likely; and which are wrong."""
    is_wrong = np.zeros(len(classes), dtype=bool)
    is_wrong[rng.permutation(len(classes))[: len(classes) // 2]] = True
    return np.where(is_wrong, (classes + rng.integers(1, n_classes, len(classes))) % n_classes, classes), is_wrong
