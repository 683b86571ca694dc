"""The optimisers step as torch's own do."""

from copy import deepcopy

import pytest
import torch

from anomaly_cvae import optimizers


@pytest.mark.parametrize(
    ("kind", "rate", "options"),
    [
        ("AdamW", 0.1, {"weight_decay": 0.1, "fused": True}),
        # As captured steps have it.
        ("AdamW", torch.tensor(0.1), {"fused": True, "capturable": True}),
        ("Adam", 0.1, {}),
    ],
)
def test_steps_are_those_of_torch(kind, rate, options):
    ours, theirs = ([torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))] for _ in range(2))
    pairs = [
        (ours, getattr(optimizers, kind)(ours, lr=rate, **options)),
        (theirs, getattr(torch.optim, kind)(theirs, lr=rate, **options)),
    ]
    for step in range(5):
        for parameters, optimizer in pairs:
            optimizer.zero_grad(set_to_none=True)
            ((parameters[0] - step).square() * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
            optimizer.step()
    assert not torch.equal(ours[0], torch.arange(6.0).reshape(2, 3))
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0)
    assert not ours[0].grad.requires_grad


def test_a_state_that_is_loaded_goes_on_where_it_was():
    def optimizer_of(parameter):
        return optimizers.AdamW([parameter], lr=0.1)

    def step(parameter, optimizer):
        optimizer.zero_grad()
        parameter.square().sum().backward()
        optimizer.step()

    first = torch.nn.Parameter(torch.ones(3))
    before = optimizer_of(first)
    for _ in range(3):
        step(first, before)
    second = torch.nn.Parameter(first.detach().clone())
    after = optimizer_of(second)
    after.load_state_dict(deepcopy(before.state_dict()))
    step(first, before)
    step(second, after)
    assert torch.equal(first, second)
