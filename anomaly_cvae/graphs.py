"""Work on fixed tensors, captured once as a CUDA graph and replayed; on any other device it is simply done.

A step of a small network is some hundred kernels of a few microseconds each, so that launching them is what it costs.
Replaying a graph launches all of them at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import torch

WARM_UP = 3
"""Calls before the capture, in which libraries make their workspaces and optimisers their state."""

Found = TypeVar("Found")
Found_co = TypeVar("Found_co", covariant=True)


class Recording(Protocol[Found_co]):
    """Captured work."""

    def replay(self) -> Found_co:
        """Do the work again; what it found is in the same tensors every time."""


class Recorder(Protocol):
    """A device that can capture work."""

    def beside(self, work: Callable[[], Found]) -> Found:
        """Do the work as it stands, where captures are made."""

    def record(self, work: Callable[[], Found], generators: Sequence[torch.Generator]) -> Recording[Found]:
        """Capture the work without doing it; a RuntimeError says that it cannot be captured."""


class Captured(Generic[Found]):
    """Work that is captured after some calls.

    The work may read and write tensors that are there before it, tensors alone: it looks at no value, and does the
    same on the same shapes every time. What it returns is overwritten by the next call. Work that cannot be captured
    goes on as it is, with a warning that names the reason.

    Parameters
    ----------
    recorder : None where nothing is captured
    generators : those that the work draws from
    """

    def __init__(
        self,
        work: Callable[[], Found],
        recorder: Recorder | None,
        *,
        name: str,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        self._work, self._recorder, self._name, self._generators = work, recorder, name, generators
        self._calls = 0
        self._recording: Recording[Found] | None = None

    @property
    def is_replayed(self) -> bool:
        """Whether the work has been captured."""
        return self._recording is not None

    def __call__(self) -> Found:
        """Do the work."""
        if self._recording is None and self._recorder is not None:
            self._calls += 1
            if self._calls <= WARM_UP:
                return self._recorder.beside(self._work)
            self._capture(self._recorder)
        return self._work() if self._recording is None else self._recording.replay()

    def _capture(self, recorder: Recorder) -> None:
        try:
            self._recording = recorder.record(self._work, self._generators)
        except RuntimeError as error:
            self._recorder, first = None, _first(error)
            if not isinstance(first, Exception):
                raise first from None  # an interrupt, whatever became of the capture
            reason = (str(first).strip().splitlines() or [type(first).__name__])[0]
            warnings.warn(f"{self._name} goes on without a CUDA graph, which is slower: {reason}", stacklevel=3)

    def release(self) -> None:
        """Give back what the capture holds; later calls are done as they stand."""
        self._recording = self._recorder = None


class CudaRecorder:
    """CUDA graphs of one device, which share their memory.

    They may do so because none of them keeps anything from one call to the next, and what one found is fetched before
    another is replayed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Backward passes remember the stream of their first call: warm-up and capture are to have the same.
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types here
        self._pool = torch.cuda.graph_pool_handle()

    def beside(self, work: Callable[[], Found]) -> Found:
        """Do the work on the stream of the captures."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            found = work()
        current.wait_stream(self.stream)
        return found

    def record(self, work: Callable[[], Found], generators: Sequence[torch.Generator]) -> Recording[Found]:
        """Capture the work as a graph."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        used = [*generators, torch.cuda.default_generators[self.stream.device_index]]
        before = [generator.clone_state() for generator in used]
        for generator in generators:
            graph.register_generator_state(generator)
        try:
            # Other threads may copy and allocate meanwhile: only what this one does is captured.
            with torch.cuda.graph(graph, self._pool, self.stream, capture_error_mode="thread_local"):
                found = work()
        except RuntimeError:
            # A failed capture leaves its stream the current one, generators that refuse to draw, and a closed pool.
            torch.cuda.set_stream(current)
            for generator, state in zip(used, before, strict=True):
                generator.graphsafe_set_state(state)
            self._pool = torch.cuda.graph_pool_handle()
            raise
        return CudaRecording(graph, found)


class CudaRecording(Generic[Found]):
    """A captured graph and the tensors that it writes."""

    def __init__(self, graph: torch.cuda.CUDAGraph, found: Found) -> None:
        self._graph, self._found = graph, found

    def replay(self) -> Found:
        """Launch the graph on the current stream."""
        self._graph.replay()
        return self._found


def recorder_of(device: torch.device) -> Recorder | None:
    """What captures work on the device; None on those that have nothing like it."""
    return CudaRecorder(device) if device.type == "cuda" else None


def _first(error: BaseException) -> BaseException:
    """The error that others came of: ending a capture that has failed fails, too."""
    while error.__context__ is not None:
        error = error.__context__
    return error
