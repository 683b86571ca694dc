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

from anomaly_cvae import bundle, checkpoints
from anomaly_cvae.calibration import HELD_OUT
from anomaly_cvae.devices import resolve_device
from anomaly_cvae.errors import ConditionError, DataError, ParameterError
from anomaly_cvae.explaining import Explainer
from anomaly_cvae.fitted import FittedModel
from anomaly_cvae.fitting import Split, fit_model, now, who
from anomaly_cvae.frames import FloatArray, IntArray
from anomaly_cvae.generative import Generative
from anomaly_cvae.inputs import check_count, feature_frame, resolve_keys, resolve_names, shortened
from anomaly_cvae.interpretation import read_layout, read_schema, warn_of_row_numbers
from anomaly_cvae.parameters import check_parameters
from anomaly_cvae.parquet_rows import Inputs, ParquetTable
from anomaly_cvae.passes import Precision
from anomaly_cvae.progress import CallbackSupportMixin, EpochReporter, with_callbacks
from anomaly_cvae.row_sample import draw_sample
from anomaly_cvae.row_stream import BYTES_PER_CELL, FIT_MEMORY_BYTES, LEAST_SAMPLE, RowStream
from anomaly_cvae.schema import Name, Schema
from anomaly_cvae.settings import fit_settings
from anomaly_cvae.training import Training


class CVAEDetector(Generative, Explainer, CallbackSupportMixin, TransformerMixin, OutlierMixin, BaseEstimator):
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
        warn_of_row_numbers(self, self.schema_, frame if stream is None else stream.sample.seen)
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

    # ------------------------------------------------------------------ fit and judge, latent coordinates

    def fit_predict(self, X: Any, y: Any = None, *, condition: Any = None) -> IntArray:
        """`fit` and `predict` on the same rows."""
        self.fit(X, y, condition=condition)
        return self.predict(X, condition=condition)

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
