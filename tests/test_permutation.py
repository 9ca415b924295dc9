"""The group of a spec: laws on random elements, nested spaces included; declarations are checked."""

import json

import pytest
import tiny
import torch

from hf_tsc.axes import Atom, Frozen, Product
from hf_tsc.permutation import (
    PermutationSpec,
    Space,
    Tap,
    apply,
    compose,
    identity,
    invert,
    moved_fraction,
    roll,
)

SPACES = {
    "stream": Space("stream", 5, "residual"),
    "heads": Space("heads", 3, "heads"),
    "vo": Space("vo", 4, "vo", "heads"),
}
HEADS = Product((Atom("heads", 3), Atom("vo", 4, "heads")))
AXES = {
    "v": (HEADS, Atom("stream", 5)),
    "o": (Atom("stream", 5), HEADS),
    "out": (Frozen(2, "model output"), Atom("stream", 5)),
}
SPEC = PermutationSpec(SPACES, AXES, (Tap("o", "input", -1, HEADS),))


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"v": (12, 5), "o": (5, 12), "out": (2, 5), "other": (7,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(params=range(3))
def three(request):
    return [tiny.random_permutation(SPEC, seed=10 * request.param + k) for k in range(3)]


class TestGroup:
    def test_compose_is_one_after_the_other(self, three):
        p, q, _ = three
        both = apply(weights(), SPEC, compose(SPEC, p, q))
        assert same(both, apply(apply(weights(), SPEC, p), SPEC, q))
        assert not same(both, apply(apply(weights(), SPEC, q), SPEC, p))  # the group does not commute

    def test_associative(self, three):
        p, q, r = three
        assert same(compose(SPEC, compose(SPEC, p, q), r), compose(SPEC, p, compose(SPEC, q, r)))

    def test_inverse_on_both_sides(self, three):
        p = three[0]
        assert same(compose(SPEC, p, invert(SPEC, p)), identity(SPEC))
        assert same(compose(SPEC, invert(SPEC, p), p), identity(SPEC))
        assert same(apply(apply(weights(), SPEC, p), SPEC, invert(SPEC, p)), weights())
        assert not same(invert(SPEC, p), p)

    def test_inverse_of_a_product(self, three):
        p, q, _ = three
        assert same(invert(SPEC, compose(SPEC, p, q)), compose(SPEC, invert(SPEC, q), invert(SPEC, p)))

    def test_identity(self, three):
        assert same(compose(SPEC, identity(SPEC), three[0]), three[0])
        assert same(compose(SPEC, three[0], identity(SPEC)), three[0])
        assert same(apply(weights(), SPEC, identity(SPEC)), weights())

    @pytest.mark.parametrize("family", ["vit", "clip"])
    def test_laws_on_derived_specs(self, family):
        spec = tiny.spec(family)
        p, q = (tiny.random_permutation(spec, seed=k) for k in range(2))
        assert same(compose(spec, p, invert(spec, p)), identity(spec))
        theta = tiny.tensors(tiny.random_model(family))
        assert same(apply(apply(theta, spec, p), spec, q), apply(theta, spec, compose(spec, p, q)))


class TestApply:
    def test_by_hand(self):
        p = {
            "stream": torch.tensor([4, 0, 1, 3, 2]),
            "heads": torch.tensor([1, 2, 0]),
            "vo": torch.tensor([[3, 0, 1, 2], [1, 0, 3, 2], [2, 3, 1, 0]]),
        }
        theta = weights()
        moved = apply(theta, SPEC, p)
        for i in range(3):
            for j in range(4):
                source = 4 * p["heads"][i] + p["vo"][i, j]
                assert torch.equal(moved["v"][4 * i + j], theta["v"][source][p["stream"]])
                assert torch.equal(moved["o"][:, 4 * i + j], theta["o"][p["stream"], source])
        assert torch.equal(moved["out"], theta["out"][:, p["stream"]])

    def test_inputs_are_not_written_to(self):
        theta, p = weights(), roll(SPEC)
        moved = apply(theta, SPEC, p)
        for tensor in moved.values():
            if tensor is not theta["other"]:
                tensor.zero_()
        assert same(theta, weights())
        assert same(p, roll(SPEC))

    def test_a_tensor_that_the_spec_does_not_list_is_passed_through(self):
        theta = weights()
        assert apply(theta, SPEC, roll(SPEC))["other"] is theta["other"]

    def test_part_of_the_tensors(self):
        assert apply({"out": weights()["out"]}, SPEC, roll(SPEC)).keys() == {"out"}

    def test_a_wrong_shape(self):
        with pytest.raises(ValueError, match=r"v has shape \(12, 4\), the spec was made for \(12, 5\)"):
            apply({"v": torch.zeros(12, 4)}, SPEC, identity(SPEC))

    def test_a_missing_space(self):
        p = identity(SPEC)
        del p["heads"]
        with pytest.raises(ValueError, match="no entry for the space 'heads'; give one for every space"):
            apply(weights(), SPEC, p)

    def test_an_inner_permutation_that_is_not_one_a_block(self):
        with pytest.raises(ValueError, match=r"vo: shape \(4,\) given, \(3, 4\) expected"):
            apply(weights(), SPEC, {**identity(SPEC), "vo": torch.arange(4)})


class TestRoll:
    def test_no_fixed_points_and_another_roll_in_each_block(self):
        p = roll(SPEC)
        assert all(fraction == 1 for fraction in moved_fraction(p).values())
        assert len({tuple(row) for row in p["vo"].tolist()}) == 3

    def test_outer_spaces_are_not_their_own_inverses(self):
        for name in ("stream", "heads"):
            assert not torch.equal(roll(SPEC)[name], invert(SPEC, roll(SPEC))[name])

    def test_a_block_of_one_unit(self):
        spaces = {"h": Space("h", 2, "heads"), "d": Space("d", 1, "vo", "h")}
        spec = PermutationSpec(spaces, {}, ())
        assert roll(spec)["d"].tolist() == [[0], [0]]


def test_moved_fraction():
    p = {"a": torch.tensor([0, 2, 1, 3]), "b": torch.tensor([[0, 1], [1, 0]])}
    assert moved_fraction(p) == {"a": 0.5, "b": 0.5}
    assert set(moved_fraction(identity(SPEC)).values()) == {0}


class TestDeclaration:
    @pytest.mark.parametrize(
        ("axis", "message"),
        [
            (Atom("nobody", 5), "axis 0 of w names the space 'nobody', which is not declared"),
            (Atom("stream", 6), "axis 0 of w has stream of size 6, but the space is declared as .*size=5"),
            (Atom("vo", 4), "axis 0 of w has vo of size 4, but the space is declared as .*parent='heads'"),
            (Atom("vo", 4, "heads"), "'vo' is nested in 'heads' but stands outside of it"),
            (Product((Atom("stream", 5), Atom("vo", 4, "heads"))), "stands outside of it"),
        ],
    )
    def test_axes_are_checked(self, axis, message):
        with pytest.raises(ValueError, match=message):
            PermutationSpec(SPACES, {"w": (axis,)}, ())

    def test_taps_are_checked(self):
        with pytest.raises(ValueError, match="the tap at fc names the space 'nobody'"):
            PermutationSpec(SPACES, {}, (Tap("fc", "input", -1, Atom("nobody", 5)),))

    def test_queries(self):
        assert [space.name for space in SPEC.children("heads")] == ["vo"]
        assert SPEC.children("stream") == []
        assert list(SPEC.members("vo")) == [("v", 0), ("o", 1)]
        assert list(SPEC.members("stream")) == [("v", 1), ("o", 0), ("out", 1)]
        assert list(SPEC.moved()) == [("v", 0), ("v", 1), ("o", 0), ("o", 1), ("out", 1)]
        assert SPEC.shape("vo") == (3, 4)
        assert SPEC.shape("stream") == (5,)

    def test_description_is_json(self):
        made = json.loads(json.dumps(SPEC.to_dict()))
        assert made["spaces"]["vo"] == {
            "size": 4,
            "kind": "vo",
            "parent": "heads",
            "taps": ["input of o, axis -1: (heads vo@heads)"],
        }
        assert made["tensors"]["out"][0] == {"axis": "_2", "size": 2, "frozen": "model output"}
        assert made["tensors"]["v"][0] == {"axis": "(heads vo@heads)", "size": 12}
        assert made["unknown_ops"] == []
