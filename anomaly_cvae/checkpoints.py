"""Where a training stands, on disk: tensors as safetensors, never a pickle; replaced in one step."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from anomaly_cvae.errors import BundleError, ParameterError


def check_place(path: Path) -> None:
    """Raise now, not after an hour of training, unless a checkpoint can be written at ``path``.

    Raises
    ------
    ParameterError
        Saying why it cannot.
    """
    if path == Path() or path.is_dir():
        raise ParameterError(f"checkpoint must be a file, and {str(path)!r} is a folder; name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ParameterError(f"checkpoint {path} cannot be written: {error}") from error
    if not os.access(path.parent, os.W_OK):
        raise ParameterError(f"checkpoint {path} cannot be written: its folder is read-only")


def write(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
    """Write tensors and notes to one file, beside it first and then in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    save_file(plain, beside, metadata={"notes": json.dumps(dict(notes))})
    beside.replace(path)


def read(path: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write` wrote.

    Raises
    ------
    BundleError
        If the file is none of these, or damaged.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as saved:
            notes = json.loads((saved.metadata() or {})["notes"])
            return {name: saved.get_tensor(name) for name in saved.keys()}, notes  # noqa: SIM118  # no mapping
    except Exception as error:  # safetensors raises its own kind for damaged files
        raise BundleError(f"{path} is no readable checkpoint ({error}); delete it to start again") from error


def named(prefix: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """A list of tensors under numbered names."""
    return {f"{prefix}.{i}": value for i, value in enumerate(tensors)}
