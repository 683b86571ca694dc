"""Which digits products have: float32 means float32, whatever a device offers instead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch

IEEE = "ieee"
_CONVOLUTIONS = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # torch sets it up at import


def has_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are done by the hardware; made up by software they are slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # torch says so in no public way.
    told = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device.type == "cpu" and told is not None and bool(told())


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Within, products and convolutions of float32 keep all their bits on CUDA, too.

    TF32, which is torch's default for convolutions there, keeps 11 of 24: fewer than scores promise to agree in. The
    switches are the process's; the last one to leave puts them back.
    """
    if device.type != "cuda":
        yield
        return
    _SWITCHES.enter()
    try:
        yield
    finally:
        _SWITCHES.leave()


class _Switches:
    def __init__(self) -> None:
        self.lock, self.inside = Lock(), 0
        self.before = ("none", "none")

    def enter(self) -> None:
        with self.lock:
            if not self.inside:
                self.before = _now()
                _set(IEEE, IEEE)
            self.inside += 1

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                _set(*self.before)


_SWITCHES = _Switches()


def _now() -> tuple[str, str]:
    return torch.backends.cuda.matmul.fp32_precision, _CONVOLUTIONS.fp32_precision


def _set(products: str, convolutions: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = products
    _CONVOLUTIONS.fp32_precision = convolutions
