"""Captured work: what is replayed is what would have been done, and what cannot be captured goes on without."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from anomaly_cvae import training
from anomaly_cvae.encoding import FittedColumn
from anomaly_cvae.errors import TrainingDivergedError
from anomaly_cvae.graphs import WARM_UP, Captured
from anomaly_cvae.model import CVAE, Architecture
from anomaly_cvae.networks import full_float32
from anomaly_cvae.objectives import BoundObjective, Hybrid, Objective, elbo, importance_weighted, objective
from anomaly_cvae.rows import DeviceRows
from anomaly_cvae.training import Training, TrainingSettings, train

SETTINGS = TrainingSettings(max_steps=30, batch_size=16, learning_rate=0.02, mask_rate=0.5, input_noise=0.1)
TRAINING, VALIDATION = torch.arange(0, 90), torch.arange(90, 120)


class Tape:
    """A device that captures: it replays the work itself, and overwrites what was found before, as a graph does."""

    def __init__(self, refuses: str | None = None) -> None:
        self.refuses, self.captured, self.generators = refuses, 0, list[torch.Generator]()

    def beside(self, work: Callable[[], Any]) -> Any:
        return work()

    def record(self, work: Callable[[], Any], generators: Sequence[torch.Generator]) -> Recorded:
        if self.refuses is not None:
            try:
                raise RuntimeError(self.refuses)
            except RuntimeError:
                raise RuntimeError("the end of the capture failed, too")  # noqa: B904  # as torch does it
        self.captured += 1
        self.generators += generators
        return Recorded(work)


class Recorded:
    def __init__(self, work: Callable[[], Any]) -> None:
        self.work, self.found, self.replays = work, None, 0

    def replay(self) -> Any:
        new = self.work()
        self.replays += 1
        if self.found is None:
            self.found = new
        elif new is not None:
            self.found.copy_(new)
        return self.found


# ---------------------------------------------------------------------- captured work


def test_work_is_captured_after_some_calls_and_every_call_counts() -> None:
    x, calls, tape = torch.zeros(()), [], Tape()

    def work() -> Tensor:
        calls.append(1)
        return x.add_(1.0).clone()

    captured = Captured(work, tape, name="work")
    found = [float(captured()) for _ in range(WARM_UP + 3)]
    assert found == [1.0 + n for n in range(WARM_UP + 3)]
    assert tape.captured == 1
    assert captured.is_replayed
    captured.release()
    assert float(captured()) == WARM_UP + 4


def test_what_cannot_be_captured_goes_on_with_a_warning_that_says_why() -> None:
    x = torch.zeros(())
    captured = Captured(lambda: x.add_(1.0), Tape(refuses="no copy while capturing\nmore lines"), name="scoring")
    for _ in range(WARM_UP):
        captured()
    with pytest.warns(UserWarning, match=r"scoring goes on without a CUDA graph.*: no copy while capturing$"):
        captured()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captured()
    assert float(x) == WARM_UP + 2
    assert not captured.is_replayed


def test_an_interrupt_of_a_capture_is_an_interrupt() -> None:
    class Interrupted(Tape):
        def record(self, work: Callable[[], Any], generators: Sequence[torch.Generator]) -> Recorded:
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt:
                raise RuntimeError("unjoined work")  # noqa: B904  # as torch does it

    captured = Captured(lambda: None, Interrupted(), name="work")
    for _ in range(WARM_UP):
        captured()
    with pytest.raises(KeyboardInterrupt):
        captured()


def test_without_a_recorder_work_is_simply_done() -> None:
    x = torch.zeros(())
    captured = Captured(lambda: x.add_(1.0), None, name="work")
    assert [float(captured()) for _ in range(WARM_UP + 2)] == [1.0 + n for n in range(WARM_UP + 2)]


# ---------------------------------------------------------------------- training


def rows() -> DeviceRows:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((120, 4), generator=generator).cumsum(dim=1)
    return DeviceRows(values.double(), None, None)


def bank(**changes: Any) -> CVAE:
    columns = tuple(FittedColumn(f"x{d}", "normal", observed=100) for d in range(4))
    return CVAE(Architecture(2, 2, (8,), missing_indicators=True, **changes), columns, seed=1).double()


def run(model: CVAE, settings: TrainingSettings = SETTINGS, data: DeviceRows | None = None, **more: Any) -> Training:
    return train(
        model, rows() if data is None else data, [TRAINING] * 2, [VALIDATION] * 2, settings,
        generator=torch.Generator().manual_seed(0), validation_noise=torch.ones(1, 2).double(), **more,
    )  # fmt: skip


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> Tape:
    """The processor, taken for a device that the host runs ahead of."""
    made = Tape()
    monkeypatch.setattr(training, "recorder_of", lambda device: made)
    return made


def plain(model: CVAE, settings: TrainingSettings, **more: Any) -> Training:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "recorder_of", lambda device: None)
        return run(model, settings, **more)


def assert_same(model: CVAE, other: CVAE, found: Training, expected: Training) -> None:
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    for own, theirs in zip(found.epochs, expected.epochs, strict=True):
        assert replace(own, seconds=0.0) == replace(theirs, seconds=0.0)


@pytest.mark.parametrize("clip_norm", [5.0, 0.1], ids=["not clipped", "clipped"])
@pytest.mark.parametrize(
    "own",
    [lambda: BoundObjective(elbo, 1, free_bits=0.1), lambda: BoundObjective(importance_weighted, 3), Hybrid],
    ids=["elbo", "iwae", "hybrid"],
)
def test_captured_training_is_training(tape: Tape, own: Callable[[], Objective], clip_norm: float) -> None:
    settings = replace(SETTINGS, clip_norm=clip_norm)
    seen = own is Hybrid
    model, other = bank(observed_condition=seen), bank(observed_condition=seen)
    found = run(model, replace(settings, objective=own()))
    assert tape.captured == 1
    assert len(tape.generators) == 1
    assert_same(model, other, found, plain(other, replace(settings, objective=own())))


def test_capture_may_be_switched_off(tape: Tape) -> None:
    model, other = bank(), bank()
    found = run(model, replace(SETTINGS, capture=False))
    assert tape.captured == 0
    assert_same(model, other, found, plain(other, SETTINGS))


def test_training_that_cannot_be_captured_goes_on(tape: Tape) -> None:
    tape.refuses = "operation not permitted when stream is capturing"
    model, other = bank(), bank()
    with pytest.warns(UserWarning, match="training goes on without a CUDA graph.*not permitted"):
        found = run(model)
    assert_same(model, other, found, plain(other, SETTINGS))


def test_objectives_whose_steps_differ_are_not_captured(tape: Tape) -> None:
    class Looking(BoundObjective):
        capturable = False

    model, other = bank(), bank()
    found = run(model, replace(SETTINGS, objective=Looking()))
    assert tape.captured == 0
    assert_same(model, other, found, plain(other, SETTINGS))
    assert [objective(name).capturable for name in ("elbo", "iwae", "hybrid", "semi_supervised", "vae_gan")] == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_rows_that_come_in_between_steps_are_seen_by_the_captured_step(tape: Tape) -> None:
    def fresh(data: DeviceRows) -> Callable[[int], None]:
        def refresh(step: int) -> None:
            data.values[step % 90] = 0.1 * step

        return refresh

    model, other, own, theirs = bank(), bank(), rows(), rows()
    found = run(model, data=own, refresh=fresh(own))
    assert_same(model, other, found, plain(other, SETTINGS, data=theirs, refresh=fresh(theirs)))


def describe(member: int, column: int) -> str:
    return f"column {column}, member {member}"


@pytest.mark.parametrize("spoiled", [0, 17, 29])
def test_a_host_that_runs_ahead_names_the_step_and_the_column_all_the_same(tape: Tape, spoiled: int) -> None:
    def run_into(training_of: Callable[..., Training], model: CVAE) -> str:
        data = rows()

        def refresh(step: int) -> None:
            if step == spoiled:
                data.values[TRAINING, 2] = math.nan

        with pytest.raises(TrainingDivergedError) as raised:
            training_of(model, SETTINGS, data=data, refresh=refresh, describe=describe)
        return str(raised.value)

    model, other = bank(), bank()
    message = run_into(run, model)
    assert f"step {spoiled} in column 2, member 0" in message
    assert message == run_into(plain, other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_long_epoch_does_not_keep_a_divergence_to_itself(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LOOK_EVERY", 4)
    taken: list[int] = []
    data = replace(rows(), values=torch.full((120, 4), math.inf, dtype=torch.float64))
    settings = replace(SETTINGS, max_steps=4000)
    with pytest.raises(TrainingDivergedError, match="step 0"):
        run(bank(), settings, data=data, refresh=taken.append)
    assert len(taken) == 4


# ---------------------------------------------------------------------- no look at a value

KINDS = ("normal", "robust_normal", "student_t", "categorical", "bernoulli", "poisson", "negative_binomial")


def loop_of(settings: TrainingSettings, shape: tuple[int, int, int] | None, **changes: Any) -> Any:
    """A loop over every kind of column, with conditions, missing cells and classes."""
    columns = tuple(FittedColumn(kind, kind, observed=100, n_levels=2) for kind in KINDS)
    if shape is not None:
        columns = (*columns, FittedColumn("image", "discretised_logistic", observed=100, shape=shape))
    made = Architecture(2, 2, (8,), n_conditions=2, missing_indicators=True, channels=(4,), n_groups=2, n_classes=2)
    model = CVAE(replace(made, **changes), columns, seed=1).float()
    model.class_table = torch.eye(2)
    classes = torch.arange(50) % 2
    cells = torch.ones(50, model.n_cells)
    data = DeviceRows(cells, cells.clone(), model.class_table[classes], torch.zeros_like(cells), classes)
    numbers, noise = [torch.arange(40)] * 2, torch.zeros(1, 2)
    return training._Loop(model, data, numbers, numbers, settings, torch.Generator().manual_seed(0), noise, describe)


class NoLook(TorchDispatchMode):
    """Refuses what a capture refuses: looking at a value, shapes that depend on one, numbers from the host."""

    refused = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "equal", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name.strip("_") in [r.strip("_") for r in self.refused] or by_mask or str(func) == REPEATS:
            raise AssertionError(f"{func} would wait for the host")
        return func(*args, **(kwargs or {}))


REPEATS = "aten.repeat_interleave.Tensor"


@pytest.mark.parametrize(
    ("changes", "architecture", "shape"),
    [
        ({}, {}, None),
        ({"objective": objective("iwae", 3)}, {}, None),
        ({"objective": objective("hybrid")}, {"observed_condition": True}, None),
        ({}, {"pseudo_inputs": 3}, None),
        ({}, {"learned_prior": True}, (1, 7, 5)),
        ({"mask_shapes": "quadrants"}, {"observed_condition": True}, (3, 8, 8)),
        ({"mask_shapes": "cells", "objective": objective("elbo", 2, 0.1)}, {}, (3, 8, 8)),
    ],
    ids=["elbo", "iwae", "hybrid", "vamp", "learned prior", "quadrants", "free bits"],
)
def test_a_step_that_may_be_captured_looks_at_no_value(
    tape: Tape, changes: dict[str, Any], architecture: dict[str, Any], shape: tuple[int, int, int] | None
) -> None:
    settings = replace(SETTINGS, **changes)
    assert settings.objective.capturable
    loop = loop_of(settings, shape, **architecture)
    loop.advance(0)
    with NoLook():
        loop.advance(1)
    loop.losses.look()


@pytest.mark.parametrize(
    "look",
    [
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: torch.tensor([1.0, 2.0]) * x,
        lambda x: torch.repeat_interleave(x, torch.ones(2).long()),
    ],
    ids=["a number", "a truth", "some", "from the host", "so often"],
)
def test_who_looks_is_found_out(look: Callable[[Tensor], Any]) -> None:
    with NoLook(), pytest.raises(AssertionError, match="wait for the host"):
        look(torch.ones(2))


def test_a_step_of_the_objective_that_looks_is_found_out(tape: Tape) -> None:
    loop = loop_of(replace(SETTINGS, objective=objective("semi_supervised")), None)
    with NoLook(), pytest.raises(AssertionError, match="wait for the host"):
        loop.advance(0)


# ---------------------------------------------------------------------- precision


def test_float32_on_a_card_means_float32_and_the_switches_are_put_back() -> None:
    def switches() -> tuple[str, str]:
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision

    before = switches()
    with full_float32(torch.device("cuda")):
        with full_float32(torch.device("cuda")):
            assert switches() == ("ieee", "ieee")
        assert switches() == ("ieee", "ieee")
    assert switches() == before
    with full_float32(torch.device("cpu")):
        assert switches() == before
    with pytest.raises(KeyError), full_float32(torch.device("cuda")):
        raise KeyError
    assert switches() == before
