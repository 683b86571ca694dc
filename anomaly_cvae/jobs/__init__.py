"""Whole jobs on tables in files: what the command line and the pipelines are made of."""

from anomaly_cvae.jobs.config import TableConfig, TrainConfig, load_config
from anomaly_cvae.jobs.evaluation import Evaluated, evaluate_model
from anomaly_cvae.jobs.explanation import Explanation, explain_rows, explain_tables
from anomaly_cvae.jobs.generation import generate_rows
from anomaly_cvae.jobs.models import OpenModel, open_model
from anomaly_cvae.jobs.scoring import score_tables
from anomaly_cvae.jobs.thresholds import recalibrate_model
from anomaly_cvae.jobs.training import Plan, Trained, prepare, train

__all__ = [
    "Evaluated",
    "Explanation",
    "OpenModel",
    "Plan",
    "TableConfig",
    "TrainConfig",
    "Trained",
    "evaluate_model",
    "explain_rows",
    "explain_tables",
    "generate_rows",
    "load_config",
    "open_model",
    "prepare",
    "recalibrate_model",
    "score_tables",
    "train",
]
