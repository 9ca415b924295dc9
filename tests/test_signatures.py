"""Specs written by hand: they equal the derived ones, every mistake is told, and the notation reads what it writes."""

import re
from collections.abc import Callable
from pathlib import Path

import modules
import pytest
import tiny
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_tsc.activations import collect_statistics
from hf_tsc.axes import Atom, Axis, Concat, Frozen, Product, atoms
from hf_tsc.derive import derive_spec, example_inputs, verify
from hf_tsc.derive.verify import TOLERANCE, Probe
from hf_tsc.errors import PurificationError, UsageError
from hf_tsc.permutation import PermutationSpec, Tap, apply, roll
from hf_tsc.signatures import Group, Leaf, parse_axis, register_spec, registered_spec, registry, spec_from_signatures

PAGE = (Path(__file__).parent.parent / "docs/own_spec.md").read_text(encoding="utf-8")

QK, VO = (f"(layers.*.heads:{tiny.HEADS} layers.*.{kind}@heads)" for kind in ("qk", "vo"))
VIT = {
    "vit.embeddings.cls_token": "_, _, residual",
    "vit.embeddings.position_embeddings": "_, _, residual",
    "vit.embeddings.patch_embeddings.projection.weight": "residual, _, _, _",
    "vit.embeddings.patch_embeddings.projection.bias": "residual",
    "vit.layers.*.layernorm_*.*": "residual",
    "vit.layers.*.attention.q_proj.weight": f"{QK}, residual",
    "vit.layers.*.attention.q_proj.bias": QK,
    "vit.layers.*.attention.k_proj.weight": f"{QK}, residual",
    "vit.layers.*.attention.k_proj.bias": QK,
    "vit.layers.*.attention.v_proj.weight": f"{VO}, residual",
    "vit.layers.*.attention.v_proj.bias": VO,
    "vit.layers.*.attention.o_proj.weight": f"residual, {VO}",
    "vit.layers.*.attention.o_proj.bias": "residual",
    "vit.layers.*.mlp.fc1.weight": "layers.*.hidden, residual",
    "vit.layers.*.mlp.fc1.bias": "layers.*.hidden",
    "vit.layers.*.mlp.fc2.weight": "residual, layers.*.hidden",
    "vit.layers.*.mlp.fc2.bias": "residual",
    "vit.layernorm.*": "residual",
    "classifier.weight": "_, residual",
}
BLOCK = "resnet.encoder.stages.*.layers.*"
RESNET = {
    "resnet.embedder.embedder.convolution.weight": "stages.0.residual, _, _, _",
    "resnet.embedder.embedder.normalization.*": "stages.0.residual",
    "resnet.encoder.stages.0.layers.*.layer.0.convolution.weight": "stages.0.layers.*.hidden, stages.0.residual, _, _",
    "resnet.encoder.stages.1.layers.*.layer.0.convolution.weight": "stages.1.layers.*.hidden, stages.0.residual, _, _",
    f"{BLOCK}.layer.0.normalization.*": "stages.*.layers.*.hidden",
    f"{BLOCK}.layer.1.convolution.weight": "stages.*.residual, stages.*.layers.*.hidden, _, _",
    f"{BLOCK}.layer.1.normalization.*": "stages.*.residual",
    f"{BLOCK}.shortcut.convolution.weight": "stages.*.residual, stages.0.residual, _1, _1",
    f"{BLOCK}.shortcut.normalization.*": "stages.*.residual",
    "classifier.1.weight": "_, stages.1.residual",
}
SAME_INPUT = ["input of vit.layers.*.attention.k_proj", "input of vit.layers.*.attention.v_proj"]
BY_HAND = {"vit": (VIT, SAME_INPUT), "resnet": (RESNET, [f"input of {BLOCK}.shortcut.convolution"])}
assert BY_HAND.keys() == set(tiny.CLASSIFIERS)


def by_hand(family: str, **options) -> PermutationSpec:
    return spec_from_signatures(tiny.model(family), BY_HAND[family][0], **options)


def renamed(spec: PermutationSpec) -> tuple[list, dict, list]:
    """Spaces, axes and taps with the spaces numbered as they come in the tensors."""
    found = [atom.space for axes in spec.axes.values() for axis in axes for atom in atoms(axis)]
    numbers = {name: f"s{number}" for number, name in enumerate(dict.fromkeys(found))}

    def text(axis: Axis) -> str:
        return re.sub(r"[\w.]+", lambda match: numbers.get(match[0], match[0]), str(axis))

    spaces = [(numbers[s.name], s.size, s.kind, numbers.get(s.parent)) for s in spec.spaces.values()]
    axes = {name: [text(axis) for axis in axes] for name, axes in spec.axes.items()}
    return sorted(spaces), axes, [(tap.module, tap.side, tap.dim, text(tap.axis)) for tap in spec.taps]


@pytest.mark.parametrize("family", tiny.CLASSIFIERS)
class TestByHand:
    def test_equals_the_derived_spec_up_to_names(self, family):
        assert renamed(by_hand(family, untapped=BY_HAND[family][1])) == renamed(tiny.spec(family))

    def test_keeps_the_function(self, family):
        model = tiny.model(family)
        found = verify(model, by_hand(family), example_inputs(model))
        assert found.error < 1e-12
        assert found.control > 1e-3

    def test_every_layer_that_reads_is_tapped(self, family):
        every, derived = renamed(by_hand(family))[2], renamed(tiny.spec(family))[2]
        assert set(derived) < set(every)
        more = {
            "vit": {(f"vit.layers.{layer}.attention.{name}_proj", "input") for layer in range(2) for name in "kv"},
            "resnet": {("resnet.encoder.stages.1.layers.0.shortcut.convolution", "input")},
        }
        assert {(module, side) for module, side, *_ in set(every) - set(derived)} == more[family]

    def test_every_line_left_out_is_seen(self, family):
        """What no line names is frozen, with its reason; the gate then refuses the spec."""
        model, whole, (table, _) = tiny.model(family), by_hand(family), BY_HAND[family]
        probe = Probe(model, example_inputs(model))
        harmless = set()
        for name in table:
            spec = spec_from_signatures(model, {other: line for other, line in table.items() if other != name})
            left = {axis.reason for n, axes in spec.axes.items() for axis in axes if whole.axes[n] != axes}
            assert left == {"not named in the registered spec"}
            if probe.error(apply(probe.params, spec, roll(spec))) < TOLERANCE:
                harmless.add(name)
        # softmax ignores what is the same for all keys: the bias of k adds q_i b_k to every score of query i
        assert harmless == ({"vit.layers.*.attention.k_proj.bias"} if family == "vit" else set())


def test_names_reasons_and_order():
    spec = by_hand("vit")
    assert list(spec.spaces)[:5] == ["residual", *(f"layers.0.{kind}" for kind in ("heads", "qk", "vo", "hidden"))]
    assert spec.spaces["layers.1.qk"].parent == "layers.1.heads"
    reasons = {axis.reason for axes in spec.axes.values() for axis in axes if isinstance(axis, Frozen)}
    assert reasons == {"frozen in the registered spec", "not named in the registered spec"}


def sized(axis: Axis) -> str:
    """An axis as text with every size in it."""
    if isinstance(axis, Product):
        return "(" + " ".join(f"({sized(f)})" for f in axis.factors) + ")"
    if isinstance(axis, Concat):
        return " + ".join(sized(part) for part in axis.parts)
    if isinstance(axis, Atom):
        return f"{axis.space}:{axis.size}" + (f"@{axis.parent}" if axis.parent else "")
    return str(axis)


def described(axis: Axis):
    """An axis as `parse_axis` must read it."""
    if isinstance(axis, Product | Concat):
        children = axis.factors if isinstance(axis, Product) else axis.parts
        return Group(type(axis), tuple(described(child) for child in children))
    return Leaf(axis.space, None, axis.parent) if isinstance(axis, Atom) else Leaf("", axis.size)


ROUND = ("cat", "repeat", "rotary", "fused_reshape", "fused_chunk", "grouped_conv", "multihead_attention")


def derived(name: str) -> tuple[nn.Module, PermutationSpec]:
    """A model with its derived spec: of a family, or one written ad hoc."""
    if name in tiny.FAMILIES:
        return tiny.model(name), tiny.spec(name)
    module, inputs = modules.build(name)
    return module, derive_spec(module, inputs)


class TestRoundTrip:
    @pytest.mark.parametrize("name", [*tiny.CLASSIFIERS, "clip", *ROUND])
    def test_derived_specs_as_signatures(self, name):
        """str(axis) is read as the same axis, and with its sizes gives it back; so do all axes of a spec together."""
        model, spec = derived(name)
        axes = [axis for axes in spec.axes.values() for axis in axes]
        assert [parse_axis(str(axis)) for axis in axes] == [described(axis) for axis in axes]
        made = spec_from_signatures(model, {n: ", ".join(map(sized, axes)) for n, axes in spec.axes.items() if axes})
        assert made.spaces == spec.spaces
        assert made.axes == spec.axes
        if name != "grouped_conv":  # read where it is made; see `test_a_grouped_convolution_is_read_as_derived`
            assert set(spec.taps) <= set(made.taps)

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("hidden", Leaf("hidden")),
            (" ( hidden ) ", Leaf("hidden")),
            ("_", Leaf("")),
            ("_12", Leaf("", 12)),
            ("heads:12", Leaf("heads", 12)),
            ("layers.*.vo_2:4@layers.*.heads", Leaf("layers.*.vo_2", 4, "layers.*.heads")),
            ("a+b", Group(Concat, (Leaf("a"), Leaf("b")))),
            ("(a + b)", Group(Concat, (Leaf("a"), Leaf("b")))),
            ("a + (b + _1)", Group(Concat, (Leaf("a"), Leaf("b"), Leaf("", 1)))),
            ("((a b) c)", Group(Product, (Leaf("a"), Leaf("b"), Leaf("c")))),
            (
                "(heads (qk@heads + qk@heads + vo@heads))",
                Group(
                    Product,
                    (
                        Leaf("heads"),
                        Group(
                            Concat, (Leaf("qk", None, "heads"), Leaf("qk", None, "heads"), Leaf("vo", None, "heads"))
                        ),
                    ),
                ),
            ),
            ("(_3 a) + b", Group(Concat, (Group(Product, (Leaf("", 3), Leaf("a"))), Leaf("b")))),
        ],
    )
    def test_by_hand(self, text, expected):
        assert parse_axis(text) == expected


def network(**members) -> nn.Module:
    return modules.Network(lambda net, x: x, **members)


def spec_of(table: dict[str, str], **members) -> PermutationSpec:
    return spec_from_signatures(network(**members), table)


class TestSizes:
    def test_solved_through_several_tensors(self):
        spec = spec_of(
            {
                "a.weight": "(heads (qk@heads + qk@heads + vo@heads)), _",
                "b.weight": "_, (heads vo@heads)",
                "s": "heads",
            },
            a=nn.Linear(12, 48),
            b=nn.Linear(18, 5),
            s=modules.parameter(3),
        )
        assert {name: space.size for name, space in spec.spaces.items()} == {"heads": 3, "qk": 5, "vo": 6}

    @pytest.mark.parametrize("text", ["(hidden hidden)", "hidden + (_4 hidden) + hidden_2:3", "hidden:3 + hidden_2"])
    def test_solved_in_one_tensor(self, text):
        spec = spec_of({"a.weight": f"_, {text}"}, a=nn.Linear(9 if "_4" not in text else 18, 5))
        assert spec.spaces["hidden"].size == 3
        assert spec.axes["a.weight"][0] == Frozen(5)

    def test_an_open_stretch_takes_what_is_left(self):
        spec = spec_of({"a.weight": "_ + hidden, (_ residual)", "b.weight": "hidden, residual"}, **pair(9, 12, 5, 6))
        assert list(map(str, spec.axes["a.weight"])) == ["_4 + hidden", "(_2 residual)"]

    def test_spaces_of_one_unit_are_frozen(self):
        """One head: what is nested in it is not nested any more."""
        spec = spec_of({"a.weight": "(heads:1 qk@heads), _", "b.weight": "hidden, residual"}, **pair(4, 3, 1, 6))
        assert spec.spaces.keys() == {"qk", "residual"}
        assert spec.spaces["qk"].parent is None
        assert str(spec.axes["a.weight"][0]) == "(_1 qk)"
        assert spec.axes["b.weight"][0].reason == "size 1"


def pair(out_a: int, in_a: int, out_b: int, in_b: int) -> dict[str, nn.Module]:
    return {"a": nn.Linear(in_a, out_a), "b": nn.Linear(in_b, out_b)}


class TestTensors:
    def test_only_floating_tensors_are_listed(self):
        norm = nn.BatchNorm1d(6)
        spec = spec_of({"a.weight": "hidden, _", "n.*": "hidden"}, a=nn.Linear(12, 6), n=norm)
        assert spec.axes.keys() == {"a.weight", "a.bias", "n.weight", "n.bias", "n.running_mean", "n.running_var"}

    def test_buffers_that_are_not_saved_cannot_move(self):
        net = network(a=nn.Linear(12, 6), b=nn.Linear(6, 3))
        net.register_buffer("scale", torch.ones(6), persistent=False)
        table = {"a.weight": "hidden, _", "b.weight": "_, hidden"}
        assert spec_from_signatures(net, table | {"scale": "_"}).axes["scale"] == (Frozen(6),)
        with pytest.raises(
            UsageError, match=r'^scale is not saved with the model, so it cannot move: write "_" for its'
        ):
            spec_from_signatures(net, table | {"scale": "hidden"})

    def test_tied_tensors_are_one(self):
        net = network(a=nn.Linear(6, 6), b=nn.Linear(6, 6))
        net.b.weight = net.a.weight
        spec = spec_from_signatures(net, {"*.weight": "_, hidden"})
        assert spec.axes.keys() == {"a.weight", "a.bias", "b.bias"}
        assert [str(tap) for tap in spec.taps] == [f"input of {layer}, axis -1: hidden" for layer in "ab"]
        with pytest.raises(
            UsageError, match=r'^"b.weight" fits no floating tensor of Network; name a.weight, which it is'
        ):
            spec_from_signatures(net, {"b.weight": "_, hidden"})


class TestTaps:
    def taps(self, weight: str, layer: nn.Module, **members) -> list[str]:
        return [str(tap) for tap in spec_of({"a.weight": weight}, a=layer, **members).taps]

    @pytest.mark.parametrize(
        ("layer", "rest"),
        [
            (nn.Linear(6, 5), ""),
            (nn.Conv1d(6, 5, 1), ", _"),
            (nn.Conv2d(6, 5, 3), ", _, _"),
            (nn.Conv3d(6, 5, 1), ", _, _, _"),
        ],
    )
    def test_layers(self, layer, rest):
        dim = 1 if rest else -1
        assert self.taps(f"_, hidden{rest}", layer) == [f"input of a, axis {dim}: hidden"]
        assert self.taps(f"hidden, _{rest}", layer) == [f"output of a, axis {dim}: hidden"]
        both = [f"input of a, axis {dim}: residual", f"output of a, axis {dim}: hidden"]
        assert self.taps(f"hidden, residual{rest}", layer) == both

    @pytest.mark.parametrize(
        ("layer", "rest"),
        [
            (Conv1D(5, 6), ""),
            (nn.ConvTranspose1d(6, 5, 1), ", _"),
            (nn.ConvTranspose2d(6, 5, 3), ", _, _"),
            (nn.ConvTranspose3d(6, 5, 1), ", _, _, _"),
        ],
    )
    def test_layers_whose_weight_has_the_input_first(self, layer, rest):
        dim = 1 if rest else -1
        assert self.taps(f"hidden, _{rest}", layer) == [f"input of a, axis {dim}: hidden"]
        assert self.taps(f"_, hidden{rest}", layer) == [f"output of a, axis {dim}: hidden"]

    def test_a_grouped_transposed_convolution(self):
        layer = nn.ConvTranspose2d(12, 8, 3, groups=4)
        taps = self.taps("(hidden:4 hidden_2@hidden), hidden_3, _, _", layer)
        assert taps == [
            "input of a, axis 1: (hidden hidden_2@hidden)",
            "output of a, axis 1: (hidden hidden_3)",
        ]

    @pytest.mark.parametrize(
        ("groups", "weight", "expected"),
        [
            (4, "(hidden:4 hidden_2@hidden), hidden_3, _, _", "input of a, axis 1: (hidden hidden_3)"),
            (4, "_, hidden, _, _", "input of a, axis 1: (_4 hidden)"),
            (2, "(_ hidden:4), hidden_2, _, _", "input of a, axis 1: (_2 hidden_2)"),
            (8, "hidden, _, _, _", "input of a, axis 1: hidden"),
            (4, "hidden, hidden_2, _, _", "output of a, axis 1: hidden"),  # no group to be seen
        ],
    )
    def test_grouped_convolutions(self, groups, weight, expected):
        layer = nn.Conv2d(8, 8, 3, groups=groups)
        reader = nn.Conv2d(layer.weight.shape[1], 5, 1)
        table = {"a.weight": weight} | ({"b.weight": "_, hidden_2, _, _"} if "hidden_2, _, _" in weight else {})
        assert expected in [str(tap) for tap in spec_of(table, a=layer, b=reader).taps]

    def test_a_grouped_convolution_is_read_as_derived(self):
        """The derived spec reads what goes into it where it is made: the axes are the same."""
        model, spec = derived("grouped_conv")
        table = {name: ", ".join(map(sized, axes)) for name, axes in spec.axes.items()}
        tap = next(tap for tap in spec_from_signatures(model, table).taps if (tap.module, tap.side) == ("b", "input"))
        assert tap.axis == spec.axes["a.weight"][0]

    def test_untapped(self):
        layers = pair(6, 12, 3, 6)
        table = {"a.weight": "hidden, _", "b.weight": "_, hidden"}
        places = [(), ["input of b"], ["* of b"]]
        taps = [spec_from_signatures(network(**layers), table, untapped=place).taps for place in places]
        assert [[str(tap) for tap in found] for found in taps] == [
            ["input of b, axis -1: hidden"],
            ["output of a, axis -1: hidden"],
            ["output of a, axis -1: hidden"],
        ]
        with pytest.raises(
            UsageError, match=r'^untapped: "input of c" is the input or output of no layer; the closest'
        ):
            spec_from_signatures(network(**layers), table, untapped=["input of c"])

    def test_the_projections_of_multihead_attention(self):
        """Its layers are used without being called."""
        module, inputs = modules.build("multihead_attention")
        rows = "(heads:3 qk@heads) + (heads qk@heads) + (heads vo@heads)"
        table = {"m.in_proj_weight": f"{rows}, _", "m.in_proj_bias": rows, "o.weight": "_, residual"}
        table |= {"m.out_proj.weight": "residual, (heads vo@heads)", "m.out_proj.bias": "residual"}
        spec = spec_from_signatures(module, table)
        assert [str(tap) for tap in spec.taps] == [
            "input of o, axis -1: residual",
            "query of m, axis -1: (heads qk@heads)",
            "key of m, axis -1: (heads qk@heads)",
            "value of m, axis -1: (heads vo@heads)",
        ]
        verify(module, spec, inputs)
        statistics = collect_statistics(module, spec.taps, [inputs], points=[tiny.tensors(module)])
        assert [one.count for one in statistics] == [10] * 4

    def test_copies_of_one_projection(self):
        spec = spec_of({"m.in_proj_weight": "(_3 heads:3 qk@heads), _"}, m=nn.MultiheadAttention(12, 3))
        expected = [(side, "(heads qk@heads)") for side in ("query", "key", "value")]
        assert [(tap.side, str(tap.axis)) for tap in spec.taps] == expected

    @pytest.mark.parametrize("rows", ["(heads:3 qk@heads)", "_4 + hidden", "_4 + hidden + _8"])
    def test_packed_projections_that_show_no_thirds(self, rows):
        with pytest.raises(UsageError, match="has no tap"):
            spec_of({"m.in_proj_weight": f"{rows}, _"}, m=nn.MultiheadAttention(12, 3))

    def test_every_tap_of_the_hand_written_vit_is_read(self):
        model = tiny.model("vit")
        spec = by_hand("vit")
        found = collect_statistics(model, spec.taps, [example_inputs(model)], points=[tiny.tensors(model)])
        assert [len(one.products) for one in found] == [tap.axis.size for tap in spec.taps]
        by_place = {(tap.module, tap.side): one.products for tap, one in zip(spec.taps, found, strict=True)}
        q, k, _ = (by_place[f"vit.layers.0.attention.{name}_proj", "input"] for name in "qkv")
        assert torch.equal(q, k)  # the same tensor, read twice


FC = {"fc1": nn.Linear(12, 10), "fc2": nn.Linear(10, 12)}
MISTAKES = {
    "no such tensor": (
        {"fc1.weigth": "hidden, _"},
        '"fc1.weigth" fits no floating tensor of Network; the closest name is "fc1.weight"',
    ),
    "a star for a dot": (
        {"*": "hidden, _"},
        r'"\*" fits no floating tensor of Network; the closest name is ".*"',
    ),
    "rank": ({"fc1.weight": "hidden, residual, _"}, 'fc1.weight has 2 axes, its signature "hidden, residual, _" 3: '),
    "blanks between axes": (
        {"fc1.weight": "hidden residual"},
        'the signature of "fc1.weight": "hidden residual" has blanks outside of parentheses: write "\\(a b\\)" for a '
        'product, "a, b" for two axes',
    ),
    "length": (
        {"fc1.weight": "hidden, (heads:4 qk:4@heads)"},
        r'axis 1 of fc1.weight has 12 positions, "\(heads:4 qk:4@heads\)" makes 16 of them \(heads = 4 by axis 1 of '
        r"fc1.weight, qk = 4 by axis 1 of fc1.weight\)",
    ),
    "length of a space found elsewhere": (
        {"fc1.weight": "hidden, residual", "fc2.weight": "residual, residual"},
        'axis 1 of fc2.weight has 10 positions, "residual" makes 12 of them \\(residual = 12 by '
        r"axis 1 of fc1.weight\)",
    ),
    "length of positions": ({"fc1.bias": "_11"}, 'axis 0 of fc1.bias has 10 positions, "_11" makes 11 of them'),
    "no size fits": (
        {"fc1.weight": "hidden, (heads:5 qk@heads)"},
        r'axis 1 of fc1.weight has 12 positions, and no size of "qk" makes "\(heads:5 qk@heads\)" that long',
    ),
    "no room": (
        {"fc1.weight": "hidden, residual", "fc2.weight": "_ + residual, hidden"},
        r'axis 0 of fc2.weight has 12 positions, and no size of "_" makes "_ \+ residual" that long \(residual = 12',
    ),
    "open": (
        {"fc1.weight": "_, (heads qk@heads)"},
        r'the size of heads and of qk is open: axis 1 of fc1.weight, "\(heads qk@heads\)", has 12 positions in all; '
        r'write a size at one place, as in "heads:N"',
    ),
    "open positions": ({"fc1.bias": "_ + _"}, 'axis 0 of fc1.bias, "_ \\+ _", has several "_": write their lengths'),
    "two sizes": (
        {"fc1.weight": "hidden:10, _", "fc2.weight": "_, hidden:5"},
        "axis 1 of fc2.weight states hidden:5, axis 0 of fc1.weight hidden:10",
    ),
    "unknown kind": (
        {"fc1.bias": "fc1.stream"},
        'axis 0 of fc1.bias, "fc1.stream": the name "fc1.stream" tells no kind: let its last part be one of residual, '
        r"hidden, heads, qk, vo \(or hidden_2, ...\)",
    ),
    "outside of its parent": (
        {"fc1.weight": "(vo@heads heads:2), _"},
        r'axis 0 of fc1.weight, "\(vo@heads heads:2\)": "vo@heads" must stand to the right of heads in a product',
    ),
    "a parent in another part": ({"fc1.bias": "heads + vo@heads"}, '"vo@heads" must stand to the right of heads'),
    "two possible parents": (
        {"fc1.weight": "_, (a.heads:2 b.heads:2 vo@heads)"},
        '"vo@heads" can be nested in a.heads or b.heads: give the full name',
    ),
    "two parents": (
        {"fc1.weight": "(heads:2 vo@heads), _", "fc2.weight": "_, (heads vo)"},
        'axis 1 of fc2.weight has "vo" nested in nothing, axis 0 of fc1.weight in heads: write the same parent '
        "everywhere",
    ),
    "two levels": (
        {"fc1.weight": "_, (heads:2 hidden:3@heads vo@hidden)"},
        'axis 1 of fc1.weight has "vo" nested in hidden, which is itself nested in heads: only one level is possible; '
        'leave "@hidden" out',
    ),
    "twice": (
        {"fc1.weight": "hidden, _", "*.weight": "hidden, _"},
        r'fc1.weight is named twice, by "fc1.weight" and by "\*.weight": make one narrower',
    ),
    "too many stars": (
        {"*.bias": "*.*.hidden"},
        r'axis 0 of fc1.bias, "\*.\*.hidden": "\*.\*.hidden" has 2 "\*", more than the tensor\'s name has \(1\)',
    ),
    "no tap": (
        {"fc1.bias": "hidden"},
        'the space "hidden" has no tap: no linear or convolution layer reads or makes it; write "_" in its place',
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_in_a_table(case):
    table, message = MISTAKES[case]
    with pytest.raises(UsageError, match=f"^(axis .*: )?{message}"):
        spec_of(table, **FC)


BAD_AXES = [
    ("(heads vo@heads", r'"\(heads vo@heads" has unbalanced parentheses: 1 "\(" and 0 "\)"'),
    ("heads)", r'"heads\)" has unbalanced parentheses: 0 "\(" and 1 "\)"'),
    (")heads(", r'"\)heads\(": expected a space .*, got \'\)\''),
    ("heads )(", r'"heads \)\(": the axis ends before \'\)\'; give one axis'),
    ("", '"": expected a space .*, got nothing'),
    ("()", r'"\(\)": expected a space .*, got \'\)\''),
    ("a +", r'"a \+": expected a space .*, got nothing'),
    ("a + + b", r"got '\+'"),
    ("heads:", "got 'heads:'"),
    ("heads:0", "got 'heads:0'"),
    ("vo@", "got 'vo@'"),
    ("vo@heads:3", "got 'vo@heads:3'"),
    ("a, b", "the axis ends before ','; give one axis"),
    ("(a, b)", r'"\(a, b\)" has a comma inside of parentheses: blanks separate the factors of a product'),
    ("(a b + c)", r'"\(a b \+ c\)" has both "\+" and blanks in one place: put parentheses round the inner ones'),
    ("a b", '"a b" has blanks outside of parentheses'),
]


@pytest.mark.parametrize(("text", "message"), BAD_AXES)
def test_mistakes_in_an_axis(text, message):
    with pytest.raises(UsageError, match=message):
        parse_axis(text)


def test_mistakes_in_an_axis_tell_the_tensor():
    with pytest.raises(UsageError, match=r'^the signature of "fc1.weight": "\(hidden, _" has unbalanced parentheses'):
        spec_of({"fc1.weight": "(hidden, _"}, **FC)


class TestRegistry:
    @pytest.fixture(autouse=True)
    def _empty(self, monkeypatch):
        monkeypatch.setattr(registry, "_SPECS", {})

    def test_nothing_is_registered(self):
        assert registered_spec(tiny.model("vit")) is None
        assert registered_spec(network()) is None

    def test_the_class_name_comes_before_the_model_type(self):
        by_type, by_class = (PermutationSpec({}, {}, (), (name,)) for name in ("type", "class"))
        model = tiny.model("vit")
        assert register_spec("vit", lambda model: by_type)(model) is by_type
        assert registered_spec(model) is by_type
        register_spec("ViTForImageClassification", lambda model: by_class)
        assert registered_spec(model) is by_class

    def test_a_decorator_leaves_the_function_as_it_is(self):
        @register_spec("Network")
        def spec(model):
            return spec_from_signatures(model, {"fc1.weight": "hidden, _"})

        net = network(**FC)
        assert registered_spec(net) == spec(net)
        assert spec(net).taps == (Tap("fc1", "output", -1, Atom("hidden", 10)),)

    def test_the_last_one_counts(self):
        for number in range(2):
            register_spec("Network", lambda model, number=number: number)
        assert registered_spec(network()) == 1


class TestPage:
    def example(self, source: str) -> dict:
        scope: dict = {}
        exec(compile(source, "own_spec.md", "exec"), scope)
        return scope

    @pytest.fixture
    def source(self, monkeypatch):
        monkeypatch.setattr(registry, "_SPECS", {})
        torch.manual_seed(0)
        (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
        return block

    def test_the_example_runs(self, source, capsys):
        scope = self.example(source)
        error, *lines = capsys.readouterr().out.splitlines()
        assert float(error) < 1e-12
        assert lines == [
            "residual (12,) residual",
            *(
                line
                for block in range(2)
                for line in (
                    f"blocks.{block}.heads (3,) heads",
                    f"blocks.{block}.qk (3, 4) qk",
                    f"blocks.{block}.hidden (20,) hidden",
                )
            ),
        ]
        with pytest.raises(PurificationError, match="the graph of EarlyExit cannot be exported"):
            derive_spec(scope["model"], {"pixel_values": torch.randn(2, 6, 7)})

    def test_so_does_what_it_says_of_q_k_and_v(self, source, capsys):
        (better,) = re.findall(r"v: write\s+`(.*?)`", PAGE, re.DOTALL)
        source = source.replace("(_3 {heads} blocks.*.qk@heads)", better)
        source = source.replace("residual, ({heads} blocks.*.qk@heads)", "residual, ({heads} blocks.*.vo@heads)")
        spec = self.example(source)["spec"]
        assert {name.rpartition(".")[2] for name in spec.spaces} == {"residual", "heads", "qk", "vo", "hidden"}
        assert float(capsys.readouterr().out.splitlines()[0]) < 1e-12

    def test_its_messages_are_those_of_the_code(self):
        rows = re.findall(r"^\| `(.+?)` \| ", PAGE.partition("## Errors")[2], re.MULTILINE)
        raised = [message_of(lambda table=table: spec_of(table, **FC)) for table, _ in MISTAKES.values()]
        raised += [message_of(lambda text=text: parse_axis(text)) for text, _ in BAD_AXES]
        assert len(rows) > 8
        assert [row for row in rows if not any(row in text.replace("Network", "MyNet") for text in raised)] == []


def message_of(function: Callable[[], object]) -> str:
    with pytest.raises(UsageError) as caught:
        function()
    return str(caught.value)
