"""The training loop: it learns, keeps each member's best weights, and stops for the right reason."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from anomaly_cvae.encoding import FittedColumn
from anomaly_cvae.errors import TrainingDivergedError
from anomaly_cvae.model import CVAE, Architecture
from anomaly_cvae.objectives import BoundObjective, elbo, importance_weighted
from anomaly_cvae.rows import DeviceRows
from anomaly_cvae.training import Epoch, Training, TrainingSettings, epoch_length, train

COLUMNS = tuple(FittedColumn(f"x{d}", "normal", observed=100) for d in range(4))
SETTINGS = TrainingSettings(max_steps=40, batch_size=32, learning_rate=0.02)
TRAINING, VALIDATION = torch.arange(0, 160), torch.arange(160, 240)
NOISE = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])


def rows(dtype: torch.dtype = torch.float64, *, conditional: bool = False) -> DeviceRows:
    """240 rows of four columns that follow two latent units, and a condition that shifts them."""
    generator = torch.Generator().manual_seed(0)
    z, noise = torch.randn((240, 2), generator=generator), torch.randn((240, 4), generator=generator)
    loading = torch.tensor([[1.0, 0.9, 0.0, 0.1], [0.0, 0.2, 1.0, -0.9]])
    values = z @ loading + 0.2 * noise
    condition = torch.eye(2)[torch.arange(240) % 2] if conditional else None
    if condition is not None:
        values = values + condition @ torch.tensor([[1.0, 1.0, 0.0, 0.0], [-1.0, -1.0, 0.0, 0.0]])
    return DeviceRows(values.to(dtype), None, None if condition is None else condition.to(dtype))


def bank(n_members: int = 1, dtype: torch.dtype = torch.float64, **changes: Any) -> CVAE:
    return CVAE(replace(Architecture(n_members, 2, (8,)), **changes), COLUMNS, seed=1).to(dtype)


def run(
    model: CVAE,
    data: DeviceRows | None = None,
    settings: TrainingSettings = SETTINGS,
    *,
    training: Sequence[Tensor] | None = None,
    validation: Sequence[Tensor] | None = None,
    seed: int = 0,
    **more: Any,
) -> Training:
    members = model.architecture.n_members
    return train(
        model,
        rows() if data is None else data,
        training or [TRAINING] * members,
        validation or [VALIDATION] * members,
        settings,
        generator=torch.Generator().manual_seed(seed),
        validation_noise=NOISE.to(next(model.parameters()).dtype),
        **more,
    )


@torch.no_grad()
def held_out_loss(model: CVAE, data: DeviceRows) -> Tensor:
    """Mean negative ELBO (M,) of all held-out rows."""
    batch = data.batch(VALIDATION.expand(model.architecture.n_members, -1))
    return -elbo(model.terms(batch, NOISE.to(data.values.dtype))).mean(1)


def reported_loss(model: CVAE, data: DeviceRows, validation: Sequence[Tensor] | None = None) -> tuple[float, ...]:
    """What an epoch would say of the weights as they are, per member: a training that does not move them."""
    still = replace(SETTINGS, learning_rate=0.0, max_steps=1)
    training = [rows[-1:] for rows in validation] if validation else None
    return run(model, data, still, training=training, validation=validation).epochs[0].validation_per_member


def weights(model: CVAE) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_same_weights(model: CVAE, other: Sequence[Tensor]) -> None:
    assert all(torch.equal(own, theirs) for own, theirs in zip(weights(model), other, strict=True))


def poison(model: CVAE, member: int | slice = slice(None)) -> None:
    """Ruin the weights, so that every later epoch is worse."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[member] += 3.0


# ---------------------------------------------------------------------- learning


@pytest.mark.parametrize("conditional", [False, True])
def test_training_lowers_the_held_out_loss(conditional: bool) -> None:
    data, model = rows(conditional=conditional), bank(2, n_conditions=2 if conditional else 0)
    before = held_out_loss(model, data)
    training = run(model, data, replace(SETTINGS, max_steps=150))
    after = held_out_loss(model, data)
    assert (after < before - 0.5).all()
    assert training.stopped_by == "max_steps"
    assert training.epochs[-1].step == 150


@pytest.mark.parametrize(
    "changes",
    [
        {"input_noise": 0.1},
        {"mask_rate": 0.5},
        {"objective": BoundObjective(elbo, 3)},
        {"objective": BoundObjective(importance_weighted, 3)},
        {"objective": BoundObjective(elbo, 1, free_bits=0.1)},
        {"kl_weight": 0.5},
    ],
    ids=["input noise", "hidden cells", "three samples", "iwae", "free bits", "less kl"],
)
def test_every_way_of_training_learns_and_leaves_the_rows_as_they_are(changes: dict[str, Any]) -> None:
    data, model = rows(), bank(2, missing_indicators=True)
    untouched, before = data.values.clone(), held_out_loss(model, data)
    run(model, data, replace(SETTINGS, max_steps=150, **changes))
    assert (held_out_loss(model, data) < before - 0.3).all()
    assert torch.equal(data.values, untouched)


def test_hiding_cells_in_training_hides_those_already_missing_too() -> None:
    data = rows()
    observed = torch.ones_like(data.values)
    observed[:, 0] = 0.0
    hidden = replace(data, observed=observed)
    loud = replace(hidden, values=torch.where(observed > 0, data.values, 1e3))
    quiet_model, loud_model = bank(missing_indicators=True), bank(missing_indicators=True)
    settings = replace(SETTINGS, mask_rate=0.5)
    run(quiet_model, hidden, settings)
    run(loud_model, loud, settings)
    assert_same_weights(quiet_model, weights(loud_model))


def test_a_linear_model_without_hidden_layers_learns() -> None:
    data, model = rows(), bank(hidden_dims=())
    before = held_out_loss(model, data)
    run(model, data, replace(SETTINGS, max_steps=150))
    assert held_out_loss(model, data) < before - 0.3


def test_a_learned_prior_learns() -> None:
    data, model = rows(conditional=True), bank(n_conditions=2, learned_prior=True)
    before = weights(model.prior_network)
    run(model, data, replace(SETTINGS, max_steps=60))
    assert all((old != new).any() for old, new in zip(before, weights(model.prior_network), strict=True))


# ---------------------------------------------------------------------- randomness


@pytest.mark.parametrize("changes", [{}, {"input_noise": 0.1, "mask_rate": 0.5, "objective": BoundObjective(elbo, 2)}])
def test_the_generator_is_the_only_randomness(changes: dict[str, Any]) -> None:
    settings = replace(SETTINGS, **changes)
    first, again, other = bank(2), bank(2), bank(2)
    torch.manual_seed(1)
    np.random.seed(1)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1]
    run(first, settings=settings, seed=5)
    assert torch.equal(torch_state, torch.get_rng_state())
    np.testing.assert_array_equal(numpy_state, np.random.get_state()[1])
    torch.manual_seed(2)
    run(again, settings=settings, seed=5)
    run(other, settings=settings, seed=6)
    assert_same_weights(again, weights(first))
    assert any(not torch.equal(a, b) for a, b in zip(weights(first), weights(other), strict=True))


# ---------------------------------------------------------------------- best weights


def test_the_best_epochs_weights_are_restored() -> None:
    data, model = rows(), bank()
    seen: list[tuple[Epoch, list[Tensor]]] = []

    def on_epoch(epoch: Epoch) -> bool:
        seen.append((epoch, weights(model)))
        if epoch.epoch == 4:
            poison(model)
        return False

    training = run(model, data, on_epoch=on_epoch)
    assert len(training.epochs) > 5
    best, best_weights = min(seen, key=lambda pair: pair[0].validation_negative_elbo)
    assert best.epoch <= 4
    assert best.improved_members == 1
    assert_same_weights(model, best_weights)
    assert reported_loss(model, data) == pytest.approx([best.validation_negative_elbo], rel=1e-12)
    assert training.epochs[-1].validation_negative_elbo > best.validation_negative_elbo + 1.0


def test_every_member_keeps_its_own_best_weights() -> None:
    data, model = rows(), bank(3)
    seen: list[list[Tensor]] = []

    def on_epoch(epoch: Epoch) -> bool:
        seen.append(weights(model))
        if epoch.epoch in (2, 4):
            poison(model, {2: 0, 4: 2}[epoch.epoch])
        return False

    training = run(model, data, on_epoch=on_epoch)
    per_member = np.array([epoch.validation_per_member for epoch in training.epochs])
    best = per_member.argmin(axis=0)
    assert best[0] <= 1
    assert best[2] <= 3
    assert best[1] > 3
    for member, epoch in enumerate(best):
        for parameter, remembered in zip(weights(model), seen[epoch], strict=True):
            assert torch.equal(parameter[member], remembered[member])
    np.testing.assert_allclose(reported_loss(model, data), per_member.min(axis=0), rtol=1e-12)


def test_training_that_only_makes_things_worse_leaves_the_network_as_it_was() -> None:
    model = bank()
    before = weights(model)
    training = run(model, settings=replace(SETTINGS, learning_rate=50.0, max_steps=20))
    assert all(epoch.improved_members == 0 for epoch in training.epochs)
    assert_same_weights(model, before)


def test_a_few_wild_held_out_rows_cannot_decide_which_weights_are_best() -> None:
    data = rows()
    spike = data.values.clone()
    spike[VALIDATION[:4]] = 1e6
    calm, spiky = run(bank(), data), run(bank(), replace(data, values=spike))
    for epoch, other in zip(calm.epochs, spiky.epochs, strict=True):
        assert abs(epoch.validation_negative_elbo - other.validation_negative_elbo) < 1.0


# ---------------------------------------------------------------------- reasons to stop


def test_an_interrupt_keeps_the_best_weights() -> None:
    data, model = rows(), bank()
    best: list[Tensor] = []

    def on_epoch(epoch: Epoch) -> bool:
        if epoch.epoch == 3:
            best.extend(weights(model))
            poison(model)
            raise KeyboardInterrupt
        return False

    training = run(model, data, on_epoch=on_epoch)
    assert training.stopped_by == "interrupt"
    assert [epoch.epoch for epoch in training.epochs] == [1, 2, 3]
    assert_same_weights(model, best)


def test_any_other_error_of_the_callback_is_raised_with_the_best_weights_in_place() -> None:
    model = bank()
    best: list[Tensor] = []

    def on_epoch(epoch: Epoch) -> bool:
        best.extend(weights(model))
        poison(model)
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        run(model, on_epoch=on_epoch)
    assert_same_weights(model, best)


def test_the_callback_can_stop_the_training() -> None:
    training = run(bank(), on_epoch=lambda epoch: epoch.epoch == 2)
    assert training.stopped_by == "callback"
    assert len(training.epochs) == 2


@pytest.mark.parametrize("patience", [1, 3])
def test_training_stops_early_when_nothing_improves(patience: int) -> None:
    model = bank(2)
    before = weights(model)
    training = run(model, settings=replace(SETTINGS, learning_rate=0.0, patience=patience))
    assert training.stopped_by == "early stopping"
    assert len(training.epochs) == patience
    assert_same_weights(model, before)


def test_one_member_that_still_improves_keeps_the_training_going() -> None:
    model = bank(2)

    def on_epoch(epoch: Epoch) -> bool:
        poison(model, 0)
        return False

    training = run(model, settings=replace(SETTINGS, patience=2, learning_rate=0.005), on_epoch=on_epoch)
    assert training.stopped_by == "max_steps"


# ---------------------------------------------------------------------- divergence


def describe(member: int, column: int) -> str:
    return f"column 'x{column}', class 'm{member}'"


def test_an_overflowing_column_is_named_with_the_step() -> None:
    data, model = rows(torch.float32), bank(2, torch.float32)
    before = weights(model)
    values = data.values.clone()
    values[TRAINING, 2] = 1e25  # its square is infinite in float32
    with pytest.raises(TrainingDivergedError, match=r"step 0 in column 'x2', class 'm0'.*learning_rate.*0\.02"):
        run(model, replace(data, values=values), describe=describe)
    assert_same_weights(model, before)


def test_a_column_of_nan_is_named_with_the_step() -> None:
    data, model = rows(), bank(2)
    values = data.values.clone()
    values[100:, 2] = math.nan
    member_rows = [torch.arange(0, 100), torch.arange(80, 160)]
    with pytest.raises(TrainingDivergedError, match=r"step 0 in column 'x2', class 'm1'"):
        run(model, replace(data, values=values), training=member_rows, describe=describe)


def test_a_learning_rate_that_explodes_is_reported_and_the_weights_stay_finite() -> None:
    data, model = rows(torch.float32), bank(dtype=torch.float32)
    before = held_out_loss(model, data)
    with pytest.raises(TrainingDivergedError, match=r"at step \d+ in .*lower learning_rate \(now 1e\+30\)"):
        run(model, data, replace(SETTINGS, learning_rate=1e30))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert (held_out_loss(model, data) <= before).all()


# ---------------------------------------------------------------------- members


@pytest.mark.parametrize("padding", [math.nan, 0.0])
def test_members_with_very_different_numbers_of_rows_see_only_their_own(padding: float) -> None:
    data, model = rows(), bank(3)
    values = data.values.clone()
    values[0] = padding  # row 0 belongs to nobody and fills the shorter tables up
    training = [torch.arange(1, 4), torch.arange(4, 160), torch.arange(160, 161)]
    validation = [torch.arange(161, 162), torch.arange(161, 240), torch.arange(165, 175)]
    data = replace(data, values=values)
    untrained = reported_loss(model, data, validation)
    result = run(model, data, training=training, validation=validation)
    assert all(math.isfinite(epoch.train_negative_elbo) for epoch in result.epochs)
    best = np.min([untrained, *(epoch.validation_per_member for epoch in result.epochs)], axis=0)
    np.testing.assert_allclose(reported_loss(model, data, validation), best, rtol=1e-12)
    # Padding says nothing either: each member alone has the same loss.
    for member, own in enumerate(validation):
        padded_alone = reported_loss(model, data, [own] * 3)
        assert padded_alone[member] == pytest.approx(best[member], rel=1e-10)


def test_rows_of_one_member_never_move_another() -> None:
    data = rows()
    values = data.values.clone()
    values[:80] = 100.0 * values[:80] + 1e4
    training = [torch.arange(80, 160), torch.arange(0, 80)]
    calm, wild = bank(2), bank(2)
    run(calm, data, training=training)
    run(wild, replace(data, values=values), training=training)
    for own, other in zip(weights(calm), weights(wild), strict=True):
        torch.testing.assert_close(own[0], other[0], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(own[1], other[1])


def test_clipping_bounds_what_one_wild_row_can_do() -> None:
    # Adam divides by the gradient's own size, so what clipping bounds is the memory of a wild step.
    data = rows()
    values = data.values.clone()
    values[0] = 1e6
    losses = {}
    for clip_norm in (5.0, 1e30):
        model = bank()
        run(model, replace(data, values=values), replace(SETTINGS, max_steps=150, clip_norm=clip_norm, patience=1000))
        losses[clip_norm] = float(held_out_loss(model, data))
    assert losses[5.0] < losses[1e30] - 0.3


# ---------------------------------------------------------------------- schedule and history


def test_epochs_report_the_schedule() -> None:
    reported: list[Epoch] = []
    training = run(bank(2), on_epoch=lambda epoch: bool(reported.append(epoch)))
    assert training.epochs == reported
    assert [epoch.epoch for epoch in reported] == list(range(1, len(reported) + 1))
    assert [epoch.step for epoch in reported] == list(range(5, 41, 5))
    assert reported[0].kl_weight < 1.0
    assert reported[-1].kl_weight == 1.0
    rates = [epoch.learning_rate for epoch in reported]
    assert max(rates) <= SETTINGS.learning_rate
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.02 * SETTINGS.learning_rate
    seconds = [epoch.seconds for epoch in reported]
    assert seconds == sorted(seconds)
    for epoch in reported:
        assert epoch.validation_negative_elbo == pytest.approx(np.mean(epoch.validation_per_member), rel=1e-12)
        assert math.isfinite(epoch.train_negative_elbo)


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_losses_are_nats_per_row_with_the_kl_weighted_as_at_the_end_of_training(weight: float) -> None:
    # Every row is the same, the decoder ignores z and nothing moves: all steps and epochs have one loss.
    data = replace(rows(), values=rows().values[:1].expand(240, -1))
    model = bank(hidden_dims=())
    with torch.no_grad():
        model.decoder.mlp.layers[0].weight.zero_()
        model.encoder.mlp.layers[0].bias.fill_(1.0)
        terms = model.terms(data.batch(TRAINING[None, :1]), NOISE.double())
    reconstruction, kl = float(-terms.log_prob[0, 0].sum()), float(terms.kl.sum())
    assert kl > 0.1
    settings = replace(SETTINGS, learning_rate=0.0, kl_weight=weight, patience=100)
    epochs = run(model, data, settings).epochs
    for epoch in epochs:
        assert epoch.validation_negative_elbo == pytest.approx(reconstruction + weight * kl, rel=1e-9)
    assert epochs[-1].train_negative_elbo == pytest.approx(reconstruction + weight * kl, rel=1e-9)


def test_the_best_weights_are_the_best_by_the_kl_weight_that_training_has() -> None:
    # Early weights have the least KL: by a weight of 1 they would be the best of a training that has 0.
    data, model = rows(), bank()
    steps = replace(SETTINGS, max_steps=400, kl_weight=0.0, patience=100)
    training = run(model, data, steps)
    assert training.epochs[-1].validation_negative_elbo < training.epochs[0].validation_negative_elbo - 1.0
    with torch.no_grad():
        kept = -model.terms(data.batch(VALIDATION[None]), NOISE.double()).log_prob.sum(-1).mean()
    assert float(kept) < training.epochs[0].validation_negative_elbo - 0.5


def test_members_have_noise_of_their_own_and_in_turn() -> None:
    data, model = rows(), bank(4)
    run(model, data, replace(SETTINGS, max_steps=300, input_noise=(0.0, 1.0)))
    loss = held_out_loss(model, data)
    assert loss[1::2].min() > loss[::2].max() + 0.3


@pytest.mark.parametrize("n_rows", [1, 100, 10_000, 10**7])
@pytest.mark.parametrize("max_steps", [1, 39, 1000])
def test_there_are_at_most_forty_looks_at_the_held_out_rows(n_rows: int, max_steps: int) -> None:
    interval = epoch_length(n_rows, 64, max_steps)
    assert 1 <= interval <= max_steps
    assert math.ceil(max_steps / interval) <= 40


def test_one_step_of_training_is_one_epoch() -> None:
    training = run(bank(), settings=replace(SETTINGS, max_steps=1))
    assert [epoch.step for epoch in training.epochs] == [1]


def test_training_leaves_a_copy_of_the_bank_alone() -> None:
    model = bank()
    copied, before = copy.deepcopy(model), weights(model)
    run(model)
    assert_same_weights(copied, before)
    assert any(not torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


@pytest.mark.parametrize("n_members", [1, 3])
def test_half_the_digits_of_products_learn_as_well(n_members: int) -> None:
    model, halved = bank(n_members, torch.float32), bank(n_members, torch.float32)
    data, settings = rows(torch.float32), replace(SETTINGS, max_steps=120)
    full = run(model, data, settings)
    half = run(halved, data, replace(settings, mixed_precision=True))
    first, last = half.epochs[0].validation_negative_elbo, half.epochs[-1].validation_negative_elbo
    assert first - last > 1.0
    assert last == pytest.approx(full.epochs[-1].validation_negative_elbo, abs=0.1)
    assert all(parameter.dtype == torch.float32 for parameter in halved.parameters())


def test_two_hundred_members_learn_in_one_step_as_one_does() -> None:
    model = bank(200, torch.float32)
    data = rows(torch.float32)
    before = held_out_loss(model, data)
    run(model, data, replace(SETTINGS, max_steps=100))
    gained = before - held_out_loss(model, data)
    assert gained.min() > 0.0
    assert gained.mean() > 0.3


# ---------------------------------------------------------------------- rows that change under way


def test_rows_that_are_brought_in_before_a_step_are_the_ones_it_learns_from() -> None:
    data, whole = rows(), rows()
    other = replace(whole, values=whole.values + 5.0)
    moved, still = bank(), bank()
    steps: list[int] = []

    def refresh(step: int) -> None:
        steps.append(step)
        if step == 1:
            data.replace(TRAINING.numpy(), other, TRAINING.numpy())

    # Held out are rows like those that come in, so that the weights learned of them are the best.
    data.values[VALIDATION] += 5.0
    run(moved, data, replace(SETTINGS, max_steps=150), refresh=refresh)
    run(still, replace(other, values=torch.where(torch.arange(240)[:, None] < 160, whole.values, other.values)),
        replace(SETTINGS, max_steps=150))  # fmt: skip
    assert steps[:3] == [0, 1, 2]
    assert held_out_loss(moved, other) < held_out_loss(still, other) - 1.0


def test_replaced_rows_take_their_condition_and_missing_cells_along() -> None:
    observed = torch.ones(240, 4, dtype=torch.float64)
    data = replace(rows(conditional=True), observed=observed.clone())
    other = replace(rows(conditional=True), observed=torch.zeros_like(observed))
    data.replace(np.array([3, 5]), other, np.array([10, 11]))
    assert torch.equal(data.values[[3, 5]], other.values[[10, 11]])
    assert data.condition is not None
    assert other.condition is not None
    assert torch.equal(data.condition[[3, 5]], other.condition[[10, 11]])
    assert data.observed is not None
    assert data.observed[[3, 5]].sum() == 0
    assert data.observed.sum() == observed.sum() - 8
