"""Pieces of work shared out among as many threads as torch has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import chain, islice
from threading import Lock, Semaphore, Thread
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
KEPT_BYTES = 31 << 20
"""Freed memory that the process keeps: just under what glibc takes for a large block, whatever it has seen."""


def in_threads(work: Callable[[Piece], None], pieces: Iterable[Piece]) -> None:
    """Do the work on all pieces, as many at a time as torch has threads, each on one of its own.

    One product on several threads waits for the slowest of them at every layer, and for Python between layers; whole
    pieces wait for nothing. Work that leaves Python's lock alone most of the time gains, which numpy, torch and graphs
    do on large arrays.
    """
    _keep_freed_memory()
    n_threads, rest = torch.get_num_threads(), iter(pieces)
    first = list(islice(rest, 2))
    rest = chain(first, rest)
    if n_threads > 1 and len(first) > 1:
        _Crew(work, rest).run(n_threads)
    # Nothing is left but where there can be no threads, as at the end of the interpreter.
    for piece in rest:
        work(piece)


@cache
def _keep_freed_memory() -> None:
    """Have the process keep what pieces free for the next ones.

    glibc's malloc gives freed blocks back to the system from a size on that grows with the largest block it was seen
    to free (mallopt(3), M_MMAP_THRESHOLD). At first that is less than a piece's activations, of which the system
    then makes every page anew for every piece. Elsewhere this does nothing.
    """
    torch.empty(KEPT_BYTES, dtype=torch.uint8)


class _Crew:
    """Threads that take piece after piece, until there is none or one of them fails.

    Not a pool of `concurrent.futures`: once the main thread has ended, these take no more work.
    """

    def __init__(self, work: Callable[[Piece], None], pieces: Iterator[Piece]) -> None:
        self._work, self._pieces, self._lock = work, pieces, Lock()
        self._ready, self._faults = Semaphore(0), list[BaseException]()

    def run(self, n_threads: int) -> None:
        threads = list(self._started(n_threads))
        try:
            for _ in threads:
                self._ready.acquire()
            # Threads have noted "one" where every new thread of the process looks first: that is put back.
            torch.set_num_threads(n_threads)
            for thread in threads:
                thread.join()
        except BaseException as fault:  # Ctrl-C: no thread begins another piece
            self._faults.append(fault)
            for thread in threads:
                thread.join()
            raise
        if self._faults:
            raise self._faults[0]

    def _started(self, n_threads: int) -> Iterator[Thread]:
        for number in range(n_threads):
            thread = Thread(target=self._take_pieces, name=f"pieces-{number}")
            try:
                thread.start()
            except RuntimeError:
                return
            yield thread

    def _take_pieces(self) -> None:
        try:
            torch.get_num_threads()  # A thread's first look takes the process's number; its own comes after.
            torch.set_num_threads(1)
        finally:
            self._ready.release()
        try:
            while not self._faults:
                with self._lock:
                    some = list(islice(self._pieces, 1))
                if not some:
                    return
                self._work(some[0])
        except BaseException as fault:
            self._faults.append(fault)
