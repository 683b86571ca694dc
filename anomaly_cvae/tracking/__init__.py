"""MLflow: runs that can be reviewed, compared and loaded again."""

from anomaly_cvae.tracking.models import fetch_bundle, promote
from anomaly_cvae.tracking.runs import (
    DataSet,
    Extras,
    LoggedModel,
    describe,
    log_detector,
    log_evaluation,
    log_extras,
    log_numbers,
    log_parameters,
    log_tables,
    recent_runs,
    run_exists,
    said_of,
)
from anomaly_cvae.tracking.store import (
    close_run,
    faults_named,
    metric_name,
    open_run,
    resume_run,
    start_run,
    use_store,
)

__all__ = [
    "DataSet",
    "Extras",
    "LoggedModel",
    "close_run",
    "describe",
    "faults_named",
    "fetch_bundle",
    "log_detector",
    "log_evaluation",
    "log_extras",
    "log_numbers",
    "log_parameters",
    "log_tables",
    "metric_name",
    "open_run",
    "promote",
    "recent_runs",
    "resume_run",
    "run_exists",
    "said_of",
    "start_run",
    "use_store",
]
