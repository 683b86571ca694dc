"""Work that overlaps: reading ahead and writing behind in threads of their own, and the seconds of each stage."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

AHEAD = 2
"""Batches that are read before they are needed."""

Item = TypeVar("Item")


class Stopwatch:
    """Seconds per stage; each stage runs in one thread."""

    def __init__(self) -> None:
        self.seconds = {"read": 0.0, "score": 0.0, "write": 0.0}

    def timed(self, stage: str, work: Callable[[], Item]) -> Item:
        """Do the work and add its seconds to the stage."""
        started = time.perf_counter()
        try:
            return work()
        finally:
            self.seconds[stage] += time.perf_counter() - started


class Writer:
    """Runs one piece of work at a time in a thread of its own; at most one waits."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, "write")
        self.last: Future[object] | None = None

    def __enter__(self) -> Writer:
        return self

    def submit(self, work: Callable[[], object]) -> None:
        """Hand over work once the last piece is done; an error of that one is raised here."""
        if self.last is not None:
            self.last.result()
        self.last = self.pool.submit(work)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.pool.shutdown(wait=True)
        if kind is None and self.last is not None:
            self.last.result()


def ahead(items: Iterator[Item], stopwatch: Stopwatch) -> Generator[Item]:
    """The same items, read in a thread of their own before they are needed."""
    ready: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(AHEAD)
    stop = threading.Event()

    def put(item: Item | None, error: BaseException | None) -> None:
        while not stop.is_set():
            try:
                return ready.put((item, error), timeout=0.1)
            except queue.Full:
                continue

    def read() -> None:
        try:
            while not stop.is_set():
                item = stopwatch.timed("read", lambda: next(items, None))
                put(item, None)
                if item is None:
                    return
        except BaseException as error:
            put(None, error)

    thread = threading.Thread(target=read, name="read", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        stop.set()
        thread.join()
