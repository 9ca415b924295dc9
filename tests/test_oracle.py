"""Another tool finds the same coupled axes: the dependency graph of Torch-Pruning, on convolutional networks.

Torch-Pruning (https://github.com/VainF/Torch-Pruning, MIT; Fang et al., DepGraph, CVPR 2023, arXiv 2301.12900) asks
what else must go when one channel of a layer is removed. Channels that must go together must also move together, so
its groups are our spaces. It shares nothing with `hf_tsc.derive`: it follows `grad_fn` from the logits back to the
layers, where ours follows the operators of an exported graph.

Compared are, for the first and the middle unit of every space, all positions along all axes of all parameters and
buffers.

- Its layers are pruned in copies: the axes that got shorter are those that a group acts on.
- Concatenations: a channel of one part stands, in what reads the whole, at its own place plus the offset of the part.
- Parameters of no layer that it knows (layer scale, response normalisation): their last axis longer than 1 is taken.
- To it the logits are a group like any other; here their axes are frozen as the model's output.
"""

import copy
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator

import pytest
import torch
from golden_specs import derived
from torch import Tensor, nn

from hf_tsc.axes import Frozen, positions
from hf_tsc.derive import example_inputs, fixed_outputs
from hf_tsc.derive.verify import Probe, tolerance
from hf_tsc.permutation import Params, PermutationSpec, apply, roll

torch_pruning = pytest.importorskip("torch_pruning", reason="Torch-Pruning is the oracle: install the extra `dev`")

AGREE = (
    *("resnet(basic)", "resnet(bottleneck)", "convnext", "convnextv2", "efficientnet", "mobilenet_v1"),
    *("mobilenet_v2", "pp_lcnet", "hgnet_v2", "textnet", "poolformer"),
)
# Its groups say nothing of channels that are tied because they are normalised or convolved together.
DISAGREE = {"regnet(x)": "grouped convolutions", "bit(bottleneck)": "group normalisation"}

Places = dict[tuple[str, int], list[int]]  # (tensor, axis) -> positions


def groups_of(model: nn.Module) -> Iterator[tuple[Places, Places]]:
    """Every group of Torch-Pruning: where the first and the middle unit of it are."""
    graph = torch_pruning.DependencyGraph().build_dependency(
        model, example_inputs(model), output_transform=lambda output: fixed_outputs(output)[0], verbose=False
    )
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for group in list(graph.get_all_groups()):
        root, units = group[0]
        first, middle = (graph.get_pruning_group(root.layer, root.handler, [unit]) for unit in (0, len(units) // 2))
        yield removed(first, names), removed(middle, names)


def removed(group, names: dict[int, str]) -> Places:
    """What the pruning of a group takes away."""
    found: Places = defaultdict(list)
    for dependency, units in group:
        before = own_tensors(dependency.layer)
        if not before:
            continue  # an operator
        node = copy.copy(dependency.target)
        node.module = copy.deepcopy(dependency.layer)
        prune = torch_pruning.Dependency(dependency.trigger, dependency.handler, dependency.source, node)
        for key, tensor in own_tensors(prune(units)).items():
            for axis, (old, new) in enumerate(zip(before[key].shape, tensor.shape, strict=True)):
                if old != new:
                    found[names[id(before[key])], axis] += units
    return {place: sorted(units) for place, units in found.items()}


def own_tensors(layer: nn.Module | nn.Parameter) -> dict[str, Tensor]:
    if isinstance(layer, nn.Parameter):
        return {"": layer}
    return {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}


def spaces_of(spec: PermutationSpec) -> Iterator[tuple[Places, Places]]:
    """Every space of a spec: where the first and the middle unit of it are."""
    for name, space in spec.spaces.items():
        found = {
            (tensor, axis): [row for rows in positions(spec.axes[tensor][axis], name) for row in rows.tolist()]
            for tensor, axis in spec.members(name)
        }
        first, middle = (
            {place: sorted(row[u] for row in rows) for place, rows in found.items()} for u in (0, space.size // 2)
        )
        yield first, middle


def outputs_of(spec: PermutationSpec) -> set[tuple[str, int]]:
    """The axes that are frozen because they make the output."""
    return {
        (name, dim)
        for name, axes in spec.axes.items()
        for dim, axis in enumerate(axes)
        if isinstance(axis, Frozen) and axis.reason == "model output"
    }


def key(pair: tuple[Places, Places]) -> Hashable:
    return str([sorted(places.items()) for places in pair])


@pytest.mark.parametrize("variant", AGREE)
def test_its_groups_are_our_spaces(variant):
    model, spec = derived(variant)
    fixed = outputs_of(spec)
    groups = list(groups_of(model))
    (output,) = [pair for pair in groups if pair[0].keys() & fixed]
    assert output[0].keys() == fixed
    groups.remove(output)
    assert Counter(map(key, groups)) == Counter(map(key, spaces_of(spec)))


@pytest.mark.parametrize("variant", DISAGREE)
def test_where_it_disagrees_its_groups_change_the_output(variant):
    model, spec = derived(variant)
    probe = Probe(model, example_inputs(model))
    assert probe.error(apply(probe.params, spec, roll(spec))) < tolerance(spec)
    ours = set(map(key, spaces_of(spec)))
    others = [pair for pair in groups_of(model) if key(pair) not in ours and not pair[0].keys() & outputs_of(spec)]
    errors = [probe.error(swapped(probe.params, *pair)) for pair in others if fits(probe.params, pair[1])]
    assert errors
    assert min(errors) > 1e-6


def fits(params: Params, places: Places) -> bool:
    """Whether all positions exist: along axis 1, the weight of a grouped convolution has those of one group only."""
    return all(max(units) < params[name].shape[axis] for (name, axis), units in places.items())


def swapped(params: Params, first: Places, second: Places) -> Params:
    """The parameters with two units exchanged."""
    result = dict(params)
    for (name, axis), units in first.items():
        index = torch.arange(params[name].shape[axis])
        others = second[name, axis]
        index[units + others] = index[others + units]
        result[name] = result[name].index_select(axis, index)
    return result
