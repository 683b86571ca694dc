"""One decoder head per kind of column."""

from anomaly_cvae.likelihoods.base import LIKELIHOODS, Likelihood, likelihood_class
from anomaly_cvae.likelihoods.bernoulli import Bernoulli
from anomaly_cvae.likelihoods.categorical import Categorical
from anomaly_cvae.likelihoods.counts import NegativeBinomial, Poisson
from anomaly_cvae.likelihoods.discretised_logistic import DiscretisedLogistic
from anomaly_cvae.likelihoods.normal import Normal
from anomaly_cvae.likelihoods.robust_normal import RobustNormal
from anomaly_cvae.likelihoods.student_t import StudentT

__all__ = [
    "LIKELIHOODS",
    "Bernoulli",
    "Categorical",
    "DiscretisedLogistic",
    "Likelihood",
    "NegativeBinomial",
    "Normal",
    "Poisson",
    "RobustNormal",
    "StudentT",
    "likelihood_class",
]
