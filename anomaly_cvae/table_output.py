"""Tables into files of the format that their suffix says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomaly_cvae.console import is_array, is_missing
from anomaly_cvae.errors import DataError, OutputError

if TYPE_CHECKING:
    import pandas as pd


SUFFIXES = (".parquet", ".csv", ".json")


def write(path: str, table: pd.DataFrame) -> None:
    """Write a table to a new or existing file.

    Raises
    ------
    OutputError
        If the file cannot be written.
    DataError
        If the table holds images and the format cannot.
    """
    target = Path(path)
    _require_room_for_images(path, table)
    writers: dict[str, Callable[[], Any]] = {
        ".parquet": lambda: _writable(table).to_parquet(target, index=False),
        ".csv": lambda: table.to_csv(target, index=False),
        ".json": lambda: table.to_json(target, orient="records", indent=1),
    }
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        writers[target.suffix]()
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error


def _writable(table: pd.DataFrame) -> pd.DataFrame:
    """Cells of mixed type (a value observed may be a number or a word) as text: Parquet columns have one type.

    Images are PNG bytes.
    """
    mixed = [name for name in table if table[name].dtype == object]
    cells = {name: _png if _holds_images(table[name]) else str for name in mixed}
    return table.assign(
        **{
            str(name): table[name].map(lambda v, as_cell=as_cell: None if is_missing(v) else as_cell(v))
            for name, as_cell in cells.items()
        }
    )


def _holds_images(cells: pd.Series) -> bool:
    return cells.dtype == object and any(is_array(cell) for cell in cells)


def _require_room_for_images(path: str, table: pd.DataFrame) -> None:
    if Path(path).suffix == ".parquet":
        return
    images = [str(name) for name in table if _holds_images(table[name])]
    if images:
        raise DataError(f"{path}: cannot hold the images of column {images[0]!r}; choose .parquet, or .png for a grid")


def _png(image: Any) -> bytes:
    """An image (H, W), (H, W, C) or (C, H, W) as PNG bytes; fractions become bytes."""
    import io

    import numpy as np
    from PIL import Image

    pixels = np.asarray(image)
    if pixels.dtype != np.uint8:
        pixels = np.round(255.0 * np.clip(pixels.astype(np.float64), 0.0, 1.0)).astype(np.uint8)
    if pixels.ndim == 3 and pixels.shape[2] not in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    content = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels).save(content, "PNG")
    return content.getvalue()
