"""A saved model by the name a user gives it: a folder, ``runs:/…`` or ``models:/name@alias``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from anomaly_cvae import bundle
from anomaly_cvae.detector import CVAEDetector
from anomaly_cvae.errors import BundleError
from anomaly_cvae.tracking import fetch_bundle
from anomaly_cvae.tracking.models import is_uri


@dataclass(frozen=True)
class OpenModel:
    """A detector ready to score, with where it came from.

    ``run_id`` is the MLflow run that trained it, None where there is none or it is not known.
    """

    name: str
    folder: Path
    detector: CVAEDetector
    sha256: str
    run_id: str | None

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of the user's, which can be written to."""
        return not is_uri(self.name)


def open_model(name: str, *, device: str = "auto", **policies: str) -> OpenModel:
    """Load a model; ``unseen_class`` and ``missing_condition``, where given, replace its policies.

    Raises
    ------
    BundleError, TrackingError
        If there is no such model, or it cannot be read.
    """
    if is_uri(name):
        fetched = fetch_bundle(name)
        folder, run_id = fetched.folder, fetched.run_id
    else:
        folder, run_id = Path(name), None
        if folder.is_file():
            raise BundleError(f"{name} is not a model: MODEL is a folder, runs:/ID or models:/NAME@ALIAS")
        if not folder.is_dir():
            raise BundleError(f"{name}: no such folder; MODEL is a folder, runs:/ID or models:/NAME@ALIAS")
    detector = CVAEDetector.load(folder, device=device)
    detector.set_params(**policies)
    return OpenModel(
        name, folder, detector, bundle.model_hash(folder), run_id or bundle.provenance(folder).get("run_id")
    )
