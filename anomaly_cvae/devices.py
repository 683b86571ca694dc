"""Which device a detector computes on."""

from __future__ import annotations

import torch

from anomaly_cvae.errors import ParameterError


def resolve_device(device: str, dtype: torch.dtype) -> torch.device:
    """Turn ``"auto"`` into the best device there is: CUDA, then Apple's GPU (float32 only), then the CPU.

    Raises
    ------
    ParameterError
        If the device asked for is not there, or cannot compute in ``dtype``.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        mps = torch.backends.mps.is_available() and dtype == torch.float32
        return torch.device("mps" if mps else "cpu")
    try:
        resolved = torch.device(device)
        torch.zeros(1, dtype=dtype, device=resolved)
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ParameterError(f"device={device!r} with dtype={dtype} cannot be used here: {reason}") from error
    return resolved
