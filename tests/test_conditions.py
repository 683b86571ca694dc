"""Conditions as codes of levels: what they say is what their vectors say, quicker."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from anomaly_cvae import CVAEDetector
from anomaly_cvae.encoding import Encoded
from anomaly_cvae.networks import Condition, StackedMLP
from anomaly_cvae.networks.conditions import FEW_LEVELS, codes_of
from anomaly_cvae.networks.convolutions import StackedConv
from anomaly_cvae.rows import DeviceRows

N_ROWS = 9


def table_of(*n_levels: int) -> Tensor:
    """One vector for each of the first classes of conditions with so many levels, one-hot side by side."""
    codes = np.stack([np.arange(max(n_levels)) % n for n in n_levels], axis=1)
    blocks = [np.eye(n)[codes[:, q]] for q, n in enumerate(n_levels)]
    return torch.tensor(np.concatenate(blocks, axis=1))


def told(table: Tensor, n_members: int = 1, seed: int = 0) -> Condition:
    """Rows of any class: vectors and codes."""
    codes = codes_of(table)
    assert codes is not None
    rows = torch.randint(len(table), (n_members, N_ROWS), generator=torch.Generator().manual_seed(seed))
    return Condition(table[rows], codes[rows])


def same_with_gradients(network: torch.nn.Module, x: Tensor, condition: Condition) -> None:
    found = []
    for own in (condition, Condition(condition.vectors)):
        network.zero_grad()
        out = network(x, own)
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad for p in network.parameters())])
    for coded, plain in zip(*found, strict=True):
        torch.testing.assert_close(coded, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n_samples", [1, 3])
@pytest.mark.parametrize("n_levels", [(20,), (12, 9), (3, 17, 5)])
@pytest.mark.parametrize("n_members", [1, 2])
@pytest.mark.parametrize("own_rows", [False, True])
def test_a_network_says_the_same_of_codes_as_of_vectors(
    n_members: int, own_rows: bool, n_levels: tuple[int, ...], n_samples: int
) -> None:
    table = table_of(*n_levels)
    network = StackedMLP(n_members, 4, (6, 5), 3, table.shape[1], torch.Generator().manual_seed(0)).double()
    x = torch.randn((n_members, n_samples * N_ROWS, 4), generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        for layer in network.layers:
            layer.bias.normal_(generator=torch.Generator().manual_seed(2))
    same_with_gradients(network, x, told(table, n_members if own_rows else 1))


def test_convolutions_say_the_same_of_codes_as_of_vectors() -> None:
    layer = StackedConv(2, 3, 4, 20, torch.Generator().manual_seed(0)).double()
    x = torch.randn((2, 2 * N_ROWS, 3, 5, 4), generator=torch.Generator().manual_seed(1)).double()
    same_with_gradients(layer, x, told(table_of(20)))


def test_codes_are_the_places_of_the_ones() -> None:
    table = table_of(12, 9)
    codes = codes_of(table)
    assert codes.shape == (12, 2)
    for vector, own in zip(table, codes, strict=True):
        assert vector.nonzero().squeeze(1).tolist() == own.tolist()


def test_codes_are_for_processors_and_rows_that_have_a_class() -> None:
    assert Condition.of_classes(torch.eye(20)).codes is not None
    assert Condition.of_classes(torch.eye(20), coded=False).codes is None
    assert Condition.of_classes(torch.eye(20, device="meta")).codes is None


@pytest.mark.parametrize(
    "table",
    [
        torch.eye(FEW_LEVELS),
        torch.zeros(3, FEW_LEVELS + 1),
        2.0 * torch.eye(FEW_LEVELS + 1),
        torch.eye(FEW_LEVELS + 1) - torch.eye(FEW_LEVELS + 1).roll(1, 0),
        torch.ones(FEW_LEVELS + 1, FEW_LEVELS + 1).tril(),
    ],
    ids=["few", "nothing", "no ones", "other numbers", "not equally many"],
)
def test_other_vectors_have_no_codes(table: Tensor) -> None:
    assert codes_of(table) is None


def encoded(class_index: list[int], n_continuous: int = 0) -> Encoded:
    n = len(class_index)
    return Encoded(np.zeros((n, 2)), np.ones((n, 2), bool), np.array(class_index), np.ones((n, n_continuous)))


def rows_of(some: Encoded, *, coded: bool = True) -> DeviceRows:
    classes = Condition.of_classes(torch.eye(20), coded=coded)
    return DeviceRows.of(some, classes, None, torch.device("cpu"), torch.float32)


def test_batches_carry_the_codes_of_their_rows() -> None:
    batch = rows_of(encoded([3, 19, 0])).batch(torch.tensor([[2, 0], [1, 1]]))
    assert batch.condition.codes.tolist() == [[[0], [3]], [[19], [19]]]
    assert batch.condition.vectors.argmax(-1).tolist() == [[0, 3], [19, 19]]


def test_rows_that_bring_more_than_a_class_or_may_lack_it_have_no_codes() -> None:
    assert rows_of(encoded([3, 19], n_continuous=1)).codes is None
    rows = rows_of(encoded([3, -1]), coded=False)
    assert rows.codes is None
    assert not rows.condition[1].any()
    with pytest.raises(AssertionError, match="a row without a class has no codes"):
        rows_of(encoded([3, -1]))


def test_new_rows_bring_their_codes() -> None:
    rows = rows_of(encoded([3, 19, 0]))
    rows.replace(np.array([1]), rows_of(encoded([7, 8])), np.array([1]))
    assert rows.codes.squeeze(1).tolist() == [3, 8, 0]


def test_many_classes_are_told_apart() -> None:
    """From end to end, with a threshold for every class: the mean of a class decides what is normal."""
    rng = np.random.default_rng(0)
    of = np.arange(2_000) % 40
    table = pd.DataFrame({"x": of + 0.3 * rng.normal(size=2_000), "y": rng.normal(size=2_000)})
    table["machine"] = [f"m{k:02d}" for k in of]
    detector = CVAEDetector("machine", max_steps=300, hidden_dims=(32,), n_estimators=1, random_state=0).fit(table)
    wrong = table.assign(machine=table["machine"].to_numpy()[::-1])
    assert (detector.contrast(wrong) > detector.contrast(table)).mean() > 0.9
