"""Evaluate a saved model on a labelled table, by the label rules of a configuration.

The same as ``anomaly-cvae evaluate MODEL DATA --label …``, in library calls.
"""

from __future__ import annotations

import argparse

from anomaly_cvae import jobs
from anomaly_cvae.report import Report


def main() -> None:
    """Run the job from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="YAML file that names the label; see pipelines/configs")
    parser.add_argument("model", help="folder, runs:/ID or models:/NAME@ALIAS")
    parser.add_argument("data", nargs="+", help="files, folders or patterns")
    parser.add_argument("--no-tracking", action="store_true", help="no MLflow run")
    arguments = parser.parse_args()
    with Report() as report:
        config = jobs.load_config(arguments.config, {"data": arguments.data})
        model = jobs.open_model(arguments.model)
        report.evaluated(jobs.evaluate_model(model, config, log=not arguments.no_tracking), model)


if __name__ == "__main__":
    main()
