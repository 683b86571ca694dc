"""Pieces of work shared out among as many threads as torch has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import TypeVar

import torch

Piece = TypeVar("Piece")


def in_threads(work: Callable[[Piece], None], pieces: Iterable[Piece]) -> None:
    """Do the work on all pieces, as many at a time as torch has threads, each on one of its own.

    One product on several threads waits for the slowest of them at every layer, and for Python between layers; whole
    pieces wait for nothing. Work that leaves Python's lock alone most of the time gains, which numpy, torch and graphs
    do on large arrays. How many threads torch has is a number of each thread, so the caller's stays what it is.
    """
    n_threads, rest = torch.get_num_threads(), iter(pieces)
    first = list(islice(rest, 2))
    if n_threads == 1 or len(first) < 2:
        for piece in chain(first, rest):
            work(piece)
        return
    with ThreadPoolExecutor(n_threads, "pieces", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in pool.map(work, chain(first, rest)):
            pass
