"""Logged and registered models: fetched as bundles, promoted by an alias."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from anomaly_cvae.errors import BundleError, TrackingError
from anomaly_cvae.tracking.store import faults_named, mlflow, use_store

SCHEMES = ("runs:/", "models:/")
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND")


@dataclass(frozen=True)
class Fetched:
    """A bundle on this machine, and the run that logged it, if any did."""

    folder: Path
    run_id: str | None


def is_uri(model: str) -> bool:
    """Whether ``model`` names a logged or registered model and not a folder."""
    return model.startswith(SCHEMES)


def fetch_bundle(uri: str) -> Fetched:
    """The bundle of ``runs:/ID`` (or ``runs:/ID/model``), ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``.

    Raises
    ------
    TrackingError
        If there is no such model, or the server cannot be reached.
    BundleError
        If it is no model of this library.
    """
    if uri.startswith("runs:/") and uri.removeprefix("runs:/").strip("/").count("/") == 0:
        uri = f"{uri.rstrip('/')}/model"
    with faults_named():
        use_store()
        client = mlflow()
        try:
            folder = Path(client.artifacts.download_artifacts(uri))
            described = client.models.Model.load(str(folder))
        except client.exceptions.MlflowException as error:
            if error.error_code not in ABSENT:
                raise
            reason = str(error).strip().splitlines()[0]
            raise TrackingError(f"{uri}: no such model at {client.get_tracking_uri()}: {reason}") from error
    artifacts = (described.flavors.get("python_function") or {}).get("artifacts") or {}
    if "bundle" not in artifacts:
        raise BundleError(f"{uri} is a model of another library: it holds no bundle")
    return Fetched(folder / artifacts["bundle"]["path"], described.run_id)


def promote(name: str, version: str, alias: str = "champion") -> str:
    """Let ``models:/NAME@ALIAS`` mean this version from now on; returns that URI.

    Raises
    ------
    TrackingError
        If there is no such version, or the server cannot be reached.
    """
    with faults_named():
        use_store()
        mlflow().MlflowClient().set_registered_model_alias(name, alias, version)
    return f"models:/{name}@{alias}"
