"""The U-Net: shapes of any size, zero at the start, its own generator, gradients, dtypes, directions."""

from __future__ import annotations

import json

import pytest
import torch

import sbot
from sbot.neural.unet import UNet


def inputs(event, n=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, *event, generator=generator, dtype=dtype)
    return x, torch.rand(n, generator=generator, dtype=dtype)


def perturbed(net: UNet) -> UNet:
    """The same network with its last layers away from zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in (net.out.weight, net.affine.weight):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return net


@pytest.mark.parametrize("event", [(1, 8, 8), (3, 7, 5), (2, 13, 13), (1, 32, 32), (1, 1, 9)])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_shape_of_the_image_whatever_its_size(event, levels):
    if min(event[1:]) <= 2 ** (levels - 1) - 1:
        with pytest.raises(sbot.InvalidProblem, match="levels"):
            UNet(event, width=8, levels=levels)
        return
    x, t = inputs(event)
    out = perturbed(UNet(event, width=8, levels=levels, blocks=2))(x, t)
    assert out.shape == x.shape
    assert torch.isfinite(out).all()
    assert out.abs().max() > 0


def test_zero_at_the_start():
    x, t = inputs((1, 8, 8))
    assert UNet((1, 8, 8), width=8)(x, t).abs().max() == 0
    assert UNet((1, 8, 8), width=8, directed=True)(x, t, torch.ones(3)).abs().max() == 0


def test_every_weight_gets_a_gradient():
    event = (2, 7, 6)
    net = perturbed(UNet(event, width=8, levels=3, directed=True))
    x, t = inputs(event)
    net(x, t, torch.tensor([1.0, -1.0, 1.0])).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_float64():
    x, t = inputs((1, 8, 8), dtype=torch.float64)
    net = perturbed(UNet((1, 8, 8), width=8)).double()
    assert net(x, t).dtype == torch.float64
    assert torch.allclose(net(x, t), net.float()(x.float(), t.float()).double(), atol=1e-4)


def test_time_and_direction_matter():
    x, t = inputs((1, 8, 8))
    net = perturbed(UNet((1, 8, 8), width=8, directed=True))
    ahead, back = net(x, t, torch.ones(3)), net(x, t, -torch.ones(3))
    assert (ahead - back).abs().max() > 1e-3
    assert (net(x, 1 - t, torch.ones(3)) - ahead).abs().max() > 1e-3
    # one row's direction is its own
    mixed = net(x, t, torch.tensor([1.0, -1.0, 1.0]))
    assert torch.allclose(mixed, torch.stack([ahead[0], back[1], ahead[2]]), atol=1e-6)


def test_no_direction_where_undirected():
    x, t = inputs((1, 8, 8))
    net = perturbed(UNet((1, 8, 8), width=8))
    assert torch.equal(net(x, t), net(x, t, -torch.ones(3)))


def test_weights_come_from_the_generator_alone():
    before = torch.random.get_rng_state()
    nets = [UNet((1, 8, 8), width=8, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    other = UNet((1, 8, 8), width=8, generator=torch.Generator().manual_seed(6))
    assert torch.equal(before, torch.random.get_rng_state())
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(nets[0].into.weight, other.into.weight)


def test_config_rebuilds_the_network():
    net = perturbed(UNet((3, 9, 8), width=8, levels=2, blocks=2, directed=True))
    twin = UNet(**json.loads(json.dumps(net.config)))
    twin.load_state_dict(net.state_dict())
    x, t = inputs((3, 9, 8))
    assert torch.equal(net(x, t, torch.ones(3)), twin(x, t, torch.ones(3)))


@pytest.mark.parametrize("event", [(8, 8), 8, (1, 0, 8), ("a", 8, 8)])
def test_events_that_are_no_images(event):
    with pytest.raises(sbot.InvalidProblem):
        UNet(event)
