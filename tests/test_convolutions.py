"""Convolutions with a member axis: shapes, independence of members, and where the condition enters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from anomaly_cvae.encoding import FittedColumn
from anomaly_cvae.model import CVAE, Architecture
from anomaly_cvae.networks import Blocks, CellDecoder, CellEncoder, Cells, Condition
from anomaly_cvae.networks.convolutions import ConvDecoder, ConvEncoder, StackedConv, sizes
from anomaly_cvae.rows import Batch

CHANNELS = (4, 8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def told(*shape: int, seed: int = 0) -> Condition:
    return Condition(randn(*shape, seed=seed))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def convolution(n_members: int, n_in: int = 2, n_out: int = 5, n_conditions: int = 3, stride: int = 1) -> StackedConv:
    return StackedConv(n_members, n_in, n_out, n_conditions, generator(), stride).double()


def encoder(n_members: int, shape: tuple[int, int, int] = (1, 8, 8), n_conditions: int = 3) -> ConvEncoder:
    return ConvEncoder(n_members, shape, CHANNELS, n_conditions, generator()).double()


def decoder(
    n_members: int, shape: tuple[int, int, int] = (2, 8, 8), n_conditions: int = 3, *, seen: bool = False
) -> ConvDecoder:
    return ConvDecoder(n_members, shape, CHANNELS, n_conditions, generator(), seen).double()


def member_of(network: torch.nn.Module, alone: torch.nn.Module, m: int) -> torch.nn.Module:
    """``alone``, a network of one member, with the weights of member ``m`` of ``network``."""
    own = {name: value.detach()[m : m + 1] for name, value in network.named_parameters()}
    assert alone.load_state_dict(own, strict=False).unexpected_keys == []
    return alone


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------- one convolution


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 1), (1, 6)])
def test_each_member_convolves_with_its_own_weights_and_shift(stride: int, size: tuple[int, int]) -> None:
    layer, images, condition = convolution(3, stride=stride), randn(3, 4, 2, *size), told(3, 4, 3, seed=1)
    found = layer(images, condition)
    for m in range(3):
        shift = layer.bias[m] + condition.vectors[m] @ layer.condition_weight[m]
        expected = conv2d(images[m], layer.weight[m], None, stride, 1) + shift[:, :, None, None]
        same(found[m], expected)


def test_images_and_conditions_shared_by_all_members_are_given_once() -> None:
    layer, images, condition = convolution(3), randn(1, 4, 2, 6, 6), told(1, 4, 3, seed=1)
    expected = layer(images.expand(3, -1, -1, -1, -1), Condition(condition.vectors.expand(3, -1, -1)))
    same(layer(images, condition), expected)
    first = condition.vectors[:, :1]
    same(layer(images, Condition(first)), layer(images, Condition(first.expand(1, 4, 3))))


def test_a_condition_of_n_rows_is_repeated_for_every_sample() -> None:
    layer, images, condition = convolution(2), randn(2, 6, 2, 5, 5), told(1, 3, 3, seed=1)
    same(layer(images, condition), layer(images, Condition(condition.vectors.repeat(1, 2, 1))))


@pytest.mark.parametrize("members", [slice(0, 1), slice(1, 3), slice(2, 3)])
def test_some_members_alone_are_those_of_all(members: slice) -> None:
    layer, images, condition = convolution(3), randn(1, 4, 2, 6, 6), told(1, 4, 3, seed=1)
    same(layer(images, condition, members), layer(images, condition)[members])


# ---------------------------------------------------------------------- sizes


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 12), (1, 7, 5), (1, 9, 1), (1, 1, 1), (3, 13, 10)])
def test_every_size_is_halved_rounding_up_and_drawn_again(shape: tuple[int, int, int]) -> None:
    _, height, width = shape
    maps = encoder(2, shape)(randn(2, 3, *shape), told(1, 3, 3))
    scales = [(-(-height // 2), -(-width // 2)), (-(-height // 4), -(-width // 4))]
    assert [tuple(found.shape) for found in maps] == [
        (2, 3, width_of, *scale) for width_of, scale in zip(CHANNELS, scales, strict=True)
    ]
    assert encoder(2, shape).n_features == maps[-1][0, 0].numel()
    mirror = decoder(2, shape)
    drawn = mirror(randn(2, 3, mirror.n_seed), told(1, 3, 3))
    assert drawn.shape == (2, 3, *shape)


def test_more_scales_than_halvings_end_at_one_pixel() -> None:
    assert sizes((1, 5, 3), 4) == [(5, 3), (3, 2), (2, 1), (1, 1), (1, 1)]


@pytest.mark.parametrize("channels", [(4,), (4, 4, 4, 4)])
def test_an_image_smaller_than_its_scales_goes_through(channels: tuple[int, ...]) -> None:
    found = ConvEncoder(1, (1, 3, 3), channels, 0, generator()).double()(randn(1, 2, 1, 3, 3), None)
    assert len(found) == len(channels)
    network = ConvDecoder(1, (1, 3, 3), channels, 0, generator()).double()
    assert network(randn(1, 2, network.n_seed), None).shape == (1, 2, 1, 3, 3)


# ---------------------------------------------------------------------- members


def test_a_member_alone_encodes_as_it_does_among_others() -> None:
    both, images, condition = encoder(2), randn(2, 3, 1, 8, 8), told(1, 3, 3, seed=1)
    together = both(images, condition)
    for m in range(2):
        alone = member_of(both, encoder(1), m)(images[m : m + 1], condition)
        for mine, ours in zip(alone, together, strict=True):
            same(mine[0], ours[m])


@pytest.mark.parametrize("seen", [False, True])
def test_a_member_alone_decodes_as_it_does_among_others(seen: bool) -> None:
    both, condition = decoder(2, seen=seen), told(1, 3, 3, seed=1)
    seeds = randn(2, 3, both.n_seed)
    maps = [randn(2, 3, 4, 4, 4, seed=2), randn(2, 3, 8, 2, 2, seed=3)] if seen else []
    together = both(seeds, condition, seen=maps)
    for m in range(2):
        alone = member_of(both, decoder(1, seen=seen), m)
        mine = alone(seeds[m : m + 1], condition, seen=[own[m : m + 1] for own in maps])
        same(mine[0], together[m])


def test_no_gradient_crosses_from_one_member_to_another() -> None:
    coder, mirror = encoder(2), decoder(2)
    features = coder(randn(1, 3, 1, 8, 8), told(1, 3, 3))[-1].flatten(2)
    mirror(features, told(1, 3, 3))[0].square().sum().backward()
    for name, parameter in (*coder.named_parameters(), *mirror.named_parameters()):
        assert parameter.grad is not None, name
        assert parameter.grad[0].any(), name
        assert not parameter.grad[1].any(), name


def test_rows_do_not_mix() -> None:
    coder, mirror = encoder(2), decoder(2)
    images, condition = randn(2, 4, 1, 8, 8), told(1, 4, 3)
    changed = images.clone()
    changed[:, 2] += 1.0
    before, after = (mirror(coder(own, condition)[-1].flatten(2), condition) for own in (images, changed))
    assert torch.equal(before[:, [0, 1, 3]], after[:, [0, 1, 3]])
    assert (before[:, 2] != after[:, 2]).any()


# ---------------------------------------------------------------------- the condition


@pytest.mark.parametrize("scale", [0, 1])
@pytest.mark.parametrize("part", ["down", "mix"])
def test_the_condition_shifts_the_encoder_at_every_scale(part: str, scale: int) -> None:
    coder = encoder(1)
    silence_all_but(coder, getattr(coder, part)[scale])
    images = randn(1, 3, 1, 8, 8)
    before, after = (coder(images, Condition(torch.full((1, 3, 3), value).double())) for value in (0.0, 1.0))
    changed = [bool((a != b).any()) for a, b in zip(before, after, strict=True)]
    assert changed == [scale == 0, True]


@pytest.mark.parametrize("scale", [0, 1])
@pytest.mark.parametrize("part", ["mix", "up"])
def test_the_condition_shifts_the_decoder_at_every_scale(part: str, scale: int) -> None:
    mirror = decoder(1)
    silence_all_but(mirror, getattr(mirror, part)[scale])
    seeds = randn(1, 3, mirror.n_seed)
    before, after = (mirror(seeds, Condition(torch.full((1, 3, 3), value).double())) for value in (0.0, 1.0))
    assert (before != after).flatten(2).any(-1).all()


def silence_all_but(network: torch.nn.Module, kept: torch.nn.Module) -> None:
    """Leave one layer's condition weights as they are and clear the others."""
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, StackedConv) and layer is not kept and layer.condition_weight is not None:
                layer.condition_weight.zero_()


def test_without_conditions_there_is_none_to_learn() -> None:
    coder = encoder(2, n_conditions=0)
    assert not [name for name, _ in coder.named_parameters() if "condition" in name]
    assert coder(randn(1, 3, 1, 8, 8), None)[-1].shape == (2, 3, 8, 2, 2)


# ---------------------------------------------------------------------- what was seen


def test_maps_of_what_was_seen_come_in_at_every_scale() -> None:
    mirror = decoder(1, seen=True)
    seeds = randn(1, 3, mirror.n_seed)
    maps = [randn(1, 3, 4, 4, 4, seed=2), randn(1, 3, 8, 2, 2, seed=3)]
    before = mirror(seeds, None, seen=maps)
    for scale in range(2):
        other = [own + 1.0 if i == scale else own for i, own in enumerate(maps)]
        assert (mirror(seeds, None, seen=other) != before).flatten(2).any(-1).all()


def test_what_was_seen_of_a_row_is_told_to_every_sample_of_it() -> None:
    mirror = decoder(1, seen=True)
    maps = [randn(1, 2, 4, 4, 4, seed=2), randn(1, 2, 8, 2, 2, seed=3)]
    seeds = randn(1, 4, mirror.n_seed)
    repeated = [own.repeat(1, 2, 1, 1, 1) for own in maps]
    same(mirror(seeds, None, seen=maps), mirror(seeds, None, seen=repeated))


# ---------------------------------------------------------------------- images beside a table, whole models


def test_table_cells_and_two_images_are_told_apart() -> None:
    blocks = Blocks(3, ((1, 8, 8), (3, 5, 7)))
    coder = CellEncoder(2, blocks, CHANNELS, (6,), 4, 0, generator()).double()
    cells = Cells(randn(1, 5, 3), (randn(1, 5, 1, 8, 8), randn(1, 5, 3, 5, 7)))
    found = coder(cells, None)
    assert found.outputs.shape == (2, 5, 4)
    assert [len(maps) for maps in found.maps] == [2, 2]
    for changed in (
        Cells(cells.table + 1.0, cells.images),
        Cells(cells.table, (cells.images[0] + 1.0, cells.images[1])),
        Cells(cells.table, (cells.images[0], cells.images[1] + 1.0)),
    ):
        assert (coder(changed, None).outputs != found.outputs).any(-1).all()
    mirror = CellDecoder(2, 4, Blocks(6, ((2, 8, 8), (6, 5, 7))), CHANNELS, (6,), 0, generator()).double()
    assert mirror(randn(2, 5, 4), None).shape == (2, 5, 6 + 2 * 64 + 6 * 35)


def image_bank(n_members: int) -> CVAE:
    columns = (
        FittedColumn("x", "normal", observed=100),
        FittedColumn("picture", "normal", observed=100, shape=(1, 7, 6)),
    )
    return CVAE(Architecture(n_members, 2, (8,), n_conditions=2, channels=CHANNELS), columns, seed=1).double()


def test_a_model_with_a_picture_has_terms_per_cell_and_members_that_do_not_touch() -> None:
    both, alone = image_bank(2), image_bank(1)
    values, condition = randn(1, 4, 43), told(1, 4, 2, seed=1)
    repeated = Condition(condition.vectors.expand(2, -1, -1))
    batch, noise = Batch(values.expand(2, -1, -1), None, repeated), randn(3, 2, seed=2)
    terms = both.terms(batch, noise)
    assert terms.log_prob.shape == (2, 3, 4, 43)
    for m in range(2):
        mine = member_of(both, alone, m).terms(Batch(values, None, condition), noise)
        same(mine.log_prob[0], terms.log_prob[m])
        same(mine.kl[0], terms.kl[m])
    np.testing.assert_array_equal(both.images(batch.values)[0][0, 0].numpy(), values[0, 0, 1:].reshape(1, 7, 6))
