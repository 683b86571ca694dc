"""What every decoder head promises; a newly registered likelihood is checked by all of it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad
from scipy.special import expit, log_softmax, softmax
from torch import Tensor

from anomaly_cvae.encoding import LARGEST_VALUE, LIKELIHOODS_OF_KIND, FittedColumn
from anomaly_cvae.errors import ParameterError
from anomaly_cvae.likelihoods import LIKELIHOODS, Likelihood, likelihood_class

SCALE_FLOOR = 0.08
# A likelihood of table columns that pixels may have, too, is checked as one of table columns.
KIND_OF = {name: kind for kind, names in reversed(LIKELIHOODS_OF_KIND.items()) for name in names}
NAMES = sorted(LIKELIHOODS)
REAL = [name for name in NAMES if KIND_OF[name] == "real"]
COUNTS = [name for name in NAMES if KIND_OF[name] == "count"]
PIXELS = [name for name in NAMES if KIND_OF[name] == "pixel"]
NUMBERS = REAL + COUNTS + PIXELS
STANDARDISED = REAL + PIXELS
LEVELS = [name for name in NAMES if KIND_OF[name] in ("binary", "categorical")]


def columns(name: str) -> tuple[FittedColumn, ...]:
    """Three columns that differ in everything that training learns of a column."""
    if KIND_OF[name] == "real":
        return (
            FittedColumn("celsius", name, center=80.0, scale=12.5, mean=80.0, observed=100),
            FittedColumn("plain", name, observed=100),
            FittedColumn("micrometres", name, center=-3e-4, scale=1e-5, mean=-3e-4, observed=7),
        )
    if KIND_OF[name] == "count":
        return (
            FittedColumn("few", name, center=0.3, scale=0.4, mean=0.5, observed=100),
            FittedColumn("some", name, center=1.2, scale=0.6, mean=3.0, observed=100),
            FittedColumn("many", name, center=3.6, scale=0.2, mean=40.0, observed=7),
        )
    if KIND_OF[name] == "pixel":
        return (
            FittedColumn("ordinary", name, center=120.3, scale=60.0, mean=120.3, observed=100),
            FittedColumn("dark", name, center=2.6, scale=1.5, mean=2.6, observed=100),
            FittedColumn("bright", name, center=240.7, scale=20.0, mean=240.7, observed=7),
        )
    n_levels = (2, 2, 2) if KIND_OF[name] == "binary" else (3, 1, 5)
    return tuple(
        FittedColumn(f"levels {d}", name, n_levels=n, observed=observed)
        for d, (n, observed) in enumerate(zip(n_levels, (10, 1000, 2), strict=True))
    )


def head(name: str, dtype: torch.dtype = torch.float64) -> Likelihood:
    return LIKELIHOODS[name](columns(name), SCALE_FLOOR).to(dtype)


def parameters(likelihood: Likelihood, *shape: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = (*shape, likelihood.n_parameters)
    return spread * torch.randn(size, generator=generator, dtype=torch.float64)


def cells(name: str, n_rows: int, seed: int = 0) -> Tensor:
    """Ordinary encoded cells (N, 3): standardised numbers, known codes, counts."""
    rng = np.random.default_rng(seed)
    own = columns(name)
    if KIND_OF[name] == "real":
        values = 2.0 * rng.standard_normal((n_rows, len(own)))
    elif KIND_OF[name] == "count":
        values = rng.poisson([column.mean for column in own], (n_rows, len(own)))
    elif KIND_OF[name] == "pixel":
        levels = rng.normal([column.center for column in own], [column.scale for column in own], (n_rows, len(own)))
        values = standardised(name, np.clip(np.round(levels), 0, 255))
    else:
        values = rng.integers(0, [column.n_levels for column in own], (n_rows, len(own)))
    return torch.tensor(values, dtype=torch.float64)


def standardised(name: str, levels: np.ndarray) -> np.ndarray:
    """Levels 0 to 255 of three pixels (N, 3) as the encoder hands them over."""
    own = columns(name)
    return (levels - [column.center for column in own]) / [column.scale for column in own]


def extreme_cells(name: str) -> Tensor:
    """The most that an encoder hands over: clipped numbers, an unknown level."""
    if KIND_OF[name] in ("binary", "categorical"):
        return torch.tensor([[float(column.n_levels) for column in columns(name)]], dtype=torch.float64)
    if KIND_OF[name] == "pixel":
        return torch.tensor(standardised(name, np.array([[0.0] * 3, [255.0] * 3])))
    largest = torch.full((1, 3), LARGEST_VALUE, dtype=torch.float64)
    return torch.cat([largest, -largest]) if KIND_OF[name] == "real" else largest


def _normal(p: np.ndarray, column: FittedColumn) -> Any:
    deviation = np.sqrt(np.exp(p[1]) + SCALE_FLOOR**2)
    return stats.norm(column.center + column.scale * p[0], column.scale * deviation)


class _WithOutliers:
    """scipy's normal and Cauchy, 999 to 1; its location stands for the mean that a Cauchy has not."""

    def __init__(self, normal: Any, cauchy: Any) -> None:
        self.parts = ((0.999, normal), (0.001, cauchy))

    def logpdf(self, x: Any) -> Any:
        return np.log(sum(share * part.pdf(x) for share, part in self.parts))

    def cdf(self, x: Any) -> Any:
        return sum(share * part.cdf(x) for share, part in self.parts)

    def mean(self) -> float:
        return float(self.parts[0][1].mean())


def _robust_normal(p: np.ndarray, column: FittedColumn) -> Any:
    return _WithOutliers(_normal(p, column), stats.cauchy(column.center, 3.0 * column.scale))


def _student_t(p: np.ndarray, column: FittedColumn) -> Any:
    deviation = np.sqrt(np.exp(p[1]) + SCALE_FLOOR**2)
    freedom = 2.0 + np.log1p(np.exp(p[2] + 2.0))
    return stats.t(freedom, column.center + column.scale * p[0], column.scale * deviation)


def _poisson(p: np.ndarray, column: FittedColumn) -> Any:
    return stats.poisson(column.mean * np.exp(p[0]))


def _negative_binomial(p: np.ndarray, column: FittedColumn) -> Any:
    mean, concentration = column.mean * np.exp(p[0]), np.exp(p[1])
    return stats.nbinom(concentration, concentration / (concentration + mean))


class _RoundedLogistic:
    """scipy's logistic, rounded to the levels 0 to 255; the mean is that of the logistic, held within them."""

    def __init__(self, location: float, width: float) -> None:
        self.logistic = stats.logistic(location, width)

    def pmf(self, level: Any) -> Any:
        level = np.asarray(level)
        above = np.where(level >= 255, 1.0, self.logistic.cdf(level + 0.5))
        below = np.where(level <= 0, 0.0, self.logistic.cdf(level - 0.5))
        # Above the middle the survival function keeps the digits that 1 - cdf loses.
        left = np.where(level <= 0, 1.0, self.logistic.sf(level - 0.5))
        right = np.where(level >= 255, 0.0, self.logistic.sf(level + 0.5))
        return np.where(level > self.logistic.mean(), left - right, above - below)

    def logpmf(self, level: Any) -> Any:
        return np.log(self.pmf(level))

    def mean(self) -> float:
        # Of a variable that is not negative: the integral of its survival function.
        width = self.logistic.std()
        near = np.clip(self.logistic.mean() + width * np.array([-20, -5, -1, 0, 1, 5, 20]), 0.0, 255.0)
        ends = np.unique([0.0, *near, 255.0])
        return float(sum(quad(self.logistic.sf, a, b, epsabs=1e-13)[0] for a, b in pairwise(ends)))


def _discretised_logistic(p: np.ndarray, column: FittedColumn) -> Any:
    return _RoundedLogistic(column.center + column.scale * p[0], column.scale * np.exp(p[1]))


def _bernoulli(p: np.ndarray, column: FittedColumn) -> Any:
    return stats.bernoulli(expit(p[0]))


def _categorical(p: np.ndarray, column: FittedColumn) -> Any:
    return stats.rv_discrete(values=(np.arange(column.n_levels), softmax(p)))


REFERENCES: dict[str, Callable[[np.ndarray, FittedColumn], Any]] = {
    "normal": _normal,
    "robust_normal": _robust_normal,
    "student_t": _student_t,
    "poisson": _poisson,
    "negative_binomial": _negative_binomial,
    "discretised_logistic": _discretised_logistic,
    "bernoulli": _bernoulli,
    "categorical": _categorical,
}
"""scipy's distribution of a raw cell given one column's decoder outputs; a new likelihood needs a line here."""


def reference(name: str, outputs: Tensor, d: int) -> Any:
    """scipy's distribution of column ``d`` for one row's decoder outputs (P,)."""
    assert name in REFERENCES, f"add scipy's or torch's counterpart of {name!r} to REFERENCES"
    own = columns(name)
    if KIND_OF[name] == "categorical":
        first = sum(column.n_levels for column in own[:d])
        block = outputs[first : first + own[d].n_levels]
    else:
        block = outputs.reshape(-1, len(own))[:, d]
    return REFERENCES[name](block.numpy(), own[d])


def log_unknown(name: str, column: FittedColumn) -> float:
    """The documented log e of a level that training did not see."""
    imagined = 3 if KIND_OF[name] == "binary" else column.n_levels + 1
    return -np.log(column.observed + imagined)


def reference_log_prob(name: str, outputs: Tensor, values: Tensor) -> np.ndarray:
    """Log-probabilities (N, D) in raw units of known cells."""
    expected = np.empty(values.shape)
    for n in range(len(values)):
        for d, column in enumerate(columns(name)):
            distribution, value = reference(name, outputs[n], d), float(values[n, d])
            if KIND_OF[name] == "real":
                expected[n, d] = distribution.logpdf(column.center + column.scale * value)
            elif name in PIXELS:
                expected[n, d] = distribution.logpmf(round(column.center + column.scale * value))
            else:
                expected[n, d] = distribution.logpmf(value)
                if name in LEVELS:
                    expected[n, d] += np.log1p(-np.exp(log_unknown(name, column)))
    return expected


# ---------------------------------------------------------------------- names and shapes


@pytest.mark.parametrize("name", NAMES)
def test_a_likelihood_is_found_by_its_name_and_goes_with_a_kind_of_column(name: str) -> None:
    assert likelihood_class(name) is LIKELIHOODS[name]
    assert LIKELIHOODS[name].name == name
    assert name in KIND_OF


def test_an_unknown_name_is_a_parameter_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ParameterError, match=r"'gauss'.*bernoulli.*normal"):
        likelihood_class("gauss")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_and_types(name: str, dtype: torch.dtype) -> None:
    likelihood, n_columns = head(name, dtype), len(columns(name))
    outputs, values = parameters(likelihood, 2, 4, 5).to(dtype), cells(name, 5).to(dtype)
    generator = torch.Generator().manual_seed(0)
    results = {
        (5, likelihood.n_features): likelihood.features(values, None),
        (2, 4, 5, n_columns): likelihood.log_prob(outputs, values),
        (5, n_columns): likelihood.expected(outputs),
    }
    for shape, result in results.items():
        assert result.shape == shape
        assert result.dtype == dtype
    drawn = likelihood.sample(outputs, generator)
    assert drawn.shape == (2, 4, 5, n_columns)
    assert drawn.dtype == dtype
    assert likelihood.n_columns == n_columns


# ---------------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_log_prob_is_that_of_scipy_in_raw_units(name: str, seed: int) -> None:
    outputs, values = parameters(head(name), 12, seed=seed), cells(name, 12, seed)
    log_prob = head(name).log_prob(outputs, values)
    np.testing.assert_allclose(log_prob, reference_log_prob(name, outputs, values), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_log_prob_in_float32_is_close_to_that_in_float64(name: str) -> None:
    outputs, values = parameters(head(name), 40, spread=2.0), cells(name, 40)
    narrow = head(name, torch.float32).log_prob(outputs.float(), values.float())
    np.testing.assert_allclose(narrow, head(name).log_prob(outputs, values), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", COUNTS)
def test_large_counts_are_exact_in_float32(name: str) -> None:
    column = FittedColumn("packets", name, center=13.8, scale=0.1, mean=1e6, observed=100)
    outputs = np.array([0.0, 9.0])[: 1 if name == "poisson" else 2]
    likelihood = LIKELIHOODS[name]((column,), SCALE_FLOOR).float()
    log_prob = likelihood.log_prob(torch.tensor(outputs[None]).float(), torch.tensor([[1e6]]))
    assert log_prob.item() == pytest.approx(REFERENCES[name](outputs, column).logpmf(1e6), abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_every_member_sample_and_row_is_judged_by_its_own_parameters(name: str) -> None:
    likelihood = head(name)
    outputs, values = parameters(likelihood, 2, 3, 4), cells(name, 4)
    together = likelihood.log_prob(outputs, values[None, None])
    for m, s, n in np.ndindex(2, 3, 4):
        alone = likelihood.log_prob(outputs[m, s, n], values[n])
        torch.testing.assert_close(together[m, s, n], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", REAL)
def test_the_density_of_a_raw_cell_integrates_to_one(name: str) -> None:
    likelihood = head(name)
    outputs = parameters(likelihood, 1, 1, 6, seed=4)
    middle = likelihood.expected(outputs)
    # Steps of sinh reach far into heavy tails and stay fine in the middle.
    u = torch.linspace(-25.0, 25.0, 20_001, dtype=torch.float64)
    values = middle[None] + torch.sinh(u)[:, None, None]
    raw_step = torch.cosh(u)[:, None, None] * torch.tensor([column.scale for column in columns(name)])
    density = torch.exp(likelihood.log_prob(outputs[0], values)) * raw_step
    np.testing.assert_allclose(torch.trapezoid(density, u, dim=0), 1.0, rtol=1e-6)


@pytest.mark.parametrize("name", COUNTS)
def test_the_probabilities_of_all_counts_sum_to_one(name: str) -> None:
    likelihood = head(name)
    outputs = parameters(likelihood, 5, seed=4)
    counts = torch.arange(20_000, dtype=torch.float64)[:, None, None].expand(-1, 1, 3)
    total = torch.exp(likelihood.log_prob(outputs, counts)).sum(0)
    np.testing.assert_allclose(total, 1.0, rtol=1e-6)


@pytest.mark.parametrize("name", PIXELS)
def test_the_probabilities_of_all_levels_of_a_pixel_sum_to_one(name: str) -> None:
    likelihood = head(name)
    levels = torch.tensor(standardised(name, np.arange(256.0)[:, None].repeat(3, axis=1)))
    outputs = parameters(likelihood, 5, seed=4, spread=2.0)
    total = torch.exp(likelihood.log_prob(outputs, levels[:, None])).sum(0)
    np.testing.assert_allclose(total, 1.0, rtol=1e-9)


@pytest.mark.parametrize("name", PIXELS)
def test_draws_of_a_pixel_are_levels(name: str) -> None:
    drawn = head(name).sample(parameters(head(name), 500, spread=3.0), torch.Generator().manual_seed(0)).numpy()
    for d, column in enumerate(columns(name)):
        levels = column.center + column.scale * drawn[:, d]
        np.testing.assert_allclose(levels, np.round(levels), atol=1e-9)
        assert levels.min() >= -1e-9
        assert levels.max() <= 255 + 1e-9


@pytest.mark.parametrize("name", LEVELS)
def test_the_probabilities_of_all_levels_and_the_unknown_one_sum_to_one(name: str) -> None:
    for d, column in enumerate(columns(name)):
        likelihood = LIKELIHOODS[name]((column,), SCALE_FLOOR).double()
        codes = torch.arange(column.n_levels + 1, dtype=torch.float64)[:, None, None]
        outputs = parameters(likelihood, 5, seed=d).expand(len(codes), -1, -1)
        total = torch.exp(likelihood.log_prob(outputs, codes)).sum(0)
        np.testing.assert_allclose(total, 1.0, rtol=1e-12)


@pytest.mark.parametrize("name", LEVELS)
def test_a_column_that_had_one_level_in_training_still_has_probabilities_that_sum_to_one(name: str) -> None:
    # A column that is True throughout training is binary with one level.
    column = FittedColumn("always true", name, n_levels=1, observed=50)
    likelihood = LIKELIHOODS[name]((column,), SCALE_FLOOR).double()
    codes = torch.tensor([[[0.0]], [[1.0]]], dtype=torch.float64)
    total = torch.exp(likelihood.log_prob(parameters(likelihood, 5).expand(2, -1, -1), codes)).sum(0)
    np.testing.assert_allclose(total, 1.0, rtol=1e-12)


@pytest.mark.parametrize("name", LEVELS)
def test_an_unknown_level_costs_log_e_whatever_the_decoder_says(name: str) -> None:
    likelihood = head(name)
    unknown = torch.tensor([float(column.n_levels) for column in columns(name)], dtype=torch.float64)
    log_prob = likelihood.log_prob(parameters(likelihood, 5, spread=20.0), unknown.expand(5, -1))
    documented = [log_unknown(name, column) for column in columns(name)]
    np.testing.assert_allclose(log_prob, np.tile(documented, (5, 1)), rtol=1e-12)


@pytest.mark.parametrize("name", ["categorical"])
def test_logits_of_one_column_do_not_touch_another(name: str) -> None:
    outputs, values = parameters(head(name), 8), cells(name, 8)
    log_prob = head(name).log_prob(outputs, values)
    first = columns(name)[0]
    own = log_softmax(outputs[:, : first.n_levels].numpy(), axis=1)
    known = own[np.arange(8), values[:, 0].long()] + np.log1p(-np.exp(log_unknown(name, first)))
    np.testing.assert_allclose(log_prob[:, 0], known, rtol=1e-12)


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [0.0, 1.0, 1e4])
def test_gradients_of_ordinary_cells_are_finite(name: str, dtype: torch.dtype, spread: float) -> None:
    likelihood = head(name, dtype)
    outputs = parameters(likelihood, 30, spread=spread).to(dtype).requires_grad_()
    log_prob = likelihood.log_prob(outputs, cells(name, 30).to(dtype))
    log_prob.sum().backward()
    assert torch.isfinite(log_prob).all()
    assert torch.isfinite(outputs.grad).all()
    if spread == 1.0:
        assert (outputs.grad != 0).any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [0.0, 1.0, 1e4])
def test_log_prob_and_gradients_are_finite_at_the_largest_cells(name: str, dtype: torch.dtype, spread: float) -> None:
    likelihood, values = head(name, dtype), extreme_cells(name).to(dtype)
    outputs = parameters(likelihood, 20, 1, spread=spread).to(dtype).requires_grad_()
    log_prob = likelihood.log_prob(outputs, values)
    log_prob.sum().backward()
    assert torch.isfinite(log_prob).all()
    assert torch.isfinite(outputs.grad).all()


# ---------------------------------------------------------------------- features


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_cell_gives_zero_features_and_leaves_the_others_as_they_are(name: str) -> None:
    likelihood, values = head(name), cells(name, 20) + (1.0 if name in COUNTS else 0.0)
    complete = likelihood.features(values, torch.ones_like(values))
    torch.testing.assert_close(complete, likelihood.features(values, None), rtol=0, atol=0)
    assert not likelihood.features(values, torch.zeros_like(values)).any()
    for d in range(3):
        observed = torch.ones_like(values)
        observed[:, d] = 0.0
        features = likelihood.features(values, observed)
        hidden = likelihood.features(values, 1.0 - observed)
        torch.testing.assert_close(features + hidden, complete, rtol=0, atol=0)
        # The hidden cell's features are what is lost, so the two masks share no feature.
        assert not (features * hidden).any()
        assert hidden.any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_of_the_largest_cells_stay_small(name: str, dtype: torch.dtype) -> None:
    features = head(name, dtype).features(extreme_cells(name).to(dtype), None)
    assert features.abs().max() < 200


@pytest.mark.parametrize("name", LEVELS)
def test_an_unknown_level_gives_zero_features(name: str) -> None:
    assert not head(name).features(extreme_cells(name), None).any()


@pytest.mark.parametrize("name", NUMBERS)
def test_features_keep_the_order_of_numbers(name: str) -> None:
    grid = torch.linspace(0.0, 1e4, 2001, dtype=torch.float64)
    grid = torch.cat([-grid.flip(0)[:-1], grid]) if name in STANDARDISED else grid
    features = head(name).features(grid[:, None].expand(-1, 3), None)
    assert (features.diff(dim=0) > 0).all()


@pytest.mark.parametrize("name", LEVELS)
def test_features_tell_known_levels_apart(name: str) -> None:
    for column in columns(name):
        likelihood = LIKELIHOODS[name]((column,), SCALE_FLOOR).double()
        codes = torch.arange(column.n_levels + 1, dtype=torch.float64)[:, None]
        assert len(likelihood.features(codes, None).unique(dim=0)) == column.n_levels + 1


# ---------------------------------------------------------------------- expected values and samples


def _mean_of_numbers(name: str, outputs: Tensor, n: int, d: int) -> float:
    means = [float(reference(name, outputs[m, s, n], d).mean()) for m, s in np.ndindex(*outputs.shape[:2])]
    column = columns(name)[d]
    return (np.mean(means) - column.center) / column.scale if name in STANDARDISED else np.mean(means)


@pytest.mark.parametrize("name", NUMBERS)
def test_expected_number_is_the_mean_over_members_and_samples(name: str) -> None:
    outputs = parameters(head(name), 2, 3, 4)
    documented = [[_mean_of_numbers(name, outputs, n, d) for d in range(3)] for n in range(4)]
    np.testing.assert_allclose(head(name).expected(outputs), documented, rtol=1e-9)


@pytest.mark.parametrize("name", LIKELIHOODS_OF_KIND["pixel"])
def test_the_mean_of_a_pixel_is_that_of_one_member_and_sample_and_has_a_gradient(name: str) -> None:
    outputs = parameters(head(name), 4).requires_grad_()
    mean = head(name).mean(outputs)
    assert mean.shape == (4, 3)
    mean.sum().backward()
    assert (outputs.grad[:, :3] != 0).any()
    if name not in LEVELS:  # of levels the expected one is the most probable, not the mean
        torch.testing.assert_close(mean, head(name).expected(outputs[None, None]), rtol=1e-12, atol=1e-12)
        return
    documented = [[reference(name, outputs.detach()[n], d).mean() for d in range(3)] for n in range(4)]
    np.testing.assert_allclose(mean.detach(), documented, rtol=1e-9)


@pytest.mark.parametrize("name", LEVELS)
def test_expected_level_is_the_most_probable_one_of_the_mixture(name: str) -> None:
    outputs = parameters(head(name), 3, 2, 20, spread=3.0)
    expected = head(name).expected(outputs)
    for n, d in np.ndindex(20, 3):
        codes = np.arange(columns(name)[d].n_levels)
        mixture = np.mean([reference(name, outputs[m, s, n], d).pmf(codes) for m, s in np.ndindex(3, 2)], axis=0)
        assert expected[n, d] == mixture.argmax()


@pytest.mark.parametrize("name", NAMES)
def test_samples_follow_the_distribution(name: str) -> None:
    outputs = parameters(head(name), 2, seed=5)
    n_draws = 4000
    drawn = head(name).sample(outputs.expand(n_draws, -1, -1), torch.Generator().manual_seed(0)).numpy()
    for n, d in np.ndindex(2, 3):
        distribution, column = reference(name, outputs[n], d), columns(name)[d]
        sample = drawn[:, n, d]
        if name in REAL:
            p_value = stats.kstest(column.center + column.scale * sample, distribution.cdf).pvalue
        elif name in PIXELS:
            p_value = _chi_square_p_value(np.round(column.center + column.scale * sample), distribution)
        else:
            p_value = _chi_square_p_value(sample, distribution)
        assert p_value > 1e-4


def _chi_square_p_value(sample: np.ndarray, distribution: Any) -> float:
    """Observed against expected frequencies of values that are expected at least ten times."""
    values = np.arange(int(sample.max()) + 1)
    probability = distribution.pmf(values)
    common = probability * len(sample) >= 10
    expected = np.append(probability[common], 1.0 - probability[common].sum()) * len(sample)
    seen = np.array([(sample == value).sum() for value in values[common]])
    observed = np.append(seen, len(sample) - seen.sum())
    kept = expected > 1e-6
    assert not observed[~kept].any()
    statistic = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    return float(stats.chi2.sf(statistic, max(kept.sum() - 1, 1)))


@pytest.mark.parametrize("name", NAMES)
def test_samples_depend_on_the_generator_and_on_nothing_else(name: str) -> None:
    likelihood = head(name)
    outputs = parameters(likelihood, 50)
    state = torch.get_rng_state()
    first = likelihood.sample(outputs, torch.Generator().manual_seed(1))
    again = likelihood.sample(outputs, torch.Generator().manual_seed(1))
    other = likelihood.sample(outputs, torch.Generator().manual_seed(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


# ---------------------------------------------------------------------- training noise, saving


@pytest.mark.parametrize("name", NAMES)
def test_training_noise_moves_real_cells_by_its_scale_and_nothing_else(name: str) -> None:
    values = cells(name, 4000)
    moved = head(name).jitter(values, 0.2, torch.Generator().manual_seed(0)) - values
    if name not in REAL:
        assert not moved.any()
        return
    np.testing.assert_allclose(moved.mean(0), 0.0, atol=5 * 0.2 / np.sqrt(4000))
    np.testing.assert_allclose(moved.std(0), 0.2, rtol=0.06)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_head_brings_its_columns_along(name: str) -> None:
    fresh = LIKELIHOODS[name](
        [FittedColumn(c.name, name, n_levels=c.n_levels, mean=1.0) for c in columns(name)], SCALE_FLOOR
    )
    fresh = fresh.double()
    outputs, values = parameters(fresh, 10), cells(name, 10)
    assert not torch.equal(fresh.log_prob(outputs, values), head(name).log_prob(outputs, values))
    fresh.load_state_dict(head(name).state_dict())
    assert torch.equal(fresh.log_prob(outputs, values), head(name).log_prob(outputs, values))
