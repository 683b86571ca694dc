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
from sklearn.base import BaseEstimator, OutlierMixin, TransformerMixin, clone
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from anomaly_cvae import bundle, checkpoints, explain
from anomaly_cvae.calibration import HELD_OUT, Calibration, select_discoveries
from anomaly_cvae.devices import resolve_device
from anomaly_cvae.encoding import Encoded
from anomaly_cvae.errors import ConditionError, DataError, ParameterError
from anomaly_cvae.fitted import FittedModel, ScoreKind, require_contrast
from anomaly_cvae.fitting import Split, fit_model, now, who
from anomaly_cvae.frames import BoolArray, FloatArray, IntArray
from anomaly_cvae.generative import Generative
from anomaly_cvae.inputs import (
    check_count,
    feature_frame,
    resolve_keys,
    resolve_names,
    shortened,
)
from anomaly_cvae.interpretation import read_layout, read_schema
from anomaly_cvae.parameters import CHOICES, check_parameters
from anomaly_cvae.parquet_rows import Inputs, ParquetTable
from anomaly_cvae.passes import Precision
from anomaly_cvae.progress import CallbackSupportMixin, EpochReporter, with_callbacks
from anomaly_cvae.row_sample import draw_sample
from anomaly_cvae.row_stream import BYTES_PER_CELL, FIT_MEMORY_BYTES, LEAST_SAMPLE, RowStream
from anomaly_cvae.schema import (
    Name,
    Schema,
    is_row_number,
)
from anomaly_cvae.settings import fit_settings
from anomaly_cvae.training import Training

FLAGGED = -np.finfo(np.float64).tiny
"""Largest decision of a row that policy, not its score, makes an anomaly."""


UNKNOWN_CLASS = "(unknown class)"
"""Where rows of a class not seen in training, or with a missing condition, are grouped."""


class CVAEDetector(Generative, CallbackSupportMixin, TransformerMixin, OutlierMixin, BaseEstimator):
    """Find rows that are unlikely given their condition.

    A bank of conditional variational autoencoders models p(x | c). A row's score is its negative ELBO in
    nats, in expectation an upper bound of -log p(x | c) in the units of x; of a table without a condition a weighted
    one, which is no bound (``part_weights``). Thresholds are set per class of the condition on normals that training
    has not seen.

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
    n_estimators : networks per class (or in all, when shared)
    part_weights : how a score sums the reconstruction and the KL of every network: "alike", the mean of negative ELBOs;
        "spread", each part by one over its spread over held-out rows (training rows where fewer than 20 are held
        out), reconstructions' weights adding to 1, which is no bound on -log p(x | c); "auto": "spread" where networks
        are trained unlike (``kl_weight``, ``input_noise``), else "alike"
    linear_start : where classes share networks, each class has a linear path of its own through them, which begins at
        a factor analysis of its rows that leans on the other classes; networks of one class begin there, too. For 4 to
        32 columns with a (robust) normal head, 2 to 32 classes, one categorical condition where networks are shared,
        priors "aggregate" and "standard"; not with images, ``condition_on_observed`` or rows that lack their class
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
    kl_weight : weight of the KL in training and in the choice of the best weights, or several, dealt to the networks
        in turn; scores are not weighed by it, but see ``part_weights``. A small one finds rows that are near no
        training row, but guesses worse what is missing: of unlike networks the first fills in missing cells. "auto": 1
        and .1 for tables without a condition, else 1
    free_bits : nats of KL per latent unit that cost nothing in training
    input_noise : standard deviation of training noise on real columns, in units of the column's own, or several,
        dealt to the networks in turn
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
    mixed_precision : "training" takes products and convolutions in bfloat16 where the hardware has it, weights and
        sums stay in ``dtype``; True does so in scores, too: with a KL weight of 1 they
        agree within 0.5 %, with smaller ones within some percent; thresholds allow for what was measured in `fit`
    random_state : int, RandomState or None; the only source of randomness
    verbose : 0 silent, 1 progress bar, 2 a line per epoch

    Attributes
    ----------
    model_ : FittedModel, the bank with its encoder and calibration
    schema_ : Schema, what every column was taken for
    history_ : DataFrame, one row per epoch (losses in nats per row, of unlike networks the mean of each one's own;
        the largest KL weight; seconds since the start)
    thresholds_ : DataFrame by class: threshold, calibration rows, guarantee, rule, time, who set it
    offset_ : float, minus the pooled threshold
    n_features_in_, feature_names_in_ : as in scikit-learn
    """

    model_: FittedModel
    split_: Split

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
        part_weights: str = "auto",
        linear_start: bool = True,
        latent_dim: int | str = "auto",
        hidden_dims: Sequence[int] = (128, 128),
        likelihoods: str | Mapping[Name, str] = "auto",
        column_kinds: Mapping[Name, str] | None = None,
        ignore_columns: Sequence[Name] | Name | None = None,
        channels: Sequence[int] = (32, 64),
        condition_on_observed: bool = False,
        inference_head: bool = False,
        prior: str = "aggregate",
        objective: str = "elbo",
        train_samples: int = 1,
        kl_weight: float | Sequence[float] | str = "auto",
        free_bits: float = 0.0,
        input_noise: float | Sequence[float] = 0.1,
        mask_rate: float = 0.2,
        mask_shapes: str = "mixed",
        scale_floor: float = 0.08,
        n_samples: int = 4,
        max_steps: int = 1000,
        batch_size: int = 128,
        learning_rate: float = 2e-3,
        patience: int = 10,
        validation_fraction: float = 0.1,
        calibration_fraction: float = 0.2,
        checkpoint: str | Path | None = None,
        device: str = "auto",
        dtype: str = "float32",
        mixed_precision: bool | str = False,
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
        self.part_weights = part_weights
        self.linear_start = linear_start
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
        self.mixed_precision = mixed_precision
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
        return self._fit(X, y, condition)

    @with_callbacks
    def fit_files(
        self, inputs: Inputs, *, columns: Sequence[str] | None = None, memory_bytes: int = FIT_MEMORY_BYTES
    ) -> Self:
        """Train and calibrate on the normal rows of Parquet files, which may be more than memory holds.

        Parameters
        ----------
        inputs : a file, a folder of files, or a list of these
        columns : those of the files to use, conditions included; None: all
        memory_bytes : what the rows may take, roughly. If all fit, the result is exactly that of `fit` on the
            whole table. Else scaling, early stopping, thresholds and the prior come from a random sample, and
            training passes over all other rows; then ``split_`` numbers rows of the whole table, and its
            ``training`` are only those of the sample.

        Raises
        ------
        DataError, ConditionError, ParameterError
            As `fit`, naming file and row; and if a file is no Parquet file, is damaged, or has other columns
            than the first.
        TrainingDivergedError
            If the loss becomes infinite; names column and step.
        """
        check_parameters(self)
        check_count(memory_bytes, "memory_bytes")
        table = ParquetTable.of(inputs)
        table = table if columns is None else table.select(columns)
        n_rows = max(LEAST_SAMPLE, memory_bytes // (BYTES_PER_CELL * len(table.columns)))
        if table.n_rows <= n_rows:
            frame = table.frame()
            with table.rows_named(np.arange(len(frame))):
                return self._fit(frame, None, None)
        random_state = check_random_state(self.random_state)
        stream = self._stream(table, n_rows, int(random_state.randint(np.iinfo(np.int32).max)))
        places = stream.sample.positions
        with table.rows_named(places):
            self._fit(stream.frame(table.columns), None, None, stream, random_state)
        of_sample = self.split_
        self.split_ = Split(places[of_sample.training], places[of_sample.validation], places[of_sample.calibration])
        return self

    def _stream(self, table: ParquetTable, n_rows: int, seed: int) -> RowStream:
        """The files with a sample of ``n_rows`` of their rows; ignored columns are not read."""
        names = pd.DataFrame(columns=list(table.columns))
        conditions = resolve_names(self.condition_columns, names, "condition_columns")
        ignored = resolve_names(self.ignore_columns, names, "ignore_columns")
        used = [name for name in table.columns if name not in ignored]
        kinds = resolve_keys(self.column_kinds, names, "column_kinds")
        table = table.select(used)
        may_miss = self.objective == "semi_supervised"
        sample = draw_sample(table, n_rows, [str(name) for name in conditions], kinds, seed, may_miss=may_miss)
        return RowStream(table, sample, seed)

    def _fit(self, X: Any, y: Any, condition: Any, stream: RowStream | None = None, random_state: Any = None) -> Self:
        check_parameters(self)
        features = feature_frame(self, X, reset=True)
        self.layout_, frame = read_layout(self, X, features, condition)
        self.schema_, likelihoods = self._schema_of(features, frame, stream)
        if self.checkpoint is not None:
            checkpoints.check_place(Path(self.checkpoint))
        self._warn_of_row_numbers(frame if stream is None else stream.sample.seen)
        settings, random_state = fit_settings(self, self.schema_), random_state or check_random_state(self.random_state)
        with EpochReporter(self, X, y, max_steps=self.max_steps, verbose=self.verbose) as reporter:
            fit = fit_model(self.schema_, frame, likelihoods, settings, random_state, reporter, stream)
        self.model_ = fit.model
        self.history_ = self._history(fit.training)
        self.split_ = fit.split
        self._n_features_out = fit.model.engine.noise.shape[1]
        if fit.training.stopped_by == "interrupt":
            warnings.warn(
                f"training was interrupted at step {len(fit.training.epochs) and fit.training.epochs[-1].step}; "
                "the best weights so far were kept and calibrated",
                stacklevel=2,
            )
        return self

    def _warn_of_row_numbers(self, frame: pd.DataFrame) -> None:
        asked = self.column_kinds or {}
        columns = [c.name for c in self.schema_.columns if c.kind in ("real", "count") and c.name not in asked]
        numbers = [name for name in columns if is_row_number(frame[name], name)]
        if numbers:
            warnings.warn(
                f"{', '.join(map(repr, numbers))}: whole numbers without a repeat, as row numbers are. New rows have "
                "new ones, which makes them unusual: leave them out (ignore_columns, --ignore); a time can be a "
                "continuous condition; or say what they are (column_kinds, --kind)",
                stacklevel=4,
            )

    def _schema_of(
        self, features: pd.DataFrame, frame: pd.DataFrame, stream: RowStream | None
    ) -> tuple[Schema, dict[Name, str]]:
        if stream is None:
            return read_schema(self, self.layout_, features, frame)
        seen = stream.sample.seen.reindex(columns=features.columns)
        with stream.table.rows_named(stream.sample.seen_positions):
            schema, likelihoods = read_schema(self, self.layout_, seen, seen)
        if schema.images:
            raise DataError(
                f"column {schema.images[0].name!r} holds images: fit_files reads tables in parts; raise memory_bytes "
                "to take in all of them"
            )
        return schema, likelihoods

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
        fresh.layout_, frame = read_layout(fresh, X, features, condition)
        schema: Schema = read_schema(fresh, fresh.layout_, features, frame)[0]
        return schema

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
        """Negative ELBO of each row, its parts weighed as ``part_weights`` says, (N,), nats: higher = more anomalous.

        ``given`` says which cells belong to the condition: the score is then that of the others given
        these, 0 if all are given. Booleans like X, or {column: booleans}; needs ``condition_on_observed``.
        """
        encoded = self._encode(X, condition, given)
        return self.model_.scores(encoded, "elbo")

    def negative_log_likelihood(
        self, X: Any, *, condition: Any = None, given: Any = None, n_samples: int = 100
    ) -> FloatArray:
        """-log p(x | c) of each row by importance sampling from q(z | x, c), (N,), nats.

        In expectation it lies between -log p(x | c) and the negative ELBO with parts that count alike, nearer to the
        first with more samples (Burda, Grosse and Salakhutdinov 2016). ``given`` as in `negative_elbo`.
        """
        check_count(n_samples, "n_samples")
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
        encoded = self._encode(X, condition)
        return self.model_.scores(encoded, "contrast")

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
        ``is_anomaly``; on request ``contrast`` (nats), and of rows above their threshold ``top_column``, the one most
        to blame, and ``top_nats``, by how much the negative ELBO would fall if that cell were what the rest lets
        expect. Both are missing where no cell alone is to blame.
        """
        encoded = self._encode(X, condition)
        kind: ScoreKind = self._kind()
        scores = self.model_.scores_of_kinds(encoded, {"elbo", kind, *(("contrast",) if contrast else ())})
        thresholds = self._thresholds(encoded)
        decisions = self._decisions(encoded, scores[kind], thresholds)
        names = np.array([*self.schema_.class_names, None], dtype=object)
        table = pd.DataFrame(
            {
                "condition": self._class_labels(X, condition, encoded, names),
                "negative_elbo": scores["elbo"],
                "score": scores[kind],
                "threshold": thresholds,
                "p_value": self._p_values(encoded, scores[kind]),
                "is_anomaly": decisions < 0,
            },
            index=self._index(X),
        )
        if contrast:
            table["contrast"] = scores["contrast"]
        if top_column:
            # A class that training did not see is flagged as such, whatever its cells.
            above = np.flatnonzero((decisions < 0) & (scores[kind] > thresholds))
            top, gains = explain.to_blame(self.model_, encoded.take(above), 1)
            columns, nats = np.full(len(table), None, dtype=object), np.full(len(table), np.nan)
            for row, column, saved in zip(above, top[:, 0], gains[:, 0], strict=True):
                if saved > 0:
                    columns[row], nats[row] = self.schema_.names[column], saved
            table["top_column"], table["top_nats"] = columns, nats
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

    # ------------------------------------------------------------------ explanation

    def explain(self, X: Any, *, condition: Any = None, method: str = "sum") -> pd.DataFrame:
        """Nats per column: what each adds to the negative ELBO, or what mending it alone would save.

        ``"sum"`` takes the negative ELBO apart, (N, D + 1): nats of each column and of the KL, which sum to it.
        ``"repair"``, (N, D), asks which cell is wrong: the nats by which the negative ELBO falls if the cell becomes
        what the rest of its row lets expect; an image becomes a drawn one. It has no unit, sums to nothing, and costs
        2 D passes; a missing cell has 0. It ranks a wrong cell first more often (docs/benchmarks/quality.md).

        Raises
        ------
        ParameterError
            If ``method`` is another one.
        """
        if method not in explain.METHODS:
            raise ParameterError(f"method must be one of {explain.METHODS}, not {method!r}")
        encoded = self._encode(X, condition)
        if method == "repair":
            gains = explain.repair_gains(self.model_, encoded)
            return pd.DataFrame(gains, columns=self.schema_.names, index=self._index(X))
        parts = explain.column_scores(self.model_, encoded)
        frame = pd.DataFrame(parts.columns, columns=self.schema_.names, index=self._index(X))
        frame[explain.KL] = parts.kl
        return frame

    def top_columns(self, X: Any, *, condition: Any = None, n: int = 3) -> pd.DataFrame:
        """The ``n`` columns of each row that are most to blame: value observed, value and 90 % range expected.

        Ranked by ``repair_nats``: by how much the negative ELBO would fall if this cell alone were what the rest of
        the row lets expect, ``expected`` (of an image: one drawn of what it lets expect). ``nats`` is the column's
        share of the negative ELBO. Of many columns, the eight that cost most above what they cost a normal row are
        asked (``n``, if that is more).
        """
        encoded, frame = self._encode(X, condition), self._frame(X, condition)
        n = min(n, len(self.schema_.columns))
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
        """Which columns drive the alarms among the rows of X: one line per class with alarms and column.

        ``alarms`` counts the class's flagged rows, ``top`` those in which the column is the one most to blame, as
        `top_columns` says, and ``repair_nats`` is the mean over these of what mending it would save. "(new class)"
        stands for rows flagged for their class alone, "(no cell alone)" for those that no column's mending helps.
        """
        encoded = self._encode(X, condition)
        scores, thresholds = self.model_.scores(encoded, self._kind()), self._thresholds(encoded)
        flagged = np.flatnonzero(self._decisions(encoded, scores, thresholds) < 0)
        names = np.array([*self.schema_.class_names, UNKNOWN_CLASS], dtype=object)
        alarms, above = encoded.take(flagged), (scores > thresholds)[flagged]
        return explain.alarm_columns(self.model_, alarms, names[self.model_.groups(alarms)], above)

    def explain_pixels(self, X: Any, *, condition: Any = None, column: Name | None = None) -> FloatArray:
        """Nats of every pixel of an image column, (N, …) like the images, colours added up: a heat map.

        Their sum is the column's nats in `explain`; of a row of unknown class, under its most probable one.
        ``column`` may be left out where there is one of images.

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
    def load(cls, path: str | Path, *, device: str = "auto", mixed_precision: bool | str | None = None) -> Self:
        """Read a detector that `save` wrote, onto any device; ``mixed_precision`` other than it was fitted with.

        Raises
        ------
        BundleError
            If a file is missing or changed, or the format is newer than this version reads.
        """
        saved = bundle.load(path, resolve_device(device, torch.float64 if device == "auto" else torch.float32))
        detector = cls(**saved.parameters)
        if mixed_precision is not None:
            detector.mixed_precision = mixed_precision
            check_parameters(detector)
            precision: Precision = "bfloat16" if mixed_precision is True else "float32"
            saved = replace(saved, model=replace(saved.model, engine=replace(saved.model.engine, precision=precision)))
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
        if self.score_kind == "parts" and self._calibration().parts is None:
            raise ParameterError(
                "this model has no calibration of the parts of its negative ELBO: fit or recalibrate it with "
                "score_kind='parts'"
            )
        return self.score_kind  # type: ignore[return-value]  # checked above

    def _calibration(self) -> Calibration:
        check_is_fitted(self)
        assert self.model_.calibration is not None
        return self.model_.calibration

    def _thresholds(self, encoded: Encoded) -> FloatArray:
        return self._calibration().thresholds(self._kind(), self.model_.groups(encoded), encoded.observed)

    def _decisions(self, encoded: Encoded, scores: FloatArray, thresholds: FloatArray | None = None) -> FloatArray:
        decisions = (self._thresholds(encoded) if thresholds is None else thresholds) - scores
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
