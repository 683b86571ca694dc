"""Whole jobs on tables in files: what the command line and the pipelines are made of."""

from anomaly_cvae.jobs.config import TableConfig, TrainConfig, load_config
from anomaly_cvae.jobs.evaluation import Evaluated, evaluate_model
from anomaly_cvae.jobs.explanation import Explanation, explain_rows, explain_tables
from anomaly_cvae.jobs.generation import generate_rows, named_values
from anomaly_cvae.jobs.images import (
    Change,
    Grid,
    complete_images,
    edit_images,
    edit_rows,
    generate_images,
    heat_map,
    reconstruct_images,
)
from anomaly_cvae.jobs.models import OpenModel, open_model
from anomaly_cvae.jobs.rows import (
    Rows,
    check_completion,
    complete_rows,
    image_of,
    intervals_of,
    read_rows,
    rows_to_show,
)
from anomaly_cvae.jobs.scoring import score_tables
from anomaly_cvae.jobs.thresholds import recalibrate_model
from anomaly_cvae.jobs.training import Plan, Trained, prepare, train

__all__ = [
    "Change",
    "Evaluated",
    "Explanation",
    "Grid",
    "OpenModel",
    "Plan",
    "Rows",
    "TableConfig",
    "TrainConfig",
    "Trained",
    "check_completion",
    "complete_images",
    "complete_rows",
    "edit_images",
    "edit_rows",
    "evaluate_model",
    "explain_rows",
    "explain_tables",
    "generate_images",
    "generate_rows",
    "heat_map",
    "image_of",
    "intervals_of",
    "load_config",
    "named_values",
    "open_model",
    "prepare",
    "read_rows",
    "recalibrate_model",
    "reconstruct_images",
    "rows_to_show",
    "score_tables",
    "train",
]
