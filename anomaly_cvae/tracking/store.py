"""Where runs live: the user's MLFLOW_TRACKING_URI, or a SQLite file under ``mlruns/``."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anomaly_cvae.errors import MissingDependencyError

FOLDER = Path("mlruns")
_REFUSED = re.compile(r"[^\w\-. :/]")


def mlflow() -> Any:
    """The mlflow module, imported when first needed (0.8 s).

    Raises
    ------
    MissingDependencyError
        Where it is not installed.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        import mlflow
    except ImportError as error:
        raise MissingDependencyError("tracking needs mlflow: pip install mlflow") from error
    for chatty in ("mlflow.store.db.utils", "mlflow.pyfunc", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    return mlflow


def use_store(experiment: str, folder: Path = FOLDER) -> str:
    """Point MLflow at its store, make sure of the experiment, and return the tracking URI.

    The environment is read at this moment, so setting MLFLOW_TRACKING_URI later than the import works.
    """
    client = mlflow()
    own = os.environ.get("MLFLOW_TRACKING_URI")
    if own:
        client.set_tracking_uri(own)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        # MLflow 3 refuses a plain ./mlruns file store.
        client.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
        if client.get_experiment_by_name(experiment) is None:
            client.create_experiment(
                experiment,
                artifact_location=(folder / "artifacts").resolve().as_uri(),
                tags={"mlflow.experimentKind": "custom_model_development"},  # opens on runs, not on traces
            )
    client.set_experiment(experiment)
    return str(client.get_tracking_uri())


@contextmanager
def start_run(name: str, tags: Mapping[str, str] | None = None) -> Iterator[str]:
    """A run of the current experiment; yields its id."""
    with mlflow().start_run(run_name=name, tags=dict(tags or {})) as run:
        yield str(run.info.run_id)


def metric_name(name: str, class_name: str | None = None) -> str:
    """``name/class``, with characters that MLflow refuses written as ``_`` and their code point in hex."""
    if class_name is None:
        return name
    return f"{name}/{_REFUSED.sub(lambda match: f'_{ord(match.group()):x}', class_name)}"
