"""torch's optimisers without torch's compiler.

Their decorators, made for models that are compiled, import it on the first call: more than a second of the first fit of
a process.
"""

from __future__ import annotations

from inspect import unwrap

import torch
from torch.optim import Optimizer


class _Plain(Optimizer):
    add_param_group = unwrap(Optimizer.add_param_group)
    zero_grad = unwrap(Optimizer.zero_grad)
    state_dict = unwrap(Optimizer.state_dict)
    load_state_dict = unwrap(Optimizer.load_state_dict)


class Adam(_Plain, torch.optim.Adam):
    """`torch.optim.Adam` for models that are not compiled, and steps that are not differentiated."""

    step = torch.no_grad()(unwrap(torch.optim.Adam.step))


class AdamW(_Plain, torch.optim.AdamW):
    """`torch.optim.AdamW` for the same."""

    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))
