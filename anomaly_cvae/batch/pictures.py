"""Images that no table holds, read as one: a folder of pictures, a single picture, or arrays in MNIST's layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import pandas as pd

from anomaly_cvae.batch.places import Place
from anomaly_cvae.errors import DataError
from anomaly_cvae.frames import Level
from anomaly_cvae.images import ImageFormat, as_cells, decode_picture, image_format
from anomaly_cvae.inputs import IMAGE

Part = Literal["train", "test"]
SUFFIXES = (".png", ".jpg", ".jpeg")
OnFault = Callable[[Path, str], None]
"""Told of every picture that cannot be used, and why."""
FILE, FOLDER, LABEL = "file", "folder", "label"
"""Columns beside the image: the picture's place below its folder, the sub-folder it lies in, the array's label."""


@dataclass(frozen=True)
class PictureColumns:
    """What a model calls the columns of such a table, and what it takes for an image.

    ``group`` names the column of sub-folders or labels; None: ``folder`` or ``label``. ``levels`` maps the
    text of a class to the level that the model knows. ``expected`` is the format of every image; None: that of
    the first one.
    """

    image: str = IMAGE
    group: str | None = None
    levels: Mapping[str, Level] = field(default_factory=dict)
    expected: ImageFormat | None = None

    def level(self, name: Any) -> Any:
        """The level that a sub-folder's name or a label stands for."""
        return self.levels.get(str(name), name)


def refuse_picture(path: Path, why: str) -> None:
    """An `OnFault` for those who need every picture.

    Raises
    ------
    DataError
        Always.
    """
    raise DataError(f"{path}: {why}")


def is_picture(path: Place) -> bool:
    """Whether a file's name says that it holds a picture."""
    return path.suffix.lower() in SUFFIXES


def pictures_below(folder: Place) -> list[Path]:
    """Pictures in a folder and its sub-folders by name; hidden ones and those that begin with ``_`` are passed over."""
    if not isinstance(folder, Path):
        return []
    found = (file for file in folder.rglob("*") if is_picture(file) and file.is_file())
    return sorted(f for f in found if not any(part.startswith((".", "_")) for part in f.relative_to(folder).parts))


def picture_names(called: PictureColumns) -> list[str]:
    """Columns of a folder of pictures, or of one picture."""
    return [FILE, called.image, called.group or FOLDER]


def read_pictures(path: Place, called: PictureColumns, rows: int, on_fault: OnFault) -> Iterator[tuple[Any, float]]:
    """A folder of pictures, or one, as tables of at most ``rows`` pictures, and the share of them read so far.

    Pictures that cannot be decoded, or have another format than the others, are passed to ``on_fault`` and left out.

    Raises
    ------
    DataError
        If none can be used.
    """
    assert isinstance(path, Path), "pictures at URLs are refused where they are found"
    files = pictures_below(path) if path.is_dir() else [path]
    root = path if path.is_dir() else path.parent
    lines: list[tuple[str, Any, Any]] = []
    expected, used, first_fault = called.expected, 0, ""
    for number, file in enumerate(files, start=1):
        try:
            image = decode_picture(file.read_bytes())
            expected = _same_format(image, expected, trained=called.expected is not None)
        except (ValueError, OSError) as fault:
            first_fault = first_fault or f"{file}: {fault}"
            on_fault(file, str(fault))
        else:
            below = file.relative_to(root)
            group = None if below.parent == Path() else called.level(str(below.parent))
            lines.append((str(below), _laid_out(image, expected), group))
        if lines and (len(lines) == rows or number == len(files)):
            used += len(lines)
            yield pd.DataFrame(lines, columns=picture_names(called), dtype=object), number / len(files)
            lines = []
    if not used:
        raise DataError(f"none of its {len(files):,} picture(s) can be used; the first: {first_fault}")


def _same_format(image: Any, expected: ImageFormat | None, *, trained: bool) -> ImageFormat:
    """The format to be had by all; a picture's axes are ordered as they were decoded, which says nothing of it."""
    found = image_format(pd.Series([image]), IMAGE)
    if expected is None:
        return found
    if (found.shape, found.pixels) != (expected.shape, expected.pixels):
        others = "those of training were" if trained else "the first one is"
        raise DataError(f"it is {found}, but {others} {expected}; resize, crop or convert it")
    return expected


def _laid_out(image: Any, expected: ImageFormat) -> Any:
    """A decoded picture, (H, W) or (H, W, 3), with its axes as the model has them."""
    if expected.layout == "CHW":
        return np.ascontiguousarray(np.atleast_3d(image).transpose(2, 0, 1))
    return np.atleast_3d(image) if expected.layout == "HWC" else image


def array_names(path: Place, called: PictureColumns, part: Part) -> list[str]:
    """Columns of an npz file: the image, and the label if there is one.

    Raises
    ------
    DataError
        If there are no images.
    """
    return list(_arrays(path, called, part))


def read_arrays(path: Place, called: PictureColumns, part: Part, rows: int) -> Iterator[tuple[Any, float]]:
    """Images and labels of an npz file as tables of at most ``rows`` rows, and the share of them read so far."""
    arrays = _arrays(path, called, part)
    total = len(arrays[called.image])
    for start in range(0, max(total, 1), rows):
        block = {name: values[start : start + rows] for name, values in arrays.items()}
        cells = {name: as_cells(values) if values.ndim > 1 else values for name, values in block.items()}
        yield pd.DataFrame(cells), min((start + rows) / max(total, 1), 1.0)


def _arrays(path: Place, called: PictureColumns, part: Part) -> dict[str, Any]:
    try:
        with path.open("rb") as content, np.load(content, allow_pickle=False) as saved:
            if f"x_{part}" not in saved:
                there = ", ".join(saved) or "nothing"
                raise DataError(f"{path}: has no array 'x_{part}' of images (N, height, width); it holds {there}")
            images = saved[f"x_{part}"]
            labels = saved[f"y_{part}"].reshape(-1) if f"y_{part}" in saved else None
    except BadZipFile as error:
        raise DataError(f"{path}: cannot be read as npz: {error}; write it again, or take it away") from error
    if images.ndim not in (3, 4):
        raise DataError(f"{path}: x_{part} has shape {images.shape}; images are (N, height, width), or with channels")
    if labels is None:
        return {called.image: images}
    if len(labels) != len(images):
        raise DataError(f"{path}: x_{part} has {len(images):,} images, but y_{part} has {len(labels):,} labels")
    known = pd.Series(labels).map(called.level) if called.levels else labels
    return {called.image: images, called.group or LABEL: np.asarray(known)}
