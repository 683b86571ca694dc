"""Runs of the jobs that use a model: below the run that trained it, where that one is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from anomaly_cvae import bundle, tracking
from anomaly_cvae.jobs.models import OpenModel

EXPERIMENT = "anomaly_cvae"


@contextmanager
def child_run(model: OpenModel, name: str, job: str, parameters: Mapping[str, Any]) -> Iterator[str]:
    """A run for one use of ``model``.

    Raises
    ------
    TrackingError
        If the server cannot be reached, or refuses.
    """
    with tracking.faults_named():
        experiment = bundle.provenance(model.folder).get("experiment", EXPERIMENT)
        tracking.use_store(experiment)
        parent = model.run_id if model.run_id and tracking.run_exists(model.run_id) else None
        with tracking.start_run(name, {"job": job}, parent=parent) as run_id:
            tracking.log_parameters(parameters)
            yield run_id
