"""Distributions of the latent z against torch.distributions, and the mixture fitted to posteriors."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

from anomaly_cvae.priors import (
    MAX_COMPONENTS,
    AggregatePosterior,
    DiagonalNormal,
    Mixture,
    StandardNormal,
    number_of_components,
)

MEMBERS, ROWS, LATENT = 2, 6, 3


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def posterior(seed: int = 0) -> DiagonalNormal:
    return DiagonalNormal(randn(MEMBERS, ROWS, LATENT, seed=seed), randn(MEMBERS, ROWS, LATENT, seed=seed + 100))


def mixture(n_components: int, seed: int = 0) -> Mixture:
    shape = (MEMBERS, n_components, LATENT)
    log_weight = torch.log_softmax(randn(MEMBERS, n_components, seed=seed), dim=-1)
    return Mixture(log_weight, randn(*shape, seed=seed + 1), randn(*shape, seed=seed + 2))


def as_torch(normal: DiagonalNormal) -> Normal:
    return Normal(normal.mean, torch.exp(0.5 * normal.log_variance))


def mixture_as_torch(mixture: Mixture, member: int) -> MixtureSameFamily:
    components = Normal(mixture.mean[member], torch.exp(0.5 * mixture.log_variance[member]))
    return MixtureSameFamily(Categorical(logits=mixture.log_weight[member]), Independent(components, 1))


# ---------------------------------------------------------------------- normals


def test_kl_of_two_normals_is_that_of_torch() -> None:
    q, p = posterior(0), posterior(1)
    torch.testing.assert_close(p.kl(q), kl_divergence(as_torch(q), as_torch(p)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(q.kl(q), torch.zeros(MEMBERS, ROWS, LATENT).double(), rtol=0, atol=1e-15)


def test_kl_from_the_standard_normal_is_that_of_torch() -> None:
    q = posterior()
    standard = Normal(torch.zeros(()).double(), torch.ones(()).double())
    torch.testing.assert_close(StandardNormal().kl(q), kl_divergence(as_torch(q), standard), rtol=1e-12, atol=1e-12)


def test_one_prior_serves_all_rows() -> None:
    q, p = posterior(), DiagonalNormal(randn(MEMBERS, 1, LATENT), randn(MEMBERS, 1, LATENT, seed=3))
    repeated = DiagonalNormal(p.mean.expand(-1, ROWS, -1), p.log_variance.expand(-1, ROWS, -1))
    assert torch.equal(p.kl(q), repeated.kl(q))
    z = randn(MEMBERS, 4, ROWS, LATENT, seed=4)
    assert torch.equal(p.log_prob(z), repeated.log_prob(z))


def test_log_densities_of_the_normals_are_those_of_torch() -> None:
    q, z = posterior(), randn(MEMBERS, 4, ROWS, LATENT, seed=9)
    own = Normal(q.mean.unsqueeze(1), torch.exp(0.5 * q.log_variance).unsqueeze(1)).log_prob(z).sum(-1)
    torch.testing.assert_close(q.log_prob(z), own, rtol=1e-12, atol=1e-12)
    standard = Normal(0.0, 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(StandardNormal().log_prob(z), standard, rtol=1e-6, atol=1e-6)


def test_samples_of_a_normal_have_its_moments() -> None:
    q = posterior()
    noise = randn(MEMBERS, 20_000, ROWS, LATENT, seed=7)
    z = q.sample(noise)
    deviation = torch.exp(0.5 * q.log_variance)
    assert ((z.mean(1) - q.mean).abs() < 5 * deviation / math.sqrt(20_000)).all()
    torch.testing.assert_close(z.std(1), deviation, rtol=0.03, atol=0)


# ---------------------------------------------------------------------- mixtures


@pytest.mark.parametrize("n_components", [1, 2, 7])
def test_log_density_of_a_mixture_is_that_of_torch(n_components: int) -> None:
    prior, z = mixture(n_components), 2.0 * randn(MEMBERS, 4, ROWS, LATENT, seed=9)
    expected = torch.stack([mixture_as_torch(prior, m).log_prob(z[m]) for m in range(MEMBERS)])
    torch.testing.assert_close(prior.log_prob(z), expected, rtol=1e-12, atol=1e-12)


def test_kl_from_a_mixture_of_one_is_that_of_the_normal() -> None:
    q, one = posterior(), mixture(1)
    exact = DiagonalNormal(one.mean, one.log_variance).kl(q).sum(-1, keepdim=True)
    torch.testing.assert_close(one.kl(q), exact, rtol=1e-10, atol=1e-10)


def test_kl_from_a_mixture_of_equal_parts_is_that_of_one_of_them() -> None:
    q, one = posterior(), mixture(1)
    log_weight = torch.log(torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)).expand(MEMBERS, -1)
    equal = Mixture(log_weight, one.mean.expand(-1, 3, -1), one.log_variance.expand(-1, 3, -1))
    torch.testing.assert_close(equal.kl(q), one.kl(q), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n_components", [2, 5, 20])
def test_kl_from_a_mixture_bounds_the_true_one_from_above(n_components: int) -> None:
    q, prior = posterior(), mixture(n_components)
    z = q.sample(randn(MEMBERS, 20_000, ROWS, LATENT, seed=3))
    draws = q.log_prob(z) - prior.log_prob(z)
    estimate, standard_error = draws.mean(1), draws.std(1) / math.sqrt(draws.shape[1])
    bound = prior.kl(q)
    assert bound.shape == (MEMBERS, ROWS, 1)
    assert (bound[..., 0] >= estimate - 4 * standard_error).all()
    # Dropping all but the heaviest component is a bound too, and this one is the better.
    heaviest = prior.log_weight.argmax(-1)
    for m in range(MEMBERS):
        j = heaviest[m]
        alone = Normal(prior.mean[m, j], torch.exp(0.5 * prior.log_variance[m, j]))
        single = kl_divergence(Normal(q.mean[m], torch.exp(0.5 * q.log_variance[m])), alone).sum(-1)
        assert (bound[m, :, 0] <= single - prior.log_weight[m, j] + 1e-10).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_from_a_mixture_is_never_negative(dtype: torch.dtype) -> None:
    # The hardest case: every component is the posterior itself, far from the origin, where products cancel.
    mean, log_variance = 30.0 + randn(1, ROWS, LATENT), torch.full((1, ROWS, LATENT), -8.0, dtype=torch.float64)
    for row in range(ROWS):
        own = mean[:, row : row + 1], log_variance[:, row : row + 1]
        log_weight = torch.full((1, 4), -math.log(4.0), dtype=dtype)
        same = Mixture(log_weight, *(part.expand(-1, 4, -1).to(dtype) for part in own))
        kl = same.kl(DiagonalNormal(*(part.to(dtype) for part in own)))
        assert kl.dtype == dtype
        assert kl.abs() < 1e-6
    assert (mixture(6).kl(posterior()) > 0).all()


def test_the_kl_in_float32_is_that_in_float64() -> None:
    q, prior = posterior(), mixture(20)
    far = Mixture(prior.log_weight, prior.mean + 50.0, prior.log_variance - 6.0)
    near = DiagonalNormal(far.mean[:, :ROWS] + 0.01, q.log_variance - 6.0)
    # What float32 can hold of the inputs is the same in both.
    narrow = Mixture(far.log_weight.float(), far.mean.float(), far.log_variance.float())
    q32 = DiagonalNormal(near.mean.float(), near.log_variance.float())
    widened = Mixture(narrow.log_weight.double(), narrow.mean.double(), narrow.log_variance.double())
    q64 = DiagonalNormal(q32.mean.double(), q32.log_variance.double())
    torch.testing.assert_close(narrow.kl(q32).double(), widened.kl(q64), rtol=1e-5, atol=1e-5)


def test_samples_of_a_mixture_have_its_moments() -> None:
    prior, n = mixture(5), 40_000
    drawn = prior.sample(n, torch.Generator().manual_seed(0))
    assert drawn.shape == (MEMBERS, n, LATENT)
    for m in range(MEMBERS):
        reference = mixture_as_torch(prior, m)
        deviation = reference.variance.sqrt()
        assert ((drawn[m].mean(0) - reference.mean).abs() < 5 * deviation / math.sqrt(n)).all()
        torch.testing.assert_close(drawn[m].std(0), deviation, rtol=0.03, atol=0)
    assert torch.equal(drawn, prior.sample(n, torch.Generator().manual_seed(0)))


# ---------------------------------------------------------------------- the aggregate posterior


def rows_of(mean: Tensor, log_variance: Tensor | None = None) -> DiagonalNormal:
    return DiagonalNormal(mean, torch.full_like(mean, -2.0) if log_variance is None else log_variance)


def fitted(rows: DiagonalNormal, seed: int = 0) -> Mixture:
    """The mixture of one member and one class fitted to ``rows`` (N, Z)."""
    n_rows, latent = rows.mean.shape
    aggregate = AggregatePosterior(1, 1, number_of_components(n_rows), latent).double()
    aggregate.fit_group(0, 0, rows, seed)
    return aggregate.select(slice(0, 1), 0)


def assert_same_moments(mixture: Mixture, rows: DiagonalNormal) -> None:
    weight = torch.exp(mixture.log_weight[0])[:, None]
    second = torch.exp(mixture.log_variance[0]) + mixture.mean[0].square()
    torch.testing.assert_close(weight.sum(), torch.ones(()).double(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((weight * mixture.mean[0]).sum(0), rows.mean.mean(0), rtol=1e-9, atol=1e-9)
    expected = (torch.exp(rows.log_variance) + rows.mean.square()).mean(0)
    torch.testing.assert_close((weight * second).sum(0), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n_rows", [1, 2, 7, 40, 300])
def test_the_mixture_has_the_moments_of_the_posteriors(n_rows: int) -> None:
    rows = rows_of(3.0 * randn(n_rows, 2, seed=1), randn(n_rows, 2, seed=2))
    prior = fitted(rows)
    assert_same_moments(prior, rows)
    assert prior.mean.shape[1] <= max(1, n_rows // 4)


def test_there_are_at_most_512_components_however_many_rows() -> None:
    rows = rows_of(randn(2400, 2, seed=1))
    prior = fitted(rows)
    assert MAX_COMPONENTS == 512
    assert 256 < prior.mean.shape[1] <= 512
    assert_same_moments(prior, rows)
    assert number_of_components(10**7) == 512
    assert number_of_components(0) == 1


def test_a_single_row_is_its_own_mixture() -> None:
    rows = rows_of(randn(1, 3), randn(1, 3, seed=5))
    prior = fitted(rows)
    torch.testing.assert_close(prior.mean[0], rows.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(prior.log_variance[0], rows.log_variance, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n_distinct", [1, 3])
def test_duplicates_of_rows_are_fine(n_distinct: int) -> None:
    rows = rows_of(randn(n_distinct, 2).repeat(40, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior = fitted(rows)
    assert prior.mean.shape[1] == n_distinct
    assert_same_moments(prior, rows)


def test_rows_that_hardly_vary_keep_a_finite_density() -> None:
    rows = rows_of(torch.full((20, 2), 1.5, dtype=torch.float64), torch.full((20, 2), -60.0, dtype=torch.float64))
    prior = fitted(rows)
    assert torch.isfinite(prior.log_variance).all()
    assert torch.isfinite(prior.log_prob(torch.full((1, 1, 1, 2), 1.5, dtype=torch.float64))).all()


def test_separate_clouds_get_separate_components() -> None:
    clouds = torch.cat([randn(40, 2) - 20.0, randn(40, 2, seed=1) + 20.0])
    prior = fitted(rows_of(clouds))
    assert (prior.mean[0].abs() > 10).all()
    middle, cloud = torch.zeros(1, 1, 1, 2).double(), torch.full((1, 1, 1, 2), 20.0).double()
    assert prior.log_prob(cloud) > prior.log_prob(middle) + 50


def test_the_fit_is_the_same_for_the_same_seed() -> None:
    rows = rows_of(randn(200, 2))
    first, again = fitted(rows, seed=3), fitted(rows, seed=3)
    for name in ("log_weight", "mean", "log_variance"):
        assert torch.equal(getattr(first, name), getattr(again, name))


def test_members_and_classes_keep_mixtures_of_their_own_size() -> None:
    aggregate = AggregatePosterior(2, 2, 10, 2).double()
    rows = {
        (0, 0): rows_of(randn(40, 2)),
        (1, 0): rows_of(randn(8, 2, seed=1)),
        (0, 1): rows_of(5.0 + randn(20, 2, seed=2)),
        (1, 1): rows_of(5.0 + randn(4, 2, seed=3)),
    }
    for (member, group), own in rows.items():
        aggregate.fit_group(member, group, own, seed=0)
    q = DiagonalNormal(randn(2, ROWS, 2, seed=4), randn(2, ROWS, 2, seed=5))
    z = randn(2, 3, ROWS, 2, seed=6)
    generator = torch.Generator().manual_seed(0)
    for group in (0, 1):
        both = aggregate.select(slice(0, 2), group)
        kl, log_prob, drawn = both.kl(q), both.log_prob(z), both.sample(50, generator)
        for member in (0, 1):
            # A member with fewer components than another is not changed by sharing a tensor with it.
            alone = fitted(rows[member, group])
            own_q = DiagonalNormal(q.mean[member][None], q.log_variance[member][None])
            torch.testing.assert_close(kl[member], alone.kl(own_q)[0], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(log_prob[member], alone.log_prob(z[member][None])[0], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(drawn.mean((0, 1)), 5.0 * group, atol=1.0)


def test_the_mixture_is_saved_with_its_components() -> None:
    aggregate = AggregatePosterior(1, 1, 10, 2).double()
    aggregate.fit_group(0, 0, rows_of(randn(40, 2)), seed=0)
    loaded = AggregatePosterior(1, 1, 10, 2).double()
    loaded.load_state_dict(aggregate.state_dict())
    z = randn(1, 2, 5, 2)
    expected = aggregate.select(slice(0, 1), 0).log_prob(z)
    assert torch.equal(loaded.select(slice(0, 1), 0).log_prob(z), expected)
