"""How a fitted detector reads what it is given, and writes what it makes like it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from sklearn.utils.validation import check_is_fitted

from anomaly_cvae.encoding import Encoded
from anomaly_cvae.errors import ConditionError, ParameterError
from anomaly_cvae.fitted import FittedModel
from anomaly_cvae.frames import BoolArray, FloatArray, IntArray, is_table, to_frame
from anomaly_cvae.images import to_images
from anomaly_cvae.inputs import (
    Layout,
    condition_frame,
    feature_frame,
    given_cells,
    nearest,
    shortened,
    with_ignored,
    with_missing,
)
from anomaly_cvae.schema import Schema, image_of


class TableReader:
    """X and ``condition`` checked against what `fit` saw, and encoded; rows of the model brought back like X."""

    model_: FittedModel
    layout_: Layout
    schema_: Schema
    unseen_class: str
    missing_condition: str
    _n_features_out: int

    def _features(self, X: Any, *, need_condition: bool = True) -> pd.DataFrame:
        check_is_fitted(self)
        if not need_condition and is_table(X):
            frame = to_frame(X)
            may_lack = (*self.layout_.condition_columns, *self.layout_.ignored)
            absent = [name for name in may_lack if name not in frame.columns]
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
            if self.schema_.continuous_conditions or self.schema_.attributes:
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
            # By position, as everywhere: a Series would be aligned by its labels.
            cells = value if isinstance(value, (str, bytes)) or not hasattr(value, "__len__") else np.asarray(value)
            if isinstance(cells, np.ndarray) and cells.shape != (len(own),):
                raise ConditionError(f"condition_to[{name!r}] has shape {cells.shape}; give one value, or {len(own)}")
            own[name] = cells
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
            images = ordered.iloc[:, 0].tolist()
            none = to_images(np.zeros((0, *image_of(self.schema_.images[0]).shape)), image_of(self.schema_.images[0]))
            return np.stack(images) if images else none
        return ordered.to_numpy()

    def _index(self, X: Any) -> pd.Index | None:
        return to_frame(X).index if is_table(X) else None
