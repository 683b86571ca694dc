"""Images from a model as a grid to look at: new ones, reconstructed, edited and completed ones, and heat maps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from anomaly_cvae import plots
from anomaly_cvae.errors import DataError, ParameterError
from anomaly_cvae.frames import BoolArray, Level
from anomaly_cvae.images import ImageFormat, as_cells, read_images, to_images
from anomaly_cvae.jobs.explanation import Explanation
from anomaly_cvae.jobs.generation import condition_values, sampled
from anomaly_cvae.jobs.models import OpenModel
from anomaly_cvae.jobs.rows import Rows, image_of
from anomaly_cvae.schema import Name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rgb = npt.NDArray[np.uint8]
HIDDEN_GREY = 127
COLUMNS = 10
QUADRANTS = ("upper-left", "upper-right", "lower-left", "lower-right")
HALVES: Mapping[str, tuple[str, str]] = {
    "left": ("upper-left", "lower-left"),
    "right": ("upper-right", "lower-right"),
    "upper": ("upper-left", "upper-right"),
    "lower": ("lower-left", "lower-right"),
}


@dataclass(frozen=True)
class Change:
    """Conditions that rows are to have, and how: see `CVAEDetector.edit`."""

    to: Mapping[str, Level]
    keep_detail: bool = False
    strength: float = 1.0


@dataclass(frozen=True)
class Grid:
    """Images (rows, columns, height, width, 3) of bytes; ``lines`` says what each row is, "" where it needs no word."""

    images: Rgb
    lines: tuple[str, ...] = ()

    @property
    def picture(self) -> Rgb:
        """All of them side by side, (height, width, 3)."""
        tiled: Rgb = plots.tile(self.images)
        return tiled


def generate_images(
    model: OpenModel,
    n: int,
    condition: Sequence[str] | None,
    random_state: int,
    *,
    noise: bool = False,
    same_z: bool = False,
    columns: int | None = None,
) -> Grid:
    """``n`` new images of one class; without ``condition`` ``n`` of every class, a row each.

    Raises
    ------
    ConditionError, ParameterError
        As `generate_rows` and `image_of` do.
    """
    name, form = image_of(model)
    schema = model.detector.schema_
    if condition is None and len(schema.classes) > 1 and len(schema.categorical_conditions) == len(schema.conditions):
        every = [list(levels) for levels in schema.classes for _ in range(n)]
        drawn = sampled(model, len(every), every, random_state, noise=noise, same_z=same_z)
        images = rgb(drawn[name], form)
        return Grid(images.reshape(len(schema.classes), n, *images.shape[1:]), tuple(schema.class_names))
    drawn = sampled(model, n, condition_values(model, condition), random_state, noise=noise, same_z=same_z)
    return Grid(_wrapped(rgb(drawn[name], form)[None], columns or int(np.ceil(np.sqrt(n)))))


def reconstruct_images(model: OpenModel, rows: Rows, columns: int | None = None) -> Grid:
    """Every image, and below it what the model makes of it."""
    name, form = image_of(model)
    below = rgb(model.reader.reconstruct(rows.frame)[name], form)
    return _one_above_the_other((_seen(rows, name, form), below), columns)


def edit_images(model: OpenModel, rows: Rows, change: Change, columns: int | None = None) -> Grid:
    """Every image, and below it what it would be under other conditions."""
    name, form = image_of(model)
    below = rgb(edit_rows(model, rows, change)[name], form)
    return _one_above_the_other((_seen(rows, name, form), below), columns)


def edit_rows(model: OpenModel, rows: Rows, change: Change) -> pd.DataFrame:
    """The rows as they would be under other conditions."""
    edited: pd.DataFrame = model.reader.edit(
        rows.frame, condition_to=dict(change.to), keep_detail=change.keep_detail, strength=change.strength
    )
    return edited


def complete_images(
    model: OpenModel, rows: Rows, hide: Collection[str], n: int, random_state: int, *, noise: bool = False
) -> Grid:
    """A row per image: itself, what is left of it, and ``n`` ways that the model would complete it."""
    name, form = image_of(model)
    hidden = hidden_pixels(hide, form)
    images = _seen(rows, name, form)
    left = images.copy()
    left[:, hidden] = HIDDEN_GREY
    masked = _with_hidden(rows.frame, name, form, hidden)
    drawn = rgb(model.reader.impute_draws(masked, n, random_state=random_state, noise=noise)[name], form)
    completions = drawn.reshape(len(images), n, *drawn.shape[1:])
    return Grid(np.concatenate([images[:, None], left[:, None], completions], axis=1))


def hidden_pixels(hide: Collection[str], form: ImageFormat) -> BoolArray:
    """Pixels in the quadrants and halves named, (height, width).

    Raises
    ------
    ParameterError
        For a part that there is not, or if nothing would be left to be seen.
    """
    _, height, width = form.shape
    hidden = np.zeros((height, width), dtype=np.bool_)
    for part in hide:
        if part not in (*QUADRANTS, *HALVES):
            raise ParameterError(f"there is no part {part!r} to hide; there are {', '.join((*HALVES, *QUADRANTS))}")
        for quadrant in HALVES.get(part, (part,)):
            down, across = quadrant.split("-")
            rows = slice(height // 2, None) if down == "lower" else slice(0, height // 2)
            hidden[rows, slice(width // 2, None) if across == "right" else slice(0, width // 2)] = True
    if hidden.all() or not hidden.any():
        raise ParameterError(f"to complete an image, hide a part of it, not {'all' if hidden.all() else 'nothing'}")
    return hidden


def heat_map(model: OpenModel, explanation: Explanation) -> Figure:
    """The images explained, where their nats are, and what was expected instead.

    Raises
    ------
    ParameterError
        If the model's x is not one column of images.
    DataError
        If there is no row.
    """
    name, form = image_of(model)
    if not len(explanation.frame):
        raise DataError("there is no row to draw")
    images = rgb(_arrays(explanation.frame[name], name, form), form)
    expected = rgb(model.reader.reconstruct(explanation.frame)[name], form)
    nats = model.reader.explain_pixels(explanation.frame)
    above = np.clip(nats - nats.mean(axis=(1, 2), keepdims=True), 0.0, None)
    titles = [_title(row) for row in explanation.rows.to_dict(orient="records")]
    drawn = (image[..., 0] if form.shape[0] == 1 else image for image in (images, expected))
    shown, instead = (image.astype(np.float64) / 255.0 for image in drawn)
    return plots.surprising_images(shown, above, instead, titles, min(len(titles), 6))


def _title(row: Mapping[Any, Any]) -> str:
    said = f"row {row['row']}" + ("" if row["condition"] in (None, "all") else f", {row['condition']}")
    return f"{said}\n{row['negative_elbo']:,.0f} nats, p {row['p_value']:.2g}"


def rgb(cells: pd.Series | npt.NDArray[Any], form: ImageFormat) -> Rgb:
    """Images as the model gives them, as bytes with three colours last: (N, height, width, 3)."""
    images = np.stack(list(cells))
    if images.dtype != np.uint8:
        images = np.round(255.0 * np.clip(images.astype(np.float64), 0.0, 1.0)).astype(np.uint8)
    if form.layout == "HW":
        images = images[..., None]
    elif form.layout == "CHW":
        images = images.transpose(0, 2, 3, 1)
    # Three colours, of grey images too: a picture is shown as it is, not as ink on paper.
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def _arrays(cells: pd.Series, name: Name, form: ImageFormat) -> npt.NDArray[Any]:
    """Images that may be bytes as arrays like those of training."""
    return to_images(read_images(cells, form, name).values, form)


def _seen(rows: Rows, name: Name, form: ImageFormat) -> Rgb:
    return rgb(_arrays(rows.frame[name], name, form), form)


def _with_hidden(frame: pd.DataFrame, name: Name, form: ImageFormat, hidden: BoolArray) -> pd.DataFrame:
    images = _arrays(frame[name], name, form)
    if form.pixels == "bool":
        images = images > 0.5
    axes = {"HW": hidden, "HWC": hidden[..., None], "CHW": hidden[None]}[form.layout]
    masked = np.ma.array(images, mask=np.broadcast_to(axes, images.shape))
    changed = frame.copy()
    changed[name] = as_cells(masked)
    return changed


def _one_above_the_other(kinds: Sequence[Rgb], columns: int | None) -> Grid:
    return Grid(_wrapped(np.stack(list(kinds)), columns or COLUMNS))


def _wrapped(images: Rgb, columns: int) -> Rgb:
    """Images (kinds, N, …) as rows of at most ``columns``; the kinds of one image stay one above the other."""
    kinds, n = images.shape[:2]
    columns = min(columns, n)
    blocks = -(-n // columns)
    filled = np.full((kinds, blocks * columns, *images.shape[2:]), 255, dtype=np.uint8)
    filled[:, :n] = images
    apart = filled.reshape(kinds, blocks, columns, *images.shape[2:])
    return apart.swapaxes(0, 1).reshape(blocks * kinds, columns, *images.shape[2:])
