"""What the conditional benchmark compares: ours in three ways, classical detectors in three, and detectors of claims.

A method takes a split and a seed and returns its scores of the test rows by name, (R,) each, higher = more anomalous.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from conditional_peers import PEERS, WAYS, class_names, encode, peer_scores
from contexts import DataSet, Limits, Split
from contrast_peers import CONTRASTS, of_claims
from scipy.special import logsumexp

from anomaly_cvae import CVAEDetector, presets

Scores = dict[str, npt.NDArray[np.float64]]
ALL_ROWS: dict[str, Any] = {"contamination": 0.01}
"""Thresholds by a share of the training rows, none held out for them: where the line is does not move AUROC."""
OURS: dict[str, dict[str, Any]] = {
    "CVAE fast": {**presets.FAST, **ALL_ROWS},
    "CVAE balanced": {**presets.BALANCED, **ALL_ROWS},
    "CVAE balanced, no linear start": {**presets.BALANCED, **ALL_ROWS, "linear_start": False},
    "CVAE balanced, parts by their spread": {**presets.BALANCED, **ALL_ROWS, "part_weights": "spread"},
}
"""Presets, and the balanced one with one thing changed."""
ON_IMAGES: dict[str, Any] = {
    **presets.IMAGES, **ALL_ROWS, "channels": (16, 32), "latent_dim": 12, "scale_floor": 1.5, "patience": 40,
}  # fmt: skip
"""As the study of MNIST has it (`pipelines/drawn_digits.py`), its channels those of few cores."""
IMAGES_PER_NETWORK = 16
"""In a step, of one network per class: ten of them then see about as many images as one that is shared."""
OUR_WAYS = {"no condition": "shared", "shared": "shared", "per class": "per_class"}
"""Of each, what `conditioning` is."""
GIVEN_CLASS = "given the class"
TRUTH = "true densities"
DETERMINISTIC = ("kNN(5)", "LOF(20)")


def methods_of(data: DataSet) -> list[tuple[str, str]]:
    """Method and way of every line of a set, ours first, the quick before the slow."""
    found = [("CVAE balanced", way) for way in OUR_WAYS if data.part != "f" or way != "no condition"]
    found += [(peer, way) for peer in PEERS for way in WAYS if data.part != "f" or way != "no condition"]
    if data.part == "a" or "wrong class" in data.name:
        found += [(judge, GIVEN_CLASS) for judge in CONTRASTS]
    if data.part == "e":
        found.append((TRUTH, GIVEN_CLASS))
    if data.part in "bcde":
        found += [("CVAE fast", way) for way in OUR_WAYS]
    if data.part != "a":
        found += [("CVAE balanced, no linear start", way) for way in ("shared", "per class")]
        found.append(("CVAE balanced, parts by their spread", "shared"))
    refused = data.has_tiny_classes
    return [(method, way) for method, way in found if not (refused and method in OURS and way == "per class")]


def scores_of(method: str, way: str, split: Split, seed: int, limits: Limits) -> Scores:
    """The scores of one method, told the condition in one way."""
    if method in OURS:
        return ours(split, way, parameters_of(method, way, split.image_shape is not None, limits), seed)
    if method == TRUTH:
        return truth(split)
    if method in CONTRASTS:
        return {"contrast": judged(CONTRASTS[method], split, seed)}
    return {
        "score": peer_scores(
            method, way, *scaled(split), split.conditions, seed,
            standardise=split.image_shape is None, least_rows=split.least_rows,
        )
    }  # fmt: skip


def parameters_of(method: str, way: str, on_images: bool, limits: Limits) -> dict[str, Any]:
    """Of one of ours; nothing of a peer."""
    if method not in OURS:
        return {}
    if not on_images:
        # Told a condition, the networks of a preset are alike, and a second one is worth a thousandth.
        one = {"n_estimators": 1} if way != "no condition" else {}
        return {**OURS[method], **one}
    batch = IMAGES_PER_NETWORK if way == "per class" else ON_IMAGES["batch_size"]
    return {**ON_IMAGES, "max_steps": limits.image_steps, "batch_size": batch}


def ours(split: Split, way: str, parameters: Mapping[str, Any], seed: int) -> Scores:
    """Negative ELBO, and where a condition is told: on its class's scale, contrast, inference head (images, shared)."""
    is_told = way != "no condition"
    asks_head = is_told and split.image_shape is not None and way == "shared"
    detector = CVAEDetector(
        **parameters, conditioning=OUR_WAYS[way], unseen_class="anomaly", inference_head=asks_head, random_state=seed
    )
    X, condition = view(split, split.train, is_told)
    detector.fit(X, condition=condition)
    X, condition = view(split, split.test, is_told)
    scores: Scores = {"negative ELBO": detector.negative_elbo(X, condition=condition)}
    if not is_told:
        return scores
    if split.wrong_claims:
        scores["contrast"] = detector.contrast(X, condition=condition)
    else:
        scores["negative ELBO, class scale"] = detector.calibrated_score(X, condition=condition)
    own, claimed = class_names(split.train, split.conditions), class_names(split.test, split.conditions)
    if asks_head:
        told = detector.condition_proba(X, method="head").rename(columns=str)
        places = told.columns.get_indexer(claimed)
        scores["inference head"] = -told.to_numpy()[np.arange(len(told)), places]
    # A row of an unknown class is flagged by policy, so it ranks first.
    known = np.isin(claimed, own)
    return {name: np.where(known, values, values.max() + 1.0) for name, values in scores.items()}


def view(split: Split, rows: pd.DataFrame, is_told: bool) -> tuple[Any, Any]:
    """x and condition as our detector takes them: frames of a table, arrays of images."""
    x, condition = rows.drop(columns=split.conditions), rows[split.conditions]
    if split.image_shape is None:
        return x, condition if is_told else None
    return x.to_numpy().reshape(-1, *split.image_shape), condition.to_numpy().ravel() if is_told else None


def scaled(split: Split) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows for peers: pixels, which have one unit, from 0 to 1; other columns as they are."""
    if split.image_shape is None:
        return split.train, split.test
    both = [
        rows.drop(columns=split.conditions).div(255.0).join(rows[split.conditions])
        for rows in (split.train, split.test)
    ]
    return both[0], both[1]


def judged(judge: Callable[..., np.ndarray], split: Split, seed: int) -> np.ndarray:
    """Scores of a detector of wrong claims."""
    train, test = scaled(split)
    x_train, x_test = encode(
        train.drop(columns=split.conditions), test.drop(columns=split.conditions), standardise=split.image_shape is None
    )
    own, claimed = class_names(train, split.conditions), class_names(test, split.conditions)
    return judge(x_train, own, x_test, claimed, seed)


def truth(split: Split) -> Scores:
    """What the true densities say: nothing can do better, on average."""
    assert split.log_densities is not None
    log_densities = split.log_densities()
    classes = np.unique(class_names(split.train, split.conditions))
    claimed = class_names(split.test, split.conditions)
    scores = {"negative log density": of_claims(-log_densities, classes, claimed, None)}
    if split.wrong_claims:
        posterior = logsumexp(log_densities, axis=1, keepdims=True) - log_densities
        scores["contrast"] = of_claims(posterior, classes, claimed, None)
    return scores
