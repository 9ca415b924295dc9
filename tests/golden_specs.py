"""Specs as signatures that can be read: the text of the files under `tests/golden/`.

    python tests/golden_specs.py

writes those anew that have changed, and says "not reviewed" in their first lines. Read them against the modelling
source, line by line (do exactly these axes move together? could more of them move? is something missing?), then put
the first line back. Remarks may follow it.

A line is a signature in the notation of `hf_tsc.signatures`, with the reasons of its frozen axes behind a `#` (`_1` is
an axis of one position and needs none). Layers that are alike share a line: a `*` stands for the number of a layer, or
for `weight`, `bias` and the statistics of a norm. It is written only where all that it fits has this very signature.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from itertools import combinations, takewhile
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hf_tsc.architectures import VARIANTS
from hf_tsc.axes import Atom, Axis, Concat, Frozen, Product
from hf_tsc.derive import derive_spec, example_inputs
from hf_tsc.permutation import PermutationSpec
from hf_tsc.signatures.patterns import matches_of

FOLDER = Path(__file__).parent / "golden"
REVIEWED = re.compile(r"# reviewed against transformers \d+\.\d+\.\d+, models/\w+/modeling_\w+\.py")
NOT_REVIEWED = "# not reviewed"

SUFFIXES = ("weight", "bias", "running_mean", "running_var")  # what a `*` at the end of a name may stand for

# file -> variant
GOLDEN = {
    "beit": "beit(relpos)",
    "clip": "clip",
    "convnext": "convnext",
    "deit": "deit",
    "dinov2": "dinov2",
    "dinov3_vit": "dinov3_vit",
    "efficientnet": "efficientnet",
    "mobilenet_v2": "mobilenet_v2",
    "resnet": "resnet(bottleneck)",
    "siglip": "siglip",
    "swin": "swin",
    "vit": "vit",
    "vit_mae": "vit_mae",
}


@cache
def derived(variant: str) -> tuple[PreTrainedModel, PermutationSpec]:
    torch.manual_seed(0)
    model = VARIANTS[variant].build().eval()
    return model, derive_spec(model, example_inputs(model))


def text_of(spec: PermutationSpec) -> str:
    """The spec as lines `pattern: signature  # reasons`, in the order of the model's tensors."""
    return "".join(f"{pattern}: {signature}\n" for pattern, signature in _collapsed(spec).items())


def head_and_body(text: str) -> tuple[list[str], str]:
    """The lines of a file that come first and start with `#`, and the rest."""
    lines = text.splitlines(keepends=True)
    head = list(takewhile(lambda line: line.startswith("#"), lines))
    return head, "".join(lines[len(head) :])


def signatures_of(text: str) -> dict[str, str]:
    """A file as `spec_from_signatures` takes it."""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return dict(line.split(": ") for line in lines if line)


def _collapsed(spec: PermutationSpec) -> dict[str, str]:
    """Patterns that fit every tensor once, those that fit most first; each with the signature of all it fits."""
    candidates = _candidates(spec)
    free, taken = set(spec.axes), {}  # taken: first tensor -> pattern
    for pattern in sorted(candidates, key=lambda pattern: (-len(candidates[pattern][0]), pattern.count("*"))):
        names, _ = candidates[pattern]
        if free.issuperset(names):
            free.difference_update(names)
            taken[names[0]] = pattern
    patterns = [taken[name] for name in spec.axes if name in taken]
    return {pattern: candidates[pattern][1] for pattern in patterns}


def _candidates(spec: PermutationSpec) -> dict[str, tuple[list[str], str]]:
    """The patterns whose tensors all have one signature: these tensors, and their signature."""
    sized = _sized(spec)
    candidates = {}
    patterns = {_starred(name, stars): stars for name in spec.axes for stars in _star_places(name)}
    for pattern, stars in patterns.items():
        names = list(matches_of(pattern, spec.axes))
        signatures = {_signature(spec, name, stars, sized.get(name, ())) for name in names}
        if len(signatures) == 1 and (signature := signatures.pop()):  # a number has no axes
            candidates[pattern] = (names, signature)
    return candidates


def _star_places(name: str) -> Iterator[tuple[int, ...]]:
    """The sets of parts of a name that may become a `*`."""
    parts = name.split(".")
    places = [i for i, part in enumerate(parts) if part.isdecimal() or part in SUFFIXES]
    for count in range(len(places) + 1):
        yield from combinations(places, count)


def _starred(name: str, stars: Collection[int]) -> str:
    return ".".join("*" if i in stars else part for i, part in enumerate(name.split(".")))


def _sized(spec: PermutationSpec) -> dict[str, list[str]]:
    """Where sizes are stated: those of the spaces that others are nested in, at the first tensor of each."""
    sized: dict[str, list[str]] = {}
    for parent in {space.parent: None for space in spec.spaces.values() if space.parent}:
        first, _ = next(spec.members(parent))
        sized.setdefault(first, []).append(parent)
    return sized


def _signature(spec: PermutationSpec, name: str, stars: Collection[int], sized: Collection[str]) -> str:
    """The signature of one tensor, where the parts `stars` of its name have become `*`; `sized` state their size."""
    path = name.split(".")
    stated = {space: f":{spec.spaces[space].size}" for space in sized}

    def renamed(axis: Axis) -> Axis:
        if isinstance(axis, Atom):
            parts = axis.space.split(".")
            space = _starred(axis.space, [i for i in stars if parts[: i + 1] == path[: i + 1]])
            parent = axis.parent.rpartition(".")[2] if axis.parent else None
            return Atom(space + stated.pop(axis.space, ""), axis.size, parent)
        if isinstance(axis, Frozen):
            return axis
        if isinstance(axis, Product):
            return Product(tuple(map(renamed, axis.factors)))
        return Concat(tuple(map(renamed, axis.parts)))

    axes = ", ".join(str(renamed(axis)) for axis in spec.axes[name])
    reasons = dict.fromkeys(part.reason for axis in spec.axes[name] for part in _frozen(axis) if part.size > 1)
    return f"{axes}  # {', '.join(reasons)}" if reasons else axes


def _frozen(axis: Axis) -> Iterator[Frozen]:
    """The frozen parts of an axis, from left to right."""
    if isinstance(axis, Frozen):
        yield axis
    elif isinstance(axis, Product | Concat):
        for child in axis.factors if isinstance(axis, Product) else axis.parts:
            yield from _frozen(child)


def write(golden: Mapping[str, str], folder: Path) -> None:
    """Write the files whose specs have changed."""
    for stem, variant in golden.items():
        file = folder / f"{stem}.txt"
        head, body = head_and_body(file.read_text(encoding="utf-8")) if file.exists() else ([], "")
        if body != (new := text_of(derived(variant)[1])):
            file.write_text("".join([f"{NOT_REVIEWED}\n", *head[1:], new]), encoding="utf-8")
            print(f"{file}: read it, then give it its first line")


if __name__ == "__main__":
    write(GOLDEN, FOLDER)
