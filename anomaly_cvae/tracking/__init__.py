"""MLflow: runs that can be reviewed, compared and loaded again."""

from anomaly_cvae.tracking.runs import Evaluation, log_detector
from anomaly_cvae.tracking.store import metric_name, start_run, use_store

__all__ = ["Evaluation", "log_detector", "metric_name", "start_run", "use_store"]
