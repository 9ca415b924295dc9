"""What an objective is; the trainer knows nothing of images, labels, captions or teachers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_tsc.activations import Batch

Forward = Callable[..., object]


class Objective(Protocol):
    """A training loss, clean model inputs, and the measures of a point.

    `score_name` names the fraction that `evaluate` reports as `score`: what `max_accuracy_drop` is about. `head` is
    what is trained beside the model and not saved with it, or None.
    """

    score_name: str
    head: nn.Module | None

    def loss(self, forward: Forward, batch: Batch, *, seed: int) -> Tensor:
        """Mean loss of one training batch; all randomness is a function of `seed`."""

    def model_inputs(self, batch: Batch) -> Batch:
        """The batch as the model takes it, without augmentation."""

    def evaluate(self, forward: Forward, batches: Iterable[Batch]) -> dict[str, float]:
        """`loss` (mean, nats) and `score` (a fraction) on clean data."""


def across_processes(tensor: Tensor) -> Tensor:
    """(n, ...) of this process -> (processes · n, ...) of all of them, in the order of their ranks.

    The gradient reaches this process' own rows alone; see `loss_of_all`.
    """
    if not _distributed():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, tensor.detach().contiguous())
    parts[torch.distributed.get_rank()] = tensor
    return torch.cat(parts)


def loss_of_all(loss: Tensor) -> Tensor:
    """A loss that every process has computed from the rows of all, ready for an average of gradients.

    Each process has the gradient with respect to its own rows. The gradient of the whole is their sum; distributed
    training averages, which takes a factor of the number of processes. The value stays.
    """
    if not _distributed():
        return loss
    return loss.detach() + torch.distributed.get_world_size() * (loss - loss.detach())


def counted_once(value: Tensor) -> Tensor:
    """A value that every process computes alike from the parameters themselves, for use in a `loss_of_all`.

    There each process' gradient is taken for a part of the whole.
    """
    if not _distributed():
        return value
    return value.detach() + (value - value.detach()) / torch.distributed.get_world_size()


def _distributed() -> bool:
    available: Any = torch.distributed.is_available() and torch.distributed.is_initialized()
    return bool(available) and torch.distributed.get_world_size() > 1
