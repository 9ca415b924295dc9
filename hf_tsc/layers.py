"""The linear layers: where their units are, in activations and in weights."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D


class Layer(NamedTuple):
    """The dimension of the units in a layer's activations, and the axes of its weight that make and read them."""

    dim: int
    output: int
    input: int


LAYERS: dict[type[nn.Module], Layer] = {
    nn.Linear: Layer(-1, output=0, input=1),
    Conv1D: Layer(-1, output=1, input=0),
    nn.Conv1d: Layer(1, output=0, input=1),
    nn.Conv2d: Layer(1, output=0, input=1),
    nn.Conv3d: Layer(1, output=0, input=1),
    nn.ConvTranspose1d: Layer(1, output=1, input=0),
    nn.ConvTranspose2d: Layer(1, output=1, input=0),
    nn.ConvTranspose3d: Layer(1, output=1, input=0),
}
