"""The scoring engine: a score is a function of the row, whatever the batch, the order and the chunks."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from anomaly_cvae import CVAEDetector, presets
from anomaly_cvae.devices import resolve_device
from anomaly_cvae.encoding import Encoded, Encoder
from anomaly_cvae.errors import ParameterError
from anomaly_cvae.fitting import Conditioning, FitSettings, PriorName, fit_model
from anomaly_cvae.frames import level_cells
from anomaly_cvae.model import CVAE, Terms
from anomaly_cvae.networks import Condition, StackedMLP, has_bfloat16
from anomaly_cvae.objectives import elbo
from anomaly_cvae.passes import Limit, padded_length
from anomaly_cvae.priors import low_discrepancy_normal
from anomaly_cvae.rows import Batch
from anomaly_cvae.schema import Schema, infer_column, infer_condition, observed_classes
from anomaly_cvae.scoring import ScoringEngine
from anomaly_cvae.training import TrainingSettings

X_COLUMNS = ("temperature", "delay", "packets", "on", "colour")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
BANKS: dict[str, tuple[Conditioning, PriorName, tuple[str, ...]]] = {
    "shared": ("shared", "aggregate", ("type",)),
    "per_class": ("per_class", "aggregate", ("type",)),
    "learned prior": ("shared", "learned", ("type",)),
    "continuous condition": ("shared", "standard", ("type", "load")),
    "only continuous": ("shared", "aggregate", ("load",)),
    "unconditional": ("shared", "aggregate", ()),
}
DTYPES = [torch.float64, torch.float32]


def table(n_rows: int, seed: int, *, wild: bool = False) -> pd.DataFrame:
    """Rows with every kind of column, missing cells and three types; wild: outliers and unseen levels too."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(["furnace", "fridge", "pump"], n_rows, p=[0.5, 0.3, 0.2])
    frame = pd.DataFrame(
        {
            "type": kind,
            "load": rng.random(n_rows),
            "temperature": np.where(kind == "furnace", 80.0, 5.0) + 3.0 * rng.standard_normal(n_rows),
            "delay": rng.standard_t(3, n_rows),
            "packets": rng.negative_binomial(3, 0.3, n_rows).astype(float),
            "on": rng.integers(0, 2, n_rows).astype(float),
            "colour": rng.choice(["red", "green", "blue"], n_rows),
        }
    )
    missing = pd.DataFrame(rng.random((n_rows, len(X_COLUMNS))) < 0.1, columns=list(X_COLUMNS))
    missing[: n_rows // 3] = False  # some chunks are complete and some are not
    frame[list(X_COLUMNS)] = frame[list(X_COLUMNS)].mask(missing)
    if wild:
        frame.loc[0, "temperature"] = 1e12
        frame.loc[1, "packets"] = 1e9
        frame.loc[2, "colour"] = "mauve"
        frame.loc[3, list(X_COLUMNS)] = np.nan
    return frame


@functools.cache
def fitted(bank: str, dtype: torch.dtype, temperature_unit: float = 1.0) -> tuple[Encoder, ScoringEngine]:
    conditioning, prior, conditions = BANKS[bank]
    frame = table(150, seed=1)
    frame["temperature"] *= temperature_unit
    inferred = tuple(infer_condition(frame[name], name) for name in conditions)
    cells = [level_cells(frame[c.name], c.name) for c in inferred if c.kind == "categorical"]
    columns = tuple(infer_column(frame[name], name, "count" if name == "packets" else None) for name in X_COLUMNS)
    schema = Schema(columns, inferred, observed_classes(cells))
    settings = FitSettings(
        conditioning=conditioning,
        n_estimators=2,
        latent_dim=2,
        hidden_dims=(8,),
        prior=prior,
        n_samples=4,
        scale_floor=0.08,
        false_alarm_rate=0.1,
        contamination=0.1,
        validation_fraction=0.1,
        calibration_fraction=0.2,
        device=torch.device("cpu"),
        dtype=dtype,
        training=TrainingSettings(max_steps=30, batch_size=32, learning_rate=0.02, mask_rate=0.2),
    )
    fit = fit_model(schema, frame, {"delay": "student_t"}, settings, np.random.RandomState(0))
    return fit.model.encoder, fit.model.engine


def new_rows(encoder: Encoder, n_rows: int = 60) -> Encoded:
    return encoder.encode(table(n_rows, seed=2, wild=True))


every_engine = pytest.mark.parametrize("bank", BANKS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def assert_same_scores(scores: np.ndarray, other: np.ndarray, dtype: torch.dtype) -> None:
    assert np.isfinite(other).all()
    np.testing.assert_allclose(scores, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


# ---------------------------------------------------------------------- a score is a function of the row


@every_engine
@every_dtype
@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
def test_the_size_of_the_chunks_does_not_matter(bank: str, dtype: torch.dtype, chunk_rows: int) -> None:
    encoder, engine = fitted(bank, dtype)
    rows = new_rows(encoder, 24)
    chunked = replace(engine, chunk_rows=chunk_rows)
    parts, chunked_parts = engine.column_scores(rows), chunked.column_scores(rows)
    assert_same_scores(chunked.negative_elbo(rows), engine.negative_elbo(rows), dtype)
    assert_same_scores(chunked_parts.columns, parts.columns, dtype)
    assert_same_scores(chunked_parts.kl, parts.kl, dtype)
    assert_same_scores(chunked.posterior_mean(rows), engine.posterior_mean(rows), dtype)
    assert_same_scores(chunked.expected(rows), engine.expected(rows), dtype)


@every_engine
@every_dtype
def test_the_order_of_the_rows_does_not_matter(bank: str, dtype: torch.dtype) -> None:
    encoder, engine = fitted(bank, dtype)
    rows = new_rows(encoder)
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = rows.take(order)
    assert_same_scores(engine.negative_elbo(shuffled), engine.negative_elbo(rows)[order], dtype)
    assert_same_scores(engine.column_scores(shuffled).columns, engine.column_scores(rows).columns[order], dtype)
    assert_same_scores(engine.posterior_mean(shuffled), engine.posterior_mean(rows)[order], dtype)


@every_engine
@every_dtype
def test_a_row_alone_has_the_score_that_it_has_in_a_batch(bank: str, dtype: torch.dtype) -> None:
    encoder, engine = fitted(bank, dtype)
    rows = new_rows(encoder, 15)
    alone = [engine.negative_elbo(rows.take(np.array([n])))[0] for n in range(len(rows))]
    assert_same_scores(np.array(alone), engine.negative_elbo(rows), dtype)


@every_engine
def test_two_calls_agree_to_the_last_bit_and_touch_no_global_generator(bank: str) -> None:
    encoder, engine = fitted(bank, torch.float32)
    rows = new_rows(encoder)
    state = torch.get_rng_state()
    first = engine.negative_elbo(rows)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    np.testing.assert_array_equal(engine.negative_elbo(rows), first)


@every_engine
def test_no_rows_have_no_scores(bank: str) -> None:
    encoder, engine = fitted(bank, torch.float64)
    none = new_rows(encoder).take(np.array([], dtype=np.int64))
    assert engine.negative_elbo(none).shape == (0,)
    assert engine.class_negative_elbo(none).shape == (0, engine.n_classes)
    assert engine.column_scores(none).columns.shape == (0, len(X_COLUMNS))


# ---------------------------------------------------------------------- what the score is


@every_engine
def test_the_score_is_the_mean_over_members_of_the_negative_elbo_of_the_model(bank: str) -> None:
    encoder, engine = fitted(bank, torch.float64)
    rows = new_rows(encoder)
    scores, seen = engine.negative_elbo(rows), 0
    for chunk, _ in engine.posteriors(rows):
        own_class = np.unique(rows.class_index[chunk.places])
        assert len(own_class) == 1
        k = int(own_class[0])
        assert chunk.members == (slice(2 * k, 2 * k + 2) if engine.members_per_class else slice(0, 2))
        prior = None
        if engine.aggregate is not None:
            prior = engine.aggregate.select(chunk.members, 0 if engine.members_per_class else k)
        with torch.no_grad():
            terms = engine.model.terms(chunk.batch, engine.noise, members=chunk.members, prior=prior)
        expected = -elbo(terms).mean(0).numpy() * rows.observed[chunk.places].any(axis=1)
        np.testing.assert_allclose(scores[chunk.places], expected, rtol=1e-10, atol=1e-10)
        seen += len(chunk.places)
    assert seen == len(rows)


@pytest.mark.parametrize("bank", ["shared", "per_class", "unconditional"])
def test_the_score_is_a_density_in_the_units_of_the_column(bank: str) -> None:
    # A power of two, so that the standardised cells, and with them the training, stay the same to the last bit.
    encoder, engine = fitted(bank, torch.float64)
    finer_encoder, finer = fitted(bank, torch.float64, temperature_unit=1024.0)
    frame = table(60, seed=2)
    scores = engine.negative_elbo(encoder.encode(frame))
    finer_scores = finer.negative_elbo(finer_encoder.encode(frame.assign(temperature=1024.0 * frame["temperature"])))
    shift = np.where(frame["temperature"].isna(), 0.0, np.log(1024.0))
    np.testing.assert_allclose(finer_scores, scores + shift, rtol=1e-8, atol=1e-8)


@every_engine
@every_dtype
def test_the_columns_and_the_kl_add_up_to_the_score(bank: str, dtype: torch.dtype) -> None:
    encoder, engine = fitted(bank, dtype)
    rows = new_rows(encoder)
    parts = engine.column_scores(rows)
    np.testing.assert_allclose(parts.total, engine.negative_elbo(rows), rtol=1e-6, atol=1e-9)
    assert (parts.kl >= -1e-6).all()
    assert not parts.columns[~rows.observed].any()
    assert (parts.columns[rows.observed] != 0.0).all()


@every_engine
@every_dtype
def test_a_rows_own_class_costs_what_the_row_costs(bank: str, dtype: torch.dtype) -> None:
    encoder, engine = fitted(bank, dtype)
    rows = new_rows(encoder)
    by_class = engine.class_negative_elbo(rows)
    assert by_class.shape == (len(rows), engine.n_classes)
    own = by_class[np.arange(len(rows)), rows.class_index]
    assert_same_scores(own, engine.negative_elbo(rows), dtype)
    if engine.n_classes > 1:
        observed = rows.observed.any(axis=1)
        assert (np.ptp(by_class[observed], axis=1) > 1e-3).all()


@every_engine
@every_dtype
def test_a_row_without_an_observed_cell_scores_zero(bank: str, dtype: torch.dtype) -> None:
    encoder, engine = fitted(bank, dtype)
    rows = new_rows(encoder)
    assert not rows.observed[3].any()
    assert engine.negative_elbo(rows)[3] == 0.0
    assert not engine.class_negative_elbo(rows)[3].any()
    parts = engine.column_scores(rows)
    assert parts.total[3] == 0.0
    assert parts.kl[3] == 0.0
    assert (engine.negative_elbo(rows)[rows.observed.any(axis=1)] != 0.0).all()


@every_engine
@every_dtype
def test_a_hidden_cell_costs_nothing_and_what_it_held_does_not_matter(bank: str, dtype: torch.dtype) -> None:
    encoder, engine = fitted(bank, dtype)
    rows = new_rows(encoder)
    cells = np.zeros(rows.observed.shape, dtype=np.bool_)
    cells[:, 1] = True
    hidden = rows.hide(cells)
    changed = replace(hidden, values=np.where(cells, np.roll(hidden.values, 1, axis=0), hidden.values))
    assert (changed.values != hidden.values).any()
    assert not engine.column_scores(hidden).columns[:, 1].any()
    assert_same_scores(engine.negative_elbo(changed), engine.negative_elbo(hidden), dtype)


@pytest.mark.parametrize("bank", ["shared", "per_class"])
def test_a_reading_that_is_ordinary_for_another_class_is_expensive(bank: str) -> None:
    encoder, engine = fitted(bank, torch.float64)
    frame = table(90, seed=5)
    ordinary = engine.column_scores(encoder.encode(frame)).columns
    swapped = frame.assign(type=frame["type"].map({"furnace": "fridge", "fridge": "furnace", "pump": "furnace"}))
    absurd = engine.column_scores(encoder.encode(swapped)).columns
    temperature = [column.name for column in encoder.columns].index("temperature")
    seen = encoder.encode(frame).observed[:, temperature]
    assert absurd[seen, temperature].mean() > ordinary[seen, temperature].mean() + 0.5


@every_engine
def test_outliers_and_unseen_levels_cost_more_than_ordinary_rows(bank: str) -> None:
    encoder, engine = fitted(bank, torch.float32)
    scores = engine.negative_elbo(new_rows(encoder))
    # An outlier share of 1 in 1000 bounds what one wild cell costs, but it is still far from ordinary.
    assert scores[0] > np.median(scores) + 25
    assert scores[1] > np.median(scores) + 5
    parts = engine.column_scores(new_rows(encoder)).columns
    colour = [column.name for column in encoder.columns].index("colour")
    assert parts[2, colour] == pytest.approx(np.log(encoder.columns[colour].observed + 3 + 1), rel=1e-6)


# ---------------------------------------------------------------------- expected values and draws


@every_engine
def test_draws_follow_what_is_expected_and_the_generator(bank: str) -> None:
    encoder, engine = fitted(bank, torch.float64)
    rows = encoder.encode(table(20, seed=3))
    drawn = engine.draw(rows, 300, engine.generator(1))
    assert drawn.shape == (300, 20, len(X_COLUMNS))
    np.testing.assert_array_equal(drawn, engine.draw(rows, 300, engine.generator(1)))
    assert not np.array_equal(drawn, engine.draw(rows, 300, engine.generator(2)))
    temperature = [column.name for column in encoder.columns].index("temperature")
    error = drawn[..., temperature].mean(axis=0) - engine.expected(rows)[:, temperature]
    assert (np.abs(error) < 6 * drawn[..., temperature].std(axis=0) / np.sqrt(300)).all()


@pytest.mark.parametrize("bank", ["shared", "per_class", "learned prior"])
def test_expected_values_and_draws_are_in_the_units_of_the_table(bank: str) -> None:
    encoder, engine = fitted(bank, torch.float64)
    frame = table(60, seed=3)
    rows = encoder.encode(frame)
    expected = encoder.decode(engine.expected(rows))["temperature"]
    drawn = encoder.decode(engine.draw(rows, 1, engine.generator(0))[0])["temperature"]
    for kind, typical in {"furnace": 80.0, "fridge": 5.0, "pump": 5.0}.items():
        own = (frame["type"] == kind).to_numpy()
        assert expected[own].median() == pytest.approx(typical, abs=2.5)
        assert drawn[own].median() == pytest.approx(typical, abs=5.0)


def test_latent_coordinates_are_those_of_the_first_member_of_the_class() -> None:
    encoder, engine = fitted("per_class", torch.float64)
    rows = new_rows(encoder)
    coordinates = engine.posterior_mean(rows)
    for chunk, posterior in engine.posteriors(rows):
        np.testing.assert_allclose(coordinates[chunk.places], posterior.mean[0], rtol=1e-10, atol=1e-10)
    assert coordinates.shape == (len(rows), 2)


# ---------------------------------------------------------------------- fixed noise


@pytest.mark.parametrize("n_samples", [2, 3, 4, 8, 64])
@pytest.mark.parametrize("latent_dim", [1, 5, 32])
def test_low_discrepancy_noise_has_mean_0_and_variance_1(n_samples: int, latent_dim: int) -> None:
    points = low_discrepancy_normal(n_samples, latent_dim, seed=3)
    assert points.shape == (n_samples, latent_dim)
    np.testing.assert_allclose(points.mean(axis=0), 0.0, atol=1e-12)
    np.testing.assert_allclose(points.var(axis=0), 1.0, rtol=1e-12)


def test_low_discrepancy_noise_is_a_function_of_its_seed() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = low_discrepancy_normal(8, 3, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    np.testing.assert_array_equal(low_discrepancy_normal(8, 3, seed=3), first)
    assert not np.array_equal(low_discrepancy_normal(8, 3, seed=4), first)
    assert len(np.unique(first, axis=0)) == 8


def test_many_low_discrepancy_points_integrate_better_than_random_ones() -> None:
    def error(points: np.ndarray) -> float:
        return float(np.abs(np.exp(0.5 * points).mean(axis=0) - np.exp(0.125)).max())

    fixed = max(error(low_discrepancy_normal(256, 4, seed)) for seed in range(5))
    random = max(error(np.random.default_rng(seed).standard_normal((256, 4))) for seed in range(5))
    assert fixed < 0.25 * random


def test_one_point_is_finite() -> None:
    assert np.isfinite(low_discrepancy_normal(1, 4, seed=0)).all()


# ---------------------------------------------------------------------- devices


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cpu_and_auto_are_always_there(dtype: torch.dtype) -> None:
    assert resolve_device("cpu", dtype) == torch.device("cpu")
    assert torch.ones(2, dtype=dtype, device=resolve_device("auto", dtype)).sum() == 2


@pytest.mark.parametrize("device", ["abacus", "", "cpu:x", "cuda:99"])
def test_a_device_that_is_not_there_is_a_parameter_error_that_names_it(device: str) -> None:
    with pytest.raises(ParameterError, match=f"device='{device}'.*float32.*cannot be used here"):
        resolve_device(device, torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(ParameterError, match="device='cuda'"):
        resolve_device("cuda", torch.float32)


# ---------------------------------------------------------------------- precision


@pytest.fixture(scope="module")
def wide() -> CVAEDetector:
    """Three hidden layers, so that there are products between hidden ones; trained, so that scores say something."""
    settings = {**presets.BALANCED, "hidden_dims": (32, 32, 32), "max_steps": 150, "random_state": 0, "kl_weight": 1.0}
    return CVAEDetector("side", **settings).fit(_two_sides(600))


def _two_sides(n: int, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    side = np.array(["left", "right"])[rng.integers(0, 2, n)]
    x = rng.normal(size=(n, 6)) @ rng.normal(size=(6, 6)) + np.where(side == "left", -1.0, 1.0)[:, None]
    return pd.DataFrame(x, columns=list("abcdef")).assign(side=side)


def test_halved_products_score_within_their_tolerance(wide: CVAEDetector) -> None:
    engine, encoded = wide.model_.engine, wide._encode(_two_sides(3_000, seed=1), None)
    halved = replace(engine, precision="bfloat16")
    plain, found = engine.negative_elbo(encoded), halved.negative_elbo(encoded)
    tolerance = halved.tolerance * (1.0 + np.abs(plain))
    assert (np.abs(found - plain) <= tolerance).all()
    np.testing.assert_allclose(halved.column_scores(encoded).total, found, rtol=1e-6, atol=1e-6)
    assert halved.tolerance > engine.tolerance
    if has_bfloat16(torch.device("cpu")):
        assert (found != plain).any(), "the hardware has bfloat16, and it was not used"


def test_halved_weights_follow_the_weights(wide: CVAEDetector) -> None:
    encoded = wide._encode(_two_sides(50), None)
    engine = replace(wide.model_.engine, model=copy.deepcopy(wide.model_.engine.model), precision="bfloat16")
    before = engine.negative_elbo(encoded)
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.mul_(0.5)
    fresh = replace(engine, model=copy.deepcopy(engine.model))
    np.testing.assert_array_equal(engine.negative_elbo(encoded), fresh.negative_elbo(encoded))
    assert (engine.negative_elbo(encoded) != before).all()


def test_a_detector_says_its_precision_and_may_be_loaded_with_another(wide: CVAEDetector, tmp_path: Path) -> None:
    folder, rows = wide.save(tmp_path / "model"), _two_sides(40)
    assert CVAEDetector.load(folder, device="cpu").model_.engine.precision == "float32"
    halved = CVAEDetector.load(folder, device="cpu", mixed_precision=True)
    assert halved.model_.engine.precision == "bfloat16"
    np.testing.assert_allclose(halved.negative_elbo(rows), wide.negative_elbo(rows), rtol=0.01, atol=0.01)
    again = CVAEDetector.load(halved.save(tmp_path / "halved"), device="cpu")
    assert again.model_.engine.precision == "bfloat16"
    with pytest.raises(ParameterError, match="mixed_precision must be one of"):
        CVAEDetector.load(folder, device="cpu", mixed_precision="half")


@pytest.mark.parametrize("hidden", [(), (8,), (8, 8), (8, 8, 8)])
@pytest.mark.parametrize("members", [slice(None), slice(1, 2)])
def test_fused_networks_are_the_plain_ones(hidden: tuple[int, ...], members: slice) -> None:
    network = StackedMLP(3, 5, hidden, 4, 2, torch.Generator().manual_seed(0))
    x = torch.randn((1, 7, 5), generator=torch.Generator().manual_seed(1))
    condition = Condition(torch.tensor([[[0.0, 1.0]]]))
    plain = network(x, condition, members).detach()
    with torch.inference_mode():
        torch.testing.assert_close(network(x, condition, members), plain, rtol=1e-5, atol=1e-6)


class _SmallMemory(torch.nn.Module):
    """A bank on a device that holds no more than some rows at a time."""

    def __init__(self, model: CVAE, rows: int) -> None:
        super().__init__()
        self.model, self.rows, self.tried = model, rows, list[int]()

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name in ("model",) else getattr(self.model, name)

    def terms(self, batch: Batch, *given: Any, **more: Any) -> Terms:
        self.tried.append(batch.values.shape[1])
        if batch.values.shape[1] > self.rows:
            raise torch.OutOfMemoryError("out of memory")
        return self.model.terms(batch, *given, **more)


def test_chunks_that_memory_does_not_hold_are_halved_and_that_is_remembered(wide: CVAEDetector) -> None:
    engine, encoded = wide.model_.engine, wide._encode(_two_sides(2_000, seed=2), None)
    small = _SmallMemory(engine.model, rows=300)
    limited = replace(engine, model=small, limit=Limit())
    np.testing.assert_allclose(limited.negative_elbo(encoded), engine.negative_elbo(encoded), rtol=1e-5, atol=1e-5)
    assert any(rows > 300 for rows in small.tried)
    small.tried.clear()
    limited.negative_elbo(encoded)
    assert all(rows <= 300 for rows in small.tried), "what did not fit once is not tried again"
    none = replace(engine, model=_SmallMemory(engine.model, rows=0), limit=Limit())
    with pytest.raises(torch.OutOfMemoryError):
        none.negative_elbo(encoded)


@pytest.mark.parametrize("parts", [8, 16])
@pytest.mark.parametrize("size", [1, 7, 512, 4096])
def test_short_pieces_have_few_lengths_and_little_to_spare(size: int, parts: int) -> None:
    lengths = [padded_length(n, size, parts) for n in range(1, size + 1)]
    assert all(n <= length <= size for n, length in enumerate(lengths, start=1))
    assert len(set(lengths)) <= parts + size.bit_length()
    assert max(length - n for n, length in enumerate(lengths, start=1)) <= max(size // parts, 1)
