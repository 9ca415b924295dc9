"""Permutation specs written by hand: a readable signature for every tensor that moves, axes separated by commas.

    spec_from_signatures(model, {
        "embed.weight": "residual, _",
        "layers.*.up.weight": "layers.*.hidden, residual",
        "layers.*.up.bias": "layers.*.hidden",
        "layers.*.down.weight": "residual, layers.*.hidden",
        "head.weight": "_, residual",
    })

An axis is written as in `hf_tsc.axes`, with three abbreviations: `_` is a stretch as long as the tensor says,
`vo@heads` finds its parent by the last part of the name, and sizes are solved for (`heads:12` states one). The k-th
`*` of a space's name is what the k-th `*` of the tensor's pattern matched.
"""

from hf_tsc.signatures.build import NOT_NAMED, spec_from_signatures
from hf_tsc.signatures.notation import Group, Leaf, parse_axis
from hf_tsc.signatures.registry import register_spec, registered_spec
from hf_tsc.signatures.taps import WRITTEN

__all__ = [
    "NOT_NAMED",
    "WRITTEN",
    "Group",
    "Leaf",
    "parse_axis",
    "register_spec",
    "registered_spec",
    "spec_from_signatures",
]
