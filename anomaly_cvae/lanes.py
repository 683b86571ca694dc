"""Rows on their way to a device and results on their way back, while the device computes: a ring of two slots.

While the device computes one load, the next is copied to it and the one after is made ready on the host. Copies overlap
with anything only from and to page-locked memory, which is why rows are staged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

SLOTS = 2

Work = Callable[[Mapping[str, Tensor]], Sequence[Tensor]]
"""From a load's tensors on the device to what is found there."""
Take = Callable[[Sequence[Tensor]], None]
"""Puts results, on the host and overwritten soon, where they belong."""


class Mark(Protocol):
    """A place in a lane."""

    def wait(self) -> None:
        """Let the host wait until the lane has come past here."""


class Lanes(Protocol):
    """Two orders in which a device does things, beside the host: sending rows, and computing with fetching results."""

    def staging(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the host that copies go from and to."""

    def room(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the device."""

    def send(self, to: Tensor, of: Tensor) -> None:
        """Copy to the device, in the sending lane."""

    def compute(self, work: Callable[[], None]) -> None:
        """Do something on the device, in the computing lane."""

    def fetch(self, to: Tensor, of: Tensor) -> None:
        """Copy from the device, in the computing lane and within its work."""

    def mark_sending(self) -> Mark:
        """Where the sending lane stands."""

    def mark_computing(self) -> Mark:
        """Where the computing lane stands."""

    def hold_sending(self, mark: Mark) -> None:
        """Let the sending lane wait for a mark of the other."""

    def hold_computing(self, mark: Mark) -> None:
        """Let the computing lane wait for a mark of the other."""


@dataclass
class Slot:
    """Memory for one load. ``sent``, ``used``, ``back``: rows are on the device, were read there, results are here."""

    staged: dict[str, Tensor] = field(default_factory=dict)
    there: dict[str, Tensor] = field(default_factory=dict)
    found: list[Tensor] = field(default_factory=list)
    sent: Mark | None = None
    used: Mark | None = None
    back: Mark | None = None
    take: Callable[[], None] | None = None


class Ring:
    """Loads one after the other; results are handed over in the order of the loads, two loads later or at the end.

    Numbers that are not whole travel as ``dtype``, whatever they are on the host.

    Leaving its context waits for the lanes: with an error or an interrupt results in flight are dropped, else they are
    handed over.
    """

    def __init__(self, lanes: Lanes, dtype: torch.dtype) -> None:
        self.lanes, self.dtype = lanes, dtype
        self._slots = [Slot() for _ in range(SLOTS)]
        self._turn = 0

    def __enter__(self) -> Ring:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.drain()
        # Whatever is under way reads and writes memory that is given back now.
        self.lanes.mark_sending().wait()
        self.lanes.mark_computing().wait()

    def put(self, rows: Mapping[str, Tensor], work: Work, shapes: Sequence[Sequence[int]], take: Take) -> None:
        """Send ``rows`` (N, …), do the work on them, and take what it found, float64 of ``shapes``."""
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % len(self._slots)
        self._send(slot, rows)
        self._finish(slot)
        n_rows = {name: len(part) for name, part in rows.items()}
        found = self._room_for_results(slot, shapes)
        there = {name: slot.there[name][:n] for name, n in n_rows.items()}
        assert slot.sent is not None
        self.lanes.hold_computing(slot.sent)

        def compute() -> None:
            for to, of in zip(found, work(there), strict=True):
                self.lanes.fetch(to, of)

        try:
            self.lanes.compute(compute)
        finally:  # a part of the work may be under way although the rest did not fit into memory
            slot.used = slot.back = self.lanes.mark_computing()
        slot.take = lambda: take(found)

    def drain(self) -> None:
        """Wait for all loads and hand their results over."""
        for turn in range(len(self._slots)):
            self._finish(self._slots[(self._turn + turn) % len(self._slots)])

    def _send(self, slot: Slot, rows: Mapping[str, Tensor]) -> None:
        _wait(slot.sent)  # what is staged has been copied
        self._make_room(slot, rows)
        for name, part in rows.items():
            slot.staged[name][: len(part)].copy_(part)
        if slot.used is not None:
            self.lanes.hold_sending(slot.used)
        for name, part in rows.items():
            self.lanes.send(slot.there[name][: len(part)], slot.staged[name][: len(part)])
        slot.sent = self.lanes.mark_sending()

    def _make_room(self, slot: Slot, rows: Mapping[str, Tensor]) -> None:
        dtypes = {name: self.dtype if part.is_floating_point() else part.dtype for name, part in rows.items()}
        short = [n for n, part in rows.items() if not _holds(slot.staged.get(n), part.shape, dtypes[n])]
        if not short:
            return
        self._finish(slot)  # nothing reads what is given up
        for name in short:
            slot.staged[name] = self.lanes.staging(rows[name].shape, dtypes[name])
            slot.there[name] = self.lanes.room(rows[name].shape, dtypes[name])
        # The device's memory may be some that work under way has just given back.
        slot.used = self.lanes.mark_computing()

    def _room_for_results(self, slot: Slot, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        dtype = torch.float64
        if len(slot.found) != len(shapes) or not all(map(_holds, slot.found, shapes, [dtype] * len(shapes))):
            slot.found = [self.lanes.staging(shape, dtype) for shape in shapes]
        return [own[: shape[0]] for own, shape in zip(slot.found, shapes, strict=True)]

    def _finish(self, slot: Slot) -> None:
        if slot.take is None:
            return
        take, slot.take = slot.take, None
        _wait(slot.back)
        take()


def _wait(mark: Mark | None) -> None:
    if mark is not None:
        mark.wait()


def _holds(own: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> bool:
    if own is None or own.dtype != dtype:
        return False
    return own.shape[0] >= shape[0] and tuple(own.shape[1:]) == tuple(shape[1:])


class Nothing:
    """A mark that everything has passed."""

    def wait(self) -> None:
        """Return."""


class HostLanes:
    """The processor's lanes: everything is done when it is asked for."""

    def staging(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Any memory."""
        return torch.empty(*shape, dtype=dtype)

    room = staging

    def send(self, to: Tensor, of: Tensor) -> None:
        """Copy."""
        to.copy_(of)

    fetch = send

    def compute(self, work: Callable[[], None]) -> None:
        """Do it."""
        work()

    def mark_sending(self) -> Mark:
        """Nothing to wait for."""
        return Nothing()

    mark_computing = mark_sending

    def hold_sending(self, mark: Mark) -> None:
        """Nothing to wait for."""

    hold_computing = hold_sending


class CudaMark:
    """An event of a stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no types here
        self.event.record(stream)

    def wait(self) -> None:
        """Let the host wait, without keeping Ctrl-C waiting longer than a load takes."""
        self.event.synchronize()


class CudaLanes:
    """A stream of copies to the device beside the current one, which computes and copies back."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.computing = torch.cuda.current_stream(device)
        self.sending = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types here

    def staging(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Page-locked memory, which torch keeps for the next time."""
        return torch.empty(*shape, dtype=dtype, pin_memory=True)

    def room(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the computing stream; the ring outlives its use by the other."""
        return torch.empty(*shape, dtype=dtype, device=self.device)

    def send(self, to: Tensor, of: Tensor) -> None:
        """Copy in the stream of copies."""
        with torch.cuda.stream(self.sending):
            to.copy_(of, non_blocking=True)

    def compute(self, work: Callable[[], None]) -> None:
        """Launch it on the current stream."""
        work()

    def fetch(self, to: Tensor, of: Tensor) -> None:
        """Copy back in the current stream."""
        to.copy_(of, non_blocking=True)

    def mark_sending(self) -> Mark:
        """An event in the stream of copies."""
        return CudaMark(self.sending)

    def mark_computing(self) -> Mark:
        """An event in the current stream."""
        return CudaMark(self.computing)

    def hold_sending(self, mark: Mark) -> None:
        """Let the stream of copies wait for the event."""
        assert isinstance(mark, CudaMark)
        self.sending.wait_event(mark.event)

    def hold_computing(self, mark: Mark) -> None:
        """Let the current stream wait for the event."""
        assert isinstance(mark, CudaMark)
        self.computing.wait_event(mark.event)


def lanes_of(device: torch.device) -> Lanes:
    """The lanes of a device."""
    return CudaLanes(device) if device.type == "cuda" else HostLanes()
