"""Derived specs keep the function and miss no axis. `test_golden.py`: they are what the modelling source says."""

from collections import Counter

import modules
import pytest
import tiny
import torch
from torch import nn
from torch.func import functional_call

from hf_tsc.axes import Frozen, atoms
from hf_tsc.derive import derive_spec, example_inputs, fixed_outputs
from hf_tsc.derive.verify import apply_without
from hf_tsc.errors import PurificationError
from hf_tsc.permutation import PermutationSpec, apply

TOLERANCE = 1e-10  # relative, float64: several orders above the rounding of a few layers
SEEN = 1e-6

ATTENTION = [("heads", (3,)), ("qk", (3, 4)), ("vo", (3, 4)), ("hidden", (10,))]
TRANSFORMER = [("residual", (12,)), *ATTENTION, *ATTENTION]  # 1 + 4 L spaces, L = 2
SPACES = {
    "resnet": [("residual", (6,)), ("hidden", (6,)), ("hidden", (6,)), ("residual", (8,)), ("hidden", (8,))],
    "resnet_wide_stem": [
        *[("hidden", (5,)), ("residual", (6,)), ("hidden", (6,)), ("hidden", (6,))],
        *[("residual", (8,)), ("hidden", (8,))],
    ],
    "resnet_bottleneck": [
        *[("hidden", (6,)), ("residual", (8,)), *4 * [("hidden", (2,))]],
        *[("residual", (12,)), *2 * [("hidden", (3,))]],
    ],
    "resnet_downsample": [
        *[("hidden", (6,)), ("residual", (6,)), ("hidden", (6,)), ("hidden", (6,))],
        *[("residual", (8,)), ("hidden", (8,))],
    ],
    "vit": TRANSFORMER,
    "vit_no_qkv_bias": TRANSFORMER,
    "deit": TRANSFORMER,
    "deit_teacher": TRANSFORMER,
    # the projections make embeddings, which are outputs
    "clip": [
        *TRANSFORMER,
        *[("residual", (10,)), ("heads", (2,)), ("qk", (2, 5)), ("vo", (2, 5)), ("hidden", (9,))],
    ],
}
assert SPACES.keys() == tiny.FAMILIES.keys()


def outputs(module: nn.Module, params, inputs) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return fixed_outputs(functional_call(module, params, kwargs=inputs))


def error(module: nn.Module, params, inputs, reference) -> float:
    """Largest absolute change of an output over its largest absolute value."""
    pairs = zip(outputs(module, params, inputs), reference, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def probe(module: nn.Module, inputs):
    """The module in float64 and randomised; its tensors, inputs and outputs."""
    module = module.double()
    tiny.randomise(module)
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    params = tiny.tensors(module)
    return module, params, inputs, outputs(module, params, inputs)


def unseen(spec: PermutationSpec, module, params, inputs, reference) -> set[tuple[str, int]]:
    """The axes that can be left behind without a change of the output."""
    missing = set()
    for name, dim in spec.moved():
        if not error(module, apply_without(params, spec, name, dim), inputs, reference) > SEEN:
            missing.add((name, dim))
    return missing


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def case(family):
    made = tiny.model(family)
    return probe(made, example_inputs(made, batch_size=3))


class TestFamilies:
    @pytest.mark.parametrize("seed", range(3))
    def test_random_permutations_keep_the_function(self, family, case, seed):
        module, params, inputs, reference = case
        spec = tiny.spec(family)
        moved = apply(params, spec, tiny.random_permutation(spec, seed=seed))
        assert not any(torch.equal(moved[name], params[name]) for name, dim in spec.moved() if params[name].ndim > 1)
        assert error(module, moved, inputs, reference) < TOLERANCE

    def test_every_axis_left_behind_is_seen(self, family, case):
        spec = tiny.spec(family)
        module, params, *rest = case
        # softmax ignores what is the same for all keys: the bias of k adds q_i b_k to every score of query i
        no_effect = {(name, 0) for name in params if name.endswith("k_proj.bias")}
        assert unseen(spec, module, params, *rest) == no_effect

    def test_spaces(self, family):
        spec = tiny.spec(family)
        found = Counter((space.kind, spec.shape(space.name)) for space in spec.spaces.values())
        assert found == Counter(SPACES[family])
        assert all(name == space.name for name, space in spec.spaces.items())
        assert spec.unknown_ops == ()

    def test_every_floating_tensor_is_listed_and_every_axis_explained(self, family):
        spec = tiny.spec(family)
        floating = {name: t for name, t in tiny.tensors(tiny.model(family)).items() if t.is_floating_point()}
        assert spec.axes.keys() == floating.keys()
        for name, axes in spec.axes.items():
            assert tuple(axis.size for axis in axes) == tuple(floating[name].shape)
            assert all(axis.reason for axis in axes if isinstance(axis, Frozen)), name

    def test_every_space_has_a_tap(self, family):
        spec = tiny.spec(family)
        assert {atom.space for tap in spec.taps for atom in atoms(tap.axis)} == spec.spaces.keys()
        assert len({(tap.module, tap.side) for tap in spec.taps}) == len(spec.taps)


class TestTaps:
    @pytest.mark.parametrize("family", ["vit", "deit"])
    def test_transformer(self, family):
        stem = family
        read = {(tap.module, tap.side): str(tap.axis) for tap in tiny.spec(family).taps}
        stream = f"{stem}.layers.residual"
        expected = {("classifier", "input"): stream}
        for layer in range(tiny.LAYERS):
            base = f"{stem}.layers.{layer}"
            heads = f"{base}.attention.heads"
            qk, vo = f"({heads} {base}.attention.qk@{heads})", f"({heads} {base}.attention.vo@{heads})"
            expected |= {
                (f"{base}.attention.q_proj", "input"): stream,  # once: k and v read the same tensor
                (f"{base}.mlp.fc1", "input"): stream,
                (f"{base}.attention.q_proj", "output"): qk,  # no linear map reads q and k
                (f"{base}.attention.k_proj", "output"): qk,
                (f"{base}.attention.o_proj", "input"): vo,
                (f"{base}.mlp.fc2", "input"): f"{base}.mlp.hidden",
            }
        assert read == expected

    def test_resnet_reads_the_stream_at_every_block(self):
        stages = "resnet.encoder.stages"
        taps = tiny.spec("resnet").taps
        first = {tap.module for tap in taps if str(tap.axis) == "resnet.residual"}
        assert first == {
            f"{stages}.{block}.layer.0.convolution" for block in ("0.layers.0", "0.layers.1", "1.layers.0")
        }
        last = {tap.module for tap in taps if str(tap.axis) == "resnet.encoder.stages.1.layers.0.residual"}
        assert last == {"classifier.1"}
        assert {tap.side for tap in taps} == {"input"}
        assert {tap.dim for tap in taps} == {1, -1}


# Axes of the ad hoc networks that have no effect, with the reason.
NO_EFFECT = {
    "attention": {("k.bias", 0)},  # softmax ignores what is the same for all keys
    "talking_heads": {("k.bias", 0), ("t.bias", 0)},
    "expanded_norm": {("n.weight", 0)},  # LayerNorm of a constant vector is zero
    "grouped_queries": {("k.bias", 0)},
    "repeated_keys": {("k.bias", 0)},
    "zero_key_bias": {("k.value", 0)},
}


@pytest.fixture(scope="module", params=modules.NETWORKS)
def network(request):
    module, inputs = modules.build(request.param)
    return request.param, derive_spec(module, inputs), probe(module, inputs)


class TestAdHocNetworks:
    def test_random_permutations_keep_the_function(self, network):
        _, spec, (module, params, inputs, reference) = network
        for seed in range(4):
            moved = apply(params, spec, tiny.random_permutation(spec, seed=seed))
            assert error(module, moved, inputs, reference) < TOLERANCE

    def test_spaces(self, network):
        name, spec, _ = network
        assert sorted(spec.shape(space) for space in spec.spaces) == sorted(modules.NETWORKS[name][3])

    def test_every_axis_left_behind_is_seen(self, network):
        name, spec, case = network
        module, params, *rest = case
        assert unseen(spec, module, params, *rest) == NO_EFFECT.get(name, set())

    def test_every_space_has_a_tap(self, network):
        _, spec, _ = network
        assert {atom.space for tap in spec.taps for atom in atoms(tap.axis)} == spec.spaces.keys()

    def test_one_level_of_nesting(self, network):
        _, spec, _ = network
        nested = [space for space in spec.spaces.values() if space.parent]
        assert all(spec.spaces[space.parent].parent is None for space in nested)

    def test_operators_without_a_rule_are_reported(self, network):
        name, spec, _ = network
        assert spec.unknown_ops == ((name,) if name in modules.UNKNOWN else ())
        if name in modules.UNKNOWN:
            reasons = {axis.reason for axes in spec.axes.values() for axis in axes if isinstance(axis, Frozen)}
            assert f"operator {name} has no rule" in reasons


@pytest.mark.parametrize("family", ["resnet"])
def test_the_callers_model_is_not_touched(family):
    made = tiny.model(family).train()
    before = tiny.tensors(made)
    spec = derive_spec(made, example_inputs(made))
    assert made.training
    assert all(torch.equal(t, before[name]) for name, t in tiny.tensors(made).items())
    assert spec == tiny.spec(family)  # nor does the spec depend on the mode


class TestLimits:
    def test_unused_parameters_are_listed(self):
        net = modules.Network(lambda net, x: net.o(net.a(x).relu()), a=nn.Linear(12, 6), o=nn.Linear(6, 3))
        net.spare = nn.Linear(6, 6)
        spec = derive_spec(net, {"pixel_values": modules.VECTOR})
        assert {axis.reason for name in ("spare.weight", "spare.bias") for axis in spec.axes[name]} == {
            "not used in the forward pass"
        }
        assert [spec.shape(space) for space in spec.spaces] == [(6,)]

    def test_tied_parameters_are_one(self):
        net = modules.Network(
            lambda net, x: net.o(net.b(x).relu()), a=nn.Linear(12, 6), b=nn.Linear(12, 6), o=nn.Linear(6, 3)
        )
        net.b.weight = net.a.weight
        inputs = {"pixel_values": modules.VECTOR}
        spec = derive_spec(net, inputs)
        assert "b.weight" not in spec.axes
        assert [str(axis) for axis in spec.axes["a.weight"]] == ["hidden", "_12"]
        module, params, inputs, reference = probe(net, inputs)
        params = dict(module.named_parameters())
        moved = apply(params, spec, tiny.random_permutation(spec))
        assert error(module, moved, inputs, reference) < TOLERANCE

    def test_a_module_that_does_not_export(self):
        net = modules.Network(lambda net, x: net.o(x * float(x.sum())), o=nn.Linear(12, 3))
        with pytest.raises(
            PurificationError, match="the graph of Network cannot be exported, so its symmetries are unknown: "
        ):
            derive_spec(net, {"pixel_values": modules.VECTOR})

    def test_outputs_of_no_known_kind(self):
        with pytest.raises(PurificationError, match=r"the model returns \['boxes'\]: expected logits, image and text"):
            fixed_outputs({"boxes": torch.zeros(1)})

    @pytest.mark.parametrize(
        ("names", "kept"),
        [
            (("logits", "last_hidden_state"), 1),
            (("logits_per_image", "logits_per_text", "image_embeds", "text_embeds"), 4),
            (("last_hidden_state", "pooler_output"), 2),
            (("last_hidden_state", "image_embeds"), 1),
        ],
    )
    def test_outputs_that_must_not_change(self, names, kept):
        output = {name: torch.zeros(1) for name in names}
        assert [id(t) for t in fixed_outputs(output)] == [id(output[name]) for name in names[:kept]]

    def test_inputs_of_a_dual_encoder(self):
        made = tiny.model("clip")
        inputs = example_inputs(made, batch_size=4)
        assert inputs["pixel_values"].shape == (4, 3, 8, 8)
        assert inputs["input_ids"].shape == (4, 8)
        assert (inputs["input_ids"] == 19).sum(1).tolist() == [1, 1, 1, 1]
        assert (inputs["input_ids"][:, -1] == 19).all()

    def test_inputs_are_a_function_of_the_seed(self):
        made = tiny.model("vit")
        first, again, other = (example_inputs(made, seed=seed)["pixel_values"] for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
