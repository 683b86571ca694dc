"""Where runs live: the user's MLFLOW_TRACKING_URI, or a SQLite file under ``mlruns/``."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anomaly_cvae.errors import MissingDependencyError, TrackingError

FOLDER = Path("mlruns")
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # A server that is down is reported within seconds, not minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    # Standard output belongs to the command's result.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Set unless the user's environment says otherwise."""
MAX_METRIC_NAME = 240
# What MLflow refuses or reads as a path; and "_" where it would look like the code of such a character.
_REFUSED = re.compile(r"[^\w\-. :]|_(?=[0-9a-f]{2})|^\.+$|^ | $")


def mlflow() -> Any:
    """The mlflow module, imported when first needed (0.8 s).

    Raises
    ------
    MissingDependencyError
        Where it is not installed.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import mlflow
    except ImportError as error:
        raise MissingDependencyError("tracking needs mlflow: pip install mlflow") from error
    for chatty in ("mlflow.store.db.utils", "mlflow.pyfunc", "mlflow.tracking._model_registry", "alembic", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    return mlflow


def use_store(experiment: str | None = None, folder: Path = FOLDER) -> str:
    """Point MLflow at its store, make sure of the experiment if one is named, and return the tracking URI.

    The environment is read at this moment, so setting MLFLOW_TRACKING_URI later than the import works.

    Raises
    ------
    TrackingError
        If the experiment was deleted.
    """
    client = mlflow()
    own = os.environ.get("MLFLOW_TRACKING_URI")
    if own:
        client.set_tracking_uri(own)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        # MLflow 3 refuses a plain ./mlruns file store.
        # The whole path: MLflow keeps one store per URI, whatever the current folder has become.
        client.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').resolve()}")
    if experiment is not None:
        with _one_at_a_time(None if own else folder):
            _use_experiment(client, experiment, None if own else folder)
    return str(client.get_tracking_uri())


@contextmanager
def _one_at_a_time(folder: Path | None) -> Iterator[None]:
    """Two processes must not both make the database of a fresh folder."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        folder = None
    if folder is None:
        yield
        return
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _use_experiment(client: Any, name: str, folder: Path | None) -> None:
    found = client.get_experiment_by_name(name)
    if found is None:
        client.create_experiment(
            name,
            artifact_location=None if folder is None else (folder / "artifacts").resolve().as_uri(),
            tags={"mlflow.experimentKind": "custom_model_development"},  # opens on runs, not on traces
        )
    elif found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"the experiment {name!r} was deleted; bring it back (`mlflow experiments restore --experiment-id "
            f"{found.experiment_id}`) or name another one"
        )
    client.set_experiment(name)


@contextmanager
def start_run(name: str, tags: Mapping[str, str] | None = None, *, parent: str | None = None) -> Iterator[str]:
    """A run of the current experiment, below the run ``parent`` if one is named; yields its id."""
    below = {"mlflow.parentRunId": parent} if parent else {}
    with mlflow().start_run(run_name=name, tags={**dict(tags or {}), **below}, nested=True) as run:
        yield str(run.info.run_id)


@contextmanager
def faults_named() -> Iterator[None]:
    """Turns what a tracking server, or the way to it, raises into a `TrackingError` of one line."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module=r"mlflow\..*")
            yield
    except (TrackingError, MissingDependencyError):
        raise
    except Exception as error:  # whatever it is, a trained model must not be lost for it
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        where = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{FOLDER / 'mlflow.db'}")
        raise TrackingError(f"tracking at {where} failed: {type(error).__name__}: {reason[:300]}") from error


def metric_name(name: str, class_name: str | None = None) -> str:
    """``name/class``; what MLflow refuses in a metric's name is written as ``_`` and its code point in hex."""
    if class_name is None:
        return name
    escaped = _REFUSED.sub(lambda match: "".join(f"_{ord(c):x}" for c in match.group()), class_name) or "_"
    full = f"{name}/{escaped}"
    if len(full) <= MAX_METRIC_NAME:
        return full
    return f"{full[: MAX_METRIC_NAME - 9]}_{hashlib.sha256(class_name.encode()).hexdigest()[:8]}"


def open_run(name: str, tags: Mapping[str, str]) -> str:
    """A new run of the current experiment; returns its id. It is logged to later, by `resume_run`.

    Meant for a thread of its own: MLflow's active run is one per thread, and this one ends with it.
    """
    return str(mlflow().start_run(run_name=name, tags=dict(tags)).info.run_id)


@contextmanager
def resume_run(run_id: str) -> Iterator[None]:
    """An open run as the active one; it ends with the block."""
    with mlflow().start_run(run_id=run_id, nested=True):
        yield


def close_run(run_id: str, status: str) -> None:
    """End an open run as FAILED, KILLED or FINISHED."""
    mlflow().MlflowClient().set_terminated(run_id, status)
