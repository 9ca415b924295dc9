"""Which hidden units of an architecture a method may prune."""

import pytest

from hf_tsc.architectures import VARIANTS
from hf_tsc.baselines.units import hidden_units


@pytest.mark.parametrize(("name", "count"), [("segformer", 5), ("pvt", 5), ("resnet(bottleneck)", 10)])
def test_what_several_layers_read_is_left_out(name, count):
    """Keys and values of a reduced picture, or a block and its shortcut: a column of one layer is not the unit."""
    found = hidden_units(VARIANTS[name].build().eval())
    assert len(found) == count
    assert not any("attention" in unit.weight for unit in found)
    assert all(bias.endswith(".bias") for unit in found for bias in unit.biases)
