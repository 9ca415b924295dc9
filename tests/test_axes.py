"""Axis trees: sizes, notation, index vectors and places of units, against loops over the indices written out."""

import pytest
import torch

from hf_tsc.axes import Atom, Concat, Frozen, Product, atoms, index, is_frozen, positions

HEADS, INNER, STREAM = Atom("heads", 3), Atom("vo", 4, "heads"), Atom("stream", 5)
PERMUTATION = {
    "heads": torch.tensor([1, 2, 0]),
    "vo": torch.tensor([[3, 0, 1, 2], [1, 0, 3, 2], [2, 3, 1, 0]]),  # row i: the new head i
    "stream": torch.tensor([4, 0, 1, 3, 2]),
}
P = PERMUTATION


def heads_index(i: int, j: int) -> int:
    """Where unit j of the new head i comes from."""
    return 4 * int(P["heads"][i]) + int(P["vo"][i, j])


AXES = {
    "stream": (STREAM, [int(P["stream"][i]) for i in range(5)]),
    "_3": (Frozen(3), [0, 1, 2]),
    "(heads vo@heads)": (Product((HEADS, INNER)), [heads_index(i, j) for i in range(3) for j in range(4)]),
    "(_2 stream)": (Product((Frozen(2), STREAM)), [5 * c + int(P["stream"][i]) for c in range(2) for i in range(5)]),
    "(stream _2)": (Product((STREAM, Frozen(2))), [2 * int(P["stream"][i]) + c for i in range(5) for c in range(2)]),
    "(_2 heads vo@heads)": (
        Product((Frozen(2), HEADS, INNER)),
        [12 * c + heads_index(i, j) for c in range(2) for i in range(3) for j in range(4)],
    ),
    "(heads _2 vo@heads)": (
        Product((HEADS, Frozen(2), INNER)),
        [8 * int(P["heads"][i]) + 4 * c + int(P["vo"][i, j]) for i in range(3) for c in range(2) for j in range(4)],
    ),
    "(heads stream)": (
        Product((HEADS, STREAM)),
        [5 * int(P["heads"][i]) + int(P["stream"][j]) for i in range(3) for j in range(5)],
    ),
    "_1 + stream + (heads vo@heads)": (
        Concat((Frozen(1), STREAM, Product((HEADS, INNER)))),
        [
            0,
            *(1 + int(P["stream"][i]) for i in range(5)),
            *(6 + heads_index(i, j) for i in range(3) for j in range(4)),
        ],
    ),
    "(heads (vo@heads + _1))": (
        Product((HEADS, Concat((INNER, Frozen(1))))),
        [5 * int(P["heads"][i]) + (int(P["vo"][i, j]) if j < 4 else 4) for i in range(3) for j in range(5)],
    ),
}


class TestIndex:
    @pytest.mark.parametrize(("axis", "expected"), AXES.values(), ids=AXES)
    def test_equals_the_loop(self, axis, expected):
        found = index(axis, PERMUTATION)
        assert found.dtype == torch.int64
        assert found.tolist() == expected
        assert axis.size == len(expected)

    @pytest.mark.parametrize("text", AXES)
    def test_notation(self, text):
        assert str(AXES[text][0]) == text

    @pytest.mark.parametrize(
        "axis", [INNER, Product((STREAM, INNER)), Concat((HEADS, INNER)), Product((INNER, HEADS))]
    )
    def test_an_inner_space_outside_its_parent(self, axis):
        with pytest.raises(ValueError, match="'vo' is nested in 'heads' but stands outside of it"):
            index(axis, PERMUTATION)

    def test_atoms_from_left_to_right(self):
        assert list(atoms(Concat((STREAM, Frozen(2), Product((HEADS, INNER)))))) == [STREAM, HEADS, INNER]

    @pytest.mark.parametrize(
        ("axis", "expected"),
        [(Frozen(2), True), (Product((Frozen(2), Concat((Frozen(1), Frozen(3))))), True), (STREAM, False)],
    )
    def test_is_frozen(self, axis, expected):
        assert is_frozen(axis) is expected

    def test_the_reason_does_not_tell_axes_apart(self):
        assert Frozen(2, "padded") == Frozen(2, "cut")


class TestPositions:
    @pytest.mark.parametrize(
        ("axis", "space", "expected"),
        [
            (STREAM, "stream", [[[0, 1, 2, 3, 4]]]),
            (STREAM, "heads", []),
            (Frozen(2), "stream", []),
            (Product((Frozen(2), STREAM)), "stream", [[[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]]),
            (Product((STREAM, Frozen(2))), "stream", [[[0, 2, 4, 6, 8]], [[1, 3, 5, 7, 9]]]),
            (Product((HEADS, INNER)), "vo", [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]]),
            (Product((HEADS, INNER)), "heads", [[[k, k + 4, k + 8]] for k in range(4)]),
            (Concat((Frozen(1), STREAM, STREAM)), "stream", [[[1, 2, 3, 4, 5]], [[6, 7, 8, 9, 10]]]),
            (Product((Concat((STREAM, Frozen(1))), Frozen(2))), "stream", [[[0, 2, 4, 6, 8]], [[1, 3, 5, 7, 9]]]),
            (
                Product((Frozen(2), HEADS, INNER)),
                "vo",
                [[[12 * c + 4 * h + d for d in range(4)] for h in range(3)] for c in range(2)],
            ),
            (
                Product((HEADS, Frozen(2), INNER)),
                "vo",
                [[[8 * h + 4 * c + d for d in range(4)] for h in range(3)] for c in range(2)],
            ),
        ],
    )
    def test_by_hand(self, axis, space, expected):
        assert [found.tolist() for found in positions(axis, space)] == expected

    @pytest.mark.parametrize("axis", [axis for axis, _ in AXES.values()], ids=AXES)
    def test_units_move_along_their_places(self, axis):
        """Moving one outer space alone permutes the columns of its places, and nothing else."""
        for space in {atom.space for atom in atoms(axis) if atom.parent is None}:
            only = {name: torch.arange(p.shape[-1]).expand(p.shape) for name, p in PERMUTATION.items()}
            moved = index(axis, {**only, space: PERMUTATION[space]})
            expected = torch.arange(axis.size)
            for places in positions(axis, space):
                expected[places] = places[:, PERMUTATION[space]]
            assert torch.equal(moved, expected)

    @pytest.mark.parametrize("axis", [axis for axis, _ in AXES.values()], ids=AXES)
    def test_row_r_of_a_nested_space_is_block_r(self, axis):
        only = {**PERMUTATION, "heads": torch.arange(3), "stream": torch.arange(5)}
        expected = torch.arange(axis.size)
        for places in positions(axis, "vo"):
            assert places.shape == (3, 4)
            expected[places] = places.gather(1, PERMUTATION["vo"])
        assert torch.equal(index(axis, only), expected)
