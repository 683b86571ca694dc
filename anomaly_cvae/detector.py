"""`CVAEDetector`: the scikit-learn face of the bank."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from scipy.special import expit, softmax
from sklearn.base import BaseEstimator, OutlierMixin, TransformerMixin, clone
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from anomaly_cvae import bundle, explain, generation
from anomaly_cvae.calibration import HELD_OUT, Calibration, select_discoveries
from anomaly_cvae.encoding import LIKELIHOODS_OF_KIND, LIKELIHOODS_OF_PIXELS, Encoded
from anomaly_cvae.errors import ConditionError, DataError, ParameterError
from anomaly_cvae.fitted import FittedModel, ScoreKind, require_contrast
from anomaly_cvae.fitting import FitSettings, Split, fit_model, now, who
from anomaly_cvae.frames import BoolArray, FloatArray, IntArray, is_table, level_cells, to_frame
from anomaly_cvae.inputs import (
    Layout,
    condition_frame,
    feature_frame,
    fill,
    given_cells,
    nearest,
    resolve_keys,
    resolve_names,
    shortened,
    with_ignored,
    with_missing,
)
from anomaly_cvae.objectives import objective
from anomaly_cvae.parameters import CHOICES, check_parameters
from anomaly_cvae.progress import CallbackSupportMixin, EpochReporter, with_callbacks
from anomaly_cvae.schema import (
    Column,
    Condition,
    Name,
    Schema,
    as_attributes,
    infer_column,
    infer_condition,
    observed_classes,
)
from anomaly_cvae.scoring import resolve_device
from anomaly_cvae.training import Training, TrainingSettings

FLAGGED = -np.finfo(np.float64).tiny
"""Largest decision of a row that policy, not its score, makes an anomaly."""


MOST_FAULTS = 20
UNKNOWN_CLASS = "(unknown class)"
"""Where rows of a class not seen in training, or with a missing condition, are grouped."""


class CVAEDetector(CallbackSupportMixin, TransformerMixin, OutlierMixin, BaseEstimator):
    """Find rows that are unlikely given their condition.

    A bank of conditional variational autoencoders models p(x | c). A row's score is its negative ELBO in
    nats, in expectation an upper bound of -log p(x | c) in the units of x; thresholds are set per class of
    the condition on normals that training has not seen.

    Every method that takes ``X`` takes a pandas frame, an Arrow table, a 2-D array of N rows, or an array
    of images (N, H, W), (N, H, W, C) or (N, C, H, W), and ``condition`` (N,) or (N, Q) if, and only if,
    `fit` was given one. NaN marks a missing cell. Cells of a frame may be images, too: arrays, or JPEG or
    PNG bytes; a masked array (`numpy.ma`) hides pixels.

    Parameters
    ----------
    condition_columns : names or positions of the columns of X that are the condition; None: unconditional
    conditioning : "shared" (every network is told c) or "per_class" (one network per class)
    unseen_class : a class not seen in training: "raise", "anomaly" (flagged, scored marginally), "marginal"
    missing_condition : a missing condition: "raise", or "marginal" to score by sum_c p(c) p(x | c)
    score_kind : what `score_samples` and `predict` use: "elbo", "contrast" (is the condition wrong?), "both",
        or "parts" (the parts of the negative ELBO kept apart: is it another kind of data altogether?)
    contamination : "auto": thresholds hold ``false_alarm_rate`` on held-out normals; a float in (0, 0.5]:
        that share of the rows of `fit` is flagged, as elsewhere in scikit-learn
    false_alarm_rate : share of normals, per class, that may be flagged
    n_estimators : networks per class (or in all, when shared); scores are their mean
    latent_dim : width of z; "auto": as many as columns, at most 32
    hidden_dims : widths of the encoder's hidden layers; the decoder mirrors them
    likelihoods : "auto", or {column: "robust_normal" | "normal" | "student_t" | "poisson" | …}
    column_kinds : {column: "real" | "binary" | "categorical" | "count" | "pixel"}, and for conditions
        "categorical" | "continuous" | "attribute", where the inferred kind (see ``schema_.report()``) is not
        right; attributes are two-valued and span no classes
    ignore_columns : columns of X that are neither x nor condition
    channels : of the convolutions on images, one per halving of height and width
    condition_on_observed : learn p(hidden | observed, c) for random observed parts of the row: missing cells
        are then drawn from what the others say, and ``given=`` may be passed; p(z) is learned
    inference_head : learn q(c | x) as well, which `condition_proba` offers as ``method="head"``
    prior : "aggregate" (at scoring time, the mixture that each class's training posteriors form),
        "standard" N(0, I), "learned" p(z | c), or "vamp" (a mixture of learned pseudo-inputs' posteriors)
    objective : "elbo"; "iwae" (``train_samples`` importance samples); "semi_supervised" (rows may lack their
        condition); "hybrid" (with ``condition_on_observed``); "vae_gan" (images, judged by a discriminator)
    train_samples : samples of z per row and training step
    kl_weight : weight of the KL in training; scores always use 1
    free_bits : nats of KL per latent unit that cost nothing in training
    input_noise : standard deviation of training noise on real columns, in units of the column's own
    mask_rate : share of training rows with a random part of their cells hidden
    mask_shapes : what of an image is hidden: "quadrants", scattered "cells", or "mixed" (boxes, too)
    scale_floor : least standard deviation of a normal or Student-t head, in units of the column's own
    n_samples : fixed points of z per row at scoring time
    max_steps, batch_size, learning_rate, patience : optimiser steps, rows per network and step, peak of
        AdamW's rate, epochs without a better held-out loss before training stops
    validation_fraction, calibration_fraction : shares of each class kept for early stopping, and for
        thresholds and nothing else
    checkpoint : file to note progress in, and to continue an interrupted fit of the same rows from
    device : "auto", "cpu", "cuda", "mps"
    dtype : "float32" or "float64"
    random_state : int, RandomState or None; the only source of randomness
    verbose : 0 silent, 1 progress bar, 2 a line per epoch

    Attributes
    ----------
    model_ : FittedModel, the bank with its encoder and calibration
    schema_ : Schema, what every column was taken for
    history_ : DataFrame, one row per epoch (losses in nats per row, seconds since the start)
    thresholds_ : DataFrame by class: threshold, calibration rows, guarantee, rule, time, who set it
    offset_ : float, minus the pooled threshold
    n_features_in_, feature_names_in_ : as in scikit-learn
    """

    model_: FittedModel

    def __init__(
        self,
        condition_columns: Sequence[Name] | Name | None = None,
        *,
        conditioning: str = "shared",
        unseen_class: str = "raise",
        missing_condition: str = "raise",
        score_kind: str = "elbo",
        contamination: float | str = "auto",
        false_alarm_rate: float = 0.01,
        n_estimators: int = 2,
        latent_dim: int | str = "auto",
        hidden_dims: Sequence[int] = (256, 256),
        likelihoods: str | Mapping[Name, str] = "auto",
        column_kinds: Mapping[Name, str] | None = None,
        ignore_columns: Sequence[Name] | Name | None = None,
        channels: Sequence[int] = (32, 64),
        condition_on_observed: bool = False,
        inference_head: bool = False,
        prior: str = "aggregate",
        objective: str = "elbo",
        train_samples: int = 1,
        kl_weight: float = 1.0,
        free_bits: float = 0.0,
        input_noise: float = 0.1,
        mask_rate: float = 0.2,
        mask_shapes: str = "mixed",
        scale_floor: float = 0.08,
        n_samples: int = 4,
        max_steps: int = 2000,
        batch_size: int = 256,
        learning_rate: float = 2e-3,
        patience: int = 10,
        validation_fraction: float = 0.1,
        calibration_fraction: float = 0.2,
        checkpoint: str | Path | None = None,
        device: str = "auto",
        dtype: str = "float32",
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.condition_columns = condition_columns
        self.conditioning = conditioning
        self.unseen_class = unseen_class
        self.missing_condition = missing_condition
        self.score_kind = score_kind
        self.contamination = contamination
        self.false_alarm_rate = false_alarm_rate
        self.n_estimators = n_estimators
        self.latent_dim = latent_dim
        self.hidden_dims = hidden_dims
        self.likelihoods = likelihoods
        self.column_kinds = column_kinds
        self.ignore_columns = ignore_columns
        self.channels = channels
        self.condition_on_observed = condition_on_observed
        self.inference_head = inference_head
        self.prior = prior
        self.objective = objective
        self.train_samples = train_samples
        self.kl_weight = kl_weight
        self.free_bits = free_bits
        self.input_noise = input_noise
        self.mask_rate = mask_rate
        self.mask_shapes = mask_shapes
        self.scale_floor = scale_floor
        self.n_samples = n_samples
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.calibration_fraction = calibration_fraction
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        self.random_state = random_state
        self.verbose = verbose

    # ------------------------------------------------------------------ training

    @with_callbacks
    def fit(self, X: Any, y: Any = None, *, condition: Any = None) -> Self:
        """Train and calibrate on normal rows (N, D); ``y`` is ignored.

        Ctrl-C ends the training early and keeps the best weights so far.

        Raises
        ------
        DataError, ConditionError, ParameterError
            Saying which column, row or parameter is wrong and what to do.
        TrainingDivergedError
            If the loss becomes infinite; names column and step.
        """
        check_parameters(self)
        features = feature_frame(self, X, reset=True)
        self.layout_, frame = self._read_layout(X, features, condition)
        self.schema_, likelihoods = self._infer_schema(features, frame)
        settings, random_state = self._fit_settings(), check_random_state(self.random_state)
        with EpochReporter(self, X, y, max_steps=self.max_steps, verbose=self.verbose) as reporter:
            fit = fit_model(self.schema_, frame, likelihoods, settings, random_state, reporter)
        self.model_ = fit.model
        self.history_ = self._history(fit.training)
        self.split_: Split = fit.split
        self._n_features_out = fit.model.engine.noise.shape[1]
        if fit.training.stopped_by == "interrupt":
            warnings.warn(
                f"training was interrupted at step {len(fit.training.epochs) and fit.training.epochs[-1].step}; "
                "the best weights so far were kept and calibrated",
                stacklevel=2,
            )
        return self

    def infer_schema(self, X: Any, *, condition: Any = None) -> Schema:
        """What `fit` would take the columns and conditions of ``X`` for; nothing is trained or stored.

        Raises
        ------
        DataError, ConditionError, ParameterError
            As `fit` does.
        """
        check_parameters(self)
        fresh = clone(self)
        features = feature_frame(fresh, X, reset=True)
        fresh.layout_, frame = fresh._read_layout(X, features, condition)
        schema: Schema = fresh._infer_schema(features, frame)[0]
        return schema

    def _read_layout(self, X: Any, features: pd.DataFrame, condition: Any) -> tuple[Layout, pd.DataFrame]:
        in_x = resolve_names(self.condition_columns, features, "condition_columns")
        ignored = resolve_names(self.ignore_columns, features, "ignore_columns")
        both = sorted(map(str, set(in_x) & set(ignored)))
        if both:
            raise ParameterError(f"{both} stand in condition_columns and in ignore_columns; keep one")
        frame, passed = features, tuple[Name, ...]()
        if condition is not None:
            extra = condition_frame(condition, len(features), features.columns)
            passed = tuple(extra.columns)
            frame = pd.concat([features, extra.set_axis(features.index)], axis=1)
        layout = Layout(tuple(features.columns), in_x, passed, ignored, is_table(X))
        return layout, frame

    def _infer_schema(self, features: pd.DataFrame, frame: pd.DataFrame) -> tuple[Schema, dict[Name, str]]:
        layout = self.layout_
        kinds = resolve_keys(self.column_kinds, frame, "column_kinds")
        likelihoods = resolve_keys(self.likelihoods, frame, "likelihoods")
        outside = {*layout.condition_columns, *layout.ignored}
        names = [name for name in features.columns if name not in outside]
        if explain.KL in names:
            raise DataError(f"a column of x is called {explain.KL!r}, as the KL in explain is; rename the column")
        if not names:
            raise ParameterError(
                f"no column is left for x: X has n_features = {features.shape[1]}, all of them conditions or ignored"
            )
        may_miss = self.objective == "semi_supervised"
        conditions = as_attributes(
            [infer_condition(frame[name], name, kinds.get(name), may_miss) for name in layout.conditions], kinds
        )
        self._check_objective(conditions)
        columns = self._infer_columns(frame, names, kinds)
        for column in columns:
            head = likelihoods.get(column.name)
            fitting = LIKELIHOODS_OF_KIND[column.kind]
            what = f"a {column.kind} column"
            if column.image is not None:
                fitting, what = LIKELIHOODS_OF_PIXELS[column.image.pixels], f"an image of {column.image.pixels} pixels"
            if head is not None and head not in fitting:
                raise ParameterError(
                    f"likelihoods[{column.name!r}] is {head!r}, but {what} goes with "
                    f"{' or '.join(fitting)}; set column_kinds to change its kind"
                )
        if self.conditioning == "per_class" and any(c.kind != "categorical" for c in conditions):
            name, kind = next((c.name, c.kind) for c in conditions if c.kind != "categorical")
            what = "an attribute" if kind == "attribute" else kind
            raise ParameterError(
                f"condition {name!r} is {what} and has no classes: use conditioning='shared', or "
                f"column_kinds={{{name!r}: 'categorical'}}"
            )
        cells = [level_cells(frame[c.name], c.name) for c in conditions if c.kind == "categorical"]
        schema = Schema(columns, conditions, observed_classes(cells, layout.conditions), layout.ignored)
        if self.score_kind in ("contrast", "both"):
            require_contrast(schema)
        return schema, likelihoods

    def _check_objective(self, conditions: Sequence[Condition]) -> None:
        """Raise unless the conditions are what the objective and the inference head need."""
        if self.objective == "semi_supervised" and [c.kind for c in conditions] != ["categorical"]:
            raise ParameterError(
                "objective='semi_supervised' infers one categorical condition where it is missing; there "
                f"{'are' if len(conditions) != 1 else 'is'} {[f'{c.name} ({c.kind})' for c in conditions] or 'none'}"
            )
        if self.inference_head and not any(c.kind != "continuous" for c in conditions):
            raise ParameterError("inference_head=True infers the condition: it needs a categorical one or attributes")
        if self.prior == "vamp" and any(c.kind != "categorical" for c in conditions):
            raise ParameterError("prior='vamp' has pseudo-inputs per class: conditions must be categorical")

    def _infer_columns(
        self, frame: pd.DataFrame, names: Sequence[Name], kinds: Mapping[Name, str]
    ) -> tuple[Column, ...]:
        """Every column, or what is wrong with each of those that cannot be used, all at once."""
        columns, faults = list[Column](), list[DataError]()
        for name in names:
            try:
                columns.append(infer_column(frame[name], name, kinds.get(name)))
            except DataError as fault:
                faults.append(fault)
        if len(faults) == 1:
            raise faults[0]
        if faults:
            shown = "\n".join(f"- {fault}" for fault in faults[:MOST_FAULTS])
            more = f"\n- and {len(faults) - MOST_FAULTS} more" if len(faults) > MOST_FAULTS else ""
            raise DataError(f"{len(faults)} columns cannot be used as they are:\n{shown}{more}")
        return tuple(columns)

    def _fit_settings(self) -> FitSettings:
        dtype = getattr(torch, self.dtype)
        training = TrainingSettings(
            max_steps=self.max_steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            objective=objective(self.objective, self.train_samples, self.free_bits),
            kl_weight=self.kl_weight,
            input_noise=self.input_noise,
            mask_rate=self.mask_rate,
            mask_shapes=self.mask_shapes,  # type: ignore[arg-type]  # checked by check_parameters
            patience=self.patience,
            checkpoint=None if self.checkpoint is None else Path(self.checkpoint),
        )
        return FitSettings(
            conditioning=self.conditioning,  # type: ignore[arg-type]  # checked by check_parameters
            n_estimators=self.n_estimators,
            latent_dim=None if isinstance(self.latent_dim, str) else self.latent_dim,
            hidden_dims=tuple(self.hidden_dims),
            prior=self.prior,  # type: ignore[arg-type]  # checked by check_parameters
            n_samples=self.n_samples,
            scale_floor=self.scale_floor,
            false_alarm_rate=self.false_alarm_rate,
            contamination=None if isinstance(self.contamination, str) else float(self.contamination),
            validation_fraction=self.validation_fraction,
            calibration_fraction=self.calibration_fraction,
            device=resolve_device(self.device, dtype),
            dtype=dtype,
            training=training,
            channels=tuple(self.channels),
            inference_head=self.inference_head or self.objective == "semi_supervised",
            condition_on_observed=self.condition_on_observed,
            with_parts=self.score_kind == "parts",
        )

    def _history(self, training: Training) -> pd.DataFrame:
        lines = [
            {
                "epoch": e.epoch,
                "step": e.step,
                "train_negative_elbo": e.train_negative_elbo,
                "validation_negative_elbo": e.validation_negative_elbo,
                "learning_rate": e.learning_rate,
                "kl_weight": e.kl_weight,
                "improved_members": e.improved_members,
                "seconds": e.seconds,
            }
            for e in training.epochs
        ]
        history = pd.DataFrame(lines)
        history.attrs["stopped_by"] = training.stopped_by
        return history

    # ------------------------------------------------------------------ scores

    def score_samples(self, X: Any, *, condition: Any = None) -> FloatArray:
        """Minus the detector's score, (N,): higher = more normal."""
        encoded = self._encode(X, condition)
        return -self.model_.scores(encoded, self._kind())

    def negative_elbo(self, X: Any, *, condition: Any = None, given: Any = None) -> FloatArray:
        """Negative ELBO of each row, (N,), nats: higher = more anomalous.

        ``given`` says which cells belong to the condition: the score is then that of the others given
        these, 0 if all are given. Booleans like X, or {column: booleans}; needs ``condition_on_observed``.
        """
        return self.model_.scores(self._encode(X, condition, given), "elbo")

    def negative_log_likelihood(
        self, X: Any, *, condition: Any = None, given: Any = None, n_samples: int = 100
    ) -> FloatArray:
        """-log p(x | c) of each row by importance sampling from q(z | x, c), (N,), nats.

        In expectation it lies between -log p(x | c) and the negative ELBO, nearer to the first with more
        samples (Burda, Grosse and Salakhutdinov 2016). ``given`` as in `negative_elbo`.
        """
        if n_samples < 1:
            raise ParameterError(f"n_samples must be a whole number from 1 up, not {n_samples}")
        encoded = self._with_class(self._encode(X, condition, given))
        return self.model_.engine.negative_log_likelihood(encoded, n_samples)

    def contrast(self, X: Any, *, condition: Any = None) -> FloatArray:
        """Negative ELBO under the claimed class less the marginal one, (N,), nats.

        It equals log p(c) - log p(c | x): high when another class explains the row better. 0 for a row
        of unknown class.

        Raises
        ------
        ConditionError
            Without a categorical condition of at least two classes.
        """
        return self.model_.scores(self._encode(X, condition), "contrast")

    def decision_function(self, X: Any, *, condition: Any = None) -> FloatArray:
        """`score_samples` plus the threshold of the row's class, (N,): negative for anomalies.

        A row with missing cells has a threshold of its own: that of normals missing as many cells.
        """
        encoded = self._encode(X, condition)
        return self._decisions(encoded, self.model_.scores(encoded, self._kind()))

    def predict(self, X: Any, *, condition: Any = None) -> IntArray:
        """+1 for normal rows, -1 for anomalies, (N,)."""
        normal = self.decision_function(X, condition=condition) >= 0
        return np.where(normal, np.int64(1), np.int64(-1))

    def fit_predict(self, X: Any, y: Any = None, *, condition: Any = None) -> IntArray:
        """`fit` and `predict` on the same rows."""
        self.fit(X, y, condition=condition)
        return self.predict(X, condition=condition)

    def p_values(self, X: Any, *, condition: Any = None) -> FloatArray:
        """Conformal p-value of each row among its class's held-out normals, (N,).

        A row of a class not seen in training, under ``unseen_class="anomaly"``, has the least one.
        """
        encoded = self._encode(X, condition)
        return self._p_values(encoded, self.model_.scores(encoded, self._kind()))

    def score_table(
        self, X: Any, *, condition: Any = None, contrast: bool = False, top_column: bool = False
    ) -> pd.DataFrame:
        """Everything that a scored row carries, in one pass: one line per row of X.

        Columns: ``condition`` (class name), ``negative_elbo`` (nats), ``score``, ``threshold``, ``p_value``,
        ``is_anomaly``; on request ``contrast`` (nats), ``top_column`` (the one furthest above what it costs a
        normal row; "kl" where it is the combination) and ``top_nats`` (by how much).
        """
        encoded = self._encode(X, condition)
        kind: ScoreKind = self._kind()
        scores = self.model_.scores_of_kinds(encoded, {"elbo", kind, *(("contrast",) if contrast else ())})
        decisions = self._decisions(encoded, scores[kind])
        names = np.array([*self.schema_.class_names, None], dtype=object)
        table = pd.DataFrame(
            {
                "condition": self._class_labels(X, condition, encoded, names),
                "negative_elbo": scores["elbo"],
                "score": scores[kind],
                "threshold": self._thresholds(encoded),
                "p_value": self._p_values(encoded, scores[kind]),
                "is_anomaly": decisions < 0,
            },
            index=self._index(X),
        )
        if contrast:
            table["contrast"] = scores["contrast"]
        if top_column:
            excess = explain.excess_nats(self.model_, encoded, explain.column_scores(self.model_, encoded))
            top, parts = excess.argmax(axis=1), explain.parts(self.model_)
            table["top_column"] = [parts[d] for d in top]
            table["top_nats"] = excess[np.arange(len(top)), top]
        return table

    def select(self, X: Any, *, condition: Any = None, false_discovery_rate: float = 0.1) -> BoolArray:
        """Rows to report, (N,), so that at most this share of them is expected to be normal (Benjamini-Hochberg)."""
        if not 0.0 < false_discovery_rate < 1.0:
            raise ParameterError(f"false_discovery_rate must lie in (0, 1), not {false_discovery_rate}")
        return select_discoveries(self.p_values(X, condition=condition), false_discovery_rate)

    def calibrated_score(self, X: Any, *, condition: Any = None) -> FloatArray:
        """Negative ELBO on its class's scale of held-out normals (median 0, 0.9 quantile 1), (N,).

        Ranks rows across classes of unequal spread; higher = more anomalous.
        """
        encoded = self._encode(X, condition)
        groups = self.model_.groups(encoded)
        reference = self._calibration().references["elbo"]
        return reference.calibrated(self.model_.scores(encoded, "elbo"), groups, encoded.observed)

    # ------------------------------------------------------------------ explanation and generation

    def explain(self, X: Any, *, condition: Any = None) -> pd.DataFrame:
        """Nats per column and of the KL, (N, D + 1); rows sum to `negative_elbo`."""
        parts = explain.column_scores(self.model_, self._encode(X, condition))
        frame = pd.DataFrame(parts.columns, columns=self.schema_.names, index=self._index(X))
        frame[explain.KL] = parts.kl
        return frame

    def top_columns(self, X: Any, *, condition: Any = None, n: int = 3) -> pd.DataFrame:
        """The ``n`` most surprising columns of each row: nats, value observed, value and 90 % range expected.

        Ranked by ``excess_nats``, nats above what the column costs a normal row of the class. "kl" stands
        for the combination: what no column alone is to blame for.
        The expectation is made from the rest of the row: the cells in question are hidden from it.
        """
        encoded, frame = self._encode(X, condition), self._frame(X, condition)
        n = min(n, len(self.schema_.columns) + 1)
        return explain.top_columns(self.model_, encoded, frame, n, seed=0)

    def class_negative_elbo(self, X: Any, *, condition: Any = None) -> pd.DataFrame:
        """Negative ELBO of each row under every class, (N, K), nats: the least is where it would be most normal.

        Raises
        ------
        ConditionError
            Without a categorical condition of at least two classes.
        """
        check_is_fitted(self)
        require_contrast(self.schema_)
        nats = self.model_.engine.class_negative_elbo(self._encode(X, condition))
        return pd.DataFrame(nats, columns=self.schema_.class_names, index=self._index(X))

    def alarm_columns(self, X: Any, *, condition: Any = None) -> pd.DataFrame:
        """Which columns, or the KL, drive the alarms among the rows of X: one line per class with alarms and column.

        ``alarms`` counts the class's flagged rows, ``top`` those in which the column is the most surprising
        one, and ``excess_nats`` is the mean over them of its nats above what it costs a normal row.
        """
        encoded = self._encode(X, condition)
        decisions = self._decisions(encoded, self.model_.scores(encoded, self._kind()))
        flagged = np.flatnonzero(decisions < 0)
        names = np.array([*self.schema_.class_names, UNKNOWN_CLASS], dtype=object)
        alarms = encoded.take(flagged)
        return explain.alarm_columns(self.model_, alarms, names[self.model_.groups(alarms)])

    def explain_pixels(self, X: Any, *, condition: Any = None, column: Name | None = None) -> FloatArray:
        """Nats of every pixel of an image column, (N, …) like the images, colours added up: a heat map.

        Their sum is the column's nats in `explain`. ``column`` may be left out where there is one of images.

        Raises
        ------
        DataError
            If the column holds no images.
        """
        encoded = self._with_class(self._encode(X, condition))
        names = [c.name for c in self.schema_.images]
        if column is None and len(names) == 1:
            column = names[0]
        if column not in names:
            raise DataError(f"explain_pixels: {column!r} is no column of images; there are {names or 'none'}")
        return explain.pixels(self.model_, encoded, column)

    def sample(
        self, n: int, *, condition: Any = None, random_state: Any = None, noise: bool = True, same_z: bool = False
    ) -> Any:
        """Draw ``n`` rows of p(x | c), like X.

        ``condition`` is one class for all rows, or one per row; None draws classes as often as they
        occurred in training. Without ``noise`` cells are what p(x | z, c) expects, not draws of it: images
        without grain. ``same_z`` gives the i-th row of every class the same z from N(0, I): the same style.
        """
        check_is_fitted(self)
        seed = int(check_random_state(random_state).randint(np.iinfo(np.int32).max))
        conditions = self._conditions_to_sample(n, condition, seed)
        classes, continuous = self._encode_conditions(conditions)
        generator = self.model_.engine.generator(seed)
        values = generation.sample(self.model_, classes, continuous, generator, noise=noise, same_z=same_z)
        return self._like_x(self.model_.encoder.decode(values, drawn=noise), conditions)

    def reconstruct(self, X: Any, *, condition: Any = None) -> Any:
        """What the model expects of every cell after seeing the row, like X without ignored columns."""
        encoded, frame = self._encode(X, condition), self._frame(X, condition)
        values = self.model_.engine.expected(self._with_class(encoded))
        return self._like_x(self.model_.encoder.decode(values, frame.index), frame)

    def impute(self, X: Any, *, condition: Any = None) -> Any:
        """X, without ignored columns, with missing cells replaced by what the observed ones let expect."""
        encoded, frame = self._encode(X, condition), self._frame(X, condition)
        expected = self.model_.encoder.decode(generation.impute(self.model_, self._with_class(encoded)), frame.index)
        images = {column.name for column in self.schema_.images}
        filled = {n: expected[n] if n in images else fill(frame[n], expected[n]) for n in self.schema_.names}
        return self._like_x(pd.DataFrame(filled, index=frame.index), frame)

    def impute_draws(
        self, X: Any, n: int, *, condition: Any = None, random_state: Any = None, noise: bool = True
    ) -> Any:
        """X with its missing cells drawn ``n`` times given the observed ones (multiple imputation), like X.

        N * n rows: the n completions of the first row, then those of the second, and so on. ``noise`` as in
        `sample`.
        """
        encoded, frame = self._encode(X, condition), self._frame(X, condition)
        seed = int(check_random_state(random_state).randint(np.iinfo(np.int32).max))
        generator = self.model_.engine.generator(seed)
        drawn = generation.impute_draws(self.model_, self._with_class(encoded), n, generator, noise=noise)
        repeated = frame.loc[frame.index.repeat(n)] if frame.index.is_unique else frame.iloc[_repeat(len(frame), n)]
        values = drawn.transpose(1, 0, 2).reshape(len(frame) * n, -1)
        return self._like_x(self.model_.encoder.decode(values, repeated.index, drawn=noise), repeated)

    def impute_intervals(
        self, X: Any, *, condition: Any = None, coverage: float = 0.9, n_draws: int = 200, random_state: Any = None
    ) -> pd.DataFrame:
        """Where each missing number lies: one line per missing cell with ``expected``, ``low`` and ``high``.

        The central ``coverage`` of draws given the observed cells. Of an image with hidden pixels the three
        are images; of a column with levels, low and high are missing.
        """
        if not 0.0 < coverage < 1.0:
            raise ParameterError(f"coverage must lie in (0, 1), not {coverage}")
        encoded, frame = self._with_class(self._encode(X, condition)), self._frame(X, condition)
        seed = int(check_random_state(random_state).randint(np.iinfo(np.int32).max))
        return explain.intervals(self.model_, encoded, frame.index, coverage, n_draws, seed)

    def edit(self, X: Any, condition_from: Any = None, condition_to: Any = None, *, keep_detail: bool = False) -> Any:
        """The rows of X as they would be under another condition, their style z kept: like X.

        ``condition_from`` is what X is now, where `fit` was given ``condition=`` (else its own columns say
        so); ``condition_to`` is one condition for all rows, one per row, or a dict {condition: value} of
        those to change. ``keep_detail`` puts back what the reconstruction lacks of each row.

        Raises
        ------
        ConditionError
            Without a condition, for an unknown one, or in a bank of one network per class, whose latent
            spaces have nothing to do with each other.
        """
        check_is_fitted(self)
        if not self.schema_.conditions:
            raise ConditionError("edit changes the condition, and this detector has none")
        if self.model_.engine.members_per_class is not None:
            raise ConditionError(
                "edit keeps z and changes the condition: networks of one class each share no z; fit with "
                "conditioning='shared'"
            )
        encoded, frame = self._with_class(self._encode(X, condition_from)), self._frame(X, condition_from)
        if condition_to is None:
            raise ConditionError(f"edit needs condition_to: values of {[str(c.name) for c in self.schema_.conditions]}")
        wanted = self._conditions_to_have(condition_to, frame)
        classes, continuous = self._encode_conditions(wanted)
        target = encoded.of_class(classes).with_continuous(continuous)
        values = generation.change_condition(self.model_, encoded, target, keep_detail=keep_detail)
        return self._like_x(self.model_.encoder.decode(values, frame.index), wanted.set_axis(frame.index))

    def interpolate(self, X_from: Any, X_to: Any, n: int = 8, *, condition: Any = None) -> Any:
        """``n`` rows on the way from each row of X_from to that of X_to, through the latent space: like X.

        N * n rows, path after path, both ends (as reconstructed) included. The two must have the same
        conditions: change one by `edit` first.
        """
        start, end = (self._with_class(self._encode(X, condition)) for X in (X_from, X_to))
        if len(start) != len(end):
            raise DataError(f"X_from has {len(start)} rows and X_to has {len(end)}: interpolate pairs them")
        alike = (start.class_index == end.class_index) & (start.continuous == end.continuous).all(axis=1)
        if not alike.all():
            raise ConditionError(
                f"row {int(np.flatnonzero(~alike)[0])} has one condition in X_from and another in X_to; use edit to "
                "bring one to the other's"
            )
        frame, repeated = self._frame(X_from, condition), _repeat(len(start), n)
        engine = self.model_.engine
        z = generation.path(engine.posterior_mean(start), engine.posterior_mean(end), n)
        values = generation.decode(self.model_, z, start.take(repeated))
        rows = frame.iloc[repeated]
        return self._like_x(self.model_.encoder.decode(values, rows.index), rows)

    def latent_map(self, n: int = 15, *, condition: Any = None, span: float = 3.0) -> Any:
        """What the model expects at ``n`` x ``n`` points of a 2-D latent space, within ``span`` of 0: like X.

        The first latent unit runs down, the second across. ``condition`` is one class.

        Raises
        ------
        ParameterError
            If the latent space has not two units.
        """
        check_is_fitted(self)
        if self._n_features_out != 2:
            raise ParameterError(f"latent_map draws a plane: fit with latent_dim=2, not {self._n_features_out}")
        z = generation.latent_grid(n, span)
        conditions = self._conditions_to_sample(len(z), condition, seed=0)
        if condition is None and len(self.schema_.classes) > 1:
            raise ConditionError(f"latent_map needs condition=, one of {shortened(self.schema_.class_names)}")
        classes, continuous = self._encode_conditions(conditions)
        empty = np.zeros((len(z), 0))
        under = Encoded(empty, np.zeros(empty.shape, dtype=np.bool_), classes, continuous)
        return self._like_x(self.model_.encoder.decode(generation.decode(self.model_, z, under)), conditions)

    def condition_proba(self, X: Any, *, method: str = "elbo", n_samples: int = 100) -> pd.DataFrame:
        """p(c | x) of each row and class, (N, K); condition columns of X, if there, are not looked at.

        Parameters
        ----------
        method : "elbo" and "iwae" weigh the class-wise likelihoods, by their bounds, with p(c); "head" asks the
            inference head q(c | x), which also tells attributes: one column each, the probability of its
            second value
        n_samples : importance samples of "iwae"

        Raises
        ------
        ConditionError, ParameterError
            Without classes; if the model has no inference head.
        """
        check_is_fitted(self)
        if method not in ("elbo", "iwae", "head"):
            raise ParameterError(f"method must be one of 'elbo', 'iwae', 'head', not {method!r}")
        features = self._features(X, need_condition=False)
        encoded = self.model_.encoder.encode(features, with_condition=False)
        if method == "head":
            return self._condition_by_head(encoded, self._index(X))
        require_contrast(self.schema_)
        probabilities = self.model_.class_probabilities(encoded, n_samples if method == "iwae" else None)
        return pd.DataFrame(probabilities, columns=self.schema_.class_names, index=self._index(X))

    def _condition_by_head(self, encoded: Encoded, index: pd.Index | None) -> pd.DataFrame:
        architecture = self.model_.engine.model.architecture
        if not architecture.n_classes + architecture.n_attributes:
            raise ParameterError("this detector has no inference head q(c | x): fit with inference_head=True")
        logits = self.model_.engine.condition_logits(encoded)
        classes, attributes = logits[:, : architecture.n_classes], logits[:, architecture.n_classes :]
        names = [*self.schema_.class_names][: architecture.n_classes] + [c.name for c in self.schema_.attributes]
        classes = softmax(classes, axis=1) if classes.shape[1] else classes
        probabilities = np.column_stack([classes, expit(attributes)])
        return pd.DataFrame(probabilities, columns=names, index=index)

    def transform(self, X: Any, *, condition: Any = None) -> FloatArray:
        """Posterior mean of z under the first network of each row's class, (N, Z)."""
        encoded = self._encode(X, condition)
        return self.model_.engine.posterior_mean(self._with_class(encoded))

    def fit_transform(self, X: Any, y: Any = None, *, condition: Any = None) -> Any:
        """`fit` and `transform` on the same rows."""
        return self.fit(X, y, condition=condition).transform(X, condition=condition)

    def get_feature_names_out(self, input_features: Any = None) -> npt.NDArray[np.object_]:
        """Names of the latent coordinates."""
        check_is_fitted(self)
        return np.array([f"cvaedetector{i}" for i in range(self._n_features_out)], dtype=object)

    # ------------------------------------------------------------------ thresholds

    def recalibrate(self, X: Any = None, *, condition: Any = None, false_alarm_rate: float | None = None) -> Self:
        """Set thresholds anew without training.

        With ``X``, normals that neither training nor early stopping used, reference scores are made from
        them; without, the stored ones serve and only the rate changes.
        """
        calibration = self._calibration()
        rate = calibration.false_alarm_rate if false_alarm_rate is None else false_alarm_rate
        if not 0.0 < rate < 1.0:
            raise ParameterError(f"false_alarm_rate must lie in (0, 1), not {rate}")
        if X is None:
            changed = replace(calibration, false_alarm_rate=rate, contamination=None, set_at=now(), set_by=who())
            self.model_ = replace(self.model_, calibration=changed)
            self._warn_of_empty_promises()
            return self
        encoded = self._encode(X, condition)
        if not len(encoded):
            raise DataError("X has no rows; recalibrate on the rows that are to set the thresholds")
        unknown = self.model_.groups(encoded) == self.model_.n_classes
        if unknown.any():
            raise ConditionError(
                f"row {int(np.flatnonzero(unknown)[0])} has no class that training knew; recalibrate on rows of "
                "known classes"
            )
        absent = sorted(set(range(self.model_.n_classes)) - set(encoded.class_index.tolist()))
        if absent:
            names = shortened([self.schema_.class_names[k] for k in absent])
            raise ConditionError(f"X has no rows of {names}; recalibrate on rows of every class")
        self.model_ = self.model_.calibrate(
            encoded,
            false_alarm_rate=rate,
            contamination=None,
            rows=HELD_OUT,
            set_at=now(),
            set_by=who(),
            rng=np.random.default_rng(0),
            with_parts=self.score_kind == "parts",
        )
        self._warn_of_empty_promises()
        return self

    def _warn_of_empty_promises(self) -> None:
        thresholds = self.thresholds_
        empty = thresholds.index[thresholds["guarantee"] == "none"].tolist()
        if empty:
            warnings.warn(
                f"too few calibration rows to hold a false-alarm rate of {self._calibration().false_alarm_rate:g} for "
                f"{shortened([str(name) for name in empty])}; see thresholds_",
                stacklevel=3,
            )

    @property
    def thresholds_(self) -> pd.DataFrame:
        """By class: threshold of a complete row's score, calibration rows, guarantee, rule, time."""
        return self._calibration().table(self._kind())

    @property
    def offset_(self) -> float:
        """Minus the pooled threshold; unconditional: decision_function = score_samples - offset_."""
        return -self._calibration().pooled_threshold(self._kind())

    # ------------------------------------------------------------------ persistence

    def save(self, path: str | Path) -> Path:
        """Write the detector to the folder ``path`` (see `anomaly_cvae.bundle`); no row is stored."""
        check_is_fitted(self)
        from anomaly_cvae import __version__

        saved = bundle.Bundle(self.model_, self.layout_, self.get_params(deep=False), self.history_)
        return bundle.save(saved, path, __version__)

    @classmethod
    def load(cls, path: str | Path, *, device: str = "auto") -> Self:
        """Read a detector that `save` wrote, onto any device.

        Raises
        ------
        BundleError
            If a file is missing or changed, or the format is newer than this version reads.
        """
        saved = bundle.load(path, resolve_device(device, torch.float64 if device == "auto" else torch.float32))
        detector = cls(**saved.parameters)
        detector.model_, detector.layout_, detector.history_ = saved.model, saved.layout, saved.history
        detector.schema_ = saved.model.encoder.schema
        detector.n_features_in_ = len(saved.layout.columns)
        if saved.layout.is_frame and all(isinstance(name, str) for name in saved.layout.columns):
            detector.feature_names_in_ = np.array(saved.layout.columns, dtype=object)
        detector._n_features_out = saved.model.engine.noise.shape[1]
        return detector

    # ------------------------------------------------------------------ inside

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        # A missing cell of x is fine; a missing condition is not, unless asked to be averaged over.
        tags.input_tags.allow_nan = self.condition_columns is None
        return tags

    def _kind(self) -> ScoreKind:
        if self.score_kind not in CHOICES["score_kind"]:
            raise ParameterError(f"score_kind must be one of {CHOICES['score_kind']}, not {self.score_kind!r}")
        if self.score_kind in ("contrast", "both"):
            require_contrast(self.schema_)
        return self.score_kind  # type: ignore[return-value]  # checked above

    def _calibration(self) -> Calibration:
        check_is_fitted(self)
        assert self.model_.calibration is not None
        return self.model_.calibration

    def _thresholds(self, encoded: Encoded) -> FloatArray:
        return self._calibration().thresholds(self._kind(), self.model_.groups(encoded), encoded.observed)

    def _decisions(self, encoded: Encoded, scores: FloatArray) -> FloatArray:
        decisions = self._thresholds(encoded) - scores
        if self.unseen_class == "anomaly":
            return np.where(self._is_unseen(encoded), np.minimum(decisions, FLAGGED), decisions)
        return decisions

    def _p_values(self, encoded: Encoded, scores: FloatArray) -> FloatArray:
        if self.unseen_class == "anomaly":
            scores = np.where(self._is_unseen(encoded), np.inf, scores)
        return self._calibration().p_values(self._kind(), scores, self.model_.groups(encoded), encoded.observed)

    def _class_labels(self, X: Any, condition: Any, encoded: Encoded, names: npt.NDArray[np.object_]) -> Any:
        """Class names of the rows; a class not seen in training is named by its own levels."""
        labels = names[self.model_.groups(encoded)]
        unseen = np.flatnonzero(self._is_unseen(encoded))
        if unseen.size:
            conditions = [c.name for c in self.schema_.categorical_conditions]
            cells = self._frame(X, condition)[conditions].iloc[unseen]
            labels[unseen] = [", ".join(map(str, levels)) for levels in cells.itertuples(index=False)]
        return labels

    def _features(self, X: Any, *, need_condition: bool = True) -> pd.DataFrame:
        check_is_fitted(self)
        if not need_condition and is_table(X):
            frame = to_frame(X)
            absent = [name for name in self.layout_.condition_columns if name not in frame.columns]
            X = with_missing(frame, absent)[list(self.layout_.columns)] if absent else X
        if is_table(X) and self.layout_.ignored:
            X = with_ignored(to_frame(X), self.layout_)
        return feature_frame(self, X, reset=False, expected=self.layout_).set_axis(list(self.layout_.columns), axis=1)

    def _frame(self, X: Any, condition: Any) -> pd.DataFrame:
        features, passed = self._features(X), self.layout_.passed_conditions
        if condition is None and passed:
            if self.missing_condition != "marginal":
                raise ConditionError(
                    f"this detector was fitted with condition= ({', '.join(map(str, passed))}) and never scores "
                    "without: pass condition=, or set missing_condition='marginal'"
                )
            return with_missing(features, passed)
        if condition is not None and not passed:
            raise ConditionError(
                "condition= was passed, but fit had none; its conditions are "
                f"{list(self.layout_.condition_columns) or 'none at all'}"
            )
        if condition is None:
            return features
        extra = condition_frame(condition, len(features), (), passed)
        return pd.concat([features, extra.set_axis(features.index)], axis=1)

    def _encode(self, X: Any, condition: Any, given: Any = None) -> Encoded:
        check_is_fitted(self)
        encoded = self.model_.encoder.encode(self._frame(X, condition))
        self._apply_policies(encoded, X, condition)
        if given is None:
            return encoded
        parts = given_cells(given, self.schema_, len(encoded))
        cells = np.concatenate([parts[place] for place in self.model_.encoder.order], axis=1)
        if cells.any() and not cells.all() and not self.model_.engine.model.architecture.observed_condition:
            raise ParameterError(
                "given= makes an observed part of the row its condition, which this detector has not learned: fit with "
                "condition_on_observed=True"
            )
        return replace(encoded, given=cells)

    def _apply_policies(self, encoded: Encoded, X: Any, condition: Any) -> None:
        missing = np.flatnonzero(encoded.class_index < 0)
        if missing.size and self.missing_condition == "raise":
            raise ConditionError(
                f"the condition is missing in row {missing[0]} ({missing.size} row(s) in all); fill it, or set "
                "missing_condition='marginal' to average over the classes"
            )
        unseen = np.flatnonzero(self._is_unseen(encoded))
        if unseen.size and self.unseen_class == "raise":
            names = [c.name for c in self.schema_.categorical_conditions]
            cells = self._frame(X, condition)[names].iloc[unseen[0]].tolist()
            raise ConditionError(
                f"condition {', '.join(map(str, names))} is {', '.join(map(str, cells))!r} in row {unseen[0]}, a class "
                f"not seen in training ({unseen.size} row(s) in all); seen: {shortened(self.schema_.class_names)}. "
                "Set unseen_class='anomaly' to flag such rows, or 'marginal' to average over the classes"
            )

    def _is_unseen(self, encoded: Encoded) -> BoolArray:
        unseen: BoolArray = encoded.class_index == len(self.schema_.classes)
        return unseen

    def _with_class(self, encoded: Encoded) -> Encoded:
        """Rows of unknown class under their most probable one."""
        unknown = self.model_.groups(encoded) == self.model_.n_classes
        if not unknown.any():
            return encoded
        best = self.model_.class_probabilities(encoded).argmax(axis=1)
        return encoded.of_class(np.where(unknown, best, encoded.class_index))

    def _conditions_to_sample(self, n: int, condition: Any, seed: int) -> pd.DataFrame:
        names = [c.name for c in self.schema_.conditions]
        if condition is None:
            if self.schema_.continuous_conditions:
                raise ConditionError(f"sample needs condition=: values of {names}")
            rng = np.random.default_rng(seed)
            drawn = rng.choice(self.model_.n_classes, size=n, p=self.model_.class_frequency)
            levels = [self.schema_.classes[k] for k in drawn]
            return pd.DataFrame(levels, columns=names, index=range(n))
        if not names:
            raise ConditionError("condition= was passed, but this detector has no condition")
        if isinstance(condition, (str, int, float, bool, np.generic)):
            condition = [[condition] * len(names)] * n if len(names) == 1 else condition
        elif isinstance(condition, tuple) and len(condition) == len(names):
            condition = [list(condition)] * n
        return condition_frame(condition, n, (), tuple(names))

    def _conditions_to_have(self, wanted: Any, frame: pd.DataFrame) -> pd.DataFrame:
        """Conditions of every row of ``frame`` after an edit, (N, Q)."""
        names = [c.name for c in self.schema_.conditions]
        if not isinstance(wanted, Mapping):
            return self._conditions_to_sample(len(frame), wanted, seed=0)
        own = frame[names].reset_index(drop=True)
        for name, value in wanted.items():
            if name not in names:
                raise ConditionError(f"there is no condition {name!r}{nearest(name, names)}")
            own[name] = value
        return own

    def _encode_conditions(self, conditions: pd.DataFrame) -> tuple[IntArray, FloatArray]:
        classes, continuous = self.model_.encoder.encode_conditions(conditions)
        unknown = np.flatnonzero((classes < 0) | (classes >= self.model_.n_classes))
        if unknown.size:
            raise ConditionError(
                f"no class {conditions.iloc[unknown[0]].tolist()}; there are {shortened(self.schema_.class_names)}"
            )
        return classes, continuous

    def _like_x(self, cells: pd.DataFrame, conditions: pd.DataFrame) -> Any:
        """Cells of x with X's condition columns put back, in X's order: a frame, or an array as X was."""
        layout = self.layout_
        for name in layout.condition_columns:
            cells[name] = conditions[name].to_numpy()
        ordered = cells[[name for name in layout.columns if name not in layout.ignored]]
        if layout.is_frame:
            return ordered
        if len(self.schema_.columns) == len(self.schema_.images) == 1 and ordered.shape[1] == 1:
            return np.stack(ordered.iloc[:, 0].tolist()) if len(ordered) else np.zeros((0, 0, 0))
        return ordered.to_numpy()

    def _index(self, X: Any) -> pd.Index | None:
        return to_frame(X).index if is_table(X) else None


def _repeat(n_rows: int, n: int) -> IntArray:
    """Row numbers, each ``n`` times in a row."""
    return np.repeat(np.arange(n_rows), n)
