"""Work on inputs of few shapes, captured shape by shape: inputs are copied to where the captured work expects them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from anomaly_cvae.graphs import Captured, Recorder, recorder_of

MOST_SHAPES = 64
"""Shapes that are captured; others are done as they stand."""

Inputs = Mapping[str, Tensor]


@dataclass
class _Prepared:
    rows: dict[str, Tensor]
    shared: dict[str, Tensor]
    version: Hashable
    work: Captured[Sequence[Tensor]]


class Replays:
    """Captured work by its key, which says all that makes two calls differ but the numbers in their inputs.

    ``lock`` is for whoever calls from several threads: inputs and results are in the same places every time. A copy
    has captured nothing.
    """

    def __init__(self) -> None:
        self.lock = Lock()
        self._recorder: Recorder | None = None
        self._prepared: dict[Hashable, _Prepared] = {}

    def __reduce__(self) -> tuple[type[Replays], tuple[()]]:
        return Replays, ()

    def __len__(self) -> int:
        return len(self._prepared)

    def run(
        self,
        key: Hashable,
        work: Callable[[Inputs], Sequence[Tensor]],
        rows: Inputs,
        shared: Inputs,
        version: Hashable,
    ) -> Sequence[Tensor]:
        """The work on ``rows``, other ones every time, and ``shared``, which changes with its version alone."""
        prepared = self._prepared.get(key)
        if prepared is None:
            if len(self._prepared) >= MOST_SHAPES:
                return work({**rows, **shared})
            prepared = self._prepared[key] = self._prepare(work, rows, shared)
        for name, part in rows.items():
            prepared.rows[name].copy_(part)
        if prepared.version != version:
            for name, part in shared.items():
                prepared.shared[name].copy_(part)
            prepared.version = version
        return prepared.work()

    def drop(self) -> None:
        """Forget all, and give back the memory it holds."""
        self._prepared.clear()
        self._recorder = None

    def _prepare(self, work: Callable[[Inputs], Sequence[Tensor]], rows: Inputs, shared: Inputs) -> _Prepared:
        own, theirs = ({name: torch.empty_like(part) for name, part in some.items()} for some in (rows, shared))
        if self._recorder is None and rows:
            self._recorder = recorder_of(next(iter(rows.values())).device)
        captured = Captured(lambda: work({**own, **theirs}), self._recorder, name="scoring")
        return _Prepared(own, theirs, object(), captured)
