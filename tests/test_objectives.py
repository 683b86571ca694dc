"""Objectives as reductions of hand-made terms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import norm
from torch import Tensor

from anomaly_cvae.errors import ParameterError
from anomaly_cvae.model import Terms
from anomaly_cvae.objectives import BOUNDS, OBJECTIVES, elbo, importance_weighted, objective
from anomaly_cvae.priors import DiagonalNormal, Prior, StandardNormal

MEMBERS, SAMPLES, ROWS, COLUMNS, LATENT = 2, 4, 3, 5, 2


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hand_made_terms(
    log_prob: Tensor | None = None, posterior: DiagonalNormal | None = None, prior: Prior | None = None
) -> Terms:
    shape = (MEMBERS, ROWS, LATENT)
    log_prob = randn(MEMBERS, SAMPLES, ROWS, COLUMNS, seed=0) if log_prob is None else log_prob
    posterior = posterior or DiagonalNormal(randn(*shape, seed=1), randn(*shape, seed=2))
    prior = prior or DiagonalNormal(randn(*shape, seed=3), randn(*shape, seed=4))
    z = posterior.sample(randn(MEMBERS, SAMPLES, ROWS, LATENT, seed=5))
    return Terms(log_prob, prior.kl(posterior), z, posterior, prior)


def normal_log_density(normal: DiagonalNormal, terms: Terms) -> np.ndarray:
    mean, log_variance = normal.mean.detach().numpy()[:, None], normal.log_variance.detach().numpy()[:, None]
    return norm.logpdf(terms.z.detach().numpy(), mean, np.exp(0.5 * log_variance)).sum(-1)


# ---------------------------------------------------------------------- each objective's formula


@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
def test_elbo_is_the_mean_reconstruction_less_the_weighted_kl(kl_weight: float) -> None:
    terms = hand_made_terms()
    expected = terms.log_prob.numpy().sum(-1).mean(1) - kl_weight * terms.kl.numpy().sum(-1)
    np.testing.assert_allclose(elbo(terms, kl_weight), expected, rtol=1e-12)


def test_the_kl_counts_fully_unless_told_otherwise() -> None:
    for bound in BOUNDS.values():
        assert torch.equal(bound(hand_made_terms()), bound(hand_made_terms(), 1.0))


@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
def test_iwae_is_the_log_mean_of_the_importance_weights(kl_weight: float) -> None:
    terms = hand_made_terms()
    log_ratio = normal_log_density(terms.prior, terms) - normal_log_density(terms.posterior, terms)
    log_weight = terms.log_prob.numpy().sum(-1) + kl_weight * log_ratio
    expected = logsumexp(log_weight, axis=1) - math.log(SAMPLES)
    np.testing.assert_allclose(importance_weighted(terms, kl_weight), expected, rtol=1e-10)


def test_iwae_survives_weights_that_underflow() -> None:
    terms = hand_made_terms(log_prob=randn(MEMBERS, SAMPLES, ROWS, COLUMNS, seed=0) - 1e5)
    bound = importance_weighted(terms)
    assert torch.isfinite(bound).all()
    torch.testing.assert_close(bound + 5e5, importance_weighted(hand_made_terms()), rtol=1e-6, atol=1e-6)


def test_a_kl_that_does_not_split_over_latent_units_is_summed_all_the_same() -> None:
    terms = hand_made_terms()
    whole = Terms(terms.log_prob, terms.kl.sum(-1, keepdim=True), terms.z, terms.posterior, terms.prior)
    torch.testing.assert_close(elbo(whole), elbo(terms), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------- what all objectives promise


@pytest.mark.parametrize("name", BOUNDS)
def test_one_number_per_member_and_row(name: str) -> None:
    assert objective(name).bound is BOUNDS[name]
    bound = BOUNDS[name](hand_made_terms())
    assert bound.shape == (MEMBERS, ROWS)
    assert bound.dtype == torch.float64


@pytest.mark.parametrize("name", BOUNDS)
def test_exact_where_the_posterior_is_the_prior_and_the_decoder_ignores_z(name: str) -> None:
    posterior = DiagonalNormal(randn(MEMBERS, ROWS, LATENT, seed=1), randn(MEMBERS, ROWS, LATENT, seed=2))
    log_prob = randn(MEMBERS, 1, ROWS, COLUMNS, seed=0).expand(-1, SAMPLES, -1, -1)
    terms = hand_made_terms(log_prob, posterior, posterior)
    for kl_weight in (0.0, 0.5, 1.0):
        bound = BOUNDS[name](terms, kl_weight)
        torch.testing.assert_close(bound, log_prob[:, 0].sum(-1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", BOUNDS)
def test_nats_are_summed_in_float64(name: str) -> None:
    # In float32 1e8 + 1 = 1e8: a column of one nat would vanish beside one of a hundred million.
    log_prob = torch.zeros(MEMBERS, SAMPLES, ROWS, COLUMNS)
    log_prob[..., 0], log_prob[..., 1] = -1e8, -1.0
    standard = DiagonalNormal(torch.zeros(MEMBERS, ROWS, LATENT), torch.zeros(MEMBERS, ROWS, LATENT))
    terms = Terms(
        log_prob, StandardNormal().kl(standard), torch.zeros(MEMBERS, SAMPLES, ROWS, LATENT), standard, StandardNormal()
    )
    np.testing.assert_allclose(BOUNDS[name](terms), -1e8 - 1.0, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", BOUNDS)
def test_better_reconstruction_is_better_and_rows_do_not_mix(name: str) -> None:
    log_prob = randn(MEMBERS, SAMPLES, ROWS, COLUMNS, seed=0)
    better = log_prob.clone()
    better[1, :, 2, 3] += 1.0
    gain = BOUNDS[name](hand_made_terms(better)) - BOUNDS[name](hand_made_terms(log_prob))
    assert gain[1, 2] == pytest.approx(1.0, abs=1e-12)
    gain[1, 2] = 0.0
    assert not gain.any()


@pytest.mark.parametrize("name", BOUNDS)
def test_gradients_reach_the_decoder_the_posterior_and_the_prior(name: str) -> None:
    leaves = [randn(MEMBERS, ROWS, LATENT, seed=seed).requires_grad_() for seed in range(1, 5)]
    log_prob = randn(MEMBERS, SAMPLES, ROWS, COLUMNS, seed=0).requires_grad_()
    terms = hand_made_terms(log_prob, DiagonalNormal(*leaves[:2]), DiagonalNormal(*leaves[2:]))
    BOUNDS[name](terms, 0.7).sum().backward()
    for leaf in (log_prob, *leaves):
        assert torch.isfinite(leaf.grad).all()
        assert (leaf.grad != 0).all()


@pytest.mark.parametrize("name", BOUNDS)
def test_without_the_kl_the_prior_does_not_matter(name: str) -> None:
    learned, standard = hand_made_terms(), hand_made_terms(prior=StandardNormal())
    assert torch.equal(BOUNDS[name](learned, 0.0), BOUNDS[name](standard, 0.0))
    assert not torch.equal(BOUNDS[name](learned), BOUNDS[name](standard))


def test_an_unknown_name_is_a_parameter_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ParameterError, match="'vae'") as caught:
        objective("vae")
    assert all(name in str(caught.value) for name in OBJECTIVES)
