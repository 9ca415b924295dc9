"""Small networks written ad hoc, each with one construction that a derivation can get wrong.

`NETWORKS[name]` is (forward, layers, input, shapes): `shapes` are those of the expected permutations, sorted; a nested
one reads (blocks, units in a block). Networks that no permutation may touch expect ().
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GENERATOR = torch.Generator().manual_seed(0)
IMAGE = torch.randn(2, 3, 8, 8, generator=GENERATOR)
TOKENS = torch.randn(2, 5, 12, generator=GENERATOR)
VECTOR = torch.randn(3, 12, generator=GENERATOR)


class Network(nn.Module):
    """A forward function with its layers and parameters."""

    def __init__(self, function: Callable, **members):
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"logits": self.function(self, pixel_values)}


def build(name: str) -> tuple[Network, dict[str, Tensor]]:
    function, members, x, _ = NETWORKS[name]
    return Network(function, **members()).eval(), {"pixel_values": x}


def conv(inputs: int, outputs: int, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def unsaved(value: Tensor) -> nn.Module:
    """A module with the buffer `value`, which its state dict does not have."""
    module = nn.Module()
    module.register_buffer("value", value, persistent=False)
    return module


def pooled(*names: str) -> Callable:
    """Layers one after the other with ReLU after the second, then the mean over positions."""

    def forward(net: Network, x: Tensor) -> Tensor:
        for number, name in enumerate(names):
            x = getattr(net, name)(x)
            x = x.relu() if number == 1 else x
        return x.mean((2, 3))

    return forward


def chain(function: Callable) -> Callable:
    """a, then `function`, then the head o."""
    return lambda net, x: net.o(function(net.a(x)))


def cat_streams(net, x):
    return net.c(torch.cat([net.a(x), net.b(x)], 1).relu()).mean((2, 3))


def cat_copies(net, x):
    y = net.a(x)
    return net.c(torch.cat([y, y.relu()], 1)).mean((2, 3))


def grouped_residual(net, x):
    y = net.a(x)
    return net.c(net.b(y) + y).mean((2, 3))


def gated(net, x):
    u, v = net.a(x).chunk(2, -1)
    return net.o(u * F.gelu(v))


def attend(net, q, k, v):
    """q, k, v: (batch, heads, tokens, d)."""
    mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
    return net.o(mixed.transpose(1, 2).flatten(2)).mean(1)


def separate(net, x):
    return attend(net, *(layer(x).view(2, 5, 3, 4).transpose(1, 2) for layer in (net.q, net.k, net.v)))


def fused_reshape(net, x):
    return attend(net, *net.qkv(x).reshape(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0))


def fused_chunk(net, x):
    return attend(net, *(part.view(2, 5, 3, 4).transpose(1, 2) for part in net.qkv(x).chunk(3, -1)))


def fused_qk(net, x):
    q, k = net.qk(x).reshape(2, 5, 2, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return attend(net, q, k, net.v(x).view(2, 5, 3, 4).transpose(1, 2))


def shared_norm_of_heads(net, x):
    q, k, v = (layer(x).view(2, 5, 3, 4) for layer in (net.q, net.k, net.v))
    return attend(net, net.n(q).transpose(1, 2), net.n(k).transpose(1, 2), v.transpose(1, 2))


def talking_heads(net, x):
    q, k, v = (layer(x).view(2, 5, 3, 4).transpose(1, 2) for layer in (net.q, net.k, net.v))
    scores = net.t((q @ k.transpose(-1, -2)).movedim(1, -1)).movedim(-1, 1)
    return net.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)).mean(1)


def rotary(net, x):
    def turn(y):
        first, second = y.chunk(2, -1)
        return y * net.cos + torch.cat([-second, first], -1) * net.sin

    q, k, v = (layer(x).view(2, 5, 3, 4).transpose(1, 2) for layer in (net.q, net.k, net.v))
    return attend(net, turn(q), turn(k), v)


def grouped_queries(net, x):
    q, k, v = (layer(x).unflatten(2, (-1, 3)).transpose(1, 2) for layer in (net.q, net.k, net.v))
    mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return net.o(mixed.transpose(1, 2).flatten(2)).mean(1)


def repeated_keys(net, x):
    q, k, v = (layer(x).unflatten(2, (-1, 3)).transpose(1, 2) for layer in (net.q, net.k, net.v))
    return attend(net, q, *(y[:, :, None].expand(2, 2, 2, 5, 3).reshape(2, 4, 5, 3) for y in (k, v)))


def layer_scale(net, x):
    y = net.a(x)
    return net.o(y + net.gamma * net.c(net.b(net.n(y)).relu()))


def in_place(net, x):
    y = net.a(x)
    y += net.c(F.relu(net.b(y)))
    return net.d(y.relu_()).mean((2, 3))


def in_place_view(net, x):
    y = net.a(x)
    part = y[:, :4]
    part += net.c(x)
    return net.d(y.relu()).mean((2, 3))


def bias_averaged_over_heads(net, x):
    y = net.a(x).view(-1, 3, 4) + net.a.bias.view(3, 4).mean(0)
    return net.o(y.flatten(1).relu())


def three_levels(net, x):
    y = net.a(x).view(-1, 2, 3, 4).softmax(-1)
    return net.o((y / y.norm(dim=(2, 3), keepdim=True)).flatten(1))


def expanded_norm(net, x):
    return net.o(net.a(x) + net.n(x[:, :1].expand(-1, 6)))


def expanded_batch_norm(net, x):
    return net.o(net.a(x) + net.n(x[:, :1].expand(-1, 6, -1, -1))).mean((2, 3))


def shuffled_residual(net, x):
    y = net.a(x)
    return net.o((y + y.view(-1, 3, 3).transpose(1, 2).reshape(-1, 9)).relu())


def embeddings(net, x):
    y = torch.cat([net.token.expand(2, -1, -1), net.a(x)], 1) + net.place
    return net.o(net.n(y).relu()).mean(1)


def standardised_weight(net, x):
    weight = net.w - net.w.mean((1, 2, 3), keepdim=True)
    return net.o(F.conv2d(net.a(x), weight, padding=1).relu()).mean((2, 3))


def slices_of_a_product(net, x):
    y = net.a(x).view(-1, 3, 4).softmax(-1).flatten(1)
    return net.o(torch.cat([y[:, 4:8].square(), y[:, :4]], 1))


def zero_key_bias(net, x):
    bias = torch.cat([net.q, net.k.value, net.v])
    return attend(net, *(net.qkv(x) + bias).reshape(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0))


def heads(layer, x, *shape):
    """Softmax in every head, then the heads side by side again."""
    return layer(x).view(-1, *shape).softmax(-1).flatten(1)


def heads_apart(net, x):
    few, many = heads(net.a, x, 5, 3).split([6, 9], 1)
    joined = torch.cat([few.square(), many], 1).view(-1, 5, 3)
    return net.o((joined * net.b(x).view(-1, 5, 3)).softmax(-1).flatten(1))


def heads_in_two_ways(net, x):
    y = heads(net.a, x, 4, 3)
    return net.p(y[:, :3]) + net.o(y + heads(net.b, x, 2, 2, 3))


def heads_of_two_layers(net, x):
    return net.o(torch.cat([net.a(x), net.b(x)], 1).view(-1, 6, 2).softmax(-1).flatten(1))


def conv_over_layers(net, x):
    return net.o(net.c(torch.stack([net.a(x), net.b(x)], 1)).flatten(1).relu())


def conv_over_units(net, x):
    return net.o(net.c(net.a(x)[:, None]).flatten(1))


def without_a_batch(net, x):
    return torch.stack([net.c(F.avg_pool2d(net.a(image), 2)).mean((1, 2)) for image in x.unbind()])


def cast_like(net, x):
    y, z = net.a(x), net.b(x)
    return net.o(y.type_as(z).relu()) + net.p(z.relu())


def windows(net, x):
    y = net.a(x.flatten(2).transpose(1, 2)).view(2, 2, 4, 2, 4, 6)
    return net.o(y.permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 96)).mean(1)


def apart(width: int = 12) -> dict[str, nn.Module]:
    return {"q": linear(12, 12), "k": linear(12, width), "v": linear(12, width), "o": linear(12, 3)}


def pair(width: int, inner: int | None = None) -> Callable:
    return lambda: {"a": linear(12, width), "o": linear(width if inner is None else inner, 3)}


NETWORKS = {
    # convolutions
    "grouped_conv": (
        pooled("a", "b", "c"),
        lambda: {"a": conv(3, 8), "b": conv(8, 12, groups=4), "c": conv(12, 5)},
        IMAGE,
        [(2,), (4,), (4, 3)],
    ),
    "two_groupings": (
        pooled("a", "b", "c", "d"),
        lambda: {"a": conv(3, 8), "b": conv(8, 12, groups=4), "c": conv(12, 12, groups=2), "d": conv(12, 5)},
        IMAGE,
        [(2,), (2,), (2,), (2, 3), (2, 6)],
    ),
    "grouped_residual": (
        grouped_residual,
        lambda: {"a": conv(3, 8), "b": conv(8, 8, groups=4), "c": conv(8, 5)},
        IMAGE,
        [(2,), (4,)],
    ),
    "depthwise_conv": (
        pooled("a", "b", "c"),
        lambda: {"a": conv(3, 8), "b": conv(8, 8, groups=8), "c": conv(8, 5)},
        IMAGE,
        [(8,)],
    ),
    "depthwise_multiplier": (
        pooled("a", "b", "c"),
        lambda: {"a": conv(3, 4), "b": conv(4, 8, groups=4), "c": conv(8, 5)},
        IMAGE,
        [(4,), (4, 2)],
    ),
    "conv_over_units": (
        conv_over_units,
        lambda: {"a": linear(12, 8), "c": nn.Conv1d(1, 2, 3), "o": linear(12, 3)},
        VECTOR,
        [(2,)],
    ),
    "conv_of_one_unit": (
        conv_over_units,
        lambda: {"a": linear(12, 8), "c": nn.Conv1d(1, 2, 1), "o": linear(16, 3)},
        VECTOR,
        [(2,), (8,)],
    ),
    "conv_of_every_second_unit": (
        conv_over_units,
        lambda: {"a": linear(12, 8), "c": nn.Conv1d(1, 2, 1, stride=2), "o": linear(8, 3)},
        VECTOR,
        [(2,)],
    ),
    "conv_of_one_unit_padded": (
        conv_over_units,
        lambda: {"a": linear(12, 8), "c": nn.Conv1d(1, 2, 1, stride=2, padding=4), "o": linear(16, 3)},
        VECTOR,
        [(2,)],
    ),
    "conv_over_layers": (
        conv_over_layers,
        lambda: {"a": linear(12, 6), "b": linear(12, 6), "c": nn.Conv1d(2, 1, 1), "o": linear(6, 3)},
        VECTOR,
        [(6,)],
    ),
    "transposed_conv": (
        pooled("a", "b", "c"),
        lambda: {"a": conv(3, 8), "b": nn.ConvTranspose2d(8, 12, 2, stride=2), "c": conv(12, 5)},
        IMAGE,
        [(8,), (12,)],
    ),
    "transposed_grouped_conv": (
        pooled("a", "b", "c"),
        lambda: {"a": conv(3, 8), "b": nn.ConvTranspose2d(8, 12, 2, stride=2, groups=4), "c": conv(12, 5)},
        IMAGE,
        [(3,), (4,), (4, 2)],
    ),
    "transposed_depthwise_conv": (
        pooled("a", "b", "c"),
        lambda: {"a": conv(3, 8), "b": nn.ConvTranspose2d(8, 8, 3, groups=8), "c": conv(8, 5)},
        IMAGE,
        [(8,)],
    ),
    "without_a_batch": (without_a_batch, lambda: {"a": conv(3, 6), "c": conv(6, 5)}, IMAGE, [(6,)]),
    "adaptive_max_pool": (
        chain(lambda y: F.adaptive_max_pool2d(y, 1).flatten(1)),
        lambda: {"a": conv(3, 6), "o": linear(6, 3)},
        IMAGE,
        [(6,)],
    ),
    "sliding_windows": (
        lambda net, x: net.o(net.a(x).unfold(2, 3, 2).square().mean(-1)).mean((2, 3)),
        lambda: {"a": conv(3, 6), "o": conv(6, 3)},
        IMAGE,
        [(6,)],
    ),
    "standardised_weight": (
        standardised_weight,
        lambda: {"a": conv(3, 6), "w": parameter(7, 6, 3, 3), "o": conv(7, 3)},
        IMAGE,
        [(6,), (7,)],
    ),
    "flatten": (chain(lambda y: y.flatten(1)), lambda: {"a": conv(3, 6), "o": linear(384, 3)}, IMAGE, [(6,)]),
    # norms
    "group_norm": (
        pooled("a", "n", "c"),
        lambda: {"a": conv(3, 8), "n": nn.GroupNorm(2, 8), "c": conv(8, 5)},
        IMAGE,
        [(2,), (2, 4)],
    ),
    "group_norm_of_all": (
        pooled("a", "n", "c"),
        lambda: {"a": conv(3, 8), "n": nn.GroupNorm(1, 8), "c": conv(8, 5)},
        IMAGE,
        [(8,)],
    ),
    "expanded_norm": (
        expanded_norm,
        lambda: {"a": linear(12, 6), "n": nn.LayerNorm(6), "o": linear(6, 3)},
        VECTOR,
        [(6,)],
    ),
    "expanded_batch_norm": (
        expanded_batch_norm,
        lambda: {"a": conv(3, 6), "n": nn.BatchNorm2d(6), "o": conv(6, 3)},
        IMAGE,
        [(6,)],
    ),
    # joined and split streams
    "cat": (cat_streams, lambda: {"a": conv(3, 8), "b": conv(3, 6), "c": conv(14, 5)}, IMAGE, [(6,), (8,)]),
    "cat_copies": (cat_copies, lambda: {"a": conv(3, 8), "c": conv(16, 5)}, IMAGE, [(8,)]),
    "gated": (gated, lambda: {"a": linear(12, 14), "o": linear(7, 3)}, VECTOR, [(7,)]),
    "layer_scale": (
        layer_scale,
        lambda: {
            "a": linear(12, 7),
            "n": nn.LayerNorm(7),
            "b": linear(7, 6),
            "c": linear(6, 7),
            "gamma": parameter(7),
            "o": linear(7, 3),
        },
        VECTOR,
        [(6,), (7,)],
    ),
    "in_place": (
        in_place,
        lambda: {"a": conv(3, 6), "b": conv(6, 7), "c": conv(7, 6), "d": conv(6, 4)},
        IMAGE,
        [(6,), (7,)],
    ),
    "in_place_view": (in_place_view, lambda: {"a": conv(3, 6), "c": conv(3, 4), "d": conv(6, 4)}, IMAGE, [(2,), (4,)]),
    "repeat_interleave": (chain(lambda y: y.repeat_interleave(3, 1).relu()), pair(4, 12), VECTOR, [(4,)]),
    "cast_like": (
        cast_like,
        lambda: {"a": linear(12, 6), "b": linear(12, 6), "o": linear(6, 3), "p": linear(6, 3)},
        VECTOR,
        [(6,), (6,)],
    ),
    "repeat": (chain(lambda y: y.repeat(1, 3).relu()), pair(4, 12), VECTOR, [(4,)]),
    "pad": (chain(lambda y: F.pad(y, (1, 2))), pair(6, 9), VECTOR, [(6,)]),
    "pad_of_tokens": (
        lambda net, x: net.o(F.pad(net.a(x), (0, 1, 1, 0), value=1.0).relu()).mean(1),
        pair(6, 7),
        TOKENS,
        [(6,)],
    ),
    "crop": (chain(lambda y: F.pad(y, (-1, 2))), pair(6, 7), VECTOR, []),
    "reflected": (chain(lambda y: F.pad(y, (1, 2), mode="reflect")), pair(6, 9), VECTOR, []),
    "slices": (chain(lambda y: y[:, 1:4] + y[:, -3:]), pair(6, 3), VECTOR, []),
    "slices_of_a_product": (slices_of_a_product, pair(12, 8), VECTOR, [(4,)]),
    "windows": (windows, lambda: {"a": linear(3, 6), "o": linear(96, 3)}, IMAGE, [(6,)]),
    # products
    "mean_over_heads": (
        lambda net, x: net.o(net.a(x).view(-1, 5, 3, 4).relu().mean(2)).mean(1),
        pair(12, 4),
        TOKENS,
        [(3,), (4,)],
    ),
    "bias_averaged_over_heads": (bias_averaged_over_heads, pair(12), VECTOR, [(3,), (4,)]),
    "heads_apart": (
        heads_apart,
        lambda: {"a": linear(12, 15), "b": linear(12, 15), "o": linear(15, 3)},
        VECTOR,
        [(2,), (3,), (3,)],
    ),
    "heads_in_two_ways": (
        heads_in_two_ways,
        lambda: {"a": linear(12, 12), "b": linear(12, 12), "o": linear(12, 3), "p": linear(3, 3)},
        VECTOR,
        [(3,)],
    ),
    "heads_of_two_layers": (
        heads_of_two_layers,
        lambda: {"a": linear(12, 6), "b": linear(12, 6), "o": linear(12, 3)},
        VECTOR,
        [(3,), (3,), (3, 2), (3, 2)],
    ),
    "three_levels": (three_levels, pair(24), VECTOR, [(2,), (2, 3), (2, 4)]),
    "shuffle": (
        chain(lambda y: y.view(-1, 2, 3).transpose(1, 2).reshape(-1, 6).relu()),
        pair(6),
        VECTOR,
        [(2,), (3,)],
    ),
    "shuffled_residual": (shuffled_residual, pair(9), VECTOR, [(3,)]),
    # attention
    "attention": (separate, apart, TOKENS, [(3,), (3, 4), (3, 4)]),
    "fused_reshape": (
        fused_reshape,
        lambda: {"qkv": linear(12, 36), "o": linear(12, 3)},
        TOKENS,
        [(3,), (3, 4), (3, 4)],
    ),
    "fused_chunk": (
        fused_chunk,
        lambda: {"qkv": linear(12, 36), "o": linear(12, 3)},
        TOKENS,
        [(3,), (3, 4), (3, 4)],
    ),
    "fused_qk": (
        fused_qk,
        lambda: {"qk": linear(12, 24), "v": linear(12, 12), "o": linear(12, 3)},
        TOKENS,
        [(3,), (3, 4), (3, 4)],
    ),
    "shared_norm_of_heads": (
        shared_norm_of_heads,
        lambda: {**apart(), "n": nn.LayerNorm(4)},
        TOKENS,
        [(3,), (3, 4), (4,)],
    ),
    "talking_heads": (
        talking_heads,
        lambda: {**apart(), "t": linear(3, 3)},
        TOKENS,
        [(3,), (3,), (3, 4), (3, 4)],
    ),
    "rotary": (
        rotary,
        lambda: {**apart(), "cos": parameter(5, 4), "sin": parameter(5, 4)},
        TOKENS,
        [(2,), (3,), (3, 4)],
    ),
    "zero_key_bias": (
        zero_key_bias,
        lambda: {
            "qkv": nn.Linear(12, 36, bias=False),
            "q": parameter(12),
            "k": unsaved(torch.zeros(12)),
            "v": parameter(12),
            "o": linear(12, 3),
        },
        TOKENS,
        [(3,), (3, 4), (3, 4)],
    ),
    "grouped_queries": (grouped_queries, lambda: apart(6), TOKENS, [(3,), (3,)]),
    "repeated_keys": (repeated_keys, lambda: apart(6), TOKENS, [(2,), (2, 2), (2, 3), (2, 3)]),
    "multihead_attention": (  # its layers are used without being called: no hook sees them
        lambda net, x: net.o(net.m(x, x, x)[0].relu()).mean(1),
        lambda: {"m": nn.MultiheadAttention(12, 3, batch_first=True), "o": linear(12, 3)},
        TOKENS,
        [(12,), (3,), (3, 4), (3, 4)],
    ),
    # parameters
    "embeddings": (
        embeddings,
        lambda: {
            "a": linear(12, 6),
            "token": parameter(1, 1, 6),
            "place": parameter(1, 6, 6),
            "n": nn.LayerNorm(6),
            "o": linear(6, 3),
        },
        TOKENS,
        [(6,)],
    ),
    "unsaved_scale": (
        lambda net, x: net.o(net.a(x).relu() * net.s.value),
        lambda: {"a": linear(12, 6), "s": unsaved(torch.arange(6.0)), "o": linear(6, 3)},
        VECTOR,
        [],
    ),
    "lstm": (  # no linear layer reads what its first layer gives to its second
        lambda net, x: net.o(net.l(net.a(x))[0]).mean(1),
        lambda: {
            "a": linear(12, 6),
            "l": nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True),
            "o": linear(10, 3),
        },
        TOKENS,
        [(5,), (5,), (6,)],
    ),
    "layer_called_twice": (
        lambda net, x: net.o(net.b(net.b(net.a(x)).relu()).relu()),
        lambda: {"a": linear(12, 6), "b": linear(6, 6), "o": linear(6, 3)},
        VECTOR,
        [(6,)],
    ),
    "square_weight": (
        lambda net, x: net.o(net.a(net.a(x)).relu()),
        lambda: {"a": linear(12, 12), "o": linear(12, 3)},
        VECTOR,
        [],
    ),
}

NETWORKS |= {
    "cumsum": (chain(lambda y: y.cumsum(1)), pair(6), VECTOR, []),
    "expanded_cumsum": (
        lambda net, x: net.o(net.a(x) + x[:, :1].expand(-1, 6).cumsum(1)),
        pair(6),
        VECTOR,
        [],
    ),
    "flip": (chain(lambda y: y.flip(-1)), pair(6), VECTOR, []),
    "glu": (chain(F.glu), pair(6, 3), VECTOR, [(3,)]),
}

# Operators without a rule: what they touch freezes.
UNKNOWN = {
    "aten.fft_rfft.default": (chain(lambda y: torch.fft.rfft(y).abs()), pair(6, 4), VECTOR, []),
    "aten.sort.default": (chain(lambda y: y.sort(-1).values), pair(6), VECTOR, []),
    "aten.lstm.input": (
        lambda net, x: net.o(net.l(net.a(x))[1][0][0]),
        lambda: {"a": linear(12, 6), "l": nn.LSTM(6, 5, batch_first=True), "o": linear(5, 3)},
        TOKENS,
        [],
    ),
}
NETWORKS |= UNKNOWN
