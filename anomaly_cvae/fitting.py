"""From an encoded table to a fitted model: split, build the bank, train, fit the prior, calibrate."""

from __future__ import annotations

import getpass
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import numpy as np
import pandas as pd
import torch

from anomaly_cvae import linear_start
from anomaly_cvae.calibration import HELD_OUT, rows_needed
from anomaly_cvae.encoding import ClassScaling, Encoded, Encoder
from anomaly_cvae.errors import DataError
from anomaly_cvae.fitted import FittedModel
from anomaly_cvae.frames import BoolArray, IntArray
from anomaly_cvae.model import CVAE, Architecture
from anomaly_cvae.networks import Condition
from anomaly_cvae.part_weights import fix_part_weights
from anomaly_cvae.passes import Precision
from anomaly_cvae.priors import (
    MAX_FITTED_ROWS,
    ROWS_PER_COMPONENT,
    AggregatePosterior,
    DiagonalNormal,
    low_discrepancy_normal,
    number_of_components,
)
from anomaly_cvae.row_stream import RowStream
from anomaly_cvae.rows import DeviceRows, class_conditions, tensor
from anomaly_cvae.schema import Name, Schema
from anomaly_cvae.scoring import ScoringEngine
from anomaly_cvae.training import Epoch, Training, TrainingSettings, dealt, train

MAX_CALIBRATION_ROWS = 10_000
MAX_VALIDATION_ROWS = 2_000
MAX_AUTO_LATENT_DIM = 32
LEAST_ROWS_PER_NETWORK = 10

Conditioning = Literal["shared", "per_class"]
PartWeights = Literal["auto", "alike", "spread"]
PriorName = Literal["aggregate", "standard", "learned", "vamp"]
VAMP_COMPONENTS = 64
"""Pseudo-inputs of a VampPrior, over all classes; at least `LEAST_VAMP_COMPONENTS` for each."""
LEAST_VAMP_COMPONENTS = 8
LABELLED_SHARE = 0.1
"""Least share of a batch that has a class, where only some rows have one."""


@dataclass(frozen=True)
class FitSettings:
    """What `fit_model` needs beyond the rows; names as in `CVAEDetector`."""

    conditioning: Conditioning
    n_estimators: int
    latent_dim: int | None
    hidden_dims: tuple[int, ...]
    prior: PriorName
    n_samples: int
    scale_floor: float
    false_alarm_rate: float
    contamination: float | None
    validation_fraction: float
    calibration_fraction: float
    device: torch.device
    dtype: torch.dtype
    training: TrainingSettings
    channels: tuple[int, ...] = (32, 64)
    inference_head: bool = False
    condition_on_observed: bool = False
    with_parts: bool = False
    part_weights: PartWeights = "auto"
    linear_start: bool = True
    precision: Precision = "float32"


@dataclass(frozen=True)
class Split:
    """Row numbers for the gradient, for early stopping, and for thresholds; disjoint."""

    training: IntArray
    validation: IntArray
    calibration: IntArray


@dataclass(frozen=True)
class Fit:
    """The fitted model, how its training went, and which rows served for what."""

    model: FittedModel
    training: Training
    split: Split


def fit_model(
    schema: Schema,
    frame: pd.DataFrame,
    likelihoods: Mapping[Name, str],
    settings: FitSettings,
    random_state: np.random.RandomState,
    on_epoch: Callable[[Epoch], bool] | None = None,
    stream: RowStream | None = None,
) -> Fit:
    """Train a bank on the normals of ``frame`` and calibrate it.

    The rows are split before anything is learned of them: scaling, too, comes from training rows alone.
    ``stream`` says that ``frame`` is but a sample of more rows than memory holds, and has them all for training.

    Raises
    ------
    DataError
        If a class has too few rows for a network of its own.
    TrainingDivergedError
        If the loss becomes infinite; names column, class and step.
    """
    seeds = random_state.randint(np.iinfo(np.int32).max, size=5)
    n_classes = len(schema.classes)
    class_index = schema.class_index_of(frame)
    check_class_sizes(class_index, schema, settings)
    held_out = 0.0 if settings.contamination is not None else settings.calibration_fraction
    rng = np.random.default_rng(seeds[0])
    if stream is None:
        split = split_rows(class_index, n_classes, settings.validation_fraction, held_out, rng)
    else:
        split = split_sample(stream, class_index, schema, settings.validation_fraction, held_out, rng)
    encoder = Encoder.fit(schema, frame.iloc[split.training], likelihoods)
    encoded = encoder.encode(frame)
    engine = build_engine(encoder, encoded.take(split.training), settings, int(seeds[1]))
    training = _train(engine, encoder, encoded, split, settings, int(seeds[2]), on_epoch, stream)
    counts = np.bincount(class_index[class_index >= 0], minlength=n_classes)
    counts = counts if stream is None else stream.class_counts(schema)
    frequency = counts / counts.sum()
    model = FittedModel(encoder, engine, frequency)
    encoded = with_probable_class(model, encoded)
    fix_prior(engine, encoded.take(split.training), settings, int(seeds[3]))
    fix_part_weights(engine, encoded, split.validation, split.training)
    calibrated = calibrate(model, encoded, split, settings, np.random.default_rng(seeds[4]))
    return Fit(calibrated, training, split)


def with_probable_class(model: FittedModel, encoded: Encoded) -> Encoded:
    """Rows that training had without a class, under the one that q(c | x) finds most probable."""
    unlabelled = np.flatnonzero(encoded.class_index < 0)
    if not unlabelled.size:
        return encoded
    logits = model.engine.condition_logits(encoded.take(unlabelled))
    classes = encoded.class_index.copy()
    classes[unlabelled] = logits[:, : model.n_classes].argmax(axis=1)
    return encoded.of_class(classes)


def fix_prior(engine: ScoringEngine, encoded: Encoded, settings: FitSettings, seed: int) -> None:
    """Fit the mixture that scoring uses, or copy the one that training learned."""
    if engine.aggregate is None:
        return
    if settings.prior == "vamp":
        with torch.no_grad():
            learned = engine.model.vamp()
        engine.aggregate.log_weight.fill_(-np.log(learned.mean.shape[2]))
        engine.aggregate.mean.copy_(learned.mean)
        engine.aggregate.log_variance.copy_(learned.log_variance)
    else:
        fit_aggregate(engine, encoded, seed)


def calibrate(
    model: FittedModel, encoded: Encoded, split: Split, settings: FitSettings, rng: np.random.Generator
) -> FittedModel:
    """Thresholds from the rows held out for them; a float contamination uses all rows of fit.

    So do fewer held-out rows than the rate needs: no threshold could promise anything, and the asked share
    of all rows is a steadier one than the largest of a few.
    """
    if settings.contamination is not None:
        rows, described = encoded, "of fit"
    elif len(split.calibration) >= rows_needed(settings.false_alarm_rate):
        rows, described = encoded.take(split.calibration), HELD_OUT
    else:
        rows, described = encoded, "of fit (too few to hold enough out)"
    return model.calibrate(
        rows,
        false_alarm_rate=settings.false_alarm_rate,
        contamination=settings.contamination,
        rows=described,
        set_at=now(),
        set_by=who(),
        rng=rng,
        with_parts=settings.with_parts,
    )


def now() -> str:
    """The time of a calibration, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def who() -> str:
    """The user who sets thresholds; "unknown" where the system has no name for them."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return "unknown"


def check_class_sizes(class_index: IntArray, schema: Schema, settings: FitSettings) -> None:
    """One network per class needs a few rows of every class.

    Raises
    ------
    DataError
        Naming the smallest class and the remedy.
    """
    if settings.conditioning != "per_class":
        return
    counts = np.bincount(class_index[class_index >= 0], minlength=len(schema.classes))
    smallest = int(counts.argmin())
    if counts[smallest] < LEAST_ROWS_PER_NETWORK:
        raise DataError(
            f"class {schema.class_names[smallest]!r} has {counts[smallest]} row(s); a network of its own "
            f"needs at least {LEAST_ROWS_PER_NETWORK}: use conditioning='shared', or drop the class"
        )


def split_rows(
    class_index: IntArray, n_classes: int, validation: float, calibration: float, rng: np.random.Generator
) -> Split:
    """Split each class by the asked shares, rounded down; tiny classes give all their rows to training.

    Where some rows have no class, those that have one are few and all of them train.
    """
    parts: tuple[list[IntArray], list[IntArray], list[IntArray]] = ([], [], [])
    order = rng.permutation(len(class_index))
    partly = bool((class_index < 0).any())
    if partly:
        parts[0].append(order[class_index[order] >= 0])
    for k in [-1] if partly else range(n_classes):
        own = order[class_index[order] == k]
        n_calibration = min(int(calibration * len(own)), MAX_CALIBRATION_ROWS)
        n_validation = min(int(validation * len(own)), MAX_VALIDATION_ROWS)
        cuts = np.split(own, [n_calibration, n_calibration + n_validation])
        for part, rows in zip(parts, (cuts[2], cuts[1], cuts[0]), strict=True):
            part.append(rows)
    # Training draws by row number, so a fixed order keeps it reproducible; held-out rows stay shuffled.
    shuffled = [rng.permutation(np.concatenate(part)) for part in parts]
    return Split(*shuffled)


def split_sample(
    stream: RowStream, class_index: IntArray, schema: Schema, validation: float, calibration: float,
    rng: np.random.Generator,
) -> Split:  # fmt: skip
    """Split the sample of a stream as the stream splits all its rows; `split_rows` says how many are held out."""
    early, late = stream.held_out(stream.sample.positions, class_index, schema, validation, calibration)
    parts = [np.flatnonzero(~early & ~late)]
    for part, most in ((early, MAX_VALIDATION_ROWS), (late, MAX_CALIBRATION_ROWS)):
        chosen = rng.permutation(np.flatnonzero(part))
        own = [chosen[class_index[chosen] == k][:most] for k in range(-1, len(schema.classes))]
        parts.append(rng.permutation(np.concatenate(own)))
    return Split(*parts)


def build_engine(encoder: Encoder, encoded: Encoded, settings: FitSettings, seed: int) -> ScoringEngine:
    """An untrained bank in its engine, made for the training rows ``encoded``."""
    schema, per_class = encoder.schema, settings.conditioning == "per_class"
    n_classes = len(schema.classes)
    conditional = bool(schema.conditions) and not per_class
    table = class_conditions(schema) if conditional else None
    n_attributes = len(schema.attributes)
    width = 0 if table is None else table.shape[1] + len(schema.continuous_conditions) + n_attributes
    latent_dim = settings.latent_dim or min(max(encoder.n_cells, 1), MAX_AUTO_LATENT_DIM)
    n_members = settings.n_estimators * (n_classes if per_class else 1)
    n_groups = 1 if per_class else n_classes
    has_vamp = settings.prior == "vamp" and not settings.condition_on_observed
    n_pseudo = max(LEAST_VAMP_COMPONENTS, VAMP_COMPONENTS // n_groups) if has_vamp else 0
    starts_linear = _starts_linear(encoder, encoded, settings)
    architecture = Architecture(
        n_members=n_members,
        latent_dim=latent_dim,
        hidden_dims=settings.hidden_dims,
        n_conditions=width,
        missing_indicators=settings.training.mask_rate > 0.0 or not bool(encoded.observed.all()),
        learned_prior=settings.prior == "learned",
        scale_floor=settings.scale_floor,
        channels=settings.channels,
        observed_condition=settings.condition_on_observed,
        n_classes=n_classes if settings.inference_head and schema.categorical_conditions else 0,
        n_attributes=n_attributes if settings.inference_head else 0,
        pseudo_inputs=n_pseudo,
        linear_start=starts_linear,
        n_paths=linear_start.n_paths(schema) if starts_linear and not per_class else 0,
        n_groups=n_groups,
    )
    device, dtype = settings.device, settings.dtype
    model = CVAE(architecture, encoder.columns, seed).to(device=device, dtype=dtype)
    aggregate = None
    if has_vamp:
        aggregate = AggregatePosterior(n_members, n_groups, n_pseudo, latent_dim)
    elif settings.prior == "aggregate" and not settings.condition_on_observed:
        known = encoded.class_index[encoded.class_index >= 0]
        largest = len(encoded) if len(known) < len(encoded) else int(np.bincount(known, minlength=n_classes).max())
        aggregate = AggregatePosterior(n_members, n_groups, number_of_components(largest), latent_dim)
    # Values in units of a row's own class would tell the inference head that class.
    scaled = n_classes > 1 and bool(encoder.is_real.any()) and not settings.inference_head
    own = (dealt(each, settings.n_estimators) for each in (settings.training.kl_weight, settings.training.input_noise))
    unlike = any(len(set(numbers)) > 1 for numbers in own)
    weighed = settings.part_weights == "spread" or (settings.part_weights == "auto" and unlike)
    class_table = None if table is None else tensor(table, device, dtype)
    if class_table is not None:
        model.class_table = class_table
    return ScoringEngine(
        model=model,
        noise=tensor(low_discrepancy_normal(settings.n_samples, latent_dim, seed), device, dtype),
        n_classes=n_classes,
        class_table=class_table,
        members_per_class=settings.n_estimators if per_class else None,
        aggregate=None if aggregate is None else aggregate.to(device=device, dtype=dtype),
        scaling=ClassScaling.fit(encoded, n_classes, encoder.is_real) if scaled else None,
        unlike=unlike,
        part_weights=torch.ones(n_members, 2, dtype=dtype, device=device) / settings.n_estimators if weighed else None,
        precision=settings.precision,
    )


def _starts_linear(encoder: Encoder, encoded: Encoded, settings: FitSettings) -> bool:
    """Whether networks begin at factor analyses; not where some rows lack a class."""
    asked = settings.linear_start and bool(settings.hidden_dims) and not settings.condition_on_observed
    if not asked or bool((encoded.class_index < 0).any()):
        return False
    shared = settings.conditioning == "shared"
    return linear_start.suits(encoder, settings.prior) and (not shared or linear_start.n_paths(encoder.schema) > 0)


def _train(
    engine: ScoringEngine,
    encoder: Encoder,
    encoded: Encoded,
    split: Split,
    settings: FitSettings,
    seed: int,
    on_epoch: Callable[[Epoch], bool] | None,
    stream: RowStream | None,
) -> Training:
    names = [str(column.name) for column in encoder.columns for _ in range(column.width)]
    per_class = engine.members_per_class

    def describe(member: int, column: int) -> str:
        where = f"column {names[column]!r}" if column >= 0 else "the latent code"
        return where if per_class is None else f"{where}, class {encoder.schema.class_names[member // per_class]!r}"

    classes = engine.classes
    if classes is not None and settings.training.objective.takes_unlabelled:
        classes = Condition.of_classes(classes.vectors, coded=False)

    def to_device(some: Encoded) -> DeviceRows:
        may_miss = stream is not None
        scaling, dtype = engine.scaling, engine.noise.dtype
        return DeviceRows.of(some, classes, scaling, engine.device, dtype, may_miss=may_miss)

    if engine.model.architecture.linear_start:
        own = dealt(settings.training.input_noise, engine.model.architecture.n_members)
        linear_start.start(engine, encoded, split.training, np.array(own), seed)
    rows = to_device(encoded)
    with _refreshed(stream, encoder, encoded, rows, split.training, settings, to_device) as refresh:
        return train(
            engine.model,
            rows,
            _rows_of_members(engine, encoded, split.training, split.training),
            _rows_of_members(engine, encoded, split.validation, split.training),
            settings.training,
            generator=torch.Generator(engine.device).manual_seed(seed),
            validation_noise=engine.noise,
            on_epoch=on_epoch,
            describe=describe,
            refresh=refresh,
        )


@contextmanager
def _refreshed(
    stream: RowStream | None, encoder: Encoder, encoded: Encoded, rows: DeviceRows, slots: IntArray,
    settings: FitSettings, to_device: Callable[[Encoded], DeviceRows],
) -> Iterator[Callable[[int], None] | None]:  # fmt: skip
    """What brings new rows of the stream into the ``slots`` of ``rows`` before each step; None without a stream."""
    if stream is None:
        yield None
        return
    shares = (
        settings.validation_fraction,
        0.0 if settings.contamination is not None else settings.calibration_fraction,
    )

    def is_training(positions: IntArray, classes: IntArray) -> BoolArray:
        early, late = stream.held_out(positions, classes, encoder.schema, *shares)
        return ~early & ~late

    networks = len(encoder.schema.classes) if settings.conditioning == "per_class" else 1
    per_step, own = networks * settings.training.batch_size, encoded.class_index[slots]
    with stream.feed(encoder, rows, slots, own, per_step, to_device, is_training) as refresh:
        yield refresh


def _rows_of_members(
    engine: ScoringEngine, encoded: Encoded, chosen: IntArray, fallback: IntArray
) -> list[torch.Tensor]:
    """Row numbers per member; the fallback's where a member would have none."""
    if engine.members_per_class is None:
        own = _with_labelled_more_often(chosen if len(chosen) else fallback, encoded.class_index)
        groups = [own] * engine.model.architecture.n_members
    else:
        groups = []
        for k in range(engine.n_classes):
            own = chosen[encoded.class_index[chosen] == k]
            own = own if len(own) else fallback[encoded.class_index[fallback] == k]
            groups += [own] * engine.members_per_class
    return [torch.as_tensor(rows, device=engine.device) for rows in groups]


def _with_labelled_more_often(chosen: IntArray, class_index: IntArray) -> IntArray:
    """Row numbers, those with a class repeated until they are `LABELLED_SHARE` of all, where some have none."""
    labelled = chosen[class_index[chosen] >= 0]
    wanted = LABELLED_SHARE / (1.0 - LABELLED_SHARE) * (len(chosen) - len(labelled))
    if not len(labelled) or len(labelled) >= wanted:
        return chosen
    return np.concatenate([chosen, np.tile(labelled, int(wanted / len(labelled)) - 1)])


def fit_aggregate(engine: ScoringEngine, encoded: Encoded, seed: int) -> None:
    """Fit the aggregate posterior of every member and class to the training rows' posteriors."""
    assert engine.aggregate is not None
    for k in range(engine.n_classes):
        own = np.flatnonzero(encoded.class_index == k)
        rows = encoded.take(own[:MAX_FITTED_ROWS])
        if len(own) < ROWS_PER_COMPONENT:
            # A component of one or two rows would be those rows: such a class gets that of all rows.
            rows = encoded.take(np.arange(min(len(encoded), MAX_FITTED_ROWS)))
            rows = rows.of_class(np.full(len(rows), k, dtype=np.int64))
        chunks = list(engine.posteriors(rows))
        mean = torch.cat([posterior.mean for _, posterior in chunks], dim=1)
        log_variance = torch.cat([posterior.log_variance for _, posterior in chunks], dim=1)
        members = engine.members_of(k)
        for place, member in enumerate(range(members.start, members.stop)):
            posterior = DiagonalNormal(mean[place], log_variance[place])
            engine.aggregate.fit_group(member, chunks[0][0].group, posterior, seed, number_of_components(len(own)))
