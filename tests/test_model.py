"""The terms of the CVAE against closed forms, and the independence of members, cells and conditions."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.nn.functional import linear

from anomaly_cvae.encoding import FittedColumn
from anomaly_cvae.model import CVAE, Architecture, Terms
from anomaly_cvae.networks import Condition, StackedMLP
from anomaly_cvae.networks.stacked import NARROW_CONDITION
from anomaly_cvae.objectives import elbo, importance_weighted
from anomaly_cvae.priors import DiagonalNormal, StandardNormal
from anomaly_cvae.rows import Batch

# ---------------------------------------------------------------------- a model with a known answer

CLASSES = 3


@dataclass(frozen=True)
class LinearGaussian:
    """x = loading z + offset(c) + noise, z ~ N(prior_mean(c), prior_variance): p(x | c) is normal.

    loading (D, Z), noise_variance (D,), offset (K, D), prior_mean (K, Z), prior_variance (Z,), scale (D,).
    """

    loading: Tensor
    noise_variance: Tensor
    offset: Tensor
    prior_mean: Tensor
    prior_variance: Tensor
    scale: Tensor

    @property
    def n_columns(self) -> int:
        return len(self.loading)

    @property
    def latent_dim(self) -> int:
        return self.loading.shape[1]

    def of_columns(self, kept: Sequence[int]) -> LinearGaussian:
        """The same model of fewer columns."""
        kept = list(kept)
        return replace(
            self,
            loading=self.loading[kept],
            noise_variance=self.noise_variance[kept],
            offset=self.offset[:, kept],
            scale=self.scale[kept],
        )

    def log_marginal(self, values: Tensor, classes: Tensor) -> Tensor:
        """log p(x | c) of standardised rows (N, D), in raw units."""
        mean = self.prior_mean @ self.loading.T + self.offset
        covariance = (self.loading * self.prior_variance) @ self.loading.T + torch.diag(self.noise_variance)
        return MultivariateNormal(mean[classes], covariance).log_prob(values) - self.scale.log().sum()

    def exact_posterior(self, values: Tensor, classes: Tensor) -> MultivariateNormal:
        """p(z | x, c) of rows (N, D)."""
        weighted = self.loading / self.noise_variance[:, None]
        precision = torch.diag(1 / self.prior_variance) + self.loading.T @ weighted
        shift = (values - self.offset[classes]) @ weighted + self.prior_mean[classes] / self.prior_variance
        return MultivariateNormal(torch.linalg.solve(precision, shift.T).T, precision_matrix=precision)

    def network(self, *, learned_prior: bool = True, seed: int = 0) -> CVAE:
        """A CVAE whose decoder and prior are this model; its encoder is random."""
        columns = [
            FittedColumn(f"x{d}", "normal", center=7.0, scale=float(scale), observed=100)
            for d, scale in enumerate(self.scale)
        ]
        # The floor is far below rounding, so that the noise variance is exactly the one asked for.
        architecture = Architecture(1, self.latent_dim, (), CLASSES, learned_prior=learned_prior, scale_floor=1e-12)
        model = CVAE(architecture, columns, seed).double()
        with torch.no_grad():
            decoder = model.decoder.mlp.layers[0]
            decoder.weight.zero_()[0, :, : self.n_columns] = self.loading.T
            decoder.condition_weight.zero_()[0, :, : self.n_columns] = self.offset
            decoder.bias.zero_()[0, 0, self.n_columns :] = self.noise_variance.log()
            if learned_prior:
                prior = model.prior_network.layers[0]
                prior.weight.zero_()[0, :, : self.latent_dim] = self.prior_mean
                prior.bias.zero_()[0, 0, self.latent_dim :] = self.prior_variance.log()
        return model

    def set_posterior(self, model: CVAE, observed: Sequence[int], shift: float = 0.0, stretch: float = 0.0) -> None:
        """Give ``model`` the exact posterior given the ``observed`` columns; it must be diagonal.

        ``shift`` (standard deviations) and ``stretch`` (of the log-variance) make it wrong on purpose. The
        weights of the other columns stay as they are: their features are zero.
        """
        seen = self.of_columns(observed)
        weighted = seen.loading / seen.noise_variance[:, None]
        precision = 1 / self.prior_variance + (seen.loading * weighted).sum(0)
        constant = (self.prior_mean / self.prior_variance - seen.offset @ weighted) / precision
        with torch.no_grad():
            encoder = model.encoder.mlp.layers[0]
            encoder.weight[0, :, self.latent_dim :] = 0.0
            encoder.weight[0, list(observed), : self.latent_dim] = weighted / precision
            encoder.condition_weight.zero_()[0, :, : self.latent_dim] = constant
            encoder.bias[0, 0, : self.latent_dim] = shift / precision.sqrt()
            encoder.bias[0, 0, self.latent_dim :] = stretch - precision.log()


def linear_gaussian(*, orthogonal: bool, standard_prior: bool = False) -> LinearGaussian:
    """Five columns of two latent units; orthogonal: every column loads on one unit, whatever is missing."""
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    loading = normal(5, 2)
    if orthogonal:
        loading = loading * torch.tensor([[1, 0], [1, 0], [1, 0], [0, 1], [0, 1]])
    prior_mean, prior_variance = 0.5 * normal(CLASSES, 2), torch.exp(0.5 * normal(2))
    if standard_prior:
        prior_mean, prior_variance = torch.zeros_like(prior_mean), torch.ones_like(prior_variance)
    return LinearGaussian(
        loading=loading,
        noise_variance=torch.exp(normal(5)),
        offset=normal(CLASSES, 5),
        prior_mean=prior_mean,
        prior_variance=prior_variance,
        scale=torch.exp(normal(5)),
    )


def linear_rows(n_rows: int, n_columns: int = 5) -> tuple[Tensor, Tensor]:
    """Rows within 3 standard deviations, where the encoder's input is not squashed, and their classes."""
    generator = torch.Generator().manual_seed(5)
    values = 5.8 * torch.rand((n_rows, n_columns), generator=generator, dtype=torch.float64) - 2.9
    return values, torch.arange(n_rows) % CLASSES


def batch_of(values: Tensor, classes: Tensor, observed: Tensor | None = None) -> Batch:
    condition = torch.eye(CLASSES, dtype=values.dtype)[classes]
    mask = None if observed is None else observed.to(values.dtype).expand(values.shape)[None]
    return Batch(values[None], mask, Condition(condition[None]))


def exact_expectation_points(latent_dim: int) -> Tensor:
    """Points (2 Z, Z) whose average integrates any quadratic against N(0, I) exactly (cubature of degree 3)."""
    axes = math.sqrt(latent_dim) * torch.eye(latent_dim, dtype=torch.float64)
    return torch.cat([axes, -axes])


def exact_elbo(model: CVAE, batch: Batch) -> Tensor:
    """The ELBO (N,) of a linear-Gaussian model with its expectation over z taken without error."""
    with torch.no_grad():
        return elbo(model.terms(batch, exact_expectation_points(model.architecture.latent_dim)))[0]


# ---------------------------------------------------------------------- the ELBO is a bound, tight where q is exact


@pytest.mark.parametrize("standard_prior", [False, True])
def test_the_elbo_is_the_log_likelihood_where_the_posterior_is_exact(standard_prior: bool) -> None:
    truth = linear_gaussian(orthogonal=True, standard_prior=standard_prior)
    values, classes = linear_rows(40)
    model = truth.network(learned_prior=not standard_prior)
    truth.set_posterior(model, range(5))
    torch.testing.assert_close(
        exact_elbo(model, batch_of(values, classes)), truth.log_marginal(values, classes), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("orthogonal", [True, False])
def test_the_gap_of_the_elbo_is_the_divergence_from_the_exact_posterior(orthogonal: bool, seed: int) -> None:
    truth = linear_gaussian(orthogonal=orthogonal)
    values, classes = linear_rows(40)
    batch = batch_of(values, classes)
    model = truth.network(seed=seed)
    gap = truth.log_marginal(values, classes) - exact_elbo(model, batch)
    q = model.encode(batch)
    approximate = MultivariateNormal(q.mean[0], torch.diag_embed(torch.exp(q.log_variance[0])))
    divergence = kl_divergence(approximate, truth.exact_posterior(values, classes)).detach()
    torch.testing.assert_close(gap, divergence, rtol=1e-9, atol=1e-9)
    assert (gap > 0.01).all()


def test_bounds_tighten_from_the_elbo_over_iwae_to_the_truth() -> None:
    truth = linear_gaussian(orthogonal=True)
    values, classes = linear_rows(6)
    model = truth.network()
    truth.set_posterior(model, range(5), shift=0.5, stretch=0.3)
    log_likelihood = truth.log_marginal(values, classes)
    estimates = {"elbo": _errors(model, values, classes, log_likelihood, 1, exact_kl=True)}
    for n_samples in (1, 5, 50, 500):
        estimates[f"iwae {n_samples}"] = _errors(model, values, classes, log_likelihood, n_samples)
    means = {name: float(errors.mean()) for name, errors in estimates.items()}
    standard_errors = {name: float(errors.std()) / math.sqrt(len(errors)) for name, errors in estimates.items()}
    for looser, tighter in pairwise(estimates):
        margin = 3 * math.hypot(standard_errors[looser], standard_errors[tighter])
        assert means[looser] <= means[tighter] + margin
    # One sample is the ELBO in expectation; many samples are worth having.
    assert means["iwae 1"] == pytest.approx(means["elbo"], abs=3 * standard_errors["iwae 1"] + 0.01)
    assert means["iwae 5"] > means["iwae 1"] + 3 * standard_errors["iwae 1"]
    assert means["iwae 500"] == pytest.approx(0.0, abs=0.01)


def _errors(
    model: CVAE, values: Tensor, classes: Tensor, log_likelihood: Tensor, n_samples: int, *, exact_kl: bool = False
) -> Tensor:
    """Bound less truth of many independent estimates, each of ``n_samples`` draws of z."""
    repeats = 60_000 // (n_samples * len(values))
    repeated = batch_of(values.repeat(repeats, 1), classes.repeat(repeats))
    shape = (1, n_samples, repeats * len(values), model.architecture.latent_dim)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(n_samples), dtype=torch.float64)
    with torch.no_grad():
        terms = model.terms(repeated, noise)
        bound = elbo(terms) if exact_kl else importance_weighted(terms)
    return bound[0] - log_likelihood.repeat(repeats)


# ---------------------------------------------------------------------- missing cells


@pytest.mark.parametrize("kept", [(0, 1, 2, 3, 4), (1, 2, 4), (3,), (0, 1, 2)])
def test_masked_columns_leave_the_marginal_of_the_observed_ones(kept: tuple[int, ...]) -> None:
    truth = linear_gaussian(orthogonal=True)
    values, classes = linear_rows(30)
    model = truth.network()
    truth.set_posterior(model, kept)
    observed = torch.zeros(5, dtype=torch.bool)
    observed[list(kept)] = True
    rest = truth.of_columns(kept)
    torch.testing.assert_close(
        exact_elbo(model, batch_of(values, classes, observed)),
        rest.log_marginal(values[:, list(kept)], classes),
        rtol=1e-10,
        atol=1e-10,
    )


def test_masked_columns_equal_the_network_of_the_remaining_columns() -> None:
    truth, kept = linear_gaussian(orthogonal=False), [0, 2, 3]
    values, classes = linear_rows(30)
    full, rest = truth.network(seed=3), truth.of_columns(kept).network()
    with torch.no_grad():
        rest.encoder.mlp.load_state_dict(
            full.encoder.mlp.state_dict() | {"layers.0.weight": full.encoder.mlp.layers[0].weight[:, kept]}
        )
    noise = torch.randn((4, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    observed = torch.tensor([True, False, True, True, False])
    masked = full.terms(batch_of(values, classes, observed), noise)
    remaining = rest.terms(batch_of(values[:, kept], classes), noise)
    torch.testing.assert_close(masked.log_prob[..., kept], remaining.log_prob, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(masked.kl, remaining.kl, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(elbo(masked), elbo(remaining), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------- a bank over every kind of column

MIXED = (
    FittedColumn("on", "bernoulli", n_levels=2, observed=50),
    FittedColumn("colour", "categorical", n_levels=3, observed=50),
    FittedColumn("site", "categorical", n_levels=4, observed=50),
    FittedColumn("packets", "negative_binomial", center=1.5, scale=0.5, mean=4.0, observed=50),
    FittedColumn("temperature", "normal", center=20.0, scale=5.0, observed=50),
    FittedColumn("pressure", "normal", center=1.0, scale=0.1, observed=50),
    FittedColumn("errors", "poisson", center=0.4, scale=0.5, mean=1.0, observed=50),
    FittedColumn("delay", "student_t", center=3.0, scale=2.0, observed=50),
)
N_ROWS, N_CONDITIONS = 7, 3


def bank(seed: int = 0, **changes: object) -> CVAE:
    architecture = replace(Architecture(3, 2, (6, 5), N_CONDITIONS, scale_floor=0.1), **changes)
    model = CVAE(architecture, MIXED, seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # biases start at zero, where a forgotten one would not be noticed
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def mixed_batch(n_copies: int = 1, *, missing: bool = False, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    shape = (n_copies, N_ROWS)
    cells = [
        *(rng.integers(0, column.n_levels, shape) for column in MIXED[:3]),
        rng.poisson(4.0, shape),
        rng.standard_normal(shape),
        rng.standard_normal(shape),
        rng.poisson(1.0, shape),
        rng.standard_normal(shape),
    ]
    values = torch.tensor(np.stack(cells, axis=-1).astype(np.float64))
    observed = torch.tensor(rng.random(values.shape) > 0.4, dtype=torch.float64) if missing else None
    return Batch(values, observed, Condition(torch.tensor(rng.standard_normal((n_copies, N_ROWS, N_CONDITIONS)))))


def fixed_noise(n_samples: int = 4, latent_dim: int = 2) -> Tensor:
    return torch.randn((n_samples, latent_dim), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def assert_same_terms(terms: Terms, other: Terms) -> None:
    for name in ("log_prob", "kl", "z", "log_q", "log_prior"):
        torch.testing.assert_close(getattr(terms, name), getattr(other, name), rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("learned_prior", [False, True])
@pytest.mark.parametrize("hidden_dims", [(), (6, 5)])
def test_shapes_of_the_terms(hidden_dims: tuple[int, ...], learned_prior: bool, missing: bool) -> None:
    model = bank(hidden_dims=hidden_dims, learned_prior=learned_prior, missing_indicators=missing)
    terms = model.terms(mixed_batch(missing=missing), fixed_noise())
    assert terms.log_prob.shape == (3, 4, N_ROWS, len(MIXED))
    assert terms.kl.shape == (3, N_ROWS, 2)
    assert terms.z.shape == (3, 4, N_ROWS, 2)
    assert terms.log_q.shape == terms.log_prior.shape == (3, 4, N_ROWS)
    assert all(torch.isfinite(t).all() for t in (terms.log_prob, terms.kl, terms.log_q, terms.log_prior))


def test_the_seed_makes_the_weights_whatever_the_global_generator() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = CVAE(Architecture(2, 2, (4,)), MIXED, seed=3).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    again = CVAE(Architecture(2, 2, (4,)), MIXED, seed=3).state_dict()
    other = CVAE(Architecture(2, 2, (4,)), MIXED, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["encoder.mlp.layers.0.weight"], other["encoder.mlp.layers.0.weight"])
    assert not torch.equal(first["encoder.mlp.layers.0.weight"][0], first["encoder.mlp.layers.0.weight"][1])


def test_the_log_densities_of_z_are_those_of_its_distributions() -> None:
    model, batch = bank(learned_prior=True), mixed_batch()
    terms = model.terms(batch, fixed_noise())
    q = Normal(terms.posterior.mean.unsqueeze(1), torch.exp(0.5 * terms.posterior.log_variance).unsqueeze(1))
    prior = model.prior(batch.condition)
    assert isinstance(prior, DiagonalNormal)
    p = Normal(prior.mean.unsqueeze(1), torch.exp(0.5 * prior.log_variance).unsqueeze(1))
    torch.testing.assert_close(terms.log_q, q.log_prob(terms.z).sum(-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms.log_prior, p.log_prob(terms.z).sum(-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms.kl, kl_divergence(q, p).squeeze(1), rtol=1e-12, atol=1e-12)


def test_samples_of_z_are_the_noise_on_the_scale_of_the_posterior() -> None:
    model, batch, noise = bank(), mixed_batch(), fixed_noise()
    posterior = model.encode(batch)
    z = model.terms(batch, noise).z
    for m, s, n in np.ndindex(3, 4, N_ROWS):
        expected = posterior.mean[m, n] + torch.exp(0.5 * posterior.log_variance[m, n]) * noise[s]
        torch.testing.assert_close(z[m, s, n], expected, rtol=1e-12, atol=1e-12)


def test_own_noise_of_every_row_is_used_where_it_is_given() -> None:
    model, batch = bank(), mixed_batch()
    shared = fixed_noise()
    own = shared[None, :, None, :].repeat(3, 1, N_ROWS, 1)
    assert_same_terms(model.terms(batch, own), model.terms(batch, shared))
    own[1, :, 4] += 1.0
    changed = (model.terms(batch, own).log_prob != model.terms(batch, shared).log_prob).any(-1)
    assert changed[1, :, 4].all()
    assert changed.sum() == 4


def test_a_row_is_judged_alone() -> None:
    model, batch = bank(learned_prior=True), mixed_batch()
    together = model.terms(batch, fixed_noise())
    for n in range(N_ROWS):
        row = Batch(batch.values[:, n : n + 1], None, Condition(batch.condition.vectors[:, n : n + 1]))
        alone = model.terms(row, fixed_noise())
        torch.testing.assert_close(alone.log_prob[:, :, 0], together.log_prob[:, :, n], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(alone.kl[:, 0], together.kl[:, n], rtol=1e-10, atol=1e-10)


def test_one_condition_for_all_rows_equals_the_same_condition_given_to_each() -> None:
    model, batch = bank(learned_prior=True), mixed_batch()
    shared = Condition(batch.condition.vectors[:, :1])
    repeated = Batch(batch.values, None, Condition(shared.vectors.expand(1, N_ROWS, -1)))
    assert_same_terms(
        model.terms(Batch(batch.values, None, shared), fixed_noise()), model.terms(repeated, fixed_noise())
    )


# ---------------------------------------------------------------------- condition


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_the_condition_enters_at_every_layer(part: str, layer: int) -> None:
    model, batch = bank(), mixed_batch()
    layers = getattr(model, part).mlp.layers
    assert len(layers) == 3
    with torch.no_grad():
        for other in (*model.encoder.mlp.layers, *model.decoder.mlp.layers):
            if other is not layers[layer]:
                other.condition_weight.zero_()
    before = model.terms(batch, fixed_noise())
    after = model.terms(Batch(batch.values, None, Condition(batch.condition.vectors + 1.0)), fixed_noise())
    rows_changed = (before.log_prob != after.log_prob).any(-1).any(1)
    assert rows_changed.all()
    if part == "decoder":
        assert torch.equal(before.kl, after.kl)


def test_a_bank_without_conditions_takes_none() -> None:
    model = bank(n_conditions=0, learned_prior=True)
    batch = mixed_batch()
    assert isinstance(model.prior(None), StandardNormal)
    terms = model.terms(Batch(batch.values, None, None), fixed_noise())
    assert torch.isfinite(terms.log_prob).all()


# ---------------------------------------------------------------------- prior


def test_a_learned_prior_depends_on_the_condition_and_a_standard_one_does_not() -> None:
    condition = mixed_batch().condition
    assert isinstance(bank().prior(condition), StandardNormal)
    prior = bank(learned_prior=True).prior(condition)
    assert isinstance(prior, DiagonalNormal)
    assert prior.mean.shape == (3, N_ROWS, 2)
    assert len(prior.mean[0].unique(dim=0)) == N_ROWS
    assert len(prior.log_variance[0].unique(dim=0)) == N_ROWS


def test_a_learned_prior_is_trained_by_the_kl_alone() -> None:
    model = bank(learned_prior=True)
    terms = model.terms(mixed_batch(), fixed_noise())
    terms.log_prob.sum().backward(retain_graph=True)
    assert all(p.grad is None for p in model.prior_network.parameters())
    terms.kl.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.prior_network.parameters())


def test_another_prior_at_scoring_time_changes_the_kl_and_nothing_else() -> None:
    model, batch = bank(), mixed_batch()
    other = DiagonalNormal(torch.ones(3, 1, 2).double(), torch.zeros(3, 1, 2).double())
    training, scoring = model.terms(batch, fixed_noise()), model.terms(batch, fixed_noise(), prior=other)
    assert torch.equal(training.log_prob, scoring.log_prob)
    torch.testing.assert_close(scoring.kl, other.kl(scoring.posterior), rtol=0, atol=0)
    assert not torch.equal(training.kl, scoring.kl)


# ---------------------------------------------------------------------- members


def test_changing_one_member_leaves_the_others_terms_as_they_are() -> None:
    model, batch = bank(learned_prior=True), mixed_batch()
    before = model.terms(batch, fixed_noise())
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter[1] += 0.5
    after = changed.terms(batch, fixed_noise())
    for name in ("log_prob", "kl", "z", "log_prior"):
        torch.testing.assert_close(getattr(before, name)[0], getattr(after, name)[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(getattr(before, name)[2], getattr(after, name)[2], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(getattr(before, name)[1], getattr(after, name)[1])


def test_the_gradient_of_one_members_terms_stays_with_it() -> None:
    model = bank(learned_prior=True)
    terms = model.terms(mixed_batch(), fixed_noise())
    (terms.log_prob[1].sum() - terms.kl[1].sum()).backward()
    for parameter in model.parameters():
        assert parameter.grad[1].abs().sum() > 0
        assert not parameter.grad[[0, 2]].any()


@pytest.mark.parametrize("members", [slice(0, 1), slice(2, 3), slice(1, 3)])
@pytest.mark.parametrize("missing", [False, True])
def test_some_members_equal_their_part_of_the_whole_bank(members: slice, missing: bool) -> None:
    model = bank(learned_prior=True, missing_indicators=True)
    batch = mixed_batch(missing=missing)
    whole, part = model.terms(batch, fixed_noise()), model.terms(batch, fixed_noise(), members=members)
    for name in ("log_prob", "kl", "z", "log_q", "log_prior"):
        torch.testing.assert_close(getattr(part, name), getattr(whole, name)[members], rtol=1e-10, atol=1e-10)


def test_every_member_can_have_rows_of_its_own() -> None:
    model, batch = bank(learned_prior=True, missing_indicators=True), mixed_batch(3, missing=True)
    together = model.terms(batch, fixed_noise())
    for m in range(3):
        told = Condition(batch.condition.vectors[m : m + 1])
        own = Batch(batch.values[m : m + 1], batch.observed[m : m + 1], told)
        alone = model.terms(own, fixed_noise(), members=slice(m, m + 1))
        torch.testing.assert_close(alone.log_prob[0], together.log_prob[m], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(alone.kl[0], together.kl[m], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n_samples", [1, 2])
@pytest.mark.parametrize("n_conditions", [0, 3, NARROW_CONDITION + 1])
@pytest.mark.parametrize("hidden_dims", [(), (4,), (6, 5)])
@pytest.mark.parametrize("n_members", [1, 3])
def test_a_stacked_network_equals_a_loop_over_single_ones(
    n_members: int, hidden_dims: tuple[int, ...], n_conditions: int, n_samples: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    stacked = StackedMLP(n_members, 4, hidden_dims, 2, n_conditions, generator).double()
    with torch.no_grad():
        for parameter in stacked.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).double())
    x = torch.randn((n_members, n_samples * N_ROWS, 4), generator=generator).double().requires_grad_()
    condition = torch.randn((1, N_ROWS, n_conditions), generator=generator).double() if n_conditions else None
    told = None if condition is None else Condition(condition)
    out = stacked(x, told)
    assert out.shape == (n_members, n_samples * N_ROWS, 2)
    # Two samples per row: a row's condition serves both.
    repeated = None if condition is None else condition[0].repeat(n_samples, 1)
    alone = torch.stack([_single_network(stacked, m, x[m], repeated) for m in range(n_members)])
    torch.testing.assert_close(out, alone, rtol=1e-12, atol=1e-12)
    everything = [x, *stacked.parameters()]
    gradients = [torch.autograd.grad((result**2).sum(), everything) for result in (out, alone)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-10)
    some = stacked(x[:1], told, slice(0, 1))
    torch.testing.assert_close(some[0], alone[0], rtol=1e-12, atol=1e-12)


def _single_network(stacked: StackedMLP, member: int, x: Tensor, condition: Tensor | None) -> Tensor:
    hidden = x
    for place, layer in enumerate(stacked.layers):
        hidden = linear(hidden, layer.weight[member].T, layer.bias[member, 0])
        if condition is not None:
            hidden = hidden + linear(condition, layer.condition_weight[member].T)
        if place + 1 < len(stacked.layers):
            hidden = torch.relu(hidden)
    return hidden if stacked.skip is None else hidden + x @ stacked.skip[member]


# ---------------------------------------------------------------------- masked cells


def test_masked_cells_cost_exactly_nothing_and_say_nothing() -> None:
    model, batch = bank(missing_indicators=True), mixed_batch(missing=True)
    terms = model.terms(batch, fixed_noise())
    masked = batch.observed[0] == 0
    assert (terms.log_prob[:, :, masked] == 0.0).all()
    assert (terms.log_prob[:, :, ~masked] != 0.0).all()
    other = torch.where(batch.observed > 0, batch.values, mixed_batch(seed=9).values)
    assert not torch.equal(other, batch.values)
    assert_same_terms(model.terms(Batch(other, batch.observed, batch.condition), fixed_noise()), terms)


def test_masked_cells_have_exactly_no_gradient() -> None:
    model, batch = bank(), mixed_batch()
    observed = torch.ones_like(batch.values)
    observed[..., 4] = 0.0
    values = batch.values.clone()
    values[..., 4] = 1e15
    terms = model.terms(Batch(values, observed, batch.condition), fixed_noise())
    (elbo(terms).sum()).backward()
    # Decoder outputs of column 4: after 1 + (3 + 4) + 2 outputs come two means and two log-variances.
    for parameter in (model.decoder.mlp.layers[-1].weight, model.decoder.mlp.layers[-1].bias, model.decoder.mlp.skip):
        assert not parameter.grad[..., [10, 12]].any()
        assert parameter.grad[..., [11, 13]].any()
    for parameter in model.parameters():
        assert torch.isfinite(parameter.grad).all()


def test_a_row_with_nothing_observed_keeps_only_its_kl() -> None:
    model, batch = bank(), mixed_batch()
    blank = Batch(batch.values, torch.zeros_like(batch.values), batch.condition)
    terms = model.terms(blank, fixed_noise())
    assert not terms.log_prob.any()
    torch.testing.assert_close(elbo(terms), -terms.kl.sum(-1), rtol=0, atol=0)


def test_indicators_tell_a_missing_cell_from_an_average_one() -> None:
    batch = mixed_batch()
    values, observed = batch.values.clone(), torch.ones_like(batch.values)
    values[..., 4], observed[..., 4] = 0.0, 0.0
    hidden = Batch(values, observed, batch.condition)
    average = Batch(values, torch.ones_like(values), batch.condition)
    without = bank()
    assert torch.equal(without.encode(hidden).mean, without.encode(average).mean)
    with_indicators = bank(missing_indicators=True)
    assert (with_indicators.encode(hidden).mean != with_indicators.encode(average).mean).any(-1).all()


@pytest.mark.parametrize("missing_indicators", [False, True])
def test_no_mask_means_that_every_cell_is_there(missing_indicators: bool) -> None:
    model, batch = bank(missing_indicators=missing_indicators), mixed_batch()
    explicit = Batch(batch.values, torch.ones_like(batch.values), batch.condition)
    assert_same_terms(model.terms(batch, fixed_noise()), model.terms(explicit, fixed_noise()))


# ---------------------------------------------------------------------- units of a class


def test_the_scale_of_a_rows_class_belongs_to_the_density() -> None:
    truth = linear_gaussian(orthogonal=True)
    values, classes = linear_rows(20)
    model = truth.network()
    truth.set_posterior(model, range(5))
    log_scale = torch.randn((CLASSES, 5), generator=torch.Generator().manual_seed(2), dtype=torch.float64)[classes]
    batch = replace(batch_of(values, classes), log_scale=log_scale[None])
    torch.testing.assert_close(
        exact_elbo(model, batch), truth.log_marginal(values, classes) - log_scale.sum(1), rtol=1e-10, atol=1e-10
    )


def test_the_scale_of_a_class_costs_nothing_where_the_cell_is_missing() -> None:
    model, batch = bank(), mixed_batch(missing=True)
    scaled = replace(batch, log_scale=torch.full((1, 1, len(MIXED)), 3.0, dtype=torch.float64))
    difference = model.terms(batch, fixed_noise()).log_prob - model.terms(scaled, fixed_noise()).log_prob
    torch.testing.assert_close(difference, 3.0 * batch.observed.unsqueeze(1).expand_as(difference), rtol=0, atol=1e-9)


# ---------------------------------------------------------------------- generation and training noise


def test_draws_lie_in_the_support_of_their_columns() -> None:
    model = bank()
    z = torch.randn((3, 50, N_ROWS, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parameters = model.decode(z, mixed_batch().condition)
    drawn = model.draw(parameters, torch.Generator().manual_seed(0))
    assert drawn.shape == (3, 50, N_ROWS, len(MIXED))
    for d, column in enumerate(MIXED):
        own = drawn[..., d]
        if column.n_levels:
            assert set(own.unique().tolist()) == set(range(column.n_levels))
        elif column.likelihood in ("poisson", "negative_binomial"):
            assert (own >= 0).all()
            assert torch.equal(own, own.round())
        else:
            assert (own != own.round()).any()
    expected = model.expected(parameters)
    assert expected.shape == (N_ROWS, len(MIXED))
    numbers = [d for d, column in enumerate(MIXED) if not column.n_levels]
    error = drawn[..., numbers].mean((0, 1)) - expected[:, numbers]
    standard_error = drawn[..., numbers].std((0, 1)) / math.sqrt(150)
    assert (error.abs() < 6 * standard_error).all()


def test_training_noise_is_on_real_columns_only() -> None:
    batch = mixed_batch(missing=True)
    moved = bank().jitter(batch, 0.2, torch.Generator().manual_seed(0))
    changed = (moved.values != batch.values).reshape(-1, len(MIXED))
    real = torch.tensor([column.likelihood in ("normal", "student_t") for column in MIXED])
    assert changed[:, real].all()
    assert not changed[:, ~real].any()
    assert torch.equal(moved.observed, batch.observed)
    assert torch.equal(moved.condition.vectors, batch.condition.vectors)
    scale = torch.tensor([0.0, 0.2]).reshape(2, 1, 1)
    own = bank().jitter(mixed_batch(2), scale, torch.Generator().manual_seed(0)).values != mixed_batch(2).values
    assert not own[0].any()
    assert own[1][:, real].all()
    scaled = replace(batch, log_scale=torch.ones_like(batch.values))
    assert torch.equal(bank().jitter(scaled, 0.2, torch.Generator().manual_seed(0)).log_scale, scaled.log_scale)
