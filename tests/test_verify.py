"""The gate before every purification: right specs pass, wrong ones are refused, and it can see."""

import dataclasses

import modules
import pytest
import tiny
import torch
from torch import nn

from hf_tsc.axes import Frozen, index
from hf_tsc.derive import derive_spec, example_inputs, verify
from hf_tsc.derive.verify import Probe, apply_without, failing_spaces, randomised
from hf_tsc.errors import PurificationError
from hf_tsc.permutation import PermutationSpec, apply, identity, roll

STAGES = "resnet.encoder.stages"


def without(spec: PermutationSpec, name: str, dim: int) -> PermutationSpec:
    """The spec with one axis forgotten."""
    axes = list(spec.axes[name])
    axes[dim] = Frozen(axes[dim].size, "forgotten")
    return dataclasses.replace(spec, axes={**spec.axes, name: tuple(axes)})


@pytest.mark.parametrize("family", ["resnet", "vit", "clip"])
def test_a_right_spec_passes(family):
    model = tiny.model(family)
    before = tiny.tensors(model)
    found = verify(model, tiny.spec(family), example_inputs(model))
    assert found.error < 1e-12
    assert found.control > 1e-3
    assert model.dtype == torch.float32
    assert all(torch.equal(t, before[name]) for name, t in tiny.tensors(model).items())


@pytest.mark.parametrize(
    ("family", "name", "dim", "space"),
    [
        ("resnet", f"{STAGES}.0.layers.1.layer.1.normalization.running_var", 0, "resnet.residual"),
        ("resnet", "classifier.1.weight", 1, f"{STAGES}.1.layers.0.residual"),
        ("vit", "vit.embeddings.position_embeddings", 2, "vit.layers.residual"),
        ("vit", "vit.layers.1.attention.q_proj.bias", 0, "vit.layers.1.attention.heads, vit.layers.1.attention.qk"),
    ],
)
def test_a_forgotten_axis_is_refused_with_the_name_of_its_space(family, name, dim, space):
    model, spec = tiny.model(family), without(tiny.spec(family), name, dim)
    message = f"does not keep its function: relative error .*, allowed 1e-10; spaces that fail alone: {space}$"
    with pytest.raises(PurificationError, match=message):
        verify(model, spec, example_inputs(model))


def test_an_output_that_is_not_a_number_is_refused():
    net = modules.Network(lambda net, x: net.o(net.a(x).abs().neg().log()), a=nn.Linear(12, 6), o=nn.Linear(6, 3))
    inputs = {"pixel_values": modules.VECTOR}
    with pytest.raises(PurificationError, match="relative error nan"):
        verify(net, derive_spec(net, inputs), inputs)


def test_a_model_without_spaces_passes():
    module, inputs = modules.build("aten.sort.default")
    found = verify(module, derive_spec(module, inputs), inputs)
    assert found.error == 0
    assert found.control is None


def test_failing_spaces_are_none_for_a_right_spec():
    model = tiny.model("vit")
    assert failing_spaces(Probe(model, example_inputs(model)), tiny.spec("vit")) == []


def test_apply_without_leaves_one_axis_behind():
    spec = tiny.spec("vit")
    params = tiny.tensors(tiny.random_model("vit"))
    name = "vit.layers.0.attention.v_proj.weight"
    moved, left = apply(params, spec, roll(spec)), apply_without(params, spec, name, 0)
    assert torch.equal(left[name], params[name][:, index(spec.axes[name][1], roll(spec))])
    assert all(torch.equal(left[other], moved[other]) for other in params if other != name)


class TestRandomised:
    def test_every_floating_tensor_is_random_and_the_model_untouched(self):
        model = tiny.model("resnet")
        before = tiny.tensors(model)
        made = randomised(model, seed=0)
        floating = {name for name, t in before.items() if t.is_floating_point() and t.ndim}
        assert made.keys() == floating
        assert all(t.dtype == torch.float64 and t.flatten().unique().numel() == t.numel() for t in made.values())
        assert all((made[name] >= 0.5).all() for name in made if name.endswith("running_var"))
        assert all(torch.equal(t, before[name]) for name, t in tiny.tensors(model).items())

    def test_a_function_of_the_seed(self):
        model = tiny.model("vit")
        first, again, other = (randomised(model, seed=seed)["classifier.weight"] for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_the_error_is_relative_to_the_largest_output():
    net = modules.Network(lambda net, x: net.o(x), o=nn.Linear(12, 3))
    probe = Probe(net, {"pixel_values": modules.VECTOR})
    assert probe.error(probe.params) == 0
    doubled = {name: 2 * tensor for name, tensor in probe.params.items()}
    assert probe.error(doubled) == pytest.approx(1)


def test_the_identity_changes_nothing():
    model, spec = tiny.model("vit"), tiny.spec("vit")
    probe = Probe(model, example_inputs(model))
    assert probe.error(apply(probe.params, spec, identity(spec))) == 0
