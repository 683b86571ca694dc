"""Work on several threads: every piece once, each thread a whole one, and results those of one thread."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from anomaly_cvae import CVAEDetector
from anomaly_cvae.errors import DataError
from anomaly_cvae.networks import has_bfloat16
from anomaly_cvae.threads import in_threads

N_ROWS = 6_000


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_every_piece_is_done_once_by_threads_of_one_each(three_threads: None) -> None:
    done, busy, most, lock = list[int](), 0, 0, threading.Lock()

    def work(piece: int) -> None:
        nonlocal busy, most
        assert torch.get_num_threads() == 1
        with lock:
            busy += 1
            most = max(most, busy)
        time.sleep(0.01)
        with lock:
            busy -= 1
            done.append(piece)

    in_threads(work, iter(range(20)))
    assert sorted(done) == list(range(20))
    assert most == 3
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(("threads", "pieces"), [(1, 5), (3, 1), (3, 0)])
def test_there_are_no_threads_for_one_piece_or_where_torch_has_one(threads: int, pieces: int) -> None:
    before, seen = torch.get_num_threads(), list[int]()
    try:
        torch.set_num_threads(threads)
        in_threads(lambda _: seen.append(threading.get_ident()), range(pieces))
    finally:
        torch.set_num_threads(before)
    assert seen == [threading.get_ident()] * pieces


def test_what_fails_in_a_thread_fails_here_and_ends_the_work(three_threads: None) -> None:
    done = list[int]()

    def work(piece: int) -> None:
        if piece == 7:
            raise ValueError("the seventh")
        time.sleep(0.005)
        done.append(piece)

    with pytest.raises(ValueError, match="the seventh"):
        in_threads(work, range(500))
    assert len(done) < 100, "pieces that had not begun are left"


def test_threads_that_begin_later_have_what_torch_had_before(three_threads: None) -> None:
    in_threads(lambda _: None, range(20))
    seen = list[int]()
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [3]


AT_THE_END = """
import atexit, threading, torch
from anomaly_cvae.threads import in_threads
torch.set_num_threads(3)
done = []
def finish():
    threading.main_thread().join()
    in_threads(done.append, range(20))
    print(sorted(done) == list(range(20)), flush=True)
threading.Thread(target=finish).start()
atexit.register(lambda: (in_threads(done.append, range(20, 30)), print(len(done), flush=True)))
"""


def test_work_is_done_when_the_main_thread_has_ended() -> None:
    ran = subprocess.run([sys.executable, "-c", AT_THE_END], capture_output=True, text=True, check=False)
    assert (ran.stdout.split(), ran.stderr) == (["True", "30"], "")


def _table(n_rows: int, seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 3, n_rows)
    frame = pd.DataFrame(rng.normal(size=(n_rows, 5)) + kind[:, None], columns=list("abcde"))
    frame["whole"] = rng.integers(-50, 50, n_rows)
    return frame.assign(colour=rng.choice(["red", "blue"], n_rows), kind=kind)


@pytest.fixture(scope="module")
def detector() -> CVAEDetector:
    return CVAEDetector(["kind"], max_steps=20, hidden_dims=(32, 32), random_state=0).fit(_table(600, seed=0))


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    """Some cells missing, some far out, in several blocks."""
    frame = _table(N_ROWS, seed=1)
    frame.loc[::7, "b"] = np.nan
    frame.loc[N_ROWS - 3, "c"] = 1e30
    return frame


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_scores_are_those_of_one_thread(
    detector: CVAEDetector, rows: pd.DataFrame, precision: str, three_threads: None
) -> None:
    engine = replace(detector.model_.engine, precision=precision, chunk_rows=500)
    encoded = detector._encode(rows, None)
    several = engine.negative_elbo(encoded)
    parts = engine.column_scores(encoded)
    torch.set_num_threads(1)
    one = engine.negative_elbo(encoded)
    np.testing.assert_allclose(several, one, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(parts.total, one, rtol=1e-4, atol=1e-4)
    exact = replace(engine, precision="float32").negative_elbo(encoded)
    halves = precision == "bfloat16" and has_bfloat16(engine.device)
    assert np.array_equal(one, exact) != halves, "threads have the precision of the engine"


def test_cells_are_encoded_as_by_one_thread_and_as_block_by_block(
    detector: CVAEDetector, rows: pd.DataFrame, three_threads: None
) -> None:
    several = detector._encode(rows, None)
    torch.set_num_threads(1)
    one = detector._encode(rows, None)
    pieces = [detector._encode(rows.iloc[first : first + 100], None) for first in range(0, N_ROWS, 100)]
    for name in ("values", "observed", "class_index"):
        np.testing.assert_array_equal(getattr(several, name), getattr(one, name))
        np.testing.assert_array_equal(getattr(one, name), np.concatenate([getattr(piece, name) for piece in pieces]))
    assert (~one.observed).sum() == len(rows.loc[::7])
    assert np.isfinite(one.values).all()


def test_an_infinite_cell_in_any_block_is_named_by_its_row(
    detector: CVAEDetector, rows: pd.DataFrame, three_threads: None
) -> None:
    wrong = rows.copy()
    wrong.loc[5_432, "d"] = -np.inf
    wrong.loc[5_430, "e"] = np.nan
    with pytest.raises(DataError, match=r"column 'd' has -inf .* in row 5432"):
        detector.score_samples(wrong)


FAULTS = """
import resource, torch
from anomaly_cvae.threads import in_threads
torch.set_num_threads(1)

def work(_):
    # As in a network: a layer's activations are freed when the next one's are there, between what stays.
    layers, x = [], torch.ones(1 << 20)
    for _ in range(6):
        y = x * 2
        layers.append(y[:10].clone())
        x = y

in_threads(work, range(3))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
in_threads(work, range(20))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES_OF_A_PIECE = 7 * (1 << 22) // 4096


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_what_pieces_free_is_there_for_the_next_ones() -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC", "GLIBC_TUNABLES"))}
    ran = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, env=plain)
    assert int(ran.stdout) < PAGES_OF_A_PIECE
