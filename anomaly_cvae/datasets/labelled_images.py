"""MNIST and what comes in its layout: npz with x_train, y_train, x_test, y_test, or the four idx files."""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anomaly_cvae.errors import DataError
from anomaly_cvae.frames import IntArray

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
IDX_FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}
IDX_TYPES = {0x08: np.uint8}


@dataclass(frozen=True)
class LabelledImages:
    """Images (N, H, W) uint8 and their classes (N,), for training and test."""

    x_train: npt.NDArray[Any]
    y_train: IntArray
    x_test: npt.NDArray[Any]
    y_test: IntArray


def labelled_images(path: str | Path) -> LabelledImages:
    """Read an npz file, or a folder with the four idx files (plain or .gz).

    Raises
    ------
    DataError
        Saying what is missing.
    """
    where = Path(path)
    if where.is_dir():
        arrays = {name: _read_idx(_idx_file(where, name)) for name in ARRAYS}
    elif where.is_file():
        with np.load(where, allow_pickle=False) as saved:
            absent = [name for name in ARRAYS if name not in saved]
            if absent:
                raise DataError(f"{where} has no array {absent[0]!r}; it needs {', '.join(ARRAYS)}")
            arrays = {name: saved[name] for name in ARRAYS}
    else:
        raise DataError(f"{where} does not exist; give an npz file with {', '.join(ARRAYS)}, or a folder of idx files")
    return LabelledImages(
        arrays["x_train"], arrays["y_train"].astype(np.int64), arrays["x_test"], arrays["y_test"].astype(np.int64)
    )


def binarise(images: npt.NDArray[Any], random_state: int = 0) -> npt.NDArray[np.bool_]:
    """Black-and-white images, drawn once: each pixel is white with its own brightness as probability.

    The static binarisation of MNIST that papers report on is such a draw, too, but another one.
    """
    rng = np.random.default_rng(random_state)
    return np.stack([rng.random(image.shape, dtype=np.float32) * 255.0 < image for image in images])


def _idx_file(folder: Path, name: str) -> Path:
    stem = IDX_FILES[name]
    for candidate in (stem, f"{stem}.gz", stem.replace("-idx", ".idx"), f"{stem.replace('-idx', '.idx')}.gz"):
        if (folder / candidate).is_file():
            return folder / candidate
    raise DataError(f"{folder} has no {stem} (or {stem}.gz); it needs {', '.join(IDX_FILES.values())}")


def _read_idx(file: Path) -> npt.NDArray[Any]:
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in IDX_TYPES:
        raise DataError(f"{file} is no idx file of unsigned bytes")
    n_axes = content[3]
    shape = struct.unpack(f">{n_axes}I", content[4 : 4 + 4 * n_axes])
    values = np.frombuffer(content, dtype=IDX_TYPES[content[2]], offset=4 + 4 * n_axes)
    if values.size != np.prod(shape):
        raise DataError(f"{file} is cut short: {values.size:,} bytes for shape {shape}")
    return values.reshape(shape)
