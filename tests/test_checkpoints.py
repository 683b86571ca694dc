"""An interrupted fit continues from its checkpoint and ends where the uninterrupted one does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from anomaly_cvae import CVAEDetector, checkpoints, training
from anomaly_cvae.errors import BundleError

SETTINGS: dict[str, Any] = {
    "n_estimators": 2, "hidden_dims": (8,), "latent_dim": 2, "max_steps": 60, "batch_size": 16, "random_state": 3,
}  # fmt: skip
IMAGES: dict[str, Any] = {
    **SETTINGS, "n_estimators": 1, "channels": (4, 8), "n_samples": 1, "max_steps": 20, "mask_rate": 0.5,
}  # fmt: skip


class PowerCut(Exception):
    """The process dies."""


@pytest.fixture(autouse=True)
def note_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)


@pytest.fixture
def cut_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[int]]:
    """Let the process die after the n-th note; returns the list in which the notes' steps are written down."""
    really_write = checkpoints.write

    def arrange(n: int | None) -> list[int]:
        steps: list[int] = []

        def write(path: Path, tensors: Any, notes: Any) -> None:
            really_write(path, tensors, notes)
            steps.append(notes["step"])
            if len(steps) == n:
                raise PowerCut

        monkeypatch.setattr(checkpoints, "write", write)
        return steps

    return arrange


def table(n: int = 160, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    load = rng.normal(size=n)
    return pd.DataFrame({"load": load, "heat": load + 0.1 * rng.normal(size=n), "type": np.tile(["a", "b"], n // 2)})


def images(n: int = 48) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, 8, 8), dtype=np.uint8)


def fit(X: Any, condition: Any = None, **parameters: Any) -> CVAEDetector:
    conditions = {"condition_columns": "type"} if isinstance(X, pd.DataFrame) else {}
    return CVAEDetector(**{**conditions, **parameters}).fit(X, condition=condition)


def assert_same(found: CVAEDetector, expected: CVAEDetector, X: Any, condition: Any = None) -> None:
    np.testing.assert_array_equal(
        found.negative_elbo(X, condition=condition), expected.negative_elbo(X, condition=condition)
    )
    pd.testing.assert_frame_equal(found.history_.drop(columns="seconds"), expected.history_.drop(columns="seconds"))
    pd.testing.assert_frame_equal(found.thresholds_.drop(columns="set_at"), expected.thresholds_.drop(columns="set_at"))


TABLE_CHANGES = [{}, {"objective": "iwae", "train_samples": 2}, {"prior": "vamp"}, {"inference_head": True}]


@pytest.mark.parametrize("changes", TABLE_CHANGES, ids=["elbo", "iwae", "vamp", "inference head"])
def test_an_interrupted_fit_ends_exactly_where_the_uninterrupted_one_does(
    changes: dict[str, Any], tmp_path: Path, cut_after: Callable[[int | None], list[int]]
) -> None:
    settings = {**SETTINGS, **changes}
    expected = fit(table(), **settings)
    before = cut_after(2)
    with pytest.raises(PowerCut):
        fit(table(), checkpoint=tmp_path / "progress", **settings)
    after = cut_after(None)
    continued = fit(table(), checkpoint=tmp_path / "progress", **settings)
    assert before[-1] < after[0]  # no step was taken twice
    assert after[-1] == 60
    assert_same(continued, expected, table())


IMAGE_CHANGES = [{"mask_rate": 0.5}, {"objective": "vae_gan", "mask_rate": 0.0}, {"prior": "vamp"}]


@pytest.mark.parametrize("changes", IMAGE_CHANGES, ids=["elbo", "vae_gan", "vamp"])
def test_so_does_one_of_images(
    changes: dict[str, Any], tmp_path: Path, cut_after: Callable[[int | None], list[int]]
) -> None:
    settings = {**IMAGES, **changes}
    expected = fit(images(), **settings)
    cut_after(3)
    with pytest.raises(PowerCut):
        fit(images(), checkpoint=tmp_path / "progress", **settings)
    cut_after(None)
    assert_same(fit(images(), checkpoint=tmp_path / "progress", **settings), expected, images())


def test_a_fit_cut_twice_ends_there_too(tmp_path: Path, cut_after: Callable[[int | None], list[int]]) -> None:
    expected = fit(table(), **SETTINGS)
    for n in (1, 2):
        cut_after(n)
        with pytest.raises(PowerCut):
            fit(table(), checkpoint=tmp_path / "progress", **SETTINGS)
    cut_after(None)
    assert_same(fit(table(), checkpoint=tmp_path / "progress", **SETTINGS), expected, table())


def test_a_finished_fit_is_not_trained_again(tmp_path: Path, cut_after: Callable[[int | None], list[int]]) -> None:
    steps = cut_after(None)
    first = fit(table(), checkpoint=str(tmp_path / "progress"), **SETTINGS)
    many = len(steps)
    again = fit(table(), checkpoint=str(tmp_path / "progress"), **SETTINGS)
    assert len(steps) == many
    assert_same(again, first, table())


def test_a_fit_that_stopped_early_ends_there_when_continued(tmp_path: Path) -> None:
    settings = {**SETTINGS, "patience": 1, "learning_rate": 0.5, "max_steps": 400}
    expected = fit(table(), **settings)
    assert expected.history_.attrs["stopped_by"] == "early stopping"
    fit(table(), checkpoint=tmp_path / "progress", **settings)
    assert_same(fit(table(), checkpoint=tmp_path / "progress", **settings), expected, table())


def test_a_folder_that_is_not_there_is_made_and_nothing_else_is_left_in_it(tmp_path: Path) -> None:
    fit(table(), checkpoint=tmp_path / "deep" / "down" / "progress", **SETTINGS)
    assert [file.name for file in (tmp_path / "deep" / "down").iterdir()] == ["progress"]


# ---------------------------------------------------------------------- refusals


@pytest.fixture
def cut(tmp_path: Path, cut_after: Callable[[int | None], list[int]]) -> Path:
    """The checkpoint of a fit that was cut."""
    cut_after(2)
    with pytest.raises(PowerCut):
        fit(table(), checkpoint=tmp_path / "progress", **SETTINGS)
    cut_after(None)
    return tmp_path / "progress"


REFUSED = r"progress is the checkpoint of another training \(model, rows or settings differ\); delete it to start again"


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_dims": (9,)},
        {"latent_dim": 3},
        {"learning_rate": 1e-3},
        {"max_steps": 80},
        {"kl_weight": 0.5},
        {"mask_rate": 0.0},
        {"prior": "learned"},
        {"inference_head": True},
        {"objective": "semi_supervised"},
        {"objective": "iwae", "train_samples": 4},
        {"free_bits": 0.5},
        {"random_state": 4},
    ],
    ids=lambda changes: " ".join(map(str, changes)) + " " + str(next(iter(changes.values()))),
)
def test_the_checkpoint_of_other_settings_is_refused(changes: dict[str, Any], cut: Path) -> None:
    with pytest.raises(BundleError, match=REFUSED):
        fit(table(), checkpoint=cut, **{**SETTINGS, **changes})


@pytest.mark.parametrize(
    "change",
    [
        lambda frame: frame.iloc[:-2],
        lambda frame: frame.assign(load=frame["load"].where(frame.index != 7, 1.5)),
        lambda frame: frame.assign(load=frame["load"] * frame["heat"]),
        lambda frame: frame.assign(type=np.tile(["b", "a"], len(frame) // 2)),
        lambda frame: frame.assign(load=frame["load"].where(frame.index != 7)),
        lambda frame: frame[["heat", "load", "type"]].iloc[::-1],
    ],
    ids=["fewer", "one cell", "a column", "classes", "a missing cell", "another order"],
)
def test_the_checkpoint_of_other_rows_is_refused(change: Callable[[pd.DataFrame], pd.DataFrame], cut: Path) -> None:
    with pytest.raises(BundleError, match=REFUSED):
        fit(change(table()), checkpoint=cut, **SETTINGS)


def test_another_split_of_the_same_rows_is_refused(
    tmp_path: Path, cut_after: Callable[[int | None], list[int]]
) -> None:
    # Black and white pixels have no scale that would tell the splits apart; rows held out by one train the other.
    cut_after(2)
    with pytest.raises(PowerCut):
        fit(images() > 127, checkpoint=tmp_path / "progress", **IMAGES)
    with pytest.raises(BundleError, match=REFUSED):
        fit(images() > 127, checkpoint=tmp_path / "progress", **{**IMAGES, "random_state": 4})


def test_a_refused_checkpoint_is_left_as_it_is(cut: Path) -> None:
    content = cut.read_bytes()
    with pytest.raises(BundleError):
        fit(table(), checkpoint=cut, **{**SETTINGS, "latent_dim": 3})
    assert cut.read_bytes() == content


@pytest.mark.parametrize("damage", ["cut short", "overwritten", "empty", "text", "other tensors"])
def test_a_damaged_checkpoint_is_refused_by_name_with_the_remedy(damage: str, cut: Path) -> None:
    content = cut.read_bytes()
    if damage == "other tensors":
        from safetensors.torch import save_file

        save_file({"a": torch.zeros(2)}, cut)
    else:
        cut.write_bytes(
            {
                "cut short": content[: len(content) // 2],
                "overwritten": bytes(100) + content[100:],
                "empty": b"",
                "text": b"no checkpoint",
            }[damage]
        )
    with pytest.raises(BundleError, match=r"progress is no readable checkpoint .*; delete it to start again"):
        fit(table(), checkpoint=cut, **SETTINGS)
