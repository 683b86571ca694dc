"""Figures from arrays; nothing is computed here but positions and colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from anomaly_cvae.errors import MissingDependencyError
from anomaly_cvae.frames import BoolArray, FloatArray
from anomaly_cvae.metrics import Curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1f2937"
NORMAL = "#4b7bb5"
ANOMALY = "#d1495b"
GRID = "#e5e7eb"
MAX_POINTS = 1_000
"""Points of a curve on an interactive page."""
MAX_HISTOGRAMS = 30


def figure(width: float, height: float) -> Figure:
    """An empty figure that belongs to no global state.

    Raises
    ------
    MissingDependencyError
        Without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("figures need matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def roc_and_pr(curves: Mapping[str, Curves], areas: Mapping[str, tuple[float, float]]) -> Figure:
    """ROC and precision-recall curves side by side; ``areas`` (AUROC, average precision) go into the legends."""
    drawn = figure(10, 4.4)
    roc, pr = drawn.subplots(1, 2)
    for name, curve in curves.items():
        auroc, precision = areas[name]
        roc.plot(curve.false_positive_rate, curve.true_positive_rate, label=f"{name}  {auroc:.3f}", lw=1.8)
        pr.plot(curve.recall, curve.precision, label=f"{name}  {precision:.3f}", lw=1.8)
    roc.plot([0, 1], [0, 1], color="#9ca3af", lw=1, ls=":")
    _label(roc, "ROC (area)", "false-positive rate", "true-positive rate")
    _label(pr, "Precision-recall (average precision)", "recall", "precision")
    roc.legend(loc="lower right", fontsize=8)
    pr.legend(loc="lower left", fontsize=8)
    return drawn


def interactive_roc_and_pr(
    curve: Curves, area: tuple[float, float], operating_point: tuple[float, float, float]
) -> str:
    """The same of one model as a page with the threshold under the cursor; it needs no network.

    ``operating_point``: false-alarm rate, recall and precision of the verdicts.

    Raises
    ------
    MissingDependencyError
        Without plotly.
    """
    try:
        from plotly.graph_objects import Scatter
        from plotly.subplots import make_subplots
    except ImportError as error:
        raise MissingDependencyError("interactive figures need plotly: pip install plotly") from error
    titles = (f"ROC, area {area[0]:.3f}", f"PR, average precision {area[1]:.3f}")
    drawn = make_subplots(rows=1, cols=2, subplot_titles=titles, horizontal_spacing=0.1)
    thin = curve.thinned(MAX_POINTS)
    said = (
        "%{yaxis.title.text} %{y:.3f}<br>%{xaxis.title.text} %{x:.3f}<br>score above %{customdata:.3f}<extra></extra>"
    )
    line = {"color": NORMAL, "width": 2}
    drawn.add_scatter(
        x=thin.false_positive_rate, y=thin.true_positive_rate, customdata=thin.roc_threshold, hovertemplate=said,
        line=line, showlegend=False, row=1, col=1,
    )  # fmt: skip
    thresholds = np.append(thin.pr_threshold, np.nan)
    drawn.add_scatter(
        x=thin.recall, y=thin.precision, customdata=thresholds, hovertemplate=said,
        line=line, showlegend=False, row=1, col=2,
    )  # fmt: skip
    false_alarms, recall, precision = operating_point
    mark = {"color": ANOMALY, "size": 11, "symbol": "diamond"}
    name = "the thresholds in use"
    drawn.add_trace(Scatter(x=[false_alarms], y=[recall], mode="markers", marker=mark, name=name), row=1, col=1)
    drawn.add_trace(
        Scatter(x=[recall], y=[precision], mode="markers", marker=mark, name=name, showlegend=False), row=1, col=2
    )
    for column, (x, y) in enumerate((("false-alarm rate", "recall"), ("recall", "precision")), start=1):
        drawn.update_xaxes(title_text=x, range=[-0.02, 1.02], row=1, col=column)
        drawn.update_yaxes(title_text=y, range=[-0.02, 1.02], row=1, col=column)
    drawn.update_annotations(font_size=13)
    drawn.update_layout(
        template="plotly_white", height=460, margin={"l": 50, "r": 20, "t": 50}, legend={"orientation": "h", "y": -0.2}
    )
    page: str = drawn.to_html(include_plotlyjs=True, full_html=True, config={"displaylogo": False})
    return page


def score_histograms(scores: FloatArray, is_anomaly: BoolArray, classes: np.ndarray, thresholds: pd.Series) -> Figure:
    """One histogram of scores per class, normals and anomalies, with the class's threshold."""
    names = [name for name in thresholds.index if (classes == name).any()]
    names = sorted(names, key=lambda name: -(classes == name).sum())[:MAX_HISTOGRAMS]
    if not names:
        raise ValueError(
            f"no class of the rows has a threshold: {sorted(set(classes))} against {list(thresholds.index)}"
        )
    columns = min(5, len(names))
    rows = -(-len(names) // columns)
    drawn = figure(2.4 * columns, 1.8 * rows + 0.5)
    axes = np.atleast_1d(drawn.subplots(rows, columns, sharey=True)).ravel()
    low, high = np.quantile(scores, [0.0, 0.97])
    bins = np.linspace(low, max(high, float(thresholds.max())) * 1.05, 30).tolist()
    for name, axis in zip(names, axes, strict=False):
        own = classes == name
        shown = np.clip(scores[own], bins[0], bins[-1])
        axis.hist(shown[~is_anomaly[own]], bins, color=NORMAL, alpha=0.75, label="normal")
        axis.hist(shown[is_anomaly[own]], bins, color=ANOMALY, alpha=0.6, label="anomaly")
        axis.axvline(thresholds[name], color=INK, lw=1.2, label="threshold")
        axis.set_title(f"class {name}", fontsize=9)
        axis.tick_params(labelsize=7)
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    axes[0].legend(fontsize=7)
    drawn.supxlabel("score (larger ones are drawn in the last bin)", fontsize=9)
    drawn.supylabel("rows", fontsize=9)
    return drawn


def training_curves(history: pd.DataFrame) -> Figure:
    """Training and held-out negative ELBO per epoch."""
    drawn = figure(6, 3.6)
    axis = drawn.subplots()
    axis.plot(history["step"], history["train_negative_elbo"], color=NORMAL, label="training")
    axis.plot(history["step"], history["validation_negative_elbo"], color=ANOMALY, label="held out")
    _label(axis, "Training", "step", "negative ELBO (nats per row)")
    axis.legend()
    return drawn


def surprising_images(
    images: FloatArray,
    nats: FloatArray,
    expected: FloatArray,
    titles: Sequence[str],
    columns: int = 6,
    labels: tuple[str, str, str] = ("the row", "nats above the\nrow's mean", "expected for the\nclaimed class"),
) -> Figure:
    """Image, nats per pixel, and what was expected instead, for N images (N, height, width); ``labels`` name the three.

    Each image has its own scale of red: it shows where the nats are, the title how many.
    """
    rows = -(-len(images) // columns)
    drawn = figure(2.0 * columns, 6.3 * rows)
    groups = drawn.subfigures(rows, 1, squeeze=False)[:, 0]
    brightest = float(images.max())
    for row, group in enumerate(groups):
        chosen = range(row * columns, min((row + 1) * columns, len(images)))
        axes = group.subplots(3, columns, squeeze=False)
        for axis in axes.ravel():
            axis.set_axis_off()
        for place, i in enumerate(chosen):
            axes[0, place].imshow(images[i], cmap="gray_r", vmin=0, vmax=brightest)
            axes[0, place].set_title(titles[i], fontsize=8.5, color=INK)
            axes[1, place].imshow(images[i], cmap="gray_r", vmin=0, vmax=brightest * 2.5)
            axes[1, place].imshow(nats[i], cmap="Reds", vmin=0, vmax=max(float(nats[i].max()), 1e-9), alpha=0.75)
            axes[2, place].imshow(np.clip(expected[i], 0, brightest), cmap="gray_r", vmin=0, vmax=brightest)
        for axis, text in zip(axes[:, 0], labels, strict=True):
            axis.text(-0.12, 0.5, text, transform=axis.transAxes, rotation=90, ha="right", va="center", fontsize=8.5)
    return drawn


def image_grid(images: FloatArray, row_labels: Sequence[str] = (), column_labels: Sequence[str] = ()) -> Figure:
    """Images (rows, columns, height, width), or with colours (…, 3) last, as a grid with labels.

    Grey images of bytes are drawn from 0 to 255, of fractions from 0 to 1; others up to their brightest.
    """
    rows, columns = images.shape[:2]
    drawn = figure(0.62 * columns + (0.9 if row_labels else 0.1), 0.62 * rows + (0.4 if column_labels else 0.1))
    axes = drawn.subplots(rows, columns, squeeze=False)
    shown = {"cmap": "gray_r", "vmin": 0, "vmax": _brightest(images)} if images.ndim == 4 else {}
    for row in range(rows):
        for column in range(columns):
            axes[row, column].imshow(images[row, column], **shown)
            axes[row, column].set_axis_off()
    for row, label in enumerate(row_labels):
        axes[row, 0].text(-0.2, 0.5, label, transform=axes[row, 0].transAxes, ha="right", va="center", fontsize=9)
    for column, label in enumerate(column_labels):
        axes[0, column].set_title(label, fontsize=8, color=INK)
    return drawn


def _brightest(images: FloatArray) -> float:
    if images.dtype == np.uint8:
        return 255.0
    largest = float(images.max())
    return 1.0 if largest <= 1.0 else float(np.quantile(images, 0.999))


def tile(images: np.ndarray, gap: int = 2) -> np.ndarray:
    """Images (rows, columns, H, W) or (…, 3), bytes or fractions, side by side as one picture of bytes.

    Grey images are drawn dark on light, like ink.
    """
    values = images if images.dtype == np.uint8 else np.round(255.0 * np.clip(images.astype(float), 0, 1))
    values = values.astype(np.uint8)
    if values.ndim == 4:
        values = 255 - values
    rows, columns, height, width = values.shape[:4]
    picture = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, *values.shape[4:]), 255, np.uint8)
    for row in range(rows):
        for column in range(columns):
            top, left = gap + row * (height + gap), gap + column * (width + gap)
            picture[top : top + height, left : left + width] = values[row, column]
    return picture


def latent_map(z: FloatArray, classes: np.ndarray, names: Sequence[str]) -> Figure:
    """Posterior means (N, 2) coloured by class (N,), with the circles that hold 39 % and 86 % of N(0, I)."""
    drawn = figure(6.4, 5.6)
    axis = drawn.subplots()
    palette = drawn_colours(len(names))
    for k, name in enumerate(names):
        own = classes == k
        axis.scatter(z[own, 0], z[own, 1], s=4, color=palette[k], label=name, alpha=0.6, linewidths=0)
    angle = np.linspace(0, 2 * np.pi, 200)
    for radius in (1.0, 2.0):
        axis.plot(radius * np.cos(angle), radius * np.sin(angle), color=INK, lw=0.8, ls=":")
    axis.set_aspect("equal")
    _label(axis, "Posterior means; circles: one and two standard deviations of N(0, I)", "z, unit 1", "z, unit 2")
    axis.legend(markerscale=3, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return drawn


def drawn_colours(n: int) -> list[tuple[float, ...]]:
    """``n`` colours that can be told apart."""
    from matplotlib import colormaps

    return [colormaps["tab10"](k % 10) if n <= 10 else colormaps["hsv"](k / n) for k in range(n)]


def _label(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=11, color=INK)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(color=GRID)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
