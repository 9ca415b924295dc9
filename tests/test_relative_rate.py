"""Rates in proportion to the weights before a BatchNorm: a training does not depend on the size of these weights."""

import copy

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from hf_tsc.architectures.classifiers import levit
from hf_tsc.derive import example_inputs
from hf_tsc.layers import LAYERS
from hf_tsc.relative_rate import REFERENCE, rate_factor, scale_rate, weights_before_batch_norm


class Toy(nn.Module):
    """A convolution before a BatchNorm, one whose sum with its input a norm takes, and a linear layer before one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-14)
        self.second, self.sum_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.third, self.last_norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 2)
        self.double()

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        x = self.sum_norm(x + self.second(x))
        return self.head(self.last_norm(self.third(x.mean((2, 3)))))


def images(n=8):
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(1)).double()


def trained(network, *, rate, relative=True, steps=20):
    """Outputs after some steps of SGD with momentum and weight decay, with a relative rate before the BatchNorms."""
    network = copy.deepcopy(network)
    names = weights_before_batch_norm(network.eval(), {"x": images()})
    weights = [network.get_parameter(name) for name in names]
    optimizer = SGD(network.parameters(), lr=rate, momentum=0.9, weight_decay=0.1)
    scale_rate(optimizer, weights, rate_factor(weights) if relative else 1.0)
    network.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(network(images()), torch.arange(8) % 2).backward()
        optimizer.step()
    return network(images()).detach()


class TestWeightsBeforeBatchNorm:
    def test_those_that_a_norm_takes_as_they_are(self):
        assert weights_before_batch_norm(Toy().eval(), {"x": images()}) == {"first.weight": 0, "third.weight": 0}

    def test_a_resnet_has_all_its_convolutions(self):
        model = tiny.model("resnet")
        found = weights_before_batch_norm(model, example_inputs(model))
        assert sorted(found) == sorted(name for name, p in model.named_parameters() if p.ndim == 4)

    def test_another_shape_on_the_way(self):
        """LeViT flattens what its linear layers give before a BatchNorm takes it; only classifiers have none."""
        model = levit().eval()
        layers = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, tuple(LAYERS))}
        left = layers - set(weights_before_batch_norm(model, example_inputs(model)))
        assert all("classifier" in name for name in left)

    def test_a_transformer_has_none(self):
        model = tiny.model("vit")
        assert weights_before_batch_norm(model, example_inputs(model)) == {}

    def test_the_axis_of_the_units_of_a_transposed_convolution(self):
        network = nn.Sequential(nn.ConvTranspose2d(3, 5, 2), nn.BatchNorm2d(5)).double().eval()
        assert weights_before_batch_norm(network, {"input": images()}) == {"0.weight": 1}

    def test_no_hooks_are_left(self):
        network = Toy().eval()
        weights_before_batch_norm(network, {"x": images()})
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


class TestRateFactor:
    def test_against_the_formula(self):
        weights = [torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.ones(1, 2, 2, 2)]
        assert rate_factor(weights) == pytest.approx((25 * 4 * 8) ** (1 / 3) / REFERENCE)

    def test_it_grows_with_the_square(self):
        weights = [torch.randn(5, 4, 3, 3), torch.randn(3, 5)]
        assert rate_factor([3 * w for w in weights]) == pytest.approx(9 * rate_factor(weights))

    def test_without_weights_or_with_dead_ones(self):
        assert rate_factor([]) == rate_factor([torch.zeros(3, 2)]) == 1.0
        assert rate_factor([torch.tensor([[0.0], [1e-3], [1.0]])]) == pytest.approx(1 / REFERENCE)


class TestTraining:
    def test_it_does_not_depend_on_the_size_of_the_weights(self):
        """A convolution of seven times the weights does the same, and is trained in the same way."""
        plain, large = Toy(), Toy()
        del plain.third, large.third  # so that the factor is that of one layer
        plain.third = large.third = nn.Identity()
        for network in (plain, large):
            network.last_norm, network.head = nn.BatchNorm1d(4).double(), nn.Linear(4, 2).double()
            network.head.load_state_dict({"weight": torch.ones(2, 4) / 4, "bias": torch.tensor([0.1, 0.0])})
        with torch.no_grad():
            large.first.weight *= 7
        reached = trained(plain, rate=0.05)
        assert torch.allclose(trained(large, rate=0.05), reached, atol=1e-8)
        factor = rate_factor([large.first.weight]) / rate_factor([plain.first.weight])
        assert factor == pytest.approx(49)
        assert not torch.allclose(trained(large, rate=0.05, relative=False), reached, atol=1e-2)

    def test_the_group_and_its_rate(self):
        network = Toy()
        optimizer = SGD(network.parameters(), lr=0.3, momentum=0.5, weight_decay=0.1)
        scale_rate(optimizer, [network.first.weight], 2.5)
        rest, own = optimizer.param_groups
        assert own["params"] == [network.first.weight]
        assert len(rest["params"]) == len(list(network.parameters())) - 1
        assert (rest["lr"], own["lr"], own["momentum"], own["weight_decay"]) == (0.3, pytest.approx(0.75), 0.5, 0.04)
