"""Activation statistics of all spaces at once, in one hooked pass over the clean images.

For two networks a and b (b = a for un-alignment) and every tap, with x of shape (m, n): m positions (images x pixels
or tokens), n units,

    products[i, j] = sum over positions of a_i * b_j          (n, n)
    sums, squares  = sum of x_i and of x_i ** 2               (n,) for each network

A permutation keeps the function of the network, so no layer's statistics depend on another layer's permutation: one
pass gives every matrix, whatever the depth, and several passes over some of the taps each give the same matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_tsc.errors import PurificationError, UsageError
from hf_tsc.functional import call_at
from hf_tsc.permutation import PROJECTIONS, Params, Tap
from hf_tsc.processes import add_up, number_of_processes, rank, together

Batch = dict[str, Tensor]
ROUNDING = 8 * torch.finfo(torch.float32).eps  # relative, of what is summed in single precision over a batch


@dataclass
class TapStatistics:
    """Sums over all positions of all images at one tap, in float64.

    Attributes:
        products: (n, n) inner products, rows of network a, columns of network b.
        sums: (2, n) for a and b.
        squares: (2, n) for a and b.
        count: number of positions.
    """

    products: Tensor
    sums: Tensor
    squares: Tensor
    count: int = 0

    @classmethod
    def zeros(cls, size: int, device: torch.device) -> TapStatistics:
        # float64 sums of float32 products of one batch: the error stays that of a single batch's matmul
        dtype = torch.float64 if device.type != "mps" else torch.float32
        products, sums, squares = (torch.zeros(n, size, dtype=dtype, device=device) for n in (size, 2, 2))
        return cls(products, sums, squares)

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add positions; a and b: (m, n), the same tensor for un-alignment."""
        products = a.T @ b
        self.products += products
        if a is b:
            self.sums += a.sum(0)
            self.squares += products.diagonal()
        else:
            for row, x in enumerate((a, b)):
                self.sums[row] += x.sum(0)
                self.squares[row] += x.square().sum(0)
        self.count += a.shape[0]

    def similarity(self, method: str) -> Tensor:
        """(n, n), how alike unit i of a and unit j of b are; scaled so that taps can be added up.

        `l2`: inner products over the geometric mean of both networks' total energy (for one tap, maximising their
        trace minimises the L2 distance of the paper). `correlation`: Pearson's; a unit that never varies correlates
        with nothing (0).
        """
        if method == "l2":
            energy = self.squares.sum(1).prod().sqrt()
            return self.products / energy if energy > 0 else self.products
        mean = self.sums / self.count  # (2, n)
        covariance = self.products / self.count - torch.outer(mean[0], mean[1])
        variance = self.squares / self.count - mean.square()
        floor = ROUNDING * (self.squares / self.count)  # below it the unit is constant
        deviation = torch.where(variance > floor, variance, 0).sqrt()
        scale = torch.outer(deviation[0], deviation[1])
        correlation = covariance / scale.clamp_min(torch.finfo(scale.dtype).tiny)
        return torch.where(scale > 0, correlation.clamp(-1, 1), 0) / scale.shape[0]


MATCHING_METHODS = ("l2", "correlation")


def matrix_bytes(taps: Iterable[Tap]) -> int:
    """What the inner products of all these taps occupy while they are collected."""
    return sum(torch.float64.itemsize * tap.axis.size**2 for tap in taps)


def collect_statistics(
    model: nn.Module,
    taps: Sequence[Tap],
    batches: Iterable[Batch],
    *,
    points: Sequence[Params],
    max_positions: int | None = None,
    seed: int = 0,
    memory_limit: int | None = None,
) -> list[TapStatistics]:
    """Exact statistics of one network with itself, or of two networks, in one pass.

    Several processes each read their batches; what they find is added up.

    Held are the matrices of all taps and, with two networks, what the first of them gave at all taps until the second
    one gives the same.

    Args:
        model: the architecture, in eval mode; its own weights are not used.
        taps: where to read.
        batches: model inputs; every batch is used once. Of W processes, process r has those numbered r, r + W, ...
        points: one set of parameters and buffers, or two (a, b).
        max_positions: read at most this many positions of an image (drawn anew for each batch, the same for both
            networks, for all images of the batch and for all taps with equally many positions); `None` reads all.
        seed: for `max_positions`.
        memory_limit: bytes that may be held; with two networks a batch is read in parts where that is needed.

    Returns:
        One `TapStatistics` a tap, of all processes. The model is called `len(points)` times a batch (or part of one).

    Raises:
        PurificationError: a tap was not read.
        UsageError: the matrices, or the activations of one image beside them, take more than `memory_limit`.
    """
    device = next(iter(points[0].values())).device
    room = _room_beside_matrices(taps, memory_limit)
    totals = [TapStatistics.zeros(tap.axis.size, device) for tap in taps]
    with together():
        images: int | None = None
        for number, batch in enumerate(batches):
            pick = _PositionPicker(max_positions, (seed, rank() + number * number_of_processes()))
            if len(points) == 1:
                _read(model, taps, batch, points[0], pick, lambda number, x: totals[number].add(x, x))
                continue
            if room is not None and images is None:
                image = activation_bytes(model, taps, batch, point=points[0], max_positions=max_positions)
                images = _images_within(room, image)
            for part in _parts(batch, images):
                _add_pairs(totals, model, taps, part, points, pick)
    _add_up(totals, device)
    for tap, total in zip(taps, totals, strict=True):
        if total.count == 0:
            raise PurificationError(
                f"the {tap.side} of {tap.module} was never read: give clean images, and a spec whose taps are called"
            )
    return totals


def _add_up(totals: Sequence[TapStatistics], device: torch.device) -> None:
    """Over the processes, in place."""
    counts = torch.tensor([total.count for total in totals], device=device)
    add_up(tensor for total in totals for tensor in (total.products, total.sums, total.squares))
    add_up([counts])
    for total, count in zip(totals, counts.tolist(), strict=True):
        total.count = count


def _room_beside_matrices(taps: Sequence[Tap], memory_limit: int | None) -> int | None:
    if memory_limit is None:
        return None
    if matrix_bytes(taps) > memory_limit:
        raise UsageError(
            f"the matrices of {len(taps)} taps take {matrix_bytes(taps) / 1e9:.2g} GB, allowed are "
            f"{memory_limit / 1e9:.2g} GB: allow more, or read fewer taps at once"
        )
    return memory_limit - matrix_bytes(taps)


def _images_within(room: int, image: int) -> int:
    """How many images fit, each of whose activations take `image` bytes."""
    if image > room:
        raise UsageError(
            f"the activations of one image take {image / 1e9:.2g} GB, and beside the matrices there are "
            f"{room / 1e9:.2g} GB left: allow more memory, or fewer positions (max_positions)"
        )
    return room // max(image, 1)


def _parts(batch: Batch, images: int | None) -> Iterator[Batch]:
    """The batch in parts of so many images; whole without a number."""
    total = next(iter(batch.values())).shape[0]
    step = images or total
    for start in range(0, total, step):
        yield {name: x[start : start + step] for name, x in batch.items()}


def _add_pairs(
    totals: Sequence[TapStatistics],
    model: nn.Module,
    taps: Sequence[Tap],
    batch: Batch,
    points: Sequence[Params],
    pick: _PositionPicker,
) -> None:
    """Two forward passes: the activations of the first are kept until the second has the same tap's."""
    first: list[list[Tensor]] = [[] for _ in taps]  # copies, as the network may go on to write into what was read
    _read(model, taps, batch, points[0], pick, lambda number, x: first[number].append(x.clone()))
    _read(model, taps, batch, points[1], pick, lambda number, x: totals[number].add(first[number].pop(0), x))


class _PositionPicker:
    """Draws the positions that are read in one batch.

    They depend on nothing but the seed and how many there are: whichever taps are read, in whichever order, those of
    one tap stay the same.
    """

    def __init__(self, limit: int | None, seed: tuple[int, int]):
        self.limit, self.seed = limit, seed
        self.drawn: dict[int, Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """x: (batch, positions, n) -> (batch, at most `limit`, n)."""
        count = x.shape[1]
        if self.limit is None or count <= self.limit:
            return x
        if count not in self.drawn:
            drawn = np.random.default_rng([*self.seed, count]).choice(count, self.limit, replace=False)
            self.drawn[count] = torch.from_numpy(np.sort(drawn)).to(x.device)
        return x.index_select(1, self.drawn[count])


def activation_bytes(
    model: nn.Module, taps: Sequence[Tap], batch: Batch, *, point: Params, max_positions: int | None = None
) -> int:
    """What one network gives at all taps for the first image of a batch; this much is held between two networks."""
    sizes: list[int] = []
    pick = _PositionPicker(max_positions, (0, 0))
    _read(model, taps, next(_parts(batch, 1)), point, pick, lambda _, x: sizes.append(x.numel() * x.element_size()))
    return sum(sizes)


@torch.no_grad()
def _read(
    model: nn.Module,
    taps: Sequence[Tap],
    batch: Batch,
    point: Params,
    pick: _PositionPicker,
    use: Callable[[int, Tensor], None],
) -> None:
    """One forward pass; `use` is called with every tap's number and activations, (m, n), as soon as they are there.

    What is used at once need not be held to the end of the pass, which would take many times the pass's own memory.
    """

    def reader(number: int, tap: Tap) -> Callable[[Tensor], None]:
        return lambda x: use(number, pick(_by_position(x, tap.dim)).flatten(0, 1))

    with _hooks(model, [(tap, reader(number, tap)) for number, tap in enumerate(taps)]):
        call_at(model, point, batch)


def _by_position(x: Tensor, dim: int) -> Tensor:
    """(batch, ..., n, ...) with units on `dim` -> (batch, positions, n)."""
    moved = x.movedim(dim, -1)
    return moved.reshape(moved.shape[0], -1, moved.shape[-1])


@contextmanager
def _hooks(model: nn.Module, readers: list[tuple[Tap, Callable[[Tensor], None]]]) -> Iterator[None]:
    handles = []
    for tap, store in readers:
        module = model.get_submodule(tap.module)
        if tap.side == "output":
            handles.append(module.register_forward_hook(lambda _, __, output, store=store: store(output)))
        elif tap.side == "input":
            handles.append(module.register_forward_pre_hook(lambda _, args, store=store: store(args[0])))
        else:
            hook = _projection_hook(PROJECTIONS.index(tap.side), store)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _projection_hook(number: int, store: Callable[[Tensor], None]) -> Callable[..., None]:
    """Recomputes one of the three projections inside an `nn.MultiheadAttention`."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        assert isinstance(module, nn.MultiheadAttention)
        assert module.in_proj_weight is not None
        x = args[number] if number < len(args) else kwargs[PROJECTIONS[number]]
        weight, bias = module.in_proj_weight.chunk(3)[number], module.in_proj_bias
        store(F.linear(x, weight, None if bias is None else bias.chunk(3)[number]))

    return hook
