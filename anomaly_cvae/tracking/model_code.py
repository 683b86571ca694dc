"""The logged model as code: MLflow runs this file, which loads the bundle; nothing is pickled."""

from __future__ import annotations

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
        """Return `CVAEDetector.score_table` of the rows."""
        return self.detector.score_table(model_input)


set_model(ScoringModel())
