"""Figures come out of arrays, of the right make-up, without global state."""

import sys

import numpy as np
import pandas as pd
import pytest

from anomaly_cvae import metrics, plots
from anomaly_cvae.errors import MissingDependencyError

pytest.importorskip("matplotlib")
RNG = np.random.default_rng(0)
IS_ANOMALY = RNG.random(200) < 0.3
SCORES = RNG.normal(size=200) + IS_ANOMALY


def test_roc_and_pr_draws_one_line_per_model(tmp_path):
    curve = metrics.curves(IS_ANOMALY, SCORES)
    figure = plots.roc_and_pr({"one": curve, "two": curve}, {"one": (0.8, 0.6), "two": (0.7, 0.5)})
    roc, pr = figure.axes
    assert [len(roc.lines), len(pr.lines)] == [3, 2]  # the diagonal is the third
    assert "one  0.800" in [text.get_text() for text in roc.get_legend().get_texts()]
    figure.savefig(tmp_path / "curves.png")


def test_score_histograms_show_every_class_that_has_rows():
    classes = np.where(np.arange(200) % 2, "a", "b")
    figure = plots.score_histograms(SCORES, IS_ANOMALY, classes, pd.Series({"a": 1.0, "b": 2.0, "c": 3.0}))
    assert [axis.get_title() for axis in figure.axes if axis.get_title()] == ["class a", "class b"]
    with pytest.raises(ValueError, match="no class"):
        plots.score_histograms(SCORES, IS_ANOMALY, classes, pd.Series({"z": 1.0}))


def test_training_curves():
    history = pd.DataFrame({"step": [1, 2], "train_negative_elbo": [3.0, 2.0], "validation_negative_elbo": [3.5, 2.5]})
    (axis,) = plots.training_curves(history).axes
    assert len(axis.lines) == 2


def test_images():
    images = RNG.random((5, 8, 8))
    assert len(plots.surprising_images(images, images, images, list("abcde"), columns=3).axes) == 3 * 3 * 2
    assert len(plots.image_grid(RNG.random((2, 4, 8, 8)), ["0", "1"]).axes) == 8


def test_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match="pip install matplotlib"):
        plots.figure(1, 1)
