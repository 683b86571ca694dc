"""Image cells: arrays, or JPEG and PNG bytes, in a column of a table, read into one block of pixels."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd

from anomaly_cvae.errors import DataError, MissingDependencyError
from anomaly_cvae.frames import BoolArray

PixelType = Literal["uint8", "float", "bool"]
PixelLayout = Literal["HW", "HWC", "CHW"]
Pixels = npt.NDArray[np.float32]
CHANNELS = (1, 3)
"""Grey and RGB."""
PIXEL_RANGE: dict[str, str] = {"uint8": "uint8, 0 to 255", "float": "float, 0 to 1", "bool": "bool, black and white"}
_MODES = {"1": "bool", "L": "uint8", "RGB": "uint8", "P": "uint8"}


@dataclass(frozen=True, slots=True)
class ImageFormat:
    """What every image of a column has in common.

    ``shape`` is (channels, height, width); ``layout`` says how a cell's axes are ordered.
    """

    shape: tuple[int, int, int]
    pixels: PixelType
    layout: PixelLayout

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ImageFormat:
        """Inverse of `dataclasses.asdict`.

        Raises
        ------
        ValueError
            For a shape, type or layout that no image has.
        """
        shape = tuple(int(n) for n in data["shape"])
        if len(shape) != 3 or data["pixels"] not in get_args(PixelType) or data["layout"] not in get_args(PixelLayout):
            raise ValueError(f"{data} describes no image")
        return cls((shape[0], shape[1], shape[2]), data["pixels"], data["layout"])

    def __str__(self) -> str:
        channels, height, width = self.shape
        colours = {1: "grey", 3: "RGB"}[channels]
        return f"{height} x {width} {colours} ({PIXEL_RANGE[self.pixels]})"

    @property
    def n_pixels(self) -> int:
        """Numbers in one image, over all channels."""
        channels, height, width = self.shape
        return channels * height * width


@dataclass(frozen=True, slots=True)
class ImageCells:
    """One column of images as numbers of their own units: values and observed, (N, C * H * W) each."""

    values: Pixels
    observed: BoolArray


def is_image(cell: object) -> bool:
    """Whether a cell holds an image: an array of two or three axes, a picture of PIL, or JPEG or PNG bytes."""
    if isinstance(cell, (bytes, bytearray)):
        return bytes(cell[:8]).startswith((b"\xff\xd8\xff", b"\x89PNG"))
    if isinstance(cell, dict):  # how datasets stored as Parquet hold a picture
        return isinstance(cell.get("bytes"), bytes)
    return (isinstance(cell, np.ndarray) and cell.ndim in (2, 3)) or _is_pil(cell)


def holds_images(cells: pd.Series) -> bool:
    """Whether a column's first cell that is there is an image."""
    if cells.dtype != object and not str(cells.dtype).startswith(("binary", "large_binary", "struct")):
        return False
    first = cells.first_valid_index()
    return first is not None and is_image(cells.loc[first] if cells.index.is_unique else cells.dropna().iloc[0])


def image_format(cells: pd.Series, name: object) -> ImageFormat:
    """What the images of a column have in common, as its first one shows it.

    Raises
    ------
    DataError
        If a cell is no image, or float pixels lie outside [0, 1].
    """
    first = next(iter(cells.dropna()), None)
    if first is None:
        raise DataError(f"column {name!r} is to hold images, but has none")
    row = int(np.flatnonzero(cells.notna().to_numpy())[0])
    return _format_of(_array(first, name, row), name, row)


def read_images(cells: pd.Series, expected: ImageFormat, name: object) -> ImageCells:
    """Read one column of images; a missing image, a NaN and a masked pixel are not observed.

    Raises
    ------
    DataError
        Naming the first row whose image is of another size, mode or type than ``expected``, or unreadable.
    """
    uniform = _uniform_block(cells, expected, name)
    if uniform is not None:
        return uniform
    values = np.zeros((len(cells), expected.n_pixels), dtype=np.float32)
    observed = np.ones(values.shape, dtype=np.bool_)
    for row, (cell, absent) in enumerate(zip(cells, cells.isna(), strict=True)):
        if absent:
            observed[row] = False
            continue
        image = _array(cell, name, row)
        if not isinstance(cell, np.ndarray):
            image = _laid_out(image, expected)
        found = _format_of(image, name, row)
        if found != expected:
            raise DataError(
                f"column {name!r}: the image in row {row} is {found}, laid out {found.layout}, but those of training "
                f"were {expected}, laid out {expected.layout}; {_remedy(found, expected)}"
            )
        values[row], observed[row] = _flat(image, expected)
    return ImageCells(values, observed)


def _uniform_block(cells: pd.Series, expected: ImageFormat, name: object) -> ImageCells | None:
    """The same in one step where all cells are plain arrays of one shape and type; None where they are not."""
    kinds = {(type(cell), getattr(cell, "shape", None), getattr(cell, "dtype", None)) for cell in cells}
    if len(kinds) != 1 or next(iter(kinds))[0] is not np.ndarray:
        return None
    block = np.stack(cells.tolist())
    if block.dtype.kind == "f" or _format_of(block[0], name, 0) != expected:
        return None  # float pixels have a range to check, and may be NaN
    if expected.layout == "HWC":
        block = block.transpose(0, 3, 1, 2)
    values = block.reshape(len(block), -1).astype(np.float32)
    return ImageCells(values, np.ones(values.shape, dtype=np.bool_))


def to_images(values: npt.NDArray[Any], expected: ImageFormat) -> npt.NDArray[Any]:
    """Pixels (N, C * H * W) in their own units as images (N, …) like those of training."""
    images = values.reshape(len(values), *expected.shape)
    if expected.layout == "HW":
        images = images[:, 0]
    elif expected.layout == "HWC":
        images = images.transpose(0, 2, 3, 1)
    whole = expected.pixels == "uint8"
    fitting: npt.NDArray[Any] = np.clip(np.round(images) if whole else images, 0, 255 if whole else 1)
    return fitting.astype(np.uint8 if whole else np.float32)


def fill_pixels(cells: pd.Series, made: pd.Series, name: object) -> pd.Series:
    """Images with their missing pixels taken from those of ``made``, the others as they are to the last digit.

    Black-and-white images that miss pixels come back as ``made`` are: fractions, if that is what they hold.
    """
    filled = [
        new if absent else _filled(_array(cell, name, row), new)
        for row, (cell, absent, new) in enumerate(zip(cells, cells.isna(), made, strict=True))
    ]
    return pd.Series(as_cells(filled), index=cells.index)


def _filled(image: npt.NDArray[Any], made: npt.NDArray[Any]) -> npt.NDArray[Any]:
    plain = np.asarray(image)
    hidden = np.ma.getmaskarray(image) if isinstance(image, np.ma.MaskedArray) else np.zeros(plain.shape, np.bool_)
    if plain.dtype.kind == "f":
        hidden = hidden | np.isnan(plain)
    dtype = made.dtype if plain.dtype == np.bool_ else plain.dtype
    filled: npt.NDArray[Any] = np.where(hidden, made, plain).astype(dtype)
    return filled


def as_cells(images: Sequence[npt.NDArray[Any]] | npt.NDArray[Any]) -> npt.NDArray[np.object_]:
    """N images as N cells of a table."""
    cells = np.empty(len(images), dtype=object)
    for row, image in enumerate(images):
        cells[row] = image
    return cells


def is_image_batch(data: object) -> bool:
    """Whether ``data`` is an array of images, (N, H, W), (N, H, W, C) or (N, C, H, W), or of N cells that hold one."""
    if not isinstance(data, np.ndarray):
        return False
    if data.dtype == object:
        return data.ndim == 1 and len(data) > 0 and is_image(data[0])
    return data.ndim in (3, 4) and data.dtype.kind in "buif"


def encode_picture(image: npt.NDArray[Any]) -> bytes:
    """An image of bytes, (H, W), (H, W, 1 or 3) or channels first, as a PNG.

    Raises
    ------
    MissingDependencyError
        Without Pillow.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError("pictures as bytes need Pillow: pip install pillow") from error
    layout = _shape_and_layout(image.shape)[1]
    plain = image.transpose(1, 2, 0) if layout == "CHW" else image
    written = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(plain.squeeze())).save(written, format="PNG")
    return written.getvalue()


def decode_picture(content: bytes) -> npt.NDArray[Any]:
    """A JPEG or PNG as an array: (H, W) when grey or black and white, (H, W, 3) in colour.

    Raises
    ------
    ValueError
        If the content is no picture, or a damaged one.
    MissingDependencyError
        Without Pillow.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingDependencyError("pictures as bytes need Pillow: pip install pillow") from error
    try:
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()
            return _of_pil(picture)
    except UnidentifiedImageError as error:
        raise ValueError("neither a JPEG nor a PNG, or its beginning is damaged") from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"a damaged picture: {error}") from error


def _of_pil(picture: Any) -> npt.NDArray[Any]:
    """Palettes become RGB, transparency is dropped; other modes say what they are."""
    if picture.mode in ("P", "RGBA", "CMYK"):
        picture = picture.convert("RGB")
    elif picture.mode == "LA":
        picture = picture.convert("L")
    elif picture.mode.startswith("I;16"):
        sixteen: npt.NDArray[Any] = np.asarray(picture)
        return (sixteen >> 8).astype(np.uint8)
    if picture.mode not in _MODES:
        raise ValueError(f"a picture of mode {picture.mode!r}; convert it to L (grey) or RGB")
    return np.asarray(picture)


def _is_pil(cell: object) -> bool:
    return type(cell).__module__.startswith("PIL.")


def _array(cell: Any, name: object, row: int) -> npt.NDArray[Any]:
    """One cell as an array."""
    if isinstance(cell, dict):
        cell = cell.get("bytes")
    try:
        if isinstance(cell, (bytes, bytearray)):
            return decode_picture(bytes(cell))
        if _is_pil(cell):
            return _of_pil(cell)
    except ValueError as error:
        raise DataError(f"column {name!r}, row {row}: {error}") from error
    if isinstance(cell, np.ndarray):
        return cell
    raise DataError(f"column {name!r} holds images, but row {row} holds {type(cell).__name__}; give it an image")


def _format_of(image: npt.NDArray[Any], name: object, row: int) -> ImageFormat:
    shape, layout = _shape_and_layout(image.shape)
    if shape is None:
        raise DataError(
            f"column {name!r}: the image in row {row} has shape {image.shape}; an image is (height, width), or that "
            f"with {' or '.join(map(str, CHANNELS))} channels first or last"
        )
    if min(shape) < 1:
        raise DataError(f"column {name!r}: the image in row {row} is empty, its shape is {image.shape}")
    return ImageFormat(shape, _pixel_type(image, name, row), layout)


def _shape_and_layout(shape: Sequence[int]) -> tuple[tuple[int, int, int] | None, PixelLayout]:
    if len(shape) == 2:
        return (1, shape[0], shape[1]), "HW"
    if len(shape) == 3 and shape[2] in CHANNELS:
        return (shape[2], shape[0], shape[1]), "HWC"
    if len(shape) == 3 and shape[0] in CHANNELS:
        return (shape[0], shape[1], shape[2]), "CHW"
    return None, "HW"


def _pixel_type(image: npt.NDArray[Any], name: object, row: int) -> PixelType:
    if image.dtype == np.bool_:
        return "bool"
    if image.dtype == np.uint8:
        return "uint8"
    if image.dtype.kind == "f":
        present = np.ma.compressed(image) if isinstance(image, np.ma.MaskedArray) else image
        present = present[~np.isnan(present)]
        if present.size and (present.min() < 0.0 or present.max() > 1.0):
            raise DataError(
                f"column {name!r}: the image in row {row} has float pixels from {present.min():g} to "
                f"{present.max():g}; float pixels lie in [0, 1]: divide by the largest value, or convert to uint8"
            )
        return "float"
    raise DataError(
        f"column {name!r}: the image in row {row} has pixels of type {image.dtype}; use uint8 (0 to 255), float (0 to "
        "1) or bool"
    )


def _laid_out(image: npt.NDArray[Any], expected: ImageFormat) -> npt.NDArray[Any]:
    """A decoded picture, (H, W) or (H, W, 3), with its axes as training had them: a file knows no other order."""
    if expected.layout == "HW":
        return image
    channels_last = np.atleast_3d(image)
    return channels_last.transpose(2, 0, 1) if expected.layout == "CHW" else channels_last


def _remedy(found: ImageFormat, expected: ImageFormat) -> str:
    if found.pixels != expected.pixels:
        ways = {"uint8": "(image * 255).round().astype('uint8')", "float": "image / 255", "bool": "image > 127"}
        return f"convert the pixels, such as by {ways[expected.pixels]}"
    if found.shape[0] != expected.shape[0]:
        return "convert between grey and RGB"
    return "transpose it" if found.shape == expected.shape else "resize or crop it"


def _flat(image: npt.NDArray[Any], expected: ImageFormat) -> tuple[Pixels, BoolArray]:
    """Values and observed of one image, channels first, (C * H * W,)."""
    hidden = np.ma.getmaskarray(image) if isinstance(image, np.ma.MaskedArray) else None
    plain = np.asarray(image)
    if expected.layout == "HWC":
        plain = plain.transpose(2, 0, 1)
        hidden = None if hidden is None else hidden.transpose(2, 0, 1)
    values = plain.astype(np.float32).reshape(-1)
    observed = ~np.isnan(values) if expected.pixels == "float" else np.ones(len(values), dtype=np.bool_)
    if hidden is not None:
        observed &= ~hidden.reshape(-1)
    return np.where(observed, values, 0.0).astype(np.float32), observed
