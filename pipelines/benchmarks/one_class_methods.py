"""Detectors that learn from normal rows alone and score others: ours by preset, scikit-learn's, PyOD's.

Each takes training rows (N, D), test rows (R, D) and a seed, and returns scores (R,), higher = more anomalous. Peers
have their libraries' defaults, on standardised columns; none is tuned. Those whose cost grows with the square of the
training rows, and those of PyOD, learn from at most `MOST_ROWS` of them, drawn by the seed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity, LocalOutlierFactor, NearestNeighbors
from sklearn.preprocessing import StandardScaler
from sklearn.svm import OneClassSVM

from anomaly_cvae import CVAEDetector, presets

Rows = npt.NDArray[np.float64]
Method = Callable[[Rows, Rows, int], Rows]

MOST_ROWS = 20_000
MOST_ROWS_OF_SVM = 5_000
NEIGHBOURS = 5
COMPONENTS = 10
ALL_ROWS: dict[str, Any] = {"contamination": 0.01}
"""Thresholds by a share of the training rows, none held out for them: where the line is does not move AUROC."""
OURS: dict[str, dict[str, Any]] = {
    "CVAE fast": {**presets.FAST, **ALL_ROWS},
    "CVAE balanced": {**presets.BALANCED, **ALL_ROWS},
    "CVAE best": {**presets.BEST, **ALL_ROWS},
}
"""Presets."""
ABLATION: dict[str, dict[str, Any]] = {
    "one network, KL weight 1": {"n_estimators": 1, "kl_weight": 1.0},
    "KL weight 1": {"kl_weight": 1.0},
    "KL weight .1": {"kl_weight": 0.1},
    "parts as they are": {"part_weights": "alike"},
    "KL weights 1 and .3": {"kl_weight": (1.0, 0.3)},
    "KL weights 1 and .05": {"kl_weight": (1.0, 0.05)},
    "four networks": {"n_estimators": 4},
    "prior N(0, I)": {"prior": "standard"},
    "VampPrior": {"prior": "vamp"},
    "no hidden cells": {"mask_rate": 0.0},
    "cells hidden in half of the rows": {"mask_rate": 0.5},
    "no noise": {"input_noise": 0.0},
    "noise .05": {"input_noise": 0.05},
    "noise .1 and .02": {"input_noise": (0.1, 0.02)},
    "scale floor .02": {"scale_floor": 0.02},
    "four latent units": {"latent_dim": 4},
    "one point of z a score": {"n_samples": 1},
    "no early end": {"patience": 1_000_000},
    "wider, longer": {"hidden_dims": (256, 256), "max_steps": 2000, "batch_size": 256},
}
"""What is changed of the balanced one, one at a time."""
IN_THE_TABLE = "CVAE balanced, one network, KL weight 1"
"""The one of these that is compared with the others' methods, too."""
OURS |= {f"CVAE balanced, {name}": {**presets.BALANCED, **ALL_ROWS, **changes} for name, changes in ABLATION.items()}


def cvae(parameters: dict[str, Any], train: Rows, test: Rows, seed: int) -> Rows:
    """The negative ELBO of our detector, without a condition."""
    scores: Rows = CVAEDetector(**parameters, random_state=seed).fit(train).negative_elbo(test)
    return scores


def nearest_neighbours(train: Rows, test: Rows, seed: int) -> Rows:
    """Distance to the fifth nearest training row."""
    distances: Rows = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(train).kneighbors(test)[0][:, -1]
    return distances


def local_outlier_factor(train: Rows, test: Rows, seed: int) -> Rows:
    """Defaults: 20 neighbours."""
    return -LocalOutlierFactor(novelty=True).fit(train).score_samples(test)


def isolation_forest(train: Rows, test: Rows, seed: int) -> Rows:
    """Defaults: 100 trees."""
    return -IsolationForest(random_state=seed).fit(train).score_samples(test)


def one_class_svm(train: Rows, test: Rows, seed: int) -> Rows:
    """Defaults: radial basis functions, nu 0.5."""
    return -OneClassSVM().fit(_some(train, MOST_ROWS_OF_SVM, seed)).score_samples(test)


def gaussian_mixture(train: Rows, test: Rows, seed: int) -> Rows:
    """Ten full components, fewer where there are fewer than 500 rows."""
    components = int(np.clip(len(train) // 50, 1, COMPONENTS))
    return -GaussianMixture(components, reg_covar=1e-3, random_state=seed).fit(train).score_samples(test)


def kernel_density(train: Rows, test: Rows, seed: int) -> Rows:
    """A normal kernel of bandwidth 1 on standardised columns."""
    return -KernelDensity(rtol=1e-3).fit(train).score_samples(test)


def principal_components(train: Rows, test: Rows, seed: int) -> Rows:
    """Squared error after a projection that keeps 90 % of the variance."""
    kept = PCA(0.9, svd_solver="full").fit(train)
    error: Rows = np.square(test - kept.inverse_transform(kept.transform(test))).sum(axis=1)
    return error


def of_pyod(name: str, train: Rows, test: Rows, seed: int) -> Rows:
    """PyOD's detector of that name with its defaults; needs the extra ``bench``."""
    import torch
    from pyod.models.auto_encoder import AutoEncoder
    from pyod.models.deep_svdd import DeepSVDD
    from pyod.models.ecod import ECOD
    from pyod.models.lunar import LUNAR
    from pyod.models.vae import VAE

    torch.manual_seed(seed)
    np.random.seed(seed)  # the only seed that some of them know
    kinds: dict[str, Callable[[], Any]] = {
        "AE": lambda: AutoEncoder(random_state=seed, verbose=0),
        "VAE": lambda: VAE(random_state=seed, verbose=0),
        "DeepSVDD": lambda: DeepSVDD(n_features=train.shape[1], random_state=seed, verbose=0),
        "ECOD": ECOD,
        "LUNAR": LUNAR,
    }
    scores: Rows = kinds[name]().fit(train).decision_function(test)
    return scores


def _some(train: Rows, at_most: int, seed: int) -> Rows:
    if len(train) <= at_most:
        return train
    return train[np.random.default_rng(seed).choice(len(train), at_most, replace=False)]


def _standardised(method: Method, at_most: int | None, train: Rows, test: Rows, seed: int) -> Rows:
    scaler = StandardScaler().fit(train)
    kept = train if at_most is None else _some(train, at_most, seed)
    return method(scaler.transform(kept), scaler.transform(test), seed)


METHODS: dict[str, Method] = {
    **{name: partial(cvae, parameters) for name, parameters in OURS.items()},
    "kNN": partial(_standardised, nearest_neighbours, MOST_ROWS),
    "LOF": partial(_standardised, local_outlier_factor, MOST_ROWS),
    "Isolation Forest": partial(_standardised, isolation_forest, None),
    "OCSVM": partial(_standardised, one_class_svm, None),
    "GMM": partial(_standardised, gaussian_mixture, None),
    "KDE": partial(_standardised, kernel_density, MOST_ROWS),
    "PCA": partial(_standardised, principal_components, None),
    **{
        f"{name} (PyOD)": partial(_standardised, partial(of_pyod, name), MOST_ROWS)
        for name in ("LUNAR", "AE", "VAE", "DeepSVDD", "ECOD")
    },
}
