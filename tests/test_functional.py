"""Networks at points of weight space that are not their own; LeViT keeps attention biases in evaluation mode."""

import copy

import pytest
import tiny
import torch

from hf_tsc.architectures import VARIANTS
from hf_tsc.curve import CurveModel
from hf_tsc.derive import example_inputs
from hf_tsc.functional import call_at, forget_caches


@pytest.fixture(scope="module")
def levit():
    torch.manual_seed(0)
    model = VARIANTS["levit"].build().eval()
    tiny.randomise(model)
    return model


def scaled(model, factor):
    """The model's tensors with other attention biases."""
    tensors = {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}
    return {n: t.normal_() * factor if n.endswith("attention_biases") else t for n, t in tensors.items()}


def fresh(model, tensors, inputs):
    """The same weights in a model that has never been called."""
    other = copy.deepcopy(model)
    forget_caches(other)
    saved = other.state_dict()
    other.load_state_dict({**saved, **{name: t for name, t in tensors.items() if name in saved}})
    return other.eval()(**inputs).logits


@torch.no_grad()
def test_a_point_is_called_with_its_own_weights(levit):
    inputs = example_inputs(levit)
    own = levit(**inputs).logits
    for factor in (1.0, 3.0):
        point = scaled(levit, factor)
        assert torch.equal(call_at(levit, point, inputs).logits, fresh(levit, point, inputs))
        assert not torch.allclose(call_at(levit, point, inputs).logits, own)
    assert torch.equal(levit(**inputs).logits, own)  # it has not kept the point's biases


@torch.no_grad()
def test_a_curve_in_evaluation_mode_follows_its_weights(levit):
    inputs = example_inputs(levit)
    start, end = scaled(levit, 1.0), scaled(levit, 3.0)
    curve = CurveModel(levit).eval()
    curve.set_ends({n: start[n] for n in curve.names}, {n: end[n] for n in curve.names})
    for t in (0.0, 0.5, 1.0):
        curve.t = t
        assert torch.allclose(curve(**inputs).logits, fresh(levit, curve.point(t), inputs), rtol=1e-4)


def test_modes_stay():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.BatchNorm1d(3)).eval()
    model[1].train()
    forget_caches(model)
    assert [module.training for module in model.modules()] == [False, False, True]
