"""The saved model: a folder of safetensors, JSON and npz with a manifest of SHA-256; never a pickle, no rows."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from anomaly_cvae.calibration import Calibration, PartsShape, Reference
from anomaly_cvae.encoding import ClassScaling, Encoder
from anomaly_cvae.errors import BundleError
from anomaly_cvae.fitted import FittedModel
from anomaly_cvae.inputs import Layout
from anomaly_cvae.model import CVAE, Architecture
from anomaly_cvae.passes import Precision
from anomaly_cvae.priors import AggregatePosterior
from anomaly_cvae.scoring import ScoringEngine

FORMAT_VERSION = 5
"""2: thresholds say who set them. 3: images. 4: networks may count unequally. 5: so may their parts, and classes have
linear paths. Earlier formats are read, too."""
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
MODEL = "model.json"
DETECTOR = "detector.json"
HISTORY = "history.json"
CALIBRATION = "calibration.json"
SCORES = "calibration.npz"


@dataclass(frozen=True)
class Bundle:
    """Everything that a detector is made of."""

    model: FittedModel
    layout: Layout
    parameters: Mapping[str, Any]
    history: pd.DataFrame


def save(bundle: Bundle, path: str | Path, library_version: str) -> Path:
    """Write ``bundle`` to the folder ``path``; an earlier bundle there is replaced in one step.

    Raises
    ------
    BundleError
        If ``path`` exists and is not a bundle.
    """
    target = Path(path).resolve()
    check_target(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside, old = (target.with_name(f".{target.name}.{uuid4().hex[:8]}") for _ in range(2))
    beside.mkdir()
    try:
        _write(bundle, beside)
        _write_manifest(beside, library_version)
        if target.exists():
            target.rename(old)
        beside.rename(target)
    finally:
        for left in (beside, old):
            shutil.rmtree(left, ignore_errors=True)
    return Path(path)


def check_target(path: str | Path) -> None:
    """Raise unless a bundle may be saved at ``path``: where nothing is, or an earlier bundle.

    Raises
    ------
    BundleError
        If something else is there.
    """
    target = Path(path).resolve()
    if target.exists() and not _may_be_replaced(target):
        raise BundleError(f"{target} exists and is not a model bundle; choose another folder")


def _may_be_replaced(target: Path) -> bool:
    """An empty folder, or one that holds a bundle and nothing else: nobody's files are deleted."""
    if not target.is_dir():
        return False
    names = {file.name for file in target.iterdir()}
    if not names:
        return True
    try:
        manifest = _read_manifest(target)
    except BundleError:
        return False
    return names <= {MANIFEST, *manifest["files"]}


def load(path: str | Path, device: torch.device) -> Bundle:
    """Read a bundle onto ``device``, whatever device it was trained on.

    Raises
    ------
    BundleError
        If a file is missing or changed, or the format is newer than this version reads.
    """
    folder = Path(path)
    check(folder)
    description, detector = _read_json(folder / MODEL), _read_json(folder / DETECTOR)
    encoder = Encoder.from_json(description["encoder"])
    weights = _in_todays_names(load_file(folder / WEIGHTS))
    parameters = {name: _from_plain(value) for name, value in detector["parameters"].items()}
    precision: Precision = "bfloat16" if parameters.get("mixed_precision") is True else "float32"
    engine = _load_engine(description, encoder, weights, device, precision)
    frequency = np.array(description["class_frequency"])
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in detector["layout"].items()}
    layout = Layout(**plain)
    return Bundle(
        model=FittedModel(encoder, engine, frequency, _load_calibration(folder)),
        layout=layout,
        parameters=parameters,
        history=_load_history(folder),
    )


def check(folder: Path) -> dict[str, Any]:
    """Compare every file with the manifest and return the manifest.

    Raises
    ------
    BundleError
        Naming the file and what is wrong with it.
    """
    manifest = _read_manifest(folder)
    if manifest["format_version"] > FORMAT_VERSION:
        raise BundleError(
            f"{folder} has format {manifest['format_version']}, written by anomaly_cvae "
            f"{manifest['library_version']}; this version reads up to {FORMAT_VERSION}: upgrade anomaly_cvae"
        )
    for name in (WEIGHTS, MODEL, DETECTOR, HISTORY, CALIBRATION, SCORES):
        if not (folder / name).is_file():
            raise BundleError(f"{folder}: {name} is missing; restore the bundle from where it was saved")
        if _sha256(folder / name) != manifest["files"].get(name):
            raise BundleError(
                f"{folder}: {name} is not the file that was saved (its SHA-256 differs); restore the bundle"
            )
    return manifest


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        raise BundleError(f"{folder} is not a model bundle: it has no {MANIFEST}")
    manifest = _read_json(folder / MANIFEST)
    kinds = {"format_version": int, "files": dict, "library_version": str}
    if not isinstance(manifest, dict) or not all(isinstance(manifest.get(n), kind) for n, kind in kinds.items()):
        raise BundleError(f"{folder / MANIFEST} is no manifest of a model bundle; save the model again")
    return manifest


def model_hash(path: str | Path) -> str:
    """SHA-256 over a bundle's files: two models are the same if and only if this is.

    Raises
    ------
    BundleError
        If the bundle is incomplete or changed.
    """
    files = check(Path(path))["files"]
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def provenance(path: str | Path) -> dict[str, str]:
    """Where a bundle comes from, as `annotate` noted it; empty if nobody did.

    Raises
    ------
    BundleError
        If ``path`` is no bundle.
    """
    return {str(name): str(value) for name, value in _read_manifest(Path(path)).get("provenance", {}).items()}


def annotate(path: str | Path, notes: Mapping[str, str]) -> None:
    """Add to what a bundle says of its origin (run, data, user); the model's hash stays what it was."""
    folder = Path(path)
    manifest = _read_manifest(folder)
    manifest["provenance"] = {**manifest.get("provenance", {}), **notes}
    beside = folder / f".{MANIFEST}.{uuid4().hex[:8]}"
    _write_json(beside, manifest)
    beside.replace(folder / MANIFEST)


def _write(bundle: Bundle, folder: Path) -> None:
    model, engine = bundle.model, bundle.model.engine
    if model.calibration is None:
        raise BundleError("a model without calibration cannot be saved: fit or recalibrate it first")
    save_file(_weights(engine), folder / WEIGHTS)
    _write_json(
        folder / MODEL,
        {
            "architecture": asdict(engine.model.architecture),
            "encoder": model.encoder.to_json(),
            "members_per_class": engine.members_per_class,
            "n_classes": engine.n_classes,
            "unlike": engine.unlike,
            "class_frequency": model.class_frequency.tolist(),
            "aggregate_shape": None if engine.aggregate is None else list(engine.aggregate.mean.shape),
        },
    )
    parameters = {name: _to_plain(value) for name, value in bundle.parameters.items()}
    _write_json(folder / DETECTOR, {"parameters": parameters, "layout": asdict(bundle.layout)})
    _write_json(folder / HISTORY, {"epochs": bundle.history.to_dict(orient="split"), **bundle.history.attrs})
    calibration = model.calibration
    _write_json(
        folder / CALIBRATION,
        {
            "kinds": list(calibration.references),
            "group_names": list(calibration.group_names),
            "false_alarm_rate": calibration.false_alarm_rate,
            "contamination": calibration.contamination,
            "rows": calibration.rows,
            "set_at": calibration.set_at,
            "set_by": calibration.set_by,
            "tolerance": calibration.tolerance,
        },
    )
    arrays: dict[str, Any] = {"typical_nats": calibration.typical_nats}
    if calibration.parts is not None:
        arrays |= {"parts_center": calibration.parts.center, "parts_precision": calibration.parts.precision}
    for kind, reference in calibration.references.items():
        arrays |= reference.to_arrays(kind)
    np.savez_compressed(folder / SCORES, **arrays)


def _weights(engine: ScoringEngine) -> dict[str, torch.Tensor]:
    weights = {f"model.{name}": value for name, value in engine.model.state_dict().items()}
    weights["noise"] = engine.noise
    if engine.part_weights is not None:
        weights["part_weights"] = engine.part_weights
    if engine.class_table is not None:
        weights["class_table"] = engine.class_table
    if engine.scaling is not None:
        weights["class_center"] = torch.as_tensor(engine.scaling.center)
        weights["class_scale"] = torch.as_tensor(engine.scaling.scale)
    if engine.aggregate is not None:
        weights |= {f"aggregate.{name}": value for name, value in engine.aggregate.state_dict().items()}
    return {name: value.detach().cpu().contiguous() for name, value in weights.items()}


def _load_engine(
    description: Mapping[str, Any],
    encoder: Encoder,
    weights: dict[str, torch.Tensor],
    device: torch.device,
    precision: Precision,
) -> ScoringEngine:
    shape = description["architecture"]
    tuples = {name: tuple(shape[name]) for name in ("hidden_dims", "channels") if name in shape}
    model = CVAE(Architecture(**{**shape, **tuples}), encoder.columns)
    dtype = weights["noise"].dtype
    model.to(dtype=dtype).load_state_dict(_with_prefix(weights, "model."))
    aggregate = None
    if description["aggregate_shape"] is not None:
        aggregate = AggregatePosterior(*description["aggregate_shape"]).to(dtype=dtype)
        aggregate.load_state_dict(_with_prefix(weights, "aggregate."))
        aggregate = aggregate.to(device)
    table, counts, scaling = weights.get("class_table"), weights.get("part_weights"), None
    if table is not None:
        model.class_table = table
    if "class_scale" in weights:
        scaling = ClassScaling(weights["class_center"].numpy(), weights["class_scale"].numpy())
    return ScoringEngine(
        model=model.to(device),
        noise=weights["noise"].to(device),
        n_classes=description["n_classes"],
        class_table=None if table is None else table.to(device),
        members_per_class=description["members_per_class"],
        aggregate=aggregate,
        scaling=scaling,
        part_weights=None if counts is None else counts.to(device),
        unlike=description.get("unlike", counts is not None),
        precision=precision,
    )


def _in_todays_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of earlier formats under the names of this one."""
    new = {"model.encoder.": "model.encoder.mlp.", "model.decoder.": "model.decoder.mlp."}
    renamed = {}
    for name, value in weights.items():
        old = next((prefix for prefix in new if name.startswith((f"{prefix}layers.", f"{prefix}skip"))), None)
        renamed[name if old is None else name.replace(old, new[old], 1)] = value
    if "member_weights" in renamed:  # format 4: a network counted as a whole
        renamed["part_weights"] = renamed.pop("member_weights").unsqueeze(1).repeat(1, 2)
    return renamed


def _with_prefix(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _load_history(folder: Path) -> pd.DataFrame:
    saved = _read_json(folder / HISTORY)
    history = pd.DataFrame(**saved.pop("epochs"))
    history.attrs.update(saved)
    return history


def _load_calibration(folder: Path) -> Calibration:
    described = _read_json(folder / CALIBRATION)
    with np.load(folder / SCORES, allow_pickle=False) as arrays:
        references = {kind: Reference.from_arrays(kind, arrays) for kind in described.pop("kinds")}
        described["typical_nats"] = arrays["typical_nats"]
        if "parts_center" in arrays:
            described["parts"] = PartsShape(arrays["parts_center"], arrays["parts_precision"])
    return Calibration(references, **{**described, "group_names": tuple(described["group_names"])})


def _write_manifest(folder: Path, library_version: str) -> None:
    files = {file.name: _sha256(file) for file in sorted(folder.iterdir())}
    manifest = {"format_version": FORMAT_VERSION, "library_version": library_version, "files": files}
    _write_json(folder / MANIFEST, manifest)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_json(file: Path, data: Any) -> None:
    file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{file} is not readable as JSON: {error}") from error


def _to_plain(value: Any) -> Any:
    """A parameter as JSON: dicts as pairs (their keys may be positions), a random generator as None."""
    if isinstance(value, Mapping):
        return {"pairs": [[_to_plain(k), _to_plain(v)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_to_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays, pandas indexes
        return _to_plain(value.tolist())
    return value if isinstance(value, (str, int, float, bool, type(None))) else None


def _from_plain(value: Any) -> Any:
    if isinstance(value, dict):
        return dict(value["pairs"])
    return tuple(_from_plain(item) for item in value) if isinstance(value, list) else value
