"""Section "Peers": PyOD's VAE and AutoEncoder, scikit-learn's IsolationForest and LocalOutlierFactor, and ours."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from page import Goal, goal_table, installed, spread
from reference import Job, Rates, in_turn, operations_per_row, reference_detector, seconds, table
from scoring import with_precision
from sklearn.ensemble import IsolationForest
from sklearn.neighbors import LocalOutlierFactor

PYOD_EPOCHS = 30
"""Default of PyOD's VAE; its AutoEncoder takes ten."""
OUR_BATCH = 256
LEAST_ROWS = 500
"""Of a fit before the one that counts."""
MOST_FITS = 3
"""Rounds of fits, at most: they take a minute and more."""
OURS = "ours: detector, score_samples"


@dataclass(frozen=True)
class Peer:
    """Another detector: how it is made, and how it scores an array."""

    make: Callable[[], Any]
    score: Callable[[Any, np.ndarray], np.ndarray]


def peers(epochs: int) -> dict[str, Peer]:
    """Those that are installed; ``epochs`` of PyOD's networks, its own number unless the run is a short one."""
    threads = torch.get_num_threads()
    found = {
        "scikit-learn IsolationForest": Peer(
            lambda: IsolationForest(n_jobs=threads, random_state=0), lambda fitted, x: fitted.score_samples(x)
        ),
        "scikit-learn LocalOutlierFactor": Peer(
            lambda: LocalOutlierFactor(novelty=True, n_jobs=threads), lambda fitted, x: fitted.score_samples(x)
        ),
    }
    if installed("pyod") is None:
        return found
    from pyod.models.auto_encoder import AutoEncoder
    from pyod.models.vae import VAE

    changed = {} if epochs == PYOD_EPOCHS else {"epoch_num": epochs}
    for name, kind in (("PyOD VAE", VAE), ("PyOD AutoEncoder", AutoEncoder)):
        found[name] = Peer(lambda kind=kind: kind(verbose=0, **changed), lambda fitted, x: fitted.decision_function(x))
    return found


def fit(peer: Peer, x: np.ndarray) -> tuple[Any, float]:
    """A fitted peer and its seconds; what it prints is left out."""
    detector = peer.make()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        taken = seconds(lambda: detector.fit(x))
    return detector, taken


def our_fit(frame: pd.DataFrame, epochs: int) -> tuple[Any, float]:
    """Our detector after as many passes over all rows of ``frame``, thresholds included."""
    steps = max(1, epochs * len(frame) // OUR_BATCH)
    made: list[Any] = []
    taken = seconds(lambda: made.append(reference_detector(frame, max_steps=steps, batch_size=OUR_BATCH)))
    return made[0], taken


def fits(training: pd.DataFrame, epochs: int, rounds: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Ours and the peers fitted in turn, once a round: those of the last round, and the seconds (R,) of each."""
    x, few = training.drop(columns="c").to_numpy(), training.iloc[:LEAST_ROWS]
    our_fit(few, 1)  # the first fit of a process imports much of torch; so does PyOD's
    for peer in peers(1).values():
        fit(peer, x[:LEAST_ROWS])
    fitted, taken = dict[str, Any](), dict[str, list[float]]()
    for _ in range(rounds):
        found = {OURS: our_fit(training, epochs)} | {name: fit(peer, x) for name, peer in peers(epochs).items()}
        for name, (detector, its_seconds) in found.items():
            fitted[name] = detector
            taken.setdefault(name, []).append(its_seconds)
    return fitted, {name: np.array(own) for name, own in taken.items()}


def section(n_training: int, n_rows: int, rounds: int, *, epochs: int = PYOD_EPOCHS) -> list[str]:
    """The section's text. Fits take turns, and so does scoring, round by round."""
    training, frame = table(n_training), table(n_rows, seed=1)
    x = frame.drop(columns="c").to_numpy()
    fitted, taken = fits(training, epochs, min(rounds, MOST_FITS))
    ours = fitted[OURS]
    encoded = ours.model_.encoder.encode(frame)
    jobs = {OURS: Job(lambda: ours.score_samples(frame), n_rows)}
    for precision in ("float32", "bfloat16"):
        engine = with_precision(ours.model_.engine, precision)
        if engine is not None:
            jobs[f"ours: engine, {precision}"] = Job(lambda e=engine: e.negative_elbo(encoded), n_rows)
    for name, peer in peers(epochs).items():
        jobs[name] = Job(lambda p=peer, d=fitted[name]: p.score(d, x), n_rows)
    return _text(in_turn(jobs, rounds), taken, n_training, n_rows, epochs)


def _goals(rates: Rates, taken: dict[str, np.ndarray]) -> list[Goal]:
    goals = []
    for peer, plain, short in (("PyOD VAE", 5, 10), ("scikit-learn IsolationForest", 1.2, 2.2)):
        for precision, goal in (("float32", plain), ("bfloat16", short)):
            both = rates.has(peer) and rates.has(f"ours: engine, {precision}")
            ratio = rates.of[f"ours: engine, {precision}"] / rates.of[peer] if both else None
            absent = "PyOD is not installed" if not rates.has(peer) else "this version has no bfloat16 scoring"
            goals.append(Goal(f"scoring {precision}, against {peer}", ratio, goal, why_not=absent))
    ratio = taken["PyOD VAE"] / taken[OURS] if "PyOD VAE" in taken else None
    goals.append(Goal("fitting, against PyOD VAE at equal epochs", ratio, 6, why_not="PyOD is not installed"))
    return goals


def _text(rates: Rates, taken: dict[str, np.ndarray], n_training: int, n_rows: int, epochs: int) -> list[str]:
    engine = rates.of["ours: engine, float32"]
    lines = [
        f"| {name} | {spread(rate)} | {spread(engine / rate)} | {spread(taken[name]) if name in taken else ''} |"
        for name, rate in rates.of.items()
    ]
    if not rates.has("PyOD"):
        lines += [f"| {name} | not installed | | |" for name in ("PyOD VAE", "PyOD AutoEncoder")]
    return [
        f"Fitted on {n_training:,} rows of 64 columns, scoring {n_rows:,} others, {rounds_of(rates)} rounds; peers "
        f"with their defaults and as many threads as torch. Ours is the reference CVAE ({operations_per_row():,} "
        f"operations a row; its {epochs} epochs are passes over all rows in batches of {OUR_BATCH}, without hidden "
        "cells, thresholds included"
        + ("" if epochs == PYOD_EPOCHS else "; PyOD's networks, too, were cut to as many epochs")
        + "); PyOD's VAE has 128-64-32 hidden units, 2 latent ones, and takes batches of 32. Fits take turns, "
        f"{len(taken[OURS])} round(s), after a small one each that is not counted.",
        "",
        *goal_table(_goals(rates, taken)),
        "| detector | rows/s | our float32 engine's rate to its own | fit, s |",
        "|---|---|---|---|",
        *lines,
    ]


def rounds_of(rates: Rates) -> int:
    """How many rounds were measured."""
    return len(next(iter(rates.of.values())))
