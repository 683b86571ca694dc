"""CelebA: a Parquet file of JPEG bytes and attribute columns, or the standard folder of the data set.

For non-commercial research on one's own machine; nothing made from it belongs into this project.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from anomaly_cvae.errors import DataError

ATTRIBUTES = ("Male", "Smiling", "Eyeglasses", "Young", "Wearing_Hat", "Blond_Hair")
"""Attributes that one can see in a small picture."""
LIST_FILE = "list_attr_celeba.txt"
IMAGES = "img_align_celeba"


def faces(path: str | Path, attributes: tuple[str, ...] = ATTRIBUTES, side: int = 64) -> pd.DataFrame:
    """Faces as a table: ``image``, arrays (side, side, 3) of uint8, and a boolean column per attribute.

    Raises
    ------
    DataError
        Saying what is missing.
    """
    where = Path(path)
    table = _read_standard(where) if where.is_dir() else _read_parquet(where)
    absent = [name for name in attributes if name not in table]
    if absent:
        raise DataError(f"{where} has no attribute {absent[0]!r}; it has {', '.join(table.columns[1:])}")
    table = table[["image", *attributes]].reset_index(drop=True)
    images = [_resized(content, side) for content in table["image"]]
    return table.assign(image=pd.Series(images, dtype=object))


def _read_parquet(file: Path) -> pd.DataFrame:
    if not file.is_file():
        raise DataError(f"{file} does not exist; give a Parquet file with an image column, or CelebA's folder")
    table = pd.read_parquet(file)
    if "image" not in table:
        raise DataError(f"{file} has no column 'image' of JPEG bytes; it has {', '.join(map(str, table.columns))}")
    return table


def _read_standard(folder: Path) -> pd.DataFrame:
    """``list_attr_celeba.txt``: a count, a line of names, then file name and -1 or 1 per attribute."""
    listed, images = folder / LIST_FILE, folder / IMAGES
    for needed in (listed, images):
        if not needed.exists():
            raise DataError(f"{folder} has no {needed.name}; CelebA's folder holds {LIST_FILE} and {IMAGES}/")
    table = pd.read_csv(listed, sep=r"\s+", skiprows=1)
    files = [images / name for name in table.index]
    return (table == 1).reset_index(drop=True).assign(image=[str(file) for file in files])


def _resized(content: bytes | str, side: int) -> npt.NDArray[Any]:
    """The middle square of a picture, given as bytes or as the path of a file."""
    from PIL import Image

    with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as picture:
        width, height = picture.size
        edge = min(width, height)
        left, top = (width - edge) // 2, (height - edge) // 2
        square = picture.convert("RGB").crop((left, top, left + edge, top + edge))
        return np.asarray(square if edge == side else square.resize((side, side)))
