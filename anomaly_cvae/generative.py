"""What a fitted detector makes: samples, reconstructions, edits, paths, completions, and the condition of a row."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit, softmax
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from anomaly_cvae import explain, generation
from anomaly_cvae.encoding import Encoded
from anomaly_cvae.errors import ConditionError, DataError, ParameterError
from anomaly_cvae.fitted import require_contrast
from anomaly_cvae.frames import IntArray
from anomaly_cvae.images import fill_pixels
from anomaly_cvae.inputs import check_count, fill, shortened
from anomaly_cvae.reading import TableReader

MAX_STRENGTH = 10
"""A condition ten times as far as asked is no condition that training knew."""


class Generative(TableReader):
    """The part of the detector that generates; X and ``condition`` are as everywhere."""

    def sample(
        self, n: int, *, condition: Any = None, random_state: Any = None, noise: bool = True, same_z: bool = False
    ) -> Any:
        """Draw ``n`` rows of p(x | c), like X.

        ``condition`` is one class for all rows, or one per row; None draws classes as often as they
        occurred in training. Without ``noise`` cells are what p(x | z, c) expects, not draws of it: images
        without grain. ``same_z`` gives the i-th row of every class the same z, one that training rows have: the same
        style.
        """
        check_is_fitted(self)
        check_count(n, "n", least=0)
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
        return self._like_x(self._filled(frame, expected), frame)

    def _filled(self, frame: pd.DataFrame, made: pd.DataFrame) -> pd.DataFrame:
        """The cells of x as they are, missing ones and missing pixels as ``made``."""
        images = {column.name for column in self.schema_.images}
        cells = {
            name: fill_pixels(frame[name], made[name], name) if name in images else fill(frame[name], made[name])
            for name in self.schema_.names
        }
        return pd.DataFrame(cells, index=frame.index)

    def impute_draws(
        self, X: Any, n: int, *, condition: Any = None, random_state: Any = None, noise: bool = True
    ) -> Any:
        """X with its missing cells drawn ``n`` times given the observed ones (multiple imputation), like X.

        N * n rows: the n completions of the first row, then those of the second, and so on. ``noise`` as in
        `sample`.
        """
        check_count(n, "n")
        encoded, frame = self._encode(X, condition), self._frame(X, condition)
        seed = int(check_random_state(random_state).randint(np.iinfo(np.int32).max))
        generator = self.model_.engine.generator(seed)
        drawn = generation.impute_draws(self.model_, self._with_class(encoded), n, generator, noise=noise)
        # Labels may repeat, so rows are numbered until the end.
        repeated = frame.iloc[_repeat(len(frame), n)]
        values = drawn.transpose(1, 0, 2).reshape(len(frame) * n, self.model_.encoder.n_cells)
        made = self.model_.encoder.decode(values, drawn=noise)
        cells = self._filled(repeated.reset_index(drop=True), made).set_axis(repeated.index)
        return self._like_x(cells, repeated)

    def impute_intervals(
        self, X: Any, *, condition: Any = None, coverage: float = 0.9, n_draws: int = 200, random_state: Any = None
    ) -> pd.DataFrame:
        """Where each missing number lies: one line per missing cell with ``expected``, ``low`` and ``high``.

        The central ``coverage`` of draws given the observed cells. Of an image with hidden pixels the three
        are images; of a column with levels, low and high are missing.
        """
        if not 0.0 < coverage < 1.0:
            raise ParameterError(f"coverage must lie in (0, 1), not {coverage}")
        check_count(n_draws, "n_draws")
        encoded, frame = self._with_class(self._encode(X, condition)), self._frame(X, condition)
        seed = int(check_random_state(random_state).randint(np.iinfo(np.int32).max))
        return explain.intervals(self.model_, encoded, frame.index, coverage, n_draws, seed)

    def edit(
        self,
        X: Any,
        condition_from: Any = None,
        condition_to: Any = None,
        *,
        keep_detail: bool = False,
        strength: float = 1.0,
    ) -> Any:
        """The rows of X as they would be under another condition, their style z kept: like X.

        ``condition_from`` is what X is now, where `fit` was given ``condition=`` (else its own columns say
        so); ``condition_to`` is one condition for all rows, one per row, or a dict {condition: value} of
        those to change. ``keep_detail`` puts back what the reconstruction lacks of each row.

        z often keeps something of the condition, which holds against the change. ``strength`` exaggerates: at
        2 the decoder is told a condition twice as far from the row's own, at 0.5 one half-way.

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
        if not isinstance(strength, Real) or isinstance(strength, bool) or not abs(strength) <= MAX_STRENGTH:
            raise ParameterError(f"strength must be a number from -{MAX_STRENGTH} to {MAX_STRENGTH}, not {strength!r}")
        encoded, frame = self._with_class(self._encode(X, condition_from)), self._frame(X, condition_from)
        if condition_to is None:
            raise ConditionError(f"edit needs condition_to: values of {[str(c.name) for c in self.schema_.conditions]}")
        wanted = self._conditions_to_have(condition_to, frame)
        classes, continuous = self._encode_conditions(wanted)
        target = encoded.of_class(classes).with_continuous(continuous)
        values = generation.change_condition(self.model_, encoded, target, keep_detail=keep_detail, strength=strength)
        return self._like_x(self.model_.encoder.decode(values, frame.index), wanted.set_axis(frame.index))

    def interpolate(self, X_from: Any, X_to: Any, n: int = 8, *, condition: Any = None) -> Any:
        """``n`` rows on the way from each row of X_from to that of X_to, through the latent space: like X.

        N * n rows, path after path, both ends (as reconstructed) included. The two must have the same
        conditions: change one by `edit` first.
        """
        check_count(n, "n")
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
        method : "elbo" and "iwae" weigh the class-wise likelihoods, by their bounds ("elbo": by scores, where
            ``part_weights`` are "spread"), with p(c); "head" asks the inference head q(c | x), which also tells
            attributes: one column each, the probability of its second value
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
        if self.schema_.attributes:
            raise ConditionError(
                "the class-wise likelihoods are those under known attributes; ask the inference head, method='head'"
            )
        check_count(n_samples, "n_samples")
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


def _repeat(n_rows: int, n: int) -> IntArray:
    """Row numbers, each ``n`` times in a row."""
    return np.repeat(np.arange(n_rows), n)
