"""Tensors that `fully_shard` (FSDP2) has divided among the processes: gathering them, and writing to them in place.

A tensor that is not sharded is passed through.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered where it is sharded; then every process has to call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def write(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded: each process takes its part of its own copy.

    Args:
        target: is written to, in place.
        value: of as many elements, not sharded, and the same in all processes.
    """
    value = value.view(target.shape)
    if isinstance(target, DTensor):
        value = distribute_tensor(
            value.to(target.device, target.dtype), target.device_mesh, target.placements, src_data_rank=None
        )
    target.copy_(value)
