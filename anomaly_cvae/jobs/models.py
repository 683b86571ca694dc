"""A saved model by the name a user gives it: a folder, ``runs:/…`` or ``models:/name@alias``."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from anomaly_cvae import bundle
from anomaly_cvae.batch.csv_text import CsvFormat
from anomaly_cvae.batch.needs import for_files
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
    def reader(self) -> CVAEDetector:
        """The detector for tables in files, whose conditions all are columns."""
        return for_files(self.detector)

    @property
    def label(self) -> str:
        """A short name for people: the folder's, or the URI's last part."""
        return bundle.provenance(self.folder).get("name") or Path(self.name).name

    def csv_format(self, given: CsvFormat) -> CsvFormat:
        """``given``, with the number marks of the training table where they were unusual and none are given."""
        marks = json.loads(bundle.provenance(self.folder).get("csv", "{}"))
        if not marks or given.decimal is not None or given.thousands is not None:
            return given
        return replace(given, **marks)

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of the user's, which can be written to."""
        return not is_uri(self.name)


def open_model(name: str, *, device: str = "auto", mixed_precision: bool = False, **policies: str) -> OpenModel:
    """Load a model; ``unseen_class`` and ``missing_condition``, where given, replace its policies.

    ``mixed_precision`` has it score with products in bfloat16, even if it was not trained to.

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
    detector, sha256 = _load(folder, device, mixed_precision)
    detector.set_params(**policies)
    return OpenModel(name, folder, detector, sha256, run_id or bundle.provenance(folder).get("run_id"))


def _load(folder: Path, device: str, mixed_precision: bool) -> tuple[CVAEDetector, str]:
    """The detector and the hash of what was loaded, should the folder be replaced at this very moment."""
    for _ in range(3):
        sha256 = bundle.model_hash(folder)
        detector = CVAEDetector.load(folder, device=device, mixed_precision=mixed_precision or None)
        if bundle.model_hash(folder) == sha256:
            return detector, sha256
    raise BundleError(f"{folder} is being written to again and again; try later")
