"""Ridge reconstruction: against least squares, against its objective's gradient, and what it does to a shortcut."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_baselines import case, result, run, suspect_of
from torch import nn

from hf_tsc.baselines.ridge import layers_in_order, reconstructed, solve_ridge
from hf_tsc.errors import AccuracyBudgetError, UsageError
from hf_tsc.functional import call_at, tensors_of

PENALTY = 0.3


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def least_squares(x: torch.Tensor, wanted: torch.Tensor, penalty: float) -> torch.Tensor:
    """(o, d): the penalty as further rows of an ordinary problem."""
    scale = x.square().sum() / x.shape[1]
    rows = (penalty * scale).sqrt() * torch.eye(x.shape[1], dtype=x.dtype)
    zeros = torch.zeros(x.shape[1], wanted.shape[1], dtype=x.dtype)
    return torch.linalg.lstsq(torch.cat([x, rows]), torch.cat([wanted, zeros])).solution.T


class TwoLayers(nn.Module):
    """The second one is registered first."""

    def __init__(self, inputs: int = 5):
        super().__init__()
        self.second = nn.Linear(4, 3).double()
        self.first = nn.Linear(inputs, 4).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


class Picture(nn.Module):
    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class TestSolution:
    def test_least_squares(self):
        x, wanted = drawn(20, 6), drawn(20, 3, seed=1)
        found = solve_ridge(wanted.T @ x, x.T @ x, PENALTY)
        assert torch.allclose(found, least_squares(x, wanted, PENALTY), atol=1e-12)

    def test_no_input(self):
        assert torch.equal(solve_ridge(torch.zeros(2, 3), torch.zeros(3, 3), PENALTY), torch.zeros(2, 3))


class TestReconstructed:
    def test_two_layers(self):
        """The second layer is fitted to what it reads now, and to what it gave before."""
        model, x = TwoLayers().eval(), drawn(30, 5)
        found = reconstructed(model, lambda: [{"x": x[:11]}, {"x": x[11:]}], PENALTY)
        first = least_squares(x, x @ model.first.weight.T, PENALTY)
        before, now = model.first(x).relu(), F.linear(x, first, model.first.bias).relu()
        second = least_squares(now, before @ model.second.weight.T, PENALTY)
        assert torch.allclose(found["first.weight"], first, atol=1e-12)
        assert torch.allclose(found["second.weight"], second, atol=1e-12)
        assert torch.equal(found["second.bias"], model.second.bias)

    @pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2, "padding": (0, 1)}, {"dilation": 2}])
    def test_convolution(self, options):
        """At the solution the gradient of the objective is 0; it is taken through torch's own convolution."""
        model, x = Picture(nn.Conv2d(2, 3, 3, **options)).eval(), drawn(7, 2, 8, 8)
        name, layer = "layers.0.weight", model.layers[0]
        weight = reconstructed(model, lambda: [{"x": x}], PENALTY)[name].requires_grad_()

        def convolved(pictures, weight):
            return F.conv2d(pictures, weight, None, layer.stride, layer.padding, layer.dilation)

        scale = convolved(x.square(), torch.ones_like(weight[:1])).sum() / weight[0].numel()
        fit = (convolved(x, weight) - convolved(x, layer.weight)).square().sum()
        (gradient,) = torch.autograd.grad(fit + PENALTY * scale * weight.square().sum(), weight)
        (of_the_fit,) = torch.autograd.grad((convolved(x, weight) - convolved(x, layer.weight)).square().sum(), weight)
        assert gradient.abs().max() < 1e-9 * of_the_fit.abs().max()

    def test_what_clean_inputs_do_not_use_is_gone(self):
        """A shortcut from an input that is always 0 on clean data; its answers to them stay."""
        model, x = TwoLayers().eval(), drawn(200, 5)
        x[:, 3] = 0
        with torch.no_grad():
            model.first.weight[:, 3] = 50.0
        found = reconstructed(model, lambda: [{"x": x}], 1e-9)
        assert found["first.weight"][:, 3].abs().max() < 1e-9
        assert torch.allclose(call_at(model, found, {"x": x}), model(x), atol=1e-5)
        triggered = x.clone()
        triggered[:, 3] = 1
        assert torch.allclose(call_at(model, found, {"x": triggered}), model(x), atol=1e-5)
        assert (model(triggered) - model(x)).abs().max() > 1

    def test_a_large_penalty_leaves_little(self):
        model, x = TwoLayers().eval(), drawn(30, 5)
        norms = [reconstructed(model, lambda: [{"x": x}], penalty)["first.weight"].norm() for penalty in (0.1, 1, 1e6)]
        assert norms[0] > norms[1] > 1e3 * norms[2]

    @pytest.mark.parametrize("family", ["resnet", "vit"])
    def test_a_small_penalty_keeps_the_answers(self, family):
        model = suspect_of(family).double()
        pixels = drawn(40, 3, 8, 8)
        before = copy.deepcopy(model.state_dict())
        found = reconstructed(model, lambda: [{"pixel_values": pixels}], 1e-12)
        now = call_at(model, found, {"pixel_values": pixels}).logits
        assert torch.allclose(now, model(pixel_values=pixels).logits, atol=1e-4)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert all(torch.equal(found[name], tensor) for name, tensor in model.named_buffers())
        changed = {name for name, tensor in model.named_parameters() if not torch.equal(found[name], tensor)}
        assert changed <= {f"{name}.weight" for name in layers_in_order(model, {"pixel_values": pixels[:1]})}


class TestLayers:
    def test_order(self):
        assert layers_in_order(TwoLayers(), {"x": drawn(2, 5)}) == ["first", "second"]

    def test_grouped_convolutions_stay(self):
        model = Picture(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 2, 3, padding="same"))
        assert layers_in_order(model, {"x": drawn(1, 4, 6, 6)}) == ["layers.1"]

    def test_shared_weights_stay(self):
        model = Picture(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
        model.layers[2].weight = model.layers[0].weight
        assert layers_in_order(model, {"x": drawn(1, 3)}) == ["layers.1"]

    def test_none(self):
        with pytest.raises(UsageError, match="Picture has no linear or convolutional layer that ridge could replace"):
            reconstructed(Picture(nn.ReLU()), lambda: [{"x": drawn(1, 3)}], PENALTY)


class TestMethod:
    def test_path(self):
        on = case("resnet")
        found, outcome = run("ridge", on, penalty=0.4)
        ((_, last, point, taken),) = found.values()
        assert (last, taken, outcome.gradient_evaluations) == (True, 0.4, 0)
        suspect = tensors_of(on.suspect)
        assert all(torch.equal(point(0.0)[name], tensor) for name, tensor in suspect.items())
        assert point(0.4) is point(0.4)  # is fitted once
        weight = "classifier.1.weight"
        assert point(1.0)[weight].norm() < point(0.4)[weight].norm() < suspect[weight].norm()

    def test_penalty_by_the_accuracy_budget(self):
        found, _ = run("ridge", case("vit"), max_accuracy_drop=100)
        assert found["penalty"][3] == 1.0

    def test_no_penalty_within_the_budget(self, monkeypatch):
        on = case("vit")
        scores = iter([0.9, *[0.5] * 11])
        monkeypatch.setattr(type(on), "score", lambda *args: next(scores))
        with pytest.raises(
            AccuracyBudgetError, match=r"no point is within max_accuracy_drop=1 points.*90\.0 % before"
        ):
            run("ridge", on, max_accuracy_drop=1)

    def test_is_the_same_again(self):
        first, second = result("ridge", case("vit")), result("ridge", case("vit", seed=5))
        assert all(torch.equal(first[name], second[name]) for name in first)
