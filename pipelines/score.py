"""Score tables of any size with a saved model, and be able to go on after a kill.

The same as ``anomaly-cvae score MODEL INPUT --output DIR``, in library calls.
"""

from __future__ import annotations

import argparse

from anomaly_cvae import jobs
from anomaly_cvae.batch import ScoreOptions
from anomaly_cvae.report import Report


def main() -> None:
    """Run the job from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder, runs:/ID or models:/NAME@ALIAS")
    parser.add_argument("data", nargs="+", help="files, folders or patterns")
    parser.add_argument("--output", required=True, help="folder for the scored files")
    parser.add_argument("--explain", action="store_true", help="add the most surprising column and its nats")
    parser.add_argument("--no-tracking", action="store_true", help="no MLflow run")
    arguments = parser.parse_args()
    with Report() as report:
        model = jobs.open_model(arguments.model, unseen_class="anomaly")
        options = ScoreOptions(top_column=arguments.explain)
        with report.progress() as on_progress:
            scored = jobs.score_tables(
                model, arguments.data, arguments.output, options, log=not arguments.no_tracking, on_progress=on_progress
            )
        report.scored(scored, arguments.output)


if __name__ == "__main__":
    main()
