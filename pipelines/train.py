"""Train a model as a configuration says: read, split, fit, calibrate, evaluate, save, log.

The same as ``anomaly-cvae train DATA --config CONFIG``, in library calls to start one's own pipeline from.
"""

from __future__ import annotations

import argparse

from anomaly_cvae import jobs
from anomaly_cvae.report import Report


def main() -> None:
    """Run the job from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="YAML file; see pipelines/configs")
    parser.add_argument("data", nargs="+", help="files, folders or patterns")
    parser.add_argument("--test-data", nargs="*", default=[], help="labelled rows to evaluate on")
    parser.add_argument("--output", help="folder of the model; default: ./NAME of the configuration")
    parser.add_argument("--no-tracking", action="store_true", help="no MLflow run")
    arguments = parser.parse_args()
    given = {"data": arguments.data, "test_data": arguments.test_data, "output": arguments.output}
    if arguments.no_tracking:
        given["tracking"] = False
    with Report() as report:
        plan = jobs.prepare(jobs.load_config(arguments.config, given))
        report.plan(plan)
        folder = str(plan.config.folder)
        report.trained(jobs.train(plan, verbose=report.verbose, on_stage=lambda stage: report.stage(stage, folder)))


if __name__ == "__main__":
    main()
