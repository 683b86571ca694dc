"""The logged model as code: MLflow runs this file, which loads the bundle; nothing is pickled."""

from __future__ import annotations

import copy
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from anomaly_cvae import CVAEDetector


class ScoringModel(PythonModel):
    """Scores rows with the bundle that was logged beside this file."""

    def load_context(self, context: Any) -> None:
        """Read the bundle, onto whatever device there is."""
        self.detector = CVAEDetector.load(context.artifacts["bundle"])

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Return `CVAEDetector.score_table` of the rows.

        ``params``: ``contrast``, ``top_column`` (more columns), ``score_kind``, ``unseen_class``,
        ``missing_condition`` and ``false_alarm_rate`` (other than the detector's own).
        """
        asked = dict(params or {})
        more = {name: bool(asked.pop(name, False)) for name in ("contrast", "top_column")}
        rate = asked.pop("false_alarm_rate", None)
        detector = copy.copy(self.detector).set_params(**asked)
        if rate is not None and rate != detector.model_.calibration.false_alarm_rate:
            detector.recalibrate(false_alarm_rate=rate)
        layout = detector.layout_
        if layout.is_frame:
            features = [name for name in layout.columns if name not in layout.ignored]
            model_input = model_input[features]
        scored: pd.DataFrame = detector.score_table(model_input, **more)
        return scored


set_model(ScoringModel())
