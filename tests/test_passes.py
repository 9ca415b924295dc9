"""Passes: the same permutation whatever memory there is, and no more matrices at once than allowed."""

import pytest
import tiny
import torch

from hf_tsc import passes
from hf_tsc.activations import collect_statistics, matrix_bytes
from hf_tsc.axes import Atom, Concat, Frozen, atoms
from hf_tsc.errors import UsageError
from hf_tsc.matching import match
from hf_tsc.passes import match_networks, parts
from hf_tsc.permutation import KINDS, PermutationSpec, Space, Tap, identity

IMAGES = 12
FAMILIES = [*tiny.CLASSIFIERS, "resnet_bottleneck"]


def batches():
    return iter(tiny.digit_batches(IMAGES, 5))


def points(family: str, count: int):
    return [tiny.tensors(tiny.random_model(family, seed=seed)) for seed in range(count)]


def largest(spec: PermutationSpec, kinds=KINDS) -> int:
    """Bytes of what has to stay together."""
    return max(matrix_bytes(part.taps) for part in parts(spec, kinds, 0))


class TestParts:
    @pytest.mark.parametrize("family", tiny.FAMILIES)
    @pytest.mark.parametrize("share", [None, 0.0, 0.3, 0.6])
    def test_every_space_and_tap_is_in_one_part(self, family, share):
        spec = tiny.spec(family)
        limit = None if share is None else round(share * matrix_bytes(spec.taps))
        found = parts(spec, KINDS, limit)
        assert sorted(name for part in found for name in part.spaces) == sorted(spec.spaces)
        assert sorted(str(tap) for part in found for tap in part.taps) == sorted(map(str, spec.taps))
        for part in found:
            assert [tap for tap in spec.taps if tap in part.taps] == list(part.taps)
            assert {atom.space for tap in part.taps for atom in atoms(tap.axis)} == part.spaces.keys()
        if limit is None:
            assert len(found) == 1

    @pytest.mark.parametrize("family", FAMILIES)
    def test_as_large_as_allowed(self, family):
        spec = tiny.spec(family)
        limit = 2 * largest(spec)
        found = parts(spec, KINDS, limit)
        assert all(matrix_bytes(part.taps) <= limit for part in found)
        assert 1 < len(found) < len(parts(spec, KINDS, 0))

    def test_what_cannot_move_is_left_out(self):
        spec = tiny.spec("vit")
        (part,) = parts(spec, ["hidden"])
        assert {space.kind for space in part.spaces.values()} == {"hidden"}
        assert len(part.taps) == tiny.LAYERS
        (part,) = parts(spec, ["vo"])  # in the heads
        assert {space.kind for space in part.spaces.values()} == {"heads", "qk", "vo"}
        assert parts(spec, []) == []

    def test_spaces_that_share_a_tap_stay_together(self):
        a, b, c, d = (Atom(name, size) for name, size in zip("abcd", (2, 3, 4, 5), strict=True))
        taps = [Tap("m", "input", -1, axis) for axis in (Concat((a, b)), Concat((Frozen(2), c)), d, Concat((b, c)), d)]
        spaces = {atom.space: Space(atom.space, atom.size, "hidden") for atom in (a, b, c, d)}
        lonely = {"e": Space("e", 9, "hidden")}  # is read nowhere
        found = parts(PermutationSpec(spaces | lonely, {}, tuple(taps)), KINDS, 0)
        assert [set(part.spaces) for part in found] == [set("abc"), set("d")]
        assert [len(part.taps) for part in found] == [3, 2]


class TestPasses:
    def run(self, family, monkeypatch, *, networks, share=None, **options):
        """The permutation, and the bytes of matrices collected in every pass."""
        held = []

        def watch(model, taps, *args, **kwargs):
            held.append(matrix_bytes(taps))
            return collect_statistics(model, taps, *args, **kwargs)

        monkeypatch.setattr(passes, "collect_statistics", watch)
        limit = None if share is None else round(share * largest(tiny.spec(family)))
        model, maximize = tiny.random_model(family), networks == 2
        permutation = match_networks(
            model,
            tiny.spec(family),
            batches,
            points=points(family, networks),
            maximize=maximize,
            memory_limit=limit,
            **options,
        )
        return permutation, held, limit

    @pytest.mark.parametrize("max_positions", [None, 2])
    @pytest.mark.parametrize("networks", [1, 2])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_several_give_what_one_gives(self, family, networks, max_positions, monkeypatch):
        spec, options = tiny.spec(family), {"networks": networks, "max_positions": max_positions, "seed": 5}
        once, whole, _ = self.run(family, monkeypatch, **options)
        assert whole == [matrix_bytes(spec.taps)]
        for share in (1.0, 1.4):
            found, held, limit = self.run(family, monkeypatch, share=networks * share, **options)
            assert len(held) > 1
            assert max(held) <= limit / networks
            assert found.keys() == once.keys()
            assert all(torch.equal(found[name], once[name]) for name in once)

    def test_only_what_may_move_is_read(self, monkeypatch):
        found, held, _ = self.run("vit", monkeypatch, networks=1, kinds=["hidden"])
        assert held == [matrix_bytes(parts(tiny.spec("vit"), ["hidden"])[0].taps)]
        model, spec = tiny.random_model("vit"), tiny.spec("vit")
        readings = collect_statistics(model, spec.taps, batches(), points=points("vit", 1))
        expected = match(spec, readings, maximize=False, kinds=["hidden"])
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_without_anything_to_move_nothing_is_read(self, monkeypatch):
        found, held, _ = self.run("vit", monkeypatch, networks=1, kinds=[])
        assert held == []
        assert all(torch.equal(perm, found[name]) for name, perm in identity(tiny.spec("vit")).items())

    def test_a_limit_below_the_taps_of_one_space(self, monkeypatch):
        with pytest.raises(UsageError, match=r"the matrices of \d+ taps take"):
            self.run("vit", monkeypatch, networks=1, share=0.9)
