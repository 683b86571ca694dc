"""Networks of affine maps and ReLU by oneDNN, where torch has it: twice the rate of its default product on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anomaly_cvae.networks.conditions import Condition

LEAST_ROWS = 128


def _find() -> object | None:
    """The operator that torch's own compiler calls for a linear layer on CPU; absent in builds without oneDNN."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # torch has no types here
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


_LINEAR = _find()


def can_fuse(x: Tensor, condition: Condition | None, n_members: int) -> bool:
    """Whether `network` applies and pays: inference from float32 on a CPU, one condition for all rows of a member.

    Members are taken one by one, which many of them with few rows each are too short for.
    """
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32 and (n_members == 1 or x.shape[1] >= LEAST_ROWS)
    alike = condition is None or condition.n_rows == 1
    return _LINEAR is not None and on_cpu and alike and not torch.is_grad_enabled()


def network(
    x: Tensor, weights: Sequence[Tensor], shifts: Sequence[Tensor], skip: Tensor | None, inner: Sequence[Tensor]
) -> Tensor:
    """Layers x W + b with ReLU between them, and x times ``skip`` added in the end: (M, R, out).

    Shapes: x (M or 1, R, in), weights (M, in, out), shifts (M, 1, out). ``inner`` are the weights between hidden
    layers, which may be bfloat16: these products then are, too, with sums in float32. The first layer and the last
    stay as they are: what is rounded there is rounded in every cell alike, and does not average out.
    """
    parts = [_of_member(x[m if len(x) > 1 else 0], m, weights, shifts, skip, inner) for m in range(len(weights[0]))]
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)


def _of_member(
    x: Tensor, m: int, weights: Sequence[Tensor], shifts: Sequence[Tensor], skip: Tensor | None, inner: Sequence[Tensor]
) -> Tensor:
    assert callable(_LINEAR)
    hidden = x
    if len(weights) > 1:
        hidden = _LINEAR(hidden, weights[0][m].T, shifts[0][m, 0], "relu", [], "")
        for weight, shift in zip(inner, shifts[1:-1], strict=True):
            hidden = _LINEAR(hidden.to(weight.dtype), weight[m].T, shift[m, 0], "relu", [], "")
        hidden = hidden.to(x.dtype)
    last, shift = weights[-1][m].T, shifts[-1][m, 0]
    out: Tensor
    if skip is None:
        out = _LINEAR(hidden, last, shift, "none", [], "")
    else:
        direct = _LINEAR(x, skip[m].T, None, "none", [], "")
        out = _LINEAR.binary(hidden, direct, last, shift, "add")  # type: ignore[attr-defined]  # an overload of torch's
    return out
