"""Objectives that are more than a bound: what each learns that the ELBO alone does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from anomaly_cvae import CVAEDetector
from anomaly_cvae.encoding import FittedColumn
from anomaly_cvae.errors import ConditionError, ParameterError
from anomaly_cvae.model import CVAE, Architecture
from anomaly_cvae.networks import Condition
from anomaly_cvae.objectives import (
    Adversarial,
    BoundObjective,
    Draws,
    Hybrid,
    Objective,
    SemiSupervised,
    adversarial,
    objective,
)
from anomaly_cvae.objectives.adversarial import otherwise
from anomaly_cvae.objectives.step import inference_loss
from anomaly_cvae.rows import Batch, DeviceRows
from anomaly_cvae.training import TrainingSettings, train

TINY: dict[str, Any] = {
    "n_estimators": 1, "hidden_dims": (16,), "latent_dim": 2, "max_steps": 150, "batch_size": 64, "mask_rate": 0.0,
    "learning_rate": 1e-2, "device": "cpu", "random_state": 0,
}  # fmt: skip


def clusters(n: int = 400, n_labelled: int | None = None, seed: int = 0) -> pd.DataFrame:
    """Two clusters that touch along x and are told apart along y; of few rows the cluster is known."""
    rng = np.random.default_rng(seed)
    left = np.arange(n) % 2 == 0
    frame = pd.DataFrame({"x": rng.normal(size=n), "y": np.where(left, -2.0, 2.0) + 0.5 * rng.normal(size=n)})
    frame["side"] = np.where(left, "left", "right").astype(object)
    if n_labelled is not None:
        frame.loc[n_labelled:, "side"] = None
    return frame


def images(n: int = 96, seed: int = 0) -> np.ndarray:
    """Bright squares (N, 8, 8) at one of four places on a dark ground."""
    rng = np.random.default_rng(seed)
    made = rng.normal(40, 6, (n, 8, 8))
    for image, (i, j) in zip(made, rng.integers(0, 2, (n, 2)) * 4, strict=True):
        image[i : i + 4, j : j + 4] += 150
    return np.clip(made, 0, 255).astype(np.uint8)


def brightest_quarter(made: np.ndarray) -> np.ndarray:
    return made.reshape(len(made), 2, 4, 2, 4).mean(axis=(2, 4)).reshape(len(made), 4).argmax(axis=1)


def bank(shape: tuple[int, int, int] = (1, 8, 8), **changes: Any) -> CVAE:
    column = FittedColumn("image", "normal", observed=100, shape=shape)
    return CVAE(Architecture(1, 2, (8,), channels=(4, 8), **changes), (column,), seed=1)


def batch_of(model: CVAE, n: int = 6) -> Batch:
    return Batch(torch.randn((1, n, model.n_cells), generator=torch.Generator().manual_seed(0)), None, None)


def draws(seed: int = 0) -> Draws:
    return Draws(torch.Generator().manual_seed(seed), torch.device("cpu"), torch.float32)


# ---------------------------------------------------------------------- what every objective does


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("elbo", BoundObjective), ("iwae", BoundObjective), ("semi_supervised", SemiSupervised), ("hybrid", Hybrid),
        ("vae_gan", Adversarial),
    ],
)  # fmt: skip
def test_an_objective_is_made_anew_for_its_name(name: str, kind: type[Objective]) -> None:
    first, second = objective(name, 2, 0.1), objective(name, 2, 0.1)
    assert type(first) is kind
    assert first is not second


@pytest.mark.parametrize("name", ["elbo", "iwae", "vae_gan", "hybrid"])
def test_a_step_has_one_finite_loss_per_member_and_row_and_a_gradient(name: str) -> None:
    model = bank(observed_condition=name == "hybrid")
    own = objective(name, 2)
    own.start(model, draws(), 1e-3)
    found = own.loss(model, batch_of(model), draws(), 1.0)
    assert found.rows.shape == (1, 6)
    assert torch.isfinite(found.rows).all()
    found.rows.mean().backward()
    for part in (model.encoder, model.decoder):
        assert any(p.grad is not None and p.grad.any() for p in part.parameters())
    held_out = own.held_out(model, batch_of(model), torch.zeros(1, 2))
    assert held_out.shape == (1, 6)


# ---------------------------------------------------------------------- semi-supervised


@pytest.fixture(scope="module")
def semi() -> CVAEDetector:
    return CVAEDetector("side", objective="semi_supervised", **TINY).fit(clusters(n_labelled=8))


def test_a_few_labels_and_many_rows_tell_the_clusters_apart(semi: CVAEDetector) -> None:
    new = clusters(200, seed=1)
    truth = new["side"].to_numpy()
    for method in ("head", "elbo"):
        probabilities = semi.condition_proba(new, method=method)
        assert (probabilities.columns[probabilities.to_numpy().argmax(axis=1)] == truth).mean() > 0.95
    assert set(semi.schema_.class_names) == {"left", "right"}


def test_rows_without_a_label_teach_the_model_of_each_class(semi: CVAEDetector) -> None:
    """Eight rows alone do not show how far a class reaches; the others do."""
    new = clusters(200, seed=1)
    alone = CVAEDetector("side", **TINY).fit(clusters(n_labelled=8).dropna())
    assert semi.negative_elbo(new).mean() < alone.negative_elbo(new).mean() - 0.5
    wrong = new.assign(side=np.where(new["side"] == "left", "right", "left"))
    assert np.median(semi.negative_elbo(wrong)) > np.median(semi.negative_elbo(new)) + 3.0


def test_rows_without_a_label_move_the_weights() -> None:
    """The unlabelled rows are learned from, not left out."""
    some = clusters(n_labelled=8)
    moved = some.copy()
    moved.loc[8:, "x"] += 50.0
    settings = {**TINY, "max_steps": 60}
    first, second = (CVAEDetector("side", objective="semi_supervised", **settings).fit(x) for x in (some, moved))
    far = clusters(20, seed=1).assign(x=50.0)
    assert (second.negative_elbo(far) < first.negative_elbo(far)).all()


def test_a_semi_supervised_detector_is_the_same_after_loading(semi: CVAEDetector, tmp_path: Path) -> None:
    loaded = CVAEDetector.load(semi.save(tmp_path / "model"), device="cpu")
    new = clusters(20, seed=1)
    np.testing.assert_allclose(loaded.negative_elbo(new), semi.negative_elbo(new), rtol=1e-5, atol=1e-5)
    pd.testing.assert_frame_equal(loaded.condition_proba(new, method="head"), semi.condition_proba(new, method="head"))


def test_with_all_labels_it_learns_as_well() -> None:
    detector = CVAEDetector("side", objective="semi_supervised", **TINY).fit(clusters())
    found = detector.condition_proba(clusters(200, seed=1), method="head").to_numpy().argmax(axis=1)
    assert (found == np.arange(200) % 2).mean() > 0.95


def test_the_inference_head_beside_the_elbo_tells_the_clusters_apart() -> None:
    detector = CVAEDetector("side", inference_head=True, **TINY).fit(clusters())
    found = detector.condition_proba(clusters(200, seed=1), method="head").to_numpy().argmax(axis=1)
    assert (found == np.arange(200) % 2).mean() > 0.95


def test_labels_may_be_missing_in_no_other_objective_and_never_all_of_them() -> None:
    with pytest.raises(ConditionError, match=r"missing \(NaN\) in row 8.*objective='semi_supervised'"):
        CVAEDetector("side", **TINY).fit(clusters(n_labelled=8))
    with pytest.raises(ConditionError, match="'side' is missing in every row"):
        CVAEDetector("side", objective="semi_supervised", **TINY).fit(clusters(n_labelled=0))


# ---------------------------------------------------------------------- hybrid


def test_the_hybrid_predicts_the_rest_from_what_is_observed() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=600)
    frame = pd.DataFrame({"x": x, "y": 3.0 * x + 0.3 * rng.normal(size=600)})
    settings = {**TINY, "max_steps": 300}
    detector = CVAEDetector(objective="hybrid", train_samples=2, condition_on_observed=True, **settings).fit(
        frame[:500]
    )
    new = frame[500:]
    filled = detector.impute(new.assign(y=np.nan))
    assert np.sqrt(np.mean((filled["y"] - new["y"]) ** 2)) < 0.5 * new["y"].std()
    given = detector.negative_log_likelihood(new, given={"x": True})
    alone = detector.negative_log_likelihood(new.assign(x=np.nan))
    assert given.mean() < alone.mean() - 0.3
    lines = detector.impute_intervals(new.assign(y=np.nan), random_state=0)
    inside = (new["y"].to_numpy() > lines["low"]) & (new["y"].to_numpy() < lines["high"])
    assert 0.7 < inside.mean() <= 1.0


def test_the_hybrid_needs_an_observed_part() -> None:
    with pytest.raises(ParameterError, match="set condition_on_observed=True"):
        CVAEDetector(objective="hybrid", **TINY).fit(clusters()[["x", "y"]])
    model = bank()
    with pytest.raises(ParameterError, match="set condition_on_observed=True"):
        Hybrid().loss(model, batch_of(model), draws(), 1.0)


# ---------------------------------------------------------------------- VAE/GAN


def test_the_discriminator_learns_from_steps_of_its_own() -> None:
    model, own = bank(), Adversarial()
    own.start(model, draws(), 1e-2)
    before = [p.detach().clone() for p in networks_of(own)]
    own.loss(model, batch_of(model), draws(), 1.0).rows.mean().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, networks_of(own), strict=True))
    own.after(1e-2)
    assert all((a != b).any() for a, b in zip(before, networks_of(own), strict=True) if a.numel() > 1)


def networks_of(own: Adversarial) -> list[torch.Tensor]:
    return list(own.discriminator.parameters())


def test_the_discriminator_becomes_harder_to_fool() -> None:
    model, own = bank(), Adversarial()
    real = Batch(torch.as_tensor(images(32) / 60 - 1.5, dtype=torch.float32).reshape(1, 32, 64), None, None)
    own.start(model, draws(), 1e-2)
    before = own.loss(model, real, draws(99), 1.0).rows.mean()
    for step in range(30):
        own.loss(model, real, draws(step), 1.0)
        own.after(1e-2)
    after = own.loss(model, real, draws(99), 1.0).rows.mean()
    assert after > before + 1.0  # the model is as it was: it has more to learn


def test_the_model_is_not_trained_by_the_discriminators_step_nor_the_discriminator_by_the_models() -> None:
    model, own = bank(), Adversarial()
    own.start(model, draws(), 1e-2)
    own.loss(model, batch_of(model), draws(), 1.0)
    weights = [p.detach().clone() for p in model.parameters()]
    own.after(1e-2)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert not [p for p in networks_of(own) if any(p is mine for mine in model.parameters())]


def told_bank(n_classes: int, n_attributes: int) -> tuple[CVAE, Batch]:
    """A bank that is told and tells classes and attributes, and rows of them."""
    n_conditions = n_classes + 1 + n_attributes
    model = bank(n_conditions=n_conditions, n_classes=n_classes, n_attributes=n_attributes)
    model.class_table = torch.eye(n_classes)
    index = torch.arange(6).reshape(1, -1) % max(n_classes, 1)
    parts = [torch.eye(n_classes)[index[0]]] if n_classes else []
    parts += [torch.full((6, 1), 0.3), torch.ones(6, n_attributes)]
    rows = batch_of(model)
    condition = torch.cat(parts, dim=1).unsqueeze(0)
    return model, Batch(rows.values, None, Condition(condition), class_index=index if n_classes else None)


@pytest.mark.parametrize(("n_classes", "n_attributes"), [(3, 0), (0, 4), (3, 2)])
def test_images_are_drawn_under_another_condition_of_the_same_kind(n_classes: int, n_attributes: int) -> None:
    model, rows = told_bank(n_classes, n_attributes)
    seen = [otherwise(model, rows, draws(seed)) for seed in range(20)]
    for other in seen:
        told, own = other.condition.vectors, rows.condition.vectors
        assert told.shape == own.shape
        assert (told[..., n_classes] == 0.3).all()  # a number is no class: it stays
        assert ((told != own)[..., n_classes + 1 :].sum(-1) == min(1, n_attributes)).all()
        if n_classes:
            assert torch.equal(told[..., :n_classes], model.class_table[other.class_index])
    if n_classes:
        assert len(torch.unique(torch.stack([other.class_index for other in seen]))) == n_classes
    assert len(torch.unique(torch.stack([other.condition.vectors for other in seen]), dim=0)) > 10


def test_the_inference_head_learns_from_real_images_alone() -> None:
    model, rows = told_bank(3, 2)
    own = Adversarial()
    own.start(model, draws(), 1e-2)
    own.loss(model, rows, draws(), 1.0).rows.sum().backward()
    found = [p.grad.clone() for p in model.inference_head.parameters()]
    model.zero_grad()
    inference_loss(model, rows).sum().backward()
    for gradient, parameter in zip(found, model.inference_head.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_the_decoder_learns_to_obey_the_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares at four places whose attributes are often wrong: z, which knows the place, is the better guide."""
    shown = images(400)
    place = brightest_quarter(shown)
    wrong = np.random.default_rng(1).random((400, 2)) < 0.3
    table = pd.DataFrame({"low": (place >= 2) ^ wrong[:, 0], "right": (place % 2 == 1) ^ wrong[:, 1]})
    kinds = dict.fromkeys(table, "attribute")
    settings = {**TINY, "latent_dim": 4, "channels": (8, 16), "inference_head": True, "column_kinds": kinds}

    def obeyed(weight: float) -> float:
        monkeypatch.setattr(adversarial, "OBEDIENCE_WEIGHT", weight)
        detector = CVAEDetector(objective="vae_gan", **settings).fit(shown, condition=table)
        made = detector.edit(shown, table, {"low": place < 2})
        return float((brightest_quarter(made) // 2 == (place < 2)).mean())

    assert obeyed(0.5) > obeyed(0.0) + 0.2


def test_the_last_weights_are_kept_although_the_held_out_loss_was_lower_before() -> None:
    """The held-out ELBO is not what a VAE/GAN lowers, so it does not choose the weights, nor stop the training."""
    kept: list[list[torch.Tensor]] = []
    for own in (Adversarial(), BoundObjective()):
        model = bank()
        rows = DeviceRows(batch_of(model, 32).values[0], None, None)
        seen: list[torch.Tensor] = []

        def spoil(epoch: Any, model: CVAE = model, seen: list[torch.Tensor] = seen) -> bool:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.05)
            seen[:] = [parameter.detach().clone() for parameter in model.parameters()]
            return False

        ended = train(
            model, rows, [torch.arange(24)], [torch.arange(24, 32)],
            TrainingSettings(max_steps=24, batch_size=12, learning_rate=1e-4, objective=own, patience=3),
            generator=torch.Generator().manual_seed(0), validation_noise=torch.zeros(1, 2), on_epoch=spoil,
        )  # fmt: skip
        kept.append([parameter.detach().clone() for parameter in model.parameters()])
        spoilt = all((a - b).abs().max() < 0.06 for a, b in zip(kept[-1], seen, strict=True))
        assert spoilt == (not own.keeps_best)
        assert ended.stopped_by == ("early stopping" if own.keeps_best else "max_steps")


def test_a_vae_gan_draws_squares_and_its_scores_mean_something(tmp_path: Path) -> None:
    # Free bits: so few features are worth little, and the latent units would be switched off.
    settings = {**TINY, "channels": (8, 16), "n_samples": 1, "max_steps": 300, "batch_size": 32, "latent_dim": 4}
    settings |= {"learning_rate": 2e-3, "free_bits": 0.5}
    detector = CVAEDetector(objective="vae_gan", **settings).fit(images())
    new = images(40, seed=1)
    noise = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    assert np.median(detector.negative_elbo(noise)) > np.median(detector.negative_elbo(new))
    assert (brightest_quarter(detector.reconstruct(new)) == brightest_quarter(new)).mean() > 0.5
    loaded = CVAEDetector.load(detector.save(tmp_path / "model"), device="cpu")
    np.testing.assert_allclose(loaded.negative_elbo(new), detector.negative_elbo(new), rtol=1e-5, atol=1e-4)


def test_a_vae_gan_is_the_same_again_from_the_same_random_state() -> None:
    settings = {**TINY, "channels": (4, 8), "n_samples": 1, "max_steps": 10, "batch_size": 32}
    first, again, other = (
        CVAEDetector(objective="vae_gan", **{**settings, "random_state": seed}).fit(images()).negative_elbo(images())
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_a_vae_gan_of_a_table_is_refused() -> None:
    with pytest.raises(ParameterError, match="objective='vae_gan' is for images alone"):
        CVAEDetector(objective="vae_gan", **TINY).fit(clusters()[["x", "y"]])


# ---------------------------------------------------------------------- free bits


def test_free_bits_keep_latent_units_from_being_switched_off() -> None:
    """Of noise z has nothing to tell: its KL vanishes, but for what is free."""
    kl = []
    for bits in (0.0, 0.5):
        model, own = bank((1, 4, 4)), BoundObjective(free_bits=bits)
        optimizer, source = torch.optim.Adam(model.parameters(), lr=5e-3), draws()
        for _ in range(150):
            batch = Batch(source.normal(1, 64, 16), None, None)
            optimizer.zero_grad()
            own.loss(model, batch, source, 1.0).rows.mean().backward()
            optimizer.step()
        kl.append(model.terms(batch, torch.zeros(1, 2)).kl.mean(dim=(0, 1)))
    assert (kl[0] < 0.1).all()
    assert (kl[1] > 0.3).all()


def test_scores_charge_the_whole_kl_whatever_was_free_in_training() -> None:
    rows = np.random.default_rng(0).normal(size=(200, 3))
    detector = CVAEDetector(free_bits=0.5, **{**TINY, "max_steps": 40}).fit(rows)
    np.testing.assert_allclose(detector.explain(rows).sum(axis=1), detector.negative_elbo(rows), rtol=1e-5, atol=1e-5)


def test_free_bits_hold_the_kl_of_a_unit_where_its_mean_is_less() -> None:
    model = bank()
    batch, noise = batch_of(model), draws()
    charged = [
        BoundObjective(free_bits=bits).loss(model, batch, draws(), 1.0).rows.mean().item() for bits in (0.0, 100.0)
    ]
    kl = model.terms(batch, noise.latent(model, batch, 1)).kl.sum(-1).mean().item()
    assert charged[1] - charged[0] == pytest.approx(200.0 - kl, abs=0.05)  # two units of 100 nats
