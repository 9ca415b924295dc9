"""The Bezier curve against its closed form, at its points, in its gradient and through a training step."""

import pytest
import tiny
import torch
from torch import nn
from torch.func import functional_call

from hf_tsc.curve import CurveModel, bezier_weights
from hf_tsc.errors import UsageError

PIXELS = tiny.digit_batches(6, 6, torch.float64)[0]["pixel_values"]


def params(family: str, seed: int) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in tiny.random_model(family, seed=seed).named_parameters()}


@pytest.fixture(params=tiny.CLASSIFIERS)
def family(request):
    return request.param


@pytest.fixture
def curve(family):
    """A curve between two random networks whose bend is a third one."""
    made = CurveModel(tiny.random_model(family, seed=1)).eval()
    made.set_ends(params(family, 2), params(family, 3))
    with torch.no_grad():
        for name, value in params(family, 4).items():
            made.bend[name].copy_(value)
    return made


def logits(module, **weights) -> torch.Tensor:
    return module(pixel_values=PIXELS).logits


class TestPoints:
    @pytest.mark.parametrize(
        ("t", "weights"), [(0, (1, 0, 0)), (0.5, (0.25, 0.5, 0.25)), (1, (0, 0, 1)), (0.4, (0.36, 0.48, 0.16))]
    )
    def test_weights(self, t, weights):
        assert bezier_weights(t) == pytest.approx(weights)
        assert sum(bezier_weights(t)) == pytest.approx(1)

    @pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
    def test_point_and_forward_are_the_closed_form(self, curve, family, t):
        a, c, b = params(family, 2), params(family, 4), params(family, 3)
        closed = {name: (1 - t) ** 2 * a[name] + 2 * t * (1 - t) * c[name] + t**2 * b[name] for name in a}
        point = curve.point(t)
        assert point.keys() == closed.keys()
        assert all(torch.allclose(point[name], closed[name], rtol=1e-14, atol=1e-14) for name in closed)
        curve.t = t
        with torch.no_grad():
            expected = functional_call(
                tiny.random_model(family, seed=1), closed, kwargs={"pixel_values": PIXELS}
            ).logits
            assert torch.allclose(logits(curve), expected, rtol=1e-9, atol=1e-9)

    def test_the_ends_are_exact(self, curve, family):
        for t, seed in ((0.0, 2), (1.0, 3)):
            assert all(torch.equal(curve.point(t)[name], p) for name, p in params(family, seed).items())

    def test_a_new_curve_bends_in_the_middle_of_its_ends(self, curve, family):
        a, b = params(family, 5), params(family, 6)
        curve.set_ends(a, b)
        for name in a:
            assert torch.equal(curve.start[name], a[name])
            assert torch.equal(curve.end[name], b[name])
            assert torch.allclose(curve.bend[name], (a[name] + b[name]) / 2, rtol=1e-15)
            assert torch.allclose(curve.point(0.5)[name], (a[name] + b[name]) / 2, rtol=1e-14, atol=1e-15)

    def test_ends_are_copies(self, curve, family):
        a, b = params(family, 5), params(family, 6)
        curve.set_ends(a, b)
        for tensor in (*a.values(), *b.values()):
            tensor.zero_()
        assert all(torch.equal(curve.start[name], p) for name, p in params(family, 5).items())

    def test_a_fresh_curve_is_the_model(self, family):
        model = tiny.random_model(family)
        curve = CurveModel(model).eval()
        for t in (0.0, 0.3, 1.0):
            curve.t = t
            assert torch.allclose(logits(curve), logits(model), rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("t", [-0.01, 1.01, float("nan")])
    def test_t_outside(self, curve, t):
        with pytest.raises(ValueError, match=r"a point of the curve has t in \[0, 1\]"):
            curve.t = t

    def test_tied_parameters_are_refused(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        with pytest.raises(UsageError, match=r"1\.weight shared with another layer: a curve needs untied parameters"):
            CurveModel(model)


class TestTraining:
    @pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 1.0])
    def test_gradient_of_the_bend(self, curve, family, t):
        """dL/dC = 2 t (1 - t) dL/dγ(t)."""
        curve.t = t
        nn.functional.cross_entropy(logits(curve), torch.arange(6)).backward()
        point = {name: p.requires_grad_() for name, p in curve.point(t).items()}
        plain = tiny.random_model(family, seed=1)
        nn.functional.cross_entropy(
            functional_call(plain, point, kwargs={"pixel_values": PIXELS}).logits, torch.arange(6)
        ).backward()
        assert any(p.grad.abs().max() > 1e-3 for p in point.values())
        for name, bend in curve.bend.items():
            scale = point[name].grad.abs().max()
            assert torch.allclose(
                bend.grad, 2 * t * (1 - t) * point[name].grad, rtol=1e-7, atol=1e-9 * max(scale, 1e-3)
            )

    def test_only_the_bend_is_trained(self, curve):
        trained = {id(p) for p in curve.parameters() if p.requires_grad}
        assert trained == {id(p) for p in curve.bend.values()}
        frozen = {id(p) for p in curve.parameters() if not p.requires_grad}
        assert frozen == {id(p) for p in (*curve.start.values(), *curve.end.values())}

    def test_the_ends_stay_in_a_step(self, curve, family):
        optimizer = torch.optim.SGD([p for p in curve.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
        for t in (0.1, 0.8):
            curve.t = t
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits(curve), torch.arange(6)).backward()
            optimizer.step()
        assert all(torch.equal(curve.start[name], p) for name, p in params(family, 2).items())
        assert all(torch.equal(curve.end[name], p) for name, p in params(family, 3).items())
        assert not any(torch.equal(curve.bend[name], p) for name, p in params(family, 4).items())

    def test_state_dict_round_trip(self, curve, family):
        other = CurveModel(tiny.random_model(family, seed=9)).eval()
        other.load_state_dict(curve.state_dict())
        curve.t = other.t = 0.3
        assert torch.equal(logits(other), logits(curve))
        for t in (0.0, 0.3, 1.0):
            assert all(torch.equal(other.point(t)[name], p) for name, p in curve.point(t).items())

    def test_the_wrapped_model_is_a_copy(self, family):
        model = tiny.random_model(family)
        before = tiny.tensors(model)
        curve = CurveModel(model)
        for tensor in curve.bend.values():
            tensor.data.zero_()
        assert all(torch.equal(t, before[name]) for name, t in tiny.tensors(model).items())
