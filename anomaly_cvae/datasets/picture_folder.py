"""A folder of pictures as a table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from anomaly_cvae.errors import DataError
from anomaly_cvae.images import decode_picture

SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class PictureFolder:
    """Pictures that could be read, and what is wrong with the others.

    ``table`` has ``file`` (relative to the folder), ``image``, and ``folder``, the name of the sub-folder it
    lies in, "" at the top: many data sets have a folder per class.
    """

    table: pd.DataFrame
    faults: dict[str, str]


def picture_folder(path: str | Path) -> PictureFolder:
    """Read every PNG and JPEG in a folder and its sub-folders, in the order of their names.

    Raises
    ------
    DataError
        If there is none.
    """
    folder = Path(path)
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise DataError(f"{folder} has no picture ({', '.join(SUFFIXES)})")
    lines, faults = [], {}
    for file in files:
        name = file.relative_to(folder)
        try:
            image = decode_picture(file.read_bytes())
        except (ValueError, OSError) as fault:
            faults[str(name)] = str(fault)
            continue
        lines.append((str(name), image, "" if name.parent == Path() else str(name.parent)))
    return PictureFolder(pd.DataFrame(lines, columns=["file", "image", "folder"]), faults)
