"""From a table of signatures to a spec."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from hf_tsc.axes import Frozen, Product, atoms
from hf_tsc.errors import UsageError
from hf_tsc.permutation import KINDS, Kind, PermutationSpec, Space
from hf_tsc.signatures.notation import KIND, Description, Group, Leaf, leaves_of, parse_signature
from hf_tsc.signatures.patterns import closest, matches_of
from hf_tsc.signatures.sizes import Sizes, Written
from hf_tsc.signatures.taps import places_of, taps_of

NOT_NAMED = "not named in the registered spec"


def spec_from_signatures(
    model: nn.Module, signatures: Mapping[str, str], *, untapped: Collection[str] = ()
) -> PermutationSpec:
    """The spec that a table of signatures describes.

    Args:
        model: only its names, shapes and layer types are read.
        signatures: tensor name -> signature; a `*` in the name stands for any text without a dot. Floating tensors
            that no name fits are frozen.
        untapped: places where activations must not be read, `*` as above: `input of layers.*.k_proj` (it is that of
            q_proj), `* of head` (a layer that is never called).

    Returns:
        The spec, not verified yet (`hf_tsc.derive.verify`). Activations are read at the input of every layer that
        reads a space; where none does, at the output of those that make it.

    Raises:
        UsageError: a name fits no tensor, or a signature not its shape; a size is open; a space has no tap.
    """
    first_names, tensors = _tensors(model)
    written = _written_axes(model, first_names, tensors, signatures)
    everything = [axis for axes in written.values() for axis in axes]
    _check_nesting(everything)
    sizes = Sizes(everything)
    axes = {
        name: tuple(sizes.axis(one) for one in written[name])
        if name in written
        else tuple(Frozen(size, NOT_NAMED) for size in tensor.shape)
        for name, tensor in tensors.items()
    }
    moving = [atom for tensor_axes in axes.values() for axis in tensor_axes for atom in atoms(axis)]
    spaces = {atom.space: Space(atom.space, atom.size, _kind(atom.space), atom.parent) for atom in moving}
    taps = taps_of(places_of(model, first_names, axes), untapped)
    tapped = {atom.space for tap in taps for atom in atoms(tap.axis)}
    for name in spaces:
        if name not in tapped:
            raise UsageError(
                f'the space "{name}" has no tap: no linear or convolution layer reads or makes it; write "_" in its '
                f"place, which freezes it"
            )
    return PermutationSpec(spaces, axes, taps)


def _tensors(model: nn.Module) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Every name of a tensor -> its first one (tied tensors have several); first name -> floating tensor."""
    everything = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    first_names = {name: first.setdefault(id(tensor), name) for name, tensor in everything}
    tensors = {name: t for name, t in everything if first_names[name] == name and t.is_floating_point()}
    return first_names, tensors


def _written_axes(
    model: nn.Module, first_names: Mapping[str, str], tensors: Mapping[str, Tensor], signatures: Mapping[str, str]
) -> dict[str, list[Written]]:
    """The axes of every tensor that has a signature."""
    written: dict[str, list[Written]] = {}
    patterns: dict[str, str] = {}
    saved = model.state_dict().keys()
    for pattern, text in signatures.items():
        parsed = parse_signature(pattern, text)
        matches = matches_of(pattern, tensors)
        if not matches:
            tied = [name for name in matches_of(pattern, first_names) if first_names[name] in tensors]
            advice = f"; name {first_names[tied[0]]}, which it is tied to" if tied else closest(pattern, tensors)
            raise UsageError(f'"{pattern}" fits no floating tensor of {type(model).__name__}{advice}')
        for name, stars in matches.items():
            if name in patterns:
                raise UsageError(f'{name} is named twice, by "{patterns[name]}" and by "{pattern}": make one narrower')
            patterns[name] = pattern
            rank = tensors[name].ndim
            if rank != len(parsed):
                raise UsageError(f'{name} has {rank} axes, its signature "{text}" {len(parsed)}: give one for each')
            triples = zip(range(rank), tensors[name].shape, parsed, strict=True)
            written[name] = [_written_axis(name, dim, size, piece, stars) for dim, size, piece in triples]
            if name not in saved and any(leaf.space for axis in written[name] for leaf in leaves_of(axis.description)):
                raise UsageError(f'{name} is not saved with the model, so it cannot move: write "_" for its axes')
    return written


def _written_axis(
    tensor: str, dim: int, size: int, parsed: tuple[str, Description], stars: tuple[str, ...]
) -> Written:
    text, description = parsed
    try:
        return Written(tensor, dim, size, text, _in_full(description, stars, ()))
    except UsageError as error:
        raise UsageError(f'axis {dim} of {tensor}, "{text}": {error}') from None


def _in_full(node: Description, stars: Sequence[str], outer: tuple[str, ...]) -> Description:
    """The description with full names; `outer` are the spaces that this part of the axis stands inside of."""
    if isinstance(node, Leaf):
        if not node.space:
            return node
        space = _fill(node.space, stars)
        _kind(space)
        return Leaf(space, node.size, None if node.parent is None else _full_parent(node, stars, outer))
    children = []
    for child in node.children:
        children.append(_in_full(child, stars, outer))
        if node.join is Product and isinstance(made := children[-1], Leaf) and made.space:
            outer = (*outer, made.space)
    return Group(node.join, tuple(children))


def _fill(name: str, stars: Sequence[str]) -> str:
    first, *pieces = name.split("*")
    if len(pieces) > len(stars):
        raise UsageError(f'"{name}" has {len(pieces)} "*", more than the tensor\'s name has ({len(stars)})')
    return first + "".join(star + piece for star, piece in zip(stars, pieces, strict=False))


def _kind(space: str) -> Kind:
    match = KIND.fullmatch(space)
    if match is None:
        raise UsageError(
            f'the name "{space}" tells no kind: let its last part be one of {", ".join(KINDS)} (or hidden_2, ...)'
        )
    return cast(Kind, match[1])


def _full_parent(leaf: Leaf, stars: Sequence[str], outer: tuple[str, ...]) -> str:
    """The space that `@name` means: the one around it with this name, else with this last part."""
    assert leaf.parent is not None
    name = _fill(leaf.parent, stars)
    found = {space for space in outer if space == name} or {space for space in outer if space.endswith(f".{name}")}
    if not found:
        raise UsageError(f'"{leaf}" must stand to the right of {name} in a product, as in "(heads vo@heads)"')
    if len(found) > 1:
        raise UsageError(f'"{leaf}" can be nested in {" or ".join(sorted(found))}: give the full name')
    return found.pop()


def _check_nesting(written: Iterable[Written]) -> None:
    """A space has the same parent wherever it stands, and that one has none."""
    parents: dict[str, tuple[str | None, Written]] = {}
    for axis in written:
        for leaf in leaves_of(axis.description):
            if leaf.space:
                parent, other = parents.setdefault(leaf.space, (leaf.parent, axis))
                if parent != leaf.parent:
                    raise UsageError(
                        f'{axis} has "{leaf.space}" nested in {leaf.parent or "nothing"}, {other} in '
                        f"{parent or 'nothing'}: write the same parent everywhere"
                    )
    for space, (parent, axis) in parents.items():
        if parent is not None and parents[parent][0] is not None:
            raise UsageError(
                f'{axis} has "{space}" nested in {parent}, which is itself nested in {parents[parent][0]}: only one '
                f'level is possible; leave "@{parent}" out, which gives one permutation for all blocks'
            )
